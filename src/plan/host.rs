//! The host's network as a value: what it should be ([`Intent`]), what it is ([`Observation`]), and the ordered steps from
//! one to the other ([`diff`]). Pure: the same two values always give the same plan, and a node that is right gives an
//! empty one, so that a restart of the daemon never disturbs a pod.
//!
//! Order (`spec/dataplane.md` 29): what is missing is added before what is wrong is deleted; nothing is deleted and added
//! again; only what is provably ours is touched.

mod branches;
mod egress;
mod enis;
mod leftovers;
mod planner;
mod pods;

pub use self::branches::gateway_rule;
pub use self::egress::Fresh;
pub use self::leftovers::{Idle, regrets};
use self::planner::Planner;
pub use self::planner::main_rules;
pub(super) use self::{
    enis::{global, is_connected, leads_out, to_eni},
    leftovers::strangers,
    planner::{leads_to_main, serves},
    pods::{diverted, made_with, source, strange_mac, veths_of},
};
use super::branch::Branch;
use super::egress::{HostEnd, lives};
use super::ruleset;
use crate::error::{Error, Result};
use crate::model::ids::EniId;
use crate::model::map::Map;
use crate::model::naming;
use crate::model::net::{Address, Barrier, Family, Link, Mac, Neighbour, Route, Rule};
use crate::model::nft::{SnatPorts, Table};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr};

/// What the host's network should be. The daemon tells it to `enibox doctor` as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a setting of its own")]
pub struct Intent {
    /// IPv6 mode.
    pub v6: bool,
    /// Primary address of the primary ENI, in the mode's family.
    pub node_ip: IpAddr,
    /// MAC of the primary ENI.
    pub primary_mac: Mac,
    /// MTU of every ENI, in bytes.
    pub eni_mtu: u32,
    /// Somebody else does SNAT (AWS_VPC_K8S_CNI_EXTERNALSNAT).
    pub external_snat: bool,
    /// NodePort through the primary ENI (AWS_VPC_CNI_NODE_PORT_SUPPORT).
    pub node_port: bool,
    /// How SNAT picks ports.
    pub snat_ports: SnatPorts,
    /// No SNAT for what has the primary address already, nor for what leaves by a secondary ENI (ENIBOX_KEEP_HOST_SOURCE).
    pub keep_host_source: bool,
    /// Connmark, value and mask in one; not 0.
    pub mark: u32,
    /// Prefix of host veths, 1 to 4 bytes.
    pub veth_prefix: String,
    /// CIDRs of the VPC.
    pub vpc_cidrs: Vec<IpNet>,
    /// CIDRs that are not SNATed either.
    pub excluded_cidrs: Vec<IpNet>,
    /// CIDRs reached through main even by pods of secondary ENIs.
    pub external_service_cidrs: Vec<IpNet>,
    /// The managed secondary ENIs that are attached (never the primary).
    pub enis: Vec<HostEni>,
    /// Every assigned pod address.
    pub pods: Vec<HostPod>,
    /// Pods with a branch ENI of their own, as far as the API server has told of them.
    pub branches: Vec<HostBranch>,
    /// New pods with a branch ENI are wired in strict mode: the rule for local addresses stands behind theirs.
    pub strict_branches: bool,
    /// Addresses of pods that are gone: their rules are leftovers.
    pub gone: Vec<IpAddr>,
    /// The other family's way out (`spec/dataplane.md` 22.3).
    pub egress: Egress,
}

impl Default for Intent {
    /// The defaults of the settings, with no ENI and no address known.
    fn default() -> Self {
        Intent {
            v6: false,
            node_ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            primary_mac: Mac::default(),
            eni_mtu: 9001,
            external_snat: false,
            node_port: true,
            snat_ports: SnatPorts::FullyRandom,
            keep_host_source: false,
            mark: naming::DEFAULT_MARK,
            veth_prefix: naming::DEFAULT_VETH_PREFIX.into(),
            vpc_cidrs: Vec::new(),
            excluded_cidrs: Vec::new(),
            external_service_cidrs: Vec::new(),
            enis: Vec::new(),
            pods: Vec::new(),
            branches: Vec::new(),
            strict_branches: false,
            gone: Vec::new(),
            egress: Egress::Off,
        }
    }
}

