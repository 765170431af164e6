//! IMDS that is wrong, late or away, at a restart and while nothing happens: no pod loses its address, nobody gets one that
//! EC2 has not assigned, and nothing is taken back from EC2 on its word.

use crate::stage::{Stage, Subject, TRY_AGAIN, eventually};
use crate::talk::Talk;
use enibox::clock;
use enibox::model::ec2::Call;
use enibox::model::ids::EniId;
use enibox::sim::conditions::Lie;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

/// Calls that take something away from the node. A new ENI that could not be attached may be deleted again.
const DESTRUCTIVE: [&str; 2] = ["DetachNetworkInterface", "UnassignPrivateIpAddresses"];
/// How long the lies of the steady state last: longer than a look at IMDS (a minute after the last action), EC2's word, and
/// its second word half a minute later.
const STEADY: Duration = Duration::from_secs(130);
/// Pods that are there all the time: one ENI of an m5.large and a part of the next.
const PODS: usize = 11;
const FEW: &[(&str, &str)] = &[("IP_COOLDOWN_PERIOD", "1"), ("WARM_IP_TARGET", "2")];
const SETTINGS: &[(&str, &str)] = &[("ENIBOX_ADD_WAIT", "1"), ("IP_COOLDOWN_PERIOD", "1")];

/// A node with pods that talk, and what must not change.
struct Watch<'a> {
    stage: &'a Stage,
    pods: Vec<Subject>,
    talk: Option<Talk>,
    before: BTreeMap<&'static str, u64>,
    // The targets are so small that addresses of pods that went are given back.
    shrinks: bool,
}

impl Watch<'_> {
    fn new(stage: &Stage) -> Watch<'_> {
        let pods: Vec<_> = (0..PODS).map(|number| add_at_last(stage, &format!("pod-{number}"))).collect();
        at_rest(stage);
        // The first is on the primary ENI, the last on another.
        let talk = Talk::start(stage, &pods[PODS - 2..]);
        Watch { stage, pods, talk: Some(talk), before: stage.calls(), shrinks: false }
    }

    // After somebody else has changed something in EC2.
    fn mark(&mut self) {
        self.before = self.stage.calls();
    }

    /// Everybody has what they had, and EC2 has lost nothing.
    #[track_caller]
    fn check(&self, what: &str) {
        let held = self.stage.allocations();
        for pod in &self.pods {
            let owner = self.stage.world.cloud.vpc().owner(pod.address());
            assert_eq!(owner.as_ref(), Some(&self.stage.world.nodes[0].instance), "{what}: {}", pod.address());
            assert_eq!(held.get(&pod.container), Some(&pod.address()), "{what}: {}\n{}", pod.name, self.stage.log());
        }
        let calls = self.stage.calls_since(&self.before);
        // A node whose pods have gone gives back what nobody uses; that no pod lost its address is asserted above.
        let wrong: &[&str] = if self.shrinks { &[] } else { &DESTRUCTIVE };
        let bad: Vec<_> = wrong.iter().filter(|action| calls.contains_key(**action)).collect();
        assert!(bad.is_empty(), "{what}: {bad:?}\n{}", self.stage.log());
        assert!(!self.talk.as_ref().unwrap().broken(), "{what}: a connection broke\n{}", self.stage.log());
        self.stage.probe(&self.pods[0]);
        self.stage.assert_no_complaints();
    }

    /// New pods until there is no address; whatever they get is theirs in EC2 too, and reaches others.
    #[track_caller]
    fn churn(&self, what: &str) {
        let mut new = Vec::new();
        loop {
            let mut subject = self.stage.subject(&format!("new-{}", new.len()));
            let Err((code, text)) = self.stage.try_add(&mut subject) else {
                let address = subject.address();
                let owner = self.stage.world.cloud.vpc().owner(address);
                let ours = Some(&self.stage.world.nodes[0].instance);
                assert_eq!(owner.as_ref(), ours, "{what}: {address} is not assigned\n{}", self.stage.log());
                new.push(subject);
                continue;
            };
            assert_eq!(code, TRY_AGAIN, "{what}: {text}");
            self.stage.delete(subject);
            break;
        }
        if let Some(last) = new.last() {
            self.stage.probe(last);
        }
        for subject in new {
            self.stage.delete(subject);
        }
    }

    fn finish(mut self) {
        if let Some(talk) = self.talk.take() {
            talk.finish();
        }
    }
}

