//! `enibox doctor` on a whole node: single faults, each found under its name and mended, and no false alarm.

mod faults;
pub mod modes;

use crate::settings::fetch;
use crate::stage::{PROGRAM, Stage, Subject, eventually};
use enibox::clock;
use enibox::rpc::http1::{Limits, Request, Response, Server};
use enibox::sandbox::topology::{EC2, IMDS, Node};
use enibox::sandbox::world::World;
use faults::{FAULTS, Fault, Mended};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Of the daemon and the doctor.
const SETTINGS: &[(&str, &str)] = &[("AWS_EXTERNAL_SERVICE_CIDRS", "192.0.2.0/28")];

/// Where the daemon answers the doctor.
const INTROSPECTION: &str = "127.0.0.1:61679";
/// Where it shows its metrics.
const METRICS: &str = "127.0.0.1:61678";

/// A node that faults are planted on.
struct Ward {
    node: Arc<Node>,
    /// Settings of the daemon and the doctor.
    env: Vec<(String, String)>,
    root: Root,
    /// What scripts may name.
    variables: Vec<(&'static str, String)>,
    /// Further arguments of the doctor.
    args: &'static [&'static str],
}

impl Ward {
    fn new(node: Arc<Node>, env: &[(&str, &str)]) -> Ward {
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Ward { node, env, root: Root::new(), variables: Vec::new(), args: &[] }
    }

    /// The operator's command on the node, with the daemon's settings and these.
    fn enibox(&self, words: &[&str], env: &[(&str, &str)], args: &[&str]) -> (i32, String) {
        let mut command = self.node.command(PROGRAM).unwrap();
        command.args(words).args(args).env_clear().stdin(Stdio::null());
        command.env("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{IMDS}"));
        command.env("AWS_EC2_ENDPOINT", format!("http://{EC2}"));
        command.envs(self.env.iter().map(|(name, value)| (name, value))).envs(env.iter().copied());
        let output = command.output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(!text.is_empty(), "{words:?}: {told}");
        (output.status.code().unwrap(), text)
    }

    fn doctor(&self, fault: Option<&Fault>, args: &[&str]) -> (i32, Value) {
        let root = self.root.0.display().to_string();
        let words = ["doctor", "--json", "--root", &root];
        let (code, text) = self.enibox(&words, fault.map_or(&[], |fault| fault.env), &[self.args, args].concat());
        (code, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")))
    }

    /// Runs a shell script on the node.
    fn script(&self, text: &str) -> Result<String, String> {
        let mut command = self.node.command("sh").unwrap();
        // The tool itself, where the shell has a smaller one built in; and the rule of a chain that has this text, by its handle.
        let tool = ["/usr/sbin/ip", "/sbin/ip", "/usr/bin/ip"].into_iter().find(|path| Path::new(path).exists());
        let library = "ip() { $TOOL \"$@\"; }\n\
                       unrule() { nft delete rule ip aws-cni $1 handle $(nft -a list chain ip aws-cni $1 | \
                       grep -e \"$2\" | head -n 1 | sed 's/.*# handle //'); }\n\
                       unrule6() { nft delete rule ip6 aws-cni $1 handle $(nft -a list chain ip6 aws-cni $1 | \
                       grep -e \"$2\" | head -n 1 | sed 's/.*# handle //'); }\n\
                       far() { nsenter --net=$ROUTER $TOOL link set dev $(nsenter --net=$ROUTER $TOOL -o link | \
                       sed -n \"s/^$($TOOL -o link show $1 | sed 's/.*@if\\([0-9]*\\):.*/\\1/'): \\([^@:]*\\).*/\\1/p\") $2; }\n";
        command.args(["-ec", &format!("{library}{text}")]);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command.env("PROGRAM", PROGRAM).env("R", self.root.0.as_os_str()).env("TOOL", tool.unwrap_or("/bin/ip"));
        let output = command.stdin(Stdio::null()).output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        let wrong = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(told) } else { Err(format!("{text}: {told}{wrong}")) }
    }

    /// What a script prints.
    fn told(&self, text: &str) -> String {
        self.script(text).unwrap().trim().to_owned()
    }

    /// Waits until the daemon has told the doctor of all pods and nothing is wrong.
    fn is_healthy(&self, addresses: usize) {
        eventually(Duration::from_secs(40), "a healthy node has no findings", || {
            let (code, told) = self.doctor(None, &[]);
            if code == 0 && told["pods"] == addresses { Ok(()) } else { Err(told) }
        });
    }

    /// What the running daemon says to the doctor.
    fn pages(&self) -> BTreeMap<String, String> {
        let ask = |path: &str| {
            let answer = self.node.place.net.run(|| fetch(INTROSPECTION, path)).unwrap();
            (path.to_owned(), answer.split_once("\r\n\r\n").unwrap().1.to_owned())
        };
        ["/v1/enibox/intent", "/v1/enibox/status"].map(ask).into()
    }

    /// Says it in place of a daemon that is gone, with metrics of nothing.
    fn answer_with(&self, pages: BTreeMap<String, String>) -> [Server; 2] {
        let metrics = BTreeMap::from([("/metrics".to_owned(), String::new())]);
        [(INTROSPECTION, pages), (METRICS, metrics)].map(|(address, pages)| {
            let listener = self.node.place.net.run(|| TcpListener::bind(address)).unwrap().unwrap();
            let answer = move |request: &Request| match pages.get(&request.path) {
                Some(page) => Response::new(200, "application/json", page.as_str()).into(),
                None => Response::text(404, "").into(),
            };
            Server::start("stand-in", listener, Limits::default(), Arc::new(answer)).unwrap()
        })
    }

    fn of(&self, name: &str) -> &str {
        &self.variables.iter().find(|(known, _)| *known == name).unwrap().1
    }

    /// Plants them one after the other; those that were not found or mended, and why.
    fn trials(&self, faults: &[Fault]) -> Vec<String> {
        let begin = clock::instant();
        let mut wrong = Vec::new();
        for fault in faults {
            let begin = clock::instant();
            let tried = trial(self, fault);
            println!("{:<40} {:?}", fault.case, begin.elapsed());
            if let Err(why) = tried {
                println!("{}: {why}", fault.case);
                wrong.push(format!("{}: {why}", fault.case));
            }
        }
        println!("{} faults in {:?}", faults.len(), begin.elapsed());
        wrong
    }
}

