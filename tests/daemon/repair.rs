//! What others flush or alter of the host's network is put back while traffic runs: how soon, and at what cost.

use crate::settings::fetch;
use crate::stage::{Stage, Subject, eventually};
use crate::support::{find_program, tool};
use crate::talk::Talk;
use enibox::apply::Host;
use enibox::clock;
use enibox::model::naming::host_veth;
use enibox::model::net::{Family, Rule};
use enibox::model::nft::Table;
use enibox::netlink::netns::Namespace;
use enibox::netlink::{KernelError, rule, sysctl};
use enibox::plan::ruleset;
use enibox::sandbox::world::HOSTS;
use enibox::sys;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// The promise.
const PROMISE: Duration = Duration::from_secs(1);
/// What no repair of a debug build on a busy machine may take.
pub const LIMIT: Duration = if cfg!(debug_assertions) { Duration::from_secs(4) } else { PROMISE };
/// A machine that is busy with other things may keep the daemon from a processor so often.
const ATTEMPTS: usize = 3;
const SERVICE: &str = "198.18.0.0/15";
const FOREIGN: [&str; 4] = [
    "rule add pref 100 from 203.0.113.7 lookup 100",
    "rule add pref 512 fwmark 0x1/0x1 lookup 100",
    "rule add pref 32764 from 203.0.113.7 lookup 150",
    "route add 203.0.113.64/26 dev lo table 100",
];

/// Breaks something and sees it mended: `attempt` says how long that took and how many packets more than allowed were lost. In one
/// of a few attempts both are as promised.
pub fn promised(name: &str, mut attempt: impl FnMut() -> (Duration, u64)) {
    let kept = |outcome: &(Duration, u64)| outcome.0 < PROMISE && outcome.1 == 0;
    let mut outcomes = Vec::new();
    while !outcomes.last().is_some_and(kept) {
        assert!(outcomes.len() < ATTEMPTS, "{name}: time, and packets lost beyond what is allowed: {outcomes:?}");
        outcomes.push(attempt());
        assert!(outcomes.iter().all(|(took, _)| *took < LIMIT), "{name}: {outcomes:?}");
    }
}

/// Breaks much and sees it mended: in one of a few attempts it takes no longer than [`LIMIT`].
fn in_limit(name: &str, mut attempt: impl FnMut() -> Duration) {
    let mut all = Vec::new();
    while all.last().is_none_or(|took: &Duration| *took >= LIMIT) {
        assert!(all.len() < ATTEMPTS, "{name}: {all:?}");
        all.push(attempt());
    }
}

/// Of these many lost packets of `flows`, those that neither the fault nor its repair explains: nothing may be lost of a flow that
/// `quiet` faults do not touch, and of others no longer than the repair took.
pub fn unexplained(quiet: bool, lost: u64, flows: usize, took: Duration) -> u64 {
    let gap = if quiet { 0 } else { (took + PATIENCE).as_millis().div_ceil(PAUSE.as_millis()) };
    lost.saturating_sub(u64::try_from(gap).unwrap() * flows as u64)
}

/// Between two packets of a flow, at least.
const PAUSE: Duration = Duration::from_millis(4);
/// Until a packet that went its way just when the repair was complete is back.
const PATIENCE: Duration = Duration::from_millis(50);

/// Packets of one UDP flow from a pod that is asked back, one every five milliseconds.
pub struct Pings {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u64, u64)>,
}

impl Pings {
    fn start(stage: &Stage, subject: &Subject, host: &str) -> Pings {
        let host = HOSTS.iter().find(|there| there.name == host).unwrap();
        let (far, near) = (stage.world.namespace(host.name).unwrap(), subject.pod.place.handle().unwrap());
        Pings::between(&near, &far, Ipv4Addr::UNSPECIFIED.into(), host.address.into())
    }

