//! The other family's way out (`spec/dataplane.md` 22.3): pods with an address that only the node knows, from the plugin.

use crate::support::{Netns, tool_with_input};
use crate::talk::{BOTH, Flow, PATIENCE};
use crate::world::{PRIMARY, intent, ip, well};
use enibox::apply::Host;
use enibox::plan::host::{Egress, Intent};
use serde_json::json;
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
    let shell = |netns: &Netns, script: &str| drop(netns.run(|| tool_with_input("sh", &["-e"], script)));
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
    pod.run(|| tool_with_input("sh", &["-e"], "ip link add eth0 type veth peer name far"));
    pod
}

fn check(family: &Family, wanted: &Intent) {
    let (node, remote) = wire(family);
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
    plugin("DEL", family, &node, one, &files);
    assert_eq!(flow(two, family.remote, &remote, 7307), sees(family.node), "the other pod is left alone");
    plugin("DEL", family, &node, two, &files);
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