/// Egress of the family that is not the cluster's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Egress {
    /// No egress addresses.
    #[default]
    Off,
    /// Egress addresses may exist and accept no new connection; nothing is translated.
    Guard,
    /// As [`Egress::Guard`], and what they send leaves as this address of the node.
    Snat(IpAddr),
    /// Switched off: no new pod gets such an address. Those of before go on as with [`Egress::Snat`] until the last of them is
    /// gone; a pod keeps its link and its default route, and without a translation the VPC would drop what it sends.
    Ending(IpAddr),
}

impl Intent {
    /// What of [`Intent::egress`] counts on a node with these links: never [`Egress::Ending`].
    pub fn egress_beside(&self, links: &[Link]) -> Egress {
        let Egress::Ending(own) = self.egress else { return self.egress };
        match lives(Family::of(own), links) {
            true => Egress::Snat(own),
            // In IPv6 mode the guard is always there (`spec/dataplane.md` 11.1, 21).
            false if self.v6 => Egress::Guard,
            false => Egress::Off,
        }
    }
}

/// A managed secondary ENI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostEni {
    /// Its id, for reports.
    pub id: EniId,
    /// MAC: how its link is found.
    pub mac: Mac,
    /// Network card.
    pub card: u32,
    /// Device index on the card.
    pub device: u32,
    /// Its primary address with the subnet's prefix length.
    pub own: IpNet,
    /// Gateway of its subnet.
    pub gateway: IpAddr,
    /// Its route table, never main ([`naming::table_of`]).
    pub table: u32,
    /// Carries branch ENIs: no rule for its own address.
    pub trunk: bool,
}

/// An address of a pod whose ADD is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPod {
    /// The address.
    pub address: IpAddr,
    /// Table of its ENI; main for the primary.
    pub table: u32,
    /// The pod, as `namespace/name`, for reports; empty if the runtime did not tell.
    pub name: String,
    /// The eleven digits that the name of its host veth ends in ([`naming::suffix`]), whatever the prefix was then; empty if
    /// the pod has no name.
    pub veth: String,
}

/// A pod with a branch ENI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostBranch {
    /// Its address.
    pub address: IpAddr,
    /// The branch ENI.
    pub eni: Branch,
    /// The pod, as `namespace/name`.
    pub name: String,
    /// The eleven digits that the name of its host veth ends in.
    pub veth: String,
}

/// What the host's network is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// All links.
    pub links: Vec<Link>,
    /// All addresses of both families.
    pub addresses: Vec<Address>,
    /// Unicast routes of both families in all tables but local.
    pub routes: Vec<Route>,
    /// Routes that let nothing through, of both families in all tables.
    pub barriers: Vec<Barrier>,
    /// Neighbour entries for which the kernel asks nobody, but those of groups.
    pub neighbours: Vec<Neighbour>,
    /// MACs of the other ends of veths that have such an entry, as far as they are known.
    pub peers: Map<u32, Mac>,
    /// All rules of both families.
    pub rules: Vec<Rule>,
    /// Our nf_tables tables.
    pub tables: Vec<Table>,
    /// Those of [`sysctls`] that this kernel has, with their values.
    pub sysctls: Map<String, String>,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Makes the VLAN device of a branch ENI on the trunk's link with this index, down.
    AddVlan(Branch, u32),
    /// Deletes the link with this index.
    DeleteLink(u32),
    /// Sets the MTU (bytes) of the link with this index.
    SetMtu(u32, u32),
    /// Sets the link with this index up, where neighbours are asked for their MACs.
    SetUp(u32),
    /// Sets the hardware address of the link with this index.
    SetMac(u32, Mac),
    /// Notes on the veth with this index what it was made with, as its alias.
    NoteEgress(u32, HostEnd),
    /// Notes MAC, MTU (bytes) and name on the veth with this index, as its alias ([`naming::veth_alias`]).
    NoteVeth(u32, Mac, u32, String),
    /// Gives the link with this index this name, which no other has.
    Rename(u32, String),
    /// Makes the sysctl of this path hold this value.
    SetSysctl(String, String),
    /// Adds an address.
    AddAddress(Address),
    /// Deletes an address.
    DeleteAddress(Address),
    /// Adds a route or replaces the one with the same destination and metric.
    ReplaceRoute(Route),
    /// Deletes a route.
    DeleteRoute(Route),
    /// Deletes a route that lets nothing through.
    DeleteBarrier(Barrier),
    /// Deletes the neighbour entry of an address on the link with this index.
    DeleteNeighbour(u32, IpAddr),
    /// Adds a rule.
    AddRule(Rule),
    /// Deletes this very rule.
    DeleteRule(Rule),
    /// Makes our nf_tables tables exactly these, in one transaction; a family not listed loses its table.
    SetTables(Vec<Table>),
}

