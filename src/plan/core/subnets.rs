//! Where new ENIs go and which ENIs are not for pods: the subnets of the node's zone, their tags and what is known of
//! their free addresses (`spec/aws.md` 8.2, `spec/config.md` 6.2, `spec/ipamd.md` 7.6).
//!
//! Whether a subnet is for pods can change at any time. It is asked again when pods come and go; a node on which nothing
//! happens asks nobody. What EC2 will not tell is taken as nothing excluded (B35).

use super::{Core, Level, Op, Timer};
use crate::model::ec2::{Call, Failure, Reply, Subnet};
use crate::model::ids::SubnetId;
use crate::model::map::Set;
use crate::model::order::{self, Gather as _};
use crate::model::time::Mono;
use crate::plan::pool::Eni;
use std::time::Duration;

/// How long a subnet without free addresses is left alone (`spec/ipamd.md` 6.1, per subnet by B23).
const EXHAUSTED: Duration = Duration::from_mins(2);
/// How long a list of subnets is good (`spec/aws.md` 8.2).
const SUBNETS_AGE_MAX: Duration = Duration::from_mins(5);

/// How often tags of subnets are looked at while pods come and go (B36).
const JUDGE_EVERY: Duration = Duration::from_mins(10);

/// Which subnets are not for pods, by their tags.
#[derive(Debug, Default)]
pub(super) struct Judgement {
    // What EC2 said last, be it before the restart.
    excluded: Option<Set<SubnetId>>,
    // When EC2 answered or refused to.
    last: Option<Mono>,
    // It was told that EC2 does not answer.
    complained: bool,
}

impl Judgement {
    /// One that was made before the restart.
    pub(super) fn restored(excluded: Option<Set<SubnetId>>, now: Mono) -> Judgement {
        Judgement { last: excluded.as_ref().map(|_| now), excluded, complained: false }
    }

    /// For the checkpoint.
    pub(super) fn excluded(&self) -> Option<Set<SubnetId>> {
        self.excluded.clone()
    }
}

impl Core {
    // Subnet exclusion goes with subnet discovery. In IPv6 mode excluded ENIs are left out from the start.
    fn judges_subnets(&self) -> bool {
        self.config.subnet_discovery && !self.config.imds_only && !self.config.v6
    }

    /// Whether it is known which ENIs are for pods, or has been waited for long enough.
    pub(super) fn subnets_judged(&self) -> bool {
        let judgement = &self.judgement;
        let heard = judgement.excluded.is_some() || judgement.last.is_some();
        heard || !self.judges_subnets() || !self.timers.contains_key(&Timer::Trust)
    }

    // Whether the tags of a subnet keep pods out of it.
    fn excludes(&self, subnet: &SubnetId) -> bool {
        self.judges_subnets() && self.judgement.excluded.as_ref().is_some_and(|excluded| excluded.contains(subnet))
    }

    /// Whether no new pod is to be put on an ENI: its subnet is not for pods, or it is the primary one with custom
    /// networking (B31).
    pub(super) fn not_for_pods(&self, eni: &Eni) -> bool {
        (eni.primary && self.config.custom_networking.is_some()) || self.excludes(&eni.subnet)
    }

    /// Asks for the tags of the subnets if nothing is known of them.
    pub(super) fn judge_first(&mut self) {
        if self.judges_subnets() && self.judgement.excluded.is_none() {
            self.ask_subnets();
        }
    }

    /// A pod came or went: asks for them again if the last time is long enough ago.
    pub(super) fn judge_again(&mut self) {
        let old = self.judgement.last.is_some_and(|at| self.now.mono.since(at) >= JUDGE_EVERY);
        if old && self.judges_subnets() {
            self.ask_subnets();
        }
    }

    fn judge(&mut self, subnets: Option<&[Subnet]>) {
        if !self.judges_subnets() {
            return;
        }
        if let Some(subnets) = subnets {
            let excluded = subnets.iter().filter(|subnet| excluded(subnet, &self.config.cluster_name));
            let excluded: Set<SubnetId> = excluded.map(|subnet| subnet.id.clone()).gather();
            if self.judgement.excluded.as_ref() != Some(&excluded) {
                self.judgement.excluded = Some(excluded);
                self.changed();
            }
            self.mark_excluded();
        }
        self.judgement.last = Some(self.now.mono);
    }

    fn mark_excluded(&mut self) {
        let wrong = self.pool.enis().filter(|(_, eni)| eni.excluded != self.not_for_pods(eni));
        for (id, excluded) in wrong.map(|(id, eni)| (id.clone(), !eni.excluded)).collect::<Vec<_>>() {
            let verdict = if excluded { "not for new pods any more" } else { "for pods again" };
            self.log(Level::Info, format!("eni {id}: by the tags of its subnet {verdict}"));
            self.pool.set_excluded(&id, excluded);
        }
    }

    fn ask_subnets(&mut self) {
        if !self.ops.values().any(|op| *op == Op::Subnets) {
            let identity = &self.config.identity;
            let call = Call::DescribeSubnets { vpc: identity.vpc.clone(), zone: identity.zone.clone() };
            self.ask_ec2(Op::Subnets, call);
        }
    }

    /// Whether a subnet can be chosen now; asks for what is missing if not.
    pub(super) fn place_known(&mut self) -> bool {
        if self.config.custom_networking.is_some() {
            return self.eni_config_known();
        }
        let fresh = self.subnets.as_ref().is_some_and(|(at, _)| self.now.mono.since(*at) < SUBNETS_AGE_MAX);
        if !fresh {
            self.ask_subnets();
        }
        fresh
    }

