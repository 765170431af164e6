//! What the API server tells and is told about the node: how many pods it runs, whether it is cordoned, which ENIConfig
//! it names, that it wants a trunk ENI, and events (`spec/kubernetes.md` 4, 7; `spec/ipamd.md` 7.4, 7.5, 13).
//!
//! Nothing here is needed to serve an ordinary pod: what the API server has not told is unknown, and the pool goes on.

use super::{Core, Level, Op, OpId, Phase, RECONCILE, Tally, Timer};
use crate::model::ec2;
use crate::model::kube::{self, Call, EniConfig, Feature, Notice, Regarding, Reply};
use crate::model::time::Mono;
use crate::plan::pool::Kind;
use std::time::Duration;

/// An ENIConfig is read again for each creation of an ENI; those that are created together share one reading.
const ENI_CONFIG_FRESH: Duration = Duration::from_secs(10);
/// IMDS is looked at so often while a trunk ENI is to come (`spec/ipamd.md` 7.4).
const TRUNK_SCAN: Duration = Duration::from_secs(5);
/// Events on their way to the API server; more are dropped.
const NOTICES_MAX: usize = 16;
/// Bytes of a note (`spec/kubernetes.md` 7).
const NOTE_MAX: usize = 1024;

/// What the API server told.
#[derive(Debug, Default)]
pub(super) struct Cluster {
    pub(super) node: Option<kube::Node>,
    /// The ENIConfig as last read, and when.
    pub(super) eni_config: Option<(Mono, EniConfig)>,
    // Its name.
    eni_config_name: String,
    // Features that the CNINode is known to have.
    features: Vec<Feature>,
}

impl Core {
    pub(super) fn node_seen(&mut self, node: kube::Node) {
        let before = (self.max_pods(), self.cordoned(), self.eni_config_name());
        self.cluster.node = Some(node);
        let now = (self.max_pods(), self.cordoned(), self.eni_config_name());
        if before != now {
            let text = format!("node: {} pods, cordoned: {}, ENIConfig {:?}", now.0, now.1, now.2);
            self.log(Level::Info, text);
        }
        if before.2 != now.2 {
            // What failed with the other ENIConfig is no reason to wait.
            self.timers.remove(&Timer::Growth);
            self.growth_failures = 0;
        }
    }

    /// Pods that the node may run; a Node object without a figure is no news (B7).
    pub(super) fn max_pods(&self) -> usize {
        let told = self.cluster.node.as_ref().and_then(|node| node.max_pods).filter(|pods| *pods > 0);
        told.map_or(self.config.max_pods, |pods| usize::try_from(pods).unwrap_or(usize::MAX))
    }

    /// Whether nothing is to be grown and no ENI to be given back because the node is cordoned.
    pub(super) fn cordoned(&self) -> bool {
        let unschedulable = self.cluster.node.as_ref().is_some_and(|node| node.unschedulable);
        unschedulable && !self.config.tunables.manage_unschedulable
    }

    /// The name of the node's ENIConfig; absent without custom networking and as long as the Node has not been read (B34).
    pub fn eni_config_name(&self) -> Option<String> {
        let (annotation, label) = self.config.custom_networking.as_ref()?;
        Some(self.cluster.node.as_ref()?.eni_config(annotation, label).to_owned())
    }

    /// Whether the ENIConfig is known well enough to create an ENI; asks for it if not.
    pub(super) fn eni_config_known(&mut self) -> bool {
        let Some(name) = self.eni_config_name() else { return false };
        let fresh = |at: Mono| self.now.mono.since(at) < ENI_CONFIG_FRESH;
        let known = self.cluster.eni_config.as_ref().is_some_and(|(at, _)| fresh(*at));
        if known && self.cluster.eni_config_name == name {
            return true;
        }
        let asked = self.ops.values().any(|op| matches!(op, Op::EniConfig(_)));
        if !asked {
            self.ask_kube(Op::EniConfig(name.clone()), Call::EniConfig(name));
        }
        false
    }

    fn eni_config_done(&mut self, name: String, result: Result<Reply, kube::Failure>) {
        match result {
            Ok(Reply::EniConfig(config)) if !config.subnet.0.is_empty() => {
                self.cluster.eni_config = Some((self.now.mono, config));
                self.cluster.eni_config_name = name;
            }
            Err(failure) if self.cluster.eni_config_name == name && (failure.status == 0 || failure.status >= 500) => {
                self.log(Level::Warn, format!("read ENIConfig {name}: {failure}; using it as it was"));
                if let Some((at, _)) = &mut self.cluster.eni_config {
                    *at = self.now.mono;
                }
            }
            result => {
                let why = result.map_or_else(|failure| failure.to_string(), |_| "it names no subnet".into());
                let text = format!("ENIConfig {name}: {why}");
                self.notice(Regarding::Node, "ENIConfigUnusable", "CreateNetworkInterface", &text);
                self.growth_failed(None, &text, None);
            }
        }
    }

    /// Whether a slot is kept for a trunk ENI, which only the VPC resource controller attaches.
    pub(super) fn trunk_to_come(&self) -> bool {
        let there = self.pool.enis().any(|(_, eni)| eni.kind == Kind::Trunk);
        self.config.pod_eni && self.config.trunk_capable && !there
    }

    /// How often IMDS is compared with the pool.
    pub(super) fn scan_every(&self) -> Duration {
        if self.trunk_to_come() { TRUNK_SCAN } else { RECONCILE }
    }

