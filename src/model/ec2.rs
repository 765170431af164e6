//! EC2 calls and answers as values: what the core asks for, what the client sends, what the model of EC2 answers
//! (`spec/aws.md` 7).

use super::ids::{AttachmentId, EniId, GroupId, InstanceId, SubnetId, VpcId};
use super::net::Mac;
use crate::model::map::Map;
use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// What an ENI is asked to carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Count {
    /// Single secondary IPv4 addresses.
    Addresses(u32),
    /// IPv4 /28 prefixes.
    Prefixes(u32),
    /// IPv6 addresses of the ENI itself.
    Ipv6Addresses(u32),
}

impl Count {
    /// CIDRs for pods.
    pub fn cidrs(self) -> u32 {
        match self {
            Count::Addresses(count) | Count::Prefixes(count) => count,
            Count::Ipv6Addresses(_) => 0,
        }
    }
}

impl Default for Count {
    fn default() -> Self {
        Count::Addresses(0)
    }
}

/// A call. One value is one API action; paging and retries are the client's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// DescribeNetworkInterfaces with the filter `attachment.instance-id`: every ENI of the instance.
    DescribeAttached(InstanceId),
    /// DescribeNetworkInterfaces with the filter `network-interface-id`; an unknown id gives an empty list.
    DescribeOne(EniId),
    /// DescribeNetworkInterfaces of detached ENIs by their tags (`spec/ipamd.md` 9.6).
    DescribeLeaked {
        /// The VPC.
        vpc: VpcId,
        /// Tag filters besides status and VPC: key and value, or only the key (`tag-key`).
        tags: Vec<(String, Option<String>)>,
    },
    /// DescribeInstanceTypes of one type.
    DescribeInstanceType(String),
    /// DescribeSubnets of a VPC and zone.
    DescribeSubnets {
        /// The VPC.
        vpc: VpcId,
        /// Availability zone.
        zone: String,
    },
    /// CreateNetworkInterface.
    Create(Create),
    /// AttachNetworkInterface.
    Attach {
        /// The ENI.
        eni: EniId,
        /// Our instance.
        instance: InstanceId,
        /// Device index.
        device: u32,
        /// Network card.
        card: u32,
    },
    /// ModifyNetworkInterfaceAttribute: delete on termination.
    DeleteOnTermination {
        /// The ENI.
        eni: EniId,
        /// Its attachment.
        attachment: AttachmentId,
    },
    /// ModifyNetworkInterfaceAttribute: security groups (replaces the list).
    ModifyGroups {
        /// The ENI.
        eni: EniId,
        /// All groups.
        groups: Vec<GroupId>,
    },
    /// CreateTags on an ENI.
    CreateTags {
        /// The ENI.
        eni: EniId,
        /// Tags by key.
        tags: Map<String, String>,
    },
    /// AssignPrivateIpAddresses (addresses or prefixes).
    Assign {
        /// The ENI.
        eni: EniId,
        /// How many.
        count: Count,
    },
    /// AssignIpv6Addresses with one prefix.
    AssignIpv6Prefix(EniId),
    /// UnassignPrivateIpAddresses of addresses.
    UnassignAddresses {
        /// The ENI.
        eni: EniId,
        /// At least one.
        addresses: Vec<Ipv4Addr>,
    },
    /// UnassignPrivateIpAddresses of prefixes.
    UnassignPrefixes {
        /// The ENI.
        eni: EniId,
        /// At least one.
        prefixes: Vec<Ipv4Net>,
    },
    /// DetachNetworkInterface.
    Detach(AttachmentId),
    /// DeleteNetworkInterface.
    Delete(EniId),
}

