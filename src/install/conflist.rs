//! The CNI configuration that is laid on the host (`spec/install.md` 5): a template, filled in and edited as text.
//!
//! The template may be the operator's own (a ConfigMap mounted over the image's file), so that everything in it which is not
//! ours to set must come out as it went in: unknown fields, their order, the blanks between them. Decoding and encoding again
//! loses one or the other; hence values are put into the text, escaped where they stand inside a string, and what is added is
//! inserted at places that a small reader of JSON finds. Whether the text is JSON at all is for `serde_json` to say.

use super::json;
use crate::error::{Context, Error, Result};
use crate::model::cni::Version;
use crate::model::imds::Identity;
use crate::model::nft::SnatPorts;
use crate::model::order;
use crate::model::settings::Settings;
use serde_json::Value;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::path::Path;

/// Name of the template and of the file on the host. A runtime takes the lexically first configuration of its folder, and
/// people look for this name.
pub const NAME: &str = "10-aws.conflist";
/// What counts when there is no file of that name in the working directory.
const BUILT_IN: &str = include_str!("../../init/10-aws.conflist");
/// A ConfigMap holds at most 1 MiB.
const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

const BANDWIDTH: (&str, &str) = ("bandwidth", r#"{"type": "bandwidth", "capabilities": {"bandwidth": true}}"#);
const TUNING: &str = r#"{"type": "tuning", "sysctl": {"net.ipv6.conf.all.disable_ipv6": "1", "net.ipv6.conf.default.disable_ipv6": "1", "net.ipv6.conf.lo.disable_ipv6": "1"}}"#;

/// A text with placeholders, and what to call it.
#[derive(Clone, Debug)]
pub struct Template {
    text: String,
    name: String,
}

/// The addresses of the node that go into the configuration, as texts; empty where there is none.
#[derive(Clone, Debug, Default)]
pub struct NodeAddresses {
    v4: String,
    v6: String,
}

impl NodeAddresses {
    /// Those that IMDS has told.
    pub fn of(identity: &Identity) -> NodeAddresses {
        let v6 = identity.local_ipv6.map(|address| address.to_string());
        NodeAddresses { v4: identity.local_ipv4.to_string(), v6: v6.unwrap_or_default() }
    }
}

impl Template {
    /// The operator's template in `folder`, or the built-in one if there is none.
    ///
    /// # Errors
    /// It is there and cannot be read, is no text, or is longer than 1 MiB.
    pub fn read(folder: &Path) -> Result<Template> {
        let path = folder.join(NAME);
        let name = path.display().to_string();
        let what = || format!("read template {name}");
        let mut bytes = Vec::new();
        match File::open(&path) {
            Ok(file) => file.take(TEMPLATE_BYTES_MAX + 1).read_to_end(&mut bytes).with_context(what)?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Ok(Template { text: BUILT_IN.to_owned(), name: NAME.to_owned() });
            }
            Err(error) => return Err(error).with_context(what),
        };
        if bytes.len() as u64 > TEMPLATE_BYTES_MAX {
            return Err(Error::new(format!("more than {TEMPLATE_BYTES_MAX} bytes")).context(what()));
        }
        let text = String::from_utf8(bytes).map_err(|error| Error::new(error.to_string()).context(what()))?;
        Ok(Template { text, name })
    }

    /// Puts the values in and appends the plugins that are switched on.
    ///
    /// # Errors
    /// What comes out is no configuration list that a runtime would take; with the place where it is wrong.
    pub fn fill(&self, settings: &Settings, node: &NodeAddresses) -> Result<Filled> {
        let what = || format!("fill in {}", self.name);
        let mut text = substitute(&self.text, &values(settings, node));
        let chain = read_chain(&text).with_context(what)?;
        let mut added = Vec::new();
        // A second one would take the first one's queueing discipline for its own.
        if settings.bandwidth_plugin && !chain.types.iter().any(|name| name == BANDWIDTH.0) {
            added.push(BANDWIDTH.1);
        }
        if settings.pod_ipv6_disabled {
            added.push(TUNING);
        }
        append(&mut text, &added);
        let before = chain.types.len();
        let chain = read_chain(&text).with_context(what)?;
        if chain.types.len() != before + added.len() {
            // A key with escapes in it, say.
            return Err(Error::new("cannot see where \"plugins\" stands").context(what()));
        }
        Ok(Filled { text, chain })
    }
}