impl Action {
    /// Whether it takes something away that rules, routes or addresses may stand in for.
    pub fn deletes(&self) -> bool {
        matches!(
            self,
            Action::DeleteAddress(_)
                | Action::DeleteRoute(_)
                | Action::DeleteBarrier(_)
                | Action::DeleteNeighbour(..)
                | Action::DeleteRule(_)
                | Action::DeleteLink(_)
        )
    }

    /// The single address that a rule or route to be added or deleted is about.
    pub fn address(&self) -> Option<IpAddr> {
        match self {
            Action::AddRule(rule) | Action::DeleteRule(rule) => single(rule.src.or(rule.dst)?),
            Action::ReplaceRoute(route) | Action::DeleteRoute(route) => single(route.dst),
            _ => None,
        }
    }
}

/// What a step mends: the label `what` of the counter of repairs, and the name of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// MTU of the primary ENI's link.
    PrimaryMtu,
    /// The rule for marked packets at 1024.
    MarkRule,
    /// The rule `lookup local`, at 0 or moved to 20.
    LocalRule,
    /// The rule `lookup main` at 32766.
    MainRule,
    /// A rule for an external service CIDR at 1535.
    ServiceRule,
    /// MTU of a secondary ENI's link.
    EniMtu,
    /// A secondary ENI's link that is down.
    EniLink,
    /// An address on a secondary ENI's link.
    EniAddress,
    /// A route of a secondary ENI, in its table or in main.
    EniRoute,
    /// The rule for an ENI's own address at 32765.
    EniRule,
    /// The rule to a pod at 512.
    ToPodRule,
    /// The rule from a pod at 1536.
    FromPodRule,
    /// The state of a branch ENI's VLAN device.
    BranchLink,
    /// A route in the table of a branch ENI.
    BranchRoute,
    /// A rule to the table of a branch ENI, at 10, or one that a former pod has left.
    BranchRule,
    /// A branch ENI's VLAN device that a former pod has left.
    BranchLeftover,
    /// The rule for the VPC's IPv6 router at 0.
    GatewayRule,
    /// The route to a pod in main.
    PodRoute,
    /// The host's end of a pod's veth that is down.
    PodLink,
    /// Name of the host's end of a pod's veth, which rules for traffic of pods go by.
    PodName,
    /// MAC of the host's end of a pod's veth, which the pod has as its gateway's.
    PodMac,
    /// MTU of the host's end of a pod's veth.
    PodMtu,
    /// A neighbour entry that names another MAC for a pod than it has, and for which the kernel asks nobody.
    PodNeighbour,
    /// What a pod's veth of the original's was made with is noted nowhere.
    PodNote,
    /// Name, state, MAC or MTU of the host's end of a pod's way out in the other family.
    EgressLink,
    /// That end's own address, which the pod has as its gateway.
    EgressAddress,
    /// The route to a pod's address of the other family.
    EgressRoute,
    /// Rules of a pod that is gone.
    GonePod,
    /// A sysctl.
    Sysctl,
    /// Forwarding of what comes in by a link of ours.
    LinkForwarding,
    /// An IPv6 setting of a pod's veth or VLAN device.
    LinkSysctl,
    /// Our nf_tables tables.
    Ruleset,
}

