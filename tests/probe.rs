//! The health probe as the kubelet runs it, each of its exit codes against our server, Google's, and ends that are none.

#[path = "support/foreign.rs"]
mod foreign;

use enibox::clock;
use enibox::rpc::grpc::{BindOptions, Call, Server};
use enibox::rpc::{health, stop::Stop};
use foreign::{Folder, Foreign};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_enibox");
/// What a server of HTTP/2 begins with: SETTINGS without any.
const EMPTY_SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
/// A probe that has a time-out of seconds ends within this on any machine.
const PATIENCE: Duration = Duration::from_secs(30);

fn probe(words: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg0("/app/grpc-health-probe").args(words).env_clear().stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(Stdio::piped());
    command
}

fn unix(socket: &Path) -> String {
    format!("unix://{}", socket.display())
}

/// The texts of the log lines; nothing may be said but in lines of JSON on stderr.
fn lines(output: &Output) -> Vec<String> {
    assert!(output.stdout.is_empty(), "{output:?}");
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    let line = |line: &str| {
        let json: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert_eq!(json["level"], "info", "{line}");
        assert!(json["ts"].is_string() && json["caller"].as_str().unwrap().starts_with("src/probe.rs:"), "{line}");
        json["msg"].as_str().unwrap().to_owned()
    };
    text.lines().map(line).collect()
}

/// Runs the probe; its code and its only line must be these, the line up to what the system says in words of its own.
#[track_caller]
fn check(what: &str, words: &[&str], code: i32, line: &str) {
    let output = probe(words).output().unwrap();
    let lines = lines(&output);
    assert_eq!(output.status.code(), Some(code), "{what}: {lines:?}");
    assert!(lines.len() == 1 && lines[0].starts_with(line), "{what}: {lines:?} instead of {line:?}");
}

/// Our server with the health service of the daemon.
struct Ours(Stop, Option<JoinHandle<()>>);

impl Ours {
    fn start(socket: &Path) -> Ours {
        let server = Server::bind(socket, BindOptions::default()).unwrap();
        let stop = Stop::new();
        let theirs = stop.clone();
        let thread =
            std::thread::spawn(move || server.serve(|call: &Call| health::check(&call.body), &theirs).unwrap());
        Ours(stop, Some(thread))
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        self.0.stop();
        if let Some(thread) = self.1.take() {
            thread.join().unwrap();
        }
    }
}

/// An end that answers every connection in one way, on a thread that ends with the test's process.
fn end(socket: &Path, serve: fn(UnixStream)) {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            serve(stream.unwrap());
        }
    });
}

/// Leaves the connection open for good.
fn keep(stream: UnixStream) {
    std::mem::forget(stream);
}

#[test]
fn our_server_is_healthy() {
    let folder = Folder::new("probe-ours");
    let socket = folder.socket("s");
    let _server = Ours::start(&socket);
    let addr = format!("-addr={}", unix(&socket));
    check("manifest", &[&addr, "-connect-timeout=5s", "-rpc-timeout=5s"], 0, "status: SERVING");
    check("by name", &[&addr, "--service", "grpc.health.v1.aws-node"], 0, "status: SERVING");
    check("short form", &[&format!("--addr=unix:{}", socket.display())], 0, "status: SERVING");
    let failed = "error: health rpc failed: rpc error: code = NotFound desc = unknown service \"other\"";
    check("unknown service", &[&addr, "-service=other"], 3, failed);
    // The time-outs are a second by default, which a busy machine may need by itself.
    let within =
        |run: &dyn Fn() -> Output| (0..3).map(|_| run()).find(|output| output.status.success()).expect("served");
    let lines = lines(&within(&|| probe(&[&addr, "-v"]).output().unwrap()));
    let starts = [
        "parsed options:",
        &format!("> remoteUrl={} conn-timeout=1s rpc-timeout=1s", unix(&socket)),
        "establishing connection",
        "connection established (took ",
        "time elapsed: connect=",
        "status: SERVING",
    ];
    assert_eq!(lines.len(), starts.len(), "{lines:?}");
    assert!(lines.iter().zip(starts).all(|(line, start)| line.starts_with(start)), "{lines:?}");
    // As the first word of the command line.
    within(&|| Command::new(PROGRAM).args(["grpc-health-probe", &addr]).output().unwrap());
}

