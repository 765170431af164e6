//! A node that this program leaves: `enibox cleanup --enis` gives back what it took from EC2.

use crate::stage::{Stage, eventually};
use enibox::sandbox::topology::{EC2, IMDS};
use std::process::Stdio;
use std::time::Duration;

struct Said {
    code: i32,
    out: String,
    err: String,
}

fn cleanup(stage: &Stage, arguments: &[&str]) -> Said {
    let mut command = stage.node.command(env!("CARGO_BIN_EXE_enibox")).unwrap();
    command.args(["cleanup", "--enis"]).args(arguments).env_clear().stdin(Stdio::null());
    command.env("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{IMDS}"));
    command.env("AWS_EC2_ENDPOINT", format!("http://{EC2}"));
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Said { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

// Three ENIs with three addresses for pods each: one that all nodes have, one with a pod, and a spare one.
#[test]
fn enis_that_serve_no_pod_are_given_back() {
    let stage = Stage::ready("t3.small", 81, &[]);
    let pods: Vec<_> = (0..4).map(|n| stage.add(&format!("p{n}"))).collect();
    eventually(Duration::from_mins(1), "there is a spare ENI", || {
        let count = stage.enis().0.len();
        if count == 3 { Ok(()) } else { Err(format!("{count} ENIs")) }
    });
    let (attached, _) = stage.enis();
    let primary = stage.world.cloud.vpc().identity(&stage.world.nodes[0].instance).unwrap().primary_eni;
    let last = pods[3].address();
    let (busy, spare): (Vec<_>, Vec<_>) =
        attached.iter().filter(|(id, _)| **id != primary).partition(|(_, addresses)| addresses.contains(&last));
    let (busy, spare) = (busy[0].0.clone(), spare[0].0.clone());
    stage.stop();

    let listed = cleanup(&stage, &[]);
    assert_eq!(listed.code, 3, "{}{}", listed.out, listed.err);
    assert!(listed.out.contains(&format!("detach and delete {spare} (")), "{}", listed.out);
    assert!(!listed.out.contains(&busy.0) && !listed.out.contains(&primary.0), "{}", listed.out);
    assert!(listed.err.contains(&format!("{busy} stays: a pod has its address {last}")), "{}", listed.err);
    let refused = cleanup(&stage, &["--apply"]);
    assert_eq!((refused.code, refused.out.as_str()), (1, ""), "{}", refused.err);
    assert_eq!(stage.enis().0.len(), 3, "nothing has changed yet");

    let applied = cleanup(&stage, &["--apply", "--force"]);
    assert_eq!((applied.code, &applied.out), (0, &listed.out), "{}", applied.err);
    let left = || -> Vec<_> { stage.world.cloud.vpc().interfaces().map(|eni| eni.id.clone()).collect() };
    assert!(left().contains(&busy) && left().contains(&primary) && !left().contains(&spare), "{:?}", left());

    // The pods live, and nothing on the node tells their addresses any more.
    let told = format!("{busy} stays: there are living pods whose addresses are not known (eni");
    let again = cleanup(&stage, &["--apply", "--force"]);
    assert_eq!((again.code, again.out.as_str()), (0, ""), "{}", again.err);
    assert!(again.err.contains(&told), "{}", again.err);
    let again = cleanup(&stage, &["--apply", "--force", "--json"]);
    let document: serde_json::Value = serde_json::from_str(&again.out).unwrap();
    assert_eq!((&document["steps"], again.err.as_str()), (&serde_json::json!([]), ""));
    let stays = document["stays"].as_array().unwrap();
    assert!(stays.iter().any(|line| line.as_str().unwrap().starts_with(&told)), "{document}");
    assert!(left().contains(&busy), "{:?}", left());

    for pod in pods {
        stage.bury(pod);
    }
    eventually(Duration::from_secs(20), "the pods' links are gone", || {
        let links = stage.veths();
        if links.is_empty() { Ok(()) } else { Err(format!("{links:?}")) }
    });
    let applied = cleanup(&stage, &["--apply"]);
    assert_eq!(applied.code, 0, "{}{}", applied.out, applied.err);
    assert_eq!(left(), [primary]);
    assert_eq!((cleanup(&stage, &[]).code, stage.enis().1.len()), (0, 0), "nothing is left to do");
}
