//! What pods cost on a node that has many: ADD, DEL and the daemon's part of both with 10, 100, 500 and 1,000 pods, each round
//! beside one on a node with 10, so that the machine's load falls on both. The same for the bare kernel work (`benches/pod.rs`),
//! whose growth is not ours: the kernel goes through a list of all rules for each that it adds or deletes. Then with 1,000
//! pods: `enibox doctor`, and how soon a daemon that was killed serves an ADD again.
//!
//! The nodes are of the sandbox, with prefixes, and every pod has its namespace and was wired by the plugin. Run as root:
//! `cargo bench --bench crowd`. `ENIBOX_BENCH_PROGRAM` names another executable to measure, the static release one for instance.
//! The exit status is 1 if a promise was not kept.

#[path = "support/promise.rs"]
mod promise;

use enibox::clock;
use enibox::model::naming::{self, DAEMON_SOCKET};
use enibox::model::net::{Address, Mac};
use enibox::model::wire::{AddNetworkReply, AddNetworkRequest, DelNetworkReply, DelNetworkRequest};
use enibox::netlink::netns::Namespace;
use enibox::netlink::{Request, Socket, addr, link, neigh, route, rule};
use enibox::plan::pod::PodInterface;
use enibox::rpc::grpc::Client;
use enibox::rpc::proto::path;
use enibox::sandbox::agents::Agent;
use enibox::sandbox::kube::Api;
use enibox::sandbox::topology::{Node, Pod};
use enibox::sandbox::world::{Plan, World};
use enibox::sys;
use promise::Promises;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Pods of the smaller node, and of the larger one at each step.
const FEW: usize = 10;
const CROWDS: [usize; 4] = [10, 100, 500, 1000];
/// Pods that come and go at each step, and those that do not count.
const ROUNDS: usize = 60;
const WARM_UP: usize = 5;
/// Takes that many addresses with three ENIs.
const INSTANCE: &str = "m5.4xlarge";
/// The ENI's route table of the bare work: a secondary ENI, so that both rules are made.
const TABLE: u32 = 2;
const MTU: u32 = 9001;
const LIMIT: Duration = Duration::from_mins(1);
/// What is promised: p50 beside many pods against p50 beside few, and times with many.
const RATIO_MAX: f64 = 1.5;
const DOCTOR_MAX_S: f64 = 2.0;
const RESTART_MAX_S: f64 = 1.0;
/// How often `enibox doctor` is run and the daemon restarted.
const REPEATS: usize = 5;

fn main() -> ExitCode {
    // `cargo bench -- --list` and the like concern the standard harness.
    if std::env::args().any(|word| word == "--list") {
        return ExitCode::SUCCESS;
    }
    assert_eq!(sys::effective_uid(), 0, "the benchmark makes network namespaces: run it as root");
    // What stands below /run goes with this process.
    sys::unshare_mounts().unwrap();
    sys::mount_tmpfs(Path::new("/run")).unwrap();
    let home = std::env::temp_dir().join("enibox-crowd");
    let mut world = World::create(&Plan { nodes: 2, instance_type: INSTANCE, seed: 1, home: &home }).unwrap();
    let mut api = Api::new();
    for node in &world.nodes {
        api.add_node(&node.name, 1100);
    }
    world.serve_kube(api).unwrap();
    let (mut few, mut crowd) = (Stage::start(&world, 0, FEW), Stage::start(&world, 1, CROWDS[3]));
    let (mut bare_few, mut bare_crowd) = (Bare::new("few"), Bare::new("crowd"));
    few.fill(FEW);
    bare_few.fill(FEW);
    println!(
        "p50 and p10 in us, beside {FEW} pods at the same time; processor time of the daemon per ADD and DEL in us"
    );
    let mut times = Times::new();
    for pods in CROWDS {
        crowd.fill(pods);
        bare_crowd.fill(pods);
        times = step(pods, (&few, &crowd), (&mut bare_few, &mut bare_crowd));
    }
    let doctor = crowd.consult();
    let restart = crowd.restart();
    let mut promises = Promises::default();
    let seconds = |times: &[Duration]| percentile(times, 50).as_secs_f64();
    for what in ["ADD", "DEL"] {
        let (few, crowd) = &times[what];
        let what = format!("{what} beside {} pods", CROWDS[3]);
        promises.most(&what, seconds(crowd) / seconds(few), RATIO_MAX, "times");
    }
    promises.most("doctor", seconds(&doctor), DOCTOR_MAX_S, "s");
    promises.most("from the start of a daemon to the end of an ADD", seconds(&restart), RESTART_MAX_S, "s");
    promises.code()
}

