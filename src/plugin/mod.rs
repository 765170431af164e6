//! The CNI protocol: environment and standard input in, result or error document on standard output, exit code
//! (`spec/plugin.md` 1; CNI specification 1.1.0, section 2).
//!
//! Everything that can be wrong with a call is found here before a handler runs, in the order and with the codes of the Go
//! skeleton that runtimes are used to. Nothing but the document ever goes to standard output. This path links neither
//! command-line parsing nor TLS nor name resolution into its run.

pub mod aws_cni;
mod calls;
mod collect;
mod delegate;
pub mod egress_cni;
pub mod host_local;
mod local;
mod teardown;

use crate::error::exit;
use crate::model::cni::{self, CniError, Command, Envelope, Output, Version, code};
use crate::{clock, sys};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

/// Longest configuration. With the pod's annotations (256 KiB at most) and a cached result it stays far below.
const STDIN_BYTES_MAX: usize = 1 << 20;
/// So long the runtime may take to write the configuration.
const STDIN_TIMEOUT: Duration = Duration::from_secs(10);
/// VERSION needs no input and must not wait long for one that nobody sends.
const VERSION_STDIN_TIMEOUT: Duration = Duration::from_millis(500);

/// A checked call.
#[derive(Clone, Debug)]
pub struct Request {
    /// `CNI_CONTAINERID`; empty for GC and STATUS.
    pub container_id: String,
    /// `CNI_NETNS`; may be empty for DEL, and is for GC and STATUS.
    pub netns: String,
    /// `CNI_IFNAME`; empty for GC and STATUS.
    pub ifname: String,
    /// `CNI_ARGS`, not taken apart.
    pub args: String,
    /// The configuration.
    pub envelope: Envelope,
    /// The configuration as it came, for the log.
    pub stdin: Vec<u8>,
}

/// A plugin: what it is called and what it does on each command.
pub struct Plugin {
    /// The first words of the text that is printed when no command is given.
    pub about: &'static str,
    /// ADD.
    pub add: fn(&Request) -> Result<Output, CniError>,
    /// DEL.
    pub del: fn(&Request) -> Result<(), CniError>,
    /// CHECK, from 0.4.0 on.
    pub check: fn(&Request) -> Result<(), CniError>,
    /// STATUS, from 1.1.0 on.
    pub status: fn(&Request) -> Result<(), CniError>,
    /// GC, from 1.1.0 on.
    pub gc: fn(&Request) -> Result<(), CniError>,
}

/// Serves the call that this process was started for.
pub fn run(plugin: &Plugin) -> u8 {
    let env = |name: &str| std::env::var_os(name).map(|value| value.into_string().map_err(|_| name.to_owned()));
    match io::stdin().as_fd().try_clone_to_owned() {
        Ok(stdin) => serve(plugin, env, File::from(stdin), &mut io::stdout(), &mut io::stderr()),
        Err(error) => {
            let failure = CniError::new(code::IO, format!("error reading from stdin: {error}"));
            answer(Err(failure), Version::NEWEST, &mut io::stdout(), &mut io::stderr())
        }
    }
}

/// The value of an environment variable, or its name when it is not UTF-8.
type Variable = Option<Result<String, String>>;

/// [`run`] with the outside as arguments.
fn serve(
    plugin: &Plugin,
    env: impl Fn(&str) -> Variable,
    stdin: impl Read + AsFd,
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
) -> u8 {
    let mut version = Version::NEWEST;
    let done = match env("CNI_COMMAND") {
        None => None,
        Some(Ok(text)) if text.is_empty() => None,
        Some(Ok(text)) => match Command::parse(&text) {
            Some(command) => Some(dispatch(plugin, command, &Environment::read(env), stdin, &mut version)),
            None => Some(Err(CniError::new(code::BAD_ENVIRONMENT, format!("unknown CNI_COMMAND: {text}")))),
        },
        Some(Err(name)) => Some(Err(not_utf8(&name))),
    };
    let Some(done) = done else {
        let versions = Version::ALL.map(Version::as_str).join(", ");
        // Nobody is served by failing because nobody reads.
        let _ = writeln!(stderr, "{}\nCNI protocol versions supported: {versions}", plugin.about);
        return exit::OK;
    };
    answer(done, version, stdout, stderr)
}

