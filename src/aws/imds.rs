//! The instance metadata service (`spec/aws.md` 4): session tokens, retries, and what the daemon reads from it.
//!
//! IMDS lags behind EC2, so that its answers are hints. The service drops packets above 1024 a second per ENI, which
//! appears as a time-out: hence few GETs over one kept connection. It must never be reached through a proxy, and it
//! must not decide anything about ENIs.

mod memory;

use self::memory::Memory;
use super::endpoint::flag;
use super::pace::Pace;
use crate::clock;
use crate::error::{Context, Error, Result};
use crate::http::{Agent, Broken, Options, Proxies, Response, Roots};
use crate::model::imds::{Answer, Eni, Identity, Query};
use crate::model::net::Mac;
use crate::model::order;
use crate::model::time::Mono;
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Where IMDS is on IPv4.
pub const ENDPOINT_V4: &str = "http://169.254.169.254";
/// Where IMDS is on IPv6.
pub const ENDPOINT_V6: &str = "http://[fd00:ec2::254]";

/// Seconds that a token is asked to live: the longest that is allowed.
const TOKEN_TTL_S: u64 = 21_600;
/// Attempts per operation.
const ATTEMPTS: u32 = 3;
/// Bytes of one answer; the longest, a list of addresses, has under 1 KB.
const BODY_LIMIT: u64 = 256 * 1024;
/// MACs in one listing; no instance has a tenth of it.
const MACS_LIMIT: usize = 1024;

const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";
const TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const IDENTITY_DOCUMENT: &str = "/latest/dynamic/instance-identity/document";
const MACS: &str = "network/interfaces/macs";

/// How IMDS is reached.
#[derive(Clone, Debug)]
pub struct Config {
    /// Absolute URL without a path.
    pub endpoint: String,
    /// No request without a session token, whatever happens to the token's own request.
    pub v1_disabled: bool,
    /// Every call fails at once.
    pub disabled: bool,
    /// Taken as the region if the identity document cannot be read.
    pub region: Option<String>,
    /// Limits.
    pub limits: Limits,
    /// Speed of the pauses.
    pub pace: Pace,
}

/// Time limits (`spec/aws.md` 3 and 4.2).
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connecting.
    pub connect: Duration,
    /// Until the headers of a response are there.
    pub response: Duration,
    /// All attempts of one operation with their pauses.
    pub operation: Duration,
    /// Between two attempts.
    pub pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connect: Duration::from_millis(250),
            response: Duration::from_millis(500),
            operation: Duration::from_secs(5),
            pause: Duration::from_secs(1),
        }
    }
}

impl Config {
    /// The usual limits at another address.
    pub fn at(endpoint: impl Into<String>) -> Config {
        Config {
            endpoint: endpoint.into(),
            v1_disabled: false,
            disabled: false,
            region: None,
            limits: Limits::default(),
            pace: Pace::REAL,
        }
    }

    /// From the variables of `spec/aws.md` 4.1.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Config {
        let set = |name: &str| lookup(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let v6 = set("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE").is_some_and(|mode| mode.eq_ignore_ascii_case("IPv6"));
        let standard = if v6 { ENDPOINT_V6 } else { ENDPOINT_V4 };
        Config {
            v1_disabled: flag(&lookup, "AWS_EC2_METADATA_V1_DISABLED", false),
            disabled: flag(&lookup, "AWS_EC2_METADATA_DISABLED", false),
            region: set("AWS_REGION"),
            ..Config::at(set("AWS_EC2_METADATA_SERVICE_ENDPOINT").unwrap_or_else(|| standard.to_owned()))
        }
    }
}

/// What went wrong with one path. Found again with [`Error::find`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImdsError {
    /// The path that was read.
    pub path: String,
    /// HTTP status of the last answer; 0 without one.
    pub status: u16,
    /// Text for people.
    pub what: String,
}

impl fmt::Display for ImdsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "read imds {}: {}", self.path, self.what)
    }
}

impl std::error::Error for ImdsError {}

/// A client, to be shared by all threads.
pub struct Client {
    config: Config,
    agent: Agent,
    token: Mutex<Token>,
    primary: Mutex<Option<Mac>>,
    memory: Mutex<Memory>,
    observer: Observer,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("config", &self.config).finish_non_exhaustive()
    }
}