/// What was measured on the smaller node and on the larger one, by name.
type Times = BTreeMap<&'static str, (Vec<Duration>, Vec<Duration>)>;

/// One line for each thing that is measured, of rounds on both nodes in turn.
fn step(pods: usize, (few, crowd): (&Stage, &Stage), (bare_few, bare_crowd): (&mut Bare, &mut Bare)) -> Times {
    let mut times = Times::new();
    let mut used = [BTreeMap::new(), BTreeMap::new()];
    for round in 0..WARM_UP + ROUNDS {
        let mut note = |what, few, crowd| {
            let both = times.entry(what).or_default();
            if round >= WARM_UP {
                both.0.push(few);
                both.1.push(crowd);
            }
        };
        let (one, other) = in_turn(round, || bare_few.round(), || bare_crowd.round());
        for (part, what) in ["bare veth", "bare host's side", "bare pod's side", "bare DEL"].into_iter().enumerate() {
            note(what, one[part], other[part]);
        }
        let add = |parts: [Duration; 4]| parts[..3].iter().sum();
        note("bare ADD", add(one), add(other));
        let before = [few.processor(), crowd.processor()];
        let (one, other) = in_turn(round, || few.round(), || crowd.round());
        note("ADD", one[0], other[0]);
        note("DEL", one[1], other[1]);
        note("of it AddNetwork", one[2], other[2]);
        note("of it DelNetwork", one[3], other[3]);
        note("VERSION", one[4], other[4]);
        for (used, (before, after)) in used.iter_mut().zip(before.into_iter().zip([few.processor(), crowd.processor()]))
        {
            for (thread, time) in after {
                let spent = time.saturating_sub(before.get(&thread).copied().unwrap_or_default());
                *used.entry(thread).or_insert(Duration::ZERO) += spent;
            }
        }
    }
    for (what, (few, crowd)) in &times {
        let ratio = percentile(crowd, 50).as_secs_f64() / percentile(few, 50).as_secs_f64();
        let [a, b, c, d] =
            [(few, 50), (few, 10), (crowd, 50), (crowd, 10)].map(|(of, p)| percentile(of, p).as_micros());
        println!("{pods:>5} pods  {what:<18}{c:>8}{d:>8}   {FEW} pods {a:>8}{b:>8}   ratio {ratio:.2}");
    }
    let [few, crowd] = &used;
    // Each round has two ADDs and two DELs: the plugin's, and those without it.
    let per = |time: Duration| time.as_micros() / (2 * (WARM_UP + ROUNDS) as u128);
    let text = |of: &BTreeMap<String, Duration>| {
        let threads = of.iter().filter(|(_, time)| per(**time) >= 10);
        threads.map(|(name, time)| format!("{name} {}", per(*time))).collect::<Vec<_>>().join(", ")
    };
    println!("{pods:>5} pods  daemon             {}\n            beside {FEW} pods    {}", text(crowd), text(few));
    times
}

/// Both, in an order that changes from round to round. What a link's end leaves to the kernel is done in the pauses.
fn in_turn<T>(round: usize, one: impl FnOnce() -> T, other: impl FnOnce() -> T) -> (T, T) {
    let pause = || std::thread::sleep(Duration::from_millis(40));
    pause();
    if round.is_multiple_of(2) {
        let first = one();
        pause();
        return (first, other());
    }
    let second = other();
    pause();
    (one(), second)
}

fn program() -> PathBuf {
    std::env::var_os("ENIBOX_BENCH_PROGRAM").map_or_else(|| env!("CARGO_BIN_EXE_enibox").into(), PathBuf::from)
}

/// A node with the daemon and pods.
struct Stage {
    node: Arc<Node>,
    name: String,
    env: Vec<(String, String)>,
    agent: Option<Agent>,
    logs: PathBuf,
    pods: Vec<Pod>,
    plugin: PathBuf,
    /// Comes and goes.
    guest: Pod,
    inside: Mutex<Socket>,
}

