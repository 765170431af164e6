//! `enibox sandbox --set ...`: the daemon's modes with real packets, every flow as the mode has it.

#![cfg(feature = "sandbox")]

use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::process::Command;

struct Run {
    report: Value,
}

// A run that must be as it should be.
#[track_caller]
fn run(words: &[&str], settings: &[&str]) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_enibox"));
    command.args(["sandbox", "--json"]).args(words);
    command.args(settings.iter().flat_map(|setting| ["--set", setting]));
    let output = command.output().unwrap();
    let (text, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}\n{told}"));
    let flows = report["flows"].as_array().unwrap();
    let failed: Vec<&Value> = flows.iter().filter(|flow| flow["ok"] != true).collect();
    assert_eq!((failed, &report["problems"]), (Vec::new(), &json!([])), "{told}");
    assert!(output.status.success() && report["ok"] == true && !flows.is_empty(), "{report}");
    Run { report }
}

impl Run {
    fn calls(&self) -> BTreeSet<&str> {
        self.report["ec2_calls"].as_object().unwrap().keys().map(String::as_str).collect()
    }

    fn node(&self, field: &str) -> u64 {
        self.report["nodes"][0][field].as_u64().unwrap()
    }

    fn pods(&self) -> &Vec<Value> {
        self.report["pods"].as_array().unwrap()
    }

    // ENIs that have pods.
    fn enis(&self) -> BTreeSet<&str> {
        self.pods().iter().map(|pod| pod["eni"].as_str().unwrap()).collect()
    }
}

#[test]
fn custom_networking_gives_pods_another_subnet() {
    let run = run(&["--nodes", "2", "--pods", "11"], &["AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG=true"]);
    for pod in run.pods() {
        let (node, ip) = (pod["node"].as_str().unwrap(), pod["ip"].as_str().unwrap());
        let subnet = if node == "node-1" { 64..80 } else { 96..112 };
        let octets: Vec<u8> = ip.split('.').map(|octet| octet.parse().unwrap()).collect();
        assert!(octets[..2] == [100, 64] && subnet.contains(&octets[2]), "{node}: {ip}");
    }
    assert_eq!(run.enis().len(), 4, "eleven pods fill one ENI of an m5.large and begin another");
    assert_eq!(run.node("enis"), 3, "the primary ENI serves no pods");
}

#[test]
fn without_provisioning_nothing_is_changed_in_ec2() {
    let run = run(&["--nodes", "1", "--pods", "14"], &["DISABLE_NETWORK_RESOURCE_PROVISIONING=true"]);
    // Tags of subnets still say which ENIs are for pods.
    assert_eq!(run.calls(), BTreeSet::from(["DescribeNetworkInterfaces", "DescribeSubnets"]));
    assert_eq!((run.node("enis"), run.node("addresses"), run.enis().len()), (2, 14, 2));
}

#[test]
fn with_imds_alone_ec2_is_never_called() {
    let run = run(&["--nodes", "1", "--pods", "14"], &["ENABLE_IMDS_ONLY_MODE=true"]);
    assert_eq!(run.calls(), BTreeSet::new());
    assert_eq!((run.node("enis"), run.node("addresses"), run.enis().len()), (2, 14, 2));
}

#[test]
fn warm_and_minimum_targets_hold_few_addresses() {
    let targets = ["WARM_IP_TARGET=2", "MINIMUM_IP_TARGET=6", "AWS_VPC_K8S_CNI_EXTERNALSNAT=true"];
    let run = run(&["--nodes", "1", "--pods", "3"], &targets);
    assert_eq!((run.node("enis"), run.node("addresses")), (1, 6));
    let flows = run.report["flows"].as_array().unwrap();
    let seen = flows.iter().find(|flow| flow["to"] == "internet").unwrap();
    assert!(run.pods().iter().any(|pod| pod["ip"] == seen["seen"]), "without SNAT a pod is seen as itself: {seen}");
}

#[test]
fn without_discovery_new_enis_go_into_the_nodes_subnet() {
    let run = run(&["--nodes", "1", "--pods", "12"], &["ENABLE_SUBNET_DISCOVERY=false"]);
    assert!(run.pods().iter().all(|pod| pod["ip"].as_str().unwrap().starts_with("10.20.")));
    assert!(run.enis().len() >= 2);
}

