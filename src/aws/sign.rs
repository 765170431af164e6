//! Signature Version 4 for both sides: the client signs ([`headers`]), a fake of EC2 checks ([`verify`]).
//!
//! The canonical request is the crate's (`aws-sigv4`), since that is where a home-made version would be almost right.
//! The clock is passed in: the client adds the skew it has measured, a checker takes the moment from the request.

use crate::error::{Error, Result};
use crate::model::time::Wall;
use aws_credential_types::Credentials;
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningParams, SigningSettings, sign};
use aws_sigv4::sign::v4;
use std::fmt;
use std::time::{Duration, SystemTime};

const ALGORITHM: &str = "AWS4-HMAC-SHA256";

/// The keys to sign with.
#[derive(Clone, Copy)]
pub struct Keys<'a> {
    /// Access key id.
    pub access_key: &'a str,
    /// Secret access key.
    pub secret: &'a str,
    /// Session token, with temporary credentials.
    pub token: Option<&'a str>,
}

/// What is signed.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// `POST`.
    pub method: &'a str,
    /// Path and query as sent, `/` or `/?Action=…`.
    pub path: &'a str,
    /// The headers to sign, `host` among them; `x-amz-date` and `x-amz-security-token` come by themselves.
    pub headers: &'a [(&'a str, &'a str)],
    /// The whole body.
    pub body: &'a [u8],
    /// `ec2`.
    pub service: &'a str,
    /// `eu-west-1`.
    pub region: &'a str,
    /// When; whole seconds count.
    pub time: Wall,
}

/// The value of the `Authorization` header.
pub fn authorization(request: &Request<'_>, keys: &Keys<'_>) -> Result<String> {
    headers(request, keys)?
        .into_iter()
        .find(|(name, _)| *name == "authorization")
        .map(|(_, value)| value)
        .ok_or_else(|| Error::new("sign request: no authorization made"))
}

/// The headers to add to the request: `x-amz-date`, `authorization` and, with a session token,
/// `x-amz-security-token`. Names in lower case.
pub fn headers(request: &Request<'_>, keys: &Keys<'_>) -> Result<Vec<(&'static str, String)>> {
    let identity = Credentials::new(keys.access_key, keys.secret, keys.token.map(str::to_owned), None, "enibox").into();
    let mut settings = SigningSettings::default();
    settings.excluded_headers = None; // the caller names exactly the headers to sign
    let params: SigningParams<'_> = v4::SigningParams::builder()
        .identity(&identity)
        .region(request.region)
        .name(request.service)
        .time(system_time(request.time))
        .settings(settings)
        .build()
        .map_err(|error| Error::from(error).context("sign request"))?
        .into();
    let host = request.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("host")).map_or("", |(_, host)| host);
    let signable = SignableRequest::new(
        request.method,
        format!("http://{host}{}", request.path),
        request.headers.iter().copied(),
        SignableBody::Bytes(request.body),
    )
    .map_err(|error| Error::from(error).context("sign request"))?;
    let (instructions, _) =
        sign(signable, &params).map_err(|error| Error::from(error).context("sign request"))?.into_parts();
    let (headers, _) = instructions.into_parts();
    Ok(headers.iter().map(|header| (header.name(), header.value().to_owned())).collect())
}

fn system_time(wall: Wall) -> SystemTime {
    let seconds = wall.as_unix_seconds();
    let distance = Duration::from_secs(seconds.unsigned_abs());
    let moved = if seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    };
    moved.unwrap_or(SystemTime::UNIX_EPOCH)
}

/// A request as a server has received it.
#[derive(Clone, Copy)]
pub struct Received<'a> {
    /// `POST`.
    pub method: &'a str,
    /// Path and query as received.
    pub path: &'a str,
    /// All headers, in any case and order.
    pub headers: &'a [(String, String)],
    /// The whole body.
    pub body: &'a [u8],
}

impl<'a> Received<'a> {
    fn header(&self, name: &str) -> Option<&'a str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// Who signed, for what, and when. Whether the moment is near enough is for the caller to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Access key id.
    pub access_key: String,
    /// Session token, if one was sent; it is part of what is signed.
    pub token: Option<String>,
    /// Region of the scope.
    pub region: String,
    /// Service of the scope.
    pub service: String,
    /// `x-amz-date`.
    pub time: Wall,
}

