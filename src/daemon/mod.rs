//! The node daemon: threads and wiring around the core (`design.md` 5).
//!
//! One thread owns the core and blocks on one bounded channel. What takes time is done by others, which send the outcome
//! back as an event: `ec2-N`, `imds`, `kernel`, `disk`, `kube-N`, `rpc` and its connections; `http` shows a copy. Nothing is decided here. A
//! thread that ends unexpectedly ends the process: the state is on disk, and the kubelet starts us again.

mod executors;
mod files;
mod former;
mod instance;
mod introspect;
mod kernel;
mod kube;
mod metrics;
mod pulse;
mod rpc_server;
mod status;
mod tuning;

use crate::apply;
use crate::aws::{creds, ec2, imds};
use crate::clock;
use crate::error::{Context, Error, Result, exit};
use crate::logging;
use crate::model::imds::Identity;
use crate::model::limits::Limits;
use crate::model::map::Map;
use crate::model::naming;
use crate::model::settings::layers::{ENVIRONMENT, environment_to_text};
use crate::model::settings::{Mode, Settings, Valid};
use crate::model::time::Mono;
use crate::model::wire::NetworkPolicyAgentConfig;
use crate::netlink::{Socket, link, sysctl};
use crate::plan::configure;
use crate::plan::core::{Answer, CallId, Config, Core, Effect, Event, Level};
use crate::rpc::stop::Stop;
use crate::sys;
use executors::Executors;
use introspect::{Board, View};
use metrics::Metrics;
use pulse::Lane;
use rpc_server::Desk;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tuning::{Known, Notes, Tuner};

/// Events that wait for the core. 32 connections bring at most one each; the rest are outcomes of operations.
const EVENTS_MAX: usize = 1024;
/// How long the process waits for its threads at the end.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// What operators see is renewed when nothing has happened for so long, and so often when something happens all the time. It
/// takes milliseconds where there are a thousand pods: no ADD that comes alone waits for it.
const PUBLISH_AFTER: Duration = Duration::from_millis(50);
const PUBLISH_EVERY: Duration = Duration::from_secs(1);
/// The core looks at the clock at least so often, whatever it is waiting for.
const SLEEP_MAX: Duration = Duration::from_mins(1);

/// Plugins that wait for their answers.
#[derive(Clone, Default)]
struct Calls(Arc<Mutex<OpenCalls>>);

#[derive(Default)]
struct OpenCalls {
    last: CallId,
    waiting: Map<CallId, SyncSender<Answer>>,
}

impl Calls {
    fn open(&self) -> (CallId, Receiver<Answer>) {
        let (sender, receiver) = sync_channel(1);
        let mut calls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        calls.last += 1;
        let id = calls.last;
        calls.waiting.insert(id, sender);
        (id, receiver)
    }

    fn answer(&self, id: CallId, answer: Answer) {
        if let Some(sender) = self.close(id) {
            sender.try_send(answer).ok(); // the caller gave up in this moment
        }
    }

    fn close(&self, id: CallId) -> Option<SyncSender<Answer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).waiting.remove(&id)
    }
}

/// Why the process is to end.
enum End {
    Signal(i32),
    Thread(String),
}

/// What somebody wants to do once plugins are served, with the settings that count and the node's identity.
type Ready = Box<dyn FnOnce(&Settings, &Identity) -> Result<()> + Send>;

/// Runs the daemon until a signal ends it; the exit code.
pub fn run() -> u8 {
    run_then(Box::new(|_, _| Ok(())))
}

/// The same; `ready` is called once, on a thread of its own, as soon as plugins are served. Its error ends the daemon.
pub fn run_then(ready: Ready) -> u8 {
    let tuner = Tuner::read();
    let settings = &tuner.known().layered.settings;
    let log_file = settings.log_file.clone();
    logging::init(&log_file, &settings.log_level, logging::Stdout::Allowed);
    log::info!("enibox {} starting as the node's IPAM daemon", crate::VERSION);
    match serve(tuner, ready) {
        Ok(()) => exit::OK,
        Err(error) => {
            log::error!("{error}");
            if !matches!(log_file.to_ascii_lowercase().as_str(), "" | "stderr" | "stdout") {
                // Whoever started us may have closed it; the log has it in any case.
                let _ = writeln!(std::io::stderr(), "aws-k8s-agent: {error}");
            }
            exit::FAILURE
        }
    }
}

