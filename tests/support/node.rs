//! A node for tests of the plugin: `/run` and the network are its own, the daemon and the policy agent are played by the
//! test, and the plugin is run as a runtime runs it.
//!
//! Everything happens on one thread with a mount and a network namespace of its own, so that the fixed paths below
//! `/var/run/aws-node` can be used without touching the machine's. What that thread starts lives in the same namespaces.
#![allow(dead_code, reason = "each test binary uses its part")]

use enibox::model::wire::{
    AddNetworkReply, AddNetworkRequest, DelNetworkReply, DelNetworkRequest, DeleteNpRequest, EnforceNpRequest,
    IpAllocation,
};
use enibox::netlink::{Socket, link};
use enibox::rpc::grpc::{BindOptions, Code, Server, Status};
use enibox::rpc::proto::{HealthCheckResponse, Message, NpReply, path};
use enibox::rpc::stop::Stop;
use enibox::{clock, sys};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Where the daemon and everything of it is.
pub const AWS_NODE: &str = "/var/run/aws-node";

/// A node without a daemon.
pub struct Node {
    directory: PathBuf,
}

/// Runs the body on a node that vanishes with it.
pub fn on_a_node<T: Send>(body: impl FnOnce(&Node) -> T + Send) -> T {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            sys::unshare_mounts().expect("the tests run as root");
            sys::unshare_netns().unwrap();
            sys::mount_tmpfs(Path::new("/run")).unwrap();
            let node = Node { directory: "/run/node".into() };
            fs::create_dir_all(node.directory.join("bin")).unwrap();
            std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_enibox"), node.plugin()).unwrap();
            let result = body(&node);
            pods_leave_no_link();
            result
        });
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The host ends of the pods' veths go with the pods' namespaces, soon after these are gone.
fn pods_leave_no_link() {
    let end = clock::instant() + Duration::from_secs(10);
    loop {
        let links = link::list(&mut Socket::route().unwrap()).unwrap();
        let left: Vec<_> = links.into_iter().map(|link| link.name).filter(|name| name.starts_with("eni")).collect();
        if left.is_empty() {
            return;
        }
        assert!(clock::instant() < end, "links of pods that are gone: {left:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Node {
    /// A file of this node.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn plugin(&self) -> PathBuf {
        self.path("bin/aws-cni")
    }

    /// A good call for `command`; the caller changes what it wants to be different.
    pub fn call(&self, command: &str, version: &str) -> Call {
        let env = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "cni-5a1f"),
            ("CNI_NETNS", ""),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/run/node/bin"),
            (
                "CNI_ARGS",
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=sample-pod;K8S_POD_INFRA_CONTAINER_ID=cni-5a1f;\
                 K8S_POD_UID=7c0e",
            ),
        ];
        Call {
            program: self.plugin(),
            env: env.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            config: json!({"cniVersion": version, "name": "aws-cni", "type": "aws-cni", "mtu": "9001", "vethPrefix": "eni"}),
            stdin: None,
        }
    }
}

/// A call of the plugin.
#[derive(Clone)]
pub struct Call {
    program: PathBuf,
    env: BTreeMap<String, String>,
    config: Value,
    stdin: Option<Vec<u8>>,
}

impl Call {
    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<Path>) -> Call {
        self.env.insert(name.to_owned(), value.as_ref().to_str().unwrap().to_owned());
        self
    }

    /// Takes a variable away.
    #[must_use]
    pub fn without(mut self, name: &str) -> Call {
        self.env.remove(name);
        self
    }

    /// Sets a field of the configuration.
    #[must_use]
    pub fn config(mut self, name: &str, value: impl Into<Value>) -> Call {
        self.config[name] = value.into();
        self
    }

    /// Sends these bytes instead of a configuration.
    #[must_use]
    pub fn stdin(mut self, bytes: &[u8]) -> Call {
        self.stdin = Some(bytes.to_owned());
        self
    }

    /// Calls the program under another of its names.
    #[must_use]
    pub fn named(mut self, name: &str) -> Call {
        self.program.set_file_name(name);
        if !self.program.exists() {
            std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_enibox"), &self.program).unwrap();
        }
        self.config["type"] = name.into();
        self
    }

    /// Names another pod, with a container of its own.
    #[must_use]
    pub fn pod(self, name: &str) -> Call {
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={name};K8S_POD_UID={name}-uid");
        self.env("CNI_CONTAINERID", format!("container-of-{name}")).env("CNI_ARGS", args)
    }

    /// Runs it.
    pub fn run(&self) -> Answer {
        let started = enibox::clock::instant();
        let mut child = Command::new(&self.program)
            .env_clear()
            .envs(&self.env)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = self.stdin.clone().unwrap_or_else(|| self.config.to_string().into_bytes());
        // The plugin may end without having read it.
        let _ = child.stdin.take().unwrap().write_all(&stdin);
        let output = child.wait_with_output().unwrap();
        Answer {
            code: output.status.code().expect("not ended by a signal"),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
            took: started.elapsed(),
        }
    }
}

/// What the plugin answered.
#[derive(Debug)]
pub struct Answer {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Answer {
    /// The document on standard output; there must be exactly one.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The result of an ADD.
    #[track_caller]
    pub fn result(&self) -> Value {
        assert_eq!(self.code, 0, "{self:?}");
        self.json()
    }

