//! Calls another plugin of the host to give or take addresses, as `libcni` does (`spec/egress.md` 7): where `ipam.type` is
//! none of ours.

use crate::clock;
use crate::error::{Context, Error, Result};
use crate::model::cni::{Output, Version};
use crate::sys;
use serde_json::Value;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long it may take.
const TIMEOUT: Duration = Duration::from_mins(1);
/// Bytes that are taken of each of its outputs.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// The file may be in the middle of being replaced.
const STARTS_MAX: u32 = 5;
const START_PAUSE: Duration = Duration::from_secs(1);
/// Between two looks whether it has ended.
const WAIT_PAUSE: Duration = Duration::from_millis(1);

/// Runs the plugin `name` for `command` with our own environment and this configuration; what it printed.
pub fn call(name: &str, command: &str, config: &[u8]) -> Result<Vec<u8>> {
    let program = find(name)?;
    let mut start = Command::new(&program);
    start.env("CNI_COMMAND", command).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let what = || format!("run {}", program.display());
    let mut child = spawn(&mut start).with_context(what)?;
    let end = clock::instant() + TIMEOUT;
    let finished = converse(&mut child, config, end).and_then(|texts| Ok((texts, wait(&mut child, end)?)));
    if finished.is_err() {
        // It may hang; its end is certain then.
        let _ = child.kill();
        let _ = child.wait();
    }
    let ((stdout, stderr), status) = finished.with_context(what)?;
    if status.success() { Ok(stdout) } else { Err(failure(status, &stdout, &stderr)) }
}

/// The result of ADD.
pub fn result(stdout: &[u8], version: Version) -> Result<Output> {
    let value: Value = serde_json::from_slice(stdout).context("read the result")?;
    Output::parse(&value, version).map_err(Error::new)
}

fn find(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("CNI_PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file());
    found
        .filter(|_| !name.is_empty() && !name.contains('/'))
        .ok_or_else(|| Error::new(format!("failed to find plugin {name:?} in path [{}]", path.display())))
}

fn spawn(command: &mut Command) -> std::io::Result<Child> {
    for _ in 1..STARTS_MAX {
        match command.spawn() {
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => std::thread::sleep(START_PAUSE),
            outcome => return outcome,
        }
    }
    command.spawn()
}

/// Waits for its end, which follows that of its outputs unless it has closed them and hangs.
fn wait(child: &mut Child, end: Instant) -> Result<ExitStatus> {
    loop {
        match child.try_wait()? {
            Some(status) => return Ok(status),
            None if clock::instant() >= end => return Err(Error::new(format!("no end within {TIMEOUT:?}"))),
            None => std::thread::sleep(WAIT_PAUSE),
        }
    }
}

/// Writes standard input; reads both outputs to their ends.
fn converse(child: &mut Child, config: &[u8], end: Instant) -> Result<(Vec<u8>, Vec<u8>)> {
    let (Some(mut stdin), Some(mut stdout), Some(mut stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(Error::new("no pipes"));
    };
    // Beside: a pipe holds less than a long configuration, and who has inherited its other end may never read. It ends with us.
    let config = config.to_vec();
    let write = move || drop(stdin.write_all(&config)); // it may end without having read everything
    std::thread::Builder::new().spawn(write).context("start a thread")?;
    let (mut texts, mut open) = ((Vec::new(), Vec::new()), (true, true));
    while open.0 || open.1 {
        let left = end.saturating_duration_since(clock::instant());
        if left.is_zero() || texts.0.len().max(texts.1.len()) > OUTPUT_BYTES_MAX {
            return Err(Error::new(format!("no end within {TIMEOUT:?} and {OUTPUT_BYTES_MAX} bytes")));
        }
        let ready = sys::poll_readable(&[stdout.as_fd(), stderr.as_fd()], left)?;
        if open.0 && ready.first() == Some(&true) {
            open.0 = more(&mut stdout, &mut texts.0)?;
        }
        if open.1 && ready.get(1) == Some(&true) {
            open.1 = more(&mut stderr, &mut texts.1)?;
        }
    }
    Ok(texts)
}

/// False at the end.
fn more(from: &mut dyn Read, to: &mut Vec<u8>) -> std::io::Result<bool> {
    let mut chunk = [0; 4096];
    let count = from.read(&mut chunk)?;
    to.extend_from_slice(&chunk[..count]);
    Ok(count > 0)
}

fn failure(status: ExitStatus, stdout: &[u8], stderr: &[u8]) -> Error {
    let told = serde_json::from_slice::<Value>(stdout).ok();
    let text = |key: &str| told.as_ref()?.get(key)?.as_str().map(str::to_owned).filter(|text| !text.is_empty());
    match (text("msg"), text("details")) {
        (Some(msg), Some(details)) => Error::new(format!("{msg}; {details}")),
        (Some(msg), None) => Error::new(msg),
        _ => Error::new(format!("netplugin failed: {status}: {:?}", String::from_utf8_lossy(stderr).trim())),
    }
}
