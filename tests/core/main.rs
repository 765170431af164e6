//! The core against a model of EC2, in virtual time: scenarios, one long scenario killed at every effect, random lives.

#![cfg(feature = "sandbox")]

mod cards;
mod cluster;
mod exclusion;
mod lives;
mod prefixes;
mod scenarios;
mod steady;
mod truth;
mod world;