impl What {
    /// In lower case with hyphens.
    pub fn name(self) -> &'static str {
        match self {
            What::PrimaryMtu => "primary-mtu",
            What::MarkRule => "mark-rule",
            What::LocalRule => "local-rule",
            What::MainRule => "main-rule",
            What::ServiceRule => "service-rule",
            What::EniMtu => "eni-mtu",
            What::EniLink => "eni-link",
            What::EniAddress => "eni-address",
            What::EniRoute => "eni-route",
            What::EniRule => "eni-rule",
            What::ToPodRule => "to-pod-rule",
            What::FromPodRule => "from-pod-rule",
            What::BranchLink => "branch-link",
            What::BranchRoute => "branch-route",
            What::BranchRule => "branch-rule",
            What::BranchLeftover => "branch-leftover",
            What::GatewayRule => "gateway-rule",
            What::PodRoute => "pod-route",
            What::PodLink => "pod-link",
            What::PodName => "veth-name",
            What::PodMac => "pod-mac",
            What::PodMtu => "pod-mtu",
            What::PodNeighbour => "host-neighbour",
            What::PodNote => "pod-note",
            What::EgressLink => "egress-link",
            What::EgressAddress => "egress-address",
            What::EgressRoute => "egress-route",
            What::GonePod => "gone-pod",
            What::Sysctl => "sysctl",
            What::LinkForwarding => "link-forwarding",
            What::LinkSysctl => "link-sysctl",
            What::Ruleset => "ruleset",
        }
    }
}

/// A change with its text and what it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What it mends.
    pub what: What,
    /// The ENI that cannot be used when this fails; absent for what concerns the node.
    pub eni: Option<EniId>,
    /// The change.
    pub action: Action,
    /// What it does, for logs and errors: `add address 10.20.12.5/24 to eth1`.
    pub text: String,
}

/// The way from an observation to an intent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Link of the primary ENI: index and name.
    pub primary: (u32, String),
    /// Steps in order; empty when all is right.
    pub steps: Vec<Step>,
    /// ENIs that cannot be set up yet, with the reason; they do not hold up the rest.
    pub failed: Map<EniId, String>,
}

/// The link of an ENI: that MAC, and not stacked on another link nor part of a bridge or bond, whose MACs may be copies.
pub fn link_of(links: &[Link], mac: Mac) -> Option<&Link> {
    let stacked = |link: &Link| {
        let copies = ["vlan", "macvlan", "ipvlan", "macvtap", "bridge", "bond", "team"];
        link.master.is_some()
            || link.kind.as_deref().is_some_and(|kind| copies.contains(&kind))
            || (link.parent.is_some() && link.kind.as_deref() != Some("veth"))
    };
    links.iter().find(|link| link.mac == Some(mac) && !stacked(link))
}

/// The sysctls that the data plane needs on a node with these links, of which the primary ENI's has this name
/// (`spec/dataplane.md` 4): path below `/proc/sys`, and value. The init container writes them; others change them back.
pub fn sysctls(intent: &Intent, primary: &str, links: &[Link]) -> Vec<(String, &'static str)> {
    let egress = intent.egress_beside(links);
    let forwarding = |family| forwarding(intent.v6, egress, family);
    // Loose: answers to NodePort connections leave through the primary ENI for pods of others.
    let mut wanted = vec![(format!("net/ipv4/conf/{primary}/rp_filter"), "2")];
    if intent.v6 {
        // For all links first: that one changes those of the single links too.
        wanted.extend(["all", primary].map(|name| (format!("net/ipv6/conf/{name}/disable_ipv6"), "0")));
    }
    wanted.extend([Family::V4, Family::V6].into_iter().filter_map(|family| Some((forwarding(family)?.into(), "1"))));
    if forwarding(Family::V6).is_some() {
        // With forwarding on, 1 would mean that router advertisements are not listened to.
        wanted.push((format!("net/ipv6/conf/{primary}/accept_ra"), "2"));
    }
    wanted
}