impl Stage {
    fn start(world: &World, index: usize, pods: usize) -> Stage {
        let node = world.node(index).unwrap();
        let env = [
            ("CLUSTER_ENDPOINT", "http://198.51.100.2".to_owned()),
            ("ENABLE_PREFIX_DELEGATION", "true".into()),
            ("MINIMUM_IP_TARGET", (pods + 20).to_string()),
            ("WARM_IP_TARGET", "1".into()),
            // The guests' addresses are given out again and again.
            ("IP_COOLDOWN_PERIOD", "0".into()),
            ("AWS_VPC_K8S_CNI_LOGLEVEL", "WARN".into()),
        ];
        let env = env.map(|(name, value)| (name.to_owned(), value)).to_vec();
        let name = world.nodes[index].name.clone();
        let logs = world.topology().run().logs();
        let plugin = logs.join("aws-cni");
        if !plugin.exists() {
            std::os::unix::fs::symlink(program(), &plugin).unwrap();
        }
        let guest = node.create_pod("guest").unwrap();
        let inside = guest.place.socket().unwrap().into();
        let mut stage = Stage { node, name, env, agent: None, logs, pods: Vec::new(), plugin, guest, inside };
        stage.run();
        let agent = stage.agent.as_mut().unwrap();
        agent.wait_ready(&stage.node, &|| Ok(())).unwrap();
        stage
    }

    fn run(&mut self) {
        self.agent = Some(Agent::start(&program(), &self.logs, &self.node, &self.env).unwrap());
    }

    fn fill(&mut self, pods: usize) {
        while self.pods.len() < pods {
            let number = self.pods.len();
            let pod = self.node.create_pod(&format!("pod-{number}")).unwrap();
            let end = clock::instant() + LIMIT;
            while let Err(refused) = self.here(|| self.call("ADD", &format!("pod-{number}"), &pod)) {
                assert!(clock::instant() < end, "{refused}");
            }
            self.pods.push(pod);
        }
        // What follows from so many ADDs is not of the next one.
        std::thread::sleep(Duration::from_secs(8));
    }

