//! The API server as one node sees it: its Node and CNINode objects, ENIConfigs, its pods; and the resource controller
//! behind it.

use crate::model::kube::{Call, EniConfig, Failure, Feature, Node, Notice, Pod, Reply};
use crate::model::map::Map;

/// Notices that are kept.
const NOTICES_MAX: usize = 1000;

/// The objects.
#[derive(Clone, Debug, Default)]
pub struct Api {
    /// The Node.
    pub node: Node,
    /// ENIConfigs by name.
    pub eni_configs: Map<String, EniConfig>,
    /// Features of the CNINode.
    pub features: Vec<Feature>,
    /// Pods by name, in the namespace `default`.
    pub pods: Map<String, Pod>,
    /// Events, latest last.
    pub notices: Vec<Notice>,
    version: u64,
}

fn failure(status: u16, message: &str) -> Failure {
    Failure { status, message: message.to_owned() }
}

impl Api {
    /// Carries out a request.
    pub fn answer(&mut self, call: &Call) -> Result<Reply, Failure> {
        match call {
            Call::Pod { name, .. } | Call::PodWithBranch { name, .. } => match self.pods.get(name) {
                Some(pod) => Ok(Reply::Pod(pod.clone())),
                None => Err(failure(404, "pods not found")),
            },
            Call::Annotate { name, key, value, .. } => match self.pods.get_mut(name) {
                Some(pod) => {
                    pod.annotations.insert(key.clone(), value.clone());
                    Ok(Reply::Done)
                }
                None => Err(failure(404, "pods not found")),
            },
            Call::EniConfig(name) => match self.eni_configs.get(name) {
                Some(config) => Ok(Reply::EniConfig(config.clone())),
                None => Err(failure(404, "eniconfigs.crd.k8s.amazonaws.com not found")),
            },
            Call::CniNode => Ok(Reply::CniNode { version: self.version.to_string(), features: self.features.clone() }),
            Call::SetFeatures { version, .. } if *version != self.version.to_string() => {
                Err(failure(409, "the object has been modified"))
            }
            Call::SetFeatures { features, .. } => {
                self.version += 1;
                self.features.clone_from(features);
                Ok(Reply::Done)
            }
            Call::Event(notice) => {
                if self.notices.len() < NOTICES_MAX {
                    self.notices.push(notice.clone());
                }
                Ok(Reply::Done)
            }
        }
    }
}
