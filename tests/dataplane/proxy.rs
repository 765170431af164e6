//! kube-proxy's rules on a node, in the form that each of its modes gives them: chains, marks, priorities and order are its
//! own, only the names of services are ours. Written by the tools, as kube-proxy does.

use crate::support::{Netns, python, tool, tool_with_input};
use ipnet::IpNet;
use std::fmt::Write as _;
use std::net::SocketAddr;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    IptablesNft,
    IptablesLegacy,
    Nftables,
    Ipvs,
}

/// How a service is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    ClusterIp,
    /// externalTrafficPolicy Local: the client's address is kept.
    NodePortLocal,
    /// externalTrafficPolicy Cluster: masqueraded.
    NodePortCluster,
}

/// A service with one endpoint, over TCP and UDP.
#[derive(Clone, Debug)]
pub struct Service {
    pub kind: Kind,
    /// Cluster address and port; of a node port only the port counts.
    pub at: SocketAddr,
    pub endpoint: SocketAddr,
}

/// Whether this kernel and these tools offer the backend; the reason if not.
pub fn offered(backend: Backend, probe: &Netns) -> Result<(), String> {
    let try_command = |program: &str, arguments: &[&str]| {
        let output = probe.run(|| std::process::Command::new(program).args(arguments).output());
        match output {
            Err(error) => Err(format!("{program}: {error}")),
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        }
    };
    match backend {
        Backend::IptablesNft => try_command("iptables-nft", &["-t", "nat", "-L", "-n"]),
        Backend::IptablesLegacy => try_command("iptables-legacy", &["-t", "nat", "-L", "-n"]),
        Backend::Nftables => try_command("nft", &["list", "ruleset"]),
        Backend::Ipvs => {
            try_command("ip", &["link", "add", "kube-ipvs0", "type", "dummy"])?;
            try_command("ipvsadm", &["-L", "-n"])?;
            try_command("iptables-nft", &["-t", "nat", "-L", "-n"])
        }
    }
}

/// [`offered`], with a line on standard error where it is not.
pub fn here(backend: Backend) -> bool {
    match offered(backend, &Netns::new("probe")) {
        Ok(()) => true,
        Err(why) => {
            let why =
                format!("kube-proxy as {backend:?} is not tried here, only in the virtual machine of tests/vm: {why}");
            // A kernel without IPVS is usual, one without nf_tables or iptables is none for a cluster.
            if backend == Backend::Ipvs {
                _ = std::io::Write::write_all(&mut std::io::stderr(), format!("SKIP: {why}\n").as_bytes());
            } else {
                python::skip(&why);
            }
            false
        }
    }
}

/// Starts kube-proxy: afterwards all services work.
pub fn start(backend: Backend, node: &Netns, services: &[Service]) {
    let tool = |kind: &str| format!("ip{}tables-{kind}-restore", if v6(services) { "6" } else { "" });
    match backend {
        Backend::IptablesNft => restore(node, &tool("nft"), &iptables(services)),
        Backend::IptablesLegacy => restore(node, &tool("legacy"), &iptables(services)),
        Backend::Nftables => drop(node.run(|| tool_with_input("nft", &["-f", "-"], &nftables(services)))),
        Backend::Ipvs => ipvs(node, services),
    }
}

/// Takes everything of kube-proxy's away again. Nobody else may have rules in the tables of iptables.
pub fn stop(backend: Backend, node: &Netns) {
    let tables = ["nat", "filter", "mangle"];
    match backend {
        Backend::IptablesNft | Backend::Ipvs => {
            let script = tables.map(|table| format!("add table ip {table}\ndelete table ip {table}\n")).concat();
            node.run(|| tool_with_input("nft", &["-f", "-"], &script));
            if backend == Backend::Ipvs {
                node.run(|| tool("ipvsadm", &["-C"]));
                node.run(|| tool("ip", &["link", "delete", "kube-ipvs0"]));
            }
        }
        Backend::IptablesLegacy => {
            for table in tables {
                node.run(|| tool("iptables-legacy", &["-t", table, "-F"]));
                node.run(|| tool("iptables-legacy", &["-t", table, "-X"]));
            }
        }
        Backend::Nftables => drop(node.run(|| tool("nft", &["delete", "table", "ip", "kube-proxy"]))),
    }
}

fn restore(node: &Netns, program: &str, text: &str) {
    node.run(|| tool_with_input(program, &["--noflush"], text));
}

// What all modes that use iptables have in nat for masquerading, first of all.
const MASQUERADE: &str = "\
*nat
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
-I PREROUTING 1 -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-I OUTPUT 1 -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-I POSTROUTING 1 -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
";

const FILTER: &str = "\
*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

/// Whether the services are those of an IPv6 cluster; all are of one family.
fn v6(services: &[Service]) -> bool {
    services.first().is_some_and(|service| service.endpoint.is_ipv6())
}

