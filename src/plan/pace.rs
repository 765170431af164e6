//! How fast the node may call EC2: a token bucket per action, and patience when EC2 asks for it.
//!
//! EC2's limits are shared by all nodes of the account (`spec/aws.md` 11.3), so a node that retries at once takes from
//! the others. Calls wait here until their action may be called again; whoever asks for the next one says which matter
//! most. A throttled call was not carried out: it is sent again later. EC2 does not say how many nodes call it, so each
//! finds out by its refusals how long the pauses between its calls must be, and keeps to them after a success too: a
//! hundred nodes or more that want ENIs at one time then take turns, with little more calls than are needed.

use super::backoff::Random;
use crate::model::ec2::{Call, Failure, Reply};
use crate::model::map::Map;
use crate::model::time::Mono;
use std::time::Duration;

/// Calls of one action that may leave at once.
const BURST: u32 = 10;
/// One token comes back in this time, for calls that only look and for those that change something.
const REFILL_READ: Duration = Duration::from_secs(1);
const REFILL_WRITE: Duration = Duration::from_secs(2);
/// The pause between calls of a crowded account doubles with each two levels of crowding, from this on.
const PAUSE: Duration = Duration::from_secs(2);
/// A refusal raises the level by so much: nobody knows how many nodes there are, and a pause that grows too slowly costs
/// every one of them many refusals. A success lowers it by one, so that three calls of four succeed in the long run.
const STEP: u32 = 3;
/// Pauses of 17 minutes on average: so long must each of 5,000 nodes wait between two calls of an account that may call
/// five times a second.
const LEVEL_MAX: u32 = 18;
/// Without a call the level falls by two in this time, and at least in the time of a pause.
const FORGET: Duration = Duration::from_secs(30);
/// Pods that wait do so for this part of a pause.
const URGENT_PART: u32 = 8;
/// A call that was refused so often is given up, and its sender decides what then.
const REFUSALS_MAX: u32 = 8;

/// One action's bucket.
#[derive(Clone, Debug)]
struct Bucket {
    refill: Duration,
    // The moment at which the bucket would have been empty, had it been filled ever since: a token is there for each
    // refill time that has passed since then, at most `BURST`.
    empty_at: Mono,
    // How crowded the account is, as far as EC2's answers tell: 0 as long as it has not refused anything.
    level: u32,
    // The last answer that counted, and the pause after it.
    heard: Mono,
    pause: Duration,
}

impl Bucket {
    fn new(call: &Call, now: Mono) -> Bucket {
        let refill = if call.action().starts_with("Describe") { REFILL_READ } else { REFILL_WRITE };
        Bucket { refill, empty_at: now.minus(refill * BURST), level: 0, heard: Mono::default(), pause: Duration::ZERO }
    }

    // When the next call may leave. One that pods wait for needs no token as long as EC2 does not complain.
    fn ready_at(&self, urgent: bool) -> Mono {
        match (urgent, self.level) {
            (true, 0) => Mono::default(),
            (true, _) => self.heard.plus(self.pause / URGENT_PART),
            (false, _) => self.empty_at.plus(self.refill).max(self.heard.plus(self.pause)),
        }
    }

    fn take(&mut self, now: Mono) {
        self.empty_at = self.empty_at.max(now.minus(self.refill * BURST)).plus(self.refill);
        let idle = now.since(self.heard.plus(self.pause));
        let forgotten = idle.as_millis() / FORGET.max(mean_pause(self.level)).as_millis();
        self.level = self.level.saturating_sub(u32::try_from(forgotten).unwrap_or(u32::MAX).saturating_mul(2));
    }

    fn hear(&mut self, now: Mono, level: u32, random: &mut Random) {
        self.level = level.min(LEVEL_MAX);
        let mean = mean_pause(self.level);
        // From a half to one and a half of it, so that nodes which were refused together do not come back together.
        let part = random.below(u64::try_from(mean.as_millis()).unwrap_or(u64::MAX));
        self.pause = if self.level == 0 { Duration::ZERO } else { mean / 2 + Duration::from_millis(part) };
        self.heard = now;
    }
}

fn mean_pause(level: u32) -> Duration {
    let whole = PAUSE.saturating_mul(1 << (level / 2));
    if level.is_multiple_of(2) { whole } else { whole * 3 / 2 }
}

/// A call and how often EC2 has refused it for its rate.
#[derive(Clone, Debug)]
struct Paced {
    call: Call,
    refusals: u32,
}

/// The calls that wait, and those that are out. `N` numbers a call; lower ones came first.
#[derive(Clone, Debug)]
pub struct Pacer<N> {
    buckets: Map<&'static str, Bucket>,
    waiting: Map<N, Paced>,
    out: Map<N, Paced>,
}

impl<N: Copy + Ord> Default for Pacer<N> {
    fn default() -> Self {
        Pacer { buckets: Map::new(), waiting: Map::new(), out: Map::new() }
    }
}

