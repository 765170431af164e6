//! The dozen system calls that the standard library does not offer, behind safe functions. The only `unsafe` of the
//! program, but for what stands in `lean` in place of other people's functions.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

// Not where a panic unwinds, as in tests, which are no releases; the tests of the functions themselves export none.
#[cfg(all(any(test, all(lean, panic = "abort")), any(target_arch = "x86_64", target_arch = "aarch64")))]
mod lean;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Moves the calling thread into the network namespace that `namespace` is open on. The thread should end soon after:
/// use [`in_netns`] unless it does.
pub fn enter_netns(namespace: impl AsFd) -> io::Result<()> {
    // SAFETY: setns takes a descriptor, which is open for as long as the borrow lives, and touches no memory.
    match check(unsafe { libc::setns(namespace.as_fd().as_raw_fd(), libc::CLONE_NEWNET) }) {
        // The daemon's container has no CAP_SYS_ADMIN, and without it the kernel refuses even the namespace that the thread is
        // in (`netns_install`, net/core/net_namespace.c).
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let wanted = format!("/proc/self/fd/{}", namespace.as_fd().as_raw_fd());
            if same_namespace(Path::new(&wanted), Path::new("/proc/thread-self/ns/net"))? { Ok(()) } else { Err(error) }
        }
        entered => entered.map(drop),
    }
}

/// Runs `work` on a thread of its own inside the network namespace. Sockets opened there stay in that namespace for good,
/// so that nothing has to switch back.
pub fn in_netns<T: Send>(namespace: impl AsFd + Sync, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let worker = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
            enter_netns(&namespace)?;
            Ok(work())
        })?;
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Gives the calling thread a fresh network namespace of its own.
pub fn unshare_netns() -> io::Result<()> {
    // SAFETY: unshare takes flags only.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).map(drop)
}

/// Whether two paths are the same network namespace: same device and inode.
pub fn same_namespace(one: &Path, other: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let (one, other) = (std::fs::metadata(one)?, std::fs::metadata(other)?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

/// Takes the exclusive advisory lock of an open file; waits for it. It goes with the file.
pub fn lock_exclusive(file: &File) -> io::Result<()> {
    // SAFETY: flock takes an open descriptor and flags.
    check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) }).map(drop)
}

/// Time since the system was started, without the time that it slept: the same for all processes, and never set back.
pub fn monotonic() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to one live, writable timespec. The clock is always there, so that nothing can fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Random bytes from the kernel.
pub fn random_bytes(buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        let rest = &mut buffer[filled..];
        // SAFETY: pointer and length are those of one live, writable slice.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(count) => filled += count,
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

/// Blocks SIGTERM, SIGINT and SIGHUP in the calling thread and all that it starts later, so that [`wait_signal`] gets them.
pub fn block_signals() -> io::Result<()> {
    let set = signal_set();
    // SAFETY: `set` is initialised; the old mask is not asked for.
    let errno = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
}

/// Waits for one of the blocked signals, at most `timeout`; `None` when none came.
pub fn wait_signal(timeout: Duration) -> io::Result<Option<i32>> {
    let set = signal_set();
    let limit = libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(timeout.subsec_nanos()),
    };
    // SAFETY: both pointers are to live, initialised values; no siginfo is asked for.
    let signal = unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const limit) };
    match check(signal) {
        Ok(signal) => Ok(Some(signal)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Ok(None),
        Err(error) => Err(error),
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT does not end the process: calls that block fail with `EINTR`, and [`interrupted`] tells why.
pub fn catch_interrupt() -> io::Result<()> {
    extern "C" fn note(_: libc::c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    // SAFETY: all bytes zero are a valid value: an empty mask, and no flags, so that calls are not begun again.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = note as *const () as libc::sighandler_t;
    // SAFETY: the pointer is to a live, initialised value; the function it names lives for ever and does nothing but store
    // a flag, which any moment allows.
    check(unsafe { libc::sigaction(libc::SIGINT, &raw const action, std::ptr::null_mut()) }).map(drop)
}

/// Whether SIGINT came since [`catch_interrupt`].
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

fn signal_set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set before it is read; the signal numbers are valid.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

/// User and process id of the peer of a unix socket.
pub fn peer_credentials(socket: impl AsFd) -> io::Result<(u32, i32)> {
    let mut credentials = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = libc::socklen_t::try_from(size_of::<libc::ucred>()).unwrap_or(0);
    // SAFETY: `credentials` is a live ucred and `length` its size, as SO_PEERCRED wants.
    check(unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    })?;
    Ok((credentials.uid, credentials.pid))
}

/// Sets how long a read on the socket may block; zero blocks for ever. For sockets the standard library does not know.
pub fn set_receive_timeout(socket: impl AsFd, timeout: Duration) -> io::Result<()> {
    set_socket_timeout(socket, libc::SO_RCVTIMEO, timeout)
}

fn set_socket_timeout(socket: impl AsFd, option: libc::c_int, timeout: Duration) -> io::Result<()> {
    let value = libc::timeval {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_usec: libc::suseconds_t::from(timeout.subsec_micros()),
    };
    // SAFETY: pointer and length are those of one live timeval.
    check(unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            libc::socklen_t::try_from(size_of::<libc::timeval>()).unwrap_or(0),
        )
    })
    .map(drop)
}