// Few addresses are warm, so that one may have to be waited for.
fn add_at_last(stage: &Stage, name: &str) -> Subject {
    let mut subject = stage.subject(name);
    let end = clock::instant() + Duration::from_secs(30);
    while let Err(refused) = stage.try_add(&mut subject) {
        assert!(refused.0 == TRY_AGAIN && clock::instant() < end, "{refused:?}\n{}", stage.log());
        stage.del(&subject);
    }
    subject
}

fn at_rest(stage: &Stage) {
    let last = std::cell::RefCell::new((stage.calls(), clock::instant()));
    // A growth that nobody waits for may have to wait some seconds for its turn after a burst of calls.
    eventually(Duration::from_mins(1), "EC2 is left alone for eight seconds", || {
        let mut last = last.borrow_mut();
        if stage.calls() != last.0 {
            *last = (stage.calls(), clock::instant());
        }
        if last.1.elapsed() > Duration::from_secs(8) { Ok(()) } else { Err(last.0.clone()) }
    });
}

// What IMDS tells now, to be told from now on.
fn freeze(stage: &Stage) {
    let instance = &stage.world.nodes[0].instance;
    let told = stage.world.cloud.vpc().imds(clock::now(), instance).unwrap().clone();
    stage.world.cloud.lie(Lie::Stale(told));
}

fn execute(stage: &Stage, call: &Call) {
    stage.world.cloud.change(|vpc| vpc.execute(clock::now(), call)).result.unwrap();
}

// Somebody else takes an address away that nobody uses, on the ENI that has most of them.
fn take_a_free_address(stage: &Stage) {
    let used: BTreeSet<Ipv4Addr> = stage.allocations().into_values().collect();
    let free = |(eni, has): (EniId, BTreeSet<Ipv4Addr>)| (eni, has.difference(&used).copied().collect::<Vec<_>>());
    let (eni, addresses) = stage.enis().0.into_iter().map(free).max_by_key(|(_, free)| free.len()).unwrap();
    let address = *addresses.first().expect("some address is free");
    execute(stage, &Call::UnassignAddresses { eni, addresses: vec![address] });
}

// Somebody else detaches the ENI that has no pods.
fn take_a_free_eni(stage: &Stage) {
    let used: BTreeSet<Ipv4Addr> = stage.allocations().into_values().collect();
    let empty = stage.enis().0.into_iter().find(|(_, has)| has.is_disjoint(&used)).expect("an ENI without pods").0;
    let attachment = {
        let vpc = stage.world.cloud.vpc();
        vpc.interface(&empty).unwrap().attachment.clone().unwrap().id
    };
    execute(stage, &Call::Detach(attachment));
    execute(stage, &Call::Delete(empty));
}

#[test]
fn a_restart_survives_what_imds_says() {
    let stage = Stage::ready("m5.large", 81, SETTINGS);
    let mut watch = Watch::new(&stage);
    let restart = |watch: &Watch<'_>, what: &str| {
        stage.kill();
        stage.start();
        stage.wait_ready();
        watch.churn(what);
        watch.check(what);
    };
    for (what, lie) in [("an ENI is left out", Lie::OmitEni(0)), ("addresses are left out", Lie::OmitAddresses)] {
        stage.world.cloud.lie(lie);
        restart(&watch, what);
    }
    // What EC2 has taken away meanwhile is listed all the same: an address, then an ENI.
    stage.world.cloud.lie(Lie::None);
    at_rest(&stage);
    freeze(&stage);
    take_a_free_address(&stage);
    watch.mark();
    restart(&watch, "an address that is gone is listed");
    take_a_free_eni(&stage);
    watch.mark();
    restart(&watch, "an ENI that is gone is listed");

    // With no answer at all the daemon cannot know what node it is on. It ends, the kubelet starts it again, and pods go on.
    for (what, lie) in [("IMDS lists no ENI", Lie::Empty), ("IMDS does not answer", Lie::Down)] {
        stage.world.cloud.lie(lie);
        stage.kill();
        stage.start();
        let mut refused = stage.subject("refused");
        assert_eq!(stage.try_add(&mut refused).unwrap_err().0, TRY_AGAIN, "{what}");
        stage.delete(refused);
        std::thread::sleep(Duration::from_secs(3));
        watch.check(what);
        stage.world.cloud.lie(Lie::None);
        restart(&watch, &format!("after {what}"));
    }
    watch.finish();
}