impl<N: Copy + Ord> Pacer<N> {
    /// Takes a call that is to be sent.
    pub fn submit(&mut self, number: N, call: Call) {
        self.waiting.insert(number, Paced { call, refusals: 0 });
    }

    // After a refusal calls of an action go one by one until one succeeds: more would be refused together.
    fn held_back(&self, paced: &Paced) -> bool {
        let action = paced.call.action();
        self.buckets.get(action).is_some_and(|bucket| bucket.level > 0)
            && self.out.values().any(|out| out.call.action() == action)
    }

    /// The next call that may be sent now: the lowest `rank` first, then the lowest number. Pods wait for those of rank 0.
    pub fn next(&mut self, now: Mono, rank: impl Fn(N) -> u8) -> Option<(N, Call)> {
        let buckets = &self.buckets;
        let ready = self
            .waiting
            .iter()
            .filter(|(number, paced)| {
                let bucket = buckets.get(paced.call.action());
                bucket.is_none_or(|bucket| bucket.ready_at(rank(**number) == 0) <= now)
            })
            .filter(|(_, paced)| !self.held_back(paced));
        let number = ready.min_by_key(|(number, _)| (rank(**number), **number)).map(|(number, _)| *number)?;
        let paced = self.waiting.remove(&number)?;
        let bucket = self.buckets.entry(paced.call.action()).or_insert_with(|| Bucket::new(&paced.call, now));
        bucket.take(now);
        let call = paced.call.clone();
        self.out.insert(number, paced);
        Some((number, call))
    }

    /// When [`Pacer::next`] should be asked again, if calls wait for a time and not for the answer to another one.
    pub fn wake_at(&self, now: Mono, rank: impl Fn(N) -> u8) -> Option<Mono> {
        let waiting = self.waiting.iter().filter(|(_, paced)| !self.held_back(paced));
        let ready = waiting.map(|(number, paced)| {
            let bucket = self.buckets.get(paced.call.action());
            bucket.map_or(now, |bucket| bucket.ready_at(rank(*number) == 0))
        });
        ready.min()
    }

    /// Hears the answer to a call; true if the call waits again and its sender need not know.
    pub fn answered(&mut self, now: Mono, number: N, result: &Result<Reply, Failure>, random: &mut Random) -> bool {
        let Some(mut paced) = self.out.remove(&number) else { return false };
        // What the other actions have met is a hint: all nodes of a fleet call them one after the other.
        let known = self.buckets.values().map(|bucket| bucket.level).max().unwrap_or(0);
        let Some(bucket) = self.buckets.get_mut(paced.call.action()) else { return false };
        let throttled = result.as_ref().is_err_and(|failure| failure.throttled() && !failure.maybe_applied);
        if !throttled {
            if bucket.level > 0 {
                bucket.hear(now, bucket.level - 1, random); // one success does not mean that everybody may rush
            }
            return false;
        }
        // Calls that left together are refused together: that is one refusal.
        if bucket.level == 0 || now >= bucket.heard.plus(bucket.pause / URGENT_PART) {
            bucket.hear(now, (bucket.level + STEP).max(known.saturating_sub(1)), random);
        }
        paced.refusals += 1;
        let again = paced.refusals < REFUSALS_MAX;
        if again {
            self.waiting.insert(number, paced);
        }
        again
    }

