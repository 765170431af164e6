//! Links: `ip link`. Encodings are those of `spec/plugin.md` 13.6 and `linux/if_link.h`.
//!
//! A veth is created in one message with names, MACs, MTU, one end up and each end born in its namespace. Moving an end
//! afterwards would serialise concurrent pods on an RCU barrier. It has one queue in each direction, as it would have in the
//! end anyway: without being told, the kernel makes one for each processor, with its entries in sysfs, and takes all but
//! the first away again, for which it waits for every processor while it holds the lock of all links (`veth_init_queues`
//! in drivers/net/veth.c). On a busy machine that took some milliseconds for each end.

use super::attr::{Attr, Attrs, Writer};
use super::socket::{CREATE_EXCL, KernelError, Message, Request, Socket};
use crate::error::Result;
use crate::model::net::{Conf6, Link, Mac};
use crate::model::order;
use neli::consts::rtnl::{Ifla, IflaInfo, IflaVlan, Rtm};
use std::os::fd::{AsRawFd, BorrowedFd};

const IFF_UP: u32 = libc::IFF_UP.cast_unsigned();
const IFF_NOARP: u32 = libc::IFF_NOARP.cast_unsigned();
/// The driver has a carrier (`linux/if.h`).
const IFF_LOWER_UP: u32 = 1 << 16;
/// Length of `struct ifinfomsg`.
const HEADER: usize = 16;
/// VETH_INFO_PEER (`linux/veth.h`).
const VETH_INFO_PEER: u16 = 1;
/// RTEXT_FILTER_SKIP_STATS: no counters, which are half of every link message.
const SKIP_STATS: u32 = 1 << 3;
/// Longest name of a link, without its NUL (IFNAMSIZ - 1).
const NAME_MAX: usize = 15;

/// One end of a veth pair.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// Name, at most 15 bytes.
    pub name: &'a str,
    /// Hardware address; none leaves the choice to the kernel.
    pub mac: Option<Mac>,
    /// The namespace it is born in; none is the socket's. The descriptor must stay open until the request was sent.
    pub netns: Option<BorrowedFd<'a>>,
}

/// A veth pair.
#[derive(Clone, Copy, Debug)]
pub struct Veth<'a> {
    /// The end that the request is about; its [`Link::parent`] tells the peer's index.
    pub end: End<'a>,
    /// The other end.
    pub peer: End<'a>,
    /// Largest packet of both ends in bytes; 0 leaves 1500.
    pub mtu: u32,
    /// Whether `end` is up at once. The peer is always born down: the kernel joins the two only after it has configured
    /// the peer, and refuses to open one that stands alone (ENOTCONN, `veth_open` in drivers/net/veth.c). Send
    /// [`set_up`] for it afterwards.
    pub up: bool,
}

fn header(index: u32, flags: u32, change: u32) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..].copy_from_slice(&change.to_ne_bytes());
    header
}

fn up_header(up: bool) -> [u8; HEADER] {
    let flag = if up { IFF_UP } else { 0 };
    header(0, flag, flag)
}

fn end_attributes(writer: &mut Writer, end: &End<'_>, mtu: u32) {
    writer.text(Ifla::Ifname, end.name);
    if mtu != 0 {
        writer.u32(Ifla::Mtu, mtu);
    }
    if let Some(mac) = end.mac {
        writer.bytes(Ifla::Address, &mac.0);
    }
    if let Some(netns) = end.netns {
        writer.u32(Ifla::NetNsFd, netns.as_raw_fd().cast_unsigned());
    }
    for queues in [Ifla::NumTxQueues, Ifla::NumRxQueues] {
        writer.u32(queues, 1);
    }
}

