//! The only place that reads the time.

use crate::model::time::{Mono, Now, Wall};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The present: monotonic for ages and time-outs, wall clock for what is written down.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn now() -> Now {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let start = *START.get_or_init(Instant::now);
    // One second of head start keeps `now - small duration` from underflowing right after the start.
    let mono = Instant::now().duration_since(start).as_nanos() + 1_000_000_000;
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
