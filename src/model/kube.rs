//! What the daemon asks of the Kubernetes API and what it is told, as values (`spec/kubernetes.md`, `spec/ipamd.md` 13).
//!
//! Only the fields that are used. Everything here concerns this node: its Node and CNINode objects, its pods, its
//! ENIConfig.

use super::ids::{GroupId, SubnetId};
use std::collections::BTreeMap;
use std::fmt;

/// The annotation with which the VPC resource controller tells about a pod's branch ENI; also the start of the resource
/// name that such a pod asks for.
pub const POD_ENI: &str = "vpc.amazonaws.com/pod-eni";
/// The annotation with the pod's address (ANNOTATE_POD_IP).
pub const POD_IPS: &str = "vpc.amazonaws.com/pod-ips";
/// The feature of the CNINode that asks the resource controller for a trunk ENI.
pub const FEATURE_TRUNK: &str = "SecurityGroupsForPods";
/// The feature of the CNINode that names the ENIConfig.
pub const FEATURE_CUSTOM_NETWORKING: &str = "CustomNetworking";

/// A request. One value is one HTTP request; the client knows the names of the node and of our own pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// GET of a pod.
    Pod {
        /// Namespace.
        namespace: String,
        /// Name.
        name: String,
    },
    /// Like [`Call::Pod`], but waits up to some seconds for the annotation [`POD_ENI`] to be there; answers with the pod
    /// as it was last seen (`spec/kubernetes.md` 6, "BETTER").
    PodWithBranch {
        /// Namespace.
        namespace: String,
        /// Name.
        name: String,
    },
    /// Merge patch of one annotation of a pod.
    Annotate {
        /// Namespace.
        namespace: String,
        /// Name.
        name: String,
        /// Key.
        key: String,
        /// Value.
        value: String,
    },
    /// GET of an ENIConfig.
    EniConfig(String),
    /// GET of the node's CNINode.
    CniNode,
    /// Merge patch of the features of the node's CNINode, if it still has this version.
    SetFeatures {
        /// `metadata.resourceVersion` as it was read.
        version: String,
        /// The whole list.
        features: Vec<Feature>,
    },
    /// An event; repeats are folded by the client.
    Event(Notice),
}

/// What a call gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// To [`Call::Pod`] and [`Call::PodWithBranch`].
    Pod(Pod),
    /// To [`Call::EniConfig`].
    EniConfig(EniConfig),
    /// To [`Call::CniNode`].
    CniNode {
        /// `metadata.resourceVersion`.
        version: String,
        /// `spec.features`.
        features: Vec<Feature>,
    },
    /// To everything else.
    Done,
}

/// Why a call failed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    /// HTTP status; 0 without an answer.
    pub status: u16,
    /// Text for people.
    pub message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status {
            0 => f.write_str(&self.message),
            status => write!(f, "{} (HTTP {status})", self.message),
        }
    }
}

impl std::error::Error for Failure {}

/// The node's own Node object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `metadata.annotations`.
    pub annotations: BTreeMap<String, String>,
    /// A taint `node.kubernetes.io/unschedulable` with effect `NoSchedule`: cordoned.
    pub unschedulable: bool,
    /// `status.capacity.pods`; absent or 0 is unknown.
    pub max_pods: Option<u32>,
}

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.annotations`.
    pub annotations: BTreeMap<String, String>,
    /// Some container has a limit whose name starts with [`POD_ENI`].
    pub wants_branch: bool,
}

/// `spec` of an ENIConfig.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EniConfig {
    /// Subnet of new ENIs.
    pub subnet: SubnetId,
    /// Their security groups; empty means those of the primary ENI.
    pub groups: Vec<GroupId>,
}

/// A feature of a CNINode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Feature {
    /// Name.
    pub name: String,
    /// Value; an empty one is left out of the object.
    pub value: String,
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Regarding {
    /// The daemon's own pod.
    OwnPod,
    /// The node.
    Node,
}

/// A warning event (`spec/kubernetes.md` 7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// About whom.
    pub regarding: Regarding,
    /// CamelCase word, at most 128 characters.
    pub reason: String,
    /// What was being done, at most 128 characters.
    pub action: String,
    /// Text for people, at most 1024 bytes.
    pub note: String,
}
