//! Limits of the instance types known at the time of the build (`spec/aws.md` 15).
//!
//! The table is kept as 8 KiB of text in the notation of its source and read on each look-up: one look-up per start of
//! the daemon does not earn a map in memory, and the text can be compared with its source by eye. A type that is missing
//! here is asked of EC2 by the daemon; this module asks nobody.

use super::ec2::InstanceType;
use serde_json::{Value, json};

/// `<ENIs per card>/<IPv4 addresses per ENI> <size>: <families>`; a line that starts with a blank continues the one above.
const TYPES: &str = include_str!("limits.txt");

/// Types with more than one network card: number of cards and types.
const CARDS: [(usize, &str); 6] = [
    (
        2,
        "c6in.32xlarge c6in.metal c8gb.48xlarge c8gb.metal-48xl c8gn.48xlarge c8gn.metal-48xl c8ib.96xlarge \
         c8ib.metal-96xl c8in.96xlarge c8in.metal-96xl g6e.24xlarge g7.48xlarge g7e.24xlarge hpc6id.32xlarge \
         hpc7a.12xlarge hpc7a.24xlarge hpc7a.48xlarge hpc7a.96xlarge hpc8a.96xlarge m6idn.32xlarge m6idn.metal \
         m6in.32xlarge m6in.metal m8gb.48xlarge m8gb.metal-48xl m8gn.48xlarge m8gn.metal-48xl m8ib.96xlarge \
         m8ib.metal-96xl m8idb.96xlarge m8idb.metal-96xl m8idn.96xlarge m8idn.metal-96xl m8in.96xlarge m8in.metal-96xl \
         r6idn.32xlarge r6idn.metal r6in.32xlarge r6in.metal r8gb.48xlarge r8gb.metal-48xl r8gn.48xlarge \
         r8gn.metal-48xl r8ib.96xlarge r8ib.metal-96xl r8idb.96xlarge r8idb.metal-96xl r8idn.96xlarge r8idn.metal-96xl \
         r8in.96xlarge r8in.metal-96xl u7in-16tb.224xlarge u7in-24tb.224xlarge u7in-32tb.224xlarge",
    ),
    (4, "dl1.24xlarge g6e.48xlarge g7e.48xlarge p4d.24xlarge p4de.24xlarge"),
    (8, "p6-b200.48xlarge trn1.32xlarge"),
    (16, "p5en.48xlarge trn1n.32xlarge trn2.48xlarge"),
    (17, "p6-b300.48xlarge"),
    (32, "p5.48xlarge p5e.48xlarge"),
];

/// Families that run on Xen in every size.
const XEN: &str = "c1 c3 c4 d2 f1 h1 i2 i3 m1 m2 m3 m4 p3 r3 r4 t1 t2 x1 x1e";

/// Families none of whose sizes can carry a trunk ENI (`spec/aws.md` 15.2); `i3.metal` can.
const TRUNKLESS: &str = "c1 c3 c4 d2 f1 h1 i2 i3 m1 m2 m3 m4 p3 r3 r4 t1 t2 t3 t3a t4g x1 x1e";

/// What runs the instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hypervisor {
    /// Nitro.
    Nitro,
    /// Xen.
    Xen,
    /// None (most bare-metal types) or not told.
    Unknown,
}

/// What an instance type can carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// ENIs on the default network card, the primary one included.
    pub enis: u32,
    /// IPv4 addresses per ENI, the ENI's own included; prefixes count as one address each.
    pub ipv4_per_eni: u32,
    /// ENIs that each network card takes, by card index; never empty.
    pub cards: Vec<u32>,
    /// Hypervisor.
    pub hypervisor: Hypervisor,
    /// Bare metal.
    pub bare_metal: bool,
    /// Pods that a kubelet is advised to run at most where addresses are not the bound: 110, above 30 vCPUs 250
    /// (`spec/operations.md` 9.1).
    pub kubelet_pods: u32,
}

impl Limits {
    /// Addresses or prefixes that an ENI has for pods: all but its own.
    pub fn slots_per_eni(&self) -> u32 {
        self.ipv4_per_eni.saturating_sub(1)
    }

    /// Whether EC2 assigns prefixes to this type.
    pub fn takes_prefixes(&self) -> bool {
        self.hypervisor == Hypervisor::Nitro || self.bare_metal
    }

    /// Addresses for pods on card 0 when `reserved` of its ENIs serve none: the primary one with custom networking, a
    /// trunk (`spec/operations.md` 9.1). Each slot is an address, or a prefix of 16.
    pub fn pod_addresses(&self, reserved: u32, prefixes: bool) -> u32 {
        let slots = self.enis.saturating_sub(reserved).saturating_mul(self.slots_per_eni());
        slots.saturating_mul(if prefixes { 16 } else { 1 })
    }

