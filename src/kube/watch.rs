//! List and watch of one kind (`spec/kubernetes.md` 6.1).
//!
//! One thread and one connection each; silent while nothing changes. Versions are opaque: they are handed back, never
//! compared. It keeps no objects: what is seen goes to the caller at once.

use super::client::{Client, GET_LIMIT, Trouble, segment};
use super::split::{OBJECT_LIMIT, Splitter};
use super::{objects, random_below};
use crate::clock;
use crate::error::{Error, Result};
use crate::model::kube::Failure;
use crate::model::time::Mono;
use serde_json::Value;
use std::io::{ErrorKind, Read};
use std::time::Duration;

/// Objects of one page of a list.
const PAGE: u32 = 500;
/// Pages of one list.
const PAGES_LIMIT: u32 = 100;
/// A whole list.
const LIST_LIMIT: Duration = Duration::from_secs(30);
/// How long the server is asked to keep a watch, at least, and the random rest, so that nodes do not come back together.
const STAY: Duration = Duration::from_mins(5);
const STAY_MORE: Duration = Duration::from_mins(5);
/// A watch that ends sooner without a word has something wrong.
const TOO_SHORT: Duration = Duration::from_secs(1);
/// How long the server may answer with its error 500 before the list is read again.
const INTERNAL_LIMIT: Duration = Duration::from_mins(1);

/// Pauses and limits of a watch.
#[derive(Clone, Copy, Debug)]
pub struct Tempo {
    /// The first pause; it doubles. Each is lengthened by a random part of itself.
    pub first: Duration,
    /// The longest, before that.
    pub cap: Duration,
    /// After so long without trouble the pauses begin anew.
    pub calm: Duration,
    /// After so long without a word the connection counts as dead. Servers send a bookmark a minute.
    pub silence: Duration,
}

impl Default for Tempo {
    fn default() -> Self {
        Tempo {
            first: Duration::from_millis(800),
            cap: Duration::from_secs(30),
            calm: Duration::from_mins(2),
            silence: Duration::from_mins(3),
        }
    }
}

/// What a watch tells.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    /// A list begins; what an earlier one that was not ended has told is void.
    List,
    /// An object of the list.
    Item(Value),
    /// The list is whole: what was not in it is gone.
    Listed,
    /// An object is new or has changed.
    Set(Value),
    /// An object is gone.
    Gone(Value),
}

/// Told of everything that is seen; `false` ends the watch.
pub type Viewer<'a> = dyn FnMut(Seen) -> bool + 'a;

/// A watch of one kind.
#[derive(Debug)]
pub struct Watch<'a> {
    client: &'a Client,
    path: &'static str,
    selector: String,
    tempo: Tempo,
    version: String,
    cause: String,
    attempt: u32,
    last_trouble: Mono,
}

// How a list or a watch ended.
enum End {
    Stopped,
    // All is well; a watch is next.
    Well,
    // The version is too old.
    Expired,
    Failed(Trouble),
}

// What to do next.
enum Next {
    Watch,
    List,
    // Without a version: what is in the store now.
    ListAnew,
}

