//! DEL (`spec/plugin.md` 10): best effort, and success whenever nothing is left that a repetition could improve.
//!
//! When the daemon does not answer, the plugin clears the kernel by itself, from the cached result or else from the daemon's
//! checkpoint, and leaves a record in the spool for the daemon to release the address. It never removes anything of an
//! address that the checkpoint gives to another pod.

use super::aws_cni::{self, Context};
use super::{Request, calls, local};
use crate::error::{Error, Result};
use crate::model::cni::{CniError, code};
use crate::model::ids::PodName;
use crate::model::wire::{DelNetworkReply, DeleteNpRequest, IpAllocation, UNKNOWN_POD};
use crate::plan::pod::{Removal, Request as PodRequest};

/// Serves DEL.
pub fn del(request: &Request) -> Result<(), CniError> {
    let context = Context::new(request, "del")?;
    if let Some(removal) = branch_from_cache(&context) {
        return branch_deleted(&context, &removal);
    }
    match calls::del_network(&context.del_request(calls::POD_DELETED)) {
        Ok(reply) if reply.success => released(&context, &reply),
        Ok(_) => Err(CniError::new(code::TRY_AGAIN, "del cmd: failed to process delete request")),
        Err(status) if status.message.contains(UNKNOWN_POD) => {
            log::info!("{}: {UNKNOWN_POD}, nothing to release", context.key);
            aws_cni::note("clear what an earlier DEL left", without_allocation(&context));
            Ok(())
        }
        Err(status) => {
            log::warn!("release the addresses of {}: {status}", context.key);
            aws_cni::note("clear the pod's network without the daemon", without_daemon(&context));
            let record = local::leave_record(&context.key, &context.pod_name(), &context.args.pod_uid);
            aws_cni::note("leave a record for the daemon", record);
            // The runtime may never ask again, and the daemon has the record.
            Ok(())
        }
    }
}

/// A cached result tells of a branch ENI: no address of the daemon's is involved, and the plugin can do all by itself.
fn branch_from_cache(context: &Context) -> Option<Removal> {
    from_cache(context).ok().filter(|removal| removal.branch.is_some())
}

fn branch_deleted(context: &Context, removal: &Removal) -> Result<(), CniError> {
    if context.pod.netns.is_empty() {
        // A repeated DEL for a dead sandbox must not hit a newer pod that uses the VLAN again.
        log::info!("{} has no network namespace any more, nothing to do", context.key);
        return Ok(());
    }
    let text = "del cmd: failed to delete with prevResult: ";
    aws_cni::clear(removal).map_err(|error| CniError::new(code::KERNEL, format!("{text}{error}")))?;
    log::info!("deleted {} with its branch ENI", context.key);
    tell_policy_agent(context);
    Ok(())
}

pub(super) fn tell_policy_agent(context: &Context) {
    if !calls::has_policy_agent() {
        return;
    }
    let request =
        DeleteNpRequest { pod_name: context.args.pod_name.clone(), pod_namespace: context.args.pod_namespace.clone() };
    if let Err(status) = calls::delete_policy(&request) {
        log::warn!("tell the policy agent that {} is gone: {status}", context.key);
    }
}

/// The daemon has taken the addresses back: their rules and routes go.
fn released(context: &Context, reply: &DelNetworkReply) -> Result<(), CniError> {
    if reply.pod_vlan_id != 0 && context.pod.netns.is_empty() {
        // A repeated DEL for a dead sandbox must not hit a newer pod that uses the VLAN again.
        return Ok(());
    }
    let failed =
        |error: Error| CniError::new(code::KERNEL, format!("del cmd: failed on tear down pod network: {error}"));
    let removal = Removal::from_reply(reply, &context.pod).map_err(failed)?;
    if removal.addresses.is_empty() {
        log::warn!("{} had no address", context.key);
    }
    aws_cni::clear(&removal).map_err(failed)?;
    log::info!("deleted {}", context.key);
    if !reply.network_policy_mode.is_empty() {
        tell_policy_agent(context);
    }
    Ok(())
}

/// What the cached result says is to be removed.
fn from_cache(context: &Context) -> Result<Removal> {
    match &context.config.prev_result {
        Ok(Some(output)) => Removal::from_previous(output, &context.pod),
        Ok(None) => Err(Error::new("there is no previous result")),
        Err(reason) => Err(Error::new(reason.clone())),
    }
}

/// The daemon knows no allocation. An earlier DEL may have failed after the release; what it left is cleared, but only when
/// the checkpoint proves that nobody else has the address by now.
fn without_allocation(context: &Context) -> Result<()> {
    let Ok(mut removal) = from_cache(context) else { return Ok(()) };
    let Some(allocations) = local::Allocations::load()? else { return Ok(()) };
    allocations.spare_others(&mut removal, &context.key);
    aws_cni::clear(&removal)
}

fn without_daemon(context: &Context) -> Result<()> {
    let allocations = local::Allocations::load().unwrap_or_else(|error| {
        log::warn!("{error}");
        None
    });
    let mut removal = match (from_cache(context), &allocations) {
        (Ok(removal), _) => removal,
        (Err(reason), Some(allocations)) => {
            log::info!("{reason}; use the checkpoint");
            from_checkpoint(context, allocations)?
        }
        (Err(reason), None) => return Err(reason),
    };
    if let Some(allocations) = &allocations {
        allocations.spare_others(&mut removal, &context.key);
    }
    aws_cni::clear(&removal)
}

/// What the checkpoint says is to be removed. It does not hold the route table: rules to any table go.
fn from_checkpoint(context: &Context, allocations: &local::Allocations) -> Result<Removal> {
    let mut request = context.pod.clone();
    let mut reply = DelNetworkReply::default();
    for allocation in allocations.of(&context.key) {
        if let Some(address) = allocation.address() {
            reply.allocations.push(any_table(address));
        }
        let known =
            PodName { namespace: allocation.metadata.namespace.clone(), name: allocation.metadata.name.clone() };
        name_if_unknown(&mut request, &known);
    }
    Removal::from_reply(&reply, &request)
}

/// An allocation as the daemon would report it, were it there.
pub(super) fn any_table(address: std::net::IpAddr) -> IpAllocation {
    let (ipv4, ipv6) =
        if address.is_ipv4() { (address.to_string(), String::new()) } else { (String::new(), address.to_string()) };
    IpAllocation { ipv4, ipv6, device_number: 0, route_table_id: 0 }
}

/// Runtimes other than those of Kubernetes do not tell the pod's name in `CNI_ARGS`.
fn name_if_unknown(request: &mut PodRequest, known: &PodName) {
    if request.name.is_empty() {
        request.namespace.clone_from(&known.namespace);
        request.name.clone_from(&known.name);
    }
}
