//! What a pod costs: ADD and DEL as whole processes of the plugin with a warm daemon, beside the bare kernel work for the
//! same pod (veth, address, routes, neighbour, rules) done by this process with sockets that are open already. The veth
//! goes with the pod's namespace, so that no DEL has its price.
//!
//! The same for IPv6, whose ADD is set beside that of IPv4.
//!
//! The daemon is the real one on a node of the sandbox, with enough addresses for all pods; the bare work is done in a network
//! namespace that no daemon watches. Run as root: `cargo bench --bench pod`. Nothing of it shows outside of namespaces that
//! end with this process. Figures mean something on an idle machine only: a plugin process waits for the scheduler a dozen
//! times, the bare work never. `ENIBOX_BENCH_PROGRAM` names another executable to measure, the static release one for instance.
//! The exit status is 1 if an IPv6 ADD takes longer beside one of IPv4 than is promised.

#[path = "support/promise.rs"]
mod promise;

use enibox::clock;
use enibox::model::ec2::Interface;
use enibox::model::naming;
use enibox::model::net::Mac;
use enibox::netlink::netns::Namespace;
use enibox::netlink::{Request, Socket, addr, link, neigh, route, rule};
use enibox::plan::pod::PodInterface;
use enibox::sandbox::topology::{EC2, IMDS};
use enibox::sandbox::world::{Plan, World};
use enibox::sys;
use promise::Promises;
use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

/// Pods one after the other.
const ROUNDS: usize = 300;
/// Pods at the same moment, and how often that is done.
const AT_ONCE: usize = 30;
const BURSTS: usize = 20;
/// Rounds at the start that do not count.
const WARM_UP: usize = 20;
/// The ENI's route table of the bare work: a secondary ENI, so that both rules are made.
const TABLE: u32 = 2;
const MTU: u32 = 9001;
/// Addresses that the daemon holds, so that no pod waits for EC2.
const ADDRESSES: usize = 40;
/// How long the daemon may take to get them.
const POOL_TIMEOUT: Duration = Duration::from_mins(1);

/// Nobody waits for duplicate address detection.
const V6_RATIO_MAX: f64 = 1.5;

/// Times of ADDs and DELs.
type Times = (Vec<Duration>, Vec<Duration>);

fn main() -> ExitCode {
    // `cargo bench -- --list` and the like concern the standard harness.
    if std::env::args().any(|word| word == "--list") {
        return ExitCode::SUCCESS;
    }
    assert_eq!(sys::effective_uid(), 0, "the benchmark makes network namespaces: run it as root");
    let (v4, version) = family(false);
    println!("{:<34}{:>10}{:>10}{:>10}{:>10}", "", "p50 us", "p99 us", "p50 ratio", "p99 ratio");
    v4.report("");
    report("VERSION, whole process", &version, None);
    let (v6, _) = family(true);
    v6.report("IPv6 ");
    println!("beside IPv4:");
    report("IPv6 ADD, whole process", &v6.whole.0, Some(&v4.whole.0));
    report(&format!("IPv6 ADD, {AT_ONCE} at once"), &v6.whole_bursts.0, Some(&v4.whole_bursts.0));
    let mut promises = Promises::default();
    let [v6, v4] = [&v6.whole.0, &v4.whole.0].map(|times| percentile(times, 50).as_secs_f64());
    promises.most("an IPv6 ADD beside one of IPv4", v6 / v4, V6_RATIO_MAX, "times");
    promises.code()
}

/// Everything of one family.
struct Series {
    bare: Times,
    bare_bursts: Times,
    whole: Times,
    whole_bursts: Times,
}

