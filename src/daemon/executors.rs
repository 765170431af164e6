//! The threads that carry out effects. Each owns what it talks to and sends the outcome back as an event.

use super::kernel::{self, Work};
use super::metrics::Metrics;
use super::{End, files, spawn};
use crate::aws::{ec2, imds};
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

/// The queues of the executors.
pub(super) struct Executors {
    ec2: SyncSender<(OpId, Call)>,
    imds: SyncSender<(OpId, Query)>,
    kernel: kernel::Queue,
    disk: SyncSender<Disk>,
    kube: Option<SyncSender<(OpId, kube::Call)>>,
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
            spawn(&format!("ec2-{n}"), ended, move || ec2_loop(&client, &calls, &events))?;
        }
        let (imds_queue, queries) = sync_channel(QUEUE_MAX);
        let (sender, client) = (events.clone(), Arc::clone(imds));
        let beside = store.clone();
        spawn("imds", ended, move || imds_loop(&client, &queries, &sender, &beside))?;
        let (kernel_queue, inbox) = kernel::queue().context("make the kernel thread's queue")?;
        let (sender, metrics) = (events.clone(), Arc::clone(metrics));
        spawn("kernel", ended, move || kernel::run(&inbox, &sender, &metrics))?;
        let (disk_queue, work) = sync_channel(QUEUE_MAX);
        let sender = events.clone();
        spawn("disk", ended, move || disk_loop(&store, &work, &sender))?;
        Ok(Executors { ec2: ec2_queue, imds: imds_queue, kernel: kernel_queue, disk: disk_queue, kube })
    }

    /// To be told before the plugin is: what it takes away from now on is not to be put back.
    pub(super) fn released(&self, reply: &DelNetworkReply) {
        let texts = reply.allocations.iter().flat_map(|allocation| [&allocation.ipv4, &allocation.ipv6]);
        let addresses = texts.filter_map(|text| text.parse().ok()).collect();
        // If the queue is full, the rules may be put back; the core sweeps such rules away after a while.
        self.kernel.try_send(Work::Released(addresses)).ok();
    }

    /// Hands an effect over; the event that it failed at once, if its queue is full.
    pub(super) fn carry_out(&self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Ec2(op, call) => {
                let action = call.action();
                let refused = self.ec2.try_send((op, call)).err().map(|error| full(&error))?;
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
                self.imds.try_send((op, query)).err().map(|error| Event::Imds(op, Err(full(&error))))
            }
            Effect::Kernel(op, intent) => {
                self.kernel.try_send(Work::Apply(op, intent)).err().map(|error| Event::Kernel(op, Err(full(&error))))
            }
            Effect::ListLinks => self.kernel.try_send(Work::List).err().map(|error| Event::Seen(Err(full(&error)))),
            Effect::Save(generation, content) => {
                let work = Disk::Save(generation, content);
                self.disk.try_send(work).err().map(|error| Event::Saved(generation, Err(full(&error))))
            }
            Effect::SetAside(card, _) => {
                self.disk.try_send(Disk::SetAside(card)).ok();
                None
            }
            Effect::SpoolDone(records) => {
                self.disk.try_send(Disk::SpoolDone(records)).ok(); // they are read again, and done with then
                None
            }
            Effect::Kube(op, call) => {
                let refused = match &self.kube {
                    Some(queue) => queue.try_send((op, call)).err().map(|error| full(&error)),
                    None => Some("no API server".into()),
                };
                refused.map(|message| Event::Kube(op, Err(kube::Failure { status: 0, message })))
            }
            Effect::Reply(..) | Effect::WakeAt(_) | Effect::Ready | Effect::Log(..) | Effect::Tally(_) => None, // the core's thread's own
        }
    }
}

fn full<T>(error: &TrySendError<T>) -> String {
    match error {
        TrySendError::Full(_) => "too much work waits already".into(),
        TrySendError::Disconnected(_) => "the thread that does it has ended".into(),
    }
}

fn ec2_loop(client: &ec2::Client, calls: &Mutex<Receiver<(OpId, Call)>>, events: &SyncSender<Event>) -> Result<()> {
    loop {
        // Whoever holds the lock waits for the next call; the lock goes before the call is made.
        let next = calls.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((op, call)) = next else { return Ok(()) };
        let result = client.execute(&call);
        events.send(Event::Ec2(op, result)).context("tell the core")?;
    }
}

fn imds_loop(
    client: &imds::Client,
    queries: &Receiver<(OpId, Query)>,
    events: &SyncSender<Event>,
    store: &Path,
) -> Result<()> {
    while let Ok((op, query)) = queries.recv() {
        let result = client.query(&query).map_err(|error| error.to_string());
        events.send(Event::Imds(op, result)).context("tell the core")?;
        if let Some(told) = client.to_keep()
            && let Err(error) = files::write_metadata(store, told)
        {
            log::warn!("keep what imds told: {error}"); // only a restart while IMDS is silent would need it
        }
    }
    Ok(())
}

fn disk_loop(store: &Path, work: &Receiver<Disk>, events: &SyncSender<Event>) -> Result<()> {
    loop {
        match work.recv_timeout(SPOOL_EVERY) {
            Ok(Disk::Save(generation, content)) => {
                let mut files = content.into_iter();
                let written = files.try_for_each(|(card, file)| {
                    files::write(&files::store_of(store, card), file.to_text().as_bytes())
                });
                let result = written.map_err(|error| error.to_string());
                events.send(Event::Saved(generation, result)).context("tell the core")?;
            }
            Ok(Disk::SetAside(card)) => {
                if let Err(error) = files::set_aside(&files::store_of(store, card)) {
                    log::error!("keep the unreadable checkpoint: {error}");
                }
            }
            Ok(Disk::SpoolDone(records)) => {
                let folder = Path::new(spool::DIRECTORY);
                for record in &records {
                    files::remove_record(folder, record);
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                let records = files::read_spool();
                if !records.is_empty() {
                    events.send(Event::Spool(records)).context("tell the core")?;
                }
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}
