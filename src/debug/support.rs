//! `enibox support-bundle`: what somebody far away needs to understand a node, as one tar archive.
//!
//! It collects, and judges nothing; the judgement in it is the doctor's. Each part is taken by itself: one that cannot be had
//! becomes a line of `notes.txt`. The operator's subcommands run as processes of their own, so that one that hangs or dies
//! costs its own part only. Archives of this form are read everywhere (POSIX ustar), and writing one is a page.

use super::doctor::gather::{chains, under};
use super::{METRICS, ask, complain, environment};
use crate::apply::Host;
use crate::clock;
use crate::error::{Context, Error, Result, exit};
use crate::model::naming::SUFFIX_LEN;
use crate::model::order;
use crate::plan::doctor::environment::{DIRECTORIES, FILES, Facts};
use crate::sys;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, PipeReader, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Folder in the archive.
const TOP: &str = "enibox-support";
/// Where the image has the host's files mounted.
const MOUNTED: &str = "/host";
/// The end of a log, and the start of any other file.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Of a plugin, for its hash.
const PLUGIN_BYTES_MAX: u64 = 256 << 20;
/// Files of one folder.
const FILES_MAX: usize = 2000;
/// The doctor asks IMDS and EC2, looks into every pod and may look twice.
const COMMAND_MAX: Duration = Duration::from_secs(90);
/// Settings of the kernel.
const SYSCTLS_MAX: usize = 10_000;
const BLOCK: usize = 512;
/// Subcommands that are run.
const COMMANDS: [&str; 4] = ["doctor", "status", "config", "rules"];
/// Introspection: path and name in the archive.
const PAGES: [(&str, &str); 6] = [
    ("/v1/enis", "enis.json"),
    ("/v1/enibox/status", "status.json"),
    ("/v1/enibox/intent", "intent.json"),
    ("/v1/eni-configs", "eni-configs.json"),
    ("/v1/networkutils-env-settings", "networkutils-env-settings.json"),
    ("/v1/ipamd-env-settings", "ipamd-env-settings.json"),
];
/// What the kernel and the host tell, besides what the doctor looks at.
const MORE_FILES: [&str; 12] = [
    "/proc/version",
    "/proc/uptime",
    "/proc/meminfo",
    "/proc/pressure/cpu",
    "/proc/net/dev",
    "/proc/net/arp",
    "/proc/net/sockstat",
    "/proc/net/snmp",
    "/proc/net/netstat",
    "/proc/net/stat/nf_conntrack",
    "/proc/net/ip6_tables_names",
    "/etc/os-release",
];
/// State of the daemon and of the egress plugin.
const STATE: [&str; 3] = ["/var/run/aws-node", "/run/cni/v4pd/egress-v6-ipam", "/run/cni/v6pd/egress-v4-ipam"];
const PLUGINS: &str = "/opt/cni/bin";
const LOGS: &str = "/var/log/aws-routed-eni";
/// A line of a configuration with one of these is left out.
const SECRETS: [&str; 5] = ["token", "password", "secret", "client-key-data", "private key"];

/// Arguments of `support-bundle`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Introspection address of the daemon [default: INTROSPECTION_BIND_ADDRESS]
    #[arg(long, value_name = "ADDRESS")]
    address: Option<String>,
    /// Where the host's files are
    #[arg(long, value_name = "DIRECTORY", default_value = "/")]
    root: PathBuf,
    /// The archive, which must not be there yet; - is standard output
    #[arg(long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    /// Size of the archive at most; logs come last
    #[arg(long, value_name = "MIB", default_value_t = 100)]
    max_size: u32,
    /// Logs that were written to in these hours only
    #[arg(long, value_name = "HOURS")]
    since: Option<u32>,
    /// No logs
    #[arg(long)]
    no_logs: bool,
    /// Do not ask the daemon's introspection
    #[arg(long)]
    no_introspection: bool,
    /// Do not read the daemon's metrics
    #[arg(long)]
    no_metrics: bool,
}

/// An archive that is being written.
struct Archive<'a> {
    out: &'a mut dyn Write,
    left: u64,
    at: i64,
    notes: String,
}

/// Runs the subcommand; the exit code.
pub fn run(args: &Args) -> u8 {
    match bundle(args) {
        Ok(()) => exit::OK,
        Err(error) => {
            complain(&error.to_string());
            exit::FAILURE
        }
    }
}