impl<'a> Watch<'a> {
    pub(super) fn new(client: &'a Client, path: &'static str, selector: &str) -> Watch<'a> {
        Watch {
            client,
            path,
            selector: selector.to_owned(),
            tempo: Tempo::default(),
            version: String::new(),
            cause: String::new(),
            attempt: 0,
            last_trouble: Mono::default(),
        }
    }

    /// With other pauses.
    #[must_use]
    pub fn at(mut self, tempo: Tempo) -> Watch<'a> {
        self.tempo = tempo;
        self
    }

    /// Lists and watches until `view` has had enough.
    pub fn run(mut self, view: &mut Viewer) {
        let mut next = Next::List;
        let (mut internal_since, mut expired) = (None, 0);
        loop {
            let anew = matches!(next, Next::ListAnew);
            let watching = matches!(next, Next::Watch);
            let before = self.version.clone();
            match if watching { self.watch(view) } else { self.list(anew, view) } {
                End::Stopped => return,
                End::Well => {
                    internal_since = None;
                    if !watching || self.version != before {
                        self.recovered();
                    }
                    expired = if self.version == before { expired } else { 0 };
                    next = Next::Watch;
                }
                End::Expired => {
                    expired += 1;
                    next = if watching { Next::List } else { Next::ListAnew };
                    // A server that forgets faster than we can read is not asked all the time.
                    if expired > 2 {
                        self.pause("the version has expired again and again");
                    }
                }
                End::Failed(trouble) => {
                    let Failure { status, .. } = trouble.failure;
                    let since = *internal_since.get_or_insert(clock::now().mono);
                    let internal = status == 500 && clock::now().mono.since(since) < INTERNAL_LIMIT;
                    internal_since = internal_since.filter(|_| status == 500);
                    next = if watching && (matches!(status, 0 | 429) || internal) {
                        Next::Watch
                    } else if anew {
                        Next::ListAnew
                    } else {
                        Next::List
                    };
                    self.pause(&trouble.to_string());
                }
            }
        }
    }

    fn query(&self, more: &[(&str, &str)]) -> String {
        let mut query = format!("{}?fieldSelector={}", self.path, encode(&self.selector));
        for (name, value) in more {
            query.extend(["&", name, "=", &encode(value)]);
        }
        query
    }

    fn list(&mut self, anew: bool, view: &mut Viewer) -> End {
        let mut version = if self.version.is_empty() { "0" } else { &self.version }.to_owned();
        if anew {
            version.clear();
        }
        if !view(Seen::List) {
            return End::Stopped;
        }
        let mut token = String::new();
        for _ in 0..PAGES_LIMIT {
            let limit = PAGE.to_string();
            let mut query = vec![("limit", limit.as_str())];
            match (token.is_empty(), version.is_empty()) {
                (false, _) => query.push(("continue", &token)),
                (true, false) => query.push(("resourceVersion", &version)),
                (true, true) => {}
            }
            let path = self.query(&query);
            let (frame, going) = match self.page(&path, view) {
                Ok(page) => page,
                Err(trouble) => {
                    let Failure { status, message } = &trouble.failure;
                    let old = *status == 410 || message.contains("oo large resource version");
                    return if old && !anew { End::Expired } else { End::Failed(trouble) };
                }
            };
            if !going {
                return End::Stopped;
            }
            objects::text(&frame, "/metadata/continue").clone_into(&mut token);
            if token.is_empty() {
                objects::version(&frame).clone_into(&mut self.version);
                return if view(Seen::Listed) { End::Well } else { End::Stopped };
            }
        }
        let message = format!("GET {}: more than {PAGES_LIMIT} pages", self.path);
        End::Failed(failed(message))
    }

    // The list without its objects, and whether to go on.
    fn page(&self, path: &str, view: &mut Viewer) -> Result<(Value, bool), Trouble> {
        let mut body = self.client.open(path, LIST_LIMIT, GET_LIMIT)?;
        let mut splitter = Splitter::default();
        let mut going = true;
        let mut read = || -> Result<Value> {
            let mut chunk = [0; 4096];
            loop {
                let count = body.read(&mut chunk)?;
                if count == 0 {
                    return Ok(serde_json::from_slice(&std::mem::take(&mut splitter).frame())?);
                }
                splitter.feed(&chunk[..count], &mut |object| {
                    going = going && view(Seen::Item(serde_json::from_slice(object)?));
                    Ok(())
                })?;
            }
        };
        let frame = read().map_err(|error| failed(format!("GET {path}: {error}")))?;
        Ok((frame, going))
    }

    fn watch(&mut self, view: &mut Viewer) -> End {
        let more = random_below(STAY_MORE.as_secs());
        let stay = STAY + Duration::from_secs(more);
        let path = self.query(&[
            ("watch", "true"),
            ("resourceVersion", &self.version),
            ("allowWatchBookmarks", "true"),
            ("timeoutSeconds", &stay.as_secs().to_string()),
        ]);
        let begin = clock::now().mono;
        let mut lines = match self.client.open(&path, stay + Duration::from_secs(30), self.tempo.silence) {
            Ok(body) => Lines::new(body),
            Err(trouble) if trouble.failure.status == 410 => return End::Expired,
            Err(trouble) => return End::Failed(trouble),
        };
        let mut told = false;
        let broken = loop {
            let line = match lines.next() {
                Ok(Some(line)) => line,
                Ok(None) => break None,
                Err(error) if error.find::<std::io::Error>().is_some() => break Some(error.to_string()),
                Err(error) => return End::Failed(garbled(format!("watch {}: {error}", self.path))),
            };
            let Ok(event) = serde_json::from_slice::<Value>(line) else {
                return End::Failed(garbled(format!("watch {}: a line that is no JSON", self.path)));
            };
            match self.meet(event, view) {
                Ok(true) => told = true,
                Ok(false) => return End::Stopped,
                Err(end) => return end,
            }
        };
        // Servers end a watch when its time is over, and networks cut it; both is followed by the next one at once.
        if !told && clock::now().mono.since(begin) < TOO_SHORT {
            let why = broken.unwrap_or_else(|| "it ended at once".into());
            return End::Failed(failed(format!("watch {}: {why}", self.path)));
        }
        End::Well
    }

    // One event of the stream; whether to go on.
    fn meet(&mut self, mut event: Value, view: &mut Viewer) -> Result<bool, End> {
        let object = event.get_mut("object").map(Value::take).unwrap_or_default();
        let kind = objects::text(&event, "/type");
        if kind == "ERROR" {
            let status = object.get("code").and_then(Value::as_u64).and_then(|code| u16::try_from(code).ok());
            let message = format!("watch {}: {}", self.path, objects::text(&object, "/message"));
            return Err(match status.unwrap_or(500) {
                410 => End::Expired,
                status => End::Failed(Trouble { failure: Failure { status, message }, certificate: false }),
            });
        }
        let version = objects::version(&object);
        if !version.is_empty() {
            version.clone_into(&mut self.version);
            self.recovered();
        }
        Ok(match kind {
            "ADDED" | "MODIFIED" => view(Seen::Set(object)),
            "DELETED" => view(Seen::Gone(object)),
            _ => true, // a bookmark has told its version
        })
    }

    // Says each cause once.
    fn pause(&mut self, cause: &str) {
        let now = clock::now().mono;
        if now.since(self.last_trouble) > self.tempo.calm {
            self.attempt = 0;
        }
        self.last_trouble = now;
        if self.cause == cause {
            log::debug!("API server: {cause}");
        } else {
            log::warn!("API server: {cause}; trying on");
            cause.clone_into(&mut self.cause);
        }
        let pause = self.tempo.first.saturating_mul(1 << self.attempt.min(16)).min(self.tempo.cap);
        self.attempt += 1;
        let more = random_below(u64::try_from(pause.as_millis()).unwrap_or(0));
        std::thread::sleep(pause + Duration::from_millis(more));
    }

    fn recovered(&mut self) {
        if !std::mem::take(&mut self.cause).is_empty() {
            log::info!("API server: watching {} again", self.path);
        }
    }
}

