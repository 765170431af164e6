//! The probe's command line in the syntax of Go's `flag` package, as manifests are written for it: `-x` and `--x`, `=v` or
//! the next word, the last of several counts, the first word that is no flag ends them.

use std::fmt::Write as _;

/// What the probe was told. Durations are in nanoseconds and may be what no time-out can be: that has a text of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Flags {
    pub(super) addr: String,
    pub(super) service: String,
    pub(super) user_agent: String,
    pub(super) connect_timeout: i64,
    pub(super) rpc_timeout: i64,
    pub(super) verbose: bool,
}

impl Default for Flags {
    fn default() -> Self {
        Flags {
            addr: String::new(),
            service: String::new(),
            user_agent: "grpc-health-probe".into(),
            connect_timeout: SECOND,
            rpc_timeout: SECOND,
            verbose: false,
        }
    }
}

const SECOND: i64 = 1_000_000_000;

/// The flags, for people.
pub(super) const USAGE: &str = "  -addr string
    \twhom to ask: unix:///path or host:port (required)
  -connect-timeout duration
    \thow long connecting may take, repetitions included (default 1s)
  -rpc-timeout duration
    \thow long the answer may take (default 1s)
  -service string
    \tname of the service to ask for (default: the server as a whole)
  -user-agent string
    \tthe header's value (default \"grpc-health-probe\")
  -v\ttell more
";

/// Why there are no flags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// Help was asked for.
    Help,
    /// A line that says what is wrong.
    Wrong(String),
}

/// Reads the words behind the program's name.
pub(super) fn parse(words: impl IntoIterator<Item = String>) -> Result<Flags, Refused> {
    let mut flags = Flags::default();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let Some(rest) = word.strip_prefix('-').filter(|rest| !rest.is_empty()) else { break };
        let rest = rest.strip_prefix('-').unwrap_or(rest);
        if rest.is_empty() {
            break; // `--` ends the flags
        }
        if rest.starts_with(['-', '=']) {
            return Err(Refused::Wrong(format!("bad flag syntax: {word}")));
        }
        let (name, value) = match rest.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (rest, None),
        };
        if name == "v" {
            flags.verbose = match value {
                None => true,
                Some(text) => parse_bool(&text)
                    .ok_or_else(|| Refused::Wrong(format!("invalid boolean value {text:?} for -v: parse error")))?,
            };
            continue;
        }
        if matches!(name, "h" | "help") {
            return Err(Refused::Help);
        }
        if !matches!(name, "addr" | "service" | "user-agent" | "connect-timeout" | "rpc-timeout") {
            return Err(Refused::Wrong(format!("flag provided but not defined: -{name}")));
        }
        let Some(value) = value.or_else(|| words.next()) else {
            return Err(Refused::Wrong(format!("flag needs an argument: -{name}")));
        };
        match name {
            "addr" => flags.addr = value,
            "service" => flags.service = value,
            "user-agent" => flags.user_agent = value,
            _ => {
                let nanos = parse_duration(&value)
                    .ok_or_else(|| Refused::Wrong(format!("invalid value {value:?} for flag -{name}: parse error")))?;
                *(if name == "rpc-timeout" { &mut flags.rpc_timeout } else { &mut flags.connect_timeout }) = nanos;
            }
        }
    }
    Ok(flags)
}

fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Go's `time.ParseDuration`: a sign, then numbers with a unit each; `0` needs none.
fn parse_duration(text: &str) -> Option<i64> {
    let (negative, mut rest) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, behind) = rest.split_at(number_end);
        let unit_end = behind.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(behind.len());
        let (unit, behind) = behind.split_at(unit_end);
        rest = behind;
        let unit: u128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        // No number in range has more digits, and no smaller part of an hour is as long as a nanosecond.
        if (whole.is_empty() && fraction.is_empty()) || whole.len() > 19 || fraction.contains('.') {
            return None;
        }
        let digits = |text: &str| text.bytes().fold(0u128, |value, digit| value * 10 + u128::from(digit - b'0'));
        let fraction = &fraction[..fraction.len().min(15)];
        let scale = 10u128.pow(u32::try_from(fraction.len()).unwrap_or(0));
        total += digits(whole) * unit + digits(fraction) * unit / scale;
        if total > u128::from(i64::MAX.unsigned_abs()) {
            return None;
        }
    }
    let total = i64::try_from(total).ok()?;
    Some(if negative { -total } else { total })
}