fn bundle(args: &Args) -> Result<()> {
    let stdout = args.output == Path::new("-");
    if stdout && io::stdout().is_terminal() {
        return Err(Error::new("standard output is a terminal: give --output FILE, or redirect it"));
    }
    let mut out: Box<dyn Write> = if stdout {
        Box::new(io::stdout())
    } else {
        let create = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&args.output);
        Box::new(create.with_context(|| format!("create {}", args.output.display()))?)
    };
    let at = clock::now().wall.as_unix_nanos() / 1_000_000_000;
    let left = u64::from(args.max_size) << 20;
    let mut archive = Archive { out: out.as_mut(), left, at, notes: format!("enibox {}\n", crate::VERSION) };
    collect(args, &mut archive).context("write the archive")
}

// What is small and tells most comes first. The archive's own errors end it, those of its parts do not.
fn collect(args: &Args, archive: &mut Archive<'_>) -> io::Result<()> {
    for name in COMMANDS {
        let told = subcommand(name, args);
        archive.part(&format!("{name}.txt"), told)?;
    }
    if !args.no_introspection {
        let address = args.address.clone().unwrap_or_else(|| environment().introspection_address);
        for (path, name) in PAGES {
            archive.part(&format!("introspection/{name}"), ask::body(&address, path).map(String::into_bytes))?;
        }
    }
    if !args.no_metrics {
        archive.part("metrics.txt", ask::body(METRICS, "/metrics").map(String::into_bytes))?;
    }
    archive.part("network.txt", network().map(String::into_bytes))?;
    let mut text = String::new();
    sysctls(Path::new("/proc/sys/net"), &mut text, &mut 0);
    archive.part("sysctl.txt", Ok(text.into_bytes()))?;
    archive.part("plugins.txt", Ok(listing(&find(&args.root, PLUGINS)).into_bytes()))?;
    for path in FILES.iter().chain(&MORE_FILES) {
        archive.file(path, &find(&args.root, path), true)?;
    }
    for (folder, end) in DIRECTORIES {
        archive.folder(folder, &find(&args.root, folder), |name, _| name.ends_with(end), true)?;
    }
    for folder in STATE {
        archive.folder(folder, &find(&args.root, folder), |_, _| true, false)?;
    }
    if !args.no_logs {
        let since = args.since.map_or(i64::MIN, |hours| archive.at - 3600 * i64::from(hours));
        archive.folder(LOGS, &find(&args.root, LOGS), |_, written| written >= since, false)?;
    }
    archive.end()
}

// Where a file of the host is seen from here.
fn find(root: &Path, path: &str) -> PathBuf {
    // What the kernel shows is the same everywhere.
    let root = if path.starts_with("/proc/") { Path::new("/") } else { root };
    let (found, mounted) = (under(root, path), under(Path::new(MOUNTED), path));
    if mounted.exists() && (root == Path::new("/") || !found.exists()) { mounted } else { found }
}

// What a subcommand of this program says, to both outputs.
fn subcommand(name: &str, args: &Args) -> Result<Vec<u8>> {
    let (reader, writer) = io::pipe()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("enibox").arg(name).stdin(Stdio::null());
    if let Some(address) = &args.address {
        command.arg("--address").arg(address);
    }
    if name == "doctor" {
        command.arg("--root").arg(&args.root);
    }
    command.stderr(writer.try_clone()?).stdout(writer);
    let mut child = command.spawn()?;
    drop(command); // it has our ends of the pipe
    let told = read_in_time(reader);
    if told.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    let mut told = told?;
    told.extend(format!("({status})\n").into_bytes());
    Ok(told)
}

fn read_in_time(mut reader: PipeReader) -> Result<Vec<u8>> {
    let deadline = clock::instant() + COMMAND_MAX;
    let (mut told, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        let left = deadline.saturating_duration_since(clock::instant());
        if left.is_zero() || told.len() as u64 > FILE_BYTES_MAX {
            return Err(Error::new("no end of its output in time"));
        }
        if sys::poll_readable(&[reader.as_fd()], left)?.contains(&true) {
            match reader.read(&mut chunk)? {
                0 => return Ok(told),
                count => told.extend_from_slice(&chunk[..count]),
            }
        }
    }
}

// Links, addresses, all rules and routes, chains of all tables. Writing to a string cannot fail.
fn network() -> Result<String> {
    let mut host = Host::open()?;
    let seen = host.observe()?;
    let mut facts = Facts::default();
    chains(&mut facts, &host, &seen.tables)?;
    let mut text = String::new();
    for link in &seen.links {
        let mac = link.mac.map(|mac| mac.to_string()).unwrap_or_default();
        let up = if link.up { "up" } else { "down" };
        let _ = writeln!(text, "link {} {} {mac} mtu {} {up}", link.index, link.name, link.mtu);
    }
    for address in &seen.addresses {
        let _ = writeln!(text, "address {address}");
    }
    for rule in &seen.rules {
        let _ = writeln!(text, "rule {rule}");
    }
    for route in &seen.routes {
        let _ = writeln!(text, "route {route}");
    }
    for chain in &facts.chains {
        let hook = chain.hook.map(|hook| hook.to_string()).unwrap_or_default();
        let policy = if chain.forward.drops { "drop" } else { "" };
        let _ = writeln!(text, "chain {} {} {} {hook} {policy}", chain.family, chain.table, chain.name);
    }
    for chain in &facts.legacy {
        let _ = writeln!(text, "legacy chain {chain}");
    }
    Ok(text)
}

