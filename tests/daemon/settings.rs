//! Settings of one node while its daemon runs, and what `enibox status` and `enibox config` tell about it.

use crate::stage::{PROGRAM, Stage, eventually};
use enibox::model::settings::layers::MEMORY;
use enibox::sandbox::kube::{Api, Kind};
use serde_json::{Value, json};
use std::process::Stdio;
use std::time::Duration;

const FILE: &str = "/run/aws-node/settings.env";
/// How soon a change of the file counts.
const RELOAD: Duration = Duration::from_secs(30);

// Runs the operator's command on the node: exit code, standard output and standard error.
fn run(stage: &Stage, words: &[&str], env: &[(&str, &str)]) -> (i32, String, String) {
    let mut command = stage.node.command(PROGRAM).unwrap();
    command.args(words).env_clear().envs(env.iter().copied()).stdin(Stdio::null());
    let output = command.output().unwrap();
    let texts = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    let [out, err] = texts;
    (output.status.code().unwrap(), out, err)
}

fn json_of(stage: &Stage, command: &str) -> Value {
    let (code, out, err) = run(stage, &[command, "--json"], &[]);
    assert_eq!(code, 0, "{err}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
}

fn setting(document: &Value, variable: &str) -> Value {
    let settings = document["settings"].as_array().unwrap().iter();
    settings.clone().find(|setting| setting["variable"] == variable).cloned().unwrap_or_default()
}

#[test]
fn a_running_daemon_tells_its_status() {
    let stage =
        Stage::ready("m5.large", 31, &[("WARM_IP_TARGET", "2"), ("MINIMUM_IP_TARGET", "4"), ("MAX_ENI", "none")]);
    let pod = stage.add("web-0");
    eventually(Duration::from_secs(10), "the pod shows", || {
        let status = json_of(&stage, "status");
        let shown = (status["phase"].clone(), status["pool"]["used"].clone(), status["pool"]["total"].clone());
        if shown == (json!("ready"), json!(1), json!(4)) { Ok(()) } else { Err(status) }
    });
    let status = json_of(&stage, "status");
    let primary = &status["pool"]["enis"][0];
    assert_eq!((&primary["kind"], &primary["device"], &primary["used"]), (&json!("primary"), &json!(0), &json!(1)));
    assert_eq!(status["doing"]["targets"], json!({"warm_eni": 1, "warm_ip": 2, "minimum_ip": 4, "warm_prefix": 0}));
    assert_eq!(status["instance"]["type"], "m5.large");
    assert_eq!(setting(&status, "WARM_IP_TARGET")["layer"], "environment");
    assert!(status["wrong"][0].as_str().unwrap().contains("MAX_ENI"), "{status}");

    let (code, page, err) = run(&stage, &["status"], &[]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(page.contains("4 addresses: 1 used, 0 cooling, 3 free; 1 of 3 ENIs"), "{page}");
    let (code, page, _) = run(&stage, &["config"], &[]);
    assert!(code == 0 && page.contains("\nWARM_IP_TARGET=2  # environment; per node, at once\n"), "{page}");

    let metrics = stage.node.place.net.run(|| fetch("127.0.0.1:61678", "/metrics")).unwrap();
    for line in [
        "awscni_total_ip_addresses 4\n",
        "awscni_assigned_ip_addresses 1\n",
        "enibox_add_wait_seconds_count{success=\"true\"} 1\n",
        "awscni_ipamd_startup_duration_seconds_count{success=\"true\",with_api_server=\"false\",failure_reason=\"\"} 1\n",
    ] {
        assert!(metrics.contains(line), "{line:?} is missing in\n{metrics}");
    }
    let commands = stage.node.place.net.run(|| fetch("127.0.0.1:61679", "/")).unwrap();
    assert!(commands.contains("/v1/enibox/status") && commands.contains("/v1/eni-configs"), "{commands}");
    let unknown = stage.node.place.net.run(|| fetch("127.0.0.1:61679", "/v1/pods")).unwrap();
    assert!(unknown.starts_with("HTTP/1.1 404 "), "{unknown}");

    stage.kill();
    let (code, page, err) = run(&stage, &["status"], &[]);
    assert!(code == 1 && err.contains("ask the daemon at 127.0.0.1:61679"), "{err}");
    assert!(page.starts_with("the daemon does not answer; "), "{page}");
    assert!(page.contains(&pod.address().to_string()) && page.contains("/web-0\n"), "{page}");
    let (code, out, _) = run(&stage, &["config", "--json"], &[("WARM_IP_TARGET", "7")]);
    let without: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &setting(&without, "WARM_IP_TARGET")["value"]), (0, &json!("7")));
    assert_eq!(run(&stage, &["status", "--jsn"], &[]).0, 2);
}

