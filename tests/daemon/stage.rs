//! A node of the sandbox with the real daemon, and the real plugin called as a runtime calls it.

use enibox::clock;
use enibox::model::checkpoint::Checkpoint;
use enibox::model::ids::EniId;
use enibox::model::spool;
use enibox::netlink::rule;
use enibox::plan::backoff::Random;
use enibox::sandbox::agents::Agent;
use enibox::sandbox::probe::{Flow, PORT, Proto};
use enibox::sandbox::serve::ACTIONS;
use enibox::sandbox::topology::{Node, Pod};
use enibox::sandbox::world::{Plan, World};
use enibox::sys;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_enibox");
pub const CHECKPOINT: &str = "/run/aws-node/ipam.json";
/// CNI's "try again later".
pub const TRY_AGAIN: u64 = 11;
/// What the pod's namespace of Kubernetes is in all tests.
const NAMESPACE: &str = "tests";
const FLOW_TIMEOUT: Duration = Duration::from_secs(5);

pub struct Stage {
    agent: Mutex<Option<Agent>>,
    pub node: Arc<Node>,
    pub logs: PathBuf,
    env: Vec<(String, String)>,
    /// Last, because the daemon needs it.
    pub world: World,
}

/// A pod, wired or not.
pub struct Subject {
    pub name: String,
    pub container: String,
    pub pod: Pod,
    pub result: Option<Value>,
}

impl Subject {
    /// The address that the plugin reported.
    pub fn address(&self) -> Ipv4Addr {
        address_of(self.result.as_ref().expect("it was added"))
    }
}

fn address_of(result: &Value) -> Ipv4Addr {
    let text = result["ips"][0]["address"].as_str().unwrap_or_else(|| panic!("no address: {result}"));
    text.split('/').next().unwrap().parse().unwrap()
}

/// What the plugin answered: the result, or code and message.
pub type Answer = Result<Value, (u64, String)>;

impl Stage {
    /// A node whose daemon is not started yet.
    pub fn new(instance_type: &str, seed: u64, env: &[(&str, &str)]) -> Stage {
        let home = std::env::temp_dir().join(format!("enibox-daemon-{}", std::process::id()));
        let world = World::create(&Plan { nodes: 1, instance_type, seed, home: &home }).unwrap();
        let node = world.node(0).unwrap();
        let logs = world.topology().run().logs();
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Stage { agent: Mutex::new(None), node, logs, env, world }
    }

    /// The same with a daemon that serves.
    pub fn ready(instance_type: &str, seed: u64, env: &[(&str, &str)]) -> Stage {
        let stage = Stage::new(instance_type, seed, env);
        stage.start();
        stage.wait_ready();
        stage
    }

    /// Starts the daemon. It ends with the calling thread.
    pub fn start(&self) {
        self.start_program(Path::new(PROGRAM));
    }

    /// Starts another executable as the daemon.
    pub fn start_program(&self, program: &Path) {
        let mut agent = self.agent.lock().unwrap();
        assert!(agent.is_none(), "one daemon at a time");
        *agent = Some(Agent::start(program, &self.logs, &self.node, &self.env).unwrap());
    }

    /// Waits until it serves; how long that took from its start.
    pub fn wait_ready(&self) -> Duration {
        let mut agent = self.agent.lock().unwrap();
        agent.as_mut().expect("started").wait_ready(&self.node, &|| Ok(())).unwrap()
    }

    /// Waits until it serves, within `limit` of its start. The machine may be busy with other things: one of three starts counts.
    pub fn wait_ready_within(&self, limit: Duration) -> Duration {
        let mut all = Vec::new();
        loop {
            let took = self.wait_ready();
            all.push(took);
            if took < limit {
                return took;
            }
            assert!(all.len() < 3, "served after {all:?}\n{}", self.log());
            self.kill();
            self.start();
        }
    }

    /// `kill -9`.
    pub fn kill(&self) {
        drop(self.agent.lock().unwrap().take().expect("started"));
    }