    /// Runs `work` on a thread in the node's namespaces; what it starts inherits them.
    fn here<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let net = self.node.place.handle().unwrap();
        let work = || {
            Ok(std::thread::scope(|scope| {
                let inside = || {
                    sys::enter_netns(&net).unwrap();
                    work()
                };
                inside_thread(scope, inside)
            }))
        };
        self.node.inside(work).unwrap()
    }

    fn call(&self, verb: &str, name: &str, pod: &Pod) -> Result<(), String> {
        let config = concat!(
            r#"{"cniVersion":"1.0.0","name":"aws-cni","type":"aws-cni","vethPrefix":"eni","mtu":"9001","#,
            r#""pluginLogFile":"/run/plugin.log","pluginLogLevel":"INFO","podSGEnforcingMode":"strict"}"#
        );
        let mut child = Command::new(&self.plugin)
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", container(name))
            .env("CNI_NETNS", &pod.path)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=production;K8S_POD_NAME={name}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        // It may have answered without reading: VERSION does not need the configuration.
        _ = child.stdin.take().unwrap().write_all(config.as_bytes());
        let output = child.wait_with_output().unwrap();
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stdout).into_owned()) }
    }

    /// ADD and DEL of the plugin, the daemon's part of both, and VERSION.
    fn round(&self) -> [Duration; 5] {
        let guest = &self.guest;
        let whole = |verb| timed(|| self.call(verb, "guest", guest).unwrap());
        let [add, del, version] = self.here(|| ["ADD", "DEL", "VERSION"].map(whole));
        self.inside.lock().unwrap().run(&[link::delete_by_name("eth0").or_not_found()]).unwrap();
        let [first, second] = self.here(|| [timed(|| self.ask_add("lodger")), timed(|| ask_del("lodger"))]);
        [add, del, first, second, version]
    }

    fn ask_add(&self, name: &str) {
        let request = AddNetworkRequest {
            pod_name: name.into(),
            pod_namespace: "production".into(),
            infra_container_id: String::new(),
            netns: self.guest.path.to_string_lossy().into_owned(),
            if_name: "eth0".into(),
            network_name: "aws-cni".into(),
            container_id: container(name),
            client_version: enibox::VERSION.into(),
            requires_multi_nic: false,
        };
        let mut client = Client::connect(Path::new(DAEMON_SOCKET), LIMIT).unwrap();
        let reply: AddNetworkReply = client.call(path::ADD_NETWORK, &request, LIMIT).unwrap();
        assert!(reply.success, "{}", reply.failure);
    }

    /// What each of the daemon's threads has used of a processor.
    fn processor(&self) -> BTreeMap<String, Duration> {
        let pid = self.agent.as_ref().unwrap().pid();
        let mut used = BTreeMap::new();
        for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
            let read = |name: &str| fs::read_to_string(thread.path().join(name));
            // A thread may end meanwhile.
            let (Ok(name), Ok(times)) = (read("comm"), read("schedstat")) else { continue };
            let nanos = times.split(' ').next().unwrap().parse().unwrap();
            let name = name.trim().trim_end_matches(|c: char| c.is_ascii_digit() || c == '-').to_owned();
            *used.entry(name).or_insert(Duration::ZERO) += Duration::from_nanos(nanos);
        }
        used
    }

    fn consult(&self) -> Vec<Duration> {
        let ask = || {
            let mut command = self.node.command(program()).unwrap();
            command.args(["doctor", "--root", "/nonexistent"]).env_clear().stdin(Stdio::null());
            command.env("MY_NODE_NAME", &self.name);
            command.env("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{}", enibox::sandbox::topology::IMDS));
            command.env("AWS_EC2_ENDPOINT", format!("http://{}", enibox::sandbox::topology::EC2));
            command.envs(self.env.iter().map(|(name, value)| (name, value)));
            command.output().unwrap()
        };
        let mut last = None;
        let times: Vec<Duration> = (0..REPEATS).map(|_| timed(|| last = Some(ask()))).collect();
        let output = last.unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let lines: Vec<&str> = text.lines().collect();
        println!(
            "doctor with {} pods: {times:?}, {}: {}",
            self.pods.len(),
            output.status,
            lines[lines.len().saturating_sub(3)..].join(" / ")
        );
        times
    }

    /// From the start of the new daemon to the end of the first ADD.
    fn restart(&mut self) -> Vec<Duration> {
        let mut times = Vec::new();
        for _ in 0..REPEATS {
            self.agent = None; // kills it
            let start = clock::instant();
            self.run();
            let ready = self.agent.as_mut().unwrap().wait_ready(&self.node, &|| Ok(())).unwrap();
            let asked = clock::instant();
            self.here(|| {
                while let Err(refused) = self.call("ADD", "guest", &self.guest) {
                    assert!(start.elapsed() < LIMIT, "{refused}");
                }
            });
            let (all, add) = (start.elapsed(), asked.elapsed());
            times.push(all);
            println!(
                "restart with {} pods: serves after {ready:?}, an ADD is done after {all:?} ({add:?} of it its own)",
                self.pods.len()
            );
            self.here(|| self.call("DEL", "guest", &self.guest).unwrap());
            self.inside.lock().unwrap().run(&[link::delete_by_name("eth0").or_not_found()]).unwrap();
        }
        times
    }
}

