//! Up, down, up: a node that the original runs is taken over with its pods, served, handed back, and taken again, while TCP
//! connections of all pods talk on. The original is played by its own tools and formats, never by our code: what it writes
//! is written from its descriptions, and what we leave is read by a reader that knows nothing of ours.

#![cfg(feature = "sandbox")]

mod lines;
mod original;
mod reader;
mod stage;
#[path = "../support/mod.rs"]
mod support;

use enibox::clock;
use lines::{End, Lines};
use reader::Entry;
use stage::{CHECKPOINT, Family, Living, NAMESPACE, Stage, V4, V4_LEGACY, V6, container, host_veth};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);

/// The tools of the original, or a line that says what is missing.
fn can_play(family: &Family) -> bool {
    let programs = ["ip", "nft", "iptables-legacy-save", family.nat, family.tables, "sha1sum", "sha512sum"];
    let missing = programs.iter().find(|program| support::find_program(program).is_none());
    let missing = missing.copied().or((!Path::new(original::HOST_LOCAL).exists()).then_some(original::HOST_LOCAL));
    if let Some(missing) = missing {
        support::python::skip(&format!("{missing} is not installed, the original is not played"));
    }
    missing.is_none()
}

/// New connections of a pod: to hosts near and far, from a host, to and from another pod, and out in the other family. Each
/// is seen as who it is.
#[track_caller]
fn connect(stage: &Stage, lines: &Lines, pod: &Living, other: &Living) {
    let (net, other_net) = (pod.pod.place.handle().unwrap(), other.pod.place.handle().unwrap());
    let me = End { name: &pod.name, net: &net };
    let (near, near_net) = stage.host("vpc-host");
    let near_end = End { name: near.name, net: &near_net };
    let near = near.at(stage.family.v6);
    lines.open(&me, &near_end, near, pod.address);
    lines.open(&near_end, &me, pod.address, near);
    let (far, far_net) = stage.host("internet");
    let far_end = End { name: far.name, net: &far_net };
    let seen = if stage.family.v6 { pod.address } else { stage.own(true) };
    lines.open(&me, &far_end, far.at(stage.family.v6), seen);
    lines.open(&me, &far_end, far.at(!stage.family.v6), stage.own(false));
    lines.open(&me, &End { name: &other.name, net: &other_net }, other.address, pod.address);
}

fn connect_all(stage: &Stage, lines: &Lines, pods: &[Living]) {
    for (number, pod) in pods.iter().enumerate() {
        connect(stage, lines, pod, &pods[(number + 1) % pods.len()]);
    }
}

/// The words by which a pod is known on the node.
fn words(pod: &Living) -> Vec<String> {
    vec![pod.address.to_string(), pod.egress.to_string(), host_veth(&pod.name), pod.container.clone()]
}

#[track_caller]
fn assert_gone(stage: &Stage, words: &[String]) {
    let begin = clock::instant(); // the kernel takes links away in its own time
    while !stage.traces(words).is_empty() && begin.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("the last trace was gone after {:?}", begin.elapsed());
    assert_eq!(stage.traces(words), Vec::<String>::new(), "{words:?}");
    let mut files = stage.host_local_files();
    files.remove("last_reserved_ip.0"); // it names an address that may have been given back
    assert!(files.values().all(|content| !words.iter().any(|word| content.contains(word))), "{files:?}");
}

/// The checkpoint has these pods and the entry of nobody, `host-local`'s files have the pods.
#[track_caller]
fn assert_known(stage: &Stage, living: &[Living], nobody: &Entry) {
    let mut entries = reader::checkpoint(&stage.read(CHECKPOINT), stage.family.v6);
    assert_eq!(entries.remove(&nobody.container).as_ref(), Some(nobody), "what has no name is kept");
    let known: BTreeMap<_, _> = entries.values().map(|entry| (entry.container.clone(), entry.address)).collect();
    let wanted: BTreeMap<_, _> = living.iter().map(|pod| (pod.container.clone(), pod.address)).collect();
    assert_eq!(known, wanted);
    for pod in living {
        let entry = &entries[&pod.container];
        assert_eq!((entry.namespace.as_str(), entry.name.as_str()), (NAMESPACE, pod.name.as_str()));
    }
    let wanted: BTreeMap<_, _> = living.iter().map(|pod| (pod.container.clone(), pod.egress)).collect();
    assert_eq!(reader::host_local(stage), wanted);
}

