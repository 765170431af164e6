//! Log lines: one JSON object each, to stderr or to a rotating file that many processes share safely
//! (`spec/plugin.md` 5); or as plain text on stderr, where people read a container's log (`spec/install.md` 3).
//!
//! A line is one `write(2)` in append mode, so that lines of concurrent plugin processes never mix. Whoever finds the file
//! full renames it while holding its lock; everybody else notices that the name stands for another file and follows.
//! Backups are not compressed: the plugin must not do seconds of work for a line, and five files of 100 MiB are a bound
//! already. Logging never fails its caller: what cannot go to the file goes to stderr.

use crate::error::{Context, Error, Result};
use crate::model::order;
use crate::model::time::Wall;
use crate::{VERSION, clock};
use log::{Level, LevelFilter, Record};
use serde::Serialize;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A file is rotated before it grows beyond this.
const FILE_BYTES_MAX: u64 = 100 << 20;
/// So many rotated files are kept …
const BACKUPS_MAX: usize = 5;
/// … unless they are older than this.
const BACKUP_AGE_MAX: Duration = Duration::from_hours(30 * 24);
/// Longest message in a line; what is beyond is cut off. Standard input of the plugin is logged and may be long.
const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Where lines may go besides stderr.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stdout {
    /// `stdout` means standard output (the daemon).
    Allowed,
    /// `stdout` means stderr, because standard output belongs to the CNI result (the plugin).
    Reserved,
}

/// Starts logging for the process. `destination` is empty, `stderr`, `stdout` (any case) or a file's path; `level` is
/// `debug`, `info`, `warn`, `error` or `fatal` (any case), and anything else means debug. A second call does nothing.
pub fn init(destination: &str, level: &str, stdout: Stdout) {
    init_with(destination, level, stdout, FILE_BYTES_MAX);
}

fn init_with(destination: &str, level: &str, stdout: Stdout, bytes_max: u64) {
    let sink = match destination.to_ascii_lowercase().as_str() {
        "stdout" if stdout == Stdout::Allowed => Sink::Stdout,
        "" | "stderr" | "stdout" => Sink::Stderr,
        _ => match RotatingFile::open(Path::new(destination), bytes_max) {
            Ok(file) => Sink::File(file),
            Err(error) => {
                let _ = writeln!(io::stderr(), "log to stderr instead of {destination}: {error}");
                Sink::Stderr
            }
        },
    };
    let built = env_logger::Builder::new()
        .filter_level(LevelFilter::Debug) // the level itself is the facade's, which can be changed later
        // The netlink library logs every field that it decodes, the others every header: never wanted from a node.
        .filter_module("neli", LevelFilter::Warn)
        .filter_module("ureq", LevelFilter::Warn)
        .filter_module("ureq_proto", LevelFilter::Warn)
        .filter_module("rustls", LevelFilter::Warn)
        .format(|buffer, record| buffer.write_all(&line(clock::now().wall, record)))
        .target(env_logger::Target::Pipe(Box::new(sink)))
        .try_init();
    if built.is_ok() {
        set_level(level);
        log::info!("enibox {VERSION} logs at level {}", log::max_level());
    }
}

/// Starts logging for a process whose lines people read: text on stderr, from level info on. A second call does nothing.
pub fn init_text() {
    if log::set_logger(&Plain).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// One such line, beside the log of a process that has its own.
pub fn tell(level: Level, text: &str) {
    let now = clock::now().wall;
    let line = text_line(now, &Record::builder().level(level).args(format_args!("{text}")).build());
    io::stderr().write_all(line.as_bytes()).ok(); // there is nobody to tell
}

/// Lines of text on stderr.
struct Plain;

impl log::Log for Plain {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            io::stderr().write_all(text_line(clock::now().wall, record).as_bytes()).ok(); // as above
        }
    }

    fn flush(&self) {}
}

/// `time="2024-01-31T10:00:00Z" level=info msg="..."`, its newline included.
fn text_line(now: Wall, record: &Record<'_>) -> String {
    let level = match record.level() {
        Level::Warn => "warning",
        other => level_name(other),
    };
    format!("time=\"{now}\" level={level} msg={:?}\n", record.args().to_string())
}

/// Changes the level of a running process; the texts are those of [`init`].
pub fn set_level(level: &str) {
    log::set_max_level(level_filter(level));
}

fn level_filter(text: &str) -> LevelFilter {
    match text.to_ascii_lowercase().as_str() {
        "info" => LevelFilter::Info,
        "warn" => LevelFilter::Warn,
        // There is no level above error: nothing here ends a process from within a log call.
        "error" | "fatal" => LevelFilter::Error,
        _ => LevelFilter::Debug,
    }
}

