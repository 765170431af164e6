//! The daemon and the API server: there, away, late, silent.

use crate::stage::{Stage, eventually};
use enibox::clock;
use enibox::model::map::Set;
use enibox::model::net::{Family, Rule};
use enibox::netlink::rule;
use enibox::sandbox::kube::{Api, Kind};
use serde_json::json;
use std::cell::RefCell;
use std::time::Duration;

const ENDPOINT: (&str, &str) = ("CLUSTER_ENDPOINT", "http://198.51.100.2");
const TOKEN: &str = "/run/secrets/kubernetes.io/serviceaccount/token";
const LIMIT: Duration = Duration::from_secs(90);

fn objects() -> Api {
    let mut api = Api::new();
    api.add_node("node-1", 29);
    api.add_pod("tests", "early", "node-1", &json!({}));
    api.add_pod("tests", "on-the-host", "node-1", &json!({"hostNetwork": true}));
    api.add_pod("tests", "elsewhere", "node-2", &json!({}));
    api
}

#[track_caller]
fn logged(stage: &Stage, text: &str) {
    eventually(LIMIT, text, || if stage.log().contains(text) { Ok(()) } else { Err(stage.log()) });
}

fn serves(stage: &Stage) {
    let pod = stage.add("some");
    stage.probe(&pod);
    stage.delete(pod);
    stage.assert_no_complaints();
}

#[test]
fn watches_its_node_and_pods_and_is_idle() {
    let mut stage = Stage::new("m5.large", 61, &[ENDPOINT]);
    let kube = stage.world.serve_kube(objects()).unwrap();
    stage.start();
    stage.wait_ready();
    logged(&stage, "our node takes 29 pods\"");
    logged(&stage, "1 pods of our node need an address");
    kube.change(|api| {
        api.cordon("node-1", true);
        api.add_pod("tests", "second", "node-1", &json!({}));
    });
    logged(&stage, "our node takes 29 pods, cordoned");
    logged(&stage, "2 pods of our node need an address");
    let watches = || kube.requests().iter().filter(|line| line.contains("watch=true")).count();
    let cut = watches();
    kube.cut();
    kube.change(|api| api.remove(Kind::Pod, "tests", "early"));
    eventually(LIMIT, "the count falls", || {
        let last = stage.log().lines().rfind(|line| line.contains("pods of our node need")).map(str::to_owned);
        if last.as_ref().is_some_and(|line| line.contains("\"1 pods")) { Ok(()) } else { Err(last) }
    });
    // Two watches and nothing else, once those that were cut are there again.
    eventually(LIMIT, "both watches are back", || if watches() >= cut + 2 { Ok(()) } else { Err(kube.requests()) });
    let before = RefCell::new((kube.requests(), clock::instant()));
    eventually(LIMIT, "the API server is left alone for a second", || {
        let mut last = before.borrow_mut();
        let now = kube.requests();
        if now != last.0 {
            *last = (now, clock::instant());
        }
        if last.1.elapsed() > Duration::from_secs(1) { Ok(()) } else { Err(last.0.clone()) }
    });
    let before = kube.requests();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(kube.requests(), before);
    serves(&stage);
    stage.stop();
}

#[test]
fn serves_pods_while_the_api_server_is_away() {
    let mut stage = Stage::ready("m5.large", 62, &[ENDPOINT]);
    serves(&stage);
    assert!(!stage.log().contains("our node takes"));
    // It appears late, and takes no token but that of a file which comes later still.
    let kube = stage.world.serve_kube(objects()).unwrap();
    kube.tune(|knobs| knobs.tokens = Some(Set::from(["t-1".to_owned()])));
    logged(&stage, "Unauthorized");
    let write = || {
        std::fs::create_dir_all("/run/secrets/kubernetes.io/serviceaccount")?;
        Ok(std::fs::write(TOKEN, "t-1\n")?)
    };
    stage.node.inside(write).unwrap();
    logged(&stage, "our node takes 29 pods");
    // The kubelet has renewed the token, and the old one has run out.
    stage.write(TOKEN, "t-2\n");
    kube.tune(|knobs| knobs.tokens = Some(Set::from(["t-2".to_owned()])));
    kube.cut();
    kube.change(|api| api.cordon("node-1", true));
    logged(&stage, "our node takes 29 pods, cordoned");
    stage.stop();
}

