//! One exchange between two namespaces: a server tells its client which source it saw.

use crate::support::Netns;
use enibox::clock;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

/// How long an exchange may take that must succeed; generous, for loaded machines.
pub const PATIENCE: Duration = Duration::from_secs(15);
/// How long an exchange is waited for that must fail.
pub const IMPATIENCE: Duration = Duration::from_millis(900);
const POLL: Duration = Duration::from_millis(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proto {
    Tcp,
    Udp,
}

pub const BOTH: [Proto; 2] = [Proto::Tcp, Proto::Udp];

/// From where to where, and where the server that shall get it really is.
pub struct Flow<'a> {
    pub client: &'a Netns,
    pub target: SocketAddr,
    pub server: &'a Netns,
    pub listen: SocketAddr,
}

impl Flow<'_> {
    /// The source that the server saw, as the client heard it; an error says how far it came.
    pub fn run(&self, proto: Proto, limit: Duration) -> Result<IpAddr, String> {
        match proto {
            Proto::Tcp => self.tcp(limit),
            Proto::Udp => self.udp(limit),
        }
    }

    fn tcp(&self, limit: Duration) -> Result<IpAddr, String> {
        let listener = bind(self.server, self.listen, TcpListener::bind);
        listener.set_nonblocking(true).unwrap();
        let end = clock::instant() + limit;
        std::thread::scope(|scope| {
            let client = scope.spawn(|| {
                let mut stream = self.client.run(|| TcpStream::connect_timeout(&self.target, limit))?;
                stream.set_read_timeout(Some(limit))?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                Ok::<_, std::io::Error>(answer)
            });
            let mut seen = "the server saw nobody".to_owned();
            while clock::instant() < end && !client.is_finished() {
                match listener.accept() {
                    Ok((mut stream, peer)) => {
                        seen = format!("the server saw {}", peer.ip());
                        stream.write_all(peer.ip().to_string().as_bytes()).ok();
                        break;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(POLL),
                    Err(error) => panic!("accept: {error}"),
                }
            }
            let answer = client.join().unwrap().map_err(|error| format!("{error}, {seen}"))?;
            answer.parse().map_err(|_| format!("answered {answer:?}, {seen}"))
        })
    }

    fn udp(&self, limit: Duration) -> Result<IpAddr, String> {
        let server = bind(self.server, self.listen, UdpSocket::bind);
        let any = if self.target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let client =
            self.client.run(|| UdpSocket::bind(any).and_then(|socket| socket.connect(self.target).map(|()| socket)));
        let client = client.map_err(|error| error.to_string())?;
        for socket in [&server, &client] {
            socket.set_nonblocking(true).unwrap();
        }
        let end = clock::instant() + limit;
        let mut seen = "the server saw nobody".to_owned();
        let mut buffer = [0; 64];
        client.send(b"who am I?").map_err(|error| error.to_string())?;
        while clock::instant() < end {
            if let Ok((_, peer)) = server.recv_from(&mut buffer) {
                seen = format!("the server saw {}", peer.ip());
                server.send_to(peer.ip().to_string().as_bytes(), peer).ok();
            }
            match client.recv(&mut buffer) {
                Ok(length) => return Ok(String::from_utf8_lossy(&buffer[..length]).parse().unwrap()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(POLL),
                Err(error) => return Err(format!("{error}, {seen}")),
            }
        }
        Err(format!("no answer, {seen}"))
    }
}

/// A process that another test is starting holds the last socket at an address until its exec.
fn bind<T: Send>(server: &Netns, listen: SocketAddr, bind: fn(SocketAddr) -> std::io::Result<T>) -> T {
    let end = clock::instant() + PATIENCE;
    loop {
        match server.run(|| bind(listen)) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && clock::instant() < end => std::thread::sleep(POLL),
            bound => return bound.unwrap_or_else(|error| panic!("listen on {listen}: {error}")),
        }
    }
}

/// A TCP connection that stays open.
pub struct Connection {
    near: TcpStream,
    far: TcpStream,
}

impl Connection {
    pub fn open(client: &Netns, target: SocketAddr, server: &Netns, listen: SocketAddr) -> Connection {
        let listener = bind(server, listen, TcpListener::bind);
        let near = client.run(|| TcpStream::connect_timeout(&target, PATIENCE)).unwrap();
        let (far, _) = listener.accept().unwrap();
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        let connection = Connection { near, far };
        connection.talk();
        connection
    }

    /// There and back, which must succeed.
    pub fn talk(&self) {
        let mut buffer = [0; 4];
        for (mut from, mut to) in [(&self.near, &self.far), (&self.far, &self.near)] {
            from.write_all(b"ping").unwrap();
            to.read_exact(&mut buffer).unwrap();
        }
        assert_eq!(&buffer, b"ping");
    }
}
