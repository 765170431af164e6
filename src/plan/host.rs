//! The host's network as a value: what it should be ([`Intent`]), what it is ([`Observation`]), and the ordered steps from
//! one to the other ([`diff`]). Pure: the same two values always give the same plan, and a node that is right gives an
//! empty one, so that a restart of the daemon never disturbs a pod.
//!
//! Order (`spec/dataplane.md` 29): what is missing is added before what is wrong is deleted; nothing is deleted and added
//! again; only what is provably ours is touched.

use super::ruleset;
use crate::error::{Error, Result};
use crate::model::ids::EniId;
use crate::model::naming::{self, priority};
use crate::model::net::{Address, Family, Link, Mac, Route, Rule, Scope, TABLE_LOCAL, TABLE_MAIN};
use crate::model::nft::{SnatPorts, Table};
use crate::model::order::Gather as _;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

/// What the host's network should be.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Every assigned pod address with the table of its ENI (main for the primary).
    pub pods: Vec<(IpAddr, u32)>,
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
            mark: naming::DEFAULT_MARK,
            veth_prefix: naming::DEFAULT_VETH_PREFIX.into(),
            vpc_cidrs: Vec::new(),
            excluded_cidrs: Vec::new(),
            external_service_cidrs: Vec::new(),
            enis: Vec::new(),
            pods: Vec::new(),
            gone: Vec::new(),
            egress: Egress::Off,
        }
    }
}

/// Egress of the family that is not the cluster's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Egress {
    /// No egress addresses.
    #[default]
    Off,
    /// Egress addresses may exist and accept no new connection; nothing is translated.
    Guard,
    /// As [`Egress::Guard`], and what they send leaves as this address of the node.
    Snat(IpAddr),
}

/// A managed secondary ENI.
#[derive(Clone, Debug, PartialEq, Eq)]
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

/// What the host's network is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// All links.
    pub links: Vec<Link>,
    /// All addresses of both families.
    pub addresses: Vec<Address>,
    /// Unicast routes of both families in all tables but local.
    pub routes: Vec<Route>,
    /// All rules of both families.
    pub rules: Vec<Rule>,
    /// Our nf_tables tables.
    pub tables: Vec<Table>,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Sets the MTU (bytes) of the link with this index.
    SetMtu(u32, u32),
    /// Sets the link with this index up.
    SetUp(u32),
    /// Adds an address.
    AddAddress(Address),
    /// Deletes an address.
    DeleteAddress(Address),
    /// Adds a route or replaces the one with the same destination and metric.
    ReplaceRoute(Route),
    /// Deletes a route.
    DeleteRoute(Route),
    /// Adds a rule.
    AddRule(Rule),
    /// Deletes this very rule.
    DeleteRule(Rule),
    /// Makes our nf_tables tables exactly these, in one transaction; a family not listed loses its table.
    SetTables(Vec<Table>),
}

/// A change with its text and the ENI it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
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
    pub failed: BTreeMap<EniId, String>,
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

/// The steps that make `seen` what `intent` wants. An error when the primary ENI has no link (MAC and links are named) or
/// the rule set cannot be made.
pub fn diff(intent: &Intent, seen: &Observation) -> Result<Plan> {
    let primary = link_of(&seen.links, intent.primary_mac).ok_or_else(|| missing(intent.primary_mac, seen))?;
    let tables = ruleset::tables(intent, &primary.name)?;
    let mut planner = Planner {
        intent,
        seen,
        rules: seen.rules.iter().gather(),
        planned: BTreeSet::new(),
        add: Vec::new(),
        delete: Vec::new(),
        failed: BTreeMap::new(),
    };
    if primary.mtu != intent.eni_mtu {
        planner.add(
            None,
            Action::SetMtu(primary.index, intent.eni_mtu),
            format!("set mtu {} on {}", intent.eni_mtu, primary.name),
        );
    }
    planner.mark_rule();
    planner.local_rule();
    for eni in &intent.enis {
        planner.eni(eni);
    }
    planner.pods();
    planner.gone();
    planner.external_services();
    planner.stale_eni_rules();
    let differences = ruleset::differences(&tables, &seen.tables);
    if let Some(first) = differences.first() {
        let more = if differences.len() > 1 { format!(" (and {} more)", differences.len() - 1) } else { String::new() };
        planner.add(None, Action::SetTables(tables), format!("set nf_tables rules: {first}{more}"));
    }
    let mut steps = planner.add;
    steps.append(&mut planner.delete);
    Ok(Plan { primary: (primary.index, primary.name.clone()), steps, failed: planner.failed })
}