    /// Pods by convention of the kubelet's `--max-pods`: every address and two pods on the host's network; with prefixes
    /// no more than [`Limits::kubelet_pods`], which is also the figure of IPv6.
    pub fn max_pods_with(&self, reserved: u32, prefixes: bool) -> u32 {
        let pods = self.pod_addresses(reserved, prefixes).saturating_add(2);
        if prefixes { pods.min(self.kubelet_pods) } else { pods }
    }

    /// Pods that fit with single secondary addresses (`spec/aws.md` 15.1).
    pub fn max_pods(&self) -> u32 {
        self.max_pods_with(0, false)
    }
}

/// Whether the type has more than 30 vCPUs. The table has no such column, but sizes mean the same in nearly all
/// families: `<n>xlarge` has 4n vCPUs, so that the bound lies between 7 and 8. The exceptions on the wrong side of it are
/// `hpc7a.12xlarge` (24), `a1.metal` (16) and the Macs (8 to 28), as a comparison with 1368 answers of EC2 (moto 5.2.5
/// carries them) shows. `hs1.8xlarge` (16) takes neither prefixes nor IPv6, where alone it would matter.
fn many_vcpus(instance_type: &str) -> bool {
    let (family, size) = instance_type.split_once('.').unwrap_or_default();
    let times = size.strip_prefix("metal-").and_then(|size| size.strip_suffix("xl")).or(size.strip_suffix("xlarge"));
    match times.map(str::parse) {
        _ if instance_type == "hpc7a.12xlarge" => false,
        None => size == "metal" && family != "a1" && !family.starts_with("mac"),
        Some(times) => times.is_ok_and(|times: u32| times > 7),
    }
}

fn kubelet_pods(instance_type: &str) -> u32 {
    if many_vcpus(instance_type) { 250 } else { 110 }
}

/// Network cards of one instance; today's largest has 32. An answer that names a higher index is taken to be broken.
const CARDS_MAX: u32 = 256;

/// What EC2 tells of a type; `None` when it is of no use: no ENI or no address (`spec/aws.md` 7.1).
pub fn from_ec2(described: &InstanceType) -> Option<Limits> {
    let last = described.cards.iter().map(|(index, _)| *index).max().filter(|last| *last < CARDS_MAX)?;
    let cards: Vec<u32> = (0..=last)
        .map(|index| described.cards.iter().find(|(card, _)| *card == index).map_or(0, |(_, enis)| *enis))
        .collect();
    let enis = *cards.get(usize::try_from(described.default_card).ok()?)?;
    let hypervisor = match described.hypervisor.as_str() {
        "nitro" => Hypervisor::Nitro,
        "xen" => Hypervisor::Xen,
        _ => Hypervisor::Unknown,
    };
    (enis > 0 && described.ipv4_per_eni > 0).then_some(Limits {
        enis,
        ipv4_per_eni: described.ipv4_per_eni,
        cards,
        hypervisor,
        bare_metal: described.bare_metal,
        kubelet_pods: kubelet_pods(&described.name),
    })
}

/// What EC2 told of a type, to be kept: a JSON object with the names of the API.
pub fn to_json(described: &InstanceType) -> String {
    let cards: Vec<Value> = described
        .cards
        .iter()
        .map(|(index, enis)| json!({"networkCardIndex": index, "maximumNetworkInterfaces": enis}))
        .collect();
    json!({
        "instanceType": described.name,
        "hypervisor": described.hypervisor,
        "bareMetal": described.bare_metal,
        "ipv4AddressesPerInterface": described.ipv4_per_eni,
        "defaultNetworkCardIndex": described.default_card,
        "networkCards": cards,
    })
    .to_string()
}

/// Reads what [`to_json`] wrote; `None` if it is of another type, or no such object.
pub fn from_json(text: &str, instance_type: &str) -> Option<InstanceType> {
    let told: Value = serde_json::from_slice(text.as_bytes()).ok()?;
    let number = |from: &Value, name: &str| u32::try_from(from.get(name)?.as_u64()?).ok();
    let name = told.get("instanceType")?.as_str().filter(|name| *name == instance_type)?;
    let card = |card: &Value| Some((number(card, "networkCardIndex")?, number(card, "maximumNetworkInterfaces")?));
    Some(InstanceType {
        name: name.to_owned(),
        hypervisor: told.get("hypervisor")?.as_str()?.to_owned(),
        bare_metal: told.get("bareMetal")?.as_bool()?,
        ipv4_per_eni: number(&told, "ipv4AddressesPerInterface")?,
        default_card: number(&told, "defaultNetworkCardIndex")?,
        cards: told.get("networkCards")?.as_array()?.iter().map(card).collect::<Option<_>>()?,
    })
}

