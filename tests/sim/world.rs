//! The kinds of nodes that a wide schedule draws from: modes, instance types, what is there before the daemon starts, and
//! how many pods such a node can serve at any time. Also the VPC resource controller, which attaches trunk ENIs and tells
//! pods of their branches.

use enibox::model::ec2::{Call, Count, InstanceType, Interface};
use enibox::model::ids::{EniId, SubnetId};
use enibox::model::kube::{EniConfig, FEATURE_TRUNK, POD_ENI};
use enibox::model::limits;
use enibox::model::map::Map;
use enibox::model::settings::Settings;
use enibox::sim::fleet::Fleet;
use enibox::sim::node::{Node, carried};
use enibox::sim::vpc::Vpc;

pub type Pairs = &'static [(&'static str, &'static str)];

/// Three ENIs on card 0 and two on card 1, each with three addresses for pods.
pub const TWO_CARDS: &str = "two.cards";
const NO_MANAGE: &str = "node.k8s.amazonaws.com/no_manage";
const INSTANCE: &str = "node.k8s.amazonaws.com/instance_id";
/// Pods of a node at most; more would only make schedules slower.
const MOST: usize = 14;

/// What is special about a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// Addresses or prefixes, which may change with a restart.
    Plain,
    V6,
    Custom,
    Cards,
    Branch,
    /// Provisioning disabled, or no EC2 at all: what is there is all there is.
    Fixed,
}

pub struct Kind {
    pub sort: Sort,
    pub types: &'static [&'static str],
    pub settings: Pairs,
}

const ANY: &[&str] = &["t3.small", "m5.large", "t3.medium", "t3.nano"];
pub const SIX: [(&str, &str); 3] =
    [("ENABLE_IPv4", "false"), ("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true")];
const PREFIX: (&str, &str) = ("ENABLE_PREFIX_DELEGATION", "true");
const WARM_PREFIX: (&str, &str) = ("WARM_PREFIX_TARGET", "1");
pub const CUSTOM: (&str, &str) = ("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true");
pub const POD_ENI_ON: (&str, &str) = ("ENABLE_POD_ENI", "true");
pub const MULTI_NIC: (&str, &str) = ("ENABLE_MULTI_NIC", "true");
const FIXED: (&str, &str) = ("DISABLE_NETWORK_RESOURCE_PROVISIONING", "true");
const IMDS_ONLY: (&str, &str) = ("ENABLE_IMDS_ONLY_MODE", "true");

/// Settings of plain nodes.
pub const PLAIN: [Pairs; 12] = [
    &[],
    &[("WARM_IP_TARGET", "2"), ("MINIMUM_IP_TARGET", "4")],
    &[("WARM_ENI_TARGET", "0")],
    &[("WARM_ENI_TARGET", "2")],
    &[("WARM_IP_TARGET", "1")],
    &[("ENABLE_SUBNET_DISCOVERY", "false")],
    &[("MAX_ENI", "2")],
    &[("MANAGE_UNTAGGED_ENI", "false")],
    &[("AWS_MANAGE_ENIS_NON_SCHEDULABLE", "true")],
    &[PREFIX, WARM_PREFIX],
    &[PREFIX, ("WARM_IP_TARGET", "3"), ("MINIMUM_IP_TARGET", "6")],
    &[PREFIX, WARM_PREFIX, ("MAX_ENI", "2")],
];

/// What an operator changes without a restart.
pub const LIVE: [Pairs; 8] = [
    &[],
    &[("WARM_IP_TARGET", "2"), ("MINIMUM_IP_TARGET", "4")],
    &[("WARM_ENI_TARGET", "0")],
    &[("WARM_ENI_TARGET", "2")],
    &[("WARM_PREFIX_TARGET", "2")],
    &[("AWS_MANAGE_ENIS_NON_SCHEDULABLE", "true")],
    &[("ENIBOX_ADD_WAIT", "0")],
    &[("AWS_VPC_K8S_CNI_EXTERNALSNAT", "true")],
];

const fn kind(sort: Sort, types: &'static [&'static str], settings: Pairs) -> Kind {
    Kind { sort, types, settings }
}

