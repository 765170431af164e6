//! `egress-cni` called as a runtime calls it: results byte for byte, the network of pod and node, everything twice, failures
//! that leave nothing, addresses on the files of the reference plugin `host-local` and in turn with it.

mod addresses;
#[path = "../support/node.rs"]
mod node;
mod original;
#[path = "../support/mod.rs"]
mod support;

use enibox::apply::Host;
use enibox::model::net::Family;
use enibox::netlink::{Socket, link, nft, route};
use enibox::plan::host::{Egress, Intent};
use enibox::plan::ruleset;
use enibox::{clock, sys};
use node::{Call, Node, on_a_node};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use support::{Netns, tool, tool_with_input};

/// What differs between the families.
struct Way {
    family: Family,
    node_ip: &'static str,
    range: &'static str,
    all: &'static str,
    data: &'static str,
    inner: &'static str,
    first: &'static str,
    second: &'static str,
    count: usize,
}

const V4: Way = Way {
    family: Family::V4,
    node_ip: "10.20.11.162",
    range: "169.254.172.0/22",
    all: "0.0.0.0/0",
    data: "/run/cni/v6pd/egress-v4-ipam",
    inner: "v4if0",
    first: "169.254.172.2",
    second: "169.254.172.3",
    count: 1021,
};
const V6: Way = Way {
    family: Family::V6,
    node_ip: "2001:db8::5",
    range: "fd00::ac:00/118",
    all: "::/0",
    data: "/run/cni/v4pd/egress-v6-ipam",
    inner: "v6if0",
    first: "fd00::ac:2",
    second: "fd00::ac:3",
    count: 1022,
};

/// The rules that the daemon has committed before it serves.
fn rules_of_the_daemon(way: &Way) {
    let node_ip = way.node_ip.parse().unwrap();
    let v6 = way.family == Family::V4; // of an IPv6 cluster
    let own = if v6 { "2001:db8::5" } else { "10.20.11.162" };
    let vpc_cidrs = vec!["10.20.0.0/16".parse().unwrap()];
    let intent =
        Intent { v6, node_ip: own.parse().unwrap(), vpc_cidrs, egress: Egress::Snat(node_ip), ..Intent::default() };
    let mut socket = Socket::netfilter().unwrap();
    for table in ruleset::tables(&intent, "eth0", &[]).unwrap() {
        nft::commit(&mut socket, &table).unwrap();
    }
}

fn previous(version: &str) -> Value {
    match version {
        "0.1.0" | "0.2.0" => json!({"cniVersion": version, "ip4": {"ip": "10.0.12.34/32"}, "dns": {}}),
        _ => json!({"cniVersion": version, "interfaces": [{"name": "enicc21c2d7785"},
            {"name": "eth0", "mac": "3", "sandbox": "/run/netns/x"}, {"name": "dummycc21c2d7785", "mac": "0", "sandbox": "2"}],
            "ips": [{"version": "4", "interface": 1, "address": "10.0.12.34/32"}], "dns": {}}),
    }
}

/// The call as the shipped configuration makes it.
fn call(node: &Node, way: &Way, command: &str, version: &str, netns: &Path) -> Call {
    let ipam = json!({"type": "host-local", "ranges": [[{"subnet": way.range}]], "routes": [{"dst": way.all}], "dataDir": way.data});
    let call = node.call(command, version).named("egress-cni").env("CNI_NETNS", netns);
    call.config("enabled", "true")
        .config("mtu", "9001")
        .config("nodeIP", way.node_ip)
        .config("randomizeSNAT", "prng")
        .config("ipam", ipam)
        .config("pluginLogFile", node.path("egress.log").to_str().unwrap())
        .config("pluginLogLevel", "DEBUG")
        .config("prevResult", previous(version))
}

