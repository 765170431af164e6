//! What EC2 and IMDS have, against what pods use.

use super::Finding;
use crate::model::ec2::Interface;
use crate::model::ids::EniId;
use crate::model::imds::{Eni, Identity};
use crate::model::map::{Map, Set};
use crate::model::naming::table_of;
use crate::model::order::Gather as _;
use crate::plan::host::Intent;
use ipnet::IpNet;
use std::net::IpAddr;

type Nets = Map<EniId, Set<IpNet>>;

fn by_imds(enis: &[Eni]) -> Nets {
    let nets = |eni: &Eni| {
        let v4 = eni.ipv4s.iter().map(|ip| IpNet::from(IpAddr::V4(*ip)));
        let v6 = eni.ipv6s.iter().map(|ip| IpNet::from(IpAddr::V6(*ip)));
        v4.chain(v6).chain(eni.v4_prefixes.iter().copied()).chain(eni.v6_prefixes.iter().copied()).gather()
    };
    enis.iter().map(|eni| (eni.id.clone(), nets(eni))).gather()
}

fn by_ec2(interfaces: &[Interface]) -> Nets {
    let nets = |eni: &Interface| {
        let v4 = eni.primary_ipv4.iter().chain(&eni.secondary_ipv4s).map(|ip| IpNet::from(IpAddr::V4(*ip)));
        let v6 = eni.ipv6s.iter().map(|ip| IpNet::from(IpAddr::V6(*ip)));
        let prefixes = eni.v4_prefixes.iter().copied().map(IpNet::V4);
        v4.chain(v6).chain(prefixes).chain(eni.v6_prefixes.iter().copied()).gather()
    };
    interfaces.iter().map(|eni| (eni.id.clone(), nets(eni))).gather()
}

/// Pods and ENIs of the intent against IMDS, and against EC2 if it was asked; where the two differ EC2 is right. Without either
/// (`imds` is what it says now, none if it is silent) there is nothing to say of them: the advice is to delete pods.
pub fn findings(intent: &Intent, me: &Identity, imds: Option<&[Eni]>, ec2: Option<&[Interface]>) -> Vec<Finding> {
    let mut found = Vec::new();
    let told = imds.map(by_imds);
    let truth = ec2.map(by_ec2);
    if let (Some(truth), Some(told)) = (&truth, &told) {
        for (eni, nets) in truth {
            let listed = told.get(eni);
            let missing = nets.iter().filter(|net| listed.is_none_or(|listed| !listed.contains(net))).count();
            let extra = listed.map_or(0, |listed| listed.difference(nets).count());
            if missing + extra > 0 {
                let text = format!("IMDS lacks {missing} and has {extra} addresses too many of what EC2 lists");
                found.push(Finding::new("imds-stale", eni.as_str(), text));
            }
        }
        for eni in told.keys().filter(|eni| !truth.contains_key(*eni)) {
            found.push(Finding::new("imds-stale", eni.as_str(), "IMDS lists it, EC2 does not"));
        }
    }
    let source = if truth.is_some() { "EC2" } else { "IMDS" };
    let Some(truth) = truth.or(told) else { return found };
    for eni in intent.enis.iter().filter(|eni| !truth.contains_key(&eni.id)) {
        found.push(Finding::new("eni-not-attached", eni.id.as_str(), format!("{source} does not list it")));
    }
    let places = imds.unwrap_or_default().iter().map(|eni| (&eni.id, eni.card, eni.device));
    let attached = ec2.unwrap_or_default().iter().filter_map(|eni| Some((&eni.id, eni.attachment.as_ref()?)));
    let places = attached.map(|(id, at)| (id, at.card, at.device)).chain(places);
    let tables = places.filter_map(|(id, card, device)| Some((id.clone(), table_of(card, device).ok()?)));
    let tables = tables.gather::<Map<_, _>>();
    for pod in &intent.pods {
        let held = |nets: &Set<IpNet>| {
            nets.contains(&IpNet::from(pod.address)) || nets.iter().any(|net| net.contains(&pod.address))
        };
        match truth.iter().find(|(_, nets)| held(nets)) {
            None => {
                let text = format!("{} is on no ENI of {}, says {source}", pod.address, me.instance.as_str());
                found.push(Finding::new("address-lost", pod.name.as_str(), text));
            }
            Some((eni, _)) => {
                if let Some(table) = tables.get(eni).filter(|table| **table != pod.table) {
                    let text = format!("{} is on {eni} (table {table}), routed by table {}", pod.address, pod.table);
                    found.push(Finding::new("pod-other-eni", pod.name.as_str(), text));
                }
            }
        }
    }
    found
}
