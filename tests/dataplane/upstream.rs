//! The rules of the original on a node (`spec/dataplane.md` 10.1, 10.2), for the topology of the matrix, as its versions have
//! left them.

use crate::support::{Netns, tool, tool_with_input};

/// What a version writes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Everything by `iptables-nft`.
    IptablesNft,
    /// Everything by `iptables-legacy`.
    IptablesLegacy,
    /// The same, as [`Version::Nested`].
    NestedLegacy,
    /// SNAT by `iptables-nft`, the connmark by nf_tables in a table of the name that is ours now.
    Connmark,
    /// One chain for each CIDR, each leading to the next one, by `iptables-nft`.
    Nested,
}

const SNAT: &str = "\
:AWS-SNAT-CHAIN-0 - [0:0]
-A POSTROUTING -m comment --comment \"AWS SNAT CHAIN\" -j AWS-SNAT-CHAIN-0
-A AWS-SNAT-CHAIN-0 -d 172.16.0.0/12 -m comment --comment \"AWS SNAT CHAIN EXCLUSION\" -j RETURN
-A AWS-SNAT-CHAIN-0 -d 100.64.0.0/16 -m comment --comment \"AWS SNAT CHAIN\" -j RETURN
-A AWS-SNAT-CHAIN-0 -d 10.20.0.0/16 -m comment --comment \"AWS SNAT CHAIN\" -j RETURN
-A AWS-SNAT-CHAIN-0 ! -o vlan+ -m comment --comment \"AWS, SNAT\" -m addrtype ! --dst-type LOCAL -j SNAT --to-source 10.20.11.162 --random-fully
";

const CONNMARK: &str = "\
:AWS-CONNMARK-CHAIN-0 - [0:0]
-A PREROUTING -i eni+ -m comment --comment \"AWS, outbound connections\" -j AWS-CONNMARK-CHAIN-0
-A PREROUTING -m comment --comment \"AWS, CONNMARK\" -j CONNMARK --restore-mark --mask 0x80
-A AWS-CONNMARK-CHAIN-0 -d 172.16.0.0/12 -m comment --comment \"AWS CONNMARK CHAIN\" -j RETURN
-A AWS-CONNMARK-CHAIN-0 -d 100.64.0.0/16 -m comment --comment \"AWS CONNMARK CHAIN\" -j RETURN
-A AWS-CONNMARK-CHAIN-0 -d 10.20.0.0/16 -m comment --comment \"AWS CONNMARK CHAIN\" -j RETURN
-A AWS-CONNMARK-CHAIN-0 -m comment --comment \"AWS, CONNMARK\" -j CONNMARK --set-xmark 0x80/0x80
";

const NESTED: &str = "\
:AWS-SNAT-CHAIN-0 - [0:0]
:AWS-SNAT-CHAIN-1 - [0:0]
:AWS-SNAT-CHAIN-2 - [0:0]
:AWS-CONNMARK-CHAIN-0 - [0:0]
:AWS-CONNMARK-CHAIN-1 - [0:0]
:AWS-CONNMARK-CHAIN-2 - [0:0]
-A POSTROUTING -m comment --comment \"AWS SNAT CHAIN\" -j AWS-SNAT-CHAIN-0
-A AWS-SNAT-CHAIN-0 ! -d 10.20.0.0/16 -m comment --comment \"AWS SNAT CHAIN\" -j AWS-SNAT-CHAIN-1
-A AWS-SNAT-CHAIN-1 ! -d 100.64.0.0/16 -m comment --comment \"AWS SNAT CHAIN\" -j AWS-SNAT-CHAIN-2
-A AWS-SNAT-CHAIN-2 ! -o vlan+ -m comment --comment \"AWS, SNAT\" -m addrtype ! --dst-type LOCAL -j SNAT --to-source 10.20.11.162 --random-fully
-A PREROUTING -i eni+ -m comment --comment \"AWS, outbound connections\" -m state --state NEW -j AWS-CONNMARK-CHAIN-0
-A PREROUTING -m comment --comment \"AWS, CONNMARK\" -j CONNMARK --restore-mark --mask 0x80
-A AWS-CONNMARK-CHAIN-0 ! -d 10.20.0.0/16 -m comment --comment \"AWS CONNMARK CHAIN\" -j AWS-CONNMARK-CHAIN-1
-A AWS-CONNMARK-CHAIN-1 ! -d 100.64.0.0/16 -m comment --comment \"AWS CONNMARK CHAIN\" -j AWS-CONNMARK-CHAIN-2
-A AWS-CONNMARK-CHAIN-2 -m comment --comment \"AWS, CONNMARK\" -j CONNMARK --set-xmark 0x80/0x80
";

const MANGLE: &str = "\
*mangle
-A PREROUTING -i eth0 -m comment --comment \"AWS, primary ENI\" -m addrtype --dst-type LOCAL --limit-iface-in -j CONNMARK --set-xmark 0x80/0x80
-A PREROUTING -i eni+ -m comment --comment \"AWS, primary ENI\" -j CONNMARK --restore-mark --mask 0x80
-A PREROUTING -i vlan+ -m comment --comment \"AWS, primary ENI\" -j CONNMARK --restore-mark --mask 0x80
COMMIT
";

const CONNMARK_TABLE: &str = "\
table ip aws-cni {
	chain snat-mark {
		counter ip daddr 10.20.0.0/16 return
		counter ip daddr 100.64.0.0/16 return
		counter ip daddr 172.16.0.0/12 return
		counter ct mark set ct mark | 0x80
	}
	chain nat-prerouting {
		type nat hook prerouting priority -90; policy accept;
		fib daddr type local return
		iifname \"eni*\" counter jump snat-mark
		counter meta mark set ct mark & 0x80
	}
}
";

/// Installs them after whatever is there.
pub fn install(version: Version, node: &Netns) {
    let (program, nat) = match version {
        Version::IptablesNft => ("iptables-nft-restore", [SNAT, CONNMARK].concat()),
        Version::IptablesLegacy => ("iptables-legacy-restore", [SNAT, CONNMARK].concat()),
        Version::Connmark => ("iptables-nft-restore", SNAT.to_owned()),
        Version::Nested => ("iptables-nft-restore", NESTED.to_owned()),
        Version::NestedLegacy => ("iptables-legacy-restore", NESTED.to_owned()),
    };
    node.run(|| tool_with_input(program, &["--noflush"], &format!("*nat\n{nat}COMMIT\n{MANGLE}")));
    if version == Version::Connmark {
        node.run(|| tool_with_input("nft", &["-f", "-"], CONNMARK_TABLE));
    }
}

/// All rules of a kind of iptables, without what counts.
pub fn saved(node: &Netns, program: &str) -> String {
    let text = node.run(|| tool(program, &[])).unwrap_or_default();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.split(" [").next().unwrap_or(line).to_owned() + "\n").collect()
}
