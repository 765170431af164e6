//! The server besieged: peers that are silent, torn, loud or greedy keep nobody else from being served.

use super::*;
use crate::sys;

/// Ends a siege whatever happens to those besieged.
struct Lifted<'a>(&'a AtomicBool);

impl Drop for Lifted<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Peers of one kind, many at a time, who never let go; others are served all the while.
fn besieged(what: &str, connections: usize, siege: impl Fn(&mut UnixStream, usize) + Sync) {
    let options = BindOptions { instant: &[path::HEALTH_CHECK], ..BindOptions::default() };
    let server = Running::start(options);
    // Both ends are files of this process.
    sys::open_many_files().unwrap();
    let over = AtomicBool::new(false);
    let longest = std::thread::scope(|scope| {
        let _lifted = Lifted(&over);
        let besiegers: Vec<_> = (0..4)
            .map(|part| {
                let (server, siege, over) = (&server, &siege, &over);
                scope.spawn(move || {
                    let mut held = std::collections::VecDeque::new();
                    let mut n = part;
                    while !over.load(Ordering::Relaxed) {
                        let Ok(mut stream) = UnixStream::connect(&server.socket) else { continue };
                        stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
                        siege(&mut stream, n);
                        n += 4;
                        held.push_back(stream);
                        if held.len() > connections / 4 {
                            held.pop_front();
                        }
                        std::thread::sleep(Duration::from_micros(200)); // the machine is not the target
                    }
                    n / 4
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(300));
        let mut longest = Duration::ZERO;
        for _ in 0..10 {
            let before = clock::instant();
            server.check_alive();
            let mut client = server.connect();
            let reply: AddNetworkReply = client.call(path::ADD_NETWORK, &add("pod", 0), PATIENCE).unwrap();
            assert_eq!(reply.pod_eni_mac, "pod");
            longest = longest.max(before.elapsed());
        }
        over.store(true, Ordering::Relaxed);
        let came: usize = besiegers.into_iter().map(|thread| thread.join().unwrap()).sum();
        println!("{what}: {came} connections, at most {connections} at a time; others were served within {longest:?}");
        longest
    });
    assert!(longest < PATIENCE / 2, "{what}: {longest:?}");
}

/// Writes until the server has had enough; at most so many times.
fn pour(stream: &mut UnixStream, bytes: &[u8], times: usize) {
    for _ in 0..times {
        if stream.write_all(bytes).is_err() {
            return;
        }
    }
}

#[test]
fn hostile_peers_do_not_keep_others_from_being_served() {
    // More than the server takes.
    assert!(BindOptions::default().connections < 400);
    besieged("silent or torn", 400, |stream, n| {
        let whole = [start(), request(1, "9S", &add("a", 0).encode())].concat();
        pour(stream, &whole[..n % (whole.len() - 1)], 1);
    });
    let settings = [start(), frame(4, 0, 0, &[0, 4, 0, 1, 0, 0]).repeat(900)].concat();
    besieged("settings", 100, |stream, _| pour(stream, &settings, 1));
    let pings = frame(6, 0, 0, &[7; 8]).repeat(900);
    besieged("pings", 100, |stream, _| {
        pour(stream, &start(), 1);
        pour(stream, &pings, 20);
    });
    let opened = head(&[(":method", "POST"), (":path", path::ADD_NETWORK), ("content-type", "application/grpc")]);
    let resets: Vec<u8> = (0..6000u32)
        .flat_map(|n| [frame(1, 4, 2 * n + 1, &opened), frame(3, 0, 2 * n + 1, &[0, 0, 0, 8])].concat())
        .collect();
    besieged("rapid reset", 100, |stream, _| {
        pour(stream, &start(), 1);
        pour(stream, &resets, 1);
    });
    // The same with requests that are complete, each of which would run for a while.
    let message = add("slow", 20).encode();
    let abandoned: Vec<u8> = (0..500u32)
        .flat_map(|n| {
            let body = [&[0, 0, 0, 0, u8::try_from(message.len()).unwrap()][..], &message].concat();
            let stream = 2 * n + 1;
            [frame(1, 4, stream, &opened), frame(0, 1, stream, &body), frame(3, 0, stream, &[0, 0, 0, 8])].concat()
        })
        .collect();
    besieged("complete and reset", 16, |stream, _| {
        pour(stream, &start(), 1);
        pour(stream, &abandoned, 1);
    });
    let header = frame(1, 0, 1, &vec![0x82; FRAME_LIMIT]);
    let more = frame(9, 0, 1, &vec![0x82; FRAME_LIMIT]);
    besieged("endless headers", 100, |stream, _| {
        pour(stream, &[&start()[..], &header].concat(), 1);
        pour(stream, &more, 20);
    });
    let body = frame(0, 0, 1, &vec![0; FRAME_LIMIT]);
    besieged("unfinished bodies", 100, |stream, _| {
        pour(stream, &[start(), frame(1, 4, 1, &opened)].concat(), 1);
        pour(stream, &body, 40);
    });
}
