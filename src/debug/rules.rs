//! `enibox rules`: what of the node's rules, routes, settings and nf_tables is ours, in the syntax of `ip` and `nft`, each with
//! its reason; and what of others has to do with it. Neither tool is needed, nor the daemon.

use super::doctor::{Source, gather};
use super::{Asking, complain, environment, print};
use crate::apply::Host;
use crate::error::{Result, exit};
use crate::model::map::Map;
use crate::model::net::{Family, Link, Route};
use crate::model::nft::{AnyChain, Hook, Table};
use crate::model::order::Gather as _;
use crate::netlink::sysctl;
use crate::plan::doctor::environment::Facts;
use crate::plan::doctor::reasons::{Reasons, Whose};
use crate::plan::former;
use crate::plan::host::{Intent, Observation, link_of};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// Arguments of `rules`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    asking: Asking,
}

/// A line in the syntax of its tool, and why it is there.
struct Entry {
    text: String,
    why: String,
}

/// What is shown, by heading.
struct Listing {
    sections: Vec<(String, Vec<Entry>)>,
    tables: Vec<Table>,
    others: Vec<Entry>,
}

/// Runs the subcommand; the exit code.
pub fn run(args: &Args) -> u8 {
    match listing(args) {
        Ok(listing) if args.asking.json => print(&format!("{:#}\n", document(&listing))),
        Ok(listing) => print(&page(&listing)),
        Err(error) => {
            complain(&error.to_string());
            exit::FAILURE
        }
    }
}

fn listing(args: &Args) -> Result<Listing> {
    let mut host = Host::open()?;
    let seen = host.observe()?;
    let source = Source::find(&args.asking, &environment(), &seen, false)?;
    for finding in &source.findings {
        complain(&finding.seen);
    }
    let mut facts = Facts::default();
    gather::chains(&mut facts, &host, &seen.tables)?;
    let intent = source.intent.unwrap_or_default();
    let names = seen.links.iter().map(|link| (link.index, link)).gather::<Map<_, _>>();
    let mut listing = Listing { sections: Vec::new(), tables: seen.tables.clone(), others: Vec::new() };
    routing(&Reasons::new(&intent), &seen, &names, &mut listing);
    listing.sections.push(("sysctl".into(), settings(&intent, &seen)));
    neighbours(&facts, &mut listing.others);
    Ok(listing)
}

fn routing(reasons: &Reasons<'_>, seen: &Observation, names: &Map<u32, &Link>, listing: &mut Listing) {
    for (family, flag) in [(Family::V4, ""), (Family::V6, " -6")] {
        let (mut rules, mut routes) = (Vec::new(), Vec::new());
        for rule in seen.rules.iter().filter(|rule| rule.family == family) {
            sort_out(reasons.rule(rule), rule.to_string(), "rule", &mut rules, &mut listing.others);
        }
        for route in seen.routes.iter().filter(|route| Family::of(route.dst.addr()) == family) {
            sort_out(reasons.route(route), route_text(route, names), "route", &mut routes, &mut listing.others);
        }
        listing.sections.push((format!("ip{flag} rule"), rules));
        listing.sections.push((format!("ip{flag} route"), routes));
    }
}

fn sort_out(whose: Whose, text: String, kind: &str, ours: &mut Vec<Entry>, others: &mut Vec<Entry>) {
    match whose {
        Whose::Ours(why) => ours.push(Entry { text, why }),
        Whose::Kernel => ours.push(Entry { text, why: "the kernel's".into() }),
        Whose::Foreign(why) => others.push(Entry { text: format!("{kind} {text}"), why: why.into() }),
        Whose::Other => {}
    }
}

fn route_text(route: &Route, names: &Map<u32, &Link>) -> String {
    let text = route.to_string();
    let name = names.get(&route.dev).map(|link| link.name.as_str());
    match (text.split_once(&format!(" dev if{}", route.dev)), name) {
        (Some((before, after)), Some(name)) => format!("{before} dev {name}{after}"),
        _ => text,
    }
}

// What forwarding to pods stands on.
fn settings(intent: &Intent, seen: &Observation) -> Vec<Entry> {
    let primary = link_of(&seen.links, intent.primary_mac).map_or("all", |link| link.name.as_str());
    let primary = format!("net/ipv4/conf/{primary}/rp_filter");
    let wanted = [
        ("net/ipv4/ip_forward", "1: packets of pods are forwarded"),
        ("net/ipv6/conf/all/forwarding", "1 in IPv6 mode: packets of pods are forwarded"),
        ("net/ipv4/conf/all/rp_filter", "not 1: the larger of this and the link's counts"),
        (primary.as_str(), "2: NodePort packets come in here and go on to pods of other ENIs"),
        ("net/ipv4/tcp_early_demux", "0 with strict branch ENIs: probes of the kubelet"),
        ("net/ipv4/udp_early_demux", "0 with strict branch ENIs: answers to the node"),
    ];
    let entry = |(path, why): (&str, &str)| {
        let value = sysctl::read(path).ok()?;
        Some(Entry { text: format!("{} = {value}", path.replace('/', ".")), why: why.into() })
    };
    wanted.into_iter().filter_map(entry).collect()
}

fn neighbours(facts: &Facts, others: &mut Vec<Entry>) {
    for AnyChain { family, table, name, hook, forward } in &facts.chains {
        if forward.drops && *hook == Some(Hook::Forward) {
            let text = format!("chain {family} {table} {name} {{ hook forward; policy drop; }}");
            others.push(Entry { text, why: "drops what is forwarded to and from pods".into() });
        }
    }
    for removal in &facts.leftovers {
        others.push(Entry { text: former::text(removal), why: "of a former installation".into() });
    }
    for chain in &facts.legacy {
        let text = format!("iptables-legacy -t nat -S {chain}");
        others.push(Entry { text, why: "of a former installation".into() });
    }
}

// Writing to a string cannot fail.
fn page(listing: &Listing) -> String {
    let mut page = String::new();
    let mut lines = |heading: &str, entries: &[Entry]| {
        if !entries.is_empty() {
            let _ = writeln!(page, "# {heading}");
        }
        for Entry { text, why } in entries {
            let _ = writeln!(page, "{text}  # {why}");
        }
    };
    for (heading, entries) in &listing.sections {
        lines(heading, entries);
    }
    lines("of others", &listing.others);
    for table in &listing.tables {
        let _ = write!(page, "# nft\n{table}");
    }
    page
}

fn document(listing: &Listing) -> Value {
    let entries = |entries: &[Entry]| {
        let each = entries.iter().map(|Entry { text, why }| json!({"text": text, "why": why}));
        Value::Array(each.collect())
    };
    let mut document = json!({
        "others": entries(&listing.others),
        "nft": listing.tables.iter().map(ToString::to_string).collect::<Vec<_>>(),
    });
    for (heading, lines) in &listing.sections {
        document[heading.replace(' ', "")] = entries(lines);
    }
    document
}
