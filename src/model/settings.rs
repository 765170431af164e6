//! What the operator configures: environment variables as one typed value.
//!
//! Everything is read once, from a look-up function, into [`Settings`]; whoever needs a setting takes it from there and
//! never asks the environment. Upstream's leniency is kept, because a DaemonSet that works today must work with us: what
//! cannot be understood falls back to its default. But it is told: each such value gives a [`Complaint`]. Only what stops
//! upstream's start stops ours ([`Settings::check`], [`Settings::validate`]).
//!
//! This module reads neither the environment nor files.

pub mod layers;
mod parse;
mod table;

use super::limits::Limits;
use super::naming::{VETH_PREFIX_MAX, VETH_PREFIXES_TAKEN};
use super::nft::SnatPorts;
use crate::model::map::Map;
use ipnet::Ipv4Net;
use layers::{Layer, Scope};
use std::fmt;
use table::{GROUPS, Kind, NOT_YET, Row};

/// The whole configuration. One field per variable of the table (`Settings::rows`), whose help line says what it means.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the table documents each variable, and the README is made from it")]
#[expect(clippy::struct_excessive_bools, reason = "they are independent switches of the operator's")]
pub struct Settings {
    // Address family and mode.
    pub enable_ipv4: bool,
    pub enable_ipv6: bool,
    pub prefix_delegation: bool,
    pub multi_nic: bool,
    pub custom_networking: bool,
    pub eni_config_annotation: String,
    pub eni_config_label: String,
    // Warm pool and capacity; a target of 0 is off, except the ENI target's.
    pub warm_eni_target: u32,
    pub warm_ip_target: u32,
    pub minimum_ip_target: u32,
    pub warm_prefix_target: u32,
    pub max_eni: Option<u32>,
    pub ip_cooldown_s: u32,
    pub add_wait_s: u32,
    pub manage_non_schedulable: bool,
    // ENIs, subnets and tags; empty texts are unset.
    pub subnet_discovery: bool,
    pub cluster_name: String,
    pub additional_eni_tags: Map<String, String>,
    pub manage_untagged_eni: bool,
    pub provisioning_disabled: bool,
    pub imds_only: bool,
    pub leaked_eni_cleanup_disabled: bool,
    pub ec2_endpoint: String,
    pub http_timeout_s: u32,
    pub vpc_cni_version: String,
    // Routing and SNAT.
    pub external_snat: bool,
    pub snat_ports: SnatPorts,
    pub keep_host_source: bool,
    pub exclude_snat_cidrs: Vec<Ipv4Net>,
    pub external_service_cidrs: Vec<Ipv4Net>,
    pub node_port: bool,
    pub connmark: u32,
    // Pod interfaces.
    pub eni_mtu: u32,
    pub pod_mtu: u32,
    pub veth_prefix: String,
    pub pod_ipv6_disabled: bool,
    pub bandwidth_plugin: bool,
    pub annotate_pod_ip: bool,
    pub network_policy_mode: Option<String>,
    // Security groups for pods.
    pub pod_eni: bool,
    pub pod_security_group_mode: String,
    pub tcp_early_demux_disabled: bool,
    // Egress for the other family.
    pub v4_egress: bool,
    pub v6_egress: bool,
    pub egress_v4_log_file: String,
    pub egress_v6_log_file: String,
    // Kubernetes.
    pub node_name: String,
    pub pod_name: String,
    pub cluster_endpoint: String,
    pub kubernetes_host: String,
    pub kubernetes_port: String,
    pub kubeconfig: String,
    // Logs and diagnostics.
    pub log_level: String,
    pub log_file: String,
    pub plugin_log_level: String,
    pub plugin_log_file: String,
    pub introspection_address: String,
    pub introspection_disabled: bool,
    pub metrics_disabled: bool,
    // Paths.
    pub cni_bin_path: String,
    pub cni_conf_path: String,
    pub cni_version: String,
    pub backing_store: String,
    pub settings_file: String,
    /// Variables of the AWS SDKs that are set and not empty, by name. Holds secrets: never print it whole.
    pub inherited: Inherited,
}

/// Variables for the credential chain and the HTTP client, by name.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Inherited(Map<&'static str, String>);

impl Inherited {
    /// The value of a variable of the AWS SDKs; `None` when it is unset or empty.
    pub fn get(&self, variable: &str) -> Option<&str> {
        self.0.get(variable).map(String::as_str)
    }
}

/// Names only: values may be secrets.
impl fmt::Debug for Inherited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// A value that was not taken as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// The variable.
    pub variable: String,
    /// Where it was set.
    pub layer: Layer,
    /// What it was set to, at most [`COMPLAINT_BYTES_MAX`] bytes of it.
    pub value: String,
    /// What is wrong and what happened instead.
    pub what: String,
    /// Upstream refuses to start with it, and so do we; the default stands in its place meanwhile.
    pub fatal: bool,
}

