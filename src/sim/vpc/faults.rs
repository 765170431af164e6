//! How EC2 misbehaves: delays, errors, lost answers, throttling, and answers that lag behind.

use crate::model::map::Map;
use crate::model::time::Mono;
use std::collections::VecDeque;
use std::time::Duration;

/// What shall happen to one coming call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Planned {
    /// It is refused and nothing changes.
    Refused {
        /// EC2's code.
        code: String,
        /// Text.
        message: String,
        /// HTTP status.
        status: u16,
    },
    /// It is carried out, but the answer never arrives.
    AnswerLost,
    /// It never arrives.
    RequestLost,
}

/// A token bucket as EC2 documents its own (`spec/aws.md` 11.3).
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    capacity: u32,
    per_second: u32,
    level: u64, // in billionths of a token
    last: Option<Mono>,
}

const TOKEN: u64 = 1_000_000_000;

impl Bucket {
    /// A full bucket of `capacity` tokens that refills by `per_second`.
    pub fn new(capacity: u32, per_second: u32) -> Bucket {
        Bucket { capacity, per_second, level: u64::from(capacity) * TOKEN, last: None }
    }

    /// Takes a token if there is one.
    pub fn take(&mut self, now: Mono) -> bool {
        let passed = self.last.map_or(Duration::ZERO, |last| now.since(last));
        self.last = Some(now);
        let passed = u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX);
        let gained = passed.saturating_mul(u64::from(self.per_second));
        self.level = self.level.saturating_add(gained).min(u64::from(self.capacity) * TOKEN);
        let enough = self.level >= TOKEN;
        if enough {
            self.level -= TOKEN;
        }
        enough
    }
}

/// How calls of one action go.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    /// How long the answer takes.
    pub delay: Duration,
    /// What happens to the next calls, first one first; when empty they go well.
    pub next: VecDeque<Planned>,
    /// Throttling.
    pub bucket: Option<Bucket>,
}

/// Everything about EC2 that can be made worse. The default is an EC2 that answers at once, truthfully and always.
#[derive(Clone, Debug, Default)]
pub struct Knobs {
    /// Per action.
    pub actions: Map<String, Behaviour>,
    /// How long IMDS goes on telling the old state after a change.
    pub imds_lag: Duration,
    /// How long Describe goes on telling the old state after a change.
    pub describe_lag: Duration,
    /// How long a detach takes (`detaching`, then `available`).
    pub detach_time: Duration,
}

impl Knobs {
    /// The behaviour of an action, to be changed.
    pub fn action(&mut self, action: &str) -> &mut Behaviour {
        self.actions.entry(action.to_owned()).or_default()
    }

    /// The next call of the action is refused with this code and status.
    pub fn refuse_next(&mut self, action: &str, code: &str, status: u16) {
        let (code, message) = (code.to_owned(), "refused by the sandbox".to_owned());
        self.action(action).next.push_back(Planned::Refused { code, message, status });
    }

    /// Throttles as AWS documents its defaults for one account and region (`spec/aws.md` 11.3).
    pub fn throttle_like_aws(&mut self) {
        for (action, capacity, per_second) in [
            ("DescribeNetworkInterfaces", 100, 20),
            ("DescribeSubnets", 100, 20),
            ("DescribeInstanceTypes", 100, 20),
            ("CreateNetworkInterface", 100, 5),
            ("DeleteNetworkInterface", 100, 5),
            ("ModifyNetworkInterfaceAttribute", 100, 5),
            ("AssignPrivateIpAddresses", 100, 5),
            ("UnassignPrivateIpAddresses", 100, 5),
            ("AssignIpv6Addresses", 100, 5),
            ("CreateTags", 100, 10),
            ("AttachNetworkInterface", 50, 5),
            ("DetachNetworkInterface", 50, 5),
        ] {
            self.action(action).bucket = Some(Bucket::new(capacity, per_second));
        }
    }

    /// Delay and fate of a call that arrives now.
    pub(super) fn meet(&mut self, action: &str, now: Mono) -> (Duration, Option<Planned>) {
        let Some(behaviour) = self.actions.get_mut(action) else { return (Duration::ZERO, None) };
        if behaviour.bucket.as_mut().is_some_and(|bucket| !bucket.take(now)) {
            let throttled = Planned::Refused {
                code: "RequestLimitExceeded".into(),
                message: "Request limit exceeded.".into(),
                status: 503,
            };
            return (behaviour.delay, Some(throttled));
        }
        (behaviour.delay, behaviour.next.pop_front())
    }
}

/// A value that readers see late.
#[derive(Clone, Debug, Default)]
pub(super) struct Lagged<T> {
    stages: VecDeque<(Mono, T)>, // visible from; the first one is visible already
}

impl<T: Clone + PartialEq> Lagged<T> {
    /// Sets the value, to be seen from `visible` on.
    pub fn set(&mut self, visible: Mono, value: T) {
        if self.stages.back().is_some_and(|(_, last)| *last == value) {
            return;
        }
        self.stages.push_back((visible, value));
    }

    /// Everything that is or will be seen.
    pub fn stages(&self) -> impl Iterator<Item = &T> {
        self.stages.iter().map(|(_, value)| value)
    }

    /// What is seen at `now`; forgets what nobody will see again.
    pub fn seen(&mut self, now: Mono) -> Option<&T> {
        while self.stages.get(1).is_some_and(|(visible, _)| *visible <= now) {
            self.stages.pop_front();
        }
        self.stages.front().filter(|(visible, _)| *visible <= now).map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Mono {
        Mono::from_nanos(millis * 1_000_000)
    }

    #[test]
    fn a_bucket_refills_with_time() {
        let mut bucket = Bucket::new(2, 5);
        let taken = [0, 0, 0, 100, 200, 200, 10_000, 10_000, 10_000].map(|millis| bucket.take(at(millis)));
        assert_eq!(taken, [true, true, false, false, true, false, true, true, false]);
    }

    #[test]
    fn values_are_seen_late() {
        let mut value = Lagged::default();
        value.set(at(0), 'a');
        value.set(at(10), 'b');
        value.set(at(20), 'c');
        assert_eq!(value.seen(at(5)), Some(&'a'));
        assert_eq!(value.seen(at(10)), Some(&'b'));
        assert_eq!(value.seen(at(99)), Some(&'c'));
        let mut unseen = Lagged::default();
        unseen.set(at(10), 'x');
        assert_eq!(unseen.seen(at(9)), None);
    }
}
