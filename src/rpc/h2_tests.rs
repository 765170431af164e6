use super::super::hpack;
use super::*;

const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_header(&mut out, payload.len(), kind, flags, stream);
    [&out, payload].concat()
}

fn block(list: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in list {
        hpack::encode(&mut block, name, value);
    }
    block
}

fn end_headers(stream: u32) -> Vec<u8> {
    frame(kind::HEADERS, flag::END_HEADERS, stream, &block(&[(":method", "POST")]))
}

/// A server that has seen a valid start, and had its own taken away.
fn server() -> Conn {
    let mut server = Conn::new(Role::Server);
    server.receive(&[PREFACE, &SETTINGS].concat());
    assert_eq!(server.next_event(), Ok(None));
    server.out.clear();
    server
}

fn events(conn: &mut Conn, bytes: &[u8]) -> Result<Vec<Event>, Fault> {
    conn.receive(bytes);
    let mut events = Vec::new();
    while let Some(event) = conn.next_event()? {
        events.push(event);
    }
    Ok(events)
}

/// Moves bytes between both ends until neither has any, and tells what came out at each.
fn settle(client: &mut Conn, server: &mut Conn) -> (Vec<Event>, Vec<Event>) {
    let (mut at_client, mut at_server) = (Vec::new(), Vec::new());
    while !client.out.is_empty() || !server.out.is_empty() {
        at_server.extend(events(server, &std::mem::take(&mut client.out)).unwrap());
        at_client.extend(events(client, &std::mem::take(&mut server.out)).unwrap());
    }
    (at_client, at_server)
}

#[test]
fn a_call_of_any_size_goes_there_and_back() {
    for size in [0, 1, FRAME_LIMIT, 65_535, 65_536, BODY_LIMIT] {
        let (mut client, mut server) = (Conn::new(Role::Client), Conn::new(Role::Server));
        for _ in 0..3 {
            let body = vec![7; size];
            let stream = client.request(&block(&[(":path", "/")]), body.clone()).unwrap();
            let (at_client, at_server) = settle(&mut client, &mut server);
            assert!(at_client.is_empty());
            let [Event::Opened { .. }, Event::Complete { body: got, .. }] = at_server.as_slice() else {
                panic!("{size}: {at_server:?}")
            };
            assert_eq!(got, &body);
            server.respond(stream, &block(&[(":status", "200")]), body.clone(), block(&[("grpc-status", "0")]));
            let (at_client, _) = settle(&mut client, &mut server);
            let [Event::Complete { head, body: got, trailers, .. }] = at_client.as_slice() else {
                panic!("{size}: {at_client:?}")
            };
            assert_eq!((got, head.len(), trailers.len()), (&body, 1, 1));
            assert!(server.idle() && client.streams.is_empty());
        }
    }
}

#[test]
fn a_large_header_is_continued() {
    let (mut client, mut server) = (Conn::new(Role::Client), Conn::new(Role::Server));
    let value = "v".repeat(40_000);
    client.request(&block(&[(":path", "/"), ("x", &value)]), vec![1]).unwrap();
    let (_, at_server) = settle(&mut client, &mut server);
    let Some(Event::Complete { head, .. }) = at_server.last() else { panic!("{at_server:?}") };
    assert_eq!(head[1].value, value.as_bytes());
}

#[test]
fn a_body_beyond_the_limit_is_told_once_and_the_connection_lives() {
    let (mut client, mut server) = (Conn::new(Role::Client), Conn::new(Role::Server));
    let stream = client.request(&block(&[(":path", "/")]), vec![7; BODY_LIMIT + 100_000]).unwrap();
    let (_, at_server) = settle(&mut client, &mut server);
    assert!(matches!(at_server.as_slice(), [Event::Opened { .. }, Event::TooLarge { .. }]), "{at_server:?}");
    server.respond_head(stream, &block(&[("grpc-status", "8")]));
    let (at_client, _) = settle(&mut client, &mut server);
    assert!(matches!(at_client.as_slice(), [Event::Complete { .. }]), "{at_client:?}");
    client.request(&block(&[(":path", "/")]), vec![7]).unwrap();
    let (_, at_server) = settle(&mut client, &mut server);
    assert!(matches!(at_server.last(), Some(Event::Complete { .. })), "{at_server:?}");
}

