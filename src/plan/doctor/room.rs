//! How many pods the node has room for, against what the kubelet takes, and how long their addresses rest
//! (`spec/operations.md` 8.1 rows 3 and 34, 9.1).

use super::environment::Facts;
use super::{Finding, Severity};
use crate::model::limits::Limits;
use crate::model::settings::{Mode, Settings};

/// Pods on the host's network that every node has: kube-proxy and ours. They need no address.
const HOST_PODS: u32 = 2;
/// The default of `IP_COOLDOWN_PERIOD`, in seconds: kube-proxy tells every node of an endpoint that is gone within 30.
const COOLDOWN: u32 = 30;

/// Directory of pieces of the kubelet's configuration, of which the last counts most.
pub const KUBELET_PIECES: &str = "/etc/kubernetes/kubelet/config.json.d";
/// Configurations of the kubelet, by the images of EKS, Bottlerocket and kubeadm.
pub const KUBELET: [&str; 4] = [
    "/etc/kubernetes/kubelet/config.json",
    "/etc/kubernetes/kubelet/kubelet-config.json",
    "/etc/kubernetes/kubelet/config",
    "/var/lib/kubelet/config.yaml",
];

/// Room for pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// Pods, those on the host's network included.
    pub pods: u32,
    /// The sum that makes it.
    pub sum: String,
}

/// The room of a node of this type with `enis` ENIs on its first network card, if somebody knows better than the settings.
/// `None` where it has no bound that matters (IPv6), or branch ENIs take a number of pods that only the API server knows.
pub fn of(settings: &Settings, limits: &Limits, enis: Option<u32>) -> Option<Room> {
    let valid = settings.validate(limits).ok()?;
    if valid.mode == Mode::Ipv6Prefixes || settings.pod_eni {
        return None;
    }
    let enis = enis.or(valid.enis_per_card.first().copied())?;
    let (mut pods, mut sum) = (enis, format!("{enis} ENIs"));
    if settings.custom_networking {
        pods = pods.saturating_sub(1);
        sum = format!("({sum} - 1 of the node's own subnet)");
    }
    let slots = limits.slots_per_eni();
    pods = pods.saturating_mul(slots);
    if valid.mode == Mode::Ipv4Prefixes {
        pods = pods.saturating_mul(16);
        sum = format!("{sum} x {slots} prefixes x 16 addresses");
    } else {
        sum = format!("{sum} x {slots} addresses");
    }
    Some(Room { pods: pods.saturating_add(HOST_PODS), sum: format!("{sum} + {HOST_PODS} on the host's network") })
}

