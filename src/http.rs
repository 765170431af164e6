//! HTTP towards AWS and the API server: agents with every option set by us, since the defaults of the library are not
//! ours (no time-outs, 128 KiB buffers, a proxy from the environment, redirects followed, statuses turned into errors).
//!
//! One [`Agent`] talks to one endpoint and keeps its connections. The TLS provider is chosen in [`tls`], and
//! trusted roots are read on the first request to an `https` endpoint: a plain one needs none. What went wrong is told
//! by [`Broken`], which knows whether the request may have reached the other side. It must not retry.

use crate::error::{Context, Error, Result};
use crate::model::order;
use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use ureq::http::Uri;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

/// Bytes of each of the two buffers of a connection.
const BUFFER: usize = 16 * 1024;
/// Bytes of a response's status line and headers.
const HEADER_LIMIT: usize = 32 * 1024;
/// Bytes of a file of roots; the usual bundle has 220 KB.
const ROOTS_LIMIT: u64 = 16 * 1024 * 1024;
/// Files read from a directory of roots.
const ROOT_FILES_LIMIT: usize = 1000;

/// Where distributions keep the roots they trust.
const ROOT_FILES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",                // Debian, Alpine, our image
    "/etc/pki/tls/certs/ca-bundle.crt",                  // Amazon Linux, Fedora
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", // RHEL
    "/etc/ssl/ca-bundle.pem",                            // SUSE
    "/etc/ssl/cert.pem",                                 // BSD and Alpine without the bundle
];

/// How an agent behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Sent as `User-Agent`.
    pub user_agent: String,
    /// Connection set-up, TLS included.
    pub connect: Duration,
    /// From the last byte sent to the end of the response's headers.
    pub response: Duration,
    /// The whole request, body included.
    pub total: Duration,
    /// Bytes of a response's body.
    pub body_limit: u64,
    /// Idle connections kept.
    pub idle: usize,
    /// Where the roots are; asked on first use.
    pub roots: Roots,
    /// Proxies; never used for link-local and loopback addresses.
    pub proxies: Proxies,
}

/// A response, whatever its status.
#[derive(Clone, Debug)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// Headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Response {
    /// The first header of that name (lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The body as text; bytes that are no UTF-8 become the replacement character.
    pub fn text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.body)
    }
}

/// A request that got no usable response.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "five independent facts, each asked for by itself")]
pub struct Broken {
    /// It may have reached the other side and been carried out. Only `false` is certain.
    pub sent: bool,
    /// A time limit was hit.
    pub timed_out: bool,
    /// Trying again may help (`spec/aws.md` 6.4).
    pub retry: bool,
    /// The other side, or what is in between, ended the connection before the response's headers were there.
    pub severed: bool,
    /// The other side's certificate was not good, or ours was not for it.
    pub certificate: bool,
    /// Text for people.
    pub text: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Broken {}

impl Broken {
    fn unsent(text: impl Into<String>) -> Broken {
        Broken { sent: false, timed_out: false, retry: false, severed: false, certificate: false, text: text.into() }
    }
}

// Limits of one request that differ from the agent's.
#[derive(Clone, Copy)]
struct Within {
    total: Duration,
    silence: Option<Duration>,
}

/// A client of one endpoint.
pub struct Agent {
    endpoint: Uri,
    base: String,
    options: Options,
    proxy: Option<ureq::Proxy>,
    connections: Mutex<Option<ureq::Agent>>,
    // The last request went well, so the next one probably goes over the same connection. The library does not tell.
    kept: AtomicBool,
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent").field("endpoint", &self.base).finish_non_exhaustive()
    }
}

impl Agent {
    /// An agent for `endpoint`, an absolute `http` or `https` URL. A path in it stays in front of every request's.
    pub fn new(endpoint: &str, options: Options) -> Result<Agent> {
        let uri: Uri = endpoint.parse().with_context(|| format!("parse endpoint {endpoint:?}"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
            return Err(Error::new(format!("parse endpoint {endpoint:?}: want an http or https URL")));
        }
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err(Error::new("parse endpoint: a user or password in it is not allowed")); // nor printed
        }
        let proxy = options.proxies.for_target(&uri)?;
        let base = endpoint.split(['?', '#']).next().unwrap_or(endpoint).trim_end_matches('/').to_owned();
        let (connections, kept) = (Mutex::new(None), AtomicBool::new(false));
        Ok(Agent { endpoint: uri, base, options, proxy, connections, kept })
    }

