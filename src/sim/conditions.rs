//! Under what conditions a node lives: how long things take, and what is broken at the moment.

use super::vpc::ImdsEni;
use crate::plan::backoff::Random;
use std::time::Duration;

/// How long things take. EC2's own delays are [`super::vpc::Knobs`].
#[derive(Clone, Copy, Debug)]
pub struct Latencies {
    /// A request of a plugin to the daemon, one way.
    pub rpc: Duration,
    /// The plugin's work on the host.
    pub plugin: Duration,
    /// A request to EC2 and its answer, besides EC2's own time.
    pub ec2: Duration,
    /// How long the client waits for an answer that never comes.
    pub ec2_timeout: Duration,
    /// A request to IMDS.
    pub imds: Duration,
    /// The host's network.
    pub kernel: Duration,
    /// A durable write.
    pub disk: Duration,
    /// A request to the API server, or its news.
    pub api: Duration,
    /// From the binding of a pod to the first ADD.
    pub sandbox: Duration,
    /// The kubelet's pause after a failed sandbox, before jitter of up to a half (its `backOffPeriod`).
    pub again: Duration,
    /// From EC2's answer to an attach to the link on the host.
    pub link: Duration,
    /// Random part that is added to each, in percent.
    pub jitter_percent: u64,
}

impl Default for Latencies {
    /// As on an ordinary node.
    fn default() -> Self {
        Latencies {
            rpc: Duration::from_micros(300),
            plugin: Duration::from_millis(4),
            ec2: Duration::from_millis(20),
            ec2_timeout: Duration::from_secs(10),
            imds: Duration::from_millis(3),
            kernel: Duration::from_millis(5),
            disk: Duration::from_millis(2),
            api: Duration::from_millis(20),
            sandbox: Duration::from_millis(300),
            again: Duration::from_secs(10),
            link: Duration::from_millis(200),
            jitter_percent: 20,
        }
    }
}

/// `base` and a random part of it, in nanoseconds.
pub fn jittered(base: Duration, percent: u64, dice: &mut Random) -> u64 {
    let base = u64::try_from(base.as_nanos()).unwrap_or(u64::MAX);
    base.saturating_add(dice.below(base.saturating_mul(percent) / 100 + 1))
}

/// What IMDS says besides the truth.
#[derive(Clone, Debug, Default)]
pub enum Lie {
    /// Nothing.
    #[default]
    None,
    /// It lists no ENI at all.
    Empty,
    /// It omits one ENI besides the primary one: the n-th, counted around.
    OmitEni(usize),
    /// It omits one address or prefix of every ENI.
    OmitAddresses,
    /// It goes on telling what it told at some time.
    Stale(Vec<ImdsEni>),
    /// It does not answer.
    Down,
}

impl Lie {
    /// Makes of the truth what IMDS tells. One that does not answer tells nothing; that is for the caller.
    pub fn tell(&self, truth: &mut Vec<ImdsEni>) {
        match self {
            Lie::None | Lie::Down => {}
            Lie::Empty => truth.clear(),
            Lie::OmitEni(n) => {
                if truth.len() > 1 {
                    truth.remove(1 + n % (truth.len() - 1));
                }
            }
            Lie::OmitAddresses => {
                for seen in truth {
                    if seen.eni.ipv4s.len() > 1 {
                        seen.eni.ipv4s.pop();
                    }
                    seen.eni.v4_prefixes.pop();
                }
            }
            Lie::Stale(old) => truth.clone_from(old),
        }
    }
}

/// What is broken.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each fault comes and goes by itself")]
pub struct Faults {
    /// EC2 cannot be reached.
    pub ec2_down: bool,
    /// IMDS lies.
    pub imds: Lie,
    /// Nothing can be written.
    pub disk_full: bool,
    /// The kernel refuses to set up the host.
    pub kernel: bool,
    /// The API server cannot be reached.
    pub api_down: bool,
}

/// What becomes of a write that was under way when the process died.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WriteFate {
    /// It never happened.
    #[default]
    Lost,
    /// It is there.
    Done,
    /// The file is torn: what only a host that loses power can do to a file that is renamed into place.
    Torn,
}
