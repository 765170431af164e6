//! The checkpoint file: which pod has which address (`spec/ipamd.md` 5).
//!
//! The format is the original's (`vpc-cni-ipam/1`), so that a node can be taken over and handed back with running pods.
//! What we add for ourselves stands in one further member, `enibox`, which the original ignores and drops: what EC2 told
//! about the ENIs (so that a restart needs no EC2), addresses in their cooldown, and what was begun with EC2.

use super::ec2::Count;
use super::ids::{AttachmentId, EniId, GroupId, SubnetId};
use super::net::Mac;
use crate::model::map::{Map, Set};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// The only version there is.
pub const VERSION: &str = "vpc-cni-ipam/1";

/// The whole file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Checkpoint {
    /// [`VERSION`].
    pub version: String,
    /// Assigned addresses.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub allocations: Vec<Allocation>,
    /// Ours; absent in a file that the original wrote.
    #[serde(default)]
    pub enibox: Option<Own>,
}

/// One address of one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    /// CNI network.
    #[serde(rename = "networkName")]
    pub network: String,
    /// Sandbox id.
    #[serde(rename = "containerID")]
    pub container: String,
    /// Interface in the pod.
    #[serde(rename = "ifName")]
    pub ifname: String,
    /// The address, if it is an IPv4 one.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "empty_is_none")]
    pub ipv4: Option<Ipv4Addr>,
    /// The address, if it is an IPv6 one.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "empty_is_none_v6")]
    pub ipv6: Option<Ipv6Addr>,
    /// Unix nanoseconds of the assignment.
    #[serde(rename = "allocationTimestamp", default)]
    pub timestamp: i64,
    /// Pod.
    #[serde(default)]
    pub metadata: Metadata,
}

impl Allocation {
    /// The address.
    pub fn address(&self) -> Option<IpAddr> {
        self.ipv4.map(IpAddr::V4).or(self.ipv6.map(IpAddr::V6))
    }

    /// Its entry in the file.
    pub fn to_text(&self) -> String {
        serde_json::to_string(self).expect("an allocation has only string keys")
    }
}

/// What is known of the pod; empty members are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Namespace.
    #[serde(rename = "k8sPodNamespace", default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Name.
    #[serde(rename = "k8sPodName", default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Addresses that the pod holds over all cards; 0 in old files means 1.
    #[serde(rename = "interfacesCount", default, skip_serializing_if = "is_zero")]
    pub interfaces: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

fn null_is_empty<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<Allocation>, D::Error> {
    Ok(Option::<Vec<Allocation>>::deserialize(from)?.unwrap_or_default())
}

fn parse_address<'de, D: serde::Deserializer<'de>, A: std::str::FromStr>(from: D) -> Result<Option<A>, D::Error> {
    let text = Option::<String>::deserialize(from)?.unwrap_or_default();
    let bad = || serde::de::Error::custom(format!("{text:?} is not an address"));
    if text.is_empty() { Ok(None) } else { text.parse().map(Some).map_err(|_| bad()) }
}

fn empty_is_none<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Ipv4Addr>, D::Error> {
    parse_address(from)
}

fn empty_is_none_v6<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Ipv6Addr>, D::Error> {
    parse_address(from)
}

/// Our own part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Own {
    /// When this was written, by the monotonic and by the wall clock, in nanoseconds: the latter may be set before the next
    /// start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub written: Option<(u64, i64)>,
    /// What EC2 told about the attached ENIs.
    pub enis: Map<EniId, EniFacts>,
    /// Addresses in their cooldown: when they were released, in Unix nanoseconds.
    pub cooling: Map<IpAddr, i64>,
    /// CIDRs that were given back lately, and when, in Unix nanoseconds: whoever still lists them is behind.
    pub given_back: Map<IpNet, i64>,
    /// Subnets that are not for pods by their tags; absent as long as EC2 has not told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub excluded_subnets: Option<Set<SubnetId>>,
    /// Subnets that had no block for a prefix: refusals in a row, and when the next try is due, in Unix nanoseconds.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub fragmented: Map<SubnetId, (u32, i64)>,
    /// An ENI may have been made that nobody remembers: it is looked for.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub leak_suspected: bool,
    /// ENIs being created.
    pub creating: Vec<Creating>,
    /// ENIs being given back.
    pub freeing: Map<EniId, Freeing>,
}

/// What only EC2 knows of an ENI.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EniFacts {
    /// Ours to use (`spec/ipamd.md` 7.2).
    pub managed: bool,
    /// `interface`, `efa`, `efa-only`, `trunk`.
    pub interface_type: String,
    /// Network card.
    pub card: u32,
    /// Needed to detach it.
    pub attachment: AttachmentId,
    /// CIDRs that EC2 listed on it.
    pub cidrs: Vec<IpNet>,
}