impl Call {
    /// The API action, as in metrics and policies.
    pub fn action(&self) -> &'static str {
        match self {
            Call::DescribeAttached(_) | Call::DescribeOne(_) | Call::DescribeLeaked { .. } => {
                "DescribeNetworkInterfaces"
            }
            Call::DescribeInstanceType(_) => "DescribeInstanceTypes",
            Call::DescribeSubnets { .. } => "DescribeSubnets",
            Call::Create(_) => "CreateNetworkInterface",
            Call::Attach { .. } => "AttachNetworkInterface",
            Call::DeleteOnTermination { .. } | Call::ModifyGroups { .. } => "ModifyNetworkInterfaceAttribute",
            Call::CreateTags { .. } => "CreateTags",
            Call::Assign { .. } => "AssignPrivateIpAddresses",
            Call::AssignIpv6Prefix(_) => "AssignIpv6Addresses",
            Call::UnassignAddresses { .. } | Call::UnassignPrefixes { .. } => "UnassignPrivateIpAddresses",
            Call::Detach(_) => "DetachNetworkInterface",
            Call::Delete(_) => "DeleteNetworkInterface",
        }
    }

    /// Sending it twice has the effect of sending it once. A Create has, by its client token. An Assign has not; neither has
    /// an Unassign: between the two EC2 may have assigned the same address again, which the second would take from its pod.
    pub fn idempotent(&self) -> bool {
        !matches!(
            self,
            Call::Assign { .. }
                | Call::AssignIpv6Prefix(_)
                | Call::UnassignAddresses { .. }
                | Call::UnassignPrefixes { .. }
        )
    }
}

/// CreateNetworkInterface (`spec/aws.md` 7.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Create {
    /// Where.
    pub subnet: SubnetId,
    /// `aws-K8S-<instance-id>`.
    pub description: String,
    /// Security groups; empty lets EC2 take the VPC's default group.
    pub groups: Vec<GroupId>,
    /// What it carries from the start.
    pub count: Count,
    /// Idle times copied from the primary ENI.
    pub conntrack: ConntrackTimeouts,
    /// Tags by key.
    pub tags: Map<String, String>,
    /// The same token gives the same ENI, however often it is sent.
    pub client_token: String,
}

/// Connection-tracking idle times of an ENI, in seconds; absent ones are EC2's defaults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "EC2's own names")]
pub struct ConntrackTimeouts {
    pub tcp_established_s: Option<u32>,
    pub udp_stream_s: Option<u32>,
    pub udp_s: Option<u32>,
}

/// An ENI as EC2 describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Id.
    pub id: EniId,
    /// Hardware address.
    pub mac: Option<Mac>,
    /// Free text; ours start `aws-K8S-`.
    pub description: String,
    /// `interface`, `efa`, `efa-only`, `trunk`, `branch`.
    pub interface_type: String,
    /// Subnet.
    pub subnet: SubnetId,
    /// `available`, `attaching`, `in-use`, `detaching`.
    pub status: String,
    /// The attachment, if there is one.
    pub attachment: Option<Attachment>,
    /// Primary IPv4 address.
    pub primary_ipv4: Option<Ipv4Addr>,
    /// Secondary IPv4 addresses.
    pub secondary_ipv4s: Vec<Ipv4Addr>,
    /// IPv4 /28 prefixes.
    pub v4_prefixes: Vec<Ipv4Net>,
    /// IPv6 addresses.
    pub ipv6s: Vec<Ipv6Addr>,
    /// IPv6 /80 prefixes.
    pub v6_prefixes: Vec<IpNet>,
    /// Security groups.
    pub groups: Vec<GroupId>,
    /// Idle times.
    pub conntrack: ConntrackTimeouts,
    /// Tags.
    pub tags: Map<String, String>,
}

/// How an ENI is attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attachment {
    /// Id of the attachment.
    pub id: AttachmentId,
    /// Instance.
    pub instance: InstanceId,
    /// Device index on its card.
    pub device: u32,
    /// Network card.
    pub card: u32,
    /// Goes with the instance.
    pub delete_on_termination: bool,
}

/// A subnet as EC2 describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subnet {
    /// Id.
    pub id: SubnetId,
    /// Free addresses.
    pub free: u32,
    /// Tags.
    pub tags: Map<String, String>,
}

/// Limits of an instance type as EC2 describes them (`spec/aws.md` 7.1).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InstanceType {
    /// `m5.large`.
    pub name: String,
    /// `nitro`, `xen`, `unknown`.
    pub hypervisor: String,
    /// Bare metal.
    pub bare_metal: bool,
    /// IPv4 addresses per ENI, the ENI's own included.
    pub ipv4_per_eni: u32,
    /// Index of the default card.
    pub default_card: u32,
    /// Cards: index and ENIs that each takes.
    pub cards: Vec<(u32, u32)>,
}

