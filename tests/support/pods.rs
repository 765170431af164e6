//! Pods as the daemon's replies describe them.

use super::Netns;
use enibox::apply::Host;
use enibox::error::Result;
use enibox::model::cni::EnforcingMode;
use enibox::model::wire::{AddNetworkReply, IpAllocation};
use enibox::plan::pod::{Pod, Request};
use enibox::sys;

fn request(name: &str) -> Request {
    Request {
        namespace: "default".into(),
        name: name.into(),
        netns: "/var/run/netns/cni-test".into(),
        ifname: "eth0".into(),
        veth_prefix: "eni".into(),
        mtu: 1500,
        enforcing_mode: EnforcingMode::Strict,
    }
}

/// A pod of namespace `default` with these addresses and route tables.
pub fn pod_of(name: &str, addresses: &[(&str, i32)]) -> Pod {
    let allocations = addresses.iter().map(|(address, table)| {
        let (ipv4, ipv6) = if address.contains(':') { ("", *address) } else { (*address, "") };
        IpAllocation { ipv4: ipv4.into(), ipv6: ipv6.into(), device_number: 0, route_table_id: *table }
    });
    let reply = AddNetworkReply { success: true, allocations: allocations.collect(), ..AddNetworkReply::default() };
    let random = || {
        let mut bytes = [0; 6];
        sys::random_bytes(&mut bytes)?;
        Ok(bytes)
    };
    Pod::from_reply(&reply, &request(name), random).unwrap()
}

/// ADD from inside the node.
pub fn add(node: &Netns, pod: &Pod, sandbox: &Netns) -> Result<()> {
    node.run(|| Host::open()?.add_pod(pod, sandbox.handle()))
}