#[test]
fn words_that_make_no_sense_are_refused() {
    check("no address", &[], 1, "error: --addr not specified");
    check("empty address", &["-addr", ""], 1, "error: --addr not specified");
    let text = "error: --connect-timeout must be greater than zero (specified: 0s)";
    check("no time to connect", &["-addr=a", "-connect-timeout=0"], 1, text);
    let text = "error: --rpc-timeout must be greater than zero (specified: -1.5s)";
    check("no time to answer", &["-addr=a", "-rpc-timeout=-1500ms"], 1, text);
    check(
        "another host's socket",
        &["-addr=unix://host/s"],
        2,
        "error: failed to connect service at \"unix://host/s\": ",
    );
    for (words, code, first) in [
        (&["-addr=a", "-tls"][..], 2, "flag provided but not defined: -tls"),
        (&["-addr"], 2, "flag needs an argument: -addr"),
        (&["-addr=a", "-rpc-timeout=5"], 2, "invalid value \"5\" for flag -rpc-timeout: parse error"),
        (&["-h"], 0, "Usage of /app/grpc-health-probe:"),
    ] {
        let output = probe(words).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), text.lines().next()), (Some(code), Some(first)), "{words:?}");
        assert!(text.contains("Usage of /app/grpc-health-probe:\n  -addr string\n"), "{text}");
    }
}

#[test]
fn every_way_not_to_be_served_has_its_code() {
    let folder = Folder::new("probe-ways");
    let (socket, addr) = (|name: &str| folder.socket(name), |name: &str| unix(&folder.socket(name)));
    let late = |name: &str| format!("timeout: failed to connect service {:?} within 300ms: ", addr(name));
    let quick = |name: &str, code: i32, line: &str| {
        check(name, &["-addr", &addr(name), "-connect-timeout=300ms", "-rpc-timeout=300ms"], code, line);
    };
    quick("missing", 2, &late("missing"));
    drop(UnixListener::bind(socket("dead")).unwrap());
    quick("dead", 2, &late("dead"));
    let _never_accepting = UnixListener::bind(socket("queue")).unwrap();
    quick("queue", 2, &late("queue"));
    end(&socket("silent"), keep);
    quick("silent", 2, &late("silent"));
    end(&socket("closing"), drop);
    quick("closing", 2, &late("closing"));
    end(&socket("garbage"), |mut stream| {
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").ok();
        keep(stream);
    });
    quick("garbage", 2, &late("garbage"));
    // Those that connect have time for it on any machine.
    let patient = |name: &str, time: &str, line: &str| {
        let time = format!("-rpc-timeout={time}");
        check(name, &["-addr", &addr(name), "-connect-timeout=30s", &time], 3, line);
    };
    end(&socket("mute"), |mut stream| {
        stream.write_all(&EMPTY_SETTINGS).ok();
        keep(stream);
    });
    patient("mute", "300ms", "timeout: health rpc did not complete within 300ms");
    end(&socket("reset"), |mut stream| {
        stream.write_all(&EMPTY_SETTINGS).ok();
        // Until the request is under way: preface, SETTINGS and WINDOW_UPDATE come before it.
        let mut begun = [0; 100];
        stream.read_exact(&mut begun).ok();
        stream.shutdown(Shutdown::Both).ok();
    });
    patient("reset", "30s", "error: health rpc failed: rpc error: code = Unavailable desc = ");
    end(&socket("noise"), |mut stream| {
        stream.write_all(&EMPTY_SETTINGS).ok();
        stream.read_exact(&mut [0; 100]).ok();
        stream.write_all(&[0xff; 64]).ok();
        keep(stream);
    });
    patient("noise", "30s", "error: health rpc failed: rpc error: code = Internal desc = ");
    // A port that nobody listens on: it was somebody's until now.
    let target = TcpListener::bind("127.0.0.2:0").unwrap().local_addr().unwrap().to_string();
    let line = format!("timeout: failed to connect service {target:?} within 200ms: ");
    check("port", &["-addr", &target, "-connect-timeout=200ms"], 2, &line);
    let line = "timeout: failed to connect service \"no-port\" within 100ms: ";
    check("no port", &["-addr=no-port", "-connect-timeout=100ms"], 2, line);
}

