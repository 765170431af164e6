//! The faults: how each is planted, as what it is found, and what mends it.
//!
//! Scripts may name `$ETH` (link of the primary ENI), `$ENI` (of the secondary one), `$OWN`, `$NET`, `$SUBNET`, `$GW` and
//! `$T` (its address, the same with its length, its subnet, gateway and table), of two pods `$A1`, `$P1`, `$V1` (primary ENI) and `$A2`,
//! `$P2`, `$V2` (secondary): address, namespace, host veth; and `$R`, the root of the host's files. `far LINK down` takes the carrier
//! from an ENI's link.

/// A fault.
#[derive(Clone, Copy)]
pub struct Fault {
    pub case: &'static str,
    pub plant: &'static str,
    pub finding: &'static str,
    pub mended: Mended,
    pub env: &'static [(&'static str, &'static str)],
}

/// What mends it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mended {
    /// `doctor --fix`.
    ByFix,
    /// `doctor --fix`, as far as it is ours; then this script puts back what is the system's own.
    Partly(&'static str),
    /// This script, which does what the doctor advises; it must not claim that it can.
    ByHand(&'static str),
    /// The very command that the doctor prints, and then this script, which takes away what does no harm alone.
    AsTold(&'static str),
    /// That command lets pods pass a firewall, which stays and is a fault no more; then it is taken away.
    Let,
}

const fn ours(case: &'static str, finding: &'static str, plant: &'static str) -> Fault {
    Fault { case, plant, finding, mended: Mended::ByFix, env: &[] }
}

const fn theirs(case: &'static str, finding: &'static str, plant: &'static str, undo: &'static str) -> Fault {
    Fault { case, plant, finding, mended: Mended::ByHand(undo), env: &[] }
}

const fn told(case: &'static str, finding: &'static str, plant: &'static str) -> Fault {
    Fault { case, plant, finding, mended: Mended::AsTold("true"), env: &[] }
}

/// A chain at the hook `forward` that goes on dropping all but pods' packets: the command lets them pass.
const fn firewall(case: &'static str, plant: &'static str) -> Fault {
    Fault { mended: Mended::Let, ..told(case, "forward-drop", plant) }
}

const fn under(fault: Fault, env: &'static [(&'static str, &'static str)]) -> Fault {
    Fault { env, ..fault }
}

#[rustfmt::skip]
pub const FAULTS: &[Fault] = &[
    // Rules of the node.
    ours("mark rule", "mark-rule", "ip rule del pref 1024"),
    ours("mark rule of another mark", "mark-rule", "ip rule add pref 1024 fwmark 0x100/0x100 lookup main"),
    ours("local rule left at 20", "local-rule", "ip rule add pref 20 lookup local; ip rule del pref 0"),
    ours("service rule", "service-rule", "ip rule del pref 1535"),
    ours("service rule of yesterday", "service-rule", "ip rule add pref 1535 to 192.0.2.32/28 lookup main"),
    ours("way to main", "main-rule", "ip rule del pref 32766"),
    ours("all rules flushed", "main-rule", "ip rule flush"),
    ours("all rules flushed, the mark's", "mark-rule", "ip rule flush"),
    // ENIs.
    ours("primary MTU", "primary-mtu", "ip link set $ETH mtu 1500"),
    ours("ENI MTU", "eni-mtu", "ip link set $ENI mtu 1500"),
    ours("ENI down", "eni-link", "ip link set $ENI down"),
    ours("ENI asks nobody", "eni-link", "ip link set $ENI arp off"),
    ours("ENI down, its routes", "eni-route", "ip link set $ENI down; ip link set $ENI up"),
    ours("ENI address", "eni-address", "ip addr del $NET dev $ENI"),
    ours("ENI address by DHCP", "eni-address", "ip addr add 203.0.113.77/24 dev $ENI"),
    ours("ENI default route", "eni-route", "ip route del default table $T"),
    ours("ENI gateway route", "eni-route", "ip route del $GW table $T"),
    ours("ENI default route over the primary", "eni-route", "ip route del default table $T; ip route add default dev $ETH table $T"),
    ours("ENI table flushed", "eni-route", "ip route flush table $T"),
    ours("ENI subnet in main", "eni-route", "ip route append $SUBNET dev $ENI proto kernel scope link src $OWN"),
    ours("ENI rule", "eni-rule", "ip rule del pref 32765 from $OWN"),
    ours("ENI rule of a lost ENI", "eni-rule", "ip rule add pref 32765 from 10.99.0.9 lookup 7"),
    ours("ENI rule of another table", "eni-rule", "ip rule add pref 32765 from $OWN lookup 7"),
    // Rules of pods.
    ours("way in, primary", "to-pod-rule", "ip rule del pref 512 to $A1"),
    ours("way in, secondary", "to-pod-rule", "ip rule del pref 512 to $A2"),
    ours("way out", "from-pod-rule", "ip rule del pref 1536 from $A2"),
    ours("second way out", "from-pod-rule", "ip rule add pref 1536 from $A2 lookup 7"),
    ours("way out of the primary's pod", "from-pod-rule", "ip rule add pref 1536 from $A1 lookup $T"),
    ours("way out of an earlier owner, primary", "from-pod-rule", "ip rule add pref 32764 from $A1 lookup $T"),
    ours("way out of an earlier owner, secondary", "from-pod-rule", "ip route replace default dev $ENI table 10002; ip rule add pref 10001 from $A2 lookup 10002"),
    ours("way in to nobody", "stray-rule", "ip rule add pref 512 to 10.99.0.8 lookup main"),
    ours("way out of nobody", "stray-rule", "ip rule add pref 1536 from 10.99.0.8 lookup $T"),
    // nf_tables.
    ours("table", "ruleset", "nft delete table ip aws-cni"),
    ours("all tables flushed", "ruleset", "nft flush ruleset"),
    ours("table of the other family", "ruleset", "nft add table ip6 aws-cni; nft add chain ip6 aws-cni x"),
    ours("chain snat-mark empty", "ruleset", "nft flush chain ip aws-cni snat-mark"),
    ours("chain mangle-prerouting empty", "ruleset", "nft flush chain ip aws-cni mangle-prerouting"),
    ours("chain nat-prerouting empty", "ruleset", "nft flush chain ip aws-cni nat-prerouting"),
    ours("chain snat-primary empty", "ruleset", "nft flush chain ip aws-cni snat-primary"),
    ours("chain nat-postrouting empty", "ruleset", "nft flush chain ip aws-cni nat-postrouting"),
    ours("chain mangle-prerouting gone", "ruleset", "nft flush chain ip aws-cni mangle-prerouting; nft delete chain ip aws-cni mangle-prerouting"),
    ours("chain of another priority", "ruleset", "nft flush chain ip aws-cni nat-postrouting; nft delete chain ip aws-cni nat-postrouting; \
        nft add chain ip aws-cni nat-postrouting '{ type nat hook postrouting priority 90; }'; \
        nft add rule ip aws-cni nat-postrouting oifname != 'vlan*' jump snat-primary"),
    ours("chain of a stranger", "ruleset", "nft add chain ip aws-cni stranger"),
    ours("VPC CIDR not spared the mark", "ruleset", "unrule snat-mark 'VPC CIDR'"),
    ours("VPC CIDR not spared SNAT", "ruleset", "unrule snat-primary 'VPC CIDR'"),
    ours("mark set", "ruleset", "unrule snat-mark 'ct mark set'"),
    ours("SNAT rule", "ruleset", "unrule snat-primary 'snat to'"),
    ours("SNAT to another address", "ruleset", "unrule snat-primary 'snat to'; nft add rule ip aws-cni snat-primary fib daddr type != local counter snat to 10.99.0.1 fully-random"),
    ours("restore rule", "ruleset", "unrule nat-prerouting 'meta mark set'"),
    ours("NodePort mark", "ruleset", "unrule mangle-prerouting 'primary ENI'"),
    ours("jump of postrouting", "ruleset", "unrule nat-postrouting 'jump'"),
    ours("rule of a stranger before ours", "ruleset", "nft insert rule ip aws-cni nat-prerouting counter accept"),
    ours("rule of a stranger after ours", "ruleset", "nft add rule ip aws-cni snat-primary ip daddr 192.0.2.0/24 return"),
    // The name alone counts; not every kernel has links of the right kind.
    ours("no chains for IPVS", "ruleset", "ip link add kube-ipvs0 type veth peer name ipvs-peer"),
    // A pod's host side.
    ours("host route, primary", "pod-route", "ip route del $A1"),
    ours("host route, secondary", "pod-route", "ip route del $A2"),
    ours("host veth down", "pod-link", "ip link set $V1 down"),
    ours("host veth asks nobody", "pod-link", "ip link set $V1 arp off"),
    ours("host veth MTU", "pod-mtu", "ip link set $V2 mtu 1400"),
    ours("host veth MAC", "pod-mac", "ip link set $V1 address 02:00:00:00:00:99"),
    ours("host veth renamed", "veth-name", "ip link set $V1 down; ip link set $V1 name odd0; ip link set odd0 up; ip route replace $A1 dev odd0"),
    ours("host veth renamed, its route lost", "veth-name", "ip link set $V2 down; ip link set $V2 name odd0; ip link set odd0 up"),
    ours("host veth MAC, of the original's", "inside-neighbour", "ip link set $V1 alias ''; ip link set $V1 address 02:00:00:00:00:95"),
    ours("host veth MTU, of the original's", "pod-mtu", "ip link set $V2 alias ''; ip link set $V2 mtu 1400"),
    // A pod's own side.
    ours("pod link down", "inside-link", "ip -n $P1 link set eth0 down"),
    ours("pod answers nobody", "inside-link", "ip -n $P2 link set eth0 arp off"),
    ours("pod address", "inside-address", "ip -n $P1 addr flush dev eth0"),
    ours("pod address of another", "inside-address", "ip -n $P2 addr flush dev eth0; ip -n $P2 addr add 10.99.0.3/32 dev eth0"),
    ours("pod default route", "inside-route", "ip -n $P1 route del default"),
    ours("pod gateway route", "inside-route", "ip -n $P2 route flush dev eth0"),
    ours("pod MTU", "inside-mtu", "ip -n $P1 link set eth0 mtu 9100"),
    ours("pod neighbour", "inside-neighbour", "ip -n $P1 neigh del 169.254.1.1 dev eth0"),
    ours("pod neighbour's MAC", "inside-neighbour", "ip -n $P2 neigh replace 169.254.1.1 lladdr 02:00:00:00:00:98 dev eth0 nud permanent"),
    ours("pod neighbour not permanent", "inside-neighbour", "ip -n $P1 neigh replace 169.254.1.1 lladdr 02:00:00:00:00:98 dev eth0 nud reachable"),
    // Other software in the kernel.
    theirs("rule of nm-cloud-setup", "nm-cloud-setup", "ip rule add pref 30350 from $OWN lookup 30400", "ip rule del pref 30350"),
    theirs("table of nm-cloud-setup", "nm-cloud-setup", "ip route add 203.0.113.0/24 dev $ETH table 30200", "ip route flush table 30200"),
    theirs("rule of ec2-net-utils", "ec2-net-utils", "ip rule add pref 10001 from $OWN lookup 10001", "ip rule del pref 10001"),
    told("rule for everything", "foreign-rule", "ip rule add pref 100 lookup main"),
    told("our mark to another table", "foreign-rule", "ip rule add pref 1024 fwmark 0x80/0x80 lookup $T"),
    told("rule among the ways in", "foreign-rule", "ip rule add pref 512 from 10.99.0.1 lookup main"),
    theirs("rule among the ways out", "foreign-rule", "ip rule add pref 1536 from $A2 tos 0x10 lookup main", "ip rule del pref 1536 from $A2 tos 0x10"),
    told("FORWARD drops, iptables-nft", "forward-drop", "nft add table ip filter; nft add chain ip filter FORWARD '{ type filter hook forward priority 0; policy drop; }'"),
    told("FORWARD drops, nft", "forward-drop", "nft add table inet fw; nft add chain inet fw forwarded '{ type filter hook forward priority 5; policy drop; }'"),
    firewall("FORWARD ends with a drop", "nft add table inet fw; nft add chain inet fw forwarded '{ type filter hook forward priority 5; }'; \
        nft add rule inet fw forwarded ip daddr 192.0.2.1 counter drop; nft add rule inet fw forwarded counter drop"),
    firewall("FORWARD ends with a reject, iptables-nft", "iptables-nft -A FORWARD -m comment --comment x -j REJECT --reject-with icmp-host-prohibited"),
    firewall("FORWARD drops what other chains let through", "nft add table inet fw; nft add chain inet fw allowed; \
        nft add chain inet fw forwarded '{ type filter hook forward priority 5; policy drop; }'; nft add rule inet fw forwarded jump allowed"),
    firewall("FORWARD lets answers through, and what comes from pods", "iptables-nft -P FORWARD DROP; iptables-nft -A FORWARD -i eni+ -j ACCEPT; \
        iptables-nft -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"),
    told("FORWARD drops, iptables-legacy", "forward-drop", "iptables-legacy -P FORWARD DROP"),
    told("FORWARD drops, ip6tables-legacy", "forward-drop", "ip6tables-legacy -P FORWARD DROP"),
    firewall("FORWARD ends with a reject, iptables-legacy", "iptables-legacy -A FORWARD -d 192.0.2.1 -j ACCEPT; iptables-legacy -A FORWARD -j REJECT"),
    firewall("FORWARD ends with a drop, iptables-legacy", "iptables-legacy -A FORWARD -j LOG; iptables-legacy -A FORWARD -m comment --comment x -j DROP"),
    firewall("FORWARD ends with a reject, ip6tables-legacy", "ip6tables-legacy -A FORWARD -m comment --comment x -j REJECT"),
    firewall("FORWARD drops what it does not let through, iptables-legacy", "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -s 192.0.2.1 -j ACCEPT"),
    theirs("default route of the node", "default-route", "ip route show default > $R/default; ip route del default", "ip route add $(cat $R/default)"),
    told("pod's address on the primary", "pod-address-taken", "ip addr add $A1/32 dev $ETH"),
    theirs("veth in a bridge", "pod-enslaved", "ip link add br0 type bridge; ip link set $V1 master br0", "ip link set $V1 nomaster; ip link del br0"),
    Fault { mended: Mended::AsTold("ip link del br0"), ..told("ENI in a bridge", "eni-unplugged", "ip link add br0 type bridge; ip link set $ENI master br0") },
    ours("ENI does not forward", "link-forwarding", "echo 0 > /proc/sys/net/ipv4/conf/$ENI/forwarding"),
    ours("host veth does not forward", "link-forwarding", "echo 0 > /proc/sys/net/ipv4/conf/$V1/forwarding"),
    theirs("ENI without carrier", "no-carrier", "far $ENI down", "far $ENI up"),
    told("primary does not forward", "link-forwarding", "echo 0 > /proc/sys/net/ipv4/conf/$ETH/forwarding"),
    // Routes that others have put in the place of ours, before them or beside them.
    ours("hole in place of the pod's route", "pod-route", "ip route replace blackhole $A1"),
    ours("hole before the pod's route", "pod-route", "ip route prepend blackhole $A2"),
    ours("pod's route by a gateway of IPv6", "pod-route", "ip -4 route replace $A1 via inet6 fe80::99 dev $V1"),
    ours("ENI's default route by a gateway of IPv6", "eni-route", "ip -4 route replace default via inet6 fe80::99 dev $ENI table $T"),
    ours("hole in place of the ENI's default route", "eni-route", "ip route replace blackhole default table $T"),
    ours("hole before the ENI's default route", "eni-route", "ip route prepend unreachable default table $T"),
    ours("hole in place of the ENI's gateway", "eni-route", "ip route replace prohibit $GW table $T"),
    told("pod's route behind another", "foreign-route", "ip route prepend $A2 dev $ETH"),
    told("part of the ENI's traffic thrown out", "foreign-route", "ip route add throw 192.0.2.0/24 table $T"),
    told("part of the ENI's traffic forbidden", "foreign-route", "ip route add prohibit 192.0.2.0/24 table $T"),
    told("part of the ENI's traffic by the primary", "foreign-route", "ip route add 192.0.2.0/24 dev $ETH table $T"),
    told("part of the VPC into a hole", "foreign-route", "ip route add blackhole 10.20.200.0/24"),
    told("more than the VPC into a hole", "foreign-route", "ip route add unreachable 10.0.0.0/8 metric 7"),
    Fault { mended: Mended::AsTold("ip link del br0"), ..told("part of the VPC into a bridge", "foreign-route",
        "ip link add br0 type bridge; ip link set br0 up; ip route add 10.20.200.0/24 dev br0") },
    Fault { mended: Mended::AsTold("ip route del default; ip route add $(cat $R/default)"), ..told("default of DHCP by another ENI", "foreign-route",
        "ip route show default > $R/default; ip route del default; ip route add $(cat $R/default) metric 512; ip route add default via $GW dev $ENI metric 100 onlink") },
    told("default by another ENI, before the primary's", "foreign-route", "ip route prepend default via $GW dev $ENI onlink"),
    theirs("default by another ENI alone", "default-route", "ip route show default > $R/default; ip route del default; ip route add default via $GW dev $ENI onlink",
        "ip route del default; ip route add $(cat $R/default)"),
    told("part of the VPC by another ENI", "foreign-route", "ip route add 10.20.208.0/20 dev $ENI"),
    told("an address of the VPC by another ENI", "foreign-route", "ip route add 10.20.0.2 via $GW dev $ENI metric 100 onlink"),
    // Neighbours that are asked no more.
    ours("neighbour on the host veth", "host-neighbour", "ip neigh replace $A1 lladdr 02:00:00:00:00:96 dev $V1 nud permanent"),
    ours("router heard on the host veth", "link-sysctl", "echo 1 > /proc/sys/net/ipv6/conf/$V1/accept_ra"),
    ours("redirects heard on the host veth", "link-sysctl", "echo 1 > /proc/sys/net/ipv6/conf/$V2/accept_redirects"),
    ours("neighbour on the host veth, no ARP", "host-neighbour", "ip neigh replace $A2 lladdr 02:00:00:00:00:96 dev $V2 nud noarp"),
    told("gateway of the ENI", "gateway-neighbour", "ip neigh replace $GW lladdr 02:00:00:00:00:96 dev $ENI nud permanent"),
    told("gateway of the primary ENI", "gateway-neighbour",
        "ip neigh replace $(ip -o route show default | sed 's/.* via \\([^ ]*\\).*/\\1/') lladdr 02:00:00:00:00:96 dev $ETH nud noarp"),
    theirs("MACs not told, new pods", "arp-ignore", "mkdir -p $R/proc/sys/net/ipv4/conf/all; echo 2 > $R/proc/sys/net/ipv4/conf/all/arp_ignore", "rm -r $R/proc"),
    told("rule against a pod", "foreign-rule", "ip rule add pref 500 from $A2 prohibit"),
    told("rule that diverts a pod", "foreign-rule", "ip rule add pref 600 to $A1 lookup 77"),
    told("rule for a network with pods", "foreign-rule", "ip rule add pref 200 from 10.20.0.0/16 lookup $T"),
    told("rule for a network with pods among the ways out", "foreign-rule", "ip rule add pref 1536 from 10.20.0.0/16 lookup $T"),
    told("rule for the VPC", "foreign-rule", "ip rule add pref 300 to 10.20.0.0/16 lookup $T"),
    told("rule for a pod's link", "foreign-rule", "ip rule add pref 200 iif $V1 lookup $T"),
    told("rule for our mark", "foreign-rule", "ip rule add pref 1000 fwmark 0x80/0x80 lookup $T"),
    told("rule for what is not marked", "foreign-rule", "ip rule add pref 1000 fwmark 0/0x80 lookup $T"),
    Fault { mended: Mended::AsTold("ip route flush table 51820"), ..told("rule for all but a tunnel's packets", "foreign-rule",
        "ip route add default dev $ETH table 51820; ip rule add pref 32700 not fwmark 0xca6c lookup 51820") },
    ours("chains of the original", "former-rules", "nft add table ip nat; nft add chain ip nat AWS-SNAT-CHAIN-0"),
    theirs("ufw", "firewall", "nft add table ip filter; nft add chain ip filter ufw-user-forward", "nft delete table ip filter"),
    ours("forwarding off", "ip-forward", "echo 0 > /proc/sys/net/ipv4/ip_forward"),
    theirs("strict reverse path", "rp-filter", "echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter; echo 0 > /proc/sys/net/ipv4/conf/$ETH/rp_filter",
        "echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter; echo 2 > /proc/sys/net/ipv4/conf/$ETH/rp_filter"),
    ours("reverse path of the primary", "sysctl", "echo 1 > /proc/sys/net/ipv4/conf/$ETH/rp_filter"),
    // Files of the host.
    theirs("conflist of another CNI", "conflist-order", "echo {} > $R/etc/cni/net.d/05-other.conflist", "rm $R/etc/cni/net.d/05-other.conflist"),
    theirs("no conflist", "conflist-missing", "rm $R/etc/cni/net.d/10-aws.conflist", "echo {} > $R/etc/cni/net.d/10-aws.conflist"),
    theirs("only another conflist", "conflist-missing", "mv $R/etc/cni/net.d/10-aws.conflist $R/etc/cni/net.d/20-other.conf", "mv $R/etc/cni/net.d/20-other.conf $R/etc/cni/net.d/10-aws.conflist"),
    theirs("networkd takes rules", "networkd-rules", "mkdir -p $R/run/systemd/netif $R/etc/systemd; printf '[Network]\\nManageForeignRoutes=no\\n' > $R/etc/systemd/networkd.conf", "rm -r $R/run/systemd"),
    theirs("networkd takes routes", "networkd-routes", "mkdir -p $R/run/systemd/netif $R/usr/lib/systemd/networkd.conf.d; printf 'ManageForeignRoutingPolicyRules = false\\n' > $R/usr/lib/systemd/networkd.conf.d/80-x.conf; rm -f $R/etc/systemd/networkd.conf", "rm -r $R/run/systemd"),
    theirs("NetworkManager", "networkmanager", "mkdir -p $R/run/NetworkManager", "rm -r $R/run/NetworkManager"),
    theirs("NetworkManager leaves alone veths only", "networkmanager", "mkdir -p $R/run/NetworkManager/conf.d; printf '[keyfile]\nunmanaged-devices=interface-name:eni*\n' > $R/run/NetworkManager/conf.d/a.conf",
        "printf '[keyfile]\nunmanaged-devices=interface-name:eni*;interface-name:vlan*;type:ethernet;except:interface-name:'$ETH'\n' > $R/run/NetworkManager/conf.d/a.conf"),
    theirs("NetworkManager takes ENIs", "networkmanager", "printf '[keyfile]\nunmanaged-devices=interface-name:eni*;interface-name:vlan*\n' > $R/run/NetworkManager/conf.d/a.conf", "rm -r $R/run/NetworkManager"),
    theirs("firewalld", "firewall", "echo 1 > $R/run/firewalld.pid", "rm $R/run/firewalld.pid"),
    theirs("udev rule of ec2-net-utils", "ec2-net-utils", "mkdir -p $R/usr/lib/udev/rules.d; echo > $R/usr/lib/udev/rules.d/99-vpc-policy-routes.rules", "rm -r $R/usr/lib/udev"),
    theirs("udev rule of ec2-net-utils, Amazon Linux 2", "ec2-net-utils", "mkdir -p $R/etc/udev/rules.d; echo > $R/etc/udev/rules.d/53-ec2-network-interfaces.rules", "rm -r $R/etc/udev"),
    theirs("cloud-init waits for links", "cloud-init", "mkdir -p $R/etc/udev/rules.d; echo > $R/etc/udev/rules.d/90-cloud-init-hook-hotplug.rules", "rm -r $R/etc/udev"),
    theirs("nm-cloud-setup is enabled", "nm-cloud-timer", "mkdir -p $R/etc/systemd/system/timers.target.wants; echo > $R/etc/systemd/system/timers.target.wants/nm-cloud-setup.timer", "rm -r $R/etc/systemd/system"),
    theirs("kube-proxy in both iptables", "kube-proxy-twice", "iptables-legacy -t nat -N KUBE-SERVICES; iptables-nft -t nat -N KUBE-SERVICES", "iptables-legacy -t nat -X KUBE-SERVICES; nft delete table ip nat"),
    theirs("containerd reads other configurations", "runtime-folders", "mkdir -p $R/etc/containerd; printf '[cni]\n  bin_dir = \"/opt/cni/bin\"\n  conf_dir = \"/etc/cni/other.d\"\n' > $R/etc/containerd/config.toml",
        "printf '[cni]\n  conf_dir = \"/etc/cni/net.d/\"\n  bin_dir = \"\"\n' > $R/etc/containerd/config.toml"),
    theirs("containerd runs other plugins", "runtime-folders", "echo \"bin_dir = '/usr/lib/cni'\" > $R/etc/containerd/config.toml", "rm -r $R/etc/containerd"),
    theirs("container held back", "cpu-throttled", "printf 'usage_usec 9\nnr_periods 9000\nnr_throttled 4000\n' > $R/sys/fs/cgroup/cpu.stat", "echo > $R/sys/fs/cgroup/cpu.stat"),
    theirs("kubelet takes too many pods", "max-pods", "mkdir -p $R/etc/kubernetes/kubelet; echo '{\"a\": 1, \"maxPods\": 110, \"b\": 2}' > $R/etc/kubernetes/kubelet/config.json",
        "mkdir $R/etc/kubernetes/kubelet/config.json.d; echo '{\"maxPods\": 11}' > $R/etc/kubernetes/kubelet/config.json.d/40-nodeadm.conf"),
    theirs("kubelet's command line takes too many pods", "max-pods", "mkdir -p $R/proc/1 $R/proc/77; echo kubelet > $R/proc/77/comm; printf 'kubelet\\000--max-pods\\00058\\000--v=2\\000' > $R/proc/77/cmdline", "rm -r $R/proc $R/etc/kubernetes"),
    under(theirs("no rest for addresses", "cool-down", "echo IP_COOLDOWN_PERIOD=0 > /run/aws-node/doctor.env", "rm /run/aws-node/doctor.env"), &[("ENIBOX_SETTINGS_FILE", "/run/aws-node/doctor.env")]),
    under(theirs("little rest for addresses", "cool-down", "echo IP_COOLDOWN_PERIOD=29 > /run/aws-node/doctor.env", "rm /run/aws-node/doctor.env"), &[("ENIBOX_SETTINGS_FILE", "/run/aws-node/doctor.env")]),
    under(theirs("type without trunk ENIs", "trunk-missing", "mkdir -p $R/proc/sys/net/ipv4; for s in tcp udp; do echo 0 > $R/proc/sys/net/ipv4/${s}_early_demux; done", "true"), &[("ENABLE_POD_ENI", "true")]),
    theirs("connection table full", "conntrack-full", "mkdir -p $R/proc/sys/net/netfilter; echo 95 > $R/proc/sys/net/netfilter/nf_conntrack_count; echo 100 > $R/proc/sys/net/netfilter/nf_conntrack_max", "rm -r $R/proc"),
    theirs("neighbour table small", "neighbour-table", "mkdir -p $R/proc/sys/net/ipv4/neigh/default; echo 4 > $R/proc/sys/net/ipv4/neigh/default/gc_thresh3", "rm -r $R/proc"),
    theirs("old kernel", "kernel-old", "mkdir -p $R/proc/sys/kernel; echo 4.14.256-amzn > $R/proc/sys/kernel/osrelease", "rm -r $R/proc"),
    theirs("module away", "module-missing", "mkdir -p $R/proc/sys/kernel $R/lib/modules/6.9.9; echo 6.9.9 > $R/proc/sys/kernel/osrelease; \
        echo kernel/net/netfilter/nf_tables.ko.xz: > $R/lib/modules/6.9.9/modules.dep; echo kernel/nft_ct.ko > $R/lib/modules/6.9.9/modules.builtin; echo > $R/proc/modules", "rm -r $R/proc $R/lib"),
    theirs("checkpoint from before the boot", "checkpoint-old", "mkdir -p $R/proc; echo 'btime 99999999999' > $R/proc/stat", "rm -r $R/proc"),
    theirs("checkpoint on a disk", "not-tmpfs", "mkdir -p $R/proc; printf '/dev/x / ext4 rw 0 0\\n' > $R/proc/mounts", "rm -r $R/proc"),
    under(theirs("early demux", "tcp-early-demux", "mkdir -p $R/proc/sys/net/ipv4; echo 0 > $R/proc/sys/net/ipv4/udp_early_demux; echo 1 > $R/proc/sys/net/ipv4/tcp_early_demux", "echo 0 > $R/proc/sys/net/ipv4/tcp_early_demux"),
        &[("ENABLE_POD_ENI", "true")]),
    under(theirs("early demux of UDP", "udp-early-demux", "echo 1 > $R/proc/sys/net/ipv4/udp_early_demux", "echo 0 > $R/proc/sys/net/ipv4/udp_early_demux"),
        &[("ENABLE_POD_ENI", "true")]),
    theirs("no plugin", "plugin-missing", "mkdir -p $R/opt/cni/bin", "rm -r $R/opt"),
    theirs("plugin of another build", "plugin-other", "mkdir -p $R/opt/cni/bin; echo x > $R/opt/cni/bin/aws-cni", "rm $R/opt/cni/bin/aws-cni; ln -s $PROGRAM $R/opt/cni/bin/aws-cni"),
    theirs("egress address of nobody", "egress-leftover", "mkdir -p $R/run/cni/v6pd/egress-v4-ipam/aws-cni; echo x > $R/run/cni/v6pd/egress-v4-ipam/aws-cni/169.254.172.9", "rm -r $R/run/cni"),
    under(theirs("no policy agent", "policy-agent", "true", "echo > $R/run/aws-node/npa.sock"), &[("NETWORK_POLICY_ENFORCING_MODE", "strict")]),
    under(theirs("module of the policy agent away", "module-missing", "mkdir -p $R/proc/sys/kernel $R/lib/modules/6.9.9; echo 6.9.9 > $R/proc/sys/kernel/osrelease; \
        for m in veth nf_tables nft_ct nft_fib_ipv4 nft_nat nft_chain_nat sch_ingress; do echo kernel/net/$m.ko: >> $R/lib/modules/6.9.9/modules.dep; done; echo > $R/lib/modules/6.9.9/modules.builtin; echo > $R/proc/modules",
        "rm -r $R/proc $R/lib"), &[("NETWORK_POLICY_ENFORCING_MODE", "strict")]),
    // At the end: its undoing leaves the rest of the pod's network to the doctor.
    theirs("host veth gone", "pod-veth", "ip link del $V1", "ip link add $V1 mtu 9001 type veth peer name eth0 mtu 9001 netns $P1"),
];

/// In IPv6 mode. `$A2`, `$V2` and `$I2` are those of an interface of the second pod on a further network card, `$NODE` is the
/// node's own address.
#[rustfmt::skip]
pub const V6_FAULTS: &[Fault] = &[
    // Rules of the node.
    ours("mark rule", "mark-rule", "ip -6 rule del pref 1024"),
    ours("mark rule of another mark", "mark-rule", "ip -6 rule add pref 1024 fwmark 0x100/0x100 lookup main"),
    ours("local rule left at 20", "local-rule", "ip -6 rule add pref 20 lookup local; ip -6 rule del pref 0"),
    ours("rule for the router left over", "gateway-rule", "ip -6 rule add pref 0 from fe80:ec2::1 ipproto ipv6-icmp lookup local"),
    ours("service rule", "service-rule", "ip rule del pref 1535"),
    ours("all rules flushed", "main-rule", "ip -6 rule flush"),
    ours("all rules flushed, the mark's", "mark-rule", "ip -6 rule flush"),
    ours("way to main in IPv4", "main-rule", "ip rule flush"),
    // ENIs.
    ours("primary MTU", "primary-mtu", "ip link set $ETH mtu 1500"),
    ours("ENI MTU", "eni-mtu", "ip link set $ENI mtu 1500"),
    ours("ENI down", "eni-link", "ip link set $ENI down"),
    ours("ENI down, its routes", "eni-route", "ip link set $ENI down; ip link set $ENI up"),
    ours("ENI down, its address", "eni-address", "ip link set $ENI down; ip link set $ENI up"),
    ours("ENI address", "eni-address", "ip addr del $NET dev $ENI"),
    ours("ENI address of a stranger", "eni-address", "ip addr add 2001:db8:99::77/64 dev $ENI nodad"),
    theirs("ENI without carrier", "no-carrier", "far $ENI down", "far $ENI up"),
    ours("ENI without link-local address", "eni-address", "ip -6 addr flush dev $ENI scope link"),
    ours("ENI addresses flushed", "eni-address", "ip -6 addr flush dev $ENI"),
    ours("ENI default route", "eni-route", "ip -6 route del default table $T"),
    ours("ENI gateway route", "eni-route", "ip -6 route del fe80:ec2::1 table $T"),
    ours("ENI default route over the primary", "eni-route", "ip -6 route del default table $T; ip -6 route add default dev $ETH table $T"),
    ours("ENI table flushed", "eni-route", "ip -6 route flush table $T"),
    ours("ENI subnet in main", "eni-route", "ip -6 route append $SUBNET dev $ENI metric 256"),
    ours("ENI rule", "eni-rule", "ip -6 rule del pref 32765 from $OWN"),
    ours("ENI rule of a lost ENI", "eni-rule", "ip -6 rule add pref 32765 from 2001:db8:99::9 lookup 7"),
    ours("ENI rule of another table", "eni-rule", "ip -6 rule add pref 32765 from $OWN lookup 7"),
    // Rules of pods.
    ours("way in, primary", "to-pod-rule", "ip -6 rule del pref 512 to $A1"),
    ours("way in, further card", "to-pod-rule", "ip -6 rule del pref 512 to $A2"),
    ours("way out", "from-pod-rule", "ip -6 rule del pref 1536 from $A2"),
    ours("second way out", "from-pod-rule", "ip -6 rule add pref 1536 from $A2 lookup 7"),
    ours("way out of the primary's pod", "from-pod-rule", "ip -6 rule add pref 1536 from $A1 lookup $T"),
    ours("way out of an earlier owner", "from-pod-rule", "ip -6 rule add pref 10001 from $A1 lookup $T"),
    ours("way in to nobody", "stray-rule", "ip -6 rule add pref 512 to 2001:db8:99::8 lookup main"),
    ours("way out of nobody", "stray-rule", "ip -6 rule add pref 1536 from 2001:db8:99::8 lookup $T"),
    // nf_tables: the way out to IPv4.
    ours("table", "ruleset", "nft delete table ip aws-cni"),
    ours("all tables flushed", "ruleset", "nft flush ruleset"),
    ours("table of the other family", "ruleset", "nft add table ip6 aws-cni; nft add chain ip6 aws-cni x"),
    ours("chain egress-forward empty", "ruleset", "nft flush chain ip aws-cni egress-forward"),
    ours("chain egress-forward gone", "ruleset", "nft flush chain ip aws-cni egress-forward; nft delete chain ip aws-cni egress-forward"),
    ours("chain egress-postrouting empty", "ruleset", "nft flush chain ip aws-cni egress-postrouting"),
    ours("SNAT of egress", "ruleset", "unrule egress-postrouting 'snat to'"),
    ours("chain of a stranger", "ruleset", "nft add chain ip aws-cni stranger"),
    ours("rule of a stranger", "ruleset", "nft insert rule ip aws-cni egress-forward counter accept"),
    // Settings of the kernel.
    ours("forwarding off", "sysctl", "echo 0 > /proc/sys/net/ipv6/conf/all/forwarding"),
    ours("router advertisements not heard", "sysctl", "echo 1 > /proc/sys/net/ipv6/conf/$ETH/accept_ra"),
    ours("IPv6 off on the ENI", "eni-address", "echo 1 > /proc/sys/net/ipv6/conf/$ENI/disable_ipv6"),
    ours("reverse path of the primary", "sysctl", "echo 1 > /proc/sys/net/ipv4/conf/$ETH/rp_filter"),
    Fault { mended: Mended::Partly("ip addr add $NODE/128 dev $ETH nodad; ip -6 route replace default via fe80:ec2::1 dev $ETH"),
        ..ours("IPv6 off on the primary", "sysctl", "echo 1 > /proc/sys/net/ipv6/conf/$ETH/disable_ipv6") },
    // A pod's host side.
    ours("host route, primary", "pod-route", "ip -6 route del $A1"),
    ours("host route, further card", "pod-route", "ip -6 route del $A2"),
    ours("host route elsewhere", "pod-route", "ip -6 route del $A1; ip -6 route add $A1 dev $ETH"),
    ours("host veth down", "pod-link", "ip link set $V1 down"),
    ours("host veth down, its route", "pod-route", "ip link set $V1 down; ip link set $V1 up"),
    ours("host veth MTU", "pod-mtu", "ip link set $V2 mtu 1400"),
    ours("host veth MAC", "pod-mac", "ip link set $V1 address 02:00:00:00:00:99"),
    ours("host veth without link-local address", "pod-link", "ip -6 addr flush dev $V1"),
    ours("IPv6 off on the host veth", "pod-route", "echo 1 > /proc/sys/net/ipv6/conf/$V1/disable_ipv6"),
    ours("host veth renamed", "veth-name", "ip link set $V1 down; ip link set $V1 name odd0; ip link set odd0 up; ip -6 route replace $A1 dev odd0"),
    // A pod's own side.
    ours("pod link down", "inside-link", "ip -n $P1 link set eth0 down"),
    ours("pod address", "inside-address", "ip -n $P1 -6 addr flush dev eth0 scope global"),
    ours("pod address of another", "inside-address", "ip -n $P2 -6 addr flush dev $I2 scope global; ip -n $P2 addr add 2001:db8:99::3/128 dev $I2 nodad"),
    ours("pod default route", "inside-route", "ip -n $P1 -6 route del default"),
    ours("pod gateway route", "inside-route", "ip -n $P1 -6 route del fe80::1"),
    ours("pod table of a further card", "inside-route", "ip -n $P2 -6 route flush table 1"),
    ours("pod rule of a further card", "inside-rule", "ip -n $P2 -6 rule del pref 1"),
    ours("pod MTU", "inside-mtu", "ip -n $P1 link set eth0 mtu 9100"),
    ours("pod neighbour", "inside-neighbour", "ip -n $P1 neigh del fe80::1 dev eth0"),
    ours("pod neighbour's MAC", "inside-neighbour", "ip -n $P1 neigh replace fe80::1 lladdr 02:00:00:00:00:98 dev eth0 nud permanent"),
    ours("pod neighbour not permanent", "inside-neighbour", "ip -n $P2 neigh replace fe80::2 lladdr 02:00:00:00:00:98 dev $I2 nud reachable"),
    ours("IPv6 off in the pod", "inside-address", "ip netns exec $P1 sh -c 'echo 1 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6'"),
    // Other software in the kernel.
    ours("hole in place of the pod's route", "pod-route", "ip -6 route replace blackhole $A1"),
    ours("hole beside the pod's route", "pod-route", "ip -6 route append blackhole $A1"),
    told("hole before the pod's route", "foreign-route", "ip -6 route add blackhole $A1 metric 5"),
    told("another link before the pod's", "foreign-route", "ip -6 route add $A1 dev $ETH metric 5"),
    ours("hole in place of the ENI's default route", "eni-route", "ip -6 route replace unreachable default table $T"),
    told("hole before the ENI's default route", "foreign-route", "ip -6 route add prohibit default table $T metric 5"),
    told("part of the ENI's traffic thrown out", "foreign-route", "ip -6 route add throw 2001:db8:99::/48 table $T"),
    told("part of the ENI's traffic by the primary", "foreign-route", "ip -6 route add 2001:db8:99::/48 dev $ETH table $T"),
    ours("neighbour on the host veth", "host-neighbour", "ip neigh replace $A1 lladdr 02:00:00:00:00:96 dev $V1 nud permanent"),
    ours("neighbour on the host veth, no discovery", "host-neighbour", "ip neigh replace $A2 lladdr 02:00:00:00:00:96 dev $V2 nud noarp"),
    ours("router heard on the host veth", "link-sysctl", "echo 1 > /proc/sys/net/ipv6/conf/$V1/accept_ra"),
    ours("redirects heard on the host veth", "link-sysctl", "echo 1 > /proc/sys/net/ipv6/conf/$V2/accept_redirects"),
    told("gateway of the ENI", "gateway-neighbour", "ip neigh replace fe80:ec2::1 lladdr 02:00:00:00:00:96 dev $ENI nud permanent"),
    theirs("neighbour table small", "neighbour-table", "mkdir -p $R/proc/sys/net/ipv6/neigh/default; echo 4 > $R/proc/sys/net/ipv6/neigh/default/gc_thresh3", "rm -r $R/proc"),
    told("rule for everything", "foreign-rule", "ip -6 rule add pref 100 lookup main"),
    told("our mark to another table", "foreign-rule", "ip -6 rule add pref 1024 fwmark 0x80/0x80 lookup $T"),
    told("rule for our mark", "foreign-rule", "ip -6 rule add pref 1000 fwmark 0x80/0x80 lookup $T"),
    told("rule for a network with ENIs", "foreign-rule", "ip -6 rule add pref 200 from $SUBNET lookup $T"),
    told("rule for a pod's link", "foreign-rule", "ip -6 rule add pref 200 iif $V1 lookup $T"),
    told("default by another ENI", "foreign-route", "ip -6 route add default via fe80:ec2::1 dev $ENI metric 5"),
    told("FORWARD drops", "forward-drop", "nft add table ip6 filter; nft add chain ip6 filter FORWARD '{ type filter hook forward priority 0; policy drop; }'"),
    // Last: it takes the addresses of all pods along.
    Fault { mended: Mended::Partly("ip addr add $NODE/128 dev $ETH nodad; ip -6 route replace default via fe80:ec2::1 dev $ETH"),
        ..ours("IPv6 off everywhere", "sysctl", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6") },
];

/// In IPv4 mode with a way out to IPv6. `$A` is the pod's address there, `$V` the host's end of that link.
#[rustfmt::skip]
pub const V6_EGRESS_FAULTS: &[Fault] = &[
    ours("table", "ruleset", "nft delete table ip6 aws-cni"),
    ours("both tables", "ruleset", "nft delete table ip aws-cni; nft delete table ip6 aws-cni"),
    ours("all tables flushed", "ruleset", "nft flush ruleset"),
    ours("chain egress-forward empty", "ruleset", "nft flush chain ip6 aws-cni egress-forward"),
    ours("chain egress-forward gone", "ruleset", "nft flush chain ip6 aws-cni egress-forward; nft delete chain ip6 aws-cni egress-forward"),
    ours("chain egress-postrouting empty", "ruleset", "nft flush chain ip6 aws-cni egress-postrouting"),
    ours("SNAT", "ruleset", "unrule6 egress-postrouting 'snat to'"),
    ours("SNAT to another address", "ruleset", "unrule6 egress-postrouting 'snat to'; nft add rule ip6 aws-cni egress-postrouting counter snat to 2001:db8:99::1 fully-random"),
    ours("SNAT of everybody", "ruleset", "unrule6 egress-postrouting 'saddr != '"),
    ours("rule of a stranger", "ruleset", "nft insert rule ip6 aws-cni egress-forward counter accept"),
    ours("chain of a stranger", "ruleset", "nft add chain ip6 aws-cni stranger"),
    ours("forwarding off", "sysctl", "echo 0 > /proc/sys/net/ipv6/conf/all/forwarding"),
    ours("router advertisements not heard", "sysctl", "echo 1 > /proc/sys/net/ipv6/conf/$ETH/accept_ra"),
    theirs("no IPv6 in the kernel", "ipv6-off", "mkdir -p $R/proc/net; : > $R/proc/net/if_inet6", "rm -r $R/proc"),
    ours("way to main", "main-rule", "ip -6 rule flush"),
    ours("route to the pod", "egress-route", "ip -6 route del $A"),
    ours("host's end down", "egress-link", "ip link set $V down"),
    ours("hole before the pod's route", "egress-route", "ip -6 route del $A dev $V; ip -6 route add blackhole $A; ip -6 route append $A dev $V"),
    ours("hole in place of the pod's route", "egress-route", "ip -6 route del $A dev $V; ip -6 route add blackhole $A"),
    told("hole of less metric", "foreign-route", "ip -6 route add blackhole $A metric 10"),
    told("FORWARD drops", "forward-drop", "nft add table ip6 filter; nft add chain ip6 filter FORWARD '{ type filter hook forward priority 0; policy drop; }'"),
    // Of which no alias tells; these go last.
    ours("route to the pod, of the original's", "egress-way", "ip link set $V alias ''; ip -6 route del $A"),
    ours("host's end down, of the original's", "egress-way", "ip link set $V alias ''; ip link set $V down"),
];

/// Of a pod with a branch ENI of its own, in both modes and families. Scripts may name `$IP` (`ip` with the family), `$A`, `$P`
/// and `$V` (address, namespace and host veth of the pod), `$PGW` (the pod's gateway), `$DEV`, `$T` and `$GW` (the ENI's VLAN
/// device, table and gateway) and `$TRUNK`.
#[rustfmt::skip]
pub const BRANCH_FAULTS: &[Fault] = &[
    ours("VLAN device deleted", "branch-link", "ip link del $DEV"),
    ours("VLAN device down", "branch-link", "ip link set $DEV down"),
    ours("VLAN device down, its routes", "branch-route", "ip link set $DEV down; ip link set $DEV up"),
    ours("VLAN device's MAC", "branch-link", "ip link set $DEV address 02:00:00:00:00:97"),
    ours("VLAN device's MTU", "branch-link", "ip link set $DEV mtu 1400"),
    ours("gateway route of the branch", "branch-route", "$IP route del $GW table $T"),
    ours("default route of the branch", "branch-route", "$IP route del default table $T"),
    ours("default route of the branch over the primary", "branch-route", "$IP route del default table $T; $IP route add default dev $ETH table $T"),
    ours("table of the branch flushed", "branch-route", "$IP route flush table $T"),
    ours("trunk MTU, its branches", "branch-link", "ip link set $TRUNK mtu 1500"),
    ours("trunk down", "eni-link", "ip link set $TRUNK down"),
    ours("trunk down and up", "branch-route", "ip link set $TRUNK down; ip link set $TRUNK up"),
    ours("hole in place of the branch's default route", "branch-route", "$IP route replace blackhole default table $T"),
    ours("hole before the branch's default route", "branch-route", "$IP route prepend blackhole default table $T"),
    told("part of the branch's traffic thrown out", "foreign-route", "$IP route add throw 192.0.2.0/24 table $T"),
    told("part of the branch's traffic by the primary", "foreign-route", "$IP route add 192.0.2.0/24 dev $ETH table $T"),
    told("gateway of the branch", "gateway-neighbour", "ip neigh replace $GW lladdr 02:00:00:00:00:96 dev $DEV nud permanent"),
    ours("VLAN device does not forward", "link-forwarding", "echo 0 > /proc/sys/net/ipv4/conf/$DEV/forwarding"),
    ours("host veth does not forward", "link-forwarding", "echo 0 > /proc/sys/net/ipv4/conf/$V/forwarding"),
    ours("neighbour on the host veth", "host-neighbour", "ip neigh replace $A lladdr 02:00:00:00:00:96 dev $V nud permanent"),
    ours("router heard on the VLAN device", "link-sysctl", "echo 1 > /proc/sys/net/ipv6/conf/$DEV/accept_ra"),
    ours("redirects heard on the host veth", "link-sysctl", "echo 1 > /proc/sys/net/ipv6/conf/$V/accept_redirects"),
    ours("branch rules of a lost device", "branch-rule", "$IP rule add pref 10 iif vlan.eth.999 lookup 1099"),
    ours("device of a former pod", "branch-leftover", "ip link add link $TRUNK name vlan.eth.998 type vlan id 998; $IP rule add pref 10 iif vlan.eth.998 lookup 1098"),
    ours("host veth down", "pod-link", "ip link set $V down"),
    ours("host veth MAC", "pod-mac", "ip link set $V address 02:00:00:00:00:99"),
    ours("pod link down", "inside-link", "ip -n $P link set eth0 down"),
    ours("pod's gateway neighbour", "inside-neighbour", "ip -n $P neigh del $PGW dev eth0"),
];

#[rustfmt::skip]
pub const V6_BRANCH_FAULTS: &[Fault] = &[
    ours("VLAN device without link-local address", "branch-link", "ip -6 addr flush dev $DEV"),
    ours("IPv6 off on the VLAN device", "branch-route", "echo 1 > /proc/sys/net/ipv6/conf/$DEV/disable_ipv6"),
    ours("VLAN device deleted, its routes", "branch-link", "ip link del $DEV"),
    ours("veth without link-local address", "pod-link", "ip -6 addr flush dev $V"),
];

#[rustfmt::skip]
pub const STRICT_FAULTS: &[Fault] = &[
    ours("rule from the branch", "branch-rule", "$IP rule del pref 10 iif $DEV"),
    ours("rule from the pod", "branch-rule", "$IP rule del pref 10 iif $V"),
    ours("both rules of the branch", "branch-rule", "while $IP rule del pref 10 2> /dev/null; do :; done"),
    ours("route to the pod", "branch-route", "$IP route del $A table $T"),
    ours("local rule before the branches", "local-rule", "$IP rule add pref 0 lookup local"),
    ours("local rule not moved", "local-rule", "$IP rule add pref 0 lookup local; $IP rule del pref 20"),
];

#[rustfmt::skip]
pub const STANDARD_FAULTS: &[Fault] = &[
    ours("way in", "to-pod-rule", "$IP rule del pref 512 to $A"),
    ours("way out", "from-pod-rule", "$IP rule del pref 1536 from $A"),
    ours("second way out", "from-pod-rule", "$IP rule add pref 1536 from $A lookup 7"),
    ours("host route", "pod-route", "$IP route del $A"),
    ours("device of a former pod", "branch-leftover", "ip link add link $TRUNK name vlan.eth.998 type vlan id 998; $IP rule add pref 10 iif vlan.eth.998 lookup 1098"),
];