#[derive(Serialize)]
struct Line<'a> {
    level: &'a str,
    ts: &'a str,
    caller: &'a str,
    msg: &'a str,
}

/// One line of level info on stderr, for a program that says little and starts no logger.
pub fn say(text: std::fmt::Arguments<'_>, file: &'static str, number: u32) {
    let record = Record::builder().args(text).level(Level::Info).file(Some(file)).line(Some(number)).build();
    // Whoever does not read it is not told.
    let _ = io::stderr().write_all(&line(clock::now().wall, &record));
}

/// The line for a record, its newline included.
fn line(now: Wall, record: &Record<'_>) -> Vec<u8> {
    let level = level_name(record.level());
    let mut msg = record.args().to_string();
    if msg.len() > MESSAGE_BYTES_MAX {
        msg.truncate((0..=MESSAGE_BYTES_MAX).rev().find(|&at| msg.is_char_boundary(at)).unwrap_or(0));
        msg.push_str(" (cut off)");
    }
    let caller = caller(record.file().unwrap_or("?"), record.line().unwrap_or(0));
    let line = Line { level, ts: &timestamp(now), caller: &caller, msg: &msg };
    // Four strings always serialise.
    let mut bytes = serde_json::to_vec(&line).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warn => "warn",
        Level::Info => "info",
        Level::Debug | Level::Trace => "debug",
    }
}

/// `dir/file:line`: the last two parts of the source path.
fn caller(file: &str, line: u32) -> String {
    let start = file.rmatch_indices('/').nth(1).map_or(0, |(at, _)| at + 1);
    format!("{}:{line}", &file[start..])
}

/// UTC with milliseconds: `2024-01-31T10:00:00.000Z`.
fn timestamp(now: Wall) -> String {
    let millis = now.as_unix_nanos().rem_euclid(1_000_000_000) / 1_000_000;
    format!("{}.{millis:03}Z", now.to_string().trim_end_matches('Z'))
}

enum Sink {
    Stderr,
    Stdout,
    File(RotatingFile),
}

/// Takes whole lines only: the logger hands over each record with one call.
impl Write for Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let written = match self {
            Sink::Stderr => Ok(()),
            // Unbuffered, for the same reason as the file.
            Sink::Stdout => io::stdout().write_all(line).and_then(|()| io::stdout().flush()),
            Sink::File(file) => file.write_line(line),
        };
        if matches!(self, Sink::Stderr) || written.is_err() {
            io::stderr().write_all(line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct RotatingFile {
    path: PathBuf,
    file: File,
    bytes_max: u64,
}

impl RotatingFile {
    /// Opens the file for appending; makes its directory (0755) and itself (0600) if need be.
    fn open(path: &Path, bytes_max: u64) -> Result<RotatingFile> {
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(directory)
                .with_context(|| format!("create directory {}", directory.display()))?;
        }
        let file = open_append(path, 0o600).with_context(|| format!("open {}", path.display()))?;
        Ok(RotatingFile { path: path.to_owned(), file, bytes_max })
    }

    fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        let metadata = self.file.metadata()?;
        let full = metadata.len() > 0 && metadata.len() + line.len() as u64 > self.bytes_max;
        // Without a name the file was deleted under us; lines in it would be lost.
        if (full || metadata.nlink() == 0)
            && let Err(error) = self.rotate()
        {
            let _ = writeln!(io::stderr(), "rotate {}: {error}", self.path.display());
        }
        self.file.write_all(line)
    }

    /// Puts the full file aside, or follows whoever did. When the lock is taken somebody is at it this moment: then the line
    /// goes where it would have gone, a little over the limit, instead of waiting.
    fn rotate(&mut self) -> Result<()> {
        if self.file.try_lock().is_err() {
            return Ok(());
        }
        let old = self.file.metadata()?;
        let is_current =
            std::fs::metadata(&self.path).is_ok_and(|named| (named.dev(), named.ino()) == (old.dev(), old.ino()));
        let fresh = if is_current {
            self.put_aside(clock::now().wall, &old)
        } else {
            open_append(&self.path, old.mode() & 0o777).map_err(Error::from)
        };
        // The lock belongs to the open file, which another descriptor of this process may share.
        let _ = self.file.unlock();
        self.file = fresh.with_context(|| format!("open {}", self.path.display()))?;
        Ok(())
    }

    /// Renames the full file and opens a new one with its mode and owner. Called with the lock held.
    fn put_aside(&self, now: Wall, old: &std::fs::Metadata) -> Result<File> {
        let backup = backup_path(&self.path, now);
        if backup.exists() {
            return Err(Error::new(format!("{} exists already", backup.display()))); // twice in one millisecond
        }
        std::fs::rename(&self.path, &backup).with_context(|| format!("rename to {}", backup.display()))?;
        let file = open_append(&self.path, old.mode() & 0o777)?;
        file.set_permissions(std::fs::Permissions::from_mode(old.mode() & 0o777))?;
        let owner = file.metadata()?;
        if (owner.uid(), owner.gid()) != (old.uid(), old.gid()) {
            std::os::unix::fs::fchown(&file, Some(old.uid()), Some(old.gid()))?;
        }
        if let Err(error) = prune(&self.path, now) {
            let _ = writeln!(io::stderr(), "remove old files of {}: {error}", self.path.display());
        }
        Ok(file)
    }
}

