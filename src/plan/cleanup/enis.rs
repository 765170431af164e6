//! Which secondary ENIs of a node can be given back when this program leaves it (`spec/operations.md` 11): those that it or the
//! original has made for this instance and that no living pod has an address of.

use crate::model::ec2::Interface;
use crate::model::ids::{AttachmentId, EniId, InstanceId};
use crate::model::map::Set;
use crate::model::order::Gather as _;
use crate::plan::host::Observation;
use ipnet::IpNet;
use std::net::IpAddr;

/// An ENI that can go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spare {
    /// Which.
    pub eni: EniId,
    /// To be detached first; absent on one that is detached.
    pub attachment: Option<AttachmentId>,
    /// What is to be done, in words.
    pub text: String,
}

/// What becomes of the secondary ENIs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Enis {
    /// Those that can go.
    pub spare: Vec<Spare>,
    /// Why others that are ours stay, a line each.
    pub kept: Vec<String>,
}

/// What is known of living pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Living {
    /// Every address that might be one's: one to which a route leads over whatever veth, or that has a pod's rule. Somebody may
    /// have renamed a veth, set it down or flushed its route. One too many keeps an ENI until the clean-up runs again; with one
    /// too few a pod loses its address.
    pub addresses: Set<IpAddr>,
    /// Veths whose address nothing tells: a clean-up that was forced, or somebody's flush, has taken the routes along. A rule
    /// does not say over which veth its pod is reached.
    pub nameless: Vec<String>,
}

/// What is known of living pods, whose host ends have these names ([`super::Cleanup::pods`]).
pub fn living(seen: &Observation, veths: &[String]) -> Living {
    // The links were listed first, so that one which is not among them is a new veth.
    let others = seen.links.iter().filter(|link| link.kind.as_deref() != Some("veth"));
    let others = others.map(|link| link.index).gather::<Set<_>>();
    let led = super::ways(seen).filter(|route| !others.contains(&route.dev)).map(|route| route.dst.addr());
    let addresses = led.chain(seen.rules.iter().filter_map(super::of_rule)).gather();
    let devs = super::ways(seen).map(|route| route.dev).gather::<Set<_>>();
    let nameless = seen.links.iter().filter(|link| veths.contains(&link.name) && !devs.contains(&link.index));
    Living { addresses, nameless: nameless.map(|link| link.name.clone()).collect() }
}

/// Sorts the ENIs that EC2 lists. Trunks, EFAs, ENIs that are not to be managed and those of somebody else's making are not
/// looked at: the instance takes them along when it goes. Any may be the ENI of a pod whose address is not known.
pub fn sort(listed: &[Interface], instance: &InstanceId, primary: &EniId, pods: &Living) -> Enis {
    let mut enis = Enis::default();
    for interface in listed.iter().filter(|interface| interface.id != *primary && ours(interface, instance)) {
        let id = &interface.id;
        if let Some(pod) = pods.addresses.iter().find(|pod| has(interface, **pod)) {
            enis.kept.push(format!("{id} stays: a pod has its address {pod}, by a route or a rule"));
            continue;
        }
        if !pods.nameless.is_empty() {
            let veths = pods.nameless.join(", ");
            enis.kept.push(format!("{id} stays: there are living pods whose addresses are not known ({veths})"));
            continue;
        }
        let first = if interface.attachment.is_some() { "detach and delete" } else { "delete" };
        let address = interface.primary_ipv4.map(|address| format!(" ({address})")).unwrap_or_default();
        let attachment = interface.attachment.as_ref().map(|attachment| attachment.id.clone());
        enis.spare.push(Spare { eni: id.clone(), attachment, text: format!("{first} {id}{address}") });
    }
    enis
}

fn ours(interface: &Interface, instance: &InstanceId) -> bool {
    let tag = |name: &str| interface.tags.get(name).map(String::as_str);
    let elsewhere = interface.attachment.as_ref().is_some_and(|attachment| attachment.instance != *instance);
    !elsewhere
        && interface.interface_type == "interface"
        && interface.description.starts_with("aws-K8S-")
        && tag("node.k8s.amazonaws.com/instance_id") == Some(instance.0.as_str())
        && tag("node.k8s.amazonaws.com/no_manage") != Some("true")
}

