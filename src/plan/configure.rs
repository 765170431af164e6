//! From the operator's settings and the instance to what the core is told: one mapping for the daemon, the simulator and
//! the planner, so that what is simulated is what will run.

use super::core::{Config, Tunables};
use super::egress::is_host_end;
use super::host::{Egress, Intent};
use super::sizing::Targets;
use crate::model::imds::Identity;
use crate::model::limits::{self, Limits};
use crate::model::net::Link;
use crate::model::order::Gather as _;
use crate::model::settings::{Mode, Settings, Valid};
use ipnet::IpNet;
use std::net::IpAddr;
use std::time::Duration;

/// The core's configuration. `seed` makes its random numbers; on a node it is random itself.
pub fn config(settings: &Settings, valid: &Valid, limits: &Limits, identity: &Identity, seed: u64) -> Config {
    let managed = if settings.multi_nic { valid.enis_per_card.len() } else { 1 };
    let cards = (0..).zip(&valid.enis_per_card).take(managed).map(|(card, enis)| (card, size(*enis)));
    let names = (settings.eni_config_annotation.clone(), settings.eni_config_label.clone());
    Config {
        identity: identity.clone(),
        v6: valid.mode == Mode::Ipv6Prefixes,
        prefix_mode: valid.mode != Mode::Ipv4Addresses,
        slots: size(limits.slots_per_eni()),
        cards: cards.gather(),
        max_pods: size(max_pods(settings, valid, limits)),
        provisioning: !settings.read_only(),
        imds_only: settings.imds_only,
        custom_networking: settings.custom_networking.then_some(names),
        pod_eni: settings.pod_eni,
        trunk_capable: limits::takes_trunk(&identity.instance_type),
        annotate_pod_ip: settings.annotate_pod_ip,
        multi_nic: settings.multi_nic,
        clean_leaked: settings.cleans_leaked_enis(),
        subnet_discovery: settings.subnet_discovery,
        manage_untagged: settings.manage_untagged_eni,
        cluster_name: settings.cluster_name.clone(),
        additional_tags: settings.additional_eni_tags.clone(),
        network_policy_mode: settings.network_policy_mode.clone().unwrap_or_default(),
        tunables: tunables(settings, identity),
        seed,
    }
}

// As far as the instance type tells; the Node object knows better (`spec/config.md` 2.2).
fn max_pods(settings: &Settings, valid: &Valid, limits: &Limits) -> u32 {
    let reserved = u32::from(settings.custom_networking);
    match valid.mode {
        Mode::Ipv4Addresses => limits.max_pods_with(reserved, false),
        Mode::Ipv4Prefixes => limits.max_pods_with(reserved, true),
        Mode::Ipv6Prefixes => limits.kubelet_pods,
    }
}

/// The part that may change while the daemon runs.
pub fn tunables(settings: &Settings, identity: &Identity) -> Tunables {
    let nets = |nets: &[ipnet::Ipv4Net]| nets.iter().map(|net| IpNet::V4(*net)).collect::<Vec<_>>();
    let v6 = settings.mode_wished() == Mode::Ipv6Prefixes;
    let node_ip = identity.local_ipv6.filter(|_| v6).map_or(IpAddr::V4(identity.local_ipv4), IpAddr::V6);
    Tunables {
        targets: Targets {
            warm_eni: size(settings.warm_eni_target),
            warm_ip: size(settings.warm_ip_target),
            minimum_ip: size(settings.minimum_ip_target),
            warm_prefix: size(settings.warm_prefix_target),
        },
        ip_cooldown: Duration::from_secs(settings.ip_cooldown_s.into()),
        add_wait: Duration::from_secs(settings.add_wait_s.into()),
        manage_unschedulable: settings.manage_non_schedulable,
        host: Intent {
            v6,
            node_ip,
            primary_mac: identity.mac,
            eni_mtu: settings.eni_mtu,
            external_snat: settings.external_snat,
            node_port: settings.node_port,
            snat_ports: settings.snat_ports,
            keep_host_source: settings.keep_host_source,
            mark: settings.connmark,
            veth_prefix: settings.veth_prefix.clone(),
            strict_branches: settings.pod_eni && settings.pod_security_groups_strict(),
            excluded_cidrs: nets(&settings.exclude_snat_cidrs),
            external_service_cidrs: nets(&settings.external_service_cidrs),
            egress: egress(settings, identity, v6),
            ..Intent::default()
        },
    }
}

