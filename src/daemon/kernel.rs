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
use crate::plan::host::{Action, Intent, Observation, Plan, Step, What, diff};
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
/// Repairs of one round that are logged one by one.
const LINES_MAX: usize = 32;

/// What the thread is asked for.
pub(super) enum Work {
    /// Make the host's network so, and tell the core.
    Apply(OpId, Box<Intent>),
    /// Tell the core which links and pods the host shows.
    List,
    /// Pods with these addresses are being deleted.
    Released(Vec<IpAddr>),
}

impl Work {
    fn name(&self) -> &'static str {
        match self {
            Work::Apply(..) => "make the host's network",
            Work::List => "list links and pods",
            Work::Released(_) => "let released pods go",
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
    // Subscribed before the first look, so that nothing is missed between.
    let monitor = Monitor::open(true).context("watch the host's network")?;
    let host = apply::Host::open().context("open the host's netlink sockets")?;
    let mut keeper = Keeper {
        host,
        monitor,
        metrics,
        watch: None,
        pace: Pace::default(),
        quarrels: Quarrels::default(),
        mended: Set::new(),
        leaving: Set::new(),
        departing: Map::new(),
        warned: String::new(),
        former: former::Watch::default(),
    };
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
                    keeper.work(work, events)?;
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
            keeper.look();
            metrics.pulse.done(Lane::Kernel);
        }
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
    /// Of those, the ones whose pods turned out to be on their way out.
    leaving: Set<IpAddr>,
    /// Pods with a branch ENI that are being deleted: index of the veth, and since when. The core has them in its intent until
    /// the API server tells otherwise.
    departing: Map<IpAddr, (u32, Mono)>,
    /// The last warning, so that it is told once.
    warned: String,
    former: former::Watch,
}

impl Keeper<'_> {
    fn work(&mut self, work: Work, events: &SyncSender<Event>) -> Result<()> {
        let event = match work {
            Work::Apply(op, mut intent) => {
                let now = clock::now().mono;
                self.departing.retain(|_, (_, since)| now.since(*since) < DEPARTURE_MAX);
                intent.branches.retain(|pod| !self.departing.contains_key(&pod.address));
                let mut primary = String::new();
                let result = self.round(&intent, true).and_then(|mut report| {
                    primary = std::mem::take(&mut report.primary);
                    applied(report)
                });
                if result.is_ok() {
                    self.former.look(&mut self.host, &intent, &primary, self.metrics);
                }
                let result = result.map_err(|error| error.to_string());
                self.metrics.rules(result.as_ref().err().map(String::as_str));
                Event::Kernel(op, result)
            }
            Work::List => Event::Seen(files::look_at_host().map_err(|error| error.to_string())),
            Work::Released(addresses) => {
                self.release(&addresses);
                return Ok(());
            }
        };
        events.send(event).context("tell the core")
    }

    // The plugin removes what these pods have, as soon as it has its answer. A round that saw it do so, and did not know,
    // has put rules back: this message was in the queue then, and they go again.
    fn release(&mut self, addresses: &[IpAddr]) {
        let Some(watch) = &mut self.watch else { return };
        for address in addresses {
            if let Some(veth) = watch.release(*address) {
                self.departing.insert(*address, (veth, clock::now().mono));
            }
            if self.mended.remove(address) {
                self.leaving.insert(*address);
                self.pace.ask(clock::now().mono);
            }
        }
    }

    /// Reads what the kernel tells.
    fn listen(&mut self) -> Result<()> {
        for _ in 0..NOTICES_MAX {
            let Some(notice) = self.monitor.next(Duration::ZERO)? else { return Ok(()) };
            if let Notice::LinkGone(link) = &notice {
                self.departing.retain(|_, (veth, _)| *veth != link.index);
            }
            if self.watch.as_ref().is_some_and(|watch| watch.concerns(&notice)) {
                self.pace.ask(clock::now().mono);
            }
        }
        Ok(())
    }

    /// A look because of what the kernel told.
    fn look(&mut self) {
        let Some(watch) = &self.watch else { return };
        let mut intent = watch.intent().clone();
        intent.gone = self.leaving.iter().copied().collect();
        let report = self.round(&intent, false);
        self.leaving.clear();
        if let Err(error) = report.and_then(applied) {
            self.warn(&error);
            self.metrics.rules(Some(&error.to_string()));
        }
    }

    /// One look at the host and the steps that follow. `regular`: the core has asked for it, maybe with a new intent.
    fn round(&mut self, intent: &Intent, regular: bool) -> Result<HostReport> {
        let begin = clock::now().mono;
        self.mended.clear();
        self.quarrels.forget(begin);
        self.metrics.host_look(regular);
        let last = self.watch.as_ref().map(Watch::intent);
        let (quarrels, metrics) = (&mut self.quarrels, self.metrics);
        let (mut repairs, mut left) = (Set::new(), Vec::new());
        let report = self.host.host_with(intent, &mut |seen, plan| {
            mark(&mut repairs, last, intent, seen, plan);
            plan.steps.retain(|step| {
                let wait = match repairs.contains(&step.text).then(|| quarrels.judge(begin, step, regular)) {
                    None | Some(Verdict::Mend) => return true,
                    Some(Verdict::GiveWay(until)) => {
                        log::warn!("{}: undone again and again; from now on it is made less often", step.text);
                        until
                    }
                    Some(Verdict::Hold(until)) => until,
                };
                metrics.repair_held(step.what);
                left.push(wait);
                false
            });
        });
        let end = clock::now().mono;
        self.pace.looked(end, end.since(begin));
        for until in left {
            self.pace.leave(until);
        }
        let mut report = report?;
        self.watch = Some(Watch::new(intent, &report.seen));
        self.tell(&report, &repairs);
        report.seen = Observation::default(); // a node has thousands of entries
        Ok(report)
    }

    fn tell(&mut self, report: &HostReport, repairs: &Set<String>) {
        for warning in &report.warnings {
            self.warn(warning);
        }
        for (number, step) in report.steps.iter().enumerate() {
            self.mended.extend(address_of(&step.action));
            let repair = repairs.contains(&step.text) && step.what != What::GonePod;
            if repair {
                self.metrics.repaired(step.what, &step.text);
            }
            match number {
                0..LINES_MAX if repair => log::warn!("repair {}: {}", step.what.name(), step.text),
                0..LINES_MAX => log::info!("{}", step.text),
                LINES_MAX => log::warn!("and {} more steps", report.steps.len() - LINES_MAX),
                _ => {}
            }
        }
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
    for error in report.errors {
        errors.note::<()>(Err(error));
    }
    errors.into_result()?;
    let failed = report.enis.into_iter();
    let failed = failed.filter_map(|(id, result)| result.err().map(|error| (id, error.to_string()))).gather();
    Ok(Applied { failed, trunks: report.trunks })
}
