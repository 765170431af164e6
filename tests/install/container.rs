//! A node as the init container finds it: a network namespace with the primary ENI's link, folders of the image and the host,
//! and a metadata service. Mounts and namespaces end with the test.

use crate::support::in_fresh_netns;
use enibox::clock;
use enibox::netlink::socket::Socket;
use enibox::netlink::{link, sysctl};
use enibox::rpc::http1::{Limits, Method, Request, Response, Server, Verdict};
use enibox::sys;
use std::fs::{self, File, Permissions};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_enibox");
pub const NAME: &str = "aws-vpc-cni-init";
pub const MAC: &str = "0a:58:0a:14:0b:a2";
/// Nothing here takes so long, however loaded the machine is.
const LIMIT: Duration = Duration::from_mins(4);

/// How the metadata service answers a read of `mac`.
pub type Answers = Box<dyn Fn(u32) -> Verdict + Send + Sync>;

/// Version 2 only, as EC2 has it by default; and what it was asked.
pub struct Imds {
    server: Server,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Imds {
    /// Tells the MAC.
    pub fn plain() -> Imds {
        Imds::new(Box::new(|_| Response::text(200, MAC).into()))
    }

    /// Answers the n-th read of `mac`, counted from 1.
    pub fn new(answers: Answers) -> Imds {
        Imds::with(Box::new(|_| Response::text(200, "a-token").into()), answers)
    }

    /// Answers requests for tokens as well.
    pub fn with(tokens: Answers, answers: Answers) -> Imds {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (noted, counts) = (Arc::clone(&seen), [AtomicU32::new(0), AtomicU32::new(0)]);
        let handler = move |request: &Request| {
            noted.lock().unwrap().push(format!("{} {}", request.method.as_str(), request.path));
            let next = |kind: usize| counts[kind].fetch_add(1, Ordering::SeqCst) + 1;
            match (request.method, request.path.as_str()) {
                (Method::Put, "/latest/api/token") => tokens(next(0)),
                (Method::Get, "/latest/meta-data/mac") => answers(next(1)),
                _ => Response::text(404, "").into(),
            }
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let limits = Limits { connections: 256, ..Limits::default() };
        Imds { server: Server::start("imds", listener, limits, Arc::new(handler)).unwrap(), seen }
    }

    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Method and path of every request.
    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

/// A node and the image of the init container.
pub struct Node {
    path: PathBuf,
    imds: Option<SocketAddr>,
}

/// How the init container ended.
pub struct Ended {
    pub code: Option<i32>,
    pub took: Duration,
    /// `level: message` of each line.
    pub lines: Vec<String>,
}

impl Ended {
    #[track_caller]
    pub fn good(&self) -> &Ended {
        assert_eq!(self.code, Some(0), "{:#?}", self.lines);
        assert_eq!(self.lines.last().unwrap(), "info: CNI init container done");
        self
    }

    /// Failed with code 1, and its last line has all these texts.
    #[track_caller]
    pub fn failed(&self, texts: &[&str]) -> &Ended {
        assert_eq!(self.code, Some(1), "{:#?}", self.lines);
        let last = self.lines.last().unwrap();
        assert!(last.starts_with("error: "), "{last}");
        for text in texts {
            assert!(last.contains(text), "{text:?} is not in {last:?}");
        }
        self
    }

    pub fn has(&self, line: &str) -> bool {
        self.lines.iter().any(|found| found == line)
    }
}

/// Runs the body on a node of its own, whose network and mounts are seen by what it starts.
pub fn on_a_node<T: Send>(body: impl FnOnce(&mut Node) -> T + Send) -> T {
    in_fresh_netns(|| {
        sys::unshare_mounts().unwrap();
        let mut node = Node::new();
        add_link("eth0", MAC);
        body(&mut node)
    })
}

impl Node {
    fn new() -> Node {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // Beside the program, because a hard link cannot lead to another file system.
        let path = Path::new(PROGRAM).with_file_name(format!("init-{}-{number}", std::process::id()));
        for folder in ["image", "host"] {
            fs::create_dir_all(path.join(folder)).unwrap();
        }
        fs::hard_link(PROGRAM, path.join("image").join(NAME)).unwrap();
        let mut socket = Socket::route().unwrap();
        let lo = link::by_name(&mut socket, "lo").unwrap().unwrap().index;
        socket.run(&[link::set_up(lo)]).unwrap();
        Node { path, imds: None }
    }

    /// The init container will ask this service.
    pub fn asks(&mut self, address: SocketAddr) {
        self.imds = Some(address);
    }

    /// A path in the image's folder.
    pub fn image(&self, name: &str) -> PathBuf {
        self.path.join("image").join(name)
    }

    /// A path in the host's folder of plugins.
    pub fn host(&self, name: &str) -> PathBuf {
        self.path.join("host").join(name)
    }

    /// Names on the host, in order.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.host("")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The init container, not started yet.
    pub fn command(&self, variables: &[(&str, &str)]) -> Command {
        let mut command = Command::new(self.image(NAME));
        command.current_dir(self.image("")).env_clear().env("HOST_CNI_BIN_PATH", self.host(""));
        if let Some(address) = self.imds {
            command.env("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{address}"));
        }
        command.envs(variables.iter().copied()).stdin(Stdio::null());
        command
    }

    /// Runs the init container to its end.
    pub fn run(&self, variables: &[(&str, &str)]) -> Ended {
        let (out, err) = (self.path.join("stdout"), self.path.join("stderr"));
        let mut command = self.command(variables);
        command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        let start = clock::instant();
        let mut child = command.spawn().unwrap();
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status,
                None if start.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(5)),
                None => {
                    child.kill().unwrap();
                    panic!("it does not end: {}", fs::read_to_string(&err).unwrap());
                }
            }
        };
        let took = start.elapsed();
        assert_eq!(fs::read_to_string(&out).unwrap(), "");
        let lines = fs::read_to_string(&err).unwrap().lines().map(parse).collect();
        Ended { code: status.code(), took, lines }
    }
}

