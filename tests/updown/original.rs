//! What the original does on a node, by the test's own hands: with `ip`, `iptables-nft`, `nft` and the reference plugin
//! `host-local`, in its order, from its descriptions (`spec/dataplane.md` 5, 8.3, 9, 10; `spec/plugin.md` 12, 13;
//! `spec/egress.md` 2 to 7).

use crate::reader::{self, Entry};
use crate::stage::{CHECKPOINT, Family, Living, NAMESPACE, Stage, container, digest, host_veth};
use enibox::clock;
use enibox::model::ec2::{Call, ConntrackTimeouts, Count, Create, Reply};
use enibox::sandbox::topology::Pod;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU32, Ordering};

pub const HOST_LOCAL: &str = "/usr/lib/cni/host-local";
/// Addresses of an ENI of an m5.large besides its own.
const SLOTS: u32 = 9;

/// What EC2 has given the node: the primary ENI full, in IPv4 a second one too, which is set up.
pub fn attach(stage: &Stage) {
    let instance = stage.world.nodes[0].instance.clone();
    let identity = stage.world.cloud.vpc().identity(&instance).unwrap();
    let call = |call: Call| {
        let outcome = stage.world.cloud.change(|vpc| vpc.execute(clock::now(), &call));
        outcome.result.unwrap_or_else(|failure| panic!("{call:?}: {failure}"))
    };
    if stage.family.v6 {
        call(Call::AssignIpv6Prefix(identity.primary_eni));
        return;
    }
    call(Call::Assign { eni: identity.primary_eni, count: Count::Addresses(SLOTS) });
    let tags = [
        ("node.k8s.amazonaws.com/createdAt", "2026-11-21T01:30:00Z"),
        ("node.k8s.amazonaws.com/instance_id", instance.as_str()),
        ("cluster.k8s.amazonaws.com/name", "enibox-sandbox"),
        ("eks:eni:owner", "amazon-vpc-cni"),
    ];
    let Reply::Created(eni) = call(Call::Create(Create {
        subnet: identity.subnet,
        description: format!("aws-K8S-{instance}"),
        groups: Vec::new(),
        count: Count::Addresses(SLOTS),
        conntrack: ConntrackTimeouts::default(),
        tags: tags.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        client_token: "of the original".into(),
    })) else {
        panic!("an ENI was asked for")
    };
    call(Call::Attach { eni: eni.id.clone(), instance: instance.clone(), device: 1, card: 0 });
    stage.world.cloud.vpc().forget_calls();
    let link = stage.world.topology().link_names(&instance)[&eni.id].clone();
    let subnet = stage.world.cloud.vpc().subnet_cidr(&eni.subnet).unwrap();
    let (own, gateway) = (eni.primary_ipv4.unwrap(), subnet.hosts().next().unwrap());
    stage.shell(&format!(
        "ip link set {link} mtu 9001 up\n\
         ip address add {own}/{length} broadcast + dev {link}\n\
         ip route replace {gateway}/32 dev {link} scope link table 2\n\
         ip route replace default via {gateway} dev {link} table 2\n\
         ip route delete {subnet} dev {link}\n\
         ip rule add from {own} lookup 2 priority 32765",
        length = subnet.prefix_len()
    ));
}

