//! The EC2 Query API (`spec/aws.md` 6 and 7): one call in, one reply or failure out.
//!
//! Paging, retries after broken connections and internal errors, the repetition after a refused signature and the
//! measured clock skew are in here, in one place. A call that is not idempotent is never sent twice once it may have been
//! carried out: the failure says so, and the caller describes the ENI before it asks again. What to call and when is the
//! planner's business, and so is the pace: a throttled call fails at once.

use super::creds::{Chain, Credentials};
use super::endpoint;
pub use super::form::{encode, form};
use super::pace::{self, Pace};
use super::{sign, xml};
use crate::clock;
use crate::error::{Context, Result};
use crate::http::{Agent, Broken, Options, Proxies, Response, Roots};
use crate::model::ec2::{Call, Failure, Reply, throttling};
use crate::model::time::Wall;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Pages of one answer; 100,000 ENIs.
const PAGES: usize = 100;
/// Tokens that retries are paid from, for all calls of the client together (`spec/aws.md` 6.4).
const QUOTA: u32 = 500;
/// Price of a retry.
const RETRY_COST: u32 = 5;
/// Price of a retry after a time-out.
const TIMEOUT_COST: u32 = 10;
/// A `Date` header that differs more than this from our clock explains a refused signature.
const SKEW: Duration = Duration::from_mins(4);

/// How EC2 is reached.
#[derive(Clone, Debug)]
pub struct Config {
    /// Absolute URL.
    pub endpoint: String,
    /// Region to sign for.
    pub region: String,
    /// `User-Agent`.
    pub user_agent: String,
    /// Limit of one HTTP attempt, body included.
    pub http_timeout: Duration,
    /// Attempts per call, the first included.
    pub max_attempts: u32,
    /// Where the trusted roots are.
    pub roots: Roots,
    /// Proxies.
    pub proxies: Proxies,
    /// Speed of the pauses between attempts.
    pub pace: Pace,
}

impl Config {
    /// The usual limits at an address.
    pub fn at(endpoint: impl Into<String>, region: impl Into<String>) -> Config {
        Config {
            endpoint: endpoint.into(),
            region: region.into(),
            user_agent: user_agent(""),
            http_timeout: Duration::from_secs(10),
            max_attempts: 3,
            roots: Roots::default(),
            proxies: Proxies::NONE,
            pace: Pace::REAL,
        }
    }

    /// From the variables of `spec/aws.md` 2 and 6.2; the region is IMDS's.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>, region: &str) -> Config {
        Config {
            user_agent: user_agent(&lookup("VPC_CNI_VERSION").unwrap_or_default()),
            http_timeout: endpoint::http_timeout(&lookup),
            max_attempts: endpoint::max_attempts(&lookup),
            roots: Roots::from_env(&lookup),
            proxies: Proxies::from_env(&lookup),
            ..Config::at(endpoint::from_env(&lookup, "ec2", Some("AWS_EC2_ENDPOINT"), region), region)
        }
    }
}

/// Account-side dashboards group by the second product (`spec/aws.md` 3).
fn user_agent(cni_version: &str) -> String {
    let version: String = cni_version.chars().filter(char::is_ascii_graphic).take(64).collect();
    let version = if version.is_empty() { crate::VERSION.to_owned() } else { version };
    format!("enibox/{} amazon-vpc-cni-k8s/{version}", crate::VERSION)
}

/// One call as the metrics count it (`spec/aws.md` 13).
#[derive(Clone, Copy, Debug)]
pub struct Observed<'a> {
    /// The API action.
    pub action: &'static str,
    /// What went wrong, if anything.
    pub failure: Option<&'a Failure>,
    /// From the first byte of the first attempt to the end of the last, pauses included.
    pub took: Duration,
    /// HTTP requests that were sent, of all pages.
    pub attempts: u32,
}

