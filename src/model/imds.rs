//! What the instance metadata service tells, as values (`spec/aws.md` 4).

use super::ids::{EniId, InstanceId, SubnetId, VpcId};
use super::net::Mac;
use ipnet::IpNet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What never changes while the instance lives; read once at start (`spec/aws.md` 4.6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// `eu-west-1`.
    pub region: String,
    /// `eu-west-1a`.
    pub zone: String,
    /// The instance.
    pub instance: InstanceId,
    /// `m5.large`.
    pub instance_type: String,
    /// The node's IPv4 address: primary address of the primary ENI.
    pub local_ipv4: Ipv4Addr,
    /// First IPv6 address of the primary ENI; only read where it is used: in IPv6 mode, and for IPv6 egress.
    pub local_ipv6: Option<Ipv6Addr>,
    /// MAC of the primary ENI.
    pub mac: Mac,
    /// The primary ENI.
    pub primary_eni: EniId,
    /// Its subnet.
    pub subnet: SubnetId,
    /// The VPC.
    pub vpc: VpcId,
}

/// One attached ENI as IMDS lists it (`spec/aws.md` 4.5). IMDS lags behind EC2: this is a hint, never a proof.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Eni {
    /// Id.
    pub id: EniId,
    /// Hardware address; the link on the host is found by it.
    pub mac: Mac,
    /// Device index on its card; 0 on card 0 is the primary ENI.
    pub device: u32,
    /// Network card.
    pub card: u32,
    /// Subnet.
    pub subnet: SubnetId,
    /// CIDR of the subnet, absent for an ENI without IPv4.
    pub subnet_v4: Option<IpNet>,
    /// First IPv6 CIDR of the subnet.
    pub subnet_v6: Option<IpNet>,
    /// IPv4 addresses; the first is the ENI's own.
    pub ipv4s: Vec<Ipv4Addr>,
    /// IPv4 prefixes (/28).
    pub v4_prefixes: Vec<IpNet>,
    /// IPv6 addresses; the first is the ENI's own.
    pub ipv6s: Vec<Ipv6Addr>,
    /// IPv6 prefixes (/80).
    pub v6_prefixes: Vec<IpNet>,
}

impl Eni {
    /// The ENI's own address of the family, never given to a pod.
    pub fn own_address(&self, v6: bool) -> Option<IpAddr> {
        if v6 { self.ipv6s.first().map(|ip| IpAddr::V6(*ip)) } else { self.ipv4s.first().map(|ip| IpAddr::V4(*ip)) }
    }
}

/// What is asked of IMDS while the daemon runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Query {
    /// All attached ENIs.
    Scan,
    /// One ENI by MAC; used while waiting for a new one.
    Eni(Mac),
    /// CIDRs of the VPC, of the family in use.
    VpcCidrs {
        /// IPv6 instead of IPv4.
        v6: bool,
    },
    /// Security groups of the primary ENI.
    SecurityGroups,
}

/// The answer to a [`Query`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// To [`Query::Scan`].
    Enis(Vec<Eni>),
    /// To [`Query::Eni`]; absent while IMDS does not know it.
    Eni(Option<Eni>),
    /// To [`Query::VpcCidrs`].
    Cidrs(Vec<IpNet>),
    /// To [`Query::SecurityGroups`], sorted.
    Groups(Vec<super::ids::GroupId>),
}