#[test]
fn an_answer_waits_for_the_window() {
    let mut server = server();
    let small_window = frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 10]);
    let request = frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 1, &block(&[(":method", "POST")]));
    assert_eq!(events(&mut server, &[small_window, request].concat()).unwrap().len(), 2);
    server.respond(1, &block(&[(":status", "200")]), vec![7; 25], block(&[("grpc-status", "0")]));
    assert!(!server.idle());
    let sent = |server: &mut Conn, bytes: &[u8]| {
        assert_eq!(events(server, bytes), Ok(vec![]));
        std::mem::take(&mut server.out).into_iter().map(|byte| usize::from(byte == 7)).sum::<usize>()
    };
    assert_eq!(sent(&mut server, &[]), 10);
    assert_eq!(sent(&mut server, &frame(kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 3])), 3);
    // Enlarging the initial window counts for streams that are open (RFC 9113 6.9.2).
    assert_eq!(sent(&mut server, &frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 12])), 2);
    assert_eq!(sent(&mut server, &frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0])), 0);
    assert_eq!(sent(&mut server, &frame(kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 12])), 0);
    assert_eq!(sent(&mut server, &frame(kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 10])), 10);
    assert!(server.idle());
}

#[test]
fn settings_and_pings_are_answered() {
    let mut server = server();
    assert_eq!(events(&mut server, &frame(kind::PING, 0, 0, b"12345678")), Ok(vec![]));
    assert_eq!(server.out, frame(kind::PING, flag::ACK, 0, b"12345678"));
    server.out.clear();
    assert_eq!(events(&mut server, &frame(kind::PING, flag::ACK, 0, b"12345678")), Ok(vec![]));
    assert!(server.out.is_empty());
    assert_eq!(events(&mut server, &frame(kind::SETTINGS, 0, 0, &[0, 99, 0, 0, 0, 1])), Ok(vec![]));
    assert_eq!(server.out, frame(kind::SETTINGS, flag::ACK, 0, &[]));
}

#[test]
fn padding_priority_and_unknown_frames_are_passed_by() {
    let mut server = server();
    let header = block(&[(":method", "POST")]);
    let padded = [&[2][..], &[0, 0, 0, 0, 9], &header, &[0, 0]].concat();
    let flags = flag::PADDED | flag::WITH_PRIORITY | flag::END_HEADERS;
    let bytes = [
        frame(0x77, 0xff, 5, b"unknown"),
        frame(kind::PRIORITY, 0, 9, &[0, 0, 0, 0, 1]),
        frame(kind::HEADERS, flags, 1, &padded),
        frame(kind::DATA, flag::PADDED, 1, &[3, b'a', 0, 0, 0]),
        frame(kind::DATA, 0, 1, b""),
        frame(kind::DATA, flag::END_STREAM, 1, b"b"),
    ]
    .concat();
    // Octet by octet: a frame may arrive in any pieces.
    let got: Vec<Event> = bytes.iter().flat_map(|byte| events(&mut server, &[*byte]).unwrap()).collect();
    let [Event::Opened { stream: 1 }, Event::Complete { stream: 1, head, body, trailers }] = got.as_slice() else {
        panic!("{got:?}")
    };
    assert_eq!((head.len(), body.as_slice(), trailers.len()), (1, &b"ab"[..], 0));
}

