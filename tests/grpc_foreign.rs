//! Our gRPC against Google's (Python's grpcio), in both directions.

#[path = "support/foreign.rs"]
mod foreign;

use enibox::clock;
use enibox::error::Result;
use enibox::model::wire::{AddNetworkReply, AddNetworkRequest, DelNetworkReply, DelNetworkRequest};
use enibox::rpc::grpc::{BindOptions, Call, Client, Code, Server, Status};
use enibox::rpc::proto::{Empty, HealthCheckRequest, HealthCheckResponse, Message, NpReply, path};
use enibox::rpc::{health, stop::Stop};
use foreign::python::{run, skip};
use foreign::{Folder, Foreign, peer, script};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_mins(1);
const MESSAGE: &str = "datastore: unknown pod (100% sure ☃)";

fn python() -> Option<PathBuf> {
    foreign::interpreter("gRPC is not tried against a foreign implementation")
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
    let socket = folder.socket("s");
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
    let socket = folder.socket("s");
    // Permissions that let anybody connect, so that it is the server that refuses.
    let (stop, thread) = serve(&socket, BindOptions { mode: 0o666, ..Default::default() });
    if enibox::sys::effective_uid() == 0 {
        // The script must be readable by nobody wherever the sources are.
        let copy = folder.socket("peer.py");
        fs::copy(script(), &copy).unwrap();
        run(Command::new("python3").arg(copy).arg("stranger").arg(&socket));
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

#[test]
fn our_client_calls_a_foreign_server() {
    let Some(python) = python() else { return };
    let folder = Folder::new("grpc-client");
    let socket = folder.socket("s");
    let (foreign, line) = Foreign::start(&python, "server", &socket);
    assert_eq!(line, "ready");

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
    assert!(before.elapsed() < Duration::from_millis(4500)); // it answers after 5 s
    add(&mut client, "the connection lives on");
    let reply: NpReply = client.call(path::ENFORCE_NP_TO_POD, &Empty {}, PATIENCE).unwrap();
    assert!(!reply.success);

    drop(foreign);
    let status = client.call::<_, Empty>(path::HEALTH_CHECK, &Empty {}, PATIENCE).unwrap_err();
    assert_eq!(status.code, Code::UNAVAILABLE, "{status}");
}
