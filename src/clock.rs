//! The only place that reads the time.

use crate::model::time::{Mono, Now, Wall};
use crate::sys;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The present: monotonic for ages and time-outs, wall clock for what is written down. The former is the system's own, which
/// goes on from one process to the next.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn now() -> Now {
    let mono = sys::monotonic().as_nanos();
    let wall =
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX));
    Now { mono: Mono::from_nanos(u64::try_from(mono).unwrap_or(u64::MAX)), wall: Wall::from_unix_nanos(wall) }
}

/// The wall clock in the type of the standard library, for libraries that want it.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn system_time() -> SystemTime {
    SystemTime::now()
}

/// A point to measure from, for time-outs on sockets.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn instant() -> Instant {
    Instant::now()
}