/// Each is the end of the connection with this code, and GOAWAY says so.
#[test]
fn violations_end_the_connection() {
    let check = |what: &str, bytes: &[Vec<u8>], expected: u32| {
        let mut server = server();
        let got = events(&mut server, &bytes.concat()).map_err(|fault| fault.code);
        assert_eq!(got.map(|_| ()), Err(expected), "{what}");
        let last = server.out.len() - 4;
        assert_eq!(server.out[last..], expected.to_be_bytes(), "{what}");
    };
    let long = vec![0; FRAME_LIMIT + 1];
    check("frame too large", &[frame(kind::DATA, 0, 1, &long)], code::FRAME_SIZE_ERROR);
    check("data on stream 0", &[frame(kind::DATA, 0, 0, b"x")], code::PROTOCOL_ERROR);
    check("data on an unopened stream", &[frame(kind::DATA, 0, 1, b"x")], code::PROTOCOL_ERROR);
    check("headers on stream 0", &[end_headers(0)], code::PROTOCOL_ERROR);
    check("headers on a stream of ours", &[end_headers(2)], code::PROTOCOL_ERROR);
    check("trailers without end", &[end_headers(1), end_headers(1)], code::PROTOCOL_ERROR);
    check("push", &[frame(kind::PUSH_PROMISE, flag::END_HEADERS, 1, &[0, 0, 0, 2])], code::PROTOCOL_ERROR);
    check("settings on a stream", &[frame(kind::SETTINGS, 0, 1, &[])], code::PROTOCOL_ERROR);
    check("settings of five octets", &[frame(kind::SETTINGS, 0, 0, &[0; 5])], code::FRAME_SIZE_ERROR);
    check("settings ack with payload", &[frame(kind::SETTINGS, flag::ACK, 0, &[0; 6])], code::FRAME_SIZE_ERROR);
    check("window setting", &[frame(kind::SETTINGS, 0, 0, &[0, 4, 128, 0, 0, 0])], code::FLOW_CONTROL_ERROR);
    check("frame size setting", &[frame(kind::SETTINGS, 0, 0, &[0, 5, 0, 0, 0, 1])], code::PROTOCOL_ERROR);
    check("push setting", &[frame(kind::SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 2])], code::PROTOCOL_ERROR);
    check("ping on a stream", &[frame(kind::PING, 0, 1, &[0; 8])], code::PROTOCOL_ERROR);
    check("ping of seven octets", &[frame(kind::PING, 0, 0, &[0; 7])], code::FRAME_SIZE_ERROR);
    check("goaway on a stream", &[frame(kind::GOAWAY, 0, 1, &[0; 8])], code::PROTOCOL_ERROR);
    check("goaway of seven octets", &[frame(kind::GOAWAY, 0, 0, &[0; 7])], code::FRAME_SIZE_ERROR);
    check("priority on stream 0", &[frame(kind::PRIORITY, 0, 0, &[0; 5])], code::PROTOCOL_ERROR);
    check("priority of four octets", &[frame(kind::PRIORITY, 0, 1, &[0; 4])], code::FRAME_SIZE_ERROR);
    check("reset of stream 0", &[frame(kind::RST_STREAM, 0, 0, &[0; 4])], code::PROTOCOL_ERROR);
    check("reset of an unopened stream", &[frame(kind::RST_STREAM, 0, 1, &[0; 4])], code::PROTOCOL_ERROR);
    check("reset of three octets", &[frame(kind::RST_STREAM, 0, 1, &[0; 3])], code::FRAME_SIZE_ERROR);
    check("window update of zero", &[frame(kind::WINDOW_UPDATE, 0, 0, &[0; 4])], code::PROTOCOL_ERROR);
    check("window update, unopened", &[frame(kind::WINDOW_UPDATE, 0, 3, &[0, 0, 0, 1])], code::PROTOCOL_ERROR);
    check("window update of three octets", &[frame(kind::WINDOW_UPDATE, 0, 0, &[0; 3])], code::FRAME_SIZE_ERROR);
    let most = frame(kind::WINDOW_UPDATE, 0, 0, &[127, 255, 255, 255]);
    check("window overflow", &[most], code::FLOW_CONTROL_ERROR);
    let most = frame(kind::WINDOW_UPDATE, 0, 1, &[127, 255, 255, 255]);
    check("window overflow of a stream", &[end_headers(1), most], code::FLOW_CONTROL_ERROR);
    check("continuation alone", &[frame(kind::CONTINUATION, 0, 1, b"")], code::PROTOCOL_ERROR);
    let start = frame(kind::HEADERS, 0, 1, b"");
    check("header interrupted", &[start.clone(), frame(kind::PING, 0, 0, &[0; 8])], code::PROTOCOL_ERROR);
    check("continued elsewhere", &[start.clone(), frame(kind::CONTINUATION, 0, 3, b"")], code::PROTOCOL_ERROR);
    let flood = frame(kind::CONTINUATION, 0, 1, b"").repeat(33);
    check("continuation flood", &[start.clone(), flood], code::ENHANCE_YOUR_CALM);
    let large = frame(kind::CONTINUATION, 0, 1, &vec![0; FRAME_LIMIT]).repeat(5);
    check("header block too large", &[start, large], code::ENHANCE_YOUR_CALM);
    let bad = frame(kind::HEADERS, flag::END_HEADERS, 1, &[0x80]);
    check("hpack", &[bad], code::COMPRESSION_ERROR);
    let bomb = [&hpack_entry()[..], &[0xbe; 100]].concat();
    let bomb = frame(kind::HEADERS, flag::END_HEADERS, 1, &bomb);
    check("hpack bomb", &[bomb], code::COMPRESSION_ERROR);
    check("padding", &[end_headers(1), frame(kind::DATA, flag::PADDED, 1, &[2, 0])], code::PROTOCOL_ERROR);
    check("no padding length", &[end_headers(1), frame(kind::DATA, flag::PADDED, 1, b"")], code::FRAME_SIZE_ERROR);
    check("no priority", &[frame(kind::HEADERS, flag::WITH_PRIORITY, 1, b"1234")], code::FRAME_SIZE_ERROR);
    let pings = frame(kind::PING, 0, 0, &[0; 8]).repeat(10_001);
    check("ping flood", &[pings], code::ENHANCE_YOUR_CALM);
    let resets: Vec<Vec<u8>> =
        (0..6000).flat_map(|n| [end_headers(2 * n + 1), frame(kind::RST_STREAM, 0, 2 * n + 1, &[0; 4])]).collect();
    check("rapid reset", &resets, code::ENHANCE_YOUR_CALM);
    let empty = frame(kind::DATA, 0, 1, b"").repeat(10_001);
    check("empty data flood", &[end_headers(1), empty], code::ENHANCE_YOUR_CALM);
}

