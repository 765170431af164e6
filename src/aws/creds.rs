//! Credentials: where they come from, and how they are kept fresh (`spec/aws.md` 5).
//!
//! The first source that is configured counts; an error of it does not fall through to the next, since a node that
//! silently works under another role is worse than one that fails. One thread refreshes while the others go on with
//! what lives. No lock is held across I/O.

use super::endpoint;
use super::form;
use super::imds;
use super::pace::{self, Pace};
use super::xml;
use crate::clock;
use crate::error::{Context, Error, Result};
use crate::http::{Agent, Broken, Options, Proxies, Response, Roots};
use crate::model::ec2::throttling;
use crate::model::time::{Now, Wall};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Refreshed when less than this is left to live, plus up to half of it at random.
const AHEAD: Duration = Duration::from_mins(5);
/// Shortest pause after a refresh that failed while the old ones live, and the length of its random part.
const RETRY: Duration = Duration::from_secs(30);
/// Shortest pause while ended credentials of the instance role serve on; up to twice as much is added at random.
const STALE: Duration = Duration::from_mins(5);
/// Attempts at the container endpoint.
const ATTEMPTS: u32 = 3;
/// Limit of one of them.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of an answer or a token file.
const BODY_LIMIT: u64 = 64 * 1024;
/// How long a thread waits for another one's refresh: all attempts of the slowest source.
const WAIT: Duration = Duration::from_mins(1);

/// Keys and how long they live.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Access key id.
    pub access_key: String,
    /// Secret access key.
    pub secret: String,
    /// Session token, with temporary credentials.
    pub token: Option<String>,
    /// When they end; never if absent.
    pub expires: Option<Wall>,
}

/// Secrets are not printed.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("access_key", &self.access_key)
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

/// A source of credentials.
#[derive(Debug)]
enum Source {
    /// `AWS_ACCESS_KEY_ID` and its companions.
    Environment(Credentials),
    /// A service account's token exchanged at STS (IRSA).
    WebIdentity(Box<WebIdentity>),
    /// A local endpoint (EKS Pod Identity, ECS).
    Container(Box<Container>),
    /// The role of the instance, through IMDS.
    InstanceRole,
}

/// Keeps credentials fresh for all threads.
#[derive(Debug)]
pub struct Chain {
    source: Source,
    imds: Arc<imds::Client>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    current: Option<Credentials>,
    /// Refreshed from here on; drawn anew with each set of credentials and after each failure.
    due: Option<Wall>,
    /// AWS refused the current ones.
    rejected: bool,
    refreshing: bool,
}

impl Chain {
    /// The chain that the environment configures. Nothing is fetched yet.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>, imds: Arc<imds::Client>) -> Result<Chain> {
        Chain::at_pace(lookup, imds, Pace::REAL)
    }

    /// As [`Chain::from_env`], with pauses between attempts at another speed.
    pub fn at_pace(lookup: impl Fn(&str) -> Option<String>, imds: Arc<imds::Client>, pace: Pace) -> Result<Chain> {
        let source = configured(&lookup, pace).context("set up credentials")?;
        Ok(Chain { source, imds, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Where the credentials come from, for people.
    pub fn source(&self) -> &'static str {
        match self.source {
            Source::Environment(_) => "environment",
            Source::WebIdentity(_) => "web identity",
            Source::Container(_) => "container endpoint",
            Source::InstanceRole => "instance role",
        }
    }

    /// Credentials to sign with now, refreshed if they are due.
    pub fn get(&self) -> Result<Credentials> {
        let mut state = self.lock();
        loop {
            let now = clock::now();
            match state.decide(now) {
                Decision::Use(credentials) => return Ok(credentials),
                Decision::Refresh => {
                    state.refreshing = true;
                    drop(state);
                    return self.refresh();
                }
                Decision::Wait => {
                    let (back, waited) = self.changed.wait_timeout(state, WAIT).unwrap_or_else(PoisonError::into_inner);
                    if waited.timed_out() {
                        return Err(Error::new("get credentials: another thread's refresh does not end"));
                    }
                    state = back;
                }
            }
        }
    }

    /// AWS refused these credentials (`ExpiredToken` and the like): the next [`Chain::get`] fetches new ones, unless
    /// another thread has already.
    pub fn reject(&self, refused: &Credentials) {
        let mut state = self.lock();
        if state.current.as_ref() == Some(refused) && !matches!(self.source, Source::Environment(_)) {
            state.rejected = true;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fetches with nothing locked, and ends the refresh whatever happens, also a panic in between.
    fn refresh(&self) -> Result<Credentials> {
        struct End<'a>(&'a Chain);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.lock().refreshing = false;
                self.0.changed.notify_all();
            }
        }
        let end = End(self);
        let fetched = self.fetch();
        let outlive = matches!(self.source, Source::InstanceRole);
        let result = self.lock().settle(fetched, outlive, clock::now(), pace::random());
        drop(end);
        result.with_context(|| format!("get credentials from {}", self.source()))
    }

    fn fetch(&self) -> Result<Credentials> {
        match &self.source {
            Source::Environment(credentials) => Ok(credentials.clone()),
            Source::WebIdentity(web) => web.fetch(&self.imds),
            Source::Container(container) => container.fetch(),
            Source::InstanceRole => instance_role(&self.imds),
        }
    }
}

