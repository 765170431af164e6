//! Netlink sockets: requests in batches, dumps, and errors that name their operation.
//!
//! The kernel works a request off inside `send`, so all answers are there when it returns. Therefore only the last request
//! of a batch asks for an acknowledgement: errors are always sent, and what had none before the last answer succeeded. A
//! batch of twenty costs two system calls, not twenty-one. (A lost error would show as ENOBUFS, which fails the batch.)

use super::attr::Attrs;
use super::netns::Namespace;
use crate::error::{Context, Error, Result};
use crate::{clock, sys};
use neli::consts::nl::{NlmF, Nlmsg, NlmsgerrAttr};
use neli::consts::socket::{Msg, NlFamily};
use neli::socket::NlSocket;
use neli::utils::Groups;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// How long an answer may take.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Receive buffer: the kernel fills at most 32 KiB per dump message (`netlink_dump` in af_netlink.c).
const BUFFER: usize = 64 * 1024;
/// Requests of one send; if all of them fail the errors must fit into the default receive queue of 208 KiB.
const MAX_BATCH: usize = 100;
/// Bytes of one send, below the default send buffer of 208 KiB.
const MAX_SEND: usize = 128 * 1024;
/// Receive queue of a dump that is watched for changes: a thousand pods that come or go at once tell some 300 KiB.
const WATCHED_QUEUE: usize = 1 << 20;
/// How often a dump is made in all when the kernel flags it as interrupted (`spec/plugin.md` 13.6).
pub(super) const DUMP_ATTEMPTS: u32 = 5;
/// Pause before a dump is repeated, from the second repeat on.
pub(super) const DUMP_PAUSE: Duration = Duration::from_millis(100);
/// How often a watched list is tried, with [`SPURT`] dumps each time: between changes that others make 30 times a second there is
/// room for two dumps, but seldom for the first two. Where dumps are slow, it is tried for so long, but so often at least.
const SPURTS: u32 = 10;
const SPURTS_TIME: Duration = Duration::from_secs(1);
const SPURTS_MIN: u32 = 3;
/// Dumps that follow each other without a pause: whichever two neighbours are alike count.
const SPURT: u32 = 3;
/// Pause before the next of them, from the second on. A process that is held back has new time then.
const SPURT_PAUSE: Duration = Duration::from_millis(50);

const HEADER: usize = 16;

/// Request flags of "add": the thing must not be there (`spec/dataplane.md` 3).
pub(super) const CREATE_EXCL: u16 = NlmF::CREATE.union(NlmF::EXCL).bits();
/// Request flags of "add beside".
pub(super) const CREATE: u16 = NlmF::CREATE.bits();
/// Request flags of "replace".
pub(super) const CREATE_REPLACE: u16 = NlmF::CREATE.union(NlmF::REPLACE).bits();

/// One request: made by the verb functions, sent by [`Socket::batch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Message type.
    pub kind: u16,
    /// NLM_F_* besides REQUEST and ACK, which the socket sets.
    pub flags: u16,
    /// Fixed header and attributes.
    pub body: Vec<u8>,
    /// The operation in words, for errors: `add rule 512 to 10.0.1.5 lookup 254`.
    pub what: String,
    /// Errors that count as success for [`Socket::run`].
    tolerated: &'static [i32],
}

impl Request {
    /// A request that tolerates no error.
    pub fn new(kind: impl Into<u16>, flags: u16, body: Vec<u8>, what: String) -> Request {
        Request { kind: kind.into(), flags, body, what, tolerated: &[] }
    }

    /// "Already there" counts as success in [`Socket::run`].
    #[must_use]
    pub fn or_exists(self) -> Request {
        Request { tolerated: &[libc::EEXIST], ..self }
    }

    /// "Not there" counts as success in [`Socket::run`].
    #[must_use]
    pub fn or_not_found(self) -> Request {
        Request { tolerated: MISSING, ..self }
    }
}

/// ENOENT for rules, ESRCH for routes, ENODEV for links and what is asked of them, EADDRNOTAVAIL for addresses.
const MISSING: &[i32] = &[libc::ENOENT, libc::ESRCH, libc::ENODEV, libc::EADDRNOTAVAIL];