/// A duration as Go shows it: `1m0s`, `1.5s`, `100ms`.
pub(super) fn show_duration(nanos: i64) -> String {
    let (mut out, left) = (String::from(if nanos < 0 { "-" } else { "" }), nanos.unsigned_abs());
    let (unit, name, digits) = match left {
        0 => return "0s".into(),
        1..1_000 => (1, "ns", 0),
        1_000..1_000_000 => (1_000, "µs", 3),
        1_000_000..1_000_000_000 => (1_000_000, "ms", 6),
        _ => (1_000_000_000, "s", 9),
    };
    let minutes = left / 60_000_000_000;
    // Writing to a string cannot fail.
    if minutes >= 60 {
        let _ = write!(out, "{}h", minutes / 60);
    }
    if minutes > 0 {
        let _ = write!(out, "{}m", minutes % 60);
    }
    let left = left % 60_000_000_000;
    let _ = write!(out, "{}", left / unit);
    if !left.is_multiple_of(unit) {
        let fraction = format!("{:0digits$}", left % unit);
        let _ = write!(out, ".{}", fraction.trim_end_matches('0'));
    }
    out + name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Flags, Refused> {
        parse(line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned))
    }

    #[test]
    fn flags_are_written_as_in_go() {
        let check = |line: &str, change: fn(&mut Flags)| {
            let mut expected = Flags::default();
            change(&mut expected);
            assert_eq!(read(line), Ok(expected), "{line}");
        };
        check("", |_| ());
        check("-addr=unix:///a -connect-timeout=5s -rpc-timeout=5s", |flags| {
            flags.addr = "unix:///a".into();
            (flags.connect_timeout, flags.rpc_timeout) = (5 * SECOND, 5 * SECOND);
        });
        check("--addr host:1 -service a.b --user-agent=x", |flags| {
            (flags.addr, flags.service, flags.user_agent) = ("host:1".into(), "a.b".into(), "x".into());
        });
        check("-v -addr a", |flags| (flags.verbose, flags.addr) = (true, "a".into()));
        check("-v=false -v=T --v", |flags| flags.verbose = true);
        check("-v -v=0", |_| ());
        check("-addr a -addr=b=c", |flags| flags.addr = "b=c".into());
        check("-addr -v", |flags| flags.addr = "-v".into());
        check("-service= -addr=", |_| ());
        check("word -addr a", |_| ());
        check("- -addr a", |_| ());
        check("-addr a -- -v", |flags| flags.addr = "a".into());
        check("-rpc-timeout -3s", |flags| flags.rpc_timeout = -3 * SECOND);
    }

    #[test]
    fn a_mistake_has_one_line() {
        let check = |line: &str, text: &str| assert_eq!(read(line), Err(Refused::Wrong(text.into())), "{line}");
        check("-addr a -foo", "flag provided but not defined: -foo");
        check("--tls=1", "flag provided but not defined: -tls");
        check("-addr", "flag needs an argument: -addr");
        check("---addr a", "bad flag syntax: ---addr");
        check("-=a", "bad flag syntax: -=a");
        check("-v=maybe", "invalid boolean value \"maybe\" for -v: parse error");
        check("-rpc-timeout=5", "invalid value \"5\" for flag -rpc-timeout: parse error");
        check("-connect-timeout ever", "invalid value \"ever\" for flag -connect-timeout: parse error");
        assert_eq!(read("-help"), Err(Refused::Help));
        assert_eq!(read("-v --h"), Err(Refused::Help));
    }

    #[test]
    fn durations_are_read_and_shown_as_in_go() {
        let check = |text: &str, nanos: i64, shown: &str| {
            assert_eq!(parse_duration(text), Some(nanos), "{text}");
            assert_eq!(show_duration(nanos), shown, "{text}");
        };
        check("0", 0, "0s");
        check("+0", 0, "0s");
        check("5s", 5 * SECOND, "5s");
        check("1.5s", 1_500_000_000, "1.5s");
        check("1500ms", 1_500_000_000, "1.5s");
        check(".5s", 500_000_000, "500ms");
        check("1.s", SECOND, "1s");
        check("-2m", -120 * SECOND, "-2m0s");
        check("1h15m30.918s", 4_530_918_000_000, "1h15m30.918s");
        check("36h", 36 * 3600 * SECOND, "36h0m0s");
        check("100us", 100_000, "100µs");
        check("1.25µs", 1_250, "1.25µs");
        check("7ns", 7, "7ns");
        check("9223372036854775807ns", i64::MAX, "2562047h47m16.854775807s");
        for text in
            ["", "5", "s", ".s", "1x", "1..5s", "1.5.5s", "1 s", "--1s", "-", "9223372036854775808ns", "3000000h"]
        {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }
}