// The settings to start with, told in the log.
fn settle(tuner: &mut Tuner) -> Result<Settings> {
    let settings = &tuner.known().layered.settings;
    apply::find_a_way(settings.enable_ipv6 || settings.v6_egress);
    if tuner.is_first()
        && let Some(node) = kube::look(&tuner.known().layered.settings)
    {
        tuner.begin_with(&node);
    }
    let Known { layered, wrong, .. } = tuner.known();
    logging::set_level(&layered.settings.log_level);
    for line in wrong {
        log::warn!("{line}");
    }
    for line in layered.settings.effective().filter(|line| !line.is_default) {
        log::info!("setting {line} ({})", layered.source(line.variable));
    }
    if let Some(complaint) = layered.complaints.iter().find(|complaint| complaint.fatal) {
        return Err(Error::new(complaint.to_string()));
    }
    layered.settings.check().map_err(Error::new).context("settings")?;
    keep_environment(&layered.settings);
    Ok(layered.settings.clone())
}

// For the operator's commands, should they run where these variables are not set and we cannot be asked.
fn keep_environment(settings: &Settings) {
    let path = Path::new(&settings.backing_store).with_file_name(ENVIRONMENT);
    let text = environment_to_text(|name| std::env::var(name).ok());
    if std::fs::read(&path).is_ok_and(|kept| kept == text.as_bytes()) {
        return;
    }
    if let Err(error) = files::write(&path, text.as_bytes()) {
        log::warn!("{error}");
    }
}

/// Starts, and serves until a signal or a failure ends it.
///
/// What a start waits for may never answer: IMDS, EC2, the API server. A signal must end it all the same, within the time that
/// the kubelet gives us. Hence the start has a thread of its own, which is left where it is.
fn serve(mut tuner: Tuner, ready: Ready) -> Result<()> {
    // Before any thread starts, so that all inherit the mask and only the waiting thread gets them.
    sys::block_signals().context("block signals")?;
    let (ended, ends) = sync_channel(16);
    let metrics = Arc::new(Metrics::new());
    let (signals, watched) = (ended.clone(), Arc::clone(&metrics));
    spawn("signal", &ended, move || wait_for_signal(&signals, &watched))?;
    let (started, running) = sync_channel(1);
    let starting =
        move || match settle(&mut tuner).and_then(|settings| start(&settings, tuner, ready, &ended, &metrics)) {
            Ok(running) => drop(started.try_send(running)), // only a process that ends already has nobody to take it
            Err(error) => drop(ended.try_send(End::Thread(error.to_string()))), // as in `spawn`
        };
    std::thread::Builder::new().name("start".into()).spawn(starting).context("start thread start")?;

    let end = ends.recv().context("wait for the end")?;
    let running = running.try_recv().ok();
    let result = match end {
        End::Signal(signal) => {
            log::info!(
                "signal {signal}: {}",
                if running.is_some() { "stopping" } else { "leaving before the start is done" }
            );
            Ok(())
        }
        End::Thread(reason) => Err(Error::new(reason)),
    };
    if let Some(running) = running {
        if result.is_ok() {
            // STATUS asks for it (`plugin`); without it the node is NotReady until the next start, no more.
            std::fs::write(naming::DAEMON_STOPPED, "").ok();
        }
        running.stop();
    }
    log::info!("stopped");
    result
}

/// What has to be told when the process ends.
struct Running {
    events: SyncSender<Event>,
    stop: Stop,
    closed: Receiver<()>,
}

impl Running {
    /// Running requests may finish; pods keep their network whatever happens here (`spec/ipamd.md` 14).
    fn stop(self) {
        self.events.send(Event::Stop).ok();
        self.stop.stop();
        if self.closed.recv_timeout(STOP_LIMIT) == Err(RecvTimeoutError::Timeout) {
            log::warn!("requests are still running; leaving all the same");
        }
    }
}

