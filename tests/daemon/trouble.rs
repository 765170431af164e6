//! EC2 that is slow, throttles, or has no addresses: an ADD is refused cleanly, and succeeds later.

use crate::stage::{Stage, Subject, TRY_AGAIN, eventually};
use enibox::clock;
use enibox::sim::vpc::Bucket;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

// As a runtime does: a new sandbox for every attempt, DEL after a failed one.
fn add_at_last(stage: &Stage, name: &str, limit: Duration, meanwhile: &dyn Fn(u32)) -> (Subject, u32) {
    let begin = clock::instant();
    let mut refusals = 0;
    loop {
        let mut subject = stage.subject(name);
        let Err((code, text)) = stage.try_add(&mut subject) else { return (subject, refusals) };
        assert_eq!(code, TRY_AGAIN, "{text}");
        assert!(begin.elapsed() < limit, "{name}: no address within {limit:?}: {text}\n{}", stage.log());
        let veth = enibox::model::naming::host_veth("eni", "tests", name, 0).unwrap();
        assert!(!stage.veths().contains(&veth), "a refused ADD leaves nothing");
        stage.delete(subject);
        refusals += 1;
        meanwhile(refusals);
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn fill_primary(stage: &Stage) -> Vec<Subject> {
    (0..9).map(|number| stage.add(&format!("pod-{number}"))).collect()
}

fn check(stage: &Stage, living: &[Subject]) {
    let addresses: BTreeSet<_> = living.iter().map(Subject::address).collect();
    assert_eq!(addresses.len(), living.len());
    stage.probe_all(living.iter());
    stage.assert_clean(&[], &living.iter().collect::<Vec<_>>());
    eventually(Duration::from_secs(10), "the checkpoint holds the living pods", || {
        let held: BTreeSet<_> = stage.allocations().into_values().collect();
        if held == addresses { Ok(()) } else { Err((held, addresses.clone())) }
    });
    stage.assert_no_complaints();
}

#[test]
fn a_link_that_appears_late_is_waited_for() {
    let stage = Stage::new("m5.large", 31, &[]);
    let there = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&there);
    stage.world.pass_wires(move |wire| wire.device == 0 || asked.load(Ordering::Relaxed));
    stage.start();
    stage.wait_ready();
    let mut living = fill_primary(&stage);
    let (pod, refusals) = add_at_last(&stage, "late", Duration::from_secs(90), &|refusals| {
        // EC2 and IMDS have shown the ENI all the time; now the link comes.
        if refusals == 2 {
            there.store(true, Ordering::Relaxed);
            stage.world.cloud.tick();
        }
    });
    assert!(refusals >= 2, "it had an address before there was a link");
    living.push(pod);
    check(&stage, &living);
    assert_eq!(stage.enis().1.len(), 0);
}

#[test]
fn throttled_calls_are_repeated() {
    let stage = Stage::new("m5.large", 32, &[]);
    {
        let mut vpc = stage.world.cloud.vpc();
        for action in enibox::sandbox::serve::ACTIONS {
            // One call, and the next a second later.
            let behaviour = vpc.knobs.action(action);
            behaviour.bucket = Some(Bucket::new(1, 1));
        }
        for action in ["AssignPrivateIpAddresses", "CreateNetworkInterface", "AttachNetworkInterface"] {
            vpc.knobs.refuse_next(action, "RequestLimitExceeded", 503);
            vpc.knobs.refuse_next(action, "RequestLimitExceeded", 503);
        }
    }
    stage.start();
    stage.wait_ready();
    let mut living = Vec::new();
    for number in 0..14 {
        living.push(add_at_last(&stage, &format!("pod-{number}"), Duration::from_secs(90), &|_| ()).0);
    }
    check(&stage, &living);
    assert!(!stage.calls().contains_key("DeleteNetworkInterface"), "no ENI is given back because EC2 is busy");
    println!("{:?}, {} failed", stage.calls(), stage.world.cloud.vpc().journal().failures());
    // Nobody waits for the spare ENI: three actions that were refused twice or more have taught pauses of 64 s on average,
    // 96 s at most, between two attachments (`plan::pace`).
    eventually(Duration::from_mins(3), "no ENI is left lying about", || match stage.enis().1 {
        stray if stray.is_empty() => Ok(()),
        stray => Err(stray),
    });
}

#[test]
fn an_exhausted_subnet_refuses_and_recovers() {
    let stage = Stage::ready("m5.large", 33, &[("IP_COOLDOWN_PERIOD", "2")]);
    let mut living = fill_primary(&stage);
    // The spare ENI gives nine more; then the subnet has nothing.
    eventually(Duration::from_secs(10), "the spare ENI", || {
        let enis = stage.enis().0;
        if enis.len() == 2 { Ok(()) } else { Err(enis) }
    });
    for action in ["CreateNetworkInterface", "AssignPrivateIpAddresses"] {
        for _ in 0..100 {
            let mut vpc = stage.world.cloud.vpc();
            vpc.knobs.refuse_next(action, "InsufficientFreeAddressesInSubnet", 400);
        }
    }
    for number in 9..18 {
        living.push(stage.add(&format!("pod-{number}")));
    }
    let mut refused = stage.subject("refused");
    let begin = clock::instant();
    let (code, text) = stage.try_add(&mut refused).unwrap_err();
    assert_eq!(code, TRY_AGAIN, "{text}");
    println!("refused after {:?}, calls {:?}", begin.elapsed(), stage.calls());
    assert!(begin.elapsed() < Duration::from_secs(5));
    stage.delete(refused);
    assert!(stage.calls()["CreateNetworkInterface"] <= 4, "a full subnet is not asked again and again");
    // A pod goes; its address serves the next one.
    let gone = living.remove(0);
    let was = gone.address();
    stage.delete(gone);
    let (pod, _) = add_at_last(&stage, "next", Duration::from_secs(20), &|_| ());
    assert_eq!(pod.address(), was);
    living.push(pod);
    check(&stage, &living);
}
