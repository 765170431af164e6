//! Events about our pod and our node (`spec/kubernetes.md` 7): best effort, from a thread of their own, so that no caller
//! waits for them.
//!
//! What repeats becomes a series: written at once when it is new, and then its count at most every five minutes.

use super::client::{Client, Trouble, segment};
use super::objects;
use crate::clock;
use crate::model::kube::{Notice, Regarding};
use crate::model::time::{Mono, Now, Wall};
use serde_json::{Value, json};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

/// Notices that wait; further ones are dropped.
const QUEUE_MAX: usize = 64;
/// Series at one time; a further one pushes out the oldest.
const SERIES_MAX: usize = 64;
/// One series is written at most so often.
const WRITE_EVERY: Duration = Duration::from_mins(5);
/// After so long without a repetition a series is over.
const SERIES_END: Duration = Duration::from_mins(6);
/// Attempts to write while the server cannot be reached, and the pause between them.
const ATTEMPTS: u32 = 12;
const ATTEMPT_EVERY: Duration = Duration::from_secs(10);
/// Limits of the API on texts: bytes of a note, characters of reason and action.
const NOTE_MAX: usize = 1024;
const WORD_MAX: usize = 128;

const CONTROLLER: &str = "aws-node";

pub(super) fn queue() -> (SyncSender<Notice>, Receiver<Notice>) {
    sync_channel(QUEUE_MAX)
}

/// A request to the API server: method, path, body (null for GET).
type Send<'a> = dyn FnMut(&str, &str, &Value) -> Result<Value, Trouble> + 'a;

/// Writes the events of a client; to be run on a thread of its own.
#[derive(Debug)]
pub struct Writer {
    queue: Receiver<Notice>,
    pod: Option<Value>, // what to say of our pod, once it was looked up
    series: Vec<Series>,
}

#[derive(Debug)]
struct Series {
    notice: Notice,
    namespace: String,
    name: String,
    count: u32,
    written: u32, // of these; 0: there is no event yet
    last: Now,
    next_write: Mono,
    attempts: u32,
}

impl Series {
    fn due(&self) -> Mono {
        if self.count > self.written { self.next_write } else { self.last.mono.plus(SERIES_END) }
    }
}

impl Writer {
    pub(super) fn new(queue: Receiver<Notice>) -> Writer {
        Writer { queue, pod: None, series: Vec::new() }
    }

