//! Both images, built and run by a real Docker engine: what is in them, and a node that they bring from nothing to serving
//! pods. They come from the executable that `packaging/image/build` has made; `tests/image/run` does both. The engine's host is a
//! node of the sandbox, and EC2, IMDS and the API server are the sandbox's.

#![cfg(feature = "sandbox")]

mod chain;
#[path = "../support/defaults.rs"]
mod defaults;
mod engine;

use chain::Chain;
use defaults::ENV;
use engine::{Engine, eventually};
use enibox::clock;
use enibox::sandbox::probe::{Flow, PORT, Proto};
use enibox::sandbox::topology::{EC2, IMDS, KUBE, Pod};
use enibox::sandbox::world::HOSTS;
use serde_json::{Value, json};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The image of either container without reference plugins, as SPECIFICATION.md promises it.
const IMAGE_BYTES_MAX: u64 = 6_000_000;
/// The DaemonSet allows twice as much.
const STOP_MAX: Duration = Duration::from_secs(5);
const PROBE: &str =
    "/app/grpc-health-probe -addr=unix:///var/run/aws-node/ipamd.sock -connect-timeout=5s -rpc-timeout=5s";
const CREATED: &str = "2026-11-21T00:00:00Z";

/// Where `packaging/image/build` has left the file trees.
fn trees() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::env::var_os("ENIBOX_IMAGE_TREES").map_or_else(|| root.join("target/image"), PathBuf::from)
}

/// Builds a target from these trees; its name.
fn build(engine: &Engine, target: &str, trees: &Path) -> String {
    let name = format!("enibox.test/{target}:1");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("Dockerfile");
    let args = ["TREES=given", "VERSION=1.2.3", "REVISION=0abc", &format!("CREATED={CREATED}")];
    let args = args.map(|arg| format!("--build-arg {arg}")).join(" ");
    engine.must(&format!("build --target {target} {args} -t {name} -f {} {} 2>&1", file.display(), trees.display()));
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
    let image = build(engine, target, &trees());
    let found = files(engine, &image);
    assert_eq!(found, content, "{target}:\n{}", found.join("\n"));
    let told: Value = serde_json::from_str(&engine.must(&format!("image inspect {image}"))).unwrap();
    let config = &told[0]["Config"];
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&config[name], value, "{name} of {target}");
    }
    let labels = ["version", "revision", "created", "licenses"]
        .map(|name| config["Labels"][format!("org.opencontainers.image.{name}")].as_str().unwrap_or_default());
    assert_eq!(labels, ["1.2.3", "0abc", CREATED, "Apache-2.0"], "{target}");
    let size = told[0]["Size"].as_u64().unwrap();
    eprintln!("image {target}: {size} bytes, at most {IMAGE_BYTES_MAX}");
    assert!(size <= IMAGE_BYTES_MAX, "{target}: {size}");
}

/// What the original's images have, and a path for `kubectl exec`.
fn config(folder: &str, entrypoint: &str) -> Value {
    let path = format!("PATH={folder}");
    json!({"Entrypoint": [entrypoint], "Cmd": null, "WorkingDir": folder, "Env": [path], "User": ""})
}