/// Addresses that somebody has.
fn taken(living: &[Living], nobody: &Entry) -> BTreeSet<IpAddr> {
    living.iter().map(|pod| pod.address).chain([nobody.address]).collect()
}

/// ADDs through our plugins have addresses that nobody has.
#[track_caller]
fn add_ours(stage: &Stage, living: &mut Vec<Living>, names: &[&str], nobody: &Entry) {
    for name in names {
        let pod = stage.add(name);
        assert!(!taken(living, nobody).contains(&pod.address), "{} has another's {}", pod.name, pod.address);
        assert!(living.iter().all(|other| other.egress != pod.egress), "{} has another's {}", pod.name, pod.egress);
        living.push(pod);
    }
}

fn has_rules_of_the_original(stage: &Stage) -> bool {
    let filter = stage.shell(if stage.is_legacy() {
        "iptables-legacy-save; ip6tables-legacy-save"
    } else {
        "nft --stateless list ruleset"
    });
    ["CNI-E", "AWS", "Block Node Local"].iter().any(|part| filter.contains(part))
}

/// Rules in tables of `iptables-legacy` stay, and are told with commands that take them away: of the node by the daemon, of a
/// pod by its DEL. Runs those that this log has from here on.
fn follow_the_advice(stage: &Stage, log: impl Fn(&Stage) -> String, seen: usize) -> usize {
    let end = clock::instant() + LIMIT;
    loop {
        let told = log(stage);
        let lines = told.get(seen..).unwrap_or_default().lines();
        let texts = lines.filter_map(|line| {
            serde_json::from_str::<serde_json::Value>(line).ok()?["msg"].as_str().map(str::to_owned)
        });
        let advice: Vec<String> = texts.filter(|text| text.contains("are in iptables-legacy")).collect();
        if !advice.is_empty() {
            for text in advice {
                stage.shell(&text.lines().skip(1).collect::<Vec<_>>().join("\n"));
            }
            return told.len();
        }
        assert!(clock::instant() < end, "no advice: {told}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Of the original's chains in tables of `iptables-legacy`, the names.
fn legacy_chains(stage: &Stage) -> BTreeSet<String> {
    let saved = stage.shell("iptables-legacy-save; ip6tables-legacy-save");
    let chains = saved.lines().filter_map(|line| line.strip_prefix(':')?.split_whitespace().next());
    chains.filter(|name| name.starts_with("AWS-") || name.starts_with("CNI-E")).map(str::to_owned).collect()
}

/// A pod that ended while no daemon ran: its entry and its rules are all that is left.
fn dead(stage: &Stage, taken: &mut BTreeSet<IpAddr>) -> Entry {
    let (address, ip) = (original::reserve(stage, 0, taken), stage.family.ip[0]);
    stage.shell(&format!(
        "{ip} rule add to {address} lookup main priority 512\n{ip} rule add from {address} lookup 2 priority 1536"
    ));
    let (namespace, name) = (NAMESPACE.to_owned(), "dead".to_owned());
    Entry { container: container(), address, timestamp: 1_785_571_200_000_000_000, namespace, name }
}

/// What the original has left of rules goes, or is told and goes by the operator's hand, but for the chains of these pods.
fn without_the_originals_rules(stage: &Stage, lines: &Lines, pods: usize) {
    if !stage.is_legacy() {
        assert!(!has_rules_of_the_original(stage));
        return;
    }
    assert!(legacy_chains(stage).contains("AWS-SNAT-CHAIN-0"), "nobody can take them away safely but an operator");
    lines.unbroken("beside the original's rules");
    follow_the_advice(stage, Stage::log, 0);
    let left = legacy_chains(stage);
    assert!(left.len() == pods && left.iter().all(|name| name.starts_with("CNI-E6-")), "{left:?}");
}

fn up_down_up(family: &'static Family, seed: u64) {
    if !can_play(family) {
        return;
    }
    let mut stage = Stage::new(family, seed);
    original::attach(&stage);
    original::filter(&stage);
    let mut given = BTreeSet::new();
    let second = u32::from(!family.v6);
    let devices = [("web-0", 0), ("web-1", 0), ("old-0", 0), ("db-0", second), ("db-1", second), ("old-1", second)];
    let mut living: Vec<_> =
        devices.iter().map(|(name, device)| original::add(&stage, name, *device, &mut given)).collect();
    let dead = dead(&stage, &mut given);
    let address = original::reserve(&stage, 0, &mut given);
    let (namespace, name) = (String::new(), String::new());
    let nobody = Entry { container: container(), address, timestamp: 1_785_571_200_000_000_001, namespace, name };
    let entries: Vec<_> = living.iter().enumerate().map(|(number, pod)| original::entry(pod, number)).collect();
    original::save(&stage, entries.iter().chain([&dead, &nobody]));
    let lines = Lines::start();
    connect_all(&stage, &lines, &living);
    lines.unbroken("the original's node");

    assert!(has_rules_of_the_original(&stage));
    stage.up();
    without_the_originals_rules(&stage, &lines, living.len());
    assert_known(&stage, &living, &nobody);
    assert_gone(&stage, &[dead.address.to_string()]);
    lines.unbroken("taken over");
    add_ours(&stage, &mut living, &["new-0", "new-1", "new-2"], &nobody);
    connect_all(&stage, &lines, &living);
    for name in ["old-0", "old-1"] {
        let old = living.remove(living.iter().position(|pod| pod.name == name).unwrap());
        lines.hang_up(name);
        let words = words(&old);
        let (chains, told) = (legacy_chains(&stage).len(), stage.plugin_log().len());
        stage.delete(old);
        assert_gone(&stage, &words);
        if stage.is_legacy() {
            follow_the_advice(&stage, Stage::plugin_log, told);
            assert_eq!(legacy_chains(&stage).len(), chains - 1);
        }
    }
    assert_known(&stage, &living, &nobody);
    lines.unbroken("served");

    hand_back(&mut stage, &lines, &mut living, &nobody);

    stage.up();
    assert_known(&stage, &living, &nobody);
    lines.unbroken("taken over again");
    add_ours(&stage, &mut living, &["last-0", "last-1"], &nobody);
    connect_all(&stage, &lines, &living);
    lines.unbroken("served again");
    drop(lines);
    let words: Vec<String> = living.iter().flat_map(words).collect();
    living.drain(..).for_each(|pod| stage.delete(pod));
    assert_gone(&stage, &words);
    assert_known(&stage, &living, &nobody);
    assert!(stage.links().iter().all(|link| link.starts_with("eth") || link == "lo"), "{:?}", stage.links());
    stage.down();
    assert!(stage.clean_up().starts_with("delete table "));
    assert!(!stage.shell("nft list tables").contains("aws-cni"));
    assert_eq!(stage.world.cloud.complaints(), Vec::<String>::new());
}

/// We end, and the original runs: it knows every pod, adds one of its own, and deletes one of its old ones and one of ours.
fn hand_back(stage: &mut Stage, lines: &Lines, living: &mut Vec<Living>, nobody: &Entry) {
    stage.down();
    lines.unbroken("without a daemon");
    assert_known(stage, living, nobody);
    let mut restored = original::start(stage);
    let known: BTreeSet<_> = restored.values().map(|(entry, _)| entry.address).collect();
    assert_eq!(known, taken(living, nobody), "the original finds every pod");
    lines.unbroken("handed back");
    let theirs = original::add(stage, "theirs", 0, &mut taken(living, nobody));
    let table = 254;
    restored.insert(theirs.container.clone(), (original::entry(&theirs, 100), table));
    living.push(theirs);
    for name in ["web-1", "new-1"] {
        let gone = living.remove(living.iter().position(|pod| pod.name == name).unwrap());
        lines.hang_up(name);
        let mut words = words(&gone);
        words.pop(); // the chain of an egress pod is the original's affair
        original::delete(stage, gone, &mut restored);
        assert_gone(stage, &words);
    }
    original::save(stage, restored.values().map(|(entry, _)| entry));
    assert_known(stage, living, nobody);
    let said = stage.clean_up();
    assert!(said.contains("pods have addresses of egress-cni"), "{said}");
    lines.unbroken("our rules cleaned up");
    connect_all(stage, lines, living);
    lines.unbroken("the original serves");
}

#[test]
fn a_node_with_ipv4_pods_and_their_ipv6_egress() {
    up_down_up(&V4, 71);
}

#[test]
fn a_node_whose_original_uses_iptables_legacy() {
    up_down_up(&V4_LEGACY, 73);
}

#[test]
fn a_node_with_ipv6_pods_and_their_ipv4_egress() {
    up_down_up(&V6, 72);
}
