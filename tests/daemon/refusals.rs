//! An ADD that is refused says why: in the plugin's answer, in an event, and in the metrics.

use crate::settings::fetch;
use crate::stage::{Stage, Subject, TRY_AGAIN, eventually};
use enibox::sandbox::kube::{Api, Kind};
use enibox::sandbox::serve::kube::Kube;
use enibox::sim::vpc::{Behaviour, Planned};
use serde_json::Value;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

const ENDPOINT: (&str, &str) = ("CLUSTER_ENDPOINT", "http://198.51.100.2");
const QUICK: (&str, &str) = ("ENIBOX_ADD_WAIT", "1");
/// The text that everybody's alerts match.
const TEXT: &str = "add cmd: failed to assign an IP address to container";
/// An ENI of this type has one address for pods, and there are two ENIs.
const SMALL: &str = "t3.nano";
/// So many that the pool does not get by them.
const ALWAYS: usize = 1000;

// A node with an API server, and its daemon.
fn stage(instance_type: &str, seed: u64, env: &[(&str, &str)]) -> (Stage, Arc<Kube>) {
    let env: Vec<_> = [ENDPOINT, QUICK].iter().chain(env).copied().collect();
    let mut stage = Stage::new(instance_type, seed, &env);
    let mut api = Api::new();
    api.add_node("node-1", 29);
    let kube = stage.world.serve_kube(api).unwrap();
    stage.start();
    stage.wait_ready();
    (stage, kube)
}

fn refuse(stage: &Stage, actions: &[&str], code: &str) {
    let planned = Planned::Refused { code: code.into(), message: "as told".into(), status: 400 };
    let next = VecDeque::from(vec![planned; ALWAYS]);
    for action in actions {
        *stage.world.cloud.vpc().knobs.action(action) = Behaviour { next: next.clone(), ..Behaviour::default() };
    }
}

// Pods until one is refused; the pods, and the refused ADD's answer.
fn fill(stage: &Stage) -> (Vec<Subject>, String) {
    let (mut pods, before) = (Vec::new(), stage.allocations().len());
    loop {
        let mut subject = stage.subject(&format!("pod-{}", before + pods.len()));
        match stage.try_add(&mut subject) {
            Ok(_) => pods.push(subject),
            Err((code, text)) => {
                assert_eq!(code, TRY_AGAIN, "{text}");
                stage.delete(subject);
                return (pods, text);
            }
        }
    }
}

// The same, until the cause is known: EC2's client tries by itself before it gives up.
fn refused_for(stage: &Stage, word: &str) -> String {
    let last = std::cell::RefCell::new(String::new());
    eventually(Duration::from_secs(40), word, || {
        let (_, answer) = fill(stage);
        let found = answer.contains(word);
        last.replace(answer.clone());
        if found { Ok(()) } else { Err(answer) }
    });
    last.into_inner()
}

#[track_caller]
fn check(stage: &Stage, kube: &Kube, answer: &str, cause: &str, words: &[&str]) {
    let document: Value = serde_json::from_str(answer).unwrap();
    assert_eq!((&document["code"], &document["msg"]), (&TRY_AGAIN.into(), &TEXT.into()), "{answer}");
    let details = document["details"].as_str().unwrap();
    let missing: Vec<_> = words.iter().filter(|word| !details.contains(**word)).collect();
    assert!(missing.is_empty(), "{cause}: {missing:?} not in {details:?}\n{}", stage.log());
    let metrics = stage.node.place.net.run(|| fetch("127.0.0.1:61678", "/metrics")).unwrap();
    let counter = format!("enibox_add_refused_total{{cause=\"{cause}\"}} ");
    assert!(metrics.contains(&counter), "{counter}: {metrics}");
    eventually(Duration::from_secs(20), &format!("an event for {cause}"), || {
        let events = kube.change(|api| api.list(Kind::Event, "", ""));
        let ours = events.iter().find(|event| event["reason"] == "NoPodAddress" && event["action"] == cause);
        let told = ours.is_some_and(|event| {
            let note = event["note"].as_str().unwrap_or("");
            event["regarding"]["name"] == "node-1"
                && event["type"] == "Warning"
                && words.iter().all(|word| note.contains(word))
        });
        if told { Ok(()) } else { Err(events) }
    });
    stage.assert_no_complaints();
}

