//! The API server's place in the daemon (`spec/kubernetes.md` 5): what has to wait for it, the watches of our node and its
//! pods, and the threads that carry out the core's calls.
//!
//! Without a feature that needs it nothing here delays the start, or anything else: an API server that is away is looked for
//! by the watches, in their own time.

use super::executors::QUEUE_MAX;
use super::metrics::Metrics;
use super::pulse::Lane;
use super::{End, spawn};
use crate::error::{Context, Error, Result};
use crate::kube::config::SERVICE_ACCOUNT;
use crate::kube::events::Writer;
use crate::kube::{Client, Config, Seen, objects};
use crate::model::ids::PodName;
use crate::model::kube::{Call, Node, Reply};
use crate::model::map::Map;
use crate::model::settings::Settings;
use crate::plan::core::{Event, OpId};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Calls to the API server that are out at one time.
const THREADS: usize = 2;
/// Pods whose branch ENI is waited for at one time, each on a thread of its own: the others' calls must not wait behind
/// them. For a further one the kubelet tries again.
const BRANCHES_MAX: usize = 32;
/// Pause between two attempts to reach it while the start waits.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Reading our node at the start: one attempt, and their number.
const NODE_LIMIT: Duration = Duration::from_secs(10);
const NODE_ATTEMPTS: u32 = 3;

/// A start that knows nothing of the node waits so long for it: settings may stand in it.
const FIRST_LIMIT: Duration = Duration::from_secs(2);

/// The API server, if there is one.
pub(super) struct Api {
    server: Option<(Client, Writer)>,
    node: Option<Node>,
}

/// Finds the API server; waits for it if a feature that is on cannot do without.
pub(super) fn reach(settings: &Settings) -> Result<Api> {
    let features = [
        (settings.pod_eni, "ENABLE_POD_ENI"),
        (settings.custom_networking, "AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG"),
        (settings.annotate_pod_ip, "ANNOTATE_POD_IP"),
    ];
    let needed = features.iter().find(|(on, _)| *on).map(|(_, what)| *what);
    let server = match (find(settings), needed) {
        (Ok(client), _) => Some(client),
        (Err(error), Some(what)) => return Err(error.context(format!("find the API server, which {what} needs"))),
        (Err(error), None) => {
            log::warn!("going on without the API server: {error}");
            None
        }
    };
    let Some((client, _)) = server.as_ref().filter(|_| needed.is_some()) else {
        return Ok(Api { server, node: None });
    };
    wait(client)?;
    let mut attempt = 1;
    let node = loop {
        match client.node(NODE_LIMIT) {
            Ok(node) => break node,
            Err(trouble) if attempt < NODE_ATTEMPTS && !trouble.is_final() => {
                log::warn!("read our node: {trouble}; again");
                attempt += 1;
            }
            Err(trouble) => return Err(trouble).context("read our node"),
        }
    };
    Ok(Api { server, node: Some(node) })
}

/// Our node, if the API server gives it at once. If not, the watches will tell why.
pub(super) fn look(settings: &Settings) -> Option<Node> {
    let (client, _) = find(settings).ok()?;
    client.node(FIRST_LIMIT).inspect_err(|trouble| log::info!("starting without our node: {trouble}")).ok()
}

fn find(settings: &Settings) -> Result<(Client, Writer)> {
    if settings.node_name.is_empty() {
        return Err(Error::new("MY_NODE_NAME is not set"));
    }
    match Config::find(settings, Path::new(SERVICE_ACCOUNT))? {
        Some(config) => Client::new(config),
        None => Err(Error::new("none is named: neither KUBERNETES_SERVICE_HOST with a token, nor CLUSTER_ENDPOINT")),
    }
}

