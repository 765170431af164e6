//! The texts of all findings: name, severity, what does not work because of it, how to mend it. An empty remedy: the
//! doctor itself mends it. Short, because they are a part of the executable on every node.

use super::Severity::{self, Fail, Note, Warn};

type Row = (&'static str, Severity, &'static str, &'static str);

#[rustfmt::skip]
const TEXTS: &[Row] = &[
    // The steps of the host's plan (`plan::host::What`).
    ("primary-mtu", Warn, "large packets are lost or split", ""),
    ("mark-rule", Fail, "NodePort and SNAT answers leave by the wrong ENI", ""),
    ("local-rule", Fail, "traffic to the node's own addresses takes a detour", ""),
    ("service-rule", Fail, "pods of secondary ENIs reach external services by the wrong ENI", ""),
    ("eni-mtu", Warn, "large packets of the ENI's pods are lost or split", ""),
    ("eni-link", Fail, "the ENI's pods have no way out", ""),
    ("eni-address", Warn, "ARP and the ENI's own traffic go wrong", ""),
    ("eni-route", Fail, "traffic of the ENI's pods takes another way out, where EC2 drops it", ""),
    ("eni-rule", Fail, "answers from the ENI's own address leave by another ENI", ""),
    ("to-pod-rule", Fail, "marked or diverted traffic does not reach the pod", ""),
    ("from-pod-rule", Fail, "the pod's traffic leaves by an ENI that has not its address: EC2 drops it", ""),
    ("branch-link", Fail, "the branch ENI's pod has no network", ""),
    ("branch-route", Fail, "traffic of the branch ENI's pod goes astray", ""),
    ("branch-rule", Fail, "traffic of a branch ENI's pod takes another way, or a new pod's that of a former one", ""),
    ("gateway-rule", Fail, "branch pods do not find the VPC's IPv6 router", ""),
    ("gone-pod", Warn, "the next pod of the address gets its traffic misled", ""),
    ("ruleset", Fail, "SNAT, NodePort or return paths of pods are wrong", ""),
    ("no-plan", Fail, "the host's network cannot be set up or mended", "look for the primary ENI's link: ip -d link"),
    ("eni-unplugged", Fail, "the ENI's pods have no network", "ip -d link; detach and attach the ENI, or delete its pods"),
    ("primary-ambiguous", Warn, "the primary ENI's link may be taken for another", "remove the link that copies its MAC"),
    ("stray-rule", Warn, "the next pod of the address gets its traffic misled", ""),
    // Pods.
    ("pod-veth", Fail, "the pod has no network, or is gone and holds an address", "delete the pod; if it is gone already: crictl rmp of its sandbox"),
    ("veth-name", Fail, "the rules for traffic of pods do not match it", "ip link set <link> name <name>; the rename comes from a udev rule or .link file"),
    ("veth-prefix", Warn, "the rules for traffic of pods do not match those made before the change", "delete those pods"),
    ("pod-link", Fail, "the pod has no network", ""),
    ("pod-route", Fail, "nothing reaches the pod", ""),
    ("pod-mac", Fail, "what the pod sends goes to a MAC that nobody has", ""),
    ("pod-mtu", Warn, "large packets to the pod are lost or split", ""),
    ("sysctl", Warn, "the kernel treats packets of pods otherwise than they need", ""),
    ("inside-mtu", Warn, "large packets of the pod are lost or split", ""),
    ("inside-interface", Fail, "the pod has no network", "delete the pod"),
    ("inside-link", Fail, "the pod has no network", ""),
    ("inside-address", Fail, "the pod does not answer", ""),
    ("inside-route", Fail, "the pod has no way out", ""),
    ("inside-rule", Fail, "answers of the pod leave by the wrong interface", ""),
    ("inside-neighbour", Fail, "what the pod sends goes to a MAC that nobody has", ""),
    ("pod-unseen", Note, "what is inside was not looked at", "run where /var/run/netns or /proc of the host is seen"),
    // EC2 and IMDS.
    ("imds-silent", Fail, "a restart of the daemon fails; addresses cannot be checked", "allow 169.254.169.254 from the host's network; check proxies and the instance's metadata options"),
    ("eni-not-attached", Fail, "pods of the ENI have no network", "delete the pods of the ENI"),
    ("address-lost", Fail, "EC2 drops what the pod sends", "delete the pod"),
    ("pod-other-eni", Fail, "EC2 drops what the pod sends", "restart the daemon; delete the pod"),
    ("imds-stale", Note, "a decision by IMDS alone would be wrong", "wait; it mends itself within minutes"),
    ("ec2-refused", Warn, "ENIs and addresses cannot be added", "give the node's role the action"),
    ("ec2-unasked", Note, "EC2 was not compared", "run it where the daemon's credentials are, or with --no-ec2"),
    // The daemon.
    ("unknown", Fail, "what the node's network should be is not known", "start the daemon; run this with its environment and checkpoint"),
    ("daemon-silent", Warn, "new pods wait, nothing is repaired", "kubectl logs of aws-node; enibox status"),
    ("settings", Fail, "the daemon does not start", "correct the variable in the DaemonSet"),
    ("no-addresses", Warn, "new pods wait for an address", "enibox status"),
    ("subnet-exhausted", Warn, "no more addresses from this subnet", "free or add addresses; add a subnet"),
    ("ec2-throttled", Warn, "growth is slow", "lower the churn: WARM_IP_TARGET, MINIMUM_IP_TARGET"),
    ("growth-paused", Warn, "the pool does not grow for a while", "enibox status"),
    // What surrounds us.
    ("ip-forward", Fail, "nothing is forwarded to or from pods", "sysctl -w net.ipv4.ip_forward=1"),
    ("link-forwarding", Fail, "what comes in by this link is not forwarded to pods", "sysctl -w the setting = 1"),
    ("default-route", Fail, "nothing leaves the node by its primary ENI: SNAT, EC2, IMDS and the API server fail", "let DHCP set it again: networkctl renew, or nmcli; ip route add default via <gateway> dev <link>"),
    ("pod-address-taken", Fail, "the node itself answers for the pod, and nothing reaches it", "ip addr del the address from that link; cloud-init, ec2-net-utils or DHCP may have added it"),
    ("pod-enslaved", Fail, "packets of the pod go into a bridge or bond and not to the node", "ip link set <link> nomaster; look for who did it"),
    ("rp-filter", Fail, "NodePort packets are dropped", "sysctl -w the setting = 2"),
    ("tcp-early-demux", Fail, "kubelet's TCP probes of strict branch-ENI pods fail", "DISABLE_TCP_EARLY_DEMUX=true in the init container"),
    ("udp-early-demux", Warn, "the node's UDP to strict branch-ENI pods gets no answers", "DISABLE_TCP_EARLY_DEMUX=true in the init container"),
    ("allowance-exceeded", Note, "the instance has delayed or dropped packets since its start", "if it grows: a larger instance; for linklocal: a DNS cache on the node; for conntrack: fewer connections"),
    ("conntrack-full", Fail, "new connections are dropped", "sysctl -w net.netfilter.nf_conntrack_max=<more>"),
    ("neighbour-table", Warn, "the kernel refuses new neighbours of the node and all its pods", "sysctl -w net.ipv4.neigh.default.gc_thresh3=<more>"),
    ("forward-drop", Fail, "traffic between pods and to other nodes is dropped", "set the policy to accept: iptables -P FORWARD ACCEPT, or nft"),
    ("former-rules", Warn, "rules of a former installation are never updated", ""),
    ("legacy-rules", Warn, "rules of a former installation are never updated", "replace the node"),
    ("ipvs", Note, "pods of secondary ENIs do not reach services whose endpoints are outside the VPC", "kube-proxy in mode nftables or iptables; or the endpoints' CIDRs in AWS_EXTERNAL_SERVICE_CIDRS"),
    ("legacy-tables", Note, "rules of iptables-legacy act beside nf_tables", "iptables-legacy-save shows them"),
    ("firewall", Warn, "a reload drops forwarded traffic and flushes rules", "switch it off or trust the links of pods"),
    ("udev-link-policy", Note, "MACs of links without one of their own are rewritten", "a .link file with MACAddressPolicy=none before it"),
    ("networkd-rules", Warn, "systemd-networkd removes our rules whenever it reloads", "ManageForeignRoutingPolicyRules=no in networkd.conf"),
    ("networkd-routes", Warn, "systemd-networkd removes our routes whenever it reloads", "ManageForeignRoutes=no in networkd.conf"),
    ("networkmanager", Warn, "NetworkManager takes ENIs and veths over", "unmanaged-devices=interface-name:eni*;interface-name:vlan* in /etc/NetworkManager/conf.d"),
    ("nm-cloud-setup", Fail, "its rules and tables 30200 and 30400 divert traffic of pods", "systemctl disable --now nm-cloud-setup.service nm-cloud-setup.timer"),
    ("ec2-net-utils", Warn, "the OS routes an ENI's traffic by rules of its own", "remove it, or mask 99-vpc-policy-routes.rules"),
    ("foreign-rule", Warn, "a rule of somebody else decides before ours", "find its owner: ip rule"),
    ("conflist-missing", Fail, "the node is not ready", "restart aws-node; is /etc/cni/net.d mounted?"),
    ("conflist-order", Fail, "the runtime takes another network configuration", "remove the file that sorts first"),
    ("plugin-missing", Fail, "no pod starts", "restart aws-node, which installs it; is /opt/cni/bin mounted?"),
    ("plugin-other", Warn, "plugin and daemon may refuse each other: \"wrong client version\"", "restart aws-node, which installs its own; look for another installer of plugins"),
    ("egress-leftover", Note, "addresses of the other family are held by pods that are gone", "none with our plugin, which takes them back; else delete the files that name their containers"),
    ("checkpoint-old", Fail, "pods from before the boot hold addresses", "make /var/run a tmpfs; delete the file and restart the daemon"),
    ("checkpoint-unreadable", Fail, "names of pods are lost at a restart of the daemon", "keep the file for a report; the daemon sets it aside"),
    ("not-tmpfs", Warn, "the checkpoint outlives a reboot", "mount a tmpfs on /run"),
    ("policy-agent", Warn, "pods fail with \"failed to setup network policy\"", "run the agent, or unset NETWORK_POLICY_ENFORCING_MODE"),
    ("kernel-old", Warn, "parts of nf_tables or the policy agent are missing", "a kernel of 5.10 or later"),
    ("module-missing", Fail, "the rule set or branch ENIs cannot be made", "install the kernel's module package; modprobe it"),
];

/// Of a name. Every name in use stands in the table, as a test holds.
pub(super) fn of(name: &str) -> (Severity, &'static str, &'static str) {
    let row = TEXTS.iter().find(|row| row.0 == name);
    row.map_or((Warn, "", "enibox status"), |row| (row.1, row.2, row.3))
}

#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    TEXTS.iter().map(|row| row.0)
}
