//! A server for tests: real sockets on loopback, answers as the test wrote them, byte for byte, so that what a broken
//! or hostile server does can be played. It understands no more of HTTP than where a request ends.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    /// Number of the connection, from 1.
    pub connection: usize,
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// A field of a form body, as it was encoded.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.body.split('&').find_map(|field| field.strip_prefix(name)?.strip_prefix('='))
    }
}

/// What the server does with a request.
#[derive(Clone, Debug)]
pub enum Step {
    /// Sends these bytes and keeps the connection.
    Answer(Vec<u8>),
    /// Sends these bytes, if any, and closes the connection.
    Close(Vec<u8>),
    /// Says nothing until the client goes.
    Hang,
}

/// An answer with a status and a body.
pub fn answer(status: u16, body: &str) -> Step {
    answer_with(status, &[], body)
}

/// An answer with headers of its own.
pub fn answer_with(status: u16, headers: &[(&str, &str)], body: &str) -> Step {
    let mut text = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        text = format!("{text}{name}: {value}\r\n");
    }
    Step::Answer(format!("{text}\r\n{body}").into_bytes())
}

type Handler = Box<dyn FnMut(&Request) -> Step + Send>;

pub struct Server {
    addr: SocketAddr,
    seen: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
    hangs: bool,
}

impl Server {
    /// A server that answers by `handler`.
    pub fn new(handler: impl FnMut(&Request) -> Step + Send + 'static) -> Server {
        Server::at("127.0.0.1:0", handler)
    }

    /// As [`Server::new`], at an address of its own.
    pub fn at(addr: &str, handler: impl FnMut(&Request) -> Step + Send + 'static) -> Server {
        let listener = TcpListener::bind(addr).unwrap();
        let addr = listener.local_addr().unwrap();
        let (seen, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let handler: Arc<Mutex<Handler>> = Arc::new(Mutex::new(Box::new(handler)));
        let (log, halt) = (seen.clone(), stop.clone());
        std::thread::spawn(move || {
            let number = AtomicUsize::new(0);
            for stream in listener.incoming() {
                if halt.load(Ordering::SeqCst) {
                    return;
                }
                let (handler, log) = (handler.clone(), log.clone());
                let number = number.fetch_add(1, Ordering::SeqCst) + 1;
                std::thread::spawn(move || serve(stream.unwrap(), number, &handler, &log));
            }
        });
        Server { addr, seen, stop, hangs: false }
    }

    /// A server that answers each request with the next step; after the last it hangs.
    pub fn queue(steps: Vec<Step>) -> Server {
        let hangs = steps.is_empty() || steps.iter().any(|step| matches!(step, Step::Hang));
        let mut steps = steps.into_iter();
        let mut server = Server::new(move |_| steps.next().unwrap_or(Step::Hang));
        server.hangs = hangs;
        server
    }

    /// How long to wait for an answer: as short as may be where there will be none, and else long enough for any machine, since
    /// a late answer is one attempt more.
    pub fn patience(&self) -> Duration {
        if self.hangs { Duration::from_millis(500) } else { Duration::from_secs(5) }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    /// Methods and paths of all requests so far.
    pub fn lines(&self) -> Vec<String> {
        self.seen().iter().map(|request| format!("{} {}", request.method, request.path)).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.addr); // wakes the listener
    }
}

fn serve(mut stream: TcpStream, connection: usize, handler: &Mutex<Handler>, seen: &Mutex<Vec<Request>>) {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut pending = Vec::new();
    while let Some(request) = read(&mut stream, &mut pending, connection) {
        seen.lock().unwrap().push(request.clone());
        let step = (handler.lock().unwrap())(&request);
        match step {
            Step::Answer(bytes) => {
                if stream.write_all(&bytes).is_err() {
                    return;
                }
            }
            Step::Close(bytes) => {
                let _ = stream.write_all(&bytes);
                return;
            }
            Step::Hang => {
                let _ = stream.read(&mut [0; 1]);
                return;
            }
        }
    }
}

fn read(stream: &mut TcpStream, pending: &mut Vec<u8>, connection: usize) -> Option<Request> {
    let mut more = |pending: &mut Vec<u8>| {
        let mut buffer = [0; 4096];
        let count = stream.read(&mut buffer).ok().filter(|count| *count > 0)?;
        pending.extend_from_slice(&buffer[..count]);
        Some(())
    };
    let end = loop {
        match pending.windows(4).position(|window| window == b"\r\n\r\n") {
            Some(end) => break end,
            None => more(pending)?,
        }
    };
    let head = String::from_utf8(pending[..end].to_vec()).unwrap();
    let mut lines = head.lines();
    let mut first = lines.next()?.split(' ').map(str::to_owned);
    let (method, path) = (first.next()?, first.next()?);
    let headers: Vec<(String, String)> =
        lines.filter_map(|line| line.split_once(": ")).map(|(name, value)| (name.into(), value.into())).collect();
    let length = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let length: usize = length.map_or(0, |(_, value)| value.parse().unwrap());
    while pending.len() < end + 4 + length {
        more(pending)?;
    }
    let body = String::from_utf8(pending[end + 4..end + 4 + length].to_vec()).unwrap();
    pending.drain(..end + 4 + length);
    Some(Request { connection, method, path, headers, body })
}
