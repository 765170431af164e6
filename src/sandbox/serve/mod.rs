//! EC2 and IMDS over HTTP, on the one model: what daemon and tools talk to. Any bound listener will do, so that the fakes
//! can stand inside a network namespace.
//!
//! Requests that a client of EC2 should not send are answered as EC2 would and kept as complaints, for whoever runs the
//! sandbox to fail on.

mod imds;
pub mod kube;
mod query;
mod xml;

pub use imds::ROLE;
pub use query::{ACTIONS, Asked, Malformed};

use crate::aws::sign;
use crate::clock;
use crate::error::Result;
use crate::model::ec2::{Failure, Reply};
use crate::model::ids::{EniId, InstanceId};
use crate::model::time::{Now, Wall};
use crate::rpc::http1::{Limits, Method, Request, Response, Server, Verdict};
use crate::sim::conditions::Lie;
use crate::sim::vpc::{Outcome, Vpc, Wire};
use std::net::TcpListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Complaints kept; after that they are only counted by the log.
pub const COMPLAINTS_LIMIT: usize = 100;

/// How old a signed request may be (EC2's own limit).
const SIGNATURE_AGE: Duration = Duration::from_mins(5);

/// Credentials that the instance role gives out and that EC2 accepts.
#[derive(Clone, Debug)]
pub struct Keys {
    /// Access key id.
    pub access_key: String,
    /// Secret.
    pub secret: String,
    /// Session token.
    pub token: String,
}

impl Default for Keys {
    fn default() -> Self {
        Keys {
            access_key: "ASIAENIBOXSANDBOX000".into(),
            secret: "sandbox/secret+of/nobody".into(),
            token: "sandbox-session-token==".into(),
        }
    }
}

/// Told what is wired after every change; an error becomes a complaint.
pub type Watcher = dyn FnMut(&[Wire]) -> Result<()> + Send;

/// The cloud: one model for all nodes, and what the HTTP side needs besides.
pub struct Cloud {
    vpc: Mutex<Vpc>,
    keys: Keys,
    tokens: Mutex<imds::Tokens>,
    watcher: Mutex<Option<Box<Watcher>>>,
    complaints: Mutex<Vec<String>>,
    imds_requests: AtomicU64,
    lie: Mutex<Lie>,
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Everything behind these locks is whole between statements, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which instance an IMDS listener serves.
#[derive(Clone, Debug)]
pub enum Seat {
    /// Always this one.
    Instance(InstanceId),
    /// The one that the address of the asker is delivered to.
    Peer,
}

impl Cloud {
    /// A cloud around a model.
    pub fn new(vpc: Vpc) -> Arc<Cloud> {
        Arc::new(Cloud {
            vpc: Mutex::new(vpc),
            keys: Keys::default(),
            tokens: Mutex::default(),
            watcher: Mutex::new(None),
            complaints: Mutex::default(),
            imds_requests: AtomicU64::new(0),
            lie: Mutex::default(),
        })
    }

    /// The model. Keep it locked briefly.
    pub fn vpc(&self) -> MutexGuard<'_, Vpc> {
        hold(&self.vpc)
    }

