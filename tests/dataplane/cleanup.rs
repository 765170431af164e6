//! `enibox cleanup` on a node, and the way back to the original.

use crate::matrix::{differences, services};
use crate::proxy::{self, Backend};
use crate::support::{Netns, must, tool, tool_with_input};
use crate::takeover::connections;
use crate::upstream::{Version, install, saved};
use crate::world::*;
use enibox::apply::Host;
use enibox::model::net::{Family, Rule, TABLE_MAIN};
use enibox::netlink::rule;
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
    world.node.run(|| Host::open()?.host(&intent())).map(|report| well(&report)).unwrap();
    world.wire_pods();
    world
}

#[test]
fn everything_of_ours_goes_and_nothing_else() {
    let world = ours();
    proxy::start(Backend::IptablesNft, &world.node, &services(0));
    let kube_proxy = saved(&world.node, "iptables-nft-save");
    let foreign = [Rule::to(net("10.20.0.0/16"), 512, TABLE_MAIN), Rule::from(net("10.20.12.9/32"), 1600, 2)];
    must(&mut world.node.route(), &foreign.each_ref().map(rule::add));
    let listed = cleanup(&world.node, &[]);
    assert_eq!((listed.code, listed.err.as_str()), (3, ""));
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
    assert_eq!((applied.code, applied.err.as_str(), applied.out.as_str()), (0, "", listed.out.as_str()));
    let again = cleanup(&world.node, &["--json"]);
    let document: serde_json::Value = serde_json::from_str(&again.out).unwrap();
    assert_eq!((again.code, &document["steps"], &document["applied"]), (0, &serde_json::json!([]), &false.into()));
    let left = world.node.run(|| Host::open()?.observe()).unwrap();
    let priorities = left.rules.iter().filter(|rule| rule.family == Family::V4).map(|rule| rule.priority);
    assert_eq!(priorities.collect::<Vec<_>>(), [0, 512, 1600, 32766, 32767]);
    assert_eq!(saved(&world.node, "iptables-nft-save"), kube_proxy);
    // The node itself is as before, and can be set up again.
    well(&world.node.run(|| Host::open()?.host(&intent())).unwrap());
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
        assert_eq!(run(&["--apply"]), (0, String::new()), "the socket of one that has ended");
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