/// A pod that `aws-cni` has wired: with `eth0`.
fn pod() -> Netns {
    let netns = Netns::new("pod");
    netns.run(|| tool("ip", &["link", "add", "eth0", "type", "veth", "peer", "name", "far"])).unwrap();
    netns
}

/// Everything of the calling thread's namespace that this is about, a line each.
fn state() -> Vec<String> {
    let mut socket = Socket::route().unwrap();
    let mut lines: Vec<String> = link::list(&mut socket).unwrap().into_iter().map(|link| link.name).collect();
    for family in [Family::V4, Family::V6] {
        lines.extend(route::list(&mut socket, family, None).unwrap().iter().map(ToString::to_string));
    }
    lines
}

/// Waits until the state is this one: a link goes some time after its namespace.
#[track_caller]
fn assert_state(wanted: &[String]) {
    let end = clock::instant() + Duration::from_secs(10);
    while state() != wanted && clock::instant() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(state(), wanted);
}

/// Names of the files of a family.
fn files(way: &Way) -> Vec<String> {
    let Ok(entries) = fs::read_dir(Path::new(way.data).join("aws-cni")) else { return Vec::new() };
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn write(way: &Way, name: &str, text: &str) -> PathBuf {
    let directory = Path::new(way.data).join("aws-cni");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join(name), text).unwrap();
    directory.join(name)
}

fn aged(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(clock::system_time() - Duration::from_mins(10)).unwrap();
}

/// The routes that a pod sees, as `ip` shows them.
fn routes(netns: &Netns, way: &Way) -> String {
    let family = if way.family == Family::V4 { "-4" } else { "-6" };
    let text = netns.run(|| tool("ip", &[family, "route", "show", "dev", way.inner])).unwrap();
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with("fe80::/64"));
    lines.collect::<Vec<_>>().join("\n")
}

fn addresses(netns: &Netns, way: &Way) -> Vec<String> {
    let text = netns.run(|| tool("ip", &["-o", "address", "show", "dev", way.inner])).unwrap();
    let nets = text.lines().filter_map(|line| line.split_whitespace().nth(3).map(str::to_owned));
    nets.filter(|net| !net.starts_with("fe80:")).collect()
}

/// The route of the node to an address, with the name of the link.
fn way_to(address: &str) -> String {
    let family = if address.contains(':') { "-6" } else { "-4" };
    tool("ip", &[family, "route", "show", address]).unwrap().trim().to_owned()
}

/// The result with the names and MACs that chance decides replaced.
fn plain(answer: &str, netns: &Netns) -> String {
    let json: Value = serde_json::from_str(answer).unwrap();
    let mut text = answer.replace(netns.path().to_str().unwrap(), "NETNS");
    for (index, mark) in [(3, "HOST"), (4, "POD")] {
        for (field, word) in [("name", "NAME"), ("mac", "MAC")] {
            let value = json["interfaces"][index][field].as_str().unwrap();
            if value != "v4if0" && value != "v6if0" {
                text = text.replace(value, &format!("{mark}-{word}"));
            }
        }
    }
    text
}

const PLAIN_RESULT: &str = r#"{
    "cniVersion": "VERSION",
    "interfaces": [
        {
            "name": "enicc21c2d7785"
        },
        {
            "name": "eth0",
            "mac": "3",
            "sandbox": "/run/netns/x"
        },
        {
            "name": "dummycc21c2d7785",
            "mac": "0",
            "sandbox": "2"
        },
        {
            "name": "HOST-NAME",
            "mac": "HOST-MAC"
        },
        {
            "name": "INNER",
            "mac": "POD-MAC",
            "sandbox": "NETNS"
        }
    ],
    "ips": [
        {
TAG            "interface": 1,
            "address": "10.0.12.34/32"
        }
    ]DNS
}"#;

fn wanted_result(version: &str, way: &Way) -> String {
    let tagged = version.starts_with("0.");
    PLAIN_RESULT
        .replace("VERSION", version)
        .replace("INNER", way.inner)
        .replace("TAG", if tagged { "            \"version\": \"4\",\n" } else { "" })
        .replace("DNS", if tagged { ",\n    \"dns\": {}" } else { "" })
}