fn put(text: &mut String, line: impl std::fmt::Display) {
    writeln!(text, "{line}").unwrap();
}

/// What kube-proxy gives to `iptables-restore --noflush`. No cluster CIDR is configured, as on EKS.
fn iptables(services: &[Service]) -> String {
    let (mut chains, mut rules, mut portals, mut ports) = Default::default();
    let length = if v6(services) { 128 } else { 32 };
    for (number, service) in services.iter().enumerate() {
        for proto in ["tcp", "udp"] {
            let id = format!("{}{number:05}", proto.to_uppercase());
            let say = format!("-m comment --comment \"default/service{number}:{proto}\"");
            let Service { at, endpoint, .. } = service;
            put(&mut chains, format!(":KUBE-SVC-{id} - [0:0]\n:KUBE-SEP-{id} - [0:0]"));
            if service.kind == Kind::ClusterIp {
                let dport = format!("-p {proto} -m {proto} --dport {}", at.port());
                put(&mut portals, format!("-A KUBE-SERVICES -d {}/{length} {dport} {say} -j KUBE-SVC-{id}", at.ip()));
            } else {
                put(&mut chains, format!(":KUBE-EXT-{id} - [0:0]"));
                let dport = format!("-p {proto} -m {proto} --dport {}", at.port());
                put(&mut ports, format!("-A KUBE-NODEPORTS {dport} {say} -j KUBE-EXT-{id}"));
                let masquerade = match service.kind {
                    Kind::NodePortLocal => "-m addrtype --src-type LOCAL ",
                    _ => "",
                };
                put(&mut rules, format!("-A KUBE-EXT-{id} {say} {masquerade}-j KUBE-MARK-MASQ"));
                put(&mut rules, format!("-A KUBE-EXT-{id} -j KUBE-SVC-{id}"));
            }
            put(&mut rules, format!("-A KUBE-SVC-{id} {say} -j KUBE-SEP-{id}"));
            put(&mut rules, format!("-A KUBE-SEP-{id} -s {}/{length} {say} -j KUBE-MARK-MASQ", endpoint.ip()));
            put(
                &mut rules,
                format!("-A KUBE-SEP-{id} {say} -p {proto} -m {proto} -j DNAT --to-destination {endpoint}"),
            );
        }
    }
    let last = "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in \
                this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS";
    let (table, rest) = MASQUERADE.split_at(MASQUERADE.find("-I").unwrap());
    // The rule about localnet is for IPv4 alone.
    let filter = filter(v6(services));
    format!("{filter}{table}{chains}{rest}{portals}{last}\n{ports}{rules}COMMIT\n")
}

const NFT_HOOKS: &str = "\
	chain firewall-check { ip daddr . meta l4proto . th dport vmap @firewall-ips; }
	chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
	chain nodeport-endpoints-check { ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }
	chain cluster-ips-check {
		ip daddr @cluster-ips reject comment \"Reject traffic to invalid ports of ClusterIPs\"
	}
	chain filter-prerouting {
		type filter hook prerouting priority -110; policy accept;
		ct state new jump firewall-check
	}
	chain filter-input {
		type filter hook input priority -110; policy accept;
		ct state new jump nodeport-endpoints-check
		ct state new jump service-endpoints-check
	}
	chain filter-forward {
		type filter hook forward priority -110; policy accept;
		ct state new jump service-endpoints-check
		ct state new jump cluster-ips-check
	}
	chain filter-output {
		type filter hook output priority -110; policy accept;
		ct state new jump service-endpoints-check
		ct state new jump firewall-check
	}
	chain filter-output-post-dnat {
		type filter hook output priority -90; policy accept;
		ct state new jump cluster-ips-check
	}
	chain nat-prerouting {
		type nat hook prerouting priority -100; policy accept;
		jump services
	}
	chain nat-output {
		type nat hook output priority -100; policy accept;
		jump services
	}
	chain nat-postrouting {
		type nat hook postrouting priority 100; policy accept;
		jump masquerading
	}
}
";

/// [`FILTER`] of one family.
fn filter(six: bool) -> String {
    FILTER.lines().filter(|line| !six || !line.contains("127.0.0.0/8")).flat_map(|line| [line, "\n"]).collect()
}

