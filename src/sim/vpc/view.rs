//! What others see of the model: an instance through IMDS, and the topology what is wired where.

use super::{EniState, Vpc};
use crate::model::ec2::Interface;
use crate::model::ids::{EniId, GroupId, InstanceId, SubnetId};
use crate::model::imds::{Eni, Identity};
use crate::model::net::Mac;
use crate::model::order;
use crate::model::time::{Mono, Now};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An attached ENI as IMDS tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImdsEni {
    /// What the daemon reads.
    pub eni: Eni,
    /// Security groups.
    pub groups: Vec<GroupId>,
}

/// An attached ENI as the network sees it, at once and in truth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wire {
    /// The ENI.
    pub eni: EniId,
    /// Where it is attached.
    pub instance: InstanceId,
    /// Device index.
    pub device: u32,
    /// Network card.
    pub card: u32,
    /// A branch ENI: its trunk, and the VLAN on it.
    pub trunk: Option<(EniId, u16)>,
    /// Hardware address of the instance's end.
    pub mac: Mac,
    /// CIDR of the subnet; its first address is the router's.
    pub subnet: Ipv4Net,
    /// The ENI's own address.
    pub own: Ipv4Addr,
    /// IPv6 CIDR of the subnet, if it has one.
    pub subnet_v6: Option<Ipv6Net>,
    /// The ENI's own IPv6 address, if it has one.
    pub own_v6: Option<Ipv6Addr>,
    /// Everything that the ENI may send from and that is delivered to it, of both families: addresses (/32 and /128, the
    /// own ones included) and prefixes.
    pub assigned: Vec<IpNet>,
}

impl Vpc {
    /// What IMDS tells of an instance once and for all. None for an unknown instance.
    pub fn identity(&self, instance: &InstanceId) -> Option<Identity> {
        let host = self.instances.get(instance)?;
        let primary = &self.enis.get(&host.primary)?.interface;
        Some(Identity {
            region: self.region.clone(),
            zone: host.zone.clone(),
            instance: instance.clone(),
            instance_type: host.kind.name.clone(),
            local_ipv4: primary.primary_ipv4?,
            local_ipv6: primary.ipv6s.first().copied(),
            mac: primary.mac?,
            primary_eni: primary.id.clone(),
            subnet: primary.subnet.clone(),
            vpc: self.id.clone(),
        })
    }

    /// The ENIs that IMDS lists for an instance at that moment, by device index.
    pub fn imds(&mut self, now: Now, instance: &InstanceId) -> Option<&Vec<ImdsEni>> {
        self.settle(now);
        self.instances.get_mut(instance)?.seen.seen(now.mono)
    }

    /// Since when an ENI is attached to an instance, as the host sees it; None if it is not, or is being detached.
    pub fn plugged(&self, instance: &InstanceId, eni: &EniId) -> Option<Mono> {
        let state = self.enis.get(eni).filter(|state| state.detached_at.is_none())?;
        let here = state.interface.attachment.as_ref().is_some_and(|at| at.instance == *instance);
        state.attached_at.filter(|_| here)
    }

    /// IPv6 CIDRs of the VPC: those of its subnets.
    pub fn v6_cidrs(&self) -> Vec<IpNet> {
        self.subnets.values().filter_map(|subnet| subnet.v6.map(IpNet::V6)).collect()
    }

    /// All instances.
    pub fn instances(&self) -> impl Iterator<Item = &InstanceId> {
        self.instances.keys()
    }

    /// The instance that an address is delivered to.
    pub fn owner(&self, addr: impl Into<IpAddr>) -> Option<InstanceId> {
        let addr = addr.into();
        self.wires().into_iter().find(|wire| wire.assigned.iter().any(|net| net.contains(&addr))).map(|w| w.instance)
    }

    /// What is wired, in order of ENI ids. An ENI that is being detached is not.
    pub fn wires(&self) -> Vec<Wire> {
        let wired = self.enis.values().filter_map(|state| self.wire(state));
        wired.collect()
    }

    fn wire(&self, state: &EniState) -> Option<Wire> {
        let interface = &state.interface;
        let trunk = self.branches.get(&interface.id).cloned();
        // A branch is where its trunk is.
        let carrier = match &trunk {
            Some((trunk, _)) => self.enis.get(trunk)?,
            None => state,
        };
        let at = carrier.interface.attachment.as_ref().filter(|_| carrier.detached_at.is_none())?;
        let own = interface.primary_ipv4?;
        let v4 = std::iter::once(&own).chain(&interface.secondary_ipv4s).map(|addr| IpNet::from(IpAddr::V4(*addr)));
        let v6 = interface.ipv6s.iter().map(|addr| IpNet::from(IpAddr::V6(*addr)));
        let prefixes = interface.v4_prefixes.iter().copied().map(IpNet::V4);
        let assigned = v4.chain(prefixes).chain(v6).chain(interface.v6_prefixes.iter().copied()).collect();
        Some(Wire {
            eni: interface.id.clone(),
            instance: at.instance.clone(),
            device: at.device,
            card: at.card,
            trunk,
            mac: interface.mac?,
            subnet_v6: self.subnets.get(&interface.subnet)?.v6,
            own_v6: interface.ipv6s.first().copied(),
            subnet: self.subnet_cidr(&interface.subnet)?,
            own,
            assigned,
        })
    }

    pub(super) fn imds_truth(&self, instance: &InstanceId) -> Vec<ImdsEni> {
        let mut listed =
            self.attached_to(instance).filter_map(|interface| self.imds_eni(interface, instance)).collect::<Vec<_>>();
        order::sort_by_key(&mut listed, |listed| (listed.eni.card, listed.eni.device));
        listed
    }

    fn imds_eni(&self, interface: &Interface, instance: &InstanceId) -> Option<ImdsEni> {
        let at = interface.attachment.as_ref().filter(|at| at.instance == *instance)?;
        let subnet: &SubnetId = &interface.subnet;
        let place = self.subnets.get(subnet)?;
        let eni = Eni {
            id: interface.id.clone(),
            mac: interface.mac?,
            device: at.device,
            card: at.card,
            subnet: subnet.clone(),
            subnet_v4: interface.primary_ipv4.map(|_| IpNet::V4(place.space.cidr())),
            // IMDS lists the attribute only for an ENI with IPv6 addresses.
            subnet_v6: place.v6.filter(|_| !interface.ipv6s.is_empty()).map(IpNet::V6),
            ipv4s: interface.primary_ipv4.iter().chain(&interface.secondary_ipv4s).copied().collect(),
            v4_prefixes: interface.v4_prefixes.iter().copied().map(IpNet::V4).collect(),
            ipv6s: interface.ipv6s.clone(),
            v6_prefixes: interface.v6_prefixes.clone(),
        };
        Some(ImdsEni { eni, groups: interface.groups.clone() })
    }

    /// Whether an address is assigned to any ENI, attached or not.
    pub fn assigned(&self, addr: IpAddr) -> bool {
        let IpAddr::V4(addr) = addr else { return false };
        self.interfaces().any(|interface| {
            interface.primary_ipv4 == Some(addr)
                || interface.secondary_ipv4s.contains(&addr)
                || interface.v4_prefixes.iter().any(|net| net.contains(&addr))
        })
    }
}
