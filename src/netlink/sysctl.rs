//! Network sysctls: text files under `/proc/sys/net`, which shows the namespace of the thread that opens it. For another
//! namespace call these inside [`Namespace::run`](super::netns::Namespace::run).
//!
//! Paths are given as the kernel documents them with slashes, `net/ipv4/ip_forward`, because device names may hold dots.

use crate::error::{Context, Error, Result};
use std::path::PathBuf;

fn file(path: &str) -> Result<PathBuf> {
    let plain = path.starts_with("net/") && path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if plain {
        Ok(PathBuf::from("/proc/sys").join(path))
    } else {
        Err(Error::new(format!("sysctl {path:?}: not a path below net/")))
    }
}

/// The value without the newline at its end. [`missing`] tells whether an error means that the kernel has no such sysctl.
pub fn read(path: &str) -> Result<String> {
    let text = std::fs::read_to_string(file(path)?).with_context(|| format!("read sysctl {path}"))?;
    Ok(text.strip_suffix('\n').map(str::to_owned).unwrap_or(text))
}

/// Makes the sysctl hold `value`; true if it did not before. Writes only what differs, and no newline
/// (`spec/dataplane.md` 3): a read-only `/proc/sys` that already holds the right values is good enough.
pub fn set(path: &str, value: &str) -> Result<bool> {
    let file = file(path)?;
    let what = || format!("write {value:?} to sysctl {path}");
    match std::fs::read_to_string(&file) {
        // Several numbers are separated by tabs in what the kernel reports.
        Ok(text) if text.split_whitespace().eq(value.split_whitespace()) => return Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(Error::from(error).context(what())),
        _ => {} // some can only be written
    }
    // No O_CREAT and no O_TRUNC: a sysctl is there or it is not.
    let mut sysctl = std::fs::OpenOptions::new().write(true).open(file).with_context(what)?;
    std::io::Write::write_all(&mut sysctl, value.as_bytes()).with_context(what)?;
    Ok(true)
}

/// Whether an error of [`read`] or [`set`] says that this kernel has no such sysctl (ENOENT): no IPv6, say, or no device of
/// that name.
pub fn missing(error: &Error) -> bool {
    error.errno() == Some(libc::ENOENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_network_sysctls_are_reachable() {
        for bad in ["", "/etc/passwd", "net/../kernel/hostname", "kernel/hostname", "net//x", "net/./x", "net/"] {
            assert!(read(bad).unwrap_err().to_string().contains("not a path below net/"), "{bad}");
        }
    }

    #[test]
    fn a_missing_sysctl_is_told_apart() {
        assert!(missing(&read("net/ipv4/conf/no-such-dev/forwarding").unwrap_err()));
        assert!(missing(&set("net/ipv4/conf/no-such-dev/forwarding", "1").unwrap_err()));
        assert!(!missing(&Error::new("else")));
    }
}