    /// From an address in a namespace, or any, to a server's in another.
    pub fn between(near: &Namespace, far: &Namespace, source: IpAddr, at: IpAddr) -> Pings {
        let server = far.run(|| UdpSocket::bind((at, 0))).unwrap().unwrap();
        let client = near.run(|| UdpSocket::bind((source, 0))).unwrap().unwrap();
        let target: SocketAddr = server.local_addr().unwrap();
        server.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let ended = Arc::new(AtomicBool::new(false));
        let echo = std::thread::spawn({
            let ended = Arc::clone(&ended);
            move || {
                let mut buffer = [0; 8];
                while !ended.load(Ordering::Relaxed) {
                    if let Ok((length, from)) = server.recv_from(&mut buffer) {
                        _ = server.send_to(&buffer[..length], from); // the way back may be what is broken
                    }
                }
            }
        });
        let thread = std::thread::spawn(move || {
            let (mut sent, mut heard, mut buffer) = (0u64, 0, [0; 8]);
            while !asked.load(Ordering::Relaxed) {
                // Without a route the kernel refuses to send, which is a loss too.
                _ = client.send_to(&sent.to_ne_bytes(), target);
                sent += 1;
                std::thread::sleep(PAUSE);
                while client.recv(&mut buffer).is_ok() {
                    heard += 1;
                }
            }
            // What a busy machine still has on its way.
            let begin = clock::instant();
            while heard < sent && begin.elapsed() < Duration::from_millis(300) {
                heard += u64::from(client.recv(&mut buffer).is_ok());
            }
            ended.store(true, Ordering::Relaxed);
            echo.join().unwrap();
            (sent, sent - heard)
        });
        Pings { stop, thread }
    }