type Observer = Box<dyn Fn(&Observed<'_>) + Send + Sync>;

/// A client, to be shared by all threads.
pub struct Client {
    config: Config,
    agent: Agent,
    creds: Arc<Chain>,
    /// Nanoseconds that EC2's clock is ahead of ours.
    skew: Mutex<i64>,
    quota: Mutex<u32>,
    observer: Observer,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("config", &self.config).finish_non_exhaustive()
    }
}

/// How one attempt ended, if not with a page.
struct Miss {
    failure: Failure,
    remedy: Remedy,
}

/// What may help against a miss.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Remedy {
    /// Nothing.
    None,
    /// Another attempt after a pause.
    Retry,
    /// The same, at the price of a time-out.
    RetryTimeout,
    /// The signature was refused: EC2's clock (if it told) or other keys. `keys` is false if the credentials cannot be
    /// at fault, `signature` if the clock cannot.
    Sign { signature: bool, keys: bool, date: Option<Wall> },
}

/// What has happened so far to one HTTP call.
#[derive(Default)]
struct Course {
    attempts: u32,
    maybe_applied: bool,
    refreshed: bool,
    unskewed: bool,
    paid: u32,
}

impl Client {
    /// A client. Nothing is sent yet.
    pub fn new(config: Config, creds: Arc<Chain>) -> Result<Client> {
        let options = Options {
            user_agent: config.user_agent.clone(),
            // A little less than the whole, so that a time-out while connecting is known as such.
            connect: (config.http_timeout * 9 / 10).min(Duration::from_secs(30)),
            response: config.http_timeout,
            total: config.http_timeout,
            body_limit: xml::SIZE_LIMIT as u64,
            idle: 3,
            roots: config.roots.clone(),
            proxies: config.proxies.clone(),
        };
        let agent = Agent::new(&config.endpoint, options).context("set up ec2 client")?;
        let (skew, quota) = (Mutex::new(0), Mutex::new(QUOTA));
        Ok(Client { config, agent, creds, skew, quota, observer: Box::new(|_| {}) })
    }

    /// Tells `observer` of every call from here on.
    #[must_use]
    pub fn observed_by(mut self, observer: impl Fn(&Observed<'_>) + Send + Sync + 'static) -> Client {
        self.observer = Box::new(observer);
        self
    }

    /// Carries out a call.
    pub fn execute(&self, call: &Call) -> std::result::Result<Reply, Failure> {
        let start = clock::now().mono;
        let mut attempts = 0;
        let result = self.pages(call, &mut attempts);
        let took = clock::now().mono.since(start);
        let failure = result.as_ref().err();
        if let Some(failure) = failure {
            log::warn!("{failure}");
        }
        (self.observer)(&Observed { action: call.action(), failure, took, attempts });
        result
    }

    fn pages(&self, call: &Call, attempts: &mut u32) -> std::result::Result<Reply, Failure> {
        let fields = form(call);
        let mut all: Option<Reply> = None;
        let mut token: Option<String> = None;
        for _ in 0..PAGES {
            let next = token.as_deref().map(|token| ("NextToken", token));
            let pairs = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).chain(next);
            let page = self.page(call, &encode(pairs), attempts)?;
            let reply = match (all.take(), page.reply) {
                (Some(Reply::Interfaces(mut so_far)), Reply::Interfaces(more)) => {
                    so_far.extend(more);
                    Reply::Interfaces(so_far)
                }
                (Some(Reply::Subnets(mut so_far)), Reply::Subnets(more)) => {
                    so_far.extend(more);
                    xml::most_free_first(&mut so_far);
                    Reply::Subnets(so_far)
                }
                (_, reply) => reply,
            };
            match page.next_token {
                Some(next) if token.as_ref() != Some(&next) => (all, token) = (Some(reply), Some(next)),
                Some(_) => return Err(own_failure(call, "the next page is the same page")),
                None => return Ok(reply),
            }
        }
        Err(own_failure(call, &format!("more than {PAGES} pages")))
    }