impl Series {
    fn report(&self, family: &str) {
        report(&format!("{family}bare ADD"), &self.bare.0, None);
        report(&format!("{family}ADD, whole process"), &self.whole.0, Some(&self.bare.0));
        report(&format!("{family}bare DEL"), &self.bare.1, None);
        report(&format!("{family}DEL, whole process"), &self.whole.1, Some(&self.bare.1));
        report(&format!("{family}bare ADD, {AT_ONCE} at once"), &self.bare_bursts.0, None);
        report(&format!("{family}ADD, {AT_ONCE} at once"), &self.whole_bursts.0, Some(&self.bare_bursts.0));
        report(&format!("{family}bare DEL, {AT_ONCE} at once"), &self.bare_bursts.1, None);
        report(&format!("{family}DEL, {AT_ONCE} at once"), &self.whole_bursts.1, Some(&self.bare_bursts.1));
    }
}

/// Measures one family; and the plugin's VERSION, which knows none.
fn family(v6: bool) -> (Series, Vec<Duration>) {
    let (bare, bare_bursts) = aside(|| {
        sys::unshare_mounts().unwrap();
        sys::mount_tmpfs(Path::new("/run")).unwrap();
        sys::unshare_netns().unwrap();
        measure(v6, Pod::bare_add, Pod::bare_del)
    });
    let node = Node::start(v6);
    let (whole, whole_bursts, version) = aside(|| {
        sys::enter_mounts(&node.mounts).unwrap();
        sys::enter_netns(&node.network).unwrap();
        let (whole, bursts) = measure(v6, Pod::add, Pod::del);
        let pod = Pod::new(v6, AT_ONCE);
        (whole, bursts, repeat(ROUNDS, || pod.version()))
    });
    (Series { bare, bare_bursts, whole, whole_bursts }, version)
}

/// Runs `work` on a thread of its own, which may change its namespaces; what it starts inherits them.
fn aside<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

/// Both series, in the calling thread's namespaces, on pods of their own.
fn measure(v6: bool, add: fn(&mut Pod), del: fn(&mut Pod)) -> (Times, Times) {
    let mut pods: Vec<Pod> = (0..AT_ONCE).map(|number| Pod::new(v6, number)).collect();
    let links = || link::list(&mut Socket::route().unwrap()).unwrap().len();
    let before = links();
    let times = (one_by_one(&mut pods[0], add, del), bursts(&mut pods, add, del));
    assert_eq!(links(), before, "pods have left links behind");
    times
}

fn program() -> PathBuf {
    std::env::var_os("ENIBOX_BENCH_PROGRAM").map_or_else(|| env!("CARGO_BIN_EXE_enibox").into(), PathBuf::from)
}

/// A node of the sandbox with a daemon that holds enough addresses.
struct Node {
    network: File,
    mounts: File,
    daemon: Child,
    /// Last, because the daemon needs it.
    _world: World,
}

impl Node {
    fn start(v6: bool) -> Node {
        let home = std::env::temp_dir().join("enibox-bench");
        let plan = Plan { nodes: 1, instance_type: "m5.xlarge", seed: 1, home: &home };
        let world = World::create(&plan).unwrap();
        let node = &world.nodes[0];
        let topology = world.topology();
        let names = topology.run().path().to_owned();
        let open = |kind: &str| File::open(names.join(kind).join(&node.name)).unwrap();
        let (network, mounts) = (open("netns"), open("mnt"));
        let mut command = topology.node(&node.instance).unwrap().command(program()).unwrap();
        command.arg0("aws-k8s-agent").env_clear().stdin(Stdio::null()).stdout(Stdio::null());
        command.envs([
            ("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{IMDS}")),
            ("AWS_EC2_ENDPOINT", format!("http://{EC2}")),
            ("MY_NODE_NAME", node.name.clone()),
            ("ENABLE_IPv6", v6.to_string()),
            ("ENABLE_PREFIX_DELEGATION", v6.to_string()),
            ("MINIMUM_IP_TARGET", ADDRESSES.to_string()),
            ("WARM_IP_TARGET", "1".into()),
            // The same few addresses are given out again and again.
            ("IP_COOLDOWN_PERIOD", "0".into()),
            ("AWS_VPC_K8S_CNI_LOGLEVEL", "WARN".into()),
            ("AWS_VPC_K8S_CNI_LOG_FILE", "stderr".into()),
        ]);
        let daemon = command.spawn().unwrap();
        drop(topology);
        // One IPv6 prefix is more than enough.
        let of = |eni: &Interface| if v6 { eni.v6_prefixes.len() * ADDRESSES } else { eni.secondary_ipv4s.len() };
        let held = || world.cloud.vpc().interfaces().map(of).sum::<usize>();
        let start = clock::instant();
        while held() < ADDRESSES {
            assert!(start.elapsed() < POOL_TIMEOUT, "the daemon has {} addresses after {POOL_TIMEOUT:?}", held());
            std::thread::sleep(Duration::from_millis(50));
        }
        // The last ENI is still being set up when EC2 has given its addresses.
        std::thread::sleep(Duration::from_secs(3));
        Node { network, mounts, daemon, _world: world }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Both fail when it has ended.
        _ = self.daemon.kill();
        _ = self.daemon.wait();
    }
}

