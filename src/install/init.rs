//! The init container `aws-vpc-cni-init` (`spec/install.md` 3): reference plugins to the host, sysctls of the node, then it
//! ends.
//!
//! It is the only privileged one of the pod's containers, so that what needs a writable `/proc/sys` is done here, whether
//! the daemon looks after it later or not. It must not touch anything but the plugins' folder, these sysctls and the kernel's
//! own rule `lookup main` where it is missing, without which IMDS could not be asked; and what holds already is not
//! written: on a node that is as it should be it can run at any time.

use super::{metadata, plugins};
use crate::apply;
use crate::clock;
use crate::error::{Context, Error, Result, exit};
use crate::logging;
use crate::model::net::Mac;
use crate::model::settings::Settings;
use crate::netlink::link;
use crate::netlink::socket::Socket;
use crate::netlink::sysctl;
use crate::plan::host;
use crate::sys;
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

/// How long the link of the primary ENI is looked for, and how often. It is there before the kubelet is, but for a driver
/// that is being loaded or a link that is being renamed this moment.
const LINK_LIMIT: Duration = Duration::from_secs(10);
const LINK_PAUSE: Duration = Duration::from_millis(200);

/// Prepares the node; the exit code. The image's working directory holds what is to be copied.
pub fn run() -> u8 {
    logging::init_text();
    let (settings, complaints) = Settings::parse(|name| std::env::var(name).ok());
    for complaint in complaints {
        log::warn!("{complaint}");
    }
    match until_told(move || prepare(&settings)) {
        Ok(()) => {
            log::info!("CNI init container done");
            exit::OK
        }
        Err(error) => {
            log::error!("{error}");
            exit::FAILURE
        }
    }
}

/// Does the work on a thread of its own, and leaves it where it is when a signal comes: the metadata service may be silent for
/// half a minute, a first process has no default action for signals, and a node that goes away must not wait for the kubelet to
/// kill us. Whatever is cut off is whole or not there, and done again by the next start. Not done is a failure, or the
/// kubelet would go on to the next container.
fn until_told(work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    // Before the threads, which inherit it.
    sys::block_signals().context("block signals")?;
    let (ended, end) = sync_channel(2);
    let signals = ended.clone();
    let wait = move || {
        let told = loop {
            match sys::wait_signal(Duration::from_hours(1)).context("wait for a signal") {
                Ok(None) => {}
                Ok(Some(signal)) => break Error::new(format!("signal {signal}: leaving before the node is prepared")),
                Err(error) => break error,
            }
        };
        signals.try_send(Err(told)).ok(); // nobody is there who could wait for it
    };
    let begin = |name: &str| std::thread::Builder::new().name(name.into());
    begin("signal").spawn(wait).context("start thread signal")?;
    begin("prepare").spawn(move || ended.try_send(work())).context("start thread prepare")?;
    end.recv().map_err(|_| Error::new("thread prepare ended"))?
}

fn prepare(settings: &Settings) -> Result<()> {
    log::info!("Copying CNI plugin binaries ...");
    plugins::copy(Path::new("."), Path::new(&settings.cni_bin_path)).context("Failed to install binaries")?;
    log::info!("Copied all CNI plugin binaries to {}", settings.cni_bin_path);

    apply::find_a_way(settings.enable_ipv6 || settings.v6_egress);
    log::info!("Configure rp_filter loose...");
    let primary = primary_link(settings.http_timeout_s).context("Failed to get primary IF")?;
    log::info!("Found primaryIF {primary}");
    for wanted in wanted(settings, &primary) {
        set(&wanted).with_context(|| format!("Failed to configure {} settings", wanted.family))?;
    }
    Ok(())
}

/// Name of the primary ENI's link.
fn primary_link(timeout_s: u32) -> Result<String> {
    let mac = metadata::read(&metadata::client(timeout_s)?, "mac")?;
    let mac = mac.ok_or_else(|| Error::new("the metadata service tells no mac"))?;
    log::info!("Found primaryMAC {mac}");
    let mac: Mac = mac.parse().map_err(|_| Error::new(format!("the metadata service tells {mac:?} as mac")))?;
    let mut socket = Socket::route()?;
    let start = clock::now().mono;
    loop {
        let links = link::list(&mut socket)?;
        if let Some(link) = host::link_of(&links, mac) {
            return Ok(link.name.clone());
        }
        if clock::now().mono.since(start) >= LINK_LIMIT {
            return Err(host::missing(mac, &links));
        }
        std::thread::sleep(LINK_PAUSE);
    }
}