/// Nodes that are not plain.
pub const SPECIAL: [Kind; 16] = [
    kind(Sort::V6, &["t3.small", "m5.large", "t3.nano"], &SIX),
    kind(Sort::V6, &["t3.small", "m5.large", "t3.nano"], &SIX),
    kind(Sort::V6, &[TWO_CARDS], &[SIX[0], SIX[1], SIX[2], MULTI_NIC]),
    kind(Sort::Custom, ANY, &[CUSTOM]),
    kind(Sort::Custom, ANY, &[CUSTOM, ("WARM_IP_TARGET", "2"), ("MINIMUM_IP_TARGET", "3")]),
    kind(Sort::Custom, ANY, &[CUSTOM, PREFIX, WARM_PREFIX]),
    kind(Sort::Cards, &[TWO_CARDS], &[MULTI_NIC]),
    kind(Sort::Cards, &[TWO_CARDS], &[MULTI_NIC, PREFIX, WARM_PREFIX]),
    kind(Sort::Branch, &["m5.large"], &[POD_ENI_ON]),
    kind(Sort::Branch, &["m5.large", "m5.xlarge"], &[POD_ENI_ON, PREFIX, WARM_PREFIX]),
    kind(Sort::Fixed, ANY, &[FIXED]),
    kind(Sort::Fixed, ANY, &[FIXED, PREFIX, WARM_PREFIX]),
    kind(Sort::Fixed, ANY, &[IMDS_ONLY]),
    kind(Sort::Fixed, ANY, &[IMDS_ONLY, PREFIX, WARM_PREFIX]),
    kind(Sort::V6, &["m5.large"], &[SIX[0], SIX[1], SIX[2], POD_ENI_ON]),
    kind(Sort::Custom, &["m5.large"], &[CUSTOM, POD_ENI_ON]),
];

/// The instance type that no table has.
pub fn two_cards() -> InstanceType {
    InstanceType {
        name: TWO_CARDS.into(),
        hypervisor: "nitro".into(),
        bare_metal: false,
        ipv4_per_eni: 4,
        default_card: 0,
        cards: vec![(0, 3), (1, 2)],
    }
}

/// What an operator has prepared before the daemon starts. `other`: another subnet of the zone.
pub fn prepare(fleet: &mut Fleet, sort: Sort, other: &SubnetId) {
    let (now, instance) = (fleet.now(), fleet.nodes[0].instance.clone());
    let primary = fleet.sky.vpc.identity(&instance).unwrap().primary_eni;
    match sort {
        Sort::V6 => fleet.sky.vpc.meddle(now, &primary, |eni| eni.ipv6s.push("2001:db8:0:1::f".parse().unwrap())),
        Sort::Custom => {
            let config = EniConfig { subnet: other.clone(), groups: Vec::new() };
            fleet.nodes[0].api.eni_configs.insert("default".into(), config);
        }
        Sort::Fixed => {
            let prefixes = fleet.nodes[0].setup.settings.prefix_delegation;
            let few = fleet.nodes[0].limits.slots_per_eni().min(4);
            let count = if prefixes { Count::Prefixes(1) } else { Count::Addresses(few) };
            fleet.sky.vpc.execute(now, &Call::Assign { eni: primary, count }).result.unwrap();
            let subnet = fleet.sky.vpc.identity(&instance).unwrap().subnet;
            let eni = fleet.sky.vpc.add_interface(now, &subnet, "by hand", &Map::new()).unwrap();
            let attach = Call::Attach { eni: eni.clone(), instance, device: 1, card: 0 };
            fleet.sky.vpc.execute(now, &attach).result.unwrap();
            fleet.sky.vpc.execute(now, &Call::Assign { eni, count }).result.unwrap();
        }
        Sort::Plain | Sort::Cards | Sort::Branch => {}
    }
}

/// Whether the daemon may use an ENI, by its tags (`spec/ipamd.md` 7.2).
pub fn managed(eni: &Interface, node: &Node) -> bool {
    let settings: &Settings = &node.setup.settings;
    let primary = eni.attachment.as_ref().is_some_and(|at| (at.card, at.device) == (0, 0));
    let ours = match eni.tags.get(NO_MANAGE) {
        Some(value) => value != "true",
        None => eni.tags.get(INSTANCE) == Some(&node.instance.0) || settings.manage_untagged_eni,
    };
    primary || settings.imds_only || ours
}

/// The tags of an ENI that is nobody's but its owner's.
pub fn no_manage() -> Map<String, String> {
    Map::from([(NO_MANAGE.to_owned(), "true".to_owned())])
}

