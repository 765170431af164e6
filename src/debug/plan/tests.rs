//! Figures of the specification, and answers to questions that are asked wrongly.

use super::*;

fn asked(kind: &str, set: &[&str], pods: u32) -> Question {
    let set = set.iter().map(|word| (*word).to_owned()).collect();
    let args = Args { instance_type: kind.into(), pods: Some(pods), set, ..Args::default() };
    understand(&args).unwrap_or_else(|error| panic!("{kind} {pods}: {error}"))
}

const SMALL: &str = "t3.small";
const LARGE: &str = "p3dn.24xlarge";
const PD: &str = "ENABLE_PREFIX_DELEGATION=true";
const WP1: &str = "WARM_PREFIX_TARGET=1";

#[track_caller]
fn steady(kind: &str, set: &[&str], rows: &[(u32, u64, u64, u64)]) {
    for (pods, enis, cidrs, free) in rows {
        let question = asked(kind, set, *pods);
        let story = question.scene.run(&question.steps(), false, false).unwrap();
        let prefixes = question.mode == Mode::Ipv4Prefixes;
        for held in [Some(story.most().1), (*pods == 0).then_some(story.idle)].into_iter().flatten() {
            let found = (held.pods, held.enis, if prefixes { held.prefixes } else { held.addresses }, held.free);
            assert_eq!(found, (u64::from(*pods), *enis, *cidrs, *free), "{kind} {set:?} with {pods} pods");
            assert_eq!(held.addresses, held.pods + held.free);
        }
        assert!(story.stages.iter().all(|stage| stage.unserved == 0), "{kind} {set:?}: {:?}", story.stages);
    }
}

/// Pods, ENIs, addresses or prefixes, free addresses: `spec/operations.md` 9.2 and `spec/ipamd.md` 6.11.
#[test]
fn steady_states_of_single_addresses() {
    let all = [(0, 1, 3, 3), (1, 2, 6, 5), (3, 2, 6, 3), (4, 3, 9, 5), (5, 3, 9, 4), (9, 3, 9, 0)];
    steady(SMALL, &["WARM_ENI_TARGET=1"], &all);
    steady(SMALL, &["WARM_IP_TARGET=1", "MINIMUM_IP_TARGET=1"], &[(0, 1, 1, 1), (5, 2, 6, 1), (9, 3, 9, 0)]);
    steady(SMALL, &["WARM_IP_TARGET=2", "MINIMUM_IP_TARGET=5"], &[(0, 2, 5, 5), (5, 3, 7, 2), (9, 3, 9, 0)]);
    steady(LARGE, &["WARM_ENI_TARGET=1"], &[(0, 1, 49, 49), (3, 2, 98, 95), (95, 3, 147, 52)]);
    let all = [(0, 1, 10, 10), (7, 1, 12, 5), (15, 1, 20, 5), (45, 2, 50, 5)];
    steady(LARGE, &["WARM_IP_TARGET=5", "MINIMUM_IP_TARGET=10"], &all);
}

#[test]
fn steady_states_of_prefixes() {
    let all = [(0, 1, 1, 16), (5, 1, 2, 27), (16, 1, 2, 16), (17, 1, 3, 31), (58, 2, 5, 22)];
    steady(SMALL, &[PD, WP1], &all);
    let all = [(0, 1, 1, 16), (5, 1, 1, 11), (17, 1, 2, 15), (58, 2, 4, 6)];
    steady(SMALL, &[PD, "WARM_IP_TARGET=1", "MINIMUM_IP_TARGET=1"], &all);
    let all = [(0, 1, 2, 32), (5, 1, 2, 27), (17, 1, 2, 15), (58, 2, 5, 22)];
    steady(SMALL, &[PD, "WARM_IP_TARGET=7", "MINIMUM_IP_TARGET=20"], &all);
    steady(LARGE, &[PD, WP1], &[(0, 1, 1, 16), (3, 1, 2, 29), (95, 1, 7, 17)]);
    let all = [(0, 1, 1, 16), (7, 1, 1, 9), (15, 1, 2, 17), (45, 1, 4, 19)];
    steady(LARGE, &[PD, "WARM_IP_TARGET=5", "MINIMUM_IP_TARGET=10"], &all);
}

