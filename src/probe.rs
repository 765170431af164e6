//! `grpc-health-probe`: asks a server once for its health and ends with a code that the kubelet understands
//! (`spec/install.md` 7).
//!
//! Flags, lines and codes are those of the original: manifests name the first, and people search for the second. It runs
//! every few seconds on every node, so what it costs is its start: no command-line library, no logger, and no thread
//! unless a name has to be looked up. It must not know of the daemon: any server of gRPC is asked in the same way.

mod flags;

use crate::error::exit;
use crate::rpc::grpc::{Client, Code, Status};
use crate::rpc::health;
use crate::rpc::proto::{HealthCheckRequest, HealthCheckResponse, path};
use crate::{VERSION, clock, logging, sys};
use flags::{Flags, Refused, show_duration};
use std::ffi::OsStr;
use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

/// The name of this personality.
pub const NAME: &str = "grpc-health-probe";

/// The flags make no sense. Those that Go's parser refuses by itself end with [`exit::USAGE`].
const BAD_ARGUMENTS: u8 = 1;
const NOT_CONNECTED: u8 = 2;
const CALL_FAILED: u8 = 3;
const NOT_SERVING: u8 = 4;

/// Pauses between two tries to connect: twice as long each time, up to the longest.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// Addresses of a name that are tried.
const ADDRESSES_MAX: usize = 8;

/// A line of the log on stderr.
macro_rules! say {
    ($($text:tt)*) => { logging::say(format_args!($($text)*), file!(), line!()) };
}

/// Runs the probe with the arguments of the process; the exit code.
pub fn run() -> u8 {
    let mut words = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).peekable();
    let mut program = words.next().unwrap_or_default();
    if Path::new(&program).file_name() != Some(OsStr::new(NAME)) {
        program = words.next().unwrap_or(program); // called as the first word of the command line
    }
    match flags::parse(words) {
        Ok(flags) => probe(&flags),
        Err(refused) => {
            let (line, code) = match refused {
                Refused::Help => (String::new(), exit::OK),
                Refused::Wrong(line) => (line + "\n", exit::USAGE),
            };
            // Whoever does not read it is not told.
            let _ = write!(io::stderr(), "{line}Usage of {program}:\n{}", flags::USAGE);
            code
        }
    }
}

fn probe(flags: &Flags) -> u8 {
    let timeout = |nanos: i64| u64::try_from(nanos).ok().filter(|nanos| *nanos > 0).map(Duration::from_nanos);
    if flags.addr.is_empty() {
        say!("error: --addr not specified");
        return BAD_ARGUMENTS;
    }
    let (connect_text, rpc_text) = (show_duration(flags.connect_timeout), show_duration(flags.rpc_timeout));
    let Some(connect_timeout) = timeout(flags.connect_timeout) else {
        say!("error: --connect-timeout must be greater than zero (specified: {connect_text})");
        return BAD_ARGUMENTS;
    };
    let Some(rpc_timeout) = timeout(flags.rpc_timeout) else {
        say!("error: --rpc-timeout must be greater than zero (specified: {rpc_text})");
        return BAD_ARGUMENTS;
    };
    if let Err(error) = sys::catch_interrupt() {
        say!("error: catch SIGINT: {error}"); // it ends the probe as it ends any process
    }
    if flags.verbose {
        say!("parsed options:");
        say!("> remoteUrl={} conn-timeout={connect_text} rpc-timeout={rpc_text}", flags.addr);
        say!("establishing connection");
    }
    let started = clock::instant();
    let mut client = match connect(flags, connect_timeout) {
        Ok(client) => client,
        Err(Failed::Late(last)) => {
            say!("timeout: failed to connect service {:?} within {connect_text}: {}", flags.addr, last.message);
            return NOT_CONNECTED;
        }
        Err(Failed::Wrong(why)) => {
            say!("error: failed to connect service at {:?}: {why}", flags.addr);
            return NOT_CONNECTED;
        }
    };
    let connected = clock::instant();
    if flags.verbose {
        say!("connection established (took {})", since(started, connected));
    }
    let request = HealthCheckRequest { service: flags.service.clone() };
    match client.call::<_, HealthCheckResponse>(path::HEALTH_CHECK, &request, rpc_timeout) {
        Ok(reply) if reply.status != health::SERVING => {
            say!("service unhealthy (responded with {:?})", state(reply.status));
            NOT_SERVING
        }
        Ok(_) => {
            if flags.verbose {
                let took = since(connected, clock::instant());
                say!("time elapsed: connect={} rpc={took}", since(started, connected));
            }
            say!("status: {}", state(health::SERVING));
            exit::OK
        }
        Err(status) => {
            tell_of(&status, &rpc_text);
            CALL_FAILED
        }
    }
}

