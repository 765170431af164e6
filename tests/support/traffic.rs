//! Small exchanges between namespaces, over sockets opened inside them.

use super::Netns;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(5);

/// A TCP exchange from one namespace to an address in another; what the server saw as the source.
pub fn tcp(from: &Netns, to: &Netns, address: IpAddr) -> std::io::Result<IpAddr> {
    let listener = to.run(|| TcpListener::bind(SocketAddr::new(address, 0)))?;
    let server = SocketAddr::new(address, listener.local_addr()?.port());
    std::thread::scope(|scope| {
        let client = scope.spawn(|| -> std::io::Result<String> {
            let mut stream = from.run(|| TcpStream::connect_timeout(&server, TIMEOUT))?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            stream.write_all(b"hello")?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        });
        listener.set_nonblocking(true)?;
        let end = enibox::clock::instant() + TIMEOUT;
        let (mut stream, peer) = loop {
            match listener.accept() {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && enibox::clock::instant() < end => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                other => break other?,
            }
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut question = String::new();
        stream.read_to_string(&mut question)?;
        stream.write_all(question.to_uppercase().as_bytes())?;
        drop(stream);
        assert_eq!(client.join().unwrap()?, "HELLO");
        Ok(peer.ip())
    })
}

/// A UDP exchange; what the server saw as the source.
pub fn udp(from: &Netns, to: &Netns, address: IpAddr) -> std::io::Result<IpAddr> {
    let server = to.run(|| UdpSocket::bind(SocketAddr::new(address, 0)))?;
    let client = from.run(|| UdpSocket::bind("0.0.0.0:0"))?;
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(TIMEOUT))?;
    }
    client.send_to(b"hello", server.local_addr()?)?;
    let mut buffer = [0; 16];
    let (length, peer) = server.recv_from(&mut buffer)?;
    server.send_to(&buffer[..length], peer)?;
    let (length, _) = client.recv_from(&mut buffer)?;
    assert_eq!(&buffer[..length], b"hello");
    Ok(peer.ip())
}