#[test]
#[ignore = "needs a Docker engine and a static executable: run tests/image/run"]
fn they_hold_one_program_and_nothing_else() {
    let engine = Engine::start(1);
    let node = [
        "-rw-r--r-- 0/0 app/10-aws.conflist",
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
    check_image(&engine, "node", &node, &config("/app", "/app/aws-vpc-cni"));
    let init = [
        "-rw-r--r-- 0/0 etc/nsswitch.conf",
        "-rwxr-xr-x 0/0 init/aws-cni-support.sh",
        "-rwxr-xr-x 0/0 init/aws-vpc-cni-init",
        "drwxr-xr-x 0/0 etc",
        "drwxr-xr-x 0/0 init",
        "drwxrwxrwt 0/0 tmp",
    ];
    check_image(&engine, "init", &init, &config("/init", "/init/aws-vpc-cni-init"));
    // As `kubectl exec` finds it.
    let version = engine.must("run --rm --network none --entrypoint enibox enibox.test/node:1 version");
    assert_eq!(version, format!("enibox {}\n", enibox::VERSION));
}

#[test]
#[ignore = "needs a Docker engine and a static executable: run tests/image/run"]
fn the_stages_that_build_in_docker_keep_links_and_take_plugins() {
    let engine = Engine::start(3);
    let folder = engine.on_host("stages");
    fs::create_dir(&folder).unwrap();
    let at = folder.display();
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    engine.run(&format!("{} \"$(command -v busybox)\" {at}", source.join("tests/image/stages").display())).unwrap();
    for image in ["rust", "plugins"] {
        engine.must(&format!("import {at}/{image}.tar enibox.test/{image}:1"));
    }
    let check = |target: &str, more: &str, content: &[&str]| {
        engine.must(&format!(
            "build --network none --target {target} --build-arg RUST=enibox.test/rust:1 {more} -t enibox.test/{target}:2 \
             -f {} {at}/context 2>&1",
            source.join("Dockerfile").display()
        ));
        assert_eq!(files(&engine, &format!("enibox.test/{target}:2")), content, "{target} {more}");
    };
    let plain = |name: &str| {
        [
            format!("-rw-r--r-- 0/0 {name}/one"),
            format!("drwxr-xr-x 0/0 {name}"),
            format!("hrw-r--r-- 0/0 {name}/two link to {name}/one"),
        ]
    };
    check("node", "", &plain("app").each_ref().map(String::as_str));
    let init = plain("init");
    let mut init = init.each_ref().map(String::as_str).to_vec();
    check("init", "", &init);
    init.insert(1, "-rwxr-xr-x 0/0 init/portmap");
    check("init", "--build-arg PLUGINS=enibox.test/plugins:1 --build-arg PLUGINS_FOLDER=/opt/cni/bin", &init);
}

/// Environment of the main container as the chart has it, apart from endpoints, from the paths that a node's host would have,
/// and from the network policy agent, which is not there.
fn environment(engine: &Engine) -> String {
    let plugin_log = engine.on_host("log").join("plugin.log").display().to_string();
    let (imds, ec2, kube) = (format!("http://{IMDS}"), format!("http://{EC2}"), format!("http://{KUBE}"));
    let other = ["AWS_VPC_K8S_PLUGIN_LOG_FILE", "NETWORK_POLICY_ENFORCING_MODE"];
    let own = [
        ("AWS_VPC_K8S_PLUGIN_LOG_FILE", plugin_log.as_str()),
        ("MY_NODE_NAME", "node-1"),
        ("MY_POD_NAME", "aws-node-x"),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", &imds),
        ("AWS_EC2_ENDPOINT", &ec2),
        ("CLUSTER_ENDPOINT", &kube),
    ];
    let variables = ENV.iter().copied().filter(|(name, _)| !other.contains(name)).chain(own);
    variables.map(|(name, value)| format!("-e '{name}={value}'")).collect::<Vec<_>>().join(" ")
}

/// `privileged: true`, or on a machine that has not every capability itself what of it the init container is there for.
fn privileged() -> &'static str {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let last: u32 = fs::read_to_string("/proc/sys/kernel/cap_last_cap").unwrap().trim().parse().unwrap();
    let bounds = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).unwrap();
    if u64::from_str_radix(bounds.trim(), 16).unwrap() == (1 << (last + 1)) - 1 {
        "--privileged"
    } else {
        "--cap-add NET_ADMIN --cap-add SYS_ADMIN --security-opt seccomp=unconfined --security-opt systempaths=unconfined"
    }
}

/// Files of a folder with their modes.
fn listed(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    let line = |entry: fs::DirEntry| {
        let meta = entry.metadata().unwrap();
        assert!(meta.is_file(), "{}", entry.path().display());
        format!("{:o} {}", meta.permissions().mode() & 0o7777, entry.file_name().display())
    };
    let mut lines = entries.map(line).collect::<Vec<_>>();
    lines.sort();
    lines
}

/// What the init container is to have done: the helper plugins, and the node's settings.
fn check_init(engine: &Engine) {
    let image = build(engine, "init", &trees().join("with-plugins"));
    // As an operating system may have left them.
    let before = [("net/ipv4/conf/eth0/rp_filter", "1"), ("net/ipv4/tcp_early_demux", "0")];
    engine.node.place.sysctls(&before).unwrap();
    let said = engine.must(&format!(
        "run --rm --name aws-vpc-cni-init --network host {} -v {}:/host/opt/cni/bin -e DISABLE_TCP_EARLY_DEMUX=false \
         -e ENABLE_IPv6=false -e AWS_EC2_METADATA_SERVICE_ENDPOINT=http://{IMDS} {image} 2>&1",
        privileged(),
        engine.on_host("opt/cni/bin").display()
    ));
    assert!(said.contains("CNI init container done"), "{said}");
    let wanted =
        ["755 aws-cni-support.sh", "755 bandwidth", "755 host-local", "755 loopback", "755 portmap", "755 tuning"];
    let found = listed(&engine.on_host("opt/cni/bin"));
    assert!(wanted.iter().all(|wanted| found.contains(&(*wanted).to_owned())), "{found:?}");
    assert!(!found.iter().any(|line| line.ends_with("aws-vpc-cni-init")), "{found:?}");
    let values = before.map(|(key, _)| engine.run(&format!("cat /proc/sys/{key}")).unwrap().trim().to_owned());
    assert_eq!(values, ["2", "1"]);
}

