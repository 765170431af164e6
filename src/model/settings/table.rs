//! The one table of the environment variables that the program reads: variable, default, parser, help line. Parsing, the
//! effective configuration and the README's list all come from it, so a variable that is not here does not exist.
//!
//! Defaults are texts that go through the same parser as the operator's; an empty one leaves the field as
//! `Settings::blank` made it (off, empty, or worked out from others; the help line says which).
//! Sources: `spec/config.md` 2, `spec/ipamd.md` 1.1, `spec/dataplane.md` 2, `spec/aws.md` 2, `spec/kubernetes.md` 2.

use super::Settings;
use super::layers::Scope;
use crate::model::map::Map;
use crate::model::nft::SnatPorts;
use ipnet::Ipv4Net;

/// Where in the settings a value lives.
pub(super) type Slot<T> = fn(&mut Settings) -> &mut T;

/// How the text of a variable is understood. Blanks around it never count.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    /// `1 t true` or `0 f false` in any case; otherwise the default.
    Bool(Slot<bool>),
    /// A decimal count; below the least value or malformed gives the default.
    Count { least: i64, most: u32, slot: Slot<u32> },
    /// Like a count that may be off: below 1 or malformed is off.
    Cap { slot: Slot<Option<u32>> },
    /// A decimal number that must be right: malformed, empty or out of range is fatal.
    Strict { least: i64, most: u32, slot: Slot<u32> },
    /// A mark: decimal, `0x`, `0b`, `0o` or octal with a leading 0; 0, negative or malformed gives the default.
    Mark(Slot<u32>),
    /// Text; empty counts as unset.
    Text(Slot<String>),
    /// Text; empty stays empty.
    TextOrEmpty(Slot<String>),
    /// Text that is kept as it is, with the difference between unset and empty.
    Verbatim(Slot<Option<String>>),
    /// IPv4 CIDRs between commas; a bad one is left out.
    Cidrs(Slot<Vec<Ipv4Net>>),
    /// A JSON object of strings; malformed gives none at all, keys of Kubernetes are left out.
    Tags(Slot<Map<String, String>>),
    /// `prng`, `hashrandom` or `none`.
    Ports(Slot<SnatPorts>),
    /// A variable of the AWS SDKs, kept as text for the credential chain and the HTTP client; `secret` hides its value.
    Inherited { secret: bool },
    /// Accepted and ignored; the text says why.
    Ignored(&'static str),
}

/// One variable.
pub(super) struct Row {
    pub variable: &'static str,
    pub default: &'static str,
    pub kind: Kind,
    pub help: &'static str,
    pub scope: Scope,
}

/// A heading and the variables below it.
pub(super) struct Group {
    pub title: &'static str,
    pub rows: &'static [Row],
}

const fn row(variable: &'static str, default: &'static str, kind: Kind, help: &'static str) -> Row {
    Row { variable, default, kind, help, scope: Scope::Process }
}

/// May be set for a single node; takes effect at the next start.
const fn node(variable: &'static str, default: &'static str, kind: Kind, help: &'static str) -> Row {
    Row { variable, default, kind, help, scope: Scope::Start }
}

/// May be set for a single node; takes effect at once.
const fn live(variable: &'static str, default: &'static str, kind: Kind, help: &'static str) -> Row {
    Row { variable, default, kind, help, scope: Scope::Live }
}

/// No node holds more addresses than this; larger wishes mean "as many as possible" and must not overflow sums.
const COUNT_MOST: u32 = 1_000_000;

/// Ten years: longer means "for ever" and must not overflow sums of times.
const SECONDS_MOST: u32 = 315_360_000;

/// Smallest MTU of IPv4 that upstream accepts; with IPv6 it is 1280, which the checks look after.
const MTU_LEAST: i64 = 576;

/// Largest MTU inside a VPC.
const MTU_MOST: u32 = 9001;

const fn count(slot: Slot<u32>) -> Kind {
    Kind::Count { least: 0, most: COUNT_MOST, slot }
}

const fn mtu(slot: Slot<u32>) -> Kind {
    Kind::Strict { least: MTU_LEAST, most: MTU_MOST, slot }
}

const PLAIN: Kind = Kind::Inherited { secret: false };
const SECRET: Kind = Kind::Inherited { secret: true };
const NO_PROFILES: Kind = Kind::Ignored("shared configuration files of the SDKs are not supported");

