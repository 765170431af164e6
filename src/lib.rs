//! enibox: the Amazon VPC CNI for Kubernetes as one static executable.
//!
//! Layers, each importing only what stands above it (`tests/tidy.rs` holds them to it):
//!
//! ```text
//! error
//! model                      types and parsing: no I/O, no clock
//! plan                       decisions: (state, observation, now) -> new state and effects
//! sim                        a VPC and its nodes in virtual time, with the real core
//! http                       requests to others, over TLS
//! netlink   rpc   aws   kube the kernel, the wire, AWS, the API server; each knows only model
//! apply                      carries out plans on the kernel
//! plugin   install   probe   daemon   debug   sandbox      the personalities; never import each other
//! ```
//!
//! `clock`, `logging` and `sys` touch the outside and are never used by `model` or `plan`.

pub mod apply;
pub mod aws;
pub mod clock;
pub mod daemon;
pub mod debug;
pub mod error;
pub mod http;
pub mod install;
pub mod kube;
pub mod logging;
pub mod model;
pub mod netlink;
pub mod plan;
pub mod plugin;
pub mod probe;
pub mod rpc;
#[cfg(feature = "sandbox")]
pub mod sandbox;
pub mod sim;
pub mod sys;

/// The program's version, told to EC2 and printed by every personality.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
