//! A thread of the daemon that makes no progress is told of by its name and with what it is at, and everything else goes on.

use crate::settings::fetch;
use crate::stage::{CHECKPOINT, PROGRAM, Stage, TRY_AGAIN, eventually};
use enibox::rpc::health::{NAMES, PROGRESS};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

const SOCKET: &str = "unix:///run/aws-node/ipamd.sock";
/// The first line comes after half a minute, at one of the looks that come every 15 s.
const TOLD: Duration = Duration::from_mins(2);

/// What the probe says of a service.
fn probe(stage: &Stage, service: &str) -> i32 {
    let mut command = stage.node.command(PROGRAM).unwrap();
    command.arg0("/app/grpc-health-probe").args(["-addr", SOCKET, "-service", service]).env_clear();
    command.args(["-connect-timeout=20s", "-rpc-timeout=20s"]).stdin(Stdio::null());
    command.output().unwrap().status.code().unwrap()
}

/// For how many seconds a thread has made no progress.
fn held(stage: &Stage, thread: &str) -> f64 {
    let page = stage.node.place.net.run(|| fetch("127.0.0.1:61678", "/metrics")).unwrap();
    let name = format!("enibox_thread_held_seconds{{thread=\"{thread}\"}} ");
    let value = page.lines().find_map(|line| line.strip_prefix(&name)).unwrap_or_else(|| panic!("no {name}:\n{page}"));
    value.parse().unwrap()
}

fn says(stage: &Stage, words: &[&str]) -> Result<(), String> {
    let log = stage.log();
    let found = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
    if found { Ok(()) } else { Err(log) }
}

#[test]
fn a_thread_that_hangs_is_told_of_and_the_others_go_on() {
    let stage = Stage::ready("m5.large", 95, &[("WARM_IP_TARGET", "2"), ("ENIBOX_ADD_WAIT", "1")]);
    let first = stage.add("first");
    assert_eq!((probe(&stage, NAMES[1]), probe(&stage, PROGRESS), probe(&stage, "other")), (0, 0, 3));

    // What opens a pipe to write waits for a reader: the disk is gone, as far as the daemon can tell.
    let pipe = format!("{CHECKPOINT}.tmp{}", stage.pid());
    let made = |path: &str| Ok(Command::new("mkfifo").arg(path).status()?.success());
    eventually(Duration::from_secs(20), "the daemon is not just writing that file", || {
        if stage.node.inside(|| made(&pipe)).unwrap() { Ok(()) } else { Err(pipe.clone()) }
    });
    let mut second = stage.subject("second");
    let (code, text) = stage.try_add(&mut second).unwrap_err();
    assert_eq!(code, TRY_AGAIN, "what is not written down is not given out: {text}");
    let hung = "thread disk makes no progress for";
    eventually(TOLD, "the thread is told of", || {
        says(&stage, &[hung, "write the checkpoint; it sleeps in the kernel"])
    });
    let seconds = held(&stage, "disk");
    assert!(seconds >= 30.0, "{seconds}");
    // The others get on, and it is too early to call the daemon dead.
    assert_eq!((probe(&stage, NAMES[0]), probe(&stage, PROGRESS)), (0, 0));
    assert_eq!(says(&stage, &["thread kernel makes no progress"]).and(says(&stage, &["thread core makes"])).ok(), None);
    stage.probe(&first);

    // Somebody reads: it goes on, finds that this is no file, and writes it anew.
    let read = std::thread::scope(|scope| {
        scope.spawn(|| stage.node.inside(|| Ok(std::fs::read(&pipe)?.len())).unwrap()).join().unwrap()
    });
    assert!(read > 0);
    eventually(TOLD, "it goes on", || says(&stage, &["thread disk goes on after", "write the checkpoint"]));
    let address = std::cell::RefCell::new(second);
    eventually(TOLD, "pods are served again", || stage.try_add(&mut address.borrow_mut()).map(drop));
    stage.probe(&address.into_inner());
    assert!(held(&stage, "disk") < seconds);
    stage.stop();
    stage.assert_no_complaints();
}