/// The kernel's refusal of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelError {
    /// Positive errno.
    pub errno: i32,
    /// Extended acknowledgement, if the kernel explained itself.
    pub text: Option<String>,
    /// The operation that was refused.
    pub what: String,
}

impl KernelError {
    /// What was to be added is there (EEXIST).
    pub fn exists(&self) -> bool {
        self.errno == libc::EEXIST
    }

    /// What was to be read, changed or deleted is not there (ENOENT, ESRCH, ENODEV, EADDRNOTAVAIL).
    pub fn not_found(&self) -> bool {
        MISSING.contains(&self.errno)
    }
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = std::io::Error::from_raw_os_error(self.errno).to_string();
        let words = words.split(" (os error").next().unwrap_or(&words);
        write!(f, "{}: {words}", self.what)?;
        match &self.text {
            Some(text) => write!(f, " ({})", text.trim_end_matches('.')),
            None => Ok(()),
        }
    }
}

impl std::error::Error for KernelError {}

/// A message of the kernel's, in the receive buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Message type.
    pub kind: u16,
    /// NLM_F_*.
    pub flags: u16,
    /// Sequence number of the request it answers, 0 for notifications.
    pub sequence: u32,
    /// Port of the socket it is meant for, 0 for notifications of the kernel's own doing.
    pub port: u32,
    /// Fixed header and attributes.
    pub body: &'a [u8],
}

/// The messages of a datagram. Ends at the first one that does not fit.
pub(super) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let (header, _) = bytes.split_at_checked(HEADER)?;
        let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let length = usize::try_from(word(0)).ok()?;
        let body = bytes.get(HEADER..length)?;
        let message = Message { kind: half(4), flags: half(6), sequence: word(8), port: word(12), body };
        bytes = bytes.get((length + 3) & !3..).unwrap_or_default();
        Some(message)
    })
}

/// The errno of an NLMSG_ERROR or NLMSG_DONE message, 0 for an acknowledgement, and the extended text.
fn verdict(message: &Message<'_>) -> (i32, Option<String>) {
    let Some(code) = message.body.get(..4).and_then(|code| code.try_into().ok()) else {
        return (0, None); // NLMSG_DONE of old kernels carries nothing
    };
    let errno = i32::from_ne_bytes(code).saturating_neg();
    let has = |flag: NlmF| message.flags & flag.bits() != 0;
    if !has(NlmF::ACK_TLVS) {
        return (errno, None);
    }
    // The errno, then for errors the header of the request, followed by its body unless the answer is capped.
    let skip = if message.kind == u16::from(Nlmsg::Done) {
        4
    } else {
        let request = message.body.get(4..8).and_then(|length| length.try_into().ok()).map_or(0, u32::from_ne_bytes);
        4 + if has(NlmF::CAPPED) { HEADER } else { usize::try_from(request).unwrap_or(HEADER).clamp(HEADER, BUFFER) }
    };
    (errno, Attrs::after(message.body, skip).find(NlmsgerrAttr::Msg).map(|text| text.text()))
}

/// What became of one request: the bodies of the messages that answered it, or the refusal.
pub type Outcome = Result<Vec<Vec<u8>>, KernelError>;

/// The first refusal among outcomes, as an error.
pub fn first_failure(outcomes: Vec<Outcome>) -> Result<()> {
    outcomes.into_iter().try_for_each(|outcome| outcome.map(drop).map_err(Error::from))
}

/// A netlink socket in the namespace it was opened in.
pub struct Socket {
    inner: NlSocket,
    port: u32,
    sequence: u32,
    buffer: Vec<u8>,
    read: usize,
    /// A list was begun and its end has not been read.
    unfinished: bool,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket").field("port", &self.port).field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        sys::netlink_fd(&self.inner)
    }
}

impl Socket {
    /// A NETLINK_ROUTE socket in the calling thread's namespace.
    pub fn route() -> Result<Socket> {
        Socket::open(NlFamily::Route, &[]).context("open route netlink socket")
    }

    /// A NETLINK_NETFILTER socket in the calling thread's namespace.
    pub fn netfilter() -> Result<Socket> {
        Socket::open(NlFamily::Netfilter, &[]).context("open netfilter netlink socket")
    }

    /// A NETLINK_ROUTE socket in `namespace`.
    pub fn route_in(namespace: &Namespace) -> Result<Socket> {
        namespace.run(Socket::route)?
    }

