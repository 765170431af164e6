//! What surrounds us on the node: settings of the kernel, other software, files (`spec/operations.md` 8.1 and 13).
//!
//! Files come by the path they have on the host. What is not there was not found, or could not be read, and gives no
//! finding of its own: a look from inside a container sees less.

use super::{Finding, single};
use crate::model::map::{Map, Set};
use crate::model::naming::{in_eni_ranges, priority};
use crate::model::net::{Family, Route, Rule, TABLE_LOCAL, TABLE_MAIN};
use crate::model::nft::{AnyChain, Hook, Removal};
use crate::model::order::Gather as _;
use crate::model::settings::Settings;
use crate::plan::former;
use crate::plan::host::{Intent, Observation, link_of};
use std::net::IpAddr;

/// Single files that are looked at.
pub const FILES: &[&str] = &[
    "/proc/stat",
    "/proc/mounts",
    "/proc/modules",
    "/proc/sys/kernel/osrelease",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sys/net/ipv4/tcp_early_demux",
    "/proc/sys/net/ipv4/udp_early_demux",
    "/proc/sys/net/ipv4/conf/all/rp_filter",
    "/proc/sys/net/ipv4/neigh/default/gc_thresh3",
    "/proc/sys/net/netfilter/nf_conntrack_count",
    "/proc/sys/net/netfilter/nf_conntrack_max",
    "/proc/net/ip_tables_names",
    "/etc/systemd/networkd.conf",
    "/etc/NetworkManager/NetworkManager.conf",
];

/// Directories whose files are looked at, with what their names end in.
pub const DIRECTORIES: &[(&str, &str)] = &[
    ("/etc/systemd/network", ".link"),
    ("/run/systemd/network", ".link"),
    ("/usr/lib/systemd/network", ".link"),
    ("/etc/systemd/networkd.conf.d", ".conf"),
    ("/run/systemd/networkd.conf.d", ".conf"),
    ("/usr/lib/systemd/networkd.conf.d", ".conf"),
    ("/etc/NetworkManager/conf.d", ".conf"),
    ("/run/NetworkManager/conf.d", ".conf"),
    ("/usr/lib/NetworkManager/conf.d", ".conf"),
    ("/etc/cni/net.d", ""),
    ("/usr/lib/udev/rules.d", "99-vpc-policy-routes.rules"),
];

/// Paths of which only it matters whether they are there.
pub const MARKS: &[&str] = &[
    "/run/systemd/netif",
    "/run/NetworkManager",
    "/run/firewalld.pid",
    "/etc/cni/net.d",
    "/etc/udev/rules.d/99-vpc-policy-routes.rules",
    "/run/aws-node/npa.sock",
];

/// Our network configuration.
const CONFLIST: &str = "10-aws.conflist";
/// The link that kube-proxy in ipvs mode has services' addresses on.
const IPVS: &str = "kube-ipvs0";
/// Tables of nm-cloud-setup.
const NM_TABLES: [u32; 2] = [30_200, 30_400];
/// Modules that the rule set needs.
const MODULES: &[&str] = &["nf_tables", "nft_ct", "nft_fib_ipv4", "nft_nat", "nft_chain_nat"];

/// The plugin that the runtime starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plugin {
    /// Its path as it is seen from here.
    pub path: String,
    /// Whether it is there.
    pub there: bool,
    /// Whether it is the executable that looks at it: image and plugins are one.
    pub same: bool,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Content of files by path.
    pub files: Map<String, String>,
    /// Those of [`MARKS`] that are there.
    pub there: Set<String>,
    /// Chains of all nf_tables tables.
    pub chains: Vec<AnyChain>,
    /// What a former installation has left in tables of `iptables-nft`.
    pub leftovers: Vec<Removal>,
    /// The same in `iptables-legacy`: chains.
    pub legacy: Vec<String>,
    /// Families of which `iptables-legacy` drops what is forwarded.
    pub legacy_drops: Vec<Family>,
    /// Counters of drivers: link, name, count.
    pub counters: Vec<(String, String, u64)>,
    /// The plugin on the host, if its folder is seen.
    pub plugin: Option<Plugin>,
    /// Addresses of the other family that pods have, or have had (`spec/egress.md` 7).
    pub egress: Vec<IpAddr>,
    /// When the checkpoint was written, in Unix seconds.
    pub checkpoint: Option<i64>,
    /// Names of this kernel's modules and built-ins; empty if they are not seen.
    pub modules: Set<String>,
}

