//! The kernel: rtnetlink, nf_tables, conntrack, namespaces, sysctls. Knows nothing of pods or AWS.
//!
//! Verb functions (`link::create_veth`, `route::replace`, `rule::add`, …) make [`Request`]s, so that a caller puts any mix
//! of them into one [`Socket::batch`]. List functions take the socket and return the values of `model::net` and
//! `model::nft`. A socket stays in the namespace it was opened in; nothing here switches the caller's.
//!
//! neli gives the socket and the constants; its typed messages are left out, because every attribute there is a fallible
//! builder that copies its children once per level. [`attr`] is what remains: 4 bytes of header and padding.

pub mod addr;
pub mod attr;
pub mod conntrack;
pub mod link;
pub mod monitor;
pub mod neigh;
pub mod netns;
pub mod nft;
pub mod nft_expr;
pub mod nft_outline;
pub mod route;
pub mod rule;
pub mod socket;
pub mod sysctl;
pub mod xtables;

pub use socket::{KernelError, Message, Outcome, Request, Socket};

use crate::model::net::Family;

/// AF_INET or AF_INET6 as the one byte that stands first in every request.
fn family_byte(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// The family of a kernel message; none for those we do not speak.
fn family_of(byte: u8) -> Option<Family> {
    match byte {
        2 => Some(Family::V4),
        10 => Some(Family::V6),
        _ => None,
    }
}
