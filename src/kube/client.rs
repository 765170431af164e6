//! Requests to the API server: addresses in turn, token, deadlines, repeats (`spec/kubernetes.md` 3, 6.2 and 10).
//!
//! It blocks the calling thread, at most for the deadline of the request. It must not decide what a failure means for the
//! node.

use super::config::{Authority, Config, Token};
use super::events::{self, Writer};
use super::objects;
use super::watch::{self, Watch};
use crate::clock;
use crate::error::{Context, Error, Result};
use crate::http::{Agent, Broken, Options, Proxies, Response, Roots};
use crate::model::kube::{Call, EniConfig, Failure, Pod, Reply};
use crate::model::map::Map;
use crate::model::time::Mono;
use serde_json::{Value, json};
use std::fmt;
use std::io::Read;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A read, all attempts together.
pub const GET_LIMIT: Duration = Duration::from_secs(5);
/// A write, all attempts together.
pub const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// How long [`Call::PodWithBranch`] waits for the annotation.
pub const BRANCH_WAIT: Duration = Duration::from_secs(10);
/// A connection with its TLS; the other address is tried within the deadline of a read.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Bytes of a response; an object has at most 1.5 MiB in the server's store.
const BODY_LIMIT: u64 = 4 << 20;
/// Bytes of a refusal that are read.
const REFUSAL_LIMIT: u64 = 64 << 10;
/// Age from which on the token's file is read again: the library's period of 60 s less its leeway.
const TOKEN_AGE: Duration = Duration::from_secs(50);
/// Bytes of a token or CA file.
const FILE_LIMIT: u64 = 1 << 20;
/// How often one request is repeated because the server asked for it.
const REPEATS: u32 = 10;
/// ENIConfigs remembered for an outage.
const KEPT_LIMIT: usize = 64;

/// Why a request failed, for callers that go on by the kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// Status and text.
    pub failure: Failure,
    /// The server's certificate is not one to trust.
    pub certificate: bool,
}

impl Trouble {
    fn new(status: u16, message: impl Into<String>) -> Trouble {
        Trouble { failure: Failure { status, message: message.into() }, certificate: false }
    }

    /// No time and no second try will mend it: a certificate, or credentials that are refused.
    pub fn is_final(&self) -> bool {
        self.certificate || matches!(self.failure.status, 401 | 403)
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.failure.fmt(f)
    }
}

impl std::error::Error for Trouble {}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Failure {
        trouble.failure
    }
}

struct Ask<'a> {
    method: &'a str,
    path: &'a str,
    content_type: &'a str,
    body: &'a [u8],
    limit: Duration,
    /// The response is to be read bit by bit: for so long, with no longer silence than this.
    stream: Option<(Duration, Duration)>,
}

type Body = Option<ureq::BodyReader<'static>>;

#[derive(Default)]
struct State {
    agents: Map<usize, Arc<Agent>>,
    preferred: usize,
    token: Option<(String, Option<Mono>)>, // and when it was read; `None`: the server did not like it
    kept: Map<String, EniConfig>,
    no_authority: bool, // its file could not be read, which is told once
}

/// A client of the API server. Threads may share it.
pub struct Client {
    config: Config,
    state: Mutex<State>,
    events: SyncSender<crate::model::kube::Notice>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("servers", &self.config.servers).finish_non_exhaustive()
    }
}

impl Client {
    /// A client, and what writes its events, to be run on a thread of its own. Nothing is sent yet.
    pub fn new(config: Config) -> Result<(Client, Writer)> {
        for server in &config.servers {
            // Looks at the URL alone; the real agents are made on first use, when the CA file may have come.
            Agent::new(server, options(Roots::default()))?;
        }
        let (events, queue) = events::queue();
        Ok((Client { config, state: Mutex::default(), events }, Writer::new(queue)))
    }