fn tell_of(status: &Status, rpc_text: &str) {
    match status.code {
        Code::UNIMPLEMENTED => {
            say!("error: this server does not implement the grpc health protocol (grpc.health.v1.Health)");
        }
        Code::DEADLINE_EXCEEDED => say!("timeout: health rpc did not complete within {rpc_text}"),
        code => {
            if sys::interrupted() {
                say!("cancellation received");
            }
            say!("error: health rpc failed: rpc error: code = {} desc = {}", go_name(code), status.message);
        }
    }
}

fn since(start: Instant, end: Instant) -> String {
    show_duration(i64::try_from(end.saturating_duration_since(start).as_nanos()).unwrap_or(i64::MAX))
}

/// `HealthCheckResponse.ServingStatus` by name.
fn state(status: i32) -> String {
    let names = ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"];
    let name = usize::try_from(status).ok().and_then(|number| names.get(number));
    name.map_or_else(|| status.to_string(), |name| (*name).to_owned())
}

/// A status code as gRPC for Go calls it: `NotFound`.
fn go_name(code: Code) -> String {
    match code {
        Code::CANCELLED => return "Canceled".into(),
        Code::OK => return "OK".into(),
        Code(number) if number > Code::UNAUTHENTICATED.0 => return format!("Code({number})"),
        _ => {}
    }
    let mut name = String::new();
    for word in code.to_string().split('_') {
        let (first, rest) = word.split_at(1);
        name.push_str(first);
        name.push_str(&rest.to_ascii_lowercase());
    }
    name
}

/// Why there is no connection.
enum Failed {
    /// The time is over; why the last try failed.
    Late(Status),
    /// It is of no use to try.
    Wrong(String),
}

