//! Types and parsing. No file, socket, process, thread or clock is used here, so that everything in it can be tested as
//! a table and run by the simulator.

pub mod checkpoint;
pub mod cni;
pub mod ec2;
pub mod ids;
pub mod imds;
pub mod kube;
pub mod limits;
pub mod map;
pub mod naming;
pub mod net;
pub mod nft;
pub mod notice;
pub mod order;
pub mod settings;
pub mod spool;
pub mod time;
pub mod wire;