/// Starts the main container and waits until it serves; the time from its start to the CNI configuration.
fn start_node(engine: &Engine) -> Duration {
    let image = build(engine, "node", &trees());
    let host = |path: &str| engine.on_host(path).display().to_string();
    let mounts = [
        format!("{}:/host/opt/cni/bin", host("opt/cni/bin")),
        format!("{}:/host/etc/cni/net.d", host("etc/cni/net.d")),
        format!("{}:/host/var/log/aws-routed-eni", host("log")),
        "/var/run/aws-node:/var/run/aws-node".to_owned(),
    ];
    let mounts = mounts.map(|mount| format!("-v {mount}")).join(" ");
    let environment = environment(engine);
    let start = clock::instant();
    engine.must(&format!(
        "run -d --name aws-node --network host --cap-add NET_ADMIN --cap-add NET_RAW {mounts} {environment} {image}"
    ));
    let list = engine.on_host("etc/cni/net.d/10-aws.conflist");
    eventually("the CNI configuration is there", || {
        let ended = engine.docker("inspect -f '{{.State.Status}}' aws-node")?;
        assert_eq!(ended.trim(), "running");
        if list.exists() { Ok(()) } else { Err(engine.must("logs aws-node 2>&1")) }
    });
    start.elapsed()
}

/// The pod's flows, to it and from it, and to its mapped port.
fn check_flows(engine: &Engine, pod: &Pod, own: Ipv4Addr) {
    let far = HOSTS.iter().find(|host| host.name == "vpc-host").unwrap();
    let (outside, inside) = (engine.world.namespace(far.name).unwrap(), pod.place.handle().unwrap());
    let there = SocketAddr::from((far.address, PORT));
    let here = SocketAddr::from((own, PORT));
    let mapped = SocketAddr::from((engine.world.nodes[0].address, chain::HOST_PORT));
    let flows = [
        (own, Flow { client: &inside, source: None, target: there, server: &outside, listen: there }),
        (far.address, Flow { client: &outside, source: None, target: here, server: &inside, listen: here }),
        (far.address, Flow { client: &outside, source: None, target: mapped, server: &inside, listen: here }),
    ];
    for (source, flow) in flows {
        let seen = flow.run(Proto::Tcp, Duration::from_secs(10)).unwrap_or_else(|error| panic!("{flow:?}: {error}"));
        assert_eq!(seen.ip(), source, "{flow:?}");
    }
}

#[test]
#[ignore = "needs a Docker engine and a static executable: run tests/image/run"]
fn they_bring_a_node_from_nothing_to_serving_pods() {
    let engine = Engine::start(2);
    check_init(&engine);
    let took = start_node(&engine);
    eprintln!("docker run of the main container to the CNI configuration: {took:?}");

    let bin = engine.on_host("opt/cni/bin");
    let [plugin, egress] = ["aws-cni", "egress-cni"].map(|name| fs::metadata(bin.join(name)).unwrap());
    assert_eq!((plugin.ino(), plugin.mode() & 0o7777), (egress.ino(), 0o755), "one file with two names");
    assert_eq!(listed(&engine.on_host("etc/cni/net.d")), ["644 10-aws.conflist"]);
    let socket = engine.run("stat -c '%a %F' /var/run/aws-node/ipamd.sock").unwrap();
    assert_eq!(socket.trim(), "600 socket");
    let log = fs::read_to_string(engine.on_host("log/ipamd.log")).unwrap();
    assert!(log.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{log}");
    let probed = engine.must(&format!("exec aws-node {PROBE} 2>&1"));
    assert!(probed.contains("status: SERVING"), "{probed}");
    assert!(engine.must("exec aws-node enibox status").contains("eni"), "as kubectl exec calls it");

    let chain = Chain::of(&engine);
    let pod = engine.node.create_pod("cni-sample").unwrap();
    let result = chain.add(&pod, "sample");
    let own = chain::address(&result);
    check_flows(&engine, &pod, own);

    let start = clock::instant();
    engine.must("stop -t 10 aws-node");
    let took = start.elapsed();
    let code = engine.must("inspect -f '{{.State.ExitCode}}' aws-node");
    eprintln!("docker stop: {took:?}");
    assert!(code.trim() == "0" && took < STOP_MAX, "exit code {code} after {took:?}");
    check_flows(&engine, &pod, own);

    engine.must("start aws-node");
    eventually("it serves again", || engine.docker(&format!("exec aws-node {PROBE} 2>&1")));
    check_flows(&engine, &pod, own);
    chain.delete(&pod, "sample", &result);
    engine.node.delete_pod(pod).unwrap();
    assert_eq!(engine.node.place.traces("no such link", &[own]).unwrap(), Vec::<String>::new());
    assert_eq!(engine.world.cloud.complaints(), Vec::<String>::new());
}
