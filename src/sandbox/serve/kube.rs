//! The API server over HTTP: get, list, watch, create and merge patch, with what goes wrong there on demand.

use super::hold;
pub use crate::rpc::http1::Server;

use crate::error::Result;
use crate::model::map::{Map, Set};
use crate::rpc::http1::{Limits, Method, Piece, Request, Response, Verdict};
use crate::sandbox::kube::{Api, Kind, Refusal};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::net::TcpListener;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Requests that are remembered.
const REQUESTS_LIMIT: usize = 10_000;
/// How long one look for changes waits.
const LOOK: Duration = Duration::from_millis(500);
/// A request to a black hole is given up after this at the latest.
const HOLE_LIMIT: Duration = Duration::from_mins(2);

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub struct Knobs {
    /// Tokens that are let in; `None`: everybody.
    pub tokens: Option<Set<String>>,
    /// Requests are taken and never answered.
    pub black_hole: bool,
    /// The next requests are refused: status and `Retry-After` in seconds.
    pub refuse: VecDeque<(u16, Option<u32>)>,
    /// The next lists that name a version are answered 410.
    pub lists_gone: u32,
    /// The next watches end with an ERROR event of this code.
    pub watch_errors: VecDeque<u16>,
    /// Watches begin with a bookmark.
    pub bookmark_first: bool,
}

struct State {
    api: Api,
    knobs: Knobs,
    cuts: u64, // watches that began before the last cut end
    bookmarks: u64,
    requests: Vec<String>,
}

/// A served API server.
pub struct Kube {
    state: Mutex<State>,
    changed: Condvar,
}

impl Kube {
    /// Around a model.
    pub fn new(api: Api) -> Arc<Kube> {
        let state = State { api, knobs: Knobs::default(), cuts: 0, bookmarks: 0, requests: Vec::new() };
        Arc::new(Kube { state: Mutex::new(state), changed: Condvar::new() })
    }

