//! What DHCP servers read of clients that nobody trusts (RFC 2131).
#![forbid(unsafe_code)]

use dhcproto::Decodable;
use dhcproto::v4::{HType, Message, Opcode, OptionCode};

/// The port that servers listen at.
pub const SERVER: u16 = 67;
/// The port that clients listen at.
pub const CLIENT: u16 = 68;

/// Where a message has the length of the client's address.
const HLEN: usize = 2;
/// Where its options begin, behind the magic cookie (RFC 2131, 3).
const OPTIONS: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];

/// A client's message, with those options that servers of ours look at. None if it makes no sense, or is no client's on Ethernet.
pub fn request(message: &[u8]) -> Option<Message> {
    let message = Message::from_bytes(&essence(message)?).ok()?;
    let is_request = message.opcode() == Opcode::BootRequest && message.htype() == HType::Eth;
    is_request.then_some(message)
}

/// The message with no other options than those that we look at. dhcproto believes any length of the client's address, and panics at
/// some values of options that are none of our business.
fn essence(message: &[u8]) -> Option<Vec<u8>> {
    let (fixed, mut options) = message.split_at_checked(OPTIONS)?;
    if fixed[HLEN] != 6 || !fixed.ends_with(&COOKIE) {
        return None;
    }
    let mut essence = fixed.to_vec();
    loop {
        match *options {
            // Some clients forget the end.
            [] | [255, ..] => break,
            [0, ref rest @ ..] => options = rest,
            [code, len, ref rest @ ..] => {
                let (value, rest) = rest.split_at_checked(len.into())?;
                let good = match OptionCode::from(code) {
                    OptionCode::MessageType => len == 1,
                    OptionCode::RequestedIpAddress | OptionCode::ServerIdentifier => len == 4,
                    OptionCode::ParameterRequestList | OptionCode::ClientIdentifier => true,
                    _ => {
                        options = rest;
                        continue;
                    }
                };
                if !good {
                    return None;
                }
                essence.extend([code, len]);
                essence.extend(value);
                options = rest;
            }
            [_] => return None,
        }
    }
    essence.push(255);
    Some(essence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dhcproto::Encodable;
    use dhcproto::v4::{DhcpOption, MessageType};
    use proptest::prelude::*;

    fn discover() -> Vec<u8> {
        let mut message = Message::default();
        message.set_opcode(Opcode::BootRequest).set_chaddr(&[0x52, 0x4c, 0, 0, 0, 1]);
        message.opts_mut().insert(DhcpOption::MessageType(MessageType::Discover));
        message.to_vec().unwrap()
    }

    #[test]
    fn what_nobody_looks_at_is_not_read() {
        let mut message = discover();
        let end = message.iter().rposition(|byte| *byte == 255).unwrap();
        message.truncate(end);
        // Lease queries (RFC 6926), cut short.
        message.extend([151, 1, 0, 152, 1, 9, 0, 0, 255]);
        let read = request(&message).unwrap();
        assert_eq!(read.opts().msg_type(), Some(MessageType::Discover));
        assert_eq!(read.opts().iter().count(), 1);
        // A client's address of 200 bytes has no room.
        message[HLEN] = 200;
        assert!(request(&message).is_none());
        assert!(request(&discover()[..OPTIONS - 1]).is_none());
    }

    proptest! {
        #[test]
        fn any_options_are_read_or_not(options in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut message = discover();
            message.truncate(OPTIONS);
            message.extend(options);
            let _ = request(&message);
        }
    }
}
