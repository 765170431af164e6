//! TCP connections that are kept open and used all the time, so that a pause or a break in a pod's network shows.

use enibox::clock;
use enibox::netlink::netns::Namespace;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// A connection that is silent for so long is broken. The kernel repeats a lost segment after 200 ms.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);

/// One end of a line.
pub struct End<'a> {
    pub name: &'a str,
    pub net: &'a Namespace,
}

struct Line {
    from: String,
    to: String,
    near: TcpStream,
    far: TcpStream,
}

#[derive(Default)]
struct State {
    lines: Vec<Line>,
    rounds: u64,
    longest: Duration,
}

/// Connections that talk on a thread of their own until they are asked to end.
pub struct Lines {
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Lines {
    pub fn start() -> Lines {
        let (state, stop) = (Arc::new(Mutex::new(State::default())), Arc::new(AtomicBool::new(false)));
        let (shared, asked) = (Arc::clone(&state), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !asked.load(Ordering::Relaxed) {
                shared.lock().unwrap().round();
                std::thread::sleep(PAUSE);
            }
        });
        Lines { state, stop, thread: Some(thread) }
    }

    /// Opens one; the server must see this source.
    #[track_caller]
    pub fn open(&self, from: &End, to: &End, address: IpAddr, seen: IpAddr) {
        let what = format!("{} to {} at {address}", from.name, to.name);
        let listener = to.net.run(|| TcpListener::bind(SocketAddr::new(address, 0))).unwrap().unwrap();
        let target = listener.local_addr().unwrap();
        let near = from.net.run(|| TcpStream::connect_timeout(&target, PATIENCE)).unwrap();
        let near = near.unwrap_or_else(|error| panic!("{what}: connect: {error}"));
        let (far, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip(), seen, "{what}: the source");
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            stream.set_nodelay(true).unwrap();
        }
        let line = Line { from: from.name.to_owned(), to: to.name.to_owned(), near, far };
        self.state.lock().unwrap().lines.push(line);
    }

    /// Ends those of a pod that is going to be deleted.
    pub fn hang_up(&self, name: &str) {
        self.state.lock().unwrap().lines.retain(|line| line.from != name && line.to != name);
    }

    /// Says how long the longest exchange has taken since the last time; all must have talked.
    #[track_caller]
    pub fn unbroken(&self, phase: &str) {
        let begin = self.state.lock().expect("a connection broke").rounds;
        while self.state.lock().expect("a connection broke").rounds < begin + 2 {
            std::thread::sleep(PAUSE);
        }
        let mut state = self.state.lock().unwrap();
        let (count, longest) = (state.lines.len(), std::mem::take(&mut state.longest));
        println!("{phase}: {count} connections, longest pause {longest:?}");
        assert!(count > 0, "nobody talks");
    }
}

impl State {
    fn round(&mut self) {
        for line in &mut self.lines {
            let begin = clock::instant();
            line.exchange().unwrap_or_else(|error| panic!("{} to {}: {error}", line.from, line.to));
            self.longest = self.longest.max(begin.elapsed());
        }
        self.rounds += 1;
    }
}

impl Line {
    fn exchange(&mut self) -> std::io::Result<()> {
        let mut buffer = [0; 4];
        for _ in 0..2 {
            self.near.write_all(b"ping")?;
            self.far.read_exact(&mut buffer)?;
            std::mem::swap(&mut self.near, &mut self.far);
        }
        Ok(())
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(matches!(ended, Some(Ok(()))) || std::thread::panicking(), "a connection broke");
    }
}
