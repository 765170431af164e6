//! All that a network namespace has, as the tools print it: links, addresses, routes of all tables, rules, permanent neighbours
//! and the whole packet filter. Settings below /proc/sys are left out.

use super::tool;
use enibox::clock;
use enibox::netlink::netns::Namespace;
use std::collections::BTreeSet;
use std::time::Duration;

const PARTS: [(&str, &str); 8] = [
    ("link", "ip -o link show"),
    ("address", "ip -o address show"),
    ("route", "ip -4 -o route show table all"),
    ("route", "ip -6 -o route show table all"),
    ("rule -4", "ip -4 rule show"),
    ("rule -6", "ip -6 rule show"),
    ("neighbour", "ip neighbour show nud permanent"),
    ("nft", "nft -s list ruleset"),
];

/// A line for each thing, without the numbers of links.
#[derive(Debug, PartialEq, Eq)]
pub struct Whole(BTreeSet<String>);

impl Whole {
    /// Without the tools it is empty, and they have said so.
    pub fn of(net: &Namespace) -> Whole {
        let mut lines = BTreeSet::new();
        for (part, command) in PARTS {
            let words = command.split(' ').collect::<Vec<_>>();
            let text = net.run(|| tool(words[0], &words[1..])).unwrap().unwrap_or_default();
            if part == "nft" {
                lines.insert(format!("nft {text}"));
                continue;
            }
            for line in text.lines() {
                let unnumbered = line.split_once(": ").filter(|_| matches!(part, "link" | "address"));
                let line = unnumbered.map_or(line, |(_, rest)| rest);
                // What the kernel finds out in its own time.
                let line = line.replace(" tentative", "").replace(" linkdown", "");
                let words = line.split_whitespace().collect::<Vec<_>>();
                let state = words.iter().position(|word| *word == "state").filter(|_| part == "link");
                let kept = words
                    .iter()
                    .enumerate()
                    .filter(|(at, _)| state.is_none_or(|state| !(state..state + 2).contains(at)));
                lines.insert(format!("{part} {}", kept.map(|(_, word)| *word).collect::<Vec<_>>().join(" ")));
            }
        }
        Whole(lines)
    }

    /// Once the kernel has found out all by itself: what is plugged in, and that nobody else has a link's own address.
    pub fn at_rest(net: &Namespace) -> Whole {
        let end = clock::instant() + Duration::from_mins(1);
        let mut last = Whole::of(net);
        loop {
            std::thread::sleep(Duration::from_secs(4));
            let now = Whole::of(net);
            if now == last {
                return now;
            }
            assert!(clock::instant() < end, "{:#?}", last.differences(&now));
            last = now;
        }
    }

    /// Lines that are there now and were not, and those that were there and are not.
    pub fn differences(&self, now: &Whole) -> Vec<String> {
        let come = now.0.difference(&self.0).map(|line| format!("+ {line}"));
        come.chain(self.0.difference(&now.0).map(|line| format!("- {line}"))).collect()
    }

    /// Those differences that are not of links which `said` says stay. Of routes over these only the kernel's own are expected.
    pub fn unexplained(&self, now: &Whole, said: &str) -> Vec<String> {
        let lines =
            said.lines().filter_map(|line| line.strip_prefix("enibox: ").filter(|line| line.contains(" stays")));
        let names = lines.filter_map(|line| line.split(' ').next()).collect::<BTreeSet<_>>();
        let explained = |line: &String| {
            let part = line.split(' ').nth(1).unwrap();
            let own = part != "route" || line.contains("proto kernel");
            matches!(part, "link" | "address" | "route")
                && own
                && line.split([' ', ':', '@']).skip(2).any(|word| names.contains(word))
        };
        self.differences(now).into_iter().filter(|line| !explained(line)).collect()
    }
}
