//! Files on the host, placed whole or not at all (`spec/install.md` 6).
//!
//! A temporary in the same folder is written, given its mode, synced and renamed over the target: a runtime never sees half
//! of a plugin nor one that it may not execute, a plugin that runs goes on running from the old file, and the new file takes
//! the SELinux label of the folder, which one renamed from elsewhere would not. A target that is a symbolic link is replaced
//! itself; what it points to is never touched. Folders are not made: they are mounts of the host, and one that is missing is
//! a mistake to tell.
//!
//! Temporaries are named at random, because process ids are the same in every container, and are locked while they are at
//! work, so that [`sweep`] can tell those of the dead. They end in `.tmp`, which no runtime loads as a configuration.

use crate::error::{Context, Error, Result};
use crate::sys;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// How a temporary's name starts and ends; sixteen hexadecimal digits stand between.
const TEMPORARY: (&str, &str) = (".enibox-", ".tmp");
/// How often a file is begun anew because its temporary was swept away in the moment between its making and its locking.
const ATTEMPTS: u32 = 4;
/// Bytes that are read at a time.
const CHUNK: usize = 64 << 10;

/// What placing a file came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// The target is new.
    Written,
    /// The target had this content and this mode already: nothing was written.
    Unchanged,
}

/// Places `content` as `folder/name` with exactly this mode.
///
/// # Errors
/// The operation, the path and the cause; then the target is as it was, and no temporary is left.
pub fn put(folder: &Path, name: &str, content: &[u8], mode: u32) -> Result<Placed> {
    place(folder, name, &Content::Bytes(content), mode)
}

/// Places a copy of the regular file `source` (links are followed) as `folder/name` with exactly this mode.
///
/// # Errors
/// As [`put`]; and when the source is no regular file or gets shorter meanwhile.
pub fn put_file(folder: &Path, name: &str, source: &Path, mode: u32) -> Result<Placed> {
    let what = || format!("read {}", source.display());
    // A named pipe would block here until somebody writes.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(source).with_context(what)?;
    let metadata = file.metadata().with_context(what)?;
    if !metadata.is_file() {
        return Err(Error::new("not a regular file").context(what()));
    }
    place(folder, name, &Content::File(&file, metadata.len(), source), mode)
}

/// Makes `folder/name` a hard link of `folder/existing`. Where the file system has no hard links it becomes a copy, and the
/// log says so.
///
/// # Errors
/// As [`put`].
pub fn link(folder: &Path, name: &str, existing: &str) -> Result<Placed> {
    let (target, source) = (folder.join(name), folder.join(existing));
    let what = || format!("link {} to {}", target.display(), source.display());
    let of = fs::symlink_metadata(&source).with_context(what)?;
    if !of.is_file() {
        return Err(Error::new(format!("{existing} is not a regular file")).context(what()));
    }
    if fs::symlink_metadata(&target).is_ok_and(|old| (old.dev(), old.ino()) == (of.dev(), of.ino())) {
        return Ok(Placed::Unchanged);
    }
    let mut attempt = 1;
    loop {
        let temporary = Temporary(folder.join(temporary_name()?));
        let linked = fs::hard_link(&source, &temporary.0).and_then(|()| fs::rename(&temporary.0, &target));
        match linked {
            Ok(()) => break,
            // Somebody who swept took it for a dead one's: a link cannot be locked apart from its file.
            Err(error) if error.kind() == io::ErrorKind::NotFound && attempt < ATTEMPTS => attempt += 1,
            Err(error) if has_no_links(&error) => {
                log::info!("{}: {error}; copying it instead", what());
                return put_file(folder, name, &source, of.mode() & 0o7777);
            }
            Err(error) => return Err(Error::from(error).context(what())),
        }
        // When somebody else made the same link meanwhile, rename(2) does nothing and leaves the temporary, whose name goes
        // as the value does.
    }
    sync_folder(folder)?;
    Ok(Placed::Written)
}

/// Removes temporaries of ours whose process ended before it could; returns their names. What cannot be removed or is in use
/// stays: a temporary hinders nobody.
pub fn sweep(folder: &Path) -> Vec<String> {
    let mut removed = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !is_temporary(&name) || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        let path = entry.path();
        let Ok(file) = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path) else { continue };
        // Whoever writes holds the lock; one that was renamed meanwhile has this name no longer.
        if file.try_lock().is_ok() && fs::remove_file(&path).is_ok() {
            removed.push(name);
        }
    }
    removed
}

fn is_temporary(name: &str) -> bool {
    let middle = name.strip_prefix(TEMPORARY.0).and_then(|rest| rest.strip_suffix(TEMPORARY.1));
    middle.is_some_and(|digits| digits.len() == 16 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn temporary_name() -> Result<String> {
    let mut bytes = [0; 8];
    sys::random_bytes(&mut bytes).context("read random bytes")?;
    Ok(format!("{}{:016x}{}", TEMPORARY.0, u64::from_ne_bytes(bytes), TEMPORARY.1))
}

/// Whether the error of link(2) says that this file system, or its rules, make no hard link of this file.
fn has_no_links(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS | libc::EMLINK | libc::EXDEV))
}

