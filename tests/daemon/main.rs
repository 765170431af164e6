//! The whole node under restarts and failures: the real daemon, the real plugin and real packets, in the sandbox.

#![cfg(feature = "sandbox")]

mod doctor;
mod footprint;
mod kills;
mod kube;
mod lies;
mod probes;
mod refusals;
mod repair;
mod restarts;
mod settings;
mod stage;
mod stalls;
#[path = "../support/mod.rs"]
mod support;
mod takeover;
mod talk;
mod trouble;
