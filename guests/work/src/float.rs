//! Floating point and SIMD. Everything is exact IEEE arithmetic in a fixed order, so that the checksums are too.

use std::arch::x86_64::*;
use std::hint::black_box;

use crate::tool::{Random, mix};

const SIDE: usize = 120;

/// Products of matrices of 120 by 120 doubles, in plain code.
pub fn matrix(iterations: u64) -> u64 {
    let mut random = Random::new(5);
    let mut fill = || -> Vec<f64> { (0..SIDE * SIDE).map(|_| (random.next() >> 40) as f64 / 1e6).collect() };
    let (a, mut b, mut c) = (fill(), fill(), vec![0f64; SIDE * SIDE]);
    for _ in 0..iterations {
        c.fill(0.0);
        for (row, out) in a.chunks_exact(SIDE).zip(c.chunks_exact_mut(SIDE)) {
            for (x, line) in row.iter().zip(b.chunks_exact(SIDE)) {
                out.iter_mut().zip(line).for_each(|(out, y)| *out += x * y);
            }
        }
        // The next product depends on this one, and stays in range.
        b.iter_mut().zip(&c).for_each(|(b, c)| *b = (*b + *c / 1e6) * 0.5);
    }
    c.iter().fold(0, |sum, x| mix(sum, x.to_bits()))
}

#[derive(Clone, Copy)]
struct Body {
    at: [f64; 3],
    speed: [f64; 3],
    mass: f64,
}

/// Five bodies that attract each other.
pub fn nbody(iterations: u64) -> u64 {
    let mut random = Random::new(6);
    let mut number = || (random.next() >> 44) as f64 / 1048576.0 - 0.5;
    let mut bodies = [0; 5].map(|_: i32| Body {
        at: [number() * 20.0, number() * 20.0, number() * 20.0],
        speed: [number(), number(), number()],
        mass: number() + 1.0,
    });
    for _ in 0..iterations {
        for i in 0..bodies.len() {
            let (done, rest) = bodies.split_at_mut(i + 1);
            let one = &mut done[i];
            for other in rest {
                let d = [one.at[0] - other.at[0], one.at[1] - other.at[1], one.at[2] - other.at[2]];
                let square = d[0] * d[0] + d[1] * d[1] + d[2] * d[2] + 0.01;
                let pull = 0.001 / (square * square.sqrt());
                for (axis, d) in d.iter().enumerate() {
                    one.speed[axis] -= d * other.mass * pull;
                    other.speed[axis] += d * one.mass * pull;
                }
            }
        }
        for body in &mut bodies {
            (0..3).for_each(|axis| body.at[axis] += body.speed[axis] * 0.001);
        }
    }
    bodies.iter().flat_map(|b| b.at).fold(0, |sum, x| mix(sum, x.to_bits()))
}

/// Elements of the vectors, 32 KiB each.
const INTS: usize = 16 << 10;
const FLOATS: usize = 8 << 10;

/// Dot products and byte shuffles of vectors of 16-bit integers.
pub fn avx2_integer(iterations: u64) -> u64 {
    assert!(is_x86_feature_detected!("avx2"));
    let mut random = Random::new(7);
    let mut fill = || -> Vec<i16> { (0..INTS).map(|_| random.next() as i16).collect() };
    let (mut a, b) = (fill(), fill());
    let mut sum = 0;
    for round in 0..iterations {
        a[round as usize % INTS] ^= round as i16;
        // SAFETY: the processor has AVX2.
        sum = mix(sum, unsafe { dot_integer(black_box(&a), &b) });
    }
    sum
}

#[target_feature(enable = "avx2")]
fn dot_integer(a: &[i16], b: &[i16]) -> u64 {
    let mut sum = _mm256_setzero_si256();
    let order = _mm256_setr_epi8(
        1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12,
        15, 14,
    );
    for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
        // SAFETY: each chunk is 32 bytes long, and these loads need no alignment.
        let (x, y) =
            unsafe { (_mm256_loadu_si256(a.as_ptr().cast()), _mm256_loadu_si256(b.as_ptr().cast())) };
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, y));
        sum = _mm256_xor_si256(sum, _mm256_shuffle_epi8(_mm256_max_epi16(x, y), order));
    }
    let (low, high) = (_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
    let folded = _mm_add_epi64(low, high);
    mix(_mm_cvtsi128_si64(folded) as u64, _mm_extract_epi64::<1>(folded) as u64)
}

/// Dot products of vectors of single floats.
pub fn avx2_float(iterations: u64) -> u64 {
    assert!(is_x86_feature_detected!("avx2"));
    let mut random = Random::new(8);
    let mut fill = || -> Vec<f32> { (0..FLOATS).map(|_| (random.next() >> 48) as f32 / 65536.0).collect() };
    let (mut a, b) = (fill(), fill());
    let mut sum = 0;
    for round in 0..iterations {
        a[round as usize % FLOATS] += 0.25;
        // SAFETY: the processor has AVX2.
        sum = mix(sum, unsafe { dot_float(black_box(&a), &b) }.to_bits().into());
    }
    sum
}

#[target_feature(enable = "avx2")]
fn dot_float(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [_mm256_setzero_ps(); 2];
    for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
        for (n, sum) in sums.iter_mut().enumerate() {
            // SAFETY: each chunk is 64 bytes long, of which this is the first or second half; no alignment is needed.
            let (x, y) =
                unsafe { (_mm256_loadu_ps(a.as_ptr().add(n * 8)), _mm256_loadu_ps(b.as_ptr().add(n * 8))) };
            *sum = _mm256_add_ps(*sum, _mm256_mul_ps(x, y));
        }
    }
    let mut lanes = [0f32; 8];
    // SAFETY: the array is 32 bytes long, and this store needs no alignment.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), _mm256_add_ps(sums[0], sums[1])) };
    lanes.iter().sum()
}
