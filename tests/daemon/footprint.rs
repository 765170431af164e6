//! What a daemon costs the node when it has many pods, and when nothing happens (`SPECIFICATION.md`).
//!
//! `ENIBOX_TEST_PROGRAM` names another executable to measure, the static release one for instance; its limits hold for that
//! and for `cargo test --release`. A debug build is only held to the wake-ups and calls.

use crate::stage::{PROGRAM, Stage, eventually};
use enibox::clock;
use enibox::model::naming::DAEMON_SOCKET;
use enibox::model::wire::{AddNetworkReply, AddNetworkRequest};
use enibox::rpc::grpc::Client;
use enibox::rpc::proto::path;
use enibox::sandbox::kube::Api;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// `p3dn.24xlarge` has 15 ENIs with 49 addresses for pods each, and 737 pods with the two on the host's network.
const PODS: usize = 735;
const ENIS: usize = 15;
/// Peak and rest of the resident memory, in kB.
const MEMORY_MAX_KB: u64 = 10_000;
const IDLE: Duration = Duration::from_secs(20);

fn program() -> PathBuf {
    std::env::var_os("ENIBOX_TEST_PROGRAM").map_or_else(|| PROGRAM.into(), PathBuf::from)
}

// Gives this many pods an address, without network namespaces for them.
fn allocate(stage: &Stage, pods: std::ops::Range<usize>) {
    let limit = Duration::from_mins(1);
    let ask = || {
        let mut client = Client::connect(Path::new(DAEMON_SOCKET), limit)?;
        for number in pods {
            let request = AddNetworkRequest {
                pod_name: format!("deployment-6f7d9c5b4d-{number:05}"),
                pod_namespace: "production".into(),
                infra_container_id: String::new(),
                netns: format!("/run/netns/cni-{number:08}-4b1e-4f7a-9d0c-2a5c7f1e8b11"),
                if_name: "eth0".into(),
                network_name: "aws-cni".into(),
                container_id: format!("{number:064x}"),
                client_version: enibox::VERSION.into(),
                requires_multi_nic: false,
            };
            let end = clock::instant() + limit;
            loop {
                let reply: AddNetworkReply = client.call(path::ADD_NETWORK, &request, limit)?;
                if reply.success {
                    break;
                }
                assert!(clock::instant() < end, "pod {number}: {}", reply.failure);
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        Ok(())
    };
    stage.node.inside(ask).unwrap();
}

fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in\n{text}"));
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

// Peak and present size in kB.
fn memory(pid: u32) -> (u64, u64) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    (field(&status, "VmHWM:"), field(&status, "VmRSS:"))
}

// How often each thread has gone to sleep and so been woken up, by its number and with its name.
fn wakeups(pid: u32) -> BTreeMap<String, (String, u64)> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let read = |thread: std::io::Result<fs::DirEntry>| {
        let thread = thread.unwrap();
        let status = fs::read_to_string(thread.path().join("status")).ok()?; // it may have ended just now
        let name = status.lines().next()?.trim_start_matches("Name:").trim().to_owned();
        Some((thread.file_name().into_string().unwrap(), (name, field(&status, "voluntary_ctxt_switches:"))))
    };
    threads.filter_map(read).collect()
}

// Memory, calls and wake-ups of a daemon that has nothing to do.
fn measure(stage: &Stage, what: &str, release: bool) {
    let requests = || (stage.calls(), stage.world.cloud.vpc().journal().failures());
    let last = std::cell::RefCell::new((requests(), clock::instant()));
    eventually(Duration::from_mins(2), "EC2 is left alone for five seconds", || {
        let mut last = last.borrow_mut();
        if requests() != last.0 {
            *last = (requests(), clock::instant());
        }
        if last.1.elapsed() > Duration::from_secs(5) { Ok(()) } else { Err(last.0.clone()) }
    });
    // Waiting for a lock of the kernel that another test's node holds counts as a wake-up too: one of three windows is quiet.
    for attempt in 1..=3 {
        let (calls, before) = (stage.calls(), wakeups(stage.pid()));
        std::thread::sleep(IDLE);
        let after = wakeups(stage.pid());
        assert_eq!(stage.calls(), calls, "{what}: an idle daemon calls EC2");
        // A worker that had nothing to do for long was woken once more, to end.
        let ended = before.keys().filter(|thread| !after.contains_key(*thread)).count() as u64;
        let slept = |thread: &String| before.get(thread).map_or(0, |(_, count)| *count);
        let woken = ended + after.iter().map(|(thread, (_, count))| count - slept(thread)).sum::<u64>();
        println!("{what}: {woken} wake-ups in {IDLE:?}, {} threads", after.len());
        if woken <= IDLE.as_secs() {
            break;
        }
        assert!(attempt < 3, "{what}: {woken} wake-ups in {IDLE:?}: {before:?} {after:?}");
    }
    let (peak, now) = memory(stage.pid());
    println!("{what}: VmHWM {peak} kB, VmRSS {now} kB");
    if release {
        assert!(peak <= MEMORY_MAX_KB, "{what}: {peak} kB");
    }
}

#[test]
fn many_pods_cost_little_and_an_idle_node_nothing() {
    let program = program();
    let release = !cfg!(debug_assertions) || std::env::var_os("ENIBOX_TEST_PROGRAM").is_some();
    let mut stage = Stage::new("p3dn.24xlarge", 91, &[("CLUSTER_ENDPOINT", "http://198.51.100.2")]);
    let mut api = Api::new();
    api.add_node("node-1", 737);
    stage.world.serve_kube(api).unwrap();
    stage.start_program(&program);
    stage.wait_ready();
    allocate(&stage, 0..PODS);
    assert_eq!((stage.allocations().len(), stage.enis().0.len()), (PODS, ENIS));
    measure(&stage, "735 pods and two of the host", release);
    stage.stop();
    stage.start_program(&program);
    stage.wait_ready();
    allocate(&stage, 0..PODS); // the same addresses again
    assert_eq!(stage.allocations().len(), PODS);
    measure(&stage, "the same after a restart", release);
    stage.stop();
    stage.assert_no_complaints();
}