    /// How many were sent, and lost.
    pub fn finish(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// What the node's network is, as far as a repair has to restore it.
#[derive(Debug, PartialEq)]
struct Picture {
    lines: BTreeSet<String>,
    tables: Vec<Table>,
}

fn picture(stage: &Stage) -> Picture {
    let look = || Host::open()?.observe();
    let seen = stage.node.place.net.run(look).unwrap().unwrap();
    let v4 = |address: IpAddr| address.is_ipv4();
    let rules = seen.rules.iter().filter(|rule| rule.family == Family::V4).map(|rule| format!("rule {rule:?}"));
    let routes = seen
        .routes
        .iter()
        .filter(|route| v4(route.dst.addr()) && route.table != FORMER)
        .map(|route| format!("route {route:?}"));
    let barriers = seen.barriers.iter().filter(|barrier| v4(barrier.dst.addr())).map(|barrier| format!("{barrier:?}"));
    let addresses = seen.addresses.iter().filter(|address| v4(address.addr.addr()));
    let fixed =
        seen.neighbours.iter().filter(|entry| entry.permanent && v4(entry.addr)).map(|entry| format!("{entry:?}"));
    let links = seen
        .links
        .iter()
        .map(|link| format!("link {} {:?} {} {} {:?}", link.name, link.mac, link.mtu, link.up, link.forwards));
    let addresses = addresses.map(|address| format!("address {address:?}"));
    let lines = rules.chain(routes).chain(barriers).chain(addresses).chain(links).chain(fixed);
    let mut lines: BTreeSet<String> = lines.collect();
    let path = "net/ipv4/conf/eth0/rp_filter";
    lines.insert(format!("{path} {}", stage.node.place.net.run(|| sysctl::read(path)).unwrap().unwrap()));
    Picture { lines, tables: seen.tables }
}

impl Picture {
    fn differences(&self, now: &Picture) -> Vec<String> {
        let lines = self.lines.symmetric_difference(&now.lines).cloned();
        lines.chain(ruleset::differences(&self.tables, &now.tables)).collect()
    }
}

fn metrics(stage: &Stage) -> String {
    stage.node.place.net.run(|| fetch("127.0.0.1:61678", "/metrics")).unwrap()
}

fn counters(stage: &Stage, name: &str) -> BTreeMap<String, u64> {
    counters_of(&metrics(stage), name)
}

fn counters_of(page: &str, name: &str) -> BTreeMap<String, u64> {
    let lines = page.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('{'));
    let parse = |line: &str| {
        let (labels, value) = line.rsplit_once("} ").unwrap();
        (labels.split('"').nth(1).unwrap().to_owned(), value.parse().unwrap())
    };
    lines.map(parse).collect()
}

fn counter(stage: &Stage, name: &str, label: &str) -> u64 {
    counters(stage, name).get(label).copied().unwrap_or(0)
}

fn commits_are_counted(stage: &Stage) {
    eventually(Duration::from_secs(5), "the start and each repair have committed rules", || {
        let page = metrics(stage);
        let (commits, repairs) = ("awscni_connmark_reconcile_total", "awscni_repairs_total");
        let (commits, repairs) = (counters_of(&page, commits), counters_of(&page, repairs));
        if commits["success"] == repairs["ruleset"] + 1 { Ok(()) } else { Err((commits, repairs)) }
    });
}

fn repairs(stage: &Stage, what: &str) -> u64 {
    counter(stage, "awscni_repairs_total", what)
}

fn looks(stage: &Stage) -> u64 {
    counter(stage, "enibox_host_looks_total", "notice")
}

/// Commands in the node, `ip` where nothing else is named; one that is a `maybe` may fail.
fn meddle(stage: &Stage, commands: &[String]) {
    let run = || {
        for command in commands {
            let words: Vec<&str> = command.split(' ').collect();
            match words[..] {
                ["nft", ref rest @ ..] => drop(tool("nft", rest)),
                ["sysctl", path, value] => drop(sysctl::set(path, value)?),
                ["maybe", ref rest @ ..] => drop(Command::new(find_program("ip").unwrap()).args(rest).output()?),
                _ => drop(tool("ip", &words)),
            }
        }
        Ok::<_, enibox::error::Error>(())
    };
    stage.node.place.net.run(run).unwrap().unwrap();
}

/// A table as kube-proxy has one in all its modes. As long as anybody has a chain for translation, the kernel goes on translating the
/// packets of established connections; and as long as anybody has a rule that looks at connections, it knows them (a chain alone
/// asks for none: only expressions call `nf_ct_netns_get`). A node whose last such rule goes with our table forgets them as
/// soon as the kernel has cleaned up, which on a busy machine is before the repair: a pod's packets leave as they are then, answers
/// stay at the node, and both are refused with a reset by whom they reach.
fn others(stage: &Stage) {
    let chain = "nft add chain ip others nat { type nat hook postrouting priority 200 ; }";
    let rule = "nft add rule ip others nat ct state new mark and 0x4000 == 0x4000 counter masquerade";
    meddle(stage, &["nft add table ip others".into(), chain.into(), rule.into()]);
}

/// A node with six pods on two ENIs and foreign entries, whose pods are watched over.
fn watched(seed: u64) -> (Stage, Vec<Subject>) {
    let env = [("AWS_EXTERNAL_SERVICE_CIDRS", SERVICE), ("WARM_ENI_TARGET", "0"), ("WARM_IP_TARGET", "1")];
    let stage = Stage::ready("t3.small", seed, &env);
    let pods: Vec<Subject> = (0..6).map(|number| stage.add(&format!("pod-{number}"))).collect();
    meddle(&stage, &FOREIGN.map(str::to_owned));
    others(&stage);
    for subject in &pods {
        let rule = Rule::to(IpNet::from(IpAddr::V4(subject.address())), 512, 254);
        let delete = || stage.node.place.socket().unwrap().run(&[rule::delete(&rule)]);
        let there = || rule::list(&mut stage.node.place.socket().unwrap(), Family::V4).unwrap().contains(&rule);
        delete().unwrap();
        // Until its ADD is long over, nobody knows that the rule is not just about to be made.
        eventually(Duration::from_secs(50), &format!("{} is watched over", subject.name), || {
            if there() { Ok(()) } else { Err(stage.log()) }
        });
    }
    (stage, pods)
}

/// The fault under its name, what it is counted as, and how it is made.
fn faults(pods: &[Subject], eni: &str, own: &str) -> Vec<(&'static str, &'static str, Vec<String>)> {
    let pod = pods.last().unwrap(); // on the second ENI
    let veth = |pod: &Subject| host_veth("eni", "tests", &pod.name, 0).unwrap();
    // The same thing again and again would be a quarrel.
    let (other, other_veth) = (pods[4].address(), veth(&pods[4]));
    let (address, veth) = (pod.address(), veth(pod));
    let one = |text: String| vec![text];
    let first = pods[0].address(); // on the primary ENI, without a rule for its way out
    // What is others' they put back themselves, and nobody needs the kernel's rule for a table that is empty.
    let others = FOREIGN.iter().filter(|command| command.starts_with("rule ")).copied();
    let others = others.chain(["rule add pref 32767 lookup default"]).map(str::to_owned);
    let flush = ["rule flush".to_owned()].into_iter().chain(others).collect();
    vec![
        ("rule 512 deleted", "to-pod-rule", one(format!("rule del pref 512 to {address}"))),
        ("rule 1536 deleted", "from-pod-rule", one(format!("rule del pref 1536 from {address}"))),
        ("rule 1536 to another table", "from-pod-rule", one(format!("rule add pref 1536 from {address} lookup 77"))),
        ("former owner's rule, primary", "from-pod-rule", one(format!("rule add pref 32764 from {first} lookup 2"))),
        ("former owner's rule", "from-pod-rule", of_former(address, eni)),
        ("rule 0 of the local table deleted", "local-rule", one("rule del pref 0".into())),
        ("rule 32766 of main deleted", "main-rule", one("rule del pref 32766".into())),
        ("all rules flushed", "main-rule", flush),
        ("rule 1024 deleted", "mark-rule", one("rule del pref 1024".into())),
        ("rule 1024 of another mark", "mark-rule", one("rule add pref 1024 fwmark 0x40/0x40 lookup main".into())),
        ("rule 1535 deleted", "service-rule", one(format!("rule del pref 1535 to {SERVICE}"))),
        ("rule 32765 deleted", "eni-rule", one(format!("rule del pref 32765 from {own}"))),
        ("table of the ENI flushed", "eni-route", one("route flush table 2".into())),
        ("default route elsewhere", "eni-route", one("route replace default dev eth0 table 2".into())),
        ("pod's route deleted", "pod-route", one(format!("route del {address}"))),
        ("pod's route elsewhere", "pod-route", one(format!("route replace {address} dev eth0 scope link"))),
        (
            "pod's route by two ways",
            "pod-route",
            one(format!("route replace {address} nexthop dev eth0 nexthop dev {eni}")),
        ),
        ("another's route a blackhole", "pod-route", one(format!("route replace blackhole {other}"))),
        ("blackhole before its route", "pod-route", one(format!("route prepend blackhole {other}"))),
        ("forwarding of its veth", "link-forwarding", one(format!("sysctl net/ipv4/conf/{other_veth}/forwarding 0"))),
        ("forwarding of the ENI", "link-forwarding", one(format!("sysctl net/ipv4/conf/{eni}/forwarding 0"))),
        ("MTU of the primary", "primary-mtu", one("link set eth0 mtu 1500".into())),
        ("MTU of the ENI", "eni-mtu", one(format!("link set {eni} mtu 1500"))),
        ("ENI down", "eni-link", one(format!("link set {eni} down"))),
        ("ENI down and up", "eni-route", vec![format!("link set {eni} down"), format!("link set {eni} up")]),
        ("ENI's address flushed", "eni-address", one(format!("addr flush dev {eni}"))),
        ("address added to the ENI", "eni-address", one(format!("addr add 192.0.2.9/24 dev {eni}"))),
        ("veth's MAC rewritten", "pod-mac", one(format!("link set {veth} address 02:00:00:00:00:99"))),
        ("veth's MTU", "pod-mtu", one(format!("link set {veth} mtu 1400"))),
        ("veth renamed", "veth-name", one(format!("link set {veth} name odd0"))),
        (
            "veth renamed while down",
            "veth-name",
            // Unless the daemon was faster, which gives it its name and sets it up.
            vec![
                format!("link set {veth} down"),
                format!("link set {veth} name odd0"),
                "maybe link set odd0 up".into(),
            ],
        ),
        (
            "pod's neighbour elsewhere",
            "host-neighbour",
            one(format!("neigh replace {address} lladdr 02:00:00:00:00:96 dev {veth} nud permanent")),
        ),
        ("veth down", "pod-link", one(format!("link set {veth} down"))),
        ("nft rules flushed", "ruleset", one("nft flush chain ip aws-cni snat-mark".into())),
        ("nft rule added", "ruleset", one("nft insert rule ip aws-cni nat-prerouting accept".into())),
        ("nft table deleted", "ruleset", one("nft delete table ip aws-cni".into())),
        ("rp_filter", "sysctl", one("sysctl net/ipv4/conf/eth0/rp_filter 1".into())),
    ]
}

/// A table of the number that `amazon-ec2-net-utils` gives an ENI's. No repair has to restore what stands in it.
const FORMER: u32 = 10_002;

/// What `amazon-ec2-net-utils` makes for an address of that ENI.
fn of_former(address: Ipv4Addr, eni: &str) -> Vec<String> {
    let route = format!("route replace default dev {eni} table {FORMER}");
    vec![route, format!("rule add pref 10001 from {address} lookup {FORMER}")]
}

/// Faults that do not touch the flows that are watched.
const QUIET: [&str; 12] = [
    "rule 1536 to another table",
    "former owner's rule, primary",
    "former owner's rule",
    "rule 0 of the local table deleted",
    "rule 1024 of another mark",
    "rule 1535 deleted",
    "rule 32765 deleted",
    "forwarding of its veth",
    "MTU of the primary",
    "MTU of the ENI",
    "address added to the ENI",
    "veth's MTU",
];

#[test]
fn what_others_alter_is_put_back_while_traffic_runs() {
    let (stage, pods) = watched(301);
    let enis = stage.node.place.links().unwrap();
    let eni = enis.iter().find(|link| link.name.starts_with("eth") && link.name != "eth0").expect("a second ENI");
    let before = picture(&stage);
    let own = before.lines.iter().find_map(|line| {
        let (_, rest) = line.split_once("address Address { dev: ")?;
        let (dev, rest) = rest.split_once(", addr: ")?;
        (dev == eni.index.to_string()).then(|| rest.split('/').next().unwrap().to_owned())
    });
    // Everything at once, as a service that thinks that all rules and routes are its own.
    let mut all: Vec<String> = ["1024", "1535", "32765"].map(|pref| format!("rule del pref {pref}")).into();
    for subject in &pods {
        all.push(format!("rule del pref 512 to {}", subject.address()));
        all.push(format!("route del {}", subject.address()));
    }
    all.extend(["route flush table 2".into(), "nft flush ruleset".into()]);
    in_limit("everything at once", || {
        let begin = clock::instant();
        meddle(&stage, &all);
        others(&stage);
        eventually(Duration::from_secs(20), "all is put back", || {
            let found = before.differences(&picture(&stage));
            if found.is_empty() { Ok(()) } else { Err((found, stage.log())) }
        });
        println!("everything at once: {} ms", begin.elapsed().as_millis());
        begin.elapsed()
    });
    println!("{:<34}{:>10}{:>10}{:>10}{:>14}", "fault", "ms", "sent", "lost", "tcp pause ms");
    for (name, what, commands) in faults(&pods, &eni.name, &own.expect("the ENI has an address")) {
        promised(name, || {
            let counted = repairs(&stage, what);
            let talk = Talk::start(&stage, &pods[4..]);
            let pings = [Pings::start(&stage, &pods[5], "vpc-host"), Pings::start(&stage, &pods[5], "internet")];
            std::thread::sleep(Duration::from_millis(200));
            let begin = clock::instant();
            meddle(&stage, &commands);
            eventually(Duration::from_secs(20), name, || {
                let found = before.differences(&picture(&stage));
                if found.is_empty() { Ok(()) } else { Err((found, stage.log())) }
            });
            let took = begin.elapsed();
            let said = talk.finish();
            let lost = pings.map(Pings::finish);
            let (sent, lost) = (lost[0].0 + lost[1].0, lost[0].1 + lost[1].1);
            println!("{name:<34}{:>10}{sent:>10}{lost:>10}{:>14}", took.as_millis(), said.longest.as_millis());
            // A repair is counted at the end of the round that made it.
            eventually(Duration::from_secs(5), &format!("{name}: {what} is counted"), || {
                let now = repairs(&stage, what);
                if now > counted { Ok(()) } else { Err(counters(&stage, "awscni_repairs_total")) }
            });
            (took, unexplained(QUIET.contains(&name), lost, 2, took))
        });
    }
    connections_outlive_a_late_repair(&stage, &pods);
    commits_are_counted(&stage);
    stage.probe_all(&pods);
    let status = stage.node.place.net.run(|| fetch("127.0.0.1:61679", "/v1/enibox/status")).unwrap();
    assert!(status.contains("\"repairs\":[{") && status.contains("\"what\":\"ruleset\""), "{status}");
    assert!(stage.log().contains("repair mark-rule: add rule 1024"), "{}", stage.log());
    let listed = stage.node.place.net.run(|| tool("nft", &["list", "tables"])).unwrap();
    assert!(listed.is_none_or(|listed| listed.contains("table ip others")));
    for pod in pods {
        stage.delete(pod);
    }
    stage.stop();
}

/// Our table is away for longer than the kernel takes to clean up behind it, as on a machine that is busy.
fn connections_outlive_a_late_repair(stage: &Stage, pods: &[Subject]) {
    let before = picture(stage);
    let talk = Talk::start(stage, &pods[4..]);
    sys::signal(stage.pid(), libc::SIGSTOP).unwrap();
    meddle(stage, &["nft delete table ip aws-cni".into()]);
    std::thread::sleep(Duration::from_secs(1));
    sys::signal(stage.pid(), libc::SIGCONT).unwrap();
    eventually(Duration::from_secs(20), "the table is back", || {
        let found = before.differences(&picture(stage));
        if found.is_empty() { Ok(()) } else { Err((found, stage.log())) }
    });
    let said = talk.finish();
    println!("a second without our table: {} connections, tcp pause {:?}", said.connections, said.longest);
}

/// Nobody can be asked anything from such a node, and IMDS has told nothing yet.
#[test]
fn a_daemon_that_starts_on_a_node_without_rules_finds_its_way() {
    let stage = Stage::ready("t3.small", 308, &[]);
    let pod = stage.add("pod");
    stage.kill();
    meddle(&stage, &["rule flush".into()]);
    stage.node.command("rm").unwrap().arg("/var/run/aws-node/imds.json").status().unwrap();
    stage.start();
    println!("ready after {:?}", stage.wait_ready());
    assert!(stage.log().contains("repair main-rule: add rule 32766: from all lookup main"), "{}", stage.log());
    stage.probe(&pod);
    stage.delete(pod);
    stage.stop();
}

#[test]
fn a_storm_costs_little_and_a_quarrel_is_given_up() {
    let (stage, mut pods) = watched(302);
    let foreign = Rule::from("203.0.113.0/24".parse().unwrap(), 700, 100);
    let storm = |rule: &Rule| {
        let mut socket = stage.node.place.socket().unwrap();
        let begin = clock::instant();
        for _ in 0..50 {
            let pair = [rule::add(rule), rule::delete(rule)];
            let many: Vec<_> = std::iter::repeat_n(pair, 100).flatten().collect();
            for outcome in socket.batch(&many).unwrap() {
                // The daemon may have been faster with one of ours.
                assert!(outcome.as_ref().is_err_and(KernelError::not_found) || outcome.is_ok(), "{outcome:?}");
            }
        }
        begin.elapsed()
    };
    // Plugins at work, while nothing of older pods is touched.
    let before = looks(&stage);
    let more: Vec<Subject> = (0..3).map(|number| stage.add(&format!("more-{number}"))).collect();
    for pod in more {
        stage.delete(pod);
    }
    stage.delete(pods.remove(0));
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(looks(&stage), before, "an ADD or a DEL has made the daemon look");

    let took = storm(&foreign);
    std::thread::sleep(Duration::from_millis(1500));
    let few = looks(&stage) - before;
    println!("10000 changes of a foreign rule in {took:?}: {few} looks");
    assert!(u128::from(few) <= 3 + took.as_millis() / 100, "{few} looks in {took:?}"); // an overrun is a reason

    let before = looks(&stage);
    let took = storm(&Rule { fwmark: Some((0x40, 0x40)), ..Rule::any(Family::V4, 1024, 254) });
    std::thread::sleep(Duration::from_millis(2500));
    let looked = looks(&stage) - before;
    println!("10000 changes of a rule that might be ours in {took:?}: {looked} looks");
    assert!(looked >= 1 && looked <= 12 + took.as_secs() * 10, "{looked} looks in {took:?}");

    // Somebody who will not have our rule.
    let marked = Rule { fwmark: Some((0x80, 0x80)), ..Rule::any(Family::V4, 1024, 254) };
    let there = || rule::list(&mut stage.node.place.socket().unwrap(), Family::V4).unwrap().contains(&marked);
    let begin = clock::instant();
    let mut undone = 0;
    while counter(&stage, "enibox_repairs_held_total", "mark-rule") == 0 {
        assert!(begin.elapsed() < Duration::from_mins(1), "undone {undone} times\n{}", stage.log());
        if there() {
            stage.node.place.socket().unwrap().run(&[rule::delete(&marked)]).unwrap();
            undone += 1;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("given way after {undone} times in {:?}", begin.elapsed());
    assert!((5..=8).contains(&undone), "{undone}");
    assert_eq!(stage.log().matches("undone again and again").count(), 1, "{}", stage.log());
    // Other things are put back as before.
    meddle(&stage, &[format!("rule del pref 1535 to {SERVICE}")]);
    let service = Rule::to(SERVICE.parse().unwrap(), 1535, 254);
    eventually(LIMIT, "another rule is put back", || {
        let rules = rule::list(&mut stage.node.place.socket().unwrap(), Family::V4).unwrap();
        if rules.contains(&service) { Ok(()) } else { Err(stage.log()) }
    });
    // And this one after a while.
    eventually(Duration::from_secs(20), "the rule is back", || if there() { Ok(()) } else { Err(stage.log()) });
    stage.probe_all(&pods);
    for pod in pods {
        stage.delete(pod);
    }
    stage.stop();
}

#[test]
fn a_mac_that_is_rewritten_right_after_the_add_is_put_back_at_once() {
    let (stage, _pods) = watched(307);
    for number in 0..3 {
        let young = stage.add(&format!("young-{number}"));
        let veth = host_veth("eni", "tests", &young.name, 0).unwrap();
        let mac = || stage.node.place.links().unwrap().into_iter().find(|link| link.name == veth).unwrap().mac.unwrap();
        let right = mac();
        let begin = clock::instant();
        meddle(&stage, &[format!("link set {veth} address 02:00:00:00:00:9{number}")]);
        eventually(LIMIT, "the MAC is put back before the pod's first regular look", || {
            if mac() == right { Ok(()) } else { Err(stage.log()) }
        });
        println!("MAC of a young pod's veth back after {:?}", begin.elapsed());
    }
}