/// More of a wrong value is not repeated in the log.
pub const COMPLAINT_BYTES_MAX: usize = 256;

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "setting {}={:?}", self.variable, self.value)?;
        if self.layer > Layer::Environment {
            write!(f, " ({})", self.layer)?;
        }
        write!(f, ": {}", self.what)
    }
}

/// What the pool hands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Secondary IPv4 addresses of ENIs.
    Ipv4Addresses,
    /// IPv4 addresses out of /28 prefixes.
    Ipv4Prefixes,
    /// IPv6 addresses out of /80 prefixes.
    Ipv6Prefixes,
}

/// The outcome of [`Settings::validate`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Valid {
    /// What the pool hands out.
    pub mode: Mode,
    /// ENIs per network card, by card index: the instance type's limits under `MAX_ENI`.
    pub enis_per_card: Vec<u32>,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

/// One line of the effective configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The variable.
    pub variable: &'static str,
    /// What counts; `None` when nothing does. Secrets are never in it.
    pub value: Option<String>,
    /// Whether it is what would count without any configuration.
    pub is_default: bool,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{}={value}", self.variable),
            None => write!(f, "{} (unset)", self.variable),
        }
    }
}

/// One variable as documentation shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doc {
    /// Heading above it.
    pub group: &'static str,
    /// The variable.
    pub variable: &'static str,
    /// Default; empty when there is none or the help line tells it.
    pub default: &'static str,
    /// What it does.
    pub help: &'static str,
    /// Read and checked, and without effect in this version.
    pub not_yet: bool,
    /// Whether it may be set for a single node.
    pub scope: Scope,
}

impl Default for Settings {
    /// What counts when no variable is set.
    fn default() -> Self {
        Settings::parse(|_| None).0
    }
}

impl Settings {
    /// Every variable, in the order of the documentation.
    pub fn docs() -> impl Iterator<Item = Doc> {
        GROUPS.iter().flat_map(|group| {
            group.rows.iter().map(|row| Doc {
                group: group.title,
                variable: row.variable,
                default: row.default,
                help: row.help,
                not_yet: NOT_YET.contains(&row.variable),
                scope: row.scope,
            })
        })
    }

    /// The mode, as far as the settings tell; the instance type may still forbid prefixes.
    pub fn mode_wished(&self) -> Mode {
        match (self.enable_ipv6, self.prefix_delegation) {
            (true, _) => Mode::Ipv6Prefixes,
            (false, true) => Mode::Ipv4Prefixes,
            (false, false) => Mode::Ipv4Addresses,
        }
    }

    /// EC2 must not be changed, by either of two variables.
    pub fn read_only(&self) -> bool {
        self.provisioning_disabled || self.imds_only
    }

    /// Whether this node looks for ENIs that dead nodes have left (`spec/ipamd.md` 1.1).
    pub fn cleans_leaked_enis(&self) -> bool {
        !(self.leaked_eni_cleanup_disabled || self.read_only() || self.enable_ipv6)
    }

    /// Any text but `standard` is strict (`spec/config.md` 2.6).
    pub fn pod_security_groups_strict(&self) -> bool {
        self.pod_security_group_mode != "standard"
    }

    /// Without the API server nothing can work (`spec/config.md` 1.2).
    pub fn needs_api_server(&self) -> bool {
        self.pod_eni || self.custom_networking || self.annotate_pod_ip
    }

    /// Combinations that stop the start whatever the instance. Fatal complaints of [`Settings::parse`] come before these.
    pub fn check(&self) -> Result<(), String> {
        self.mistakes().into_iter().next().map_or(Ok(()), Err)
    }

    /// All of them: upstream's entrypoint and the static part of its daemon (`spec/config.md` 1.1 and 1.2), in that order.
    pub fn mistakes(&self) -> Vec<String> {
        let mut mistakes = self.mistakes_of_plugin();
        let no_target = self.warm_ip_target == 0 && self.warm_prefix_target == 0 && self.minimum_ip_target == 0;
        if self.prefix_delegation && no_target && !self.enable_ipv6 {
            mistakes.push(
                "ENABLE_PREFIX_DELEGATION needs WARM_IP_TARGET, WARM_PREFIX_TARGET or MINIMUM_IP_TARGET above 0".into(),
            );
        }
        if let Some(mode) = &self.network_policy_mode
            && !["none", "strict", "standard"].iter().any(|known| known.eq_ignore_ascii_case(mode))
        {
            mistakes.push(format!("NETWORK_POLICY_ENFORCING_MODE={mode:?} is not none, strict or standard"));
        }
        let family = match (self.enable_ipv4, self.enable_ipv6) {
            (true, true) => "ENABLE_IPv4 and ENABLE_IPv6 exclude each other",
            (false, false) => "one of ENABLE_IPv4 and ENABLE_IPv6 must be true",
            (false, true) if !self.prefix_delegation => "ENABLE_IPv6 needs ENABLE_PREFIX_DELEGATION",
            (false, true) if self.custom_networking => {
                "ENABLE_IPv6 and AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG exclude each other"
            }
            _ => return mistakes,
        };
        mistakes.push(family.into());
        mistakes
    }