enum Decision {
    Use(Credentials),
    Refresh,
    Wait,
}

impl State {
    fn decide(&self, now: Now) -> Decision {
        let Some(current) = &self.current else {
            return if self.refreshing { Decision::Wait } else { Decision::Refresh };
        };
        let due = self.rejected || self.due.is_some_and(|due| now.wall >= due);
        let dead = self.rejected || current.expires.is_some_and(|end| now.wall >= end);
        match (due, self.refreshing) {
            (true, false) => Decision::Refresh,
            (true, true) if dead => Decision::Wait,
            _ => Decision::Use(current.clone()),
        }
    }

    /// Takes the result of a refresh: new credentials, or the old ones for as long as they may serve.
    fn settle(&mut self, fetched: Result<Credentials>, outlive: bool, now: Now, random: u64) -> Result<Credentials> {
        let within =
            |limit: Duration| Duration::from_millis(random % u64::try_from(limit.as_millis()).unwrap_or(1).max(1));
        match fetched {
            Ok(new) => {
                self.due = new.expires.map(|end| {
                    if outlive && end <= now.wall {
                        // IMDS itself has nothing newer: these serve on, and asking again at once gives the same.
                        return now.wall.plus(STALE + within(STALE * 2));
                    }
                    let ahead = AHEAD + within(AHEAD / 2);
                    // Credentials that live shorter than that are asked for again after half of their life.
                    let half = now.wall.plus((end.since(now.wall) / 2).max(RETRY));
                    before(end, ahead).max(half)
                });
                self.rejected = false;
                self.current = Some(new.clone());
                Ok(new)
            }
            Err(error) => {
                let Some(old) = self.current.clone() else { return Err(error) };
                let lives = old.expires.is_none_or(|end| now.wall < end);
                // AWS may be mistaken in refusing what has not expired; the caller gives up after one repetition anyway.
                self.rejected = false;
                let pause = match (lives, outlive) {
                    (true, _) => RETRY + within(RETRY),
                    (false, true) => STALE + within(STALE * 2),
                    (false, false) => {
                        self.due = Some(now.wall);
                        return Err(error);
                    }
                };
                log::warn!("refresh credentials: {error}; keeping the old ones, next try in {} s", pause.as_secs());
                self.due = Some(now.wall.plus(pause));
                Ok(old)
            }
        }
    }
}

fn before(end: Wall, ahead: Duration) -> Wall {
    Wall::from_unix_nanos(end.as_unix_nanos().saturating_sub(i64::try_from(ahead.as_nanos()).unwrap_or(i64::MAX)))
}

fn configured(lookup: &impl Fn(&str) -> Option<String>, pace: Pace) -> Result<Source> {
    let set = |name: &str| lookup(name).filter(|value| !value.is_empty());
    if let (Some(access_key), Some(secret)) = (set("AWS_ACCESS_KEY_ID"), set("AWS_SECRET_ACCESS_KEY")) {
        let token = set("AWS_SESSION_TOKEN");
        return Ok(Source::Environment(Credentials { access_key, secret, token, expires: None }));
    }
    if let Some(file) = set("AWS_WEB_IDENTITY_TOKEN_FILE") {
        let role = set("AWS_ROLE_ARN")
            .ok_or_else(|| Error::new("AWS_WEB_IDENTITY_TOKEN_FILE is set, but AWS_ROLE_ARN is not"))?;
        return Ok(Source::WebIdentity(Box::new(WebIdentity::new(lookup, role, file.into(), pace))));
    }
    let full = set("AWS_CONTAINER_CREDENTIALS_FULL_URI");
    let relative = || set("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI").map(|path| format!("http://169.254.170.2{path}"));
    if let Some(url) = full.or_else(relative) {
        let token = match set("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE") {
            Some(file) => TokenFrom::File(file.into()),
            None => set("AWS_CONTAINER_AUTHORIZATION_TOKEN").map_or(TokenFrom::Nowhere, TokenFrom::Text),
        };
        return Ok(Source::Container(Box::new(Container::new(lookup, &url, token, pace)?)));
    }
    Ok(Source::InstanceRole)
}

