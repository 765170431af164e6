use super::*;
use crate::clock;
use crate::model::wire::{AddNetworkReply, AddNetworkRequest};
use crate::rpc::grpc::{Client, Code, MESSAGE_LIMIT, Status, frame_message, fuzz_h2_server};
use crate::rpc::h2::{FRAME_LIMIT, PREFACE};
use crate::rpc::proto::{Empty, HealthCheckRequest, HealthCheckResponse, Message, path};
use crate::rpc::{health, hpack};
use proptest::prelude::*;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

#[cfg(test)]
#[path = "siege_tests.rs"]
mod siege;

const PATIENCE: Duration = Duration::from_secs(20);
const EMPTY_SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];

/// The interface's name in calls that last until the test releases them.
const HELD: &str = "held";

/// What the handler tells the test, and the test the handler.
#[derive(Default)]
struct Gate {
    begun: AtomicU32, // calls of AddNetwork
    open: AtomicBool,
}

/// A server in a directory of its own, both gone when dropped.
struct Running {
    dir: PathBuf,
    socket: PathBuf,
    stop: Stop,
    gate: Arc<Gate>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Running {
    fn start(options: BindOptions) -> Running {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("enibox-rpc-{}-{number}", std::process::id()));
        let socket = dir.join("run/s.sock");
        let server = Server::bind(&socket, options).unwrap();
        let stop = Stop::new();
        let gate = Arc::new(Gate::default());
        let thread = std::thread::spawn({
            let (stop, gate) = (stop.clone(), Arc::clone(&gate));
            move || server.serve(move |call: &Call| answer(call, &gate), &stop)
        });
        Running { dir, socket, stop, gate, thread: Some(thread) }
    }