/// A pod's namespace and everything prepared that is not to be timed.
struct Pod {
    plugin: PathBuf,
    container: String,
    namespace: Namespace,
    host: Socket,
    inside: Socket,
    interface: PodInterface,
}

impl Pod {
    /// Puts a namespace and the plugin below `/run`, which is private.
    fn new(v6: bool, number: usize) -> Pod {
        let name = format!("pod-{number}");
        let dir = Path::new("/run/enibox-bench");
        let namespace = Namespace::create_named(&dir.join("netns"), &name).unwrap();
        let plugin = dir.join("aws-cni");
        if !plugin.exists() {
            std::os::unix::fs::symlink(program(), &plugin).unwrap();
        }
        let number = u32::try_from(number).unwrap();
        let address: IpAddr = if v6 {
            Ipv6Addr::from_bits((0x2001_0db8 << 96) + u128::from(number)).into()
        } else {
            Ipv4Addr::from_bits(0x0a02_0000 + number).into()
        };
        let interface = PodInterface {
            host_veth: naming::host_veth(naming::DEFAULT_VETH_PREFIX, "bare", &name, 0).unwrap(),
            ifname: "eth0".into(),
            address,
            gateway: naming::gateway(v6, 0).unwrap(),
            table: TABLE,
            mtu: MTU,
            host_mac: Mac([2, 0, 0, 0, 0, number.to_be_bytes()[3]]),
            branch: None,
        };
        let (host, inside) = (Socket::route().unwrap(), Socket::route_in(&namespace).unwrap());
        Pod { plugin, container: name, namespace, host, inside, interface }
    }