// Everything may pass but a certificate and credentials that are refused.
fn wait(client: &Client) -> Result<()> {
    let mut cause = String::new();
    loop {
        match client.probe() {
            Ok(()) => return Ok(()),
            Err(trouble) if trouble.is_final() => return Err(trouble).context("reach the API server"),
            Err(trouble) => {
                let text = trouble.to_string();
                if text != cause {
                    log::warn!("waiting for the API server: {text}");
                    cause = text;
                }
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

impl Api {
    /// Starts the threads; where calls go. A node that was read already is told first.
    pub(super) fn start(
        self,
        events: &SyncSender<Event>,
        ended: &SyncSender<End>,
        metrics: &Arc<Metrics>,
    ) -> Result<Option<SyncSender<(OpId, Call)>>> {
        let Some((client, writer)) = self.server else { return Ok(None) };
        if let Some(node) = self.node.clone() {
            events.send(Event::NodeSeen(Box::new(node))).context("tell of our node")?;
        }
        let client = Arc::new(client);
        let (queue, calls) = sync_channel(QUEUE_MAX);
        let calls = Arc::new(Mutex::new(calls));
        for n in 0..THREADS {
            let (events, client, calls) = (events.clone(), Arc::clone(&client), Arc::clone(&calls));
            let metrics = Arc::clone(metrics);
            spawn(&format!("kube-{n}"), ended, move || serve(&client, &calls, &events, &metrics))?;
        }
        let (sender, watching, known) = (events.clone(), Arc::clone(&client), self.node);
        spawn("kube-node", ended, move || {
            watch_node(&watching, &sender, known);
            Ok(())
        })?;
        let (sender, watching) = (events.clone(), Arc::clone(&client));
        spawn("kube-pods", ended, move || {
            watch_pods(&watching, &sender);
            Ok(())
        })?;
        spawn("kube-events", ended, move || {
            writer.run(&client);
            Ok(())
        })?;
        Ok(Some(queue))
    }
}

fn serve(
    client: &Arc<Client>,
    calls: &Mutex<Receiver<(OpId, Call)>>,
    events: &SyncSender<Event>,
    metrics: &Metrics,
) -> Result<()> {
    static BRANCHES: AtomicUsize = AtomicUsize::new(0);
    loop {
        // Whoever holds the lock waits for the next call; the lock goes before the call is made.
        let next = calls.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((op, call)) = next else { return Ok(()) };
        metrics.pulse.begin(Lane::Kube, "a call of the API server");
        let result = client.execute(&at_once(&call));
        metrics.pulse.done(Lane::Kube);
        let waits =
            matches!(&result, Ok(Reply::Pod(pod)) if matches!(call, Call::PodWithBranch { .. }) && pod.lacks_branch());
        if waits && BRANCHES.fetch_add(1, Ordering::Relaxed) < BRANCHES_MAX {
            let (client, events) = (Arc::clone(client), events.clone());
            let wait = move || {
                let result = client.execute(&call);
                BRANCHES.fetch_sub(1, Ordering::Relaxed);
                events.send(Event::Kube(op, result)).ok(); // nobody is there at the end of the process
            };
            if std::thread::Builder::new().name("kube-branch".into()).spawn(wait).is_ok() {
                continue;
            }
        }
        if waits {
            BRANCHES.fetch_sub(1, Ordering::Relaxed);
        }
        events.send(Event::Kube(op, result)).context("tell the core")?;
    }
}

// The call without its wait.
fn at_once(call: &Call) -> Call {
    match call.clone() {
        Call::PodWithBranch { namespace, name } => Call::Pod { namespace, name },
        call => call,
    }
}

// The heartbeat of the kubelet changes the object every few minutes, and nothing that we look at.
fn watch_node(client: &Client, events: &SyncSender<Event>, mut known: Option<Node>) {
    let selector = format!("metadata.name={}", client.config().node);
    client.watch("/api/v1/nodes", &selector).run(&mut |seen| {
        let (Seen::Item(object) | Seen::Set(object)) = seen else { return true };
        let node = objects::node(&object);
        if known.as_ref() == Some(&node) {
            return true;
        }
        let cordoned = if node.unschedulable { ", cordoned" } else { "" };
        log::debug!("our node takes {} pods{cordoned}", node.max_pods.unwrap_or(0));
        known = Some(node.clone());
        events.send(Event::NodeSeen(Box::new(node))).is_ok()
    });
}

fn watch_pods(client: &Client, events: &SyncSender<Event>) {
    let selector = format!("spec.nodeName={}", client.config().node);
    let mut pods = Pods::default();
    client.watch("/api/v1/pods", &selector).run(&mut |seen| {
        let news = pods.see(&seen);
        if let Some(count) = news.needing {
            log::debug!("{count} pods of our node need an address");
        }
        let needing = news.needing.map(Event::PodsSeen);
        let branches = news.branches.map(Event::BranchesSeen);
        needing.into_iter().chain(branches).all(|event| events.send(event).is_ok())
    });
}

// What is kept of a pod: whether it needs an address, or its name and what is told of its branch ENI.
#[derive(Clone, PartialEq, Eq)]
enum Kept {
    Needs,
    Branch(PodName, String),
}

fn kept(pod: &serde_json::Value) -> Option<Kept> {
    if objects::needs_address(pod) {
        return Some(Kept::Needs);
    }
    let annotation = objects::branch(pod)?;
    let name = PodName {
        namespace: objects::text(pod, "/metadata/namespace").to_owned(),
        name: objects::text(pod, "/metadata/name").to_owned(),
    };
    Some(Kept::Branch(name, annotation.to_owned()))
}

// The pods of our node that need an address or have a branch ENI, by uid.
#[derive(Default)]
struct Pods {
    there: Map<String, Kept>,
    listed: Map<String, Kept>, // of a list that is not whole yet
    told: Option<(usize, Vec<(PodName, String)>)>,
}

// What has changed.
#[derive(Debug, Default, PartialEq, Eq)]
struct News {
    needing: Option<usize>,
    branches: Option<Vec<(PodName, String)>>,
}

impl Pods {
    fn see(&mut self, seen: &Seen) -> News {
        let put = |pods: &mut Map<String, Kept>, pod: &serde_json::Value| match kept(pod) {
            Some(kept) => drop(pods.insert(uid(pod), kept)),
            None => drop(pods.remove(&uid(pod))),
        };
        match seen {
            Seen::List => self.listed.clear(),
            Seen::Item(pod) => put(&mut self.listed, pod),
            Seen::Listed => self.there = std::mem::take(&mut self.listed),
            Seen::Set(pod) => put(&mut self.there, pod),
            Seen::Gone(pod) => drop(self.there.remove(&uid(pod))),
        }
        if self.told.is_none() && !matches!(seen, Seen::Listed) {
            return News::default();
        }
        let needing = self.there.values().filter(|kept| **kept == Kept::Needs).count();
        let branches = self.there.values().filter_map(|kept| match kept {
            Kept::Branch(name, annotation) => Some((name.clone(), annotation.clone())),
            Kept::Needs => None,
        });
        let branches = branches.collect::<Vec<_>>();
        let told = self.told.replace((needing, branches.clone()));
        let (was_needing, had) = told.map_or((None, Vec::new()), |(needing, branches)| (Some(needing), branches));
        News {
            needing: Some(needing).filter(|_| was_needing != Some(needing)),
            branches: Some(branches).filter(|branches| *branches != had),
        }
    }
}

fn uid(pod: &serde_json::Value) -> String {
    objects::text(pod, "/metadata/uid").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::map::Set;
    use serde_json::json;

    #[test]
    fn pods_are_counted() {
        let pod = |uid: &str, phase: &str| json!({"metadata": {"uid": uid}, "status": {"phase": phase}});
        let mut pods = Pods::default();
        let mut check = |seen: Seen, needing: Option<usize>| {
            assert_eq!(pods.see(&seen), News { needing, branches: None }, "{seen:?}");
        };
        check(Seen::List, None);
        check(Seen::Item(pod("a", "Running")), None);
        check(Seen::Item(pod("b", "Succeeded")), None);
        check(Seen::Listed, Some(1));
        check(Seen::Set(pod("a", "Running")), None);
        check(Seen::Set(pod("c", "Pending")), Some(2));
        check(Seen::Set(pod("a", "Failed")), Some(1));
        check(Seen::Gone(pod("a", "Failed")), None);
        // A list that breaks off changes nothing.
        check(Seen::List, None);
        check(Seen::Item(pod("x", "Running")), None);
        check(Seen::Set(pod("d", "Running")), Some(2));
        check(Seen::List, None);
        check(Seen::Listed, Some(0));
    }

    #[test]
    fn branch_enis_are_told_with_their_pods() {
        let pod = |uid: &str, annotation: Option<&str>, phase: &str| {
            let limits = json!({"limits": {"vpc.amazonaws.com/pod-eni": "1"}});
            let annotations = annotation.map(|text| json!({"vpc.amazonaws.com/pod-eni": text}));
            let metadata = json!({"uid": uid, "namespace": "a", "name": uid, "annotations": annotations});
            let spec = json!({"containers": [{"resources": limits}]});
            json!({"metadata": metadata, "spec": spec, "status": {"phase": phase}})
        };
        let mut pods = Pods::default();
        let mut check = |seen: Seen, expect: Option<&[(&str, &str)]>| {
            let told = pods.see(&seen).branches;
            let told = told.map(|pods| pods.into_iter().map(|(pod, text)| (pod.to_string(), text)).collect::<Vec<_>>());
            let expect = expect.map(|pods| pods.iter().map(|(pod, text)| (format!("a/{pod}"), (*text).to_owned())));
            assert_eq!(told, expect.map(Iterator::collect), "{seen:?}");
        };
        check(Seen::List, None);
        check(Seen::Item(pod("p", Some("[1]"), "Running")), None);
        check(Seen::Item(pod("q", None, "Pending")), None);
        check(Seen::Listed, Some(&[("p", "[1]")]));
        check(Seen::Set(pod("q", Some("[2]"), "Pending")), Some(&[("p", "[1]"), ("q", "[2]")]));
        check(Seen::Set(pod("q", Some("[2]"), "Running")), None);
        check(Seen::Set(pod("p", Some("[1]"), "Succeeded")), Some(&[("q", "[2]")]));
        check(Seen::Gone(pod("q", Some("[2]"), "Running")), Some(&[]));
    }

    fn settings(variables: &[(&str, &str)]) -> Settings {
        Settings::parse(|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())).0
    }

    #[test]
    fn what_is_missing_matters_to_features_alone() {
        let complaint = |variables: &[(&str, &str)]| match reach(&settings(variables)) {
            Ok(api) => Ok(api.server.is_some()),
            Err(error) => Err(error.to_string()),
        };
        assert_eq!(complaint(&[]), Ok(false));
        let endpoint = ("CLUSTER_ENDPOINT", "http://127.0.0.1:1");
        assert_eq!(complaint(&[endpoint]), Ok(false), "no name of a node");
        assert_eq!(complaint(&[endpoint, ("MY_NODE_NAME", "n")]), Ok(true), "it is not tried");
        let missing = "find the API server, which ENABLE_POD_ENI needs: MY_NODE_NAME is not set";
        assert_eq!(complaint(&[endpoint, ("ENABLE_POD_ENI", "true")]), Err(missing.to_owned()));
    }

    #[cfg(feature = "sandbox")]
    #[test]
    fn pods_that_wait_for_a_branch_eni_hold_up_nobody() {
        use crate::model::kube::POD_ENI;
        use crate::sandbox::kube::{Api as Objects, Kind};
        let limits = json!({"containers": [{"resources": {"limits": {POD_ENI: "1"}}}]});
        let mut objects = Objects::new();
        for number in 0..8 {
            objects.add_pod("a", &format!("branch-{number}"), "n", &limits);
        }
        objects.add_pod("a", "plain", "n", &json!({}));
        let kube = crate::sandbox::serve::kube::Kube::new(objects);
        let server = kube.serve(std::net::TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        let endpoint = format!("http://{}", server.address());
        let settings = settings(&[("CLUSTER_ENDPOINT", &endpoint), ("MY_NODE_NAME", "n")]);
        let (events, inbox) = sync_channel(64);
        let (ended, _ends) = sync_channel(16);
        let metrics = Arc::new(Metrics::new());
        let queue = reach(&settings).unwrap().start(&events, &ended, &metrics).unwrap().unwrap();
        let ask = |op: u64, name: &str| {
            queue.send((op, Call::PodWithBranch { namespace: "a".into(), name: name.into() })).unwrap();
        };
        let next = || loop {
            if let Event::Kube(op, result) = inbox.recv_timeout(Duration::from_secs(8)).unwrap() {
                let Ok(Reply::Pod(pod)) = result else { panic!("{result:?}") };
                return (op, pod.annotations.contains_key(POD_ENI));
            }
        };
        for number in 0..8 {
            ask(number, &format!("branch-{number}"));
        }
        ask(100, "plain");
        assert_eq!(next(), (100, false));
        kube.change(|api| api.annotate(Kind::Pod, "a", "branch-5", POD_ENI, "[]"));
        assert_eq!(next(), (5, true));
    }

    #[cfg(feature = "sandbox")]
    #[test]
    fn features_wait_for_the_api_server() {
        use crate::sandbox::{kube, serve::kube::Kube};
        use std::net::TcpListener;
        // At an address where no other test listens, so that the port stays free.
        let listener = TcpListener::bind("127.0.0.5:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let endpoint = format!("http://{address}");
        let settings = settings(&[("CLUSTER_ENDPOINT", &endpoint), ("MY_NODE_NAME", "n"), ("ANNOTATE_POD_IP", "true")]);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| reach(&settings));
            std::thread::sleep(Duration::from_millis(300));
            assert!(!waiting.is_finished());
            let mut api = kube::Api::new();
            api.add_node("n", 17);
            let kube = Kube::new(api);
            let _server = kube.serve(TcpListener::bind(address).unwrap()).unwrap();
            let api = waiting.join().unwrap().unwrap();
            assert_eq!(api.node.unwrap().max_pods, Some(17));
            // Credentials that are refused are not waited for.
            kube.tune(|knobs| knobs.tokens = Some(Set::new()));
            let error = reach(&settings).err().unwrap().to_string();
            assert!(error.starts_with("reach the API server: GET /version: Unauthorized"), "{error}");
        });
    }
}