/// Everything until the threads are there.
fn start(
    settings: &Settings,
    tuner: Tuner,
    ready: Ready,
    ended: &SyncSender<End>,
    metrics: &Arc<Metrics>,
) -> Result<Running> {
    let env = |name: &str| std::env::var(name).ok();
    let board = Board::new(settings, tuner.known().clone());
    introspect::start(settings, &board, metrics, ended)?;
    let store = PathBuf::from(&settings.backing_store);
    let imds = Arc::new(imds_client(settings, &store, metrics)?);
    let identity = identify(settings, &imds)?;
    let creds = Arc::new(creds::Chain::from_env(env, Arc::clone(&imds))?);
    let counted = Arc::clone(metrics);
    let ec2 = ec2::Client::new(ec2::Config::from_env(env, &identity.region), creds)?;
    let ec2 = Arc::new(ec2.observed_by(move |seen| counted.ec2(seen)));
    let limits = instance::limits(&identity.instance_type, settings, &ec2)?;
    let valid = settings.validate(&limits).map_err(Error::new).context("settings")?;
    for warning in &valid.warnings {
        log::warn!("{warning}");
    }
    let config = configure(settings, &valid, &limits, &identity)?;
    if !config.v6 {
        warn_of_forwarding();
    }
    let policy = policy(settings, &config, &identity);

    let api = kube::reach(settings)?;
    let (events, inbox) = sync_channel(EVENTS_MAX);
    let stop = Stop::new();
    let started = files::read_start(&store, config.cards.keys().copied(), config.v6)?;
    board.introduce(&identity, valid.mode);
    let api = api.start(&events, ended, metrics)?;
    let executors = Executors::start(&events, ended, &imds, &ec2, metrics, store, api)?;
    let calls = Calls::default();
    let (open, closed) = sync_channel::<()>(0); // `open` goes when the last request is served
    let rpc = {
        let (events, calls, metrics) = (events.clone(), calls.clone(), Arc::clone(metrics));
        let (desk, stop, ended) = (Desk { events, calls, policy, metrics }, stop.clone(), ended.clone());
        let (settings, identity) = (settings.clone(), identity.clone());
        move || {
            rpc_server::start(Path::new(naming::DAEMON_SOCKET), desk, stop, &ended, open)?;
            // A crash from here on is no replacement.
            std::fs::remove_file(naming::DAEMON_STOPPED).ok();
            tell_ready(ready, settings, identity, &ended)
        }
    };
    metrics.initialising();
    events.send(started).context("start the core")?;
    let notes = tuning::start(tuner, identity, board.clone(), events.clone(), ended)?;
    let metrics = Arc::clone(metrics);
    let hands = Hands { executors, calls, metrics, board, notes, mode: valid.mode };
    spawn("core", ended, move || core_loop(Core::new(config), &inbox, &hands, rpc))?;
    Ok(Running { events, stop, closed })
}

fn imds_client(settings: &Settings, store: &Path, metrics: &Arc<Metrics>) -> Result<imds::Client> {
    // Where EC2 is not to be asked, nothing could tell what has changed since.
    let told = if settings.imds_only { serde_json::Map::new() } else { files::read_metadata(store) };
    let imds = imds::Client::new(imds::Config::from_env(|name| std::env::var(name).ok()))?.remembering(told);
    let counted = Arc::clone(metrics);
    Ok(imds.observed_by(move |seen| counted.imds(seen)))
}

// The system's image sets it; neither our init container nor the daemon does (`spec/dataplane.md` 4). In IPv6 mode forwarding is
// part of what the daemon keeps.
fn warn_of_forwarding() {
    if sysctl::read("net/ipv4/ip_forward").is_ok_and(|value| value == "0") {
        log::warn!(
            "net.ipv4.ip_forward is 0: this node passes on no packet, so pods reach nothing but the node itself; set it \
             (sysctl -w net.ipv4.ip_forward=1, and in /etc/sysctl.d to last) or run `enibox doctor --fix`"
        );
    }
}

// What the network policy agent asks for.
fn policy(settings: &Settings, config: &Config, identity: &Identity) -> NetworkPolicyAgentConfig {
    NetworkPolicyAgentConfig {
        network_policy_mode: config.network_policy_mode.clone(),
        multi_nic_enabled: settings.multi_nic,
        node_ipv4: if config.v6 { String::new() } else { identity.local_ipv4.to_string() },
        node_ipv6: identity.local_ipv6.filter(|_| config.v6).map(|ip| ip.to_string()).unwrap_or_default(),
        instance_id: identity.instance.0.clone(),
        region: identity.region.clone(),
    }
}

// Who we are; with the node's IPv6 address where it is used.
fn identify(settings: &Settings, imds: &imds::Client) -> Result<Identity> {
    let links = Socket::route().and_then(|mut socket| link::list(&mut socket))?;
    let identity = imds.identity(configure::needs_v6(settings, &links)).context("read the instance's identity")?;
    if (settings.enable_ipv6 || settings.v6_egress) && identity.local_ipv6.is_none() {
        let missing = "the primary ENI has no IPv6 address";
        if settings.enable_ipv6 {
            return Err(Error::new(missing).context("ENABLE_IPv6"));
        }
        log::warn!("ENABLE_V6_EGRESS: {missing}: nothing is translated");
    }
    Ok(identity)
}

// This thread has nothing else to do, so it looks after the others meanwhile.
fn wait_for_signal(ended: &SyncSender<End>, metrics: &Metrics) -> Result<()> {
    loop {
        match sys::wait_signal(pulse::LOOK_EVERY).context("wait for a signal")? {
            Some(signal) => drop(ended.send(End::Signal(signal))),
            None => metrics.look_after_threads(),
        }
    }
}