/// Creates a veth pair; EEXIST if one of the names is taken.
pub fn create_veth(veth: &Veth<'_>) -> Request {
    let mut writer = Writer::new(&up_header(veth.up));
    end_attributes(&mut writer, &veth.end, veth.mtu);
    writer.nest(Ifla::Linkinfo, |writer| {
        writer.text(IflaInfo::Kind, "veth");
        writer.nest(IflaInfo::Data, |writer| {
            writer.nest(VETH_INFO_PEER, |writer| {
                writer.raw(&up_header(false));
                end_attributes(writer, &veth.peer, veth.mtu);
            });
        });
    });
    let what = format!("add link {} type veth peer {}", veth.end.name, veth.peer.name);
    Request::new(Rtm::Newlink, CREATE_EXCL, writer.finish(), what)
}

/// Creates an 802.1Q link on the link with index `lower`, down, with the MTU of the one below.
pub fn create_vlan(name: &str, lower: u32, id: u16, mac: Option<Mac>) -> Request {
    let mut writer = Writer::new(&up_header(false));
    writer.text(Ifla::Ifname, name);
    writer.u32(Ifla::Link, lower);
    if let Some(mac) = mac {
        writer.bytes(Ifla::Address, &mac.0);
    }
    writer.nest(Ifla::Linkinfo, |writer| {
        writer.text(IflaInfo::Kind, "vlan");
        writer.nest(IflaInfo::Data, |writer| writer.u16(IflaVlan::Id, id));
    });
    Request::new(Rtm::Newlink, CREATE_EXCL, writer.finish(), format!("add link {name} type vlan id {id} on if{lower}"))
}

/// Creates a dummy link, down.
pub fn create_dummy(name: &str) -> Request {
    let mut writer = Writer::new(&up_header(false));
    writer.text(Ifla::Ifname, name);
    writer.nest(Ifla::Linkinfo, |writer| writer.text(IflaInfo::Kind, "dummy"));
    Request::new(Rtm::Newlink, CREATE_EXCL, writer.finish(), format!("add link {name} type dummy"))
}

fn change(index: u32, verb: &str, fill: impl FnOnce(&mut Writer)) -> Request {
    let mut writer = Writer::new(&header(index, 0, 0));
    fill(&mut writer);
    Request::new(Rtm::Newlink, 0, writer.finish(), format!("set link if{index} {verb}"))
}

/// Sets the link up.
pub fn set_up(index: u32) -> Request {
    Request::new(Rtm::Newlink, 0, header(index, IFF_UP, IFF_UP).to_vec(), format!("set link if{index} up"))
}

/// The same, and the kernel asks on it for MACs again.
pub fn set_working(index: u32) -> Request {
    let header = header(index, IFF_UP, IFF_UP | IFF_NOARP);
    Request::new(Rtm::Newlink, 0, header.to_vec(), format!("set link if{index} up"))
}

/// Gives the link an alias, at most 255 bytes. (A link cannot be created with one.) Best before it is up: then it counts as a
/// change, which is told to everybody in the kernel who keeps anything by link.
pub fn set_alias(index: u32, alias: &str) -> Request {
    change(index, &format!("alias {alias:?}"), |writer| writer.text(Ifla::Ifalias, alias))
}

/// Lets the kernel give the link no IPv6 address of its own when it comes up (`IN6_ADDR_GEN_MODE_NONE`, linux/if_link.h). Refused
/// where the link has no IPv6 at all.
pub fn no_link_local(index: u32) -> Request {
    const AF_INET6: u16 = 10;
    const INET6_ADDR_GEN_MODE: u16 = 8;
    change(index, "addrgenmode none", |writer| {
        writer.nest(Ifla::AfSpec, |writer| writer.nest(AF_INET6, |writer| writer.u8(INET6_ADDR_GEN_MODE, 1)));
    })
}

/// Sets the link down, which flushes its routes.
pub fn set_down(index: u32) -> Request {
    Request::new(Rtm::Newlink, 0, header(index, 0, IFF_UP).to_vec(), format!("set link if{index} down"))
}