/// The sysctl that lets packets of the family through, if it is ours. In IPv4 mode IPv4's is the system's own, which the doctor
/// looks at. What is ending counts as if pods of before were there.
pub(super) fn forwarding(v6: bool, egress: Egress, family: Family) -> Option<&'static str> {
    let translated = matches!(egress, Egress::Snat(_) | Egress::Ending(_));
    match family {
        Family::V4 => (v6 && translated).then_some("net/ipv4/ip_forward"),
        Family::V6 => (v6 || egress != Egress::Off).then_some("net/ipv6/conf/all/forwarding"),
    }
}

/// The steps that make `seen` what `intent` wants. An error when the primary ENI has no link (MAC and links are named) or
/// the rule set cannot be made.
pub fn diff(intent: &Intent, seen: &Observation) -> Result<Plan> {
    let primary = link_of(&seen.links, intent.primary_mac).ok_or_else(|| missing(intent.primary_mac, &seen.links))?;
    let links = egress::told(seen);
    let tables = ruleset::tables(intent, &primary.name, &links)?;
    let mut planner = Planner::new(intent, seen);
    if primary.mtu != intent.eni_mtu {
        planner.add(
            What::PrimaryMtu,
            None,
            Action::SetMtu(primary.index, intent.eni_mtu),
            format!("set mtu {} on {}", intent.eni_mtu, primary.name),
        );
    }
    for (path, value) in sysctls(intent, &primary.name, &links) {
        if let Some(there) = seen.sysctls.get(&path).filter(|there| *there != value) {
            let text = format!("set sysctl {path} to {value} instead of {there}");
            planner.add(What::Sysctl, None, Action::SetSysctl(path, value.into()), text);
        }
    }
    planner.mark_rule();
    planner.local_rule();
    planner.add.extend(main_rules(&seen.rules, serves(intent, Family::V6)));
    for eni in &intent.enis {
        planner.eni(eni);
    }
    let branches = planner.branches();
    planner.stale_branch_rules();
    planner.stale_devices();
    planner.pods(&branches);
    planner.egress();
    planner.young();
    planner.gone();
    planner.external_services();
    planner.stale_eni_rules();
    let differences = ruleset::differences(&tables, &seen.tables);
    if let Some(first) = differences.first() {
        let more = if differences.len() > 1 { format!(" (and {} more)", differences.len() - 1) } else { String::new() };
        planner.add(What::Ruleset, None, Action::SetTables(tables), format!("set nf_tables rules: {first}{more}"));
    }
    let mut steps = planner.add;
    steps.append(&mut planner.delete);
    Ok(Plan { primary: (primary.index, primary.name.clone()), steps, failed: planner.failed })
}

/// Of these steps, those that make what the pods of the intent have on the host. Of the intent nothing else is needed.
pub fn wiring(intent: &Intent, seen: &Observation) -> Vec<Step> {
    let mut planner = Planner::new(intent, seen);
    let branches = planner.branches();
    planner.pods(&branches);
    let mut steps = planner.add;
    steps.append(&mut planner.delete);
    steps
}

/// The error when [`link_of`] finds none: names the MAC, and the links that there are with theirs.
pub fn missing(mac: Mac, links: &[Link]) -> Error {
    let names = links.iter().map(|link| match link.mac {
        Some(mac) if link.master.is_some() => format!("{} {mac} in a bridge or bond", link.name),
        Some(mac) => format!("{} {mac}", link.name),
        None => link.name.clone(),
    });
    Error::new(format!("no link has MAC {mac} (links: {})", names.collect::<Vec<_>>().join(", ")))
}

/// The address of a /32 or /128.
pub(super) fn single(net: IpNet) -> Option<IpAddr> {
    (net.prefix_len() == net.max_prefix_len()).then(|| net.addr())
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