/// For a type of which nothing is known where nothing is allocated and EC2 not asked (IMDS-only mode): the largest
/// figures of the table, so that nothing that is attached is too much.
pub fn unknown(instance_type: &str) -> Limits {
    Limits {
        enis: 24,
        ipv4_per_eni: 64,
        cards: vec![24],
        hypervisor: Hypervisor::Nitro,
        bare_metal: false,
        kubelet_pods: kubelet_pods(instance_type),
    }
}

/// Limits of an instance type such as `m5.large`, if it was known when this program was built.
pub fn of(instance_type: &str) -> Option<Limits> {
    let (family, size) = instance_type.split_once('.')?;
    let (enis, ipv4_per_eni, ..) =
        entries().find(|(_, _, entry_size, entry_family)| *entry_size == size && *entry_family == family)?;
    let cards = CARDS.iter().find(|(_, types)| listed(types, instance_type)).map_or(1, |(cards, _)| *cards);
    let bare_metal = size.starts_with("metal");
    let (hypervisor, kubelet_pods) = (hypervisor(family, size), kubelet_pods(instance_type));
    Some(Limits { enis, ipv4_per_eni, cards: vec![enis; cards], hypervisor, bare_metal, kubelet_pods })
}

/// The names of all known types.
pub fn names() -> impl Iterator<Item = String> {
    entries().map(|(_, _, size, family)| format!("{family}.{size}"))
}

/// Known types whose names are most like this one, the likest first: those that begin and end alike.
pub fn like(instance_type: &str, most: usize) -> Vec<String> {
    let alike = |name: &str| {
        let (mine, other) = (instance_type.bytes(), name.bytes());
        let ends = mine.clone().rev().zip(other.clone().rev()).take_while(|(a, b)| a == b).count();
        let begins = mine.zip(other).take_while(|(a, b)| a == b).count();
        (begins + ends).min(name.len())
    };
    let mut names: Vec<String> = names().collect();
    super::order::sort_by_key(&mut names, |name| {
        (std::cmp::Reverse(alike(name)), name.len().abs_diff(instance_type.len()), name.clone())
    });
    names.retain(|name| alike(name) >= 3);
    names.truncate(most);
    names
}

/// Whether the type can carry a trunk ENI. A type that is not known to be unable counts as able, as upstream does.
pub fn takes_trunk(instance_type: &str) -> bool {
    let Some((family, size)) = instance_type.split_once('.') else { return true };
    let unable = match (family, size) {
        ("i3", "metal") => false,
        ("i4i", "large") => true,
        ("u-6tb1", size) => !size.starts_with("metal"),
        _ => listed(TRUNKLESS, family),
    };
    !unable
}

fn hypervisor(family: &str, size: &str) -> Hypervisor {
    match (family, size) {
        ("c7g", "metal") => Hypervisor::Nitro,
        ("cr1" | "hs1", "8xlarge") => Hypervisor::Unknown,
        (_, size) if size.starts_with("metal") => Hypervisor::Unknown,
        (family, _) if listed(XEN, family) => Hypervisor::Xen,
        _ => Hypervisor::Nitro,
    }
}

fn listed(words: &str, word: &str) -> bool {
    words.split_ascii_whitespace().any(|each| each == word)
}

/// Every type of the table: ENIs, addresses, size, family. A malformed line would be skipped; the tests count them all.
fn entries() -> impl Iterator<Item = (u32, u32, &'static str, &'static str)> {
    let mut head = None;
    TYPES.lines().flat_map(move |line| {
        let families = match line.split_once(':') {
            Some((start, families)) => {
                head = parse_head(start);
                families
            }
            None => line,
        };
        let head = head;
        families
            .split_ascii_whitespace()
            .filter_map(move |family| head.map(|(enis, addresses, size)| (enis, addresses, size, family)))
    })
}

