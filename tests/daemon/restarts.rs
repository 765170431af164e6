//! Restarts: what is served while the daemon is away, how soon it is back, and what that costs.

use crate::stage::{CHECKPOINT, PROGRAM, Stage, Subject, TRY_AGAIN, eventually};
use crate::talk::Talk;
use enibox::clock;
use enibox::model::naming::DAEMON_STOPPED;
use enibox::netlink::sysctl;
use enibox::sim::vpc::Planned;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

fn pods(stage: &Stage, prefix: &str, count: usize) -> Vec<Subject> {
    (0..count).map(|number| stage.add(&format!("{prefix}-{number}"))).collect()
}

// Nothing is under way with EC2: the pool is as large as it should be.
fn at_rest(stage: &Stage) {
    let before = std::cell::RefCell::new((stage.calls(), clock::instant()));
    eventually(Duration::from_secs(30), "EC2 is left alone for a second", || {
        let mut last = before.borrow_mut();
        let calls = stage.calls();
        if calls != last.0 {
            *last = (calls, clock::instant());
        }
        if last.1.elapsed() > Duration::from_secs(1) { Ok(()) } else { Err(last.0.clone()) }
    });
}

#[test]
fn without_a_daemon_pods_are_deleted_and_none_is_added() {
    // Long enough for the ADDs that must not get what cools down.
    let stage = Stage::ready("m5.large", 11, &[("IP_COOLDOWN_PERIOD", "30")]);
    let cooldown = Duration::from_secs(30);
    let mut living = pods(&stage, "pod", 4);
    let talk = Talk::start(&stage, &living[1..]);
    stage.kill();

    let gone = living.remove(0);
    let address = gone.address();
    stage.del(&gone);
    let others: Vec<&Subject> = living.iter().collect();
    assert_eq!(stage.spooled().len(), 1);
    stage.del(&gone); // once more, as runtimes do
    assert_eq!(stage.spooled().len(), 1, "one record per pod");
    let container = gone.container.clone();
    stage.bury(gone);
    stage.assert_clean(&[address], &others);

    let mut refused = stage.subject("new");
    let (code, text) = stage.try_add(&mut refused).unwrap_err();
    assert_eq!(code, TRY_AGAIN, "{text}");
    stage.assert_clean(&[address], &others);
    stage.delete(refused);
    assert_eq!(stage.allocations().get(&container), Some(&address), "nobody has released it yet");

    let restarted = clock::instant();
    stage.start();
    stage.wait_ready();
    eventually(Duration::from_secs(20), "the spool is drained", || {
        let (spooled, held) = (stage.spooled(), stage.allocations().values().any(|held| *held == address));
        if spooled.is_empty() && !held { Ok(()) } else { Err((spooled, held)) }
    });
    // Every other address of the node is given out before it; it only after its cooldown.
    let more = pods(&stage, "more", 27 - living.len() - 1);
    assert!(more.iter().all(|pod| pod.address() != address));
    let mut last = stage.subject("last");
    loop {
        match stage.try_add(&mut last) {
            Ok(given) => break assert_eq!(given, address),
            Err(refused) => assert_eq!(refused.0, TRY_AGAIN, "{refused:?}"),
        }
        assert!(restarted.elapsed() < 3 * cooldown, "never given out again");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(restarted.elapsed() >= cooldown, "reused after {:?}", restarted.elapsed());
    stage.probe(&last);
    talk.finish();
    stage.assert_no_complaints();
}

#[test]
fn existing_pods_are_served_within_a_second_while_ec2_does_not_answer() {
    for hangs in [true, false] {
        let stage = Stage::ready("m5.large", 12, &[]);
        let mut living = pods(&stage, "pod", 12); // two ENIs
        at_rest(&stage);
        let talk = Talk::start(&stage, &living[8..]);
        stage.kill();
        {
            let mut vpc = stage.world.cloud.vpc();
            let describe = vpc.knobs.action("DescribeNetworkInterfaces");
            if hangs {
                describe.delay = Duration::from_secs(6);
            }
            describe.next.extend(std::iter::repeat_n(Planned::RequestLost, 1000));
        }
        stage.start();
        let took = stage.wait_ready_within(Duration::from_secs(2));
        let before = clock::instant();
        let had = living[3].address();
        assert_eq!(stage.try_add(&mut living[3]).unwrap(), had, "a repeated ADD gets the same address");
        println!("EC2 {}: served after {took:?}, ADD {:?}", if hangs { "hangs" } else { "refuses" }, before.elapsed());
        // The others of the pool can be given out as well: they are written down.
        let new = stage.add("new");
        assert!(living.iter().all(|pod| pod.address() != new.address()));
        stage.probe(&new);
        stage.delete(living.remove(0));
        stage.probe_all(living.iter());

        // EC2 is back: the daemon asks until it hears something.
        let failures = stage.world.cloud.vpc().journal().failures();
        *stage.world.cloud.vpc().knobs.action("DescribeNetworkInterfaces") = enibox::sim::vpc::Behaviour::default();
        let calls = stage.calls();
        eventually(Duration::from_secs(40), "EC2 is asked again", || {
            let vpc = stage.world.cloud.vpc();
            let heard = vpc.journal().entries().last().is_some_and(|entry| entry.error.is_none());
            if heard && vpc.journal().counts().iter().ne(&calls) { Ok(()) } else { Err(vpc.journal().counts().clone()) }
        });
        assert!(failures > 0, "EC2 was asked while it did not answer");
        let said = talk.finish();
        println!("{said:?}");
        stage.assert_no_complaints();
    }
}

#[test]
fn existing_pods_are_served_while_imds_does_not_answer() {
    let stage = Stage::ready("m5.large", 12, &[]);
    let mut living = pods(&stage, "pod", 12); // two ENIs
    at_rest(&stage);
    let talk = Talk::start(&stage, &living[8..]);
    stage.kill();
    stage.world.cloud.lie(enibox::sim::conditions::Lie::Down);
    stage.start();
    let took = stage.wait_ready_within(Duration::from_secs(3));
    println!("IMDS is silent: served after {took:?}");
    let had = living[3].address();
    assert_eq!(stage.try_add(&mut living[3]).unwrap(), had, "a repeated ADD gets the same address");
    let new = stage.add("new");
    stage.probe(&new);
    stage.delete(living.remove(0));
    stage.probe_all(living.iter());
    stage.world.cloud.lie(enibox::sim::conditions::Lie::None);
    at_rest(&stage);
    stage.probe_all(living.iter());
    talk.finish();
    stage.assert_no_complaints();
}

#[test]
fn calls_to_ec2_are_few_and_a_restart_is_one() {
    let stage = Stage::ready("m5.large", 13, &[]);
    let mut living = pods(&stage, "pod", 27);
    at_rest(&stage);
    let want = [
        ("DescribeNetworkInterfaces", 1),
        ("AssignPrivateIpAddresses", 1),
        ("CreateTags", 1),
        ("DescribeSubnets", 1),
        ("CreateNetworkInterface", 2),
        ("AttachNetworkInterface", 2),
        ("ModifyNetworkInterfaceAttribute", 2),
    ];
    assert_eq!(stage.calls(), BTreeMap::from(want));
    let (attached, stray) = stage.enis();
    assert_eq!((attached.len(), stray.len()), (3, 0));
    let addresses: BTreeSet<Ipv4Addr> = living.iter().map(Subject::address).collect();
    assert_eq!(addresses.len(), 27);

    // The node is full.
    let mut refused = stage.subject("one-too-many");
    assert_eq!(stage.try_add(&mut refused).unwrap_err().0, TRY_AGAIN);
    stage.delete(refused);
    assert_eq!(stage.calls(), BTreeMap::from(want), "a full node asks EC2 for nothing");

    for kill in [true, false] {
        let before = stage.calls();
        if kill {
            stage.kill();
        } else {
            stage.stop();
        }
        stage.start();
        let took = stage.wait_ready();
        // It serves before it has asked EC2.
        eventually(Duration::from_secs(30), "EC2 is asked", || {
            if stage.calls() == before { Err(stage.log()) } else { Ok(()) }
        });
        at_rest(&stage);
        assert_eq!(stage.calls_since(&before), BTreeMap::from([("DescribeNetworkInterfaces", 1)]));
        println!("restart with 3 ENIs and 27 pods: {took:?}");
    }
    let again = living[20].address();
    assert_eq!(stage.try_add(&mut living[20]).unwrap(), again);
    stage.probe_all(living.iter());
    stage.assert_no_complaints();
}

#[test]
fn running_requests_are_finished_at_a_sigterm() {
    let stage = Stage::ready("m5.large", 14, &[]);
    let living = pods(&stage, "pod", 4);
    let talk = Talk::start(&stage, &living);
    // EC2 takes its time, so that some ADDs wait for addresses when the signal comes.
    stage.slow_down(Duration::from_secs(2), Duration::ZERO);
    let mut new: Vec<Subject> = (0..24).map(|number| stage.subject(&format!("new-{number}"))).collect();
    let (answers, took) = std::thread::scope(|scope| {
        let stage = &stage;
        let adds: Vec<_> = new.iter_mut().map(|subject| scope.spawn(move || stage.try_add(subject))).collect();
        // Some have been answered, others wait.
        eventually(Duration::from_secs(10), "ADDs are being served", || {
            let held = stage.allocations().len();
            if held > living.len() + 2 { Ok(()) } else { Err(held) }
        });
        let begin = clock::instant();
        stage.stop();
        let took = begin.elapsed();
        (adds.into_iter().map(|add| add.join().unwrap()).collect::<Vec<_>>(), took)
    });
    println!("ended {took:?} after SIGTERM, {} of {} ADDs served", answers.iter().flatten().count(), answers.len());
    assert!(took < Duration::from_secs(5), "ended after {took:?}");
    for refused in answers.iter().filter_map(|answer| answer.as_ref().err()) {
        assert_eq!(refused.0, TRY_AGAIN, "{refused:?}");
    }
    // Whoever was given an address has been told.
    let served = living.iter().chain(&new).filter(|subject| subject.result.is_some());
    let told: BTreeMap<String, Ipv4Addr> = served.map(|pod| (pod.container.clone(), pod.address())).collect();
    assert_eq!(stage.allocations(), told);
    stage.probe_all(new.iter().chain(&living).filter(|subject| subject.result.is_some()));
    talk.finish();
    assert!(!stage.read(CHECKPOINT).is_empty());
    stage.slow_down(Duration::ZERO, Duration::ZERO);
    stage.start();
    stage.wait_ready();
    stage.probe_all(living.iter());
    stage.assert_no_complaints();
}

// The plugin's STATUS: its exit code and what it printed.
fn status(stage: &Stage) -> (i32, String) {
    let mut command = stage.node.command(PROGRAM).unwrap();
    command.arg0("aws-cni").env_clear().env("CNI_COMMAND", "STATUS").env("CNI_PATH", "/opt/cni/bin");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let log = stage.logs.join("plugin.log");
    let config = serde_json::json!({
        "cniVersion": "1.1.0", "name": "aws-cni", "type": "aws-cni", "vethPrefix": "eni", "mtu": "9001",
        "podSGEnforcingMode": "strict", "pluginLogLevel": "DEBUG", "pluginLogFile": log,
    });
    child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_node_stays_ready_while_its_daemon_is_replaced_and_not_after_a_crash() {
    let stage = Stage::ready("m5.large", 15, &[]);
    let marked = || stage.node.inside(|| Ok(Path::new(DAEMON_STOPPED).exists())).unwrap();
    // Whether the mark is there, and what STATUS says.
    let check = |what: &str, mark: bool, code: i32| {
        // It waits half a second for an answer, and a busy machine may take longer; runtimes ask again too.
        let answer = (0..20).map(|_| status(&stage)).find(|answer| answer.0 == code);
        let (said, text) = answer.unwrap_or_else(|| status(&stage));
        assert_eq!((marked(), said), (mark, code), "{what}: {text}\n{}", stage.log());
        assert!(code == 0 || text.contains("\"code\":50") || text.contains("\"code\": 50"), "{what}: {text}");
    };
    check("it serves", false, 0);
    for round in 0..2 {
        stage.stop();
        check("told to stop", true, 0);
        stage.start();
        stage.wait_ready();
        // It serves a moment before it takes the mark away.
        eventually(Duration::from_secs(30), "the mark goes", || if marked() { Err(round) } else { Ok(()) });
        check("it is back", false, 0);
    }
    stage.kill();
    check("killed", false, 1);
    stage.start();
    stage.wait_ready();
    check("it is back", false, 0);
    stage.assert_no_complaints();
}

#[test]
fn a_node_that_forwards_nothing_is_told_of_at_the_start() {
    const LINE: &str = "net.ipv4.ip_forward is 0";
    let stage = Stage::new("m5.large", 16, &[]);
    for (value, told) in [("0", 1), ("1", 1), ("0", 2)] {
        stage.node.place.net.run(|| sysctl::set("net/ipv4/ip_forward", value)).unwrap().unwrap();
        stage.start();
        stage.wait_ready();
        assert_eq!(stage.log().matches(LINE).count(), told, "{value}: {}", stage.log());
        let kept = stage.node.place.net.run(|| sysctl::read("net/ipv4/ip_forward")).unwrap().unwrap();
        assert_eq!(kept, value, "the system's own is not changed");
        stage.stop();
    }
}
