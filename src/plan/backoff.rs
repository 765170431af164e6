//! Pauses between attempts, and the random numbers of the core. Both are part of its state: a seed replays a run exactly.

use std::time::Duration;

/// Pauses that grow by a factor of two from `first` to `cap`, each lengthened by a random part of itself
/// (`spec/ipamd.md` 15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The first pause.
    pub first: Duration,
    /// The longest, before jitter.
    pub cap: Duration,
    /// Largest random addition, in percent of the pause.
    pub jitter_percent: u32,
}

impl Backoff {
    /// The pause after attempt number `attempt`, counted from 0.
    pub fn pause(&self, attempt: u32, random: &mut Random) -> Duration {
        let base = self.first.saturating_mul(1u32.checked_shl(attempt.min(31)).unwrap_or(u32::MAX)).min(self.cap);
        let most = base.as_millis() * u128::from(self.jitter_percent) / 100;
        base + Duration::from_millis(random.below(u64::try_from(most).unwrap_or(u64::MAX)))
    }
}

/// A small generator of random numbers (xorshift64*), good for jitter and tokens, not for secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Random(u64);

impl Random {
    /// From a seed; 0 is replaced, since it would stay 0 for ever.
    pub fn new(seed: u64) -> Self {
        Random(if seed == 0 { 0x9e37_79b9_7f4a_7c15 } else { seed })
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number from 0 to `limit`, exclusive; 0 if the limit is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        if limit == 0 { 0 } else { self.bits() % limit }
    }

    /// A random UUID (version 4), the form in which EC2 likes its client tokens.
    pub fn uuid(&mut self) -> String {
        let high = (self.bits() & 0xffff_ffff_ffff_0fff) | 0x4000;
        let low = (self.bits() & 0x3fff_ffff_ffff_ffff) | 0x8000_0000_0000_0000;
        format!(
            "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
            high >> 32,
            high >> 16 & 0xffff,
            high & 0xffff,
            low >> 48,
            low & 0xffff_ffff_ffff
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_cap() {
        let backoff = Backoff { first: Duration::from_millis(100), cap: Duration::from_mins(1), jitter_percent: 15 };
        let mut random = Random::new(7);
        for (attempt, least_ms) in [(0, 100), (1, 200), (9, 51_200), (10, 60_000), (40, 60_000)] {
            let pause = backoff.pause(attempt, &mut random);
            let least = Duration::from_millis(least_ms);
            assert!(pause >= least && pause <= least * 115 / 100, "attempt {attempt}: {pause:?}");
        }
    }

    #[test]
    fn uuids_look_like_uuids_and_differ() {
        let mut random = Random::new(1);
        let (one, two) = (random.uuid(), random.uuid());
        assert_ne!(one, two);
        for uuid in [one, two] {
            let parts: Vec<usize> = uuid.split('-').map(str::len).collect();
            assert_eq!(parts, [8, 4, 4, 4, 12], "{uuid}");
            assert_eq!(uuid.as_bytes()[14], b'4');
            assert!(b"89ab".contains(&uuid.as_bytes()[19]), "{uuid}");
        }
    }
}
