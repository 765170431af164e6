//! The messages between plugin, daemon, policy agent and probe, as values (`spec/plugin.md` 8.2, `spec/ipamd.md` 10.1).
//! Their protobuf form is in `rpc::proto`.

/// `rpc.AddNetworkRequest`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of the CNI protocol")]
pub struct AddNetworkRequest {
    pub pod_name: String,
    pub pod_namespace: String,
    pub infra_container_id: String,
    pub netns: String,
    pub if_name: String,
    pub network_name: String,
    pub container_id: String,
    pub client_version: String,
    /// The pod asks for one interface on each managed network card.
    pub requires_multi_nic: bool,
}

/// `rpc.IPAllocationMetadata`: one address and where it belongs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IpAllocation {
    /// Bare address; wins when both are set.
    pub ipv4: String,
    /// Bare address.
    pub ipv6: String,
    /// Device index of the ENI on its card; -1 for a branch ENI.
    pub device_number: i32,
    /// Host route table of the ENI; 0 for a branch ENI.
    pub route_table_id: i32,
}

/// `rpc.AddNetworkReply`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddNetworkReply {
    /// False: no address.
    pub success: bool,
    /// One per interface, in card order.
    pub allocations: Vec<IpAllocation>,
    /// AWS_VPC_K8S_CNI_EXTERNALSNAT.
    pub use_external_snat: bool,
    /// VPC and excluded CIDRs (IPv4).
    pub vpc_v4_cidrs: Vec<String>,
    /// VPC CIDRs (IPv6).
    pub vpc_v6_cidrs: Vec<String>,
    /// VLAN of the branch ENI; 0 for an ordinary pod.
    pub pod_vlan_id: i32,
    /// MAC of the branch ENI.
    pub pod_eni_mac: String,
    /// Gateway of the branch ENI's subnet.
    pub pod_eni_subnet_gw: String,
    /// Host interface index of the trunk ENI.
    pub parent_if_index: i32,
    /// NETWORK_POLICY_ENFORCING_MODE verbatim; empty when not set.
    pub network_policy_mode: String,
    /// Why there is no address, for the `details` of the CNI error. Ours (field 100): the original's plugin skips it.
    pub failure: String,
}

/// `rpc.DelNetworkRequest`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of the CNI protocol")]
pub struct DelNetworkRequest {
    pub pod_name: String,
    pub pod_namespace: String,
    pub infra_container_id: String,
    /// `PodDeleted` or `SetupNSFailed`.
    pub reason: String,
    pub if_name: String,
    pub network_name: String,
    pub container_id: String,
    pub client_version: String,
    pub pod_uid: String,
}

/// `rpc.DelNetworkReply`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DelNetworkReply {
    /// False: failure without text.
    pub success: bool,
    /// Every address that was released.
    pub allocations: Vec<IpAllocation>,
    /// Non-zero for a branch-ENI pod.
    pub pod_vlan_id: i32,
    /// NETWORK_POLICY_ENFORCING_MODE verbatim; empty when not set.
    pub network_policy_mode: String,
}

/// `rpc.NetworkPolicyAgentConfigReply`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct NetworkPolicyAgentConfig {
    pub network_policy_mode: String,
    pub multi_nic_enabled: bool,
    pub node_ipv4: String,
    pub node_ipv6: String,
    pub instance_id: String,
    pub region: String,
}

/// `rpc.EnforceNpRequest`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct EnforceNpRequest {
    pub pod_name: String,
    pub pod_namespace: String,
    pub network_policy_mode: String,
    /// Number of addresses of the pod.
    pub interface_count: i32,
}

/// `rpc.DeleteNpRequest`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct DeleteNpRequest {
    pub pod_name: String,
    pub pod_namespace: String,
}

/// The one error text that plugins match: the key has no address (`spec/plugin.md` 8.2).
pub const UNKNOWN_POD: &str = "datastore: unknown pod";
