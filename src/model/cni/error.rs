//! Errors as the runtime reads them from standard output.

use serde::Serialize;
use std::fmt;

/// Codes of the CNI specification, of its Go library where runtimes rely on them, and our own from 100 on.
pub mod code {
    /// The configuration's version is not supported.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// An environment variable is missing or invalid.
    pub const BAD_ENVIRONMENT: u32 = 4;
    /// Standard input or output failed.
    pub const IO: u32 = 5;
    /// The configuration is no JSON.
    pub const DECODE: u32 = 6;
    /// The configuration is invalid.
    pub const INVALID_CONFIG: u32 = 7;
    /// `CNI_NETNS` cannot be used.
    pub const INVALID_NETNS: u32 = 8;
    /// The runtime should try again later: the daemon does not answer, or has no address yet.
    pub const TRY_AGAIN: u32 = 11;
    /// STATUS: no pod can be added now.
    pub const NOT_AVAILABLE: u32 = 50;
    /// The kernel refused part of the pod's network.
    pub const KERNEL: u32 = 100;
    /// The network policy agent did not take the pod.
    pub const POLICY_AGENT: u32 = 101;
    /// The daemon answered with something that cannot be used.
    pub const BAD_REPLY: u32 = 102;
    /// CHECK found differences.
    pub const DIFFERS: u32 = 103;
    /// Garbage collection left something behind.
    pub const INCOMPLETE: u32 = 104;
}

/// A failure with its CNI code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniError {
    /// One of [`code`].
    pub code: u32,
    /// What failed; alerts match the beginnings that `spec/plugin.md` 15 lists.
    pub msg: String,
    /// Further explanation; may be empty.
    pub details: String,
}

#[derive(Serialize)]
struct Document<'a> {
    #[serde(rename = "cniVersion", skip_serializing_if = "str::is_empty")]
    cni_version: &'a str,
    code: u32,
    msg: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    details: &'a str,
}

impl CniError {
    /// An error without details.
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        CniError { code, msg: msg.into(), details: String::new() }
    }

    /// Adds an explanation.
    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    /// The document for standard output, in the indentation of the Go library. `version` is that of the configuration, as
    /// far as it was understood.
    pub fn to_json(&self, version: &str) -> String {
        let document = Document { cni_version: version, code: self.code, msg: &self.msg, details: &self.details };
        super::result::indent(&document)
    }
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.msg, self.code)?;
        if self.details.is_empty() { Ok(()) } else { write!(f, ": {}", self.details) }
    }
}

impl std::error::Error for CniError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_what_runtimes_parse() {
        let error =
            CniError::new(code::INCOMPATIBLE_VERSION, "incompatible CNI versions").with_details("config is \"9\"");
        assert_eq!(
            error.to_json("1.1.0"),
            "{\n    \"cniVersion\": \"1.1.0\",\n    \"code\": 1,\n    \"msg\": \"incompatible CNI versions\",\n    \
             \"details\": \"config is \\\"9\\\"\"\n}"
        );
        assert_eq!(CniError::new(4, "x").to_json(""), "{\n    \"code\": 4,\n    \"msg\": \"x\"\n}");
    }
}
