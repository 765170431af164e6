//! The secondary ENIs of a node, as EC2 has them, and giving them back.

use crate::aws::{creds, ec2, imds};
use crate::clock;
use crate::debug::variables;
use crate::error::{Context, Error, Result};
use crate::model::ec2::{Call, Interface, Reply};
use crate::model::imds::Identity;
use crate::model::settings::Settings;
use crate::plan::cleanup::enis::Spare;
use std::sync::Arc;
use std::time::Duration;

/// Between a detach and an attempt to delete, and between two of these: EC2 takes some seconds.
const PAUSE: Duration = Duration::from_secs(2);
/// How long EC2 may take to detach one.
const DETACH_MAX: Duration = Duration::from_mins(2);

/// EC2 as the daemon's settings and credentials have it.
pub(super) struct Ec2 {
    client: ec2::Client,
    /// Who we are.
    pub(super) identity: Identity,
}

impl Ec2 {
    pub(super) fn open(settings: &Settings) -> Result<Ec2> {
        let metadata = Arc::new(imds::Client::new(imds::Config::from_env(variables()))?);
        let identity = metadata.identity(settings.enable_ipv6)?;
        let chain = Arc::new(creds::Chain::from_env(|name| std::env::var(name).ok(), metadata)?);
        let client = ec2::Client::new(ec2::Config::from_env(variables(), &identity.region), chain)?;
        Ok(Ec2 { client, identity })
    }

    /// What is attached to this instance, and what was made for it and is detached.
    pub(super) fn list(&self) -> Result<Vec<Interface>> {
        let own = ("node.k8s.amazonaws.com/instance_id".to_owned(), Some(self.identity.instance.0.clone()));
        let calls = [
            Call::DescribeAttached(self.identity.instance.clone()),
            Call::DescribeLeaked { vpc: self.identity.vpc.clone(), tags: vec![own] },
        ];
        let mut found = Vec::new();
        for call in &calls {
            match self.client.execute(call).context("list the ENIs")? {
                Reply::Interfaces(interfaces) => found.extend(interfaces),
                other => return Err(Error::new(format!("list the ENIs: EC2 answered {other:?}"))),
            }
        }
        Ok(found)
    }

    /// Detaches and deletes it.
    pub(super) fn give_back(&self, spare: &Spare) -> Result<()> {
        if let Some(attachment) = &spare.attachment {
            match self.client.execute(&Call::Detach(attachment.clone())) {
                Err(failure) if !failure.not_found() => return Err(failure).context(spare.text.clone()),
                _ => std::thread::sleep(PAUSE),
            }
        }
        let begin = clock::instant();
        loop {
            match self.client.execute(&Call::Delete(spare.eni.clone())) {
                Ok(_) => return Ok(()),
                Err(failure) if failure.eni_not_found() => return Ok(()),
                Err(failure) if failure.in_use() && begin.elapsed() < DETACH_MAX => std::thread::sleep(PAUSE),
                Err(failure) => return Err(failure).context(spare.text.clone()),
            }
        }
    }
}
