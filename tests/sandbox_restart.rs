//! IPv6 pods, and pods with several interfaces, live on while their daemon is killed and started again: connections stay,
//! rules and routes are not touched, addresses are not given twice.

#![cfg(feature = "sandbox")]

use enibox::clock;
use enibox::model::net::Family;
use enibox::model::order::Gather as _;
use enibox::model::settings::Settings;
use enibox::netlink::netns::Namespace;
use enibox::netlink::{route, rule};
use enibox::sandbox::agents::{Agent, EVERY_CARD, Runtime, WiredPod};
use enibox::sandbox::flows::{self, Expectation};
use enibox::sandbox::topology::Node;
use enibox::sandbox::world::{HOSTS, Plan, World};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_enibox");
/// The pod that is deleted while its daemon is down.
const DELETED: &str = "b";
const PATIENCE: Duration = Duration::from_secs(10);

/// Two nodes in a mode, with pods.
struct Stage {
    agents: Vec<Option<Agent>>,
    pods: Vec<Vec<WiredPod>>,
    nodes: Vec<Arc<Node>>,
    settings: Settings,
    env: Vec<(String, String)>,
    logs: PathBuf,
    world: World,
}

impl Stage {
    fn new(name: &str, instance_type: &str, env: &[(&str, &str)]) -> Stage {
        let home = std::env::temp_dir().join(format!("enibox-restart-{}-{name}", std::process::id()));
        let world = World::create(&Plan { nodes: 2, instance_type, seed: 3, home: &home }).unwrap();
        let nodes = (0..2).map(|index| world.node(index).unwrap()).collect::<Vec<_>>();
        let find = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let settings = Settings::parse(find).0;
        let env = env.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let logs = world.topology().run().logs();
        let (agents, pods) = (vec![None, None], vec![Vec::new(), Vec::new()]);
        let mut stage = Stage { agents, pods, nodes, settings, env, logs, world };
        for node in 0..2 {
            stage.nodes[node].prepare(&stage.settings).unwrap();
            stage.start(node);
        }
        stage
    }

    // Starts the daemon of a node; how long it took to serve.
    fn start(&mut self, node: usize) -> Duration {
        let mut agent = Agent::start(Path::new(PROGRAM), &self.logs, &self.nodes[node], &self.env).unwrap();
        let took = agent.wait_ready(&self.nodes[node], &|| Ok(())).unwrap();
        self.agents[node] = Some(agent);
        took
    }

    fn runtime(&self, node: usize) -> Runtime<'_> {
        Runtime {
            program: Path::new(PROGRAM),
            logs: &self.logs,
            node: &self.nodes[node],
            settings: &self.settings,
            egress: None,
        }
    }

    fn add(&mut self, node: usize, name: &str) {
        let annotations = if self.settings.multi_nic { &[EVERY_CARD][..] } else { &[] };
        let pod = self.runtime(node).add(name, annotations).unwrap();
        self.pods[node].push(pod);
    }

    fn every_flow_is_right(&self, when: &str) {
        let v6 = self.settings.enable_ipv6;
        let snat = !self.settings.external_snat;
        let (excluded, services) = (Vec::new(), Vec::new());
        let expectation = Expectation { v6, strict: false, snat, excluded, services, node_port: true };
        let outcomes = flows::run(&self.world, &self.pods, &expectation, &|| Ok(())).unwrap();
        let failed: Vec<_> = outcomes.iter().filter(|outcome| !outcome.ok).collect();
        assert!(failed.is_empty() && outcomes.len() > 50, "{when}: {failed:#?}");
    }

    // All addresses of pods; no two have the same.
    fn addresses(&self) -> BTreeSet<IpAddr> {
        let all = self.pods.iter().flatten().flat_map(addresses).collect::<Vec<_>>();
        let distinct = all.iter().copied().gather::<BTreeSet<_>>();
        assert_eq!(all.len(), distinct.len(), "an address is given twice: {all:?}");
        distinct
    }

    // Until EC2 has not been called for three seconds: an ENI more is routes and rules more, which follow soon.
    fn at_rest(&self) {
        let look = || (self.world.cloud.vpc().journal().counts().clone(), self.state(0));
        let end = clock::instant() + 6 * PATIENCE;
        let (mut last, mut since) = (look(), clock::instant());
        while since.elapsed() < Duration::from_secs(3) {
            std::thread::sleep(Duration::from_millis(100));
            let now = look();
            if now != last {
                (last, since) = (now, clock::instant());
            }
            assert!(clock::instant() < end, "EC2 is called all the time: {last:?}");
        }
    }

    // Rules and routes of a node as text, but those that the kernel makes for each link, which go in its own time.
    fn state(&self, node: usize) -> BTreeSet<String> {
        let mut socket = self.nodes[node].place.socket().unwrap();
        let mut lines = BTreeSet::new();
        for family in [Family::V4, Family::V6] {
            lines.extend(rule::list(&mut socket, family).unwrap().iter().map(|rule| format!("{family:?} rule {rule}")));
            let routes = route::list(&mut socket, family, None).unwrap();
            lines.extend(routes.iter().map(|route| format!("{family:?} route {route}")));
        }
        lines.retain(|line| !line.contains("route fe80::/64"));
        lines
    }
}

fn addresses(pod: &WiredPod) -> Vec<IpAddr> {
    std::iter::once(pod.address).chain(pod.further.iter().map(|(_, address)| *address)).collect()
}

