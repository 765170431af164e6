//! Decisions: (state, observation, now) -> new state and effects. Deterministic; no I/O, no clock, ordered maps only.

pub mod backoff;
pub mod branch;
pub mod cleanup;
pub mod configure;
pub mod core;
pub mod doctor;
pub mod egress;
pub mod former;
pub mod host;
pub mod pace;
pub mod pod;
pub mod pool;
pub mod repair;
pub mod ruleset;
#[cfg(test)]
mod sample;
pub mod sizing;