impl Facts {
    fn text(&self, path: &str) -> Option<&str> {
        self.files.get(path).map(|text| text.trim())
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    fn below<'a>(&'a self, directory: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        let inside = move |(path, text): (&'a String, &'a String)| {
            let name = path.strip_prefix(directory)?.strip_prefix('/')?;
            (!name.contains('/')).then_some((name, text.as_str()))
        };
        self.files.iter().filter_map(inside)
    }

    // Files of several directories by name: of equal names the first directory's counts, as systemd has it.
    fn layered<'a>(&'a self, directories: &[&'a str]) -> Map<&'a str, &'a str> {
        let mut files = Map::new();
        for directory in directories {
            for (name, text) in self.below(directory) {
                files.entry(name).or_insert(text);
            }
        }
        files
    }
}

/// All findings. `seen` may be absent when the kernel could not be looked at.
pub fn findings(intent: Option<&Intent>, seen: &Observation, settings: &Settings, facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut note = |name, text: String| found.push(Finding::new(name, "", text));
    kernel(settings, facts, intent.is_some_and(|intent| intent.v6), &mut note);
    files(facts, &mut note);
    software(settings, facts, &mut note);
    chains(facts, &mut note);
    counters(facts, &mut note);
    leftovers_of_egress(seen, facts, &mut note);
    if let Some(intent) = intent {
        reverse_path(intent, seen, facts, &mut note);
        ipvs(intent, seen, &mut note);
        ways(intent, seen, facts, &mut note);
        rules(intent, seen, &mut note);
        let most = facts.number("/proc/sys/net/ipv4/neigh/default/gc_thresh3");
        if let Some(most) = most.filter(|most| *most < 2 * intent.pods.len() as u64) {
            note("neighbour-table", format!("gc_thresh3 is {most}, with {} pods", intent.pods.len()));
        }
        if !facts.legacy.is_empty() {
            let primary = link_of(&seen.links, intent.primary_mac).map_or("eth0", |link| link.name.as_str());
            let commands = former::legacy_commands(&intent.veth_prefix, intent.mark, primary, &facts.legacy);
            let finding = Finding::new("legacy-rules", "", facts.legacy.join(" "));
            found.push(finding.mended_by(commands.join("; ")));
        }
    }
    found
}

