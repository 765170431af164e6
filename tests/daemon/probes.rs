//! The health probe while the daemon has next to no processor and a crowd of plugins asks for addresses.
//!
//! `ENIBOX_PROBES=1000 cargo test --test daemon probes -- --nocapture` asks as often as `SPECIFICATION.md` promises;
//! `ENIBOX_TEST_PROGRAM` names another executable, the static release one for instance.

use crate::stage::{PROGRAM, Stage};
use enibox::clock;
use enibox::model::wire::{AddNetworkReply, AddNetworkRequest};
use enibox::rpc::grpc::Client;
use enibox::rpc::proto::path;
use enibox::sys;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Of one processor, for the daemon with all its threads.
const PERCENT: u64 = 2;
const PERIOD: Duration = Duration::from_millis(100);
/// Plugins at one time. Each asks once a second, and then waits no longer for the answer: in place of one that does, there
/// is another.
const PLUGINS: usize = 200;
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
const ADD_LIMIT: Duration = Duration::from_secs(1);
const SETUP_LIMIT: Duration = Duration::from_secs(30);
/// Probes without the variable, and how many run at one time.
const PROBES: usize = 150;
const PROBERS: usize = 24;
/// Addresses of an `m5.large` for pods: three ENIs with ten each, of which the first is its own.
const ADDRESSES: usize = 27;

fn program() -> PathBuf {
    std::env::var_os("ENIBOX_TEST_PROGRAM").map_or_else(|| PROGRAM.into(), PathBuf::from)
}

/// Keeps a process to a share of one processor until dropped: by a control group where the kernel has the controller, else
/// by stopping and continuing it in turn.
enum Limit {
    Group(PathBuf),
    Turns(std::sync::Arc<AtomicBool>, Option<std::thread::JoinHandle<()>>, u32),
}

impl Limit {
    fn set(process: u32) -> Limit {
        Limit::group(process).unwrap_or_else(|why| {
            println!("no control group ({why}): the daemon is stopped and continued in turn");
            let over = std::sync::Arc::new(AtomicBool::new(false));
            let theirs = over.clone();
            let turns = move || {
                let on = PERIOD * u32::try_from(PERCENT).unwrap() / 100;
                while !theirs.load(Ordering::Relaxed) {
                    sys::signal(process, libc::SIGCONT).ok(); // it ends with the test
                    std::thread::sleep(on);
                    sys::signal(process, libc::SIGSTOP).ok();
                    std::thread::sleep(PERIOD.saturating_sub(on));
                }
            };
            Limit::Turns(over, Some(std::thread::spawn(turns)), process)
        })
    }

    /// Version 1 where its controller is mounted, else version 2.
    fn group(process: u32) -> Result<Limit, String> {
        let mounts = fs::read_to_string("/proc/self/mounts").map_err(|error| error.to_string())?;
        let mount = |kind: &str, option: &str| {
            let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
            let found = fields.filter(|line| line.len() > 3 && line[2] == kind);
            let fits = |line: &Vec<&str>| option.is_empty() || line[3].split(',').any(|word| word == option);
            found.into_iter().find(fits).map(|line| PathBuf::from(line[1]))
        };
        let (root, first) = match (mount("cgroup", "cpu"), mount("cgroup2", "")) {
            (Some(root), _) => (root, true),
            (None, Some(root)) => (root, false),
            (None, None) => return Err("none is mounted".into()),
        };
        let folder = root.join(format!("enibox-test-{}", std::process::id()));
        let (period, quota) = (PERIOD.as_micros(), PERIOD.as_micros() * u128::from(PERCENT) / 100);
        let put = |file: &str, text: String| {
            fs::write(folder.join(file), text).map_err(|error| format!("write {file} of {}: {error}", folder.display()))
        };
        if !first {
            fs::write(root.join("cgroup.subtree_control"), "+cpu")
                .map_err(|error| format!("cpu controller: {error}"))?;
        }
        fs::create_dir(&folder).map_err(|error| format!("make {}: {error}", folder.display()))?;
        let limit = Limit::Group(folder.clone());
        if first {
            put("cpu.cfs_period_us", period.to_string())?;
            put("cpu.cfs_quota_us", quota.to_string())?;
        } else {
            put("cpu.max", format!("{quota} {period}"))?;
        }
        put("cgroup.procs", process.to_string())?;
        println!("limited by control groups of version {}", if first { 1 } else { 2 });
        Ok(limit)
    }

    /// In words, from the kernel.
    fn told(&self) -> String {
        match self {
            Limit::Group(folder) => {
                let text = fs::read_to_string(folder.join("cpu.stat")).unwrap_or_default();
                text.lines().filter(|line| line.starts_with("nr_")).collect::<Vec<_>>().join(", ")
            }
            Limit::Turns(..) => String::new(),
        }
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        match self {
            Limit::Group(folder) => {
                let parent = folder.parent().unwrap().join("cgroup.procs");
                for process in fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default().lines() {
                    fs::write(&parent, process).ok(); // it may have ended
                }
                fs::remove_dir(&*folder).ok();
            }
            Limit::Turns(over, thread, process) => {
                over.store(true, Ordering::Relaxed);
                if let Some(thread) = thread.take() {
                    thread.join().unwrap();
                }
                sys::signal(*process, libc::SIGCONT).ok();
            }
        }
    }
}

