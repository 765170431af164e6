use super::*;
use crate::model::wire::{AddNetworkReply, AddNetworkRequest};
use crate::rpc::grpc::{Client, MESSAGE_LIMIT};
use crate::rpc::h2::PREFACE;
use crate::rpc::health;
use crate::rpc::proto::{Empty, HealthCheckRequest, HealthCheckResponse, Message, path};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

const PATIENCE: Duration = Duration::from_secs(20);
const EMPTY_SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];

/// A server in a directory of its own, both gone when dropped.
struct Running {
    dir: PathBuf,
    socket: PathBuf,
    stop: Stop,
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
        let thread = std::thread::spawn({
            let stop = stop.clone();
            move || server.serve(answer, &stop)
        });
        Running { dir, socket, stop, thread: Some(thread) }
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

    fn finish(&mut self) -> Result<()> {
        self.stop.stop();
        self.thread.take().map_or(Ok(()), |thread| thread.join().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.finish().unwrap();
        fs::remove_dir_all(&self.dir).unwrap();
    }
}

/// The handler of all tests. `AddNetwork` sleeps as many milliseconds as the interface's name says and echoes the pod's name.
fn answer(call: &Call) -> std::result::Result<Vec<u8>, Status> {
    match call.method {
        path::HEALTH_CHECK => health::check(&call.body),
        path::ADD_NETWORK => {
            let request = AddNetworkRequest::decode(&call.body)?;
            assert_eq!(call.peer_pid.cast_unsigned(), std::process::id());
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
