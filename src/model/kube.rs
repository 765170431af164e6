//! What the daemon asks of the Kubernetes API and what it is told, as values (`spec/kubernetes.md`, `spec/ipamd.md` 13).
//!
//! Only the fields that are used. Everything here concerns this node: its Node and CNINode objects, its pods, its
//! ENIConfig.

use super::ids::{GroupId, SubnetId};
use super::net::Mac;
use crate::model::map::Map;
use ipnet::IpNet;
use serde_json::Value;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

/// The annotation with which the VPC resource controller tells about a pod's branch ENI; also the start of the resource
/// name that such a pod asks for.
pub const POD_ENI: &str = "vpc.amazonaws.com/pod-eni";
/// The annotation with the pod's address (ANNOTATE_POD_IP).
pub const POD_IPS: &str = "vpc.amazonaws.com/pod-ips";
/// The label that is looked at first for the name of the ENIConfig.
const EXTERNAL_ENI_CONFIG: &str = "vpc.amazonaws.com/externalEniConfig";
/// The ENIConfig of a node that names none.
pub const DEFAULT_ENI_CONFIG: &str = "default";
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
    pub labels: Map<String, String>,
    /// `metadata.annotations`.
    pub annotations: Map<String, String>,
    /// A taint `node.kubernetes.io/unschedulable` with effect `NoSchedule`: cordoned.
    pub unschedulable: bool,
    /// `status.capacity.pods`; absent or 0 is unknown.
    pub max_pods: Option<u32>,
}

