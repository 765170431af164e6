use super::*;
use crate::model::ec2::{ConntrackTimeouts, Count};
use ipnet::IpNet;
use proptest::prelude::*;

const ZONE: &str = "eu-west-1a";

fn now(millis: u64) -> Now {
    let wall = Wall::from_unix_nanos(i64::try_from(millis).unwrap() * 1_000_000);
    Now { mono: Mono::from_nanos(millis * 1_000_000), wall }
}

struct Bed {
    vpc: Vpc,
    subnet: SubnetId,
    instance: InstanceId,
    time: u64,
}

fn bed(cidr: &str, kind: &str) -> Bed {
    let mut vpc = Vpc::new("eu-west-1", vec!["10.20.0.0/16".parse().unwrap()], 1);
    let subnet = vpc.add_subnet(ZONE, cidr.parse().unwrap(), Some("2001:db8:0:1::/64".parse().unwrap()), &[]);
    let instance = vpc.launch(now(0), kind, &subnet, &[]).unwrap();
    Bed { vpc, subnet, instance, time: 0 }
}

impl Bed {
    fn call(&mut self, call: &Call) -> Result<Reply, Failure> {
        self.time += 1;
        self.vpc.execute(now(self.time), call).result
    }

    fn code(&mut self, call: &Call) -> String {
        self.call(call).unwrap_err().code
    }

    fn create(&self, token: &str, count: Count) -> Call {
        Call::Create(Create {
            subnet: self.subnet.clone(),
            description: format!("aws-K8S-{}", self.instance),
            groups: Vec::new(),
            count,
            conntrack: ConntrackTimeouts::default(),
            tags: Map::from([("node.k8s.amazonaws.com/instance_id".into(), self.instance.to_string())]),
            client_token: token.into(),
        })
    }

    fn created(&mut self, token: &str, count: Count) -> Interface {
        match self.call(&self.create(token, count)).unwrap() {
            Reply::Created(interface) => *interface,
            other => panic!("{other:?}"),
        }
    }

    fn attach(&mut self, eni: &EniId, device: u32) -> Result<Reply, Failure> {
        self.call(&Call::Attach { eni: eni.clone(), instance: self.instance.clone(), device, card: 0 })
    }

