//! Pauses between attempts: how long, with what jitter, and at what speed. One place, so that a test can run the same
//! schedule in no time; it must not read the clock.

use crate::sys;
use std::time::Duration;

/// The speed at which pauses pass, in thousandths of real time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace(u32);

impl Default for Pace {
    fn default() -> Self {
        Pace::REAL
    }
}

impl Pace {
    /// Pauses as the specification has them.
    pub const REAL: Pace = Pace(1000);

    /// Pauses of `thousandths` of their length; 0 leaves them out.
    pub const fn thousandths(thousandths: u32) -> Pace {
        Pace(thousandths)
    }

    /// The length of a pause at this speed.
    pub fn scaled(self, pause: Duration) -> Duration {
        pause.saturating_mul(self.0) / 1000
    }

    /// Waits.
    pub fn sleep(self, pause: Duration) {
        let pause = self.scaled(pause);
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
}

/// A random duration in `[0, limit)`, in steps of a microsecond.
pub fn jitter(limit: Duration) -> Duration {
    let limit = u64::try_from(limit.as_micros()).unwrap_or(u64::MAX);
    if limit == 0 { Duration::ZERO } else { Duration::from_micros(random() % limit) }
}

/// 64 random bits. A kernel that has no randomness to give (early boot) costs the jitter, not the call.
pub fn random() -> u64 {
    let mut bytes = [0; 8];
    match sys::random_bytes(&mut bytes) {
        Ok(()) => u64::from_ne_bytes(bytes),
        Err(error) => {
            log::debug!("read random bytes: {error}");
            0
        }
    }
}

/// The pause before attempt `attempt + 1`: random in `[0, 2^attempt)` seconds, 20 s from the fifth on
/// (`spec/aws.md` 6.4).
pub fn backoff(attempt: u32) -> Duration {
    if attempt >= 5 { Duration::from_secs(20) } else { jitter(Duration::from_secs(1 << attempt)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_stay_in_their_range() {
        for attempt in 1..5 {
            for _ in 0..100 {
                assert!(backoff(attempt) < Duration::from_secs(1 << attempt));
            }
        }
        assert_eq!(backoff(5), Duration::from_secs(20));
        assert_eq!(backoff(40), Duration::from_secs(20));
        assert_eq!(jitter(Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn speed_scales_pauses() {
        let second = Duration::from_secs(1);
        assert_eq!(Pace::REAL.scaled(second), second);
        assert_eq!(Pace::thousandths(1).scaled(second), Duration::from_millis(1));
        assert_eq!(Pace::thousandths(0).scaled(second), Duration::ZERO);
    }
}