    /// SIGTERM; the daemon must end with code 0.
    pub fn stop(&self) {
        self.agent.lock().unwrap().take().expect("started").stop().unwrap();
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.agent.lock().unwrap().as_ref().expect("started").pid()
    }

    /// The daemon's log since the first start.
    pub fn log(&self) -> String {
        let name = format!("{}-ipamd.log", self.node.place.name);
        fs::read_to_string(self.logs.join(name)).unwrap_or_default()
    }

    pub fn subject(&self, name: &str) -> Subject {
        let pod = self.node.create_pod(&format!("cni-{name}-{}", &fresh_container()[..8])).unwrap();
        Subject { name: name.to_owned(), container: fresh_container(), pod, result: None }
    }

    /// ADD of a new pod, which must succeed.
    pub fn add(&self, name: &str) -> Subject {
        let mut subject = self.subject(name);
        self.try_add(&mut subject).unwrap_or_else(|refused| panic!("ADD of {name}: {refused:?}\n{}", self.log()));
        subject
    }

    pub fn try_add(&self, subject: &mut Subject) -> Result<Ipv4Addr, (u64, String)> {
        let result = self.call("ADD", subject)?;
        let address = address_of(&result);
        subject.result = Some(result);
        Ok(address)
    }

    /// DEL, which must succeed. The namespace stays until [`Stage::bury`].
    pub fn del(&self, subject: &Subject) {
        if let Err(refused) = self.call("DEL", subject) {
            panic!("DEL of {}: {refused:?}", subject.name);
        }
    }

    /// DEL, and the namespace goes.
    pub fn delete(&self, subject: Subject) {
        self.del(&subject);
        self.bury(subject);
    }

    pub fn bury(&self, subject: Subject) {
        self.node.delete_pod(subject.pod).unwrap();
    }