/// A literal of 3 KiB with indexing.
fn hpack_entry() -> Vec<u8> {
    let mut block = vec![0x40, 1, b'a', 0x7f, 0x81, 0x17];
    block.extend(std::iter::repeat_n(b'x', 3072));
    block
}

#[test]
fn more_data_than_the_window_ends_the_connection() {
    // Credit is given while frames are taken, so only a window made small by hand can be overrun.
    let mut server = server();
    server.receive_window = 10;
    let bytes = [end_headers(1), frame(kind::DATA, 0, 1, &[0; 11])].concat();
    assert_eq!(events(&mut server, &bytes).unwrap_err().code, code::FLOW_CONTROL_ERROR);
}

#[test]
fn a_wrong_start_ends_the_connection() {
    for bytes in [&b"GET / HTTP/1.1\r\n"[..], b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\x00"] {
        let mut server = Conn::new(Role::Server);
        assert_eq!(events(&mut server, bytes).unwrap_err().code, code::PROTOCOL_ERROR);
    }
    for first in [frame(kind::PING, 0, 0, &[0; 8]), frame(kind::SETTINGS, flag::ACK, 0, &[])] {
        let mut server = Conn::new(Role::Server);
        assert_eq!(events(&mut server, &[PREFACE, &first].concat()).unwrap_err().code, code::PROTOCOL_ERROR);
    }
}