fn open_append(path: &Path, mode: u32) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(mode).open(path)
}

/// `plugin.log` becomes `plugin-2024-01-31T10-00-00.000.log`.
fn backup_path(path: &Path, now: Wall) -> PathBuf {
    let (stem, extension) = name_parts(path);
    let time = timestamp(now).trim_end_matches('Z').replace(':', "-");
    path.with_file_name(format!("{stem}-{time}{extension}"))
}

/// The file's name without its extension, and the extension with its dot.
fn name_parts(path: &Path) -> (String, String) {
    let text = |part: Option<&std::ffi::OsStr>| part.map(|part| part.to_string_lossy().into_owned());
    let extension = text(path.extension()).map_or_else(String::new, |extension| format!(".{extension}"));
    (text(path.file_stem()).unwrap_or_default(), extension)
}

/// When a file of this name was rotated, if it is a backup of ours; compressed ones of other programs count as well.
fn backup_time(name: &str, stem: &str, extension: &str) -> Option<Wall> {
    let rest = name.strip_prefix(stem)?.strip_prefix('-')?;
    let time = rest.strip_suffix(".gz").unwrap_or(rest).strip_suffix(extension)?;
    let (date, clock) = time.split_once('T')?;
    Wall::parse_rfc3339(&format!("{date}T{}Z", clock.replace('-', ":")))
}