/// Puts the one document on standard output and says how it went.
fn answer(done: Result<String, CniError>, version: Version, stdout: &mut dyn Write, stderr: &mut dyn Write) -> u8 {
    let (document, code) = match done {
        Ok(document) => (document, exit::OK),
        Err(failure) => {
            log::error!("{failure}");
            (failure.to_json(version.as_str()), exit::FAILURE)
        }
    };
    match stdout.write_all(document.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => code,
        Err(error) => {
            log::error!("write {document}: {error}");
            let _ = writeln!(stderr, "write {document}: {error}"); // there may be no log
            exit::FAILURE
        }
    }
}

/// The `CNI_*` variables; an absent one is the same as an empty one.
struct Environment {
    container_id: Result<String, String>,
    netns: Result<String, String>,
    ifname: Result<String, String>,
    args: Result<String, String>,
    path: Result<String, String>,
    netns_override: bool,
}

impl Environment {
    fn read(env: impl Fn(&str) -> Variable) -> Environment {
        let get = |name| env(name).unwrap_or_else(|| Ok(String::new()));
        Environment {
            container_id: get("CNI_CONTAINERID"),
            netns: get("CNI_NETNS"),
            ifname: get("CNI_IFNAME"),
            args: get("CNI_ARGS"),
            path: get("CNI_PATH"),
            netns_override: get("CNI_NETNS_OVERRIDE").is_ok_and(|v| v == "1" || v.eq_ignore_ascii_case("true")),
        }
    }

    /// All missing names at once. `CNI_PATH` is asked for only where the specification does: the Go skeleton wants it
    /// everywhere, but the specification lets it be absent and we run no other plugin.
    fn require(&self, command: Command) -> Result<(), CniError> {
        let wanted: &[(&str, &Result<String, String>)] = match command {
            Command::Add | Command::Check => {
                &[("CNI_CONTAINERID", &self.container_id), ("CNI_NETNS", &self.netns), ("CNI_IFNAME", &self.ifname)]
            }
            Command::Del => &[("CNI_CONTAINERID", &self.container_id), ("CNI_IFNAME", &self.ifname)],
            Command::Gc => &[("CNI_PATH", &self.path)],
            Command::Status | Command::Version => &[],
        };
        let missing: Vec<_> =
            wanted.iter().filter(|(_, v)| v.as_ref().is_ok_and(String::is_empty)).map(|w| w.0).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let names = missing.join(",");
        Err(CniError::new(code::BAD_ENVIRONMENT, format!("required env variables [{names}] missing")))
    }
}

fn not_utf8(name: &str) -> CniError {
    CniError::new(code::BAD_ENVIRONMENT, format!("{name} is not UTF-8"))
}

/// Carries out one command and returns what goes to standard output. `version` is set as soon as it is known.
fn dispatch(
    plugin: &Plugin,
    command: Command,
    env: &Environment,
    stdin: impl Read + AsFd,
    version: &mut Version,
) -> Result<String, CniError> {
    let silent = match command {
        Command::Version => return Ok(version_document(stdin)),
        Command::Add => None,
        Command::Del => Some(plugin.del),
        Command::Check => Some(plugin.check),
        Command::Status => Some(plugin.status),
        Command::Gc => Some(plugin.gc),
    };
    env.require(command)?;
    let bytes = read_all(stdin, STDIN_TIMEOUT)?;
    *version = Envelope::peek_version(&bytes).unwrap_or(*version);
    let request = check_call(command, env, bytes)?;
    match silent {
        Some(handler) => handler(&request).map(|()| String::new()),
        None => (plugin.add)(&request).map(|output| output.to_json(request.envelope.version)),
    }
}

/// `{"cniVersion":...,"supportedVersions":[...]}` and a newline. The version is that of the input if there is one that we
/// understand, as the specification wants it, else the newest.
fn version_document(stdin: impl Read + AsFd) -> String {
    let input = read_all(stdin, VERSION_STDIN_TIMEOUT).unwrap_or_default();
    let version = Envelope::peek_version(&input).unwrap_or(Version::NEWEST);
    let versions = Version::ALL.map(|version| format!("{:?}", version.as_str())).join(",");
    format!("{{\"cniVersion\":\"{version}\",\"supportedVersions\":[{versions}]}}\n")
}

