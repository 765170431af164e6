//! As much of a kubeconfig as debugging by hand needs: server, CA and token of the one cluster and the one user in it.
//! JSON, or YAML with one `key: value` on a line, as kubectl writes it.
//!
//! The structure is not looked at, so a key that comes twice with different values is refused: `kubectl config view
//! --minify --flatten` leaves one. Commands that make tokens (`exec`) are not run, and client certificates not shown: the
//! TLS provider has no private keys.

use super::config::{Authority, Config, Token};
use crate::error::{Context, Error, Result};
use crate::model::map::Map;
use serde_json::Value;
use std::io::Read;
use std::path::Path;

/// Bytes of a kubeconfig or a file that it names.
const FILE_LIMIT: u64 = 1024 * 1024;

/// What would change who we are or whom we trust, and is not done.
const REFUSED: [&str; 5] =
    ["insecure-skip-tls-verify", "tls-server-name", "exec", "client-certificate", "client-certificate-data"];

const KEYS: [&str; 10] = [
    "server",
    "certificate-authority",
    "certificate-authority-data",
    "token",
    "tokenFile",
    "client-certificate",
    "client-certificate-data",
    "insecure-skip-tls-verify",
    "tls-server-name",
    "exec",
];

type Found = Map<&'static str, String>;

/// Takes over what the file says.
pub(super) fn read(file: &Path, config: &mut Config) -> Result<()> {
    let found = scan(&String::from_utf8(load(file)?).context("read as text")?)?;
    if let Some(key) = REFUSED.iter().find(|key| found.contains_key(*key)) {
        return Err(Error::new(format!("{key:?} is not supported")));
    }
    let server = found.get("server").ok_or_else(|| Error::new("no server"))?;
    config.servers = vec![server.trim_end_matches('/').to_owned()];
    // A file is named relative to the kubeconfig.
    let beside = |name: &String| file.parent().unwrap_or(Path::new("")).join(name);
    config.authority = match (found.get("certificate-authority-data"), found.get("certificate-authority")) {
        (Some(data), _) => Authority::Pem(decode(data)?),
        (None, Some(file)) => Authority::Pem(load(&beside(file)).with_context(|| format!("read CA {file:?}"))?),
        (None, None) => Authority::System,
    };
    config.token = match (found.get("token"), found.get("tokenFile")) {
        (Some(token), _) => Token::Fixed(token.clone()),
        (None, Some(file)) => Token::File(beside(file)),
        (None, None) => Token::None,
    };
    Ok(())
}

fn load(file: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(file)?.take(FILE_LIMIT).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn scan(text: &str) -> Result<Found> {
    let mut found = Found::new();
    if text.trim_start().starts_with('{') {
        walk(&serde_json::from_slice(text.as_bytes())?, &mut found)?;
        return Ok(found);
    }
    for line in text.lines() {
        let line = line.trim_start_matches([' ', '-']).trim_end();
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        let quoted = |mark: char| value.strip_prefix(mark).and_then(|value| value.strip_suffix(mark));
        note(key, quoted('"').or_else(|| quoted('\'')).unwrap_or(value), &mut found)?;
    }
    Ok(found)
}

fn walk(value: &Value, found: &mut Found) -> Result<()> {
    match value {
        Value::Array(items) => items.iter().try_for_each(|item| walk(item, found)),
        Value::Object(map) => map.iter().try_for_each(|(key, value)| {
            note(key, value.as_str().unwrap_or(""), found)?;
            walk(value, found)
        }),
        _ => Ok(()),
    }
}

fn note(key: &str, value: &str, found: &mut Found) -> Result<()> {
    let Some(key) = KEYS.into_iter().find(|known| *known == key) else { return Ok(()) };
    if value.is_empty() && key != "exec" {
        return Ok(());
    }
    match found.insert(key, value.to_owned()) {
        Some(before) if before != value => {
            Err(Error::new(format!("{key:?} stands there twice; keep one cluster and user")))
        }
        _ => Ok(()),
    }
}

/// Base64 (RFC 4648 4); white space and padding are passed over.
fn decode(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for byte in text.bytes().filter(|byte| !byte.is_ascii_whitespace() && *byte != b'=') {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return Err(Error::new("decode base64: a character that has no place there")),
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count).to_be_bytes()[3]);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: Result<&[(&str, &str)], &str>) {
        let got = scan(text).map_err(|error| error.to_string());
        let expect =
            expect.map(|pairs| pairs.iter().map(|(key, value)| (*key, (*value).to_owned())).collect::<Vec<_>>());
        assert_eq!(got.map(|found| found.into_iter().collect()), expect.map_err(str::to_owned), "{text}");
    }

    #[test]
    fn texts() {
        let yaml = "apiVersion: v1\nclusters:\n- cluster:\n    server: https://a:6443\n  name: c\nusers:\n- name: u\n  user:\n    token: \"t\"\n";
        check(yaml, Ok(&[("server", "https://a:6443"), ("token", "t")]));
        check("- server: 'http://b'\n", Ok(&[("server", "http://b")]));
        let json = r#"{"clusters":[{"name":"c","cluster":{"server":"https://a","certificate-authority":"ca"}}]}"#;
        check(json, Ok(&[("certificate-authority", "ca"), ("server", "https://a")]));
        check("server: a\nserver: b\n", Err("\"server\" stands there twice; keep one cluster and user"));
        check("user:\n  exec:\n    command: aws\n", Ok(&[("exec", "")]));
        check("", Ok(&[]));
    }

    #[test]
    fn base64() {
        for (text, plain) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9v\nYmFy", "foobar")] {
            assert_eq!(decode(text).unwrap(), plain.as_bytes());
        }
        assert_eq!(decode("/+8=").unwrap(), [0xff, 0xef]);
        assert!(decode("a-b").is_err());
    }

    #[test]
    fn files() {
        let dir = std::env::temp_dir().join(format!("enibox-kubeconfig-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("ca"), "CA").unwrap();
        let lookup = |text: &str| {
            std::fs::write(dir.join("config"), text).unwrap();
            let mut config = Config {
                servers: vec!["https://other".into()],
                authority: Authority::System,
                token: Token::None,
                node: String::new(),
                pod: String::new(),
                namespace: String::new(),
            };
            read(&dir.join("config"), &mut config).map(|()| config).map_err(|error| error.to_string())
        };
        let config = lookup("server: https://a/\ncertificate-authority: ca\ntokenFile: t\n").unwrap();
        assert_eq!(config.servers, ["https://a"]);
        assert!(config.authority == Authority::Pem(b"CA".to_vec()) && config.token == Token::File(dir.join("t")));
        for (text, complaint) in [
            ("a: b", "no server"),
            ("server: a\nexec:\n", "\"exec\" is not supported"),
            ("server: a\nclient-certificate: x\n", "\"client-certificate\" is not supported"),
        ] {
            assert_eq!(lookup(text).err().as_deref(), Some(complaint));
        }
        std::fs::remove_dir_all(dir).unwrap();
    }
}
