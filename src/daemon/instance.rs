//! What the node's instance type can carry: from the table, from what EC2 told an earlier run, from EC2.

use super::files;
use crate::aws::ec2;
use crate::aws::pace::{self, Pace};
use crate::error::{Context, Error, Result};
use crate::model::ec2::{Call, Failure, Reply};
use crate::model::limits::{self, Limits};
use crate::model::settings::Settings;
use std::path::Path;

/// How often EC2 is asked for an unknown type while it throttles; half a minute in all.
const ATTEMPTS: u32 = 6;

/// Beside the checkpoint: EC2's answer for a type that is not in the table, so that a restart does not depend on EC2
/// (`spec/aws.md` 15.1).
const FILE_NAME: &str = "instance-type.json";

/// Limits of the type. EC2 is only asked for one that neither the table nor the file beside the checkpoint holds, and
/// not at all in IMDS-only mode.
pub(super) fn limits(instance_type: &str, settings: &Settings, ec2: &ec2::Client) -> Result<Limits> {
    if let Some(limits) = limits::of(instance_type) {
        return Ok(limits);
    }
    let file = Path::new(&settings.backing_store).with_file_name(FILE_NAME);
    let kept = files::read(&file).unwrap_or_default().and_then(|text| limits::from_json(&text, instance_type));
    if let Some(limits) = kept.as_ref().and_then(limits::from_ec2) {
        log::info!("instance type {instance_type}: limits from {}", file.display());
        return Ok(limits);
    }
    if settings.imds_only {
        log::warn!("instance type {instance_type}: limits unknown, and EC2 is not to be asked; assuming none");
        return Ok(limits::unknown(instance_type));
    }
    let what = || format!("limits of instance type {instance_type:?}");
    match ask(ec2, instance_type).with_context(what)? {
        Reply::InstanceType(described) => {
            if let Err(error) = files::write(&file, limits::to_json(&described).as_bytes()) {
                log::warn!("keep {}: {error}", what());
            }
            limits::from_ec2(&described).ok_or_else(|| Error::new("EC2 tells none").context(what()))
        }
        reply => Err(Error::new(format!("EC2 answered {reply:?}")).context(what())),
    }
}

// Nothing else goes on yet, so that waiting here delays nothing that could do without.
fn ask(ec2: &ec2::Client, instance_type: &str) -> std::result::Result<Reply, Failure> {
    let call = Call::DescribeInstanceType(instance_type.to_owned());
    let mut attempt = 1;
    loop {
        match ec2.execute(&call) {
            Err(failure) if failure.throttled() && attempt < ATTEMPTS => Pace::REAL.sleep(pace::backoff(attempt)),
            result => return result,
        }
        attempt += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aws::script::{Server, answer};
    use crate::aws::{creds, imds};
    use std::sync::Arc;

    fn client(server: &Server) -> ec2::Client {
        let keys = |name: &str| name.starts_with("AWS_").then(|| "x".to_owned());
        let imds = imds::Client::new(imds::Config::at("http://127.0.0.1:1")).unwrap();
        let chain = creds::Chain::from_env(keys, Arc::new(imds)).unwrap();
        ec2::Client::new(ec2::Config::at(server.url(), "eu-west-1"), Arc::new(chain)).unwrap()
    }

    #[test]
    fn an_unknown_type_is_asked_for_once() {
        let folder = std::env::temp_dir().join(format!("enibox-instance-{}", std::process::id()));
        let with = |imds_only| {
            let (settings, _) = Settings::parse(|_| None);
            Settings { imds_only, backing_store: folder.join("ipam.json").display().to_string(), ..settings }
        };
        let told = include_str!("../../testdata/ec2/instance_type.xml").replace("c6in.32xlarge", "m99.large");
        let throttled = "<Response><Errors><Error><Code>RequestLimitExceeded</Code></Error></Errors></Response>";
        let ec2 = Server::queue(vec![answer(503, throttled), answer(200, &told)]);
        let first = limits("m99.large", &with(false), &client(&ec2)).unwrap();
        assert_eq!((first.enis, first.cards.len(), ec2.seen().len()), (8, 2, 2));
        let silent = Server::queue(Vec::new());
        let silent_client = client(&silent);
        for imds_only in [false, true] {
            assert_eq!(limits("m99.large", &with(imds_only), &silent_client).unwrap(), first);
        }
        // Another type, in the table or not, and a file that is none.
        assert_eq!(limits("m5.4xlarge", &with(true), &silent_client).unwrap().enis, 8);
        assert_eq!(limits("m98.large", &with(true), &silent_client).unwrap(), limits::unknown("m98.large"));
        std::fs::write(folder.join(FILE_NAME), "{").unwrap();
        assert_eq!(limits("m99.large", &with(true), &silent_client).unwrap(), limits::unknown("m99.large"));
        assert_eq!(silent.seen().len(), 0);
        let ec2 = Server::queue(vec![answer(400, &throttled.replace("RequestLimitExceeded", "InvalidInstanceType"))]);
        let error = limits("m98.large", &with(false), &client(&ec2)).unwrap_err().to_string();
        assert!(error.starts_with("limits of instance type \"m98.large\": DescribeInstanceTypes: Invalid"), "{error}");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
