//! What others flush or alter is put back while traffic runs, in the modes besides plain IPv4: IPv6, the ways out in the other
//! family of both kinds, and links that get another name.

use crate::doctor::modes::has_vlan;
use crate::repair::{LIMIT, Pings, promised, unexplained};
use crate::settings::fetch;
use crate::stage::{PROGRAM, eventually};
use crate::support::{find_program, tool_with_input};
use crate::talk::Talk;
use enibox::apply::Host;
use enibox::clock;
use enibox::model::limits;
use enibox::model::naming::host_veth;
use enibox::model::net::Link;
use enibox::model::nft::Table;
use enibox::model::settings::Settings;
use enibox::netlink::sysctl;
use enibox::plan::egress::HostEnd;
use enibox::plan::host::Observation;
use enibox::plan::ruleset;
use enibox::sandbox::agents::{Agent, EVERY_CARD, Runtime, WiredPod};
use enibox::sandbox::cluster::{self, ApiServer};
use enibox::sandbox::controller;
use enibox::sandbox::serve::kube::Kube;
use enibox::sandbox::topology::Node;
use enibox::sandbox::world::{HOSTS, Plan, World};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// After that long without a look the next change is looked at at once.
const CALM: Duration = Duration::from_millis(2100);

/// A node with its daemon and pods.
struct Ground {
    agent: Agent,
    settings: Settings,
    node: Arc<Node>,
    /// The node's address of the other family, if pods are chained through `egress-cni`.
    egress: Option<IpAddr>,
    pods: Vec<WiredPod>,
    kube: Option<Arc<Kube>>,
    world: World,
}

/// Nobody needs the kernel's rule for a table that is empty; IPv6 has none.
const FLUSHES: [(&str, &str, &str); 2] = [
    ("all IPv6 rules flushed", "main-rule", "ip -6 rule flush"),
    ("all IPv4 rules flushed", "main-rule", "ip rule flush; ip rule add pref 32767 lookup default"),
];

/// Faults that do not touch the flows that are watched.
const QUIET: [&str; 6] = [
    "rule 1536 to another table",
    "rule 32765 deleted",
    "ENI's MTU",
    "veth's MTU",
    "veth without its own address",
    "egress: MTU",
];

impl Ground {
    fn new(instance_type: &str, seed: u64, env: &[(&str, &str)], egress: bool) -> Ground {
        let home = std::env::temp_dir().join(format!("enibox-ground-{}", std::process::id()));
        let mut world = World::create(&Plan { nodes: 1, instance_type, seed, home: &home }).unwrap();
        let mut env: Vec<(String, String)> =
            env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let get = |name: &str| env.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        let settings = Settings::parse(get).0;
        let limits = limits::of(instance_type).unwrap();
        let kube = cluster::prepare(&mut world, &settings, &limits, (ApiServer::Answers, 6)).unwrap();
        let node = world.node(0).unwrap();
        node.prepare(&settings).unwrap();
        env.push(cluster::endpoint());
        let logs = world.topology().run().logs();
        let mut agent = Agent::start(Path::new(PROGRAM), &logs, &node, &env).unwrap();
        agent.wait_ready(&node, &|| Ok(())).unwrap();
        let egress = egress.then(|| world.nodes[0].at(!settings.enable_ipv6));
        Ground { agent, settings, node, egress, pods: Vec::new(), kube, world }
    }

