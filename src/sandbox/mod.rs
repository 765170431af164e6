//! A VPC, EC2 and IMDS on one machine, with real packets in network namespaces.
//!
//! The model of EC2 is [`crate::sim::vpc`], that of the API server [`kube`]; the HTTP fakes ([`serve`]) and the [`topology`]
//! make it real. Daemon and plugin run as processes of their own and know nothing of it; this module imports neither.

pub mod agents;
pub mod cluster;
pub mod controller;
pub mod demo;
pub mod egress;
pub mod flows;
mod given;
pub mod kube;
mod nodeport;
pub mod probe;
mod report;
pub mod runs;
pub mod serve;
pub mod topology;
pub mod world;
