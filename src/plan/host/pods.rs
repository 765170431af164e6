//! Entries of pods in shared tables, which the plugin makes and the daemon watches (`spec/dataplane.md` 9).

use super::planner::Planner;
use super::{Action, HostPod, Observation, What, single};
use crate::model::naming::priority;
use crate::model::net::{Rule, TABLE_MAIN};
use crate::model::order::Gather as _;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

impl Planner<'_> {
    /// Every pod address that is wired up has its way in and exactly the rule of its ENI's table. One that is not may be in
    /// the middle of an ADD, which makes them itself, or of a DEL, after which they would be left over.
    pub(super) fn pods(&mut self, branches: &[HostPod]) {
        let seen = self.seen;
        let index = PodEntries::new(seen);
        for HostPod { address, table, .. } in self.intent.pods.iter().chain(branches) {
            let host = IpNet::from(*address);
            let from = (*table != TABLE_MAIN).then(|| Rule::from(host, priority::FROM_POD, *table));
            if index.wired.contains(address) {
                if let Some(rule) = &from {
                    self.want_rule(What::FromPodRule, None, rule.clone());
                }
                self.want_rule(What::ToPodRule, None, Rule::to(host, priority::TO_POD, TABLE_MAIN));
            }
            for rule in index.rules.get(address).into_iter().flatten().filter(|rule| Some(**rule) != from.as_ref()) {
                self.delete(
                    What::FromPodRule,
                    None,
                    Action::DeleteRule((*rule).clone()),
                    format!("delete rule {rule}"),
                );
            }
        }
    }

    pub(super) fn gone(&mut self) {
        let pods = self.intent.pods.iter().map(|pod| pod.address);
        let alive = pods.chain(self.intent.branches.iter().map(|pod| pod.address)).gather::<BTreeSet<_>>();
        let gone = self.intent.gone.iter().filter(|address| !alive.contains(address)).copied().gather::<BTreeSet<_>>();
        self.drop_rules(What::GonePod, |rule| {
            let to = rule.dst.filter(|dst| *rule == Rule::to(*dst, priority::TO_POD, TABLE_MAIN));
            let from = rule.src.filter(|src| *rule == Rule::from(*src, priority::FROM_POD, rule.table));
            to.or(from).and_then(single).is_some_and(|address| gone.contains(&address))
        });
    }
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
