//! What plugins, policy agent and probes ask over the socket (`spec/ipamd.md` 10).

use super::metrics::Metrics;
use super::{Calls, End, spawn};
use crate::clock;
use crate::error::{Context, Result};
use crate::model::wire::{AddNetworkRequest, DelNetworkRequest, NetworkPolicyAgentConfig};
use crate::plan::core::{Answer, CallId, Event};
use crate::rpc::grpc::{BindOptions, Call, Code, Server, Status};
use crate::rpc::health;
use crate::rpc::proto::{self, Message};
use crate::rpc::stop::Stop;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

/// A client without a deadline of its own waits so long for the core.
const ANSWER_MAX: Duration = Duration::from_mins(1);

/// The methods that are served here; the policy agent's are its own.
const METHODS: &[&str] = &[
    proto::path::ADD_NETWORK,
    proto::path::DEL_NETWORK,
    proto::path::GET_NETWORK_POLICY_CONFIGS,
    proto::path::HEALTH_CHECK,
];

/// Answered at once, whatever else is going on: probes end the container that keeps them waiting, and the policy agent starts
/// with its question.
const INSTANT: &[&str] = &[proto::path::GET_NETWORK_POLICY_CONFIGS, proto::path::HEALTH_CHECK];

/// An ADD may wait for an address; a DEL brings one.
const SLOW: &[&str] = &[proto::path::ADD_NETWORK];

/// What requests are answered with.
pub(super) struct Desk {
    pub(super) events: SyncSender<Event>,
    pub(super) calls: Calls,
    pub(super) policy: NetworkPolicyAgentConfig,
    pub(super) metrics: Arc<Metrics>,
}

/// Binds the socket and serves on threads of its own; `open` is held until the last request is served.
pub(super) fn start(path: &Path, desk: Desk, stop: Stop, ended: &SyncSender<End>, open: SyncSender<()>) -> Result<()> {
    let server =
        Server::bind(path, BindOptions { methods: METHODS, instant: INSTANT, slow: SLOW, ..BindOptions::default() })?;
    log::info!("serving on {}", path.display());
    let handler = move |call: &Call| handle(call, &desk);
    spawn("rpc", ended, move || {
        let _open = open;
        server.serve(handler, &stop).context("serve")
    })?;
    Ok(())
}

fn handle(call: &Call, desk: &Desk) -> std::result::Result<Vec<u8>, Status> {
    let Desk { events, calls, policy, metrics } = desk;
    match call.method {
        proto::path::ADD_NETWORK => {
            let request = AddNetworkRequest::decode(&call.body)?;
            log::debug!("ADD from process {}: {request:?}", call.peer_pid);
            let asked = clock::now().mono;
            let answer = ask(call, events, calls, |id| Event::Add(id, request));
            let success = matches!(&answer, Ok(Answer::Add(reply)) if reply.success);
            metrics.answered(success, clock::now().mono.since(asked));
            match answer? {
                Answer::Add(reply) => Ok(reply.encode()),
                other => Err(refusal(other)),
            }
        }
        proto::path::DEL_NETWORK => {
            let request = DelNetworkRequest::decode(&call.body)?;
            log::debug!("DEL from process {}: {request:?}", call.peer_pid);
            match ask(call, events, calls, |id| Event::Del(id, request))? {
                Answer::Del(reply) => Ok(reply.encode()),
                other => Err(refusal(other)),
            }
        }
        proto::path::GET_NETWORK_POLICY_CONFIGS => Ok(policy.encode()),
        proto::path::HEALTH_CHECK => health::check_with(&call.body, metrics.pulse.is_good(clock::now().mono)),
        other => Err(Status::new(Code::UNIMPLEMENTED, format!("no such method {other}"))),
    }
}

fn refusal(answer: Answer) -> Status {
    match answer {
        Answer::Error(text) => Status::new(Code::UNKNOWN, text),
        Answer::Add(_) | Answer::Del(_) => Status::new(Code::INTERNAL, "the answer to another request"),
    }
}

// Puts a request before the core and waits for the answer. When the caller's time is up the request is still carried out:
// the runtime's DEL takes the address back, and where none comes the missing veth tells.
fn ask(
    call: &Call,
    events: &SyncSender<Event>,
    calls: &Calls,
    event: impl FnOnce(CallId) -> Event,
) -> std::result::Result<Answer, Status> {
    let (id, answer) = calls.open();
    let patience =
        call.deadline.map_or(ANSWER_MAX, |at| at.saturating_duration_since(clock::instant()).min(ANSWER_MAX));
    if events.try_send(event(id)).is_err() {
        calls.close(id);
        return Err(Status::new(Code::UNAVAILABLE, "too many requests wait already"));
    }
    answer.recv_timeout(patience).map_err(|_| {
        calls.close(id);
        Status::new(Code::DEADLINE_EXCEEDED, "no answer in time")
    })
}
