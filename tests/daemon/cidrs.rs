//! CIDRs of the VPC that come and go while the daemon runs (`spec/dataplane.md` 5): what leaves for them keeps the pod's address.

use crate::stage::{Stage, Subject, eventually};
use crate::support::tool;
use enibox::clock;
use enibox::sandbox::probe::{Flow, PORT, Proto};
use enibox::sandbox::world::{HOSTS, VPC_CIDRS};
use enibox::sim::conditions::Lie;
use ipnet::Ipv4Net;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// What somebody associates with the VPC: the peered network lies in it.
const MORE: &str = "198.18.0.0/15";
/// IMDS is asked every half minute, and after a failure once more a little later.
const PATIENCE: Duration = Duration::from_mins(3);

/// As whom the peered host sees a new connection of the pod's.
fn seen(stage: &Stage, pod: &Subject) -> [Result<IpAddr, String>; 2] {
    let peered = HOSTS.iter().find(|host| host.name == "peered").unwrap();
    let (near, far) = (pod.pod.place.handle().unwrap(), stage.world.namespace("peered").unwrap());
    let at = SocketAddr::from((peered.address, PORT));
    let flow = Flow { client: &near, source: None, target: at, server: &far, listen: at };
    [Proto::Udp, Proto::Tcp].map(|proto| {
        let source = flow.run(proto, Duration::from_secs(5)).map_err(|error| error.to_string());
        source.map(|source| source.ip())
    })
}

/// How long it took.
fn becomes(stage: &Stage, pod: &Subject, source: IpAddr, listed: bool, what: &str) {
    let begin = clock::instant();
    eventually(PATIENCE, what, || {
        let now = seen(stage, pod);
        if now == [Ok(source), Ok(source)] { Ok(()) } else { Err((now, stage.log())) }
    });
    println!("{what}: after {:?}", begin.elapsed());
    if let Some(table) = stage.node.place.net.run(|| tool("nft", &["list", "table", "ip", "aws-cni"])).unwrap() {
        assert_eq!(table.contains(MORE), listed, "{what}: {table}");
    }
}

/// Waits until the daemon has said so once more, and looks that nothing has changed by then.
fn stays(stage: &Stage, pod: &Subject, source: IpAddr, (word, listed): (&str, bool), what: &str) {
    let count = |stage: &Stage| stage.log().matches(word).count();
    let before = count(stage);
    eventually(PATIENCE, what, || if count(stage) > before { Ok(()) } else { Err(stage.log()) });
    becomes(stage, pod, source, listed, what);
}

#[test]
fn cidrs_of_the_vpc_are_followed_while_the_daemon_runs() {
    let stage = Stage::ready("t3.small", 84, &[]);
    let pod = stage.add("one");
    let (own, node) = (IpAddr::from(pod.address()), IpAddr::from(stage.world.nodes[0].address));
    let set = |cidrs: &[Ipv4Net]| stage.world.cloud.vpc().set_cidrs(cidrs.to_vec());
    let wider = [VPC_CIDRS[0], VPC_CIDRS[1], MORE.parse().unwrap()];
    becomes(&stage, &pod, node, false, "at first");
    // IMDS tells nothing of a change while it is away, and the old ones count.
    stage.world.cloud.lie(Lie::Down);
    set(&wider);
    stays(&stage, &pod, node, ("ask IMDS: ", false), "IMDS does not answer");
    stage.probe(&pod);
    stage.world.cloud.lie(Lie::None);
    becomes(&stage, &pod, own, true, "another CIDR");
    stage.probe(&pod);
    // Nor is it believed that there is none, or that they have gone because it does not answer.
    set(&[]);
    stays(&stage, &pod, own, ("vpc-ipv4-cidr-blocks: not there", true), "IMDS lists none");
    set(&wider);
    stage.world.cloud.lie(Lie::Down);
    set(&VPC_CIDRS);
    stays(&stage, &pod, own, ("ask IMDS: ", true), "IMDS does not answer again");
    stage.world.cloud.lie(Lie::None);
    becomes(&stage, &pod, node, false, "it is gone again");
    stage.probe(&pod);
    stage.delete(pod);
}
