//! The plugins that the image carries besides our own, copied to the host (`spec/install.md` 3).
//!
//! The host may have some of them already, by its operating system or by an administrator, and perhaps newer ones. Those are
//! not ours to replace. What we have written ourselves we renew: a record in the plugins' folder tells the hashes of it, and
//! what somebody else has changed since has another hash. Of two things it is known without a record: the support script
//! bears this product's name, and what is the beginning of the plugin that is to be installed is a copy that was never
//! finished.

use super::files::{self, Placed};
use crate::error::{Context, Error, Result};
use crate::model::order;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

/// What the record is called. A runtime looks for plugins by name and does not see it.
const RECORD: &str = ".enibox-plugins";
/// A longer record is not ours.
const RECORD_BYTES_MAX: usize = 64 << 10;
/// Files that are looked at; the reference plugins are 18.
const FILES_MAX: usize = 256;
/// The program that is running.
const OWN: &str = "aws-vpc-cni-init";
/// Part of this product, whoever has put it there.
const SUPPORT: &str = "aws-cni-support.sh";
const MODE: u32 = 0o755;
const CHUNK: usize = 64 << 10;

/// Copies the executable regular files of `from` to `to`, but the running program.
///
/// # Errors
/// The first file that could not be placed; those before it are.
pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
    for stray in files::sweep(to) {
        log::info!("Removed {}, which an interrupted start has left", to.join(stray).display());
    }
    let mut record = Record::read(to);
    let (mut names, mut news) = (Vec::new(), false);
    for name in executables(from).context("list the working directory")? {
        let (source, target) = (from.join(&name), to.join(&name));
        match look(&name, &source, &target, &record) {
            There::Foreign => {
                log::info!("Left {} as it is: it was not installed by us", target.display());
                continue;
            }
            There::Ours => news |= record.add(&name, &hash(&source)?),
            There::Same => {}
        }
        names.push(name);
    }
    if news {
        // First, so that it is known again whenever this ends.
        record.write(to)?;
    }
    for name in names {
        let path = to.join(&name);
        match files::put_file(to, &name, &from.join(&name), MODE)? {
            Placed::Written => log::info!("Installed {}", path.display()),
            Placed::Unchanged => log::info!("{} is there already", path.display()),
        }
    }
    Ok(())
}

/// Names of the plugins in the image, in order. Its licence is no executable, and links are of no use elsewhere.
fn executables(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
            continue;
        }
        match entry.file_name().into_string() {
            Ok(name) if name != OWN => names.push(name),
            _ => {} // no plugin has a name that is no text
        }
        if names.len() > FILES_MAX {
            return Err(Error::new(format!("more than {FILES_MAX} executables: this is no folder of plugins")));
        }
    }
    order::sort(&mut names);
    Ok(names)
}

/// What the host has under the name of a plugin.
#[derive(Debug, PartialEq, Eq)]
enum There {
    /// Nothing, something of ours, or something that cannot be a plugin: it may be replaced.
    Ours,
    /// The same content, whoever's it is.
    Same,
    /// Somebody else's.
    Foreign,
}

fn look(name: &str, source: &Path, target: &Path, record: &Record) -> There {
    // Where it cannot be looked at nothing can be placed either, which will be told.
    let Ok(metadata) = fs::symlink_metadata(target) else { return There::Ours };
    if metadata.is_symlink() && name != SUPPORT {
        // It leads to a place of the host that cannot be looked at from a container.
        return There::Foreign;
    }
    if !metadata.is_file() {
        return There::Ours;
    }
    match common(source, target) {
        Ok((same, source, target)) if same == source && same == target => There::Same,
        Ok((same, _, target)) if same == target || name == SUPPORT => There::Ours,
        _ if hash(target).is_ok_and(|hash| record.has(name, &hash)) => There::Ours,
        _ => There::Foreign,
    }
}

/// Bytes that two files have in common from the start, as far as they are compared in whole pieces, and their lengths.
fn common(one: &Path, other: &Path) -> Result<(u64, u64, u64)> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    let lengths = (one.metadata()?.len(), other.metadata()?.len());
    let shorter = lengths.0.min(lengths.1);
    let mut pieces = [vec![0; CHUNK], vec![0; CHUNK]];
    let mut at = 0;
    while at < shorter {
        let length = usize::try_from(shorter - at).unwrap_or(CHUNK).min(CHUNK);
        let [mine, theirs] = &mut pieces;
        one.read_exact_at(&mut mine[..length], at)?;
        other.read_exact_at(&mut theirs[..length], at)?;
        if mine[..length] != theirs[..length] {
            break;
        }
        at += length as u64;
    }
    Ok((at, lengths.0, lengths.1))
}

/// SHA-1 of a file, in hexadecimal digits.
fn hash(path: &Path) -> Result<String> {
    let what = || format!("read {}", path.display());
    let mut file = File::open(path).with_context(what)?;
    let mut hash = sha1_smol::Sha1::new();
    let mut piece = vec![0; CHUNK];
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(hash.digest().to_string()),
            Ok(length) => hash.update(&piece[..length]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).with_context(what),
        }
    }
}

/// What we have written: lines of a hash, a blank and a name, the newest last.
struct Record(Vec<String>);

impl Record {
    /// One that is missing or no text of a proper length is empty: then what differs is somebody else's.
    fn read(folder: &Path) -> Record {
        let mut text = String::new();
        let limit = RECORD_BYTES_MAX as u64;
        let read = File::open(folder.join(RECORD)).and_then(|file| file.take(limit).read_to_string(&mut text));
        let lines = if read.is_ok() { text.lines().map(str::to_owned).collect() } else { Vec::new() };
        Record(lines)
    }

    fn has(&self, name: &str, hash: &str) -> bool {
        self.0.contains(&format!("{hash} {name}"))
    }

    /// Adds a line; false if it is there.
    fn add(&mut self, name: &str, hash: &str) -> bool {
        let new = !self.has(name, hash);
        if new {
            self.0.push(format!("{hash} {name}"));
        }
        new
    }

    /// Writes it, without the oldest lines where there are too many: those plugins have been replaced long ago.
    fn write(&self, folder: &Path) -> Result<()> {
        let mut text = self.0.join("\n") + "\n";
        while text.len() > RECORD_BYTES_MAX {
            let end = text.find('\n').unwrap_or(0);
            text.drain(..=end);
        }
        files::put(folder, RECORD, text.as_bytes(), 0o644).map(drop)
    }
}

#[cfg(test)]
#[path = "plugins_tests.rs"]
mod tests;