/// Shuts a socket down in both directions. On a listening socket this wakes the thread that is blocked in `accept`.
pub fn shutdown(socket: impl AsFd) -> io::Result<()> {
    // SAFETY: shutdown takes an open descriptor and a flag.
    check(unsafe { libc::shutdown(socket.as_fd().as_raw_fd(), libc::SHUT_RDWR) }).map(drop)
}

/// The effective user id.
pub fn effective_uid() -> u32 {
    // SAFETY: geteuid cannot fail and touches no memory.
    unsafe { libc::geteuid() }
}

/// Connects a stream socket to a unix socket; waits at most `timeout` while the listener's backlog is full, and then fails
/// with `EAGAIN`. The time-out stays on the socket for writes. For [`std::os::unix::net::UnixStream`], which cannot.
pub fn connect_unix(path: &Path, timeout: Duration) -> io::Result<OwnedFd> {
    use std::os::unix::ffi::OsStrExt;
    let bytes = path.as_os_str().as_bytes();
    let mut address = libc::sockaddr_un { sun_family: 0, sun_path: [0; 108] };
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).unwrap_or(0);
    // One byte stays zero, and a zero byte inside would end the name or make it abstract.
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "socket path is empty or longer than 107 bytes"));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    // SAFETY: socket takes numbers only.
    let fd = check(unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor was just made and has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    set_socket_timeout(&socket, libc::SO_SNDTIMEO, timeout)?;
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).unwrap_or(0);
    // SAFETY: pointer and length are those of one live, initialised sockaddr_un.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}

/// Connects a TCP socket from an address of one's own, within `timeout`; it stays on the socket for writes. For
/// [`std::net::TcpStream`], which cannot bind before it connects.
#[cfg(feature = "sandbox")]
pub fn connect_tcp_from(
    source: std::net::IpAddr,
    target: std::net::SocketAddr,
    timeout: Duration,
) -> io::Result<OwnedFd> {
    let (near, length) = raw_address((source, 0).into());
    let (far, _) = raw_address(target);
    let family = i32::from(near.ss_family);
    // SAFETY: socket takes numbers only.
    let fd = check(unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor was just made and has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // It bounds connect as well (socket(7)).
    set_socket_timeout(&socket, libc::SO_SNDTIMEO, timeout)?;
    // SAFETY: pointer and length are those of one live address of that family.
    check(unsafe { libc::bind(fd, (&raw const near).cast(), length) })?;
    // SAFETY: as above; both addresses must be of one family, or the kernel refuses the second.
    match check(unsafe { libc::connect(fd, (&raw const far).cast(), length) }) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Err(io::ErrorKind::TimedOut.into()),
        result => result.map(|_| socket),
    }
}

/// A socket address as the kernel reads it, and its length.
#[cfg(feature = "sandbox")]
fn raw_address(address: std::net::SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: all bytes zero are a valid value of this struct of integers.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let length = match address {
        std::net::SocketAddr::V4(v4) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or(0),
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: the storage is larger than, and aligned for, every socket address.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(raw) };
            size_of::<libc::sockaddr_in>()
        }
        std::net::SocketAddr::V6(v6) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::sa_family_t::try_from(libc::AF_INET6).unwrap_or(0),
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(raw) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, libc::socklen_t::try_from(length).unwrap_or(0))
}