/// Removes backups that are too many or too old.
fn prune(path: &Path, now: Wall) -> Result<()> {
    let (stem, extension) = name_parts(path);
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut backups = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if let Some(time) = backup_time(&entry.file_name().to_string_lossy(), &stem, &extension) {
            backups.push((time, entry.path()));
        }
    }
    order::sort(&mut backups);
    backups.reverse(); // the newest first
    for (rank, (time, backup)) in backups.iter().enumerate() {
        if rank >= BACKUPS_MAX || now.since(*time) > BACKUP_AGE_MAX {
            std::fs::remove_file(backup).with_context(|| format!("remove {}", backup.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Directory {
            let path = std::env::temp_dir().join(format!("enibox-log-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Directory(path)
        }

        fn names(&self) -> Vec<String> {
            let entries = std::fs::read_dir(&self.0).unwrap();
            let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_line_is_one_json_object() {
        let now = Wall::from_unix_nanos(1_706_695_200_007_000_000);
        let record = Record::builder()
            .level(Level::Warn)
            .file(Some("src/plugin/aws_cni.rs"))
            .line(Some(12))
            .args(format_args!("a \"quoted\"\nline"))
            .build();
        assert_eq!(
            String::from_utf8(line(now, &record)).unwrap(),
            "{\"level\":\"warn\",\"ts\":\"2024-01-31T10:00:00.007Z\",\"caller\":\"plugin/aws_cni.rs:12\",\
             \"msg\":\"a \\\"quoted\\\"\\nline\"}\n"
        );
    }

    #[test]
    fn a_line_of_text_stays_one_line() {
        let now = Wall::from_unix_nanos(1_706_695_200_007_000_000);
        let check = |level: Level, wanted: &str| {
            let args = format_args!("a \"quoted\"\nline");
            assert_eq!(text_line(now, &Record::builder().level(level).args(args).build()), wanted);
        };
        check(Level::Info, "time=\"2024-01-31T10:00:00Z\" level=info msg=\"a \\\"quoted\\\"\\nline\"\n");
        check(Level::Warn, "time=\"2024-01-31T10:00:00Z\" level=warning msg=\"a \\\"quoted\\\"\\nline\"\n");
    }

    #[test]
    fn long_messages_are_cut_at_a_character() {
        let text = "ä".repeat(MESSAGE_BYTES_MAX);
        let bytes = line(Wall::default(), &Record::builder().args(format_args!("x{text}")).build());
        assert!(bytes.len() < MESSAGE_BYTES_MAX + 200);
        let value: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert!(value["msg"].as_str().unwrap().ends_with("ä (cut off)"));
    }

    #[test]
    fn callers_have_two_parts() {
        assert_eq!(caller("src/plugin/mod.rs", 3), "plugin/mod.rs:3");
        assert_eq!(caller("src/main.rs", 3), "src/main.rs:3");
        assert_eq!(caller("main.rs", 3), "main.rs:3");
    }

    #[test]
    fn levels_are_read_in_any_case() {
        for (text, wanted) in [
            ("DEBUG", LevelFilter::Debug),
            ("Info", LevelFilter::Info),
            ("warn", LevelFilter::Warn),
            ("error", LevelFilter::Error),
            ("fatal", LevelFilter::Error),
            ("", LevelFilter::Debug),
            ("verbose", LevelFilter::Debug),
        ] {
            assert_eq!(level_filter(text), wanted, "{text}");
        }
    }

    #[test]
    fn a_full_file_is_put_aside_with_its_mode() {
        let directory = Directory::new("rotate");
        let path = directory.0.join("deep/er/plugin.log");
        let mut file = RotatingFile::open(&path, 100).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        file.write_line(&[b'a'; 90]).unwrap();
        file.write_line(b"b\n").unwrap();
        assert_eq!(path.metadata().unwrap().len(), 92);
        file.write_line(&[b'c'; 50]).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [b'c'; 50]);
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o640);
        let names = std::fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(names, 2);
    }

    #[test]
    fn another_process_rotating_is_followed() {
        let directory = Directory::new("follow");
        let path = directory.0.join("plugin.log");
        let mut one = RotatingFile::open(&path, 100).unwrap();
        let mut other = RotatingFile::open(&path, 100).unwrap();
        one.write_line(&[b'a'; 99]).unwrap();
        one.write_line(b"one\n").unwrap();
        other.write_line(b"other\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one\nother\n");
        assert_eq!(directory.names().len(), 2);
        std::fs::remove_file(&path).unwrap();
        other.write_line(b"again\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"again\n");
    }

    #[test]
    fn many_writers_lose_no_line() {
        const WRITERS: usize = 8;
        const LINES: usize = 100;
        let directory = Directory::new("many");
        let path = directory.0.join("plugin.log");
        std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                let path = path.clone();
                scope.spawn(move || {
                    for number in 0..LINES {
                        // Opened anew for each line, as a short-lived process does. Few enough rotations for the backups kept.
                        let mut file = RotatingFile::open(&path, 4000).unwrap();
                        file.write_line(format!("line {writer:02} {number:03} end\n").as_bytes()).unwrap();
                    }
                });
            }
        });
        let mut lines = Vec::new();
        for name in directory.names() {
            let text = std::fs::read_to_string(directory.0.join(name)).unwrap();
            lines.extend(text.lines().map(str::to_owned));
        }
        lines.sort();
        let wanted: Vec<_> =
            (0..WRITERS).flat_map(|w| (0..LINES).map(move |n| format!("line {w:02} {n:03} end"))).collect();
        assert_eq!(lines, wanted);
    }

    #[test]
    fn old_and_surplus_backups_go() {
        let directory = Directory::new("prune");
        let path = directory.0.join("plugin.log");
        let now = Wall::parse_rfc3339("2024-03-15T00:00:00Z").unwrap();
        for name in [
            "plugin-2024-01-01T00-00-00.000.log",
            "plugin-2024-02-01T00-00-00.000.log.gz",
            "plugin-2024-03-01T00-00-00.000.log",
            "plugin-2024-03-02T00-00-00.000.log",
            "plugin-2024-03-03T00-00-00.000.log.gz",
            "plugin-2024-03-04T00-00-00.000.log",
            "plugin-2024-03-05T00-00-00.000.log",
            "plugin-2024-03-06T00-00-00.000.log",
            "plugin-of-somebody-else.log",
            "other-2024-01-01T00-00-00.000.log",
        ] {
            std::fs::write(directory.0.join(name), "").unwrap();
        }
        prune(&path, now).unwrap();
        assert_eq!(
            directory.names(),
            [
                "other-2024-01-01T00-00-00.000.log",
                "plugin-2024-03-02T00-00-00.000.log",
                "plugin-2024-03-03T00-00-00.000.log.gz",
                "plugin-2024-03-04T00-00-00.000.log",
                "plugin-2024-03-05T00-00-00.000.log",
                "plugin-2024-03-06T00-00-00.000.log",
                "plugin-of-somebody-else.log",
            ]
        );
    }

    #[test]
    fn a_backup_is_named_by_its_time() {
        let now = Wall::from_unix_nanos(1_706_695_200_007_000_000);
        let path = backup_path(Path::new("/var/log/aws-routed-eni/plugin.log"), now);
        assert_eq!(path, Path::new("/var/log/aws-routed-eni/plugin-2024-01-31T10-00-00.007.log"));
        assert_eq!(backup_time(path.file_name().unwrap().to_str().unwrap(), "plugin", ".log"), Some(now));
    }
}