    fn runtime<T>(&self, work: impl FnOnce(&Runtime<'_>) -> T) -> T {
        let logs = self.world.topology().run().logs();
        let (program, node, settings, egress) = (Path::new(PROGRAM), &*self.node, &self.settings, self.egress);
        work(&Runtime { program, logs: &logs, node, settings, egress })
    }

    fn add(&mut self, name: &str, annotations: &[(&str, &str)]) {
        self.pods.push(self.runtime(|runtime| runtime.add(name, annotations)).unwrap());
    }

    fn script(&self, text: &str) -> String {
        // The tool itself, where the shell has a smaller one built in.
        let ip = find_program("ip").unwrap();
        let text = format!("ip() {{ {} \"$@\"; }}\n{text}", ip.display());
        self.node.place.net.run(|| tool_with_input("sh", &["-e"], &text)).unwrap().unwrap().trim().to_owned()
    }

    fn seen(&self) -> Observation {
        self.node.place.net.run(|| Host::open()?.observe()).unwrap().unwrap()
    }

    fn veth(&self, pod: usize, interface: usize) -> String {
        host_veth("eni", &self.node.place.name, &self.pods[pod].name, interface).unwrap()
    }

    fn metric(&self, start: &str) -> u64 {
        let page = self.node.place.net.run(|| fetch("127.0.0.1:61678", "/metrics")).unwrap();
        let lines = page.lines().filter_map(|line| line.strip_prefix(start));
        lines.map(|line| line.rsplit(' ').next().unwrap().trim().parse::<u64>().unwrap()).sum()
    }

    fn repairs(&self, what: &str) -> u64 {
        self.metric(&format!("awscni_repairs_total{{what=\"{what}\"}} "))
    }

    /// A repair is counted at the end of the round that made it.
    fn counts_beyond(&self, name: &str, what: &str, counted: u64) {
        eventually(Duration::from_secs(5), &format!("{name}: {what} is counted"), || {
            if self.repairs(what) > counted { Ok(()) } else { Err(self.log()) }
        });
    }

    fn looks(&self) -> u64 {
        self.metric("enibox_host_looks_total{cause=\"notice\"} ")
    }

    fn log(&self) -> String {
        let name = format!("{}-ipamd.log", self.node.place.name);
        std::fs::read_to_string(self.world.topology().run().logs().join(name)).unwrap_or_default()
    }

    /// Everybody is watched over: the core has told the thread that keeps the host's network of these pods.
    fn settle(&self) {
        let addresses: Vec<IpAddr> = self
            .pods
            .iter()
            .flat_map(|pod| pod.further.iter().map(|(_, address)| *address).chain([pod.address]))
            .collect();
        for address in addresses {
            let flag = if address.is_ipv6() { "-6" } else { "-4" };
            let rule = format!("ip {flag} rule show pref 512 to {address}");
            self.script(&format!("ip {flag} rule del pref 512 to {address}"));
            eventually(Duration::from_mins(1), &format!("{address} is watched over"), || {
                if self.script(&rule).is_empty() { Err(self.log()) } else { Ok(()) }
            });
        }
    }

    /// Plants the faults one after the other while traffic runs; each is put back, in time and counted.
    fn mends(&self, faults: &[(&str, &str, String)], flows: &[(usize, IpAddr, IpAddr)]) {
        let far = self.world.namespace("internet").unwrap();
        let near = |pod: usize| self.pods[pod].pod.place.handle().unwrap();
        let flows: Vec<_> = flows.iter().map(|(pod, source, at)| (near(*pod), *source, *at)).collect();
        let before = Picture::of(self);
        println!("{:<32}{:>8}{:>8}{:>8}{:>14}", "fault", "ms", "sent", "lost", "tcp pause ms");
        for (name, what, script) in faults {
            promised(name, || {
                let counted = self.repairs(what);
                let from_any = flows.iter().filter(|(_, source, _)| source.is_unspecified());
                let ends: Vec<_> = from_any.map(|(near, _, at)| (*name, near, &far, SocketAddr::new(*at, 0))).collect();
                let talk = Talk::between(&ends);
                let pings = flows.iter().map(|(near, source, at)| Pings::between(near, &far, *source, *at));
                let pings: Vec<_> = pings.collect();
                std::thread::sleep(Duration::from_millis(200));
                let begin = clock::instant();
                self.script(script);
                eventually(Duration::from_secs(20), name, || {
                    let found = before.differences(&Picture::of(self));
                    if found.is_empty() { Ok(()) } else { Err((found, self.log())) }
                });
                let took = begin.elapsed();
                let said = talk.finish();
                let (sent, lost) =
                    pings.into_iter().map(Pings::finish).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
                println!("{name:<32}{:>8}{sent:>8}{lost:>8}{:>14}", took.as_millis(), said.longest.as_millis());
                self.counts_beyond(name, what, counted);
                (took, unexplained(QUIET.contains(name), lost, flows.len(), took))
            });
        }
    }

    /// Faults of what `egress-cni` has made of the first pod, and of the rules for all.
    fn egress_faults(&self) -> Vec<(&'static str, &'static str, String)> {
        let pod = self.pods[0].egress.expect("it is chained");
        let seen = self.seen();
        let link = seen.links.iter().find(|link| HostEnd::of(link).is_some_and(|end| end.pod == pod)).unwrap();
        let (veth, own) = (&link.name, HostEnd::of(link).unwrap().address(0).addr);
        let (ip, table) = if pod.is_ipv4() { ("ip", "ip") } else { ("ip -6", "ip6") };
        // Before Linux 6.2 a link must be down to be renamed.
        let to = format!("ip link set {veth} name odd9");
        let rename = format!("{to} 2> /dev/null || {{ ip link set {veth} down; {to}; ip link set odd9 up || :; }}");
        let mut faults = vec![
            ("egress: route flushed", "egress-route", format!("{ip} route flush {pod}")),
            ("egress: route elsewhere", "egress-route", format!("{ip} route del {pod}; {ip} route add {pod} dev eth0")),
            ("egress: address flushed", "egress-address", format!("{ip} address del {own} dev {veth}")),
            ("egress: MAC rewritten", "egress-link", format!("ip link set {veth} address 02:00:00:00:00:99")),
            ("egress: MTU", "egress-link", format!("ip link set {veth} mtu 1400")),
            ("egress: link down", "egress-link", format!("ip link set {veth} down")),
            ("egress: link down and up", "egress-route", format!("ip link set {veth} down; ip link set {veth} up")),
            ("egress: chain flushed", "ruleset", format!("nft flush chain {table} aws-cni egress-postrouting")),
            ("egress: guard flushed", "ruleset", format!("nft flush chain {table} aws-cni egress-forward")),
            ("egress: table deleted", "ruleset", format!("nft delete table {table} aws-cni")),
            ("egress: link renamed", "egress-link", rename),
            (
                "egress: link renamed while down",
                "egress-link",
                // Unless the daemon was faster, which gives it its name and sets it up.
                format!("ip link set {veth} down; {to}; ip link set odd9 up || :"),
            ),
        ];
        if pod.is_ipv4() {
            for (name, link) in [("egress: link does not forward", veth.as_str()), ("egress: eth0 does not", "eth0")] {
                let script = format!("echo 0 > /proc/sys/net/ipv4/conf/{link}/forwarding");
                faults.push((name, "link-forwarding", script));
            }
        }
        faults
    }

    /// Whether packets of a pod pass the node is said by the setting of all links alone in IPv6: nothing has to keep those of
    /// single ones.
    fn single_links_do_not_keep_ipv6_from_passing(&self) {
        let far = self.world.namespace("internet").unwrap();
        let (pod, source, at) = to_internet(0, true);
        let path = |link: &str| format!("net/ipv6/conf/{link}/forwarding");
        let end = |link: &&Link| HostEnd::of(link).is_some_and(|end| Some(end.pod) == self.pods[pod].egress);
        let veth = self.seen().links.iter().find(end).unwrap().name.clone();
        for link in [veth.as_str(), "eth0"] {
            self.node.place.net.run(|| sysctl::set(&path(link), "0")).unwrap().unwrap();
        }
        let pings = Pings::between(&self.pods[pod].pod.place.handle().unwrap(), &far, source, at);
        std::thread::sleep(Duration::from_millis(500));
        let (sent, lost) = pings.finish();
        println!("IPv6 without forwarding of the single links: {sent} sent, {lost} lost");
        assert!(sent > 0 && lost < sent, "{sent} sent, {lost} lost");
        for link in [veth.as_str(), "eth0"] {
            assert_eq!(self.node.place.net.run(|| sysctl::read(&path(link))).unwrap().unwrap(), "0");
            self.node.place.net.run(|| sysctl::set(&path(link), "1")).unwrap().unwrap();
        }
    }

    /// As long as anybody has rules like these the kernel goes on translating established connections.
    fn others(&self) {
        for table in ["ip", "ip6"] {
            self.script(&format!(
                "nft add table {table} others\nnft add chain {table} others nat '{{ type nat hook postrouting priority 200 ; }}'\n\
                 nft add rule {table} others nat ct state new mark and 0x4000 == 0x4000 counter masquerade"
            ));
        }
    }

    /// A pod that comes and goes has nothing put back, and makes nobody look.
    fn comes_and_goes(&mut self) {
        let (looks, repairs) = (self.looks(), self.metric("awscni_repairs_total"));
        let begin = clock::instant();
        for number in 0..3 {
            self.add(&format!("short-{number}"), &[]);
            let pod = self.pods.pop().unwrap();
            self.runtime(|runtime| runtime.delete(pod)).unwrap();
        }
        std::thread::sleep(Duration::from_millis(500));
        let looked = self.looks() - looks;
        println!("three pods came and went in {:?}: {looked} looks", begin.elapsed());
        // None, unless the machine takes a tenth of a second between a link's going down and its going.
        assert!(looked <= 3, "{looked} looks");
        assert_eq!(self.metric("awscni_repairs_total"), repairs, "{}", self.log());
    }

    /// A DEL and a repair at one time: the DEL wins, nothing stays, and nothing is complained of.
    fn goes_while_it_is_mended(&mut self) {
        let before = Picture::of(self);
        for number in 0..10u64 {
            self.add(&format!("racing-{number}"), &[]);
            let pod = self.pods.pop().unwrap();
            let address = pod.egress.unwrap();
            let seen = self.seen();
            let link = seen.links.iter().find(|link| HostEnd::of(link).is_some_and(|end| end.pod == address)).unwrap();
            let ip = if address.is_ipv4() { "ip" } else { "ip -6" };
            self.script(&format!("{ip} route flush {address}; ip link set {} mtu 1400", link.name));
            // The repair comes after a tenth of a second, a DEL of the plugin takes some hundredths until it deletes the link.
            std::thread::sleep(Duration::from_millis(number * 15));
            self.runtime(|runtime| runtime.delete(pod)).unwrap();
        }
        eventually(Duration::from_secs(20), "all is as before", || {
            let found = before.differences(&Picture::of(self));
            if found.is_empty() { Ok(()) } else { Err((found, self.log())) }
        });
        assert!(!self.log().contains("host network:"), "{}", self.log());
    }

    /// What `enibox rules` says.
    fn listed(&self) -> String {
        let output = self.node.command(PROGRAM).unwrap().arg("rules").env_clear().output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    fn end(mut self) {
        for pod in std::mem::take(&mut self.pods) {
            self.runtime(|runtime| runtime.delete(pod)).unwrap();
        }
        self.agent.stop().unwrap();
    }
}

/// What the node's network is, as far as a repair has to restore it.
struct Picture {
    lines: BTreeSet<String>,
    tables: Vec<Table>,
}

impl Picture {
    fn of(ground: &Ground) -> Picture {
        let seen = ground.seen();
        let forwarding = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"].map(|path| {
            let value = ground.node.place.net.run(|| sysctl::read(path)).unwrap().unwrap();
            format!("{path} {value}")
        });
        let rules = seen.rules.iter().map(|rule| format!("rule {:?} {rule}", rule.family));
        // What the kernel gives a link of its own is its business.
        let own = |net: ipnet::IpNet| matches!(net, ipnet::IpNet::V6(net) if net.addr().is_unicast_link_local());
        let routes = seen.routes.iter().filter(|route| !own(route.dst)).map(|route| format!("route {route}"));
        let addresses = seen.addresses.iter().map(|address| format!("address {} if{}", address.addr, address.dev));
        let links = seen.links.iter().map(|link| {
            format!("link {} {:?} {} {} forwards {:?}", link.name, link.mac, link.mtu, link.up, link.forwards)
        });
        let lines = rules.chain(routes).chain(addresses).chain(links).chain(forwarding).collect();
        Picture { lines, tables: seen.tables }
    }