/// What stands for each placeholder (`spec/config.md` 4).
fn values(settings: &Settings, node: &NodeAddresses) -> [(&'static str, String); 12] {
    let v6 = settings.enable_ipv6;
    let (enabled, address) = match (v6, settings.v6_egress) {
        (true, _) => (settings.v4_egress, node.v4.clone()),
        (false, true) => (!node.v6.is_empty(), node.v6.clone()),
        (false, false) => (false, String::new()),
    };
    let (subnet, destination, directory, log_file) = if v6 {
        ("169.254.172.0/22", "0.0.0.0/0", "/run/cni/v6pd/egress-v4-ipam", &settings.egress_v4_log_file)
    } else {
        ("fd00::ac:00/118", "::/0", "/run/cni/v4pd/egress-v6-ipam", &settings.egress_v6_log_file)
    };
    let ports = match settings.snat_ports {
        SnatPorts::FullyRandom => "prng",
        SnatPorts::Random => "hashrandom",
        SnatPorts::Keep => "none",
    };
    [
        ("__VETHPREFIX__", settings.veth_prefix.clone()),
        ("__MTU__", settings.pod_mtu.to_string()),
        ("__PODSGENFORCINGMODE__", settings.pod_security_group_mode.clone()),
        ("__PLUGINLOGFILE__", settings.plugin_log_file.clone()),
        ("__PLUGINLOGLEVEL__", settings.plugin_log_level.clone()),
        ("__EGRESSPLUGINLOGFILE__", log_file.clone()),
        ("__EGRESSPLUGINENABLED__", enabled.to_string()),
        ("__EGRESSPLUGINIPAMSUBNET__", subnet.to_owned()),
        ("__EGRESSPLUGINIPAMDST__", destination.to_owned()),
        ("__EGRESSPLUGINIPAMDATADIR__", directory.to_owned()),
        ("__RANDOMIZESNAT__", ports.to_owned()),
        ("__NODEIP__", address),
    ]
}

/// Replaces the placeholders, with the escapes of JSON where they stand inside a string. Outside of one the value goes in as
/// it is: `"mtu": __MTU__` makes a number.
fn substitute(template: &str, values: &[(&'static str, String)]) -> String {
    let mut text = String::with_capacity(template.len());
    let (mut inside, mut escaped) = (false, false);
    let mut rest = template;
    while let Some(next) = rest.chars().next() {
        if let Some((name, value)) = values.iter().find(|(name, _)| rest.starts_with(name)) {
            text.push_str(&if inside { json::escape(value) } else { value.clone() });
            rest = &rest[name.len()..];
            continue;
        }
        inside ^= next == '"' && !escaped;
        escaped = inside && next == '\\' && !escaped;
        text.push(next);
        rest = &rest[next.len_utf8()..];
    }
    text
}

/// What the list runs.
#[derive(Clone, Debug, Default)]
struct Chain {
    /// The plugins' types in their order.
    types: Vec<String>,
    /// The types of plugins that those call for addresses.
    delegates: Vec<String>,
}

fn read_chain(text: &str) -> Result<Chain> {
    let document: Value = serde_json::from_slice(text.as_bytes()).map_err(|error| {
        let line = text.lines().nth(error.line().saturating_sub(1)).unwrap_or_default();
        Error::new(format!("{error}: {}", line.trim()))
    })?;
    if !document["name"].is_string() {
        return Err(Error::new("\"name\" is not a text"));
    }
    let plugins = document["plugins"].as_array().filter(|plugins| !plugins.is_empty());
    let plugins = plugins.ok_or_else(|| Error::new("\"plugins\" is not a list with plugins in it"))?;
    let mut chain = Chain::default();
    for (index, plugin) in plugins.iter().enumerate() {
        // libcni looks the type up in its folders as a file's name.
        let kind = plugin["type"].as_str().filter(|kind| !kind.is_empty() && !kind.contains('/'));
        let kind = kind.ok_or_else(|| Error::new(format!("plugin {} has no \"type\"", index + 1)))?;
        chain.types.push(kind.to_owned());
        if !OURS.contains(&kind)
            && let Some(delegate) =
                plugin["ipam"]["type"].as_str().filter(|kind| !kind.is_empty() && !kind.contains('/'))
        {
            chain.delegates.push(delegate.to_owned());
        }
    }
    Ok(chain)
}

/// Our own plugins: all versions are known to them, and the allocation of addresses is theirs.
const OURS: &[&str] = &["aws-cni", "egress-cni", "egress-v4-cni"];

/// A configuration that lacks only its version.
#[derive(Clone, Debug)]
pub struct Filled {
    text: String,
    chain: Chain,
}

impl Filled {
    /// Names of the programs that the list runs and that are not ours, each once.
    pub fn foreign(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for name in self.chain.types.iter().chain(&self.chain.delegates) {
            if !OURS.contains(&name.as_str()) && !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        names
    }

    /// The whole text. With `pinned` this is the version; else the template's stays for runtimes that know only one field for
    /// it, and those that know `cniVersions` (libcni from 1.2 on) may take the highest of `common` that they speak.
    pub fn finish(&self, pinned: Option<Version>, common: &[Version]) -> String {
        let mut text = self.text.clone();
        let members = json::members(&text);
        // What stands between the brace and the first member.
        let blanks =
            members.first().map_or("", |first| json::blanks(&text[text.find('{').map_or(0, |at| at + 1)..first.start]));
        let (one, many) = (json::find(&members, "cniVersion"), json::find(&members, "cniVersions"));
        match (pinned, one) {
            (Some(version), _) => {
                let quoted = format!("\"{version}\"");
                let mut edits: Vec<(Range<usize>, String)> = Vec::new();
                edits.extend(one.map(|member| (member.value.clone(), quoted.clone())));
                edits.extend(many.map(|member| (member.value.clone(), format!("[{quoted}]"))));
                if one.is_none() {
                    let start = members.first().map_or(0, |first| first.start);
                    edits.push((start..start, format!("\"cniVersion\": {quoted},{blanks}")));
                }
                // From behind, so that the places in front stay true.
                order::sort_by_key(&mut edits, |(place, _)| std::cmp::Reverse(place.start));
                for (place, new) in edits {
                    text.replace_range(place, &new);
                }
            }
            (None, Some(one)) if many.is_none() => {
                let own = Version::parse(text[one.value.clone()].trim_matches('"')).unwrap_or(Version::NEWEST);
                let texts: Vec<String> =
                    common.iter().filter(|version| **version >= own).map(|version| format!("\"{version}\"")).collect();
                if common.iter().any(|version| *version > own) {
                    let new = format!(",{blanks}\"cniVersions\": [{}]", texts.join(", "));
                    text.insert_str(one.value.end, &new);
                }
            }
            (None, _) => {} // the operator's own choice
        }
        text
    }
}

/// Appends elements to the list of plugins, each behind the blanks that stand before the first one.
fn append(text: &mut String, elements: &[&str]) {
    let members = json::members(text);
    let Some(plugins) = json::find(&members, "plugins") else { return };
    let inner = &text[plugins.value.start + 1..plugins.value.end - 1];
    let blanks = json::blanks(inner);
    let (blanks, at) = (blanks.to_owned(), plugins.value.start + 1 + inner.trim_end().len());
    for element in elements.iter().rev() {
        text.insert_str(at, &format!(",{blanks}{element}"));
    }
}

#[cfg(test)]
#[path = "conflist_tests.rs"]
mod tests;
