//! Checkpoints that we have not written ourselves: the original's, and torn ones.

use crate::stage::{CHECKPOINT, Stage, Subject, eventually};
use crate::support::tool;
use crate::talk::Talk;
use enibox::model::naming::{host_veth, veth_alias};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

fn pods(stage: &Stage, prefix: &str, count: usize) -> Vec<Subject> {
    (0..count).map(|number| stage.add(&format!("{prefix}-{number}"))).collect()
}

fn addresses(pods: &[Subject]) -> BTreeSet<Ipv4Addr> {
    pods.iter().map(Subject::address).collect()
}

#[test]
fn a_checkpoint_of_the_original_is_taken_over_with_running_pods() {
    let stage = Stage::ready("m5.large", 21, &[]);
    let mut living = pods(&stage, "pod", 12);
    let talk = Talk::start(&stage, &living[7..]);
    stage.kill();
    let mut theirs = stage.checkpoint();
    theirs.enibox = None;
    stage.write(CHECKPOINT, &theirs.to_text());
    let veth = host_veth("eni", "tests", &living[9].name, 0).unwrap();
    let link = || stage.node.place.links().unwrap().into_iter().find(|link| link.name == veth).unwrap();
    let (mac, mtu) = (link().mac.unwrap(), link().mtu);
    let set =
        |words: &[&str]| stage.node.place.net.run(|| tool("ip", &[&["link", "set", &veth], words].concat())).unwrap();
    set(&["alias", ""]);
    stage.start();
    stage.wait_ready();
    eventually(Duration::from_secs(20), "MAC and MTU of the original's veth are noted", || {
        let alias = link().alias;
        if alias == veth_alias(mac, mtu, &veth) { Ok(()) } else { Err(alias) }
    });
    set(&["address", "02:00:00:00:00:94"]);
    set(&["mtu", "1400"]);
    eventually(Duration::from_secs(4), "they are put back", || {
        let link = link();
        if (link.mac, link.mtu) == (Some(mac), mtu) { Ok(()) } else { Err((link.mac, link.mtu)) }
    });
    let had = living[10].address();
    assert_eq!(stage.try_add(&mut living[10]).unwrap(), had);
    let held: BTreeMap<String, Ipv4Addr> = living.iter().map(|pod| (pod.container.clone(), pod.address())).collect();
    assert_eq!(stage.allocations(), held);
    living.extend(pods(&stage, "new", 10));
    assert_eq!(addresses(&living).len(), living.len());
    let gone = living.remove(0);
    let was = gone.address();
    stage.delete(gone);
    stage.probe_all(living.iter());
    stage.assert_clean(&[was], &living.iter().collect::<Vec<_>>());
    talk.finish();
    stage.assert_no_complaints();
}

#[test]
fn a_torn_checkpoint_is_set_aside_and_no_living_address_is_given_out() {
    let stage = Stage::ready("m5.large", 22, &[("IP_COOLDOWN_PERIOD", "1")]);
    let mut living = pods(&stage, "pod", 12);
    let talk = Talk::start(&stage, &living[7..]);
    stage.kill();
    let text = stage.read(CHECKPOINT);
    stage.write(CHECKPOINT, &text[..text.len() / 2]);
    stage.start();
    stage.wait_ready();
    eventually(Duration::from_secs(20), "the torn file is kept", || {
        let names = stage.list("/run/aws-node");
        if names.iter().any(|name| name.starts_with("ipam.json.corrupt-")) { Ok(()) } else { Err(names) }
    });
    // All that is left is given out: nothing of it is a living pod's.
    let new = pods(&stage, "new", 27 - living.len());
    assert!(addresses(&new).is_disjoint(&addresses(&living)));
    assert_eq!(addresses(&new).len(), new.len());
    stage.probe_all(new.iter().chain(&living));
    // Nobody knows any more whose they are: a DEL takes the veth, and the daemon then sees that the address is free.
    let gone = living.remove(0);
    let was = gone.address();
    stage.delete(gone);
    let rest: Vec<&Subject> = new.iter().chain(&living).collect();
    stage.probe_all(rest.iter().copied());
    assert!(stage.allocations().values().any(|address| *address == was));
    stage.stop();
    stage.start();
    stage.wait_ready();
    eventually(Duration::from_secs(5), "the deleted pod's rules are swept", || {
        let ruled = stage.ruled();
        if ruled.contains(&was) { Err(ruled) } else { Ok(()) }
    });
    stage.assert_clean(&[was], &rest);
    assert!(stage.allocations().values().all(|address| *address != was));
    stage.probe_all(rest.iter().copied());
    talk.finish();
    stage.assert_no_complaints();
}