/// Reads to the end, within limits of time and length.
fn read_all(mut stdin: impl Read + AsFd, timeout: Duration) -> Result<Vec<u8>, CniError> {
    let failed = |reason: String| CniError::new(code::IO, format!("error reading from stdin: {reason}"));
    let until = clock::instant() + timeout;
    let (mut bytes, mut chunk) = (Vec::new(), [0; 8192]);
    loop {
        let left = until.saturating_duration_since(clock::instant());
        let ready = sys::poll_readable(&[stdin.as_fd()], left).map_err(|error| failed(error.to_string()))?;
        if !ready.contains(&true) {
            if clock::instant() >= until {
                return Err(failed(format!("no end within {timeout:?}")));
            }
            continue; // a signal
        }
        match stdin.read(&mut chunk) {
            Ok(0) => return Ok(bytes),
            Ok(length) if bytes.len() + length > STDIN_BYTES_MAX => {
                return Err(failed(format!("more than {STDIN_BYTES_MAX} bytes")));
            }
            Ok(length) => bytes.extend_from_slice(&chunk[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error.to_string())),
        }
    }
}

/// Checks configuration, environment and namespace, and makes the request of them.
fn check_call(command: Command, env: &Environment, bytes: Vec<u8>) -> Result<Request, CniError> {
    let mut request = Request {
        container_id: String::new(),
        netns: String::new(),
        ifname: String::new(),
        args: String::new(),
        envelope: Envelope::parse(&bytes)?,
        stdin: bytes,
    };
    if matches!(command, Command::Add | Command::Del | Command::Check) {
        let value = |variable: &Result<String, String>| variable.clone().map_err(|name| not_utf8(&name));
        request.container_id = value(&env.container_id)?;
        request.netns = value(&env.netns)?;
        request.ifname = value(&env.ifname)?;
        request.args = value(&env.args)?;
        check_names(&request.container_id, &request.ifname)?;
    }
    let version = request.envelope.version;
    if version < command.since() {
        let msg = format!("config version does not allow {}", command.as_str());
        let details = format!("config is \"{version}\", {} needs \"{}\"", command.as_str(), command.since());
        return Err(CniError::new(code::INCOMPATIBLE_VERSION, msg).with_details(details));
    }
    check_netns(command, &request.netns, env.netns_override)?;
    Ok(request)
}

fn check_names(container_id: &str, ifname: &str) -> Result<(), CniError> {
    if !cni::is_valid_id(container_id) {
        let details = format!("CNI_CONTAINERID is {container_id:?}");
        return Err(CniError::new(code::BAD_ENVIRONMENT, "invalid characters in containerID").with_details(details));
    }
    if let Some(reason) = cni::bad_ifname(ifname) {
        let details = format!("CNI_IFNAME is {ifname:?}");
        return Err(CniError::new(code::BAD_ENVIRONMENT, reason).with_details(details));
    }
    Ok(())
}

/// The pod's namespace must be there, except for DEL, and must not be our own: rules and routes of the pod would go to the
/// host. The Go skeleton finds out only after the plugin has done that.
fn check_netns(command: Command, netns: &str, netns_override: bool) -> Result<(), CniError> {
    let must_exist = match command {
        Command::Add | Command::Check => true,
        Command::Del => false,
        Command::Status | Command::Gc | Command::Version => return Ok(()),
    };
    if let Err(error) = std::fs::metadata(netns) {
        let msg = format!("open CNI_NETNS {netns:?}: {error}");
        return if must_exist { Err(CniError::new(code::INVALID_NETNS, msg)) } else { Ok(()) };
    }
    let own = sys::same_namespace(Path::new(netns), Path::new("/proc/thread-self/ns/net"));
    if own.unwrap_or(false) && !netns_override && command != Command::Check {
        let msg = "plugin's netns and netns from CNI_NETNS should not be the same";
        return Err(CniError::new(code::INVALID_NETNS, msg));
    }
    Ok(())
}

#[cfg(test)]
mod protocol_tests;
