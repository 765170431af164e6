//! `egress-cni` called as a runtime calls it: results byte for byte, the network of pod and node, everything twice, failures
//! that leave nothing, addresses on the files of the reference plugin `host-local` and in turn with it.

#[path = "support/node.rs"]
mod node;
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

const HOST_LOCAL: &str = "/usr/lib/cni/host-local";

/// The rules that the daemon has committed before it serves.
fn rules_of_the_daemon(way: &Way) {
    let node_ip = way.node_ip.parse().unwrap();
    let v6 = way.family == Family::V4; // of an IPv6 cluster
    let own = if v6 { "2001:db8::5" } else { "10.20.11.162" };
    let vpc_cidrs = vec!["10.20.0.0/16".parse().unwrap()];
    let intent =
        Intent { v6, node_ip: own.parse().unwrap(), vpc_cidrs, egress: Egress::Snat(node_ip), ..Intent::default() };
    let mut socket = Socket::netfilter().unwrap();
    for table in ruleset::tables(&intent, "eth0").unwrap() {
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

#[test]
fn a_full_range_takes_back_what_is_dead() {
    on_a_node(|node| {
        for way in [&V4, &V6] {
            rules_of_the_daemon(way);
            let netns = pod();
            let all: Vec<IpAddr> = addresses_of(way);
            assert_eq!(all.len(), way.count);
            let paths: Vec<_> =
                all.iter().map(|ip| write(way, &ip.to_string(), &format!("old-{ip}\r\neth0"))).collect();
            let (code, text) = call(node, way, "ADD", "1.0.0", &netns.path()).run().failure();
            assert!(code == 11 && text.contains("no IP addresses available in range set: "), "{text}");
            assert_eq!(files(way).len(), way.count + 1, "all are young");
            for path in &paths {
                aged(path);
            }
            // Living pods have their routes.
            let living = &all[5..25];
            let routes: Vec<String> = living.iter().map(|ip| format!("ip route add {ip} dev alive")).collect();
            let routes = routes.join("\n");
            tool_with_input(
                "sh",
                &["-e"],
                &format!(
                    "ip link add alive type veth peer name far\nip link set far up\nip link set alive up\n{routes}"
                ),
            );
            call(node, way, "ADD", "1.0.0", &netns.path()).run().result();
            let left = files(way);
            assert!(living.iter().all(|ip| left.contains(&ip.to_string())), "{left:?}");
            assert_eq!(left.len(), living.len() + 3, "those, the new one, the lock, the last one");
            call(node, way, "DEL", "1.0.0", &netns.path()).run().silent();
            tool("ip", &["link", "delete", "alive"]);
        }
    });
}

#[test]
fn gc_takes_back_what_is_dead_and_nothing_of_the_living() {
    on_a_node(|node| {
        for (way, program) in [(&V4, "iptables-nft"), (&V6, "ip6tables-nft")] {
            rules_of_the_daemon(way);
            let netns = pod();
            call(node, way, "ADD", "1.1.0", &netns.path()).run().result();
            let all = addresses_of(way);
            let file = |index: usize, content: &str| write(way, &all[index].to_string(), content);
            // The pod is not in the list; others are dead, listed without a route, and young.
            let (dead, listed, young) =
                (file(5, "containerId-123\r\neth0"), file(6, "listed\r\neth0"), file(7, "young\r\neth0"));
            let old = file(8, "containerId-789");
            for path in [&Path::new(way.data).join("aws-cni").join(way.first), &dead, &listed, &old] {
                aged(path);
            }
            let address = all[if way.family == Family::V4 { 5 } else { 8 }].to_string();
            let chains = tool(program, &["--version"]).is_some();
            if chains {
                chain_of_the_original(&format!("{program}-restore"), way, &address);
            }
            let before = state();
            let gc =
                |list: Value| call(node, way, "GC", "1.1.0", Path::new("")).config("cni.dev/valid-attachments", list);
            let (code, text) = gc(json!("all")).run().failure();
            assert!(code != 0 && text.contains("must be a list"), "{text}");
            gc(Value::Null).run().silent();
            assert!(dead.exists(), "without a list nothing is done");
            let valid = json!([{"containerID": "listed", "ifname": "eth0"}, {"containerID": "containerId-123", "ifname": "net1"}]);
            for _ in 0..2 {
                gc(valid.clone()).run().silent();
                assert_eq!([&dead, &old, &listed, &young].map(|path| path.exists()), [false, false, true, true]);
                assert!(files(way).contains(&way.first.to_owned()), "the pod's");
                assert_eq!(state(), before);
                if chains {
                    let left = tool(&format!("{program}-save"), &["-t", "nat"]).unwrap();
                    assert!(!left.contains("CNI-E") && left.contains("-A POSTROUTING -j KUBE-POSTROUTING"), "{left}");
                }
            }
            call(node, way, "DEL", "1.1.0", &netns.path()).run().silent();
        }
    });
}

fn addresses_of(way: &Way) -> Vec<IpAddr> {
    let ipam = json!({"name": "aws-cni", "ipam": {"ranges": [[{"subnet": way.range}]]}});
    let envelope = enibox::model::cni::Envelope::parse(ipam.to_string().as_bytes()).unwrap();
    enibox::model::cni::EgressConfig::from_envelope(&envelope).unwrap().ipam.range.unwrap().after(None).collect()
}

#[test]
fn twenty_at_once_have_twenty_addresses() {
    on_a_node(|node| {
        for way in [&V4, &V6] {
            rules_of_the_daemon(way);
            let before = state();
            let pods: Vec<(String, Netns)> = (0..20).map(|number| (format!("c{number}"), pod())).collect();
            let all = |command: &str| {
                std::thread::scope(|scope| {
                    let running: Vec<_> = pods
                        .iter()
                        .map(|(id, netns)| {
                            let call = call(node, way, command, "1.0.0", &netns.path()).env("CNI_CONTAINERID", id);
                            scope.spawn(move || call.run())
                        })
                        .collect();
                    for run in running {
                        assert_eq!(run.join().unwrap().code, 0);
                    }
                });
            };
            all("ADD");
            let mut given: Vec<String> = pods.iter().flat_map(|(_, netns)| addresses(netns, way)).collect();
            given.sort();
            given.dedup();
            assert_eq!(given.len(), 20);
            assert_eq!(files(way).len(), 22);
            all("DEL");
            assert_state(&before);
            assert_eq!(files(way), ["last_reserved_ip.0", "lock"]);
        }
    });
}

/// The reference plugin; none, with a line that says so, where it is not installed.
fn host_local(way: &Way, command: &str, container: &str) -> Option<(bool, String)> {
    if !Path::new(HOST_LOCAL).exists() {
        let missing = format!("SKIP: {HOST_LOCAL} is not installed (Debian: containernetworking-plugins)");
        assert!(std::env::var_os("CI").is_none(), "{missing}");
        _ = std::io::stderr().write_all(format!("{missing}\n").as_bytes());
        return None;
    }
    let config = json!({"cniVersion": "0.4.0", "name": "aws-cni", "type": "egress-cni", "ipam": {"type": "host-local",
        "ranges": [[{"subnet": way.range}]], "routes": [{"dst": way.all}], "dataDir": way.data}});
    let variables = [
        ("CNI_COMMAND", command),
        ("CNI_CONTAINERID", container),
        ("CNI_NETNS", "/run/netns/x"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/usr/lib/cni"),
    ];
    let mut child = Command::new(HOST_LOCAL)
        .env_clear()
        .envs(variables)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    Some((output.status.success(), String::from_utf8(output.stdout).unwrap()))
}

#[test]
fn host_local_and_we_work_on_one_directory_in_turn() {
    on_a_node(|node| {
        for way in [&V4, &V6] {
            rules_of_the_daemon(way);
            let pods = [pod(), pod(), pod()];
            let ours = |command: &str, index: usize| {
                let call = call(node, way, command, "0.4.0", &pods[index].path())
                    .env("CNI_CONTAINERID", format!("ours{index}"));
                let answer = call.run();
                assert_eq!(answer.code, 0, "{answer:?}");
            };
            let Some((good, text)) = host_local(way, "ADD", "theirs0") else { return };
            assert!(good && text.contains(&format!("\"{}/", way.first)), "{text}");
            ours("ADD", 0);
            assert!(addresses(&pods[0], way)[0].starts_with(&format!("{}/", way.second)), "behind theirs");
            let (_, text) = host_local(way, "ADD", "theirs1").unwrap();
            assert!(text.contains(&way.second.replace('3', "4")), "behind ours: {text}");
            let (good, text) = host_local(way, "ADD", "ours0").unwrap();
            assert!(!good && text.contains("duplicate allocation is not allowed"), "they know our files: {text}");
            // Each deletes what the other made.
            assert!(host_local(way, "DEL", "ours0").unwrap().0);
            let theirs = call(node, way, "DEL", "0.4.0", Path::new("")).env("CNI_CONTAINERID", "theirs0");
            theirs.run().silent();
            assert_eq!(files(way), [&way.second.replace('3', "4"), "last_reserved_ip.0", "lock"]);
            // One lock for both.
            std::thread::scope(|scope| {
                let theirs: Vec<_> =
                    (10..20).map(|n| scope.spawn(move || host_local(way, "ADD", &format!("theirs{n}")))).collect();
                ours("ADD", 1);
                ours("ADD", 2);
                for run in theirs {
                    assert!(run.join().unwrap().unwrap().0);
                }
            });
            assert_eq!(files(way).len(), 10 + 2 + 1 + 2);
        }
    });
}

#[test]
fn other_plugins_may_give_the_address() {
    on_a_node(|node| {
        rules_of_the_daemon(&V4);
        let netns = pod();
        let script =
            "#!/bin/sh\ncat > /run/node/stdin\necho \"$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME\" >> /run/node/calls\n";
        let plugin = |name: &str, rest: &str| {
            let path = node.path("bin").join(name);
            fs::write(&path, format!("{script}{rest}\n")).unwrap();
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        };
        let ips = |ips: &str| format!("[ $CNI_COMMAND = DEL ] || echo '{{\"cniVersion\":\"0.4.0\",\"ips\":[{ips}]}}'");
        let one = r#"{"version":"4","address":"169.254.172.9/22","gateway":"169.254.172.1"}"#;
        plugin("one", &ips(one));
        plugin("none", &ips(""));
        plugin("two", &ips(&format!("{one},{one}")));
        plugin("refuses", r#"echo '{"code":11,"msg":"try later","details":"full"}'; exit 1"#);
        plugin("dies", "echo oh dear >&2; exit 3");
        let call = |command: &str, kind: &str| {
            let ipam = json!({"type": kind, "routes": [{"dst": "0.0.0.0/0"}]});
            call(node, &V4, command, "0.4.0", &netns.path()).env("PATH", "/usr/bin:/bin").config("ipam", ipam)
        };
        call("ADD", "one").run().result();
        assert_eq!(addresses(&netns, &V4), ["169.254.172.9/22"]);
        call("DEL", "one").run().silent();
        let calls = || fs::read_to_string(node.path("calls")).unwrap_or_default();
        assert_eq!(calls(), "ADD cni-5a1f eth0\nDEL cni-5a1f eth0\n");
        assert!(fs::read_to_string(node.path("stdin")).unwrap().contains("nodeIP"), "with the whole configuration");
        for (kind, part) in [
            ("none", "IPAM plugin returned zero IPs"),
            ("two", "IPAM plugin is expected to return 1 IP address, but returned 2 IPs, "),
            ("refuses", "running IPAM plugin failed: try later; full"),
            ("dies", "netplugin failed: exit status: 3: \"oh dear\""),
            ("absent", "failed to find plugin \"absent\" in path [/run/node/bin]"),
            ("../bin/one", "failed to find plugin"),
        ] {
            let (code, text) = call("ADD", kind).run().failure();
            assert!(code == 11 && text.contains(part), "{kind}: {text}");
            call("DEL", kind).run().silent();
        }
        // One that never reads, and leaves somebody behind who does not either.
        let leaves = node.path("bin").join("leaves");
        let behind = "#!/bin/sh\nsleep 100 <&0 >/dev/null 2>&1 &\necho $! >> /run/node/behind\n";
        fs::write(&leaves, format!("{behind}{}\n", ips(one))).unwrap();
        fs::set_permissions(&leaves, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        for command in ["ADD", "DEL"] {
            let done = call(command, "leaves").config("filler", "x".repeat(200_000)).run();
            assert_eq!(done.code, 0, "{done:?}");
            println!("{command} by a plugin that leaves somebody behind: {:?}", done.took);
            assert!(done.took < Duration::from_secs(50), "{:?}", done.took);
        }
        for process in fs::read_to_string(node.path("behind")).unwrap().lines() {
            sys::signal(process.parse().unwrap(), libc::SIGKILL).unwrap();
        }
        assert!(calls().contains("ADD cni-5a1f eth0\nDEL cni-5a1f eth0\nDEL cni-5a1f eth0\n"), "{}", calls());
    });
}

/// What the original has made for a pod, beside rules of others.
fn chain_of_the_original(program: &str, way: &Way, address: &str) {
    let (chain, multicast) = match way.family {
        Family::V4 => ("CNI-E4-5740307710ebfd5fb24f5", "224.0.0.0/4"),
        Family::V6 => ("CNI-E6-e335b08ae90730d0a659a", "ff00::/8"),
    };
    let container = if way.family == Family::V4 { "containerId-123" } else { "containerId-789" };
    let comment = format!("-m comment --comment \"name: \\\"aws-cni\\\" id: \\\"{container}\\\"\"");
    let rules = format!(
        "*nat\n:{chain} - [0:0]\n:KUBE-POSTROUTING - [0:0]\n-A POSTROUTING -j KUBE-POSTROUTING\n\
         -A POSTROUTING -s {address} {comment} -j {chain}\n-A {chain} -d {multicast} {comment} -j ACCEPT\n\
         -A {chain} {comment} -j SNAT --to-source {} --random-fully\nCOMMIT\n",
        way.node_ip
    );
    tool_with_input(program, &[], &rules);
}

/// Wires a pod as the original does (`spec/egress.md` 3, 4), as far as there is something to take away.
fn wired_by_the_original(way: &Way, netns: &Netns) {
    let inner = way.inner;
    let (gateway, address, scope) = match way.family {
        Family::V4 => ("169.254.172.1/32", format!("{}/22", way.first), "scope link"),
        Family::V6 => ("fe80::77/64", format!("{}/118", way.first), "nodad"),
    };
    write(way, way.first, "cni-5a1f\r\neth0");
    let host = format!(
        "ip link add veth0a1b2c3d mtu 9001 type veth peer name {inner} netns {}\nip link set veth0a1b2c3d up\n\
         ip address add {gateway} dev veth0a1b2c3d {scope}\nip route add {} dev veth0a1b2c3d",
        netns.path().display(),
        way.first
    );
    tool_with_input("sh", &["-e"], &host);
    let nodad = if way.family == Family::V6 { "nodad" } else { "" };
    let pod = format!("ip address add {address} dev {inner} {nodad}\nip link set {inner} up");
    netns.run(|| tool_with_input("sh", &["-e"], &pod));
}

#[test]
fn pods_of_the_original_are_taken_over() {
    on_a_node(|node| {
        for way in [&V4, &V6] {
            rules_of_the_daemon(way);
            let before = state();
            for (again, netns_lives) in [(false, true), (true, true), (false, false)] {
                let netns = pod();
                wired_by_the_original(way, &netns);
                if again {
                    let result = call(node, way, "ADD", "0.4.0", &netns.path()).run().result();
                    assert_ne!(result["interfaces"][3]["name"], "veth0a1b2c3d", "made anew");
                    assert!(addresses(&netns, way)[0].starts_with(&format!("{}/", way.first)), "with its old address");
                }
                let path = if netns_lives { netns.path() } else { PathBuf::new() };
                call(node, way, "DEL", "0.4.0", &path).run().silent();
                assert_state(&before);
                assert!(!files(way).contains(&way.first.to_owned()));
            }
        }
    });
}

#[test]
fn chains_of_the_original_go_with_their_pods() {
    on_a_node(|node| {
        for (way, container, program) in
            [(&V4, "containerId-123", "iptables-nft"), (&V6, "containerId-789", "ip6tables-nft")]
        {
            if tool(program, &["--version"]).is_none() {
                return;
            }
            write(way, way.first, &format!("{container}\r\neth0"));
            chain_of_the_original(&format!("{program}-restore"), way, way.first);
            let saved = || tool(&format!("{program}-save"), &["-t", "nat"]).unwrap();
            assert!(saved().contains("CNI-E"));
            for _ in 0..2 {
                call(node, way, "DEL", "0.4.0", Path::new("")).env("CNI_CONTAINERID", container).run().silent();
                let left = saved();
                assert!(!left.contains("CNI-E") && left.contains("-A POSTROUTING -j KUBE-POSTROUTING"), "{left}");
            }
            assert_eq!(files(way), ["lock"]);
        }
    });
}

#[test]
fn chains_in_legacy_tables_are_told_with_the_commands() {
    on_a_node(|node| {
        for (way, container, program) in
            [(&V4, "containerId-123", "iptables-legacy"), (&V6, "containerId-789", "ip6tables-legacy")]
        {
            if tool(program, &["--version"]).is_none() {
                return;
            }
            write(way, way.first, &format!("{container}\r\neth0"));
            chain_of_the_original(&format!("{program}-restore"), way, way.first);
            call(node, way, "DEL", "0.4.0", Path::new("")).env("CNI_CONTAINERID", container).run().silent();
            let log = fs::read_to_string(node.path("egress.log")).unwrap();
            let told = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let told: Vec<String> = told.map(|line| line["msg"].as_str().unwrap_or_default().to_owned()).collect();
            let warning =
                told.iter().rfind(|text| text.contains("iptables-legacy")).unwrap_or_else(|| panic!("{told:?}"));
            let commands = warning.lines().skip(1).collect::<Vec<_>>().join("\n");
            assert_eq!(commands.lines().count(), 3, "{warning}");
            tool_with_input("sh", &["-e"], &commands);
            let left = tool(&format!("{program}-save"), &["-t", "nat"]).unwrap();
            assert!(!left.contains("CNI-E") && left.contains("KUBE-POSTROUTING"), "the commands do it: {left}");
        }
    });
}

#[test]
fn a_lock_that_nobody_gives_back_ends_an_add() {
    on_a_node(|node| {
        rules_of_the_daemon(&V4);
        let held = File::open(write(&V4, "lock", "")).unwrap();
        sys::lock_exclusive(&held).unwrap();
        let netns = pod();
        let (code, text) = call(node, &V4, "ADD", "1.0.0", &netns.path()).run().failure();
        assert!(code == 11 && text.contains("lock /run/cni"), "{text}");
        assert!(Host::open().unwrap().require_egress_rules(Family::V4).is_ok());
    });
}