    /// Until so many calls have got a thread, of all that there were.
    fn wait_begun(&self, count: u32) {
        let end = clock::instant() + PATIENCE;
        while self.gate.begun.load(Ordering::Relaxed) < count {
            assert!(clock::instant() < end, "fewer than {count} calls have begun");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lets calls end that are held.
    fn release(&self) {
        self.gate.open.store(true, Ordering::Relaxed);
    }

    fn connect(&self) -> Client {
        Client::connect(&self.socket, PATIENCE).unwrap()
    }

    fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// The server still serves.
    fn check_alive(&self) {
        let reply: HealthCheckResponse =
            self.connect().call(path::HEALTH_CHECK, &HealthCheckRequest::default(), PATIENCE).unwrap();
        assert_eq!(reply.status, health::SERVING);
    }

    /// A call that lasts until it is released; the server has taken it up, since it has answered a ping that came behind it.
    fn hold(&self, pod_name: &str) -> UnixStream {
        let mut stream = self.raw();
        let ask = AddNetworkRequest { pod_name: pod_name.into(), if_name: HELD.into(), ..Default::default() };
        stream.write_all(&[start(), request(1, "60S", &ask.encode())].concat()).unwrap();
        ping(&mut stream);
        stream
    }

    fn finish(&mut self) -> Result<()> {
        self.stop.stop();
        self.thread.take().map_or(Ok(()), |thread| thread.join().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.release();
        self.finish().unwrap();
        fs::remove_dir_all(&self.dir).unwrap();
    }
}

/// The handler of all tests. `AddNetwork` sleeps as many milliseconds as the interface's name says, or until it is released, and
/// echoes the pod's name.
fn answer(call: &Call, gate: &Gate) -> std::result::Result<Vec<u8>, Status> {
    match call.method {
        path::HEALTH_CHECK => health::check(&call.body),
        path::ADD_NETWORK => {
            let request = AddNetworkRequest::decode(&call.body)?;
            assert_eq!(call.peer_pid.cast_unsigned(), std::process::id());
            gate.begun.fetch_add(1, Ordering::Relaxed);
            let end = clock::instant() + 3 * PATIENCE;
            while request.if_name == HELD && !gate.open.load(Ordering::Relaxed) && clock::instant() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(request.if_name.parse().unwrap_or(0)));
            Ok(AddNetworkReply { success: true, pod_eni_mac: request.pod_name, ..Default::default() }.encode())
        }
        _ => Err(Status::new(Code::UNKNOWN, "datastore: unknown pod (100% sure ☃)")),
    }
}

fn add(pod_name: &str, sleep_ms: u32) -> AddNetworkRequest {
    AddNetworkRequest { pod_name: pod_name.into(), if_name: sleep_ms.to_string(), ..Default::default() }
}

fn quick() -> BindOptions {
    BindOptions {
        read_timeout: Duration::from_millis(300),
        write_timeout: Duration::from_millis(300),
        stop_limit: Duration::from_millis(500),
        ..Default::default()
    }
}

#[test]
fn our_client_and_our_server_understand_each_other() {
    let server = Running::start(BindOptions::default());
    let mut client = server.connect();
    for name in ["a", "", &"x".repeat(MESSAGE_LIMIT - 100)] {
        let reply: AddNetworkReply = client.call(path::ADD_NETWORK, &add(name, 0), PATIENCE).unwrap();
        assert_eq!((reply.success, reply.pod_eni_mac.as_str()), (true, name));
    }
    let status = client.call::<_, Empty>(path::DEL_NETWORK, &Empty {}, PATIENCE).unwrap_err();
    assert_eq!(status, Status::new(Code::UNKNOWN, "datastore: unknown pod (100% sure ☃)"));
    for method in ["/grpc.health.v1.Health/Watch", "/rpc.CNIBackend/Other"] {
        let status = client.call::<_, Empty>(method, &Empty {}, PATIENCE).unwrap_err();
        assert_eq!(status, Status::new(Code::UNIMPLEMENTED, format!("unknown method {method}")));
    }
    let status = client.call_raw(path::ADD_NETWORK, &[0x0a, 5], PATIENCE).unwrap_err();
    assert_eq!(status, Status::new(Code::INTERNAL, "message truncated"));
    server.check_alive();
}

#[test]
fn a_server_that_is_missing_dead_or_silent_is_told_apart() {
    let dir = std::env::temp_dir().join(format!("enibox-rpc-dead-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let socket = dir.join("s");
    let error = |timeout| Client::connect(&socket, timeout).map(drop).unwrap_err();
    let missing = error(PATIENCE);
    assert_eq!(missing.code, Code::UNAVAILABLE);
    assert_eq!(missing.message, format!("connect to {}: No such file or directory (os error 2)", socket.display()));
    let listener = UnixListener::bind(&socket).unwrap();
    let deadline = Duration::from_millis(150);
    let mut client = Client::connect(&socket, PATIENCE).unwrap();
    let check_silent = |client: &mut Client, request: &AddNetworkRequest| {
        let before = clock::instant();
        let status = client.call::<_, Empty>(path::ADD_NETWORK, request, deadline).unwrap_err();
        assert_eq!(status.code, Code::DEADLINE_EXCEEDED, "{status}");
        assert!((deadline..PATIENCE).contains(&before.elapsed()));
    };
    check_silent(&mut client, &add("a", 0));
    check_silent(&mut client, &add(&"x".repeat(MESSAGE_LIMIT - 50), 0));
    check_silent(&mut Client::connect(&socket, PATIENCE).unwrap(), &add("a", 0));
    drop(listener);
    let status = client.call::<_, Empty>(path::ADD_NETWORK, &add("a", 0), PATIENCE).unwrap_err();
    assert_eq!(status.code, Code::UNAVAILABLE, "{status}");
    let dead = error(PATIENCE);
    assert_eq!(dead.message, format!("connect to {}: Connection refused (os error 111)", socket.display()));
    fs::remove_dir_all(&dir).unwrap();
}

/// What a server answers in place of HTTP/2.
#[test]
fn a_client_survives_a_broken_server() {
    let dir = std::env::temp_dir().join(format!("enibox-rpc-broken-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let listener = UnixListener::bind(dir.join("s")).unwrap();
    let check = |answer: &[u8], code: Code| {
        let mut client = Client::connect(&dir.join("s"), PATIENCE).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        server.write_all(answer).unwrap();
        server.shutdown(Shutdown::Write).unwrap();
        let status = client.call::<_, Empty>(path::ADD_NETWORK, &add("a", 0), PATIENCE).unwrap_err();
        assert_eq!(status.code, code, "{answer:?}: {status}");
        let again = client.call::<_, Empty>(path::ADD_NETWORK, &add("a", 0), PATIENCE).unwrap_err();
        assert_eq!(again.code, Code::UNAVAILABLE, "{answer:?}: {again}");
    };
    check(b"", Code::UNAVAILABLE);
    check(&EMPTY_SETTINGS, Code::UNAVAILABLE);
    check(b"HTTP/1.1 400 Bad Request\r\n\r\n", Code::INTERNAL);
    let goaway = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    check(&[&EMPTY_SETTINGS[..], &goaway].concat(), Code::UNAVAILABLE);
    let refused = [0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 7];
    check(&[&EMPTY_SETTINGS[..], &refused].concat(), Code::UNAVAILABLE);
    fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_slow_call_ends_at_its_deadline_and_the_channel_lives_on() {
    let server = Running::start(BindOptions::default());
    let mut client = server.connect();
    let before = clock::instant();
    let held = AddNetworkRequest { if_name: HELD.into(), ..Default::default() };
    let status = client.call::<_, AddNetworkReply>(path::ADD_NETWORK, &held, Duration::from_millis(100)).unwrap_err();
    assert_eq!(status.code, Code::DEADLINE_EXCEEDED);
    assert!(before.elapsed() < PATIENCE / 2, "a sixth of what the call lasts");
    let reply: AddNetworkReply = client.call(path::ADD_NETWORK, &add("b", 0), PATIENCE).unwrap();
    assert_eq!(reply.pod_eni_mac, "b");
}

#[test]
fn a_call_whose_deadline_passed_in_the_queue_is_not_run() {
    let server = Running::start(BindOptions::default());
    let mut stream = server.raw();
    // Whose time is a nanosecond has none left when the request is complete.
    stream.write_all(&[start(), request(1, "1n", &[])].concat()).unwrap();
    let answer = read_for(&mut stream, b"grpc-status");
    assert!(contains(&answer, b"deadline passed before the call was taken up"));
}

#[test]
fn the_socket_is_private_replaces_what_was_there_and_goes() {
    let mut server = Running::start(BindOptions::default());
    let (socket, parent) = (server.socket.clone(), server.socket.parent().unwrap().to_owned());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&socket), 0o600);
    assert_eq!(mode(&parent) & 0o700, 0o700);
    let names = || fs::read_dir(&parent).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    assert_eq!(names(), ["s.sock"]);
    // A second server takes the path over; the first must not remove what is no longer its own.
    let second = Server::bind(&socket, BindOptions { mode: 0o660, ..Default::default() }).unwrap();
    assert_eq!(mode(&socket), 0o660);
    server.finish().unwrap();
    assert_eq!(names(), ["s.sock"]);
    second.remove_socket();
    assert_eq!(names(), [""; 0]);
    for make in [|path: &Path| fs::write(path, "x"), |path: &Path| fs::create_dir(path)] {
        make(&socket).unwrap();
        Server::bind(&socket, BindOptions::default()).unwrap().remove_socket();
        assert_eq!(names(), [""; 0]);
    }
    fs::create_dir_all(socket.join("full")).unwrap();
    let error = Server::bind(&socket, BindOptions::default()).map(drop).unwrap_err().to_string();
    assert_eq!(error, format!("bind {}: Directory not empty (os error 39)", socket.display()));
    assert_eq!(names(), ["s.sock"]);
}

#[test]
fn idle_connections_make_room_and_busy_ones_do_not() {
    let read_timeout = Duration::from_secs(2);
    let server = Running::start(BindOptions { connections: 2, read_timeout, ..Default::default() });
    let mut clients: Vec<Client> = (0..2).map(|_| server.connect()).collect();
    let ask = |client: &mut Client, sleep_ms: u32| {
        client.call::<_, AddNetworkReply>(path::ADD_NETWORK, &add("a", sleep_ms), PATIENCE).map(|reply| reply.success)
    };
    for client in &mut clients {
        assert_eq!(ask(client, 0), Ok(true));
    }
    // Idle beyond the read time-out, they are still there.
    std::thread::sleep(read_timeout * 3 / 2);
    for client in &mut clients {
        assert_eq!(ask(client, 0), Ok(true));
    }
    let mut third = server.connect();
    assert_eq!(ask(&mut third, 0), Ok(true));
    assert_eq!(ask(&mut clients[1], 0), Ok(true), "only the one idle longest went");
    assert_eq!(ask(&mut clients[0], 0).unwrap_err().code, Code::UNAVAILABLE);
    let begun = server.gate.begun.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        let busy = [scope.spawn(|| ask(&mut third, 900)), {
            let second = &mut clients[1];
            scope.spawn(move || ask(second, 900))
        }];
        server.wait_begun(begun + 2);
        // It waits until one of them has its answer.
        assert_eq!(ask(&mut server.connect(), 0), Ok(true));
        for call in busy {
            assert_eq!(call.join().unwrap(), Ok(true));
        }
    });
    server.check_alive();
}

/// The answers to calls that were held.
fn answered(held: Vec<UnixStream>, name: &str) {
    for mut stream in held {
        let got = read_for(&mut stream, b"grpc-status\x010");
        assert!(contains(&got, name.as_bytes()), "{got:?}");
    }
}

#[test]
fn what_is_answered_at_once_waits_for_nobody() {
    let options = BindOptions { threads: 2, line: 1, instant: &[path::HEALTH_CHECK], ..BindOptions::default() };
    let server = Running::start(options);
    // Two run, one waits, one is too many.
    let running = vec![server.hold("held-pod"), server.hold("held-pod")];
    server.wait_begun(2);
    let waiting = server.hold("held-pod");
    let status = server.connect().call::<_, Empty>(path::ADD_NETWORK, &add("a", 0), PATIENCE).unwrap_err();
    assert_eq!(status.code, Code::UNAVAILABLE, "{status}");
    server.check_alive();
    let mut greeted = server.connect();
    greeted.greet(PATIENCE).unwrap();
    assert_eq!(server.gate.begun.load(Ordering::Relaxed), 2, "all this was while two ran");
    server.release();
    answered(running, "held-pod");
    answered(vec![waiting], "held-pod");
    server.check_alive();
}

#[test]
fn slow_calls_leave_threads_to_others() {
    let server = Running::start(BindOptions { threads: 4, slow: &[path::ADD_NETWORK], ..BindOptions::default() });
    let held: Vec<_> = (0..8).map(|_| server.hold("held-pod")).collect();
    server.wait_begun(3);
    let status = server.connect().call::<_, Empty>(path::DEL_NETWORK, &Empty {}, PATIENCE).unwrap_err();
    assert_eq!(status.code, Code::UNKNOWN, "{status}");
    assert_eq!(server.gate.begun.load(Ordering::Relaxed), 3, "that was while three ran");
    server.release();
    answered(held, "held-pod");
    assert_eq!(server.gate.begun.load(Ordering::Relaxed), 8);
}

#[test]
fn nobody_runs_a_call_whose_client_has_left() {
    let server = Running::start(BindOptions { threads: 1, ..BindOptions::default() });
    let first = server.hold("held-pod");
    server.wait_begun(1);
    // They give up while the first runs: one by its deadline, which resets the stream, one by hanging up.
    let mut patient = server.connect();
    let given_up = patient.call::<_, AddNetworkReply>(path::ADD_NETWORK, &add("b", 0), Duration::from_millis(50));
    assert_eq!(given_up.unwrap_err().code, Code::DEADLINE_EXCEEDED);
    drop(server.hold("c"));
    // What came before a ping is seen before the one after it is answered.
    let mut stream = server.raw();
    stream.write_all(&start()).unwrap();
    ping(&mut stream);
    ping(&mut stream);
    server.release();
    let reply: AddNetworkReply = patient.call(path::ADD_NETWORK, &add("d", 0), PATIENCE).unwrap();
    assert_eq!(reply.pod_eni_mac, "d");
    answered(vec![first], "held-pod");
    assert_eq!(server.gate.begun.load(Ordering::Relaxed), 2);
}

#[test]
fn thirty_two_calls_run_at_once() {
    let server = Running::start(BindOptions::default());
    std::thread::scope(|scope| {
        for n in 0..32 {
            let mut client = server.connect();
            scope.spawn(move || {
                let name = n.to_string();
                let ask = AddNetworkRequest { pod_name: name.clone(), if_name: HELD.into(), ..Default::default() };
                let reply: AddNetworkReply = client.call(path::ADD_NETWORK, &ask, PATIENCE).unwrap();
                assert_eq!(reply.pod_eni_mac, name);
            });
        }
        // None ends before all have begun.
        server.wait_begun(32);
        server.release();
    });
}

#[test]
fn stopping_lets_running_calls_finish_within_the_limit() {
    // The limit is far from what the call takes.
    let check = |sleep_ms: u32, limit: Duration, expected: std::result::Result<(), Code>| {
        let mut server = Running::start(BindOptions { stop_limit: limit, ..Default::default() });
        let mut idle = server.connect();
        idle.call::<_, AddNetworkReply>(path::ADD_NETWORK, &add("a", 0), PATIENCE).unwrap();
        let mut client = server.connect();
        std::thread::scope(|scope| {
            let call = scope
                .spawn(move || client.call::<_, AddNetworkReply>(path::ADD_NETWORK, &add("a", sleep_ms), PATIENCE));
            server.wait_begun(2);
            let before = clock::instant();
            server.finish().unwrap();
            assert!(before.elapsed() < PATIENCE / 2, "stopped within the limit");
            assert_eq!(call.join().unwrap().map(drop).map_err(|status| status.code), expected);
        });
        assert!(!server.socket.exists());
        let status = idle.call::<_, Empty>(path::ADD_NETWORK, &add("a", 0), PATIENCE).unwrap_err();
        assert_eq!(status.code, Code::UNAVAILABLE);
    };
    check(300, PATIENCE, Ok(()));
    check(60_000, quick().stop_limit, Err(Code::UNAVAILABLE));
}

// From here on the peer is not a client of ours.

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [.., l0, l1, l2] = payload.len().to_be_bytes();
    [&[l0, l1, l2, kind, flags][..], &stream.to_be_bytes(), payload].concat()
}

fn start() -> Vec<u8> {
    [PREFACE, &EMPTY_SETTINGS].concat()
}

fn head(list: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in list {
        hpack::encode(&mut block, name, value);
    }
    block
}

/// HEADERS and DATA of an `AddNetwork` call.
fn request(stream: u32, timeout: &str, message: &[u8]) -> Vec<u8> {
    let head = head(&[
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path::ADD_NETWORK),
        ("content-type", "application/grpc"),
        ("grpc-timeout", timeout),
    ]);
    let body = frame_message(message).unwrap();
    let mut out = frame(1, 4, stream, &head);
    let pieces = body.chunks(FRAME_LIMIT);
    let last = pieces.len() - 1;
    for (at, piece) in pieces.enumerate() {
        out.extend(frame(0, u8::from(at == last), stream, piece));
    }
    out
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Reads until `part` has come; an end before that is a failure.
fn read_for(stream: &mut UnixStream, part: &[u8]) -> Vec<u8> {
    let mut got = Vec::new();
    while !contains(&got, part) {
        let mut buffer = [0; 4096];
        let count = stream.read(&mut buffer).unwrap();
        assert!(count > 0, "connection ended before {part:?}: {got:?}");
        got.extend_from_slice(&buffer[..count]);
    }
    got
}

/// There and back.
fn ping(stream: &mut UnixStream) {
    stream.write_all(&frame(6, 0, 0, b"pingpong")).unwrap();
    read_for(stream, &frame(6, 1, 0, b"pingpong"));
}

/// Reads until the server closes, which it must.
fn read_to_end(stream: &mut UnixStream) -> Vec<u8> {
    let mut got = Vec::new();
    if let Err(error) = stream.read_to_end(&mut got) {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }
    got
}

#[test]
fn requests_that_are_not_grpc_are_answered_as_such() {
    let server = Running::start(BindOptions::default());
    let check = |list: &[(&str, &str)], expected: &[u8]| {
        let mut stream = server.raw();
        stream.write_all(&[start(), frame(1, 5, 1, &head(list))].concat()).unwrap();
        let got = read_for(&mut stream, expected);
        assert!(contains(&got, expected), "{list:?}");
    };
    let reset = frame(3, 0, 1, &[0, 0, 0, 1]);
    let grpc = ("content-type", "application/grpc");
    check(&[(":method", "GET"), (":path", "/"), grpc], b"405");
    check(&[(":method", "POST"), (":path", "/"), ("content-type", "text/plain")], b"415");
    check(&[(":method", "POST"), (":path", "/x"), grpc], b"unknown method /x");
    check(&[(":method", "POST"), grpc], &reset);
    check(&[(":path", "/"), grpc], &reset);
    check(&[(":method", "POST"), (":path", "/"), (":path", "/"), grpc], &reset);
    check(&[(":method", "POST"), grpc, (":path", "/")], &reset);
    check(&[(":method", "POST"), (":path", "/"), ("Upper", "x"), grpc], &reset);
    let method = (":path", path::ADD_NETWORK);
    check(&[(":method", "POST"), method, grpc, ("grpc-timeout", "soon")], b"malformed grpc-timeout");
    check(&[(":method", "POST"), method, grpc], b"no message where one is due");
}

/// A stream that the client keeps open, as for reflection, is answered without waiting for its end.
#[test]
fn a_running_call_may_be_acknowledged_while_the_server_stops() {
    let mut server = Running::start(BindOptions { stop_limit: PATIENCE, ..Default::default() });
    let mut stream = server.hold("slow");
    server.wait_begun(1);
    let (gate, socket) = (Arc::clone(&server.gate), server.socket.clone());
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| server.finish());
        let end = clock::instant() + PATIENCE;
        while socket.exists() {
            assert!(clock::instant() < end, "it does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
        // The acknowledgement of the server's SETTINGS: Google's clients take a failure here for a lost connection.
        stream.write_all(&frame(4, 1, 0, b"")).unwrap();
        gate.open.store(true, Ordering::Relaxed);
        read_for(&mut stream, b"slow");
        stopping.join().unwrap().unwrap();
    });
}

#[test]
fn an_unknown_stream_is_refused_at_its_header() {
    let server = Running::start(BindOptions::default());
    let mut stream = server.raw();
    let list =
        [(":method", "POST"), (":path", "/grpc.reflection.v1.X/Info"), ("content-type", "application/grpc+proto")];
    stream.write_all(&[start(), frame(1, 4, 1, &head(&list))].concat()).unwrap();
    let got = read_for(&mut stream, &frame(3, 0, 1, &[0; 4]));
    assert!(contains(&got, b"unknown method /grpc.reflection.v1.X/Info"));
}

#[test]
fn requests_open_at_once_are_answered_as_they_complete() {
    let server = Running::start(BindOptions::default());
    let mut stream = server.raw();
    let message = |name: &str| add(name, 0).encode();
    let (first, second) = (request(1, "9S", &message("first")), request(3, "9S", &message("second")));
    let split = first.len() - 3;
    // The first stream's DATA frame is torn apart only by frames' borders: send its header, the second call, its data.
    let header_end = 9 + usize::from(first[2]) + (usize::from(first[1]) << 8);
    assert!(header_end < split);
    stream.write_all(&[&start(), &first[..header_end], &second].concat()).unwrap();
    let got = read_for(&mut stream, b"second");
    assert!(!contains(&got, b"first"));
    stream.write_all(&first[header_end..]).unwrap();
    read_for(&mut stream, b"first");
    ping(&mut stream);
}

#[test]
fn violations_close_the_connection_and_nothing_else() {
    let server = Running::start(quick());
    let check = |bytes: &[u8]| {
        let mut stream = server.raw();
        stream.write_all(bytes).ok(); // it may be closed before all is written
        let got = read_to_end(&mut stream);
        // GOAWAY comes last: nine octets of header, then eight.
        assert!(contains(&got, &[0, 0, 8, 7, 0, 0, 0, 0, 0]) || got.is_empty(), "{got:?}");
    };
    check(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    check(&[0; 4096]);
    check(&[start(), frame(0, 0, 1, b"x")].concat());
    check(&[start(), frame(1, 4, 1, &[0x80])].concat());
    check(&[start(), vec![0xff; 9]].concat());
    check(&[start(), frame(1, 0, 1, b""), frame(9, 0, 1, b"").repeat(1000)].concat());
    check(&[start(), frame(1, 0, 1, b""), frame(9, 0, 1, &vec![0; FRAME_LIMIT]).repeat(100)].concat());
    check(&[start(), frame(6, 0, 0, &[0; 8]).repeat(20_000)].concat());
    check(&[start(), frame(0, 0, 1, &vec![0; FRAME_LIMIT + 1])].concat());
    server.check_alive();
}

#[test]
fn a_message_too_large_is_refused_and_the_connection_lives() {
    let server = Running::start(BindOptions::default());
    let mut client = server.connect();
    // What our client would not send itself.
    let mut stream = server.raw();
    let mut reader = stream.try_clone().unwrap();
    let reading = std::thread::spawn(move || read_for(&mut reader, b"message larger than 1048576"));
    let head = frame(
        1,
        4,
        1,
        &head(&[(":method", "POST"), (":path", path::ADD_NETWORK), ("content-type", "application/grpc")]),
    );
    stream.write_all(&[start(), head].concat()).unwrap();
    for _ in 0..70 {
        stream.write_all(&frame(0, 0, 1, &vec![0; FRAME_LIMIT])).unwrap();
    }
    reading.join().unwrap();
    stream.write_all(&request(3, "9S", &add("after", 0).encode())).unwrap();
    read_for(&mut stream, b"after");
    let status = client.call_raw(path::ADD_NETWORK, &vec![0; MESSAGE_LIMIT + 1], PATIENCE).unwrap_err();
    assert_eq!(status.code, Code::RESOURCE_EXHAUSTED);
    server.check_alive();
}

#[test]
fn a_request_cut_at_any_byte_does_no_harm() {
    let server = Running::start(quick());
    let whole = [start(), request(1, "9S", &add("a", 0).encode())].concat();
    for end in 0..whole.len() {
        let mut stream = server.raw();
        stream.write_all(&whole[..end]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert!(!contains(&read_to_end(&mut stream), b"grpc-status"), "answered after {end} bytes");
    }
    let mut stream = server.raw();
    stream.write_all(&whole).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(contains(&read_to_end(&mut stream), b"grpc-status"), "a client may close its half once it has asked");
    server.check_alive();
}

#[test]
fn an_unfinished_request_is_cut_off_in_time() {
    let server = Running::start(quick());
    let whole = [start(), request(1, "9S", &add("a", 0).encode())].concat();
    let check = |end: usize| {
        let mut stream = server.raw();
        stream.write_all(&whole[..end]).unwrap();
        let before = clock::instant();
        read_to_end(&mut stream);
        assert!((Duration::from_millis(200)..Duration::from_secs(5)).contains(&before.elapsed()), "{end}");
    };
    check(0);
    check(10);
    check(whole.len() - 1);
    // A byte now and then buys no time.
    let mut stream = server.raw();
    let before = clock::instant();
    for byte in whole {
        if stream.write_all(&[byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(before.elapsed() < Duration::from_secs(5));
    server.check_alive();
}

#[test]
fn a_client_that_takes_no_answer_is_cut_off() {
    let server = Running::start(quick());
    let ask = request(1, "9S", &add(&"x".repeat(60_000), 0).encode());
    // Without a window the answer waits for credit; with the largest it fills the socket.
    let no_window = frame(4, 0, 0, &[0, 4, 0, 0, 0, 0]);
    let largest = [frame(4, 0, 0, &[0, 4, 127, 255, 255, 255]), frame(8, 0, 0, &[127, 255, 0, 0])].concat();
    for (windows, asks) in [(no_window, 1), (largest, 40)] {
        let mut stream = server.raw();
        stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut bytes = [start(), windows].concat();
        for n in 0..asks {
            let mut ask = ask.clone();
            let mut at = 0; // every frame of the request moves to another stream
            while at < ask.len() {
                ask[at + 5..at + 9].copy_from_slice(&(2 * n + 1u32).to_be_bytes());
                at += 9 + (usize::from(ask[at]) << 16 | usize::from(ask[at + 1]) << 8 | usize::from(ask[at + 2]));
            }
            bytes.extend(ask);
        }
        let before = clock::instant();
        let mut result = stream.write_all(&bytes);
        while result.is_ok() && before.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(20));
            result = stream.write_all(&frame(6, 1, 0, &[0; 8]));
        }
        let error = result.expect_err("still connected");
        assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{error}");
    }
    server.check_alive();
}

#[test]
fn a_thousand_connections_come_and_go() {
    let server = Running::start(BindOptions::default());
    for n in 0..1000 {
        let mut stream = server.raw();
        if n % 3 == 1 {
            stream.write_all(&start()).ok();
        } else if n % 3 == 2 {
            stream.write_all(&[start(), request(1, "9S", &add("a", 0).encode())].concat()).ok();
        }
    }
    server.check_alive();
}

fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    (0u8..11, any::<u8>(), 0u32..8, prop::collection::vec(any::<u8>(), 0..64))
        .prop_map(|(kind, flags, stream, payload)| frame(kind, flags, stream, &payload))
}

proptest! {
    #[test]
    fn foreign_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        fuzz_h2_server(&bytes);
    }

    #[test]
    fn foreign_frames_do_no_harm(piece: u8, frames in prop::collection::vec(any_frame(), 0..20)) {
        fuzz_h2_server(&[&[piece][..], &frames.concat()].concat());
    }

    #[test]
    fn damaged_requests_do_no_harm(piece: u8, at: prop::sample::Index, value: u8, name in ".{0,20}") {
        let mut bytes = request(1, "9S", &add(&name, 0).encode());
        let at = at.index(bytes.len());
        bytes[at] = value;
        fuzz_h2_server(&[&[piece][..], &bytes].concat());
    }
}
