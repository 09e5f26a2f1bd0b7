//! Rules that were set by `iptables`, in the words of `nft -j list ruleset`.
//!
//! It has two ways to the kernel: tables of `nft`'s, which `nft` itself shows without what most of their rules ask for, and the old
//! ("legacy") tables, which `nft` does not show at all. `iptables-save` of the same way tells all there is.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::process::Command;
use tokio::time::timeout;

/// The name that the old filter table has among the others.
pub const LEGACY: &str = "filter (iptables-legacy)";
/// The one that `nft` knows, too.
const FILTER: &str = "filter";
/// Where programs are.
const PATH: [&str; 5] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"];
/// Matches whose options are known here, as far as they are.
const MATCHES: [&str; 7] = ["addrtype", "comment", "conntrack", "multiport", "state", "tcp", "udp"];
/// How long it may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// The program that reads or changes a table, if it is there. `ending`: empty, or `-save`.
pub fn program(family: &str, table: &str, ending: &str) -> Option<String> {
    let program = match family {
        "ip" => "iptables",
        "ip6" => "ip6tables",
        _ => return None,
    };
    let wanted = match table {
        FILTER => "nft",
        LEGACY => "legacy",
        _ => return None,
    };
    // What "iptables" is, the administrator chooses. On old hosts it is the old one, and called nothing else.
    let plain = format!("{program}{ending}");
    let is_nft = find(&plain).map(|file| file.contains("nft"));
    if is_nft.is_some_and(|nft| nft == (wanted == "nft")) {
        return Some(plain);
    }
    Some(format!("{program}-{wanted}{ending}")).filter(|name| find(name).is_some())
}

/// The name of the file that a program is in, links followed.
fn find(name: &str) -> Option<String> {
    let file = PATH.iter().find_map(|directory| Path::new(directory).join(name).canonicalize().ok())?;
    Some(file.file_name()?.to_string_lossy().into_owned())
}

/// Adds to what `nft` said what `iptables` knows better. What cannot be read is returned: the families whose old table is there.
pub async fn complete(ruleset: &mut Value) -> Vec<&'static str> {
    let Some(items) = ruleset["nftables"].as_array_mut() else { return Vec::new() };
    let mut unread = Vec::new();
    for (family, names) in [("ip", "/proc/net/ip_tables_names"), ("ip6", "/proc/net/ip6_tables_names")] {
        let ours = |value: &Value| value["family"] == family && value["table"] == FILTER;
        let vague = |item: &Value| {
            let rule = &item["rule"];
            let mut parts = rule["expr"].as_array().into_iter().flatten();
            ours(rule) && parts.any(|part| part.get("xt").is_some())
        };
        if items.iter().any(vague)
            && let Some(rules) = save(family, FILTER).await
        {
            items.retain(|item| !ours(&item["rule"]) && !ours(&item["chain"]));
            items.extend(rules);
        }
        let tables = std::fs::read_to_string(names).unwrap_or_default();
        if tables.lines().any(|table| table == FILTER) {
            match save(family, LEGACY).await {
                Some(rules) => items.extend(rules),
                None => unread.push(family),
            }
        }
    }
    unread
}

async fn save(family: &str, table: &str) -> Option<Vec<Value>> {
    let program = program(family, table, "-save")?;
    let mut command = Command::new(program);
    command.args(["-t", FILTER]).env_clear().env("PATH", PATH.join(":")).kill_on_drop(true);
    let output = timeout(PATIENCE, command.output()).await.ok()?.ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    // A table that it did not make is called incompatible, and left out.
    let read = output.status.success() && text.lines().any(|line| line == "*filter");
    read.then(|| rules(family, table, &text))
}

/// Chains and rules of what `iptables-save` printed.
pub fn rules(family: &str, table: &str, text: &str) -> Vec<Value> {
    let mut own = Vec::new();
    let mut items = Vec::new();
    for line in text.lines() {
        if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split(' ');
            let (Some(name), Some(policy)) = (words.next(), words.next()) else { continue };
            let mut chain = json!({ "family": family, "table": table, "name": name });
            if policy == "-" {
                own.push(name);
            } else {
                chain["type"] = FILTER.into();
                chain["hook"] = name.to_ascii_lowercase().into();
                chain["policy"] = policy.to_ascii_lowercase().into();
            }
            items.push(json!({ "chain": chain }));
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let words = words(rule);
            let Some((chain, rest)) = words.split_first() else { continue };
            let expr = statements(family, rest, &own);
            items.push(json!({ "rule": { "family": family, "table": table, "chain": chain, "expr": expr } }));
        }
    }
    items
}

/// Words, of which those with blanks are in quotation marks.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), None::<String>, false);
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        match letter {
            ' ' if !quoted => words.extend(word.take()),
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' if quoted => word.get_or_insert_default().extend(letters.next()),
            letter => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    words
}