    /// What it was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whole between statements, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what is asked and waits for the outcome; an event is only put into the queue.
    pub fn execute(&self, call: &Call) -> Result<Reply, Failure> {
        match call {
            Call::Pod { namespace, name } => {
                Ok(Reply::Pod(objects::pod(&self.get(&pod_path(namespace, name)?, GET_LIMIT)?)))
            }
            Call::PodWithBranch { namespace, name } => self.pod_with_branch(namespace, name).map(Reply::Pod),
            Call::Annotate { namespace, name, key, value } => {
                let patch = json!({"metadata": {"annotations": {key.as_str(): value}}});
                self.patch(&pod_path(namespace, name)?, &patch)?;
                Ok(Reply::Done)
            }
            Call::EniConfig(name) => self.eni_config(name).map(Reply::EniConfig),
            Call::CniNode => {
                let object = self.get(&self.cni_node()?, GET_LIMIT)?;
                let version = objects::version(&object).to_owned();
                Ok(Reply::CniNode { version, features: objects::features(&object) })
            }
            Call::SetFeatures { version, features } => {
                self.patch(&self.cni_node()?, &objects::features_patch(version, features))?;
                Ok(Reply::Done)
            }
            Call::Event(notice) => match self.events.try_send(notice.clone()) {
                Ok(()) => Ok(Reply::Done),
                Err(_) => Err(Trouble::new(0, "too many events wait already").into()),
            },
        }
    }

    /// Whether the server is there and lets us in.
    pub fn probe(&self) -> Result<(), Trouble> {
        self.get("/version", GET_LIMIT).map(drop)
    }

    /// The node's own Node object.
    pub fn node(&self, limit: Duration) -> Result<crate::model::kube::Node, Trouble> {
        let path = format!("/api/v1/nodes/{}", segment(&self.config.node)?);
        self.get(&path, limit).map(|object| objects::node(&object))
    }

    fn cni_node(&self) -> Result<String, Trouble> {
        Ok(format!("/apis/vpcresources.k8s.aws/v1alpha1/cninodes/{}", segment(&self.config.node)?))
    }

    // The last good copy serves when the server cannot be asked (`spec/kubernetes.md` 6).
    fn eni_config(&self, name: &str) -> Result<EniConfig, Failure> {
        let path = format!("/apis/crd.k8s.amazonaws.com/v1alpha1/eniconfigs/{}", segment(name)?);
        match self.get(&path, GET_LIMIT) {
            Ok(object) => {
                let config = objects::eni_config(&object);
                let config = config.ok_or_else(|| Trouble::new(422, format!("ENIConfig {name:?} has no subnet")))?;
                let mut state = self.state();
                if state.kept.len() < KEPT_LIMIT || state.kept.contains_key(name) {
                    state.kept.insert(name.to_owned(), config.clone());
                }
                Ok(config)
            }
            Err(trouble) => {
                let mut state = self.state();
                match trouble.failure.status {
                    404 => drop(state.kept.remove(name)),
                    400 | 401 | 403 => {}
                    _ => {
                        if let Some(kept) = state.kept.get(name) {
                            log::warn!("read ENIConfig {name:?}: {trouble}; going on with what it was");
                            return Ok(kept.clone());
                        }
                    }
                }
                Err(trouble.into())
            }
        }
    }

    fn pod_with_branch(&self, namespace: &str, name: &str) -> Result<Pod, Failure> {
        let path = pod_path(namespace, name)?;
        let end = clock::now().mono.plus(BRANCH_WAIT);
        let mut object = self.get(&path, GET_LIMIT)?;
        loop {
            let pod = objects::pod(&object);
            let left = end.since(clock::now().mono);
            if !pod.lacks_branch() || left < Duration::from_secs(1) {
                return Ok(pod);
            }
            match watch::next_version(self, namespace, name, objects::version(&object), left) {
                Ok(Some(next)) => object = next,
                Ok(None) => {} // the end of the time, or of the watch
                Err(trouble) if trouble.failure.status == 404 => return Err(trouble.into()),
                Err(trouble) => {
                    log::debug!("wait for the branch ENI of pod {namespace}/{name}: {trouble}");
                    std::thread::sleep(Duration::from_millis(500));
                    object = self.get(&path, GET_LIMIT)?;
                }
            }
        }
    }

    /// A GET of one object.
    pub(super) fn get(&self, path: &str, limit: Duration) -> Result<Value, Trouble> {
        self.whole(&Ask { method: "GET", path, content_type: "", body: &[], limit, stream: None })
    }

