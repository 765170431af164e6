//! The threads that carry out effects. Each owns what it talks to and sends the outcome back as an event.

use super::kernel::{self, Work};
use super::metrics::Metrics;
use super::pulse::Lane;
use super::{End, files, spawn};
use crate::aws::{ec2, imds};
use crate::clock;
use crate::error::{Context, Result};
use crate::model::checkpoint::Draft;
use crate::model::ec2::{Call, Failure};
use crate::model::imds::Query;
use crate::model::kube;
use crate::model::spool::{self, Record};
use crate::model::wire::DelNetworkReply;
use crate::plan::core::{Effect, Event, OpId};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Calls to EC2 that are out at one time.
const EC2_THREADS: usize = 3;
/// Work that waits for one executor; the core never has so much in progress.
pub(super) const QUEUE_MAX: usize = 256;
/// How often the folder of DELs that could not reach us is looked at.
const SPOOL_EVERY: Duration = Duration::from_secs(5);

enum Disk {
    Save(u64, Vec<(u32, Draft)>),
    SetAside(u32),
    SpoolDone(Vec<Record>),
}

impl Disk {
    fn name(&self) -> &'static str {
        match self {
            Disk::Save(..) => "write the checkpoint",
            Disk::SetAside(_) => "set the unreadable checkpoint aside",
            Disk::SpoolDone(_) => "remove records of DELs",
        }
    }
}

/// The queues of the executors.
pub(super) struct Executors {
    ec2: SyncSender<(OpId, Call)>,
    imds: SyncSender<(OpId, Query)>,
    kernel: kernel::Queue,
    disk: SyncSender<Disk>,
    kube: Option<SyncSender<(OpId, kube::Call)>>,
    metrics: Arc<Metrics>,
}

impl Executors {
    pub(super) fn start(
        events: &SyncSender<Event>,
        ended: &SyncSender<End>,
        imds: &Arc<imds::Client>,
        ec2: &Arc<ec2::Client>,
        metrics: &Arc<Metrics>,
        store: PathBuf,
        kube: Option<SyncSender<(OpId, kube::Call)>>,
    ) -> Result<Executors> {
        let (ec2_queue, calls) = sync_channel(QUEUE_MAX);
        let calls = Arc::new(Mutex::new(calls));
        for n in 0..EC2_THREADS {
            let (events, client, calls) = (events.clone(), Arc::clone(ec2), Arc::clone(&calls));
            let metrics = Arc::clone(metrics);
            spawn(&format!("ec2-{n}"), ended, move || ec2_loop(&client, &calls, &events, &metrics))?;
        }
        let (imds_queue, queries) = sync_channel(QUEUE_MAX);
        let (sender, client) = (events.clone(), Arc::clone(imds));
        let (beside, watched) = (store.clone(), Arc::clone(metrics));
        spawn("imds", ended, move || imds_loop(&client, &queries, &sender, &beside, &watched))?;
        let (kernel_queue, inbox) = kernel::queue().context("make the kernel thread's queue")?;
        let (sender, watched) = (events.clone(), Arc::clone(metrics));
        spawn("kernel", ended, move || kernel::run(&inbox, &sender, &watched))?;
        let (disk_queue, work) = sync_channel(QUEUE_MAX);
        let (sender, watched) = (events.clone(), Arc::clone(metrics));
        spawn("disk", ended, move || disk_loop(&store, &work, &sender, &watched))?;
        let metrics = Arc::clone(metrics);
        Ok(Executors { ec2: ec2_queue, imds: imds_queue, kernel: kernel_queue, disk: disk_queue, kube, metrics })
    }

    /// To be told before the plugin is: what it takes away from now on is not to be put back.
    pub(super) fn released(&self, reply: &DelNetworkReply) {
        let texts = reply.allocations.iter().flat_map(|allocation| [&allocation.ipv4, &allocation.ipv6]);
        let addresses = texts.filter_map(|text| text.parse().ok()).collect();
        let work = Work::Released(addresses, clock::now().mono);
        // If the queue is full, the rules may be put back; the core sweeps such rules away after a while.
        self.give(Lane::Kernel, || put(self.kernel.try_send(work)));
    }

    // Counted before it can be done; why it could not be handed over.
    fn give(&self, lane: Lane, send: impl FnOnce() -> std::result::Result<(), String>) -> Option<String> {
        self.metrics.pulse.handed(lane);
        let refused = send().err();
        if refused.is_some() {
            self.metrics.pulse.done(lane);
        }
        refused
    }

