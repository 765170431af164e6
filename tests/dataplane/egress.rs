//! The other family's way out (`spec/dataplane.md` 22.3): pods with an address that only the node knows, from the plugin.

use crate::cleanup::leaves;
use crate::support::whole::Whole;
use crate::support::{Netns, find_program, tool, tool_with_input};
use crate::talk::{BOTH, Flow, PATIENCE};
use crate::world::{PRIMARY, intent, ip, well};
use enibox::apply::Host;
use enibox::model::net;
use enibox::netlink::{Socket, link as links};
use enibox::plan::doctor;
use enibox::plan::egress::HostEnd;
use enibox::plan::host::{Egress, Intent};
use serde_json::json;
use std::collections::BTreeSet;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

struct Family {
    ip: &'static str,
    node: &'static str,
    remote: &'static str,
    /// As whom pods see the node itself.
    near: &'static str,
    range: &'static str,
    all: &'static str,
    pods: [&'static str; 2],
    length: u8,
}

const V4: Family = Family {
    ip: "ip",
    node: "10.20.11.162",
    remote: "203.0.113.10",
    near: "169.254.172.1",
    range: "169.254.172.0/22",
    all: "0.0.0.0/0",
    pods: ["169.254.172.2", "169.254.172.3"],
    length: 32,
};
const V6: Family = Family {
    ip: "ip -6",
    node: "2001:db8:11::162",
    remote: "2001:db8:99::10",
    near: "2001:db8:11::162",
    range: "fd00::ac:0/118",
    all: "::/0",
    pods: ["fd00::ac:2", "fd00::ac:3"],
    length: 128,
};

/// A node whose link leads straight to a host outside.
fn wire(family: &Family) -> (Netns, Netns) {
    let (node, remote) = (Netns::new("node"), Netns::new("remote"));
    let Family { ip, node: own, remote: outside, length, .. } = family;
    let sysctl =
        "sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.default.rp_filter=0\n";
    shell(
        &node,
        &format!(
            "{sysctl}ip link add eth0 address {PRIMARY} type veth peer name far netns {}\n\
             ip link set eth0 up\n{ip} address add {own}/{length} dev eth0 {}\n{ip} route add {outside} dev eth0",
            remote.path().display(),
            nodad(family)
        ),
    );
    // It knows a way to the pods, as nobody outside does, so that a refusal is the node's.
    shell(
        &remote,
        &format!(
            "ip link set far up\n{ip} address add {outside}/{length} dev far {}\n{ip} route add {own} dev far\n\
             {ip} route add {} via {own}",
            nodad(family),
            family.pods[0]
        ),
    );
    (node, remote)
}

fn nodad(family: &Family) -> &'static str {
    if family.length == 128 { "nodad" } else { "" }
}

fn shell(netns: &Netns, script: &str) {
    // The tool itself, where the shell has a smaller one built in.
    let ip = find_program("ip").map_or("ip".into(), |path| path.display().to_string());
    netns.run(|| tool_with_input("sh", &["-e"], &format!("ip() {{ command {ip} \"$@\"; }}\n{script}")));
}

/// Calls the plugin for a pod as a runtime on the node does.
fn plugin(command: &str, family: &Family, node: &Netns, pod: &Netns, files: &Path) {
    let config = json!({"cniVersion": "1.0.0", "name": "aws-cni", "type": "egress-cni", "enabled": "true", "mtu": "9001",
        "nodeIP": family.node, "prevResult": {"cniVersion": "1.0.0", "ips": []},
        "ipam": {"type": "host-local", "ranges": [[{"subnet": family.range}]], "routes": [{"dst": family.all}], "dataDir": files}});
    let mut call = Command::new(env!("CARGO_BIN_EXE_enibox"));
    call.arg0("egress-cni").env_clear().env("CNI_COMMAND", command).env("CNI_IFNAME", "eth0");
    call.env("CNI_NETNS", pod.path()).env("CNI_CONTAINERID", pod.path().file_name().unwrap());
    call.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = node.run(|| call.spawn()).unwrap();
    child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stdout));
}

/// A pod whose main interface has been made, up to its name.
fn pod() -> Netns {
    let pod = Netns::new("pod");
    shell(&pod, "ip link add eth0 type veth peer name far");
    pod
}

