//! The network policy agent: what the plugin tells it of pods, and what becomes of a pod when it refuses, hangs, dies or is
//! not there; what it learns from the daemon. The agent is Google's gRPC in Python (`tests/foreign/policy_peer.py`).

#![cfg(feature = "sandbox")]

#[path = "support/node.rs"]
mod node;
mod support;

use enibox::model::net::Family;
use enibox::model::wire::{AddNetworkReply, DelNetworkReply, IpAllocation};
use enibox::netlink::{Socket, link, route, rule};
use enibox::sandbox::agents::Agent;
use enibox::sandbox::world::{Plan, World};
use node::{AWS_NODE, Answer, Answers, Node, Seen, Served, given, on_a_node, taken};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;
use support::Netns;
use support::python;

const PROGRAM: &str = env!("CARGO_BIN_EXE_enibox");
const POD_IP: &str = "10.0.12.34";
const REFUSED: &str = "add cmd: failed to setup network policy";
/// The original's limit for the connection, and what a loaded machine may add to it.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
const SLACK: Duration = Duration::from_secs(6);

fn python() -> Option<PathBuf> {
    python::environment("venv-grpc", &["grpcio>=1.60,<2"], "no foreign network policy agent is tried")
}

fn peer(python: &Path, role: &str, socket: &Path) -> Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/foreign/policy_peer.py");
    let mut command = Command::new(python);
    command.arg(script).arg(role).arg(socket).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// The foreign agent, ended with the test.
