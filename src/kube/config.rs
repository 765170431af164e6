//! Where the API server is and with what we come (`spec/kubernetes.md` 2 and 3).

use super::kubeconfig;
use crate::error::{Context, Result};
use crate::model::settings::Settings;
use std::path::{Path, PathBuf};

/// Where the kubelet puts the service account of a pod.
pub const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The namespace of our own pod when nothing says it.
const NAMESPACE: &str = "kube-system";

/// What proves who we are.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// Nothing.
    None,
    /// This text.
    Fixed(String),
    /// What stands in this file, which the kubelet renews.
    File(PathBuf),
}

/// Whose signature the server's certificate must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authority {
    /// The roots of the system.
    System,
    /// This PEM.
    Pem(Vec<u8>),
    /// What stands in this file; the system's roots if that cannot be read.
    File(PathBuf),
}

/// A client's configuration.
#[derive(Clone)]
pub struct Config {
    /// Addresses of the API server, `https://host:port`, the preferred one first. Others are tried when one cannot be
    /// connected to.
    pub servers: Vec<String>,
    /// Whom to trust.
    pub authority: Authority,
    /// Bearer token.
    pub token: Token,
    /// Name of our Node.
    pub node: String,
    /// Name of our own pod; empty: unknown.
    pub pod: String,
    /// Namespace of our own pod.
    pub namespace: String,
}

impl Config {
    /// From the settings and the service account in `account`, normally [`SERVICE_ACCOUNT`]; `None` when they name no API
    /// server. In a cluster that takes both variables of the service and the token's file; CLUSTER_ENDPOINT does without.
    pub fn find(settings: &Settings, account: &Path) -> Result<Option<Config>> {
        let namespace = std::fs::read_to_string(account.join("namespace")).unwrap_or_default();
        let mut config = Config {
            servers: Vec::new(),
            authority: Authority::File(account.join("ca.crt")),
            token: Token::File(account.join("token")),
            node: settings.node_name.clone(),
            pod: settings.pod_name.clone(),
            namespace: Some(namespace.trim()).filter(|name| !name.is_empty()).unwrap_or(NAMESPACE).to_owned(),
        };
        if let Some(file) = settings.kubeconfig.split(':').find(|file| !file.is_empty()) {
            kubeconfig::read(Path::new(file), &mut config).with_context(|| format!("read KUBECONFIG {file:?}"))?;
            return Ok(Some(config));
        }
        let endpoint = settings.cluster_endpoint.trim_end_matches('/');
        if !endpoint.is_empty() {
            let scheme = if endpoint.contains("://") { "" } else { "https://" };
            config.servers.push(format!("{scheme}{endpoint}"));
        }
        let (host, port) = (settings.kubernetes_host.as_str(), settings.kubernetes_port.as_str());
        if !host.is_empty() && !port.is_empty() && account.join("token").exists() {
            let bare_v6 = host.contains(':') && !host.starts_with('[');
            let service = if bare_v6 { format!("https://[{host}]:{port}") } else { format!("https://{host}:{port}") };
            if !config.servers.contains(&service) {
                config.servers.push(service);
            }
        }
        Ok((!config.servers.is_empty()).then_some(config))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn servers(with_token: bool, variables: &[(&str, &str)]) -> Option<String> {
        let lookup = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let dir = std::env::temp_dir().join(format!("enibox-account-{}-{with_token}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("namespace"), "cni\n").unwrap();
        if with_token {
            std::fs::write(dir.join("token"), "t").unwrap();
        }
        let found = Config::find(&Settings::parse(lookup).0, &dir);
        std::fs::remove_dir_all(&dir).unwrap();
        let config = found.unwrap()?;
        assert_eq!((config.node.as_str(), config.namespace.as_str()), ("", "cni"));
        Some(config.servers.join(" "))
    }

    #[test]
    fn addresses() {
        let check = |with_token: bool, variables: &[(&str, &str)], expect: Option<&str>| {
            assert_eq!(servers(with_token, variables).as_deref(), expect, "{variables:?}");
        };
        let service = [("KUBERNETES_SERVICE_HOST", "172.20.0.1"), ("KUBERNETES_SERVICE_PORT", "443")];
        check(true, &[], None);
        check(false, &service, None);
        check(true, &service[..1], None);
        check(true, &service, Some("https://172.20.0.1:443"));
        let v6 = [("KUBERNETES_SERVICE_HOST", "fd00::1"), ("KUBERNETES_SERVICE_PORT", "443")];
        check(true, &v6, Some("https://[fd00::1]:443"));
        check(true, &[("CLUSTER_ENDPOINT", ""), service[0], service[1]], Some("https://172.20.0.1:443"));
        let both = [("CLUSTER_ENDPOINT", "abc.eks.amazonaws.com"), service[0], service[1]];
        check(true, &both, Some("https://abc.eks.amazonaws.com https://172.20.0.1:443"));
        check(false, &[("CLUSTER_ENDPOINT", "http://127.0.0.1:1/")], Some("http://127.0.0.1:1"));
    }
}
