//! The VPC resource controller, which a cluster has for security groups of pods (`spec/kubernetes.md` 8.1): it attaches a trunk
//! ENI to a node whose CNINode asks for one, makes a branch ENI for each pod that wants one, and tells of it in the pod's
//! annotation. Here it does so when it is told to, and takes nothing away: the run ends before it would.

use super::kube::Kind;
use super::serve::kube::Kube;
use super::world::{World, WorldNode};
use crate::clock;
use crate::error::{Context, Error, Result};
use crate::model::ids::{EniId, InstanceId, SubnetId};
use crate::model::kube::{FEATURE_TRUNK, POD_ENI};
use crate::sandbox::serve::Cloud;
use ipnet::{Ipv4Net, Ipv6Net};
use serde_json::{Value, json};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

/// Subnets for branch ENIs: zone and CIDRs. Nodes have none of their addresses.
const SUBNETS: [(&str, Ipv4Net, Ipv6Net); 2] = [
    ("eu-west-1a", Ipv4Net::new_assert(Ipv4Addr::new(10, 20, 64, 0), 20), subnet_v6(0x40)),
    ("eu-west-1b", Ipv4Net::new_assert(Ipv4Addr::new(10, 20, 96, 0), 20), subnet_v6(0x60)),
];

/// Branch ENIs per node: no more than the smallest types with a trunk take.
pub const BRANCHES_MAX: usize = 4;

/// How long a daemon may take to ask for a trunk.
const ASK_MAX: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(50);

const fn subnet_v6(number: u16) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0x20, number, 0, 0, 0, 0), 64)
}

/// The trunk of a node.
pub struct Trunk {
    cloud: Arc<Cloud>,
    kube: Arc<Kube>,
    eni: EniId,
    subnet: SubnetId,
    vlans: AtomicU16,
}

/// What a pod's container asks for to get a branch ENI, to be merged into the pod's `spec`.
pub fn wish() -> Value {
    json!({"containers": [{"name": "main", "resources": {"limits": {POD_ENI: "1"}, "requests": {POD_ENI: "1"}}}]})
}

/// Waits until the node asks for a trunk, and attaches one. `going` is asked whether to go on.
pub fn attach(world: &World, kube: &Arc<Kube>, node: &WorldNode, going: &dyn Fn() -> Result<()>) -> Result<Trunk> {
    let end = clock::instant() + ASK_MAX;
    while !kube.change(|api| api.get(Kind::CniNode, "", &node.name).is_some_and(wants_trunk)) {
        going()?;
        if clock::instant() > end {
            return Err(Error::new(format!("the daemon of {} does not ask for a trunk ENI", node.name)));
        }
        std::thread::sleep(LOOK_EVERY);
    }
    let subnet = subnet(world, &node.instance)?;
    let added = world.cloud.change(|vpc| vpc.add_trunk(clock::now(), &node.instance));
    let eni = added.with_context(|| format!("attach a trunk ENI to {}", node.name))?;
    Ok(Trunk { cloud: Arc::clone(&world.cloud), kube: Arc::clone(kube), eni, subnet, vlans: AtomicU16::new(1) })
}

fn wants_trunk(cni_node: &Value) -> bool {
    let features = cni_node.pointer("/spec/features").and_then(Value::as_array);
    features.is_some_and(|features| features.iter().any(|feature| feature["name"] == FEATURE_TRUNK))
}

// The one for branch ENIs in the zone of an instance.
fn subnet(world: &World, instance: &InstanceId) -> Result<SubnetId> {
    let zone = world.cloud.vpc().identity(instance).map(|identity| identity.zone);
    let found = SUBNETS.iter().find(|(of, ..)| Some(*of) == zone.as_deref());
    let (zone, v4, v6) = found.ok_or_else(|| Error::new(format!("no subnet for branch ENIs of {instance}")))?;
    Ok(world.cloud.change(|vpc| {
        let there = vpc.subnets().into_iter().find(|subnet| vpc.subnet_cidr(subnet) == Some(*v4));
        there.unwrap_or_else(|| vpc.add_subnet(zone, *v4, Some(*v6), &[]))
    }))
}

impl Trunk {
    /// Makes a branch ENI for a pod and tells of it.
    pub fn branch(&self, namespace: &str, pod: &str) -> Result<()> {
        let vlan = self.vlans.fetch_add(1, Ordering::Relaxed);
        let annotation = self.cloud.change(|vpc| {
            let eni = vpc.add_branch(clock::now(), &self.eni, &self.subnet, vlan)?;
            let wire = vpc.wires().into_iter().find(|wire| wire.eni == eni);
            let wire = wire.ok_or_else(|| Error::new("the trunk is gone"))?;
            // As the controller writes it: an empty text for a family that is not there.
            let text = |value: Option<String>| value.unwrap_or_default();
            Ok::<_, Error>(json!([{
                "eniId": eni.as_str(),
                "ifAddress": wire.mac.to_string(),
                "privateIp": wire.own.to_string(),
                "ipv6Addr": text(wire.own_v6.map(|address| address.to_string())),
                "vlanId": vlan,
                "subnetCidr": wire.subnet.to_string(),
                "subnetV6Cidr": text(wire.subnet_v6.map(|subnet| subnet.to_string())),
                "associationID": format!("trunk-assoc-{vlan:08x}"),
            }]))
        });
        let annotation = annotation.with_context(|| format!("branch ENI of {namespace}/{pod}"))?.to_string();
        self.kube.change(|api| api.annotate(Kind::Pod, namespace, pod, POD_ENI, &annotation));
        Ok(())
    }
}
