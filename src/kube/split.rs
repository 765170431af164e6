//! Takes a list apart while it comes in, so that no more than one object of it is in memory: a node's pods may be ten
//! megabytes of JSON, of which a count is kept.

use crate::error::{Error, Result};

/// Bytes of one object; the API server's own limit is that of its store, 1.5 MiB.
pub const OBJECT_LIMIT: usize = 4 << 20;
/// Bytes of a list without its objects.
const FRAME_LIMIT: usize = 256 << 10;

/// What has been read of a list.
#[derive(Debug, Default)]
pub struct Splitter {
    frame: Vec<u8>,
    object: Vec<u8>,
    word: Vec<u8>, // the last string right inside the list's own braces
    depth: usize,
    in_string: bool,
    escaped: bool,
    in_items: bool,
}

impl Splitter {
    /// Reads on; `each` gets every whole object of `items`. The JSON is checked by whoever parses the pieces.
    pub fn feed(&mut self, bytes: &[u8], each: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        for byte in bytes {
            self.take(*byte);
            if self.object.len() > OBJECT_LIMIT || self.frame.len() > FRAME_LIMIT {
                return Err(Error::new("read list: an object is too large"));
            }
            if self.in_items && self.depth == 2 && !self.object.is_empty() {
                each(&self.object)?;
                self.object.clear();
            }
        }
        Ok(())
    }

    /// The list without its objects.
    pub fn frame(self) -> Vec<u8> {
        self.frame
    }

    fn take(&mut self, byte: u8) {
        let outside = !self.in_items || self.depth < 2;
        if self.in_string {
            let ends = byte == b'"' && !self.escaped;
            self.escaped = byte == b'\\' && !self.escaped;
            self.in_string = !ends;
            if self.depth == 1 && !ends {
                self.word.push(byte);
            }
            return if outside { self.frame.push(byte) } else { self.object.push(byte) };
        }
        match byte {
            b'"' => {
                self.in_string = true;
                self.word.clear();
            }
            b'[' if self.depth == 1 && self.word == b"items" => {
                self.in_items = true;
                self.depth = 2;
                return self.frame.push(byte);
            }
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                self.in_items &= self.depth > 1;
            }
            _ => {}
        }
        if outside || !self.in_items {
            self.frame.push(byte);
        } else if self.depth > 2 || matches!(byte, b'}' | b']') {
            self.object.push(byte); // what stands between the objects goes
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn split(text: &[u8], step: usize) -> Result<(Vec<Value>, Value)> {
        let mut objects = Vec::new();
        let mut splitter = Splitter::default();
        for part in text.chunks(step) {
            splitter.feed(part, &mut |object| {
                objects.push(serde_json::from_slice(object)?);
                Ok(())
            })?;
        }
        Ok((objects, serde_json::from_slice(&splitter.frame())?))
    }

    #[test]
    fn takes_lists_apart() {
        let tricky = json!({"items": [{"a": "}]\"\\"}], "b": [[{}], "items"]});
        for list in [
            json!({"kind": "PodList", "metadata": {"resourceVersion": "7", "items": [1]}, "items": [{}, tricky, {"c": 1}]}),
            json!({"kind": "items", "items": []}),
            json!({"kind": "Status", "details": {"items": [{}]}}),
        ] {
            for text in [list.to_string(), serde_json::to_string_pretty(&list).unwrap()] {
                for step in [1, 3, 7, 1000] {
                    let (objects, frame) = split(text.as_bytes(), step).unwrap();
                    let mut expect = list.clone();
                    let items = expect.get_mut("items").and_then(Value::as_array_mut).map(std::mem::take);
                    assert_eq!((objects, frame), (items.unwrap_or_default(), expect));
                }
            }
        }
        let null = split(br#"{"items":null,"metadata":{}}"#, 5).unwrap();
        assert_eq!(null, (vec![], json!({"items": null, "metadata": {}})));
    }

    #[test]
    fn bounds_hold() {
        let long = "x".repeat(OBJECT_LIMIT);
        assert!(split(format!(r#"{{"items":[{{"a":"{long}"}}]}}"#).as_bytes(), 1 << 14).is_err());
        assert!(split(format!(r#"{{"a":"{long}"}}"#).as_bytes(), 1 << 14).is_err());
    }

    proptest::proptest! {
        #[test]
        fn hostile_bytes_never_panic(text in "[]\\[{}\",:\\\\aitems 1]{0,60}", step in 1_usize..9) {
            let _ = split(text.as_bytes(), step);
        }
    }
}
