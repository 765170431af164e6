//! Errors as a chain of short phrases, the operation first: `attach eni "eni-1": AttachmentLimitExceeded: ...`.
//!
//! Callers that must branch keep a typed error as the source and find it again with [`Error::find`]
//! (kernel errno, EC2 code, CNI code). Everybody else adds what was being done with [`Context::context`].

use std::fmt;

/// The result of nearly everything that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, outermost phrase first, and the typed error at its root if there is one.
pub struct Error {
    what: String,
    chain: Vec<String>, // phrases added on the way up, innermost first
    source: Option<Box<dyn std::error::Error + Send + Sync + 'static>>,
}

impl Error {
    /// An error that starts here, with no typed cause.
    pub fn new(what: impl Into<String>) -> Self {
        Error { what: what.into(), chain: Vec::new(), source: None }
    }

    /// The typed error at the root, if it is of type `T`.
    pub fn find<T: std::error::Error + 'static>(&self) -> Option<&T> {
        self.source.as_deref().and_then(|source| source.downcast_ref::<T>())
    }

    /// The errno at the root, if the cause was an I/O error of the operating system.
    pub fn errno(&self) -> Option<i32> {
        self.find::<std::io::Error>().and_then(std::io::Error::raw_os_error)
    }

    /// Puts what was being done in front.
    #[must_use]
    pub fn context(mut self, what: impl Into<String>) -> Self {
        self.chain.push(what.into());
        self
    }
}

impl<E: std::error::Error + Send + Sync + 'static> From<E> for Error {
    fn from(source: E) -> Self {
        Error { what: source.to_string(), chain: Vec::new(), source: Some(Box::new(source)) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for phrase in self.chain.iter().rev() {
            write!(f, "{phrase}: ")?;
        }
        f.write_str(&self.what)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Adds context to results.
pub trait Context<T> {
    /// Puts `what` in front of the error.
    fn context(self, what: impl Into<String>) -> Result<T>;
    /// Like [`Context::context`], with the phrase made only when it is needed.
    fn with_context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|error| error.into().context(what))
    }

    fn with_context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| error.into().context(what()))
    }
}

/// Collects the errors of a teardown that carries on: as much as possible is cleaned, everything that failed is told.
#[derive(Debug, Default)]
pub struct List(Vec<Error>);

impl List {
    /// An empty list.
    pub fn new() -> Self {
        List::default()
    }

    /// Remembers the error of `result`, if any, and goes on.
    pub fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.0.push(error)).ok()
    }

    /// `Ok` if nothing failed, else one error that names all.
    pub fn into_result(self) -> Result<()> {
        let mut errors = self.0;
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Error::new(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))),
        }
    }
}

/// Exit codes of every personality (`design.md` 8).
pub mod exit {
    /// All went well.
    pub const OK: u8 = 0;
    /// Something failed.
    pub const FAILURE: u8 = 1;
    /// The command line was wrong.
    pub const USAGE: u8 = 2;
    /// The command worked and found a difference.
    pub const DIFFERS: u8 = 3;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phrases_stand_outermost_first() {
        let error = Error::new("no such device").context("set mtu").context("set up eni \"eni-1\"");
        assert_eq!(error.to_string(), "set up eni \"eni-1\": set mtu: no such device");
    }

    #[test]
    fn the_typed_root_is_found_through_context() {
        let result: std::result::Result<(), _> = Err(std::io::Error::from_raw_os_error(17));
        let error = result.context("add rule").unwrap_err();
        assert_eq!(error.errno(), Some(17));
        assert!(error.to_string().starts_with("add rule: "));
    }

    #[test]
    fn a_list_tells_every_failure() {
        let mut list = List::new();
        assert_eq!(list.note(Ok(5)), Some(5));
        list.note::<()>(Err(Error::new("a")));
        list.note::<()>(Err(Error::new("b")));
        assert_eq!(list.into_result().unwrap_err().to_string(), "a; b");
        assert!(List::new().into_result().is_ok());
    }
}