    fn alter<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let result = work(&mut hold(&self.state));
        self.changed.notify_all();
        result
    }

    /// Changes the objects; watches are told.
    pub fn change<T>(&self, work: impl FnOnce(&mut Api) -> T) -> T {
        self.alter(|state| work(&mut state.api))
    }

    /// Changes what goes wrong.
    pub fn tune(&self, work: impl FnOnce(&mut Knobs)) {
        self.alter(|state| work(&mut state.knobs));
    }

    /// Breaks the connections of all watches.
    pub fn cut(&self) {
        self.alter(|state| state.cuts += 1);
    }

    /// Sends every watch a bookmark.
    pub fn bookmark(&self) {
        self.alter(|state| state.bookmarks += 1);
    }

    /// Requests so far: method, path and query.
    pub fn requests(&self) -> Vec<String> {
        hold(&self.state).requests.clone()
    }

    /// Serves it.
    pub fn serve(self: &Arc<Self>, listener: TcpListener) -> Result<Server> {
        let kube = Arc::clone(self);
        let limits = Limits { connections: 256, ..Limits::default() };
        Server::start("kube", listener, limits, Arc::new(move |request: &Request| kube.answer(request)))
    }

    fn answer(self: &Arc<Self>, request: &Request) -> Verdict {
        let mut state = hold(&self.state);
        if state.requests.len() < REQUESTS_LIMIT {
            let mark = if request.query.is_empty() { "" } else { "?" };
            let line = format!("{} {}{mark}{}", request.method.as_str(), request.path, request.query);
            state.requests.push(line);
        }
        if state.knobs.black_hole {
            let blocked = |state: &mut State| state.knobs.black_hole;
            drop(self.changed.wait_timeout_while(state, HOLE_LIMIT, blocked));
            return Verdict::HangUp;
        }
        if let Some((status, after)) = state.knobs.refuse.pop_front() {
            let response = refused(&Refusal(status, "Refused", "as the sandbox was told".into()));
            return match after {
                Some(seconds) => response.with("retry-after", seconds.to_string()).into(),
                None => response.into(),
            };
        }
        let token = request.header("authorization").and_then(|header| header.strip_prefix("Bearer ")).unwrap_or("");
        if state.knobs.tokens.as_ref().is_some_and(|tokens| !tokens.contains(token)) {
            return refused(&Refusal(401, "Unauthorized", "Unauthorized".into())).into();
        }
        if request.path == "/version" {
            return object(200, &json!({"major": "1", "minor": "33"})).into();
        }
        let Some(target) = Target::read(request) else {
            return refused(&Refusal(404, "NotFound", "the server could not find the requested resource".into()))
                .into();
        };
        if request.method == Method::Get && target.name.is_empty() && target.asked("watch") == "true" {
            return self.watch(&mut state, target);
        }
        match act(&mut state, request, &target) {
            Ok(response) => {
                self.changed.notify_all();
                response.into()
            }
            Err(refusal) => refused(&refusal).into(),
        }
    }

    fn watch(self: &Arc<Self>, state: &mut State, target: Target) -> Verdict {
        let version = target.asked("resourceVersion").parse().unwrap_or(0);
        let Target { kind, namespace, selector, .. } = target;
        let mut first = Vec::new();
        if version == 0 {
            for item in state.api.list(kind, &namespace, &selector) {
                first.extend(line("ADDED", &item));
            }
        } else if state.api.since(kind, &namespace, &selector, version).is_none() {
            return refused(&gone()).into();
        }
        if state.knobs.bookmark_first {
            first.extend(bookmark(&state.api));
        }
        let error = state.knobs.watch_errors.pop_front();
        if let Some(code) = error {
            first.extend(line("ERROR", &status(&Refusal(code, "Told", "as the sandbox was told".into()))));
        }
        let mut at = if version == 0 { state.api.version() } else { version };
        let (cuts, mut bookmarks) = (state.cuts, state.bookmarks);
        let (kube, mut over) = (Arc::clone(self), false);
        let pieces = move || {
            if over {
                return Piece::End;
            }
            if !first.is_empty() {
                over = error.is_some();
                return Piece::Bytes(std::mem::take(&mut first));
            }
            let idle =
                |state: &mut State| state.cuts == cuts && state.bookmarks == bookmarks && state.api.version() <= at;
            let waited = kube.changed.wait_timeout_while(hold(&kube.state), LOOK, idle);
            let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if state.cuts != cuts {
                return Piece::Cut;
            }
            let Some(told) = state.api.since(kind, &namespace, &selector, at) else {
                over = true;
                return Piece::Bytes(line("ERROR", &status(&gone())));
            };
            let mut bytes: Vec<u8> = told.into_iter().flat_map(|(what, item)| line(what, item)).collect();
            at = state.api.version();
            if state.bookmarks != bookmarks {
                bookmarks = state.bookmarks;
                bytes.extend(bookmark(&state.api));
            }
            if bytes.is_empty() { Piece::Nothing } else { Piece::Bytes(bytes) }
        };
        Verdict::Stream(Response::new(200, "application/json", ""), Box::new(pieces))
    }
}

// What a path means.
struct Target {
    kind: Kind,
    namespace: String,
    name: String,
    selector: String,
    query: Map<String, String>,
}

impl Target {
    fn read(request: &Request) -> Option<Target> {
        let path = request.path.strip_prefix("/api/").or_else(|| request.path.strip_prefix("/apis/"))?;
        for kind in Kind::ALL {
            let (group_version, _, plural, namespaced) = kind.facts();
            let Some(rest) = path.strip_prefix(group_version).and_then(|rest| rest.strip_prefix('/')) else { continue };
            let (namespace, rest) = match rest.strip_prefix("namespaces/").and_then(|rest| rest.split_once('/')) {
                Some((namespace, rest)) if namespaced => (namespace, rest),
                _ => ("", rest),
            };
            let mut parts = rest.splitn(2, '/');
            if parts.next() != Some(plural) {
                continue;
            }
            let pairs = request.query.split('&').filter_map(|pair| pair.split_once('='));
            let query: Map<String, String> = pairs.map(|(key, value)| (key.to_owned(), decode(value))).collect();
            let selector = query.get("fieldSelector").cloned().unwrap_or_default();
            let name = parts.next().unwrap_or("").to_owned();
            return Some(Target { kind, namespace: namespace.to_owned(), name, selector, query });
        }
        None
    }