    pub(super) fn subnets_done(&mut self, result: Result<Reply, Failure>) {
        let subnets = match result {
            Ok(Reply::Subnets(subnets)) => {
                self.judgement.complained = false;
                Some(subnets)
            }
            Ok(reply) => {
                self.log(Level::Error, format!("EC2 answered {reply:?} to DescribeSubnets"));
                None
            }
            Err(failure) => {
                // Without leave to look for others, the primary ENI's subnet is the one to use (`spec/aws.md` 8.2).
                let level = if self.judgement.complained { Level::Debug } else { Level::Warn };
                self.judgement.complained = true;
                let text = format!("look for subnets: {failure}; using the primary ENI's, and none is excluded");
                self.log(level, text);
                None
            }
        };
        self.judge(subnets.as_deref());
        self.subnets = Some((self.now.mono, subnets));
    }

    /// The subnet for a new ENI: most free addresses first among those that may be used (`spec/aws.md` 8.2).
    pub(super) fn choose_subnet(&self, prefixes: bool) -> Option<SubnetId> {
        let primary = &self.config.identity.subnet;
        let now = self.now.mono;
        let closed = |id: &SubnetId| prefixes && self.fragmented.closed(id, now);
        let open = |id: &SubnetId| !self.exhausted.contains_key(id) && !closed(id);
        if self.config.custom_networking.is_some() {
            let config = self.cluster.eni_config.as_ref();
            return config.map(|(_, config)| config.subnet.clone()).filter(open);
        }
        match &self.subnets {
            Some((_, Some(subnets))) if self.config.subnet_discovery => {
                let mut valid: Vec<&Subnet> = subnets
                    .iter()
                    .filter(|s| open(&s.id) && usable_subnet(s, primary, &self.config.cluster_name))
                    .collect();
                order::sort_by_key(&mut valid, |subnet| std::cmp::Reverse(subnet.free));
                valid.first().map(|subnet| subnet.id.clone())
            }
            // Without discovery its tags may still forbid the primary ENI's subnet (`spec/config.md` 5.9).
            Some((_, Some(subnets))) => {
                let cluster = &self.config.cluster_name;
                let refused = subnets.iter().any(|subnet| subnet.id == *primary && excluded(subnet, cluster));
                Some(primary.clone()).filter(open).filter(|_| !refused)
            }
            _ => Some(primary.clone()).filter(open),
        }
    }

    /// Leaves a subnet alone that has no free address.
    pub(super) fn exhaust(&mut self, subnet: SubnetId, failure: &Failure) {
        self.log(Level::Warn, format!("subnet {subnet} is left alone for {} s: {failure}", EXHAUSTED.as_secs()));
        let until = self.now.mono.plus(EXHAUSTED);
        self.exhausted.insert(subnet, until);
        self.subnets = None; // its figures of free addresses are out of date
        self.wake_for(Timer::Shrink, until);
    }
}

/// Whether new ENIs may be put into a subnet (`spec/aws.md` 8.2 "Valid subnet").
fn usable_subnet(subnet: &Subnet, primary: &SubnetId, cluster: &str) -> bool {
    let tagged = role(subnet).is_some_and(|role| !role.is_empty());
    !excluded(subnet, cluster) && (tagged || subnet.id == *primary)
}

fn role(subnet: &Subnet) -> Option<&str> {
    subnet.tags.get("kubernetes.io/role/cni").map(String::as_str)
}

/// Whether the tags of a subnet say that it is not for pods of this cluster.
fn excluded(subnet: &Subnet, cluster: &str) -> bool {
    const CLUSTER_TAG: &str = "cni.networking.k8s.aws/cluster/";
    match role(subnet) {
        Some("0") => true,
        None | Some("") => false,
        Some(_) => {
            let mut clusters = subnet.tags.keys().filter_map(|key| key.strip_prefix(CLUSTER_TAG)).peekable();
            !cluster.is_empty() && clusters.peek().is_some() && !clusters.any(|name| name == cluster)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_decide_whether_a_subnet_is_for_pods() {
        let other = "cni.networking.k8s.aws/cluster/other";
        let ours = "cni.networking.k8s.aws/cluster/ours";
        let role = "kubernetes.io/role/cni";
        // (tags, our cluster, usable as the primary one, usable as another, excluded)
        for (tags, cluster, primary, secondary, out) in [
            (vec![], "ours", true, false, false),
            (vec![(role, "")], "ours", true, false, false),
            (vec![(role, "0")], "ours", false, false, true),
            (vec![(role, "1")], "ours", true, true, false),
            (vec![(role, "1"), (other, "x")], "ours", false, false, true),
            (vec![(role, "1"), (other, "x")], "", true, true, false),
            (vec![(role, "1"), (other, "x"), (ours, "")], "ours", true, true, false),
            (vec![(other, "x")], "ours", true, false, false),
        ] {
            let tags = tags.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
            let subnet = Subnet { id: "subnet-1".into(), free: 9, tags };
            let usable = |primary: &str| usable_subnet(&subnet, &primary.into(), cluster);
            let found = (usable("subnet-1"), usable("subnet-2"), excluded(&subnet, cluster));
            assert_eq!(found, (primary, secondary, out), "{subnet:?} in {cluster:?}");
        }
    }
}