    /// Writes until the client is gone.
    pub fn run(mut self, client: &Client) {
        let config = client.config();
        let mut send = |method: &str, path: &str, body: &Value| match method {
            "GET" => client.get(path, super::client::GET_LIMIT),
            "POST" => client.create(path, body),
            _ => client.patch(path, body),
        };
        loop {
            // Nothing due: wait for a notice alone.
            let due = self.series.iter().map(Series::due).min();
            let next = match due {
                None => self.queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(due) => self.queue.recv_timeout(due.since(clock::now().mono)),
            };
            match next {
                Ok(notice) => self.fold(clock::now(), notice),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let own = [config.node.as_str(), &config.namespace, &config.pod];
            self.write_due(clock::now(), own, &mut send);
        }
    }

    fn fold(&mut self, now: Now, notice: Notice) {
        let same = |series: &&mut Series| {
            let Notice { regarding, reason, action, .. } = &series.notice;
            (*regarding, reason, action) == (notice.regarding, &notice.reason, &notice.action)
        };
        if let Some(series) = self.series.iter_mut().find(same) {
            series.count = series.count.saturating_add(1);
            series.last = now;
            return;
        }
        if self.series.len() >= SERIES_MAX {
            self.series.remove(0);
        }
        let (namespace, name) = (String::new(), String::new());
        let next_write = now.mono;
        self.series.push(Series { notice, namespace, name, count: 1, written: 0, last: now, next_write, attempts: 0 });
    }

    fn write_due(&mut self, now: Now, own: [&str; 3], send: &mut Send) {
        let pod = &mut self.pod;
        self.series.retain_mut(|series| {
            if series.due() > now.mono {
                return true;
            }
            if series.count == series.written {
                return false; // it is over
            }
            match write(series, now.wall, own, pod, send) {
                Ok(()) => series.next_write = now.mono.plus(WRITE_EVERY),
                Err(trouble) if trouble.failure.status == 0 && series.attempts + 1 < ATTEMPTS => {
                    log::debug!("write event {}: {trouble}; again in 10 s", series.notice.reason);
                    series.attempts += 1;
                    series.next_write = now.mono.plus(ATTEMPT_EVERY);
                    return true;
                }
                Err(trouble) => {
                    log::info!("write event {}: {trouble}; given up", series.notice.reason);
                    series.next_write = now.mono.plus(WRITE_EVERY);
                }
            }
            (series.written, series.attempts) = (series.count, 0);
            true
        });
    }
}

fn write(
    series: &mut Series,
    now: Wall,
    [node, namespace, pod]: [&str; 3],
    known: &mut Option<Value>,
    send: &mut Send,
) -> Result<(), Trouble> {
    let times = json!({"series": {"count": series.count, "lastObservedTime": micro(series.last.wall)}});
    if series.written > 0 && !series.name.is_empty() {
        let path = format!("/apis/events.k8s.io/v1/namespaces/{}/events/{}", series.namespace, series.name);
        match send("PATCH", &path, &times) {
            Err(trouble) if trouble.failure.status == 404 => {} // events live an hour or so
            result => return result.map(drop),
        }
    }
    if series.notice.regarding == Regarding::OwnPod && known.is_none() && !pod.is_empty() {
        let path = format!("/api/v1/namespaces/{}/pods/{}", segment(namespace)?, segment(pod)?);
        match send("GET", &path, &Value::Null) {
            Ok(object) => {
                let uid = objects::text(&object, "/metadata/uid");
                *known =
                    Some(json!({"kind": "Pod", "apiVersion": "v1", "namespace": namespace, "name": pod, "uid": uid}));
            }
            Err(trouble) if trouble.failure.status == 0 => return Err(trouble),
            Err(trouble) => log::info!("look up our own pod for an event: {trouble}; naming the node instead"),
        }
    }
    // Without a pod it is about the node, whose events are in the namespace "default" under the node's name as uid.
    let of_pod = known.clone().filter(|_| series.notice.regarding == Regarding::OwnPod);
    let regarding = of_pod.unwrap_or_else(|| json!({"kind": "Node", "apiVersion": "v1", "name": node, "uid": node}));
    let namespace = Some(objects::text(&regarding, "/namespace")).filter(|name| !name.is_empty()).unwrap_or("default");
    namespace.clone_into(&mut series.namespace);
    series.name = format!("{}.{:x}", objects::text(&regarding, "/name"), now.as_unix_nanos());
    let Notice { reason, action, note, .. } = &series.notice;
    let mut event = json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": series.name, "namespace": series.namespace},
        "eventTime": micro(series.last.wall),
        "reportingController": CONTROLLER,
        "reportingInstance": cut(&format!("{CONTROLLER}-{node}"), WORD_MAX),
        "type": "Warning",
        "reason": cut(reason, WORD_MAX),
        "action": cut(action, WORD_MAX),
        "note": cut(note, NOTE_MAX),
        "regarding": regarding,
    });
    if series.count > 1 {
        event["series"] = times["series"].clone();
    }
    send("POST", &format!("/apis/events.k8s.io/v1/namespaces/{}/events", series.namespace), &event).map(drop)
}

// The API wants six digits of a second, no more and no fewer.
fn micro(time: Wall) -> String {
    let text = format!("{time:#}");
    format!("{}Z", text.get(..26).unwrap_or(&text))
}