const EVERY: [&str; 3] = ["egress-address", "egress-route", "egress-link"];

/// Single faults of what the first pod has on the node: each is found under its name, put back in one go, and nothing else is.
fn mended(family: &Family, wanted: &Intent, node: &Netns, works: &dyn Fn(u16)) {
    let pod = ip(family.pods[0]);
    let look = || node.run(|| Host::open()?.observe_for(wanted)).unwrap();
    let before = look();
    let link = before.links.iter().find(|link| HostEnd::of(link).is_some_and(|end| end.pod == pod)).expect("it tells");
    let (ip, veth, length) = (family.ip, &link.name, family.length);
    let own = HostEnd::of(link).unwrap().address(link.index).addr;
    let back = format!("ip link set {veth} down\nip link set {veth} up");
    // In its place before it; and, for want of that in IPv6, one that stands elsewhere and stays.
    let barrier = match length {
        32 => format!("{ip} route prepend blackhole {pod}"),
        _ => format!("{ip} route del {pod}\n{ip} route add unreachable {pod} metric 4096"),
    };
    let v6_off = format!("echo 1 > /proc/sys/net/ipv6/conf/{veth}/disable_ipv6");
    let faults: [(&[&str], String); 9] = [
        (&[], format!("ip link set {veth} txqueuelen 900\nip link set {veth} txqueuelen 1000")),
        (&["egress-route"], format!("{ip} route del {pod}")),
        (&["egress-route"], format!("{ip} route del {pod}\n{ip} route add {pod} dev eth0")),
        (&["egress-route"], barrier),
        // With its last IPv4 address a link loses all routes.
        (&EVERY[..if length == 32 { 2 } else { 1 }], format!("{ip} address del {own} dev {veth}")),
        (&["egress-link"], format!("ip link set {veth} address 02:00:00:00:00:99")),
        (&["egress-link"], format!("ip link set {veth} mtu 1400")),
        (&EVERY[usize::from(length == 32)..2], back),
        (&EVERY[..if length == 32 { 0 } else { 2 }], v6_off),
    ];
    let all = &EVERY[usize::from(length == 32)..];
    let down = (all, format!("ip link set {veth} down"));
    // Before Linux 6.2 that is the only way to give a link another name, for us as well: all goes once more then.
    let renamed = (all, format!("ip link set {veth} down\nip link set {veth} name odd9\nip link set odd9 up"));
    for (number, (names, script)) in faults.into_iter().chain([down, renamed]).enumerate() {
        shell(node, &script);
        let found = doctor::host(wanted, &look()).iter().map(|finding| finding.name).collect::<BTreeSet<_>>();
        assert_eq!(found, names.iter().copied().collect(), "{script}");
        let report = node.run(|| Host::open()?.host(wanted)).unwrap();
        well(&report);
        let made: BTreeSet<_> = report.steps.iter().map(|step| step.what.name()).collect();
        assert_eq!(made, found, "{script}");
        works(7310 + u16::try_from(number).unwrap());
        assert_eq!(doctor::host(wanted, &look()), [], "{script}");
    }
    let after = look();
    let scope = node.run(|| tool("ip", &["address", "show", "dev", veth])).unwrap();
    assert_eq!(scope.contains("169.254.172.1/32 scope link"), length == 32, "{scope}");
    assert_eq!(after.links.iter().find(|there| there.index == link.index), Some(link));
    // One of an earlier release tells nothing until it is looked at.
    node.run(|| Socket::route()?.run(&[links::set_alias(link.index, "")])).unwrap();
    let report = node.run(|| Host::open()?.host(wanted)).unwrap();
    assert_eq!(report.steps.iter().map(|step| step.what.name()).collect::<Vec<_>>(), ["pod-note"]);
    assert_eq!(look().links.iter().find(|there| there.index == link.index), Some(link));
}

/// The chains that translate and guard in this family's table.
fn chains(node: &Netns, family: &Family) -> Vec<String> {
    let tables = node.run(|| Host::open()?.observe()).unwrap().tables;
    let ours = tables.into_iter().filter(|table| (table.family == net::Family::V4) == (family.length == 32));
    let chains = ours.flat_map(|table| table.chains).map(|chain| chain.name);
    chains.filter(|name| name.starts_with("egress-")).collect()
}

