//! Which frames the guest wants (5.1.6.5.1, 5.1.6.5.2).

use virtio_bindings::virtio_net as b;

use crate::dma::le32;
use crate::net::Mac;

/// Addresses of others that are remembered. Who wants more gets all.
const MOST: usize = 64;

/// Which frames the guest wants.
#[derive(Clone, Debug)]
pub struct Filter {
    /// The guest's own address.
    pub mac: Mac,
    /// By command of the class RX: all frames, all multicasts, all unicasts, no multicast, no unicast, no broadcast.
    modes: [bool; 6],
    /// Unicasts and multicasts beside its own; none where there are too many.
    tables: [Option<Vec<Mac>>; 2],
}

impl Filter {
    /// Until the driver says otherwise it gets everything.
    pub fn new(mac: Mac) -> Self {
        let modes = [true, false, false, false, false, false];
        Self { mac, modes, tables: [Some(Vec::new()), Some(Vec::new())] }
    }

    /// Whether the guest wants a frame to this address.
    pub fn wants(&self, to: Mac) -> bool {
        let on = |command: u32| self.modes[command as usize];
        let known = |table: &Option<Vec<Mac>>| table.as_ref().is_none_or(|macs| macs.contains(&to));
        if on(b::VIRTIO_NET_CTRL_RX_PROMISC) {
            return true;
        }
        if to == [0xff; 6] {
            return !on(b::VIRTIO_NET_CTRL_RX_NOBCAST);
        }
        if to[0] & 1 == 1 {
            let all = on(b::VIRTIO_NET_CTRL_RX_ALLMULTI);
            return !on(b::VIRTIO_NET_CTRL_RX_NOMULTI) && (all || known(&self.tables[1]));
        }
        let all = on(b::VIRTIO_NET_CTRL_RX_ALLUNI);
        !on(b::VIRTIO_NET_CTRL_RX_NOUNI) && (all || to == self.mac || known(&self.tables[0]))
    }

    /// A command of the class RX. None if it makes no sense.
    pub fn set_mode(&mut self, command: u8, data: &[u8]) -> Option<()> {
        let &[on] = data else { return None };
        *self.modes.get_mut(usize::from(command))? = on != 0;
        Some(())
    }

    /// A command of the class MAC. None if it makes no sense.
    pub fn set_macs(&mut self, command: u8, mut data: &[u8]) -> Option<()> {
        match u32::from(command) {
            b::VIRTIO_NET_CTRL_MAC_ADDR_SET => self.mac = data.try_into().ok()?,
            b::VIRTIO_NET_CTRL_MAC_TABLE_SET => {
                let mut tables = [None, None];
                for table in &mut tables {
                    let (count, rest) = data.split_at_checked(4)?;
                    let count = le32(count, 0) as usize;
                    let (macs, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
                    *table = (count <= MOST).then(|| macs.as_chunks::<6>().0.to_vec());
                    data = rest;
                }
                self.tables = tables;
            }
            _ => return None,
        }
        Some(())
    }
}