/// The descriptor of a netlink socket, which the library keeps to itself.
pub fn netlink_fd(socket: &neli::socket::NlSocket) -> std::os::fd::BorrowedFd<'_> {
    // SAFETY: the socket owns the descriptor and closes it when dropped, which the borrow outlives.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

/// Sets a socket option whose value is an integer.
pub fn set_int_option(socket: impl AsFd, level: i32, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: pointer and length are those of one live integer.
    check(unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            libc::socklen_t::try_from(size_of::<i32>()).unwrap_or(0),
        )
    })
    .map(drop)
}

/// How an instruction of a socket's filter compares the byte that was loaded last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// It is that.
    Equal,
    /// It is that or more.
    AtLeast,
    /// It is more.
    Above,
    /// One of these bits is set.
    Any,
}

/// One instruction of a socket's filter (classic BPF, `linux/filter.h`).
#[derive(Clone, Copy, Debug)]
pub struct Instruction(libc::sock_filter);

impl Instruction {
    fn new(code: u32, k: u32, jt: u8, jf: u8) -> Instruction {
        // All codes are of eight bits.
        Instruction(libc::sock_filter { code: u16::try_from(code).unwrap_or(0), jt, jf, k })
    }

    /// Loads the byte at this place of the datagram. One that is shorter does not pass.
    pub fn load_byte(at: u32) -> Instruction {
        Instruction::new(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, at, 0, 0)
    }

    /// Leaves out this many instructions, by whether the test holds.
    pub fn test(test: Test, value: u32, holds: u8, fails: u8) -> Instruction {
        let test = match test {
            Test::Equal => libc::BPF_JEQ,
            Test::AtLeast => libc::BPF_JGE,
            Test::Above => libc::BPF_JGT,
            Test::Any => libc::BPF_JSET,
        };
        Instruction::new(libc::BPF_JMP | test | libc::BPF_K, value, holds, fails)
    }

    /// Lets the datagram pass, or not.
    pub fn end(pass: bool) -> Instruction {
        Instruction::new(libc::BPF_RET | libc::BPF_K, if pass { u32::MAX } else { 0 }, 0, 0)
    }
}

/// From now on the socket gets only datagrams that the program lets pass; of the others nothing is told. The kernel refuses a
/// program that could run on for ever or beyond its end.
pub fn set_filter(socket: impl AsFd, program: &[Instruction]) -> io::Result<()> {
    let mut program = program.iter().map(|instruction| instruction.0).collect::<Vec<_>>();
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    // SAFETY: pointer and length are those of one live sock_fprog, which holds those of a live list that the kernel copies.
    check(unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            libc::socklen_t::try_from(size_of::<libc::sock_fprog>()).unwrap_or(0),
        )
    })
    .map(drop)
}