/// The table `ip kube-proxy` of the nftables mode.
fn nftables(services: &[Service]) -> String {
    let (mut chains, mut portals, mut ports) = (String::new(), Vec::new(), Vec::new());
    for (number, service) in services.iter().enumerate() {
        for proto in ["tcp", "udp"] {
            let name = format!("S{number}/{proto}");
            let Service { at, endpoint, .. } = service;
            let (service_chain, external) = (format!("service-{name}"), format!("external-{name}"));
            if service.kind == Kind::ClusterIp {
                portals.push(format!("{} . {proto} . {} : goto {service_chain}", at.ip(), at.port()));
            } else {
                ports.push(format!("{proto} . {} : goto {external}", at.port()));
                let masquerade = match service.kind {
                    Kind::NodePortLocal => "fib saddr type local ",
                    _ => "",
                };
                put(
                    &mut chains,
                    format!(
                        "\tchain {external} {{\n\t\t{masquerade}jump mark-for-masquerade\n\t\tgoto {service_chain}\n\t}}"
                    ),
                );
            }
            put(
                &mut chains,
                format!(
                    "\tchain {service_chain} {{\n\t\tnumgen random mod 1 vmap {{ 0 : goto endpoint-{name} }}\n\t}}\n\
                 \tchain endpoint-{name} {{\n\t\tip saddr {} jump mark-for-masquerade\n\
                 \t\tmeta l4proto {proto} dnat to {endpoint}\n\t}}",
                    endpoint.ip()
                ),
            );
        }
    }
    let elements = |list: &[String]| match list {
        [] => String::new(),
        list => format!("elements = {{ {} }}", list.join(", ")),
    };
    let (portals, ports) = (elements(&portals), elements(&ports));
    let text = format!(
        "table ip kube-proxy {{
	comment \"rules for kube-proxy\"
	set cluster-ips {{ type ipv4_addr; comment \"Active ClusterIPs\"; }}
	set nodeport-ips {{ type ipv4_addr; comment \"IPs that accept NodePort traffic\"; elements = {{ 10.20.11.162, 10.20.12.5 }}; }}
	map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
	map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
	map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
	map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; {portals} }}
	map service-nodeports {{ type inet_proto . inet_service : verdict; {ports} }}
	chain mark-for-masquerade {{ meta mark set meta mark | 0x4000; }}
	chain masquerading {{
		meta mark & 0x4000 == 0 return
		meta mark set meta mark ^ 0x4000
		masquerade fully-random
	}}
{chains}	chain services {{
		ip daddr . meta l4proto . th dport vmap @service-ips
		ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
	}}
{NFT_HOOKS}"
    );
    if v6(services) { in_ipv6(&text, services) } else { text }
}

// The same table for the other family.
fn in_ipv6(text: &str, services: &[Service]) -> String {
    let node_ports = services.iter().filter(|service| service.kind != Kind::ClusterIp).map(|service| service.at.ip());
    let node_port = node_ports.take(1).map(|address| address.to_string()).collect::<String>();
    text.replace("table ip ", "table ip6 ")
        .replace("ip daddr", "ip6 daddr")
        .replace("ip saddr", "ip6 saddr")
        .replace("ipv4_addr", "ipv6_addr")
        .replace("10.20.11.162, 10.20.12.5", &node_port)
}

// Virtual servers for every way to a service, the addresses on kube-ipvs0, and rules that only mark.
fn ipvs(node: &Netns, services: &[Service]) {
    if node.run(|| tool("ip", &["-br", "link", "show", "type", "dummy"])).is_none_or(|text| text.is_empty()) {
        node.run(|| tool("ip", &["link", "add", "kube-ipvs0", "type", "dummy"]));
    }
    for (path, value) in [("net/ipv4/vs/conntrack", "1"), ("net/ipv4/vs/expire_nodest_conn", "1")] {
        node.run(|| enibox::netlink::sysctl::set(path, value)).unwrap();
    }
    let six = v6(services);
    let (mut table, mut marks) = (String::new(), String::new());
    for service in services {
        let endpoint = service.endpoint;
        let addresses = match service.kind {
            Kind::ClusterIp => {
                let address = service.at.ip();
                node.run(|| {
                    tool("ip", &["address", "replace", &IpNet::from(address).to_string(), "dev", "kube-ipvs0"])
                });
                vec![address]
            }
            _ if six => vec![service.at.ip()],
            _ => vec![[10, 20, 11, 162].into(), [10, 20, 12, 5].into()],
        };
        for (flag, proto) in [("-t", "tcp"), ("-u", "udp")] {
            for address in &addresses {
                let at = SocketAddr::new(*address, service.at.port());
                writeln!(table, "-A {flag} {at} -s rr\n-a {flag} {at} -r {endpoint} -m").unwrap();
            }
            if service.kind == Kind::NodePortCluster {
                let port = service.at.port();
                writeln!(marks, "-A KUBE-NODEPORTS -p {proto} -m {proto} --dport {port} -j KUBE-MARK-MASQ").unwrap();
            }
        }
    }
    node.run(|| tool_with_input("ipvsadm", &["-R"], &table));
    let last = "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS";
    let restore_tool = if six { "ip6tables-nft-restore" } else { "iptables-nft-restore" };
    restore(node, restore_tool, &format!("{}{MASQUERADE}{last}\n{marks}COMMIT\n", filter(six)));
}
