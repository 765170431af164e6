//! Both images, built and run by a real Docker engine: what is in them, and a node that they bring from nothing to serving
//! pods. They come from the executable that `packaging/image/build` has made; `tests/image/run` does both. The engine's host is a
//! node of the sandbox, and EC2, IMDS and the API server are the sandbox's.

#![cfg(feature = "sandbox")]

mod chain;
mod engine;


use engine::Engine;
use enibox::clock;
use enibox::sandbox::probe::{Flow, PORT, Proto};
use enibox::sandbox::topology::{EC2, IMDS, KUBE, Pod};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The image of either container without reference plugins, as SPECIFICATION.md promises it.
const IMAGE_BYTES_MAX: u64 = 6_000_000;
/// The DaemonSet allows twice as much.
const STOP_MAX: Duration = Duration::from_secs(5);
const PROBE: &str =
    "/app/grpc-health-probe -addr=unix:///var/run/aws-node/ipamd.sock -connect-timeout=5s -rpc-timeout=5s";
const REASON: &str = "2026-11-21T00:00:00Z";

/// Where `packaging/image/build` has left the file trees.
fn trees() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::env::var_os("ENIBOX_IMAGE_TREES").map_or_else(|| root.join("target/image"), PathBuf::from)
}

/// Builds a target from the trees; its name.
fn build(engine: &Engine, target: &str) -> String {
    let name = format!("enibox.test/{target}:1");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("Dockerfile");
    let args = format!("--build-arg TREES=given --build-arg VERSION=1.2.3 --build-arg REVISION=0abc --build-arg CREATED={REASON}");
    engine.must(&format!("build --target {target} {args} -t {name} -f {} {} 2>&1", file.display(), trees().display()));
    name
}

/// All that its layers hold, a line each: mode and links, path.
fn files(engine: &Engine, image: &str) -> Vec<String> {
    let folder = engine.on_host("saved");
    let at = folder.display();
    fs::create_dir(&folder).unwrap();
    engine.must(&format!("save {image} | tar -x -C {at}"));
    let manifest: Value = serde_json::from_slice(&fs::read(folder.join("manifest.json")).unwrap()).unwrap();
    let mut files = Vec::new();
    for layer in manifest[0]["Layers"].as_array().unwrap() {
        let listed = engine.run(&format!("tar -tvf {at}/{} --numeric-owner", layer.as_str().unwrap())).unwrap();
        for line in listed.lines() {
            let mut words = line.split_whitespace();
            let (mode, owner) = (words.next().unwrap(), words.next().unwrap());
            let path = words.skip(3).collect::<Vec<_>>().join(" ");
            let path = path.replace("link to ./", "link to ").trim_start_matches("./").trim_end_matches('/').to_owned();
            if !path.is_empty() {
                files.push(format!("{mode} {owner} {path}"));
            }
        }
    }
    fs::remove_dir_all(folder).unwrap();
    files.sort();
    files.dedup();
    files
}

fn check_image(engine: &Engine, target: &str, content: &[&str], expected: &Value) {
    let image = build(engine, target);
    let found = files(engine, &image);
    assert_eq!(found, content, "{target}:\n{}", found.join("\n"));
    let told: Value = serde_json::from_str(&engine.must(&format!("image inspect {image}"))).unwrap();
    let config = &told[0]["Config"];
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&config[name], value, "{name} of {target}");
    }
    let labels = ["version", "revision", "created", "licenses"]
        .map(|name| config["Labels"][format!("org.opencontainers.image.{name}")].as_str().unwrap_or_default());
    assert_eq!(labels, ["1.2.3", "0abc", REASON, "Apache-2.0"], "{target}");
    let size = told[0]["Size"].as_u64().unwrap();
    eprintln!("image {target}: {size} bytes, at most {IMAGE_BYTES_MAX}");
    assert!(size <= IMAGE_BYTES_MAX, "{target}: {size}");
}

#[test]
#[ignore = "needs a Docker engine and a static executable: run tests/image/run"]
fn they_hold_one_program_and_nothing_else() {
    let engine = Engine::start(1);
    let node = [
        "-rw-r--r-- 0/0 etc/nsswitch.conf",
        "-rw-r--r-- 0/0 etc/ssl/certs/ca-certificates.crt",
        "-rwxr-xr-x 0/0 app/aws-cni",
        "drwxr-xr-x 0/0 app",
        "drwxr-xr-x 0/0 etc",
        "drwxr-xr-x 0/0 etc/ssl",
        "drwxr-xr-x 0/0 etc/ssl/certs",
        "drwxrwxrwt 0/0 tmp",
        "hrwxr-xr-x 0/0 app/aws-k8s-agent link to app/aws-cni",
        "hrwxr-xr-x 0/0 app/aws-vpc-cni link to app/aws-cni",
        "hrwxr-xr-x 0/0 app/egress-cni link to app/aws-cni",
        "hrwxr-xr-x 0/0 app/enibox link to app/aws-cni",
        "hrwxr-xr-x 0/0 app/grpc-health-probe link to app/aws-cni",
    ];
    let config = json!({"Entrypoint": ["/app/aws-vpc-cni"], "Cmd": null, "WorkingDir": "/app", "Env": ["PATH=/app"], "User": ""});
    check_image(&engine, "node", &node, &config);
    let init = [
        "-rw-r--r-- 0/0 etc/nsswitch.conf",
        "-rwxr-xr-x 0/0 init/aws-vpc-cni-init",
        "drwxr-xr-x 0/0 etc",
        "drwxr-xr-x 0/0 init",
        "drwxrwxrwt 0/0 tmp",
    ];
    let config = json!({"Entrypoint": ["/init/aws-vpc-cni-init"], "Cmd": null, "WorkingDir": "/init", "Env": ["PATH=/init"], "User": ""});
    check_image(&engine, "init", &init, &config);
    // As `kubectl exec` finds it.
    let version = engine.must("run --rm --network none --entrypoint enibox enibox.test/node:1 version");
    assert_eq!(version, format!("enibox {}\n", enibox::VERSION));
}