/// Reads a socket option of any form. `buffer` holds what the option wants to be asked with, and afterwards the answer, whose
/// length is returned.
pub fn get_option(socket: impl AsFd, level: i32, option: i32, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(buffer.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: pointer and length are those of one live, writable slice; the kernel writes at most so many bytes.
    check(unsafe {
        libc::getsockopt(socket.as_fd().as_raw_fd(), level, option, buffer.as_mut_ptr().cast(), &raw mut length)
    })?;
    usize::try_from(length).map(|length| length.min(buffer.len())).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// A raw socket, which is how `iptables-legacy` and `ip6tables-legacy` ask the kernel for their tables; needs CAP_NET_RAW.
pub fn raw_socket(v6: bool) -> io::Result<OwnedFd> {
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    // SAFETY: socket takes numbers only.
    let fd = check(unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) })?;
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Counters that a link's driver keeps beside the kernel's, by name, in the calling thread's namespace (`linux/ethtool.h`). None of a
/// driver that has more than 8,192; an error if it has none, or the link is not there.
pub fn driver_counters(link: &str) -> io::Result<Vec<(String, u64)>> {
    const COUNT_MAX: usize = 8192;
    // ETHTOOL_GSSET_INFO, ETHTOOL_GSTRINGS and ETHTOOL_GSTATS; ETH_SS_STATS, and the same as a bit.
    const COUNT: [u32; 4] = [0x37, 0, 1 << 1, 0];
    const NAMES: [u32; 2] = [0x1b, 1];
    const VALUES: u32 = 0x1d;
    const NAME: usize = 32;
    // SAFETY: socket takes numbers only.
    let fd = check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor was just made and has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let ask = |question: &[u32], count: usize, each: usize| {
        let mut buffer: Vec<u8> = question.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let head = buffer.len();
        // The kernel writes as much as the driver has by now, which may be more than it had when it was asked.
        buffer.resize(head + (count + COUNT_MAX) * each, 0);
        // SAFETY: an ifreq of zeros is one.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(link.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request.ifr_ifru.ifru_data = buffer.as_mut_ptr().cast();
        // SAFETY: name and buffer outlive the call, and the buffer has room for thousands of counters more than there were.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), 0x8946, &raw mut request) })?; // SIOCETHTOOL
        Ok::<_, io::Error>(buffer.split_off(head))
    };
    let count = ask(&COUNT, 1, 4)?.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
    let total = usize::try_from(count).unwrap_or(usize::MAX);
    if total > COUNT_MAX {
        return Ok(Vec::new());
    }
    let (names, values) = (ask(&[NAMES[0], NAMES[1], count], total, NAME)?, ask(&[VALUES, count], total, 8)?);
    let name =
        |bytes: &[u8]| String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
    let value = |bytes: &[u8]| bytes.first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
    Ok(names.chunks(NAME).map(name).zip(values.chunks(8).map(value)).take(total).collect())
}

/// A raw socket for ICMP of a family; needs CAP_NET_RAW.
#[cfg(feature = "sandbox")]
pub fn icmp_socket(v6: bool) -> io::Result<OwnedFd> {
    let (family, proto) = if v6 { (libc::AF_INET6, libc::IPPROTO_ICMPV6) } else { (libc::AF_INET, libc::IPPROTO_ICMP) };
    // SAFETY: socket takes numbers only.
    let fd = check(unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, proto) })?;
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor to wait for, and what for.
pub struct Wanted<'a> {
    /// The descriptor.
    pub fd: BorrowedFd<'a>,
    /// Something can be read, or the end.
    pub read: bool,
    /// Something can be written.
    pub write: bool,
}

/// What a descriptor is ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// A read does not block.
    pub read: bool,
    /// A write does not block.
    pub write: bool,
    /// The other end is closed, or the descriptor broken; told without being asked for.
    pub gone: bool,
}

/// Waits until one of the descriptors is ready, at most `timeout` (rounded up to a millisecond) or for ever; tells how it is
/// with each. All false: the time is over, or a signal came.
pub fn poll(wanted: &[Wanted<'_>], timeout: Option<std::time::Duration>) -> io::Result<Vec<Ready>> {
    let entry = |wanted: &Wanted<'_>| libc::pollfd {
        fd: wanted.fd.as_raw_fd(),
        events: if wanted.read { libc::POLLIN } else { 0 } | if wanted.write { libc::POLLOUT } else { 0 },
        revents: 0,
    };
    let mut polled: Vec<libc::pollfd> = wanted.iter().map(entry).collect();
    let limit = timeout.map_or(-1, |timeout| {
        libc::c_int::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(libc::c_int::MAX)
    });
    let count = libc::nfds_t::try_from(polled.len()).unwrap_or(0);
    // SAFETY: pointer and count are those of one live, writable vector.
    match check(unsafe { libc::poll(polled.as_mut_ptr(), count, limit) }) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(vec![Ready::default(); wanted.len()]),
        Err(error) => Err(error),
        Ok(_) => {
            let ready = |fd: &libc::pollfd| Ready {
                read: fd.revents & libc::POLLIN != 0,
                write: fd.revents & libc::POLLOUT != 0,
                gone: fd.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0,
            };
            Ok(polled.iter().map(ready).collect())
        }
    }
}