/// max-pods by mode: `spec/operations.md` 9.1, for every type and by the formula as it stands there.
#[test]
fn max_pods_by_mode() {
    let custom = "AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG=true";
    let (trunk, v6) = ("ENABLE_POD_ENI=true", "ENABLE_IPv6=true");
    let max_pods = |kind: &str, set: &[&str]| asked(kind, set, 0).scene.max_pods;
    for (kind, expected) in [
        (SMALL, [11, 110, 8, 98, 11, 110]), // no trunk on t3
        ("m5.large", [29, 110, 20, 110, 20, 110]),
        ("m5.8xlarge", [234, 250, 205, 250, 205, 250]),
        (LARGE, [737, 250, 688, 250, 688, 250]),
    ] {
        let found = [&[][..], &[PD, WP1], &[custom], &[custom, PD, WP1], &[trunk], &[v6, PD]];
        assert_eq!(found.map(|set| max_pods(kind, set)), expected, "{kind}");
    }
    let mut count = 0;
    for kind in limits::names() {
        let (limits, asked) = (limits::of(&kind).unwrap(), asked(&kind, &[], 0));
        assert_eq!(asked.scene.max_pods, limits.enis * (limits.ipv4_per_eni - 1) + 2, "{kind}");
        if limits.takes_prefixes() {
            let prefixes = limits.enis * (limits.ipv4_per_eni - 1) * 16 + 2;
            assert_eq!(max_pods(&kind, &[PD, WP1]), prefixes.min(limits.kubelet_pods), "{kind}");
        }
        count += 1;
    }
    assert_eq!(count, 1391);
}

#[test]
fn custom_networking_and_trunk_take_an_eni_each() {
    let custom = "AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG=true";
    for (set, pods, enis) in
        [(&[custom][..], 18, 3), (&["ENABLE_POD_ENI=true"], 18, 3), (&[custom, "ENABLE_POD_ENI=true"], 9, 3)]
    {
        let question = asked("m5.large", set, pods);
        let story = question.scene.run(&question.steps(), false, false).unwrap();
        let held = story.most().1;
        assert_eq!((held.pods, held.addresses, held.enis), (u64::from(pods), u64::from(pods), enis), "{set:?}");
    }
}

/// The members that programs read, and no recommendation without figures.
#[test]
fn json_has_its_members() {
    let question = asked(SMALL, &[], 5);
    let document: Value = serde_json::from_str(&report(&question, true).unwrap()).unwrap();
    assert_eq!(document["instance_type"], "t3.small");
    assert_eq!((&document["max_pods"], &document["enis_max"]), (&json!(11), &json!(3)));
    assert_eq!(document["mode"], "secondary-ip");
    assert_eq!(document["idle"], json!({"enis": 1, "addresses": 3, "prefixes": 0}));
    assert_eq!(document["at"], json!({"pods": 5, "enis": 3, "addresses": 9, "prefixes": 0, "free": 4}));
    assert_eq!(document["ec2_calls"]["CreateNetworkInterface"], json!(2), "{document}");
    assert!(document["ready_s"].as_f64().is_some_and(|s| s > 0.5 && s < 10.0), "{document}");
    assert!(document.get("curve").is_none());
    let mut slow = question.clone();
    slow.scene.delays = delays(&["create=1.0".into(), "attach=3.0".into(), "assign=5".into()]).unwrap();
    let slow = slow.answer().unwrap();
    assert!(slow.ready.is_some_and(|ready| ready > Duration::from_secs(5)), "{:?}", slow.ready);
}

#[test]
fn a_curve_is_followed_line_by_line() {
    let mut question = asked(SMALL, &[], 0);
    (question.asked, question.curve) = (curve("0 1\n# more\n\n600 5\n1200 0\n", "c").unwrap(), true);
    let document: Value = serde_json::from_str(&report(&question, true).unwrap()).unwrap();
    let at = |pods: u32, enis: u32, addresses: u32| json!({"pods": pods, "enis": enis, "addresses": addresses, "prefixes": 0, "free": addresses - pods});
    assert_eq!(document["curve"], json!([at(1, 2, 6), at(5, 3, 9), at(0, 1, 3)]));
    assert_eq!(document["at"], at(5, 3, 9));
}