#[test]
fn a_full_subnet_is_named() {
    let (stage, kube) = stage("m5.large", 71, &[("WARM_IP_TARGET", "1"), ("MINIMUM_IP_TARGET", "2")]);
    refuse(&stage, &["AssignPrivateIpAddresses", "CreateNetworkInterface"], "InsufficientFreeAddressesInSubnet");
    let answer = refused_for(&stage, "free addresses");
    check(&stage, &kube, &answer, "subnet_exhausted", &["subnet subnet-", "no free addresses", "next try in"]);
}

#[test]
fn full_enis_and_resting_addresses_are_named() {
    let (stage, kube) = stage(SMALL, 72, &[]);
    let (mut pods, answer) = fill(&stage);
    assert_eq!(pods.len(), 2);
    check(&stage, &kube, &answer, "eni_limit", &["takes no more ENIs", "2 of 2 addresses are in use", "2 of 2 ENIs"]);
    stage.delete(pods.pop().unwrap());
    let (more, answer) = fill(&stage);
    assert_eq!(more.len(), 0);
    check(&stage, &kube, &answer, "cooling", &["rests after its last pod", "1 of 2 addresses are in use, 1 rest"]);
}

#[test]
fn throttling_is_named_with_its_end() {
    let (stage, kube) = stage("m5.large", 73, &[("WARM_IP_TARGET", "1"), ("MINIMUM_IP_TARGET", "2")]);
    refuse(&stage, &["AssignPrivateIpAddresses", "CreateNetworkInterface"], "RequestLimitExceeded");
    let answer = refused_for(&stage, "throttles");
    check(&stage, &kube, &answer, "throttled", &["EC2 throttles AssignPrivateIpAddresses: next call in "]);
}

#[test]
fn a_daemon_that_waits_for_ec2_says_so_and_one_that_is_away_is_named_too() {
    let (stage, kube) = stage(SMALL, 74, &[]);
    let (mut pods, _) = fill(&stage);
    stage.kill();
    let mut subject = stage.subject("meanwhile");
    let (code, text) = stage.try_add(&mut subject).unwrap_err();
    assert!(code == TRY_AGAIN && text.contains("add cmd: Error received from AddNetwork gRPC call"), "{text}");
    stage.delete(subject);
    let next = VecDeque::from(vec![Planned::RequestLost; ALWAYS]);
    let silent = Behaviour { next, ..Behaviour::default() };
    *stage.world.cloud.vpc().knobs.action("DescribeNetworkInterfaces") = silent;
    stage.start();
    stage.wait_ready();
    let (_, answer) = fill(&stage);
    check(&stage, &kube, &answer, "starting", &["the daemon is starting and waits for EC2"]);
    let had = pods[0].address();
    assert_eq!(stage.try_add(&mut pods[0]).unwrap(), had, "pods that are there are served all the same");
}

#[test]
fn a_cordoned_node_keeps_its_pods_and_asks_ec2_for_nothing() {
    let (stage, kube) = stage("m5.large", 75, &[("WARM_IP_TARGET", "2"), ("MINIMUM_IP_TARGET", "4")]);
    let first = stage.add("first");
    kube.change(|api| api.cordon("node-1", true));
    eventually(Duration::from_secs(20), "the daemon knows", || {
        if stage.log().contains("our node takes 29 pods, cordoned") { Ok(()) } else { Err(stage.log()) }
    });
    let before = stage.calls();
    let (mut pods, answer) = fill(&stage);
    check(&stage, &kube, &answer, "cordoned", &["the node is cordoned"]);
    assert_eq!(stage.calls(), before, "EC2 is left alone");
    pods.push(first);
    stage.probe_all(&pods);
    kube.change(|api| api.cordon("node-1", false));
    let mut late = stage.subject("late");
    eventually(Duration::from_secs(30), "an address after the uncordon", || {
        let mut subject = stage.subject("late");
        let result = stage.try_add(&mut subject);
        stage.delete(subject);
        result.map(drop)
    });
    stage.try_add(&mut late).unwrap();
    stage.probe(&late);
}

#[test]
fn what_the_settings_forbid_is_named() {
    let (stage, kube) = stage("m5.large", 76, &[("DISABLE_NETWORK_RESOURCE_PROVISIONING", "true")]);
    let (pods, answer) = fill(&stage);
    assert_eq!(pods.len(), 0);
    check(&stage, &kube, &answer, "provisioning_disabled", &["the settings forbid"]);
    // Looks only: ENIs, and the tags of subnets that say which ENIs are for pods.
    let calls = stage.calls().into_keys().collect::<Vec<_>>();
    assert_eq!(calls, ["DescribeNetworkInterfaces", "DescribeSubnets"]);
}
