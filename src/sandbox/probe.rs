//! Real TCP and UDP between two namespaces: what source the receiver sees, and whether the answer comes back.

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
}

impl Proto {
    /// In lower case.
    pub fn as_str(self) -> &'static str {
        match self {
            Proto::Tcp => "tcp",
            Proto::Udp => "udp",
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
}