    fn call(&self, command: &str) {
        let config = concat!(
            r#"{"cniVersion":"1.0.0","name":"aws-cni","type":"aws-cni","vethPrefix":"eni","mtu":"9001","#,
            r#""pluginLogFile":"/run/enibox-bench/plugin.log","pluginLogLevel":"INFO","podSGEnforcingMode":"strict"}"#
        );
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME={}", self.container);
        let mut child = Command::new(&self.plugin)
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.container)
            .env("CNI_NETNS", self.namespace.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env("CNI_ARGS", args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        // It may have answered without reading: VERSION does not need the configuration.
        _ = child.stdin.take().unwrap().write_all(config.as_bytes());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stdout));
    }

    fn add(&mut self) {
        self.call("ADD");
    }

    fn del(&mut self) {
        self.call("DEL");
    }

    fn version(&self) {
        self.call("VERSION");
    }

    /// The same kernel objects in the fewest messages: three sends.
    fn bare_add(&mut self) {
        let pod = &self.interface;
        let create = link::create_veth(&link::Veth {
            up: true,
            end: link::End { name: &pod.host_veth, mac: Some(pod.host_mac), netns: None },
            peer: link::End { name: &pod.ifname, mac: None, netns: Some(self.namespace.as_fd()) },
            mtu: pod.mtu,
        });
        let outcomes = self.host.batch(&[create, link::query(&pod.host_veth)]).unwrap();
        let found = outcomes.into_iter().next_back().unwrap().unwrap();
        let outer = found.iter().find_map(|body| link::decode(body)).unwrap();
        let index = outer.parent.unwrap();
        let rules = [Some(pod.to_rule()), pod.from_rule()];
        let mut requests = vec![route::replace(&pod.host_route(outer.index))];
        requests.extend(rules.iter().flatten().map(rule::add));
        self.host.run(&requests).unwrap();
        let [gateway, default] = pod.pod_routes(0, index);
        let requests: [Request; 5] = [
            link::set_up(index),
            route::replace(&gateway),
            route::add(&default),
            addr::add(&pod.pod_address(index)),
            neigh::add(&pod.pod_neighbour(index, pod.host_mac)),
        ];
        self.inside.run(&requests).unwrap();
    }

    fn bare_del(&mut self) {
        let pod = &self.interface;
        let rules = [Some(pod.to_rule()), pod.from_rule()];
        let mut requests: Vec<Request> = rules.iter().flatten().map(rule::delete).collect();
        requests.push(route::delete(&pod.host_route(0)));
        self.host.run(&requests).unwrap();
    }

    /// What the end of a pod's namespace does, which DEL leaves to the runtime; not timed.
    fn unwire(&mut self) {
        self.inside.run(&[link::delete_by_name(&self.interface.ifname).or_not_found()]).unwrap();
    }
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = clock::instant();
    work();
    start.elapsed()
}

fn repeat(rounds: usize, mut work: impl FnMut()) -> Vec<Duration> {
    (0..WARM_UP).for_each(|_| work());
    (0..rounds).map(|_| timed(&mut work)).collect()
}

/// ADD and DEL, in turn, on one pod.
fn one_by_one(pod: &mut Pod, add: fn(&mut Pod), del: fn(&mut Pod)) -> Times {
    let mut round = || {
        let times = (timed(|| add(pod)), timed(|| del(pod)));
        pod.unwire();
        times
    };
    let both: Vec<(Duration, Duration)> = (0..WARM_UP + ROUNDS).map(|_| round()).collect();
    both.into_iter().skip(WARM_UP).unzip()
}

/// ADD and DEL of all pods at the same moment, each from a thread of its own.
fn bursts(pods: &mut [Pod], add: fn(&mut Pod), del: fn(&mut Pod)) -> Times {
    let mut all = |work: fn(&mut Pod)| -> Vec<Duration> {
        let barrier = std::sync::Barrier::new(pods.len());
        std::thread::scope(|scope| {
            let started: Vec<_> = pods
                .iter_mut()
                .map(|pod| {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        barrier.wait();
                        timed(|| work(pod))
                    })
                })
                .collect();
            started.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    };
    let mut round = || {
        let times = (all(add), all(del));
        all(Pod::unwire);
        times
    };
    let rounds: Vec<(Vec<Duration>, Vec<Duration>)> = (0..=BURSTS).map(|_| round()).collect();
    // The first one warms up.
    let (adds, dels): (Vec<_>, Vec<_>) = rounds.into_iter().skip(1).unzip();
    (adds.concat(), dels.concat())
}

fn report(what: &str, times: &[Duration], against: Option<&[Duration]>) {
    let (p50, p99) = (percentile(times, 50), percentile(times, 99));
    print!("{what:<34}{:>10}{:>10}", p50.as_micros(), p99.as_micros());
    if let Some(bare) = against {
        let ratio = |time: Duration, bare: Duration| time.as_secs_f64() / bare.as_secs_f64();
        print!("{:>10.2}{:>10.2}", ratio(p50, percentile(bare, 50)), ratio(p99, percentile(bare, 99)));
    }
    println!();
}

fn percentile(times: &[Duration], percent: usize) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}