    fn asked(&self, name: &str) -> &str {
        self.query.get(name).map_or("", String::as_str)
    }
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        let hex = tail.get(..2).filter(|_| *byte == b'%').and_then(|two| std::str::from_utf8(two).ok());
        match hex.and_then(|two| u8::from_str_radix(two, 16).ok()) {
            Some(plain) => {
                bytes.push(plain);
                rest = &tail[2..];
            }
            None => bytes.push(*byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn act(state: &mut State, request: &Request, target: &Target) -> Result<Response, Refusal> {
    let Target { kind, namespace, name, .. } = target;
    let body = || {
        serde_json::from_slice::<Value>(&request.body).map_err(|error| Refusal(400, "BadRequest", error.to_string()))
    };
    match (request.method, name.as_str()) {
        (Method::Get, "") => list(state, target),
        (Method::Get, name) => match state.api.get(*kind, namespace, name) {
            Some(found) => Ok(object(200, found)),
            None => Err(Refusal(404, "NotFound", format!("{} {name:?} not found", kind.facts().2))),
        },
        (Method::Post, "") => {
            let new = body()?;
            let name = new.pointer("/metadata/name").and_then(Value::as_str).unwrap_or("").to_owned();
            if name.is_empty() || new.pointer("/metadata/namespace").and_then(Value::as_str) != Some(namespace) {
                return Err(Refusal(400, "BadRequest", "name or namespace does not fit".into()));
            }
            if state.api.get(*kind, namespace, &name).is_some() {
                return Err(Refusal(409, "AlreadyExists", format!("{name:?} already exists")));
            }
            state.api.put(*kind, new);
            Ok(object(201, state.api.get(*kind, namespace, &name).unwrap_or(&Value::Null)))
        }
        (Method::Patch, name) if !name.is_empty() => {
            if request.header("content-type") != Some("application/merge-patch+json") {
                return Err(Refusal(415, "UnsupportedMediaType", "only merge patches".into()));
            }
            state.api.patch(*kind, namespace, name, &body()?).map(|patched| object(200, &patched))
        }
        _ => Err(Refusal(405, "MethodNotAllowed", "the server does not allow this method".into())),
    }
}

fn list(state: &mut State, target: &Target) -> Result<Response, Refusal> {
    let Target { kind, namespace, selector, .. } = target;
    let version = target.asked("resourceVersion");
    if !matches!(version, "" | "0") && state.knobs.lists_gone > 0 {
        state.knobs.lists_gone -= 1;
        return Err(gone());
    }
    if version.parse().unwrap_or(0) > state.api.version() {
        return Err(Refusal(504, "Timeout", "Too large resource version".into()));
    }
    let mut items = state.api.list(*kind, namespace, selector);
    for item in items.iter_mut().filter_map(Value::as_object_mut) {
        item.remove("kind");
        item.remove("apiVersion");
    }
    // Pages only of a consistent read, as the server's cache answers everything else whole.
    let from: usize = target.asked("continue").parse().unwrap_or(0);
    let whole = version == "0" || target.asked("limit").is_empty();
    let limit = if whole { items.len() } else { target.asked("limit").parse().unwrap_or(items.len()) };
    let next = if from + limit < items.len() { (from + limit).to_string() } else { String::new() };
    let page: Vec<Value> = items.into_iter().skip(from).take(limit).collect();
    let (group_version, name, ..) = kind.facts();
    let metadata = json!({"resourceVersion": state.api.version().to_string(), "continue": next});
    let kind = format!("{name}List");
    Ok(object(200, &json!({"kind": kind, "apiVersion": group_version, "metadata": metadata, "items": page})))
}

fn gone() -> Refusal {
    Refusal(410, "Expired", "too old resource version".into())
}

fn status(Refusal(code, reason, message): &Refusal) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message})
}

fn object(status: u16, value: &Value) -> Response {
    Response::new(status, "application/json", value.to_string())
}

fn refused(refusal: &Refusal) -> Response {
    object(refusal.0, &status(refusal))
}

fn line(what: &str, value: &Value) -> Vec<u8> {
    format!("{}\n", json!({"type": what, "object": value})).into_bytes()
}

fn bookmark(api: &Api) -> Vec<u8> {
    line("BOOKMARK", &json!({"metadata": {"resourceVersion": api.version().to_string()}}))
}
