//! The `aws-cni` plugin: ADD, CHECK and STATUS (`spec/plugin.md` 9, 12); DEL and GC have files of their own.
//!
//! The daemon decides addresses, `plan::pod` what the kernel must hold, `apply` makes it so. What happens here is the order
//! of these steps, what is taken back when one fails, and how failures are told.

use super::{Plugin, Request, calls, collect, local, teardown};
use crate::apply::Host;
use crate::error::{Error, Result};
use crate::logging::{self, Stdout};
use crate::model::cni::{Args, CniError, Config, Interface, IpConfig, Output, code};
use crate::model::ids::{PodKey, PodName};
use crate::model::naming;
use crate::model::wire::{AddNetworkReply, AddNetworkRequest, DelNetworkRequest, EnforceNpRequest, IpAllocation};
use crate::netlink::netns::Namespace;
use crate::plan::pod::{self, Pod, PodInterface, Removal, RemovedAddress};
use crate::rpc::grpc::{Code, Status};
use crate::{VERSION, clock, sys};
use std::fs;
use std::time::Duration;

/// The plugin's entry points.
pub const PLUGIN: Plugin = Plugin {
    about: concat!("AWS CNI ", env!("CARGO_PKG_VERSION")),
    add,
    del: teardown::del,
    check,
    status,
    gc: collect::gc,
};

/// So long a daemon that was told to stop counts as about to start again: pulling an image takes its time.
const RESTART_MAX: Duration = Duration::from_mins(2);
/// A network without policies may run without an agent; every other mode needs it.
const MODE_WITHOUT_POLICIES: &str = "none";

/// A call with its configuration and arguments understood.
pub(super) struct Context {
    pub config: Config,
    pub args: Args,
    pub key: PodKey,
    pub pod: pod::Request,
}

impl Context {
    /// Reads configuration and arguments and starts the log. `verb` is `add`, `del` or `check`.
    pub fn new(request: &Request, verb: &str) -> Result<Context, CniError> {
        let config = load_config(request, verb)?;
        log::debug!(
            "{verb} container {:?} netns {:?} ifname {:?} args {:?} stdin {}",
            request.container_id,
            request.netns,
            request.ifname,
            request.args,
            String::from_utf8_lossy(&request.stdin)
        );
        let args = Args::parse(&request.args).map_err(|reason| {
            let arg = if verb == "add" { "arg" } else { "args" };
            CniError::new(code::BAD_ENVIRONMENT, format!("{verb} cmd: failed to load k8s config from {arg}: {reason}"))
        })?;
        let key = PodKey {
            network: request.envelope.name.clone(),
            container: request.container_id.clone(),
            ifname: request.ifname.clone(),
        };
        let pod = pod::Request {
            namespace: args.pod_namespace.clone(),
            name: args.pod_name.clone(),
            netns: request.netns.clone(),
            ifname: request.ifname.clone(),
            veth_prefix: config.veth_prefix.clone(),
            mtu: config.mtu,
            enforcing_mode: config.enforcing_mode,
        };
        Ok(Context { config, args, key, pod })
    }

    /// The pod by name.
    pub fn pod_name(&self) -> PodName {
        PodName { namespace: self.args.pod_namespace.clone(), name: self.args.pod_name.clone() }
    }

    /// The request that gives the addresses back.
    pub fn del_request(&self, reason: &str) -> DelNetworkRequest {
        DelNetworkRequest {
            pod_name: self.args.pod_name.clone(),
            pod_namespace: self.args.pod_namespace.clone(),
            infra_container_id: self.args.infra_container_id.clone(),
            reason: reason.to_owned(),
            if_name: self.key.ifname.clone(),
            network_name: self.key.network.clone(),
            container_id: self.key.container.clone(),
            client_version: VERSION.to_owned(),
            // Asked for only to tell a pod from its successor of the same name, which a roll-back cannot confuse.
            pod_uid: if reason == calls::SETUP_FAILED { String::new() } else { self.args.pod_uid.clone() },
        }
    }

    /// The cached result, which must be understood if it is there.
    fn strict_previous(&self, verb: &str) -> Result<Option<&Output>, CniError> {
        self.config.prev_result.as_ref().map(Option::as_ref).map_err(|reason| bad_config(verb, reason))
    }
}

/// Reads our part of the configuration and starts the log that it asks for.
pub(super) fn load_config(request: &Request, verb: &str) -> Result<Config, CniError> {
    let config = Config::from_envelope(&request.envelope).map_err(|reason| bad_config(verb, &reason))?;
    logging::init(&config.log_file, &config.log_level, Stdout::Reserved);
    Ok(config)
}

fn bad_config(verb: &str, reason: &str) -> CniError {
    CniError::new(code::INVALID_CONFIG, format!("{verb} cmd: error loading config from args: {reason}"))
}