/// A sysctl and what it shall be.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    key: String,
    value: &'static str,
    /// Passed over where the kernel has no such sysctl.
    optional: bool,
    /// What it is about, for the error.
    family: &'static str,
}

/// The node's sysctls in the order of the specification.
fn wanted(settings: &Settings, primary: &str) -> Vec<Wanted> {
    let own = |family: &str, name: &str| format!("net/{family}/conf/{primary}/{name}");
    let must = |family, key, value| Wanted { key, value, optional: false, family };
    // Answers of a pod with a strict branch ENI are forwarded once before they arrive at the node, and what early
    // demultiplexing has given to a socket of the node is not forwarded (`ip_forward` in net/ipv4/ip_forward.c): kubelet's
    // probes would fail. UDP has a switch of its own, which both families look at; the original never writes it, so that an
    // operator's 0 stays where nothing is to be disabled.
    let disabled = settings.tcp_early_demux_disabled;
    let early = if disabled { "0" } else { "1" };
    let early_demux = |name: &str| Wanted { optional: true, ..must("IPv4", format!("net/ipv4/{name}"), early) };
    // Loose: answers to NodePort connections leave through the primary ENI for pods of others.
    let mut wanted = vec![must("IPv4", own("ipv4", "rp_filter"), "2")];
    wanted.push(early_demux("tcp_early_demux"));
    wanted.extend(disabled.then(|| early_demux("udp_early_demux")));
    if settings.enable_ipv6 {
        wanted.push(must("IPv6", "net/ipv6/conf/all/disable_ipv6".into(), "0"));
    }
    if settings.enable_ipv6 || settings.v6_egress {
        wanted.push(must("IPv6", "net/ipv6/conf/all/forwarding".into(), "1"));
        // After that one: with forwarding on, 1 means that router advertisements are not listened to.
        wanted.push(must("IPv6", own("ipv6", "accept_ra"), "2"));
    }
    wanted
}

fn set(wanted: &Wanted) -> Result<()> {
    let Wanted { key, value, optional, .. } = wanted;
    if *optional && sysctl::read(key).is_err() {
        return Ok(());
    }
    sysctl::set(key, value)?;
    let now = sysctl::read(key)?;
    if now != *value {
        return Err(Error::new(format!("sysctl {key} is {now:?} after {value:?} was written to it")));
    }
    log::info!("Updated {key} to {now}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(variables: &[(&str, &str)], keys: &[(&str, &str)]) {
        let look = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let (settings, complaints) = Settings::parse(look);
        assert!(complaints.is_empty(), "{complaints:?}");
        let wanted = wanted(&settings, "ens5");
        let got: Vec<_> = wanted.iter().map(|wanted| (wanted.key.as_str(), wanted.value)).collect();
        assert_eq!(got, keys, "{variables:?}");
        let optional: Vec<_> = wanted.iter().filter(|one| one.optional).map(|one| one.key.as_str()).collect();
        let early = ["net/ipv4/tcp_early_demux", "net/ipv4/udp_early_demux"];
        assert_eq!(optional, early[..if settings.tcp_early_demux_disabled { 2 } else { 1 }]);
    }

    #[test]
    fn sysctls_by_settings_in_order() {
        const LOOSE: (&str, &str) = ("net/ipv4/conf/ens5/rp_filter", "2");
        const TCP: [(&str, &str); 2] = [("net/ipv4/tcp_early_demux", "1"), ("net/ipv4/tcp_early_demux", "0")];
        // Only switched off: another value of it is the operator's.
        const UDP: (&str, &str) = ("net/ipv4/udp_early_demux", "0");
        const ENABLED: (&str, &str) = ("net/ipv6/conf/all/disable_ipv6", "0");
        const FORWARDING: (&str, &str) = ("net/ipv6/conf/all/forwarding", "1");
        const LISTEN: (&str, &str) = ("net/ipv6/conf/ens5/accept_ra", "2");
        check(&[], &[LOOSE, TCP[0]]);
        check(&[("DISABLE_TCP_EARLY_DEMUX", "true")], &[LOOSE, TCP[1], UDP]);
        check(&[("ENABLE_IPv6", "true")], &[LOOSE, TCP[0], ENABLED, FORWARDING, LISTEN]);
        check(&[("ENABLE_V6_EGRESS", "true")], &[LOOSE, TCP[0], FORWARDING, LISTEN]);
        let both = [("ENABLE_IPv6", "true"), ("DISABLE_TCP_EARLY_DEMUX", "1")];
        check(&both, &[LOOSE, TCP[1], UDP, ENABLED, FORWARDING, LISTEN]);
    }
}
