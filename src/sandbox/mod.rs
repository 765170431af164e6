//! A VPC, EC2 and IMDS on one machine, with real packets in network namespaces.
//!
//! One model ([`vpc`]) with three users: the simulator in memory, the HTTP fakes ([`serve`]) and the [`topology`]. Daemon
//! and plugin run as processes of their own and know nothing of it; this module imports neither.

pub mod agents;
pub mod demo;
mod flows;
mod nodeport;
pub mod probe;
mod report;
pub mod runs;
pub mod serve;
pub mod topology;
pub mod vpc;
pub mod world;