/// Pods that the kubelet takes, as its command line or its configuration says.
pub fn of_kubelet(facts: &Facts) -> Option<u32> {
    let after = |text: &str, word: &str| {
        let rest = text.rsplit_once(word)?.1.trim_start_matches(['"', ':', '=', ' ', '\0']);
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    let in_file = |text: &str| after(text, "maxPods");
    let pieces = || facts.below(KUBELET_PIECES).filter_map(|(_, text)| in_file(text)).last();
    let whole = || KUBELET.iter().find_map(|path| in_file(facts.files.get(*path)?));
    after(&facts.kubelet, "--max-pods").or_else(pieces).or_else(whole)
}

/// A kubelet that takes more pods than there is room for.
pub fn max_pods(room: &Room, kubelet: u32) -> Option<Finding> {
    let Room { pods, sum } = room;
    let seen = format!("the kubelet takes {kubelet} pods, and the node has room for {pods}: {sum}");
    let remedy =
        format!("maxPods: {pods} in the kubelet's configuration; or ENABLE_PREFIX_DELEGATION, or a larger type");
    (kubelet > *pods).then(|| Finding::new("max-pods", "", seen).mended_by(remedy))
}

/// Addresses that rest too short before their next pod. `reused` says which have done so lately; it may be empty.
pub fn cool_down(settings: &Settings, reused: &str) -> Option<Finding> {
    let rest = settings.ip_cooldown_s;
    let mut seen = format!("IP_COOLDOWN_PERIOD is {rest}, the default {COOLDOWN}");
    if !reused.is_empty() {
        seen = format!("{seen}; lately pods got {reused}");
    }
    let mut finding = Finding::new("cool-down", "", seen);
    // An operator may know that a little less will do.
    if rest > 0 && reused.is_empty() {
        finding.severity = Severity::Note;
    }
    (rest < COOLDOWN).then_some(finding)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::limits;

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        let get = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Settings::parse(get).0
    }

    #[test]
    fn room_by_mode() {
        let check = |kind: &str, pairs: &[(&str, &str)], enis: Option<u32>, expected: Option<(u32, &str)>| {
            let pairs = [pairs, &[("WARM_PREFIX_TARGET", "1")]].concat();
            let room = of(&settings(&pairs), &limits::of(kind).unwrap(), enis);
            let room =
                room.as_ref().map(|room| (room.pods, room.sum.strip_suffix(" + 2 on the host's network").unwrap()));
            assert_eq!(room, expected, "{kind} {pairs:?}");
        };
        let prefixes = ("ENABLE_PREFIX_DELEGATION", "true");
        let custom = ("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true");
        check("t3.small", &[], None, Some((11, "3 ENIs x 3 addresses")));
        check("m5.large", &[], None, Some((29, "3 ENIs x 9 addresses")));
        check("m5.large", &[("MAX_ENI", "2")], None, Some((20, "2 ENIs x 9 addresses")));
        // One ENI is taken by what is not ours.
        check("m5.large", &[], Some(1), Some((11, "1 ENIs x 9 addresses")));
        check("m5.large", &[prefixes], None, Some((434, "3 ENIs x 9 prefixes x 16 addresses")));
        check("m5.large", &[custom], None, Some((20, "(3 ENIs - 1 of the node's own subnet) x 9 addresses")));
        let both = Some((290, "(3 ENIs - 1 of the node's own subnet) x 9 prefixes x 16 addresses"));
        check("m5.large", &[custom, prefixes], None, both);
        // On Xen there are no prefixes.
        check("m4.large", &[prefixes], None, Some((20, "2 ENIs x 9 addresses")));
        check("p4d.24xlarge", &[], None, Some((737, "15 ENIs x 49 addresses")));
        check("m5.large", &[("ENABLE_IPv6", "true"), prefixes], None, None);
        check("m5.large", &[("ENABLE_POD_ENI", "true")], None, None);
    }

    #[test]
    fn the_kubelets_figure() {
        let check = |kubelet: &str, files: &[(&str, &str)], expected: Option<u32>| {
            let files = files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
            let facts = Facts { kubelet: kubelet.into(), files, ..Facts::default() };
            assert_eq!(of_kubelet(&facts), expected, "{kubelet:?}");
        };
        let json = (KUBELET[0], "{\"kind\":\"KubeletConfiguration\",\"maxPods\":29,\"x\":1}");
        let piece = |name| (name, "{ \"maxPods\" : 58 }");
        check("", &[], None);
        check("/usr/bin/kubelet\0--config=/x\0", &[json], Some(29));
        check("/usr/bin/kubelet\0--max-pods=17\0--v=2\0", &[json], Some(17));
        check("/usr/bin/kubelet\0--max-pods\x0017\0", &[json], Some(17));
        check("", &[json, piece("/etc/kubernetes/kubelet/config.json.d/40-nodeadm.conf")], Some(58));
        check("", &[(KUBELET[3], "a: 1\nmaxPods: 110\nb: 2\n")], Some(110));
        check("", &[(KUBELET[3], "a: 1\n# maxPods is not told\n")], None);
    }

    #[test]
    fn more_pods_than_room() {
        let room = Room { pods: 11, sum: "3 ENIs x 3 addresses".into() };
        assert_eq!(max_pods(&room, 11), None);
        let found = max_pods(&room, 12).unwrap();
        assert!(found.seen.contains("takes 12 pods") && found.seen.ends_with("room for 11: 3 ENIs x 3 addresses"));
        assert!(found.remedy.starts_with("maxPods: 11 "), "{}", found.remedy);
    }

    #[test]
    fn addresses_that_rest_too_short() {
        let check = |rest: &str, reused: &str, expected: Option<Severity>| {
            let found = cool_down(&settings(&[("IP_COOLDOWN_PERIOD", rest)]), reused);
            assert_eq!(found.as_ref().map(|finding| finding.severity), expected, "{rest} {reused:?}");
            assert!(found.is_none_or(|finding| finding.seen.contains(reused)));
        };
        check("30", "", None);
        check("300", "", None);
        check("29", "", Some(Severity::Note));
        check("29", "10.0.0.9 after 4 s", Some(Severity::Warn));
        check("0", "", Some(Severity::Warn));
        check("30", "10.0.0.9 after 4 s", None); // it was shorter before
    }
}
