//! How much is done at once, for all and for each.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Questions at once that others are asked, and connections, for those who ask by IPv4 and by IPv6 each: of IPv6 a guest may have many
/// addresses, of IPv4 it has one.
const MOST: usize = 256;
/// Of one guest.
const EACH: usize = 64;

/// Who has how many turns.
#[derive(Debug, Default)]
pub struct Turns(Mutex<HashMap<IpAddr, usize>>);

/// A turn, which ends with it.
#[derive(Debug)]
pub struct Turn {
    turns: Arc<Turns>,
    who: IpAddr,
}

impl Turns {
    /// One more for `who`, if there is one.
    pub fn take(self: &Arc<Self>, who: IpAddr) -> Option<Turn> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let alike = taken.iter().filter(|(other, _)| other.is_ipv4() == who.is_ipv4());
        if alike.map(|(_, count)| count).sum::<usize>() >= MOST
            || taken.get(&who).is_some_and(|taken| *taken >= EACH)
        {
            return None;
        }
        *taken.entry(who).or_default() += 1;
        Some(Turn { turns: self.clone(), who })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut taken = self.turns.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.who) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.who);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_all_turns() {
        let turns = Arc::new(Turns::default());
        let greedy: Vec<_> = (0..1000).filter_map(|_| turns.take([10, 0, 0, 2].into())).collect();
        assert_eq!(greedy.len(), EACH);
        let all: Vec<_> =
            (0..=255).flat_map(|n| [n; 10]).filter_map(|n| turns.take([10, 0, 1, n].into())).collect();
        assert_eq!(all.len(), MOST - EACH);
        let many: Vec<_> =
            (0..1000).filter_map(|n| turns.take([0xfd00, 0, 0, 0, 0, 0, 0, n].into())).collect();
        assert_eq!(many.len(), MOST);
        drop((greedy, many));
        assert!(turns.take([10, 0, 0, 2].into()).is_some());
        drop(all);
        assert!(turns.0.lock().unwrap().is_empty());
    }
}
