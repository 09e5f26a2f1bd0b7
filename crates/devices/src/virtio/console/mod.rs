//! A console device (virtio 1.2, section 5.3): a console, and ports with names beside it.

mod port;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::io::{Read, Write};
use std::sync::{Arc, Mutex, OnceLock};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::{Broken, Device, In, Out, Wires};
use crate::dma::{le16, le32};
use crate::lock;
pub use port::Port;

const QUEUE: u16 = 64;
/// Ports at most.
const MOST_PORTS: usize = 31;
/// Queues of the control messages, to the guest and from it.
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;
/// Bytes of a control message, without what some have behind it: port (4), event (2), value (2).
const MESSAGE: usize = 8;
/// Messages that wait for the driver. One that does not take them, and asks for more, is broken.
const MOST_MESSAGES: usize = 256;

const F_SIZE: u64 = 1 << 0;
const F_MULTIPORT: u64 = 1 << 1;

/// Control messages (5.3.6.2).
mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const DEVICE_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const CONSOLE_PORT: u16 = 4;
    pub const RESIZE: u16 = 5;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

fn receive_queue(port: usize) -> usize {
    if port == 0 { 0 } else { 2 * port + 2 }
}

fn transmit_queue(port: usize) -> usize {
    receive_queue(port) + 1
}

/// The device.
pub struct Console {
    ports: Vec<Arc<Port>>,
    queues: Vec<u16>,
    shared: Arc<Shared>,
}

/// What the ports know of the device.
#[derive(Default)]
struct Shared {
    wires: OnceLock<Wires>,
    control: Mutex<Control>,
}

#[derive(Default)]
struct Control {
    /// The driver knows of more ports than the first.
    many: bool,
    /// To the driver.
    messages: VecDeque<Vec<u8>>,
}

impl Shared {
    fn kick(&self, queue: usize) {
        if let Some(wires) = self.wires.get() {
            wires.kick(queue);
        }
    }

    /// Sends a message, where the driver takes any. False if it takes none of many.
    fn tell(&self, port: usize, event: u16, value: u16, more: &[u8]) -> bool {
        let mut control = lock(&self.control);
        if !control.many {
            return true;
        }
        if control.messages.len() >= MOST_MESSAGES {
            return false;
        }
        let mut message = (port as u32).to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        message.extend(more);
        control.messages.push_back(message);
        drop(control);
        self.kick(CONTROL_RECEIVE);
        true
    }

    fn resized(&self, port: usize, (columns, rows): (u16, u16)) -> bool {
        if let (0, Some(wires)) = (port, self.wires.get()) {
            wires.config_changed();
        }
        // In this order (5.3.6.2), which Linux has got right since 2025, and wrong before.
        let size = [columns.to_le_bytes(), rows.to_le_bytes()].concat();
        self.tell(port, event::RESIZE, 0, &size)
    }
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("ports", &self.ports).finish_non_exhaustive()
    }
}

impl Console {
    /// A device with these ports, 1 to 31, of which the first is a console.
    pub fn new(ports: &[Arc<Port>]) -> Self {
        let ports: Vec<_> = ports.iter().take(MOST_PORTS).cloned().collect();
        let shared = Arc::new(Shared::default());
        ports.iter().enumerate().for_each(|(index, port)| port.connect(&shared, index));
        let queues = vec![QUEUE; if ports.len() > 1 { 2 * ports.len() + 2 } else { 4 }];
        Self { ports, queues, shared }
    }

    /// The port of a queue that carries its data.
    fn port(&self, queue: usize) -> Option<&Arc<Port>> {
        match queue {
            0 | 1 => self.ports.first(),
            CONTROL_RECEIVE | CONTROL_TRANSMIT => None,
            _ => self.ports.get(queue / 2 - 1),
        }
    }

    /// A message of the driver's.
    fn heard(&self, message: [u8; MESSAGE]) -> Option<()> {
        let (id, event, value) = (le32(&message, 0) as usize, le16(&message, 4), le16(&message, 6));
        let tell = |id, event, value, more: &[u8]| self.shared.tell(id, event, value, more).then_some(());
        if event == event::DEVICE_READY {
            let mut all = 0..if value == 1 { self.ports.len() } else { 0 };
            return all.try_for_each(|id| tell(id, event::DEVICE_ADD, 1, &[]));
        }
        // A port that there is not has no news.
        let Some(port) = self.ports.get(id) else { return Some(()) };
        match event {
            event::PORT_READY if value == 1 => {
                if id == 0 {
                    tell(id, event::CONSOLE_PORT, 1, &[])?;
                    self.shared.resized(id, port.size()).then_some(())?;
                } else {
                    tell(id, event::PORT_NAME, 1, port.name().as_bytes())?;
                }
                if id == 0 || port.has_host() {
                    tell(id, event::PORT_OPEN, 1, &[])?;
                }
            }
            event::PORT_OPEN => port.opened(value == 1),
            _ => {}
        }
        Some(())
    }
}

impl Device for Console {
    fn kind(&self) -> u16 {
        VIRTIO_ID_CONSOLE as u16
    }

    fn class(&self) -> u32 {
        // A communication controller of no other kind.
        0x07_8000
    }

    fn features(&self) -> u64 {
        F_SIZE | F_MULTIPORT
    }

    fn queues(&self) -> &[u16] {
        &self.queues
    }

    fn config(&self) -> Vec<u8> {
        let (columns, rows) = self.ports.first().map_or((0, 0), |port| port.size());
        let ports = (self.ports.len() as u32).to_le_bytes();
        [&columns.to_le_bytes()[..], &rows.to_le_bytes(), &ports, &[0; 4]].concat()
    }

    fn connect(&self, wires: Wires) {
        // Called once.
        let _ = self.shared.wires.set(wires);
    }

    fn set_features(&self, features: u64) {
        let many = features & F_MULTIPORT != 0;
        lock(&self.shared.control).many = many;
        if let (false, Some(console)) = (many, self.ports.first()) {
            // Such a driver has no way to say so.
            console.opened(true);
        }
    }

    fn reset(&self) {
        *lock(&self.shared.control) = Control::default();
        self.ports.iter().for_each(|port| port.opened(false));
    }

    fn ready(&self, queue: usize) -> bool {
        match queue {
            CONTROL_RECEIVE => !lock(&self.shared.control).messages.is_empty(),
            CONTROL_TRANSMIT => true,
            _ => self.port(queue).is_some_and(|port| match queue % 2 {
                0 => port.can_receive(),
                _ => port.can_transmit(),
            }),
        }
    }

    fn serve(&self, queue: usize, mut request: In<'_>, mut answer: Out<'_>) -> Result<usize, Broken> {
        match queue {
            CONTROL_RECEIVE => {
                let Some(message) = lock(&self.shared.control).messages.pop_front() else { return Ok(0) };
                answer.write_all(&message).map_err(|_| Broken)?;
            }
            CONTROL_TRANSMIT => {
                let mut message = [0; MESSAGE];
                request.read_exact(&mut message).map_err(|_| Broken)?;
                self.heard(message).ok_or(Broken)?;
            }
            _ => {
                let port = self.port(queue).ok_or(Broken)?;
                if queue.is_multiple_of(2) {
                    port.receive(&mut answer)?;
                } else {
                    port.transmit(&mut request)?;
                }
            }
        }
        Ok(answer.bytes_written())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.ports.iter().for_each(|port| port.disconnect(&self.shared));
    }
}