    /// A NETLINK_NETFILTER socket in `namespace`.
    pub fn netfilter_in(namespace: &Namespace) -> Result<Socket> {
        namespace.run(Socket::netfilter)?
    }

    pub(super) fn open(family: NlFamily, groups: &[u32]) -> Result<Socket> {
        let socket = NlSocket::connect(family, None, Groups::new_groups(groups))?;
        let fd = sys::netlink_fd(&socket);
        sys::set_receive_timeout(fd, RECEIVE_TIMEOUT)?;
        // Texts and short answers are a comfort: kernels before 4.12 have neither.
        socket.enable_ext_ack(true).ok();
        sys::set_int_option(fd, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1).ok();
        if family == NlFamily::Route {
            // Kernels before 4.20 cannot check dump requests strictly, nor filter; every list function filters again.
            socket.enable_strict_checking(true).ok();
        }
        let port = socket.pid()?;
        Ok(Socket { inner: socket, port, sequence: 0, buffer: vec![0; BUFFER], read: 0, unfinished: false })
    }

    /// Sends the requests together and reads all answers. The kernel carries every one out, also those behind a refused
    /// one; the outcomes stand in the order of the requests. An error of this function means that the outcomes are not
    /// known (nothing was sent, or the answers did not come).
    pub fn batch(&mut self, requests: &[Request]) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::with_capacity(requests.len());
        let mut rest = requests;
        while !rest.is_empty() {
            let mut size = 0;
            let fitting = rest.iter().take(MAX_BATCH).take_while(|request| {
                size += HEADER + request.body.len() + 3;
                size <= MAX_SEND
            });
            let (chunk, later) = rest.split_at(fitting.count().max(1));
            outcomes.extend(self.exchange(chunk)?);
            rest = later;
        }
        Ok(outcomes)
    }

    /// Sends the requests together; the first refusal that its request does not tolerate is the error.
    pub fn run(&mut self, requests: &[Request]) -> Result<()> {
        let outcomes = self.batch(requests)?;
        for (request, outcome) in requests.iter().zip(outcomes) {
            match outcome {
                Err(error) if !request.tolerated.contains(&error.errno) => return Err(error.into()),
                _ => {}
            }
        }
        Ok(())
    }

    /// Sends one request and returns the bodies of its answers; errors are those of the kernel, whatever it tolerates.
    pub fn ask(&mut self, request: &Request) -> Result<Vec<Vec<u8>>> {
        match self.batch(std::slice::from_ref(request))?.pop() {
            Some(outcome) => Ok(outcome?),
            None => Ok(Vec::new()),
        }
    }

    fn exchange(&mut self, requests: &[Request]) -> Result<Vec<Outcome>> {
        let Some(last) = requests.len().checked_sub(1) else { return Ok(Vec::new()) };
        let names = || match requests {
            [only] => only.what.clone(),
            _ => format!("{} and {last} more", requests[0].what),
        };
        let first = self.send(requests, last).with_context(names)?;
        let mut outcomes: Vec<Outcome> = requests.iter().map(|_| Ok(Vec::new())).collect();
        let end = clock::instant() + RECEIVE_TIMEOUT;
        loop {
            let length = self.receive().with_context(names)?;
            for message in messages(&self.buffer[..length]) {
                let index = usize::try_from(message.sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
                if message.port != self.port || index > last {
                    continue; // the answer to an earlier request that was given up
                }
                if message.kind != u16::from(Nlmsg::Error) {
                    if let Ok(bodies) = &mut outcomes[index] {
                        bodies.push(message.body.to_vec());
                    }
                    continue;
                }
                let (errno, text) = verdict(&message);
                if errno != 0 {
                    outcomes[index] = Err(KernelError { errno, text, what: requests[index].what.clone() });
                }
                if index == last {
                    return Ok(outcomes);
                }
            }
            if clock::instant() > end {
                return Err(Error::new("only answers to other requests within 5 s").context(names()));
            }
        }
    }

    /// Sends requests in one go, the one at index `acknowledged` with NLM_F_ACK; returns the sequence number of the first.
    pub(super) fn send(&mut self, requests: &[Request], acknowledged: usize) -> Result<u32> {
        if std::mem::take(&mut self.unfinished) {
            self.drain()?;
        }
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(requests.iter().map(|request| HEADER + request.body.len() + 3).sum());
        for (index, request) in requests.iter().enumerate() {
            self.sequence = self.sequence.wrapping_add(1);
            let length = u32::try_from(HEADER + request.body.len())?;
            let ack = if index == acknowledged { NlmF::ACK.bits() } else { 0 };
            bytes.extend_from_slice(&length.to_ne_bytes());
            bytes.extend_from_slice(&request.kind.to_ne_bytes());
            bytes.extend_from_slice(&(request.flags | NlmF::REQUEST.bits() | ack).to_ne_bytes());
            bytes.extend_from_slice(&self.sequence.to_ne_bytes());
            bytes.extend_from_slice(&self.port.to_ne_bytes());
            bytes.extend_from_slice(&request.body);
            bytes.resize((bytes.len() + 3) & !3, 0);
        }
        let sent = self.inner.send(&bytes, Msg::empty()).context("send")?;
        if sent == bytes.len() { Ok(first) } else { Err(Error::new(format!("sent {sent} of {} bytes", bytes.len()))) }
    }

    /// Reads away what is left in the queue: the notices of a watched list, and a dump that was given up. The kernel takes no
    /// other dump before that one is at its end, and drops the answers for which the queue has no room.
    fn drain(&mut self) -> Result<()> {
        let end = clock::instant() + RECEIVE_TIMEOUT;
        while clock::instant() < end {
            match self.inner.recv(&mut self.buffer, Msg::DONTWAIT) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                other => drop(other.context("read the rest of a list")?),
            }
        }
        Err(Error::new("the rest of a list did not end within 5 s"))
    }

    /// Reads one datagram into the buffer; its length.
    pub(super) fn receive(&mut self) -> Result<usize> {
        loop {
            match self.inner.recv(&mut self.buffer, Msg::TRUNC) {
                Ok((length, _)) if length > self.buffer.len() => {
                    return Err(Error::new(format!("receive: a message of {length} bytes is larger than the buffer")));
                }
                Ok((length, _)) => {
                    self.read = self.read.wrapping_add(length);
                    return Ok(length);
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    return Err(Error::from(error).context("receive: no answer within 5 s"));
                }
                Err(error) => return Err(Error::from(error).context("receive")),
            }
        }
    }

    /// Bytes that were read so far: what is looked up or listed shows in them.
    pub fn bytes_read(&self) -> usize {
        self.read
    }

    /// The datagram that [`Socket::receive`] read.
    pub(super) fn received(&self, length: usize) -> &[u8] {
        self.buffer.get(..length).unwrap_or_default()
    }

    /// The verdicts in the datagram that [`Socket::receive`] read: sequence number, errno, text.
    pub(super) fn verdicts(&self, length: usize) -> Vec<(u32, i32, Option<String>)> {
        messages(self.received(length))
            .filter(|message| message.port == self.port && message.kind == u16::from(Nlmsg::Error))
            .map(|message| {
                let (errno, text) = verdict(&message);
                (message.sequence, errno, text)
            })
            .collect()
    }

    /// Raises the kernel's send buffer for one large message.
    pub(super) fn allow_send(&self, bytes: usize) -> Result<()> {
        self.buffer_option(libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, bytes).context("raise the send buffer")
    }

    /// Raises the kernel's receive queue.
    pub(super) fn allow_receive(&self, bytes: usize) -> Result<()> {
        self.buffer_option(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, bytes).context("raise the receive buffer")
    }

    fn buffer_option(&self, forced: i32, capped: i32, bytes: usize) -> Result<()> {
        let bytes = i32::try_from(bytes)?;
        sys::set_int_option(self, libc::SOL_SOCKET, forced, bytes)
            .or_else(|_| sys::set_int_option(self, libc::SOL_SOCKET, capped, bytes))?;
        Ok(())
    }

    /// Like [`Socket::dump`], for lists whose dump the kernel does not flag as interrupted and whose place it keeps as a
    /// number: what is deleted between two parts of the answer makes it skip an entry. The socket joins the list's
    /// notification group meanwhile; a change told between two parts is an interruption. Since 6.15 the kernel may tell of a
    /// change only after the list that it has spoilt: a list counts if the next one is the same, with no change told in
    /// between.
    pub(super) fn dump_watched<T: PartialEq>(
        &mut self,
        group: u32,
        request: &Request,
        decode: impl FnMut(&Message<'_>) -> Option<T>,
    ) -> Result<Vec<T>> {
        let groups = || Groups::new_groups(&[group]);
        self.allow_receive(WATCHED_QUEUE).ok(); // without it a storm of changes means more attempts
        self.inner.add_mcast_membership(groups()).with_context(|| request.what.clone())?;
        let list = self.dump_alike(request, decode);
        self.inner.drop_mcast_membership(groups()).with_context(|| request.what.clone())?;
        // What was told until here would take the room of the answers to come.
        self.drain()?;
        list
    }

    fn dump_alike<T: PartialEq>(
        &mut self,
        request: &Request,
        mut decode: impl FnMut(&Message<'_>) -> Option<T>,
    ) -> Result<Vec<T>> {
        let request = dump_of(request);
        let begin = clock::instant();
        let mut pair = Pair::default();
        for spurt in 0..SPURTS {
            if spurt > 1 {
                std::thread::sleep(SPURT_PAUSE);
            }
            for _ in 0..SPURT {
                let dump = self.dump_once(&request, &mut decode)?;
                if let Some(list) = pair.next(dump) {
                    return Ok(list);
                }
            }
            if spurt + 1 >= SPURTS_MIN && begin.elapsed() > SPURTS_TIME {
                break;
            }
        }
        Err(changed(&request))
    }

    /// Asks for a list and decodes each message of it; what `decode` returns none for is left out. A dump during which the
    /// kernel's list changed is made again, at most five times in all.
    pub fn dump<T>(&mut self, request: &Request, mut decode: impl FnMut(&Message<'_>) -> Option<T>) -> Result<Vec<T>> {
        let request = dump_of(request);
        for attempt in 0..DUMP_ATTEMPTS {
            if attempt > 1 {
                std::thread::sleep(DUMP_PAUSE);
            }
            if let Some(dump) = self.dump_once(&request, &mut decode)? {
                return Ok(dump.list);
            }
        }
        Err(changed(&request))
    }

    /// For lists as those of [`Socket::dump_watched`]: the list if it comes in one part, in which the kernel skips nothing.
    pub(super) fn dump_in_one<T>(
        &mut self,
        request: &Request,
        mut decode: impl FnMut(&Message<'_>) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let dump = self.dump_once(&dump_of(request), &mut decode)?;
        Ok(dump.filter(|dump| dump.parts <= 1).map(|dump| dump.list))
    }

    /// One dump, or none if the list changed meanwhile.
    fn dump_once<T>(
        &mut self,
        request: &Request,
        decode: &mut impl FnMut(&Message<'_>) -> Option<T>,
    ) -> Result<Option<Dump<T>>> {
        let what = || request.what.clone();
        let sequence = self.send(std::slice::from_ref(request), usize::MAX).with_context(what)?;
        let mut dump = Dump { list: Vec::new(), parts: 0, told: false };
        let (mut interrupted, mut changed) = (false, false);
        let end = clock::instant() + RECEIVE_TIMEOUT * 4;
        self.unfinished = true;
        loop {
            let length = match self.receive() {
                // So many changes were told that the queue had no room for all of them; the dump itself goes on.
                Err(error) if error.errno() == Some(libc::ENOBUFS) => {
                    interrupted = true;
                    continue;
                }
                other => other.with_context(what)?,
            };
            let part = dump.parts + 1;
            for message in messages(&self.buffer[..length]) {
                if message.port != self.port || message.sequence != sequence {
                    // A notification, if this socket asked for them.
                    dump.told |= dump.parts == 0;
                    changed |= dump.parts > 0;
                    continue;
                }
                // The kernel makes a part when the one before was read: a change told between two parts, or before the end,
                // may have spoilt what came after it.
                interrupted |= changed || message.flags & NlmF::DUMP_INTR.bits() != 0;
                if matches!(Nlmsg::from(message.kind), Nlmsg::Error | Nlmsg::Done) {
                    self.unfinished = false;
                    let (errno, text) = verdict(&message);
                    if errno == libc::ENOBUFS {
                        // The notices before it had left no room for a first part (`netlink_dump` in net/netlink/af_netlink.c).
                        // The kernel counts the dump as begun and goes on with it when the queue is read.
                        self.unfinished = true;
                        return Ok(None);
                    }
                    if errno != 0 {
                        return Err(KernelError { errno, text, what: what() }.into());
                    }
                    return Ok((!interrupted).then_some(dump));
                }
                dump.parts = part;
                dump.list.extend(decode(&message));
            }
            if clock::instant() > end {
                return Err(Error::new("the list did not end within 20 s").context(what()));
            }
        }
    }
}

/// A list as it came.
struct Dump<T> {
    list: Vec<T>,
    /// Datagrams with entries.
    parts: usize,
    /// A change was told before the first of them.
    told: bool,
}

/// The last list of a row of dumps, if it was whole.
struct Pair<T>(Option<Vec<T>>);

impl<T> Default for Pair<T> {
    fn default() -> Pair<T> {
        Pair(None)
    }
}

impl<T: PartialEq> Pair<T> {
    /// Takes the next dump, none if it was spoilt. Its list counts if the one before it is the same and no change was told between
    /// the two. Else it may be the first of the next two.
    fn next(&mut self, dump: Option<Dump<T>>) -> Option<Vec<T>> {
        let told = dump.as_ref().is_some_and(|dump| dump.told);
        let last = std::mem::replace(&mut self.0, dump.map(|dump| dump.list));
        if !told && last.is_some() && last == self.0 { last } else { None }
    }
}

fn dump_of(request: &Request) -> Request {
    Request { flags: request.flags | NlmF::DUMP.bits(), ..request.clone() }
}

fn changed(request: &Request) -> Error {
    Error::new(format!("{}: the list changed during each attempt", request.what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refusals_name_the_operation() {
        let mut error =
            KernelError { errno: libc::EEXIST, text: None, what: "add rule 512 to 10.0.1.5 lookup 254".into() };
        assert_eq!(error.to_string(), "add rule 512 to 10.0.1.5 lookup 254: File exists");
        assert!(error.exists() && !error.not_found());
        error =
            KernelError { errno: libc::ESRCH, text: Some("FIB: no such route.".into()), what: "delete route".into() };
        assert_eq!(error.to_string(), "delete route: No such process (FIB: no such route)");
        assert!(error.not_found());
        let found = Error::from(error.clone()).context("DEL");
        assert_eq!(found.find::<KernelError>(), Some(&error));
    }

    #[test]
    fn a_truncated_message_is_no_message() {
        let mut bytes = 20u32.to_ne_bytes().to_vec();
        bytes.resize(20, 0);
        assert_eq!(messages(&bytes).count(), 1);
        assert_eq!(messages(&bytes[..19]).count(), 0);
        assert_eq!(messages(&[0; 40]).count(), 0, "length 0");
    }

    /// The list that is taken of a row of dumps, `-` for one that was spoilt and `!` before one that a change was told before, and
    /// after how many.
    fn check(dumps: &str, expected: Option<(&str, usize)>) {
        let mut pair = Pair::default();
        let found = dumps.split(' ').enumerate().find_map(|(at, dump)| {
            let name = dump.trim_start_matches('!');
            let dump = (name != "-").then(|| Dump { list: vec![name], parts: 1, told: name != dump });
            Some((pair.next(dump)?[0], at + 1))
        });
        assert_eq!(found, expected, "{dumps}");
    }

    #[test]
    fn two_equal_lists_in_a_row_count_whichever_they_are() {
        check("a a", Some(("a", 2)));
        // What was told before the first of the two is in both.
        check("!a a", Some(("a", 2)));
        check("a !a", None);
        check("a !a a", Some(("a", 3)));
        check("a - a", None);
        check("- - a a", Some(("a", 4)));
        // The second of two is the first of the next two.
        check("a b b c c", Some(("b", 3)));
        check("a b c !d d", Some(("d", 5)));
        check("a b a b", None);
    }

    proptest! {
        #[test]
        fn hostile_datagrams_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), length in 0u32..260) {
            let mut framed = length.to_ne_bytes().to_vec();
            framed.extend(&bytes);
            for message in messages(&framed).chain(messages(&bytes)) {
                let _ = verdict(&message);
            }
        }
    }
}
