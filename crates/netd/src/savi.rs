//! Which card of a network has which IPv6 address: whichever comes first ("FCFS SAVI", RFC 6620), as a table of `nft`'s for each bridge or
//! link that cards are on.
//!
//! All cards there share its sets, and each has a chain, which comes after that of its own table (`filter`): the MAC of what arrives here is
//! the card's. That table is about IPv6 addresses that no guest may have; which of the others it has, the guest chooses itself.

use std::fmt::Write;

/// An address is its card's for so long after it was used last.
const PATIENCE: &str = "1h";
/// Addresses that are remembered: three of each card that there may be, and more. `nft` reads all of them whenever it is asked for anything.
const MOST: usize = 8192;
/// So often a card may begin to use an address that is nobody's.
const CARD_LIMIT: &str = "rate 1/minute burst 32 packets";
/// And all cards of one user, those that are gone included: else who connects cards by turns would fill the sets.
const USER_LIMIT: &str = "rate 4/minute burst 256 packets";
/// Of packets other than ICMP, one in so many renews its binding: traffic in bulk is to cost a lookup, and need not be asked for neighbours.
const RENEWED: u32 = 1024;

/// A card.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Its link.
    pub interface: &'a str,
    /// Frames from the guest leave the host's side of the link (MacVTap), and do not enter it (TAP).
    pub reversed: bool,
    /// Whose it is.
    pub uid: u32,
}

/// The name of a bridge's or link's table.
pub fn table(device: &str) -> String {
    format!("netdev lodge6-{device}")
}

/// The script that forgets a table, if there is one.
pub fn without(device: &str) -> String {
    let table = table(device);
    format!("table {table}\ndelete table {table}\n")
}

/// The script that forgets a card, if it is there. Its addresses remain its own for a while.
pub fn without_card(device: &str, interface: &str) -> String {
    let table = table(device);
    // Some kernels remove the chain with the link. What is to be deleted must be there.
    format!(
        "add table {table}\nadd chain {table} {interface}\nflush chain {table} {interface}\ndelete chain {table} {interface}\n\
         add counter {table} {interface}\ndelete counter {table} {interface}\n\
         add limit {table} {interface} {{ {CARD_LIMIT} }}\ndelete limit {table} {interface}\n"
    )
}

/// The script by which these cards, all whose link is there, keep to their addresses. What is remembered stays.
pub fn script<'a>(device: &str, cards: impl IntoIterator<Item = Source<'a>>) -> String {
    let (table, twice) = (table(device), 2 * MOST);
    // The target of neighbour discovery has no name in nft's language before 1.0.9, and so no type but that of bare bytes.
    let set = |name, key, size| {
        format!(
            "add set {table} {name} {{ typeof {key}; flags dynamic,timeout; timeout {PATIENCE}; size {size}; }}\n"
        )
    };
    // Should one be full, it is the first: an address that is seen and nobody's would be of no use.
    let mut text = format!("add table {table}\n")
        + &set("seen", "@nh,64,128", MOST)
        + &set("bound", "@nh,64,128 . @ll,48,48", twice);
    for card in cards {
        // Writing to a string does not fail.
        let _ = write_card(&mut text, &table, card);
    }
    text
}

fn write_card(text: &mut String, table: &str, card: Source<'_>) -> std::fmt::Result {
    let Source { interface, reversed, uid } = card;
    let hook = if reversed { "egress" } else { "ingress" };
    let mut limits = format!("limit name \"{interface}\"");
    writeln!(text, "add counter {table} {interface}\nadd limit {table} {interface} {{ {CARD_LIMIT} }}")?;
    if uid != 0 {
        writeln!(text, "add limit {table} user{uid} {{ {USER_LIMIT} }}")?;
        limits += &format!(" limit name \"user{uid}\"");
    }
    writeln!(
        text,
        "add chain {table} {interface} {{ type filter hook {hook} device \"{interface}\" priority 10; policy accept; }}\n\
         flush chain {table} {interface}\ntable {table} {{\nchain {interface} {{\nether type != ip6 accept"
    )?;
    // The source is 8 bytes into the packet, the sender's MAC 6 into the frame, the target 8 into the message (RFC 4861, 4.3 and 4.4).
    let [source, target] = ["@nh,64,128", "@th,64,128"];
    let bound = |address| format!("{address} . @ll,48,48");
    let renew = |address| format!("update @seen {{ {address} }} update @bound {{ {} }}", bound(address));
    let claim = |address| format!("{address} != @seen {limits} {}", renew(address));
    let refuse = |address| format!("{} != @bound counter name \"{interface}\" drop", bound(address));
    writeln!(
        text,
        "meta l4proto != ipv6-icmp numgen random mod {RENEWED} != 0 {} @bound accept",
        bound(source)
    )?;
    // Who asks whether an address is free (RFC 4862, 5.4) has it if it is, and is answered by whoever has it if not.
    writeln!(text, "icmpv6 type nd-neighbor-solicit ip6 saddr :: {}", claim(target))?;
    for rule in [claim(target), refuse(target), renew(target)] {
        writeln!(text, "icmpv6 type nd-neighbor-advert {rule}")?;
    }
    writeln!(text, "ip6 saddr :: accept")?;
    writeln!(text, "{}\n{}\n{}\n}}\n}}", claim(source), refuse(source), renew(source))
}