    /// Asks the resource controller for what is wanted of it, through the CNINode (`spec/kubernetes.md` 4.3).
    pub(super) fn keep_features(&mut self) {
        let asked = self.ops.values().any(|op| matches!(op, Op::CniNode | Op::SetFeatures));
        let waits = asked || self.timers.contains_key(&Timer::Features) || self.phase == Phase::Stopping;
        if !self.config.pod_eni || waits || !self.scanned {
            return;
        }
        if self.wanted_features().iter().any(|feature| !self.cluster.features.contains(feature)) {
            self.read_features();
        }
    }

    // The name of the ENIConfig first, so that the trunk's branches come into its subnet.
    fn wanted_features(&self) -> Vec<Feature> {
        let name = self.eni_config_name();
        if self.config.custom_networking.is_some() && name.is_none() {
            return Vec::new(); // not before the Node is known
        }
        let custom = name.filter(|name| name != kube::DEFAULT_ENI_CONFIG);
        let mut wanted: Vec<Feature> =
            custom.map(|value| Feature { name: kube::FEATURE_CUSTOM_NETWORKING.into(), value }).into_iter().collect();
        let enis = self.pool.enis().filter(|(_, eni)| eni.card == 0).count();
        // The slot that `sizing` keeps for the trunk is the one that it may take.
        let room = self.config.v6 || enis + self.growths.len() < self.sizing(0).eni_limit;
        let asked = self.cluster.features.iter().any(|feature| feature.name == kube::FEATURE_TRUNK);
        if self.trunk_to_come() && (room || asked) {
            wanted.push(Feature { name: kube::FEATURE_TRUNK.into(), value: String::new() });
        }
        wanted
    }

    pub(super) fn read_features(&mut self) {
        self.ask_kube(Op::CniNode, Call::CniNode);
    }

    fn features_read(&mut self, version: String, has: Vec<Feature>) {
        let wanted = self.wanted_features();
        if wanted.iter().all(|feature| has.contains(feature)) {
            self.cluster.features = has;
            return self.succeeded(Timer::Features);
        }
        let mut features = has;
        features.retain(|feature| wanted.iter().all(|new| new.name != feature.name));
        features.extend(wanted);
        self.cluster.features.clone_from(&features); // taken back if it fails
        self.ask_kube(Op::SetFeatures, Call::SetFeatures { version, features });
    }

    fn features_failed(&mut self, failure: &kube::Failure) {
        self.log(Level::Warn, format!("ask for a trunk ENI through the CNINode: {failure}"));
        self.tally(Tally::Error("tryEnableSecurityGroupsForPods"));
        self.cluster.features.clear();
        self.retry(Timer::Features);
    }

    pub(super) fn kube_done(&mut self, op: OpId, result: Result<Reply, kube::Failure>) {
        match (self.ops.remove(&op), result) {
            (Some(Op::EniConfig(name)), result) => self.eni_config_done(name, result),
            (Some(Op::CniNode), Ok(Reply::CniNode { version, features })) => self.features_read(version, features),
            (Some(Op::SetFeatures), Ok(_)) => {
                self.log(Level::Info, format!("the CNINode has the features {:?}", self.cluster.features));
                self.succeeded(Timer::Features);
            }
            (Some(Op::CniNode | Op::SetFeatures), Err(failure)) => self.features_failed(&failure),
            (Some(Op::Lookup(lookup)), result) => self.looked_up(lookup, result),
            (Some(Op::Annotate(annotated)), result) => self.annotated(annotated, result.err()),
            (Some(Op::Unannotate { namespace, name, address }), Ok(Reply::Pod(pod))) => {
                if pod.annotations.get(kube::POD_IPS).is_some_and(|text| *text == address.to_string()) {
                    let call = Call::Annotate { namespace, name, key: kube::POD_IPS.into(), value: String::new() };
                    self.ask_kube(Op::Notice, call);
                }
            }
            // A pod that is gone has no annotation to clear, and an event that is lost is lost.
            (Some(Op::Unannotate { .. } | Op::Notice) | None, _) => {}
            (Some(op), result) => self.log(Level::Error, format!("the API server answered {result:?} to {op:?}")),
        }
    }

    /// Sends an event. The client folds repeats.
    pub(super) fn notice(&mut self, regarding: Regarding, reason: &str, action: &str, note: &str) {
        if self.ops.values().filter(|op| **op == Op::Notice).count() >= NOTICES_MAX {
            return;
        }
        let end = (0..=NOTE_MAX.min(note.len())).rev().find(|end| note.is_char_boundary(*end)).unwrap_or(0);
        let (reason, action, note) = (reason.to_owned(), action.to_owned(), note[..end].to_owned());
        self.ask_kube(Op::Notice, Call::Event(Notice { regarding, reason, action, note }));
    }

    /// A refusal for want of permissions is for the operator to mend (`spec/kubernetes.md` 7).
    pub(super) fn tell_of_failure(&mut self, failure: &ec2::Failure) {
        if failure.code == "UnauthorizedOperation" && failure.action != "DetachNetworkInterface" {
            let action = format!("ec2:{}", failure.action);
            let note = format!("{action} was denied: the node's role lacks this permission, see docs/iam-policy.md");
            self.notice(Regarding::OwnPod, "MissingIAMPermissions", &action, &note);
        }
    }
}