#[test]
fn streams_beyond_the_limit_are_refused_one_by_one() {
    let mut server = server();
    assert_eq!(events(&mut server, &frame(kind::SETTINGS, flag::ACK, 0, &[])), Ok(vec![]));
    for n in 0..16 {
        assert_eq!(events(&mut server, &end_headers(2 * n + 1)), Ok(vec![Event::Opened { stream: 2 * n + 1 }]));
    }
    assert_eq!(events(&mut server, &end_headers(33)), Ok(vec![]));
    assert_eq!(server.out, frame(kind::RST_STREAM, 0, 33, &code::REFUSED_STREAM.to_be_bytes()));
    // What is still on its way for the refused stream does no harm.
    assert_eq!(events(&mut server, &frame(kind::DATA, flag::END_STREAM, 33, b"x")), Ok(vec![]));
    // Room again.
    assert_eq!(
        events(&mut server, &frame(kind::RST_STREAM, 0, 1, &code::CANCEL.to_be_bytes())),
        Ok(vec![Event::Reset { stream: 1, code: code::CANCEL }])
    );
    assert_eq!(events(&mut server, &end_headers(35)), Ok(vec![Event::Opened { stream: 35 }]));
}

#[test]
fn data_behind_the_end_closes_the_stream_only() {
    let mut server = server();
    let data = |flags| frame(kind::DATA, flags, 1, b"x");
    let bytes = [end_headers(1), data(flag::END_STREAM), data(0)].concat();
    let got = events(&mut server, &bytes).unwrap();
    assert_eq!(got.last(), Some(&Event::Reset { stream: 1, code: code::STREAM_CLOSED }));
    assert_eq!(events(&mut server, &end_headers(3)), Ok(vec![Event::Opened { stream: 3 }]));
}

#[test]
fn a_client_refuses_what_no_server_may_send() {
    let check = |what: &str, bytes: &[u8], expected: u32| {
        let mut client = Conn::new(Role::Client);
        client.request(&block(&[(":path", "/")]), vec![1]).unwrap();
        let got = events(&mut client, &[&SETTINGS, bytes].concat());
        assert_eq!(got.map_err(|fault| fault.code).map(|_| ()), Err(expected), "{what}");
    };
    check("headers on a stream that was not opened", &end_headers(3), code::PROTOCOL_ERROR);
    check("data before headers", &frame(kind::DATA, 0, 1, b"x"), code::PROTOCOL_ERROR);
    check("push", &frame(kind::PUSH_PROMISE, 0, 1, &[0; 4]), code::PROTOCOL_ERROR);
    check("push enabled", &frame(kind::SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 1]), code::PROTOCOL_ERROR);
}

#[test]
fn a_client_waits_through_informational_answers_and_heeds_goaway() {
    let mut client = Conn::new(Role::Client);
    client.request(&block(&[(":path", "/")]), vec![1]).unwrap();
    let early = frame(kind::HEADERS, flag::END_HEADERS, 1, &block(&[(":status", "103")]));
    let flags = flag::END_HEADERS | flag::END_STREAM;
    let answer = frame(kind::HEADERS, flags, 1, &block(&[(":status", "200")]));
    let goaway = frame(kind::GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0]);
    let got = events(&mut client, &[&SETTINGS[..], &early, &goaway, &answer].concat()).unwrap();
    let [Event::GoAway { last_stream: 1, code: 0 }, Event::Complete { head, .. }] = got.as_slice() else {
        panic!("{got:?}")
    };
    assert_eq!(head[0].value, b"200");
    assert_eq!(client.request(&block(&[(":path", "/")]), vec![1]), None);
}