    fn differences(&self, now: &Picture) -> Vec<String> {
        let lines = self.lines.symmetric_difference(&now.lines).cloned();
        lines.chain(ruleset::differences(&self.tables, &now.tables)).collect()
    }
}

fn internet(v6: bool) -> IpAddr {
    HOSTS.iter().find(|host| host.name == "internet").unwrap().at(v6)
}

/// From the address that the kernel chooses.
fn to_internet(pod: usize, v6: bool) -> (usize, IpAddr, IpAddr) {
    let any = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    (pod, any, internet(v6))
}

#[test]
fn in_ipv6_mode_what_others_alter_is_put_back_while_traffic_runs() {
    let env = [("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true"), ("ENABLE_MULTI_NIC", "true")];
    let mut ground = Ground::new("p4d.24xlarge", 311, &env, true);
    ground.others();
    ground.add("one", &[]);
    ground.add("two", &[EVERY_CARD]);
    ground.settle();
    let further = ground.pods[1].further[0].1;
    let table = ground.script(&format!("ip -6 -o rule show from {further} | sed 's/.* lookup //'"));
    let own =
        ground.script(&format!("ip -6 -o rule | sed -n 's/^32765:.*from \\([0-9a-f:]*\\) lookup {table} *$/\\1/p'"));
    let eni = ground.script(&format!("ip -o -6 addr show to {own} | awk '{{print $2}}'"));
    let (pod, veth, other) = (ground.pods[0].address, ground.veth(0, 0), ground.veth(1, 1));
    let default = format!("ip -6 route replace default dev eth0 table {table}");
    let by_further = (1, further, internet(true));
    let mut faults = vec![
        ("rule 512 deleted", "to-pod-rule", format!("ip -6 rule del pref 512 to {pod}")),
        ("rule 1536 deleted", "from-pod-rule", format!("ip -6 rule del pref 1536 from {further}")),
        ("rule 1536 to another table", "from-pod-rule", format!("ip -6 rule add pref 1536 from {further} lookup 7")),
        ("rule 32765 deleted", "eni-rule", format!("ip -6 rule del pref 32765 from {own}")),
        ("pod's route deleted", "pod-route", format!("ip -6 route del {pod}")),
        ("further route deleted", "pod-route", format!("ip -6 route del {further}")),
        ("table of the ENI flushed", "eni-route", format!("ip -6 route flush table {table}")),
        ("default route elsewhere", "eni-route", default),
        ("default route unreachable", "eni-route", format!("ip -6 route replace unreachable default table {table}")),
        ("pod's route a blackhole", "pod-route", format!("ip -6 route replace blackhole {pod}")),
        ("ENI's MTU", "eni-mtu", format!("ip link set {eni} mtu 1500")),
        ("ENI's address flushed", "eni-address", format!("ip -6 addr flush dev {eni} scope global")),
        ("ENI down", "eni-link", format!("ip link set {eni} down")),
        ("veth's MAC rewritten", "pod-mac", format!("ip link set {veth} address 02:00:00:00:00:99")),
        ("veth's MTU", "pod-mtu", format!("ip link set {veth} mtu 1400")),
        ("veth down", "pod-link", format!("ip link set {veth} down")),
        ("further veth down", "pod-link", format!("ip link set {other} down")),
        ("veth without its own address", "pod-link", format!("ip -6 addr flush dev {veth}")),
        ("forwarding off", "sysctl", "echo 0 > /proc/sys/net/ipv6/conf/all/forwarding".into()),
    ];
    faults.extend(FLUSHES.map(|(name, what, script)| (name, what, script.to_owned())));
    faults.extend(ground.egress_faults());
    ground.mends(&faults, &[to_internet(0, true), to_internet(1, true), to_internet(0, false), by_further]);
    ground.comes_and_goes();
    ground.end();
}

