//! DELs that the plugin carried out while the daemon did not answer: one record per file, which the daemon drains.
//!
//! The plugin has already removed the pod's rules and routes when it writes a record; what remains to be done is to
//! release the address. A record is older than everything that happened to its key afterwards: the daemon must leave an
//! allocation alone that was made later than [`Record::time`], and the plugin removes the record of a key before it asks
//! for an address for that key again.

use super::ids::{PodKey, PodName};
use super::time::Wall;
use serde::{Deserialize, Serialize};

/// Where the records are, beside the daemon's socket.
pub const DIRECTORY: &str = "/var/run/aws-node/spool";
/// Ending of a record's file name; files with other names are being written, or are not ours.
pub const SUFFIX: &str = ".json";
/// So many records are kept; with more the plugin writes none, and the daemon finds the dead pods by their missing veth.
pub const RECORDS_MAX: usize = 4096;
/// A longer file is no record: ids and names of Kubernetes are below 1 KiB together.
pub const RECORD_BYTES_MAX: usize = 16 * 1024;

/// One DEL that the daemon has to be told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The allocation.
    pub key: PodKey,
    /// The pod, empty where the runtime did not tell.
    pub pod: PodName,
    /// Its UID, empty where the runtime did not tell.
    pub uid: String,
    /// When the DEL was carried out.
    pub time: Wall,
}

/// The member names are those of the checkpoint file and of `CNI_ARGS`.
#[derive(Serialize, Deserialize)]
struct Document {
    version: String,
    #[serde(rename = "networkName")]
    network_name: String,
    #[serde(rename = "containerID")]
    container_id: String,
    #[serde(rename = "ifName")]
    if_name: String,
    #[serde(rename = "k8sPodNamespace", default)]
    pod_namespace: String,
    #[serde(rename = "k8sPodName", default)]
    pod_name: String,
    #[serde(rename = "k8sPodUID", default)]
    pod_uid: String,
    /// Nanoseconds since 1970, as in the checkpoint file.
    time: i64,
}

const FORMAT: &str = "enibox-spool/1";

impl Record {
    /// The name of the file for a key: the same key always gets the same name, so that a repeated DEL replaces its record.
    pub fn file_name(key: &PodKey) -> String {
        let mut hash = sha1_smol::Sha1::new();
        for part in [&key.network, &key.container, &key.ifname] {
            hash.update(part.as_bytes());
            hash.update(&[0]); // none of the three may hold a NUL
        }
        format!("{}{SUFFIX}", hash.digest())
    }

    /// The file's content.
    pub fn to_bytes(&self) -> Vec<u8> {
        let document = Document {
            version: FORMAT.to_owned(),
            network_name: self.key.network.clone(),
            container_id: self.key.container.clone(),
            if_name: self.key.ifname.clone(),
            pod_namespace: self.pod.namespace.clone(),
            pod_name: self.pod.name.clone(),
            pod_uid: self.uid.clone(),
            time: self.time.as_unix_nanos(),
        };
        let written = serde_json::to_vec(&document);
        // Strings and one number: there is nothing in it that could fail to serialise.
        debug_assert!(written.is_ok());
        let mut bytes = written.unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    /// Reads a file's content. The error is a short reason.
    pub fn parse(bytes: &[u8]) -> Result<Record, String> {
        if bytes.len() > RECORD_BYTES_MAX {
            return Err(format!("{} bytes are more than a record has", bytes.len()));
        }
        let document: Document = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if document.version != FORMAT {
            return Err(format!("unknown version {:?}", document.version));
        }
        let key = PodKey { network: document.network_name, container: document.container_id, ifname: document.if_name };
        if key.network.is_empty() || key.container.is_empty() || key.ifname.is_empty() {
            return Err("network, container and interface must not be empty".to_owned());
        }
        Ok(Record {
            key,
            pod: PodName { namespace: document.pod_namespace, name: document.pod_name },
            uid: document.pod_uid,
            time: Wall::from_unix_nanos(document.time),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record() -> Record {
        Record {
            key: PodKey { network: "aws-cni".into(), container: "6f2c".into(), ifname: "eth0".into() },
            pod: PodName { namespace: "default".into(), name: "web-0".into() },
            uid: "7c0e".into(),
            time: Wall::from_unix_nanos(1_785_571_200_123_456_789),
        }
    }

    #[test]
    fn the_format_is_fixed() {
        let text = r#"{"version":"enibox-spool/1","networkName":"aws-cni","containerID":"6f2c","ifName":"eth0","k8sPodNamespace":"default","k8sPodName":"web-0","k8sPodUID":"7c0e","time":1785571200123456789}"#;
        assert_eq!(String::from_utf8(record().to_bytes()).unwrap().trim_end(), text);
        assert_eq!(Record::parse(text.as_bytes()), Ok(record()));
    }

    #[test]
    fn other_documents_are_refused() {
        let check = |text: &str| assert!(Record::parse(text.as_bytes()).is_err(), "{text}");
        check("");
        check("{}");
        check(r#"{"version":"enibox-spool/2","networkName":"a","containerID":"b","ifName":"c","time":1}"#);
        check(r#"{"version":"enibox-spool/1","networkName":"a","containerID":"","ifName":"c","time":1}"#);
        check(&" ".repeat(RECORD_BYTES_MAX + 1));
    }

    #[test]
    fn a_key_has_one_file() {
        let name = |network: &str, container: &str, ifname: &str| {
            Record::file_name(&PodKey { network: network.into(), container: container.into(), ifname: ifname.into() })
        };
        assert_eq!(name("a", "b", "c"), name("a", "b", "c"));
        assert_ne!(name("a", "bc", "d"), name("ab", "c", "d"));
        assert!(name("a", &"x".repeat(1000), "c").len() < 64);
    }

    proptest! {
        #[test]
        fn records_come_back(network in "\\PC{1,9}", container in "\\PC{1,9}", pod in "\\PC{0,9}", time in any::<i64>()) {
            let mut record = record();
            record.key.network = network;
            record.key.container = container;
            record.pod.name = pod;
            record.time = Wall::from_unix_nanos(time);
            prop_assert_eq!(Record::parse(&record.to_bytes()), Ok(record));
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Record::parse(&bytes);
        }
    }
}