#[test]
fn serves_pods_while_the_api_server_is_a_black_hole() {
    let mut stage = Stage::new("m5.large", 63, &[ENDPOINT]);
    let kube = stage.world.serve_kube(objects()).unwrap();
    kube.tune(|knobs| knobs.black_hole = true);
    stage.start();
    stage.wait_ready_within(Duration::from_secs(5));
    serves(&stage);
    kube.tune(|knobs| knobs.black_hole = false);
    logged(&stage, "our node takes 29 pods");
    stage.kill();
    // A restart is no other.
    kube.tune(|knobs| knobs.black_hole = true);
    stage.start();
    stage.wait_ready_within(Duration::from_secs(5));
    serves(&stage);
    kube.tune(|knobs| knobs.black_hole = false); // whoever waits there may go
    stage.stop();
}

#[test]
fn a_daemon_without_a_node_name_goes_on_alone() {
    let mut stage = Stage::new("m5.large", 64, &[ENDPOINT, ("MY_NODE_NAME", "")]);
    let kube = stage.world.serve_kube(objects()).unwrap();
    stage.start();
    stage.wait_ready();
    serves(&stage);
    assert_eq!(stage.log().matches("MY_NODE_NAME is not set").count(), 1);
    assert_eq!(kube.requests(), [""; 0]);
    stage.stop();
}

#[test]
fn a_feature_waits_for_the_api_server_and_annotates_pods() {
    let mut stage = Stage::new("m5.large", 65, &[ENDPOINT, ("ANNOTATE_POD_IP", "true")]);
    stage.start();
    logged(&stage, "waiting for the API server");
    let kube = stage.world.serve_kube(objects()).unwrap();
    stage.wait_ready();
    let annotation = || {
        kube.change(|api| {
            let pod = api.get(Kind::Pod, "tests", "early").expect("it stays");
            let address = pod.pointer("/metadata/annotations/vpc.amazonaws.com~1pod-ips");
            address.and_then(|address| address.as_str()).map(str::to_owned)
        })
    };
    let pod = stage.add("early");
    assert_eq!(annotation(), Some(pod.address().to_string()));
    stage.probe(&pod);
    stage.delete(pod);
    eventually(LIMIT, "the annotation is emptied", || {
        if annotation().as_deref() == Some("") { Ok(()) } else { Err(annotation()) }
    });
    stage.stop();
}

#[test]
fn a_repair_is_an_event_of_the_node() {
    let mut stage = Stage::new("m5.large", 66, &[ENDPOINT]);
    let kube = stage.world.serve_kube(objects()).unwrap();
    stage.start();
    stage.wait_ready();
    logged(&stage, "our node takes 29 pods");
    let mut socket = stage.node.place.socket().unwrap();
    let marked = Rule { fwmark: Some((0x80, 0x80)), ..Rule::any(Family::V4, 1024, 254) };
    for times in 1..=2 {
        socket.run(&[rule::delete(&marked)]).unwrap();
        eventually(LIMIT, "the rule is back, and noted", || {
            let noted = stage.log().matches("repair mark-rule: add rule 1024").count();
            if noted == times { Ok(()) } else { Err(noted) }
        });
    }
    let events = || kube.change(|api| api.list(Kind::Event, "", ""));
    eventually(LIMIT, "the event", || if events().is_empty() { Err(stage.log()) } else { Ok(()) });
    // The second time within five minutes is counted, not written.
    let events = events();
    let told = |event: &serde_json::Value| (event["reason"].clone(), event["regarding"]["kind"].clone());
    assert_eq!(
        events.iter().map(told).collect::<Vec<_>>(),
        [(json!("HostNetworkRepaired"), json!("Node"))],
        "{events:?}"
    );
    stage.stop();
}