/// Pods with an address of the pool that the node can serve as EC2 stands now, at least.
pub fn capacity(vpc: &Vpc, node: &Node, sort: Sort) -> usize {
    let slots = node.limits.slots_per_eni() as usize;
    let mut ours = 0;
    let (mut strangers, mut addresses, mut trunk) = (0, 0, false);
    for eni in vpc.attached_to(&node.instance) {
        if managed(eni, node) {
            ours += 1;
            addresses += eni.secondary_ipv4s.len() + 16 * eni.v4_prefixes.len();
        } else {
            strangers += 1;
        }
        trunk |= eni.interface_type == "trunk";
    }
    let all = match sort {
        Sort::V6 => MOST,
        Sort::Cards => 2 * slots, // on card 1, which every pod may want
        Sort::Fixed => addresses,
        Sort::Plain | Sort::Custom | Sort::Branch => {
            let most = node.setup.settings.max_eni.unwrap_or(u32::MAX).min(node.limits.enis) as usize;
            let kind = vpc.identity(&node.instance).unwrap().instance_type;
            let reserved = node.setup.settings.pod_eni && (trunk || limits::takes_trunk(&kind));
            let enis = most.saturating_sub(strangers).max(ours);
            enis.saturating_sub(usize::from(reserved) + usize::from(sort == Sort::Custom)) * slots
        }
    };
    all.min(MOST)
}

/// The VPC resource controller: attaches a trunk ENI where one is asked for, and tells pods of their branches.
#[derive(Default)]
pub struct Controller {
    branches: u32,
    pub trunk: Option<EniId>,
}

impl Controller {
    pub fn work(&mut self, fleet: &mut Fleet, subnet: &SubnetId) {
        let (now, instance) = (fleet.now(), fleet.nodes[0].instance.clone());
        let asked = fleet.nodes[0].api.features.iter().any(|feature| feature.name == FEATURE_TRUNK);
        if asked && self.trunk.is_none() {
            let used: Vec<u32> =
                fleet.sky.vpc.attached_to(&instance).filter_map(|eni| Some(eni.attachment.as_ref()?.device)).collect();
            if used.len() >= fleet.nodes[0].limits.enis as usize {
                return;
            }
            let device = (1..100).find(|device| !used.contains(device)).unwrap();
            let tags = Map::from([(INSTANCE.to_owned(), instance.0.clone())]);
            let Ok(eni) = fleet.sky.vpc.add_interface(now, subnet, "aws-k8s-trunk-eni", &tags) else { return };
            fleet.sky.vpc.meddle(now, &eni, |eni| eni.interface_type = "trunk".into());
            by_hand(fleet, &Call::Attach { eni: eni.clone(), instance, device, card: 0 });
            self.trunk = Some(eni);
        }
        if self.trunk.is_some() {
            for pod in fleet.nodes[0].api.pods.values_mut().filter(|pod| pod.lacks_branch()) {
                self.branches += 1;
                let n = self.branches;
                let text = format!(
                    r#"[{{"eniId":"eni-b{n}","ifAddress":"02:aa:00:00:{:02x}:{:02x}","vlanId":{n},
                    "privateIp":"10.20.224.{}","subnetCidr":"10.20.224.0/20",
                    "ipv6Addr":"2001:db8:0:e0::{n}","subnetV6Cidr":"2001:db8:0:e0::/64"}}]"#,
                    n >> 8,
                    n & 255,
                    n % 200 + 10
                );
                pod.annotations.insert(POD_ENI.into(), text);
            }
        }
    }
}

/// Carries out a call as a person would: with EC2 in order. Whether it went well.
pub fn by_hand(fleet: &mut Fleet, call: &Call) -> bool {
    let now = fleet.now();
    let planned = std::mem::take(&mut fleet.sky.vpc.knobs.action(call.action()).next);
    let outcome = fleet.sky.vpc.execute(now, call).result;
    fleet.sky.vpc.knobs.action(call.action()).next = planned;
    outcome.is_ok()
}

/// What an ENI carries that the pool should hold.
pub fn held_by(eni: &Interface, v6: bool) -> Vec<ipnet::IpNet> {
    if v6 {
        return eni.v6_prefixes.iter().take(1).copied().collect();
    }
    carried(eni).into_iter().filter(|net| matches!(net, ipnet::IpNet::V4(_))).collect()
}