// At most so many bytes, and whole characters.
fn cut(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Now {
        let mono = Mono::default().plus(Duration::from_secs(seconds));
        Now { mono, wall: Wall::from_unix_seconds(1_800_000_000 + i64::try_from(seconds).unwrap()) }
    }

    fn notice(regarding: Regarding, action: &str) -> Notice {
        Notice { regarding, reason: "MissingIAMPermissions".into(), action: action.into(), note: "denied".into() }
    }

    struct Bed {
        writer: Writer,
        sent: Vec<(String, Value)>,
        status: u16,
    }

    impl Bed {
        fn new() -> Bed {
            Bed { writer: Writer::new(queue().1), sent: Vec::new(), status: 200 }
        }

        /// What is sent at a time, `status` being the answer to everything but reads.
        fn step(&mut self, seconds: u64, notices: &[Notice]) -> Vec<String> {
            for notice in notices {
                self.writer.fold(at(seconds), notice.clone());
            }
            let (sent, status) = (&mut self.sent, self.status);
            let from = sent.len();
            let mut send = |method: &str, path: &str, body: &Value| {
                if method == "GET" {
                    return Ok(json!({"metadata": {"uid": "u-1"}}));
                }
                sent.push((format!("{method} {path}"), body.clone()));
                let failure = crate::model::kube::Failure { status, message: String::new() };
                if status == 200 { Ok(Value::Null) } else { Err(Trouble { failure, certificate: false }) }
            };
            self.writer.write_due(at(seconds), ["node-1", "kube-system", "aws-node-x"], &mut send);
            self.sent[from..].iter().map(|(line, _)| line.clone()).collect()
        }
    }

    const POST: &str = "POST /apis/events.k8s.io/v1/namespaces/kube-system/events";
    const PATCH: &str = "PATCH /apis/events.k8s.io/v1/namespaces/kube-system/events/aws-node-x.";

    #[test]
    fn repeats_become_a_series() {
        let mut bed = Bed::new();
        let tags = [notice(Regarding::OwnPod, "ec2:CreateTags")];
        assert_eq!(bed.step(0, &tags), [POST]);
        assert_eq!(bed.step(10, &tags), [""; 0]);
        assert_eq!(bed.step(20, &[notice(Regarding::OwnPod, "ec2:AttachNetworkInterface")]), [POST]);
        assert_eq!(bed.step(299, &tags), [""; 0]);
        let second = bed.step(300, &[]);
        assert!(second.len() == 1 && second[0].starts_with(PATCH), "{second:?}");
        let body = &bed.sent.last().unwrap().1;
        assert_eq!(body, &json!({"series": {"count": 3, "lastObservedTime": "2027-01-15T08:04:59.000000Z"}}));
        // Six minutes without one: a new event.
        assert_eq!(bed.step(299 + 360, &[]), [""; 0]);
        assert_eq!(bed.writer.series.len(), 0);
        assert_eq!(bed.step(700, &tags), [POST]);
    }

    #[test]
    fn an_event_that_is_gone_is_written_anew() {
        let mut bed = Bed::new();
        let tags = [notice(Regarding::OwnPod, "ec2:CreateTags")];
        bed.step(0, &tags);
        bed.status = 404;
        bed.step(1, &tags);
        let again = bed.step(300, &[]);
        assert!(again.len() == 2 && again[0].starts_with(PATCH) && again[1] == POST, "{again:?}");
        assert_eq!(bed.sent.last().unwrap().1["series"]["count"], 2);
    }

    #[test]
    fn an_outage_is_bridged_and_a_refusal_is_not_repeated() {
        let mut bed = Bed::new();
        bed.status = 0;
        let node = [notice(Regarding::Node, "x")];
        let path = "POST /apis/events.k8s.io/v1/namespaces/default/events";
        assert_eq!(bed.step(0, &node), [path]);
        assert_eq!(bed.step(9, &[]), [""; 0]);
        bed.status = 403;
        assert_eq!(bed.step(10, &[]), [path]);
        assert_eq!(bed.step(100, &[]), [""; 0]);
        bed.status = 0;
        let attempts: usize = (0..100).map(|n| bed.step(1000 + 10 * n, if n == 0 { &node } else { &[] }).len()).sum();
        assert_eq!(attempts, usize::try_from(ATTEMPTS).unwrap());
    }

    #[test]
    fn the_object_is_as_the_api_wants_it() {
        let mut bed = Bed::new();
        let long = Notice { note: "ä".repeat(1000), action: "a".repeat(200), ..notice(Regarding::OwnPod, "") };
        bed.step(0, &[long]);
        let event = &bed.sent[0].1;
        assert_eq!(event["eventTime"], "2027-01-15T08:00:00.000000Z");
        assert_eq!((event["note"].as_str().unwrap().len(), event["action"].as_str().unwrap().len()), (1024, 128));
        let pod =
            json!({"kind": "Pod", "apiVersion": "v1", "namespace": "kube-system", "name": "aws-node-x", "uid": "u-1"});
        assert_eq!(event["regarding"], pod);
        assert_eq!(event["metadata"]["name"], format!("aws-node-x.{:x}", 1_800_000_000_000_000_000_i64));
        assert_eq!(event["reportingInstance"], "aws-node-node-1");
    }

    #[test]
    fn series_are_bounded() {
        let mut bed = Bed::new();
        let many: Vec<Notice> = (0..200).map(|n| notice(Regarding::Node, &n.to_string())).collect();
        assert_eq!(bed.step(0, &many).len(), SERIES_MAX);
    }
}
