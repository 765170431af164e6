//! What the installers ask the instance metadata service (`spec/install.md` 8): few keys, through one client with one token.
//!
//! They run when a node has just been started and have nothing better to do than to wait for an answer; but never for ever:
//! whoever started them tries again, and tells that it had to.

use crate::aws::imds::{Client, Config, ImdsError};
use crate::clock;
use crate::error::{Error, Result};
use std::time::Duration;

/// How long a service that does not answer is asked again. A request that is under way then still has its time.
const LIMIT: Duration = Duration::from_secs(30);
/// How often a key whose value is empty is read, and the pause between. A fresh instance may take a moment to learn it.
const EMPTY_MAX: u32 = 5;
const PAUSE: Duration = Duration::from_millis(500);

/// A client by the environment whose requests may take `timeout_s` seconds each (`HTTP_TIMEOUT`).
pub(super) fn client(timeout_s: u32) -> Result<Client> {
    let mut config = Config::from_env(|name| std::env::var(name).ok());
    if config.disabled {
        return Err(Error::new("AWS_EC2_METADATA_DISABLED forbids to ask the metadata service"));
    }
    config.limits.response = Duration::from_secs(timeout_s.into());
    config.limits.operation = LIMIT;
    Client::new(config)
}

/// The value of a key, trimmed. `None` when the service says that there is none, or says nothing again and again.
///
/// # Errors
/// The service refuses, or does not answer within [`LIMIT`].
pub(super) fn read(client: &Client, key: &str) -> Result<Option<String>> {
    let start = clock::now().mono;
    let mut empty = 0;
    loop {
        match client.get(key) {
            Ok(None) => return Ok(None),
            Ok(Some(text)) if !text.trim().is_empty() => return Ok(Some(text.trim().to_owned())),
            Ok(Some(_)) => {
                empty += 1;
                if empty == EMPTY_MAX {
                    log::warn!("imds {key} is empty");
                    return Ok(None);
                }
            }
            Err(error) => {
                let refused = |told: &ImdsError| matches!(told.status, 400..=499) && told.status != 401;
                if error.find().is_some_and(refused) || clock::now().mono.since(start) >= LIMIT {
                    return Err(error.context(format!("ask {}", client.endpoint())));
                }
                log::warn!("{error}; trying again");
            }
        }
        std::thread::sleep(PAUSE);
    }
}
