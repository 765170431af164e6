//! What is laid on a host: the init container as a runtime starts it, with a metadata service that answers, lies or is silent.

mod container;
mod init;
mod init_trouble;
#[path = "../support/mod.rs"]
mod support;
