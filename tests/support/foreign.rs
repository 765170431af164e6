//! Google's gRPC (Python's grpcio) as the other side of a test, and a directory for the sockets between. The package is installed
//! below `target/` on the first run; without `python3` a test says SKIP and passes, any other obstacle fails it.

pub mod python;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A directory that goes with the test.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("enibox-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// The interpreter of an environment that has grpcio; `None` where there is no python3, so that `what` is not tried.
pub fn interpreter(what: &str) -> Option<PathBuf> {
    python::environment("venv-grpc", &["grpcio>=1.60,<2"], what)
}

/// The script of the other side.
pub fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/foreign/grpc_peer.py")
}

/// The script in one of its roles.
pub fn peer(python: &Path, role: &str, socket: &Path) -> Command {
    let mut command = Command::new(python);
    command.arg(script()).arg(role).arg(socket);
    command
}

/// A foreign server, ended with the test.
pub struct Foreign(Child);

impl Foreign {
    /// Starts it and waits for its first line, which says that it serves.
    pub fn start(python: &Path, role: &str, socket: &Path) -> (Foreign, String) {
        let mut command = peer(python, role, socket);
        let mut foreign = Foreign(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
        let mut line = String::new();
        BufReader::new(foreign.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        (foreign, line.trim_end().to_owned())
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