/// Sets the MTU in bytes.
pub fn set_mtu(index: u32, mtu: u32) -> Request {
    change(index, &format!("mtu {mtu}"), |writer| writer.u32(Ifla::Mtu, mtu))
}

/// Sets the hardware address.
pub fn set_mac(index: u32, mac: Mac) -> Request {
    change(index, &format!("address {mac}"), |writer| writer.bytes(Ifla::Address, &mac.0))
}

/// Renames the link.
pub fn rename(index: u32, name: &str) -> Request {
    change(index, &format!("name {name}"), |writer| writer.text(Ifla::Ifname, name))
}

/// Moves the link into another namespace; it arrives down and without addresses. The descriptor must stay open until the
/// request was sent.
pub fn move_to(index: u32, netns: BorrowedFd<'_>) -> Request {
    let fd = netns.as_raw_fd().cast_unsigned();
    change(index, "netns", |writer| writer.u32(Ifla::NetNsFd, fd))
}

/// Deletes the link; ENODEV if it is not there.
pub fn delete(index: u32) -> Request {
    Request::new(Rtm::Dellink, 0, header(index, 0, 0).to_vec(), format!("delete link if{index}"))
}

/// Deletes the link of this name; ENODEV if it is not there.
pub fn delete_by_name(name: &str) -> Request {
    let mut writer = Writer::new(&header(0, 0, 0));
    writer.text(Ifla::Ifname, name);
    Request::new(Rtm::Dellink, 0, writer.finish(), format!("delete link {name}"))
}

/// Asks for one link by name; [`decode`] reads the answer. Lets a caller learn the index of a link that it creates in the
/// same batch.
pub fn query(name: &str) -> Request {
    let mut writer = Writer::new(&header(0, 0, 0));
    writer.u32(Ifla::ExtMask, SKIP_STATS);
    // Longer names can only be alternative ones.
    writer.text(if name.len() > NAME_MAX { Ifla::AltIfname } else { Ifla::Ifname }, name);
    Request::new(Rtm::Getlink, 0, writer.finish(), format!("get link {name}"))
}

/// Asks for one link by index; [`decode`] reads the answer.
pub fn query_index(index: u32) -> Request {
    let mut writer = Writer::new(&header(index, 0, 0));
    writer.u32(Ifla::ExtMask, SKIP_STATS);
    Request::new(Rtm::Getlink, 0, writer.finish(), format!("get link if{index}"))
}

