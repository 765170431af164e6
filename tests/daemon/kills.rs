//! `kill -9` of the daemon at random moments, while pods come and go.

use crate::stage::{Stage, Subject, eventually, seeded};
use crate::talk::Talk;
use enibox::clock;
use enibox::plan::backoff::Random;
use enibox::sandbox::probe::Proto;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

const KILLS: u32 = 20;
/// Pods that are there from the start, with connections that must not break.
const OLD: usize = 6;
/// Pods that are being added.
const NEW: usize = 20;
/// A daemon lives so long at most; shorter than it takes to start, at times.
const LIFE_MAX_MS: u64 = 600;
/// How long EC2's answers take, and how far IMDS lags behind.
const EC2_DELAY: Duration = Duration::from_millis(40);
const IMDS_LAG: Duration = Duration::from_millis(150);
/// A new pod lives so long at most while daemons are killed.
const POD_LIFE_MAX_MS: u64 = 1500;
/// Default of IP_COOLDOWN_PERIOD.
const COOLDOWN: Duration = Duration::from_secs(30);
/// Between a failed ADD and the next, in milliseconds; the kubelet takes longer.
const AGAIN_MS: u64 = 30;

/// What the runtime knows: who lives, who was deleted and when, and how often what happened.
#[derive(Default)]
struct Ledger {
    living: Mutex<BTreeMap<Ipv4Addr, String>>,
    deleted: Mutex<BTreeMap<Ipv4Addr, Instant>>,
    // Receivers listen on one port, so one probe at a time.
    probing: Mutex<()>,
    over: AtomicBool,
    added: AtomicU64,
    failed: AtomicU64,
    dels: AtomicU64,
}

impl Ledger {
    fn born(&self, name: &str, address: Ipv4Addr) {
        self.added.fetch_add(1, Ordering::Relaxed);
        if let Some(other) = self.living.lock().unwrap().insert(address, name.to_owned()) {
            panic!("{address} of {name} is that of {other}, which lives");
        }
        if let Some(at) = self.deleted.lock().unwrap().get(&address) {
            assert!(at.elapsed() >= COOLDOWN, "{address} is given out again {:?} after its DEL", at.elapsed());
        }
    }

    fn dying(&self, address: Ipv4Addr) {
        self.dels.fetch_add(1, Ordering::Relaxed);
        self.living.lock().unwrap().remove(&address);
        self.deleted.lock().unwrap().insert(address, clock::instant());
    }
}