pub fn fetch(address: &str, path: &str) -> String {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nconnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn the_settings_file_counts_while_the_daemon_runs_and_at_its_start() {
    let socket = ("INTROSPECTION_BIND_ADDRESS", "unix:/run/aws-node/introspect.sock");
    let env = [("WARM_IP_TARGET", "2"), ("MINIMUM_IP_TARGET", "2"), ("ENIBOX_SETTINGS_FILE", FILE), socket];
    let stage = Stage::ready("m5.large", 32, &env);
    let ask = |command: &str| -> Value {
        let (code, out, err) = run(&stage, &[command, "--json"], &[socket]);
        assert_eq!(code, 0, "{err}");
        serde_json::from_str(&out).unwrap()
    };
    let held = |want: usize| {
        let what = format!("the pool has {want} addresses");
        eventually(RELOAD, &what, || {
            let held: usize = stage.enis().0.values().map(std::collections::BTreeSet::len).sum();
            if held == want { Ok(()) } else { Err((held, stage.log())) }
        });
    };
    held(2);
    stage.write(
        FILE,
        "# more for this node\nWARM_IP_TARGET=6\nMAX_ENI=1\nIP_COOLDOWN_PERIOD=soon\nCLUSTER_NAME=other\n",
    );
    held(6);
    let config = ask("config");
    assert_eq!(setting(&config, "WARM_IP_TARGET")["layer"], "file");
    assert_eq!(config["pending"], json!(["MAX_ENI=1"]));
    let wrong = config["wrong"].to_string();
    assert!(wrong.contains("IP_COOLDOWN_PERIOD") && wrong.contains("CLUSTER_NAME"), "{wrong}");
    assert_eq!(stage.log().matches("takes effect at the next start").count(), 1);
    assert_eq!(ask("status")["pool"]["eni_limit"], json!(3));

    // What the Node said before, remembered: the API server is away here.
    let memory = json!({"labels": {"WARM_IP_TARGET": "3"}, "annotations": {"WARM_IP_TARGET": "x"}}).to_string();
    stage.kill();
    stage.write(&format!("/run/aws-node/{MEMORY}"), &memory);
    stage.start();
    stage.wait_ready();
    eventually(Duration::from_secs(10), "the daemon is there again", || {
        let (code, out, err) = run(&stage, &["status", "--json"], &[socket]);
        let status: Value = serde_json::from_str(&out).unwrap_or_default();
        let shown = (code, &status["pool"]["eni_limit"], setting(&status, "WARM_IP_TARGET")["layer"].clone());
        if shown == (0, &json!(1), json!("label")) { Ok(()) } else { Err((out, err)) }
    });
    assert_eq!(ask("status")["pending"], json!([]));
    stage.stop();
}

#[test]
fn the_node_object_sets_its_daemon_and_is_remembered() {
    let endpoint = ("CLUSTER_ENDPOINT", "http://198.51.100.2");
    let mut stage = Stage::new("m5.large", 33, &[endpoint, ("WARM_IP_TARGET", "2")]);
    let mut api = Api::new();
    api.add_node("node-1", 29);
    let annotate = |api: &mut Api, variable: &str, value: &str| {
        api.annotate(Kind::Node, "", "node-1", &format!("enibox.io/{variable}"), value);
    };
    annotate(&mut api, "MAX_ENI", "2");
    annotate(&mut api, "WARM_IP_TARGET", "4");
    let kube = stage.world.serve_kube(api).unwrap();
    stage.start();
    stage.wait_ready();
    let shown = |stage: &Stage, eni_limit: u32, total: u32, pending: &Value| {
        let want = (json!(eni_limit), json!(total), pending.clone());
        eventually(Duration::from_secs(15), &format!("{want:?}"), || {
            let (code, out, err) = run(stage, &["status", "--json"], &[]);
            let status: Value = serde_json::from_str(&out).unwrap_or_default();
            let pool = &status["pool"];
            let seen = (pool["eni_limit"].clone(), pool["total"].clone(), status["pending"].clone());
            if code == 0 && seen == want { Ok(()) } else { Err((out, err, stage.log())) }
        });
    };
    shown(&stage, 2, 4, &json!([])); // the first start asks for the Node before it decides anything
    kube.change(|api| {
        annotate(api, "MAX_ENI", "1");
        annotate(api, "WARM_IP_TARGET", "7");
    });
    shown(&stage, 2, 7, &json!(["MAX_ENI=1"]));
    let name = stage.node.place.net.run(|| fetch("127.0.0.1:61679", "/v1/eni-configs")).unwrap();
    assert!(name.ends_with("\"default\""), "{name}");
    stage.kill();
    kube.tune(|knobs| knobs.black_hole = true);
    stage.start();
    stage.wait_ready();
    shown(&stage, 1, 7, &json!([]));
    kube.tune(|knobs| knobs.black_hole = false); // whoever waits there may go
    stage.stop();
}
