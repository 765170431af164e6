//! Real TCP, UDP and ICMP between two namespaces: what source the receiver sees, and whether the answer comes back.

use crate::clock;
use crate::error::{Context, Error, Result};
use crate::netlink::netns::Namespace;
use crate::sys;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

/// The port that receivers listen on.
pub const PORT: u16 = 8080;

const QUESTION: &[u8] = b"who am I?";

/// Transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Proto {
    Tcp,
    Udp,
    Icmp,
}

impl Proto {
    /// In lower case.
    pub fn as_str(self) -> &'static str {
        match self {
            Proto::Tcp => "tcp",
            Proto::Udp => "udp",
            Proto::Icmp => "icmp",
        }
    }
}

/// One flow.
#[derive(Clone, Copy, Debug)]
pub struct Flow<'a> {
    /// Where it starts.
    pub client: &'a Namespace,
    /// The address to start from; none leaves it to the routes.
    pub source: Option<IpAddr>,
    /// Where it goes.
    pub target: SocketAddr,
    /// Where the receiver is.
    pub server: &'a Namespace,
    /// What the receiver listens on; differs from the target where that is translated.
    pub listen: SocketAddr,
}

impl Flow<'_> {
    /// Sends there and back; the source that the receiver saw.
    pub fn run(&self, proto: Proto, timeout: Duration) -> Result<SocketAddr> {
        match proto {
            Proto::Tcp => self.tcp(timeout),
            Proto::Udp => self.udp(timeout),
            Proto::Icmp => self.icmp(timeout),
        }
    }

    fn tcp(&self, timeout: Duration) -> Result<SocketAddr> {
        let listener = self.bind("tcp", timeout, TcpListener::bind)?;
        listener.set_nonblocking(true)?;
        let mut near = self.client.run(|| self.connect(timeout))??;
        let deadline = clock::instant() + timeout;
        let (mut far, seen) = loop {
            match listener.accept() {
                Ok(pair) => break pair,
                Err(error) if error.kind() == ErrorKind::WouldBlock && clock::instant() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(Error::from(error).context("somebody else answered: accept")),
            }
        };
        far.set_nonblocking(false)?;
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))?;
        }
        let mut buffer = [0; QUESTION.len()];
        near.write_all(QUESTION)?;
        far.read_exact(&mut buffer).context("receive over tcp")?;
        far.write_all(&buffer)?;
        near.read_exact(&mut buffer).context("receive the answer over tcp")?;
        if buffer == QUESTION { Ok(seen) } else { Err(Error::new("another answer came over tcp")) }
    }

    // A process that is being started on another thread holds the last flow's socket until its exec.
    fn bind<T: Send>(
        &self,
        what: &str,
        timeout: Duration,
        bind: impl Fn(SocketAddr) -> std::io::Result<T> + Sync,
    ) -> Result<T> {
        let deadline = clock::instant() + timeout;
        loop {
            match self.server.run(|| bind(self.listen))? {
                Err(error) if error.kind() == ErrorKind::AddrInUse && clock::instant() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                outcome => return outcome.with_context(|| format!("listen on {what} {}", self.listen)),
            }
        }
    }

    fn connect(&self, timeout: Duration) -> Result<TcpStream> {
        let stream = match self.source {
            None => TcpStream::connect_timeout(&self.target, timeout),
            Some(source) => sys::connect_tcp_from(source, self.target, timeout).map(TcpStream::from),
        };
        stream.with_context(|| format!("connect to tcp {}", self.target))
    }

    fn udp(&self, timeout: Duration) -> Result<SocketAddr> {
        let server = self.bind("udp", timeout, UdpSocket::bind)?;
        server.set_read_timeout(Some(timeout))?;
        let any: IpAddr =
            if self.target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let near = SocketAddr::from((self.source.unwrap_or(any), 0));
        let client = self.client.run(|| UdpSocket::bind(near))?;
        let client = client.with_context(|| format!("bind udp {near}"))?;
        client.set_read_timeout(Some(timeout))?;
        client.connect(self.target).with_context(|| format!("connect to udp {}", self.target))?;
        let mut buffer = [0; 64];
        client.send(QUESTION).with_context(|| format!("send to udp {}", self.target))?;
        let (length, seen) = server.recv_from(&mut buffer).context("receive over udp")?;
        server.send_to(&buffer[..length], seen).context("answer over udp")?;
        let length = client.recv(&mut buffer).context("receive the answer over udp")?;
        if &buffer[..length] == QUESTION { Ok(seen) } else { Err(Error::new("another answer came over udp")) }
    }

    // An echo request; the receiving kernel answers. Translation may change the number of the request, so that only its
    // text tells it from others.
    fn icmp(&self, timeout: Duration) -> Result<SocketAddr> {
        let v6 = self.target.is_ipv6();
        let open = || sys::icmp_socket(v6).map(UdpSocket::from);
        let (client, server) = (self.client.run(open)??, self.server.run(open)??);
        client.connect(SocketAddr::new(self.target.ip(), 0)).with_context(|| format!("ping {}", self.target.ip()))?;
        let (request, reply) = if v6 { (128, 129) } else { (8, 0) };
        let mut packet = vec![request, 0, 0, 0, 0, 1, 0, 1];
        packet.extend_from_slice(QUESTION);
        sys::random_bytes(&mut packet[4..6])?;
        if !v6 {
            // For IPv6 the kernel does it.
            let sum = checksum(&packet);
            packet[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        client.send(&packet).with_context(|| format!("send an echo request to {}", self.target.ip()))?;
        let seen = heard(&server, v6, request, timeout).context("receive the echo request")?;
        heard(&client, v6, reply, timeout).context("receive the echo reply")?;
        Ok(seen)
    }
}

// Waits for a message of this kind with the question in it; who sent it.
fn heard(socket: &UdpSocket, v6: bool, kind: u8, timeout: Duration) -> Result<SocketAddr> {
    let deadline = clock::instant() + timeout;
    let mut buffer = [0; 256];
    loop {
        let left = deadline.saturating_duration_since(clock::instant());
        if left.is_zero() {
            return Err(Error::new("timed out"));
        }
        socket.set_read_timeout(Some(left))?;
        let (length, from) = socket.recv_from(&mut buffer)?;
        // A raw IPv4 socket gives the header too.
        let header = if v6 { 0 } else { usize::from(buffer[0] & 15) * 4 };
        let message = buffer.get(header..length).unwrap_or_default();
        if message.first() == Some(&kind) && message.get(8..) == Some(QUESTION) {
            return Ok(from);
        }
    }
}

// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from));
    let sum: u32 = words.sum();
    let folded = (sum >> 16) + (sum & 0xffff);
    !u16::try_from((folded >> 16) + (folded & 0xffff)).unwrap_or(u16::MAX)
}