/// Whether the node's IPv6 address is to be known: for IPv6 pods, and for the way out over IPv6, which pods from before keep when it
/// is switched off. `links` are the node's. What an earlier version has made tells by its name alone that it may be such a way: one
/// too many costs a question.
pub fn needs_v6(settings: &Settings, links: &[Link]) -> bool {
    settings.enable_ipv6 || settings.v6_egress || links.iter().any(is_host_end)
}

/// The way out of the other family. Switched off, it is kept for pods from before, as the original's chains for single pods are.
/// The node's IPv6 address is known if IPv6 is wanted or such pods are there.
fn egress(settings: &Settings, identity: &Identity, v6: bool) -> Egress {
    match (v6, identity.local_ipv6) {
        (true, _) if settings.v4_egress => Egress::Snat(identity.local_ipv4.into()),
        (true, _) => Egress::Ending(identity.local_ipv4.into()),
        (false, Some(own)) if settings.v6_egress => Egress::Snat(own.into()),
        (false, None) if settings.v6_egress => Egress::Guard,
        (false, Some(own)) => Egress::Ending(own.into()),
        (false, None) => Egress::Off,
    }
}

fn size(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::net::Mac;

    #[test]
    fn the_ipv6_address_is_asked_for_where_a_pod_may_use_it() {
        let check = |pairs: &[(&str, &str)], name: &str, kind: Option<&str>, expected: bool| {
            let lookup = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
            let link = Link { name: name.into(), kind: kind.map(str::to_owned), ..Link::default() };
            assert_eq!(needs_v6(&Settings::parse(lookup).0, &[link]), expected, "{pairs:?} {name}");
        };
        let off = [("ENABLE_V6_EGRESS", "false")];
        check(&off, "eth0", None, false);
        check(&off, "eni0123456789a", Some("veth"), false);
        check(&[("ENABLE_V6_EGRESS", "true")], "eth0", None, true);
        check(&[("ENABLE_IPv6", "true")], "eth0", None, true);
        check(&off, "veth000000a1", Some("veth"), true); // of a version that noted nothing on it
        check(&off, "veth000000a1", None, false);
    }

    #[test]
    fn the_other_family_has_its_way_out() {
        const V6: &str = "2001:db8::5";
        let check = |pairs: &[(&str, &str)], own: Option<&str>, expected: Egress| {
            let lookup = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
            let (settings, _) = Settings::parse(lookup);
            let identity = Identity {
                region: "eu-west-1".into(),
                zone: "eu-west-1a".into(),
                instance: "i-1".into(),
                instance_type: "m5.large".into(),
                local_ipv4: "10.0.0.5".parse().unwrap(),
                local_ipv6: own.map(|text| text.parse().unwrap()),
                mac: Mac::default(),
                primary_eni: "eni-1".into(),
                subnet: "subnet-1".into(),
                vpc: "vpc-1".into(),
            };
            let host = tunables(&settings, &identity).host;
            assert_eq!((host.egress, host.node_ip.is_ipv6()), (expected, host.v6), "{pairs:?}");
        };
        let snat = |text: &str| Egress::Snat(text.parse().unwrap());
        let ending = |text: &str| Egress::Ending(text.parse().unwrap());
        let v6 = ("ENABLE_IPv6", "true");
        check(&[], None, Egress::Off);
        check(&[v6], Some(V6), snat("10.0.0.5"));
        check(&[v6, ("ENABLE_V4_EGRESS", "false")], Some(V6), ending("10.0.0.5"));
        check(&[("ENABLE_V4_EGRESS", "true")], None, Egress::Off);
        check(&[("ENABLE_V6_EGRESS", "true")], Some(V6), snat(V6));
        check(&[("ENABLE_V6_EGRESS", "true")], None, Egress::Guard);
        check(&[("ENABLE_V6_EGRESS", "false")], Some(V6), ending(V6));
        check(&[v6, ("ENABLE_V6_EGRESS", "true"), ("ENABLE_V4_EGRESS", "false")], Some(V6), ending("10.0.0.5"));
    }
}
