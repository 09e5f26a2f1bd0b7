//! What the workloads share: numbers that look random and are always the same, and a checksum.

/// Mixes `value` into a checksum.
pub fn mix(sum: u64, value: u64) -> u64 {
    (sum.rotate_left(5) ^ value).wrapping_mul(0x517c_c1b7_2722_0a95)
}

/// Numbers from a seed (Marsaglia, "Xorshift RNGs", 2003).
pub struct Random(u64);

impl Random {
    /// Starts at `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (((self.next() >> 32) * end as u64) >> 32) as usize
    }
}

/// `bytes` bytes of words, with the repetitions that text has.
pub fn text(bytes: usize, seed: u64) -> String {
    const WORDS: [&str; 16] = [
        "lodge",
        "guest",
        "the",
        "a",
        "kernel",
        "über",
        "page",
        "of",
        "memory",
        "in",
        "is",
        "processor",
        "and",
        "naïve",
        "to",
        "block",
    ];
    let mut random = Random::new(seed);
    let mut text = String::with_capacity(bytes + 24);
    while text.len() < bytes {
        if random.below(8) == 0 {
            text.push_str(&random.below(100_000).to_string());
        } else {
            text.push_str(WORDS[random.below(WORDS.len())]);
        }
        text.push(if random.below(12) == 0 { '\n' } else { ' ' });
    }
    text
}
