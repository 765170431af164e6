//! What is laid on a host: the init container as a runtime starts it, with a metadata service that answers, lies or is silent;
//! and the node's container on a node of the sandbox.

mod container;
mod init;
mod init_trouble;
#[cfg(feature = "sandbox")]
mod node;
#[path = "../support/mod.rs"]
mod support;