fn add(request: &Request) -> Result<Output, CniError> {
    let context = Context::new(request, "add")?;
    let earlier = context.strict_previous("add")?.cloned();
    // Before an address is taken for a pod that is gone.
    let netns = open_netns(request)?;
    // A DEL of this very key that still lies in the spool must not take the new address away.
    local::forget_record(&context.key);
    let reply = ask_for_addresses(&context)?;
    let pod = Pod::from_reply(&reply, &context.pod, random_mac).map_err(|error| {
        release(&context);
        CniError::new(code::BAD_REPLY, format!("add command: failed to setup network: {error}"))
    })?;
    Host::open().and_then(|mut host| host.add_pod(&pod, &netns)).map_err(|error| {
        release(&context);
        CniError::new(code::KERNEL, format!("add command: failed to setup network: SetupPodNetwork: {error}"))
    })?;
    if let Err(status) = enforce_policy(&context, &reply) {
        note("take back the pod's network", take_down(&pod));
        release(&context);
        if status.code != Code::UNAVAILABLE {
            // It may have the pod's name by now, and the runtime's DEL will find no allocation any more and say nothing.
            teardown::tell_policy_agent(&context);
        }
        let error = CniError::new(code::POLICY_AGENT, "add cmd: failed to setup network policy");
        return Err(error.with_details(status.to_string()));
    }
    let mut output = result(&context, &pod, &reply.allocations);
    output.append(earlier.unwrap_or_default());
    log::info!("added {} as {}", context.key, addresses(&pod));
    Ok(output)
}

fn ask_for_addresses(context: &Context) -> Result<AddNetworkReply, CniError> {
    let request = AddNetworkRequest {
        pod_name: context.args.pod_name.clone(),
        pod_namespace: context.args.pod_namespace.clone(),
        infra_container_id: context.args.infra_container_id.clone(),
        netns: context.pod.netns.clone(),
        if_name: context.key.ifname.clone(),
        network_name: context.key.network.clone(),
        container_id: context.key.container.clone(),
        client_version: VERSION.to_owned(),
        requires_multi_nic: context.config.wants_multi_nic(),
    };
    let reply = calls::add_network(&request).map_err(|status| {
        CniError::new(code_of(&status), format!("add cmd: Error received from AddNetwork gRPC call: {status}"))
    })?;
    if reply.success {
        return Ok(reply);
    }
    let error = CniError::new(code::TRY_AGAIN, "add cmd: failed to assign an IP address to container");
    Err(if reply.failure.is_empty() { error } else { error.with_details(reply.failure) })
}

/// Everything that time can heal asks for another try: the daemon starts, waits for EC2 or is being replaced by one of
/// another version. What remains are answers that no daemon of this protocol gives.
fn code_of(status: &Status) -> u32 {
    match status.code {
        Code::UNIMPLEMENTED | Code::INVALID_ARGUMENT | Code::INTERNAL | Code::DATA_LOSS => code::BAD_REPLY,
        _ => code::TRY_AGAIN,
    }
}

fn random_mac() -> Result<[u8; 6]> {
    let mut bytes = [0; 6];
    sys::random_bytes(&mut bytes)?;
    Ok(bytes)
}

fn open_netns(request: &Request) -> Result<Namespace, CniError> {
    Namespace::open(&request.netns).map_err(|error| CniError::new(code::INVALID_NETNS, error.to_string()))
}

/// Removes what an ADD has made, for failures after it.
fn take_down(pod: &Pod) -> Result<()> {
    let interfaces = pod.interfaces.iter();
    let removal = Removal {
        addresses: interfaces.clone().map(|i| RemovedAddress { address: i.address, table: i.table }).collect(),
        veths: interfaces.clone().map(|i| (i.host_veth.clone(), i.ifname.clone())).collect(),
        branch: interfaces.clone().find_map(PodInterface::removed_branch),
    };
    let namespace = Namespace::open(&pod.netns)?;
    Host::open()?.del_pod(&removal, Some(&namespace))
}

/// Removes what the host holds of a deleted pod. Its veth goes with its namespace, which the runtime removes next: deleting
/// it here would wait some 15 ms for the kernel, under a lock that all pods of the node share (`spec/plugin.md` 10).
pub(super) fn clear(removal: &Removal) -> Result<()> {
    Host::open()?.del_pod(removal, None)
}

/// Gives the addresses of a failed ADD back. The runtime's DEL would do it too, but runtimes have been seen not to call it.
fn release(context: &Context) {
    if let Err(status) = calls::del_network(&context.del_request(calls::SETUP_FAILED)) {
        log::error!("release the addresses of {}: {status}", context.key);
    }
}