    fn describe(&mut self) -> Vec<Interface> {
        match self.call(&Call::DescribeAttached(self.instance.clone())).unwrap() {
            Reply::Interfaces(list) => list,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_eni_lives_and_dies() {
    let mut bed = bed("10.20.1.0/24", "m5.large");
    let eni = bed.created("a", Count::Addresses(9));
    assert_eq!((eni.status.as_str(), eni.secondary_ipv4s.len()), ("available", 9));
    assert_eq!(bed.vpc.free(&bed.subnet), Some(251 - 1 - 10));
    let Reply::Attached(attachment) = bed.attach(&eni.id, 1).unwrap() else { panic!() };
    bed.call(&Call::DeleteOnTermination { eni: eni.id.clone(), attachment: attachment.clone() }).unwrap();
    let found = bed.describe().into_iter().find(|found| found.id == eni.id).unwrap();
    let at = found.attachment.unwrap();
    assert_eq!((at.id, at.device, at.delete_on_termination), (attachment.clone(), 1, true));
    assert_eq!(bed.code(&Call::Delete(eni.id.clone())), "InvalidParameterValue");
    bed.call(&Call::Detach(attachment.clone())).unwrap();
    assert_eq!(bed.code(&Call::Detach(attachment)), "InvalidAttachmentID.NotFound");
    bed.call(&Call::Delete(eni.id.clone())).unwrap();
    assert_eq!(bed.code(&Call::Delete(eni.id)), "InvalidNetworkInterfaceID.NotFound");
    assert_eq!(bed.vpc.free(&bed.subnet), Some(250));
    assert_eq!(bed.vpc.journal().counts()["DeleteNetworkInterface"], 3);
    assert_eq!(bed.vpc.journal().failures(), 3);
}

#[test]
fn a_client_token_creates_once() {
    let mut bed = bed("10.20.1.0/24", "m5.large");
    let first = bed.created("a", Count::Addresses(2));
    assert_eq!(bed.created("a", Count::Addresses(2)), first);
    assert_ne!(bed.created("b", Count::Addresses(2)).id, first.id);
    let other = bed.create("a", Count::Addresses(3));
    assert_eq!(bed.code(&other), "IdempotentParameterMismatch");
    bed.vpc.knobs.action("CreateNetworkInterface").next.push_back(Planned::AnswerLost);
    let lost = bed.call(&bed.create("c", Count::Addresses(1))).unwrap_err();
    assert_eq!((lost.status, lost.maybe_applied), (0, true));
    let before = bed.vpc.interfaces().count();
    bed.created("c", Count::Addresses(1));
    assert_eq!(bed.vpc.interfaces().count(), before, "the lost answer's ENI is found again");
}

#[test]
fn limits_are_those_of_the_type() {
    let mut bed = bed("10.20.1.0/24", "m5.large"); // 3 ENIs of 10 addresses
    let primary = bed.describe().remove(0).id;
    assert_eq!(
        bed.code(&Call::Assign { eni: primary.clone(), count: Count::Addresses(10) }),
        "PrivateIpAddressLimitExceeded"
    );
    bed.call(&Call::Assign { eni: primary.clone(), count: Count::Addresses(9) }).unwrap();
    assert_eq!(bed.code(&Call::Assign { eni: primary, count: Count::Prefixes(1) }), "PrivateIpAddressLimitExceeded");
    let enis = ["a", "b", "c"].map(|token| bed.created(token, Count::Addresses(1)).id);
    bed.attach(&enis[0], 1).unwrap();
    let taken = bed.attach(&enis[1], 1).unwrap_err();
    assert_eq!(taken.code, "InvalidParameterValue");
    assert!(taken.message.contains("already has an interface attached at device index"), "{taken}");
    assert_eq!(bed.attach(&enis[0], 2).unwrap_err().code, "InvalidNetworkInterface.InUse");
    bed.attach(&enis[1], 2).unwrap();
    assert_eq!(bed.attach(&enis[2], 3).unwrap_err().code, "AttachmentLimitExceeded");
    let crowded = bed.created("d", Count::Addresses(20));
    assert_eq!(bed.attach(&crowded.id, 3).unwrap_err().code, "AttachmentLimitExceeded");
}

#[test]
fn refusals_have_ec2s_codes() {
    let mut bed = bed("10.20.1.0/28", "m5.large");
    let primary = bed.describe().remove(0);
    let own = primary.primary_ipv4.unwrap();
    let attachment = primary.attachment.unwrap().id;
    let eni = || primary.id.clone();
    let nowhere = Call::Create(Create {
        subnet: "subnet-0".into(),
        ..match bed.create("x", Count::Addresses(0)) {
            Call::Create(create) => create,
            _ => unreachable!(),
        }
    });
    for (call, code) in [
        (nowhere, "InvalidSubnetID.NotFound"),
        (bed.create("y", Count::Addresses(10)), "InsufficientFreeAddressesInSubnet"),
        (bed.create("z", Count::Prefixes(1)), "InsufficientCidrBlocks"),
        (Call::Detach(attachment), "OperationNotPermitted"),
        (Call::Detach("eni-attach-0".into()), "InvalidAttachmentID.NotFound"),
        (Call::UnassignAddresses { eni: eni(), addresses: vec![own] }, "InvalidParameterValue"),
        (Call::UnassignAddresses { eni: eni(), addresses: vec![] }, "MissingParameter"),
        (Call::ModifyGroups { eni: eni(), groups: vec!["sg-0".into()] }, "InvalidGroup.NotFound"),
        (Call::CreateTags { eni: eni(), tags: [("aws:x".into(), String::new())].into() }, "InvalidParameterValue"),
        (Call::DescribeInstanceType("m5.tiny".into()), "InvalidInstanceType"),
        (Call::Assign { eni: "eni-0".into(), count: Count::Addresses(1) }, "InvalidNetworkInterfaceID.NotFound"),
    ] {
        assert_eq!(bed.code(&call), code, "{call:?}");
    }
    assert_eq!(bed.vpc.free(&bed.subnet), Some(10), "nothing leaked");
}

#[test]
fn imds_and_describe_lag_behind() {
    let mut bed = bed("10.20.1.0/24", "m5.large");
    bed.vpc.knobs.imds_lag = Duration::from_millis(100);
    bed.vpc.knobs.describe_lag = Duration::from_millis(50);
    let eni = bed.created("a", Count::Addresses(3)).id;
    bed.attach(&eni, 1).unwrap();
    let listed = |bed: &mut Bed, millis| bed.vpc.imds(now(millis), &bed.instance.clone()).unwrap().len();
    let done = bed.time;
    assert_eq!(bed.describe().len(), 1);
    assert_eq!(listed(&mut bed, done + 99), 1);
    assert_eq!(listed(&mut bed, done + 100), 2);
    bed.time = done + 100;
    assert_eq!(bed.describe().len(), 2);
    assert_eq!(bed.vpc.wires().len(), 2, "the wires are there at once");
}

#[test]
fn a_detach_takes_its_time() {
    let mut bed = bed("10.20.1.0/24", "m5.large");
    bed.vpc.knobs.detach_time = Duration::from_millis(100);
    let eni = bed.created("a", Count::Addresses(3)).id;
    let Reply::Attached(attachment) = bed.attach(&eni, 1).unwrap() else { panic!() };
    bed.call(&Call::Detach(attachment.clone())).unwrap();
    assert_eq!(bed.vpc.wires().len(), 1);
    assert_eq!(bed.code(&Call::Detach(attachment)), "IncorrectState");
    assert_eq!(bed.code(&Call::Delete(eni.clone())), "InvalidParameterValue");
    bed.time += 100;
    bed.call(&Call::Delete(eni)).unwrap();
}

#[test]
fn throttling_and_planned_failures() {
    let mut bed = bed("10.20.1.0/24", "m5.large");
    bed.vpc.knobs.action("DescribeSubnets").bucket = Some(Bucket::new(1, 1));
    let call = Call::DescribeSubnets { vpc: bed.vpc.id().clone(), zone: ZONE.into() };
    bed.call(&call).unwrap();
    let throttled = bed.call(&call).unwrap_err();
    assert!(throttled.throttled() && throttled.status == 503);
    bed.time += 1000;
    bed.vpc.knobs.refuse_next("DescribeSubnets", "UnauthorizedOperation", 403);
    assert_eq!(bed.code(&call), "UnauthorizedOperation");
    bed.time += 1000;
    bed.call(&call).unwrap();
}

#[test]
fn leaked_enis_are_found_by_tag() {
    let mut bed = bed("10.20.1.0/24", "m5.large");
    let key = "node.k8s.amazonaws.com/instance_id".to_owned();
    let leaked = bed.created("a", Count::Addresses(0)).id;
    let mut ask = |vpc: VpcId, value: Option<&str>| {
        let tags = vec![(key.clone(), value.map(str::to_owned))];
        match bed.call(&Call::DescribeLeaked { vpc, tags }).unwrap() {
            Reply::Interfaces(list) => list.into_iter().map(|found| found.id).collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        }
    };
    let vpc = VpcId::from("vpc-other");
    assert_eq!(ask(vpc, None), []);
    let vpc = Vpc::new("eu-west-1", vec![], 1).id().clone();
    assert_eq!(ask(vpc.clone(), None), [leaked]);
    assert_eq!(ask(vpc, Some("i-other")), []);
}

#[test]
fn a_run_can_be_repeated() {
    let run = || {
        let mut bed = bed("10.20.1.0/24", "m5.large");
        bed.created("a", Count::Addresses(5))
    };
    assert_eq!(run(), run());
}

#[derive(Clone, Debug)]
enum Step {
    Create(u32, bool),
    Attach(usize, u32),
    Assign(usize, u32, bool),
    Unassign(usize, usize),
    Detach(usize),
    Delete(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..6_u32, any::<bool>()).prop_map(|(count, prefixes)| Step::Create(count, prefixes)),
        (any::<usize>(), 0..5_u32).prop_map(|(eni, device)| Step::Attach(eni, device)),
        (any::<usize>(), 0..12_u32, any::<bool>())
            .prop_map(|(eni, count, prefixes)| Step::Assign(eni, count, prefixes)),
        (any::<usize>(), any::<usize>()).prop_map(|(eni, which)| Step::Unassign(eni, which)),
        any::<usize>().prop_map(Step::Detach),
        any::<usize>().prop_map(Step::Delete),
    ]
}

fn run_step(bed: &mut Bed, step: &Step, nth: usize) {
    let all = bed.vpc.interfaces().cloned().collect::<Vec<_>>();
    let pick = |index: usize| all[index % all.len()].clone();
    let count = |count, prefixes| if prefixes { Count::Prefixes(count) } else { Count::Addresses(count) };
    let call = match *step {
        Step::Create(number, prefixes) => bed.create(&format!("t{nth}"), count(number, prefixes)),
        Step::Attach(eni, device) => {
            let _ = bed.attach(&pick(eni).id, device);
            return;
        }
        Step::Assign(eni, number, prefixes) => Call::Assign { eni: pick(eni).id, count: count(number, prefixes) },
        Step::Unassign(eni, which) => {
            let eni = pick(eni);
            let cidrs = (eni.secondary_ipv4s.len(), eni.v4_prefixes.len());
            match cidrs {
                (0, 0) => return,
                (0, prefixes) => {
                    Call::UnassignPrefixes { prefixes: vec![eni.v4_prefixes[which % prefixes]], eni: eni.id }
                }
                (addresses, _) => {
                    Call::UnassignAddresses { addresses: vec![eni.secondary_ipv4s[which % addresses]], eni: eni.id }
                }
            }
        }
        Step::Detach(eni) => match pick(eni).attachment {
            Some(at) => Call::Detach(at.id),
            None => return,
        },
        Step::Delete(eni) => Call::Delete(pick(eni).id),
    };
    let _ = bed.call(&call);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn no_address_twice_and_limits_hold(steps in proptest::collection::vec(step(), 1..60)) {
        let mut bed = bed("10.20.1.0/25", "m5.large");
        for (nth, step) in steps.iter().enumerate() {
            run_step(&mut bed, step, nth);
            let mut seen = Set::new();
            for eni in bed.vpc.interfaces() {
                let singles = eni.primary_ipv4.iter().chain(&eni.secondary_ipv4s).map(|addr| u32::from(*addr));
                let blocks = eni.v4_prefixes.iter().flat_map(|net| (0..16).map(|n| u32::from(net.addr()) + n));
                for addr in singles.chain(blocks) {
                    prop_assert!(seen.insert(addr), "{} twice", Ipv4Addr::from(addr));
                }
                if eni.attachment.is_some() {
                    prop_assert!(1 + eni.secondary_ipv4s.len() + eni.v4_prefixes.len() <= 10);
                }
            }
            let free = bed.vpc.free(&bed.subnet).unwrap() as usize;
            prop_assert_eq!(free + seen.len(), 128 - RESERVED as usize);
            let devices = bed.vpc.wires().iter().map(|wire| wire.device).collect::<Vec<_>>();
            prop_assert!(devices.len() <= 3);
            prop_assert_eq!(devices.iter().collect::<Set<_>>().len(), devices.len());
            let assigned = |net: &IpNet| bed.vpc.assigned(net.addr());
            let told = bed.vpc.imds_truth(&bed.instance);
            for listed in told {
                prop_assert!(listed.eni.v4_prefixes.iter().all(assigned));
            }
        }
    }
}