fn inside_thread<'scope, T: Send + 'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> T {
    scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn ask_del(name: &str) {
    let request = DelNetworkRequest {
        pod_name: name.into(),
        pod_namespace: "production".into(),
        infra_container_id: String::new(),
        reason: "PodDeleted".into(),
        if_name: "eth0".into(),
        network_name: "aws-cni".into(),
        container_id: container(name),
        client_version: enibox::VERSION.into(),
        pod_uid: String::new(),
    };
    let mut client = Client::connect(Path::new(DAEMON_SOCKET), LIMIT).unwrap();
    let reply: DelNetworkReply = client.call(path::DEL_NETWORK, &request, LIMIT).unwrap();
    assert!(reply.success);
}

fn container(name: &str) -> String {
    format!("{name:0>64}")
}

/// A network namespace that no daemon watches, with what the kernel holds for its pods.
struct Bare {
    name: String,
    host: Socket,
    pods: Vec<Namespace>,
    guest: Namespace,
    inside: Socket,
}

impl Bare {
    fn new(name: &str) -> Bare {
        let mut host = Socket::route_in(&namespace(name, "host")).unwrap();
        // As a node has it: the kernel looks for a source of each route, link by link until it finds an address.
        let lo = link::by_name(&mut host, "lo").unwrap().unwrap().index;
        let addr = "198.18.0.1/32".parse().unwrap();
        let own = Address { dev: lo, addr, no_prefix_route: false, no_dad: false };
        host.run(&[link::set_up(lo), addr::add(&own)]).unwrap();
        let guest = namespace(name, "guest");
        let inside = Socket::route_in(&guest).unwrap();
        Bare { name: name.to_owned(), host, pods: Vec::new(), guest, inside }
    }

    fn pod(number: usize) -> PodInterface {
        let [.., third, fourth] = u32::try_from(number).unwrap().to_be_bytes();
        PodInterface {
            host_veth: naming::host_veth(naming::DEFAULT_VETH_PREFIX, "bare", &format!("pod-{number}"), 0).unwrap(),
            ifname: "eth0".into(),
            address: Ipv4Addr::new(10, 2, third, fourth).into(),
            gateway: naming::gateway(false, 0).unwrap(),
            table: TABLE,
            mtu: MTU,
            host_mac: Mac([2, 0, 0, 0, third, fourth]),
            branch: None,
        }
    }

    fn fill(&mut self, pods: usize) {
        while self.pods.len() < pods {
            let number = self.pods.len();
            let (pod, home) = (Self::pod(number), namespace(&self.name, &number.to_string()));
            let mut inside = Socket::route_in(&home).unwrap();
            let (outer, inner) = make_veth(&mut self.host, &pod, &home);
            host_side(&mut self.host, &pod, outer);
            pod_side(&mut inside, &pod, inner);
            self.pods.push(home);
        }
    }

    /// The parts of an ADD, and a DEL.
    fn round(&mut self) -> [Duration; 4] {
        let pod = Self::pod(60_000);
        let start = clock::instant();
        let (outer, inner) = make_veth(&mut self.host, &pod, &self.guest);
        let veth = start.elapsed();
        let route = timed(|| host_side(&mut self.host, &pod, outer));
        let inside = timed(|| pod_side(&mut self.inside, &pod, inner));
        let del = timed(|| {
            let rules = [Some(pod.to_rule()), pod.from_rule()];
            let mut requests: Vec<Request> = rules.iter().flatten().map(rule::delete).collect();
            requests.push(route::delete(&pod.host_route(0)));
            self.host.run(&requests).unwrap();
        });
        self.inside.run(&[link::delete_by_name("eth0")]).unwrap();
        [veth, route, inside, del]
    }
}

fn namespace(name: &str, what: &str) -> Namespace {
    Namespace::create_named(Path::new("/run/bare"), &format!("{name}-{what}")).unwrap()
}

/// Makes the veth; indices of the host's end and of the pod's.
fn make_veth(host: &mut Socket, pod: &PodInterface, home: &Namespace) -> (u32, u32) {
    let create = link::create_veth(&link::Veth {
        up: false,
        end: link::End { name: &pod.host_veth, mac: Some(pod.host_mac), netns: None },
        peer: link::End { name: &pod.ifname, mac: None, netns: Some(home.as_fd()) },
        mtu: pod.mtu,
    });
    let outcomes = host.batch(&[create, link::query(&pod.host_veth)]).unwrap();
    let found = outcomes.into_iter().next_back().unwrap().unwrap();
    let outer = found.iter().find_map(|body| link::decode(body)).unwrap();
    (outer.index, outer.parent.unwrap())
}

fn host_side(host: &mut Socket, pod: &PodInterface, outer: u32) {
    let rules = [Some(pod.to_rule()), pod.from_rule()];
    let mut requests = vec![link::set_up(outer), route::replace(&pod.host_route(outer))];
    requests.extend(rules.iter().flatten().map(rule::add));
    host.run(&requests).unwrap();
}

fn pod_side(inside: &mut Socket, pod: &PodInterface, inner: u32) {
    let [gateway, default] = pod.pod_routes(0, inner);
    let requests: [Request; 5] = [
        link::set_up(inner),
        route::replace(&gateway),
        route::add(&default),
        addr::add(&pod.pod_address(inner)),
        neigh::add(&pod.pod_neighbour(inner, pod.host_mac)),
    ];
    inside.run(&requests).unwrap();
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = clock::instant();
    work();
    start.elapsed()
}

fn percentile(times: &[Duration], percent: usize) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}
