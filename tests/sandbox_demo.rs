//! `enibox sandbox` as a user runs it: the real daemon and plugin, every flow, and nothing left of it.

use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

fn sandbox(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_enibox"));
    command.arg("sandbox").args(args);
    command
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}\n{}", String::from_utf8_lossy(&output.stderr)))
}

fn failed(report: &Value) -> Vec<&Value> {
    report["flows"].as_array().unwrap().iter().filter(|flow| flow["ok"] != true).collect()
}

fn started(pid: u32) -> bool {
    Path::new(&format!("/run/enibox-sandbox/{pid}")).exists()
}

#[test]
fn every_flow_is_as_it_should_be() {
    let child = sandbox(&["--nodes", "2", "--pods", "10", "--json"]);
    let output = { child }.output().unwrap();
    let report = json(&output);
    assert_eq!(failed(&report), Vec::<&Value>::new());
    assert_eq!((report["problems"].clone(), report["ok"].clone()), (Value::Array(vec![]), Value::Bool(true)));
    assert!(output.status.success());
    assert!(report["flows"].as_array().unwrap().len() > 400);
    let pods = report["pods"].as_array().unwrap();
    let addresses = pods.iter().map(|pod| pod["ip"].as_str().unwrap()).collect::<BTreeSet<_>>();
    let enis = pods.iter().map(|pod| pod["eni"].as_str().unwrap()).collect::<BTreeSet<_>>();
    assert_eq!(addresses.len(), 20);
    assert!(enis.len() >= 4, "ten pods do not fit on one ENI of an m5.large: {enis:?}");
    let internet = report["flows"].as_array().unwrap().iter().find(|flow| flow["to"] == "internet").unwrap();
    assert!(!addresses.contains(internet["seen"].as_str().unwrap()), "seen as the node");
}

#[test]
fn prefixes_are_routed_to_their_enis() {
    // One prefix fits on an ENI of this type: the last pod sits on the second one.
    let args = ["--instance-type", "t3.nano", "--nodes", "2", "--pods", "17", "--json"];
    let settings = ["--set", "ENABLE_PREFIX_DELEGATION=true", "--set", "WARM_PREFIX_TARGET=1"];
    let output = sandbox(&args).args(settings).output().unwrap();
    let report = json(&output);
    assert_eq!(failed(&report), Vec::<&Value>::new());
    assert_eq!((report["problems"].clone(), report["ok"].clone()), (Value::Array(vec![]), Value::Bool(true)));
    let enis = report["pods"].as_array().unwrap().iter().map(|pod| pod["eni"].as_str().unwrap());
    assert_eq!(enis.collect::<BTreeSet<_>>().len(), 4);
    assert_eq!(report["ec2_calls"]["UnassignPrivateIpAddresses"], Value::Null);
}

#[test]
fn without_snat_a_pod_is_seen_as_itself() {
    let output = sandbox(&["--nodes", "1", "--pods", "2", "--json", "--set", "AWS_VPC_K8S_CNI_EXTERNALSNAT=true"]);
    let report = json(&{ output }.output().unwrap());
    assert_eq!(failed(&report), Vec::<&Value>::new());
    let flow = report["flows"].as_array().unwrap().iter().find(|flow| flow["to"] == "internet").unwrap();
    assert!(report["pods"].as_array().unwrap().iter().any(|pod| pod["ip"] == flow["seen"]), "{flow}");
}

#[test]
fn a_wrong_network_is_found_out() {
    let output = broken(&["--nodes", "1", "--pods", "3", "--json"]);
    let report = json(&output);
    assert_eq!((output.status.code(), &report["ok"]), (Some(1), &Value::Bool(false)));
    let failed = failed(&report);
    let to = |word: &str, flow: &Value| flow[word].as_str().unwrap().contains("internet");
    assert_eq!(failed.iter().filter(|flow| to("to", flow)).count(), 6, "three pods, tcp and udp: {failed:?}");
    assert!(failed.iter().all(|flow| to("to", flow) || to("from", flow)), "{failed:?}");
}

#[test]
fn failed_flows_are_shown_and_counted() {
    let output = broken(&["--nodes", "1", "--pods", "5"]);
    let text = String::from_utf8(output.stdout).unwrap();
    // Five pods to the internet, and the internet to two node ports; each over tcp and udp.
    assert_eq!(
        text.lines().filter(|line| line.starts_with("FAILED  ") && line.contains(" over ")).count(),
        10,
        "{text}"
    );
    assert!(text.contains("\nFAILED  4 more; --json has them all\n"), "{text}");
    let verdict = text.lines().last().unwrap();
    assert!(verdict.starts_with("NOT as it should be: ") && verdict.contains("14 of "), "{verdict}");
    assert!(String::from_utf8(output.stderr).unwrap().contains("a VPC with 1 node of type m5.large"));
}