fn failed(message: String) -> Trouble {
    Trouble { failure: Failure { status: 0, message }, certificate: false }
}

// What no server says; something stands in between. 502 as that should have said.
fn garbled(message: String) -> Trouble {
    Trouble { failure: Failure { status: 502, message }, certificate: false }
}

/// The next version of one pod after `version`, if there is one within `limit`; a deleted one is a 404.
pub(super) fn next_version(
    client: &Client,
    namespace: &str,
    name: &str,
    version: &str,
    limit: Duration,
) -> Result<Option<Value>, Trouble> {
    let path = format!(
        "/api/v1/namespaces/{}/pods?fieldSelector=metadata.name%3D{}&watch=true&resourceVersion={}&timeoutSeconds={}",
        segment(namespace)?,
        segment(name)?,
        encode(version),
        limit.as_secs().max(1),
    );
    let mut lines = Lines::new(client.open(&path, limit, limit)?);
    match lines.next() {
        Ok(Some(line)) => {
            let mut event: Value = serde_json::from_slice(line).map_err(|error| failed(error.to_string()))?;
            let object = event.get_mut("object").map(Value::take).unwrap_or_default();
            match objects::text(&event, "/type") {
                "ADDED" | "MODIFIED" => Ok(Some(object)),
                "DELETED" => {
                    let message = format!("pod {namespace}/{name} is gone");
                    Err(Trouble { failure: Failure { status: 404, message }, certificate: false })
                }
                _ => Err(failed(objects::text(&object, "/message").to_owned())),
            }
        }
        Ok(None) => Ok(None),
        Err(error) if error.find::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::TimedOut) => {
            Ok(None)
        }
        Err(error) => Err(failed(error.to_string())),
    }
}

// The lines of a stream.
struct Lines {
    body: ureq::BodyReader<'static>,
    buffer: Vec<u8>,
    done: usize, // bytes of the line that was given out last
}

impl Lines {
    fn new(body: ureq::BodyReader<'static>) -> Lines {
        Lines { body, buffer: Vec::new(), done: 0 }
    }

    // The next line that is not empty; `None` at the end of the stream.
    fn next(&mut self) -> Result<Option<&[u8]>> {
        self.buffer.drain(..self.done);
        self.done = 0;
        if self.buffer.is_empty() {
            self.buffer = Vec::new(); // one large object must not stay in memory for hours
        }
        let mut searched = 0;
        loop {
            if let Some(at) = self.buffer[searched..].iter().position(|byte| *byte == b'\n') {
                let end = searched + at;
                if self.buffer[..end].iter().all(u8::is_ascii_whitespace) {
                    self.buffer.drain(..=end);
                    searched = 0;
                    continue;
                }
                self.done = end + 1;
                return Ok(Some(&self.buffer[..end]));
            }
            searched = self.buffer.len();
            if searched > OBJECT_LIMIT {
                return Err(Error::new("an object is too large"));
            }
            let mut chunk = [0; 4096];
            let count = self.body.read(&mut chunk)?;
            if count == 0 {
                // What is left is a line only if it was sent whole.
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(std::io::Error::from(ErrorKind::UnexpectedEof).into())
                };
            }
            self.buffer.extend_from_slice(&chunk[..count]);
        }
    }
}

// Percent-encodes a value of a query (RFC 3986 2.3).
fn encode(text: &str) -> String {
    use std::fmt::Write;
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            write!(encoded, "%{byte:02X}").ok(); // a String takes everything
        }
    }
    encoded
}