/// What a file shall hold.
enum Content<'a> {
    Bytes(&'a [u8]),
    /// An open file, its length and its path.
    File(&'a File, u64, &'a Path),
}

impl Content<'_> {
    /// Hands over all of it in order, in pieces with their offsets, until `take` says that it has seen enough.
    fn pieces(&self, take: &mut dyn FnMut(u64, &[u8]) -> Result<bool>) -> Result<()> {
        let (file, length, path) = match self {
            Content::Bytes(bytes) => return take(0, bytes).map(drop),
            Content::File(file, length, path) => (file, *length, path),
        };
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        while at < length {
            let piece = usize::try_from(length - at).unwrap_or(CHUNK).min(CHUNK);
            let piece = &mut buffer[..piece];
            file.read_exact_at(piece, at).with_context(|| format!("read {}", path.display()))?;
            if !take(at, piece)? {
                break;
            }
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn length(&self) -> u64 {
        match self {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::File(_, length, _) => *length,
        }
    }
}

fn place(folder: &Path, name: &str, content: &Content<'_>, mode: u32) -> Result<Placed> {
    let target = folder.join(name);
    let what = || format!("install {}", target.display());
    if holds(&target, content, mode).with_context(what)? {
        return Ok(Placed::Unchanged);
    }
    let (temporary, file, locked) = create_temporary(folder).with_context(what)?;
    fill(&temporary.0, &file, content, mode).with_context(what)?;
    // A file that somebody has open for writing cannot be executed.
    drop(file);
    fs::rename(&temporary.0, &target)
        .with_context(|| format!("rename {} to {name}", temporary.0.display()))
        .with_context(what)?;
    drop(locked);
    sync_folder(folder).with_context(what)?;
    Ok(Placed::Written)
}

/// Whether the target is a regular file with this content and this mode.
fn holds(target: &Path, content: &Content<'_>, mode: u32) -> Result<bool> {
    let same = |old: &fs::Metadata| old.is_file() && old.len() == content.length() && old.mode() & 0o7777 == mode;
    if !fs::symlink_metadata(target).is_ok_and(|old| same(&old)) {
        return Ok(false);
    }
    // One that cannot be read is replaced.
    let Ok(old) = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(target) else {
        return Ok(false);
    };
    let mut equal = true;
    let mut buffer = vec![0; CHUNK];
    content.pieces(&mut |at, piece| {
        for (part, start) in piece.chunks(CHUNK).zip((at..).step_by(CHUNK)) {
            let there = &mut buffer[..part.len()];
            equal = equal && old.read_exact_at(there, start).is_ok() && there == part;
        }
        Ok(equal)
    })?;
    Ok(equal)
}

/// A name that goes with the value; nothing happens when it is gone already.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // What is left is swept by the next start.
        fs::remove_file(&self.0).ok();
    }
}

/// A new file, open for writing, and the descriptor that holds its lock. The lock has one of its own, because it must last
/// beyond the one for writing.
fn create_temporary(folder: &Path) -> Result<(Temporary, File, File)> {
    let mut attempt = 1;
    loop {
        let path = folder.join(temporary_name()?);
        let what = || format!("create {}", path.display());
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = match made {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < ATTEMPTS => {
                attempt += 1;
                continue;
            }
            other => other.with_context(what)?,
        };
        let temporary = Temporary(path.clone());
        // Between the making and the locking somebody may sweep it away; then it is begun anew.
        let kept = File::open(&path).and_then(|locked| match locked.try_lock() {
            Err(TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
            // On a file system without locks nobody gets one to sweep with either.
            Ok(()) | Err(TryLockError::Error(_)) => Ok((file.metadata()?.nlink() > 0).then_some(locked)),
        });
        match kept {
            Ok(Some(locked)) => return Ok((temporary, file, locked)),
            _ if attempt < ATTEMPTS => attempt += 1,
            Ok(None) => return Err(Error::new("somebody removes it again and again").context(what())),
            Err(error) => return Err(Error::from(error).context(what())),
        }
    }
}

fn fill(path: &Path, mut file: &File, content: &Content<'_>, mode: u32) -> Result<()> {
    content.pieces(&mut |_, piece| {
        file.write_all(piece).with_context(|| format!("write {}", path.display()))?;
        Ok(true)
    })?;
    // Not by the mode of open(2), which the umask cuts down.
    file.set_permissions(Permissions::from_mode(mode)).with_context(|| format!("set mode of {}", path.display()))?;
    file.sync_all().with_context(|| format!("sync {}", path.display()))
}

/// Makes the new name last. A file system that cannot says EINVAL, and then nobody can do better.
fn sync_folder(folder: &Path) -> Result<()> {
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        Err(error) if error.raw_os_error() != Some(libc::EINVAL) => {
            Err(error).with_context(|| format!("sync {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
