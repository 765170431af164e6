//! Where new ENIs go: the subnets of the node's zone, their tags and what is known of their free addresses
//! (`spec/aws.md` 8.2, `spec/config.md` 6.2).

use super::{Core, Level, Op, Timer};
use crate::model::ec2::{Call, Failure, Reply, Subnet};
use crate::model::ids::SubnetId;
use crate::model::order;
use std::time::Duration;

/// How long a subnet without free addresses is left alone (`spec/ipamd.md` 6.1, per subnet by B23).
const EXHAUSTED: Duration = Duration::from_mins(2);
/// How long a list of subnets is good (`spec/aws.md` 8.2).
const SUBNETS_AGE_MAX: Duration = Duration::from_mins(5);

impl Core {
    /// Whether a subnet can be chosen now; asks for what is missing if not.
    pub(super) fn place_known(&mut self) -> bool {
        if self.config.custom_networking.is_some() {
            return self.eni_config_known();
        }
        let fresh = self.subnets.as_ref().is_some_and(|(at, _)| self.now.mono.since(*at) < SUBNETS_AGE_MAX);
        if fresh || !self.config.subnet_discovery {
            return true;
        }
        if !self.ops.values().any(|op| *op == Op::Subnets) {
            let identity = &self.config.identity;
            let call = Call::DescribeSubnets { vpc: identity.vpc.clone(), zone: identity.zone.clone() };
            self.ask_ec2(Op::Subnets, call);
        }
        false
    }

    pub(super) fn subnets_done(&mut self, result: Result<Reply, Failure>) {
        let subnets = match result {
            Ok(Reply::Subnets(subnets)) => Some(subnets),
            Ok(reply) => {
                self.log(Level::Error, format!("EC2 answered {reply:?} to DescribeSubnets"));
                None
            }
            Err(failure) => {
                // Without leave to look for others, the primary ENI's subnet is the one to use (`spec/aws.md` 8.2).
                self.log(Level::Warn, format!("look for subnets: {failure}; using the primary ENI's"));
                None
            }
        };
        self.subnets = Some((self.now.mono, subnets));
    }

    /// The subnet for a new ENI: most free addresses first among those that may be used (`spec/aws.md` 8.2).
    pub(super) fn choose_subnet(&self, prefixes: bool) -> Option<SubnetId> {
        let primary = &self.config.identity.subnet;
        let now = self.now.mono;
        let open = |id: &SubnetId| !self.exhausted.contains_key(id) && !(prefixes && self.fragmented.closed(id, now));
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
    const CLUSTER_TAG: &str = "cni.networking.k8s.aws/cluster/";
    match subnet.tags.get("kubernetes.io/role/cni").map(String::as_str) {
        Some("0") => false,
        None | Some("") => subnet.id == *primary,
        Some(_) => {
            let mut clusters = subnet.tags.keys().filter_map(|key| key.strip_prefix(CLUSTER_TAG)).peekable();
            cluster.is_empty() || clusters.peek().is_none() || clusters.any(|name| name == cluster)
        }
    }
}