// Settings of pods' links are many and all alike.
fn sysctls(folder: &Path, text: &mut String, count: &mut usize) {
    for path in entries(folder) {
        let name = path.file_name().unwrap_or_default();
        if path.is_dir() {
            if name.len() < SUFFIX_LEN {
                sysctls(&path, text, count);
            }
        } else if *count < SYSCTLS_MAX {
            *count += 1;
            if let Ok(value) = super::read(&path, BLOCK) {
                let _ = writeln!(text, "{} = {}", path.display(), value.trim_end());
            }
        }
    }
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths = entries.take(FILES_MAX).map(|entry| entry.path()).collect::<Vec<_>>();
    order::sort(&mut paths);
    paths
}

// Mode, size, hash and name of each file.
fn listing(folder: &Path) -> String {
    let mut text = String::new();
    for path in entries(folder) {
        let mut bytes = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(PLUGIN_BYTES_MAX).read_to_end(&mut bytes));
        if let (Ok(meta), Ok(_)) = (fs::symlink_metadata(&path), read) {
            let hash = sha1_smol::Sha1::from(&bytes).digest();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let _ = writeln!(text, "{:o} {} sha1 {hash} {name}", meta.mode(), meta.len());
        }
    }
    text
}

// A configuration without the lines that look like credentials.
fn hide(bytes: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(bytes);
    let mut shown = String::new();
    for line in text.lines() {
        let lower = line.to_lowercase();
        shown.push_str(if SECRETS.iter().any(|word| lower.contains(word)) { "(hidden)" } else { line });
        shown.push('\n');
    }
    shown.into_bytes()
}

impl Archive<'_> {
    fn note(&mut self, name: &str, what: &dyn std::fmt::Display) {
        let _ = writeln!(self.notes, "{name}: {what}"); // a string takes everything
    }

    // Something that was made here, or why it could not be.
    fn part(&mut self, name: &str, content: Result<Vec<u8>>) -> io::Result<()> {
        match content {
            Ok(bytes) => self.add(name, &bytes, self.at),
            Err(error) => {
                self.note(name, &error);
                Ok(())
            }
        }
    }

    fn folder(
        &mut self,
        name: &str,
        folder: &Path,
        wanted: impl Fn(&str, i64) -> bool,
        secrets: bool,
    ) -> io::Result<()> {
        for path in entries(folder) {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            let meta = fs::symlink_metadata(&path);
            if meta.is_ok_and(|meta| meta.is_file() && wanted(&file, meta.mtime())) {
                self.file(&format!("{name}/{file}"), &path, secrets)?;
            }
        }
        Ok(())
    }

    // A file of the host: the end of it when it is too long.
    fn file(&mut self, name: &str, path: &Path, secrets: bool) -> io::Result<()> {
        let name = format!("host{name}");
        let read = || -> io::Result<_> {
            let mut file = File::open(path)?;
            let meta = file.metadata()?;
            let mut bytes = Vec::new();
            if meta.len() > FILE_BYTES_MAX {
                file.seek(SeekFrom::End(-FILE_BYTES_MAX.cast_signed()))?;
            }
            file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
            Ok((bytes, meta))
        };
        match read() {
            Ok((bytes, meta)) => {
                if meta.len() > FILE_BYTES_MAX {
                    self.note(&name, &format_args!("the end of {} bytes", meta.len()));
                }
                let bytes = if secrets { hide(&bytes) } else { bytes };
                self.add(&name, &bytes, if meta.mtime() > 0 { meta.mtime() } else { self.at })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => {
                self.note(&name, &error);
                Ok(())
            }
        }
    }

    // A member of the archive, cut to what is left of its size.
    fn add(&mut self, name: &str, bytes: &[u8], at: i64) -> io::Result<()> {
        let room = usize::try_from(self.left.saturating_sub(2 * BLOCK as u64)).unwrap_or(usize::MAX);
        if bytes.len() > room {
            self.note(name, &format_args!("no room for {} of {} bytes", bytes.len() - room, bytes.len()));
        }
        let bytes = &bytes[..bytes.len().min(room)];
        let plain = |letter: char| if letter.is_ascii_graphic() { letter } else { '_' };
        let path: String = format!("{TOP}/{name}").chars().map(plain).collect();
        let Some(header) = header(&path, bytes.len(), at) else {
            self.note(name, &"the name is too long for the archive");
            return Ok(());
        };
        self.write(&header)?;
        self.write(bytes)?;
        self.write(&[0; BLOCK][..bytes.len().next_multiple_of(BLOCK) - bytes.len()])
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.left = self.left.saturating_sub(bytes.len() as u64);
        self.out.write_all(bytes)
    }

    fn end(&mut self) -> io::Result<()> {
        let notes = std::mem::take(&mut self.notes);
        self.left = u64::MAX; // without the notes the archive is not understood
        self.add("notes.txt", notes.as_bytes(), self.at)?;
        self.write(&[0; 2 * BLOCK])?;
        self.out.flush()
    }
}