    pub fn call(&self, verb: &str, subject: &Subject) -> Answer {
        let mut config = json!({
            "cniVersion": "1.0.0", "name": "aws-cni", "type": "aws-cni", "vethPrefix": "eni", "mtu": "9001",
            "podSGEnforcingMode": "strict", "pluginLogLevel": "DEBUG",
            "pluginLogFile": self.logs.join("plugin.log"),
        });
        if let Some(result) = subject.result.as_ref().filter(|_| verb != "ADD") {
            config["prevResult"] = result.clone();
        }
        let Subject { name, container, pod, .. } = subject;
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={name};K8S_POD_UID={name}-uid");
        let mut command = self.node.command(PROGRAM).unwrap();
        command.arg0("aws-cni").env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", container).env("CNI_NETNS", &pod.path);
        command.env("CNI_IFNAME", "eth0").env("CNI_PATH", "/opt/cni/bin").env("CNI_ARGS", args);
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let document = if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() };
        match output.status.code() {
            Some(0) => Ok(document),
            Some(1) => Err((document["code"].as_u64().unwrap_or_default(), text)),
            other => panic!("{verb} of {name} ended with {other:?}: {text}"),
        }
    }

    /// The checkpoint on disk.
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint::parse(&self.read(CHECKPOINT)).unwrap()
    }

    /// A file as the node sees it.
    pub fn read(&self, path: &str) -> String {
        self.node.inside(|| Ok(fs::read_to_string(path)?)).unwrap()
    }

    pub fn write(&self, path: &str, text: &str) {
        self.node.inside(|| Ok(fs::write(path, text)?)).unwrap();
    }

    /// Names in a directory of the node.
    pub fn list(&self, directory: &str) -> Vec<String> {
        let names = || {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            Ok(entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        };
        self.node.inside(names).unwrap()
    }

    /// Records of DELs that the daemon has not taken yet.
    pub fn spooled(&self) -> Vec<String> {
        let mut names = self.list(&spool::DIRECTORY.replace("/var/run", "/run"));
        names.retain(|name| name.ends_with(spool::SUFFIX));
        names
    }

    /// Which container has which address, by the checkpoint.
    pub fn allocations(&self) -> BTreeMap<String, Ipv4Addr> {
        let entries = self.checkpoint().allocations.into_iter();
        entries.map(|entry| (entry.container.clone(), entry.ipv4.expect("IPv4 only"))).collect()
    }

    /// Addresses of the pods that the host's rules lead to.
    pub fn ruled(&self) -> BTreeSet<Ipv4Addr> {
        let mut socket = self.node.place.socket().unwrap();
        let rules = rule::list(&mut socket, enibox::model::net::Family::V4).unwrap();
        let own: BTreeSet<_> = self.world.cloud.vpc().interfaces().filter_map(|eni| eni.primary_ipv4).collect();
        let nets = rules.into_iter().flat_map(|rule| [rule.src, rule.dst]).flatten();
        let single = nets.filter(|net| net.prefix_len() == 32 && net.addr().to_string() != "0.0.0.0");
        let v4 = single.filter_map(|net| net.addr().to_string().parse().ok());
        v4.filter(|address| !own.contains(address)).collect()
    }

    /// Names of the pods' links on the host.
    pub fn veths(&self) -> BTreeSet<String> {
        let links = self.node.place.links().unwrap().into_iter().map(|link| link.name);
        links.filter(|name| name.starts_with("eni")).collect()
    }

    /// From now on every call of EC2 takes `delay`, and IMDS tells of changes after `lag`.
    pub fn slow_down(&self, delay: Duration, lag: Duration) {
        let mut vpc = self.world.cloud.vpc();
        for action in ACTIONS {
            vpc.knobs.action(action).delay = delay;
        }
        vpc.knobs.imds_lag = lag;
    }

    /// EC2's calls by action since `before`, another answer of this.
    pub fn calls_since(&self, before: &BTreeMap<&'static str, u64>) -> BTreeMap<&'static str, u64> {
        let mut counts = self.calls();
        for (action, count) in &mut counts {
            *count -= before.get(action).copied().unwrap_or(0);
        }
        counts.retain(|_, count| *count > 0);
        counts
    }

    pub fn calls(&self) -> BTreeMap<&'static str, u64> {
        self.world.cloud.vpc().journal().counts().iter().map(|(action, count)| (*action, *count)).collect()
    }

    /// EC2's ENIs that are attached to the node, with the addresses that pods may have on each, and those that are not.
    pub fn enis(&self) -> (BTreeMap<EniId, BTreeSet<Ipv4Addr>>, Vec<EniId>) {
        let instance = &self.world.nodes[0].instance;
        let vpc = self.world.cloud.vpc();
        let ours = |eni: &enibox::model::ec2::Interface| {
            eni.attachment.as_ref().is_some_and(|attachment| attachment.instance == *instance)
        };
        let (attached, stray): (Vec<_>, Vec<_>) = vpc.interfaces().partition(|eni| ours(eni));
        let addresses = |eni: &enibox::model::ec2::Interface| eni.secondary_ipv4s.iter().copied().collect();
        let attached = attached.into_iter().map(|eni| (eni.id.clone(), addresses(eni))).collect();
        (attached, stray.into_iter().map(|eni| eni.id.clone()).collect())
    }

    /// UDP and TCP from the pod to hosts in and outside of the VPC, and to the pod; each with the right source.
    pub fn probe(&self, subject: &Subject) {
        for proto in [Proto::Udp, Proto::Tcp] {
            self.probe_with(subject, proto);
        }
    }

    pub fn probe_all<'a>(&self, pods: impl IntoIterator<Item = &'a Subject>) {
        for pod in pods {
            self.probe(pod);
        }
    }

    pub fn probe_with(&self, subject: &Subject, proto: Proto) {
        let pod = subject.pod.place.handle().unwrap();
        let own = subject.address();
        let node = self.world.nodes[0].address;
        for host in enibox::sandbox::world::HOSTS.iter().filter(|host| matches!(host.name, "vpc-host" | "internet")) {
            let far = self.world.namespace(host.name).unwrap();
            let at = SocketAddr::from((host.address, PORT));
            let flow = Flow { client: &pod, source: None, target: at, server: &far, listen: at };
            let seen = run(&flow, proto);
            let what = format!("{} {own} {} to {}", subject.name, proto.as_str(), host.name);
            let seen = seen.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(seen.ip(), if host.in_vpc { own } else { node }, "{what}");
            if host.in_vpc {
                let at = SocketAddr::from((own, PORT));
                let flow = Flow { client: &far, source: None, target: at, server: &pod, listen: at };
                let seen = run(&flow, proto).unwrap_or_else(|error| panic!("to {what}: {error}"));
                assert_eq!(seen.ip(), host.address, "to {what}");
            }
        }
    }

    /// Nothing of these addresses is on the host any more, nor of pods other than `living`.
    #[track_caller]
    pub fn assert_clean(&self, deleted: &[Ipv4Addr], living: &[&Subject]) {
        assert_eq!(self.node.place.traces("no such link", deleted).unwrap(), Vec::<String>::new());
        let wanted = living.iter().map(|subject| enibox::model::naming::host_veth("eni", NAMESPACE, &subject.name, 0));
        let wanted: BTreeSet<String> = wanted.map(|name| name.unwrap()).collect();
        // The kernel takes a link away in its own time once the pod's namespace is gone.
        eventually(Duration::from_secs(10), "the links are those of living pods", || {
            let there = self.veths();
            if there == wanted { Ok(()) } else { Err(format!("{there:?}, want {wanted:?}")) }
        });
        let ruled = self.ruled();
        let wanted: BTreeSet<Ipv4Addr> = living.iter().map(|subject| subject.address()).collect();
        let strange: Vec<_> = ruled.difference(&wanted).collect();
        assert!(strange.is_empty(), "rules of nobody: {strange:?}\n{}", self.log());
        assert!(wanted.is_subset(&ruled), "{wanted:?} {ruled:?}");
        self.assert_no_elements(deleted);
    }

    // Whatever the rule set holds: no address of a deleted pod may be in it.
    fn assert_no_elements(&self, deleted: &[Ipv4Addr]) {
        let listed = self.node.place.net.run(|| crate::support::tool("nft", &["list", "ruleset"])).unwrap();
        if let Some(listed) = listed {
            let words: BTreeSet<&str> = listed.split(|c: char| !(c.is_ascii_digit() || c == '.')).collect();
            let found: Vec<_> = deleted.iter().filter(|address| words.contains(address.to_string().as_str())).collect();
            assert!(found.is_empty(), "nft still names {found:?}:\n{listed}");
        }
    }

    /// No client of EC2 did what none should.
    pub fn assert_no_complaints(&self) {
        assert_eq!(self.world.cloud.complaints(), Vec::<String>::new());
    }
}

