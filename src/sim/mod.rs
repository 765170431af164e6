//! A VPC with its EC2 as a model, in memory and in virtual time.
//!
//! One model ([`vpc`]) with three users: the simulator, the sandbox's HTTP fakes and its topology. Pure and
//! deterministic: no I/O, no clock; the moment is passed in and everything random comes from a seed, so that a run can be
//! repeated.

pub mod vpc;