type Case = (&'static str, &'static [(&'static str, &'static str)], fn(&Stage));

// One node and one lie, for as long as it lasts, with new pods at its beginning and at its end.
fn steady(seed: u64, (what, settings, lie): &Case) {
    let stage = Stage::ready("m5.large", seed, settings);
    let mut watch = Watch::new(&stage);
    lie(&stage);
    watch.mark();
    watch.shrinks = *settings == FEW;
    let begin = clock::instant();
    watch.churn(what);
    while begin.elapsed() < STEADY {
        watch.check(what);
        std::thread::sleep(Duration::from_secs(5));
    }
    watch.churn(what);
    watch.check(what);
    println!("{what}: {:?} while it lasted", stage.calls_since(&watch.before));
    watch.finish();
}

// IMDS goes on listing what the daemon has given back to EC2 by itself.
fn keep_listing_what_was_given_back(stage: &Stage) {
    let more: Vec<_> = (0..6).map(|number| add_at_last(stage, &format!("more-{number}"))).collect();
    at_rest(stage);
    freeze(stage);
    for pod in more {
        stage.delete(pod);
    }
    eventually(Duration::from_mins(2), "surplus addresses are given back", || {
        let calls = stage.calls();
        if calls.contains_key("UnassignPrivateIpAddresses") { Ok(()) } else { Err(calls) }
    });
    at_rest(stage);
}

#[test]
fn the_steady_state_survives_what_imds_says() {
    let cases: [Case; 6] = [
        ("an ENI is left out", SETTINGS, |stage| stage.world.cloud.lie(Lie::OmitEni(0))),
        ("addresses are left out", SETTINGS, |stage| stage.world.cloud.lie(Lie::OmitAddresses)),
        ("no ENI is listed", SETTINGS, |stage| stage.world.cloud.lie(Lie::Empty)),
        ("no answer", SETTINGS, |stage| stage.world.cloud.lie(Lie::Down)),
        ("what was given back is listed", FEW, keep_listing_what_was_given_back),
        // The new pods' addresses are assigned while it lasts, so that IMDS leaves out what pods use.
        ("minutes late", FEW, |stage| stage.world.cloud.vpc().knobs.imds_lag = Duration::from_mins(5)),
    ];
    // Side by side: nearly all the time is waiting.
    std::thread::scope(|scope| {
        let threads: Vec<_> = (82..).zip(&cases).map(|(seed, case)| scope.spawn(move || steady(seed, case))).collect();
        for thread in threads {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
}

#[test]
fn a_new_eni_that_imds_shows_late_is_waited_for() {
    let stage = Stage::ready("m5.large", 90, SETTINGS);
    let pods: Vec<_> = (0..4).map(|number| stage.add(&format!("pod-{number}"))).collect();
    at_rest(&stage);
    let talk = Talk::start(&stage, &pods[..2]);
    let before = stage.calls();
    // Two ENIs are there. The third comes with the tenth pod, and IMDS does not show it for a while.
    stage.world.cloud.vpc().knobs.imds_lag = Duration::from_secs(40);
    let hidden = clock::instant();
    let more: Vec<_> = (4..18).map(|number| stage.add(&format!("pod-{number}"))).collect();
    let mut late = stage.subject("late");
    let (begin, mut refused) = (clock::instant(), 0);
    while let Err((code, text)) = stage.try_add(&mut late) {
        assert_eq!(code, TRY_AGAIN, "{text}");
        assert!(begin.elapsed() < Duration::from_secs(90), "{text}\n{}", stage.log());
        stage.del(&late);
        refused += 1;
        std::thread::sleep(Duration::from_secs(1));
    }
    assert!(refused > 0 && hidden.elapsed() > Duration::from_secs(20), "the ENI was not late");
    stage.probe_all(more.iter().chain([&late]));
    let calls = stage.calls_since(&before);
    assert_eq!((calls.get("CreateNetworkInterface"), stage.enis().1.len()), (Some(&1), 0), "{calls:?}");
    assert!(DESTRUCTIVE.iter().all(|action| !calls.contains_key(action)), "{calls:?}");
    talk.finish();
    stage.assert_no_complaints();
}
