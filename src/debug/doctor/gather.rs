//! Looks at the node: files, namespaces of pods, chains of others. Changes nothing.

use crate::apply::{self, Host};
use crate::error::Result;
use crate::model::map::Set;
use crate::model::naming::SUFFIX_LEN;
use crate::model::net::{Family, Link};
use crate::model::nft::Table;
use crate::model::order;
use crate::netlink::netns::Namespace;
use crate::netlink::{Socket, nft, nft_outline};
use crate::plan::doctor::environment::{DIRECTORIES, FILES, Facts, MARKS, Plugin, kube_proxys};
use crate::plan::doctor::pods::Inside;
use crate::plan::{egress, former};
use crate::sys;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Settings files and the like; a longer one is cut.
const FILE_BYTES_MAX: usize = 1 << 20;
/// Files of one directory.
const NAMES_MAX: usize = 1000;
/// Namespaces of one node: more than the largest instance has pods.
const NAMESPACES_MAX: usize = 4096;

/// A path of the host as it is seen from here. `/var/run` is `/run` on every host that has both.
pub(in crate::debug) fn under(root: &Path, path: &str) -> PathBuf {
    let found = root.join(path.trim_start_matches('/'));
    // Inside a scratch root or a container's mount of the host only one of the two may be there.
    match path.strip_prefix("/var/run/") {
        Some(rest) if !found.exists() && root != Path::new("/") => root.join("run").join(rest),
        _ => found,
    }
}

// What the kernel shows is the same everywhere; a root may have its own. A container's share of the processor is told inside.
fn file(root: &Path, path: &str) -> Option<String> {
    let mut found = under(root, path);
    if (path.starts_with("/proc/") || path.starts_with("/sys/fs/cgroup/")) && !found.exists() {
        found = PathBuf::from(path);
    }
    super::super::read(&found, FILE_BYTES_MAX).ok()
}

pub(super) fn facts(root: &Path, store: &Path, folder: &Path, links: &[Link]) -> Facts {
    let mut facts = Facts::default();
    // Of ENIs: of pods' links, which are many, the setting does not matter.
    for link in links.iter().filter(|link| link.name.len() < SUFFIX_LEN) {
        let path = format!("/proc/sys/net/ipv4/conf/{}/rp_filter", link.name);
        facts.files.extend(file(root, &path).map(|text| (path, text)));
        // Most drivers have none.
        let counters = sys::driver_counters(&link.name).unwrap_or_default();
        facts.counters.extend(counters.into_iter().map(|(name, count)| (link.name.clone(), name, count)));
    }
    for path in FILES {
        facts.files.extend(file(root, path).map(|text| ((*path).to_owned(), text)));
    }
    for (directory, end) in DIRECTORIES {
        for entry in fs::read_dir(under(root, directory)).into_iter().flatten().flatten().take(NAMES_MAX) {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(end) {
                let text = super::super::read(&entry.path(), FILE_BYTES_MAX).unwrap_or_default();
                facts.files.insert(format!("{directory}/{name}"), text);
            }
        }
    }
    facts.there = MARKS.iter().filter(|path| under(root, path).exists()).map(|path| (*path).to_owned()).collect();
    facts.plugin = plugin(root, folder);
    for family in [Family::V4, Family::V6] {
        for folder in fs::read_dir(under(root, egress::data_dir(family))).into_iter().flatten().flatten() {
            let entries = fs::read_dir(folder.path()).into_iter().flatten().flatten().take(NAMES_MAX * 2);
            facts.egress.extend(entries.filter_map(|entry| entry.file_name().to_str()?.parse::<IpAddr>().ok()));
        }
    }
    facts.checkpoint = fs::metadata(store).ok().map(|metadata| metadata.mtime());
    facts.modules = modules(root, &facts).unwrap_or_default();
    facts.kubelet = kubelet(root).unwrap_or_default();
    facts.runtime = runtime(root);
    facts
}

// Processes of the host, or of the container if those are not seen.
fn processes(root: &Path) -> impl Iterator<Item = PathBuf> {
    let proc = under(root, "/proc");
    let proc = if proc.join("1").exists() { proc } else { PathBuf::from("/proc") };
    let numbers = |name: &str| name.bytes().all(|b| b.is_ascii_digit());
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    entries.filter(move |entry| numbers(&entry.file_name().to_string_lossy())).map(|entry| entry.path())
}

// The kubelet's command line. Below another root no process of this machine counts but those that are seen there.
fn kubelet(root: &Path) -> Option<String> {
    if root != Path::new("/") && !under(root, "/proc/1").exists() {
        return None;
    }
    let mut kubelets = processes(root).filter(|path| {
        super::super::read(&path.join("comm"), FILE_BYTES_MAX).is_ok_and(|name| name.trim() == "kubelet")
    });
    super::super::read(&kubelets.next()?.join("cmdline"), FILE_BYTES_MAX).ok()
}

// Where containerd looks for network configurations and plugins. Nothing else of its file is kept: it may hold passwords.
fn runtime(root: &Path) -> Vec<(String, String)> {
    let text = super::super::read(&under(root, "/etc/containerd/config.toml"), FILE_BYTES_MAX).unwrap_or_default();
    text.lines().filter_map(folder).collect()
}