// One pod after the other under one name, until the killing is over; the last one stays.
fn live(stage: &Stage, ledger: &Ledger, name: &str, random: &mut Random) -> Subject {
    let pause = |random: &mut Random, limit| std::thread::sleep(Duration::from_millis(random.below(limit)));
    loop {
        let mut subject = stage.subject(name);
        match stage.try_add(&mut subject) {
            Ok(address) => {
                ledger.born(name, address);
                {
                    let _alone = ledger.probing.lock().unwrap();
                    stage.probe_with(&subject, Proto::Udp);
                }
                if !ledger.over.load(Ordering::Relaxed) {
                    pause(random, POD_LIFE_MAX_MS);
                }
                if ledger.over.load(Ordering::Relaxed) {
                    return subject;
                }
                ledger.dying(address);
            }
            Err(refused) => {
                assert_eq!(refused.0, crate::stage::TRY_AGAIN, "{refused:?}");
                ledger.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
        stage.delete(subject);
        pause(random, AGAIN_MS);
    }
}

fn probe_all_the_time(stage: &Stage, ledger: &Ledger, old: &[Subject]) -> u64 {
    let mut probes = 0;
    while !ledger.over.load(Ordering::Relaxed) {
        for subject in old {
            let _alone = ledger.probing.lock().unwrap();
            stage.probe(subject);
            probes += 1;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    probes
}

// The pool, EC2 and the host agree on who lives.
fn agree(stage: &Stage, living: &[&Subject]) {
    let wanted: BTreeMap<String, Ipv4Addr> = living.iter().map(|s| (s.container.clone(), s.address())).collect();
    eventually(Duration::from_secs(20), "the checkpoint holds the living pods", || {
        let held = stage.allocations();
        let spooled = stage.spooled();
        if held == wanted && spooled.is_empty() { Ok(()) } else { Err((held, wanted.clone(), spooled)) }
    });
    for (container, address) in &wanted {
        let owner = stage.world.cloud.vpc().owner(*address);
        assert_eq!(owner.as_ref(), Some(&stage.world.nodes[0].instance), "{container} has {address}");
    }
    eventually(Duration::from_mins(1), "no ENI is on its way or leaked", || {
        let own = stage.checkpoint().enibox.unwrap();
        let (attached, stray) = stage.enis();
        let known: BTreeSet<_> = own.enis.keys().cloned().collect();
        let wired: BTreeSet<_> = attached.keys().cloned().collect();
        let quiet = own.creating.is_empty() && own.freeing.is_empty() && stray.is_empty();
        if quiet && known == wired { Ok(()) } else { Err(format!("{own:?} {attached:?} {stray:?}")) }
    });
}

// A fresh daemon that takes everything in says how much it has: as much as EC2.
fn pool_is_that_of_ec2(stage: &Stage, used: usize) {
    stage.stop();
    stage.start();
    stage.wait_ready();
    let (attached, _) = stage.enis();
    let total: usize = attached.values().map(BTreeSet::len).sum();
    let want = format!("ready: {} ENIs, {total} addresses, {used} in use, 0 of unseen CIDRs", attached.len());
    let log = stage.log();
    let said = log.lines().rfind(|line| line.contains("ready: ")).unwrap();
    assert!(said.contains(&want), "{said}\nwant {want}");
}

#[test]
fn no_pod_suffers_from_twenty_kills() {
    let begin = clock::instant();
    let mut random = seeded();
    let stage = Stage::ready("m5.4xlarge", 5, &[]);
    // So that kills come in the middle of calls, and between EC2 and IMDS.
    stage.slow_down(EC2_DELAY, IMDS_LAG);
    let old: Vec<Subject> = (0..OLD).map(|number| stage.add(&format!("old-{number}"))).collect();
    let ledger = Ledger::default();
    for subject in &old {
        ledger.born(&subject.name, subject.address());
    }
    let talk = Talk::start(&stage, &old);
    let (new, probes) = kill_while_pods_come_and_go(&stage, &ledger, &old, &talk, &mut random);
    let said = talk.finish();
    let all: Vec<&Subject> = old.iter().chain(&new).collect();
    agree(&stage, &all);
    stage.probe_all(all.iter().copied());

    // Half of them go.
    let (gone, stay): (Vec<_>, Vec<_>) = old.into_iter().chain(new).enumerate().partition(|(n, _)| n % 2 == 0);
    let deleted: Vec<Ipv4Addr> = gone.iter().map(|(_, subject)| subject.address()).collect();
    for (_, subject) in gone {
        stage.delete(subject);
    }
    let stay: Vec<&Subject> = stay.iter().map(|(_, subject)| subject).collect();
    agree(&stage, &stay);
    let earlier: Vec<Ipv4Addr> = ledger.deleted.lock().unwrap().keys().copied().collect();
    let living: BTreeSet<Ipv4Addr> = stay.iter().map(|subject| subject.address()).collect();
    let dead = deleted.into_iter().chain(earlier).filter(|address| !living.contains(address));
    stage.assert_clean(&dead.collect::<Vec<_>>(), &stay);
    pool_is_that_of_ec2(&stage, stay.len());
    stage.probe_all(stay.iter().copied());
    stage.assert_no_complaints();
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "{KILLS} kills, {} pods added, {} ADDs failed, {} deleted while it went on, {probes} probes, {said:?}, {:?}, {:?}",
        count(&ledger.added),
        count(&ledger.failed),
        count(&ledger.dels),
        stage.calls(),
        begin.elapsed()
    );
    assert_eq!(said.connections, 4 * OLD);
    assert!(count(&ledger.added) >= (OLD + NEW) as u64 && count(&ledger.failed) > 0);
}

fn kill_while_pods_come_and_go(
    stage: &Stage,
    ledger: &Ledger,
    old: &[Subject],
    talk: &Talk,
    random: &mut Random,
) -> (Vec<Subject>, u64) {
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..NEW)
            .map(|number| {
                let mut random = Random::new(random.bits());
                scope.spawn(move || live(stage, ledger, &format!("new-{number}"), &mut random))
            })
            .collect();
        let prober = scope.spawn(|| probe_all_the_time(stage, ledger, old));
        for _ in 0..KILLS {
            std::thread::sleep(Duration::from_millis(random.below(LIFE_MAX_MS)));
            stage.kill();
            stage.start();
            let failed = talk.broken() || prober.is_finished() || workers.iter().any(ScopedJoinHandle::is_finished);
            if failed {
                break;
            }
        }
        stage.wait_ready();
        ledger.over.store(true, Ordering::Relaxed);
        // A panic of one of them is the test's.
        let new = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
        (new, prober.join().unwrap())
    })
}