/// Names of the findings that are more than a note.
fn names(document: &Value) -> Vec<String> {
    let findings = document["findings"].as_array().unwrap();
    let findings = findings.iter().filter(|finding| finding["severity"] != "NOTE");
    findings.map(|finding| finding["name"].as_str().unwrap().to_owned()).collect()
}

/// A directory with what a healthy host's files would be.
struct Root(PathBuf);

impl Root {
    fn new() -> Root {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("enibox-doctor-{}-{number}", std::process::id()));
        for directory in ["etc/cni/net.d", "run/aws-node"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::write(root.join("etc/cni/net.d/10-aws.conflist"), "{}").unwrap();
        // The machine that all this runs on may be held back itself.
        fs::create_dir_all(root.join("sys/fs/cgroup")).unwrap();
        fs::write(root.join("sys/fs/cgroup/cpu.stat"), "nr_periods 90000\nnr_throttled 30\n").unwrap();
        Root(root)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// The namespace at the other end of all ENIs, as a file for `nsenter`.
fn router(world: &World) -> String {
    let descriptor = world.topology().router().net.as_fd().as_raw_fd();
    format!("/proc/{}/fd/{descriptor}", std::process::id())
}

/// A node with a pod on its primary and one on a secondary ENI.
fn ordinary() -> (Stage, Vec<Subject>, Ward) {
    let stage = Stage::ready("t3.small", 91, SETTINGS);
    let pods: Vec<Subject> = (0..5).map(|n| stage.add(&format!("p{n}"))).collect();
    let mut ward = Ward::new(Arc::clone(&stage.node), SETTINGS);
    let tables = r"
        ip -4 -o rule | sed -n 's/^32765:.*from \([0-9.]*\) lookup \([0-9]*\).*/\1 \2/p' | head -n 1
        ip -4 -o rule | sed -n 's/^1536:.*from \([0-9.]*\) lookup .*/\1/p' | head -n 1
    ";
    let told = ward.told(tables);
    let words: Vec<&str> = told.split_whitespace().collect();
    let [own, table, second] = words[..] else { panic!("{told}") };
    let first = pods[0].address().to_string();
    assert_ne!(first, second);
    let pod_of = |address: &str| pods.iter().find(|pod| pod.address().to_string() == address).unwrap();
    let netns = |address: &str| {
        let path = &pod_of(address).pod.path;
        path.file_name().unwrap().to_string_lossy().into_owned()
    };
    let net = ward.told(&format!("ip -o -4 addr show to {own} | awk '{{print $4}}'"));
    let subnet = net.parse::<ipnet::IpNet>().unwrap().trunc().to_string();
    ward.variables = vec![
        ("OWN", own.to_owned()),
        ("T", table.to_owned()),
        ("A1", first.clone()),
        ("A2", second.to_owned()),
        ("P1", netns(&first)),
        ("P2", netns(second)),
        ("V1", ward.told(&format!("ip -o route show {first} | sed 's/.* dev \\([^ ]*\\).*/\\1/'"))),
        ("V2", ward.told(&format!("ip -o route show {second} | sed 's/.* dev \\([^ ]*\\).*/\\1/'"))),
        ("ENI", ward.told(&format!("ip -o -4 addr show to {own} | awk '{{print $2}}'"))),
        ("NET", net),
        ("SUBNET", subnet),
        ("ETH", ward.told("ip -o route show default | head -n 1 | sed 's/.* dev \\([^ ]*\\).*/\\1/'")),
        ("GW", ward.told(&format!("ip -o route show table {table} default | sed 's/.* via \\([^ ]*\\).*/\\1/'"))),
        ("ROUTER", router(&stage.world)),
    ];
    (stage, pods, ward)
}

#[test]
fn single_faults_are_found_and_mended() {
    let (stage, _pods, ward) = ordinary();
    eventually(Duration::from_secs(40), "a healthy node has no findings", || {
        let (code, told) = ward.doctor(None, &[]);
        // The third ENI comes because five pods leave less than one ENI's addresses.
        if (code, &told["pods"], &told["enis"]) == (0, &Value::from(5), &Value::from(2)) { Ok(()) } else { Err(told) }
    });
    the_daemon_mends(&ward);
    beside_a_running_daemon(&ward);
    let pages = ward.pages();
    stage.kill();
    let begin = clock::instant();
    let (code, told) = ward.doctor(None, &[]);
    assert_eq!((code, names(&told)), (3, vec!["daemon-silent".to_owned()]), "{told:#}");
    assert_eq!(told["pods"], 5);
    println!("one look takes {:?}", begin.elapsed());
    rules_are_shown_with_their_reasons(&ward);
    // The last word of the daemon counts: one that starts anew gives up a pod without a link after a while.
    let answers = ward.answer_with(pages);
    what_is_like_ours_stays(&ward);
    let wrong = ward.trials(FAULTS);
    rules_of_others_are_let_be(&ward);
    imds_is_silent(&ward, &["imds-silent"]);
    let [answers, metrics] = answers;
    drop(metrics);
    assert_eq!(names(&ward.doctor(None, &[]).1), ["metrics-port"]);
    drop(answers);
    imds_is_silent(&ward, &["imds-silent", "daemon-silent"]);
    ec2_and_imds(&stage, &ward);
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(FAULTS.len() >= 60);
}

/// What takes the place of a route of ours, or switches a link of ours off, is told by the kernel. A pod that has just come is known with the
/// next regular look.
fn the_daemon_mends(ward: &Ward) {
    let looks = [
        ("ip route replace blackhole $A1", "ip route show $A1", " dev "),
        ("ip route prepend blackhole $A2", "ip route show $A2 | head -n 1", " dev "),
        ("ip route replace unreachable default table $T", "ip route show default table $T", " via "),
        (
            "ip neigh replace $A1 lladdr 02:00:00:00:00:96 dev $V1 nud permanent",
            "echo \"[$(ip neigh show $A1 nud permanent)]\"",
            "[]",
        ),
        ("ip link set $V1 arp off", "echo \"[$(ip link show $V1 | grep NOARP)]\"", "[]"),
        ("ip link set $ENI arp off", "echo \"[$(ip link show $ENI | grep NOARP)]\"", "[]"),
        ("echo 1 > /proc/sys/net/ipv6/conf/$V1/accept_ra", "cat /proc/sys/net/ipv6/conf/$V1/accept_ra", "0"),
        ("echo 0 > /proc/sys/net/ipv4/conf/$V1/forwarding", "cat /proc/sys/net/ipv4/conf/$V1/forwarding", "1"),
        ("echo 0 > /proc/sys/net/ipv4/conf/$ENI/forwarding", "cat /proc/sys/net/ipv4/conf/$ENI/forwarding", "1"),
    ];
    for (plant, look, right) in looks {
        let begin = clock::instant();
        ward.script(plant).unwrap();
        eventually(Duration::from_secs(40), plant, || {
            let now = ward.script(look)?;
            if now.contains(right) { Ok(()) } else { Err(now) }
        });
        println!("put back after {:?}: {plant}", begin.elapsed());
    }
}

/// A rule of somebody else's that the kernel would delete in place of the stray one; and what a later plugin has set in the pod.
fn what_is_like_ours_stays(ward: &Ward) {
    let rules = ["10.99.0.8 ipproto tcp", "10.99.0.8"].map(|rule| format!("pref 512 to {rule} lookup main"));
    ward.script(&rules.each_ref().map(|rule| format!("ip rule add {rule}")).join("; ")).unwrap();
    ward.script("ip -n $P1 link set eth0 mtu 1400").unwrap();
    let look = "ip rule show pref 512 to 10.99.0.8; ip -n $P1 link show eth0 | grep -o 'mtu [0-9]*'";
    let before = ward.told(look);
    let (code, told) = ward.doctor(None, &["--fix", "--wait", "0"]);
    assert_eq!((code, names(&told)), (3, vec!["foreign-rule".to_owned(), "stray-rule".to_owned()]), "{told:#}");
    assert!(told["mended"].to_string().contains("which is not ours"), "{told:#}");
    assert_eq!(ward.told(look), before);
    ward.script(&format!("ip rule del {}", rules[0])).unwrap();
    let (code, told) = ward.doctor(None, &["--fix", "--wait", "0"]);
    assert_eq!((code, names(&told)), (0, Vec::new()), "{told:#}");
    assert_eq!(ward.told(look), "mtu 1400");
    ward.script("ip -n $P1 link set eth0 mtu 9001").unwrap();
}

/// What the daemon does not mend itself the doctor mends beside it.
fn beside_a_running_daemon(ward: &Ward) {
    ward.script("ip rule del pref 512 to $A1; ip -n $P2 neigh del 169.254.1.1 dev eth0").unwrap();
    let (code, after) = ward.doctor(None, &["--fix"]);
    assert_eq!((code, names(&after)), (0, Vec::new()), "{after:#}");
    assert!(!after["mended"].as_array().unwrap().is_empty(), "{after:#}");
    let (_, page) = ward.enibox(&["doctor", "--pod", "tests/p0", "--no-ec2"], &[], &[]);
    let (address, veth) = (ward.of("A1"), ward.of("V1"));
    for line in [
        format!("store     {address} for container "),
        format!("address   {address} of the primary ENI, table 254"),
        format!("veth      {veth} (index "),
        format!("rule      512: from all to {address} lookup main"),
        format!("route     {address} dev {veth} scope link"),
        "inside    /run/netns/".into(),
        format!("          address {address}/32 dev eth0"),
        "          route default via 169.254.1.1 dev eth0".into(),
        "          neighbour 169.254.1.1 ".into(),
        "sysctl    net/ipv4/ip_forward = 1".into(),
        "nft       chain snat-primary {".into(),
        "nothing is wrong".into(),
    ] {
        assert!(page.contains(&line), "{line}\n{page}");
    }
    let (_, told) = ward.doctor(None, &["--pod", "tests/p0", "--no-ec2"]);
    assert!(told["followed"].as_array().unwrap().len() > 20, "{told:#}");
    let (code, told) = ward.doctor(None, &["--pod", "tests/typo", "--wait", "0"]);
    assert_eq!((code, names(&told)), (3, vec!["pod-unknown".to_owned()]), "{told:#}");
}

#[test]
fn a_daemon_that_is_only_mute_is_well() {
    let env: Vec<_> = SETTINGS.iter().copied().chain([("DISABLE_INTROSPECTION", "true")]).collect();
    let stage = Stage::ready("t3.small", 92, &env);
    let pod = stage.add("p0");
    let ward = Ward::new(Arc::clone(&stage.node), &env);
    eventually(Duration::from_secs(40), "a healthy node has no findings", || {
        let (code, told) = ward.doctor(None, &[]);
        if (code, &told["pods"]) == (0, &Value::from(1)) { Ok(()) } else { Err(told) }
    });
    let (_, told) = ward.doctor(None, &[]);
    let notes: Vec<_> = told["findings"].as_array().unwrap().iter().map(|finding| &finding["name"]).collect();
    assert!(notes.contains(&&Value::from("introspection-off")), "{told:#}");
    let wrong = Fault { env: &[("AWS_VPC_K8S_CNI_CONNMARK", "-1")], ..FAULTS[0] };
    let (code, told) = ward.doctor(Some(&wrong), &[]);
    assert_eq!((code, names(&told)), (3, vec!["setting-ignored".to_owned()]), "{told:#}");
    stage.delete(pod);
    stage.kill();
    assert_eq!(names(&ward.doctor(None, &[]).1), ["daemon-silent"]);
}

/// What IMDS told before a pod got its address says nothing about the pod, whose deletion would be the advice.
fn imds_is_silent(ward: &Ward, expected: &[&str]) {
    let told_before = r#"
        mv /run/aws-node/imds.json /run/aws-node/imds.kept
        sed "s/\b$A1\b/10.20.99.99/g; s/\b$A2\b/10.20.99.98/g" /run/aws-node/imds.kept > /run/aws-node/imds.json
        grep -q local-ipv4s /run/aws-node/imds.json
        ! grep -w $A1 /run/aws-node/imds.json
        ip route add prohibit 169.254.169.254
    "#;
    ward.script(told_before).unwrap();
    let (code, told) = ward.doctor(None, &["--wait", "0"]);
    ward.script("ip route del prohibit 169.254.169.254; mv /run/aws-node/imds.kept /run/aws-node/imds.json").unwrap();
    let expected: Vec<_> = expected.iter().map(ToString::to_string).collect();
    assert_eq!((code, names(&told)), (3, expected), "{told:#}");
}

/// Rules that do not take what is ours: of marks that are not ours, of other networks and links, and to tables that lead nowhere.
fn rules_of_others_are_let_be(ward: &Ward) {
    let plant = "
        ip rule add pref 100 fwmark 0x4000/0x4000 lookup $T
        ip rule add pref 101 fwmark 0x200/0xf00 lookup $T
        ip rule add pref 102 fwmark 0x539 lookup $T
        ip rule add pref 600 from 192.168.7.0/24 to 10.20.0.0/16 lookup $T
        ip rule add pref 103 from 192.168.7.0/24 lookup $T
        ip rule add pref 104 to 192.168.0.0/16 lookup $T
        ip rule add pref 105 from 10.20.0.0/16 lookup 78
        ip rule add pref 106 iif docker0 lookup $T
        ip rule add pref 107 from 10.20.0.0/16 lookup 79
        ip rule add pref 108 from all lookup main suppress_prefixlength 0
        ip rule add pref 109 not fwmark 0x100000/0x100000 lookup 79
        ip rule add pref 40000 lookup $T
        ip rule add pref 110 not fwmark 0x100000/0x100000 lookup 80
        ip route add 192.168.0.0/16 dev $ETH table 79
        ip route add throw default table 79
        ip route add 10.20.208.0/20 dev $ETH table 80
        ip rule add pref 5270 lookup 52
        ip rule add pref 10 fwmark 0xa00/0xf00 lookup 2005
        ip route add 100.101.102.103 dev $ETH table 52
        ip route add throw 192.168.0.0/16 table 52
        ip route add default dev $ETH table 2005
        iptables-legacy -A FORWARD -j ACCEPT
        iptables-legacy -A FORWARD -j REJECT
        ip6tables-legacy -P FORWARD DROP
        ip6tables-legacy -A FORWARD -i eni+ -m comment --comment x -j ACCEPT
        ip6tables-legacy -A FORWARD -o eni+ -j ACCEPT
        nft 'add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; }'
        nft 'add rule ip filter FORWARD counter accept; add rule ip filter FORWARD counter drop'
        nft 'add table inet fw; add chain inet fw let; add chain inet fw f { type filter hook forward priority 5; policy drop; }'
        nft 'add rule inet fw f jump let; add rule inet fw f iifname \"eni*\" counter accept'
        nft 'add rule inet fw f oifname \"eni*\" accept; add rule inet fw f counter reject'
        echo '{\"type\": \"multus\", \"clusterNetwork\": \"/host/etc/cni/net.d/10-aws.conflist\"}' > $R/etc/cni/net.d/00-multus.conf
        echo '{\"plugins\": [{\"type\": \"aws-cni\"}, {\"type\": \"cilium-cni\"}]}' > $R/etc/cni/net.d/05-cilium.conflist
        mkdir -p $R/etc/containerd
        echo 'conf_dir = \"/etc/cni/net.d\" # note' > $R/etc/containerd/config.toml
    ";
    ward.script(plant).unwrap();
    let (code, told) = ward.doctor(None, &["--wait", "0"]);
    let undo = "
        for pref in 100 101 102 103 600 104 105 106 107 108 109 110 40000 5270 10; do ip rule del pref $pref; done
        ip route flush table 79
        ip route del throw default table 79 2> /dev/null || true
        for table in 80 52 2005; do ip route flush table $table; done
        ip route del throw 192.168.0.0/16 table 52 2> /dev/null || true
        rm -r $R/etc/cni/net.d/00-multus.conf $R/etc/cni/net.d/05-cilium.conflist $R/etc/containerd
    ";
    ward.script(&format!("{undo}{NO_FIREWALL}")).unwrap();
    assert_eq!((code, names(&told)), (0, Vec::new()), "{told:#}");
}

/// EC2 takes a pod's address, and IMDS does not tell yet.
fn ec2_and_imds(stage: &Stage, ward: &Ward) {
    let address = ward.of("A1");
    let mut vpc = stage.world.cloud.vpc();
    let primary = vpc.interfaces().find(|eni| eni.secondary_ipv4s.iter().any(|ip| ip.to_string() == address));
    let primary = primary.unwrap().id.clone();
    vpc.knobs.imds_lag = Duration::from_mins(10);
    vpc.meddle(clock::now(), &primary, |eni| eni.secondary_ipv4s.retain(|ip| ip.to_string() != address));
    drop(vpc);
    let (code, told) = ward.doctor(None, &[]);
    let all = told["findings"].to_string();
    assert!(code == 3 && names(&told).contains(&"address-lost".to_owned()) && all.contains("imds-stale"), "{told:#}");
    let (_, told) = ward.doctor(None, &["--no-ec2"]);
    assert_eq!(names(&told), ["daemon-silent"], "IMDS still has it: {told:#}");
}

fn rules_are_shown_with_their_reasons(ward: &Ward) {
    let of = |name: &str| ward.of(name);
    let (_, page) = ward.enibox(&["rules"], &[], &[]);
    for line in [
        format!("512: from all to {} lookup main  # pod tests/p0: way in", of("A1")),
        format!("1536: from {} lookup {}  # pod tests/", of("A2"), of("T")),
        format!("32765: from {} lookup {}  # own address of eni-", of("OWN"), of("T")),
        "1024: from all fwmark 0x80/0x80 lookup main  # ".into(),
        "1535: from all to 192.0.2.0/28 lookup main  # external service CIDR".into(),
        format!("default via {} dev {} table {}  # eni-", of("GW"), of("ENI"), of("T")),
        format!("{} dev {} scope link  # pod tests/p0", of("A1"), of("V1")),
        "net.ipv4.ip_forward = 1  # ".into(),
        "table ip aws-cni {".into(),
        "counter packets ".into(),
    ] {
        assert!(page.contains(&line), "{line}\n{page}");
    }
    assert!(!page.contains("# of others") && !page.contains("no pod that is known"), "{page}");
    ward.script("ip rule add pref 700 fwmark 0x80/0xff lookup 99").unwrap();
    let (_, page) = ward.enibox(&["rules", "--json"], &[], &[]);
    ward.script("ip rule del pref 700").unwrap();
    let document: Value = serde_json::from_str(&page).unwrap();
    assert_eq!(document["others"][0]["why"], "uses our mark", "{document:#}");
    assert!(document["iprule"].as_array().unwrap().len() > 10);
}

/// Takes away every firewall of the faults.
const NO_FIREWALL: &str = "
    for table in 'inet fw' 'ip filter' 'ip6 filter'; do nft delete table $table 2> /dev/null || true; done
    for tool in iptables-legacy ip6tables-legacy; do $tool -P FORWARD ACCEPT; $tool -F FORWARD; done
";

fn trial(ward: &Ward, fault: &Fault) -> Result<(), String> {
    ward.script(fault.plant)?;
    let (code, told) = ward.doctor(Some(fault), &["--wait", "0"]);
    let findings = told["findings"].as_array().unwrap();
    let found = findings.iter().find(|finding| finding["name"] == fault.finding);
    let mut verdict = Ok(());
    let advice = found.map_or("true", |found| found["remedy"].as_str().unwrap_or_default());
    match found {
        None => verdict = Err(format!("not found as {}: {told}", fault.finding)),
        Some(found) => {
            let texts = ["seen", "breaks", "remedy"].map(|name| found[name].as_str().unwrap_or_default().len());
            // Worth knowing, and nothing wrong.
            let expected = if found["severity"] == "NOTE" { 0 } else { 3 };
            let by_hand = matches!(fault.mended, Mended::ByHand(_) | Mended::AsTold(_) | Mended::Let);
            if code != expected || texts.contains(&0) || found["mendable"] == by_hand {
                verdict = Err(format!("code {code}, {found:#}"));
            }
        }
    }
    match fault.mended {
        Mended::ByHand(undo) => drop(ward.script(undo)?),
        Mended::AsTold(rest) => drop(ward.script(&format!("{advice}; {rest}"))?),
        Mended::Let => drop(ward.script(advice)?),
        _ => {}
    }
    let (_, after) = ward.doctor(Some(fault), &["--wait", "0", "--fix"]);
    match fault.mended {
        Mended::Partly(rest) => drop(ward.script(rest)?),
        Mended::Let => drop(ward.script(NO_FIREWALL)?),
        _ => {}
    }
    let left: Vec<String> = names(&after).into_iter().filter(|name| name != "daemon-silent").collect();
    if !left.is_empty() && verdict.is_ok() {
        verdict = Err(format!("still {left:?}: {after}"));
    }
    verdict
}