#[test]
fn a_life_in_every_version() {
    on_a_node(|node| {
        let before = state();
        for way in [&V4, &V6] {
            rules_of_the_daemon(way);
            for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
                let netns = pod();
                let path = netns.path();
                let added = call(node, way, "ADD", version, &path).run();
                assert_eq!(added.code, 0, "{added:?}");
                if matches!(version, "0.1.0" | "0.2.0") {
                    assert_eq!(added.json(), previous(version), "these have no place for interfaces");
                } else {
                    assert_eq!(plain(&added.stdout, &netns), wanted_result(version, way));
                }
                assert_eq!(addresses(&netns, way).len(), 1);
                if !version.starts_with("0.3") && !version.starts_with("0.1") && !version.starts_with("0.2") {
                    call(node, way, "CHECK", version, &path).run().silent();
                }
                for _ in 0..2 {
                    call(node, way, "DEL", version, &path).run().silent();
                    assert_state(&before);
                    assert!(netns.run(|| link::by_name(&mut Socket::route().unwrap(), way.inner)).unwrap().is_none());
                }
                drop(netns);
                call(node, way, "DEL", version, &path).run().silent();
                call(node, way, "DEL", version, Path::new("")).run().silent();
            }
            assert_eq!(files(way), ["last_reserved_ip.0", "lock"]);
        }
    });
}

#[test]
fn pod_and_node_have_the_routes_of_the_original() {
    on_a_node(|node| {
        rules_of_the_daemon(&V4);
        let netns = pod();
        let result = call(node, &V4, "ADD", "1.0.0", &netns.path()).config("mtu", 1400).run().result();
        assert_eq!(
            routes(&netns, &V4),
            "default via 169.254.172.1\n\
             169.254.172.0/22 via 169.254.172.1 src 169.254.172.2\n\
             169.254.172.1 scope link src 169.254.172.2"
        );
        assert_eq!(addresses(&netns, &V4), ["169.254.172.2/22"]);
        let outer = result["interfaces"][3]["name"].as_str().unwrap();
        assert_eq!(way_to(V4.first), format!("169.254.172.2 dev {outer} scope link"));
        let shown = tool("ip", &["address", "show", "dev", outer]).unwrap();
        assert!(shown.contains("inet 169.254.172.1/32 scope link") && shown.contains("mtu 1400"), "{shown}");
        assert!(shown.contains(result["interfaces"][3]["mac"].as_str().unwrap()), "{shown}");
        assert_eq!(fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap().trim(), "1");
        assert_eq!(fs::read_to_string(Path::new(V4.data).join("aws-cni").join(V4.first)).unwrap(), "cni-5a1f\r\neth0");
        call(node, &V4, "DEL", "1.0.0", &netns.path()).run().silent();
    });
    on_a_node(|node| {
        rules_of_the_daemon(&V6);
        let netns = pod();
        let result = call(node, &V6, "ADD", "1.0.0", &netns.path()).run().result();
        assert_eq!(routes(&netns, &V6), "default via fe80::1 metric 1024 pref medium");
        assert_eq!(addresses(&netns, &V6), ["fd00::ac:2/118"]);
        let outer = result["interfaces"][3]["name"].as_str().unwrap();
        assert_eq!(way_to(V6.first), format!("fd00::ac:2 dev {outer} metric 1024 pref medium"));
        let main = netns.run(|| fs::read_to_string("/proc/sys/net/ipv6/conf/eth0/disable_ipv6"));
        assert_eq!(main.unwrap().trim(), "1", "the main interface has no IPv6 any more");
        call(node, &V6, "DEL", "1.0.0", &netns.path()).run().silent();
    });
}

