//! What surrounds us on the node: settings of the kernel, other software, files (`spec/operations.md` 8.1 and 13).
//!
//! Files come by the path they have on the host. What is not there was not found, or could not be read, and gives no
//! finding of its own: a look from inside a container sees less.

use super::{Finding, Severity, forward, managers, room, rules, single};
use crate::model::map::{Map, Set};
use crate::model::net::{Family, Route, TABLE_MAIN};
use crate::model::nft::{AnyChain, Forward, Removal};
use crate::model::order::Gather as _;
use crate::model::settings::Settings;
use crate::plan::former;
use crate::plan::host::{Intent, Observation, link_of};
use crate::plan::ruleset::IPVS_LINK;
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
    "/proc/sys/net/ipv4/conf/all/arp_ignore",
    "/proc/sys/net/ipv4/conf/default/arp_ignore",
    "/proc/sys/net/ipv4/neigh/default/gc_thresh3",
    "/proc/sys/net/ipv6/neigh/default/gc_thresh3",
    "/proc/sys/net/netfilter/nf_conntrack_count",
    "/proc/sys/net/netfilter/nf_conntrack_max",
    "/proc/net/ip_tables_names",
    "/proc/net/if_inet6",
    room::KUBELET[0],
    room::KUBELET[1],
    room::KUBELET[2],
    room::KUBELET[3],
    "/sys/fs/cgroup/cpu.stat",
    "/sys/fs/cgroup/cpu/cpu.stat",
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
    (room::KUBELET_PIECES, ".conf"),
    ("/usr/lib/udev/rules.d", "99-vpc-policy-routes.rules"),
    ("/usr/lib/udev/rules.d", managers::UDEV_RULES),
    ("/etc/udev/rules.d", managers::UDEV_RULES),
];

/// Paths of which only it matters whether they are there.
pub const MARKS: &[&str] = &[
    "/run/systemd/netif",
    "/run/NetworkManager",
    "/run/firewalld.pid",
    "/etc/cni/net.d",
    "/etc/udev/rules.d/99-vpc-policy-routes.rules",
    NET_UTILS_1,
    HOTPLUG[0],
    HOTPLUG[1],
    NM_TIMER,
    "/run/aws-node/npa.sock",
];

/// Marks for masquerading and dropping, as kube-proxy and the kubelet have them unless told otherwise.
const KUBE_PROXYS: u32 = 0xc000;
/// Our network configuration.
const CONFLIST: &str = "10-aws.conflist";
/// What starts ec2-net-utils of Amazon Linux 2 when an ENI comes.
const NET_UTILS_1: &str = "/etc/udev/rules.d/53-ec2-network-interfaces.rules";
/// What cloud-init writes, older and newer, when it is to configure links that come later.
const HOTPLUG: [&str; 2] =
    ["/etc/udev/rules.d/10-cloud-init-hook-hotplug.rules", "/etc/udev/rules.d/90-cloud-init-hook-hotplug.rules"];
/// nm-cloud-setup is enabled.
const NM_TIMER: &str = "/etc/systemd/system/timers.target.wants/nm-cloud-setup.timer";
/// A container that is held back in this part of its time, of so many periods at least, feels it.
const THROTTLED_PART: u64 = 4;
const PERIODS_MIN: u64 = 600;
/// Modules that pods' links and the rule set need.
const MODULES: &[&str] = &["veth", "nf_tables", "nft_ct", "nft_fib_ipv4", "nft_nat", "nft_chain_nat"];

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
    /// What `iptables-legacy` does to packets that are forwarded.
    pub legacy_forward: Vec<(Family, Forward)>,
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
    /// The kubelet's command line, words apart by NULs; empty if it is not seen.
    pub kubelet: String,
    /// EC2 lists a trunk ENI; the daemon knows of a new one some seconds later.
    pub trunk: bool,
    /// The instance type takes a trunk ENI.
    pub trunk_capable: bool,
    /// `iptables-legacy` has chains of kube-proxy.
    pub legacy_kube: bool,
    /// What containerd's configuration says of folders for networks: key and value.
    pub runtime: Vec<(String, String)>,
}

