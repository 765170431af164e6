//! The whole node under restarts and failures: the real daemon, the real plugin and real packets, in the sandbox.

#![cfg(feature = "sandbox")]

mod cidrs;
mod cleaned;
mod doctor;
mod footprint;
mod kills;
mod kube;
mod leaving;
mod lies;
mod probes;
mod refusals;
mod repair;
mod repair_modes;
mod restarts;
mod settings;
mod stage;
mod stalls;
#[path = "../support/mod.rs"]
mod support;
mod takeover;
mod talk;
mod trouble;
