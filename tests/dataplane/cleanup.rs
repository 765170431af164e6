//! `enibox cleanup` on a node, and the way back to the original.

use crate::matrix::{differences, services};
use crate::proxy::{self, Backend};
use crate::six;
use crate::support::whole::Whole;
use crate::support::{Netns, must, tool, tool_with_input};
use crate::takeover::connections;
use crate::upstream::{Version, install, saved};
use crate::world::*;
use enibox::apply::Host;
use enibox::model::net::{Family, Route, Rule, Scope, TABLE_MAIN};
use enibox::netlink::{link, route, rule, sysctl};
use enibox::sys;
use std::path::{Path, PathBuf};
use std::process::Command;

struct Said {
    code: i32,
    out: String,
    err: String,
}

fn cleanup(node: &Netns, arguments: &[&str]) -> Said {
    let mut command = Command::new(env!("CARGO_BIN_EXE_enibox"));
    command.arg("cleanup").args(arguments);
    said(node, &mut command)
}

fn said(node: &Netns, command: &mut Command) -> Said {
    let output = node.run(|| command.output()).unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    Said { code: output.status.code().unwrap(), out: text(&output.stdout), err: text(&output.stderr) }
}

fn ours() -> World {
    let world = World::bare();
    // Its link-local address would come in its own time, and what is said of the link names its addresses.
    world.node.run(|| sysctl::set("net/ipv6/conf/eth1/disable_ipv6", "1")).unwrap();
    world.node.run(|| Host::open()?.host(&intent())).map(|report| well(&report)).unwrap();
    world.wire_pods();
    world
}

#[test]
fn everything_of_ours_goes_and_nothing_else() {
    let world = ours();
    proxy::start(Backend::IptablesNft, &world.node, &services(0));
    let kube_proxy = saved(&world.node, "iptables-nft-save");
    let vlan = Rule { iif: Some("vlan100".into()), ..Rule::any(Family::V4, 10, 200) };
    let foreign = [
        vlan,
        Rule::to(net("10.20.0.0/16"), 512, TABLE_MAIN),
        Rule::from(net("10.20.12.9/32"), 1600, 2),
        Rule::from(net(&format!("{NODE_IP}/32")), 32765, 10_001),
    ];
    must(&mut world.node.route(), &foreign.each_ref().map(rule::add));
    // As of amazon-ec2-net-utils, which gives its rules the same place, and of somebody's VLAN.
    let eth0 = link::by_name(&mut world.node.route(), "eth0").unwrap().unwrap().index;
    let others = [10_001, 200].map(|table| {
        let default = via(table, "0.0.0.0/0", "10.20.11.1", eth0);
        [default, Route { dst: net("10.20.11.0/24"), gateway: None, scope: Scope::Link, ..default }]
    });
    let others = others.as_flattened();
    must(&mut world.node.route(), &others.iter().map(route::add).collect::<Vec<_>>());
    let listed = cleanup(&world.node, &[]);
    assert_eq!(listed.code, 3);
    let theirs = "rule 32765: from 10.20.11.162 lookup 10001 stays";
    for line in [theirs, " stays: it goes with its pod", "eth1 with 10.20.12.5/24 stays up", "sysctls and MTUs stay"] {
        assert!(listed.err.contains(line), "{line:?} is not in\n{}", listed.err);
    }
    let expected = [
        "add rule 0: from all lookup local",
        "delete rule 10: from all iif vlan.eth.1 lookup 101",
        "delete rule 512: from all to 10.20.11.50 lookup main",
        "delete rule 1024: from all fwmark 0x80/0x80 lookup main",
        "delete rule 1536: from 10.20.12.60 lookup 2",
        "delete rule 32765: from 10.20.12.5 lookup 2",
        "delete rule 20: from all lookup local",
        "delete route default via 10.20.12.1 dev eth1 table 2",
        "delete route 10.20.13.70 dev vlan",
        "delete route 10.20.11.50 dev eni",
        "delete route 10.20.12.60 dev eni",
        "delete table ip aws-cni",
    ];
    for line in expected {
        assert!(listed.out.contains(line), "{line:?} is not in\n{}", listed.out);
    }
    let refused = cleanup(&world.node, &["--apply"]);
    assert_eq!((refused.code, refused.out.as_str()), (1, ""));
    assert!(refused.err.contains("3 pods are alive"), "{}", refused.err);
    assert_eq!(cleanup(&world.node, &[]).out, listed.out, "nothing has changed yet");
    let applied = cleanup(&world.node, &["--apply", "--force"]);
    assert_eq!((applied.code, applied.err, &applied.out), (0, listed.err, &listed.out));
    let again = cleanup(&world.node, &["--json"]);
    let document: serde_json::Value = serde_json::from_str(&again.out).unwrap();
    assert_eq!((again.code, &document["steps"], &document["applied"]), (0, &serde_json::json!([]), &false.into()));
    let left = world.node.run(|| Host::open()?.observe()).unwrap();
    let priorities = left.rules.iter().filter(|rule| rule.family == Family::V4).map(|rule| rule.priority);
    assert_eq!(priorities.collect::<Vec<_>>(), [0, 10, 512, 1600, 32765, 32766, 32767]);
    assert!(others.iter().all(|route| left.routes.contains(route)), "{:?}", left.routes);
    assert!(!left.routes.iter().any(|route| route.table == 2), "{:?}", left.routes);
    assert_eq!(saved(&world.node, "iptables-nft-save"), kube_proxy);
    // The node itself is as before, and can be set up again.
    well(&world.node.run(|| Host::open()?.host(&intent())).unwrap());
}