    /// Until when EC2 wants to be left alone, by action.
    pub fn paused(&self, now: Mono) -> impl Iterator<Item = (&'static str, Mono)> {
        let until = self.buckets.iter().map(|(action, bucket)| (*action, bucket.heard.plus(bucket.pause)));
        until.filter(move |(_, until)| *until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Mono {
        Mono::from_nanos((1_000_000 + millis) * 1_000_000)
    }

    fn call(n: u32) -> Call {
        Call::Delete(format!("eni-{n}").as_str().into())
    }

    fn throttled() -> Result<Reply, Failure> {
        Err(Failure {
            action: "DeleteNetworkInterface",
            code: "RequestLimitExceeded".into(),
            message: String::new(),
            status: 503,
            request_id: String::new(),
            maybe_applied: false,
        })
    }

    // Sends what may be sent until `until` and notes when, in milliseconds.
    fn drain(pacer: &mut Pacer<u32>, until: u64) -> Vec<(u64, u32)> {
        let mut sent = Vec::new();
        for millis in (0..=until).step_by(100) {
            while let Some((number, _)) = pacer.next(at(millis), |_| 1) {
                sent.push((millis, number));
            }
        }
        sent
    }

    #[test]
    fn a_burst_leaves_at_once_and_the_rest_as_tokens_come_back() {
        let mut pacer = Pacer::default();
        for n in 0..13 {
            pacer.submit(n, call(n));
        }
        let sent = drain(&mut pacer, 6000);
        assert!(sent[..10].iter().all(|(millis, _)| *millis == 0), "{sent:?}");
        assert_eq!(sent[10..], [(2000, 10), (4000, 11), (6000, 12)]);
        assert_eq!(pacer.wake_at(at(6000), |_| 1), None);
    }

    #[test]
    fn pods_that_wait_need_no_token_unless_ec2_complains() {
        let (mut pacer, mut random) = (Pacer::default(), Random::new(3));
        for n in 0..30 {
            pacer.submit(n, call(n));
        }
        let sent = std::iter::from_fn(|| pacer.next(at(0), |_| 0)).count();
        assert_eq!(sent, 30);
        assert!(pacer.answered(at(0), 1, &throttled(), &mut random));
        assert!(pacer.next(at(0), |_| 0).is_none(), "not while EC2 wants peace");
    }

    #[test]
    fn what_matters_most_goes_first() {
        let mut pacer = Pacer::default();
        for n in 0..3 {
            pacer.submit(n, call(n));
        }
        let order: Vec<u32> =
            std::iter::from_fn(|| pacer.next(at(0), |n| 1 + u8::from(n != 2)).map(|(n, _)| n)).collect();
        assert_eq!(order, [2, 0, 1]);
    }

    #[test]
    fn a_throttled_call_comes_again_later_and_later_and_then_fails() {
        let (mut pacer, mut random) = (Pacer::default(), Random::new(3));
        pacer.submit(1, call(1));
        let (mut now, mut pauses) = (0, Vec::new());
        for refusal in 1..=REFUSALS_MAX {
            assert_eq!(pacer.next(at(now), |_| 1).map(|(n, _)| n), Some(1));
            let again = pacer.answered(at(now), 1, &throttled(), &mut random);
            assert_eq!(again, refusal < REFUSALS_MAX);
            if let Some(wake) = pacer.wake_at(at(now), |_| 1) {
                assert!(wake > at(now), "{wake:?}");
                pauses.push(wake.since(at(now)));
                now += u64::try_from(wake.since(at(now)).as_millis()).unwrap() + 1;
            }
        }
        let most = mean_pause(LEVEL_MAX) * 2;
        assert!(pauses.iter().all(|pause| *pause >= PAUSE / 2 && *pause <= most), "{pauses:?}");
        assert!(pauses.last() > pauses.first(), "{pauses:?}");
        // Others of the action wait too; other actions do not.
        pacer.submit(2, call(2));
        pacer.submit(3, Call::DescribeOne("eni-1".into()));
        assert_eq!(pacer.next(at(now), |_| 1).map(|(n, _)| n), Some(3));
        assert_eq!(pacer.paused(at(now)).map(|(action, _)| action).collect::<Vec<_>>(), ["DeleteNetworkInterface"]);
    }

    #[test]
    fn success_shortens_the_pause_and_time_ends_it() {
        let (mut pacer, mut random) = (Pacer::default(), Random::new(3));
        for n in 1..3 {
            pacer.submit(n, call(n));
            pacer.next(at(0), |_| 1);
        }
        assert!(pacer.answered(at(0), 1, &throttled(), &mut random));
        let level = pacer.buckets["DeleteNetworkInterface"].level;
        assert_eq!(level, STEP);
        assert!(!pacer.answered(at(10), 2, &Ok(Reply::Done), &mut random));
        assert_eq!(pacer.buckets["DeleteNetworkInterface"].level, level - 1);
        assert!(pacer.wake_at(at(10), |_| 1).is_some_and(|wake| wake > at(10)));
        let later = 10 + 120_000;
        assert_eq!(pacer.next(at(later), |_| 1).map(|(n, _)| n), Some(1));
        assert_eq!(pacer.buckets["DeleteNetworkInterface"].level, 0);
    }

    #[test]
    fn pods_that_wait_do_so_for_a_part_of_the_pause() {
        let (mut pacer, mut random) = (Pacer::default(), Random::new(5));
        pacer.submit(1, call(1));
        pacer.next(at(0), |_| 0);
        assert!(pacer.answered(at(0), 1, &throttled(), &mut random));
        let wake = |rank: u8| pacer.wake_at(at(0), |_| rank).unwrap().since(at(0));
        assert_eq!(wake(0), wake(1) / URGENT_PART);
    }

    #[test]
    fn what_one_action_has_met_the_others_begin_with() {
        let (mut pacer, mut random) = (Pacer::default(), Random::new(7));
        pacer.submit(1, call(1));
        for n in 0..4 {
            pacer.next(at(n * 1_000_000), |_| 1);
            assert!(pacer.answered(at(n * 1_000_000), 1, &throttled(), &mut random));
        }
        let known = pacer.buckets["DeleteNetworkInterface"].level;
        pacer.submit(2, Call::Detach("eni-attach-1".into()));
        assert_eq!(pacer.next(at(3_000_000), |_| 1).map(|(n, _)| n), Some(2));
        assert!(pacer.answered(at(3_000_000), 2, &throttled(), &mut random));
        assert_eq!(pacer.buckets["DetachNetworkInterface"].level, STEP.max(known - 1));
    }
}