/// Waits until one of the descriptors can be read or is broken, at most `timeout` (rounded up to a millisecond); tells for
/// each whether it is. All false: the time is over.
pub fn poll_readable(fds: &[BorrowedFd<'_>], timeout: Duration) -> io::Result<Vec<bool>> {
    let wanted: Vec<Wanted<'_>> = fds.iter().map(|fd| Wanted { fd: *fd, read: true, write: false }).collect();
    Ok(poll(&wanted, Some(timeout))?.iter().map(|ready| ready.read || ready.gone).collect())
}

/// Whether an open file lies on nsfs or procfs, the two file systems that namespaces are opened from (`linux/magic.h`).
pub fn is_on_nsfs_or_procfs(file: &File) -> io::Result<bool> {
    const NSFS_MAGIC: i64 = 0x6e73_6673;
    const PROC_SUPER_MAGIC: i64 = 0x9fa0;
    let mut status = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: fstatfs takes an open descriptor and fills the structure when it succeeds, and only then it is read.
    let magic = unsafe {
        check(libc::fstatfs(file.as_raw_fd(), status.as_mut_ptr()))?;
        status.assume_init().f_type
    };
    #[allow(clippy::unnecessary_cast, clippy::cast_possible_wrap, reason = "the width of f_type differs by target")]
    let magic = magic as i64;
    Ok(matches!(magic, NSFS_MAGIC | PROC_SUPER_MAGIC))
}

fn c_path(path: &Path) -> io::Result<std::ffi::CString> {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Gives the calling thread, and what it starts later, a mount namespace of its own: what is mounted there shows nowhere
/// else.
pub fn unshare_mounts() -> io::Result<()> {
    // SAFETY: unshare takes flags only.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    mount(None, Path::new("/"), None, libc::MS_REC | libc::MS_PRIVATE)
}

/// Mounts an empty file system in memory on `target`.
pub fn mount_tmpfs(target: &Path) -> io::Result<()> {
    mount(Some(Path::new("tmpfs")), target, Some("tmpfs"), 0)
}

/// Makes `target` show what `source` is (`mount --bind`).
pub fn bind_mount(source: &Path, target: &Path) -> io::Result<()> {
    mount(Some(source), target, None, libc::MS_BIND)
}

fn mount(source: Option<&Path>, target: &Path, kind: Option<&str>, flags: libc::c_ulong) -> io::Result<()> {
    let source = source.map(c_path).transpose()?;
    let target = c_path(target)?;
    let kind = kind.map(|kind| c_path(Path::new(kind))).transpose()?;
    let pointer = |text: &Option<std::ffi::CString>| text.as_ref().map_or(std::ptr::null(), |text| text.as_ptr());
    // SAFETY: every pointer is null or to a live C string; nothing here takes data.
    check(unsafe { libc::mount(pointer(&source), target.as_ptr(), pointer(&kind), flags, std::ptr::null()) }).map(drop)
}

/// Takes a mount away at once; it vanishes when its last user closes it (`umount --lazy`).
pub fn unmount_lazily(target: &Path) -> io::Result<()> {
    let target = c_path(target)?;
    // SAFETY: the path is a live C string.
    check(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) }).map(drop)
}

/// Moves the calling thread into the mount namespace that `namespace` is open on. Its root and working directory become
/// those of that namespace.
pub fn enter_mounts(namespace: impl AsFd) -> io::Result<()> {
    // SAFETY: unshare takes flags only; a thread that shares these attributes with others may not change namespace.
    check(unsafe { libc::unshare(libc::CLONE_FS) })?;
    // SAFETY: setns takes a descriptor, which is open for as long as the borrow lives, and touches no memory.
    check(unsafe { libc::setns(namespace.as_fd().as_raw_fd(), libc::CLONE_NEWNS) }).map(drop)
}

/// Makes a command start inside these namespaces (network, mount, ...), and end with the thread that starts it.
pub fn start_inside(command: &mut std::process::Command, namespaces: Vec<OwnedFd>) {
    use std::os::unix::process::CommandExt;
    let enter = move || {
        for namespace in &namespaces {
            // SAFETY: the closure owns the descriptor; 0 takes a namespace of any kind.
            check(unsafe { libc::setns(namespace.as_raw_fd(), 0) })?;
        }
        // SAFETY: prctl takes two numbers here and touches no memory.
        check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }).map(drop)
    };
    // SAFETY: between fork and exec the closure makes async-signal-safe system calls only and allocates nothing; an error
    // it returns carries a number only.
    unsafe { command.pre_exec(enter) };
}

/// Lets this process, and what it starts from now on, open as many files as it may at most. The usual limit of 1,024 is lower for
/// the sake of programs that call select(2).
pub fn open_many_files() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes to the struct, which outlives the call, and keeps no pointer to it.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the kernel reads the struct, which outlives the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }).map(drop)
}

/// Sends a signal to one process.
pub fn signal(process: u32, signal: i32) -> io::Result<()> {
    let process = i32::try_from(process).ok().filter(|process| *process > 1).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: kill takes two numbers; a positive one means this one process and no group.
    check(unsafe { libc::kill(process, signal) }).map(drop)
}