impl Facts {
    pub(super) fn text(&self, path: &str) -> Option<&str> {
        self.files.get(path).map(|text| text.trim())
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    pub(super) fn below<'a>(&'a self, directory: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        let inside = move |(path, text): (&'a String, &'a String)| {
            let name = path.strip_prefix(directory)?.strip_prefix('/')?;
            (!name.contains('/')).then_some((name, text.as_str()))
        };
        self.files.iter().filter_map(inside)
    }

    // Files of several directories by name: of equal names the first directory's counts, as systemd has it.
    pub(super) fn layered<'a>(&'a self, directories: &[&'a str]) -> Map<&'a str, &'a str> {
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
    backends(facts, &mut note);
    chains(facts, &mut note);
    counters(facts, &mut note);
    throttled(facts, &mut note);
    leftovers_of_egress(seen, facts, &mut note);
    if settings.connmark & KUBE_PROXYS != 0 {
        let kubes =
            format!("AWS_VPC_K8S_CNI_CONNMARK is {:#x}; kube-proxy's marks are {KUBE_PROXYS:#x}", settings.connmark);
        note("mark-bits", kubes);
    }
    if let Some(intent) = intent {
        // Their packets leave by the branch ENI (rule 10) before they could be local (rule 20), which IPVS waits for.
        if intent.strict_branches && seen.links.iter().any(|link| link.name == IPVS_LINK) {
            note("ipvs", format!("link {IPVS_LINK} of kube-proxy in ipvs mode, and pods with branch ENIs are strict"));
        }
        found.extend(neighbours(intent, facts));
        found.extend(primary_forwards(intent, seen));
        found.extend(reverse_path(intent, seen, facts));
        ways(intent, seen, &mut found);
        rules::findings(intent, seen, &mut found);
        if settings.pod_eni && !facts.trunk && !intent.enis.iter().any(|eni| eni.trunk) {
            let mut finding = Finding::new("trunk-missing", "", "ENABLE_POD_ENI is set, and the node has no trunk ENI");
            if !facts.trunk_capable {
                finding.severity = Severity::Note;
                finding.seen.push_str("; its type takes none");
            }
            found.push(finding);
        }
        if !facts.legacy.is_empty() {
            let primary = link_of(&seen.links, intent.primary_mac).map_or("eth0", |link| link.name.as_str());
            let commands = former::legacy_commands(&intent.veth_prefix, intent.mark, primary, &facts.legacy);
            let finding = Finding::new("legacy-rules", "", facts.legacy.join(" "));
            found.push(finding.mended_by(commands.join("; ")));
        }
    }
    found.extend(managers::network_manager(intent, seen, settings, facts));
    found.extend(configurations(facts));
    found.extend(connections(facts));
    forward::barred(settings, facts, &mut found);
    found
}

fn connections(facts: &Facts) -> Option<Finding> {
    let count = facts.number("/proc/sys/net/netfilter/nf_conntrack_count")?;
    let most = facts.number("/proc/sys/net/netfilter/nf_conntrack_max").filter(|most| *most > 0)?;
    let finding = Finding::new("conntrack-full", "", format!("{count} of {most} connections"));
    let command = format!("sysctl -w net.netfilter.nf_conntrack_max={}", most.saturating_mul(2));
    (count >= most - most / 10).then(|| finding.mended_by(command))
}

/// The kernel's neighbours, against pods: each may have one on the host and one for its gateway.
fn neighbours(intent: &Intent, facts: &Facts) -> Option<Finding> {
    let (version, pods) = (if intent.v6 { 6 } else { 4 }, intent.pods.len() as u64);
    let most = facts.number(&format!("/proc/sys/net/ipv{version}/neigh/default/gc_thresh3"))?;
    let setting = format!("net.ipv{version}.neigh.default.gc_thresh3");
    let finding = Finding::new("neighbour-table", "", format!("{setting} is {most}, with {pods} pods"));
    // The kernel's default at least.
    let command = format!("sysctl -w {setting}={}", pods.saturating_mul(4).max(1024));
    (most < 2 * pods).then(|| finding.mended_by(command))
}

fn kernel(settings: &Settings, facts: &Facts, v6: bool, note: &mut impl FnMut(&'static str, String)) {
    let forward = "/proc/sys/net/ipv4/ip_forward";
    // In IPv6 mode it is one of the settings that the host's plan keeps.
    if !v6 && facts.number(forward) == Some(0) {
        note("ip-forward", format!("{forward} is 0"));
    }
    // A new namespace takes over what the host has for all links. 2 answers only whom it has a subnet with, 8 nobody.
    for name in ["all", "default"] {
        let value = facts.number(&format!("/proc/sys/net/ipv4/conf/{name}/arp_ignore"));
        if let Some(value) = value.filter(|value| !v6 && matches!(value, 2 | 8)) {
            note("arp-ignore", format!("net.ipv4.conf.{name}.arp_ignore is {value}"));
        }
    }
    // Where IPv6 is on at least `lo` has an address.
    let off = facts.text("/proc/stat").is_some() && facts.text("/proc/net/if_inet6").unwrap_or_default().is_empty();
    if off && (settings.enable_ipv6 || settings.v6_egress) {
        note("ipv6-off", "/proc/net/if_inet6 lists no address".into());
    }
    let strict = settings.pod_eni && settings.pod_security_groups_strict();
    for (id, name) in [("tcp-early-demux", "tcp_early_demux"), ("udp-early-demux", "udp_early_demux")] {
        if strict && facts.number(&format!("/proc/sys/net/ipv4/{name}")) == Some(1) {
            note(id, format!("net.ipv4.{name} is 1, and pods with branch ENIs are strict"));
        }
    }
    let release = facts.text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version != (0, 0) && version < (5, 10) {
        note("kernel-old", release.to_owned());
    }
    if !facts.modules.is_empty() {
        let vlan = settings.pod_eni.then_some("8021q");
        let agent: &[&str] = if policies(settings) { &["cls_bpf", "sch_ingress"] } else { &[] };
        let guard =
            settings.enable_ipv6.then_some("nft_reject_ipv4").or(settings.v6_egress.then_some("nft_reject_ipv6"));
        for module in
            MODULES.iter().chain(agent).copied().chain(vlan).chain(guard).filter(|name| !facts.modules.contains(*name))
        {
            note("module-missing", format!("{module} is neither built in nor a module of {release}"));
        }
    }
}

// Whether the agent of network policies is asked.
fn policies(settings: &Settings) -> bool {
    settings.network_policy_mode.as_deref().is_some_and(|mode| !mode.eq_ignore_ascii_case("none"))
}

/// What the runtime takes: the first of the files. Another plugin's may run ours itself, as Cilium's does when it is chained, or lead on to
/// our file, as that of Multus.
fn configurations(facts: &Facts) -> Option<Finding> {
    let ends = [".conflist", ".conf", ".json"];
    let configs = facts.below("/etc/cni/net.d").filter(|(name, _)| ends.iter().any(|end| name.ends_with(end)));
    let configs = configs.collect::<Vec<_>>();
    let names = configs.iter().map(|(name, _)| *name).collect::<Vec<_>>();
    if !facts.there.contains("/etc/cni/net.d") {
        return None;
    }
    let Some((first, text)) = configs.first() else {
        return Some(Finding::new("conflist-missing", "", "/etc/cni/net.d has none"));
    };
    let text = text.split_whitespace().collect::<String>();
    if text.contains("\"type\":\"aws-cni\"") {
        return None;
    }
    let all = names.join(", ");
    if !names.contains(&CONFLIST) {
        return Some(Finding::new("conflist-missing", "", format!("/etc/cni/net.d has {all} and no {CONFLIST}")));
    }
    if *first == CONFLIST || text.contains(CONFLIST) {
        return None;
    }
    let mut finding = Finding::new("conflist-order", "", format!("/etc/cni/net.d has, in this order, {all}"));
    // Its delegate may be a resource of the cluster's.
    if text.contains("\"type\":\"multus") {
        finding.severity = Severity::Note;
        finding.remedy = format!("look whether its delegates or its clusterNetwork lead to {CONFLIST}");
    }
    Some(finding)
}

fn files(facts: &Facts, note: &mut impl FnMut(&'static str, String)) {
    // Where ours is laid is where the runtime must look.
    let ours = facts.below("/etc/cni/net.d").any(|(name, _)| name == CONFLIST);
    for (key, value) in facts.runtime.iter().filter(|_| ours) {
        let right = if key == "conf_dir" { "/etc/cni/net.d" } else { "/opt/cni/bin" };
        if !value.trim_end_matches('/').eq(right) {
            note("runtime-folders", format!("containerd has {key} = {value:?}, and ours are in {right}"));
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
pub(super) fn ini<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let value = |line: &'a str| Some(line.trim().strip_prefix(key)?.trim_start().strip_prefix('=')?.trim());
    text.lines().rev().find_map(value)
}

pub(super) fn says_no(value: &str) -> bool {
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
    if facts.there.contains("/run/firewalld.pid") {
        note("firewall", "firewalld runs".into());
    }
    if facts.there.contains(NET_UTILS_1) {
        note("ec2-net-utils", format!("{NET_UTILS_1} is in force"));
    }
    if let Some(rule) = HOTPLUG.iter().find(|path| facts.there.contains(**path)) {
        note("cloud-init", format!("{rule} is in force"));
    }
    if facts.there.contains(NM_TIMER) {
        note("nm-cloud-timer", format!("{NM_TIMER} starts nm-cloud-setup"));
    }
    let udev = "99-vpc-policy-routes.rules";
    let masked = facts.there.contains("/etc/udev/rules.d/99-vpc-policy-routes.rules");
    if !masked && facts.below("/usr/lib/udev/rules.d").any(|(name, _)| name == udev) {
        note("ec2-net-utils", format!("/usr/lib/udev/rules.d/{udev} is in force"));
    }
    if policies(settings) && !facts.there.contains("/run/aws-node/npa.sock") {
        note("policy-agent", "NETWORK_POLICY_ENFORCING_MODE is set, and /run/aws-node/npa.sock is not there".into());
    }
}

// Which backend of iptables has what.
fn backends(facts: &Facts, note: &mut impl FnMut(&'static str, String)) {
    let kube = [facts.legacy_kube, facts.chains.iter().any(|chain| chain.family == "ip" && kube_proxys(&chain.name))];
    if kube == [true; 2] {
        note("kube-proxy-twice", "chains of kube-proxy are in iptables-legacy and in nf_tables".into());
    }
    let names = facts.text("/proc/net/ip_tables_names").unwrap_or_default();
    if !names.is_empty() {
        let names = names.split_whitespace().collect::<Vec<_>>().join(", ");
        let whose = match kube {
            [true, _] => "; kube-proxy's chains are in them",
            [_, true] => "; kube-proxy's chains are in nf_tables",
            _ => "",
        };
        note("legacy-tables", format!("{names}{whose}"));
    }
}

/// Whether `iptables` has the chain from kube-proxy; the kubelet's own say nothing.
pub fn kube_proxys(chain: &str) -> bool {
    chain == "KUBE-SERVICES"
}

// How often the container that this runs in, the daemon's, was held back (`cgroup-v2.rst`, "cpu.stat").
fn throttled(facts: &Facts, note: &mut impl FnMut(&'static str, String)) {
    let file = ["/sys/fs/cgroup/cpu.stat", "/sys/fs/cgroup/cpu/cpu.stat"].iter().find_map(|path| facts.text(path));
    let value = |name| {
        let line = file.unwrap_or_default().lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let (periods, throttled) = (value("nr_periods "), value("nr_throttled "));
    if periods >= PERIODS_MIN && throttled.saturating_mul(THROTTLED_PART) >= periods {
        note("cpu-throttled", format!("held back in {throttled} of {periods} periods of 0.1 s"));
    }
}

fn chains(facts: &Facts, note: &mut impl FnMut(&'static str, String)) {
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

fn reverse_path(intent: &Intent, seen: &Observation, facts: &Facts) -> Option<Finding> {
    let primary = link_of(&seen.links, intent.primary_mac).filter(|_| intent.node_port && !intent.v6)?;
    // The larger of both counts: 0 off, 1 strict, 2 loose.
    let own = format!("/proc/sys/net/ipv4/conf/{}/rp_filter", primary.name);
    let values = [facts.number("/proc/sys/net/ipv4/conf/all/rp_filter"), facts.number(&own)];
    let setting = format!("net/ipv4/conf/{}/rp_filter", primary.name);
    let finding = Finding::new("rp-filter", "", format!("{setting} is 1, or that of all links"));
    (values.into_iter().flatten().max() == Some(1)).then(|| finding.mended_by(format!("sysctl -w {setting}=2")))
}

// What the node and its ENIs need of what is not ours.
fn ways(intent: &Intent, seen: &Observation, found: &mut Vec<Finding>) {
    let name = |dev: u32| seen.links.iter().find(|link| link.index == dev).map_or("?", |link| link.name.as_str());
    let primary = link_of(&seen.links, intent.primary_mac).map(|link| link.index);
    let leads = |route: &Route| {
        let default = route.table == TABLE_MAIN && route.dst.prefix_len() == 0 && route.dst.addr().is_ipv4();
        default && primary.is_none_or(|primary| route.dev == primary)
    };
    // In IPv6 mode the router tells of it again by itself.
    if !intent.v6 && !seen.routes.iter().any(leads) {
        found.push(Finding::new("default-route", "", "table main has no default route by the primary ENI"));
    }
    // The table `local` comes first, whatever leads to the pod.
    let pods = intent.pods.iter().map(|pod| (pod.address, pod.name.as_str())).gather::<Map<_, _>>();
    for address in &seen.addresses {
        if let Some(pod) = pods.get(&address.addr.addr()) {
            let (address, link) = (address.addr, name(address.dev));
            let finding = Finding::new("pod-address-taken", "", format!("{address} of pod {pod} is on {link}"));
            let who = "cloud-init, ec2-net-utils or DHCP may have added it";
            found.push(finding.mended_by(format!("ip addr del {address} dev {link} # {who}")));
        }
    }
}

// The primary ENI's link is the system's own; those that are ours the host's plan looks after.
fn primary_forwards(intent: &Intent, seen: &Observation) -> Option<Finding> {
    let passing = seen.links.iter().any(|link| link.name == "lo" && link.forwards == Some(true));
    let primary = link_of(&seen.links, intent.primary_mac).filter(|_| passing && !intent.v6)?;
    let path = format!("net/ipv4/conf/{}/forwarding", primary.name);
    let mut finding = Finding::new("link-forwarding", "", format!("{path} is 0"));
    finding.mendable = false;
    (primary.forwards == Some(false)).then(|| finding.mended_by(format!("sysctl -w {path}=1")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_of_other_plugins_that_lead_to_ours() {
        let check = |files: &[(&str, &str)], wanted: Option<(&str, Severity)>| {
            let mut facts = Facts::default();
            facts.there.insert("/etc/cni/net.d".into());
            let path = |name: &str| format!("/etc/cni/net.d/{name}");
            facts.files.extend(files.iter().map(|(name, text)| (path(name), (*text).to_owned())));
            let found = findings(None, &Observation::default(), &Settings::parse(|_| None).0, &facts);
            let found = found.iter().map(|finding| (finding.name, finding.severity)).collect::<Vec<_>>();
            assert_eq!(found, wanted.into_iter().collect::<Vec<_>>(), "{files:?}");
        };
        let ours = ("10-aws.conflist", r#"{"name": "aws-cni", "plugins": [{"type": "aws-cni"}]}"#);
        let cilium = r#"{"name": "cilium", "plugins": [{"type": "aws-cni"}, {"type": "cilium-cni"}]}"#;
        let alone = r#"{"name": "cilium", "plugins": [{"type": "cilium-cni"}]}"#;
        let led = r#"{"type": "multus-shim", "clusterNetwork": "/host/etc/cni/net.d/10-aws.conflist"}"#;
        let delegates = r#"{"type": "multus", "delegates": [{"plugins": [{"name": "x", "type":"aws-cni"}]}]}"#;
        let resource = r#"{"type": "multus", "clusterNetwork": "default"}"#;
        let (missing, order) = (("conflist-missing", Severity::Fail), ("conflist-order", Severity::Fail));
        check(&[ours], None);
        check(&[ours, ("99-loopback.conf", "{}")], None);
        check(&[], Some(missing));
        check(&[("05-cilium.conflist", cilium), ours], None);
        check(&[("05-cilium.conflist", cilium), ("10-aws.conflist.cilium_bak", ours.1)], None);
        check(&[("05-cilium.conflist", alone), ours], Some(order));
        check(&[("05-cilium.conflist", alone)], Some(missing));
        check(&[("00-multus.conf", led), ours], None);
        check(&[("00-multus.conf", led)], Some(missing));
        check(&[("00-multus.conf", delegates), ours], None);
        check(&[("00-multus.conf", resource), ours], Some(("conflist-order", Severity::Note)));
        check(&[("05-other.conflist", "{}"), ours], Some(order));
        check(&[("05-other.conflist", r#"{"name": "aws-cni"}"#), ours], Some(order));
    }
}