    /// The value of the `Host` header: name and, if it is given, port.
    pub fn host(&self) -> &str {
        self.endpoint.authority().map_or("", ureq::http::uri::Authority::as_str)
    }

    /// The path of a request as it is sent and signed: the endpoint's own in front of `path`.
    pub fn full_path(&self, path: &str) -> String {
        format!("{}{path}", self.endpoint.path().trim_end_matches('/'))
    }

    /// The absolute URL of `path`, which starts with a slash.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// Sends a request and reads the whole response. `path` starts with a slash.
    ///
    /// A kept connection may have been closed by the other side, or cut off by a change of the address translation in
    /// between, which shows only when it is used. A request that may be repeated is then sent once more at once, on a
    /// fresh connection; all other failures are the caller's to repeat.
    pub fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> std::result::Result<Response, Broken> {
        self.send_with(None, method, path, headers, body)
    }

    fn send_with(
        &self,
        within: Option<Within>,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> std::result::Result<Response, Broken> {
        let kept = self.kept.swap(false, Ordering::Relaxed);
        let mut result = self.send_once(within, method, path, headers, body);
        if let Err(broken) = &result
            && kept
            && broken.severed
            && matches!(method, "GET" | "PUT" | "PATCH")
        {
            log::debug!("{method} {path}: {broken}; again on a fresh connection");
            *self.connections.lock().unwrap_or_else(PoisonError::into_inner) = None;
            result = self.send_once(within, method, path, headers, body);
        }
        self.kept.store(result.is_ok(), Ordering::Relaxed);
        result
    }

    /// As [`Agent::send`], with a limit of its own on the whole request; it replaces [`Options::total`].
    pub fn send_within(
        &self,
        total: Duration,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> std::result::Result<Response, Broken> {
        self.send_with(Some(Within { total, silence: None }), method, path, headers, body)
    }

    /// Sends a GET whose response is read bit by bit, at most for `total`, and as long as no read waits longer than
    /// `silence`; the response without its body, and that. Nothing bounds the length of the body but the reader.
    pub fn open(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        total: Duration,
        silence: Duration,
    ) -> std::result::Result<(Response, ureq::BodyReader<'static>), Broken> {
        let within = Within { total, silence: Some(silence) };
        let response = self.begin(Some(within), "GET", path, headers, &[])?;
        let head = head_of(&response);
        Ok((head, response.into_body().into_reader()))
    }

    fn send_once(
        &self,
        within: Option<Within>,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> std::result::Result<Response, Broken> {
        let mut response = self.begin(within, method, path, headers, body)?;
        let head = head_of(&response);
        let body = response
            .body_mut()
            .with_config()
            .limit(self.options.body_limit)
            .read_to_vec()
            .map_err(|error| broken(&error, true))?;
        Ok(Response { body, ..head })
    }

    // Up to the end of the response's headers.
    fn begin(
        &self,
        within: Option<Within>,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> std::result::Result<ureq::http::Response<ureq::Body>, Broken> {
        let agent = self.agent().map_err(|error| Broken::unsent(error.to_string()))?;
        let mut request = ureq::http::Request::builder().method(method).uri(self.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = request.body(()).map_err(|error| Broken::unsent(error.to_string()))?;
        if let Some(Within { total, silence }) = within {
            let config = agent.configure_request(request).timeout_global(Some(total)).timeout_per_call(Some(total));
            request = config.timeout_recv_body(Some(total)).timeout_per_read(silence).build();
        }
        let with_body = matches!(method, "POST" | "PUT" | "PATCH");
        let sent = if with_body { agent.run(request.map(|()| body)) } else { agent.run(request) };
        sent.map_err(|error| broken(&error, false))
    }

    fn agent(&self) -> Result<ureq::Agent> {
        let mut slot = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(agent) = slot.as_ref() {
            return Ok(agent.clone());
        }
        let tls = |uri: &Uri| uri.scheme_str() == Some("https");
        let needs_roots = tls(&self.endpoint) || self.proxy.as_ref().is_some_and(|proxy| tls(proxy.uri()));
        let roots = if needs_roots { self.options.roots.load()? } else { Vec::new() };
        let agent = build(&self.options, self.proxy.clone(), roots);
        *slot = Some(agent.clone());
        Ok(agent)
    }
}

fn head_of(response: &ureq::http::Response<ureq::Body>) -> Response {
    let headers = response
        .headers()
        .iter()
        .map(|(name, value)| (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    Response { status: response.status().as_u16(), headers, body: Vec::new() }
}

fn build(options: &Options, proxy: Option<ureq::Proxy>, roots: Vec<ureq::tls::Certificate<'static>>) -> ureq::Agent {
    let tls = TlsConfig::builder()
        .provider(ureq::tls::TlsProvider::Rustls)
        .client_cert(None)
        .root_certs(RootCerts::Specific(Arc::new(roots)))
        .use_sni(true)
        .disable_verification(false)
        .unversioned_rustls_crypto_provider(tls::provider())
        .build();
    let config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .https_only(false)
        .ip_family(ureq::config::IpFamily::Any)
        .tls_config(tls)
        .proxy(proxy)
        .no_delay(true)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .redirect_auth_headers(ureq::config::RedirectAuthHeaders::Never)
        .save_redirect_history(false)
        .user_agent(options.user_agent.as_str())
        .accept("*/*")
        .accept_encoding("")
        .timeout_global(Some(options.total))
        .timeout_per_call(Some(options.total))
        .timeout_per_read(None)
        .timeout_per_write(None)
        .timeout_resolve(Some(options.connect))
        .timeout_connect(Some(options.connect))
        .timeout_send_request(Some(options.total))
        .timeout_await_100(None)
        .timeout_send_body(Some(options.total))
        .timeout_recv_response(Some(options.response))
        .timeout_recv_body(Some(options.total))
        .max_response_header_size(HEADER_LIMIT)
        .input_buffer_size(BUFFER)
        .output_buffer_size(BUFFER)
        .max_idle_connections(options.idle)
        .max_idle_connections_per_host(options.idle)
        .max_idle_age(Duration::from_secs(15))
        .allow_non_standard_methods(false)
        .build();
    ureq::Agent::with_parts(config, DefaultConnector::default(), LiteralsFirst(DefaultResolver::default()))
}

/// Answers literal addresses at once. The library's own resolver starts a thread for every look-up under a time limit,
/// also for literals; names still go to it.
#[derive(Debug)]
struct LiteralsFirst(DefaultResolver);

impl Resolver for LiteralsFirst {
    fn resolve(
        &self,
        uri: &Uri,
        config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> std::result::Result<ResolvedSocketAddrs, ureq::Error> {
        let Some(addr) = literal(uri) else {
            return self.0.resolve(uri, config, timeout);
        };
        let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
        let mut addrs = self.empty();
        addrs.push(SocketAddr::new(addr, port));
        Ok(addrs)
    }
}

fn literal(uri: &Uri) -> Option<IpAddr> {
    uri.host()?.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// What an error of the library means. The request was certainly not sent only if the connection never stood; a limit
/// on the whole call may have been hit at any point, so it counts as sent.
fn broken(error: &ureq::Error, sent: bool) -> Broken {
    use std::io::ErrorKind;
    let text = error.to_string();
    let at = |sent: bool, timed_out: bool, retry: bool| Broken {
        sent,
        timed_out,
        retry,
        severed: false,
        certificate: false,
        text: text.clone(),
    };
    match error {
        ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => at(sent, true, true),
        ureq::Error::Timeout(_) => at(true, true, true),
        ureq::Error::HostNotFound
        | ureq::Error::BadUri(_)
        | ureq::Error::Http(_)
        | ureq::Error::InvalidProxyUrl
        | ureq::Error::TlsRequired
        | ureq::Error::Tls(_)
        | ureq::Error::Rustls(_)
        | ureq::Error::Pem(_) => at(sent, false, false),
        ureq::Error::ConnectionFailed | ureq::Error::ConnectProxyFailed(_) => at(sent, false, true),
        // The library gives the body of an over-long response up; asking again gives the same.
        ureq::Error::BodyExceedsLimit(_) | ureq::Error::LargeResponseHeader(..) | ureq::Error::Protocol(_) => {
            at(true, false, false)
        }
        ureq::Error::Io(io) => match io.kind() {
            ErrorKind::ConnectionRefused
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::AddrNotAvailable => at(sent, false, true),
            ErrorKind::TimedOut | ErrorKind::WouldBlock => at(true, true, true),
            // A certificate is refused before anything is sent.
            ErrorKind::InvalidData if refused_certificate(io) => Broken { certificate: true, ..at(sent, false, false) },
            // getaddrinfo's failures carry no kind; the text of EAI_AGAIN begins so in every C library.
            _ if text.contains("failed to lookup address") => at(sent, false, text.contains("emporary failure")),
            ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof => Broken { severed: !sent, ..at(true, false, true) },
            _ => at(true, false, true),
        },
        _ => at(true, false, true),
    }
}

fn refused_certificate(error: &std::io::Error) -> bool {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(tls, Some(rustls::Error::InvalidCertificate(_) | rustls::Error::PeerIncompatible(_)))
}

/// Where the trusted roots are (`spec/aws.md` 3).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roots {
    bundle: Option<PathBuf>,
    file: Option<PathBuf>,
    dirs: Vec<PathBuf>,
    pem: Option<Vec<u8>>,
}

impl Roots {
    /// These alone, as PEM.
    pub fn of_pem(pem: Vec<u8>) -> Roots {
        Roots { pem: Some(pem), ..Roots::default() }
    }

    /// `AWS_CA_BUNDLE` replaces everything; `SSL_CERT_FILE` and `SSL_CERT_DIR` replace the distribution's places.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Roots {
        let path = |name: &str| lookup(name).filter(|value| !value.is_empty());
        Roots {
            bundle: path("AWS_CA_BUNDLE").map(PathBuf::from),
            file: path("SSL_CERT_FILE").map(PathBuf::from),
            dirs: path("SSL_CERT_DIR")
                .map(|dirs| dirs.split(':').filter(|dir| !dir.is_empty()).map(PathBuf::from).collect())
                .unwrap_or_default(),
            pem: None,
        }
    }

    fn load(&self) -> Result<Vec<ureq::tls::Certificate<'static>>> {
        let mut roots = Vec::new();
        if let Some(pem) = &self.pem {
            parse_roots(pem, &mut roots)?;
        } else if let Some(file) = self.bundle.as_ref() {
            read_roots(file, &mut roots).context("read AWS_CA_BUNDLE")?;
        } else if self.file.is_some() || !self.dirs.is_empty() {
            if let Some(file) = &self.file {
                read_roots(file, &mut roots).context("read SSL_CERT_FILE")?;
            }
            for dir in &self.dirs {
                read_root_dir(dir, &mut roots).context("read SSL_CERT_DIR")?;
            }
        } else {
            for file in ROOT_FILES.map(Path::new) {
                if file.exists() {
                    read_roots(file, &mut roots)?;
                    break;
                }
            }
        }
        if roots.is_empty() {
            return Err(Error::new(
                "load trusted roots: none found; set AWS_CA_BUNDLE or SSL_CERT_FILE, or install ca-certificates",
            ));
        }
        Ok(roots)
    }
}

fn read_roots(file: &Path, roots: &mut Vec<ureq::tls::Certificate<'static>>) -> Result<()> {
    use std::io::Read;
    let mut pem = Vec::new();
    std::fs::File::open(file)
        .and_then(|open| open.take(ROOTS_LIMIT).read_to_end(&mut pem))
        .with_context(|| format!("read {}", file.display()))?;
    parse_roots(&pem, roots).with_context(|| format!("parse {}", file.display()))
}

fn parse_roots(pem: &[u8], roots: &mut Vec<ureq::tls::Certificate<'static>>) -> Result<()> {
    for item in parse_pem(pem) {
        if let PemItem::Certificate(certificate) = item? {
            roots.push(certificate);
        }
    }
    Ok(())
}

fn read_root_dir(dir: &Path, roots: &mut Vec<ureq::tls::Certificate<'static>>) -> Result<()> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
    order::sort(&mut files);
    for file in files.iter().filter(|file| file.is_file()).take(ROOT_FILES_LIMIT) {
        // A directory of roots may hold anything; one file that is no PEM does not take the others away.
        if let Err(error) = read_roots(file, roots) {
            log::debug!("{error}");
        }
    }
    Ok(())
}

/// Proxies of the environment, for EC2 and STS only (`spec/aws.md` 3).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Proxies {
    https: Option<String>,
    http: Option<String>,
    except: Vec<String>,
}

/// A proxy's URL may hold a password; it is not printed.
impl fmt::Debug for Proxies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Proxies { https, http, except } = self;
        let set = |url: &Option<String>| if url.is_some() { "set" } else { "none" };
        f.debug_struct("Proxies").field("https", &set(https)).field("http", &set(http)).field("except", except).finish()
    }
}

impl Proxies {
    /// No proxy at all.
    pub const NONE: Proxies = Proxies { https: None, http: None, except: Vec::new() };

    /// `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`, upper case before lower case.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Proxies {
        let either = |upper: &str| {
            let set = |name: &str| lookup(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
            set(upper).or_else(|| set(&upper.to_ascii_lowercase()))
        };
        Proxies {
            https: either("HTTPS_PROXY"),
            http: either("HTTP_PROXY"),
            except: either("NO_PROXY")
                .map(|list| list.split(',').map(|part| part.trim().to_ascii_lowercase()).collect())
                .unwrap_or_default(),
        }
    }

    fn for_target(&self, target: &Uri) -> Result<Option<ureq::Proxy>> {
        let https = target.scheme_str() == Some("https");
        let Some(url) = (if https { &self.https } else { &self.http }) else { return Ok(None) };
        if self.direct(target) {
            return Ok(None);
        }
        let what = if https { "parse HTTPS_PROXY" } else { "parse HTTP_PROXY" };
        let proxy = ureq::Proxy::new(url).context(what)?;
        if !matches!(proxy.uri().scheme_str(), Some("http" | "https")) {
            // The library would go around a proxy of another kind.
            return Err(Error::new("want an http or https URL").context(what));
        }
        Ok(Some(proxy))
    }

    fn direct(&self, target: &Uri) -> bool {
        let host = target.host().unwrap_or("").trim_matches(['[', ']']).to_ascii_lowercase();
        let addr: Option<IpAddr> = host.parse().ok();
        if addr.is_some_and(never_proxied) || host == "localhost" {
            return true;
        }
        self.except.iter().any(|entry| {
            let (entry, port) = match entry.rsplit_once(':') {
                Some((name, port)) if !name.contains(':') => (name, port.parse::<u16>().ok()),
                _ => (entry.as_str(), None),
            };
            let default = if target.scheme_str() == Some("https") { 443 } else { 80 };
            let port_matches = port.is_none_or(|port| target.port_u16().unwrap_or(default) == port);
            port_matches && matches_exception(entry, &host, addr)
        })
    }
}

/// Link-local and loopback addresses, and the ones where EC2 puts its own services on IPv6. A proxy's
/// `X-Forwarded-For` would make IMDS refuse the request.
fn never_proxied(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local() || v6.segments()[..2] == [0xfd00, 0x0ec2],
    }
}

/// One entry of `NO_PROXY`, as Go reads it: `*`, an address, a network, a name with all below it, `.name` for only
/// those below.
fn matches_exception(entry: &str, host: &str, addr: Option<IpAddr>) -> bool {
    let entry = entry.trim_matches(['[', ']']);
    if entry.is_empty() {
        return false;
    }
    if entry == "*" {
        return true;
    }
    if let Some(addr) = addr {
        return entry.parse::<IpAddr>().is_ok_and(|one| one == addr)
            || entry.parse::<ipnet::IpNet>().is_ok_and(|net| net.contains(&addr));
    }
    let suffix = entry.trim_start_matches('*');
    match suffix.strip_prefix('.') {
        Some(domain) => host.strip_suffix(domain).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
        None => host == suffix || host.strip_suffix(suffix).is_some_and(|rest| rest.ends_with('.')),
    }
}

#[cfg(test)]
pub(crate) mod script;
#[cfg(test)]
mod tests;
mod tls;
