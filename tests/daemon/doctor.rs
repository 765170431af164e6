//! `enibox doctor` on a whole node: single faults, each found under its name and mended, and no false alarm.

use crate::stage::{PROGRAM, Stage, Subject, eventually};
use enibox::sandbox::topology::{EC2, IMDS};
use serde_json::Value;
use std::process::Stdio;
use std::time::Duration;

/// What the doctor is told of the daemon's environment.
fn doctor(stage: &Stage, env: &[(&str, &str)], args: &[&str]) -> (i32, Value) {
    let mut command = stage.node.command(PROGRAM).unwrap();
    command.args(["doctor", "--json"]).args(args).env_clear().stdin(Stdio::null());
    command.env("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{IMDS}"));
    command.env("AWS_EC2_ENDPOINT", format!("http://{EC2}")).env("ENABLE_IPv4", "true").envs(env.iter().copied());
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    let document = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}{told}"));
    (output.status.code().unwrap(), document)
}

fn names(document: &Value) -> Vec<String> {
    let findings = document["findings"].as_array().unwrap();
    findings.iter().map(|finding| finding["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_healthy_node() {
    let stage = Stage::ready("t3.small", 91, &[]);
    let pods: Vec<Subject> = (0..5).map(|n| stage.add(&format!("p{n}"))).collect();
    let begin = enibox::clock::instant();
    eventually(Duration::from_secs(30), "all pods are known to the doctor", || {
        let (code, told) = doctor(&stage, &[], &[]);
        if told["pods"] == 5 && code == 0 { Ok(()) } else { Err(format!("{code} {told:#}")) }
    });
    println!("{:?} {}", begin.elapsed(), pods.len());
    let (_, told) = doctor(&stage, &[], &[]);
    println!("{told:#}");
    stage.kill();
    let (code, told) = doctor(&stage, &[], &[]);
    println!("{told:#}");
    assert_eq!(code, 3);
    assert_eq!(names(&told), ["daemon-silent"]);
}
