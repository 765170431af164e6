//! AWS: IMDS, credentials, signing, the EC2 Query API (`spec/aws.md`). Knows only `model`.
//!
//! Everything here blocks the calling thread, with a time-out on every read and write, and keeps its own limits on
//! attempts, bodies and pauses. Nothing here knows pods, pools or the kernel.

pub mod creds;
pub mod ec2;
pub mod endpoint;
mod form;
pub mod imds;
pub mod pace;
pub mod sign;
pub mod xml;

#[cfg(test)]
pub(crate) use crate::http::script;