#[test]
fn a_server_that_starts_within_the_window_is_waited_for() {
    let folder = Folder::new("probe-start");
    let socket = folder.socket("s");
    let child = probe(&["-addr", &unix(&socket), "-connect-timeout=30s", "-rpc-timeout=30s"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(400));
    let before = clock::instant();
    let _server = Ours::start(&socket);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    println!("served {:?} after the start", before.elapsed());
}

#[test]
fn a_foreign_server_is_understood() {
    let what = "the probe is not tried against a foreign server";
    let Some(python) = foreign::interpreter(what) else { return };
    let folder = Folder::new("probe-foreign");
    let socket = folder.socket("s");
    let (_foreign, port) = Foreign::start(&python, "health", &socket);
    let port: u16 = port.parse().unwrap();
    let ask = |what: &str, target: &str, more: &[&str], code: i32, line: &str| {
        let words = [&["-addr", target, "-connect-timeout=20s"][..], more].concat();
        check(what, &words, code, line);
    };
    let (here, wait) = (unix(&socket), "-rpc-timeout=20s");
    ask("socket", &here, &[wait], 0, "status: SERVING");
    for host in ["127.0.0.1", "localhost", ""] {
        ask("port", &format!("{host}:{port}"), &[wait], 0, "status: SERVING");
    }
    ask("port by scheme", &format!("dns:///127.0.0.1:{port}"), &[wait], 0, "status: SERVING");
    ask("down", &here, &[wait, "-service=down"], 4, "service unhealthy (responded with \"NOT_SERVING\")");
    ask("nobody", &here, &[wait, "-service=nobody"], 4, "service unhealthy (responded with \"SERVICE_UNKNOWN\")");
    ask("no status", &here, &[wait, "-service=silent"], 4, "service unhealthy (responded with \"UNKNOWN\")");
    let line = "error: health rpc failed: rpc error: code = NotFound desc = unknown service";
    ask("missing", &here, &[wait, "-service=missing"], 3, line);
    let line = "timeout: health rpc did not complete within 500ms";
    ask("slow", &here, &["-rpc-timeout=500ms", "-service=slow"], 3, line);
    let line = "error: this server does not implement the grpc health protocol (grpc.health.v1.Health)";
    ask("no such method", &format!("{here}.other"), &[wait], 3, line);
    // Answers with the length of what it is told as the client's name.
    let length = "my-probe enibox/".len() + enibox::VERSION.len();
    let line = format!("service unhealthy (responded with \"{length}\")");
    ask("user agent", &here, &[wait, "-service=agent", "-user-agent=my-probe"], 4, &line);
}

#[test]
fn an_interrupt_cancels() {
    let folder = Folder::new("probe-interrupt");
    end(&folder.socket("silent"), keep);
    end(&folder.socket("mute"), |mut stream| {
        stream.write_all(&EMPTY_SETTINGS).ok();
        keep(stream);
    });
    for (name, at, code, last) in [
        ("silent", "establishing connection", 2, "error: failed to connect service at "),
        ("mute", "connection established", 3, "error: health rpc failed: rpc error: code = Canceled desc = "),
    ] {
        let words = ["-v", "-addr", &unix(&folder.socket(name)), "-connect-timeout=60s", "-rpc-timeout=60s"];
        let before = clock::instant();
        let mut child = probe(&words).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let (mut line, mut seen) = (String::new(), Vec::new());
        while !line.contains(at) {
            line.clear();
            assert!(stderr.read_line(&mut line).unwrap() > 0, "{name}: {seen:?}");
            seen.push(line.clone());
        }
        std::thread::sleep(Duration::from_millis(200)); // into the call that blocks
        enibox::sys::signal(child.id(), libc::SIGINT).unwrap();
        let mut rest = String::new();
        stderr.read_to_string(&mut rest).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "{name}: {rest}");
        assert!(rest.contains("cancellation received") && rest.contains(last), "{name}: {rest}");
        assert!(rest.contains("context canceled") && before.elapsed() < PATIENCE, "{name}: {rest}");
    }
}