fn kernel(settings: &Settings, facts: &Facts, v6: bool, note: &mut impl FnMut(&'static str, String)) {
    let forward = "/proc/sys/net/ipv4/ip_forward";
    // In IPv6 mode it is one of the settings that the host's plan keeps.
    if !v6 && facts.number(forward) == Some(0) {
        note("ip-forward", format!("{forward} is 0"));
    }
    let strict = settings.pod_eni && settings.pod_security_groups_strict();
    for (id, name) in [("tcp-early-demux", "tcp_early_demux"), ("udp-early-demux", "udp_early_demux")] {
        if strict && facts.number(&format!("/proc/sys/net/ipv4/{name}")) == Some(1) {
            note(id, format!("net.ipv4.{name} is 1, and pods with branch ENIs are strict"));
        }
    }
    let count = facts.number("/proc/sys/net/netfilter/nf_conntrack_count").unwrap_or(0);
    let most = facts.number("/proc/sys/net/netfilter/nf_conntrack_max").unwrap_or(0);
    if most > 0 && count >= most - most / 10 {
        note("conntrack-full", format!("{count} of {most} connections"));
    }
    let release = facts.text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version != (0, 0) && version < (5, 10) {
        note("kernel-old", release.to_owned());
    }
    if !facts.modules.is_empty() {
        let vlan = settings.pod_eni.then_some("8021q");
        for module in MODULES.iter().copied().chain(vlan).filter(|name| !facts.modules.contains(*name)) {
            note("module-missing", format!("{module} is neither built in nor a module of {release}"));
        }
    }
}

fn files(facts: &Facts, note: &mut impl FnMut(&'static str, String)) {
    if facts.there.contains("/etc/cni/net.d") {
        let configs = facts.below("/etc/cni/net.d").map(|(name, _)| name);
        let configs = configs.filter(|name| [".conflist", ".conf", ".json"].iter().any(|end| name.ends_with(end)));
        let configs = configs.collect::<Vec<_>>();
        match configs.first() {
            Some(first) if !configs.contains(&CONFLIST) => {
                note("conflist-missing", format!("/etc/cni/net.d has {first} and no {CONFLIST}"));
            }
            Some(&CONFLIST) => {}
            Some(first) => note("conflist-order", format!("/etc/cni/net.d/{first} sorts before {CONFLIST}")),
            None => note("conflist-missing", "/etc/cni/net.d has none".into()),
        }
    }
    match &facts.plugin {
        Some(plugin) if !plugin.there => note("plugin-missing", format!("{} is not there", plugin.path)),
        Some(plugin) if !plugin.same => note("plugin-other", format!("{} is not this executable", plugin.path)),
        _ => {}
    }
    let boot = facts.text("/proc/stat").unwrap_or_default().lines().find_map(|line| line.strip_prefix("btime "));
    let boot = boot.and_then(|seconds| seconds.trim().parse::<i64>().ok());
    if let (Some(boot), Some(written)) = (boot, facts.checkpoint)
        && written < boot
    {
        note("checkpoint-old", format!("written {} s before the boot", boot - written));
    }
    let mounts = facts.text("/proc/mounts").unwrap_or_default().lines();
    let mut best = ("", "");
    for line in mounts {
        let mut words = line.split(' ').skip(1);
        let (Some(target), Some(kind)) = (words.next(), words.next()) else { continue };
        let holds = ["/var/run/aws-node", "/run/aws-node", "/var/run", "/run", "/"].contains(&target);
        // The deepest mount counts, and of several the last.
        if holds && target.trim_start_matches("/var").len() >= best.0.trim_start_matches("/var").len() {
            best = (target, kind);
        }
    }
    if facts.checkpoint.is_some() && !matches!(best.1, "" | "tmpfs" | "ramfs") {
        note("not-tmpfs", format!("{} is {}", best.0, best.1));
    }
}

// The value of the last line `key=...` of a file in INI syntax.
fn ini<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let value = |line: &'a str| Some(line.trim().strip_prefix(key)?.trim_start().strip_prefix('=')?.trim());
    text.lines().rev().find_map(value)
}

fn says_no(value: &str) -> bool {
    matches!(value.to_ascii_lowercase().as_str(), "no" | "false" | "0" | "off" | "n" | "f")
}

fn software(settings: &Settings, facts: &Facts, note: &mut impl FnMut(&'static str, String)) {
    let links = facts.layered(&["/etc/systemd/network", "/run/systemd/network", "/usr/lib/systemd/network"]);
    // The first file that matches every link decides.
    let policy = links.iter().find_map(|(name, text)| {
        let all = ini(text, "OriginalName").is_some_and(|names| names.split_whitespace().any(|name| name == "*"));
        Some((name, ini(text, "MACAddressPolicy").filter(|_| all)?))
    });
    if let Some((name, policy)) = policy.filter(|(_, policy)| *policy != "none") {
        note("udev-link-policy", format!("{name} has MACAddressPolicy={policy}"));
    }
    if facts.there.contains("/run/systemd/netif") {
        let parts = facts.layered(&[
            "/etc/systemd/networkd.conf.d",
            "/run/systemd/networkd.conf.d",
            "/usr/lib/systemd/networkd.conf.d",
        ]);
        let main = facts.text("/etc/systemd/networkd.conf");
        for (name, key) in
            [("networkd-rules", "ManageForeignRoutingPolicyRules"), ("networkd-routes", "ManageForeignRoutes")]
        {
            let value = parts.values().rev().copied().chain(main).find_map(|text| ini(text, key));
            if !value.is_some_and(says_no) {
                note(name, format!("systemd-networkd runs with {key}={}", value.unwrap_or("yes")));
            }
        }
    }
    if facts.there.contains("/run/NetworkManager") {
        let parts = facts.layered(&[
            "/etc/NetworkManager/conf.d",
            "/run/NetworkManager/conf.d",
            "/usr/lib/NetworkManager/conf.d",
        ]);
        let main = facts.text("/etc/NetworkManager/NetworkManager.conf");
        let wanted = format!("interface-name:{}*", settings.veth_prefix);
        let spared = |text: &str| ini(text, "unmanaged-devices").is_some_and(|list| list.contains(&wanted));
        if !parts.values().copied().chain(main).any(spared) {
            note("networkmanager", format!("NetworkManager runs, and unmanaged-devices has no {wanted}"));
        }
    }
    if facts.there.contains("/run/firewalld.pid") {
        note("firewall", "firewalld runs".into());
    }
    let udev = "99-vpc-policy-routes.rules";
    let masked = facts.there.contains("/etc/udev/rules.d/99-vpc-policy-routes.rules");
    if !masked && facts.below("/usr/lib/udev/rules.d").any(|(name, _)| name == udev) {
        note("ec2-net-utils", format!("/usr/lib/udev/rules.d/{udev} is in force"));
    }
    let agent = settings.network_policy_mode.as_deref().is_some_and(|mode| !mode.eq_ignore_ascii_case("none"));
    if agent && !facts.there.contains("/run/aws-node/npa.sock") {
        note("policy-agent", "NETWORK_POLICY_ENFORCING_MODE is set, and /run/aws-node/npa.sock is not there".into());
    }
    let names = facts.text("/proc/net/ip_tables_names").unwrap_or_default();
    if !names.is_empty() {
        note("legacy-tables", names.split_whitespace().collect::<Vec<_>>().join(", "));
    }
}

fn chains(facts: &Facts, note: &mut impl FnMut(&'static str, String)) {
    for AnyChain { family, table, name, hook, drops } in &facts.chains {
        if *hook == Some(Hook::Forward) && *drops {
            note("forward-drop", format!("chain {family} {table} {name} has policy drop"));
        }
    }
    for family in &facts.legacy_drops {
        let tool = if *family == Family::V6 { "ip6tables-legacy" } else { "iptables-legacy" };
        note("forward-drop", format!("{tool}: chain FORWARD of table filter has policy DROP"));
    }
    for removal in &facts.leftovers {
        note("former-rules", former::text(removal));
    }
    if facts.chains.iter().any(|chain| chain.name.starts_with("ufw-")) {
        note("firewall", "ufw has rules".into());
    }
}

// What ENA counts of packets beyond what the instance may have. Nothing resets it but a restart.
fn counters(facts: &Facts, note: &mut impl FnMut(&'static str, String)) {
    let beyond = facts.counters.iter().filter(|(_, name, count)| name.ends_with("_allowance_exceeded") && *count > 0);
    for (link, name, count) in beyond {
        note("allowance-exceeded", format!("{link}: {name} {count}"));
    }
}

// An address whose pod lives has a route.
fn leftovers_of_egress(seen: &Observation, facts: &Facts, note: &mut impl FnMut(&'static str, String)) {
    let led = seen.routes.iter().filter_map(|route| single(route.dst)).gather::<Set<_>>();
    let left = facts.egress.iter().filter(|address| !led.contains(address)).count();
    if left > 0 {
        let all = facts.egress.len();
        note("egress-leftover", format!("{left} of {all} addresses that are taken lead to no pod"));
    }
}

fn reverse_path(intent: &Intent, seen: &Observation, facts: &Facts, note: &mut impl FnMut(&'static str, String)) {
    let Some(primary) = link_of(&seen.links, intent.primary_mac).filter(|_| intent.node_port && !intent.v6) else {
        return;
    };
    // The larger of both counts: 0 off, 1 strict, 2 loose.
    let own = format!("/proc/sys/net/ipv4/conf/{}/rp_filter", primary.name);
    let values = [facts.number("/proc/sys/net/ipv4/conf/all/rp_filter"), facts.number(&own)];
    if values.into_iter().flatten().max() == Some(1) {
        note("rp-filter", format!("net.ipv4.conf.{}.rp_filter is 1", primary.name));
    }
}

// What the node and its ENIs need of what is not ours.
fn ways(intent: &Intent, seen: &Observation, facts: &Facts, note: &mut impl FnMut(&'static str, String)) {
    let name = |dev: u32| seen.links.iter().find(|link| link.index == dev).map_or("?", |link| link.name.as_str());
    let leads = |route: &Route| route.table == TABLE_MAIN && route.dst.prefix_len() == 0 && route.dst.addr().is_ipv4();
    // In IPv6 mode the router tells of it again by itself.
    if !intent.v6 && !seen.routes.iter().any(leads) {
        note("default-route", "table main has no default route".into());
    }
    // The table `local` comes first, whatever leads to the pod.
    let pods = intent.pods.iter().map(|pod| (pod.address, pod.name.as_str())).gather::<Map<_, _>>();
    for address in &seen.addresses {
        if let Some(pod) = pods.get(&address.addr.addr()) {
            note("pod-address-taken", format!("{} of pod {pod} is on {}", address.addr, name(address.dev)));
        }
    }
    for (path, text) in &facts.files {
        if !intent.v6 && path.ends_with("/forwarding") && text.trim() == "0" {
            note("link-forwarding", format!("{path} is 0"));
        }
    }
}

// IPVS looks for a route of its own, by the pod's address and without our mark.
fn ipvs(intent: &Intent, seen: &Observation, note: &mut impl FnMut(&'static str, String)) {
    let snat = !intent.v6 && !intent.external_snat && !intent.enis.is_empty();
    if snat && let Some(link) = seen.links.iter().find(|link| link.name == IPVS) {
        note("ipvs", format!("link {} of kube-proxy in ipvs mode, SNAT and secondary ENIs", link.name));
    }
}

fn rules(intent: &Intent, seen: &Observation, note: &mut impl FnMut(&'static str, String)) {
    let nm = |table: u32| NM_TABLES.contains(&table);
    if let Some(rule) = seen.rules.iter().find(|rule| nm(rule.table)) {
        note("nm-cloud-setup", format!("rule {rule}"));
    } else if let Some(route) = seen.routes.iter().find(|route| nm(route.table)) {
        note("nm-cloud-setup", format!("route {route}"));
    }
    let own = intent.enis.iter().map(|eni| (eni.own.addr(), eni.table)).gather::<Map<_, _>>();
    let pods = intent.pods.iter().map(|pod| pod.address).gather::<Set<_>>();
    for rule in seen.rules.iter().filter(|rule| !nm(rule.table) && !kernels(rule)) {
        let source = rule.src.and_then(single);
        let pod = rule.src.or(rule.dst).and_then(single).is_some_and(|address| pods.contains(&address));
        let before = rule.priority < priority::FROM_ENI;
        let ours = source.is_some_and(|source| own.contains_key(&source) || pods.contains(&source));
        let other = !matches!(rule.priority, priority::FROM_POD | priority::FROM_ENI);
        if ours && other && rule.table != TABLE_MAIN && in_eni_ranges(rule.table) {
            note("ec2-net-utils", format!("rule {rule}"));
        } else if foreign(rule) || (pod && before && !matches!(rule.priority, priority::TO_POD | priority::FROM_POD)) {
            note("foreign-rule", format!("rule {rule}"));
        }
    }
}

fn kernels(rule: &Rule) -> bool {
    matches!(rule.table, TABLE_LOCAL | 253) || (rule.priority == 32_766 && rule.table == TABLE_MAIN)
}

/// Whether a rule that is not ours decides about traffic of pods: it stands among ours, and either selects everything or
/// has one of our priorities with a shape that ours never have.
pub fn foreign(rule: &Rule) -> bool {
    let all = rule.src.is_none() && rule.dst.is_none() && rule.fwmark.is_none() && rule.iif.is_none();
    let before = rule.priority < priority::FROM_ENI;
    if all && before && !rule.foreign && rule.ipproto.is_none() {
        return true;
    }
    let shape = Rule { fwmark: None, src: None, dst: None, iif: None, ..rule.clone() };
    let plain = shape == Rule::any(rule.family, rule.priority, rule.table);
    match rule.priority {
        priority::TO_POD | priority::EXTERNAL_SERVICE => !plain || rule.dst.is_none() || rule.table != TABLE_MAIN,
        priority::MARK => !plain || rule.fwmark.is_none() || rule.table != TABLE_MAIN,
        priority::FROM_POD => !plain || rule.src.is_none(),
        priority::BRANCH => !plain || rule.iif.is_none(),
        _ => false,
    }
}
