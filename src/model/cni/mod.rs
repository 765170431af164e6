//! CNI configuration, arguments, results and errors, per version (`spec/plugin.md` 1 to 3, 12; CNI specification 1.1.0).
//!
//! Everything here is text in, values out and back. JSON is taken apart by hand where the specification lets a field be
//! absent, null, a string or a number, because configurations in the field do all of these. Nothing reads the
//! environment or prints.

mod args;
mod config;
mod egress;
mod error;
mod result;

pub use args::Args;
pub use config::{Attachment, Config, DEFAULT_MTU, EnforcingMode, Envelope, MULTI_NIC_ANNOTATION};
pub use egress::{EgressConfig, HOST_LOCAL, Ipam, Range};
pub use error::{CniError, code};
pub use result::{Dns, Interface, IpConfig, Output, Route};

use std::fmt;

/// A version of the CNI specification that we speak, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "the names are the versions")]
pub enum Version {
    V0_1_0,
    V0_2_0,
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

/// Versions whose results have the same shape; a `prevResult` is understood only within its family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// 0.1.0, 0.2.0: one address per family, no interfaces.
    Single,
    /// 0.3.0 to 0.4.0: lists; every address says its family.
    Tagged,
    /// 1.0.0 and later: lists; the address speaks for itself.
    Plain,
}

impl Version {
    /// Every supported version, oldest first.
    pub const ALL: [Version; 7] = [
        Version::V0_1_0,
        Version::V0_2_0,
        Version::V0_3_0,
        Version::V0_3_1,
        Version::V0_4_0,
        Version::V1_0_0,
        Version::V1_1_0,
    ];
    /// The newest supported version.
    pub const NEWEST: Version = Version::V1_1_0;

    /// The version as it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Version::V0_1_0 => "0.1.0",
            Version::V0_2_0 => "0.2.0",
            Version::V0_3_0 => "0.3.0",
            Version::V0_3_1 => "0.3.1",
            Version::V0_4_0 => "0.4.0",
            Version::V1_0_0 => "1.0.0",
            Version::V1_1_0 => "1.1.0",
        }
    }

    /// Reads a version. Empty stands for 0.1.0, the version before there was a field for it; otherwise the text must be
    /// exactly one of [`Version::ALL`].
    pub fn parse(text: &str) -> Option<Version> {
        if text.is_empty() {
            return Some(Version::V0_1_0);
        }
        Version::ALL.into_iter().find(|version| version.as_str() == text)
    }

    /// The shape of results of this version.
    pub fn shape(self) -> Shape {
        match self {
            Version::V0_1_0 | Version::V0_2_0 => Shape::Single,
            Version::V0_3_0 | Version::V0_3_1 | Version::V0_4_0 => Shape::Tagged,
            Version::V1_0_0 | Version::V1_1_0 => Shape::Plain,
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What `CNI_COMMAND` may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names are the verbs of the CNI specification")]
pub enum Command {
    Add,
    Del,
    Check,
    Status,
    Gc,
    Version,
}

impl Command {
    /// Every command.
    pub const ALL: [Command; 6] =
        [Command::Add, Command::Del, Command::Check, Command::Status, Command::Gc, Command::Version];

    /// The verb as `CNI_COMMAND` has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Command::Add => "ADD",
            Command::Del => "DEL",
            Command::Check => "CHECK",
            Command::Status => "STATUS",
            Command::Gc => "GC",
            Command::Version => "VERSION",
        }
    }

    /// Reads the verb, which is case-sensitive.
    pub fn parse(text: &str) -> Option<Command> {
        Command::ALL.into_iter().find(|command| command.as_str() == text)
    }

    /// The oldest version of a configuration that may be used with the command.
    pub fn since(self) -> Version {
        match self {
            Command::Add | Command::Del | Command::Version => Version::V0_1_0,
            Command::Check => Version::V0_4_0,
            Command::Status | Command::Gc => Version::V1_1_0,
        }
    }
}

/// Whether `text` may be a container id or a network name: `^[a-zA-Z0-9][a-zA-Z0-9_.\-]*$`.
pub fn is_valid_id(text: &str) -> bool {
    text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// Why `text` cannot name an interface; `None` when it can. The rules are the kernel's (`dev_valid_name`).
pub fn bad_ifname(text: &str) -> Option<&'static str> {
    if text.is_empty() {
        Some("interface name is empty")
    } else if text.len() > 15 {
        Some("interface name is too long; maximum is 15")
    } else if text == "." || text == ".." {
        Some("interface name is . or ..")
    } else if text.chars().any(|c| c == '/' || c == ':' || c.is_whitespace()) {
        Some("interface name contains / or : or whitespace characters")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_matched_exactly() {
        for version in Version::ALL {
            assert_eq!(Version::parse(version.as_str()), Some(version));
        }
        assert_eq!(Version::parse(""), Some(Version::V0_1_0));
        for bad in ["0.3", "1.2.0", "v1.0.0", "1.0.0 ", "9.9.9", "1.1.0-rc1"] {
            assert_eq!(Version::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn ids_follow_the_pattern() {
        for good in ["a", "0", "cni-5a1f", "6f2c_0d.e1", "aws-cni"] {
            assert!(is_valid_id(good), "{good}");
        }
        for bad in ["", "-a", ".a", "_a", "a b", "a/b", "a:b", "ä", "a\n"] {
            assert!(!is_valid_id(bad), "{bad:?}");
        }
    }

    #[test]
    fn interface_names_are_those_of_the_kernel() {
        for good in ["eth0", "a", "fifteen-bytes-x", "e.1", "..."] {
            assert_eq!(bad_ifname(good), None, "{good}");
        }
        for bad in ["", ".", "..", "sixteen-bytes-xx", "a/b", "a:1", "a b", "a\tb", "a\u{a0}b"] {
            assert!(bad_ifname(bad).is_some(), "{bad:?}");
        }
    }

    #[test]
    fn commands_are_case_sensitive() {
        for command in Command::ALL {
            assert_eq!(Command::parse(command.as_str()), Some(command));
        }
        assert_eq!(Command::parse("add"), None);
        assert_eq!(Command::parse(""), None);
    }
}