// A run whose first node has a rule of somebody's that lets nothing through to the internet. The daemon does not touch it.
fn broken(args: &[&str]) -> Output {
    let mut child = sandbox(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = child.id();
    let mut reader = BufReader::new(child.stderr.take().unwrap());
    let mut told = String::new();
    while !told.contains("starting the daemon") {
        assert!(reader.read_line(&mut told).unwrap() > 0, "{told}");
    }
    // It waits meanwhile, so that every flow comes after it.
    enibox::sys::signal(pid, 19).unwrap();
    let rule = Command::new("nsenter")
        .arg(format!("--net=/run/enibox-sandbox/{pid}/netns/node-1"))
        .args(["ip", "rule", "add", "to", "203.0.113.10", "blackhole", "pref", "5"])
        .status();
    enibox::sys::signal(pid, 18).unwrap();
    assert!(rule.unwrap().success());
    let mut output = child.wait_with_output().unwrap();
    std::io::Read::read_to_string(&mut reader, &mut told).unwrap();
    output.stderr = told.into_bytes();
    output
}

#[test]
fn a_refused_setting_is_told_by_its_reason_alone() {
    let output = sandbox(&["--nodes", "1", "--pods", "1", "--set", "AWS_VPC_K8S_CNI_VETHPREFIX=eth"]).output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    let reason = "settings: AWS_VPC_K8S_CNI_VETHPREFIX=\"eth\" must have at most 4 bytes and not be eth, lo or vlan";
    let last = told.lines().last().unwrap();
    assert_eq!(last, format!("enibox sandbox: the daemon on node-1 ended: {reason}"), "{told}");
    assert!(!told.contains("exit status") && !told.contains("\"level\""), "{told}");
}

#[test]
fn a_setting_that_there_is_not_is_refused_with_those_near_it() {
    for (setting, expected) in [
        ("NOSUCH=1", "there is no setting NOSUCH\n"),
        ("WARM_IP_TARGETS=1", "there is no setting WARM_IP_TARGETS; near it: WARM_IP_TARGET\n"),
    ] {
        let output = sandbox(&["--set", setting]).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && told.contains(expected), "{setting}: {told}");
    }
}

#[test]
fn help_is_a_subcommand_too() {
    let help = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_enibox")).args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let whole = help(&["help"]);
    assert_eq!(whole, help(&["--help"]));
    assert!(whole.contains("  sandbox ") && whole.contains("  aws-k8s-agent "), "{whole}");
    for words in [&["help", "sandbox"][..], &["sandbox", "help"]] {
        assert_eq!(help(words), help(&["sandbox", "--help"]), "{words:?}");
    }
    assert!(help(&["help", "doctor"]).contains("--fix"));
}

#[test]
fn a_bad_command_line_is_told() {
    for (args, code) in [
        (["--nodes", "0"], 2),
        (["--pods", "x"], 2),
        (["--set", "nothing"], 2),
        (["--instance-type", "m5.tiny"], 1),
        (["--pods", "200"], 1),
    ] {
        assert_eq!(sandbox(&args).output().unwrap().status.code(), Some(code), "{args:?}");
    }
}

// A run that is kept, once it stands.
fn kept() -> Child {
    let mut child = sandbox(&["--nodes", "1", "--pods", "1", "--keep"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let stands = lines.by_ref().map_while(Result::ok).any(|line| line.contains("It stands until"));
    assert!(stands);
    // Goes on reading, so that the run is not stopped by a full pipe.
    std::thread::spawn(move || lines.count());
    child
}

fn daemons_of(run: &str) -> usize {
    let of = |entry: std::fs::DirEntry| std::fs::read(entry.path().join("environ")).ok();
    let environments = std::fs::read_dir("/proc").unwrap().flatten().filter_map(of);
    environments.filter(|text| String::from_utf8_lossy(text).contains(run)).count()
}

#[test]
fn a_kept_run_is_entered_and_ended() {
    let mut child = kept();
    let pid = child.id();
    let inside = Command::new("nsenter")
        .arg(format!("--net=/run/enibox-sandbox/{pid}/netns/node-1"))
        .arg(format!("--mount=/run/enibox-sandbox/{pid}/mnt/node-1"))
        .args(["ls", "/run/aws-node", "/run/netns", "/sys/class/net"])
        .output();
    let listing = String::from_utf8(inside.unwrap().stdout).unwrap();
    assert!(listing.contains("ipamd.sock") && listing.contains("cni-pod-1"), "{listing}");
    enibox::sys::signal(pid, 15).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(!started(pid));
}

#[test]
fn a_killed_run_leaves_a_directory_that_the_next_one_removes() {
    let mut child = kept();
    let pid = child.id();
    let run = format!("/run/enibox-sandbox/{pid}/");
    assert_eq!(daemons_of(&run), 1);
    child.kill().unwrap();
    child.wait().unwrap();
    let mut patience = 1000;
    while daemons_of(&run) > 0 && patience > 0 {
        std::thread::sleep(Duration::from_millis(20));
        patience -= 1;
    }
    assert_eq!(daemons_of(&run), 0, "the daemon ends with its sandbox");
    // Its directory stays for the next run, which may be that of another test.
    assert!(sandbox(&["--nodes", "1", "--pods", "1"]).output().unwrap().status.success());
    assert!(!started(pid));
}
