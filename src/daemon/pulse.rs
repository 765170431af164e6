//! Whether the threads get on: what each is at, and since when.
//!
//! A thread that has work and makes no progress is told of by its name, with its operation and what the kernel says of it:
//! whether it waits for a processor, for the kernel or for something else decides where to look. The time is counted from
//! the moment the work was handed over, so that a thread that never takes it up shows as well. It stands in the log, in the
//! metrics, and in a health service of its own (`spec/operations.md` 5). Nothing is ended here: an operation that is slow
//! but bounded has to be waited for, and the network of the pods needs none of these threads.

use crate::clock;
use crate::model::time::Mono;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often the threads are looked at.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(15);
/// Without progress for so long a thread is told of in the log, and then each time after twice as long.
const TELL_AFTER: Duration = Duration::from_secs(30);
/// Longer than the node's own kernel and disk take while the node is of any use.
const OWN_MAX: Duration = Duration::from_mins(5);
/// Calls over the network are bounded by time-outs, attempts and pages, which operators may raise; and no restart of ours
/// makes others faster.
const REMOTE_MAX: Duration = Duration::from_mins(30);
/// What a thread is at that has not taken its work up.
const NOT_BEGUN: &str = "it has not taken up what it was given";
/// What the core is at when nothing happens.
const RESTS: &str = "it waits for an event";

/// A thread, or several that share a queue: these get on if one of them does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    Core,
    Kernel,
    Disk,
    Imds,
    Ec2,
    Kube,
}

/// In their order: name, and how long there may be no progress.
const LANES: [(&str, Duration); 6] = [
    ("core", OWN_MAX),
    ("kernel", OWN_MAX),
    ("disk", OWN_MAX),
    ("imds", REMOTE_MAX),
    ("ec2", REMOTE_MAX),
    ("kube", REMOTE_MAX),
];

#[derive(Default)]
struct Beat {
    /// Work that is not done yet.
    waiting: u32,
    /// The last progress.
    since: Mono,
    what: &'static str,
    /// The thread that began it last, below `/proc`.
    task: PathBuf,
    /// How often it was told of since then.
    told: u32,
}

impl Beat {
    fn held(&self, now: Mono) -> Duration {
        if self.waiting == 0 { Duration::ZERO } else { now.since(self.since) }
    }

    fn handed(&mut self, now: Mono) {
        if self.waiting == 0 {
            (self.since, self.what) = (now, NOT_BEGUN);
        }
        self.waiting = self.waiting.saturating_add(1);
    }

    // Progress. What was held up before and for how long, if that was told.
    fn moved(&mut self, now: Mono, what: &'static str) -> Option<(Duration, &'static str)> {
        let held = self.held(now);
        self.since = now;
        let was = std::mem::replace(&mut self.what, what);
        (std::mem::take(&mut self.told) > 0).then_some((held, was))
    }

    // Whether it is time to tell of it.
    fn due(&mut self, now: Mono) -> bool {
        let due = self.held(now) >= TELL_AFTER.saturating_mul(1 << self.told.min(16));
        self.told += u32::from(due);
        due
    }
}

/// The heartbeats of the threads.
#[derive(Default)]
pub(super) struct Pulse(Mutex<[Beat; LANES.len()]>);

impl Pulse {
    fn beats(&self) -> MutexGuard<'_, [Beat; LANES.len()]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Work is put into the lane's queue.
    pub(super) fn handed(&self, lane: Lane) {
        self.beats()[lane as usize].handed(clock::now().mono);
    }

    /// The calling thread takes up what was handed to it.
    pub(super) fn begin(&self, lane: Lane, what: &'static str) {
        let task = fs::read_link("/proc/thread-self").unwrap_or_default();
        let gone_on = {
            let beat = &mut self.beats()[lane as usize];
            beat.task = task;
            beat.moved(clock::now().mono, what)
        };
        tell(lane, gone_on);
    }

    /// It is done, or could not be handed over after all.
    pub(super) fn done(&self, lane: Lane) {
        let gone_on = {
            let beat = &mut self.beats()[lane as usize];
            beat.waiting = beat.waiting.saturating_sub(1);
            beat.moved(clock::now().mono, NOT_BEGUN)
        };
        tell(lane, gone_on);
    }

    /// The calling thread's work all the time, which it goes on with in `sleep` at the latest.
    pub(super) fn rest(&self, lane: Lane, sleep: Duration) {
        let gone_on = {
            let beat = &mut self.beats()[lane as usize];
            beat.waiting = 1;
            let now = clock::now().mono;
            let gone_on = beat.moved(now, RESTS);
            beat.since = now.plus(sleep);
            gone_on
        };
        tell(lane, gone_on);
    }