// A process that is being started on another thread holds the last probe's socket until its exec.
fn run(flow: &Flow<'_>, proto: Proto) -> Result<SocketAddr, String> {
    let end = clock::instant() + FLOW_TIMEOUT;
    loop {
        match flow.run(proto, FLOW_TIMEOUT).map_err(|error| error.to_string()) {
            Err(error) if error.contains("Address already in use") && clock::instant() < end => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
}

pub fn fresh_container() -> String {
    let mut random = [0; 16];
    sys::random_bytes(&mut random).unwrap();
    format!("{0:032x}{0:032x}", u128::from_be_bytes(random))
}

/// A source of random choices with its seed on standard output, so that a run can be tried again with
/// `ENIBOX_TEST_SEED`.
pub fn seeded() -> Random {
    let given = std::env::var("ENIBOX_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| {
        let mut bytes = [0; 8];
        sys::random_bytes(&mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    });
    println!("seed: ENIBOX_TEST_SEED={seed}");
    Random::new(seed)
}

/// Looks again and again until it is so; says what it was like at the end if it never is.
#[track_caller]
pub fn eventually<T: std::fmt::Debug>(limit: Duration, what: &str, look: impl Fn() -> Result<(), T>) {
    let end = clock::instant() + limit;
    while let Err(state) = look() {
        assert!(clock::instant() < end, "{what}: not within {limit:?}: {state:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