    /// Hands an effect over; the event that it failed at once, if its queue is full.
    pub(super) fn carry_out(&self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Ec2(op, call) => {
                let action = call.action();
                let refused = self.give(Lane::Ec2, || put(self.ec2.try_send((op, call))))?;
                let failure = Failure {
                    action,
                    code: String::new(),
                    message: refused,
                    status: 0,
                    request_id: String::new(),
                    maybe_applied: false,
                };
                Some(Event::Ec2(op, Err(failure)))
            }
            Effect::Imds(op, query) => {
                let refused = self.give(Lane::Imds, || put(self.imds.try_send((op, query))));
                refused.map(|error| Event::Imds(op, Err(error)))
            }
            Effect::Kernel(op, intent) => {
                let refused = self.give(Lane::Kernel, || put(self.kernel.try_send(Work::Apply(op, intent))));
                refused.map(|error| Event::Kernel(op, Err(error)))
            }
            Effect::ListLinks => {
                let refused = self.give(Lane::Kernel, || put(self.kernel.try_send(Work::List)));
                refused.map(|error| Event::Seen(Err(error)))
            }
            Effect::Save(generation, content) => {
                let refused = self.give(Lane::Disk, || put(self.disk.try_send(Disk::Save(generation, content))));
                refused.map(|error| Event::Saved(generation, Err(error)))
            }
            Effect::SetAside(card, _) => {
                self.give(Lane::Disk, || put(self.disk.try_send(Disk::SetAside(card))));
                None
            }
            Effect::SpoolDone(records) => {
                self.give(Lane::Disk, || put(self.disk.try_send(Disk::SpoolDone(records)))); // they are read again, and done with then
                None
            }
            Effect::Kube(op, call) => {
                let refused = match &self.kube {
                    Some(queue) => self.give(Lane::Kube, || put(queue.try_send((op, call)))),
                    None => Some("no API server".into()),
                };
                refused.map(|message| Event::Kube(op, Err(kube::Failure { status: 0, message })))
            }
            Effect::Reply(..) | Effect::WakeAt(_) | Effect::Ready | Effect::Log(..) | Effect::Tally(_) => None, // the core's thread's own
        }
    }
}

fn put<T>(sent: std::result::Result<(), TrySendError<T>>) -> std::result::Result<(), String> {
    sent.map_err(|error| match error {
        TrySendError::Full(_) => "too much work waits already".into(),
        TrySendError::Disconnected(_) => "the thread that does it has ended".into(),
    })
}

fn ec2_loop(
    client: &ec2::Client,
    calls: &Mutex<Receiver<(OpId, Call)>>,
    events: &SyncSender<Event>,
    metrics: &Metrics,
) -> Result<()> {
    loop {
        // Whoever holds the lock waits for the next call; the lock goes before the call is made.
        let next = calls.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((op, call)) = next else { return Ok(()) };
        metrics.pulse.begin(Lane::Ec2, call.action());
        let result = client.execute(&call);
        events.send(Event::Ec2(op, result)).context("tell the core")?;
        metrics.pulse.done(Lane::Ec2);
    }
}

fn imds_loop(
    client: &imds::Client,
    queries: &Receiver<(OpId, Query)>,
    events: &SyncSender<Event>,
    store: &Path,
    metrics: &Metrics,
) -> Result<()> {
    while let Ok((op, query)) = queries.recv() {
        metrics.pulse.begin(Lane::Imds, "a question to IMDS");
        let result = client.query(&query).map_err(|error| error.to_string());
        events.send(Event::Imds(op, result)).context("tell the core")?;
        if let Some(told) = client.to_keep()
            && let Err(error) = files::write_metadata(store, told)
        {
            log::warn!("keep what imds told: {error}"); // only a restart while IMDS is silent would need it
        }
        metrics.pulse.done(Lane::Imds);
    }
    Ok(())
}

fn disk_loop(store: &Path, work: &Receiver<Disk>, events: &SyncSender<Event>, metrics: &Metrics) -> Result<()> {
    loop {
        let work = work.recv_timeout(SPOOL_EVERY);
        match &work {
            Ok(work) => metrics.pulse.begin(Lane::Disk, work.name()),
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {
                metrics.pulse.handed(Lane::Disk);
                metrics.pulse.begin(Lane::Disk, "read the spool of DELs");
            }
        }
        match work.ok() {
            Some(Disk::Save(generation, content)) => {
                let mut files = content.into_iter();
                let written =
                    files.try_for_each(|(card, file)| files::write_draft(&files::store_of(store, card), &file));
                let result = written.map_err(|error| error.to_string());
                events.send(Event::Saved(generation, result)).context("tell the core")?;
            }
            Some(Disk::SetAside(card)) => {
                if let Err(error) = files::set_aside(&files::store_of(store, card)) {
                    log::error!("keep the unreadable checkpoint: {error}");
                }
            }
            Some(Disk::SpoolDone(records)) => {
                let folder = Path::new(spool::DIRECTORY);
                for record in &records {
                    files::remove_record(folder, record);
                }
            }
            None => {
                let records = files::read_spool();
                if !records.is_empty() {
                    events.send(Event::Spool(records)).context("tell the core")?;
                }
            }
        }
        metrics.pulse.done(Lane::Disk);
    }
}