fn check(family: &Family, wanted: &Intent) {
    let (node, remote) = wire(family);
    let before = Whole::at_rest(node.handle());
    let off = Intent { egress: Egress::Ending(ip(family.node)), ..wanted.clone() };
    // In IPv6 mode the guard is always there.
    let guard = &["egress-forward"][..usize::from(wanted.v6)];
    well(&node.run(|| Host::open()?.host(&off)).unwrap());
    assert_eq!(chains(&node, family), guard, "no pod ever had a way out");
    well(&node.run(|| Host::open()?.host(wanted)).unwrap());
    let files = std::env::temp_dir().join(format!("enibox-egress-{}-{}", std::process::id(), family.length));
    let pods = [pod(), pod()];
    for pod in &pods {
        plugin("ADD", family, &node, pod, &files);
    }
    let flow = |client, address: &str, server, port| {
        let at = SocketAddr::new(ip(address), port);
        BOTH.map(|proto| Flow { client, target: at, server, listen: at }.run(proto, PATIENCE))
    };
    let [one, two] = &pods;
    let sees = |address: &str| [Ok(ip(address)), Ok(ip(address))];
    assert_eq!(flow(one, family.remote, &remote, 7301), sees(family.node), "the node's address is seen outside");
    assert_eq!(flow(two, family.remote, &remote, 7302), sees(family.node));
    assert_eq!(flow(&node, family.pods[0], one, 7303), sees(family.near), "the node's own probes are not translated");
    for (client, port) in [(&remote, 7304), (two, 7305)] {
        for result in flow(client, family.pods[0], one, port) {
            let error = result.unwrap_err();
            assert!(error.contains("refused") && error.contains("saw nobody"), "new connections are refused: {error}");
        }
    }
    let works = |port| assert_eq!(flow(one, family.remote, &remote, port), sees(family.node), "port {port}");
    mended(family, wanted, &node, &works);
    // The one of those barriers that stays is none of ours.
    let barrier = format!("{} route del unreachable {} metric 4096 2> /dev/null || :", family.ip, family.pods[0]);
    node.run(|| tool_with_input("sh", &["-e"], &barrier));
    let said = leaves(&node, &before);
    assert_eq!(said.matches(" stays: it goes with its pod").count(), 2, "{said}");
    // Each link tells what it is for.
    well(&node.run(|| Host::open()?.host(wanted)).unwrap());
    works(7350);
    // A daemon that is started again with the way out switched off: pods of before keep it.
    let look = || {
        let report = node.run(|| Host::open()?.host(&off)).unwrap();
        well(&report);
        report.steps.len()
    };
    assert_eq!(look(), 0, "nothing changes");
    works(7351);
    let refused = flow(&remote, family.pods[0], one, 7352);
    assert!(refused.iter().all(|result| result.as_ref().is_err_and(|error| error.contains("refused"))), "{refused:?}");
    plugin("DEL", family, &node, one, &files);
    assert_eq!(look(), 0, "the other pod lives");
    assert_eq!(flow(two, family.remote, &remote, 7307), sees(family.node), "the other pod is left alone");
    plugin("DEL", family, &node, two, &files);
    assert_eq!(chains(&node, family), ["egress-forward", "egress-postrouting"], "until the next look");
    assert_eq!((look(), look()), (1, 0));
    assert_eq!(chains(&node, family), guard);
    leaves(&node, &before);
    assert_eq!(before.differences(&Whole::at_rest(node.handle())), Vec::<String>::new());
    std::fs::remove_dir_all(&files).unwrap();
}

#[test]
fn ipv4_of_pods_in_an_ipv6_cluster() {
    let wanted = Intent {
        v6: true,
        node_ip: ip(V6.node),
        egress: Egress::Snat(ip(V4.node)),
        enis: Vec::new(),
        pods: Vec::new(),
        ..intent()
    };
    check(&V4, &wanted);
}

#[test]
fn ipv6_of_pods_in_an_ipv4_cluster() {
    let wanted = Intent { egress: Egress::Snat(ip(V6.node)), enis: Vec::new(), pods: Vec::new(), ..intent() };
    check(&V6, &wanted);
}