/// The bound is for a loaded machine; two rounds of duplicate detection would take two seconds and more on any.
#[test]
fn nothing_waits_for_duplicate_detection() {
    on_a_node(|node| {
        rules_of_the_daemon(&V6);
        let took = (0..5).map(|number| {
            let netns = pod();
            let added =
                call(node, &V6, "ADD", "1.0.0", &netns.path()).env("CNI_CONTAINERID", format!("c{number}")).run();
            assert_eq!(added.code, 0, "{added:?}");
            added.took
        });
        let fastest = took.min().unwrap();
        println!("the fastest ADD took {fastest:?}");
        assert!(fastest < Duration::from_secs(1), "{fastest:?}");
    });
}

#[test]
fn a_repeated_add_keeps_the_address() {
    on_a_node(|node| {
        for way in [&V4, &V6] {
            rules_of_the_daemon(way);
            let netns = pod();
            let before = state();
            for _ in 0..3 {
                call(node, way, "ADD", "1.0.0", &netns.path()).run().result();
                assert_eq!(files(way), [way.first, "last_reserved_ip.0", "lock"]);
                let length = way.range.split_once('/').unwrap().1;
                assert_eq!(addresses(&netns, way), [format!("{}/{length}", way.first)]);
            }
            call(node, way, "DEL", "1.0.0", &netns.path()).run().silent();
            assert_state(&before);
        }
    });
}

/// A stale route of an earlier owner whose veth is dying, a file of our own without anything else: as after a crash.
#[test]
fn an_add_finishes_what_was_cut_short() {
    on_a_node(|node| {
        for way in [&V4, &V6] {
            rules_of_the_daemon(way);
            let stale = format!(
                "ip link add dying type veth peer name far\nip link set far up\nip link set dying up\nip route add {} dev dying",
                way.first
            );
            tool_with_input("sh", &["-e"], &stale);
            write(way, way.first, "cni-5a1f\r\neth0");
            write(way, way.second, "of-nobody\r\neth0");
            let netns = pod();
            let result = call(node, way, "ADD", "1.0.0", &netns.path()).run().result();
            let outer = result["interfaces"][3]["name"].as_str().unwrap();
            assert!(way_to(way.first).contains(outer), "{}", way_to(way.first));
            call(node, way, "DEL", "1.0.0", &netns.path()).run().silent();
            assert_eq!(way_to(way.first), "");
            assert!(files(way).contains(&way.second.to_owned()), "others' files stay");
            tool("ip", &["link", "delete", "dying"]);
        }
    });
}

#[test]
fn del_takes_everything_whatever_the_configuration_says() {
    on_a_node(|node| {
        for way in [&V4, &V6] {
            rules_of_the_daemon(way);
            let before = state();
            let other = if way.family == Family::V4 { &V6 } else { &V4 };
            let changes: [&dyn Fn(Call) -> Call; 6] = [
                &|call| call.config("enabled", "false"),
                &|call| call.config("nodeIP", "").config("mtu", ""),
                &|call| call.config("prevResult", "nonsense"),
                &|call| call.config("ipam", json!({"type": "host-local"})),
                &|call| call.config("ipam", 5),
                &|call| call.named("egress-v4-cni"),
            ];
            for change in changes {
                let netns = pod();
                call(node, way, "ADD", "0.4.0", &netns.path()).run().result();
                change(call(node, way, "DEL", "0.4.0", &netns.path())).run().silent();
                assert_state(&before);
                assert_eq!(files(way), ["last_reserved_ip.0", "lock"]);
            }
            // With the configuration of the other family.
            let netns = pod();
            call(node, way, "ADD", "0.4.0", &netns.path()).run().result();
            call(node, other, "DEL", "0.4.0", &netns.path()).run().silent();
            assert_state(&before);
            assert_eq!(files(way), ["last_reserved_ip.0", "lock"]);
            // The path of the namespace is gone, and it lives on.
            call(node, way, "ADD", "0.4.0", &netns.path()).run().result();
            call(node, way, "DEL", "0.4.0", Path::new("/run/netns/gone")).run().silent();
            assert_state(&before);
            assert_eq!(files(way), ["last_reserved_ip.0", "lock"]);
        }
    });
}

