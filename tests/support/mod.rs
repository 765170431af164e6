//! What the tests that touch the kernel share: network namespaces that vanish with the test, and the `ip` and `nft` tools as
//! a second opinion.
#![allow(dead_code, reason = "each test binary uses its part")]

pub mod pods;
pub mod python;
pub mod traffic;
pub mod whole;

use enibox::netlink::netns::Namespace;
use enibox::netlink::socket::{Outcome, Socket, first_failure};
use enibox::netlink::{Request, link};
use enibox::sys;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Runs a test's body on a thread with a network namespace of its own, which ends with it. Programs that the body starts
/// run inside too. A panic of the body is the test's.
pub fn in_fresh_netns<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            sys::unshare_netns().expect("the tests run as root");
            body()
        });
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Copies a program that will be run. By `cp`: a file that this process has open for writing is open in every child that
/// another test's thread makes meanwhile, until that one has its own program, and cannot be run so long (`ETXTBSY`).
pub fn copy_program(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg(from).arg(to).status().unwrap();
    assert!(copied.success(), "cp {} {}", from.display(), to.display());
}

/// A namespace with a name under a directory of its own, since another's end would take a shared one away while it is being
/// made; removed when dropped, whatever happened.
pub struct Netns {
    directory: PathBuf,
    name: String,
    handle: Option<Namespace>,
}

impl Netns {
    /// Creates an empty namespace with its `lo` up.
    pub fn new(name: &str) -> Netns {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("enibox-test-{}-{count}", std::process::id()));
        let name = format!("{name}-{count}");
        let handle = Namespace::create_named(&directory, &name).unwrap();
        let netns = Netns { directory, name, handle: Some(handle) };
        let mut socket = netns.route();
        let lo = link::by_name(&mut socket, "lo").unwrap().expect("every namespace has lo").index;
        socket.run(&[link::set_up(lo)]).unwrap();
        netns
    }

    /// The open namespace.
    pub fn handle(&self) -> &Namespace {
        self.handle.as_ref().expect("open until dropped")
    }

    /// The path of its name.
    pub fn path(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// A route socket inside.
    pub fn route(&self) -> Socket {
        Socket::route_in(self.handle()).unwrap()
    }

    /// Runs the closure on a thread inside.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.handle().run(work).unwrap()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.handle = None;
        let removed = Namespace::delete_named(&self.directory, &self.name);
        std::fs::remove_dir(&self.directory).ok();
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

/// Sends the requests and panics with the first refusal, tolerated or not.
pub fn must(socket: &mut Socket, requests: &[Request]) {
    let outcomes: Vec<Outcome> = socket.batch(requests).unwrap();
    first_failure(outcomes).unwrap();
}

/// Standard output of a tool run in the calling thread's namespace; none, with a line that says so, where it is missing.
pub fn tool(program: &str, arguments: &[&str]) -> Option<String> {
    tool_with_input(program, arguments, "")
}

/// Like [`tool`], with text on standard input.
pub fn tool_with_input(program: &str, arguments: &[&str], input: &str) -> Option<String> {
    let Some(path) = find_program(program) else {
        let missing = format!("SKIP second opinion: {program} is not installed ({program} {})", arguments.join(" "));
        assert!(std::env::var_os("CI").is_none(), "{missing}");
        // Straight to the descriptor: a captured line would be a silent skip.
        _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{missing}\n").as_bytes());
        return None;
    };
    let mut child = Command::new(path)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {}: {}: {stderr}", arguments.join(" "), output.status);
    Some(String::from_utf8(output.stdout).unwrap())
}

/// The JSON that a tool prints, as [`tool`].
pub fn tool_json(program: &str, arguments: &[&str]) -> Option<serde_json::Value> {
    tool(program, arguments).map(|text| {
        // `ip -j` prints nothing at all for some empty lists.
        serde_json::from_str(if text.trim().is_empty() { "[]" } else { &text }).unwrap()
    })
}

/// Where a program of the system is.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).chain([Path::new("/usr/sbin").into(), Path::new("/sbin").into()]).find_map(
        |directory| {
            let file = directory.join(name);
            file.is_file().then_some(file)
        },
    )
}
