//! GC: releases addresses of sandboxes that the runtime no longer knows (CNI specification 1.1.0, "GC").
//!
//! The daemon has no call that lists its allocations, so the list is its checkpoint. Only entries of the configuration's own
//! network are looked at, and one is released only when its host veth is gone, which means that its namespace is: an address
//! in use must not go to another pod because a runtime's list is short.

use super::{Request, aws_cni, calls, local};
use crate::VERSION;
use crate::clock;
use crate::error::{Context, Error, List, Result};
use crate::model::checkpoint::Allocation;
use crate::model::cni::{Attachment, CniError, code};
use crate::model::map::{Map, Set};
use crate::model::naming;
use crate::model::order::Gather as _;
use crate::model::time::Wall;
use crate::model::wire::{DelNetworkRequest, UNKNOWN_POD};
use crate::netlink::{Socket, link};
use crate::plan::pod::{Removal, Request as PodRequest};
use std::time::Duration;

/// An ADD may be under way whose veth is not there yet; it takes no longer than its deadline.
const YOUNG: Duration = Duration::from_secs(90);

/// Serves GC.
pub fn gc(request: &Request) -> Result<(), CniError> {
    let config = aws_cni::load_config(request, "gc")?;
    let Some(valid) = config.valid_attachments else {
        let msg =
            "gc cmd: cni.dev/valid-attachments is missing; an empty list would have to be there to release everything";
        return Err(CniError::new(code::INVALID_CONFIG, msg));
    };
    let failed = |error: Error| CniError::new(code::INCOMPLETE, format!("gc cmd: {error}"));
    let Some(allocations) = local::Allocations::load().map_err(failed)? else {
        log::info!("no checkpoint, nothing to collect");
        return Ok(());
    };
    let links = link_names().map_err(failed)?;
    let (dead, spared) = sort_out(allocations.of_network(&request.envelope.name), &valid, &links, clock::now().wall);
    for (allocation, reason) in spared {
        log::info!("spare {}/{}: {reason}", allocation.container, allocation.ifname);
    }
    let mut errors = List::new();
    for (key, allocation) in dead {
        let result = release(&request.envelope.name, &config.veth_prefix, allocation);
        errors.note(result.with_context(|| format!("release {}/{}", key.0, key.1)));
    }
    errors.into_result().map_err(failed)
}

fn link_names() -> Result<Set<String>> {
    // Not from sysfs, which shows the interfaces of the namespace that it was mounted in.
    let links = link::list(&mut Socket::route()?).context("list interfaces")?;
    Ok(links.into_iter().map(|link| link.name).gather())
}

type Dead<'a> = Map<(&'a str, &'a str), &'a Allocation>;

/// Which allocations are dead, one per container and interface, and which are spared although they are not listed, and why.
fn sort_out<'a>(
    allocations: impl Iterator<Item = &'a Allocation>,
    valid: &[Attachment],
    links: &Set<String>,
    now: Wall,
) -> (Dead<'a>, Vec<(&'a Allocation, &'static str)>) {
    let (mut dead, mut spared) = (Map::new(), Vec::new());
    for allocation in allocations {
        let listed = |a: &Attachment| a.container == allocation.container && a.ifname == allocation.ifname;
        if valid.iter().any(listed) {
            continue;
        }
        let pod = &allocation.metadata;
        let suffix = naming::suffix(&pod.namespace, &pod.name, 0);
        if now.since(Wall::from_unix_nanos(allocation.timestamp)) < YOUNG {
            spared.push((allocation, "it is young and may be an ADD under way"));
        } else if pod.name.is_empty() {
            spared.push((allocation, "its pod is not known, so nobody can tell whether it lives"));
        } else if links.iter().any(|name| name.ends_with(&suffix)) {
            spared.push((allocation, "the host veth of its pod is still there"));
        } else {
            dead.insert((allocation.container.as_str(), allocation.ifname.as_str()), allocation);
        }
    }
    (dead, spared)
}

/// Releases one allocation and clears what is left of it on the host.
fn release(network: &str, veth_prefix: &str, allocation: &Allocation) -> Result<()> {
    let pod = &allocation.metadata;
    let reply = calls::del_network(&DelNetworkRequest {
        pod_name: pod.name.clone(),
        pod_namespace: pod.namespace.clone(),
        reason: calls::POD_DELETED.to_owned(),
        if_name: allocation.ifname.clone(),
        network_name: network.to_owned(),
        container_id: allocation.container.clone(),
        client_version: VERSION.to_owned(),
        ..DelNetworkRequest::default()
    });
    let reply = match reply {
        Err(status) if status.message.contains(UNKNOWN_POD) => return Ok(()), // somebody was faster
        reply => reply?,
    };
    if !reply.success {
        return Err(Error::new("the daemon refuses without a reason"));
    }
    let request = PodRequest {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        ifname: allocation.ifname.clone(),
        veth_prefix: veth_prefix.to_owned(),
        ..PodRequest::default()
    };
    let removal = Removal::from_reply(&reply, &request)?;
    log::info!("collected {network}/{}/{}", allocation.container, allocation.ifname);
    aws_cni::clear(&removal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::checkpoint::Metadata;

    fn allocation(container: &str, pod: &str, timestamp_s: i64) -> Allocation {
        Allocation {
            network: "aws-cni".into(),
            container: container.into(),
            ifname: "eth0".into(),
            ipv4: Some([10, 0, 0, 1].into()),
            ipv6: None,
            timestamp: timestamp_s * 1_000_000_000,
            metadata: Metadata { namespace: "default".into(), name: pod.into(), interfaces: 1 },
        }
    }

    #[test]
    fn only_the_provably_dead_are_collected() {
        let all = [
            allocation("listed", "a", 0),
            allocation("dead", "b", 0),
            allocation("young", "c", 950),
            allocation("living", "sample-pod", 0),
            allocation("nameless", "", 0),
        ];
        let valid = [Attachment { container: "listed".into(), ifname: "eth0".into() }];
        let links = ["lo", "eth0", "enicc21c2d7785"].map(str::to_owned).into();
        let (dead, spared) = sort_out(all.iter(), &valid, &links, Wall::from_unix_seconds(1000));
        assert_eq!(dead.into_keys().collect::<Vec<_>>(), [("dead", "eth0")]);
        let names: Vec<_> = spared.iter().map(|(allocation, _)| allocation.container.as_str()).collect();
        assert_eq!(names, ["young", "living", "nameless"]);
    }

    #[test]
    fn another_interface_of_a_listed_container_is_not_listed() {
        let all = [allocation("a", "p", 0)];
        let valid = [Attachment { container: "a".into(), ifname: "net1".into() }];
        let (dead, _) = sort_out(all.iter(), &valid, &Set::new(), Wall::from_unix_seconds(1000));
        assert_eq!(dead.len(), 1);
    }
}