    /// The credentials that are accepted.
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    fn tokens(&self) -> MutexGuard<'_, imds::Tokens> {
        hold(&self.tokens)
    }

    /// Requests that IMDS has had.
    pub fn imds_requests(&self) -> u64 {
        self.imds_requests.load(Ordering::Relaxed)
    }

    /// From now on IMDS lies to every instance.
    pub fn lie(&self, lie: Lie) {
        *hold(&self.lie) = lie;
    }

    /// What clients did wrong so far.
    pub fn complaints(&self) -> Vec<String> {
        hold(&self.complaints).clone()
    }

    fn complain(&self, what: String) {
        log::warn!("sandbox: {what}");
        let mut complaints = hold(&self.complaints);
        if complaints.len() < COMPLAINTS_LIMIT {
            complaints.push(what);
        }
    }

    /// Tells `watcher` what is wired, now and after every change, in order and before the caller of EC2 has its answer.
    pub fn watch(&self, watcher: Box<Watcher>) {
        let mut place = hold(&self.watcher);
        *place = Some(watcher);
        self.tell(&mut place);
    }

    /// Stops telling.
    pub fn unwatch(&self) {
        *hold(&self.watcher) = None;
    }

    fn tell(&self, place: &mut Option<Box<Watcher>>) {
        if let Some(watcher) = place {
            let wires = self.vpc().wires();
            if let Err(error) = watcher(&wires) {
                self.complain(format!("wire the topology: {error}"));
            }
        }
    }

    /// Changes the model from outside of the API (an instance starts, a knob turns) and tells the watcher.
    pub fn change<T>(&self, work: impl FnOnce(&mut Vpc) -> T) -> T {
        let mut place = hold(&self.watcher);
        let result = work(&mut self.vpc());
        self.tell(&mut place);
        result
    }

    /// Lets time pass for detaches that are under way.
    pub fn tick(&self) {
        self.change(|vpc| vpc.settle(clock::now()));
    }

    /// Serves EC2.
    pub fn serve_ec2(self: &Arc<Self>, listener: TcpListener) -> Result<Server> {
        let cloud = Arc::clone(self);
        let answer = move |request: &Request| cloud.answer_ec2(request);
        Server::start("ec2", listener, Limits::default(), Arc::new(answer))
    }

    /// Serves IMDS.
    pub fn serve_imds(self: &Arc<Self>, listener: TcpListener, seat: Seat) -> Result<Server> {
        let cloud = Arc::clone(self);
        let answer = move |request: &Request| {
            cloud.imds_requests.fetch_add(1, Ordering::Relaxed);
            let instance = match &seat {
                Seat::Instance(instance) => Some(instance.clone()),
                Seat::Peer => request.peer.and_then(|peer| cloud.vpc().owner(peer.ip())),
            };
            match instance {
                Some(instance) => imds::answer(&cloud, &instance, request),
                None => Response::text(404, "").into(),
            }
        };
        Server::start("imds", listener, Limits { connections: 256, ..Limits::default() }, Arc::new(answer))
    }

    fn answer_ec2(&self, request: &Request) -> Verdict {
        let now = clock::now();
        if request.method != Method::Post || request.path != "/" || !request.query.is_empty() {
            self.complain(format!("ec2: {} {} instead of POST /", request.method.as_str(), request.path));
            return self.refused("unknown", "InvalidRequest", "The request is not a query.".into(), 400);
        }
        let content_type = request.header("content-type").unwrap_or("");
        if !content_type.starts_with("application/x-www-form-urlencoded") {
            self.complain(format!("ec2: content type {content_type:?}"));
            return self.refused("unknown", "InvalidRequest", "The content is not a form.".into(), 400);
        }
        if let Err((code, message, status)) = self.authenticate(request, now.wall) {
            self.complain(format!("ec2: {code}: {message}"));
            return self.refused("unknown", code, message, status);
        }
        let asked = std::str::from_utf8(&request.body).map_err(|_| Malformed {
            action: "unknown",
            code: "MalformedQueryString",
            message: "The body is not text.".into(),
        });
        match asked.and_then(query::read) {
            Ok(asked) => self.act(now, &asked),
            Err(Malformed { action, code, message }) => {
                self.complain(format!("ec2: {action}: {code}: {message}"));
                self.refused(action, code, message, 400)
            }
        }
    }

    fn authenticate(&self, request: &Request, now: Wall) -> Result<(), (&'static str, String, u16)> {
        let received = sign::Received {
            method: request.method.as_str(),
            path: &request.path,
            headers: &request.headers,
            body: &request.body,
        };
        let secret_of = |key: &str| (key == self.keys.access_key).then(|| self.keys.secret.clone());
        let verified = sign::verify(&received, secret_of).map_err(|refusal| {
            let code = match refusal {
                sign::Refusal::Mismatch => "SignatureDoesNotMatch",
                sign::Refusal::Unsigned => "MissingAuthenticationToken",
                sign::Refusal::Malformed(_) => "IncompleteSignature",
                sign::Refusal::UnknownKey(_) => "AuthFailure",
            };
            (code, refusal.to_string(), if code == "AuthFailure" { 401 } else { 403 })
        })?;
        if verified.token.as_deref() != Some(&self.keys.token) {
            return Err(("AuthFailure", "the session token is not that of the credentials".into(), 401));
        }
        let region = self.vpc().region().to_owned();
        if verified.service != "ec2" || verified.region != region {
            let scope = format!("signed for {} in {}, not for ec2 in {region}", verified.service, verified.region);
            return Err(("SignatureDoesNotMatch", scope, 403));
        }
        if now.since(verified.time).max(verified.time.since(now)) > SIGNATURE_AGE {
            return Err(("RequestExpired", format!("signed at {}, it is {now}", verified.time), 400));
        }
        Ok(())
    }

    fn act(&self, now: Now, asked: &Asked) -> Verdict {
        let (action, outcome) = match asked {
            // Describing wires nothing.
            Asked::Interfaces { ids, filters, .. } => {
                ("DescribeNetworkInterfaces", self.vpc().describe(now, ids, filters))
            }
            Asked::Call(call) => (call.action(), self.change(|vpc| vpc.execute(now, call))),
        };
        let Outcome { result, after } = outcome;
        if !after.is_zero() {
            std::thread::sleep(after);
        }
        match (result, asked) {
            (Ok(Reply::Interfaces(list)), Asked::Interfaces { page, after, .. }) => {
                self.page(action, list, *page, after.as_ref())
            }
            (Ok(reply), _) => self.went_well(action, &reply, None),
            (Err(failure), _) if failure.status == 0 => Verdict::HangUp,
            (Err(failure), _) => refusal(&failure),
        }
    }

    fn page(
        &self,
        action: &str,
        mut list: Vec<crate::model::ec2::Interface>,
        size: usize,
        after: Option<&EniId>,
    ) -> Verdict {
        list.retain(|eni| after.is_none_or(|last| eni.id > *last));
        let more = list.len() > size;
        list.truncate(size);
        let token = list.last().filter(|_| more).map(|eni| query::token(&eni.id));
        self.went_well(action, &Reply::Interfaces(list), token.as_deref())
    }

    fn went_well(&self, action: &str, reply: &Reply, token: Option<&str>) -> Verdict {
        let mut vpc = self.vpc();
        let request_id = vpc.request_id();
        let body = xml::reply(action, &request_id, vpc.id(), reply, token);
        Response::new(200, "text/xml;charset=UTF-8", body).into()
    }

    fn refused(&self, action: &'static str, code: &str, message: String, status: u16) -> Verdict {
        let request_id = self.vpc().request_id();
        refusal(&Failure { action, code: code.to_owned(), message, status, request_id, maybe_applied: false })
    }
}

fn refusal(failure: &Failure) -> Verdict {
    Response::new(failure.status, "text/xml;charset=UTF-8", xml::failure(failure)).into()
}

#[cfg(test)]
pub(crate) mod tests;
