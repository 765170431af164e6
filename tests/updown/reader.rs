//! Files as the original reads them. Written from its formats (`spec/ipamd.md` 5.2, 5.3; `spec/egress.md` 7.2), not with our
//! decoders, and stricter: what it would pass over in an entry is refused too.

use crate::stage::{Stage, host_veth};
use ipnet::IpNet;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// One pod's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub container: String,
    pub address: IpAddr,
    pub timestamp: i64,
    /// Empty in entries that do not say whose they are.
    pub namespace: String,
    pub name: String,
}

/// The checkpoint's entries, by container.
#[track_caller]
pub fn checkpoint(text: &str, v6: bool) -> BTreeMap<String, Entry> {
    let document: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let document = document.as_object().unwrap();
    // Names are compared without case there, so that another spelling would be taken for the same member.
    let mut known: Vec<String> = document.keys().map(|key| key.to_lowercase()).filter(|key| key != "enibox").collect();
    known.sort();
    assert_eq!(known, ["allocations", "version"]);
    assert_eq!(document["version"], "vpc-cni-ipam/1");
    let list = document["allocations"].as_array().expect("never null");
    let entries: BTreeMap<String, Entry> = list
        .iter()
        .map(|value| entry(value.as_object().unwrap(), v6))
        .map(|entry| (entry.container.clone(), entry))
        .collect();
    assert_eq!(entries.len(), list.len(), "an entry for each container");
    entries
}

fn entry(object: &Map<String, Value>, v6: bool) -> Entry {
    let member = if v6 { "ipv6" } else { "ipv4" };
    let known = ["networkName", "containerID", "ifName", member, "allocationTimestamp", "metadata"];
    assert!(object.keys().all(|key| known.contains(&key.as_str())), "{object:?}");
    let text = |name: &str| object[name].as_str().unwrap_or_else(|| panic!("{name} of {object:?}")).to_owned();
    assert_eq!((text("networkName").as_str(), text("ifName").as_str()), ("aws-cni", "eth0"));
    let metadata = object["metadata"].as_object().expect("always there");
    let known = ["k8sPodNamespace", "k8sPodName", "interfacesCount"];
    assert!(metadata.keys().all(|key| known.contains(&key.as_str())), "{metadata:?}");
    let of_pod = |name: &str| metadata.get(name).map_or("", |value| value.as_str().unwrap()).to_owned();
    assert!(metadata.get("interfacesCount").is_none_or(|count| count == 1), "{metadata:?}");
    let address: IpAddr = text(member).parse().unwrap();
    assert_eq!(address.is_ipv6(), v6);
    assert!(!text("containerID").is_empty());
    Entry {
        container: text("containerID"),
        address,
        timestamp: object["allocationTimestamp"].as_i64().expect("an integer of 64 bits"),
        namespace: of_pod("k8sPodNamespace"),
        name: of_pod("k8sPodName"),
    }
}

/// Those that the original takes up when it starts, with the route tables of their ENIs: the pod's link is there, and an ENI
/// has the address. It ends when an address is there twice.
#[track_caller]
pub fn restore(stage: &Stage, entries: &BTreeMap<String, Entry>) -> BTreeMap<String, (Entry, u32)> {
    let (links, enis) = (stage.links(), stage.enis());
    let mut seen = BTreeSet::new();
    let mut restored = BTreeMap::new();
    for (container, entry) in entries {
        let suffix = host_veth(&entry.name)["eni".len()..].to_owned();
        let unnamed = entry.namespace.is_empty() || entry.name.is_empty();
        if !unnamed && !links.iter().any(|link| link.ends_with(&suffix)) {
            continue;
        }
        let holds = |eni: &enibox::model::ec2::Interface| {
            let prefixes = eni.v4_prefixes.iter().map(|net| IpNet::V4(*net)).chain(eni.v6_prefixes.iter().copied());
            eni.secondary_ipv4s.iter().any(|one| IpAddr::V4(*one) == entry.address)
                || prefixes.into_iter().any(|net| net.contains(&entry.address))
        };
        let Some((device, _)) = enis.iter().find(|(_, eni)| holds(eni)) else { continue };
        assert!(seen.insert(entry.address), "datastore: IP already in data store: {}", entry.address);
        let table = if *device == 0 { 254 } else { device + 1 };
        restored.insert(container.clone(), (entry.clone(), table));
    }
    restored
}

/// Who has which address in the files of `host-local`.
#[track_caller]
pub fn host_local(stage: &Stage) -> BTreeMap<String, IpAddr> {
    let mut files = stage.host_local_files();
    assert_eq!(files.remove("lock").as_deref(), Some(""));
    let last = files.remove("last_reserved_ip.0").expect("which was the last");
    let range: IpNet = stage.family.range.replace("ac:00", "ac:0").parse().unwrap();
    assert!(range.contains(&last.parse::<IpAddr>().unwrap()), "{last}");
    let holder = |(name, content): (String, String)| {
        let address: IpAddr = name.parse().unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(address.to_string(), name, "the canonical text");
        assert!(range.contains(&address), "{name}");
        let (container, interface) = content.trim().split_once("\r\n").unwrap_or_else(|| panic!("{content:?}"));
        assert_eq!(interface, "eth0");
        (container.to_owned(), address)
    };
    let count = files.len();
    let holders: BTreeMap<String, IpAddr> = files.into_iter().map(holder).collect();
    assert_eq!(holders.len(), count, "an address for each container");
    holders
}
