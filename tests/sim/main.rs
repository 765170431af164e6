//! The node in virtual time under everything that can go wrong, with what must hold checked after every step.
//!
//! ```text
//! cargo test --release --test sim                          what once failed, then a bounded run
//! cargo test --release --test sim -- seed 4711             one schedule, with its story
//! cargo test --release --test sim -- schedules 100000      so many schedules, from the first or from `from N`
//! cargo test --release --test sim -- crashes               every crash point of the main scenarios
//! ```
//!
//! A schedule that fails says how to replay it. Put its number into `testdata/sim/seeds.txt`: every run replays those first.

mod crashes;
mod judge;
mod schedule;
mod trouble;
mod world;

use enibox::clock;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const SEEDS: &str = include_str!("../../testdata/sim/seeds.txt");
/// How long schedules are tried in the bounded run.
const BOUNDED: Duration = Duration::from_secs(12);
/// Of the crash points the bounded run takes one in so many: an odd number, so that both fates of the write are met.
const SOME: usize = 5;
/// Failing schedules after which a long run gives up.
const FAILURES_MAX: usize = 10;

#[derive(Default)]
struct Sum {
    schedules: u64,
    steps: u64,
    crashes: u64,
    failed: Vec<u64>,
}

impl Sum {
    fn run(&mut self, seed: u64, loud: bool) {
        let mut life = None;
        let outcome = catch_unwind(AssertUnwindSafe(|| schedule::run(seed, &mut life)));
        self.schedules += 1;
        if let Ok(outcome) = outcome {
            self.steps += outcome.steps;
            self.crashes += outcome.crashes;
        } else {
            self.failed.push(seed);
            println!("seed {seed} fails; replay it with: cargo test --release --test sim -- seed {seed}");
        }
        if let Some(life) = life.filter(|_| loud) {
            println!("{}\n{}", life.story.join("\n"), life.fleet.nodes[0].journal());
        }
    }

    fn tell(&self, since: Instant) {
        let took = since.elapsed().as_secs_f64();
        println!(
            "{} schedules, {} steps, {} crashes in {took:.1} s: {:.0} steps a minute, {} failed {:?}",
            self.schedules,
            self.steps,
            self.crashes,
            f64::from(u32::try_from(self.steps).unwrap_or(u32::MAX)) / took * 60.0,
            self.failed.len(),
            self.failed
        );
    }
}

fn kept() -> impl Iterator<Item = u64> {
    let lines = SEEDS.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    lines.filter(|line| !line.is_empty()).map(|line| line.parse().expect("testdata/sim/seeds.txt holds numbers"))
}

fn crash_points(stride: usize) -> ExitCode {
    let failed = crashes::explore(stride);
    for point in &failed {
        println!("fails: {point}");
    }
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn main() -> ExitCode {
    // Options are those of the standard harness, which other tests understand.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let number = |n: usize| words.get(n).and_then(|word| word.parse::<u64>().ok());
    let (since, mut sum) = (clock::instant(), Sum::default());
    match words.first().map(String::as_str) {
        Some("seed") => sum.run(number(1).expect("seed takes a number"), true),
        Some("schedules") => {
            let first = number(3).unwrap_or(1);
            for seed in first..first + number(1).expect("schedules takes a number") {
                sum.run(seed, false);
                if sum.failed.len() >= FAILURES_MAX {
                    break;
                }
            }
        }
        Some("crashes") => return crash_points(1),
        Some(filter) if !"sim".contains(filter) => return ExitCode::SUCCESS, // meant for another test
        _ => {
            for seed in kept() {
                sum.run(seed, false);
            }
            if crash_points(SOME) == ExitCode::FAILURE {
                return ExitCode::FAILURE;
            }
            let since = clock::instant();
            // Narrow and wide ones in turn.
            for seed in (1..schedule::WIDE).flat_map(|n| [n, schedule::WIDE + n]) {
                if since.elapsed() > BOUNDED || sum.failed.len() >= FAILURES_MAX {
                    break;
                }
                sum.run(seed, false);
            }
        }
    }
    sum.tell(since);
    if sum.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
