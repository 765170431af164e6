//! The other family's way out (`spec/dataplane.md` 22.3): pods with an address that only the node knows.

use crate::support::{Netns, tool_with_input};
use crate::talk::{BOTH, Flow, PATIENCE};
use crate::world::{PRIMARY, intent, ip, well};
use enibox::apply::Host;
use enibox::plan::host::{Egress, Intent};
use std::net::SocketAddr;

struct Family {
    ip: &'static str,
    node: &'static str,
    remote: &'static str,
    gateway: &'static str,
    pods: [&'static str; 2],
    length: u8,
}

const V4: Family = Family {
    ip: "ip",
    node: "10.20.11.162",
    remote: "203.0.113.10",
    gateway: "169.254.172.1",
    pods: ["169.254.172.10", "169.254.172.11"],
    length: 32,
};
const V6: Family = Family {
    ip: "ip -6",
    node: "2001:db8:11::162",
    remote: "2001:db8:99::10",
    gateway: "fd00::ac:1",
    pods: ["fd00::ac:10", "fd00::ac:11"],
    length: 128,
};

/// A node whose link leads straight to a host outside, and two pods with an egress address each.
fn wire(family: &Family) -> (Netns, Netns, [Netns; 2]) {
    let (node, remote, pods) = (Netns::new("node"), Netns::new("remote"), [Netns::new("pod"), Netns::new("pod")]);
    let shell = |netns: &Netns, script: &str| drop(netns.run(|| tool_with_input("sh", &["-e"], script)));
    let Family { ip, node: own, remote: outside, gateway, length, .. } = family;
    let name = |netns: &Netns| netns.path().display().to_string();
    let sysctl =
        "sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.default.rp_filter=0\n";
    shell(
        &node,
        &format!(
            "{sysctl}ip link add eth0 address {PRIMARY} type veth peer name far netns {}\n\
             ip link set eth0 up\n{ip} address add {own}/{length} dev eth0 {}\n{ip} route add {outside} dev eth0",
            name(&remote),
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
    for (number, (pod, address)) in pods.iter().zip(family.pods).enumerate() {
        shell(
            &node,
            &format!(
                "ip link add pod{number} type veth peer name v4if0 netns {}\nip link set pod{number} up\n\
                 {ip} address add {gateway}/{length} dev pod{number} {}\n{ip} route add {address} dev pod{number}",
                name(pod),
                nodad(family)
            ),
        );
        shell(
            pod,
            &format!(
                "ip link set v4if0 up\n{ip} address add {address}/{length} dev v4if0 {}\n\
                 {ip} route add {gateway} dev v4if0\n{ip} route add default via {gateway}",
                nodad(family)
            ),
        );
    }
    (node, remote, pods)
}

fn nodad(family: &Family) -> &'static str {
    if family.length == 128 { "nodad" } else { "" }
}

fn check(family: &Family, wanted: &Intent) {
    let (node, remote, pods) = wire(family);
    well(&node.run(|| Host::open()?.host(wanted)).unwrap());
    let flow = |client, address: &str, server, port| {
        let at = SocketAddr::new(ip(address), port);
        BOTH.map(|proto| Flow { client, target: at, server, listen: at }.run(proto, PATIENCE))
    };
    let [one, two] = &pods;
    let sees = |address: &str| [Ok(ip(address)), Ok(ip(address))];
    assert_eq!(flow(one, family.remote, &remote, 7301), sees(family.node), "the node's address is seen outside");
    assert_eq!(flow(two, family.remote, &remote, 7302), sees(family.node));
    assert_eq!(
        flow(&node, family.pods[0], one, 7303),
        sees(family.gateway),
        "the node's own probes are not translated"
    );
    for (client, port) in [(&remote, 7304), (two, 7305)] {
        for result in flow(client, family.pods[0], one, port) {
            let error = result.unwrap_err();
            assert!(error.contains("refused") && error.contains("saw nobody"), "new connections are refused: {error}");
        }
    }
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