#[test]
fn what_is_recommended_serves_all_pods() {
    // Nine addresses for twenty pods: only prefixes hold them.
    let mut short = asked(SMALL, &[], 0);
    short.asked = vec![(0, 20)];
    let story = short.answer().unwrap().story;
    let told = advice::warnings(&short, &story).join("\n");
    assert!(told.contains("20 pods are asked for, and the kubelet takes 9"), "{told}");
    let told = advice::advice(&short, &story).unwrap().join("\n");
    assert!(told.contains("ENABLE_PREFIX_DELEGATION=true") && told.contains("with 20 pods (now 9)"), "{told}");
    // On Xen there are none.
    let mut xen = asked("t2.small", &[], 0);
    xen.asked = vec![(0, 20)];
    let told = advice::advice(&xen, &xen.answer().unwrap().story).unwrap().join("\n");
    assert!(told.starts_with("none of the other settings"), "{told}");
}

#[test]
fn a_kubelet_that_takes_too_many_pods_is_told() {
    let args = Args { instance_type: SMALL.into(), pods: Some(12), max_pods: Some(50), ..Args::default() };
    let question = understand(&args).unwrap();
    let story = question.answer().unwrap().story;
    let told = advice::warnings(&question, &story).join("\n");
    assert!(told.contains("3 pods get no address: the instance type takes no more ENIs"), "{told}");
    assert_eq!(story.stages[0].held.pods, 9);
}

#[test]
fn a_small_subnet_runs_short() {
    let args = Args { subnet_size: Some("/28".into()), instance_type: "m5.large".into(), ..Args::default() };
    let question = understand(&Args { pods: Some(20), ..args }).unwrap();
    let story = question.answer().unwrap().story;
    let told = advice::warnings(&question, &story).join("\n");
    assert!(told.contains("pods get no address") && told.contains("a /28 has 11 addresses"), "{told}");
}

#[test]
fn wrong_questions() {
    #[track_caller]
    fn check(args: &Args, expected: &str) {
        let error = understand(args).map(|question| question.mode).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let args = || Args { instance_type: "m5.large".into(), ..Args::default() };
    check(
        &Args { instance_type: "m5.larg".into(), ..args() },
        "--instance-type \"m5.larg\": no such type is known; near it are m5.large",
    );
    check(&Args { pods: Some(1001), ..args() }, "--pods: from 0 to 1000");
    check(&Args { max_pods: Some(0), ..args() }, "--max-pods: from 1 to 1000");
    check(&Args { subnet_size: Some("8".into()), ..args() }, "--subnet-size 8: a prefix length from 16 to 28");
    check(&Args { set: words(&["WARM"]), ..args() }, "--set WARM: not VAR=VALUE");
    check(&Args { set: words(&["WARM=1"]), ..args() }, "--set WARM=1: there is no such setting");
    check(&Args { set: words(&["WARM_IP_TARGET=x"]), ..args() }, "WARM_IP_TARGET=\"x\"");
    check(&Args { set: words(&[PD]), ..args() }, "ENABLE_PREFIX_DELEGATION needs WARM_IP_TARGET");
    check(&Args { ec2_delays: words(&["build=1"]), ..args() }, "allowed are describe, subnets, create, attach");
    for wrong in ["attach=-1", "attach=1s", "attach=NaN", "attach=601", "attach="] {
        check(&Args { ec2_delays: words(&[wrong]), ..args() }, "seconds from 0 to 600");
    }
    check(&Args { curve: Some("/nonexistent".into()), ..args() }, "--curve /nonexistent: No such file");
    for (text, expected) in [
        ("0 1\n5\n", "line 2: \"5\": not \"SECONDS PODS\""),
        ("0 1 2\n", "line 1"),
        ("0 1\n\n0 2\n", "line 3: \"0 2\": seconds must grow"),
        ("x 1\n", "seconds must be a whole number from 0 to 86400"),
        ("86401 1\n", "seconds must be"),
        ("0 1001\n", "pods must be a whole number from 0 to 1000"),
        ("# nothing\n", "no line"),
    ] {
        let error = curve(text, "file").unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}
