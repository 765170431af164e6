//! Time that counts against the daemon. A machine that stands still, or that lets some of its threads stand for minutes while
//! others run, is not its fault: the kernel's scheduler has done so here, with a workqueue lockup in the kernel's log.

use enibox::clock;
use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const LOOK_EVERY: Duration = Duration::from_millis(500);
/// After that nothing can be said of anything.
const STANDSTILL_MAX: Duration = Duration::from_mins(15);

/// Counts the time in which every thread of some processes, and this one, could do what it had to do.
pub struct Patience {
    spent: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    begin: Instant,
}

impl Patience {
    /// Watches these processes and that of the test, in which EC2 and IMDS are.
    pub fn new(processes: &[u32]) -> Patience {
        let (spent, over) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let patience = Patience { spent: spent.clone(), over: over.clone(), begin: clock::instant() };
        let mut processes = processes.to_vec();
        processes.push(std::process::id());
        std::thread::spawn(move || {
            let mut before = BTreeMap::new();
            // It always runs when it looks.
            let own = fs::read_link("/proc/thread-self").unwrap();
            let own = own.file_name().unwrap().to_string_lossy().into_owned();
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK_EVERY);
                let now: BTreeMap<_, _> = processes.iter().flat_map(|process| threads(*process)).collect();
                let held = |(thread, seen): (&String, &Seen)| {
                    *thread != own && seen.wants() && before.get(thread) == Some(seen)
                };
                // By its own measure, so that time in which this thread did not run counts for nothing either.
                if !now.iter().any(held) {
                    spent.fetch_add(1, Ordering::Relaxed);
                }
                before = now;
            }
        });
        patience
    }

    /// The time that counts.
    pub fn spent(&self) -> Duration {
        assert!(self.begin.elapsed() < STANDSTILL_MAX, "the machine stands still: nothing can be said");
        LOOK_EVERY * u32::try_from(self.spent.load(Ordering::Relaxed)).unwrap()
    }
}

impl Drop for Patience {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// State and processor time of a thread (proc(5)).
#[derive(PartialEq, Eq)]
struct Seen {
    state: String,
    ticks: [String; 2],
}

impl Seen {
    // It would run if it were let: it waits for a processor, inside the kernel, or to be continued.
    fn wants(&self) -> bool {
        matches!(self.state.as_str(), "R" | "D" | "T")
    }
}

fn threads(process: u32) -> Vec<(String, Seen)> {
    let entries = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let read = |entry: fs::DirEntry| {
        let text = fs::read_to_string(entry.path().join("stat")).ok()?; // it may have ended just now
        let mut fields = text.rsplit(") ").next()?.split(' ').map(str::to_owned);
        let state = fields.next()?;
        let ticks = [fields.nth(10)?, fields.next()?];
        Some((entry.file_name().to_string_lossy().into_owned(), Seen { state, ticks }))
    };
    entries.filter_map(read).collect()
}

#[test]
fn time_in_which_a_process_is_held_does_not_count() {
    let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    let patience = Patience::new(&[child.id()]);
    let counts = || {
        let (before, end) = (patience.spent(), clock::instant() + Duration::from_mins(1));
        while patience.spent().saturating_sub(before) < 2 * LOOK_EVERY {
            assert!(clock::instant() < end, "it counts");
            std::thread::sleep(LOOK_EVERY / 5);
        }
    };
    counts();
    enibox::sys::signal(child.id(), libc::SIGSTOP).unwrap();
    std::thread::sleep(3 * LOOK_EVERY); // a look that had begun
    let before = patience.spent();
    std::thread::sleep(6 * LOOK_EVERY);
    assert_eq!(patience.spent(), before);
    enibox::sys::signal(child.id(), libc::SIGCONT).unwrap();
    counts();
    child.kill().unwrap();
    child.wait().unwrap();
}