    /// A merge patch (RFC 7396).
    pub(super) fn patch(&self, path: &str, patch: &Value) -> Result<Value, Trouble> {
        self.write("PATCH", "application/merge-patch+json", path, patch)
    }

    /// A POST of a new object.
    pub(super) fn create(&self, path: &str, object: &Value) -> Result<Value, Trouble> {
        self.write("POST", "application/json", path, object)
    }

    fn write(&self, method: &str, content_type: &str, path: &str, body: &Value) -> Result<Value, Trouble> {
        let body = body.to_string();
        self.whole(&Ask { method, path, content_type, body: body.as_bytes(), limit: WRITE_LIMIT, stream: None })
    }

    fn whole(&self, ask: &Ask) -> Result<Value, Trouble> {
        let (response, _) = self.send(ask)?;
        serde_json::from_slice(&response.body)
            .map_err(|error| Trouble::new(response.status, format!("{} {}: {error}", ask.method, ask.path)))
    }

    /// A GET whose body is read while it comes: for so long, and with no longer silence.
    pub(super) fn open(
        &self,
        path: &str,
        total: Duration,
        silence: Duration,
    ) -> Result<ureq::BodyReader<'static>, Trouble> {
        let stream = Some((total, silence));
        let ask = Ask { method: "GET", path, content_type: "", body: &[], limit: GET_LIMIT, stream };
        self.send(&ask)?.1.ok_or_else(|| Trouble::new(0, format!("GET {path}: no body")))
    }

    // Sends until there is an answer that another attempt would not better, or the time is over.
    fn send(&self, ask: &Ask) -> Result<(Response, Body), Trouble> {
        let end = clock::now().mono.plus(ask.limit);
        let (mut turned_away, mut unauthorised, mut repeats) = (1, false, 0);
        loop {
            let left = end.since(clock::now().mono).max(Duration::from_millis(1));
            let (place, agent) = self.agent()?;
            let (response, body) = match self.attempt(&agent, ask, left) {
                Ok(answer) => answer,
                Err(broken) => {
                    self.set_aside(place, &broken);
                    if !broken.sent && turned_away < self.config.servers.len() && end > clock::now().mono {
                        turned_away += 1;
                        continue;
                    }
                    let message = format!("{} {}: {broken}", ask.method, agent.url(ask.path));
                    return Err(Trouble { certificate: broken.certificate, ..Trouble::new(0, message) });
                }
            };
            let asked = response.header("retry-after").and_then(|text| text.parse().ok()).map(Duration::from_secs);
            match (response.status, asked) {
                (200..300, _) => return Ok((response, body)),
                (401, _) if !unauthorised && matches!(self.config.token, Token::File(_)) => {
                    unauthorised = true;
                    if let Some((_, read)) = &mut self.state().token {
                        *read = None;
                    }
                }
                (429 | 500.., Some(pause)) if repeats < REPEATS && clock::now().mono.plus(pause) < end => {
                    repeats += 1;
                    std::thread::sleep(pause.max(Duration::from_millis(10)));
                }
                _ => return Err(refusal(ask, &response, body)),
            }
        }
    }

    fn attempt(&self, agent: &Agent, ask: &Ask, left: Duration) -> std::result::Result<(Response, Body), Broken> {
        let bearer = self.token().map(|token| format!("Bearer {token}"));
        let mut headers = vec![("accept", "application/json")];
        headers.extend(bearer.as_ref().map(|bearer| ("authorization", bearer.as_str())));
        if !ask.content_type.is_empty() {
            headers.push(("content-type", ask.content_type));
        }
        match ask.stream {
            Some((total, silence)) => {
                agent.open(ask.path, &headers, total, silence).map(|(response, body)| (response, Some(body)))
            }
            None => agent.send_within(left, ask.method, ask.path, &headers, ask.body).map(|response| (response, None)),
        }
    }

    fn agent(&self) -> Result<(usize, Arc<Agent>), Trouble> {
        let mut state = self.state();
        let place = state.preferred;
        if let Some(agent) = state.agents.get(&place) {
            return Ok((place, Arc::clone(agent)));
        }
        let server = self.config.servers.get(place).map_or("", String::as_str);
        let agent =
            self.new_agent(server, &mut state.no_authority).map_err(|error| Trouble::new(0, error.to_string()))?;
        let agent = Arc::new(agent);
        state.agents.insert(place, Arc::clone(&agent));
        Ok((place, agent))
    }

    fn new_agent(&self, server: &str, told: &mut bool) -> Result<Agent> {
        let roots = match &self.config.authority {
            Authority::Pem(pem) => Roots::of_pem(pem.clone()),
            Authority::File(file) if server.starts_with("https") => match load(file) {
                Ok(pem) => Roots::of_pem(pem),
                Err(error) => {
                    let level = if *told { log::Level::Debug } else { log::Level::Warn };
                    *told = true;
                    log::log!(level, "read the API server's CA {}: {error}; trusting the system's", file.display());
                    Roots::default()
                }
            },
            Authority::File(_) | Authority::System => Roots::default(),
        };
        Agent::new(server, options(roots))
    }

    // An address that cannot be connected to, or whose certificate is not good: the next is another one. The CA file may be
    // another as well by now.
    fn set_aside(&self, place: usize, broken: &Broken) {
        if broken.sent {
            return;
        }
        let mut state = self.state();
        state.agents.remove(&place);
        if state.preferred == place {
            state.preferred = (place + 1) % self.config.servers.len().max(1);
        }
    }

    // A token that cannot be read again serves on.
    fn token(&self) -> Option<String> {
        let file = match &self.config.token {
            Token::None => return None,
            Token::Fixed(token) => return Some(token.clone()),
            Token::File(file) => file,
        };
        let now = clock::now().mono;
        let mut state = self.state();
        if let Some((token, Some(read))) = &state.token
            && now.since(*read) < TOKEN_AGE
        {
            return Some(token.clone());
        }
        let read = load(file).and_then(|bytes| {
            let token = String::from_utf8(bytes)?.trim().to_owned();
            if token.is_empty() { Err(Error::new("it is empty")) } else { Ok(token) }
        });
        match read {
            Ok(token) => state.token = Some((token, Some(now))),
            Err(error) => log::debug!("read the token {}: {error}", file.display()),
        }
        state.token.as_ref().map(|(token, _)| token.clone())
    }

    /// A watch of one kind.
    pub fn watch(&self, path: &'static str, selector: &str) -> Watch<'_> {
        Watch::new(self, path, selector)
    }
}

