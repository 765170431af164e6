//! JSON as text: where the members of a document stand, so that it can be changed without touching the rest of it.
//!
//! It is for texts that `serde_json` has read without complaint, and only finds its way in them: anything else gives fewer
//! members, never a panic.

use serde_json::Value;
use std::ops::Range;

/// A member of the document's object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its key, as it is written between the quotes.
    pub key: String,
    /// Where the key and its quotes begin.
    pub start: usize,
    /// Where its value stands, without blanks around it.
    pub value: Range<usize>,
}

/// The members of the object that the text is, in their order.
pub fn members(text: &str) -> Vec<Member> {
    let mut found = Vec::new();
    let mut at = skip_blanks(text, 0) + 1; // behind the brace
    loop {
        let start = skip_blanks(text, at);
        let key = end_of_value(text, start);
        let colon = skip_blanks(text, key);
        let value = skip_blanks(text, colon + 1);
        let end = end_of_value(text, value);
        let name = text.get(start + 1..key.saturating_sub(1)).filter(|_| end > value && text.get(start..end).is_some());
        let Some(name) = name.filter(|_| text.is_char_boundary(value)) else { return found };
        found.push(Member { key: name.to_owned(), start, value: value..end });
        at = skip_blanks(text, end) + 1; // behind the comma
    }
}

/// The last of several members of this key, as Go's reader has it.
pub fn find<'a>(members: &'a [Member], key: &str) -> Option<&'a Member> {
    members.iter().rfind(|member| member.key == key)
}

/// The blanks at the beginning of a text.
pub fn blanks(text: &str) -> &str {
    &text[..skip_blanks(text, 0)]
}

/// The text as it stands between the quotes of a string.
pub fn escape(text: &str) -> String {
    let quoted = Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

fn skip_blanks(text: &str, at: usize) -> usize {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
    at + text.as_bytes().get(at..).unwrap_or_default().iter().take_while(|byte| blank(byte)).count()
}

/// Where the value that begins at `at` ends.
fn end_of_value(text: &str, at: usize) -> usize {
    let (mut depth, mut inside, mut escaped) = (0_usize, false, false);
    for (offset, byte) in text.bytes().enumerate().skip(at) {
        if inside {
            inside = byte != b'"' || escaped;
            escaped = byte == b'\\' && !escaped;
            if !inside && depth == 0 {
                return offset + 1;
            }
            continue;
        }
        match byte {
            b'"' => inside = true,
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth > 1 => depth -= 1,
            b'}' | b']' => return offset + depth, // with the bracket, unless it is that of the object around
            b',' | b':' | b' ' | b'\t' | b'\n' | b'\r' if depth == 0 => return offset,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn members_are_found_where_they_stand() {
        #[track_caller]
        fn check(text: &str, expected: &[(&str, &str)]) {
            let found = members(text);
            let pairs: Vec<(&str, &str)> =
                found.iter().map(|member| (member.key.as_str(), &text[member.value.clone()])).collect();
            assert_eq!(pairs, expected, "{text:?}");
            assert!(found.iter().all(|member| text[member.start..].starts_with('"')), "{found:?}");
        }
        check("{}", &[]);
        check(" { } ", &[]);
        check(r#"{"a":1}"#, &[("a", "1")]);
        check("\n{ \"a\" :\t-1.5e3 ,\n \"b\":null}", &[("a", "-1.5e3"), ("b", "null")]);
        check(
            r#"{"a":"x, }\"]\\","b":[{"c":"]"},[]],"a":{}}"#,
            &[("a", r#""x, }\"]\\""#), ("b", r#"[{"c":"]"},[]]"#), ("a", "{}")],
        );
        check(r#"{"ä\"":"ö"}"#, &[(r#"ä\""#, "\"ö\"")]);
        check("", &[]);
        check("{\"a", &[]);
        assert_eq!(find(&members(r#"{"a":1,"a":2}"#), "a").map(|member| member.start), Some(7));
    }

    #[test]
    fn escapes_are_those_of_json() {
        assert_eq!(escape(r#"a"\b"#), r#"a\"\\b"#);
        assert_eq!(escape("a\n\u{1}ä"), "a\\n\\u0001ä");
        assert_eq!(escape(""), "");
    }

    proptest! {
        /// Whatever the text: no panic, and places inside of it.
        #[test]
        fn any_text_is_survived(text in "[\\[\\]{}\":, \\\\aä\n]{0,40}") {
            for member in members(&text) {
                prop_assert!(text.get(member.value).is_some());
            }
        }
    }
}