/// Tries until the server has greeted us: that the kernel has taken a connection says nothing of the server.
fn connect(flags: &Flags, timeout: Duration) -> Result<Client, Failed> {
    let until =
        clock::instant().checked_add(timeout).ok_or_else(|| Failed::Wrong("the time-out is too long".into()))?;
    let target = Target::parse(&flags.addr).map_err(Failed::Wrong)?;
    let mut pause = PAUSE_MIN;
    loop {
        let failed = match attempt(&target, &flags.user_agent, until) {
            Ok(client) => return Ok(client),
            Err(failed) => failed,
        };
        if sys::interrupted() {
            say!("cancellation received");
            return Err(Failed::Wrong("context canceled".into()));
        }
        let left = left(until);
        if left.is_zero() {
            return Err(Failed::Late(failed));
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

fn left(until: Instant) -> Duration {
    until.saturating_duration_since(clock::instant())
}

fn attempt(target: &Target<'_>, user_agent: &str, until: Instant) -> Result<Client, Status> {
    // The kernel would take zero for "no limit".
    let time = left(until).max(Duration::from_millis(1));
    let (socket, peer, authority) = match target {
        Target::Unix(path) => (sys::connect_unix(Path::new(path), time), *path, "localhost"),
        Target::Tcp(address) => (dial(address, until), *address, *address),
    };
    let socket = socket.map_err(|error| {
        let why = match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => "the server takes no connection".to_owned(),
            _ => error.to_string(),
        };
        Status::new(Code::UNAVAILABLE, format!("connect to {peer}: {why}"))
    })?;
    let mut client = Client::over(socket, peer, authority, &format!("{user_agent} enibox/{VERSION}"));
    client.greet(left(until))?;
    Ok(client)
}

/// Connects to the first address that answers.
fn dial(address: &str, until: Instant) -> io::Result<OwnedFd> {
    let mut failed = io::Error::from(ErrorKind::NotFound);
    for address in look_up(address, until)? {
        match TcpStream::connect_timeout(&address, left(until).max(Duration::from_millis(1))) {
            Ok(stream) => return Ok(stream.into()),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// The addresses of `host:port`. A name is looked up by the C library, which keeps to no time-out of ours: what it does then
/// is done beside.
fn look_up(address: &str, until: Instant) -> io::Result<Vec<SocketAddr>> {
    if let Ok(literal) = address.parse() {
        return Ok(vec![literal]);
    }
    // As in Go, no host means this one.
    let name = if address.starts_with(':') { format!("localhost{address}") } else { address.to_owned() };
    let (sender, receiver) = sync_channel(1);
    let work = move || {
        let found = name.to_socket_addrs().map(|found| found.take(ADDRESSES_MAX).collect());
        sender.send(found).ok(); // too late for whoever asked
    };
    std::thread::Builder::new().spawn(work)?;
    receiver.recv_timeout(left(until)).unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
}

/// Whom to ask.
#[derive(Debug, PartialEq, Eq)]
enum Target<'a> {
    Unix(&'a str),
    Tcp(&'a str),
}

impl Target<'_> {
    /// gRPC's names (gRPC "Name Resolution"): `unix:path`, `unix:///path`, `dns:///host:port`, and `host:port` for short.
    fn parse(text: &str) -> Result<Target<'_>, String> {
        let unix = match (text.strip_prefix("unix://"), text.strip_prefix("unix:")) {
            (Some(path), _) if !path.starts_with('/') => return Err(format!("no authority is known: {text:?}")),
            (Some(path), _) | (None, Some(path)) => Some(path),
            (None, None) => None,
        };
        if let Some(path) = unix {
            return Ok(Target::Unix(path));
        }
        if text.starts_with("unix-abstract:") {
            return Err("abstract sockets are not supported".into());
        }
        let bare = text.strip_prefix("dns:///").or_else(|| text.strip_prefix("passthrough:///"));
        Ok(Target::Tcp(bare.unwrap_or(text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_those_of_grpc() {
        let check =
            |text: &str, expected: Target<'_>| assert_eq!(Target::parse(text).as_ref(), Ok(&expected), "{text}");
        check("unix:///var/run/aws-node/ipamd.sock", Target::Unix("/var/run/aws-node/ipamd.sock"));
        check("unix:/run/a", Target::Unix("/run/a"));
        check("unix:a", Target::Unix("a"));
        check("localhost:50051", Target::Tcp("localhost:50051"));
        check("[::1]:50051", Target::Tcp("[::1]:50051"));
        check("dns:///a.b:1", Target::Tcp("a.b:1"));
        check("passthrough:///a.b:1", Target::Tcp("a.b:1"));
        assert!(Target::parse("unix://run/a").is_err());
        assert!(Target::parse("unix-abstract:a").is_err());
    }

    #[test]
    fn codes_have_their_go_names() {
        for (code, name) in [
            (Code::OK, "OK"),
            (Code::CANCELLED, "Canceled"),
            (Code::NOT_FOUND, "NotFound"),
            (Code::UNAVAILABLE, "Unavailable"),
            (Code::DEADLINE_EXCEEDED, "DeadlineExceeded"),
            (Code::UNAUTHENTICATED, "Unauthenticated"),
            (Code(17), "Code(17)"),
        ] {
            assert_eq!(go_name(code), name);
        }
    }

    #[test]
    fn states_have_their_names() {
        assert_eq!([0, 1, 2, 3, 4, -1].map(state), ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN", "4", "-1"]);
    }
}