/// Read and checked, and without effect in this version: the daemon refuses those that it would have to act on, the others
/// are for parts that do not exist yet.
pub(super) const NOT_YET: &[&str] = &[];

#[rustfmt::skip] // one variable a line or two, however long: it is read as a table
pub(super) const GROUPS: &[Group] = &[
    Group { title: "Address family and mode", rows: &[
        row("ENABLE_IPv4", "", Kind::Bool(|s| &mut s.enable_ipv4), "Pods get IPv4 addresses; unset: on unless ENABLE_IPv6 is. Exactly one family must be on."),
        row("ENABLE_IPv6", "false", Kind::Bool(|s| &mut s.enable_ipv6), "Pods get IPv6 addresses; needs prefix delegation, excludes custom networking."),
        node("ENABLE_PREFIX_DELEGATION", "false", Kind::Bool(|s| &mut s.prefix_delegation), "Assign /28 (IPv4) or /80 (IPv6) prefixes instead of single addresses."),
        node("ENABLE_MULTI_NIC", "false", Kind::Bool(|s| &mut s.multi_nic), "Manage the network cards above 0 as well."),
        node("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "false", Kind::Bool(|s| &mut s.custom_networking), "Take subnet and security groups of new ENIs from the node's ENIConfig."),
        row("ENI_CONFIG_ANNOTATION_DEF", "k8s.amazonaws.com/eniConfig", Kind::Text(|s| &mut s.eni_config_annotation), "Node annotation that names the ENIConfig."),
        row("ENI_CONFIG_LABEL_DEF", "k8s.amazonaws.com/eniConfig", Kind::Text(|s| &mut s.eni_config_label), "Node label that names the ENIConfig."),
    ]},
    Group { title: "Warm pool and capacity", rows: &[
        live("WARM_ENI_TARGET", "1", count(|s| &mut s.warm_eni_target), "Free addresses to keep, in whole ENIs; not used when one of the two IP targets is."),
        live("WARM_IP_TARGET", "0", count(|s| &mut s.warm_ip_target), "Free addresses to keep; 0 is off."),
        live("MINIMUM_IP_TARGET", "0", count(|s| &mut s.minimum_ip_target), "Addresses to hold at least, free or in use; 0 is off."),
        live("WARM_PREFIX_TARGET", "0", count(|s| &mut s.warm_prefix_target), "Wholly free prefixes to keep; with prefix delegation only."),
        node("MAX_ENI", "", Kind::Cap { slot: |s| &mut s.max_eni }, "ENIs per network card, the primary one included; unset or below 1: the instance type's limit."),
        live("IP_COOLDOWN_PERIOD", "30", Kind::Strict { least: 0, most: SECONDS_MOST, slot: |s| &mut s.ip_cooldown_s }, "Seconds before a released address is given out again; a pod's rests for at least 3 after its DEL."),
        live("ENIBOX_ADD_WAIT", "3", Kind::Count { least: 0, most: 30, slot: |s| &mut s.add_wait_s }, "Seconds that a new pod waits for an address that is on its way, before the runtime is told to try again; at most 30."),
        live("AWS_MANAGE_ENIS_NON_SCHEDULABLE", "false", Kind::Bool(|s| &mut s.manage_non_schedulable), "Grow and shrink the pool also while the node is cordoned."),
    ]},
    Group { title: "ENIs, subnets and tags", rows: &[
        node("ENABLE_SUBNET_DISCOVERY", "true", Kind::Bool(|s| &mut s.subnet_discovery), "Put a new ENI into the eligible subnet with most free addresses."),
        row("CLUSTER_NAME", "", Kind::Text(|s| &mut s.cluster_name), "Cluster, for tags of ENIs and subnets; unset: no cluster tags."),
        node("ADDITIONAL_ENI_TAGS", "{}", Kind::Tags(|s| &mut s.additional_eni_tags), "JSON object of further tags for ENIs."),
        node("MANAGE_UNTAGGED_ENI", "true", Kind::Bool(|s| &mut s.manage_untagged_eni), "Use attached ENIs that do not carry our instance tag."),
        node("DISABLE_NETWORK_RESOURCE_PROVISIONING", "false", Kind::Bool(|s| &mut s.provisioning_disabled), "Change nothing in EC2; work with what is attached."),
        node("ENABLE_IMDS_ONLY_MODE", "false", Kind::Bool(|s| &mut s.imds_only), "Change nothing in EC2 and do not describe ENIs either."),
        node("DISABLE_LEAKED_ENI_CLEANUP", "false", Kind::Bool(|s| &mut s.leaked_eni_cleanup_disabled), "Do not delete ENIs that dead nodes have left."),
        row("AWS_EC2_ENDPOINT", "", Kind::Text(|s| &mut s.ec2_endpoint), "URL of the EC2 API; unset: AWS_ENDPOINT_URL_EC2, AWS_ENDPOINT_URL, or the region's own."),
        row("HTTP_TIMEOUT", "10", Kind::Count { least: 10, most: SECONDS_MOST, slot: |s| &mut s.http_timeout_s }, "Seconds that one request to AWS may take; at least 10."),
        row("VPC_CNI_VERSION", "", Kind::Text(|s| &mut s.vpc_cni_version), "Text for the user agent."),
    ]},
    Group { title: "Routing and SNAT", rows: &[
        live("AWS_VPC_K8S_CNI_EXTERNALSNAT", "false", Kind::Bool(|s| &mut s.external_snat), "No SNAT on the node: pods leave the VPC with their own address."),
        live("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "prng", Kind::Ports(|s| &mut s.snat_ports), "Source ports of SNAT: prng, hashrandom or none."),
        live("ENIBOX_KEEP_HOST_SOURCE", "false", Kind::Bool(|s| &mut s.keep_host_source), "No SNAT for what the node's own processes send: with the primary address they keep their port, and by a secondary ENI its address."),
        live("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS", "", Kind::Cidrs(|s| &mut s.exclude_snat_cidrs), "Destinations without SNAT besides the VPC, comma-separated."),
        live("AWS_EXTERNAL_SERVICE_CIDRS", "", Kind::Cidrs(|s| &mut s.external_service_cidrs), "Destinations that pods reach by the primary ENI, comma-separated."),
        live("AWS_VPC_CNI_NODE_PORT_SUPPORT", "true", Kind::Bool(|s| &mut s.node_port), "Send replies to NodePort traffic back by the primary ENI."),
        node("AWS_VPC_K8S_CNI_CONNMARK", "0x80", Kind::Mark(|s| &mut s.connmark), "Mark bit for that; must not be one of kube-proxy's."),
        row("AWS_VPC_K8S_CNI_CONFIGURE_RPFILTER", "", Kind::Ignored("the primary interface is always set to loose"), "No effect."),
        row("ENABLE_NFTABLES", "", Kind::Ignored("nf_tables is always used"), "No effect."),
    ]},
    Group { title: "Pod interfaces", rows: &[
        node("AWS_VPC_ENI_MTU", "9001", mtu(|s| &mut s.eni_mtu), "MTU of every ENI, 576 (IPv6: 1280) to 9001."),
        row("POD_MTU", "", mtu(|s| &mut s.pod_mtu), "MTU of the pods' interfaces; unset: as AWS_VPC_ENI_MTU."),
        row("AWS_VPC_K8S_CNI_VETHPREFIX", "eni", Kind::Text(|s| &mut s.veth_prefix), "Start of the names of host interfaces, at most 4 bytes; not eth, lo or vlan."),
        row("DISABLE_POD_V6", "false", Kind::Bool(|s| &mut s.pod_ipv6_disabled), "Switch IPv6 off inside new pods."),
        row("ENABLE_BANDWIDTH_PLUGIN", "false", Kind::Bool(|s| &mut s.bandwidth_plugin), "Chain the bandwidth plugin."),
        node("ANNOTATE_POD_IP", "false", Kind::Bool(|s| &mut s.annotate_pod_ip), "Write each pod's address into an annotation of the pod."),
        row("NETWORK_POLICY_ENFORCING_MODE", "", Kind::Verbatim(|s| &mut s.network_policy_mode), "none, strict or standard: call the network policy agent for each pod; unset: do not."),
    ]},
    Group { title: "Security groups for pods", rows: &[
        node("ENABLE_POD_ENI", "false", Kind::Bool(|s| &mut s.pod_eni), "Serve pods with branch ENIs."),
        row("POD_SECURITY_GROUP_ENFORCING_MODE", "strict", Kind::Text(|s| &mut s.pod_security_group_mode), "strict or standard."),
        row("DISABLE_TCP_EARLY_DEMUX", "false", Kind::Bool(|s| &mut s.tcp_early_demux_disabled), "Lets the kubelet probe pods with a branch ENI in strict mode; read by the init container."),
    ]},
    Group { title: "Egress for the other family", rows: &[
        row("ENABLE_V4_EGRESS", "true", Kind::Bool(|s| &mut s.v4_egress), "IPv6 clusters: pods reach IPv4 through the node."),
        row("ENABLE_V6_EGRESS", "false", Kind::Bool(|s| &mut s.v6_egress), "IPv4 clusters: pods reach IPv6 through the node."),
        row("AWS_VPC_K8S_EGRESS_V4_PLUGIN_LOG_FILE", "/var/log/aws-routed-eni/egress-v4-plugin.log", Kind::TextOrEmpty(|s| &mut s.egress_v4_log_file), "Log of the egress plugin in IPv6 clusters, a path on the host."),
        row("AWS_VPC_K8S_EGRESS_V6_PLUGIN_LOG_FILE", "/var/log/aws-routed-eni/egress-v6-plugin.log", Kind::TextOrEmpty(|s| &mut s.egress_v6_log_file), "Log of the egress plugin in IPv4 clusters, a path on the host."),
    ]},
    Group { title: "Kubernetes", rows: &[
        row("MY_NODE_NAME", "", Kind::Text(|s| &mut s.node_name), "Name of the Node object; unset: the API server is not used."),
        row("MY_POD_NAME", "", Kind::Text(|s| &mut s.pod_name), "Name of our own pod, for events; unset: they are about the node."),
        row("CLUSTER_ENDPOINT", "", Kind::Text(|s| &mut s.cluster_endpoint), "Address of the API server instead of the service's."),
        row("KUBERNETES_SERVICE_HOST", "", Kind::Text(|s| &mut s.kubernetes_host), "Set by the kubelet: address of the API server."),
        row("KUBERNETES_SERVICE_PORT", "", Kind::Text(|s| &mut s.kubernetes_port), "Set by the kubelet: its port."),
        row("KUBECONFIG", "", Kind::Text(|s| &mut s.kubeconfig), "File with address and credentials of the API server."),
    ]},
    Group { title: "Logs and diagnostics", rows: &[
        live("AWS_VPC_K8S_CNI_LOGLEVEL", "Debug", Kind::Text(|s| &mut s.log_level), "Daemon: debug, info, warn, error or fatal."),
        row("AWS_VPC_K8S_CNI_LOG_FILE", "/host/var/log/aws-routed-eni/ipamd.log", Kind::Text(|s| &mut s.log_file), "Daemon: a path, stdout or stderr."),
        row("AWS_VPC_K8S_PLUGIN_LOG_LEVEL", "Debug", Kind::Text(|s| &mut s.plugin_log_level), "Level of both plugins."),
        row("AWS_VPC_K8S_PLUGIN_LOG_FILE", "/var/log/aws-routed-eni/plugin.log", Kind::TextOrEmpty(|s| &mut s.plugin_log_file), "Log of the plugin, a path on the host; stderr or empty: standard error."),
        row("INTROSPECTION_BIND_ADDRESS", "127.0.0.1:61679", Kind::Text(|s| &mut s.introspection_address), "Address of the debug endpoints: host:port or unix:path."),
        row("DISABLE_INTROSPECTION", "false", Kind::Bool(|s| &mut s.introspection_disabled), "No debug endpoints."),
        row("DISABLE_METRICS", "false", Kind::Bool(|s| &mut s.metrics_disabled), "No metrics on port 61678."),
    ]},
    Group { title: "Paths", rows: &[
        row("ENIBOX_SETTINGS_FILE", "/host/etc/enibox/settings.env", Kind::Text(|s| &mut s.settings_file), "File of the host with settings of this node, KEY=VALUE lines; it need not be there."),
        row("HOST_CNI_BIN_PATH", "/host/opt/cni/bin", Kind::Text(|s| &mut s.cni_bin_path), "Where the plugins are installed."),
        row("HOST_CNI_CONFDIR_PATH", "/host/etc/cni/net.d", Kind::Text(|s| &mut s.cni_conf_path), "Where the CNI configuration is installed."),
        row("ENIBOX_CNI_VERSION", "auto", Kind::Text(|s| &mut s.cni_version), "CNI version of that configuration: 0.4.0, 1.0.0 or 1.1.0; auto: 0.4.0, and to a runtime that can choose every newer one that all plugins of the list know. With 1.1.0 the runtime asks for the plugin's status: a node whose daemon is away is not ready."),
        row("AWS_VPC_K8S_CNI_BACKING_STORE", "/var/run/aws-node/ipam.json", Kind::Text(|s| &mut s.backing_store), "Checkpoint of the daemon; must survive its restart and not the node's."),
    ]},
    Group { title: "Variables of the AWS SDKs", rows: &[
        row("AWS_ACCESS_KEY_ID", "", SECRET, "Static credentials."),
        row("AWS_SECRET_ACCESS_KEY", "", SECRET, "Static credentials."),
        row("AWS_SESSION_TOKEN", "", SECRET, "Static credentials."),
        row("AWS_ROLE_ARN", "", PLAIN, "Role for the web identity."),
        row("AWS_WEB_IDENTITY_TOKEN_FILE", "", PLAIN, "Token of the web identity; read again at each refresh."),
        row("AWS_ROLE_SESSION_NAME", "", PLAIN, "Session name of that role."),
        row("AWS_CONTAINER_CREDENTIALS_FULL_URI", "", PLAIN, "Credentials of the Pod Identity agent."),
        row("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "", PLAIN, "The same, relative to http://169.254.170.2."),
        row("AWS_CONTAINER_AUTHORIZATION_TOKEN", "", SECRET, "Its token."),
        row("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "", PLAIN, "File with its token; read again at each refresh."),
        row("AWS_EC2_METADATA_DISABLED", "", PLAIN, "true: no credentials from IMDS."),
        row("AWS_EC2_METADATA_V1_DISABLED", "", PLAIN, "true: no fall-back to IMDSv1."),
        row("AWS_EC2_METADATA_SERVICE_ENDPOINT", "", PLAIN, "URL of IMDS."),
        row("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "", PLAIN, "IPv4 or IPv6."),
        row("AWS_REGION", "", PLAIN, "Region of STS; EC2's region comes from IMDS."),
        row("AWS_ENDPOINT_URL", "", PLAIN, "URL of every AWS service."),
        row("AWS_ENDPOINT_URL_EC2", "", PLAIN, "URL of the EC2 API."),
        row("AWS_ENDPOINT_URL_STS", "", PLAIN, "URL of STS."),
        row("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "", PLAIN, "true: the three above are ignored."),
        row("AWS_USE_DUALSTACK_ENDPOINT", "", PLAIN, "true: dual-stack endpoints."),
        row("AWS_USE_FIPS_ENDPOINT", "", PLAIN, "true: FIPS endpoints."),
        row("AWS_MAX_ATTEMPTS", "", PLAIN, "Attempts of one call; the SDKs' default is 3."),
        row("AWS_CA_BUNDLE", "", PLAIN, "File of certificate authorities."),
        row("SSL_CERT_FILE", "", PLAIN, "The same."),
        row("SSL_CERT_DIR", "", PLAIN, "Folder of certificate authorities."),
        row("HTTPS_PROXY", "", PLAIN, "Proxy for https; never used for IMDS. Lower case works too."),
        row("HTTP_PROXY", "", PLAIN, "Proxy for http."),
        row("NO_PROXY", "", PLAIN, "Hosts reached without a proxy."),
        row("https_proxy", "", PLAIN, "As HTTPS_PROXY."),
        row("http_proxy", "", PLAIN, "As HTTP_PROXY."),
        row("no_proxy", "", PLAIN, "As NO_PROXY."),
        row("AWS_PROFILE", "", NO_PROFILES, "Not supported."),
        row("AWS_SHARED_CREDENTIALS_FILE", "", NO_PROFILES, "Not supported."),
        row("AWS_CONFIG_FILE", "", NO_PROFILES, "Not supported."),
    ]},
];