fn enforce_policy(context: &Context, reply: &AddNetworkReply) -> Result<(), Status> {
    let mode = reply.network_policy_mode.as_str(); // as it was written, in any case of letters
    let needless = mode.eq_ignore_ascii_case(MODE_WITHOUT_POLICIES);
    if mode.is_empty() || (needless && !calls::has_policy_agent()) {
        return Ok(());
    }
    let result = calls::enforce_policy(&EnforceNpRequest {
        pod_name: context.args.pod_name.clone(),
        pod_namespace: context.args.pod_namespace.clone(),
        network_policy_mode: mode.to_owned(),
        interface_count: i32::try_from(reply.allocations.len()).unwrap_or(i32::MAX),
    });
    match result {
        Err(status) if needless && status.code == Code::UNAVAILABLE => {
            log::warn!("the policy agent is not there, which the mode {mode:?} allows: {status}");
            Ok(())
        }
        result => result,
    }
}

fn addresses(pod: &Pod) -> String {
    pod.interfaces.iter().map(|interface| interface.address.to_string()).collect::<Vec<_>>().join(", ")
}

/// The result: a pair of entries per interface, then an entry that stands for no device. `mac` and `sandbox` carry what DEL
/// needs when the daemon does not answer; runtimes keep them on disk, so neither may change (`spec/plugin.md` 12).
fn result(context: &Context, pod: &Pod, allocations: &[IpAllocation]) -> Output {
    let mut output = Output::default();
    for (interface, allocation) in pod.interfaces.iter().zip(allocations) {
        output.interfaces.push(Interface { name: interface.host_veth.clone(), ..Interface::default() });
        output.ips.push(IpConfig {
            interface: i64::try_from(output.interfaces.len()).ok(),
            address: interface.host_net(),
            gateway: interface.branch.map(|branch| branch.eni.gateway),
        });
        output.interfaces.push(Interface {
            name: interface.ifname.clone(),
            mac: allocation.route_table_id.to_string(),
            sandbox: pod.netns.clone(),
            ..Interface::default()
        });
    }
    let vlan = pod.interfaces.iter().find_map(|interface| interface.branch).map_or(0, |branch| branch.eni.vlan);
    let device = allocations.first().filter(|_| vlan == 0).map(|first| first.device_number.to_string());
    output.interfaces.push(Interface {
        name: naming::dummy(&context.pod.namespace, &context.pod.name),
        mac: vlan.to_string(), // 0: no branch ENI
        sandbox: device.unwrap_or_default(),
        ..Interface::default()
    });
    output
}

/// Compares what ADD made with what is there.
fn check(request: &Request) -> Result<(), CniError> {
    let context = Context::new(request, "check")?;
    let Some(output) = context.strict_previous("check")? else {
        return Err(CniError::new(code::INVALID_CONFIG, "check cmd: required prevResult missing"));
    };
    let pod = Pod::from_previous(output, &context.pod)
        .map_err(|error| CniError::new(code::INVALID_CONFIG, format!("check cmd: {error}")))?;
    let netns = open_netns(request)?;
    let mut lines = Host::open()
        .and_then(|mut host| host.check_pod(&pod, &netns))
        .map_err(|error| CniError::new(code::KERNEL, format!("check cmd: {error}")))?;
    match local::Allocations::load() {
        Ok(Some(allocations)) => lines.extend(missing_allocations(&allocations, &pod, &context.key)),
        Ok(None) => log::debug!("no checkpoint to compare with"),
        Err(error) => log::warn!("{error}"),
    }
    if lines.is_empty() {
        return Ok(());
    }
    Err(CniError::new(code::DIFFERS, "check cmd: the pod's network is not as it was made")
        .with_details(lines.join("; ")))
}

fn missing_allocations(allocations: &local::Allocations, pod: &Pod, key: &PodKey) -> Vec<String> {
    let known: Vec<_> = allocations.of(key).filter_map(crate::model::checkpoint::Allocation::address).collect();
    // Addresses of branch ENIs are not the daemon's to give.
    let given = pod.interfaces.iter().filter(|interface| interface.branch.is_none());
    let missing = given.map(|interface| interface.address).filter(|address| !known.contains(address));
    missing.map(|address| format!("the daemon has not given {address} to {key}")).collect()
}

/// Whether an ADD would find somebody to serve it.
fn status(request: &Request) -> Result<(), CniError> {
    load_config(request, "status")?;
    calls::check_daemon().or_else(|status| {
        if stopped_lately() {
            log::info!("the daemon was stopped and has not come back yet: {status}");
            return Ok(());
        }
        Err(CniError::new(code::NOT_AVAILABLE, "status cmd: the daemon does not serve")
            .with_details(status.to_string()))
    })
}

// A failing STATUS makes the node NotReady and takes its pods out of their Services, all of which work while the daemon is
// replaced by its next version. An ADD that comes meanwhile is tried again.
fn stopped_lately() -> bool {
    let stopped = fs::metadata(naming::DAEMON_STOPPED).and_then(|file| file.modified());
    let ago = stopped.ok().and_then(|at| clock::system_time().duration_since(at).ok());
    ago.is_some_and(|ago| ago < RESTART_MAX)
}

/// A failure of the kernel or of the daemon as text, for the log.
pub(super) fn note(what: &str, result: Result<(), Error>) {
    if let Err(error) = result {
        log::warn!("{what}: {error}");
    }
}
