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

// Flows that must have no answer.
fn silent(run: &Run) -> Vec<&Value> {
    let flows = run.report["flows"].as_array().unwrap();
    flows.iter().filter(|flow| flow["expect"] == "no answer").collect()
}

// The pods of an m5.large from the tenth on, which are on its second ENI.
fn beyond_the_first_eni(text: &Value) -> bool {
    ["pod-10", "pod-11", "pod-12"].iter().any(|pod| text.as_str().unwrap().ends_with(pod))
}

#[test]
fn without_node_port_support_a_secondary_eni_answers_no_node_port() {
    let off = "AWS_VPC_CNI_NODE_PORT_SUPPORT=false";
    for more in ["AWS_VPC_K8S_CNI_EXTERNALSNAT=false", "AWS_VPC_K8S_CNI_EXTERNALSNAT=true"] {
        let run = run(&["--nodes", "1", "--pods", "10"], &[off, more]);
        let silent = silent(&run);
        // From the internet and from the VPC, over tcp and udp.
        assert_eq!(silent.len(), 4, "{silent:?}");
        assert!(silent.iter().all(|flow| flow["to"] == "node-1:30081 -> node-1/pod-10" && flow["seen"] == "no answer"));
    }
}

#[test]
fn services_outside_are_reached_by_the_primary_eni_alone() {
    let services = "AWS_EXTERNAL_SERVICE_CIDRS=198.18.0.0/15,10.20.30.0/24";
    // With SNAT what goes outside has the primary address; what goes to a service inside the VPC has not.
    for (more, to_peered) in [("false", 0), ("true", 6)] {
        let settings = [services, &format!("AWS_VPC_K8S_CNI_EXTERNALSNAT={more}")];
        let run = run(&["--nodes", "1", "--pods", "12"], &settings);
        let silent = silent(&run);
        let is = |text: &Value, end: &str| if end == "pod" { beyond_the_first_eni(text) } else { text == end };
        let ends = |from, to| silent.iter().filter(|flow| is(&flow["from"], from) && is(&flow["to"], to)).count();
        let counts =
            [("pod", "peered"), ("pod", "vpc-host"), ("peered", "pod"), ("vpc-host", "pod")].map(|(a, b)| ends(a, b));
        assert_eq!(counts, [to_peered, 6, 6, 6], "three pods, tcp and udp: {silent:?}");
        assert_eq!(silent.len(), counts.iter().sum::<usize>());
    }
    // Without support for node ports, a rule for their clients does the same for them.
    let all = ["AWS_EXTERNAL_SERVICE_CIDRS=203.0.113.0/24", "AWS_VPC_CNI_NODE_PORT_SUPPORT=false"];
    let run = run(&["--nodes", "1", "--pods", "10"], &all);
    let silent = silent(&run);
    assert!(silent.len() == 2 && silent.iter().all(|flow| flow["from"] == "vpc-host"), "{silent:?}");
}

#[test]
fn the_egress_chain_follows_the_setting() {
    let run = run(&["--nodes", "1", "--pods", "2"], &["ENABLE_V6_EGRESS=true"]);
    let flows = run.report["flows"].as_array().unwrap();
    assert_eq!(flows.iter().filter(|flow| flow["proto"] == "icmp").count(), 2, "a ping of every pod");
    assert_eq!(run.report["skipped"], json!([]));
}

#[test]
fn what_is_not_tried_is_told() {
    let t3 = ["--nodes", "1", "--pods", "1", "--instance-type", "t3.small"];
    for (setting, expected) in [
        ("ENABLE_POD_ENI=true", "ENABLE_POD_ENI: t3.small takes no trunk ENI, so no pod gets a branch ENI"),
        ("ENABLE_BANDWIDTH_PLUGIN=true", "ENABLE_BANDWIDTH_PLUGIN: it is for the installer"),
        ("ENABLE_NFTABLES=true", "setting ENABLE_NFTABLES=\"true\": has no effect"),
        ("WARM_IP_TARGET=three", "setting WARM_IP_TARGET=\"three\": "),
    ] {
        let run = run(&t3, &[setting]);
        let skipped = run.report["skipped"].as_array().unwrap();
        assert!(skipped.len() == 1 && skipped[0].as_str().unwrap().starts_with(expected), "{setting}: {skipped:?}");
    }
}

#[test]
fn flows_of_many_pods_are_a_sample() {
    let words = ["--nodes", "1", "--pods", "110", "--instance-type", "m5.xlarge"];
    let run = run(&words, &["ENABLE_PREFIX_DELEGATION=true", "WARM_PREFIX_TARGET=1"]);
    let flows = run.report["flows"].as_array().unwrap();
    let from = flows.iter().filter_map(|flow| flow["from"].as_str()).filter(|from| from.contains('/'));
    let from = from.collect::<BTreeSet<_>>();
    assert_eq!((run.pods().len(), from.len()), (110, 100));
    assert!(from.contains("node-1/pod-1") && from.contains("node-1/pod-110"));
    let told = "flows: between 100 of the 110 pods of each node, spread evenly among them";
    assert_eq!(run.report["skipped"], json!([told]));
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
fn what_needs_the_api_server_is_refused_without_one() {
    for state in ["none", "silent"] {
        let words = ["--api-server", state, "--set", "ENABLE_POD_ENI=true"];
        let output = Command::new(env!("CARGO_BIN_EXE_enibox")).arg("sandbox").args(words).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && told.ends_with("need an API server that answers\n"), "{state}: {told}");
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