/// What a rule asks for and does.
fn statements(family: &str, words: &[String], own: &[&str]) -> Vec<Value> {
    let mut all = Vec::new();
    let mut protocol = "th".to_owned();
    let mut not = false;
    let mut words = words.iter().map(String::as_str).peekable();
    while let Some(option) = words.next() {
        if option == "!" {
            not = true;
            continue;
        }
        // Of options that are not known here, it is not known how many words they have.
        let value = words.next_if(|word| !word.starts_with('-') && *word != "!").unwrap_or_default();
        let op = if std::mem::take(&mut not) { "!=" } else { "==" };
        let is = |left: Value, right: Value| json!({ "match": { "op": op, "left": left, "right": right } });
        let link = |key: &str| {
            let name = value.strip_suffix('+').map_or_else(|| value.to_owned(), |begin| format!("{begin}*"));
            is(json!({ "meta": { "key": key } }), name.into())
        };
        let header = |protocol: &str, field: &str, right| {
            is(json!({ "payload": { "protocol": protocol, "field": field } }), right)
        };
        all.push(match option {
            "-i" => link("iifname"),
            "-o" => link("oifname"),
            "-s" => header(family, "saddr", network(value)),
            "-d" => header(family, "daddr", network(value)),
            "-p" => {
                value.clone_into(&mut protocol);
                is(json!({ "meta": { "key": "l4proto" } }), value.into())
            }
            "--dport" | "--dports" => header(&protocol, "dport", ports(value)),
            "--sport" | "--sports" => header(&protocol, "sport", ports(value)),
            "--ctstate" | "--state" => is(json!({ "ct": { "key": "state" } }), set(value)),
            "--dst-type" => is(json!({ "fib": { "result": "type", "flags": ["daddr"] } }), set(value)),
            // These say nothing without their options.
            "-m" if MATCHES.contains(&value) => continue,
            "--comment" => continue,
            "-j" | "-g" => {
                let word = match (value, option) {
                    ("ACCEPT" | "DROP" | "REJECT" | "RETURN", _) => value.to_ascii_lowercase(),
                    // What somebody else decides.
                    ("QUEUE" | "NFQUEUE", _) => "queue".into(),
                    (chain, "-g") if own.contains(&chain) => "goto".into(),
                    (chain, _) if own.contains(&chain) => "jump".into(),
                    // It only counts, logs or marks.
                    _ => break,
                };
                all.push(json!({ word: { "target": value } }));
                break;
            }
            option => json!({ "xt": { "type": "match", "name": option } }),
        });
    }
    all
}

fn network(value: &str) -> Value {
    match value.split_once('/').map(|(address, len)| (address, len.parse::<u8>())) {
        Some((address, Ok(len))) => json!({ "prefix": { "addr": address, "len": len } }),
        _ => value.into(),
    }
}

fn ports(value: &str) -> Value {
    let number = |text: &str| text.parse::<u16>().map_or_else(|_| text.into(), Value::from);
    let one = |text: &str| match text.split_once(':') {
        Some((first, last)) => json!({ "range": [number(first), number(last)] }),
        None => number(text),
    };
    json!({ "set": value.split(',').map(one).collect::<Vec<_>>() })
}

fn set(value: &str) -> Value {
    json!({ "set": value.split(',').map(str::to_ascii_lowercase).collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::foreign::tests::drops_either;

    /// Whether these rules drop what a guest sends, and its answer.
    fn drops(policy: &str, lines: &[&str]) -> (bool, bool) {
        let text = format!(
            "# by hand\n*filter\n:FORWARD {policy} [0:0]\n:own - [0:0]\n-A own -s 192.168.122.0/24 -j RETURN\n-A own -j DROP\n{}\nCOMMIT\n",
            lines.join("\n")
        );
        drops_either(&json!({ "nftables": rules("ip", LEGACY, &text) }))
    }

    #[test]
    fn rules_mean_what_they_say() {
        for (policy, lines, wanted) in [
            ("ACCEPT", &[][..], (false, false)),
            ("DROP", &[][..], (true, true)),
            ("DROP", &["-A FORWARD -i virbr+ ! -o docker0 -j ACCEPT"], (false, true)),
            ("DROP", &["-A FORWARD ! -i virbr0 -j ACCEPT"], (true, false)),
            ("DROP", &["-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"], (true, false)),
            ("DROP", &["-A FORWARD -p tcp -m multiport --dports 22,400:500 -j ACCEPT"], (false, false)),
            ("DROP", &["-A FORWARD -p tcp -m tcp --dport 22 -j ACCEPT"], (true, false)),
            (
                "DROP",
                &["-A FORWARD -d 203.0.113.1/32 -m comment --comment \"a \\\"b\\\" -j DROP\" -j ACCEPT"],
                (false, true),
            ),
            ("ACCEPT", &["-A FORWARD -g own"], (false, true)),
            ("DROP", &["-A FORWARD -j own", "-A FORWARD -j ACCEPT"], (false, true)),
            ("ACCEPT", &["-A FORWARD -p icmp -m icmp --icmp-type 8 -j DROP"], (false, false)),
            (
                "ACCEPT",
                &[
                    "-A FORWARD -j LOG --log-prefix \"-j DROP\"",
                    "-A FORWARD -j REJECT --reject-with icmp-port-unreachable",
                ],
                (true, true),
            ),
            ("ACCEPT", &["-A FORWARD -m addrtype ! --dst-type LOCAL -j DROP"], (true, true)),
        ] {
            assert_eq!(drops(policy, lines), wanted, "{policy} {lines:?}");
        }
    }

    #[test]
    fn nobody_is_blamed_for_what_is_not_known() {
        for line in [
            "-A FORWARD -m set --match-set some src,dst -j ACCEPT",
            "-A FORWARD -m socket -j ACCEPT",
            "-A FORWARD -j NFQUEUE --queue-num 1",
            "-A FORWARD -m mark ! --mark 0x1/0xff -j ACCEPT",
        ] {
            assert_eq!(drops("DROP", &[line]), (false, false), "{line}");
        }
        // It may have gone back before it came to the one that drops.
        let maybe = ["-A FORWARD -m mark --mark 0x1 -j RETURN", "-A FORWARD -j DROP"];
        assert_eq!(drops("ACCEPT", &maybe), (false, false));
        for nonsense in [
            "-A",
            "-A ",
            "-A FORWARD",
            "-A FORWARD -j",
            "-A FORWARD ! !",
            ":",
            ":x",
            "-A FORWARD \"",
            "-A FORWARD --dport x -j DROP",
        ] {
            assert_eq!(drops("ACCEPT", &[nonsense]), (false, false), "{nonsense}");
        }
    }
}
