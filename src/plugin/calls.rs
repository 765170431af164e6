//! Calls to the daemon and to the network policy agent, each with its deadline (`spec/plugin.md` 8).

use crate::clock;
use crate::model::naming::{DAEMON_SOCKET, POLICY_AGENT_SOCKET};
use crate::model::wire::{
    AddNetworkReply, AddNetworkRequest, DelNetworkReply, DelNetworkRequest, DeleteNpRequest, EnforceNpRequest,
};
use crate::rpc::grpc::{Client, Code, Status};
use crate::rpc::health;
use crate::rpc::proto::{HealthCheckRequest, HealthCheckResponse, NpReply, path};
use std::path::Path;
use std::time::Duration;

/// A unix socket connects at once, or the daemon's queue is full.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Runtimes allow 120 to 240 s for a sandbox; the rest is for the other plugins of the chain.
const ADD_DEADLINE: Duration = Duration::from_mins(1);
const DEL_DEADLINE: Duration = Duration::from_secs(30);
/// Giving an address back after a failed ADD: the runtime's DEL does it again.
const ROLLBACK_DEADLINE: Duration = Duration::from_secs(5);
/// The runtime asks for the status every few seconds and holds up the node's while it waits.
const STATUS_DEADLINE: Duration = Duration::from_millis(500);
const AGENT_DEADLINE: Duration = Duration::from_secs(10);
/// Nothing but the end of a DEL waits for it.
const DELETE_DEADLINE: Duration = Duration::from_secs(5);
/// An agent that is being replaced is back within its connect time-out; between two looks at it:
const AGENT_PAUSE: Duration = Duration::from_millis(50);

/// `Reason` of a DelNetwork for a pod that is gone.
pub const POD_DELETED: &str = "PodDeleted";
/// `Reason` of a DelNetwork that takes back a failed ADD.
pub const SETUP_FAILED: &str = "SetupNSFailed";

/// Asks for the pod's addresses.
pub fn add_network(request: &AddNetworkRequest) -> Result<AddNetworkReply, Status> {
    Client::connect(Path::new(DAEMON_SOCKET), CONNECT_TIMEOUT)?.call(path::ADD_NETWORK, request, ADD_DEADLINE)
}

/// Gives the pod's addresses back; the request's reason decides how long that may take.
pub fn del_network(request: &DelNetworkRequest) -> Result<DelNetworkReply, Status> {
    let deadline = if request.reason == SETUP_FAILED { ROLLBACK_DEADLINE } else { DEL_DEADLINE };
    Client::connect(Path::new(DAEMON_SOCKET), CONNECT_TIMEOUT)?.call(path::DEL_NETWORK, request, deadline)
}

/// Whether the daemon serves.
pub fn check_daemon() -> Result<(), Status> {
    let mut client = Client::connect(Path::new(DAEMON_SOCKET), STATUS_DEADLINE)?;
    let request = HealthCheckRequest { service: String::new() };
    let reply: HealthCheckResponse = client.call(path::HEALTH_CHECK, &request, STATUS_DEADLINE)?;
    if reply.status == health::SERVING {
        Ok(())
    } else {
        Err(Status::new(Code::UNAVAILABLE, format!("the daemon's health is {}", reply.status)))
    }
}

/// Whether the policy agent's socket is there at all.
pub fn has_policy_agent() -> bool {
    Path::new(POLICY_AGENT_SOCKET).exists()
}

/// Tells the policy agent of a new pod, before any of its traffic. `UNAVAILABLE`: it was not told. Anything else may mean
/// that it knows the pod now.
pub fn enforce_policy(request: &EnforceNpRequest) -> Result<(), Status> {
    let until = clock::instant() + CONNECT_TIMEOUT;
    let mut client = loop {
        match connect_agent(until.saturating_duration_since(clock::instant())) {
            Err(_) if clock::instant() + AGENT_PAUSE < until => std::thread::sleep(AGENT_PAUSE),
            Err(status) => return Err(Status::new(Code::UNAVAILABLE, status.message)),
            Ok(client) => break client,
        }
    };
    let reply = client.call::<_, NpReply>(path::ENFORCE_NP_TO_POD, request, AGENT_DEADLINE);
    taken(reply.map_err(|status| match status.code {
        // It has taken the connection, and perhaps the request.
        Code::UNAVAILABLE => Status::new(Code::ABORTED, status.message),
        _ => status,
    }))
}

/// Tells the policy agent that a pod is gone. It is asked only once whether it is there: nobody waits for this.
pub fn delete_policy(request: &DeleteNpRequest) -> Result<(), Status> {
    taken(connect_agent(CONNECT_TIMEOUT)?.call(path::DELETE_POD_NP, request, DELETE_DEADLINE))
}

/// As with the original, whose dial waits for the agent's greeting: one that hangs costs a pod two seconds, not ten.
fn connect_agent(timeout: Duration) -> Result<Client, Status> {
    let mut client = Client::connect(Path::new(POLICY_AGENT_SOCKET), timeout.max(AGENT_PAUSE))?;
    client.greet(timeout.max(AGENT_PAUSE))?;
    Ok(client)
}

fn taken(reply: Result<NpReply, Status>) -> Result<(), Status> {
    if reply?.success { Ok(()) } else { Err(Status::new(Code::UNKNOWN, "the agent reports failure")) }
}