/// Header of a regular file of this ASCII name (POSIX.1-2017 pax, "ustar Interchange Format"). `None`: the name does not fit.
fn header(name: &str, len: usize, at: i64) -> Option<[u8; BLOCK]> {
    // At most 100 bytes, and before them a folder of at most 155.
    let split = if name.len() <= 100 { 0 } else { name.len() - 101 + name[name.len() - 101..].find('/')? };
    let (prefix, name) = if split == 0 { ("", name) } else { (&name[..split], &name[split + 1..]) };
    if prefix.len() > 155 {
        return None;
    }
    let mut header = [0; BLOCK];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000600\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{len:011o}"));
    put(136, &format!("{:011o}", at.max(0)));
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\0");
    put(263, "00");
    put(345, prefix);
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    Some(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Members of an archive, as tar(1) reads it.
    fn members(archive: &[u8]) -> String {
        let mut tar = Command::new("tar");
        tar.args(["-tvf", "-"]).env("TZ", "UTC").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut tar = tar.spawn().unwrap();
        let mut input = tar.stdin.take().unwrap();
        // tar stops reading at the end it recognises and prints meanwhile: writing must neither wait for it nor mind.
        let archive = archive.to_vec();
        let writer = std::thread::spawn(move || drop(input.write_all(&archive)));
        let listed = tar.wait_with_output().unwrap();
        writer.join().unwrap();
        assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
        String::from_utf8(listed.stdout).unwrap()
    }

    fn archive(left: u64, work: impl FnOnce(&mut Archive<'_>) -> io::Result<()>) -> Vec<u8> {
        let mut out = Vec::new();
        let mut archive = Archive { out: &mut out, left, at: 1_000_000_000, notes: String::new() };
        work(&mut archive).unwrap();
        archive.end().unwrap();
        out
    }

    #[test]
    fn tar_reads_what_is_written() {
        let long = format!("{}/{}", "d".repeat(120), "f".repeat(60));
        let written = archive(1 << 20, |archive| {
            archive.add("a.txt", b"hello", 1_700_000_000)?;
            archive.add("empty", b"", 0)?;
            archive.add(&long, &[b'x'; 512], 1)?;
            archive.add(&"n".repeat(200), b"lost", 1)?;
            archive.add("b l\u{e4}nk", b"", 1)?;
            archive.part("failed", Err(Error::new("broken")))
        });
        assert_eq!(written.len() % BLOCK, 0);
        let listed = members(&written);
        for want in ["5 2023-11-14 22:13 enibox-support/a.txt", "0 1970-01-01 00:00 enibox-support/empty", &long] {
            assert!(listed.contains(want), "{want} is not in\n{listed}");
        }
        assert!(listed.contains("enibox-support/b_l_nk"), "{listed}");
        assert_eq!(listed.lines().count(), 5, "{listed}");
        let text = String::from_utf8_lossy(&written);
        assert!(text.contains("failed: broken\n") && text.contains("the name is too long"), "both are told");
    }

    #[test]
    fn an_archive_has_a_bound() {
        let written = archive(8192, |archive| {
            archive.add("large", &vec![b'x'; 100_000], 1)?;
            archive.add("late", b"late", 1)
        });
        assert!(written.len() < 12_000, "{}", written.len());
        let text = String::from_utf8_lossy(&written);
        assert!(text.contains("large: no room for ") && text.contains("late: no room for 4 of 4 bytes"));
        assert_eq!(members(&written).lines().count(), 3);
    }

    #[test]
    fn lines_with_credentials_are_hidden() {
        for (line, shown) in [
            ("mtu: 1500", "mtu: 1500\n"),
            ("  token: abc", "(hidden)\n"),
            ("  client-key-data: abc", "(hidden)\n"),
            ("{\"Password\": 1}", "(hidden)\n"),
        ] {
            assert_eq!(String::from_utf8(hide(line.as_bytes())).unwrap(), shown, "{line}");
        }
    }
}
