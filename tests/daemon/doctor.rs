//! `enibox doctor` on a whole node: single faults, each found under its name and mended, and no false alarm.

mod faults;
mod modes;

use crate::settings::fetch;
use crate::stage::{PROGRAM, Stage, Subject, eventually};
use enibox::clock;
use enibox::rpc::http1::{Limits, Request, Response, Server};
use enibox::sandbox::topology::{EC2, IMDS, Node};
use faults::{FAULTS, Fault, Mended};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Of the daemon and the doctor.
const SETTINGS: &[(&str, &str)] = &[("AWS_EXTERNAL_SERVICE_CIDRS", "192.0.2.0/28")];

/// Where the daemon answers the doctor.
const INTROSPECTION: &str = "127.0.0.1:61679";

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
                       grep -e \"$2\" | head -n 1 | sed 's/.*# handle //'); }\n";
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

    /// Says it in place of a daemon that is gone.
    fn answer_with(&self, pages: BTreeMap<String, String>) -> Server {
        let listener = self.node.place.net.run(|| TcpListener::bind(INTROSPECTION)).unwrap().unwrap();
        let answer = move |request: &Request| match pages.get(&request.path) {
            Some(page) => Response::new(200, "application/json", page.as_str()).into(),
            None => Response::text(404, "").into(),
        };
        Server::start("stand-in", listener, Limits::default(), Arc::new(answer)).unwrap()
    }

    fn of(&self, name: &str) -> &str {
        &self.variables.iter().find(|(known, _)| *known == name).unwrap().1
    }

    /// Plants them one after the other; those that were not found or mended.
    fn trials(&self, faults: &[Fault]) -> Vec<&'static str> {
        let begin = clock::instant();
        let mut wrong = Vec::new();
        for fault in faults {
            let begin = clock::instant();
            let tried = trial(self, fault);
            println!("{:<40} {:?}", fault.case, begin.elapsed());
            if let Err(why) = tried {
                println!("\n==== {}: {why}", fault.case);
                wrong.push(fault.case);
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
        Root(root)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
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
    let wrong = ward.trials(FAULTS);
    drop(answers);
    ec2_and_imds(&stage, &ward);
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(FAULTS.len() >= 60);
}

/// What the daemon does not mend itself the doctor mends beside it.
fn beside_a_running_daemon(ward: &Ward) {
    ward.script("ip rule del pref 512 to $A1; ip -n $P2 neigh del 169.254.1.1 dev eth0").unwrap();
    let (code, after) = ward.doctor(None, &["--fix"]);
    assert_eq!((code, names(&after)), (0, Vec::new()), "{after:#}");
    assert!(!after["mended"].as_array().unwrap().is_empty(), "{after:#}");
    let (_, page) = ward.enibox(&["doctor", "--pod", "tests/p0", "--no-ec2"], &[], &[]);
    let address = ward.of("A1");
    for line in [format!("address   {address} of the primary ENI, table 254"), "neighbour 169.254.1.1".into()] {
        assert!(page.contains(&line), "{line}\n{page}");
    }
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

fn trial(ward: &Ward, fault: &Fault) -> Result<(), String> {
    ward.script(fault.plant)?;
    let (code, told) = ward.doctor(Some(fault), &["--wait", "0"]);
    let findings = told["findings"].as_array().unwrap();
    let found = findings.iter().find(|finding| finding["name"] == fault.finding);
    let mut verdict = Ok(());
    match found {
        None => verdict = Err(format!("not found as {}: {told}", fault.finding)),
        Some(found) => {
            let texts = ["seen", "breaks", "remedy"].map(|name| found[name].as_str().unwrap_or_default().len());
            // Worth knowing, and nothing wrong.
            let expected = if found["severity"] == "NOTE" { 0 } else { 3 };
            if code != expected || texts.contains(&0) || found["mendable"] == matches!(fault.mended, Mended::ByHand(_))
            {
                verdict = Err(format!("code {code}, {found:#}"));
            }
        }
    }
    if let Mended::ByHand(undo) = fault.mended {
        ward.script(undo)?;
    }
    let (_, after) = ward.doctor(Some(fault), &["--wait", "0", "--fix"]);
    if let Mended::Partly(rest) = fault.mended {
        ward.script(rest)?;
    }
    let left: Vec<String> = names(&after).into_iter().filter(|name| name != "daemon-silent").collect();
    if !left.is_empty() && verdict.is_ok() {
        verdict = Err(format!("still {left:?}: {after}"));
    }
    verdict
}
