//! Two threads at once.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crate::tool::{Random, mix};

/// Two threads count together.
pub fn atomics(iterations: u64) -> u64 {
    let count = AtomicU64::new(0);
    let half = || {
        for _ in 0..iterations / 2 {
            count.fetch_add(1, Ordering::AcqRel);
        }
    };
    thread::scope(|scope| {
        scope.spawn(half);
        half();
    });
    count.into_inner()
}

/// Sums up 64 KiB of its own, so often.
fn part(seed: u64, iterations: u64) -> u64 {
    let mut random = Random::new(seed);
    let numbers: Vec<u64> = (0..8 << 10).map(|_| random.next()).collect();
    (0..iterations).fold(0, |sum, _| black_box(&numbers).iter().fold(sum, |sum, &n| mix(sum, n)))
}

/// One thread: what `sum_2` is compared with for scaling.
pub fn sum_1(iterations: u64) -> u64 {
    part(9, iterations)
}

/// Two threads, each of which does as many iterations.
pub fn sum_2(iterations: u64) -> u64 {
    thread::scope(|scope| {
        let other = scope.spawn(|| part(10, iterations));
        mix(part(9, iterations), other.join().unwrap_or(0))
    })
}