    /// For how long each lane has had work and made no progress.
    pub(super) fn held(&self, now: Mono) -> [(&'static str, Duration); LANES.len()] {
        let beats = self.beats();
        std::array::from_fn(|lane| (LANES[lane].0, beats[lane].held(now)))
    }

    /// Whether all of them get on.
    pub(super) fn is_good(&self, now: Mono) -> bool {
        self.held(now).iter().zip(LANES).all(|((_, held), (_, limit))| *held < limit)
    }

    /// Lines about those that do not, each at its time.
    pub(super) fn look(&self, now: Mono) -> Vec<String> {
        let mut lines = Vec::new();
        for (beat, (name, _)) in self.beats().iter_mut().zip(LANES) {
            if beat.due(now) {
                let (held, what, state) = (beat.held(now).as_secs(), beat.what, state(&beat.task));
                lines.push(format!("thread {name} makes no progress for {held} s: {what}; {state}"));
            }
        }
        lines
    }
}

fn tell(lane: Lane, gone_on: Option<(Duration, &str)>) {
    if let Some((held, what)) = gone_on {
        log::info!("thread {} goes on after {} s: {what}", LANES[lane as usize].0, held.as_secs());
    }
}

// What the kernel says of a thread (proc(5)).
fn state(task: &Path) -> String {
    let read = |name: &str| fs::read_to_string(Path::new("/proc").join(task).join(name)).unwrap_or_default();
    let stat = read("stat");
    // The name, in parentheses, may hold blanks and parentheses.
    match stat.rsplit(") ").next().and_then(|rest| rest.chars().next()) {
        Some('R') => "it has a processor or waits for one".into(),
        Some(state @ ('S' | 'D')) => {
            let place = read("wchan");
            let how = if state == 'D' { "is held by" } else { "sleeps in" };
            ["it ", how, " the kernel (", &place, ")"].concat()
        }
        Some(other) => format!("its state is {other}"),
        None => "nothing is known of it".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Mono {
        Mono::from_nanos(seconds * 1_000_000_000)
    }

    #[test]
    fn time_counts_from_the_hand_over_and_from_each_progress() {
        let mut beat = Beat::default();
        let check =
            |beat: &Beat, now: u64, held: u64| assert_eq!(beat.held(at(now)), Duration::from_secs(held), "{now}");
        check(&beat, 100, 0);
        beat.handed(at(100));
        check(&beat, 107, 7);
        assert_eq!(beat.what, NOT_BEGUN);
        beat.handed(at(108)); // what comes behind it is no progress
        check(&beat, 110, 10);
        assert_eq!(beat.moved(at(110), "read"), None);
        check(&beat, 115, 5);
        beat.waiting -= 1;
        beat.moved(at(115), NOT_BEGUN);
        check(&beat, 116, 1);
        beat.waiting -= 1;
        check(&beat, 200, 0);
    }

    #[test]
    fn a_thread_is_told_of_ever_more_seldom_and_once_when_it_goes_on() {
        let mut beat = Beat::default();
        beat.handed(at(0));
        beat.moved(at(0), "write");
        let told = (0..300).filter(|now| beat.due(at(*now))).collect::<Vec<_>>();
        assert_eq!(told, [30, 60, 120, 240]);
        assert_eq!(beat.moved(at(301), "read"), Some((Duration::from_secs(301), "write")));
        assert_eq!(beat.moved(at(302), "read"), None);
        assert!(!beat.due(at(331)) && beat.due(at(332)));
    }

    #[test]
    fn a_lane_is_good_until_its_limit() {
        let pulse = Pulse::default();
        for (lane, limit) in [(Lane::Kernel, OWN_MAX), (Lane::Ec2, REMOTE_MAX), (Lane::Core, OWN_MAX)] {
            let name = LANES[lane as usize].0;
            pulse.handed(lane);
            pulse.begin(lane, "call");
            let (now, minute) = (clock::now().mono, Duration::from_mins(1));
            assert!(pulse.is_good(now.plus(limit.saturating_sub(minute))), "{name}");
            assert!(!pulse.is_good(now.plus(limit)), "{name}");
            let lines = pulse.look(now.plus(minute));
            let line = ["thread ", name, " makes no progress for 60 s: call; it "].concat();
            assert!(lines.len() == 1 && lines[0].starts_with(&line), "{lines:?}");
            pulse.done(lane);
            assert!(pulse.is_good(now.plus(limit)) && pulse.look(now.plus(minute)).is_empty(), "{name}");
        }
        // The core is expected back when its sleep is over.
        pulse.rest(Lane::Core, Duration::from_mins(1));
        let now = clock::now().mono;
        assert!(pulse.look(now.plus(Duration::from_secs(80))).is_empty());
        assert_eq!(pulse.look(now.plus(Duration::from_secs(91))).len(), 1);
    }

    #[test]
    fn the_kernel_says_what_a_thread_is_at() {
        let own = fs::read_link("/proc/thread-self").unwrap();
        assert_eq!(state(&own), "it has a processor or waits for one");
        assert_eq!(state(Path::new("0")), "nothing is known of it");
    }
}
