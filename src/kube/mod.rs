//! The Kubernetes API server: one blocking client, watches of single kinds, events (`spec/kubernetes.md`). Knows only
//! `model`.
//!
//! Paths are fixed, objects are read as JSON values for the few fields that are used, and nothing is cached but the last
//! good ENIConfigs. Every request has a deadline. Nothing here knows pods' networks or the pool, and nothing decides: what
//! to do without an API server is the caller's.

pub mod client;
pub mod config;
pub mod events;
mod kubeconfig;
pub mod objects;
mod split;
pub mod watch;

pub use client::{Client, Trouble};
pub use config::Config;
pub use watch::{Seen, Watch};

use crate::sys;

// A random number below `limit`, for jitter. A kernel that has no randomness to give costs the jitter, nothing else.
fn random_below(limit: u64) -> u64 {
    let mut bytes = [0; 8];
    match sys::random_bytes(&mut bytes) {
        Ok(()) if limit > 0 => u64::from_ne_bytes(bytes) % limit,
        _ => 0,
    }
}

#[cfg(test)]
#[cfg(feature = "sandbox")]
mod tests;