fn missing(mac: Mac, seen: &Observation) -> Error {
    let names = seen.links.iter().map(|link| match link.mac {
        Some(mac) => format!("{} {mac}", link.name),
        None => link.name.clone(),
    });
    Error::new(format!("no link has MAC {mac} (links: {})", names.collect::<Vec<_>>().join(", ")))
}

struct Planner<'a> {
    intent: &'a Intent,
    seen: &'a Observation,
    rules: BTreeSet<&'a Rule>,
    planned: BTreeSet<Rule>,
    add: Vec<Step>,
    delete: Vec<Step>,
    failed: BTreeMap<EniId, String>,
}

impl Planner<'_> {
    fn family(&self) -> Family {
        if self.intent.v6 { Family::V6 } else { Family::V4 }
    }

    fn add(&mut self, eni: Option<&EniId>, action: Action, text: String) {
        self.add.push(Step { eni: eni.cloned(), action, text });
    }

    fn delete(&mut self, eni: Option<&EniId>, action: Action, text: String) {
        self.delete.push(Step { eni: eni.cloned(), action, text });
    }

    fn want_rule(&mut self, eni: Option<&EniId>, rule: Rule) {
        if !self.rules.contains(&rule) && self.planned.insert(rule.clone()) {
            let text = format!("add rule {rule}");
            self.add(eni, Action::AddRule(rule), text);
        }
    }

    /// Deletes every rule seen, and not foreign, that `wrong` selects.
    fn drop_rules(&mut self, wrong: impl Fn(&Rule) -> bool) {
        let seen = self.seen;
        for rule in seen.rules.iter().filter(|rule| !rule.foreign && wrong(rule)) {
            self.delete(None, Action::DeleteRule(rule.clone()), format!("delete rule {rule}"));
        }
    }

    /// Rule 1024: marked packets leave through the primary ENI. One of another mark is a leftover of a changed setting.
    fn mark_rule(&mut self) {
        let bits = (self.intent.mark, self.intent.mark);
        let wanted = (self.intent.node_port || !self.intent.external_snat)
            .then(|| Rule { fwmark: Some(bits), ..Rule::any(self.family(), priority::MARK, TABLE_MAIN) });
        if let Some(rule) = &wanted {
            self.want_rule(None, rule.clone());
        }
        let family = self.family();
        self.drop_rules(|rule| {
            let ours = rule.fwmark.filter(|(mark, mask)| mark == mask).is_some_and(|fwmark| {
                *rule == Rule { fwmark: Some(fwmark), ..Rule::any(family, priority::MARK, TABLE_MAIN) }
            });
            ours && Some(rule) != wanted.as_ref()
        });
    }

    /// A node that once ran pod ENIs in strict mode has its local rule at 20; without any branch rule it goes back to 0.
    fn local_rule(&mut self) {
        let family = self.family();
        let moved = Rule::any(family, priority::LOCAL_MOVED, TABLE_LOCAL);
        let branch = |rule: &Rule| rule.family == family && rule.priority == priority::BRANCH;
        if self.seen.rules.contains(&moved) && !self.seen.rules.iter().any(branch) {
            self.want_rule(None, Rule::any(family, priority::LOCAL, TABLE_LOCAL));
            self.drop_rules(|rule| *rule == moved);
        }
    }

    fn eni(&mut self, eni: &HostEni) {
        let seen = self.seen;
        if eni.table == TABLE_MAIN || eni.table == TABLE_LOCAL || eni.table == 0 {
            self.failed.insert(eni.id.clone(), format!("route table {} is not one of an ENI's own", eni.table));
            return;
        }
        let Some(link) = link_of(&seen.links, eni.mac) else {
            self.failed.insert(eni.id.clone(), missing(eni.mac, seen).to_string());
            return;
        };
        let id = Some(&eni.id);
        if link.mtu != self.intent.eni_mtu {
            let text = format!("set mtu {} on {}", self.intent.eni_mtu, link.name);
            self.add(id, Action::SetMtu(link.index, self.intent.eni_mtu), text);
        }
        if !link.up {
            self.add(id, Action::SetUp(link.index), format!("set {} up", link.name));
        }
        self.eni_addresses(eni, link);
        self.eni_routes(eni, link);
        if !eni.trunk {
            self.want_rule(id, Rule::from(IpNet::from(eni.own.addr()), priority::FROM_ENI, eni.table));
        }
    }

    fn eni_addresses(&mut self, eni: &HostEni, link: &Link) {
        let seen = self.seen;
        let here = seen.addresses.iter().filter(|address| address.dev == link.index);
        let here = here.filter(|address| address.addr.addr().is_ipv4() == eni.own.addr().is_ipv4()).collect::<Vec<_>>();
        if !here.iter().any(|address| address.addr == eni.own) {
            // Without a connected route in main: where both ENIs share a subnet it would win over the primary's own.
            let address = Address { dev: link.index, addr: eni.own, no_prefix_route: true, no_dad: false };
            let text = format!("add address {} to {}", eni.own, link.name);
            self.add(Some(&eni.id), Action::AddAddress(address), text);
        }
        for address in here.into_iter().filter(|address| address.addr != eni.own && global(address.addr.addr())) {
            let text = format!("delete address {} from {}", address.addr, link.name);
            self.delete(Some(&eni.id), Action::DeleteAddress(*address), text);
        }
    }

    fn eni_routes(&mut self, eni: &HostEni, link: &Link) {
        let seen = self.seen;
        let v6 = eni.own.addr().is_ipv6();
        let gateway = Route {
            table: eni.table,
            dst: IpNet::from(eni.gateway),
            gateway: None,
            dev: link.index,
            scope: if v6 { Scope::Universe } else { Scope::Link },
            prefsrc: None,
            metric: if v6 { IPV6_METRIC } else { 0 },
        };
        let default = Route {
            dst: if v6 { IpNet::V6(ipnet::Ipv6Net::default()) } else { IpNet::V4(ipnet::Ipv4Net::default()) },
            gateway: Some(eni.gateway),
            scope: Scope::Universe,
            ..gateway
        };
        for route in [gateway, default] {
            if !seen.routes.contains(&route) {
                let text = format!("replace route {}", route_text(&route, link));
                self.add(Some(&eni.id), Action::ReplaceRoute(route), text);
            }
        }
        let subnet = eni.own.trunc();
        let connected = |route: &&Route| {
            route.table == TABLE_MAIN
                && route.dev == link.index
                && route.dst == subnet
                && route.gateway.is_none()
                && route.prefsrc.is_none_or(|source| source == eni.own.addr())
        };
        for route in seen.routes.iter().filter(connected) {
            let text = format!("delete route {}", route_text(route, link));
            self.delete(Some(&eni.id), Action::DeleteRoute(*route), text);
        }
    }

    /// Every pod address that is wired up has its way in and exactly the rule of its ENI's table. One that is not may be in
    /// the middle of an ADD, which makes them itself, or of a DEL, after which they would be left over.
    fn pods(&mut self) {
        let seen = self.seen;
        let index = PodEntries::new(seen);
        for (address, table) in &self.intent.pods {
            let host = IpNet::from(*address);
            let from = (*table != TABLE_MAIN).then(|| Rule::from(host, priority::FROM_POD, *table));
            if index.wired.contains(address) {
                for rule in from.iter().cloned().chain([Rule::to(host, priority::TO_POD, TABLE_MAIN)]) {
                    self.want_rule(None, rule);
                }
            }
            for rule in index.rules.get(address).into_iter().flatten().filter(|rule| Some(**rule) != from.as_ref()) {
                self.delete(None, Action::DeleteRule((*rule).clone()), format!("delete rule {rule}"));
            }
        }
    }

    fn gone(&mut self) {
        let alive = self.intent.pods.iter().map(|(address, _)| *address).gather::<BTreeSet<_>>();
        let gone = self.intent.gone.iter().filter(|address| !alive.contains(address)).copied().gather::<BTreeSet<_>>();
        self.drop_rules(|rule| {
            let to = rule.dst.filter(|dst| *rule == Rule::to(*dst, priority::TO_POD, TABLE_MAIN));
            let from = rule.src.filter(|src| *rule == Rule::from(*src, priority::FROM_POD, rule.table));
            to.or(from).and_then(single).is_some_and(|address| gone.contains(&address))
        });
    }

    fn external_services(&mut self) {
        let wanted = self.intent.external_service_cidrs.iter().filter(|net| net.addr().is_ipv4());
        let wanted =
            wanted.map(|net| Rule::to(net.trunc(), priority::EXTERNAL_SERVICE, TABLE_MAIN)).gather::<BTreeSet<_>>();
        for rule in &wanted {
            self.want_rule(None, rule.clone());
        }
        self.drop_rules(|rule| {
            let ours = rule
                .dst
                .filter(|dst| dst.addr().is_ipv4())
                .is_some_and(|dst| *rule == Rule::to(dst, priority::EXTERNAL_SERVICE, TABLE_MAIN));
            ours && !wanted.contains(rule)
        });
    }

    /// A rule for the own address of an ENI that is no longer here would send a pod that gets the address to a wrong table
    /// (`spec/dataplane.md` 8.4). One whose address sits on a link belongs to an ENI that somebody else runs.
    fn stale_eni_rules(&mut self) {
        let intent = self.intent;
        let seen = self.seen;
        let family = self.family();
        self.drop_rules(|rule| {
            let Some(source) = rule.src.and_then(single) else { return false };
            let ours = *rule == Rule::from(IpNet::from(source), priority::FROM_ENI, rule.table);
            let attached = intent.enis.iter().find(|eni| eni.own.addr() == source);
            rule.family == family
                && ours
                && naming::in_eni_ranges(rule.table)
                && match attached {
                    Some(eni) => !eni.trunk && eni.table != rule.table,
                    None => !seen.addresses.iter().any(|address| address.addr.addr() == source),
                }
        });
    }
}