/// The JSON that IMDS and the container endpoint give.
#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Document {
    code: Option<String>,
    message: Option<String>,
    access_key_id: Option<String>,
    secret_access_key: Option<String>,
    token: Option<String>,
    expiration: Option<String>,
}

impl Document {
    fn credentials(text: &str) -> Result<Credentials> {
        let document: Document = serde_json::from_slice(text.as_bytes()).map_err(|error| {
            // The position is told, the text is not: it may hold half a secret.
            Error::new(format!("parse credentials: line {} column {}", error.line(), error.column()))
        })?;
        if let Some(code) = document.code.filter(|code| code != "Success") {
            return Err(Error::new(format!("{code}: {}", document.message.unwrap_or_default())));
        }
        let field = |value: Option<String>, name: &str| {
            value.filter(|value| !value.is_empty()).ok_or_else(|| Error::new(format!("parse credentials: no {name}")))
        };
        Ok(Credentials {
            access_key: field(document.access_key_id, "AccessKeyId")?,
            secret: field(document.secret_access_key, "SecretAccessKey")?,
            token: document.token.filter(|token| !token.is_empty()),
            expires: document.expiration.filter(|text| !text.is_empty()).map(|text| expiration(&text)).transpose()?,
        })
    }
}

fn expiration(text: &str) -> Result<Wall> {
    Wall::parse_rfc3339(text).ok_or_else(|| Error::new(format!("parse credentials: expiration {text:?}")))
}

fn instance_role(imds: &imds::Client) -> Result<Credentials> {
    const PATH: &str = "iam/security-credentials/";
    let roles = imds.get(PATH)?.ok_or_else(|| Error::new("the instance has no role (HTTP 404)"))?;
    let role = roles.lines().map(str::trim).find(|line| !line.is_empty());
    let role = role.ok_or_else(|| Error::new("the instance has no role (empty list)"))?;
    let text = imds.get(&format!("{PATH}{role}"))?;
    let text = text.ok_or_else(|| Error::new(format!("role {role:?} has no credentials (HTTP 404)")))?;
    Document::credentials(&text).with_context(|| format!("role {role:?}"))
}

fn read_token(file: &Path) -> Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(file)
        .and_then(|open| open.take(BODY_LIMIT).read_to_string(&mut text))
        .with_context(|| format!("read token file {}", file.display()))?;
    Ok(text)
}

fn options(proxies: Proxies, roots: Roots, total: Duration) -> Options {
    Options {
        user_agent: format!("enibox/{}", crate::VERSION),
        connect: Duration::from_secs(5),
        response: total,
        total,
        body_limit: BODY_LIMIT,
        idle: 1,
        roots,
        proxies,
    }
}

/// Sends up to `attempts` times; `again` says which answers are worth it.
fn insist(
    pace: Pace,
    attempts: u32,
    send: impl Fn() -> std::result::Result<Response, Broken>,
    again: impl Fn(&Response) -> bool,
) -> Result<Response> {
    let mut attempt = 1;
    loop {
        let retry = match send() {
            Ok(response) if attempt == attempts || !again(&response) => return Ok(response),
            Err(broken) if attempt == attempts || !broken.retry => return Err(broken.into()),
            Ok(response) => format!("HTTP {}", response.status),
            Err(broken) => broken.text,
        };
        log::debug!("get credentials: attempt {attempt}: {retry}");
        pace.sleep(pace::backoff(attempt));
        attempt += 1;
    }
}

enum TokenFrom {
    Nowhere,
    Text(String),
    File(PathBuf),
}

impl fmt::Debug for TokenFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TokenFrom::Nowhere => f.write_str("none"),
            TokenFrom::Text(_) => f.write_str("text"),
            TokenFrom::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// `spec/aws.md` 5.3.
#[derive(Debug)]
struct Container {
    agent: Agent,
    path: String,
    token: TokenFrom,
    pace: Pace,
}

impl Container {
    fn new(lookup: &impl Fn(&str) -> Option<String>, url: &str, token: TokenFrom, pace: Pace) -> Result<Container> {
        let uri: ureq::http::Uri = url.parse().with_context(|| format!("parse container credentials url {url:?}"))?;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        if uri.scheme_str() != Some("https") && !allowed_in_clear(host) {
            return Err(Error::new(format!(
                "container credentials url {url:?}: plain http to {host:?} is not allowed"
            )));
        }
        let authority = uri.authority().map(ureq::http::uri::Authority::as_str).unwrap_or_default();
        let base = format!("{}://{authority}", uri.scheme_str().unwrap_or_default());
        let agent = Agent::new(&base, options(Proxies::from_env(lookup), Roots::from_env(lookup), TIMEOUT))?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        Ok(Container { agent, path, token, pace })
    }