/// Why a signature does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No `Authorization` header.
    Unsigned,
    /// Something in the signature's form is wrong.
    Malformed(String),
    /// Nobody has this access key.
    UnknownKey(String),
    /// Signed with another secret, or changed after it was signed.
    Mismatch,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Unsigned => f.write_str("the request is not signed"),
            Refusal::Malformed(what) => write!(f, "malformed signature: {what}"),
            Refusal::UnknownKey(key) => write!(f, "unknown access key {key:?}"),
            Refusal::Mismatch => f.write_str("the signature does not match"),
        }
    }
}

impl std::error::Error for Refusal {}

/// Computes the signature of a received request again; `secret_of` gives the secret of an access key.
pub fn verify(
    request: &Received<'_>,
    secret_of: impl Fn(&str) -> Option<String>,
) -> std::result::Result<Verified, Refusal> {
    let malformed = |what: &str| Refusal::Malformed(what.to_owned());
    let authorization_sent = request.header("authorization").ok_or(Refusal::Unsigned)?;
    let fields = authorization_sent.strip_prefix(ALGORITHM).ok_or_else(|| malformed("another algorithm"))?;
    let field = |name: &str| {
        fields
            .split(',')
            .find_map(|field| field.trim().strip_prefix(name)?.strip_prefix('='))
            .ok_or_else(|| malformed(&format!("no {name}")))
    };
    let scope: Vec<&str> = field("Credential")?.split('/').collect();
    let [access_key, day, region, service, "aws4_request"] = scope[..] else {
        return Err(malformed("the credential scope has not five parts"));
    };
    let stamp = request.header("x-amz-date").ok_or_else(|| malformed("no x-amz-date"))?;
    let time = parse_amz_date(stamp).ok_or_else(|| malformed("x-amz-date is no moment"))?;
    if !stamp.starts_with(day) {
        return Err(malformed("scope and x-amz-date are of different days"));
    }
    let signed: Vec<&str> = field("SignedHeaders")?.split(';').collect();
    let token = request.header("x-amz-security-token");
    let must: &[&str] =
        if token.is_some() { &["host", "x-amz-date", "x-amz-security-token"] } else { &["host", "x-amz-date"] };
    if let Some(missing) = must.iter().find(|name| !signed.contains(name)) {
        return Err(malformed(&format!("{missing} is not signed")));
    }
    let mut headers = Vec::new();
    for name in &signed {
        let value = request.header(name).ok_or_else(|| malformed(&format!("{name} is signed but not sent")))?;
        if !matches!(*name, "x-amz-date" | "x-amz-security-token") {
            headers.push((*name, value));
        }
    }
    let secret = secret_of(access_key).ok_or_else(|| Refusal::UnknownKey(access_key.to_owned()))?;
    let again = Request {
        method: request.method,
        path: request.path,
        headers: &headers,
        body: request.body,
        service,
        region,
        time,
    };
    let expected = authorization(&again, &Keys { access_key, secret: &secret, token })
        .map_err(|error| malformed(&error.to_string()))?;
    if expected.rsplit_once("Signature=").map(|(_, hex)| hex) != Some(field("Signature")?) {
        return Err(Refusal::Mismatch);
    }
    Ok(Verified {
        access_key: access_key.to_owned(),
        token: token.map(str::to_owned),
        region: region.to_owned(),
        service: service.to_owned(),
        time,
    })
}

