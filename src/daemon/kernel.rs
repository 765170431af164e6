//! The thread that owns the host's network: it makes what the core wants, and keeps it so while others change it.
//!
//! It sleeps until the core has work or the kernel tells of a change. What a change means, when to look and what to put back
//! is decided in [`plan::repair`](crate::plan::repair) and [`plan::host`](crate::plan::host).

use super::metrics::Metrics;
use super::pulse::Lane;
use super::{files, former};
use crate::apply::{self, HostReport};
use crate::clock;
use crate::error::{Context, Error, List, Result};
use crate::model::map::{Map, Set};
use crate::model::order::Gather as _;
use crate::model::time::Mono;
use crate::netlink::monitor::{Monitor, Notice};
use crate::plan::core::{Applied, Event, OpId};
use crate::plan::host::{Action, Fresh, Idle, Intent, Observation, Plan, Step, What, diff};
use crate::plan::repair::{Pace, Quarrels, Verdict, Watch};
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::time::Duration;

/// How long the thread sleeps when nothing happens.
const SLEEP_MAX: Duration = Duration::from_hours(1);
/// Changes that are read in one go, before the clock is looked at.
const NOTICES_MAX: usize = 4096;
/// How long the links of a pod with a branch ENI that is being deleted are left alone, if they do not go earlier.
const DEPARTURE_MAX: Duration = Duration::from_mins(1);
/// How long after its DEL an address is certainly nobody else's, in time for a round: the core lets it rest for
/// [`REST_MIN`](crate::plan::core::REST_MIN) at least. What is left of it then the core sweeps.
const LEAVING_MAX: Duration = Duration::from_secs(2);
/// Until a look that failed is made again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Repairs of one kind are told to the core at most so often: what it makes of them is an event, and those are folded.
const TELL_EVERY: Duration = Duration::from_mins(5);
/// Repairs of one round that are logged one by one.
const LINES_MAX: usize = 32;

/// What the thread is asked for.
pub(super) enum Work {
    /// Make the host's network so, and tell the core.
    Apply(OpId, Box<Intent>),
    /// Tell the core which links and pods the host shows.
    List,
    /// Pods with these addresses are being deleted, since then.
    Released(Vec<IpAddr>, Mono),
}

impl Work {
    fn name(&self) -> &'static str {
        match self {
            Work::Apply(..) => "make the host's network",
            Work::List => "list links and pods",
            Work::Released(..) => "let released pods go",
        }
    }
}

/// The thread's queue. It waits for the kernel too, so a byte in a pipe tells it that something is in the queue.
pub(super) struct Queue {
    work: SyncSender<Work>,
    bell: PipeWriter,
}

/// The other end of [`Queue`].
pub(super) struct Inbox {
    work: Receiver<Work>,
    bell: PipeReader,
}

pub(super) fn queue() -> Result<(Queue, Inbox)> {
    let (sender, work) = sync_channel(super::executors::QUEUE_MAX);
    let (reader, writer) = std::io::pipe()?;
    Ok((Queue { work: sender, bell: writer }, Inbox { work, bell: reader }))
}

impl Queue {
    pub(super) fn try_send(&self, work: Work) -> Result<(), TrySendError<Work>> {
        self.work.try_send(work)?;
        // Never full: there is at most one byte for each work in the queue and those being read.
        (&self.bell).write_all(&[0]).ok();
        Ok(())
    }
}