fn options(roots: Roots) -> Options {
    Options {
        user_agent: format!("enibox/{}", crate::VERSION),
        connect: CONNECT_LIMIT,
        response: WRITE_LIMIT,
        total: WRITE_LIMIT,
        body_limit: BODY_LIMIT,
        idle: 1,
        roots,
        proxies: Proxies::NONE,
    }
}

fn load(file: &std::path::Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(file)?.take(FILE_LIMIT).read_to_end(&mut bytes).context("read")?;
    Ok(bytes)
}

// What the server says with its status; the body is a Status object, or what something in between made.
fn refusal(ask: &Ask, response: &Response, body: Body) -> Trouble {
    let mut bytes = response.body.clone();
    if let Some(body) = body {
        body.take(REFUSAL_LIMIT).read_to_end(&mut bytes).ok(); // the status says the most of it
    }
    let status: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let said = match objects::text(&status, "/message") {
        "" => String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).trim().to_owned(),
        message => message.to_owned(),
    };
    Trouble::new(response.status, format!("{} {}: {said}", ask.method, ask.path))
}

fn pod_path(namespace: &str, name: &str) -> Result<String, Trouble> {
    Ok(format!("/api/v1/namespaces/{}/pods/{}", segment(namespace)?, segment(name)?))
}

/// A name of Kubernetes as a part of a path. It comes from outside and must not lead elsewhere.
pub(super) fn segment(name: &str) -> Result<&str, Trouble> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if name.is_empty() || name.len() > 253 || name.starts_with('.') || !name.bytes().all(known) {
        return Err(Trouble::new(400, format!("{name:?} is no name of Kubernetes")));
    }
    Ok(name)
}