/// Reads `20150830T123600Z`.
pub fn parse_amz_date(text: &str) -> Option<Wall> {
    let digits =
        |range: std::ops::Range<usize>| text.get(range).filter(|part| part.bytes().all(|byte| byte.is_ascii_digit()));
    if text.len() != 16 || text.get(8..9) != Some("T") || text.get(15..) != Some("Z") {
        return None;
    }
    let (year, month, day) = (digits(0..4)?, digits(4..6)?, digits(6..8)?);
    let (hour, minute, second) = (digits(9..11)?, digits(11..13)?, digits(13..15)?);
    Wall::parse_rfc3339(&format!("{year}-{month}-{day}T{hour}:{minute}:{second}Z"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "AKIDEXAMPLE";
    const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
    const KEYS: Keys<'_> = Keys { access_key: KEY, secret: SECRET, token: None };

    fn moment() -> Wall {
        parse_amz_date("20150830T123600Z").unwrap()
    }

    /// Published vectors: the example of the IAM documentation and the test suite of Signature Version 4.
    #[test]
    fn published_vectors() {
        let check = |method, path, headers: &[(&str, &str)], body: &str, service, signed: &str, signature: &str| {
            let request =
                Request { method, path, headers, body: body.as_bytes(), service, region: "us-east-1", time: moment() };
            let expected = format!(
                "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/{service}/aws4_request, \
                 SignedHeaders={signed}, Signature={signature}"
            );
            assert_eq!(authorization(&request, &KEYS).unwrap(), expected);
        };
        check(
            "GET",
            "/?Action=ListUsers&Version=2010-05-08",
            &[("content-type", "application/x-www-form-urlencoded; charset=utf-8"), ("host", "iam.amazonaws.com")],
            "",
            "iam",
            "content-type;host;x-amz-date",
            "5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7",
        );
        let host = ("host", "example.amazonaws.com");
        check(
            "GET",
            "/",
            &[host],
            "",
            "service",
            "host;x-amz-date",
            "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        );
        check(
            "POST",
            "/",
            &[host],
            "",
            "service",
            "host;x-amz-date",
            "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
        );
        check(
            "POST",
            "/",
            &[("Content-Type", "application/x-www-form-urlencoded"), host],
            "Param1=value1",
            "service",
            "content-type;host;x-amz-date",
            "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a",
        );
    }

    const BODY: &[u8] = b"Action=DescribeSubnets&Version=2016-11-15";

    fn received(token: Option<&str>) -> Vec<(String, String)> {
        let sent = [("host", "127.0.0.1:4566"), ("content-type", "application/x-www-form-urlencoded; charset=utf-8")];
        let request = Request {
            method: "POST",
            path: "/",
            headers: &sent,
            body: BODY,
            service: "ec2",
            region: "eu-west-1",
            time: moment(),
        };
        let made = headers(&request, &Keys { token, ..KEYS }).unwrap();
        let all = sent.iter().map(|(name, value)| (*name, (*value).to_owned())).chain(made);
        all.map(|(name, value)| (name.to_uppercase(), value)).collect()
    }

    fn check(headers: &[(String, String)], body: &[u8]) -> std::result::Result<Verified, Refusal> {
        let request = Received { method: "POST", path: "/", headers, body };
        verify(&request, |key| (key == KEY).then(|| SECRET.to_owned()))
    }

    #[test]
    fn what_is_signed_here_holds_there() {
        for token in [None, Some("FwoGZXIvYXdzE/+=")] {
            let verified = check(&received(token), BODY).unwrap();
            assert_eq!(verified.access_key, KEY);
            assert_eq!(verified.token.as_deref(), token);
            assert_eq!((verified.region.as_str(), verified.service.as_str()), ("eu-west-1", "ec2"));
            assert_eq!(verified.time, moment());
        }
    }

    #[test]
    fn what_is_changed_does_not_hold() {
        assert_eq!(check(&received(None), b"Action=DeleteNetworkInterface"), Err(Refusal::Mismatch));
        let other_secret = |_: &str| Some("other".to_owned());
        let headers = received(None);
        let request = Received { method: "POST", path: "/", headers: &headers, body: BODY };
        assert_eq!(verify(&request, other_secret), Err(Refusal::Mismatch));
        assert_eq!(verify(&request, |_| None), Err(Refusal::UnknownKey(KEY.to_owned())));
        let replaced = |name: &str, value: &str| {
            let mut headers = received(Some("token"));
            for (key, old) in &mut headers {
                if key.eq_ignore_ascii_case(name) {
                    value.clone_into(old);
                }
            }
            check(&headers, BODY)
        };
        assert_eq!(replaced("x-amz-security-token", "forged"), Err(Refusal::Mismatch));
        assert_eq!(replaced("host", "elsewhere"), Err(Refusal::Mismatch));
        assert_eq!(replaced("x-amz-date", "20150830T123601Z"), Err(Refusal::Mismatch));
        assert!(matches!(replaced("x-amz-date", "20150831T123600Z"), Err(Refusal::Malformed(_))));
        assert!(matches!(replaced("x-amz-date", "now"), Err(Refusal::Malformed(_))));
        for wrong in ["", "Basic abc", "AWS4-HMAC-SHA256 Credential=a/b", "AWS4-HMAC-SHA256"] {
            assert!(matches!(replaced("authorization", wrong), Err(Refusal::Malformed(_))), "{wrong}");
        }
        assert_eq!(check(&[], BODY), Err(Refusal::Unsigned));
    }

    #[test]
    fn dates_of_the_header() {
        assert_eq!(parse_amz_date("20150830T123600Z").map(|w| w.to_string()).as_deref(), Some("2015-08-30T12:36:00Z"));
        for bad in ["", "20150830T123600", "20150830 123600Z", "2015083OT123600Z", "20151330T123600Z", "€€€€€T€€€"]
        {
            assert_eq!(parse_amz_date(bad), None, "{bad}");
        }
    }
}