/// The kernel's metric for IPv6 routes that name none (IP6_RT_PRIO_USER).
const IPV6_METRIC: u32 = 1024;

fn route_text(route: &Route, link: &Link) -> String {
    route.to_string().replace(&format!("dev if{}", link.index), &format!("dev {}", link.name))
}

/// The address of a /32 or /128.
fn single(net: IpNet) -> Option<IpAddr> {
    (net.prefix_len() == net.max_prefix_len()).then(|| net.addr())
}

fn global(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(link_local || address.is_loopback() || address.is_multicast() || address.is_unspecified())
}

/// Rules at 1536 by pod address, and the addresses with a route over a veth: a node has hundreds of each.
struct PodEntries<'a> {
    rules: BTreeMap<IpAddr, Vec<&'a Rule>>,
    wired: BTreeSet<IpAddr>,
}

impl<'a> PodEntries<'a> {
    fn new(seen: &'a Observation) -> Self {
        let mut rules = BTreeMap::<_, Vec<_>>::new();
        for rule in seen.rules.iter().filter(|rule| !rule.foreign) {
            if let Some(source) = rule.src.and_then(single)
                && *rule == Rule::from(IpNet::from(source), priority::FROM_POD, rule.table)
            {
                rules.entry(source).or_default().push(rule);
            }
        }
        let veths = seen.links.iter().filter(|link| link.kind.as_deref() == Some("veth"));
        let veths = veths.map(|link| link.index).gather::<BTreeSet<_>>();
        let routes = seen.routes.iter().filter(|route| route.table == TABLE_MAIN && route.gateway.is_none());
        let wired = routes.filter(|route| veths.contains(&route.dev)).filter_map(|route| single(route.dst)).gather();
        PodEntries { rules, wired }
    }
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