    /// One page, with all its attempts.
    fn page(&self, call: &Call, body: &str, attempts: &mut u32) -> std::result::Result<xml::Page, Failure> {
        let mut course = Course::default();
        loop {
            let credentials = self.creds.get().map_err(|error| {
                let failure = own_failure(call, &error.to_string());
                Failure { maybe_applied: course.maybe_applied, ..failure }
            })?;
            course.attempts += 1;
            *attempts += 1;
            let miss = match self.attempt(call, body, &credentials) {
                Ok(page) => {
                    self.refund(&course);
                    return Ok(page);
                }
                Err(miss) => miss,
            };
            course.maybe_applied |= miss.failure.maybe_applied;
            if !self.go_on(call, &miss, &credentials, &mut course) {
                return Err(Failure { maybe_applied: course.maybe_applied, ..miss.failure });
            }
            log::info!("{}; attempt {} of {}", miss.failure, course.attempts + 1, self.config.max_attempts);
        }
    }

    /// Whether to send again, after the pause that this takes.
    fn go_on(&self, call: &Call, miss: &Miss, credentials: &Credentials, course: &mut Course) -> bool {
        if miss.failure.maybe_applied && !call.idempotent() {
            return false;
        }
        let cost = match miss.remedy {
            Remedy::None => return false,
            Remedy::Retry => RETRY_COST,
            Remedy::RetryTimeout => TIMEOUT_COST,
            Remedy::Sign { signature, keys, date } => {
                // Each once per request, outside the count of attempts: nothing was carried out.
                if signature && !course.unskewed && self.learn_skew(date) {
                    course.unskewed = true;
                } else if keys && !course.refreshed {
                    course.refreshed = true;
                    self.creds.reject(credentials);
                } else {
                    return false;
                }
                course.attempts -= 1;
                return true;
            }
        };
        if course.attempts >= self.config.max_attempts {
            return false;
        }
        {
            let mut quota = self.quota.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(left) = quota.checked_sub(cost) else {
                log::warn!("{}: no more retries until calls succeed again", call.action());
                return false;
            };
            *quota = left;
        }
        course.paid = cost;
        self.config.pace.sleep(pace::backoff(course.attempts));
        true
    }

    /// A call that went well gives back what its last retry cost, and one token if it took no retry.
    fn refund(&self, course: &Course) {
        let mut quota = self.quota.lock().unwrap_or_else(PoisonError::into_inner);
        *quota = (*quota + course.paid.max(1)).min(QUOTA);
    }

    /// Remembers EC2's clock if it is far from the one that was signed with.
    fn learn_skew(&self, date: Option<Wall>) -> bool {
        let Some(date) = date else { return false };
        let ahead = date.as_unix_nanos().saturating_sub(clock::now().wall.as_unix_nanos());
        let mut skew = self.skew.lock().unwrap_or_else(PoisonError::into_inner);
        let off = Duration::from_nanos(ahead.saturating_sub(*skew).unsigned_abs());
        if off <= SKEW {
            return false;
        }
        log::warn!("ec2: the clock differs by {} s from EC2's; signing with EC2's", ahead / 1_000_000_000);
        *skew = ahead;
        true
    }

    fn attempt(&self, call: &Call, body: &str, credentials: &Credentials) -> std::result::Result<xml::Page, Miss> {
        let skew = *self.skew.lock().unwrap_or_else(PoisonError::into_inner);
        let to_sign =
            [("content-type", "application/x-www-form-urlencoded; charset=utf-8"), ("host", self.agent.host())];
        let path = self.agent.full_path("/");
        let request = sign::Request {
            method: "POST",
            path: &path,
            headers: &to_sign,
            body: body.as_bytes(),
            service: "ec2",
            region: &self.config.region,
            time: Wall::from_unix_nanos(clock::now().wall.as_unix_nanos().saturating_add(skew)),
        };
        let keys = sign::Keys {
            access_key: &credentials.access_key,
            secret: &credentials.secret,
            token: credentials.token.as_deref(),
        };
        let signed = sign::headers(&request, &keys).map_err(|error| unsent(call, &error.to_string()))?;
        let headers: Vec<(&str, &str)> =
            to_sign.into_iter().chain(signed.iter().map(|(name, value)| (*name, value.as_str()))).collect();
        match self.agent.send("POST", "/", &headers, body.as_bytes()) {
            Err(broken) => Err(no_answer(call, &broken)),
            Ok(response) if response.status == 200 => understood(call, &response),
            Ok(response) => Err(refused(call, &response)),
        }
    }
}

