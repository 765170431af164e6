//! A node of the sandbox with a Docker engine on it.

use enibox::clock;
use enibox::sandbox::kube::Api;
use enibox::sandbox::topology::Node;
use enibox::sandbox::world::{Plan, World};
use serde_json::json;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// No command takes longer on a loaded machine.
const COMMAND_MAX_S: u32 = 120;
/// Until something that takes a second or two has happened.
const SOON: Duration = Duration::from_mins(1);

pub struct Engine {
    process: Child,
    /// Folders of the node's host, as the DaemonSet mounts them: below it `opt/cni/bin`, `etc/cni/net.d`, `log`.
    pub host: PathBuf,
    cgroup: String,
    pub node: Arc<Node>,
    /// Last, because the others are in it.
    pub world: World,
}

impl Engine {
    /// A node as the kubelet finds it, with an API server that knows it and a pod `default/sample`.
    pub fn start(seed: u64) -> Engine {
        let home = std::env::temp_dir().join(format!("enibox-image-{}", std::process::id()));
        let mut world = World::create(&Plan { nodes: 1, instance_type: "m5.large", seed, home: &home }).unwrap();
        let mut api = Api::new();
        api.add_node("node-1", 29);
        api.add_pod("default", "sample", "node-1", &json!({}));
        world.serve_kube(api).unwrap();
        let node = world.node(0).unwrap();
        let host = world.topology().run().path().join("host");
        for folder in ["opt/cni/bin", "etc/cni/net.d", "log"] {
            fs::create_dir_all(host.join(folder)).unwrap();
        }
        let cgroup = format!("enibox-image-{}-{seed}", std::process::id());
        let log = fs::File::create(host.join("engine.log")).unwrap();
        let mut command = node.command("unshare").unwrap();
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/image/engine")).arg(&cgroup);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let process = command.spawn().unwrap();
        let engine = Engine { process, host, cgroup, node, world };
        eventually("the engine answers", || engine.docker("version"));
        engine
    }

    /// Standard output of a command on the node, or everything it said.
    pub fn run(&self, command: &str) -> Result<String, String> {
        let mut process = self.node.command("timeout").unwrap();
        process.args(["--kill-after=5", &COMMAND_MAX_S.to_string(), "bash", "-c", command]);
        process.env("DOCKER_HOST", "unix:///run/docker.sock").env("DOCKER_BUILDKIT", "1");
        said(process.stdin(Stdio::null()), command)
    }

    /// A command of Docker's client. Debian's is preferred: it needs no plugin to build.
    pub fn docker(&self, command: &str) -> Result<String, String> {
        let client = if Path::new("/usr/bin/docker").is_file() { "/usr/bin/docker" } else { "docker" };
        self.run(&format!("{client} {command}"))
    }

    /// The same; it must work.
    #[track_caller]
    pub fn must(&self, command: &str) -> String {
        self.docker(command).unwrap_or_else(|what| panic!("{what}"))
    }

    /// A file of the node's host.
    pub fn on_host(&self, path: &str) -> PathBuf {
        self.host.join(path)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let containers = self.docker("ps -aq").unwrap_or_default();
        for id in containers.lines() {
            if std::thread::panicking() {
                let logs = self.docker(&format!("logs {id} 2>&1")).unwrap_or_else(|what| what);
                eprintln!("--- container {id}\n{logs}");
            }
            _ = self.docker(&format!("rm -f {id}"));
        }
        if std::thread::panicking() {
            eprintln!("--- daemon\n{}", fs::read_to_string(self.host.join("log/ipamd.log")).unwrap_or_default());
            eprintln!("--- engine\n{}", fs::read_to_string(self.host.join("engine.log")).unwrap_or_default());
        }
        _ = self.process.kill();
        _ = self.process.wait();
        // In each hierarchy of version 1, or at the root of 2.
        let top = Path::new("/sys/fs/cgroup");
        let below = fs::read_dir(top).into_iter().flatten().flatten().map(|entry| entry.path());
        for hierarchy in below.chain([top.to_owned()]) {
            remove_cgroup(&hierarchy.join(&self.cgroup));
        }
    }
}

/// With those below it; processes that were killed just now are in it for a moment.
fn remove_cgroup(path: &Path) {
    for child in fs::read_dir(path).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
        remove_cgroup(&child.path());
    }
    for _ in 0..100 {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => std::thread::sleep(Duration::from_millis(20)),
            _ => return,
        }
    }
}

/// Standard output of a command that ends well, or everything it said.
pub fn said(process: &mut Command, what: &str) -> Result<String, String> {
    let output = process.output().map_err(|error| format!("{what}: {error}"))?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(out.into_owned()) } else { Err(format!("{what}: {}\n{out}{err}", output.status)) }
}

/// Tries until it works.
#[track_caller]
pub fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Result<T, String>) -> T {
    let start = clock::instant();
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(why) if start.elapsed() > SOON => panic!("{what}: {why}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