#[test]
fn pods_do_not_need_the_api_server() {
    for state in ["none", "silent"] {
        let run = run(&["--nodes", "1", "--pods", "3", "--api-server", state], &[]);
        assert_eq!(run.pods().len(), 3, "{state}");
    }
}

#[test]
fn ipv6_pods_are_seen_as_themselves() {
    let run = run(&["--nodes", "2", "--pods", "12", "--family", "ipv6"], &[]);
    let calls = BTreeSet::from(["AssignIpv6Addresses", "CreateTags", "DescribeNetworkInterfaces"]);
    assert_eq!((run.calls(), run.node("enis"), run.enis().len()), (calls, 1, 2));
    assert!(run.pods().iter().all(|pod| pod["ip"].as_str().unwrap().starts_with("2001:db8:20:")));
    for flow in run.report["flows"].as_array().unwrap() {
        let from_pod = run.pods().iter().find(|pod| flow["from"] == format!("{}/{}", pod["node"], pod["name"]));
        assert!(from_pod.is_none_or(|pod| pod["ip"] == flow["seen"]), "{flow}");
    }
}

#[test]
fn pods_reach_the_other_family_through_their_node() {
    let more: [&[&str]; 2] = [&["--egress", "v4", "--family", "ipv6"], &["--egress", "v6"]];
    for (words, randomness) in more.iter().zip(["hashrandom", "none"]) {
        let setting = format!("AWS_VPC_K8S_CNI_RANDOMIZESNAT={randomness}");
        let run = run(&[&["--nodes", "2", "--pods", "12"], *words].concat(), &[&setting]);
        let flows = run.report["flows"].as_array().unwrap();
        let of = |proto: &str, expect: &str| {
            flows
                .iter()
                .filter(|flow| flow["proto"] == proto && flow["expect"].as_str().unwrap().contains(expect))
                .count()
        };
        assert_eq!(of("icmp", ""), 24, "a ping of every pod");
        assert_eq!((of("tcp", "refused"), of("udp", "refused")), (4, 4));
    }
}

#[test]
fn egress_is_for_the_other_family() {
    for words in [&["--egress", "v4"][..], &["--egress", "v6", "--family", "ipv6"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_enibox")).arg("sandbox").args(words).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && told.contains("is for the other family"), "{told}");
    }
}

#[test]
fn pods_have_an_interface_on_every_network_card() {
    let pods = ["--nodes", "2", "--pods", "4", "--instance-type", "p4d.24xlarge"];
    for (more, setting) in [
        (&[][..], "WARM_ENI_TARGET=1"),
        (&[][..], "AWS_VPC_K8S_CNI_EXTERNALSNAT=true"),
        (&["--family", "ipv6"][..], "WARM_ENI_TARGET=1"),
    ] {
        let run = run(&[&pods[..], more].concat(), &["ENABLE_MULTI_NIC=true", setting]);
        assert!(run.node("enis") >= 4, "one on each card: {}", run.report["nodes"]);
        let flows = run.report["flows"].as_array().unwrap();
        let further = flows.iter().filter(|flow| flow["from"].as_str().unwrap().contains("mNicIf3"));
        assert!(further.count() > 20, "{more:?} {setting}");
    }
}

#[test]
fn further_cards_serve_prefixes() {
    let words = ["--nodes", "1", "--pods", "3", "--instance-type", "c6in.32xlarge"];
    let settings = ["ENABLE_MULTI_NIC=true", "ENABLE_PREFIX_DELEGATION=true", "WARM_PREFIX_TARGET=1"];
    assert!(run(&words, &settings).node("enis") >= 2);
}

#[test]
fn names_marks_and_sizes_are_those_of_the_settings() {
    let settings = ["AWS_VPC_K8S_CNI_VETHPREFIX=abc", "AWS_VPC_K8S_CNI_CONNMARK=0x10100", "AWS_VPC_ENI_MTU=1500"];
    run(&["--nodes", "2", "--pods", "11"], &settings);
    run(&["--nodes", "2", "--pods", "3", "--family", "ipv6"], &settings);
}