    fn mistakes_of_plugin(&self) -> Vec<String> {
        const IPV6_LEAST: u32 = 1280; // RFC 8200, section 5
        let mut mistakes = Vec::new();
        for (variable, file) in [
            ("AWS_VPC_K8S_PLUGIN_LOG_FILE", &self.plugin_log_file),
            ("AWS_VPC_K8S_EGRESS_V4_PLUGIN_LOG_FILE", &self.egress_v4_log_file),
            ("AWS_VPC_K8S_EGRESS_V6_PLUGIN_LOG_FILE", &self.egress_v6_log_file),
        ] {
            if file.eq_ignore_ascii_case("stdout") {
                mistakes.push(format!("{variable} cannot be stdout: it carries the result of the plugin"));
            }
        }
        if self.veth_prefix.len() > VETH_PREFIX_MAX || VETH_PREFIXES_TAKEN.contains(&self.veth_prefix.as_str()) {
            mistakes.push(format!(
                "AWS_VPC_K8S_CNI_VETHPREFIX={:?} must have at most 4 bytes and not be eth, lo or vlan",
                self.veth_prefix
            ));
        }
        if self.pod_eni && !matches!(self.pod_security_group_mode.as_str(), "strict" | "standard") {
            mistakes.push(format!(
                "POD_SECURITY_GROUP_ENFORCING_MODE={:?} is not strict or standard",
                self.pod_security_group_mode
            ));
        }
        for (variable, mtu) in [("AWS_VPC_ENI_MTU", self.eni_mtu), ("POD_MTU", self.pod_mtu)] {
            if self.enable_ipv6 && mtu < IPV6_LEAST {
                mistakes.push(format!("{variable}={mtu} is less than {IPV6_LEAST}, which IPv6 needs"));
            }
        }
        if !matches!(self.cni_version.as_str(), "auto" | "0.4.0" | "1.0.0" | "1.1.0") {
            mistakes.push(format!("ENIBOX_CNI_VERSION={:?} is not auto, 0.4.0, 1.0.0 or 1.1.0", self.cni_version));
        }
        mistakes
    }

    /// Combinations that stop the start on this instance, and what follows from its limits (`spec/ipamd.md` 1.2, 1.3).
    pub fn validate(&self, limits: &Limits) -> Result<Valid, String> {
        self.check()?;
        let mut warnings = Vec::new();
        let mode = match self.mode_wished() {
            Mode::Ipv6Prefixes if !limits.takes_prefixes() => {
                return Err("ENABLE_IPv6 needs an instance type on Nitro or bare metal".into());
            }
            Mode::Ipv4Prefixes if !limits.takes_prefixes() => {
                warnings.push(
                    "ENABLE_PREFIX_DELEGATION: the instance type is neither Nitro nor bare metal and has no prefixes; \
                     single addresses are used instead"
                        .into(),
                );
                Mode::Ipv4Addresses
            }
            mode => mode,
        };
        self.warn_of_policies(&mut warnings);
        let most = self.max_eni.unwrap_or(u32::MAX);
        Ok(Valid { mode, enis_per_card: limits.cards.iter().map(|enis| most.min(*enis)).collect(), warnings })
    }

    /// What keeps the network policy agent from doing its work (`spec/config.md` 5.7).
    fn warn_of_policies(&self, warnings: &mut Vec<String>) {
        let enforcing = self.network_policy_mode.as_ref().is_some_and(|mode| !mode.eq_ignore_ascii_case("none"));
        if enforcing && self.veth_prefix != "eni" {
            warnings.push(
                "AWS_VPC_K8S_CNI_VETHPREFIX: the network policy agent looks for interfaces whose names start with eni; \
                 policies may have no effect"
                    .into(),
            );
        }
        if enforcing && self.bandwidth_plugin {
            warnings.push(
                "ENABLE_BANDWIDTH_PLUGIN: the bandwidth plugin and the network policy agent both want the traffic control \
                 of a pod's interface"
                    .into(),
            );
        }
    }

    /// What counts, one line per variable that has an effect, without secrets.
    pub fn effective(&self) -> impl Iterator<Item = Line> + use<> {
        let (mut mine, mut default) = (self.clone(), Settings::default());
        Self::rows().filter(|row| !matches!(row.kind, Kind::Ignored(_))).map(move |row| {
            let (value, usual) = (row.show(&mut mine), row.show(&mut default));
            Line { variable: row.variable, is_default: value == usual, value }
        })
    }

    fn rows() -> impl Iterator<Item = &'static Row> {
        GROUPS.iter().flat_map(|group| group.rows.iter())
    }
}

#[cfg(test)]
mod tests;