/// A link as of an ENI.
pub fn add_link(name: &str, mac: &str) {
    let peer = format!("{name}-peer");
    let end = |name, mac| link::End { name, mac, netns: None };
    let (mac, mtu) = (Some(mac.parse().unwrap()), 1500);
    let veth = link::Veth { end: end(name, mac), peer: end(&peer, None), mtu, up: false };
    Socket::route().unwrap().run(&[link::create_veth(&veth)]).unwrap();
}

impl Drop for Node {
    fn drop(&mut self) {
        // What a test has mounted there can be removed by nobody.
        sys::unmount_lazily(&self.host("")).ok();
        fs::remove_dir_all(&self.path).ok();
    }
}

/// `time="..." level=info msg="..."` as `info: ...`; any other line is a failure.
#[track_caller]
fn parse(line: &str) -> String {
    let rest = line.strip_prefix("time=\"").and_then(|rest| rest.split_once("Z\" level="));
    let (level, rest) = rest.and_then(|(_, rest)| rest.split_once(" msg=")).unwrap_or_else(|| panic!("{line}"));
    let message: String = serde_json::from_str(rest).unwrap_or_else(|_| panic!("{line}"));
    format!("{level}: {message}")
}

/// Writes an executable.
pub fn put(path: &Path, content: impl AsRef<[u8]>) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
}

/// Sysctls of the test's namespace are these.
#[track_caller]
pub fn hold(wanted: &[(&str, &str)]) {
    for (key, value) in wanted {
        assert_eq!(sysctl::read(key).unwrap(), *value, "{key}");
    }
}

pub fn set(wanted: &[(&str, &str)]) {
    for (key, value) in wanted {
        sysctl::set(key, value).unwrap();
    }
}
