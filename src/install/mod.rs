//! What is laid on a host before the daemon can serve, and in which order (`spec/install.md`): files in the folders that
//! the kubelet's runtime reads, and the sysctls of the node.
//!
//! A runtime may look into these folders at any moment and a container may be killed at any moment, so that every file is
//! either the old one or the new one, whole. Installing must not touch what is somebody else's, and must not do twice what
//! holds already: a second start with nothing to do writes nothing.

pub mod chain;
pub mod conflist;
pub mod environment;
pub mod files;
pub mod init;
mod json;
mod metadata;
pub mod node;
mod plugins;