impl Node {
    /// The name of the node's ENIConfig, which this annotation or this label tells unless the label of the VPC resource
    /// controller does; empty ones count as absent (`spec/config.md` 6.3).
    pub fn eni_config(&self, annotation: &str, label: &str) -> &str {
        let told = [self.labels.get(EXTERNAL_ENI_CONFIG), self.annotations.get(annotation), self.labels.get(label)];
        told.into_iter().flatten().find(|name| !name.is_empty()).map_or(DEFAULT_ENI_CONFIG, String::as_str)
    }
}

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.annotations`.
    pub annotations: Map<String, String>,
    /// Some container has a limit whose name starts with [`POD_ENI`].
    pub wants_branch: bool,
}

impl Pod {
    /// A branch ENI is wanted, and the resource controller has not told yet which.
    pub fn lacks_branch(&self) -> bool {
        self.wants_branch && !self.annotations.contains_key(POD_ENI)
    }
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

/// A branch ENI as the resource controller describes it in the annotation [`POD_ENI`] (`spec/kubernetes.md` 8.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BranchEni {
    /// MAC of the branch ENI.
    pub mac: Mac,
    /// Address of the pod, in the mode's family.
    pub address: IpAddr,
    /// VLAN on the trunk, 1 to 4094.
    pub vlan: u16,
    /// Gateway of the branch ENI's subnet.
    pub gateway: IpAddr,
}

/// The router of every IPv6 subnet of a VPC.
const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0xec2, 0, 0, 0, 0, 0, 1);

impl BranchEni {
    /// Reads the annotation; the first element counts. It decides the host's network, so nothing in it is believed that
    /// cannot be right. The error says what is wrong.
    pub fn parse(annotation: &str, v6: bool) -> Result<BranchEni, String> {
        let all: Value = serde_json::from_slice(annotation.as_bytes()).map_err(|error| error.to_string())?;
        let Some(Value::Object(first)) = all.get(0) else { return Err("parsed PodENIData is empty".into()) };
        // The controller writes `vlanId`, the original reads `vlanID`: case does not count.
        let member = |name: &str| first.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value);
        let text = |name: &str| member(name).and_then(Value::as_str).unwrap_or_default();
        let bad = |name: &str| format!("{name} is {}", member(name).unwrap_or(&Value::Null));
        let mac = text("ifAddress").parse().map_err(|_| bad("ifAddress"))?;
        let vlan = member("vlanId").and_then(Value::as_u64).and_then(|vlan| u16::try_from(vlan).ok());
        let vlan = vlan.filter(|vlan| (1..4095).contains(vlan)).ok_or_else(|| bad("vlanId"))?;
        let (address, subnet) = if v6 { ("ipv6Addr", "subnetV6Cidr") } else { ("privateIp", "subnetCidr") };
        let net: IpNet = text(subnet).parse().map_err(|_| bad(subnet))?;
        let ip: IpAddr = text(address).parse().map_err(|_| bad(address))?;
        let gateway = match (net.network(), v6) {
            (IpAddr::V4(base), false) if ip.is_ipv4() => {
                IpAddr::V4(u32::from(base).checked_add(1).ok_or_else(|| bad(subnet))?.into())
            }
            (IpAddr::V6(_), true) if ip.is_ipv6() => IpAddr::V6(ROUTER_V6),
            _ => return Err(bad(address)),
        };
        Ok(BranchEni { mac, address: ip, vlan, gateway })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"[{"eniId":"eni-0b","ifAddress":"02:aa:bb:cc:dd:ee","privateIp":"10.0.9.7","ipv6Addr":"2001:db8::7",
        "vlanId":3,"subnetCidr":"10.0.8.0/22","subnetV6Cidr":"2001:db8::/64","associationID":"trunk-assoc-0c"}]"#;

    #[test]
    fn a_branch_eni_is_read_in_both_families() {
        let v4 = BranchEni::parse(GOOD, false).unwrap();
        let want = BranchEni {
            mac: Mac([2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee]),
            address: "10.0.9.7".parse().unwrap(),
            vlan: 3,
            gateway: "10.0.8.1".parse().unwrap(),
        };
        assert_eq!(v4, want);
        let v6 = BranchEni::parse(&GOOD.replace("vlanId", "vlanID"), true).unwrap();
        assert_eq!((v6.address, v6.gateway), ("2001:db8::7".parse().unwrap(), "fe80:ec2::1".parse().unwrap()));
    }

    #[test]
    fn what_cannot_be_right_is_refused_by_name() {
        let all = [
            ("02:aa:bb:cc:dd:ee", "zz", "ifAddress"),
            ("\"10.0.9.7\"", "\"\"", "privateIp"),
            ("\"10.0.9.7\"", "\"2001:db8::9\"", "privateIp"),
            (":3,", ":0,", "vlanId"),
            (":3,", ":4095,", "vlanId"),
            (":3,", ":-1,", "vlanId"),
            (":3,", ":\"3\",", "vlanId"),
            ("10.0.8.0/22", "10.0.8.0", "subnetCidr"),
            ("10.0.8.0/22", "255.255.255.255/32", "subnetCidr"),
        ];
        for (from, to, want) in all {
            let error = BranchEni::parse(&GOOD.replacen(from, to, 1), false).unwrap_err();
            assert!(error.contains(want), "{from} -> {to}: {error}");
        }
        for (text, want) in [("", "EOF"), ("[]", "empty"), ("{}", "empty"), ("[1]", "empty"), ("null", "empty")] {
            let error = BranchEni::parse(text, false).unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
    }

    #[test]
    fn the_eni_config_of_a_node() {
        let map = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<Map<_, _>>()
        };
        for (labels, annotations, expected) in [
            (vec![], vec![], "default"),
            (vec![("l", "by label")], vec![("l", "no")], "by label"),
            (vec![("l", "by label")], vec![("a", "by annotation")], "by annotation"),
            (vec![(EXTERNAL_ENI_CONFIG, "outside"), ("l", "by label")], vec![("a", "by annotation")], "outside"),
            (vec![(EXTERNAL_ENI_CONFIG, ""), ("l", "by label")], vec![("a", "")], "by label"),
        ] {
            let node = Node { labels: map(&labels), annotations: map(&annotations), ..Node::default() };
            assert_eq!(node.eni_config("a", "l"), expected, "{labels:?} {annotations:?}");
        }
    }
}
