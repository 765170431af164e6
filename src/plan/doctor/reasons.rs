//! Why an entry of ours is there: the comment at the end of its line.

use super::rules::foreign;
use super::single;
use crate::model::map::Map;
use crate::model::naming::priority;
use crate::model::net::{Family, Route, Rule, TABLE_LOCAL, TABLE_MAIN};
use crate::model::order::Gather as _;
use crate::plan::egress;
use crate::plan::host::{HostEni, HostPod, Intent};
use std::net::IpAddr;

/// The intent, arranged for look-ups.
pub struct Reasons<'a> {
    intent: &'a Intent,
    pods: Map<IpAddr, &'a HostPod>,
    tables: Map<u32, &'a HostEni>,
}

/// Whose an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Ours, for this reason.
    Ours(String),
    /// The kernel's own.
    Kernel,
    /// Somebody else's that concerns us, for this reason.
    Foreign(&'static str),
    /// Somebody else's.
    Other,
}

impl<'a> Reasons<'a> {
    /// Of this intent.
    pub fn new(intent: &'a Intent) -> Self {
        Reasons {
            intent,
            pods: intent.pods.iter().map(|pod| (pod.address, pod)).gather(),
            tables: intent.enis.iter().map(|eni| (eni.table, eni)).gather(),
        }
    }

    fn pod(&self, address: IpAddr) -> String {
        match self.pods.get(&address) {
            Some(pod) if pod.name.is_empty() => "a pod without a name".into(),
            Some(pod) => format!("pod {}", pod.name),
            None if self.intent.gone.contains(&address) => "a pod that is gone".into(),
            None => "no pod that is known".into(),
        }
    }

    fn table(&self, table: u32) -> String {
        match self.tables.get(&table) {
            Some(eni) => format!("{}, card {}, device {}", eni.id, eni.card, eni.device),
            None => format!("table {table} of no ENI that is known"),
        }
    }

    /// Of a rule.
    pub fn rule(&self, rule: &Rule) -> Whose {
        let ours = !rule.foreign && !foreign(rule);
        let address = rule.dst.or(rule.src).and_then(single);
        let reason = match (rule.priority, address) {
            (priority::LOCAL | 32_766 | 32_767, None) if !rule.foreign => return Whose::Kernel,
            (priority::LOCAL_MOVED, None) if ours || rule.table == TABLE_LOCAL => {
                "local addresses, behind branch ENIs".into()
            }
            (priority::BRANCH, _) if ours => "a pod with a branch ENI".into(),
            (priority::TO_POD, Some(address)) if ours => format!("{}: way in", self.pod(address)),
            (priority::FROM_POD, Some(address)) if ours => {
                format!("{}: way out by {}", self.pod(address), self.table(rule.table))
            }
            (priority::MARK, _) if ours && rule.fwmark == Some((self.intent.mark, self.intent.mark)) => {
                "what came in or is to leave by the primary ENI".into()
            }
            (priority::EXTERNAL_SERVICE, _) if ours => "external service CIDR".into(),
            (priority::FROM_ENI, Some(_)) if ours => format!("own address of {}", self.table(rule.table)),
            _ if rule.fwmark.is_some_and(|(mark, mask)| (mark | mask) & self.intent.mark != 0) => {
                return Whose::Foreign("uses our mark");
            }
            _ if matches!(rule.table, 30_200 | 30_400) => return Whose::Foreign("nm-cloud-setup"),
            _ if foreign(rule) => return Whose::Foreign("decides before ours"),
            _ => return Whose::Other,
        };
        Whose::Ours(reason)
    }

    /// Of a route.
    pub fn route(&self, route: &Route) -> Whose {
        if let Some(eni) = self.tables.get(&route.table) {
            return Whose::Ours(format!("{}, device {}", eni.id, eni.device));
        }
        match single(route.dst).filter(|_| route.table == TABLE_MAIN && route.gateway.is_none()) {
            Some(address) if self.pods.contains_key(&address) => Whose::Ours(self.pod(address)),
            Some(address) if egress::range(Family::of(address)).contains(&address) => {
                Whose::Ours("a pod's way out in the other family".into())
            }
            _ if matches!(route.table, 30_200 | 30_400) => Whose::Foreign("nm-cloud-setup"),
            _ => Whose::Other,
        }
    }
}
