//! What must be right before anything is installed (`spec/install.md` 4.2, `spec/config.md` 1.1 and 1.2): every mistake in the
//! settings, and whether there is anything to install into. All mistakes are told at once: an operator who mends them one by
//! one waits for the kubelet's back-off between two of them.
//!
//! The settings are those of the model's one table; nothing is read here a second time in another way.

use super::conflist::{NodeAddresses, Template};
use crate::model::cni::Version;
use crate::model::settings::Settings;
use std::path::Path;

/// What the installation works with.
#[derive(Clone, Debug)]
pub struct Site {
    /// The environment alone; the daemon may know better what counts on this node.
    pub settings: Settings,
    /// The template of the CNI configuration.
    pub template: Template,
    /// What the operator should know, one line each.
    pub warnings: Vec<String>,
}

/// Reads the environment through `lookup` and the template in `folder`.
///
/// # Errors
/// All that is wrong, one line each.
pub fn check(lookup: impl Fn(&str) -> Option<String>, folder: &Path) -> Result<Site, Vec<String>> {
    let (settings, complaints) = Settings::parse(lookup);
    let fatal = complaints.iter().filter(|complaint| complaint.fatal);
    let mut mistakes: Vec<String> = fatal.map(ToString::to_string).collect();
    mistakes.extend(settings.mistakes());
    let folders = [("HOST_CNI_BIN_PATH", &settings.cni_bin_path), ("HOST_CNI_CONFDIR_PATH", &settings.cni_conf_path)];
    for (variable, path) in folders {
        if !Path::new(path).is_dir() {
            mistakes.push(format!("{variable}={path} is not a folder: the host's must be mounted there"));
        }
    }
    // With all but the node's addresses, which need IMDS: an operator's template may be wrong, and better now than later.
    let template = Template::read(folder).and_then(|template| {
        template.fill(&settings, &NodeAddresses::default())?;
        Ok(template)
    });
    match template {
        Ok(template) if mistakes.is_empty() => Ok(Site { warnings: warnings(&settings), settings, template }),
        Ok(_) => Err(mistakes),
        Err(error) => {
            mistakes.push(error.to_string());
            Err(mistakes)
        }
    }
}

/// The version that `ENIBOX_CNI_VERSION` fixes, if it does.
pub fn pinned(settings: &Settings) -> Option<Version> {
    Version::parse(&settings.cni_version).filter(|_| settings.cni_version != "auto")
}

/// Combinations that work, and surely not as they are meant (`spec/config.md` 2.5, 5.7).
fn warnings(settings: &Settings) -> Vec<String> {
    let policy = settings.network_policy_mode.is_some();
    let rows = [
        (
            settings.pod_ipv6_disabled && settings.enable_ipv6,
            "DISABLE_POD_V6 takes the address away from every pod that ENABLE_IPv6 gives it",
        ),
        (
            settings.pod_ipv6_disabled && settings.v6_egress && !settings.enable_ipv6,
            "DISABLE_POD_V6 leaves nothing of ENABLE_V6_EGRESS: pods have no IPv6 to leave by",
        ),
        (
            settings.bandwidth_plugin && policy,
            "ENABLE_BANDWIDTH_PLUGIN and the network policy agent both use the queueing disciplines of the pods' interfaces: \
             policies may not hold",
        ),
        (
            policy && settings.veth_prefix != "eni",
            "AWS_VPC_K8S_CNI_VETHPREFIX: the network policy agent looks for interfaces whose names start with eni",
        ),
    ];
    rows.into_iter().filter(|(holds, _)| *holds).map(|(_, text)| text.to_owned()).collect()
}