#[test]
fn ways_out_to_ipv6_are_put_back_while_traffic_runs() {
    let mut ground = Ground::new("m5.large", 312, &[("ENABLE_V6_EGRESS", "true")], true);
    ground.others();
    ground.add("one", &[]);
    ground.add("two", &[]);
    ground.settle();
    let listed = ground.listed();
    let way = format!("{} dev veth", ground.pods[0].egress.unwrap());
    let line = listed.lines().find(|line| line.starts_with(&way)).unwrap_or_else(|| panic!("{listed}"));
    assert!(line.ends_with("# a pod's way out in the other family"), "{line}");
    let mut faults = ground.egress_faults();
    faults.extend(FLUSHES.map(|(name, what, script)| (name, what, script.to_owned())));
    ground.mends(&faults, &[to_internet(0, true), to_internet(1, true), to_internet(0, false)]);
    ground.single_links_do_not_keep_ipv6_from_passing();
    ground.comes_and_goes();
    ground.goes_while_it_is_mended();
    ground.end();
}

/// Tables name the primary ENI's link and those of the others, and settings are found by the name.
#[test]
fn links_that_are_renamed_are_followed_while_traffic_runs() {
    let env = [("ENIBOX_KEEP_HOST_SOURCE", "true"), ("WARM_ENI_TARGET", "0"), ("WARM_IP_TARGET", "1")];
    let mut ground = Ground::new("t3.small", 313, &env, false);
    ground.others();
    for number in 0..6 {
        ground.add(&format!("pod-{number}"), &[]);
    }
    ground.settle();
    let eni = ground.script("ip -4 -o route show table 2 default | sed 's/.* dev \\([^ ]*\\) .*/\\1/'");
    let far = ground.world.namespace("internet").unwrap();
    let near: Vec<_> = [0, 5].map(|pod| ground.pods[pod].pod.place.handle().unwrap()).into();
    let at = internet(false);
    let tables = || ground.script("nft list table ip aws-cni");
    for old in [eni.as_str(), "eth0"] {
        assert!(tables().contains(&format!("\"{old}\"")), "{}", tables());
        let before = Picture::of(&ground);
        let ends: Vec<_> = near.iter().map(|near| (old, near, &far, SocketAddr::new(at, 0))).collect();
        let talk = Talk::between(&ends);
        let pings: Vec<_> = near.iter().map(|near| Pings::between(near, &far, to_internet(0, false).1, at)).collect();
        let mut took = [Vec::new(), Vec::new()];
        for (from, to) in [(old, "other9"), ("other9", old)] {
            // Kernels before 6.2 rename no link that is up; its ways by others would be lost then.
            // Changes that follow each other closely are looked at less and less often.
            std::thread::sleep(CALM);
            let begin = clock::instant();
            ground.script(&format!("ip link set {from} name {to}"));
            eventually(Duration::from_secs(20), &format!("{from} is {to}"), || {
                let now = tables();
                let follows = now.contains(&format!("\"{to}\"")) && !now.contains(&format!("\"{from}\""));
                if follows { Ok(()) } else { Err((now, ground.log())) }
            });
            println!("{from} to {to}: {} ms", begin.elapsed().as_millis());
            took[0].push(begin.elapsed());
            // What is found by the new name, and what is not found by any.
            let path = format!("net/ipv4/conf/{to}/{}", if old == "eth0" { "rp_filter" } else { "forwarding" });
            let wrong = if old == "eth0" { ("1", "2") } else { ("0", "1") };
            std::thread::sleep(CALM);
            let begin = clock::instant();
            ground.node.place.net.run(|| sysctl::set(&path, wrong.0)).unwrap().unwrap();
            let flush = if old == "eth0" { "ip rule del pref 1024" } else { "ip route flush table 2" };
            ground.script(flush);
            eventually(Duration::from_secs(20), &path, || {
                let value = ground.node.place.net.run(|| sysctl::read(&path)).unwrap().unwrap();
                let rules = ground.script(if old == "eth0" {
                    "ip rule show pref 1024"
                } else {
                    "ip route show table 2 default"
                });
                if value == wrong.1 && !rules.is_empty() { Ok(()) } else { Err((value, rules, ground.log())) }
            });
            println!("{path}: {} ms", begin.elapsed().as_millis());
            took[1].push(begin.elapsed());
        }
        // The machine may be busy with other things once.
        assert!(took.iter().all(|took| took.iter().any(|took| *took < LIMIT)), "{took:?}\n{}", ground.log());
        let (said, lost) = (talk.finish(), pings.into_iter().map(Pings::finish).collect::<Vec<_>>());
        println!("{old}: sent and lost {lost:?}, tcp pause {:?}", said.longest);
        eventually(Duration::from_secs(20), "all is as before", || {
            let found = before.differences(&Picture::of(&ground));
            if found.is_empty() { Ok(()) } else { Err((found, ground.log())) }
        });
    }
    ground.end();
}