/// The packet filter and the rule for marked packets, as at every start.
pub fn filter(stage: &Stage) {
    let Family { v6, ip, range, tables, nat, .. } = stage.family;
    let rule = format!("{} rule add fwmark 0x80/0x80 lookup main priority 1024", ip[0]);
    let reject = format!(
        "*filter\n-I FORWARD 1 -d {range} -m conntrack --ctstate NEW -m comment \
         --comment \"Block Node Local Pod access via {}\" -j REJECT\nCOMMIT\n",
        if *v6 { "IPv4" } else { "IPv6" }
    );
    stage.shell(&format!(
        "{} || true\n{rule}\n{tables} --noflush <<'END'\n{reject}END",
        rule.replace(" add ", " delete ")
    ));
    if *v6 {
        return;
    }
    let node = stage.own(true);
    let cidrs = ["100.64.0.0/16", "10.20.0.0/16"];
    let returns =
        cidrs.map(|cidr| format!("-A AWS-SNAT-CHAIN-0 -d {cidr} -m comment --comment \"AWS SNAT CHAIN\" -j RETURN\n"));
    let marks = cidrs.map(|cidr| format!("counter ip daddr {cidr} return\n"));
    stage.shell(&format!(
        "{nat} --noflush <<'END'\n\
         *nat\n:AWS-SNAT-CHAIN-0 - [0:0]\n\
         -A POSTROUTING -m comment --comment \"AWS SNAT CHAIN\" -j AWS-SNAT-CHAIN-0\n{}\
         -A AWS-SNAT-CHAIN-0 ! -o vlan+ -m comment --comment \"AWS, SNAT\" -m addrtype ! --dst-type LOCAL -j SNAT \
         --to-source {node} --random-fully\nCOMMIT\n*mangle\n\
         -A PREROUTING -i eth0 -m comment --comment \"AWS, primary ENI\" -m addrtype --dst-type LOCAL --limit-iface-in \
         -j CONNMARK --set-xmark 0x80/0x80\n\
         -A PREROUTING -i eni+ -m comment --comment \"AWS, primary ENI\" -j CONNMARK --restore-mark --mask 0x80\n\
         -A PREROUTING -i vlan+ -m comment --comment \"AWS, primary ENI\" -j CONNMARK --restore-mark --mask 0x80\n\
         COMMIT\nEND\n\
         for chain in nat-prerouting snat-mark; do\n\
         if nft list chain ip aws-cni $chain >/dev/null 2>&1; then nft flush chain ip aws-cni $chain; fi; done\n\
         if nft list chain ip aws-cni nat-prerouting >/dev/null 2>&1; then nft delete chain ip aws-cni nat-prerouting; fi\n\
         nft -f - <<'END'\n\
         table ip aws-cni {{\nchain snat-mark {{\n{}counter ct mark set ct mark | 0x80\n}}\n\
         chain nat-prerouting {{\ntype nat hook prerouting priority -90; policy accept;\n\
         fib daddr type local return\niifname \"eni*\" counter jump snat-mark\n\
         counter meta mark set ct mark & 0x80\n}}\n}}\nEND",
        returns.concat(),
        marks.concat()
    ));
}

/// The next free address on the ENI of this device number.
fn free(stage: &Stage, device: u32, taken: &BTreeSet<IpAddr>) -> IpAddr {
    let enis = stage.enis();
    let eni = &enis.iter().find(|(number, _)| *number == device).unwrap().1;
    let mut all: Vec<IpAddr> = if stage.family.v6 {
        let first = eni.v6_prefixes[0].network().to_string().parse::<Ipv6Addr>().unwrap();
        (0..20).map(|number| IpAddr::V6((u128::from(first) + number).into())).collect()
    } else {
        eni.secondary_ipv4s.iter().copied().map(IpAddr::V4).collect()
    };
    all.sort();
    all.into_iter().find(|address| !taken.contains(address)).expect("a free address")
}

/// Reserves an address without a pod.
pub fn reserve(stage: &Stage, device: u32, taken: &mut BTreeSet<IpAddr>) -> IpAddr {
    let address = free(stage, device, taken);
    taken.insert(address);
    address
}