/// Runs until the queue is closed.
pub(super) fn run(inbox: &Inbox, events: &SyncSender<Event>, metrics: &Metrics) -> Result<()> {
    let mut keeper = Keeper::open(metrics)?;
    loop {
        let now = clock::now().mono;
        let sleep = keeper.pace.due().map_or(SLEEP_MAX, |due| due.since(now));
        if keeper.monitor.wait(inbox.bell.as_fd(), sleep)? {
            // How many bytes there were does not matter: the queue is emptied.
            _ = (&inbox.bell).read(&mut [0; 64]).context("read the bell")?;
        }
        loop {
            match inbox.work.try_recv() {
                Ok(work) => {
                    metrics.pulse.begin(Lane::Kernel, work.name());
                    keeper.work(clock::now().mono, work, events)?;
                    metrics.pulse.done(Lane::Kernel);
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
        }
        keeper.listen()?;
        if keeper.pace.due().is_some_and(|due| due <= clock::now().mono) {
            metrics.pulse.handed(Lane::Kernel);
            metrics.pulse.begin(Lane::Kernel, "look at what others have changed");
            keeper.look(clock::now().mono);
            metrics.pulse.done(Lane::Kernel);
        }
        keeper.pass_on(clock::now().mono, events);
    }
}

struct Keeper<'a> {
    host: apply::Host,
    monitor: Monitor,
    metrics: &'a Metrics,
    watch: Option<Watch>,
    pace: Pace,
    quarrels: Quarrels,
    /// Addresses of pods for which the last round has put something back.
    mended: Set<IpAddr>,
    /// Of those, the ones whose pods turned out to be on their way out, and since when.
    leaving: Map<IpAddr, Mono>,
    /// Pods with a branch ENI that are being deleted: index of the veth, and since when. The core has them in its intent until
    /// the API server tells otherwise.
    departing: Map<IpAddr, (u32, Mono)>,
    /// VLAN devices that show no pod.
    idle: Idle,
    /// Host ends of ways out in the other family that are new.
    fresh: Fresh,
    /// The last error, so that it is told once.
    warned: String,
    /// Warnings of the last round.
    warnings: Set<String>,
    former: former::Watch,
    /// When a repair of this kind was last told to the core.
    told: Map<What, Mono>,
    /// Repairs that the core is to be told of, one of each kind.
    news: Map<What, String>,
}

impl<'a> Keeper<'a> {
    /// For the namespace of the calling thread.
    fn open(metrics: &'a Metrics) -> Result<Keeper<'a>> {
        // Subscribed before the first look, so that nothing is missed between.
        let monitor = Monitor::open(true).context("watch the host's network")?;
        let host = apply::Host::open().context("open the host's netlink sockets")?;
        Ok(Keeper {
            host,
            monitor,
            metrics,
            watch: None,
            pace: Pace::default(),
            quarrels: Quarrels::default(),
            mended: Set::new(),
            leaving: Map::new(),
            departing: Map::new(),
            idle: Idle::default(),
            fresh: Fresh::default(),
            warned: String::new(),
            warnings: Set::new(),
            former: former::Watch::default(),
            told: Map::new(),
            news: Map::new(),
        })
    }

    /// Does what it is asked for at `now`.
    fn work(&mut self, now: Mono, work: Work, events: &SyncSender<Event>) -> Result<()> {
        let event = match work {
            Work::Apply(op, mut intent) => {
                self.departing.retain(|_, (_, since)| now.since(*since) < DEPARTURE_MAX);
                intent.branches.retain(|pod| !self.departing.contains_key(&pod.address));
                // The look that was asked for because of them does not come after this one.
                intent.gone.extend(self.leaving(now));
                let mut primary = String::new();
                let result = self.round(now, &intent, true).and_then(|mut report| {
                    primary = std::mem::take(&mut report.primary);
                    applied(report)
                });
                if result.is_ok() {
                    self.leaving.clear();
                    self.former.look(&mut self.host, &intent, &primary, self.metrics);
                }
                let result = result.map_err(|error| error.to_string());
                if let Err(error) = &result {
                    self.metrics.host_failed(error.clone());
                }
                Event::Kernel(op, result)
            }
            Work::List => Event::Seen(files::look_at_host().map_err(|error| error.to_string())),
            Work::Released(addresses, since) => {
                self.release(now, &addresses, since);
                return Ok(());
            }
        };
        events.send(event).context("tell the core")
    }

    // The plugin removes what these pods have, as soon as it has its answer. A round that saw it do so, and did not know,
    // has put rules back: this message was in the queue then, and they go again.
    fn release(&mut self, now: Mono, addresses: &[IpAddr], since: Mono) {
        let Some(watch) = &mut self.watch else { return };
        for address in addresses {
            if let Some(veth) = watch.release(*address) {
                self.departing.insert(*address, (veth, now));
            }
            if self.mended.remove(address) {
                self.leaving.insert(*address, since);
                self.pace.ask(now);
            }
        }
    }

    // Addresses of pods on their way out. Rounds may have failed for so long that one is the next pod's by now, of which the
    // intent at hand does not tell.
    fn leaving(&mut self, now: Mono) -> Vec<IpAddr> {
        self.leaving.retain(|_, since| now.since(*since) < LEAVING_MAX);
        self.leaving.keys().copied().collect()
    }

    /// Reads what the kernel tells.
    fn listen(&mut self) -> Result<()> {
        for _ in 0..NOTICES_MAX {
            let Some(notice) = self.monitor.next(Duration::ZERO)? else { return Ok(()) };
            if let Notice::LinkGone(link) = &notice {
                self.departing.retain(|_, (veth, _)| *veth != link.index);
            }
            if let Some(watch) = &mut self.watch {
                let now = clock::now().mono;
                if watch.hear(&notice) {
                    self.pace.ask(now);
                }
                self.pace.doubt(now, watch.doubts());
            }
        }
        Ok(())
    }

    /// A look because of what the kernel told.
    fn look(&mut self, now: Mono) {
        let Some(watch) = &self.watch else { return };
        let mut intent = watch.intent().clone();
        intent.gone = self.leaving(now);
        let report = self.round(now, &intent, false);
        if report.is_ok() {
            self.leaving.clear();
        }
        match report.and_then(applied) {
            Ok(_) => self.warned.clear(),
            Err(error) => {
                self.warn(&error);
                self.metrics.host_failed(error.to_string());
            }
        }
    }

    /// One look at the host and the steps that follow. `regular`: the core has asked for it, maybe with a new intent.
    fn round(&mut self, now: Mono, intent: &Intent, regular: bool) -> Result<HostReport> {
        let begin = clock::instant();
        self.mended.clear();
        self.quarrels.forget(now);
        self.metrics.host_look(regular);
        let last = self.watch.as_ref().map(Watch::intent);
        let (quarrels, idle, metrics) = (&mut self.quarrels, &mut self.idle, self.metrics);
        let fresh = &mut self.fresh;
        let start = last.is_none();
        let (mut repairs, mut left, mut tried) = (Set::new(), Vec::new(), Vec::new());
        let (mut held, mut first) = (Set::new(), true);
        let report = self.host.host_with(intent, &mut |seen, plan| {
            idle.look(now, intent, seen, plan);
            left.extend(fresh.look(now, seen, plan));
            mark(&mut repairs, last, intent, seen, plan);
            // What comes up in a second pass our own steps have undone: nobody is to wait for that.
            let own = !std::mem::take(&mut first);
            plan.steps.retain(|step| {
                if !repairs.contains(&step.text) {
                    return true;
                }
                if held.contains(&step.text) {
                    return false;
                }
                let wait = match quarrels.judge(now, step, regular || own) {
                    Verdict::Mend => {
                        tried.push(step.clone());
                        return true;
                    }
                    Verdict::GiveWay(until) => {
                        log::warn!("{}: undone again and again; from now on it is made less often", step.text);
                        until
                    }
                    Verdict::Hold(until) => until,
                };
                metrics.repair_held(step.what);
                held.insert(step.text.clone());
                left.push(wait);
                false
            });
        });
        let took = begin.elapsed();
        let end = now.plus(took);
        self.pace.looked(end, took);
        for until in left {
            self.pace.leave(until);
        }
        // What the notice told is not seen to yet. The core repeats the first look of all itself.
        if report.is_err() && self.watch.is_some() {
            self.pace.leave(end.plus(LOOK_AGAIN));
        }
        let ruleset = match &report {
            Ok(report) => report.ruleset.or(start.then_some(true)),
            Err(_) => start.then_some(false),
        };
        if let Some(success) = ruleset {
            metrics.rules(success);
        }
        let mut report = report?;
        let done = report.steps.iter().map(|step| &step.text).gather::<Set<_>>();
        // Tables that were set and are other ones at once somebody fights for.
        let fought = |step: &Step| step.what == What::Ruleset && report.ruleset == Some(false);
        for step in tried.iter().filter(|step| !done.contains(&step.text) && !fought(step)) {
            self.quarrels.not_made(step);
        }
        self.watch = Some(Watch::new(intent, &report.seen));
        self.tell(now, &report, &repairs);
        report.seen = Observation::default(); // a node has thousands of entries
        Ok(report)
    }

    fn tell(&mut self, now: Mono, report: &HostReport, repairs: &Set<String>) {
        // A warning is told when it is new.
        let before = std::mem::take(&mut self.warnings);
        for (what, warning) in &report.warnings {
            let text = warning.to_string();
            self.metrics.repair_failed(*what);
            if !before.contains(&text) && self.warnings.len() < LINES_MAX {
                log::warn!("host network: {text}");
            }
            self.warnings.insert(text);
        }
        for (number, step) in report.steps.iter().enumerate() {
            self.mended.extend(address_of(&step.action));
            let former = matches!(step.what, What::GonePod | What::BranchLeftover);
            let repair = repairs.contains(&step.text) && !former;
            if repair {
                self.metrics.repaired(step.what, &step.text);
                if self.told.get(&step.what).is_none_or(|at| now.since(*at) >= TELL_EVERY) {
                    self.news.entry(step.what).or_insert_with(|| step.text.clone());
                }
            }
            match number {
                0..LINES_MAX if repair => log::warn!("repair {}: {}", step.what.name(), step.text),
                0..LINES_MAX => log::info!("{}", step.text),
                LINES_MAX => log::warn!("and {} more steps", report.steps.len() - LINES_MAX),
                _ => {}
            }
        }
    }

    /// Tells the core of repairs. One with a full queue has other things to do: it is told when it has room.
    fn pass_on(&mut self, now: Mono, events: &SyncSender<Event>) {
        let told = &mut self.told;
        self.news.retain(|what, text| {
            let sent = events.try_send(Event::Repaired(what.name(), text.clone())).is_ok();
            if sent {
                told.insert(*what, now);
            }
            !sent
        });
    }

    fn warn(&mut self, error: &Error) {
        let text = error.to_string();
        if text != self.warned {
            log::warn!("host network: {text}");
            self.warned = text;
        }
    }
}

/// Notes which steps of the plan mend what was right once: those that the last intent asked for as well. The rest follows from
/// the change of the intent.
fn mark(repairs: &mut Set<String>, last: Option<&Intent>, intent: &Intent, seen: &Observation, plan: &Plan) {
    let texts = |steps: &[Step]| steps.iter().map(|step| step.text.clone()).gather::<Set<_>>();
    match last {
        Some(last) if last == intent => repairs.extend(texts(&plan.steps)),
        Some(last) if !plan.steps.is_empty() => repairs.extend(texts(&diff(last, seen).unwrap_or_default().steps)),
        _ => {}
    }
}

fn address_of(action: &Action) -> Option<IpAddr> {
    let net = match action {
        Action::AddRule(rule) => rule.src.or(rule.dst)?,
        Action::ReplaceRoute(route) => route.dst,
        _ => return None,
    };
    (net.prefix_len() == net.max_prefix_len()).then(|| net.addr())
}

fn applied(report: HostReport) -> Result<Applied> {
    let mut errors = List::new();
    for (_, error) in report.errors {
        errors.note::<()>(Err(error));
    }
    errors.into_result()?;
    let failed = report.enis.into_iter();
    let failed = failed.filter_map(|(id, result)| result.err().map(|error| (id, error.to_string()))).gather();
    Ok(Applied { failed, trunks: report.trunks })
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