/// What a call gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// To the Describe calls of ENIs.
    Interfaces(Vec<Interface>),
    /// To [`Call::DescribeSubnets`], most free addresses first.
    Subnets(Vec<Subnet>),
    /// To [`Call::DescribeInstanceType`].
    InstanceType(InstanceType),
    /// To [`Call::Create`].
    Created(Box<Interface>),
    /// To [`Call::Attach`].
    Attached(AttachmentId),
    /// To the Assign calls: what is new.
    Assigned(Vec<IpNet>),
    /// To everything else.
    Done,
}

/// Why a call failed, after the retries inside the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The API action.
    pub action: &'static str,
    /// EC2's code; empty when there was no answer of EC2 (refused, timed out, a proxy's page).
    pub code: String,
    /// Text for people.
    pub message: String,
    /// HTTP status; 0 without an answer.
    pub status: u16,
    /// EC2's request id; may be empty.
    pub request_id: String,
    /// No answer came and the call may have been carried out all the same.
    pub maybe_applied: bool,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.action)?;
        if !self.code.is_empty() {
            write!(f, "{}: ", self.code)?;
        }
        f.write_str(&self.message)?;
        if self.status != 0 {
            write!(f, " (HTTP {}", self.status)?;
            if !self.request_id.is_empty() {
                write!(f, ", request {}", self.request_id)?;
            }
            f.write_str(")")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

impl Failure {
    /// EC2 asks for fewer calls; nothing was done. The client does not repeat such a call: whoever paces the calls does.
    pub fn throttled(&self) -> bool {
        self.status == 429 || throttling(&self.code)
    }

    /// The subnet has no address, or no free block for a prefix (`spec/ipamd.md` 6.6).
    pub fn subnet_exhausted(&self) -> bool {
        matches!(self.code.as_str(), "InsufficientFreeAddressesInSubnet" | "InsufficientCidrBlocks")
    }

    /// A limit that only its owner or the end of other things lifts: the same call again fails again.
    pub fn limit(&self) -> Option<Limit> {
        match self.code.as_str() {
            "NetworkInterfaceLimitExceeded" => Some(Limit::Region),
            "AttachmentLimitExceeded" => Some(Limit::Instance),
            "SecurityGroupsPerInterfaceLimitExceeded" => Some(Limit::Groups),
            "PrivateIpAddressLimitExceeded" => Some(Limit::Eni),
            _ => None,
        }
    }

    /// Something that the call names does not exist (yet, or any more).
    pub fn not_found(&self) -> bool {
        self.code.ends_with(".NotFound")
    }

    /// The ENI that the call names does not exist; for a Delete that is success.
    pub fn eni_not_found(&self) -> bool {
        self.code == "InvalidNetworkInterfaceID.NotFound"
    }

    /// To a Detach: the ENI is not attached, which is what was wanted (`spec/aws.md` 8.4).
    pub fn detached_already(&self) -> bool {
        match self.code.as_str() {
            "InvalidAttachmentID.NotFound" => true,
            "IncorrectState" => self.message.contains("not attached") || self.message.contains("detached"),
            _ => false,
        }
    }

    /// The ENI is attached or being detached; a Delete works later.
    pub fn in_use(&self) -> bool {
        match self.code.as_str() {
            "InvalidNetworkInterface.InUse" => true,
            "InvalidParameterValue" => self.message.contains("currently in use"),
            _ => false,
        }
    }

    /// To an Attach: another ENI has the device index; the next one may be free.
    pub fn index_taken(&self) -> bool {
        self.code == "InvalidParameterValue" && self.message.contains("device index")
    }

    /// The role lacks a permission, which operators must be told by name of the action (`spec/aws.md` 11.1).
    pub fn unauthorised(&self) -> bool {
        matches!(self.code.as_str(), "UnauthorizedOperation" | "AccessDenied" | "AccessDeniedException")
    }

    /// Something broke inside EC2, or between us and it; [`Failure::maybe_applied`] says whether that leaves open what
    /// was done.
    pub fn internal(&self) -> bool {
        let told = matches!(self.code.as_str(), "InternalError" | "InternalFailure" | "Unavailable");
        told || (self.status >= 500 && !self.throttled())
    }
}

/// Whose limit is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// ENIs of the account in the region.
    Region,
    /// ENIs of the instance.
    Instance,
    /// Security groups of an ENI.
    Groups,
    /// Addresses and prefixes of an ENI.
    Eni,
}