/// An ENI that was going to be created: written before the call, so that whatever happens it is found again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Creating {
    /// The same token gives the same ENI.
    pub token: String,
    /// Network card.
    #[serde(default)]
    pub card: u32,
    /// Where.
    pub subnet: SubnetId,
    /// Security groups.
    pub groups: Vec<GroupId>,
    /// What it carries from the start.
    pub count: Count,
    /// Tags, as in the call: it must be repeated word by word.
    pub tags: Map<String, String>,
    /// The ENI, once EC2 has answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eni: Option<(EniId, Mac)>,
}

/// An ENI that left the pool and is on its way out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Freeing {
    /// The attachment, until it is detached.
    pub attachment: Option<AttachmentId>,
}

impl Checkpoint {
    /// Reads the file. The error says what is wrong and where.
    pub fn parse(text: &str) -> Result<Checkpoint, String> {
        let checkpoint: Checkpoint = serde_json::from_slice(text.as_bytes()).map_err(|error| error.to_string())?;
        if checkpoint.version == VERSION {
            Ok(checkpoint)
        } else {
            Err(format!("version is {:?}, not {VERSION:?}", checkpoint.version))
        }
    }

    /// The file's content.
    pub fn to_text(&self) -> String {
        let allocations = self.allocations.iter().map(|allocation| allocation.to_text().into()).collect::<Vec<_>>();
        Draft { allocations: allocations.into(), enibox: self.enibox.clone() }.to_text()
    }
}

/// A checkpoint to be written. A node has a thousand allocations, and each write changes one of them: the rest are shared with
/// the draft before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Draft {
    /// [`Allocation::to_text`] of each.
    pub allocations: Arc<Vec<Arc<str>>>,
    /// Our own part.
    pub enibox: Option<Own>,
}

impl Draft {
    /// The file's content: one JSON document on one line.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        self.tell(&mut |piece| text.push_str(piece));
        text
    }

    /// The same piece by piece: with a thousand pods it has a quarter of a megabyte, which nobody needs in one place.
    pub fn tell(&self, piece: &mut dyn FnMut(&str)) {
        piece(r#"{"version":""#);
        piece(VERSION);
        piece(r#"","allocations":["#);
        for (number, entry) in self.allocations.iter().enumerate() {
            if number > 0 {
                piece(",");
            }
            piece(entry);
        }
        piece("]");
        if let Some(own) = &self.enibox {
            piece(r#","enibox":"#);
            piece(&serde_json::to_string(own).expect("our part has only string keys"));
        }
        piece("}\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_originals_file_is_read_and_written_alike() {
        let text = concat!(
            r#"{"version":"vpc-cni-ipam/1","allocations":[{"networkName":"aws-cni","containerID":"6f2c0d","#,
            r#""ifName":"eth0","ipv4":"10.0.1.17","allocationTimestamp":1785571200123456789,"#,
            r#""metadata":{"k8sPodNamespace":"default","k8sPodName":"web-0","interfacesCount":1}},"#,
            r#"{"networkName":"aws-cni","containerID":"90ab77","ifName":"eth0","ipv6":"2001:db8:0:1::4","#,
            r#""allocationTimestamp":1785571201000000000,"metadata":{}}]}"#,
            "\n"
        );
        let checkpoint = Checkpoint::parse(text).unwrap();
        assert_eq!(checkpoint.allocations[0].address(), Some("10.0.1.17".parse().unwrap()));
        assert_eq!(checkpoint.to_text(), text);
    }

    #[test]
    fn our_own_part_comes_back() {
        let mut own = Own::default();
        own.enis.insert("eni-1".into(), EniFacts { managed: true, ..EniFacts::default() });
        own.cooling.insert("10.0.0.9".parse().unwrap(), 5);
        own.given_back.insert("10.0.0.7/32".parse().unwrap(), 6);
        own.creating.push(Creating {
            token: "t".into(),
            count: Count::Prefixes(9),
            eni: Some(("eni-2".into(), Mac([2; 6]))),
            ..Creating::default()
        });
        own.freeing.insert("eni-3".into(), Freeing { attachment: Some("eni-attach-3".into()) });
        let checkpoint = Checkpoint { version: VERSION.into(), allocations: Vec::new(), enibox: Some(own) };
        assert_eq!(Checkpoint::parse(&checkpoint.to_text()), Ok(checkpoint));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, want) in [
            ("", "EOF"),
            ("{", "EOF"),
            (r#"{"version":"vpc-cni-ipam/2"}"#, "vpc-cni-ipam/2"),
            (
                r#"{"version":"vpc-cni-ipam/1","allocations":[{"networkName":"a","containerID":"b","ifName":"c","ipv4":"x"}]}"#,
                "\"x\"",
            ),
        ] {
            let error = Checkpoint::parse(text).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
        assert!(Checkpoint::parse(r#"{"version":"vpc-cni-ipam/1","allocations":null,"new":1}"#).is_ok());
    }
}