    fn fetch(&self) -> Result<Credentials> {
        let token = match &self.token {
            TokenFrom::Nowhere => None,
            TokenFrom::Text(text) => Some(text.clone()),
            TokenFrom::File(file) => Some(read_token(file)?),
        };
        if token.as_ref().is_some_and(|token| token.contains(['\r', '\n'])) {
            return Err(Error::new("authorization token holds a line break"));
        }
        let mut headers = vec![("accept", "application/json")];
        headers.extend(token.as_deref().map(|token| ("authorization", token)));
        let send = || self.agent.send("GET", &self.path, &headers, &[]);
        let response = insist(self.pace, ATTEMPTS, send, |response| response.status >= 500)?;
        let text = response.text();
        if response.status != 200 {
            let error: serde_json::Value = serde_json::from_slice(text.as_bytes()).unwrap_or_default();
            let told = |name: &str| error.get(name).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
            return Err(Error::new(format!("HTTP {}: {}: {}", response.status, told("code"), told("message"))));
        }
        Document::credentials(&text)
    }
}

/// Hosts that may be asked without TLS: loopback, and the addresses that ECS and EKS answer on.
fn allowed_in_clear(host: &str) -> bool {
    host == "localhost"
        || matches!(host, "169.254.170.2" | "169.254.170.23")
        || host
            .parse::<IpAddr>()
            .is_ok_and(|addr| addr.is_loopback() || addr == IpAddr::from([0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x23]))
}

/// `spec/aws.md` 5.2.
#[derive(Debug)]
struct WebIdentity {
    role: String,
    session: Option<String>,
    file: PathBuf,
    /// What says where STS is, how long and how often it is asked; computed for the region when that is known.
    lookup: Vec<(String, String)>,
    proxies: Proxies,
    roots: Roots,
    pace: Pace,
}

impl WebIdentity {
    fn new(lookup: &impl Fn(&str) -> Option<String>, role: String, file: PathBuf, pace: Pace) -> WebIdentity {
        let names = [
            "AWS_ENDPOINT_URL_STS",
            "AWS_ENDPOINT_URL",
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
            "AWS_USE_DUALSTACK_ENDPOINT",
            "AWS_USE_FIPS_ENDPOINT",
            "AWS_MAX_ATTEMPTS",
            "HTTP_TIMEOUT",
        ];
        WebIdentity {
            role,
            session: lookup("AWS_ROLE_SESSION_NAME").filter(|name| !name.is_empty()),
            file,
            lookup: names.iter().filter_map(|name| lookup(name).map(|value| ((*name).to_owned(), value))).collect(),
            proxies: Proxies::from_env(lookup),
            roots: Roots::from_env(lookup),
            pace,
        }
    }

    fn fetch(&self, imds: &imds::Client) -> Result<Credentials> {
        let lookup = |name: &str| self.lookup.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        let url = endpoint::from_env(&lookup, "sts", None, &imds.region()?);
        let options = options(self.proxies.clone(), self.roots.clone(), endpoint::http_timeout(&lookup));
        let agent = Agent::new(&url, options)?;
        let token = read_token(&self.file)?;
        let session = match &self.session {
            Some(name) => name.clone(),
            None => clock::now().wall.as_unix_nanos().to_string(),
        };
        let body = form::encode([
            ("Action", "AssumeRoleWithWebIdentity"),
            ("Version", "2011-06-15"),
            ("RoleArn", &self.role),
            ("RoleSessionName", &session),
            ("WebIdentityToken", token.trim()),
        ]);
        let headers = [("content-type", "application/x-www-form-urlencoded; charset=utf-8")];
        let send = || agent.send("POST", "/", &headers, body.as_bytes());
        let again = |response: &Response| {
            matches!(response.status, 500 | 502 | 503 | 504)
                || xml::parse_error(&response.text()).is_some_and(|error| {
                    matches!(error.code.as_str(), "InvalidIdentityToken" | "IDPCommunicationError")
                        || throttling(&error.code)
                })
        };
        let response =
            insist(self.pace, endpoint::max_attempts(&lookup), send, again).context("assume role with web identity")?;
        let text = response.text();
        if response.status != 200 {
            let error = xml::parse_error(&text).unwrap_or_default();
            return Err(Error::new(format!(
                "assume role with web identity: {}: {} (HTTP {}, request {})",
                error.code, error.message, response.status, error.request_id
            )));
        }
        let [access_key, secret, token, end] = xml::parse_assumed_role(&text)?;
        Ok(Credentials { access_key, secret, token: Some(token), expires: Some(expiration(&end)?) })
    }
}

#[cfg(test)]
mod tests;
