//! TCP connections that are kept open and used all the time, so that a pause or a break in a pod's network shows.

use crate::stage::{Stage, Subject};
use enibox::clock;
use enibox::netlink::netns::Namespace;
use enibox::sandbox::world::HOSTS;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// A connection that is silent for so long is broken. The kernel repeats a lost segment after 200 ms.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(5);

/// What came of the talking.
#[derive(Debug)]
pub struct Said {
    pub connections: usize,
    pub rounds: u64,
    pub longest: Duration,
}

/// Connections that talk on a thread of their own until they are asked to end.
pub struct Talk {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Said>,
}

struct Line {
    what: String,
    near: TcpStream,
    far: TcpStream,
}

impl Line {
    fn open(what: String, client: &Namespace, server: &Namespace, at: SocketAddr) -> Line {
        let listener = server.run(|| TcpListener::bind(at)).unwrap().unwrap();
        let target = listener.local_addr().unwrap();
        let near = client.run(|| TcpStream::connect_timeout(&target, PATIENCE)).unwrap();
        let near = near.unwrap_or_else(|error| panic!("{what}: connect: {error}"));
        let far = listener.accept().unwrap().0;
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            stream.set_nodelay(true).unwrap();
        }
        Line { what, near, far }
    }

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

impl Talk {
    /// Three lines per pod: to a host in the VPC, to the internet (translated), and from the host in the VPC to the pod;
    /// and one from each pod to the next.
    pub fn start(stage: &Stage, pods: &[Subject]) -> Talk {
        let mut lines = Vec::new();
        for (number, subject) in pods.iter().enumerate() {
            let pod = subject.pod.place.handle().unwrap();
            let name = &subject.name;
            let own = SocketAddr::from((subject.address(), 0));
            for host in HOSTS.iter().filter(|host| matches!(host.name, "vpc-host" | "internet")) {
                let far = stage.world.namespace(host.name).unwrap();
                let at = SocketAddr::from((host.address, 0));
                lines.push(Line::open(format!("{name} to {}", host.name), &pod, &far, at));
                if host.in_vpc {
                    lines.push(Line::open(format!("{} to {name}", host.name), &far, &pod, own));
                }
            }
            let next = &pods[(number + 1) % pods.len()];
            if next.name != *name {
                let client = next.pod.place.handle().unwrap();
                lines.push(Line::open(format!("{} to {name}", next.name), &client, &pod, own));
            }
        }
        Talk::along(lines)
    }

    /// One line for each name, client, server and the server's address.
    pub fn between(ends: &[(&str, &Namespace, &Namespace, SocketAddr)]) -> Talk {
        let open = |(what, client, server, at): &(&str, &Namespace, &Namespace, SocketAddr)| {
            Line::open((*what).to_owned(), client, server, *at)
        };
        Talk::along(ends.iter().map(open).collect())
    }

    fn along(mut lines: Vec<Line>) -> Talk {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut said = Said { connections: lines.len(), rounds: 0, longest: Duration::ZERO };
            while !asked.load(Ordering::Relaxed) {
                for line in &mut lines {
                    let begin = clock::instant();
                    line.exchange().unwrap_or_else(|error| panic!("{}: {error}", line.what));
                    said.longest = said.longest.max(begin.elapsed());
                }
                said.rounds += 1;
                std::thread::sleep(PAUSE);
            }
            said
        });
        Talk { stop, thread }
    }

    /// Whether a connection has broken already.
    pub fn broken(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends it; panics if a connection broke.
    pub fn finish(self) -> Said {
        self.stop.store(true, Ordering::Relaxed);
        let said = self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        assert!(said.rounds > 0);
        said
    }
}