/// Cleans up beside whatever pods there are: then the node is as it was `before`, apart from what is said to stay.
pub fn leaves(node: &Netns, before: &Whole) -> String {
    // What is said names addresses of links, of which new ones have theirs some time after they are up.
    Whole::at_rest(node.handle());
    let listed = cleanup(node, &[]);
    assert_eq!(listed.code, 3, "{}", listed.err);
    let applied = cleanup(node, &["--apply", "--force"]);
    assert_eq!((applied.code, applied.out, &applied.err), (0, listed.out, &listed.err));
    assert_eq!(before.unexplained(&Whole::of(node.handle()), &applied.err), Vec::<String>::new(), "{}", applied.err);
    let again = cleanup(node, &[]);
    assert_eq!((again.code, again.out.as_str()), (0, ""));
    applied.err
}

/// When the pods have gone only links of ENIs are other than they were.
fn left_by_pods(node: &Netns, before: &Whole) {
    let end = enibox::clock::instant() + std::time::Duration::from_secs(20);
    // The kernel takes links away in its own time once a pod's namespace is gone.
    loop {
        let left = before.unexplained(&Whole::of(node.handle()), "enibox: eth1 stays");
        if left.is_empty() {
            return;
        }
        assert!(enibox::clock::instant() < end, "{left:#?}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[test]
fn the_node_is_as_it_was_before() {
    let world = World::bare();
    if proxy::here(Backend::IptablesNft) {
        proxy::start(Backend::IptablesNft, &world.node, &services(0));
    }
    let before = Whole::at_rest(world.node.handle());
    well(&world.node.run(|| Host::open()?.host(&intent())).unwrap());
    world.wire_pods();
    // That one is the topology's.
    world.node.run(|| tool("ip", &["route", "del", INTERNET_FROM_ENI]));
    let said = leaves(&world.node, &before);
    assert_eq!(said.matches(" stays: it goes with its pod").count(), 3, "{said}");
    let World { node, router: _router, pod1, pod2, pod3, .. } = world;
    drop((pod1, pod2, pod3));
    left_by_pods(&node, &before);
}

#[test]
fn the_node_is_as_it_was_before_in_ipv6() {
    let world = six::World::new();
    let before = Whole::at_rest(world.node.handle());
    well(&world.node.run(|| Host::open()?.host(&six::intent())).unwrap());
    world.wire_pods();
    let said = leaves(&world.node, &before);
    assert_eq!(said.matches(" stays: it goes with its pod").count(), 2, "{said}");
    let six::World { node, _router, pod1, pod2, .. } = world;
    drop((pod1, pod2));
    left_by_pods(&node, &before);
}

#[test]
fn a_running_daemon_is_not_cleaned_up_after() {
    let world = World::bare();
    well(&world.node.run(|| Host::open()?.host(&intent())).unwrap());
    world.node.run(|| {
        // Its socket has a fixed place: this thread, and what it starts, see another /run.
        sys::unshare_mounts().unwrap();
        sys::mount_tmpfs(&std::fs::canonicalize("/var/run").unwrap()).unwrap();
        std::fs::create_dir("/var/run/aws-node").unwrap();
        let daemon = std::os::unix::net::UnixListener::bind("/var/run/aws-node/ipamd.sock").unwrap();
        let run = |arguments: &[&str]| {
            let output = Command::new(env!("CARGO_BIN_EXE_enibox")).arg("cleanup").args(arguments).output().unwrap();
            (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
        };
        let (code, error) = run(&["--apply"]);
        assert_eq!(code, 1);
        assert!(error.contains("a daemon runs"), "{error}");
        assert_eq!(run(&[]).0, 3, "listing does no harm");
        drop(daemon);
        let (code, told) = run(&["--apply"]);
        assert_eq!(code, 0, "the socket of one that has ended: {told}");
        assert!(told.lines().all(|line| line.contains(" stay")), "{told}");
        assert_eq!(run(&[]).0, 0);
    });
}

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

#[test]
fn files_go_when_asked_for() {
    let folder = Folder(std::env::temp_dir().join(format!("enibox-cleanup-{}", std::process::id())));
    std::fs::create_dir(&folder.0).unwrap();
    let file = |name: &str| folder.0.join(name);
    let (ours, others) = (["10-aws.conflist", "ipam.json", "ipam-nic-1.json"], ["99-other.conf", "ipam-nic-x.json"]);
    for name in ours.iter().chain(&others) {
        std::fs::write(file(name), "{}").unwrap();
    }
    let node = Netns::new("node");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_enibox"));
        command.args(["cleanup", "--conf-dir"]).arg(&folder.0).args(arguments);
        said(&node, command.env("AWS_VPC_K8S_CNI_BACKING_STORE", file("ipam.json")))
    };
    let there = |names: &[&str]| names.iter().filter(|name| Path::exists(&file(name))).count();
    assert_eq!(run(&["--apply"]).code, 0);
    assert_eq!(there(&ours), 3, "not asked for");
    let listed = run(&["--files"]);
    assert_eq!(listed.code, 3);
    assert!(listed.out.lines().next().unwrap().ends_with("/10-aws.conflist"), "first of all: {}", listed.out);
    assert_eq!((run(&["--files", "--apply"]).code, there(&ours), there(&others)), (0, 0, 2));
    assert_eq!(run(&["--files"]).code, 0);
}

/// What the original makes of our table at its start: a chain of its own type, the same regular chain, the rest left alone.
const CONNMARK_AGAIN: &str = "\
flush chain ip aws-cni nat-prerouting
delete chain ip aws-cni nat-prerouting
flush chain ip aws-cni snat-mark
";

fn given_back(version: Version, backend: Backend) {
    if !proxy::here(backend) {
        return;
    }
    let world = World::bare();
    proxy::start(backend, &world.node, &services(0));
    well(&world.node.run(|| Host::open()?.host(&intent())).unwrap());
    world.wire_pods();
    let open = connections(&world);
    if version == Version::Connmark {
        world.node.run(|| tool_with_input("nft", &["-f", "-"], CONNMARK_AGAIN));
    }
    install(version, &world.node);
    open.iter().for_each(crate::talk::Connection::talk);
    let said = cleanup(&world.node, &["--packet-filter", "--apply"]);
    assert_eq!((said.code, said.err.as_str()), (0, ""));
    open.iter().for_each(crate::talk::Connection::talk);
    drop(open); // its ports are those of the matrix
    let tables = world.node.run(|| tool("nft", &["list", "tables"])).unwrap();
    assert_eq!(tables.contains("aws-cni"), version == Version::Connmark, "{tables}");
    if version == Version::Connmark {
        let table = world.node.run(|| tool("nft", &["list", "table", "ip", "aws-cni"])).unwrap();
        let chains = table.lines().filter(|line| line.trim().starts_with("chain ")).map(str::trim);
        assert_eq!(chains.collect::<Vec<_>>(), ["chain snat-mark {", "chain nat-prerouting {"]);
    }
    // The one flow that the original drops.
    let wrong = differences(&world, 0);
    assert!(wrong.iter().all(|line| line.contains("10.20.12.60 Cluster 203.0.113.10")), "{wrong:#?}");
    assert_eq!(wrong.len(), 2, "{wrong:#?}");
}

#[test]
fn back_to_iptables_nft() {
    given_back(Version::IptablesNft, Backend::IptablesNft);
}

#[test]
fn back_to_iptables_legacy() {
    given_back(Version::IptablesLegacy, Backend::IptablesLegacy);
}

#[test]
fn back_to_a_connmark_in_nf_tables() {
    given_back(Version::Connmark, Backend::IptablesNft);
}