/// One read as the metrics count it (`spec/aws.md` 4.4 and 13).
#[derive(Clone, Copy, Debug)]
pub struct Observed<'a> {
    /// The path, as asked for.
    pub path: &'a str,
    /// What went wrong, if anything; a path that is not there is no error here.
    pub error: Option<&'a ImdsError>,
    /// All attempts, with their pauses.
    pub took: Duration,
}

type Observer = Box<dyn Fn(&Observed<'_>) + Send + Sync>;

#[derive(Default)]
struct Token {
    current: Option<Current>,
    /// The service refused to give tokens; it is not asked again until it answers 401.
    v1: bool,
}

#[derive(Clone)]
struct Current {
    value: String,
    renew: Mono,
    expires: Mono,
}

/// How one try ended, if not with a value.
enum Try {
    /// 401: the token is no good.
    Unauthorized,
    /// Worth another try.
    Again(u16, String),
    /// Not worth it.
    Final(u16, String),
}

impl Client {
    /// A client. Nothing is sent yet.
    pub fn new(config: Config) -> Result<Client> {
        let options = Options {
            user_agent: format!("enibox/{}", crate::VERSION),
            connect: config.limits.connect,
            response: config.limits.response,
            total: config.limits.connect + config.limits.response + Duration::from_millis(500),
            body_limit: BODY_LIMIT,
            idle: 1,
            roots: Roots::default(),
            proxies: Proxies::NONE,
        };
        let agent = Agent::new(&config.endpoint, options).context("set up imds client")?;
        let observer: Observer = Box::new(|_| {});
        Ok(Client {
            config,
            agent,
            token: Mutex::default(),
            primary: Mutex::default(),
            memory: Mutex::default(),
            observer,
        })
    }

    /// Tells `observer` of every read from here on.
    #[must_use]
    pub fn observed_by(mut self, observer: impl Fn(&Observed<'_>) + Send + Sync + 'static) -> Client {
        self.observer = Box::new(observer);
        self
    }

    /// Answers with what the run before was told (of [`Client::to_keep`]) while IMDS is silent, until it answers a whole scan.
    #[must_use]
    pub fn remembering(mut self, before: serde_json::Map<String, serde_json::Value>) -> Client {
        self.memory = Mutex::new(Memory::of(before));
        self
    }

    /// What the next run should know, if that has changed since the last call: answers by path, nothing secret.
    pub fn to_keep(&self) -> Option<serde_json::Map<String, serde_json::Value>> {
        self.memory().take_news()
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The URL that is asked.
    pub fn endpoint(&self) -> &str {
        &self.config.endpoint
    }

    /// Reads a path: relative to `/latest/meta-data/`, or absolute if it starts with a slash. `None` if it is not there.
    pub fn get(&self, path: &str) -> Result<Option<String>> {
        self.read(path).map_err(Error::from)
    }

    fn read(&self, path: &str) -> std::result::Result<Option<String>, ImdsError> {
        let start = clock::now().mono;
        if let Some(remembered) = self.memory().while_silent(path, start) {
            return Ok(remembered.as_str().map(str::to_owned));
        }
        let result = self.attempts(path, start);
        let end = clock::now().mono;
        (self.observer)(&Observed { path, error: result.as_ref().err(), took: end.since(start) });
        match &result {
            Ok(told) => self.memory().heard(path, told.as_deref()),
            Err(error) if error.status == 0 || error.status >= 500 => {
                if let Some(remembered) = self.memory().failed(path, end) {
                    log::warn!("{error}; taking what it told before the restart");
                    return Ok(remembered.as_str().map(str::to_owned));
                }
            }
            Err(_) => {}
        }
        result
    }

    fn attempts(&self, path: &str, start: Mono) -> std::result::Result<Option<String>, ImdsError> {
        let fail = |status, what: String| ImdsError { path: path.to_owned(), status, what };
        if self.config.disabled {
            return Err(fail(0, "disabled by AWS_EC2_METADATA_DISABLED".to_owned()));
        }
        // What can be made up for is not waited for.
        let attempts = if self.memory().knows(path) { 1 } else { ATTEMPTS };
        let mut attempt = 1;
        loop {
            let (status, what, pause) = match self.attempt(path) {
                Ok(value) => return Ok(value),
                Err(Try::Final(status, what)) => return Err(fail(status, what)),
                // A new token is fetched at once.
                Err(Try::Unauthorized) => (401, "HTTP 401".to_owned(), Duration::ZERO),
                Err(Try::Again(status, what)) => (status, what, self.config.limits.pause),
            };
            let late = clock::now().mono.since(start) + self.config.pace.scaled(pause) >= self.config.limits.operation;
            if attempt >= attempts || late {
                return Err(fail(status, format!("{what} ({attempt} attempts)")));
            }
            log::debug!("read imds {path}: attempt {attempt}: {what}");
            self.config.pace.sleep(pause);
            attempt += 1;
        }
    }

    fn attempt(&self, path: &str) -> std::result::Result<Option<String>, Try> {
        let token = self.token()?;
        let full = if path.starts_with('/') { path.to_owned() } else { format!("/latest/meta-data/{path}") };
        let header = token.as_deref().map(|token| (TOKEN_HEADER, token));
        let response = self
            .agent
            .send("GET", &full, header.as_slice(), &[])
            .map_err(|broken| if broken.retry { Try::Again(0, broken.text) } else { Try::Final(0, broken.text) })?;
        match response.status {
            200..=299 => Ok(Some(response.text().into_owned())),
            404 => Ok(None),
            401 => {
                let mut state = self.token.lock().unwrap_or_else(PoisonError::into_inner);
                *state = Token::default();
                Err(Try::Unauthorized)
            }
            status @ (500 | 502 | 503 | 504) => Err(Try::Again(status, format!("HTTP {status}"))),
            status => Err(Try::Final(status, format!("HTTP {status}"))),
        }
    }

    /// The token for the next GET; `None` to go without one (`spec/aws.md` 4.1).
    fn token(&self) -> std::result::Result<Option<String>, Try> {
        let now = clock::now().mono;
        let old = {
            let state = self.token.lock().unwrap_or_else(PoisonError::into_inner);
            if state.v1 {
                return Ok(None);
            }
            state.current.clone().filter(|current| now < current.expires)
        };
        if let Some(current) = old.as_ref().filter(|current| now < current.renew) {
            return Ok(Some(current.value.clone()));
        }
        let asked = self.agent.send("PUT", "/latest/api/token", &[(TTL_HEADER, &TOKEN_TTL_S.to_string())], &[]);
        match asked {
            Ok(response) if response.status == 200 => self.keep_token(&response, now).map(Some),
            Ok(response) if response.status == 400 => Err(Try::Final(400, "token refused: HTTP 400".to_owned())),
            Ok(response) if matches!(response.status, 403..=405) => {
                let what = format!("token refused: HTTP {}", response.status);
                if self.config.v1_disabled {
                    return Err(Try::Final(response.status, what));
                }
                // A service that refuses tokens knows none: EC2's own is either there with tokens or refuses everything.
                // Going on costs nothing, because whoever can answer in its place could hand out tokens as well, and an
                // instance that insists on tokens answers 401, upon which one is asked for again. Not going on would keep
                // nodes behind such a service from starting, where the original's start.
                log::warn!(
                    "imds: {what}; going on without tokens (IMDSv1), which AWS_EC2_METADATA_V1_DISABLED=true forbids"
                );
                *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Token { current: None, v1: true };
                Ok(None)
            }
            // A time-out or another answer says nothing about IMDSv2: an old token serves while it lives, and the next
            // call asks again.
            other => match old {
                Some(current) => Ok(Some(current.value)),
                None if self.config.v1_disabled => Err(token_trouble(other)),
                None => Ok(None),
            },
        }
    }

    fn keep_token(&self, response: &Response, now: Mono) -> std::result::Result<String, Try> {
        let value = response.text().trim().to_owned();
        if value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Try::Again(200, "token is no text".to_owned()));
        }
        let granted = response.header(TTL_HEADER).and_then(|ttl| ttl.trim().parse().ok()).unwrap_or(TOKEN_TTL_S);
        let ttl = Duration::from_secs(granted.min(TOKEN_TTL_S));
        let current = Current { value: value.clone(), renew: now.plus(ttl * 4 / 5), expires: now.plus(ttl) };
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Token { current: Some(current), v1: false };
        Ok(value)
    }

    /// A path that must be there and not be empty, trimmed.
    fn scalar(&self, path: &str) -> std::result::Result<String, ImdsError> {
        let fail = |status, what: &str| ImdsError { path: path.to_owned(), status, what: what.to_owned() };
        match self.read(path)? {
            None => Err(fail(404, "not there (HTTP 404)")),
            Some(text) if text.trim().is_empty() => Err(fail(200, "empty")),
            Some(text) => Ok(text.trim().to_owned()),
        }
    }

    fn parsed<T: FromStr>(&self, path: &str) -> std::result::Result<T, ImdsError> {
        let text = self.scalar(path)?;
        text.parse().map_err(|_| unreadable(path, &text))
    }

    /// A list; absent is empty.
    fn list<T: FromStr>(&self, path: &str) -> std::result::Result<Vec<T>, ImdsError> {
        let text = self.read(path)?.unwrap_or_default();
        text.split_whitespace().map(|word| word.parse().map_err(|_| unreadable(path, word))).collect()
    }

    /// The region: the identity document's, else `AWS_REGION`, else `placement/region`.
    pub fn region(&self) -> Result<String> {
        let told = self.region_of_document();
        let Err(error) = told else { return told };
        if let Some(region) = &self.config.region {
            log::warn!("{error}; taking AWS_REGION, {region}");
            return Ok(region.clone());
        }
        self.scalar("placement/region").map_err(|_| error)
    }

    fn region_of_document(&self) -> Result<String> {
        let text = self.scalar(IDENTITY_DOCUMENT)?;
        let document: serde_json::Value =
            serde_json::from_slice(text.as_bytes()).with_context(|| format!("parse imds {IDENTITY_DOCUMENT}"))?;
        let region = document.get("region").and_then(serde_json::Value::as_str).unwrap_or_default();
        if region.is_empty() {
            return Err(unreadable(IDENTITY_DOCUMENT, "no region").into());
        }
        Ok(region.to_owned())
    }

    /// What never changes, in the order of `spec/aws.md` 4.6. `want_v6` also reads the node's IPv6 address.
    pub fn identity(&self, want_v6: bool) -> Result<Identity> {
        let region = self.region()?;
        let zone = self.scalar("placement/availability-zone")?;
        let local_ipv4 = self.parsed("local-ipv4")?;
        let local_ipv6 = match if want_v6 { self.read("ipv6")? } else { None } {
            None => None,
            Some(text) if text.trim().is_empty() => None,
            Some(text) => Some(text.trim().parse().map_err(|_| unreadable("ipv6", &text))?),
        };
        let instance = self.scalar("instance-id")?.into();
        let instance_type = self.scalar("instance-type")?;
        let mac = self.primary_mac()?;
        let of_primary = |field: &str| self.scalar(&format!("{MACS}/{mac}/{field}"));
        Ok(Identity {
            region,
            zone,
            instance,
            instance_type,
            local_ipv4,
            local_ipv6,
            mac,
            primary_eni: of_primary("interface-id")?.into(),
            subnet: of_primary("subnet-id")?.into(),
            vpc: of_primary("vpc-id")?.into(),
        })
    }

    /// Answers a question of the daemon.
    pub fn query(&self, query: &Query) -> Result<Answer> {
        match query {
            Query::Scan => self.scan().map(Answer::Enis).context("scan attached enis"),
            Query::Eni(mac) => self.eni(*mac).map(Answer::Eni).with_context(|| format!("read eni {mac}")),
            Query::VpcCidrs { v6 } => {
                let field = if *v6 { "vpc-ipv6-cidr-blocks" } else { "vpc-ipv4-cidr-blocks" };
                let path = format!("{MACS}/{}/{field}", self.primary_mac()?);
                let cidrs = self.list(&path)?;
                if cidrs.is_empty() && !v6 {
                    return Err(absent(&path));
                }
                Ok(Answer::Cidrs(cidrs))
            }
            Query::SecurityGroups => {
                let path = format!("{MACS}/{}/security-group-ids", self.primary_mac()?);
                let mut groups: Vec<_> = self.scalar(&path)?.split_whitespace().map(Into::into).collect();
                order::sort(&mut groups);
                Ok(Answer::Groups(groups))
            }
        }
    }

    /// The MAC of the primary ENI, which stays for the life of the instance.
    fn primary_mac(&self) -> Result<Mac> {
        let known = *self.primary.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mac) = known {
            return Ok(mac);
        }
        let mac = self.parsed("mac")?;
        *self.primary.lock().unwrap_or_else(PoisonError::into_inner) = Some(mac);
        Ok(mac)
    }

    /// All attached ENIs in the order of the listing. One that goes away while it is read is left out; any other error
    /// fails the scan, since a scan without an ENI that is there would be a wrong answer.
    fn scan(&self) -> Result<Vec<Eni>> {
        self.memory().scanning();
        let listing = self.scalar(MACS)?;
        let mut enis = Vec::new();
        for word in listing.split_whitespace().take(MACS_LIMIT) {
            let mac: Mac = word.trim_end_matches('/').parse().map_err(|_| unreadable(MACS, word))?;
            enis.extend(self.eni(mac).with_context(|| format!("eni {mac}"))?);
        }
        self.memory().scanned(&listing);
        Ok(enis)
    }

    fn eni(&self, mac: Mac) -> Result<Option<Eni>> {
        let Some(listing) = self.read(&format!("{MACS}/{mac}"))? else { return Ok(None) };
        match self.listed_eni(mac, &listing) {
            // A field that must be there is not: the ENI is being attached or detached, which cannot be of the primary one.
            Err(error) if error.find().is_some_and(|e: &ImdsError| e.status == 404) && self.primary_mac()? != mac => {
                log::info!("imds: eni {mac} is left out: {error}");
                Ok(None)
            }
            other => other.map(Some),
        }
    }

    fn listed_eni(&self, mac: Mac, listing: &str) -> Result<Eni> {
        let path = |field: &str| format!("{MACS}/{mac}/{field}");
        let listed = |field: &str| listing.split_whitespace().any(|line| line.trim_end_matches('/') == field);
        let id = self.scalar(&path("interface-id"))?.into();
        let mut device = self.parsed(&path("device-number"))?;
        if device != 0 && self.primary_mac()? == mac {
            log::warn!("imds: primary eni {mac} has device number {device}, taking 0");
            device = 0;
        }
        let card = if listed("network-card") {
            self.read(&path("network-card"))?
                .map_or(Ok(0), |text| text.trim().parse().map_err(|_| unreadable(&path("network-card"), &text)))?
        } else {
            0
        };
        let subnet = self.scalar(&path("subnet-id"))?.into();
        let ipv4s = if listed("local-ipv4s") { self.list(&path("local-ipv4s"))? } else { Vec::new() };
        let ipv6s = if listed("ipv6s") { self.list(&path("ipv6s"))? } else { Vec::new() };
        let subnet_v4 = if ipv4s.is_empty() { None } else { Some(self.parsed(&path("subnet-ipv4-cidr-block"))?) };
        let subnet_v6 = if ipv6s.is_empty() {
            None
        } else {
            self.list(&path("subnet-ipv6-cidr-blocks"))?.first().copied() // several lines: the first
        };
        // Asked for whether listed or not, as the original does: nothing says that a listing names them.
        let prefixes = |field: &str, own: bool| if own { self.list(&path(field)) } else { Ok(Vec::new()) };
        let v4_prefixes = prefixes("ipv4-prefix", !ipv4s.is_empty())?;
        let v6_prefixes = prefixes("ipv6-prefix", !ipv6s.is_empty() || listed("ipv6-prefix"))?;
        Ok(Eni { id, mac, device, card, subnet, subnet_v4, subnet_v6, ipv4s, v4_prefixes, ipv6s, v6_prefixes })
    }
}

fn token_trouble(asked: std::result::Result<Response, Broken>) -> Try {
    match asked {
        Ok(response) => Try::Again(response.status, format!("token refused: HTTP {}", response.status)),
        Err(broken) => Try::Again(0, format!("ask for a token: {broken}")),
    }
}

fn unreadable(path: &str, text: &str) -> ImdsError {
    // A page of a captive portal need not stand in the log in full.
    let start: String = text.chars().take(80).collect();
    ImdsError { path: path.to_owned(), status: 200, what: format!("cannot read {start:?}") }
}

fn absent(path: &str) -> Error {
    ImdsError { path: path.to_owned(), status: 404, what: "not there (HTTP 404)".to_owned() }.into()
}

#[cfg(test)]
mod tests;