/// Starts a named thread whose end, for whatever reason, is told.
fn spawn(
    name: &str,
    ended: &SyncSender<End>,
    work: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<std::thread::JoinHandle<()>> {
    let (ended, label) = (ended.clone(), name.to_owned());
    let body = move || {
        // A panic ends the release at once. Elsewhere what the thread was to answer would be waited for in vain.
        let reason = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
            Ok(Ok(())) => format!("thread {label} ended"),
            Ok(Err(error)) => format!("thread {label}: {error}"),
            Err(_) => format!("thread {label} panicked"),
        };
        ended.try_send(End::Thread(reason)).ok(); // a full queue means that the process is ending already
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(body).with_context(|| format!("start thread {name}"))
}

/// Does what is to be done once plugins are served, on a thread of its own. That it ends is no reason to end, but failing is.
fn tell_ready(ready: Ready, settings: Settings, identity: Identity, ended: &SyncSender<End>) -> Result<()> {
    let ended = ended.clone();
    let body = move || {
        if let Err(error) = ready(&settings, &identity) {
            ended.try_send(End::Thread(error.to_string())).ok(); // as in `spawn`
        }
    };
    std::thread::Builder::new().name("install".into()).spawn(body).context("start thread install")?;
    Ok(())
}

// From the settings and the instance to what the core wants to know.
fn configure(settings: &Settings, valid: &Valid, limits: &Limits, identity: &Identity) -> Result<Config> {
    let mut seed = [0; 8];
    sys::random_bytes(&mut seed).context("seed the random numbers")?;
    Ok(configure::config(settings, valid, limits, identity, u64::from_ne_bytes(seed)))
}

/// What the core's thread acts with.
struct Hands {
    executors: Executors,
    calls: Calls,
    metrics: Arc<Metrics>,
    board: Board,
    notes: Notes,
    mode: Mode,
}

impl Hands {
    fn publish(&self, core: &Core) {
        let (eni_limit, slots) = core.room();
        self.board.publish(View {
            pool: core.pool().clone(),
            status: Some(core.status()),
            at: clock::now(),
            mode: self.mode,
            eni_limit,
            slots,
            intent: core.intent(Duration::ZERO),
        });
    }
}

fn core_loop(mut core: Core, inbox: &Receiver<Event>, hands: &Hands, rpc: impl FnOnce() -> Result<()>) -> Result<()> {
    let mut rpc = Some(rpc);
    let (mut wake_at, mut with_api_server) = (None, false);
    let mut stale = Some(clock::now().mono); // since when the published view is older than the core
    loop {
        let sleep = wake_at.map_or(SLEEP_MAX, |at: Mono| at.since(clock::now().mono));
        let rest = sleep.min(if stale.is_some() { PUBLISH_AFTER } else { SLEEP_MAX });
        hands.metrics.pulse.rest(Lane::Core, rest);
        let event = match inbox.recv_timeout(rest) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) if stale.is_some() && sleep > PUBLISH_AFTER => {
                hands.publish(&core);
                stale = None;
                continue;
            }
            Err(RecvTimeoutError::Timeout) => Event::Tick,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        hands.metrics.pulse.begin(Lane::Core, name_of(&event));
        let now = clock::now().mono;
        if stale.is_some_and(|since| now.since(since) > PUBLISH_EVERY) {
            hands.publish(&core);
            stale = None;
        }
        stale.get_or_insert(now);
        match &event {
            Event::Stop => rpc = None,
            Event::NodeSeen(node) => {
                with_api_server = true;
                hands.notes.node_seen(node);
            }
            _ => {}
        }
        // Effects that cannot be handed over fail at once, which is an event again.
        let mut next = std::collections::VecDeque::from([event]);
        while let Some(event) = next.pop_front() {
            for effect in core.step(clock::now(), event) {
                match effect {
                    Effect::Reply(call, answer) => {
                        if let Answer::Del(reply) = &answer {
                            hands.executors.released(reply);
                        }
                        hands.calls.answer(call, answer);
                    }
                    Effect::WakeAt(at) => wake_at = Some(at),
                    Effect::Log(level, text) => log::log!(log_level(level), "{text}"),
                    Effect::Tally(tally) => hands.metrics.count(tally),
                    Effect::Ready => {
                        if let Some(rpc) = rpc.take() {
                            rpc().context("serve the plugins")?;
                            hands.metrics.started(with_api_server);
                        }
                    }
                    effect => next.extend(hands.executors.carry_out(effect)),
                }
            }
        }
    }
}

fn name_of(event: &Event) -> &'static str {
    match event {
        Event::Add(..) => "ADD",
        Event::Del(..) => "DEL",
        Event::Ec2(..) => "EC2's answer",
        Event::Imds(..) => "IMDS's answer",
        Event::Kube(..) => "the API server's answer",
        Event::Kernel(..) => "the host's network is made",
        Event::Saved(..) => "the checkpoint is written",
        Event::Tick => "a deadline",
        _ => "news",
    }
}

fn log_level(level: Level) -> log::Level {
    match level {
        Level::Debug => log::Level::Debug,
        Level::Info => log::Level::Info,
        Level::Warn => log::Level::Warn,
        Level::Error => log::Level::Error,
    }
}