fn parse_head(text: &'static str) -> Option<(u32, u32, &'static str)> {
    let (numbers, size) = text.split_once(' ')?;
    let (enis, addresses) = numbers.split_once('/')?;
    Some((enis.parse().ok()?, addresses.parse().ok()?, size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::map::Set;

    #[test]
    fn the_table_holds_every_type_once() {
        let names: Vec<String> = entries().map(|(_, _, size, family)| format!("{family}.{size}")).collect();
        let unique: Set<&String> = names.iter().collect();
        assert_eq!((names.len(), unique.len()), (1391, 1391));
        for name in &names {
            let limits = of(name).unwrap_or_else(|| panic!("{name} is not found by its own name"));
            assert!(limits.enis > 0 && limits.ipv4_per_eni > 0, "{name}: {limits:?}");
        }
    }

    #[test]
    fn every_line_of_the_table_is_understood() {
        for line in TYPES.lines() {
            let head = line.split_once(':').map(|(head, _)| head);
            assert!(line.starts_with(' ') || head.and_then(parse_head).is_some(), "{line:?}");
        }
    }

    #[test]
    fn multi_card_types_are_in_the_table() {
        let types: Vec<&str> = CARDS.iter().flat_map(|(_, types)| types.split_ascii_whitespace()).collect();
        assert_eq!(types.iter().collect::<Set<_>>().len(), types.len(), "a type is named twice");
        for name in types {
            assert!(of(name).is_some_and(|limits| limits.cards.len() > 1), "{name}");
        }
    }

    #[test]
    fn samples() {
        #[track_caller]
        fn check(name: &str, enis: u32, ipv4: u32, cards: usize, hypervisor: Hypervisor, prefixes: bool, pods: u32) {
            let limits = of(name).unwrap_or_else(|| panic!("{name} is missing"));
            assert_eq!(
                (limits.enis, limits.ipv4_per_eni, limits.cards.len(), limits.hypervisor, limits.takes_prefixes()),
                (enis, ipv4, cards, hypervisor, prefixes),
                "{name}"
            );
            assert_eq!(limits.max_pods(), pods, "{name}");
        }
        use Hypervisor::{Nitro, Unknown, Xen};
        check("m5.large", 3, 10, 1, Nitro, true, 29);
        check("t3.micro", 2, 2, 1, Nitro, true, 4);
        check("m4.large", 2, 10, 1, Xen, false, 20);
        check("c5.metal", 15, 50, 1, Unknown, true, 737);
        check("p5.48xlarge", 2, 50, 32, Nitro, true, 100);
        check("c7g.metal", 15, 50, 1, Nitro, true, 737);
        check("cr1.8xlarge", 8, 30, 1, Unknown, false, 234);
        check("c6in.metal", 8, 50, 2, Unknown, true, 394);
    }

    /// Pods with single addresses, with prefixes, with custom networking (either), with custom networking and a trunk.
    #[test]
    fn pods_by_mode() {
        #[track_caller]
        fn check(name: &str, expected: [u32; 5]) {
            let limits = of(name).unwrap_or_else(|| panic!("{name} is missing"));
            let with = |reserved, prefixes| limits.max_pods_with(reserved, prefixes);
            assert_eq!(
                [with(0, false), with(0, true), with(1, false), with(1, true), with(2, false)],
                expected,
                "{name}"
            );
        }
        check("t3.nano", [4, 34, 3, 18, 2]);
        check("t3.small", [11, 110, 8, 98, 5]);
        check("t3.medium", [17, 110, 12, 110, 7]);
        check("m5.large", [29, 110, 20, 110, 11]);
        check("c5.xlarge", [58, 110, 44, 110, 30]);
        check("m5.4xlarge", [234, 110, 205, 110, 176]);
        check("z1d.6xlarge", [234, 110, 205, 110, 176]);
        check("m5.8xlarge", [234, 250, 205, 250, 176]);
        check("c5.9xlarge", [234, 250, 205, 250, 176]);
        check("m5.24xlarge", [737, 250, 688, 250, 639]);
        check("c7i.metal-24xl", [737, 250, 688, 250, 639]);
        check("c6g.metal", [737, 250, 688, 250, 639]);
        check("a1.metal", [234, 110, 205, 110, 176]);
        check("hpc7a.12xlarge", [100, 110, 51, 110, 2]);
        check("p4d.24xlarge", [737, 250, 688, 250, 639]); // the default card's, not all four cards'
    }

    /// What holds for every type: the figures of `spec/operations.md` 9.1 from the table's two numbers, and in every
    /// mode and with every reservation a figure that a node can live with.
    #[test]
    fn pods_of_every_type() {
        let mut many = 0;
        for (enis, addresses, size, family) in entries() {
            let name = format!("{family}.{size}");
            let limits = of(&name).unwrap();
            assert_eq!((limits.enis, limits.ipv4_per_eni), (enis, addresses), "{name}");
            many += u32::from(limits.kubelet_pods == 250);
            for reserved in 0..=enis {
                let slots = (enis - reserved) * (addresses - 1);
                let plain = limits.max_pods_with(reserved, false);
                let prefixes = limits.max_pods_with(reserved, true);
                assert_eq!((limits.pod_addresses(reserved, false), plain), (slots, slots + 2), "{name}");
                assert_eq!(limits.pod_addresses(reserved, true), slots * 16, "{name}");
                assert_eq!(prefixes, (slots * 16 + 2).min(limits.kubelet_pods), "{name}");
                assert!(prefixes >= plain.min(limits.kubelet_pods) && prefixes <= 250, "{name}");
            }
            assert_eq!(limits.max_pods(), limits.max_pods_with(0, false), "{name}");
            assert_eq!(limits.cards.iter().max(), Some(&enis), "{name}");
            // Sizes up to 4xlarge never have more than 30 vCPUs, and those from 8xlarge on nearly always.
            let small = ["nano", "micro", "small", "medium", "large", "xlarge", "2xlarge", "3xlarge", "4xlarge"];
            assert!(!(small.contains(&size) && limits.kubelet_pods == 250), "{name}");
        }
        assert_eq!(many, 754, "types with more than 30 vCPUs");
    }

    #[test]
    fn names_that_are_no_type() {
        for name in ["", ".", "m5", "m5.", ".large", "m5.large.x", "large.m5", "m5.10/50"] {
            assert_eq!(of(name), None, "{name:?}");
        }
    }

    #[test]
    fn names_that_are_like_another() {
        for (wrong, expected) in [("m5.larg", "m5.large"), ("m5large", "m5.large"), ("M5.large", "m5.large")] {
            assert!(like(wrong, 5).iter().any(|name| name == expected), "{wrong}: {:?}", like(wrong, 5));
        }
        assert_eq!(like("t3.smal", 1), ["t3.small"]);
        assert_eq!(like("?", 5), Vec::<String>::new());
    }

    #[test]
    fn trunks() {
        let able = ["m5.large", "i3.metal", "i4i.xlarge", "u-6tb1.metal", "x99.huge", "odd"];
        let unable = ["t3.large", "i3.large", "i4i.large", "u-6tb1.56xlarge", "x1e.xlarge"];
        for (names, expected) in [(&able[..], true), (&unable[..], false)] {
            for name in names {
                assert_eq!(takes_trunk(name), expected, "{name}");
            }
        }
    }

    #[test]
    fn what_ec2_told_is_kept_as_json() {
        let described = InstanceType {
            name: "new.32xlarge".into(),
            hypervisor: "nitro".into(),
            bare_metal: true,
            ipv4_per_eni: 50,
            default_card: 1,
            cards: vec![(0, 2), (1, 8)],
        };
        let text = to_json(&described);
        assert_eq!(from_json(&text, "new.32xlarge"), Some(described));
        assert_eq!(from_json(&text, "new.16xlarge"), None);
        for end in 0..text.len() {
            assert_eq!(from_json(&text[..end], "new.32xlarge"), None, "{end}");
        }
        for (from, to) in [("50", "-1"), ("8", "5000000000"), ("true", "1"), ("\"nitro\"", "null"), ("[", "{\"a\":[")] {
            assert_eq!(from_json(&text.replacen(from, to, 1), "new.32xlarge"), None, "{from} as {to}");
        }
        let all = entries().map(|(enis, addresses, ..)| (enis, addresses));
        let most = all.fold((0, 0), |most, each| (most.0.max(each.0), most.1.max(each.1)));
        let unknown = unknown("x99.large");
        assert_eq!((unknown.enis, unknown.ipv4_per_eni, unknown.kubelet_pods), (most.0, most.1, 110));
    }

    #[test]
    fn an_answer_of_ec2_counts_the_default_card_only() {
        let described = InstanceType {
            name: "new.32xlarge".into(),
            hypervisor: "nitro".into(),
            ipv4_per_eni: 50,
            default_card: 1,
            cards: vec![(0, 2), (1, 8)],
            ..InstanceType::default()
        };
        let limits = from_ec2(&described).expect("usable");
        assert_eq!((limits.enis, limits.cards), (8, vec![2, 8]));
        assert_eq!(from_ec2(&InstanceType { ipv4_per_eni: 0, ..described.clone() }), None);
        assert_eq!(from_ec2(&InstanceType { default_card: 2, ..described.clone() }), None);
        assert_eq!(from_ec2(&InstanceType { cards: vec![], ..described.clone() }), None);
        assert_eq!(from_ec2(&InstanceType { cards: vec![(1, 8), (u32::MAX, 8)], ..described }), None);
    }
}
