//! A VPC and its nodes in virtual time.
//!
//! The model of EC2 ([`vpc`]) also serves the sandbox's HTTP fakes and its topology. On it live nodes ([`node`]) with the
//! real core or the original's algorithm ([`original`]), their pods ([`kubelet`]) and API objects ([`api`]), driven by one
//! queue ([`fleet`]); a [`trial`] is a run with a question. Pure and deterministic: no I/O, no clock; the moment is passed in and everything random comes from a
//! seed, so that a run can be repeated.

pub mod api;
pub mod conditions;
pub mod fleet;
pub mod kubelet;
pub mod node;
pub mod original;
pub mod queue;
pub mod trial;
pub mod vpc;