fn add(socket: &Path, number: u64, limit: Duration) -> Result<AddNetworkReply, enibox::rpc::grpc::Status> {
    let request = AddNetworkRequest {
        pod_name: format!("web-{number}"),
        pod_namespace: "default".into(),
        netns: format!("/run/netns/cni-{number}"),
        if_name: "eth0".into(),
        network_name: "aws-cni".into(),
        container_id: format!("{number:064x}"),
        client_version: enibox::VERSION.into(),
        ..AddNetworkRequest::default()
    };
    Client::connect(socket, CONNECT_LIMIT)?.call(path::ADD_NETWORK, &request, limit)
}

/// Processor time of a process, in seconds.
fn processor_time(process: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<f64> =
        stat.rsplit(')').next().unwrap().split_whitespace().map(|field| field.parse().unwrap_or(0.0)).collect();
    (fields[11] + fields[12]) / 100.0
}

/// What the plugins had.
#[derive(Default)]
struct Tally {
    asked: AtomicU64,
    given: AtomicU64,
    none: AtomicU64,
    failed: AtomicU64,
}

/// Half of the plugins ask again for what they have, half for addresses that are not there, which they wait for.
fn crowd(socket: &Path, number: usize, over: &AtomicBool, tally: &Tally) {
    let mut fresh = u64::try_from(number + 1).unwrap() * 1_000_000;
    std::thread::sleep(Duration::from_millis(5 * u64::try_from(number).unwrap()));
    let mut next = clock::instant();
    while !over.load(Ordering::Relaxed) {
        tally.asked.fetch_add(1, Ordering::Relaxed);
        fresh += 1;
        let key = if number.is_multiple_of(2) { u64::try_from(number % ADDRESSES).unwrap() } else { fresh };
        let outcome = match add(socket, key, ADD_LIMIT) {
            Ok(reply) if reply.success => &tally.given,
            Ok(_) => &tally.none,
            Err(_) => &tally.failed,
        };
        outcome.fetch_add(1, Ordering::Relaxed);
        next = (next + Duration::from_secs(1)).max(clock::instant());
        std::thread::sleep(next.saturating_duration_since(clock::instant()));
    }
}

/// As the manifest has it. How long it took, or what it said.
fn probe(program: &Path, addr: &str) -> Result<Duration, String> {
    let before = clock::instant();
    let mut command = Command::new(program);
    command.arg0("/app/grpc-health-probe").args([addr, "-connect-timeout=5s", "-rpc-timeout=5s"]).env_clear();
    let output = command.stdin(Stdio::null()).output().unwrap();
    match output.status.code() {
        Some(0) => Ok(before.elapsed()),
        code => Err(format!("{code:?}: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

#[test]
fn probes_are_answered_under_load() {
    let count = std::env::var("ENIBOX_PROBES").ok().map_or(PROBES, |text| text.parse().unwrap());
    let program = program();
    let stage = Stage::new("m5.large", 93, &[("AWS_VPC_K8S_CNI_LOGLEVEL", "INFO")]);
    stage.start_program(&program);
    stage.wait_ready();
    let pid = stage.pid();
    let socket = PathBuf::from(format!("/proc/{pid}/root/run/aws-node/ipamd.sock"));
    let end = clock::instant() + Duration::from_mins(1);
    for key in 0..ADDRESSES {
        while !add(&socket, u64::try_from(key).unwrap(), SETUP_LIMIT).is_ok_and(|reply| reply.success) {
            assert!(clock::instant() < end, "pod {key} has no address\n{}", stage.log());
        }
    }
    let (limit, tally, over) = (Limit::set(pid), Tally::default(), AtomicBool::new(false));
    let (before, used) = (clock::instant(), processor_time(pid));
    let addr = format!("-addr=unix://{}", socket.display());
    let mut results = std::thread::scope(|scope| {
        for number in 0..PLUGINS {
            let (socket, over, tally) = (&socket, &over, &tally);
            let work = move || crowd(socket, number, over, tally);
            std::thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, work).unwrap();
        }
        std::thread::sleep(Duration::from_secs(3)); // so that all of them wait
        let probers: Vec<_> = (0..PROBERS)
            .map(|number| {
                let (program, addr) = (&program, &addr);
                let share = count / PROBERS + usize::from(number < count % PROBERS);
                scope.spawn(move || (0..share).map(|_| probe(program, addr)).collect::<Vec<_>>())
            })
            .collect();
        let results: Vec<_> = probers.into_iter().flat_map(|prober| prober.join().unwrap()).collect();
        over.store(true, Ordering::Relaxed);
        results
    });
    let (took, used) = (before.elapsed(), processor_time(pid) - used);
    let counted = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "{:.0} s, the daemon had {:.1} % of a processor ({}); {} ADDs a second: {} with an address, {} without, {} not answered",
        took.as_secs_f64(),
        100.0 * used / took.as_secs_f64(),
        limit.told(),
        counted(&tally.asked) / took.as_secs().max(1),
        counted(&tally.given),
        counted(&tally.none),
        counted(&tally.failed),
    );
    drop(limit);
    let failed: Vec<_> = results.iter().filter_map(|result| result.as_ref().err()).take(3).collect();
    assert!(
        failed.is_empty(),
        "{} of {count} probes failed: {failed:?}",
        results.iter().filter(|r| r.is_err()).count()
    );
    let mut times: Vec<Duration> = results.drain(..).flatten().collect();
    times.sort();
    println!(
        "{count} probes: median {:?}, p99 {:?}, longest {:?}",
        times[times.len() / 2],
        times[times.len() * 99 / 100],
        times.last().unwrap()
    );
    assert!(used < took.as_secs_f64() * 0.05, "the limit does not hold: {used} s of {took:?}");
    stage.stop();
}