// A line of it that names such a folder. Behind a value may stand a comment (toml.io, "Comment").
fn folder(line: &str) -> Option<(String, String)> {
    let (key, value) = line.split_once('=')?;
    let (key, value) = (key.trim(), value.trim());
    let quoted = value.strip_prefix(['"', '\'']).and_then(|rest| Some(rest.split_once(value.get(..1)?)?.0));
    let value = quoted.unwrap_or_else(|| value.split('#').next().unwrap_or_default().trim_end());
    (matches!(key, "conf_dir" | "bin_dir") && !value.is_empty()).then(|| (key.to_owned(), value.to_owned()))
}

// The plugin on the host: in the folder of runtimes' default, or in that of the settings, which is as a container sees it.
fn plugin(root: &Path, folder: &Path) -> Option<Plugin> {
    let folders = [under(root, "/opt/cni/bin"), folder.to_path_buf()];
    let path = folders.into_iter().find(|folder| folder.is_dir())?.join("aws-cni");
    let same = || {
        let (one, other) = (Path::new("/proc/self/exe"), path.as_path());
        let length = |path| fs::metadata(path).map(|metadata| metadata.len()).ok();
        length(one) == length(other) && fs::read(one).ok() == fs::read(other).ok()
    };
    Some(Plugin { path: path.display().to_string(), there: path.exists(), same: same() })
}

// What this kernel has as modules or built in; none if its lists are not seen.
fn modules(root: &Path, facts: &Facts) -> Option<Set<String>> {
    let release = facts.files.get("/proc/sys/kernel/osrelease")?.trim();
    let list = |name: &str| {
        super::super::read(&under(root, &format!("/lib/modules/{release}/{name}")), 16 * FILE_BYTES_MAX).ok()
    };
    let mut names = Set::new();
    for text in [list("modules.dep")?, list("modules.builtin")?] {
        for line in text.lines() {
            let path = line.split(':').next().unwrap_or_default();
            let name = path.rsplit('/').next().unwrap_or_default().split(".ko").next().unwrap_or_default();
            names.insert(name.replace('-', "_"));
        }
    }
    let loaded = facts.files.get("/proc/modules").map(String::as_str).unwrap_or_default();
    names.extend(loaded.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned));
    Some(names)
}

/// Chains of all tables, and what a former installation has left among them.
pub(in crate::debug) fn chains(facts: &mut Facts, host: &Host, ours: &[Table]) -> Result<()> {
    let mut socket = Socket::netfilter()?;
    facts.chains = nft::chains(&mut socket)?;
    let (_, found) = nft_outline::outlines(&mut socket, &former::TABLES)?;
    facts.leftovers = former::leftovers(&found, ours);
    let chains = host.chains_of_legacy()?;
    facts.legacy_kube = chains.iter().any(|chain| kube_proxys(chain));
    facts.legacy = former::legacy_chains(chains);
    for family in [Family::V4, Family::V6] {
        facts.legacy_forward.push((family, host.legacy_forward(family)?));
    }
    Ok(())
}

/// All namespaces that can be reached, without our own. Names first: they are what runtimes give pods.
pub(super) fn namespaces(root: &Path) -> Vec<Inside> {
    let mut paths = Vec::new();
    for directory in ["/run/netns", "/var/run/netns"] {
        for directory in [under(root, directory), PathBuf::from(directory)] {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            paths.extend(entries.map(|entry| entry.path()));
        }
    }
    order::sort(&mut paths);
    paths.extend(processes(root).map(|path| path.join("ns/net")));
    let id = |path: &Path| fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
    let mut known: Set<_> = id(Path::new("/proc/thread-self/ns/net")).into_iter().collect();
    let mut found = Vec::new();
    for path in paths {
        if found.len() == NAMESPACES_MAX {
            break;
        }
        if id(&path).is_some_and(|id| known.insert(id)) {
            // One that ends meanwhile belongs to nobody any more.
            found.extend(look(&path));
        }
    }
    found
}

fn look(path: &Path) -> Result<Inside> {
    let namespace = Namespace::open(path)?;
    let mut socket = Socket::route_in(&namespace)?;
    Ok(Inside { path: path.display().to_string(), id: namespace.id()?, side: apply::side(&mut socket)? })
}

#[cfg(test)]
mod tests {
    #[test]
    fn folders_that_containerd_names() {
        let check = |line: &str, wanted: Option<(&str, &str)>| {
            let wanted = wanted.map(|(key, value)| (key.to_owned(), value.to_owned()));
            assert_eq!(super::folder(line), wanted, "{line}");
        };
        let folder = Some(("conf_dir", "/etc/cni/net.d"));
        check("conf_dir = \"/etc/cni/net.d\"", folder);
        check("  conf_dir = \"/etc/cni/net.d\" # as the kubelet has it", folder);
        check("conf_dir='/etc/cni/net.d'#'", folder);
        check("conf_dir = /etc/cni/net.d # not TOML", folder);
        check("bin_dir = \"/opt/#1/bin\"", Some(("bin_dir", "/opt/#1/bin")));
        check("bin_dir = \"\" # none", None);
        check("bin_dir = # none", None);
        check("# bin_dir = \"/opt\"", None);
        check("bin_dir", None);
        check("max_conf_num = 1", None);
    }
}
