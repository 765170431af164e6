//! One GET to the daemon's introspection, over TCP or a unix socket.

use crate::clock;
use crate::error::{Context, Error, Result};
use crate::sys;
use serde_json::Value;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

/// The daemon answers from a copy, so at once.
const TIME_MAX: Duration = Duration::from_secs(5);
/// A node with 737 pods has under 1 MB.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// The JSON document at `path`.
pub(super) fn get(address: &str, path: &str) -> Result<Value> {
    let body = body(address, path)?;
    serde_json::from_slice(body.as_bytes()).with_context(|| format!("ask the daemon at {address}"))
}

/// What is at `path`, as text.
pub(super) fn body(address: &str, path: &str) -> Result<String> {
    let what = || format!("ask the daemon at {address}");
    let mut stream = connect(address).with_context(what)?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).with_context(what)?;
    let answer = read(&mut stream).with_context(what)?;
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| Error::new("no answer").context(what()))?;
    let status = head.split_whitespace().nth(1).unwrap_or_default();
    if status != "200" {
        return Err(Error::new(format!("HTTP status {status} for {path}")).context(what()));
    }
    Ok(body.to_owned())
}

// Both kinds go by one type: only reads, writes and time-outs are asked of it, which are the same for every stream socket.
fn connect(address: &str) -> Result<TcpStream> {
    let stream = if let Some(path) = address.strip_prefix("unix:") {
        TcpStream::from(sys::connect_unix(Path::new(path), TIME_MAX)?)
    } else {
        let address: SocketAddr = address.replace("localhost:", "127.0.0.1:").parse()?;
        TcpStream::connect_timeout(&address, TIME_MAX)?
    };
    stream.set_write_timeout(Some(TIME_MAX))?;
    Ok(stream)
}

fn read(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let deadline = clock::instant() + TIME_MAX;
    let (mut answer, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        let left = deadline.saturating_duration_since(clock::instant());
        if left.is_zero() {
            return Err(Error::new("no end of the answer in time"));
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(answer),
            Ok(count) => answer.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
        if answer.len() > ANSWER_BYTES_MAX {
            return Err(Error::new("the answer is too long"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::http1::{Handler, Limits, Listener, Request, Response, Server};
    use std::net::TcpListener;
    use std::sync::Arc;

    fn handler() -> Arc<Handler> {
        Arc::new(|request: &Request| match request.path.as_str() {
            "/good" => Response::new(200, "application/json", "{\"a\":[1]}").into(),
            "/bad" => Response::new(200, "application/json", "{").into(),
            _ => Response::text(404, "Not Found\n").into(),
        })
    }

    #[test]
    fn both_kinds_of_sockets() {
        let path = std::env::temp_dir().join(format!("enibox-ask-{}.sock", std::process::id()));
        std::fs::remove_file(&path).ok();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap()); // a stale one, which must not be in the way
        let unix = Server::serve("test", Listener::unix(&path).unwrap(), Limits::default(), handler()).unwrap();
        assert!(Listener::unix(&path).unwrap_err().to_string().contains("in use"), "a living one is left alone");
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = Server::start("test", tcp, Limits::default(), handler()).unwrap();
        for address in [format!("unix:{}", path.display()), tcp.address().to_string()] {
            assert_eq!(get(&address, "/good").unwrap(), serde_json::json!({"a": [1]}), "{address}");
            assert!(get(&address, "/none").unwrap_err().to_string().contains("status 404"), "{address}");
            assert!(get(&address, "/bad").is_err(), "{address}");
        }
        drop(unix);
        std::fs::remove_file(&path).unwrap();
        let gone = get(&format!("unix:{}", path.display()), "/good").unwrap_err();
        assert!(gone.to_string().starts_with("ask the daemon at unix:"), "{gone}");
        assert!(get("nowhere", "/good").is_err());
        std::fs::write(&path, "a file").unwrap();
        assert!(Listener::unix(&path).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a file", "what is no socket is left alone");
        std::fs::remove_file(&path).unwrap();
    }
}