/// Connections that talk until they are told to end; a broken one panics.
struct Talk {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<usize>,
}

impl Talk {
    fn start(lines: &[(Namespace, Namespace, IpAddr)]) -> Talk {
        let mut open = lines.iter().map(|(from, to, at)| connect(from, to, *at)).collect::<Vec<_>>();
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut rounds = 0;
            while !asked.load(Ordering::Relaxed) {
                for (near, far) in &mut open {
                    let mut byte = [7];
                    near.write_all(&byte).unwrap();
                    far.read_exact(&mut byte).unwrap();
                    far.write_all(&byte).unwrap();
                    near.read_exact(&mut byte).unwrap();
                }
                rounds += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
            rounds
        });
        Talk { stop, thread }
    }

    fn finish(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn connect(from: &Namespace, to: &Namespace, at: IpAddr) -> (TcpStream, TcpStream) {
    let listener = to.run(|| TcpListener::bind(SocketAddr::new(at, 0))).unwrap().unwrap();
    let target = listener.local_addr().unwrap();
    let near = from.run(|| TcpStream::connect_timeout(&target, PATIENCE)).unwrap().unwrap();
    let far = listener.accept().unwrap().0;
    for stream in [&near, &far] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
    }
    (near, far)
}

// From each pod of the first node, but the one that is deleted, to hosts and to a pod of the other node, and from the host in
// the VPC to each of its addresses.
fn lines(stage: &Stage) -> Vec<(Namespace, Namespace, IpAddr)> {
    let v6 = stage.settings.enable_ipv6;
    let mut lines = Vec::new();
    let handle = |pod: &WiredPod| pod.pod.place.handle().unwrap();
    for (number, pod) in stage.pods[0].iter().enumerate().filter(|(_, pod)| pod.name != DELETED) {
        for host in HOSTS.iter().filter(|host| host.name != "second-cidr") {
            lines.push((handle(pod), stage.world.namespace(host.name).unwrap(), host.at(v6)));
        }
        let host = || stage.world.namespace("vpc-host").unwrap();
        lines.extend(addresses(pod).into_iter().map(|address| (host(), handle(pod), address)));
        let peer = &stage.pods[1][number % stage.pods[1].len()];
        lines.push((handle(pod), handle(peer), peer.address));
    }
    lines
}

fn story(name: &str, instance_type: &str, env: &[(&str, &str)], interfaces: usize) {
    let mut stage = Stage::new(name, instance_type, env);
    for node in 0..2 {
        for pod in ["a", DELETED, "c"] {
            stage.add(node, pod);
        }
    }
    assert!(stage.pods.iter().flatten().all(|pod| addresses(pod).len() == interfaces));
    stage.every_flow_is_right("at first");
    stage.at_rest();
    let (first, before) = (stage.addresses(), stage.state(0));
    let talk = Talk::start(&lines(&stage));

    drop(stage.agents[0].take()); // SIGKILL
    stage.every_flow_is_right("without a daemon");
    let deleted = stage.pods[0].iter().position(|pod| pod.name == DELETED).unwrap();
    let gone = stage.pods[0].remove(deleted);
    let kept = addresses(&gone);
    stage.runtime(0).delete(gone).unwrap();
    let took = stage.start(0);
    eprintln!("{name}: serves {took:?} after a restart with living pods");
    // Word by word: 10.20.13.11 is a part of 10.20.13.119.
    let ours = |line: &&String| line.split(' ').any(|word| word.parse().is_ok_and(|address| kept.contains(&address)));
    let expected = before.iter().filter(|line| !ours(line)).cloned().collect::<BTreeSet<_>>();
    let log = || std::fs::read_to_string(stage.logs.join("node-1-ipamd.log")).unwrap_or_default();
    assert_eq!(stage.state(0), expected, "{name}: only the deleted pod's entries are gone\n{}", log());

    stage.add(0, "d");
    let there = stage.addresses();
    let new = there.difference(&first).count();
    assert_eq!((new, there.len()), (interfaces, first.len()), "a new pod has addresses that nobody has or just had");
    stage.every_flow_is_right("after the restart");
    let rounds = talk.finish();
    eprintln!("{name}: connections have talked {rounds} times");
    assert!(rounds > 0);

    for node in 0..2 {
        let pods = std::mem::take(&mut stage.pods[node]);
        let all = pods.iter().flat_map(addresses).collect::<Vec<_>>();
        for pod in pods {
            stage.runtime(node).delete(pod).unwrap();
        }
        assert_eq!(stage.nodes[node].place.traces("no such link", &all).unwrap(), Vec::<String>::new(), "{name}");
    }
    stage.agents.into_iter().flatten().for_each(|agent| agent.stop().unwrap());
    assert_eq!(stage.world.cloud.complaints(), Vec::<String>::new());
}

const IPV6: [(&str, &str); 2] = [("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true")];
const EVERY_NIC: (&str, &str) = ("ENABLE_MULTI_NIC", "true");

#[test]
fn ipv6_pods_outlive_their_daemon() {
    story("ipv6", "m5.large", &IPV6, 1);
}

#[test]
fn pods_with_several_interfaces_outlive_their_daemon() {
    story("multi-nic", "p4d.24xlarge", &[EVERY_NIC], 4);
}

#[test]
fn ipv6_pods_with_several_interfaces_outlive_their_daemon() {
    story("multi-nic-ipv6", "c6in.32xlarge", &[IPV6[0], IPV6[1], EVERY_NIC], 2);
}
