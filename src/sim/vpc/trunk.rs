//! Trunk and branch ENIs, which the VPC resource controller makes and no daemon (`spec/kubernetes.md` 8.1): a trunk is
//! attached like any other ENI, a branch is a VLAN on it with a subnet and an address of its own. The controller's calls are
//! not those of a node, so they stand in no journal.

use super::actions::Done;
use super::{Vpc, refuse};
use crate::model::ec2::Failure;
use crate::model::ids::{EniId, InstanceId, SubnetId};
use crate::model::map::Map;
use crate::model::time::Now;

impl Vpc {
    /// Makes a trunk ENI and attaches it at the lowest free device index of card 0.
    pub fn add_trunk(&mut self, now: Now, instance: &InstanceId) -> Result<EniId, Failure> {
        let result = self.trunk(now, instance);
        self.publish(now);
        result.map_err(|refusal| self.failure("AttachNetworkInterface", refusal))
    }

    fn trunk(&mut self, now: Now, instance: &InstanceId) -> Done<EniId> {
        let Some(identity) = self.identity(instance) else {
            return refuse("InvalidInstanceID.NotFound", format!("The instance ID '{instance}' does not exist"));
        };
        let eni = self.new_interface(&identity.subnet, "aws-k8s-trunk-eni", &[], &Map::new())?;
        if identity.local_ipv6.is_some() {
            self.fill_v6(&eni, &identity.subnet, 1)?;
        }
        if let Some(state) = self.enis.get_mut(&eni) {
            state.interface.interface_type = "trunk".into();
        }
        let taken = |device: u32| self.attachments(instance).any(|at| at.card == 0 && at.device == device);
        let device = (1..u32::MAX).find(|device| !taken(*device)).unwrap_or(u32::MAX);
        self.attach(now.mono, &eni, instance, (device, 0))?;
        Ok(eni)
    }

    /// Makes a branch ENI in `subnet` and associates it with a trunk. `vlan` must be free there.
    pub fn add_branch(&mut self, now: Now, trunk: &EniId, subnet: &SubnetId, vlan: u16) -> Result<EniId, Failure> {
        let result = self.branch(trunk, subnet, vlan);
        self.publish(now);
        result.map_err(|refusal| self.failure("AssociateTrunkInterface", refusal))
    }

    fn branch(&mut self, trunk: &EniId, subnet: &SubnetId, vlan: u16) -> Done<EniId> {
        if self.enis.get(trunk).is_none_or(|state| state.interface.interface_type != "trunk") {
            return refuse("InvalidParameterValue", format!("'{trunk}' is no trunk interface"));
        }
        if !(1..4095).contains(&vlan) || self.branches.values().any(|(at, taken)| at == trunk && *taken == vlan) {
            return refuse("InvalidParameterValue", format!("VLAN {vlan} is not free on '{trunk}'"));
        }
        let eni = self.new_interface(subnet, "aws-k8s-branch-eni", &[], &Map::new())?;
        if self.subnets.get(subnet).is_some_and(|place| place.v6.is_some()) {
            self.fill_v6(&eni, subnet, 1)?;
        }
        if let Some(state) = self.enis.get_mut(&eni) {
            state.interface.interface_type = "branch".into();
            state.interface.status = "in-use".into();
        }
        self.branches.insert(eni.clone(), (trunk.clone(), vlan));
        Ok(eni)
    }

    /// Takes a branch ENI away.
    pub fn remove_branch(&mut self, now: Now, eni: &EniId) {
        if self.branches.remove(eni).is_some() {
            self.remove(eni);
        }
        self.publish(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_are_wired_with_their_trunk() {
        let now = Now::default();
        let mut vpc = Vpc::new("eu-west-1", vec!["10.20.0.0/16".parse().unwrap()], 1);
        let nodes = vpc.add_subnet("eu-west-1a", "10.20.0.0/20".parse().unwrap(), None, &[]);
        let v6 = "2001:db8::/64".parse().unwrap();
        let pods = vpc.add_subnet("eu-west-1a", "10.20.64.0/20".parse().unwrap(), Some(v6), &[]);
        let instance = vpc.launch(now, "m5.large", &nodes, &[]).unwrap();
        let trunk = vpc.add_trunk(now, &instance).unwrap();
        let branch = vpc.add_branch(now, &trunk, &pods, 5).unwrap();
        assert!(vpc.add_branch(now, &trunk, &pods, 5).is_err(), "the VLAN is taken");
        assert!(vpc.add_branch(now, &branch, &pods, 6).is_err(), "no trunk");
        let wires = vpc.wires();
        let wire = wires.iter().find(|wire| wire.eni == branch).unwrap();
        assert_eq!((&wire.instance, &wire.trunk), (&instance, &Some((trunk.clone(), 5))));
        assert_eq!(wire.subnet, "10.20.64.0/20".parse().unwrap());
        assert_eq!(wire.assigned.len(), 2, "{:?}", wire.assigned);
        assert_eq!(vpc.owner(wire.own), Some(instance.clone()));
        let listed = vpc.imds(now, &instance).unwrap();
        assert_eq!(listed.len(), 2, "IMDS tells of the trunk and of no branch");
        assert_eq!(vpc.journal().counts().len(), 0);
        vpc.remove_branch(now, &branch);
        assert_eq!(vpc.wires().len(), 2);
        vpc.add_branch(now, &trunk, &pods, 5).unwrap();
    }
}
