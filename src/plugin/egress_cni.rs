//! The `egress-cni` plugin, `egress-v4-cni` until v1.13: the second of the chain (`spec/egress.md`).
//!
//! The node's address is told by the configuration, the pod's is taken from `host_local`; `plan::egress` says what the
//! kernel must hold, `apply` makes it so, and the daemon's rules translate. No rule is made here and no tool executed. DEL
//! never fails, because `aws-cni` has its turn only after this plugin's success.

use super::aws_cni::note;
use super::host_local::{Lease, Owner, Store};
use super::{Plugin, Request, delegate};
use crate::apply::Host;
use crate::error::{Context, Error, List, Result};
use crate::logging::{self, Stdout};
use crate::model::cni::{CniError, EgressConfig, HOST_LOCAL, Interface, IpConfig, Output, code};
use crate::model::net::{Family, TABLE_MAIN};
use crate::netlink::netns::Namespace;
use crate::netlink::{Socket, route};
use crate::plan::egress::{self, Egress, Removal};
use crate::sys;
use ipnet::IpNet;
use std::net::IpAddr;

/// The plugin's entry points.
pub const PLUGIN: Plugin = Plugin {
    about: concat!("egress CNI plugin ", env!("CARGO_PKG_VERSION")),
    add,
    del,
    check: nothing,
    status: nothing,
    gc,
};

/// CHECK and STATUS: success, as the original's; runtimes are told not to call the first.
#[expect(clippy::unnecessary_wraps, reason = "the signature of a verb")]
fn nothing(_: &Request) -> Result<(), CniError> {
    Ok(())
}

fn owner(request: &Request) -> Owner<'_> {
    Owner { container: &request.container_id, ifname: &request.ifname }
}

fn invalid(text: String) -> CniError {
    CniError::new(code::INVALID_CONFIG, text)
}

fn add(request: &Request) -> Result<Output, CniError> {
    let parsed = |reason: String| invalid(format!("failed to parse config: {reason}"));
    let mut config = EgressConfig::from_envelope(&request.envelope).map_err(parsed)?;
    logging::init(&config.log_file, &config.log_level, Stdout::Reserved);
    log::debug!(
        "add container {:?} netns {:?} stdin {}",
        request.container_id,
        request.netns,
        String::from_utf8_lossy(&request.stdin)
    );
    let previous = std::mem::replace(&mut config.prev_result, Ok(None)).map_err(parsed)?;
    let mut output = previous.ok_or_else(|| invalid("must be called as a chained plugin".to_owned()))?;
    if !config.enabled {
        return Ok(output);
    }
    let mtu = config.mtu.clone().map_err(invalid)?;
    let family = egress::family(config.node_ip).map_err(|error| invalid(error.to_string()))?;
    let kernel = |error: Error| CniError::new(code::KERNEL, error.to_string());
    let netns =
        Namespace::open(&request.netns).map_err(|error| CniError::new(code::INVALID_NETNS, error.to_string()))?;
    let mut host = Host::open().map_err(kernel)?;
    // Its daemon may be starting or mending its rules.
    host.require_egress_rules(family).map_err(|error| CniError::new(code::TRY_AGAIN, error.to_string()))?;
    let given = reserve(&config, request)
        .map_err(|error| CniError::new(code::TRY_AGAIN, format!("running IPAM plugin failed: {error}")))?;
    match wire(&mut host, &config, &given, mtu, family, request, &netns) {
        Ok((outer, inner)) => {
            log::info!("added {} as {}", request.container_id, given.address);
            output.interfaces.extend([outer, inner]);
            Ok(output)
        }
        Err(error) => {
            // What an earlier ADD was given belongs to a pod that may be alive.
            if given.fresh {
                note("give the address back", release(&config, request));
            }
            Err(kernel(error))
        }
    }
}

/// An address that the pod may have now.
struct Given {
    address: IpNet,
    gateway: Option<IpAddr>,
    fresh: bool,
}

fn reserve(config: &EgressConfig, request: &Request) -> Result<Given> {
    let ipam = &config.ipam;
    if ipam.kind != HOST_LOCAL {
        let stdout = delegate::call(&ipam.kind, "ADD", &request.stdin)?;
        let output = delegate::result(&stdout, request.envelope.version);
        let one = output.and_then(|output| one_of(&output.ips).map(|ip| (ip.address, ip.gateway)));
        if one.is_err() {
            note("give the address back", release(config, request));
        }
        return one.map(|(address, gateway)| Given { address, gateway, fresh: true });
    }
    let range = ipam.range.clone().map_err(Error::new)?;
    let covered = egress::range(Family::of(range.subnet.addr()));
    if !covered.contains(&range.subnet) {
        return Err(Error::new(format!("range {} is not within {covered}, which the daemon translates", range.subnet)));
    }
    let store = Store::new(&ipam.data_dir, &request.envelope.name);
    let mut living = || routed(Family::of(range.subnet.addr()));
    let Lease { address, fresh } =
        store.reserve(&range, &owner(request), &mut living).context("failed to allocate for range 0")?;
    let address = IpNet::new(address, range.subnet.prefix_len())?;
    Ok(Given { address, gateway: Some(range.gateway), fresh })
}

fn one_of(ips: &[IpConfig]) -> Result<&IpConfig> {
    match ips {
        [] => Err(Error::new("IPAM plugin returned zero IPs")),
        [one] => Ok(one),
        more => {
            let count = more.len();
            Err(Error::new(format!("IPAM plugin is expected to return 1 IP address, but returned {count} IPs, ")))
        }
    }
}