/// The rules that stand before those of all pods, where a pod has a branch ENI in strict mode. Only a virtual machine may have VLAN
/// devices, and its clock may be slow: the figures are for reading, the limit is none of the promise.
#[test]
fn rules_of_branches_are_put_back_while_traffic_runs() {
    if has_vlan() {
        strict(false, 314);
        strict(true, 315);
    }
}

fn strict(v6: bool, seed: u64) {
    let six = if v6 { "true" } else { "false" };
    let env = [("ENABLE_POD_ENI", "true"), ("ENABLE_IPv6", six), ("ENABLE_PREFIX_DELEGATION", six)];
    let mut ground = Ground::new("m5.large", seed, &env, false);
    let kube = ground.kube.clone().expect("an API server");
    let trunk = controller::attach(&ground.world, &kube, &ground.world.nodes[0], &|| Ok(())).unwrap();
    let namespace = ground.node.place.name.clone();
    kube.change(|api| api.add_pod(&namespace, "one", &namespace, &controller::wish()));
    trunk.branch(&namespace, "one").unwrap();
    ground.add("one", &[]);
    assert!(ground.pods[0].branch);
    let ip = if v6 { "ip -6" } else { "ip -4" };
    let device = ground.script("ip -o link show type vlan | sed 's/.*\\(vlan.eth.[0-9]*\\)@.*/\\1/'");
    let veth = host_veth("vlan", &namespace, "one", 0).unwrap();
    let mut faults = vec![
        ("rule 10 from the device", "branch-rule", format!("{ip} rule del pref 10 iif {device}")),
        ("rule 10 from the pod", "branch-rule", format!("{ip} rule del pref 10 iif {veth}")),
        ("rule 0 is back", "local-rule", format!("{ip} rule add pref 0 lookup local")),
        ("rule 20 not moved", "local-rule", format!("{ip} rule add pref 0 lookup local; {ip} rule del pref 20")),
    ];
    if v6 {
        faults.push(("rule 0 of the gateway", "gateway-rule", "ip -6 rule del pref 0".into()));
    }
    let (_, any, at) = to_internet(0, v6);
    let (near, far) = (ground.pods[0].pod.place.handle().unwrap(), ground.world.namespace("internet").unwrap());
    // Until the API server has told of the pod nobody watches over it.
    eventually(Duration::from_mins(2), "the pod is watched over", || {
        let rules = ground
            .script(&format!("{ip} rule del pref 10 iif {veth} 2> /dev/null || :; sleep 1; {ip} rule show pref 10"));
        if rules.contains(&veth) { Ok(()) } else { Err((rules, ground.log())) }
    });
    let before = Picture::of(&ground);
    for (name, what, script) in faults {
        promised(name, || {
            let counted = ground.repairs(what);
            let pings = Pings::between(&near, &far, any, at);
            std::thread::sleep(Duration::from_millis(500));
            let begin = clock::instant();
            ground.script(&script);
            eventually(Duration::from_mins(1), name, || {
                let found = before.differences(&Picture::of(&ground));
                if found.is_empty() { Ok(()) } else { Err((found, ground.log())) }
            });
            let (took, (sent, lost)) = (begin.elapsed(), pings.finish());
            println!("{ip}: {name}: {} ms, {sent} sent, {lost} lost", took.as_millis());
            ground.counts_beyond(name, what, counted);
            assert!(lost < sent, "{name}: nothing came through");
            // Both rules from the pod are at 10; the others leave its packets their way.
            (took, unexplained(what != "branch-rule", lost, 1, took))
        });
    }
    ground.end();
}