    /// Success without a word.
    #[track_caller]
    pub fn silent(&self) {
        assert_eq!((self.code, self.stdout.as_str()), (0, ""), "{self:?}");
    }

    /// The error document's code and message.
    #[track_caller]
    pub fn failure(&self) -> (u64, String) {
        assert_eq!(self.code, 1, "{self:?}");
        let json = self.json();
        assert!(json["cniVersion"].is_string(), "{json}");
        (json["code"].as_u64().unwrap(), json["msg"].as_str().unwrap().to_owned())
    }
}

/// A call that the daemon or the agent got.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    Add(AddNetworkRequest),
    Del(DelNetworkRequest),
    Health,
    Enforce(EnforceNpRequest),
    Delete(DeleteNpRequest),
}

/// What they answer.
#[derive(Clone)]
pub struct Answers {
    pub add: Result<AddNetworkReply, Status>,
    /// Instead of `add`, these bytes.
    pub add_raw: Option<Vec<u8>>,
    pub del: Result<DelNetworkReply, Status>,
    /// Instead of `add` and `del`, the allocations of the pod of this name.
    pub by_pod: Option<fn(&str) -> Vec<IpAllocation>>,
    pub health: i32,
    pub policy: bool,
    pub delay: Duration,
}

impl Default for Answers {
    fn default() -> Answers {
        Answers {
            add: Err(Status::new(Code::INTERNAL, "no answer prepared")),
            add_raw: None,
            del: Err(Status::new(Code::UNKNOWN, "[datastore: unknown pod]")),
            by_pod: None,
            health: 1,
            policy: true,
            delay: Duration::ZERO,
        }
    }
}

/// The reply that gives these.
pub fn given(allocations: &[IpAllocation]) -> AddNetworkReply {
    AddNetworkReply { success: true, allocations: allocations.to_vec(), ..AddNetworkReply::default() }
}

/// The reply that has taken these back.
pub fn taken(allocations: &[IpAllocation]) -> DelNetworkReply {
    DelNetworkReply { success: true, allocations: allocations.to_vec(), ..DelNetworkReply::default() }
}

/// A call and the time that the caller was ready to wait.
type Noted = (Seen, Option<Duration>);

/// A server on one of the two sockets.
pub struct Served {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
    seen: Arc<Mutex<Vec<Noted>>>,
    answers: Arc<Mutex<Answers>>,
}

impl Served {
    /// The daemon.
    pub fn daemon(answers: Answers) -> Served {
        Served::at("ipamd.sock", answers)
    }

    /// The network policy agent.
    pub fn agent(answers: Answers) -> Served {
        Served::at("npa.sock", answers)
    }

    fn at(name: &str, answers: Answers) -> Served {
        let server = Server::bind(&Path::new(AWS_NODE).join(name), BindOptions::default()).unwrap();
        let (stop, seen) = (Stop::new(), Arc::new(Mutex::new(Vec::new())));
        let answers = Arc::new(Mutex::new(answers));
        let (theirs, log, prepared) = (stop.clone(), seen.clone(), answers.clone());
        let thread = std::thread::spawn(move || {
            let answer = move |call: &enibox::rpc::grpc::Call| {
                let left = call.deadline.map(|deadline| deadline.saturating_duration_since(enibox::clock::instant()));
                let request = decode(call.method, &call.body);
                log.lock().unwrap().push((request.clone(), left));
                let answers = prepared.lock().unwrap().clone();
                std::thread::sleep(answers.delay);
                match request {
                    Seen::Add(add) => match (answers.add_raw, answers.by_pod) {
                        (Some(raw), _) => Ok(raw),
                        (None, Some(by_pod)) => Ok(given(&by_pod(&add.pod_name)).encode()),
                        (None, None) => answers.add.map(|reply| reply.encode()),
                    },
                    Seen::Del(del) => match answers.by_pod {
                        Some(by_pod) => Ok(taken(&by_pod(&del.pod_name)).encode()),
                        None => answers.del.map(|reply| reply.encode()),
                    },
                    Seen::Health => Ok(HealthCheckResponse { status: answers.health }.encode()),
                    Seen::Enforce(_) | Seen::Delete(_) => Ok(NpReply { success: answers.policy }.encode()),
                }
            };
            server.serve(answer, &theirs).unwrap();
        });
        Served { stop, thread: Some(thread), seen, answers }
    }

    /// Changes the answers from now on.
    pub fn answer(&self, answers: Answers) {
        *self.answers.lock().unwrap() = answers;
    }

    /// The calls so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().iter().map(|(seen, _)| seen.clone()).collect()
    }

    /// The time that the last caller was ready to wait.
    pub fn last_deadline(&self) -> Option<Duration> {
        self.seen.lock().unwrap().last().and_then(|(_, left)| *left)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the server panicked");
        }
    }
}

fn decode(method: &str, body: &[u8]) -> Seen {
    match method {
        path::ADD_NETWORK => Seen::Add(Message::decode(body).unwrap()),
        path::DEL_NETWORK => Seen::Del(Message::decode(body).unwrap()),
        path::HEALTH_CHECK => Seen::Health,
        path::ENFORCE_NP_TO_POD => Seen::Enforce(Message::decode(body).unwrap()),
        path::DELETE_POD_NP => Seen::Delete(Message::decode(body).unwrap()),
        other => panic!("unexpected call of {other}"),
    }
}