/// Addresses that the host has a route of its own to.
fn routed(family: Family) -> Result<Vec<IpAddr>> {
    let routes = route::list(&mut Socket::route()?, family, Some(TABLE_MAIN))?;
    let single = |net: &IpNet| net.prefix_len() == net.max_prefix_len();
    Ok(routes.iter().map(|route| route.dst).filter(single).map(|dst| dst.addr()).collect())
}

fn wire(
    host: &mut Host,
    config: &EgressConfig,
    given: &Given,
    mtu: u32,
    family: Family,
    request: &Request,
    netns: &Namespace,
) -> Result<(Interface, Interface)> {
    let mut random = [0; 16];
    sys::random_bytes(&mut random)?;
    let mut egress = Egress::new(given.address, given.gateway, &request.ifname, mtu, random)?;
    if egress.family != family {
        return Err(Error::new(format!("address {} is not of the family of nodeIP", given.address)));
    }
    egress.routes.clone_from(&config.ipam.routes);
    let name = host.add_egress(&egress, netns)?;
    let outer = Interface { name, mac: egress.host_mac.to_string(), ..Interface::default() };
    let inner = Interface {
        name: egress::interface(family).to_owned(),
        mac: egress.pod_mac.to_string(),
        sandbox: request.netns.clone(),
        ..Interface::default()
    };
    Ok((outer, inner))
}

fn release(config: &EgressConfig, request: &Request) -> Result<()> {
    if config.ipam.kind == HOST_LOCAL {
        Store::new(&config.ipam.data_dir, &request.envelope.name).release(&owner(request))
    } else {
        delegate::call(&config.ipam.kind, "DEL", &request.stdin).map(drop)
    }
}

/// The configuration as far as it can be understood, for what must be done in any case.
fn lenient(request: &Request) -> Option<EgressConfig> {
    let config = EgressConfig::from_envelope(&request.envelope);
    if let Ok(config) = &config {
        logging::init(&config.log_file, &config.log_level, Stdout::Reserved);
    }
    config.map_err(|reason| log::warn!("failed to parse config: {reason}")).ok()
}

/// Takes back addresses of containers that the runtime no longer knows and whose routes have gone with their namespaces, in
/// both families. A listed container keeps its address whatever has happened to its route, and an unlisted one its address
/// while there is a route: a runtime's list may be short, and a living pod must stay connected. Without a list nothing is
/// done, as by the original; `aws-cni` tells that it is missing.
fn gc(request: &Request) -> Result<(), CniError> {
    let config = lenient(request);
    let failed = |reason: String| CniError::new(code::INCOMPLETE, format!("gc cmd: {reason}"));
    let Some(valid) = request.envelope.valid_attachments().map_err(failed)? else { return Ok(()) };
    let (mut errors, mut removals) = (List::new(), Vec::new());
    for family in [Family::V4, Family::V6] {
        let store = Store::new(data_dir(config.as_ref(), family), &request.envelope.name);
        let gone = errors.note(store.collect(family, &valid, &mut || routed(family))).unwrap_or_default();
        // Without the address, which may be somebody else's by now.
        removals.extend(gone.iter().map(|id| Removal::new(family, &request.envelope.name, id, Vec::new())));
    }
    if !removals.is_empty() {
        errors.note(Host::open().and_then(|mut host| host.del_egress(&removals, None)));
    }
    errors.into_result().map_err(|error| failed(error.to_string()))
}

/// Takes away whatever there is, of either family and whatever the configuration says by now: the setting may have been
/// changed since the ADD.
#[expect(clippy::unnecessary_wraps, reason = "the signature of a verb")]
fn del(request: &Request) -> Result<(), CniError> {
    let config = lenient(request);
    let stores = [Family::V4, Family::V6]
        .map(|family| (family, Store::new(data_dir(config.as_ref(), family), &request.envelope.name)));
    let removals = stores.each_ref().map(|(family, store)| {
        let addresses = store.find(&owner(request)).unwrap_or_else(|error| {
            log::warn!("look for the address: {error}");
            Vec::new()
        });
        let addresses = addresses.into_iter().filter(|address| Family::of(*address) == *family).collect();
        Removal::new(*family, &request.envelope.name, &request.container_id, addresses)
    });
    note("remove the pod's egress", clear(request, &removals));
    // Last: nobody else shall have an address that still leads here.
    for (_, store) in &stores {
        note("give the address back", store.release(&owner(request)));
    }
    if let Some(config) = config.filter(|config| !matches!(config.ipam.kind.as_str(), "" | HOST_LOCAL)) {
        note("running IPAM plugin failed", release(&config, request));
    }
    Ok(())
}

/// Where the addresses of a family are: where the configuration says, if it is about that family, or else where the
/// shipped one has them.
fn data_dir(config: Option<&EgressConfig>, family: Family) -> &str {
    let configured = config.map(|config| &config.ipam).filter(|ipam| {
        ipam.kind == HOST_LOCAL && ipam.range.as_ref().is_ok_and(|range| Family::of(range.subnet.addr()) == family)
    });
    configured.map_or_else(|| egress::data_dir(family), |ipam| ipam.data_dir.as_str())
}

fn clear(request: &Request, removals: &[Removal]) -> Result<()> {
    let mut host = Host::open()?;
    // Of a sandbox that is gone there is nothing to enter.
    let netns = (!request.netns.is_empty()).then(|| Namespace::open(&request.netns).ok()).flatten();
    let cleared = host.del_egress(removals, netns.as_ref());
    for removal in removals {
        if host.has_legacy_chain(removal)? {
            let commands = egress::legacy_commands(removal).join("\n  ");
            log::warn!(
                "rules of {} are in iptables-legacy; they go with a reboot, or with\n  {commands}",
                request.container_id
            );
        }
    }
    cleared
}
