//! The released plugins of the chain, beside us.

use crate::support::{python, tool};
use crate::talk::{BOTH, Flow, PATIENCE};
use crate::world::*;
use enibox::apply::Host;
use enibox::plan::pod::{Removal, RemovedAddress};
use serde_json::{Value, json};
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

const FOLDERS: [&str; 2] = ["/opt/cni/bin", "/usr/lib/cni"];

#[test]
fn bandwidth_shapes_a_pod_and_disturbs_nothing() {
    let Some(folder) = FOLDERS.iter().find(|folder| Path::new(folder).join("bandwidth").exists()) else {
        return python::skip("no released plugins here, bandwidth is not tried beside us");
    };
    let world = World::new(&intent(), "eni");
    if world
        .node
        .run(|| Command::new("ip").args(["link", "add", "ifb0", "type", "ifb"]).output())
        .is_ok_and(|made| !made.status.success())
    {
        return python::skip("no ifb in this kernel, bandwidth is not tried beside us");
    }
    world.node.run(|| tool("ip", &["link", "delete", "ifb0"]));
    let veth = enibox::model::naming::host_veth("eni", "default", "two", 0).unwrap();
    let netns = world.pod2.path().display().to_string();
    // As our plugin prints it (`spec/plugin.md` 10.1).
    let result = json!({
        "cniVersion": "1.0.0",
        "interfaces": [
            {"name": veth}, {"name": "eth0", "sandbox": netns},
            {"name": enibox::model::naming::dummy("default", "two"), "mac": "0", "sandbox": "1"},
        ],
        "ips": [{"address": "10.20.12.60/32", "interface": 1}],
    });
    let call = |verb: &str| {
        let config = json!({
            "cniVersion": "1.0.0", "name": "aws-cni", "type": "bandwidth", "capabilities": {"bandwidth": true},
            "ingressRate": 8_000_000, "ingressBurst": 8_000_000, "egressRate": 8_000_000, "egressBurst": 8_000_000,
            "prevResult": result,
        });
        let mut command = Command::new(Path::new(folder).join("bandwidth"));
        command.env_clear().env("CNI_COMMAND", verb).env("CNI_CONTAINERID", "two").env("CNI_NETNS", &netns);
        command.env("CNI_IFNAME", "eth0").env("CNI_PATH", folder).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = world.node.run(|| command.spawn()).unwrap();
        child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stdout));
        output.stdout
    };
    let shaped = || world.node.run(|| tool("tc", &["qdisc", "show"])).unwrap().matches("tbf").count();
    let flows = |port: u16| {
        let (inside, outside) = (SocketAddr::new(ip(POD2), port), SocketAddr::new(ip(INTERNET), port));
        for proto in BOTH {
            let out = Flow { client: &world.pod2, target: outside, server: &world.internet, listen: outside };
            assert_eq!(out.run(proto, PATIENCE), Ok(ip(NODE_IP)));
            let to = Flow { client: &world.peered, target: inside, server: &world.pod2, listen: inside };
            assert_eq!(to.run(proto, PATIENCE), Ok(ip(PEERED)));
        }
    };
    let answer: Value = serde_json::from_slice(&call("ADD")).unwrap();
    assert!(answer["interfaces"].as_array().unwrap().len() > 3, "its link for what the pod sends: {answer}");
    assert_eq!(shaped(), 2);
    flows(7201);
    let repaired = world.node.run(|| Host::open()?.host(&intent())).unwrap();
    assert_eq!((repaired.steps, shaped()), (Vec::new(), 2), "what it made is not ours to touch");
    call("CHECK");
    // The runtime goes backwards through the chain: what shapes the pod's veth goes with it.
    call("DEL");
    let addresses = vec![RemovedAddress { address: ip(POD2), table: 2 }];
    let removal = Removal { addresses, veths: vec![(veth, "eth0".into())], ..Removal::default() };
    world.node.run(|| Host::open()?.del_pod(&removal, Some(world.pod2.handle()))).unwrap();
    assert_eq!(shaped(), 0);
}