fn has(interface: &Interface, address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            interface.primary_ipv4 == Some(address)
                || interface.secondary_ipv4s.contains(&address)
                || interface.v4_prefixes.iter().any(|prefix| prefix.contains(&address))
        }
        IpAddr::V6(v6) => {
            interface.ipv6s.contains(&v6)
                || interface.v6_prefixes.iter().any(|prefix: &IpNet| prefix.contains(&address))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ec2::Attachment;

    fn eni(change: impl FnOnce(&mut Interface)) -> Interface {
        let mut eni = Interface {
            id: EniId("eni-1".into()),
            description: "aws-K8S-i-1".into(),
            interface_type: "interface".into(),
            primary_ipv4: Some([10, 0, 0, 5].into()),
            attachment: Some(Attachment {
                id: AttachmentId("eni-attach-1".into()),
                instance: InstanceId("i-1".into()),
                ..Attachment::default()
            }),
            ..Interface::default()
        };
        eni.tags.insert("node.k8s.amazonaws.com/instance_id".into(), "i-1".into());
        change(&mut eni);
        eni
    }

    fn check_beside(nameless: &[&str], change: impl FnOnce(&mut Interface), expected: &[&str]) {
        let addresses = ["10.0.0.9", "10.0.1.17", "2001:db8::7"].map(|pod| pod.parse().unwrap()).into();
        let pods = Living { addresses, nameless: nameless.iter().map(|name| (*name).to_owned()).collect() };
        let enis = sort(&[eni(change)], &InstanceId("i-1".into()), &EniId("eni-0".into()), &pods);
        let texts = enis.spare.iter().map(|spare| spare.text.as_str());
        assert_eq!(texts.chain(enis.kept.iter().map(String::as_str)).collect::<Vec<_>>(), expected);
    }

    fn check(change: impl FnOnce(&mut Interface), expected: &[&str]) {
        check_beside(&[], change, expected);
    }

    #[test]
    fn any_may_be_that_of_a_pod_whose_address_is_not_known() {
        let stays = "eni-1 stays: there are living pods whose addresses are not known (eni0, odd0)";
        check_beside(&["eni0", "odd0"], |_| {}, &[stays]);
        check_beside(&["eni0", "odd0"], |eni| eni.attachment = None, &[stays]);
        check_beside(&["eni0"], |eni| eni.description = "somebody's".into(), &[]);
    }

    #[test]
    fn only_what_is_ours_and_serves_nobody_goes() {
        check(|_| {}, &["detach and delete eni-1 (10.0.0.5)"]);
        check(|eni| eni.attachment = None, &["delete eni-1 (10.0.0.5)"]);
        check(
            |eni| eni.secondary_ipv4s.push([10, 0, 0, 9].into()),
            &["eni-1 stays: a pod has its address 10.0.0.9, by a route or a rule"],
        );
        check(
            |eni| eni.v4_prefixes.push("10.0.1.16/28".parse().unwrap()),
            &["eni-1 stays: a pod has its address 10.0.1.17, by a route or a rule"],
        );
        check(
            |eni| eni.v6_prefixes.push("2001:db8::/80".parse().unwrap()),
            &["eni-1 stays: a pod has its address 2001:db8::7, by a route or a rule"],
        );
        check(|eni| eni.id = EniId("eni-0".into()), &[]);
        for interface_type in ["trunk", "efa", "efa-only", "branch"] {
            check(|eni| eni.interface_type = interface_type.into(), &[]);
        }
        check(|eni| eni.description = "somebody's".into(), &[]);
        check(|eni| drop(eni.tags.insert("node.k8s.amazonaws.com/no_manage".into(), "true".into())), &[]);
        check(|eni| drop(eni.tags.insert("node.k8s.amazonaws.com/instance_id".into(), "i-2".into())), &[]);
        check(|eni| eni.attachment.as_mut().unwrap().instance = InstanceId("i-2".into()), &[]);
    }
}
