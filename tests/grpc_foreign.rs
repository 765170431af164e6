//! Our gRPC against Google's (Python's grpcio), in both directions. The package is installed into a directory under
//! `target/` on the first run; without `python3` the tests say SKIP and pass, any other obstacle fails them.

#[path = "support/python.rs"]
mod python;

use enibox::clock;
use enibox::error::Result;
use enibox::model::wire::{AddNetworkReply, AddNetworkRequest, DelNetworkReply, DelNetworkRequest};
use enibox::rpc::grpc::{BindOptions, Call, Client, Code, Server, Status};
use enibox::rpc::proto::{Empty, HealthCheckRequest, HealthCheckResponse, Message, NpReply, path};
use enibox::rpc::{health, stop::Stop};
use python::{run, skip};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_mins(1);
const MESSAGE: &str = "datastore: unknown pod (100% sure ☃)";

/// The interpreter of an environment that has grpcio; `None` where there is no python3.
fn python() -> Option<PathBuf> {
    let what = "gRPC is not tried against a foreign implementation";
    python::environment("venv-grpc", &["grpcio>=1.60,<2"], what)
}

fn peer(python: &Path, role: &str, socket: &Path) -> Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/foreign/grpc_peer.py");
    let mut command = Command::new(python);
    command.arg(script).arg(role).arg(socket);
    command
}

/// A directory that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("enibox-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn answer(call: &Call) -> std::result::Result<Vec<u8>, Status> {
    match call.method {
        path::HEALTH_CHECK => health::check(&call.body),
        path::ADD_NETWORK => {
            let request = AddNetworkRequest::decode(&call.body)?;
            assert!(call.deadline.is_some());
            std::thread::sleep(Duration::from_millis(request.if_name.parse().unwrap_or(0)));
            Ok(AddNetworkReply { success: true, pod_eni_mac: request.pod_name, ..Default::default() }.encode())
        }
        _ => Err(Status::new(Code::UNKNOWN, MESSAGE)),
    }
}

fn serve(socket: &Path, options: BindOptions) -> (Stop, JoinHandle<Result<()>>) {
    let server = Server::bind(socket, options).unwrap();
    let stop = Stop::new();
    let thread = std::thread::spawn({
        let stop = stop.clone();
        move || server.serve(answer, &stop)
    });
    (stop, thread)
}

#[test]
fn a_foreign_client_calls_our_server() {
    let Some(python) = python() else { return };
    let folder = Folder::new("grpc-server");
    let socket = folder.0.join("s");
    let (stop, thread) = serve(&socket, BindOptions::default());
    run(&mut peer(&python, "client", &socket));
    stop.stop();
    thread.join().unwrap().unwrap();
}

#[test]
fn a_peer_that_is_not_root_is_turned_away() {
    if Command::new("python3").arg("--version").output().is_err() {
        skip("no python3 here, a peer that is not root is not tried");
        return;
    }
    let folder = Folder::new("grpc-stranger");
    let socket = folder.0.join("s");
    // Permissions that let anybody connect, so that it is the server that refuses.
    let (stop, thread) = serve(&socket, BindOptions { mode: 0o666, ..Default::default() });
    if enibox::sys::effective_uid() == 0 {
        // The script must be readable by nobody wherever the sources are.
        let script = folder.0.join("peer.py");
        fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/foreign/grpc_peer.py"), &script).unwrap();
        run(Command::new("python3").arg(script).arg("stranger").arg(&socket));
    } else {
        skip("not root here, a peer that is not root is not tried");
    }
    let reply: HealthCheckResponse = Client::connect(&socket, PATIENCE)
        .unwrap()
        .call(path::HEALTH_CHECK, &HealthCheckRequest::default(), PATIENCE)
        .unwrap();
    assert_eq!(reply.status, health::SERVING);
    stop.stop();
    thread.join().unwrap().unwrap();
}

/// A foreign server, ended with the test.
struct Foreign(Child);

impl Drop for Foreign {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn our_client_calls_a_foreign_server() {
    let Some(python) = python() else { return };
    let folder = Folder::new("grpc-client");
    let socket = folder.0.join("s");
    let mut command = peer(&python, "server", &socket);
    let mut foreign = Foreign(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(foreign.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");

    let mut client = Client::connect(&socket, PATIENCE).unwrap();
    let add = |client: &mut Client, name: &str| {
        let request = AddNetworkRequest { pod_name: name.into(), ..Default::default() };
        let reply: AddNetworkReply = client.call(path::ADD_NETWORK, &request, PATIENCE).unwrap();
        assert_eq!((reply.success, reply.pod_eni_mac.as_str()), (true, name));
    };
    let before = clock::instant();
    for n in 0..500 {
        add(&mut client, &n.to_string());
    }
    eprintln!("our client, one connection: {:.0} calls/s", 500.0 / before.elapsed().as_secs_f64());
    let before = clock::instant();
    for n in 0..200 {
        add(&mut Client::connect(&socket, PATIENCE).unwrap(), &n.to_string());
    }
    eprintln!("our client, a connection each: {:.0} calls/s", 200.0 / before.elapsed().as_secs_f64());
    for _ in 0..5 {
        add(&mut client, &"x".repeat(900 * 1024));
    }

    let request = DelNetworkRequest::default();
    let status = client.call::<_, DelNetworkReply>(path::DEL_NETWORK, &request, PATIENCE).unwrap_err();
    assert_eq!(status, Status::new(Code::UNKNOWN, MESSAGE));
    let status = client.call::<_, Empty>("/rpc.CNIBackend/Other", &Empty {}, PATIENCE).unwrap_err();
    assert_eq!(status.code, Code::UNIMPLEMENTED);
    let status = client.call::<_, NpReply>(path::DELETE_POD_NP, &Empty {}, PATIENCE).unwrap_err();
    assert_eq!(status.code, Code::RESOURCE_EXHAUSTED, "{status}");
    let before = clock::instant();
    let deadline = Duration::from_millis(200);
    let status = client.call::<_, NpReply>(path::ENFORCE_NP_TO_POD, &Empty {}, deadline).unwrap_err();
    assert_eq!(status.code, Code::DEADLINE_EXCEEDED, "{status}");
    assert!(before.elapsed() < Duration::from_millis(1400));
    add(&mut client, "the connection lives on");
    let reply: NpReply = client.call(path::ENFORCE_NP_TO_POD, &Empty {}, PATIENCE).unwrap();
    assert!(!reply.success);

    drop(foreign);
    let status = client.call::<_, Empty>(path::HEALTH_CHECK, &Empty {}, PATIENCE).unwrap_err();
    assert_eq!(status.code, Code::UNAVAILABLE, "{status}");
}