struct Foreign {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Foreign {
    fn start(python: &Path) -> Foreign {
        fs::create_dir_all(AWS_NODE).unwrap();
        let mut child = peer(python, "agent", &agent_socket()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut foreign = Foreign { child, lines };
        assert_eq!(foreign.next()["call"], "ready");
        foreign
    }

    /// The next call that it got.
    fn next(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    /// It was told of this pod in this mode, with so many interfaces.
    #[track_caller]
    fn assert_enforced(&mut self, pod: &str, mode: &str, interfaces: usize) {
        let mut call = self.next();
        let left = call["left"].take().as_f64().unwrap();
        assert!(left > 0.0 && left <= 10.0, "{left}");
        assert_eq!(
            call,
            json!({"call": "enforce", "left": null, "1": pod, "2": "default", "3": mode, "4": interfaces})
        );
    }

    #[track_caller]
    fn assert_deleted(&mut self, pod: &str) {
        let mut call = self.next();
        assert!(call["left"].take().as_f64().unwrap() > 0.0);
        assert_eq!(call, json!({"call": "delete", "left": null, "1": pod, "2": "default"}));
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn agent_socket() -> PathBuf {
    Path::new(AWS_NODE).join("npa.sock")
}

fn v4(address: &str, device: i32, table: i32) -> IpAllocation {
    IpAllocation { ipv4: address.into(), ipv6: String::new(), device_number: device, route_table_id: table }
}

/// A daemon that gives and takes these in this mode.
fn giving(mode: &str, allocations: &[IpAllocation]) -> Answers {
    Answers {
        add: Ok(AddNetworkReply { network_policy_mode: mode.into(), ..given(allocations) }),
        del: Ok(DelNetworkReply { network_policy_mode: mode.into(), ..taken(allocations) }),
        ..Answers::default()
    }
}

fn one(mode: &str) -> Answers {
    giving(mode, &[v4(POD_IP, 2, 3)])
}

/// Rules, routes and links of the calling thread's namespace, but for what each link has of its own and the veths of pods:
/// those of earlier ones go in the kernel's own time.
fn state() -> Vec<String> {
    let mut socket = Socket::route().unwrap();
    let mut lines: Vec<String> = link::list(&mut socket).unwrap().into_iter().map(|link| link.name).collect();
    for family in [Family::V4, Family::V6] {
        lines.extend(rule::list(&mut socket, family).unwrap().iter().map(ToString::to_string));
        lines.extend(route::list(&mut socket, family, None).unwrap().iter().map(ToString::to_string));
    }
    lines.retain(|line| !line.starts_with("fe80::/64") && !line.starts_with("eni"));
    lines.sort();
    lines
}

fn run(node: &Node, verb: &str, pod: &str, netns: &Netns) -> Answer {
    node.call(verb, "1.0.0").pod(pod).env("CNI_NETNS", netns.path()).run()
}

/// An ADD that must fail because of the agent, with this in its details, and leave nothing.
#[track_caller]
fn fails_cleanly(node: &Node, daemon: &Served, pod: &str, details: &str) -> Duration {
    let netns = Netns::new("pod");
    let (host, inside, before) = (state(), netns.run(state), daemon.seen().len());
    let answer = run(node, "ADD", pod, &netns);
    assert_eq!(answer.failure(), (101, REFUSED.to_owned()), "{pod}");
    let told = answer.json()["details"].as_str().unwrap_or_default().to_owned();
    assert!(told.contains(details), "{pod}: {told:?} instead of {details:?}");
    assert_eq!(state(), host, "{pod}");
    let veth = enibox::model::naming::host_veth("eni", "default", pod, 0).unwrap();
    assert_eq!(link::by_name(&mut Socket::route().unwrap(), &veth).unwrap(), None, "{pod}");
    assert_eq!(netns.run(state), inside, "{pod}");
    let seen = daemon.seen();
    let [Seen::Add(_), Seen::Del(del)] = &seen[before..] else { panic!("{pod}: {:?}", &seen[before..]) };
    assert_eq!(del.reason, "SetupNSFailed", "{pod}");
    // The runtime's DEL finds nothing, and succeeds.
    daemon.answer(Answers { del: Answers::default().del, ..one("strict") });
    run(node, "DEL", pod, &netns).silent();
    answer.took
}

#[test]
fn a_foreign_agent_is_told_of_every_pod() {
    let Some(python) = python() else { return };
    on_a_node(|node| {
        let mut agent = Foreign::start(&python);
        let daemon = Served::daemon(Answers::default());
        let v6 =
            IpAllocation { ipv4: String::new(), ipv6: "2001:db8::77".into(), device_number: 0, route_table_id: 254 };
        let several = [v4(POD_IP, 0, 254), v4("10.0.13.35", 1, 10101)];
        for (mode, allocations) in [
            ("strict", &[v4(POD_IP, 2, 3)][..]),
            ("standard", &[v4(POD_IP, 2, 3)]),
            ("none", &[v4(POD_IP, 2, 3)]),
            ("Strict", &[v4(POD_IP, 0, 254)]), // as it was written
            ("standard", &several),
            ("strict", &[v6]),
        ] {
            daemon.answer(giving(mode, allocations));
            let netns = Netns::new("pod");
            run(node, "ADD", "web", &netns).result();
            agent.assert_enforced("web", mode, allocations.len());
            run(node, "DEL", "web", &netns).silent();
            agent.assert_deleted("web");
        }
        // Without a mode nobody is told; the next call is the next pod's.
        daemon.answer(one(""));
        let netns = Netns::new("pod");
        run(node, "ADD", "untold", &netns).result();
        run(node, "DEL", "untold", &netns).silent();
        // A branch ENI's DEL needs no daemon; that this node has no such VLAN is no matter.
        let previous = json!({"cniVersion": "1.0.0",
            "interfaces": [{"name": "vlan1234"}, {"name": "eth0", "mac": "0", "sandbox": netns.path()},
                           {"name": "dummyvlan", "mac": "7", "sandbox": ""}],
            "ips": [{"interface": 1, "address": "10.0.12.34/32"}]});
        let before = daemon.seen().len();
        let call = node.call("DEL", "1.0.0").pod("branch").env("CNI_NETNS", netns.path());
        let dummy = enibox::model::naming::dummy("default", "branch");
        let text = previous.to_string().replace("dummyvlan", &dummy);
        call.config("prevResult", serde_json::from_str::<Value>(&text).unwrap()).run().silent();
        assert_eq!(daemon.seen().len(), before);
        agent.assert_deleted("branch");
    });
}

#[test]
fn a_pod_that_a_foreign_agent_does_not_take_is_undone() {
    let Some(python) = python() else { return };
    on_a_node(|node| {
        let mut agent = Foreign::start(&python);
        let daemon = Served::daemon(Answers::default());
        for (pod, details) in [
            ("refused-1", "the agent reports failure"),
            ("aborted-1", "no map for this pod (INTERNAL)"),
            ("garbage-1", "reply to /rpc.NPBackend/EnforceNpToPod"),
            ("slow-1", "(DEADLINE_EXCEEDED)"),
        ] {
            daemon.answer(one("standard"));
            let took = fails_cleanly(node, &daemon, pod, details);
            println!("{pod}: ADD fails after {took:?}");
            assert!(took < Duration::from_secs(20) + SLACK, "{took:?}");
            agent.assert_enforced(pod, "standard", 1);
            agent.assert_deleted(pod); // it may have taken the pod all the same
        }
        // No such answer keeps a pod from being deleted.
        for pod in ["refused-2", "aborted-2", "garbage-2", "slow-2"] {
            daemon.answer(one("strict"));
            let netns = Netns::new("pod");
            run(node, "DEL", pod, &netns).silent();
            agent.assert_deleted(pod);
        }
        // It dies in the middle, and leaves its socket.
        daemon.answer(one("strict"));
        fails_cleanly(node, &daemon, "dies-1", "closed by the server");
        agent.assert_enforced("dies-1", "strict", 1);
        assert_eq!(agent.child.wait().unwrap().code(), Some(7));
        daemon.answer(one("strict"));
        let took = fails_cleanly(node, &daemon, "dead", "Connection refused");
        assert!((CONNECT_LIMIT.mul_f64(0.9)..CONNECT_LIMIT + SLACK).contains(&took), "{took:?}");
        let netns = Netns::new("pod");
        daemon.answer(one("None"));
        run(node, "ADD", "web", &netns).result(); // nothing is enforced, and nobody missed
        daemon.answer(one("strict"));
        run(node, "DEL", "web", &netns).silent();
    });
}

#[test]
fn an_agent_that_is_missing_hangs_or_comes_late() {
    on_a_node(|node| {
        let daemon = Served::daemon(one("strict"));
        let took = fails_cleanly(node, &daemon, "missing", "No such file or directory");
        assert!((CONNECT_LIMIT.mul_f64(0.9)..CONNECT_LIMIT + SLACK).contains(&took), "{took:?}");
        daemon.answer(one("none"));
        let netns = Netns::new("pod");
        run(node, "ADD", "web", &netns).result();
        daemon.answer(one("strict"));
        let answer = run(node, "DEL", "web", &netns);
        answer.silent();
        assert!(answer.took < CONNECT_LIMIT + SLACK, "{answer:?}");
        // Somebody holds the socket and says nothing.
        let hung = UnixListener::bind(agent_socket()).unwrap();
        daemon.answer(one("standard"));
        let took = fails_cleanly(node, &daemon, "hung", "deadline exceeded");
        assert!(took < CONNECT_LIMIT + SLACK, "{took:?}");
        daemon.answer(one("standard"));
        run(node, "DEL", "web", &Netns::new("pod")).silent();
        drop(hung);
        // An agent that is being replaced is waited for.
        daemon.answer(one("strict"));
        let netns = Netns::new("pod");
        let agent = std::thread::scope(|scope| {
            let add = scope.spawn(|| run(node, "ADD", "web", &netns).result());
            std::thread::sleep(Duration::from_millis(100));
            let agent = Served::agent(Answers::default());
            add.join().unwrap();
            agent
        });
        assert!(matches!(agent.seen().as_slice(), [Seen::Enforce(_)]), "{:?}", agent.seen());
        run(node, "DEL", "web", &netns).silent();
        assert!(matches!(agent.seen().as_slice(), [Seen::Enforce(_), Seen::Delete(_)]), "{:?}", agent.seen());
    });
}

#[test]
fn a_foreign_agent_learns_its_settings_from_the_daemon() {
    let Some(python) = python() else { return };
    let home = std::env::temp_dir().join(format!("enibox-policy-{}", std::process::id()));
    let world = World::create(&Plan { nodes: 1, instance_type: "m5.large", seed: 17, home: &home }).unwrap();
    let node = world.node(0).unwrap();
    let env = [("NETWORK_POLICY_ENFORCING_MODE", "Strict"), ("ENABLE_MULTI_NIC", "true")];
    let env: Vec<(String, String)> = env.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let mut daemon = Agent::start(Path::new(PROGRAM), &world.topology().run().logs(), &node, &env).unwrap();
    daemon.wait_ready(&node, &|| Ok(())).unwrap();
    let socket = PathBuf::from(format!("/proc/{}/root/run/aws-node/ipamd.sock", daemon.pid()));
    let output = peer(&python, "config", &socket).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = json!({
        "1": "Strict", "2": 1, "3": world.nodes[0].address.to_string(), "5": world.nodes[0].instance.to_string(),
        "6": answer["6"],
    });
    assert_eq!(answer, expected);
    assert!(answer["6"].as_str().is_some_and(|region| !region.is_empty()), "{answer}");
    daemon.stop().unwrap();
}