#[test]
fn failures_leave_nothing() {
    on_a_node(|node| {
        let before = state();
        let netns = pod();
        let inside = netns.run(state);
        let refused = |way: &Way, change: &dyn Fn(Call) -> Call, code: u64, part: &str| {
            let (told, text) = change(call(node, way, "ADD", "1.0.0", &netns.path())).run().failure();
            assert!(told == code && text.contains(part), "{told} {text}");
            assert_eq!((state(), netns.run(state)), (before.clone(), inside.clone()), "{text}");
            assert!(!files(way).contains(&way.first.to_owned()), "{text}");
        };
        for way in [&V4, &V6] {
            refused(way, &|call| call, 11, "chain egress-postrouting): it has to run with ENABLE_V");
            rules_of_the_daemon(way);
            let null = Value::Null;
            refused(way, &|call| call.config("prevResult", null.clone()), 7, "must be called as a chained plugin");
            refused(way, &|call| call.config("mtu", ""), 7, "parsing \"\": invalid syntax");
            refused(way, &|call| call.config("prevResult", 5), 7, "failed to parse config: could not parse prevResult");
            refused(
                way,
                &|call| call.config("nodeIP", ""),
                7,
                "global unicast IPv6 not found in host primary interface",
            );
            refused(way, &|call| call.config("nodeIP", "fe80::1"), 7, "global unicast IPv6 not found");
            refused(way, &|call| call.config("ipam", null.clone()), 11, "running IPAM plugin failed: ");
            let elsewhere = json!({"type": "host-local", "ranges": [[{"subnet": "10.9.0.0/24"}]], "dataDir": way.data});
            refused(way, &|call| call.config("ipam", elsewhere.clone()), 11, "which the daemon translates");
            // The kernel refuses the veth.
            refused(way, &|call| call.config("mtu", "99999999"), 100, "add link veth");
        }
        // With an interface that is not ours in the way, in the pod.
        for way in [&V4, &V6] {
            rules_of_the_daemon(way);
            netns.run(|| tool("ip", &["link", "add", way.inner, "type", "bridge"]));
            let inside = netns.run(state);
            let (code, text) = call(node, way, "ADD", "1.0.0", &netns.path()).run().failure();
            assert!(code == 100 && text.contains("already exists in the pod"), "{text}");
            assert_eq!((state(), netns.run(state)), (before.clone(), inside));
            assert!(!files(way).contains(&way.first.to_owned()));
            call(node, way, "DEL", "1.0.0", &netns.path()).run().silent();
        }
    });
}

#[test]
fn what_is_disabled_passes_results_on() {
    on_a_node(|node| {
        let netns = pod();
        let given = previous("1.0.0");
        let disabled = call(node, &V4, "ADD", "1.0.0", &netns.path()).config("enabled", "false").config("mtu", "");
        let mut wanted = given.clone();
        wanted["ips"][0].as_object_mut().unwrap().remove("version");
        wanted.as_object_mut().unwrap().remove("dns");
        assert_eq!(disabled.run().result(), wanted);
        assert_eq!(files(&V4), Vec::<String>::new());
        let version = node.call("VERSION", "1.0.0").named("egress-v4-cni").run();
        assert!(version.stdout.contains("\"supportedVersions\":[\"0.1.0\""), "{version:?}");
        let about = node.call("", "1.0.0").named("egress-cni").run();
        assert!(about.stderr.starts_with("egress CNI plugin "), "{about:?}");
        for command in ["STATUS", "GC"] {
            call(node, &V4, command, "1.1.0", &netns.path()).run().silent();
        }
    });
}
