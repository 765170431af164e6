//! The server: one thread (`front`) reads and writes all connections, others (`crew`) run the calls.
//!
//! What is answered at once, as a question for health is, the first thread answers itself: it waits behind no call that
//! runs, and costs no thread. Everything is bounded: [`BindOptions`] has the connections, the threads and the line of
//! calls that wait for one.

use super::Reply;
use super::crew::{Crew, Limits};
use super::front::Front;
use crate::error::{Context, Result};
use crate::rpc::proto;
use crate::rpc::stop::Stop;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A request, as the handler gets it.
#[derive(Clone, Debug)]
pub struct Call {
    /// One of [`BindOptions::methods`].
    pub method: &'static str,
    /// The encoded message.
    pub body: Vec<u8>,
    /// When the client stops waiting, on [`crate::clock::instant`]'s clock; `None` when it waits for ever.
    pub deadline: Option<Instant>,
    /// Process id of the client, for the log.
    pub peer_pid: i32,
}

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct BindOptions {
    /// Permissions of the socket.
    pub mode: u32,
    /// Whether peers other than root and our own user are turned away.
    pub root_only: bool,
    /// Paths that are served; others are answered `UNIMPLEMENTED` as soon as their header stands.
    pub methods: &'static [&'static str],
    /// Those of them that are answered without a thread of their own: they must not block.
    pub instant: &'static [&'static str],
    /// Those that may take long; they get three quarters of the threads.
    pub slow: &'static [&'static str],
    /// Connections at one time. A further one takes the place of the one that has been without a call for longest; only
    /// when all have calls under way it waits.
    pub connections: usize,
    /// Calls that run at one time.
    pub threads: usize,
    /// Calls that wait for a thread; further ones are answered `UNAVAILABLE`.
    pub line: usize,
    /// How long a request, or the taking of an answer, may make no end once begun.
    pub read_timeout: Duration,
    /// How long the peer may take to take what is written.
    pub write_timeout: Duration,
    /// How long running calls may go on after the word to stop.
    pub stop_limit: Duration,
}

impl Default for BindOptions {
    /// As `design.md` 5 and 6 want it: 0600, root peers, 32 threads, 10 s, 5 s to stop. The line is long enough for a node
    /// that starts all its pods at once, and leaves 32 connections to those that ask for what is answered at once.
    fn default() -> Self {
        BindOptions {
            mode: 0o600,
            root_only: true,
            methods: proto::path::ALL,
            instant: &[],
            slow: &[],
            connections: 256,
            threads: 32,
            line: 192,
            read_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(10),
            stop_limit: Duration::from_secs(5),
        }
    }
}

/// A socket that is bound and listens.
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    inode: (u64, u64),
    options: BindOptions,
}

impl Server {
    /// Binds `path`. The parent directory is made (0755) if need be and whatever stands at the path is replaced. The
    /// socket gets its permissions inside a private directory and is then moved into place, so there is no moment in which
    /// it is there with others.
    pub fn bind(path: &Path, options: BindOptions) -> Result<Server> {
        let what = || format!("bind {}", path.display());
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).with_context(what)?;
        // The name is short because a socket's path has at most 107 bytes. The process id keeps two servers apart; what
        // bears ours was left by a dead process.
        let private = parent.join(format!(".s{}", std::process::id()));
        let make = || -> std::io::Result<(UnixListener, (u64, u64))> {
            if private.exists() {
                fs::remove_dir_all(&private)?;
            }
            fs::DirBuilder::new().mode(0o700).create(&private)?;
            let made = private.join("s");
            let listener = UnixListener::bind(&made)?;
            fs::set_permissions(&made, fs::Permissions::from_mode(options.mode))?;
            let metadata = fs::symlink_metadata(&made)?;
            if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
                fs::remove_dir(path)?; // a container runtime makes one for a mount whose source is missing
            }
            fs::rename(&made, path)?;
            Ok((listener, (metadata.dev(), metadata.ino())))
        };
        let made = make();
        fs::remove_dir_all(&private).ok(); // empty, or left-overs of a failure that is being reported
        let (listener, inode) = made.with_context(what)?;
        Ok(Server { listener, path: path.to_owned(), inode, options })
    }

    /// Serves until `stop`: then the socket goes, running calls may finish within [`BindOptions::stop_limit`], and every
    /// client is told with GOAWAY. The handler runs on threads of its own, but for [`BindOptions::instant`] methods.
    pub fn serve<H>(self, handler: H, stop: &Stop) -> Result<()>
    where
        H: Fn(&Call) -> Reply + Send + Sync + 'static,
    {
        let limits = Limits { threads: self.options.threads, line: self.options.line, slow: self.options.slow };
        let (crew, bell) = Crew::new(Box::new(handler), limits).context("serve rpc")?;
        let listener = self.listener.try_clone().context("serve rpc")?;
        let ringing = Arc::clone(&crew);
        stop.on_stop(move || ringing.ring());
        let result = Front::new(listener, &self.options, &crew, bell).and_then(|mut front| {
            front.serve(stop)?;
            self.remove_socket();
            Ok(front.finish())
        });
        crew.close();
        self.remove_socket();
        let left = result?;
        if left > 0 {
            log::warn!("rpc: {left} calls still running after {:?} are abandoned", self.options.stop_limit);
        }
        Ok(())
    }

    /// Removes the socket unless another server has put its own there.
    fn remove_socket(&self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.inode);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("rpc: remove {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