/// ADD by both plugins.
pub fn add(stage: &Stage, name: &str, device: u32, taken: &mut BTreeSet<IpAddr>) -> Living {
    let (address, pod, container) = (reserve(stage, device, taken), stage.new_pod(name), container());
    let table = if device == 0 { 254 } else { device + 1 };
    wire(stage, name, &pod, address, table);
    let egress = host_local(stage, "ADD", &container, &pod).unwrap();
    let egress: Value = serde_json::from_str(&egress).unwrap();
    let egress = egress["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap();
    let outer = wire_egress(stage, &pod, egress, &container);
    let (version, mac) = if stage.family.v6 { ("6", "02:00:00:00:00:02") } else { ("4", "02:00:00:00:00:03") };
    let veth = host_veth(name);
    let result = json!({"cniVersion": "0.4.0",
        "interfaces": [{"name": veth}, {"name": "eth0", "mac": table.to_string(), "sandbox": pod.path},
            {"name": veth.replacen("eni", "dummy", 1), "mac": "0", "sandbox": device.to_string()},
            {"name": outer, "mac": mac}, {"name": stage.family.inner, "mac": mac, "sandbox": pod.path}],
        "ips": [{"version": version, "interface": 1, "address": format!("{address}/{}", stage.family.bits[0])}],
        "dns": {}});
    Living { name: name.into(), container, pod, address, egress, result }
}

fn fresh() -> u32 {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    COUNT.fetch_add(1, Ordering::Relaxed)
}

fn wire(stage: &Stage, name: &str, pod: &Pod, address: IpAddr, table: u32) {
    let Family { v6, ip, bits, gateway, .. } = stage.family;
    let (veth, ip, bits) = (host_veth(name), ip[0], bits[0]);
    let mac = format!("06:00:00:00:00:{:02x}", fresh());
    let netns = pod.path.display();
    stage.shell(&format!(
        "ip link add {veth} txqueuelen 0 address {mac} mtu 9001 type veth peer name eth0 mtu 9001 netns {netns}\n\
         cd /proc/sys/net/ipv6/conf/{veth}\n\
         echo 0 > accept_ra; echo 1 > accept_redirects; echo 0 > forwarding\n\
         ip link set {veth} up"
    ));
    let (enable, scope, nodad) = if *v6 {
        ("for dev in lo eth0; do echo 0 > /proc/sys/net/ipv6/conf/$dev/disable_ipv6; done\n", "", "nodad")
    } else {
        ("", "scope link", "")
    };
    Stage::shell_in(
        pod,
        &format!(
            "ip link set eth0 up\n{enable}{ip} route replace {gateway}/{bits} dev eth0 {scope}\n\
             {ip} route add default via {gateway} dev eth0\n{ip} address add {address}/{bits} dev eth0 {nodad}\n\
             {ip} neighbour add {gateway} lladdr {mac} dev eth0 nud permanent"
        ),
    );
    let from = format!("{ip} rule add from {address} lookup {table} priority 1536");
    stage.shell(&format!(
        "{ip} route replace {address}/{bits} dev {veth} {scope}\n{ip} rule add to {address} lookup main priority 512\n{}",
        if table == 254 { String::new() } else { from }
    ));
}

// The pod's second interface and its chain; the name of the host's end.
fn wire_egress(stage: &Stage, pod: &Pod, address: IpAddr, container: &str) -> String {
    let Family { v6, ip, bits, inner, range, .. } = stage.family;
    let (outer, ip, bits, netns) = (format!("veth{:08x}", fresh()), ip[1], bits[1], pod.path.display());
    stage.shell(&format!(
        "ip link add {outer} mtu 9001 type veth peer name {inner} mtu 9001 netns {netns}\n\
         cd /proc/sys/net/ipv6/conf/{outer}\necho 0 > accept_dad\nip link set {outer} up\necho 0 > accept_ra"
    ));
    let length = range.split_once('/').unwrap().1;
    if *v6 {
        let gateway = "169.254.172.1";
        Stage::shell_in(
            pod,
            &format!(
                "ip address add {address}/{length} broadcast + dev {inner}\nip link set {inner} up\n\
                 ip route add default via {gateway} dev {inner}\nip route delete {range} dev {inner}\n\
                 ip route add {gateway}/32 dev {inner} scope link src {address}\n\
                 ip route add {range} via {gateway} dev {inner} src {address}"
            ),
        );
        stage.shell(&format!(
            "ip address add {gateway}/32 scope link dev {outer}\nip route add {address}/32 dev {outer} scope link"
        ));
    } else {
        Stage::shell_in(
            pod,
            &format!(
                "cd /proc/sys/net/ipv6/conf\necho 1 > eth0/disable_ipv6\n\
                 for dev in lo {inner}; do echo 0 > $dev/disable_ipv6; done\necho 1 > {inner}/keep_addr_on_down\n\
                 ip address add {address}/{length} dev {inner} nodad\nip link set {inner} up"
            ),
        );
        let local = stage.shell(&format!(
            "for try in $(seq 100); do\n\
             local=$(ip -6 -o address show dev {outer} scope link | sed -n 's,.*inet6 \\([^/]*\\)/.*,\\1,p')\n\
             if [ -n \"$local\" ]; then echo $local; break; fi\nsleep 0.1\ndone"
        ));
        Stage::shell_in(pod, &format!("ip -6 route replace ::/0 via {} dev {inner}", local.trim()));
        stage.shell(&format!("{ip} route add {address}/{bits} dev {outer}"));
    }
    chain(stage, address, container);
    outer
}

fn chain(stage: &Stage, address: IpAddr, container: &str) {
    let Family { chain, multicast, tables, .. } = stage.family;
    let chain = format!("{chain}{}", digest("sha512sum", &format!("aws-cni{container}")).split_at(21).0);
    let comment = format!("-m comment --comment \"name: \\\"aws-cni\\\" id: \\\"{container}\\\"\"");
    stage.shell(&format!(
        "{tables} --noflush <<'END'\n*nat\n:{chain} - [0:0]\n-A {chain} -d {multicast} {comment} -j ACCEPT\n\
         -A {chain} {comment} -j SNAT --to-source {} --random-fully\n\
         -A POSTROUTING -s {address} {comment} -j {chain}\nCOMMIT\nEND",
        stage.own(false)
    ));
}

fn host_local(stage: &Stage, verb: &str, container: &str, pod: &Pod) -> Result<String, String> {
    let netns = pod.path.display().to_string();
    let env = [
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", container),
        ("CNI_NETNS", &netns),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/usr/lib/cni"),
    ];
    let config = json!({"cniVersion": "0.4.0", "name": "aws-cni", "type": "egress-cni", "ipam": stage.ipam()});
    stage.run(HOST_LOCAL, HOST_LOCAL, &env, &config.to_string())
}

/// DEL by both plugins of a pod that the daemon has restored, whoever added it, and the pod goes.
pub fn delete(stage: &Stage, pod: Living, restored: &mut BTreeMap<String, (Entry, u32)>) {
    host_local(stage, "DEL", &pod.container, &pod.pod).unwrap();
    let (entry, table) = restored.remove(&pod.container).expect("unknown pod");
    let Family { v6, ip, bits, .. } = stage.family;
    let (address, ip, scope) = (entry.address, ip[0], if *v6 { "" } else { "scope link" });
    stage.shell(&format!("{ip} rule delete to {address} lookup main priority 512"));
    if table != 254 {
        stage.shell(&format!(
            "{ip} rule delete from {address} lookup {table} priority 1536\n\
             while {ip} rule delete from {address} lookup {table} priority 1536 2>/dev/null; do :; done"
        ));
    }
    stage.shell(&format!("{ip} route delete {address}/{} {scope}", bits[0]));
    stage.node.delete_pod(pod.pod).unwrap();
}

/// Its start on a node that was ours: what it reads and whom it knows then, with everything that it writes.
pub fn start(stage: &Stage) -> BTreeMap<String, (Entry, u32)> {
    filter(stage);
    let entries = reader::checkpoint(&stage.read(CHECKPOINT), stage.family.v6);
    let restored = reader::restore(stage, &entries);
    save(stage, restored.values().map(|(entry, _)| entry));
    let ip = stage.family.ip[0];
    let rules = stage.shell(&format!("{ip} rule"));
    for (entry, table) in restored.values() {
        // Every rule from the address is made anew with the table of the last one.
        let from: Vec<u32> = rules.lines().filter_map(|line| from(line, entry.address)).collect();
        let wanted = if *table == 254 { Vec::new() } else { vec![*table] };
        assert_eq!(from, wanted, "rules from {} of {}", entry.address, entry.name);
        for table in from {
            let rule = format!("from {} lookup {table} priority 1536", entry.address);
            stage.shell(&format!("printf 'rule delete {rule}\\nrule add {rule}\\n' | {ip} -batch -"));
        }
    }
    restored
}

// The table that a listed rule leads to if it is from this address.
fn from(line: &str, address: IpAddr) -> Option<u32> {
    let rest = line.split_once("from ")?.1;
    let (source, table) = rest.split_once(" lookup ")?;
    let table = table.split_whitespace().next()?;
    (source.parse() == Ok(address)).then(|| if table == "main" { 254 } else { table.parse().unwrap() })
}

/// Writes the checkpoint.
pub fn save<'a>(stage: &Stage, entries: impl Iterator<Item = &'a Entry>) {
    let mut list = Vec::new();
    for entry in entries {
        let Entry { container, address, timestamp, namespace, name } = entry;
        let mut text = format!(
            "{{\"networkName\":\"aws-cni\",\"containerID\":\"{container}\",\"ifName\":\"eth0\",\"{}\":\"{address}\",\
             \"allocationTimestamp\":{timestamp},\"metadata\":{{",
            stage.family.member
        );
        if !name.is_empty() {
            _ = write!(text, "\"k8sPodNamespace\":\"{namespace}\",\"k8sPodName\":\"{name}\",\"interfacesCount\":1");
        }
        list.push(text + "}}");
    }
    let text = format!("{{\"version\":\"vpc-cni-ipam/1\",\"allocations\":[{}]}}\n", list.join(","));
    stage.shell(&format!(
        "mkdir -p -m 755 /run/aws-node\ncat > {CHECKPOINT}.tmp <<'END'\n{text}END\n\
         chmod 600 {CHECKPOINT}.tmp\nmv {CHECKPOINT}.tmp {CHECKPOINT}"
    ));
}

/// The entry of a pod.
pub fn entry(pod: &Living, number: usize) -> Entry {
    Entry {
        container: pod.container.clone(),
        address: pod.address,
        timestamp: 1_785_571_200_123_456_789 + i64::try_from(number).unwrap(),
        namespace: NAMESPACE.into(),
        name: pod.name.clone(),
    }
}