/// Codes by which AWS asks for fewer calls (`spec/aws.md` 6.4).
pub fn throttling(code: &str) -> bool {
    matches!(
        code,
        "RequestLimitExceeded"
            | "Throttling"
            | "ThrottlingException"
            | "ThrottledException"
            | "RequestThrottledException"
            | "RequestThrottled"
            | "TooManyRequestsException"
            | "ProvisionedThroughputExceededException"
            | "TransactionInProgressException"
            | "BandwidthLimitExceeded"
            | "LimitExceededException"
            | "SlowDown"
            | "PriorRequestNotComplete"
            | "EC2ThrottledException"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every code of `spec/aws.md` 6.4 and 11.1: what it is, and nothing else.
    #[test]
    fn failures_are_told_apart() {
        #[track_caller]
        fn check(status: u16, code: &str, message: &str, expected: &str) {
            let failure = Failure {
                action: "X",
                code: code.into(),
                message: message.into(),
                status,
                request_id: String::new(),
                maybe_applied: false,
            };
            let mut told = vec![
                (failure.throttled(), "throttled".to_owned()),
                (failure.subnet_exhausted(), "subnet exhausted".to_owned()),
                (failure.not_found(), "not found".to_owned()),
                (failure.eni_not_found(), "no eni".to_owned()),
                (failure.detached_already(), "detached".to_owned()),
                (failure.in_use(), "in use".to_owned()),
                (failure.index_taken(), "index taken".to_owned()),
                (failure.unauthorised(), "unauthorised".to_owned()),
                (failure.internal(), "internal".to_owned()),
            ];
            told.extend(failure.limit().map(|limit| (true, format!("{limit:?}"))));
            let told: Vec<String> = told.into_iter().filter(|(is, _)| *is).map(|(_, name)| name).collect();
            assert_eq!(told.join(", "), expected, "{failure}");
        }
        for code in [
            "Throttling",
            "ThrottlingException",
            "ThrottledException",
            "RequestThrottledException",
            "RequestThrottled",
            "TooManyRequestsException",
            "ProvisionedThroughputExceededException",
            "TransactionInProgressException",
            "BandwidthLimitExceeded",
            "LimitExceededException",
            "SlowDown",
            "PriorRequestNotComplete",
            "EC2ThrottledException",
        ] {
            check(400, code, "", "throttled");
        }
        check(503, "RequestLimitExceeded", "Request limit exceeded.", "throttled");
        check(429, "", "a gateway's page", "throttled");
        check(403, "UnauthorizedOperation", "", "unauthorised");
        check(401, "AuthFailure", "", "");
        check(400, "InsufficientFreeAddressesInSubnet", "", "subnet exhausted");
        check(400, "InsufficientCidrBlocks", "", "subnet exhausted");
        check(400, "PrivateIpAddressLimitExceeded", "", "Eni");
        check(400, "AttachmentLimitExceeded", "", "Instance");
        check(400, "NetworkInterfaceLimitExceeded", "", "Region");
        check(400, "SecurityGroupsPerInterfaceLimitExceeded", "", "Groups");
        check(400, "InvalidNetworkInterfaceID.NotFound", "", "not found, no eni");
        check(400, "InvalidGroup.NotFound", "", "not found");
        check(400, "InvalidSubnetID.NotFound", "", "not found");
        check(400, "InvalidAttachmentID.NotFound", "", "not found, detached");
        check(400, "IncorrectState", "Network interface 'eni-1' is not attached.", "detached");
        check(400, "IncorrectState", "instance i-1 is not in state 'running'", "");
        check(400, "InvalidNetworkInterface.InUse", "", "in use");
        check(400, "InvalidParameterValue", "Network interface 'eni-1' is currently in use.", "in use");
        let taken = "Instance 'i-1' already has an interface attached at device index '1'.";
        check(400, "InvalidParameterValue", taken, "index taken");
        check(400, "InvalidParameterValue", "invalid value for parameter subnet", "");
        check(500, "InternalError", "", "internal");
        check(503, "Unavailable", "", "internal");
        check(502, "", "a proxy's page", "internal");
        check(400, "RequestTimeout", "", "");
        check(0, "", "connection refused", "");
    }
}
