//! How long the entrypoint `aws-vpc-cni` takes from its start to the CNI configuration, and on what: on a node of the
//! sandbox whose fakes answer at once, first with nothing of ours on it, then as a restart.
//!
//! The phases are told by the process itself: its lines and its daemon's go through one pipe, and each that ends a phase is
//! timed when it arrives. What stands on the node is looked at besides. Run as root: `cargo bench --bench start`.
//! `ENIBOX_BENCH_PROGRAM` names another executable to measure, the static release one for instance.

use enibox::clock;
use enibox::sandbox::topology::{EC2, IMDS, Node};
use enibox::sandbox::world::{Plan, World};
use enibox::sys;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// Starts of each kind.
const ROUNDS: usize = 15;
/// What the promise is.
const PROMISE: Duration = Duration::from_millis(100);
/// What ends a phase, and what is done by then.
const PHASES: &[(&str, &str)] = &[
    ("Validating env variables", "process started"),
    ("Install CNI binaries", "environment checked"),
    ("Starting IPAM daemon", "plugin installed"),
    ("starting as the node's IPAM daemon", "log opened"),
    ("serving on ", "identity, ENIs, first checkpoint, socket"),
    ("Checking for IPAM connectivity", "thread for the rest started"),
    ("Copying config file", "health checked, plugins' versions there"),
    ("Successfully copied", "configuration written"),
];
const PORTMAP: &str = "#!/bin/sh\necho '{\"supportedVersions\":[\"0.4.0\",\"1.0.0\",\"1.1.0\"]}'\n";

fn main() {
    // `cargo bench -- --list` and the like concern the standard harness.
    if std::env::args().any(|word| word == "--list") {
        return;
    }
    assert_eq!(sys::effective_uid(), 0, "the benchmark makes network namespaces: run it as root");
    let home = std::env::temp_dir().join(format!("enibox-start-{}", std::process::id()));
    let (mut fresh, mut again) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let world =
            World::create(&Plan { nodes: 1, instance_type: "m5.large", seed: round as u64, home: &home }).unwrap();
        let (node, folder) = (world.node(0).unwrap(), home.join(format!("host-{round}")));
        for name in ["bin", "net.d"] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        fs::write(folder.join("bin/portmap"), PORTMAP).unwrap();
        fs::set_permissions(folder.join("bin/portmap"), Permissions::from_mode(0o755)).unwrap();
        fresh.push(start(&node, &folder));
        again.push(start(&node, &folder));
        assert!(folder.join("net.d/10-aws.conflist").exists());
        fs::remove_dir_all(&folder).unwrap();
    }
    fs::remove_dir_all(&home).ok(); // the sandbox may have removed it
    report("a fresh node", &fresh);
    report("a restart", &again);
}

/// One start, until the configuration is written; when each phase ended.
fn start(node: &Node, folder: &Path) -> Vec<Duration> {
    let program = std::env::var_os("ENIBOX_BENCH_PROGRAM").unwrap_or_else(|| env!("CARGO_BIN_EXE_enibox").into());
    let mut command = node.command(PathBuf::from(program)).unwrap();
    command.arg0("aws-vpc-cni").env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.env("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{IMDS}"));
    command.env("AWS_EC2_ENDPOINT", format!("http://{EC2}")).env("CLUSTER_NAME", "enibox-sandbox");
    command.env("HOST_CNI_BIN_PATH", folder.join("bin")).env("HOST_CNI_CONFDIR_PATH", folder.join("net.d"));
    command.env("AWS_VPC_K8S_CNI_LOG_FILE", "stderr").env("ENIBOX_SETTINGS_FILE", folder.join("none"));
    let begin = clock::instant();
    let mut child = command.spawn().unwrap();
    let times = listen(&mut child, begin);
    sys::signal(child.id(), libc::SIGTERM).unwrap();
    assert!(child.wait().unwrap().success());
    times
}

fn listen(child: &mut Child, begin: Instant) -> Vec<Duration> {
    let mut times: Vec<Duration> = Vec::new();
    let mut seen = String::new();
    for line in BufReader::new(child.stderr.as_mut().unwrap()).lines() {
        let line = line.unwrap();
        if line.contains(PHASES[times.len()].0) {
            times.push(begin.elapsed());
        }
        if times.len() == PHASES.len() {
            return times;
        }
        seen.push_str(&line);
        seen.push('\n');
    }
    panic!("it ended:\n{seen}");
}

fn report(title: &str, starts: &[Vec<Duration>]) {
    println!("{title}, {} starts: p50 and longest in ms", starts.len());
    let row = |name: &str, mut times: Vec<Duration>| {
        times.sort();
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let (middle, longest) = (times[times.len() / 2], times[times.len() - 1]);
        println!("  {name:<46}{:>9.1}{:>9.1}", ms(middle), ms(longest));
        middle
    };
    for (phase, (_, name)) in PHASES.iter().enumerate() {
        let before = |times: &Vec<Duration>| phase.checked_sub(1).map_or(Duration::ZERO, |before| times[before]);
        row(name, starts.iter().map(|times| times[phase].saturating_sub(before(times))).collect());
    }
    let all = row("all", starts.iter().map(|times| times[PHASES.len() - 1]).collect());
    println!("  the promise of {PROMISE:?} is {}", if all <= PROMISE { "kept" } else { "NOT kept" });
}