fn get(socket: &mut Socket, request: &Request) -> Result<Option<Link>> {
    match socket.ask(request) {
        Ok(answers) => Ok(answers.iter().find_map(|body| decode(body))),
        Err(error) if error.find::<KernelError>().is_some_and(KernelError::not_found) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The link of this name in the socket's namespace, if there is one.
pub fn by_name(socket: &mut Socket, name: &str) -> Result<Option<Link>> {
    get(socket, &query(name))
}

/// The link with this index in the socket's namespace, if there is one.
pub fn by_index(socket: &mut Socket, index: u32) -> Result<Option<Link>> {
    get(socket, &query_index(index))
}

/// IFLA_LINK_NETNSID: the namespace of a veth's other end, as a number that only means something in the asker's.
const LINK_NETNSID: u16 = 37;
/// IFLA_TARGET_NETNSID: the namespace that is asked about. The kernel wants CAP_NET_ADMIN there.
const TARGET_NETNSID: u16 = 46;

/// The MAC of a veth's other end, in whatever namespace that is; none if the kernel does not tell, as for a link that is no veth
/// or gone.
pub fn mac_of_peer(socket: &mut Socket, index: u32) -> Result<Option<Mac>> {
    let Some(Ok(answers)) = socket.batch(&[query_index(index)])?.pop() else { return Ok(None) };
    let end = answers.iter().find_map(|body| {
        let namespace = Attrs::after(body, HEADER).find(LINK_NETNSID).and_then(|attr| attr.u32());
        Some((decode(body)?.parent?, namespace))
    });
    let Some((peer, namespace)) = end else { return Ok(None) };
    let mut writer = Writer::new(&header(peer, 0, 0));
    writer.u32(Ifla::ExtMask, SKIP_STATS);
    if let Some(namespace) = namespace {
        writer.u32(TARGET_NETNSID, namespace);
    }
    let request = Request::new(Rtm::Getlink, 0, writer.finish(), format!("get the other end of if{index}"));
    let Some(Ok(answers)) = socket.batch(&[request])?.pop() else { return Ok(None) };
    let peer = answers.iter().find_map(|body| decode(body));
    // Only if it names this one too: the number alone may be any link's.
    Ok(peer.filter(|peer| peer.parent == Some(index)).and_then(|peer| peer.mac))
}

/// All links of the socket's namespace, by index.
pub fn list(socket: &mut Socket) -> Result<Vec<Link>> {
    let mut writer = Writer::new(&header(0, 0, 0));
    writer.u32(Ifla::ExtMask, SKIP_STATS);
    let request = Request::new(Rtm::Getlink, 0, writer.finish(), "list links".into());
    let mut links = socket.dump(&request, |message: &Message<'_>| decode(message.body))?;
    order::sort_by_key(&mut links, |link| link.index);
    Ok(links)
}

/// IPV4_DEVCONF_FORWARDING is the first of the settings in IFLA_INET_CONF (1), which AF_INET (2) has in IFLA_AF_SPEC (`linux/ip.h`).
fn forwards(attr: Attr<'_>) -> Option<bool> {
    let inet = attr.nested().find(2u16)?;
    Some(inet.nested().find(1u16)?.u32()? != 0)
}

/// IFLA_INET6_CONF (2), which AF_INET6 (10) has in IFLA_AF_SPEC: the settings by their number, from DEVCONF_FORWARDING, 0, on
/// (`linux/ipv6.h`). A link without IPv6 has none.
fn conf6(attr: Attr<'_>) -> Option<Conf6> {
    let values = attr.nested().find(10u16)?.nested().find(2u16)?.value;
    let at = |number: usize| Some(u32::from_ne_bytes(values.get(4 * number..4 * number + 4)?.try_into().ok()?));
    Some(Conf6 { forwarding: at(0)?, accept_ra: at(3)?, accept_redirects: at(4)? })
}

/// Reads the body of an RTM_NEWLINK or RTM_DELLINK message; none if it is too short.
pub fn decode(body: &[u8]) -> Option<Link> {
    let word = |at: usize| Some(u32::from_ne_bytes(body.get(at..at + 4)?.try_into().ok()?));
    let flags = word(8)?;
    let (up, no_carrier) = (flags & IFF_UP != 0, flags & (IFF_UP | IFF_LOWER_UP) == IFF_UP);
    let mut link = Link { index: word(4)?, up, no_carrier, no_arp: flags & IFF_NOARP != 0, ..Link::default() };
    word(12)?;
    for attr in Attrs::after(body, HEADER) {
        match Ifla::from(attr.kind) {
            Ifla::Ifname => link.name = attr.text(),
            Ifla::Address => link.mac = attr.mac(),
            Ifla::Mtu => link.mtu = attr.u32().unwrap_or(0),
            // 0 is what the kernel reports for tunnels without a lower link.
            Ifla::Link => link.parent = attr.u32().filter(|index| *index != 0),
            Ifla::Master => link.master = attr.u32(),
            Ifla::Ifalias => link.alias = attr.text(),
            Ifla::Txqlen => link.queue = attr.u32().unwrap_or(0),
            Ifla::AfSpec => (link.forwards, link.conf6) = (forwards(attr), conf6(attr)),
            Ifla::Linkinfo => link.kind = attr.nested().find(IflaInfo::Kind).map(|kind| kind.text()),
            _ => {}
        }
    }
    Some(link)
}
