use super::*;
use proptest::prelude::*;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|d| u8::try_from(d).unwrap()).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

fn fields(list: &[(&str, &str)]) -> Vec<Field> {
    list.iter().map(|(name, value)| Field { name: (*name).into(), value: (*value).into() }).collect()
}

/// A header block in hexadecimal, its fields, and the size of the table after it.
type Example<'a> = (&'a str, &'a [(&'a str, &'a str)], usize);

/// Decodes blocks one after the other; after each the list and the table's size must be as told.
fn check(decoder: &mut Decoder, blocks: &[Example<'_>]) {
    for (block, expected, size) in blocks {
        assert_eq!(decoder.decode(&hex(block), 65_536), Ok(fields(expected)), "{block}");
        assert_eq!(decoder.size, *size, "table after {block}");
    }
}

const GET: &[(&str, &str)] =
    &[(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")];
const GET_UNCACHED: &[(&str, &str)] = &[
    (":method", "GET"),
    (":scheme", "http"),
    (":path", "/"),
    (":authority", "www.example.com"),
    ("cache-control", "no-cache"),
];
const GET_INDEX: &[(&str, &str)] = &[
    (":method", "GET"),
    (":scheme", "https"),
    (":path", "/index.html"),
    (":authority", "www.example.com"),
    ("custom-key", "custom-value"),
];

#[test]
fn rfc_7541_c2_single_fields() {
    let mut decoder = Decoder::new();
    check(
        &mut decoder,
        &[
            (
                "400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572",
                &[("custom-key", "custom-header")],
                55,
            ),
            ("040c 2f73 616d 706c 652f 7061 7468", &[(":path", "/sample/path")], 55),
            ("1008 7061 7373 776f 7264 0673 6563 7265 74", &[("password", "secret")], 55),
            ("82", &[(":method", "GET")], 55),
        ],
    );
}

#[test]
fn rfc_7541_c3_requests_without_huffman() {
    check(
        &mut Decoder::new(),
        &[
            ("8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d", GET, 57),
            ("8286 84be 5808 6e6f 2d63 6163 6865", GET_UNCACHED, 110),
            ("8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65", GET_INDEX, 164),
        ],
    );
}

#[test]
fn rfc_7541_c4_requests_with_huffman() {
    check(
        &mut Decoder::new(),
        &[
            ("8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff", GET, 57),
            ("8286 84be 5886 a8eb 1064 9cbf", GET_UNCACHED, 110),
            ("8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf", GET_INDEX, 164),
        ],
    );
}

const DATE: &str = "Mon, 21 Oct 2013 20:13:21 GMT";
const FOUND: &[(&str, &str)] =
    &[(":status", "302"), ("cache-control", "private"), ("date", DATE), ("location", "https://www.example.com")];
const MOVED: &[(&str, &str)] =
    &[(":status", "307"), ("cache-control", "private"), ("date", DATE), ("location", "https://www.example.com")];
const COOKIE: &[(&str, &str)] = &[
    (":status", "200"),
    ("cache-control", "private"),
    ("date", "Mon, 21 Oct 2013 20:13:22 GMT"),
    ("location", "https://www.example.com"),
    ("content-encoding", "gzip"),
    ("set-cookie", "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"),
];

/// The examples assume a table of 256 octets, which makes them evict; `3fe101` is the update that says so.
#[test]
fn rfc_7541_c5_responses_without_huffman_and_with_eviction() {
    check(
        &mut Decoder::new(),
        &[
            (
                "3fe101 4803 3330 3258 0770 7269 7661 7465 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133
                 3a32 3120 474d 546e 1768 7474 7073 3a2f 2f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
                FOUND,
                222,
            ),
            ("4803 3330 37c1 c0bf", MOVED, 222),
            (
                "88c1 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3220 474d 54c0 5a04 677a 6970
                 7738 666f 6f3d 4153 444a 4b48 514b 425a 584f 5157 454f 5049 5541 5851 5745 4f49 553b 206d 6178 2d61
                 6765 3d33 3630 303b 2076 6572 7369 6f6e 3d31",
                COOKIE,
                215,
            ),
        ],
    );
}

#[test]
fn rfc_7541_c6_responses_with_huffman_and_eviction() {
    let mut decoder = Decoder::new();
    check(
        &mut decoder,
        &[
            (
                "3fe101 4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d
                 29ad 1718 63c7 8f0b 97c8 e9ae 82ae 43d3",
                FOUND,
                222,
            ),
            ("4883 640e ffc1 c0bf", MOVED, 222),
            (
                "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2
                 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07",
                COOKIE,
                215,
            ),
        ],
    );
    let names: Vec<_> = decoder.table.iter().map(|field| String::from_utf8_lossy(&field.name)).collect();
    assert_eq!(names, ["set-cookie", "content-encoding", "date"]);
}

#[test]
fn integers_are_coded_as_in_rfc_7541_c1() {
    let check = |value: usize, prefix: u32, coded: &[u8]| {
        let mut out = Vec::new();
        encode_integer(&mut out, 0, prefix, value);
        assert_eq!(out, coded);
        assert_eq!(Input { rest: coded }.integer(prefix), Ok(value));
    };
    check(10, 5, &[10]);
    check(1337, 5, &[31, 154, 10]);
    check(42, 8, &[42]);
    check(31, 5, &[31, 0]);
}

#[test]
fn the_table_shrinks_grows_and_forgets() {
    let mut decoder = Decoder::new();
    let mut add = |block: &str, expected: Result<usize, HpackError>| {
        let got = decoder.decode(&hex(block), 65_536).map(|_| decoder.table.len());
        assert_eq!(got, expected, "{block}");
    };
    add("4001 61 01 62", Ok(1));
    add("4001 63 01 64", Ok(2));
    add("3f03", Ok(1)); // size 34 holds the newest alone
    add("20 3fe11f", Ok(0)); // two updates at once: to nothing, then to 4096
    add("be", Err(HpackError::Index));
    add("3f00", Ok(0)); // size 31 holds nothing
    add("4001 61 01 62", Ok(0)); // an entry larger than the table is no error
    add("82 20", Err(HpackError::TableSize)); // an update behind a field
    add("3fe21f", Err(HpackError::TableSize)); // 4097
}

#[test]
fn malformed_blocks_are_refused() {
    let check = |block: &str, expected: HpackError| {
        assert_eq!(Decoder::new().decode(&hex(block), 65_536), Err(expected), "{block}");
    };
    check("80", HpackError::Index);
    check("be", HpackError::Index);
    check("ff ff ff ff ff 0f", HpackError::Integer);
    check("ff 80 80 80 80 00", HpackError::Integer);
    check("ff ff", HpackError::Truncated);
    check("40", HpackError::Truncated);
    check("40 05 61", HpackError::Truncated);
    check("40 01 61", HpackError::Truncated);
    check("40 01 61 05 62", HpackError::Truncated);
    check("40 81 00 01 62", HpackError::Huffman); // padding of zeros behind `0`
    check("40 82 1fff 01 62", HpackError::Huffman); // more than seven bits of padding
    check("40 84 ffff ffff 01 62", HpackError::Huffman); // end-of-string
}

#[test]
fn a_small_block_cannot_become_a_large_list() {
    let mut block = hex("4001 61 7f80 1e"); // a value of 3967 octets, indexed
    block.extend(std::iter::repeat_n(b'x', 3967));
    block.extend(std::iter::repeat_n(0xbe, 10_000)); // and named ten thousand times
    assert_eq!(Decoder::new().decode(&block, 65_536), Err(HpackError::TooLarge));
}

#[test]
fn every_octet_has_its_huffman_code() {
    // Codes follow from the lengths by counting; those that the vectors above do not meet are tried one by one.
    let mut next = 0u32;
    let mut last = 0;
    let mut symbols: Vec<u16> = (0..257).collect();
    symbols.sort_by_key(|symbol| (CODE_LENGTHS[usize::from(*symbol)], *symbol));
    for symbol in symbols {
        let length = u32::from(CODE_LENGTHS[usize::from(symbol)]);
        next <<= length - last;
        last = length;
        let mut bits = u64::from(next) << (64 - length) | (u64::MAX >> length);
        next += 1;
        let octets: Vec<u8> = (0..length.div_ceil(8))
            .map(|_| {
                let octet = u8::try_from(bits >> 56).unwrap();
                bits <<= 8;
                octet
            })
            .collect();
        let expected = u8::try_from(symbol).map(|octet| vec![octet]).map_err(|_| HpackError::Huffman);
        assert_eq!(huffman_decode(&octets), expected, "symbol {symbol}");
    }
    assert_eq!(next, 1 << 30, "the code is complete");
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(list in prop::collection::vec(("[:a-z-]{0,40}", ".{0,300}"), 0..20)) {
        let mut block = Vec::new();
        for (name, value) in &list {
            encode(&mut block, name, value);
        }
        let list: Vec<_> = list.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        prop_assert_eq!(Decoder::new().decode(&block, 1 << 20), Ok(fields(&list)));
    }

    #[test]
    fn foreign_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        fuzz_hpack(&bytes);
    }
}