/// A call that changes something.
fn mutating(call: &Call) -> bool {
    !call.action().starts_with("Describe")
}

fn own_failure(call: &Call, message: &str) -> Failure {
    Failure {
        action: call.action(),
        code: String::new(),
        message: message.to_owned(),
        status: 0,
        request_id: String::new(),
        maybe_applied: false,
    }
}

fn unsent(call: &Call, message: &str) -> Miss {
    Miss { failure: own_failure(call, message), remedy: Remedy::None }
}

fn no_answer(call: &Call, broken: &Broken) -> Miss {
    let failure = Failure { maybe_applied: broken.sent && mutating(call), ..own_failure(call, &broken.text) };
    let remedy = match (broken.retry, broken.timed_out) {
        (false, _) => Remedy::None,
        (true, false) => Remedy::Retry,
        (true, true) => Remedy::RetryTimeout,
    };
    Miss { failure, remedy }
}

/// Status 200. A body that cannot be read (a proxy's page) leaves open what was done.
fn understood(call: &Call, response: &Response) -> std::result::Result<xml::Page, Miss> {
    xml::parse_reply(call, &response.text()).map_err(|error| {
        let failure = own_failure(call, &error.to_string());
        let failure = Failure { status: response.status, maybe_applied: mutating(call), ..failure };
        Miss { failure, remedy: Remedy::None }
    })
}

fn refused(call: &Call, response: &Response) -> Miss {
    let error = xml::parse_error(&response.text());
    let answered = error.is_some();
    let error = error.unwrap_or_else(|| xml::ApiError {
        message: format!("answer is not EC2's: {:?}", response.text().chars().take(80).collect::<String>()),
        ..xml::ApiError::default()
    });
    // A throttled or unavailable service (503) has done nothing. After an internal error, or when a gateway gave up on
    // EC2, the call may have been carried out.
    let unclear = response.status == 500 || (!answered && matches!(response.status, 502 | 504));
    let remedy = match error.code.as_str() {
        "AuthFailure" | "RequestExpired" | "SignatureDoesNotMatch" => Remedy::Sign {
            signature: true,
            keys: error.code != "SignatureDoesNotMatch",
            date: response.header("date").and_then(parse_http_date),
        },
        "ExpiredToken" | "ExpiredTokenException" | "InvalidClientTokenId" | "UnrecognizedClientException" => {
            Remedy::Sign { signature: false, keys: true, date: None }
        }
        // Throttled calls are paced by the caller, who knows what else waits: an answer of this kind goes back at once.
        code if throttling(code) => Remedy::None,
        "RequestTimeout" | "RequestTimeoutException" => Remedy::Retry,
        _ if matches!(response.status, 500 | 502 | 503 | 504) => Remedy::Retry,
        _ => Remedy::None,
    };
    let failure = Failure {
        action: call.action(),
        code: error.code,
        message: error.message,
        status: response.status,
        request_id: error.request_id,
        maybe_applied: unclear && mutating(call),
    };
    Miss { failure, remedy }
}

/// Reads `Sat, 21 Nov 2026 01:30:00 GMT` (RFC 9110 5.6.7, the form that servers send).
fn parse_http_date(text: &str) -> Option<Wall> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = text.split_once(", ")?.1.split(' ');
    let (day, month, year, time) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let month = MONTHS.iter().position(|name| *name == month)? + 1;
    (words.next()? == "GMT").then(|| Wall::parse_rfc3339(&format!("{year}-{month:02}-{day}T{time}Z")))?
}

#[cfg(test)]
mod tests;
