//! ENIs that dead nodes have left in the VPC (`spec/ipamd.md` 9.6, `spec/aws.md` 10).
//!
//! Every node of the VPC looks, so each does it rarely, at a time of its own, begins anywhere in the list and gives up when
//! EC2 is busy. An ENI without the time of its creation gets one now, and is looked at again by whoever comes next.

use super::{Core, Level, Op, Phase, Timer};
use crate::model::ec2::{Call, Failure, Interface, Reply};
use crate::model::ids::EniId;
use crate::model::order;
use crate::model::time::Wall;
use std::time::Duration;

/// Half of the mean time between two looks; the other half is random.
const EVERY_HALF: Duration = Duration::from_mins(30);
/// A younger ENI may be one that its node is about to attach. The original waits 5 minutes; a node that EC2 throttles hard
/// may need longer.
const AGE_MIN: Duration = Duration::from_mins(15);
/// ENIs that one look deletes at most; the next look finds the rest.
const DELETES_MAX: usize = 100;
const CREATED: &str = "node.k8s.amazonaws.com/createdAt";

impl Core {
    pub(super) fn plan_sweep(&mut self) {
        if self.config.clean_leaked && self.config.provisioning && !self.config.v6 {
            let random = self.random.below(2 * EVERY_HALF.as_secs());
            self.set_timer(Timer::Sweep, EVERY_HALF.saturating_add(Duration::from_secs(random)));
        }
    }

    pub(super) fn sweep(&mut self) {
        self.plan_sweep();
        if self.phase != Phase::Ready {
            return;
        }
        let mut tags = vec![("node.k8s.amazonaws.com/instance_id".to_owned(), None)];
        if !self.config.cluster_name.is_empty() {
            tags.push(("cluster.k8s.amazonaws.com/name".to_owned(), Some(self.config.cluster_name.clone())));
        }
        self.ask_ec2(Op::Sweep, Call::DescribeLeaked { vpc: self.config.identity.vpc.clone(), tags });
    }

    pub(super) fn sweep_done(&mut self, result: Result<Reply, Failure>) {
        let found = match result {
            Ok(Reply::Interfaces(found)) => found,
            Ok(_) => return,
            Err(failure) => return self.log(Level::Warn, format!("look for ENIs of dead nodes: {failure}")),
        };
        let mut leftovers = Vec::new();
        for interface in found {
            let ours = self.coming().contains(&interface.id) || self.freeing.contains_key(&interface.id);
            let detached = interface.attachment.is_none() && interface.status == "available";
            if !ours && detached && interface.description.starts_with("aws-K8S-") && self.is_old(&interface) {
                leftovers.push((self.random.bits(), interface.id));
            }
        }
        order::sort(&mut leftovers);
        leftovers.truncate(DELETES_MAX);
        self.leftovers = leftovers.into_iter().map(|(_, id)| id).collect();
        self.delete_leftover();
    }

    fn is_old(&mut self, interface: &Interface) -> bool {
        if let Some(created) = interface.tags.get(CREATED).and_then(|text| Wall::parse_rfc3339(text)) {
            return self.now.wall.since(created) >= AGE_MIN;
        }
        let tags = [(CREATED.to_owned(), self.now.wall.to_string())].into();
        self.ask_ec2(Op::Tags(interface.id.clone()), Call::CreateTags { eni: interface.id.clone(), tags });
        false
    }

    fn delete_leftover(&mut self) {
        if let Some(id) = self.leftovers.pop() {
            self.log(Level::Info, format!("eni {id}: left by a dead node; deleting it"));
            self.ask_ec2(Op::SweepDelete(id.clone()), Call::Delete(id));
        }
    }

    /// One try each: another node, or the next look, does the rest.
    pub(super) fn swept(&mut self, id: &EniId, failure: Option<Failure>) {
        if let Some(failure) = failure {
            self.log(Level::Warn, format!("eni {id}: {failure}"));
            if failure.throttled() || failure.code.is_empty() {
                self.leftovers.clear();
            }
        }
        self.delete_leftover();
    }
}
