//! Puts the rows of a read into the order of the files, in buckets that threads sort and read
//! independently.

use crate::memory::{self, OutOfMemory};

/// The most rows ordered at once: bounds the memory of a call that asks for more.
const MAX_ROWS: usize = 1 << 24;
/// About the rows of a bucket.
const BUCKET_ROWS: usize = 256;
const MAX_BUCKETS: usize = 1 << 14;

/// How step indices and their positions in the call are packed into sortable keys.
#[derive(Debug, Clone, Copy)]
pub struct Packing {
    lowest: u64,
    position_bits: u32,
}

impl Packing {
    pub fn step(self, key: u64) -> u64 {
        self.lowest + (key >> self.position_bits)
    }

    pub fn position(self, key: u64) -> usize {
        (key & ((1 << self.position_bits) - 1)) as usize
    }
}

/// Keys grouped by ascending step index. Each group is still unsorted.
pub struct Order {
    pub packing: Packing,
    keys: Vec<u64>,
    ends: Vec<usize>,
}

/// As many of the indices between `lowest` and `highest` as fit one order.
pub fn capacity(lowest: u64, highest: u64) -> usize {
    1usize.checked_shl((highest - lowest).leading_zeros()).unwrap_or(MAX_ROWS).min(MAX_ROWS)
}

impl Order {
    /// Orders at most `capacity` indices, all between `lowest` and `highest`.
    pub fn new(indices: &[i64], lowest: u64, highest: u64) -> Result<Self, OutOfMemory> {
        let span_bits = u64::BITS - (highest - lowest).leading_zeros();
        let position_bits = usize::BITS - indices.len().saturating_sub(1).leading_zeros();
        debug_assert!(span_bits + position_bits <= u64::BITS, "more indices than fit");
        let buckets = (indices.len() / BUCKET_ROWS).clamp(1, MAX_BUCKETS).next_power_of_two();
        let shift = span_bits.saturating_sub(buckets.trailing_zeros());
        let bucket_of = |index: i64| ((index as u64 - lowest) >> shift) as usize;

        let mut ends = memory::filled(0, buckets)?;
        for &index in indices {
            ends[bucket_of(index)] += 1;
        }
        let mut start = 0;
        for end in &mut ends {
            start += std::mem::replace(end, start);
        }
        let mut keys = memory::filled(0, indices.len())?;
        for (position, &index) in indices.iter().enumerate() {
            let slot = &mut ends[bucket_of(index)];
            keys[*slot] = (index as u64 - lowest) << position_bits | position as u64;
            *slot += 1;
        }
        Ok(Self { packing: Packing { lowest, position_bits }, keys, ends })
    }

    /// The buckets in ascending order, without empty ones.
    pub fn buckets(&mut self) -> Result<Vec<&mut [u64]>, OutOfMemory> {
        let mut rest = &mut self.keys[..];
        let mut start = 0;
        let mut buckets = memory::with_capacity(self.ends.len())?;
        for &end in &self.ends {
            let (bucket, others) = std::mem::take(&mut rest).split_at_mut(end - start);
            if !bucket.is_empty() {
                buckets.push(bucket);
            }
            (rest, start) = (others, end);
        }
        Ok(buckets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn sorted(indices: &[i64]) -> Vec<(u64, usize)> {
        let lowest = *indices.iter().min().expect("indices") as u64;
        let highest = *indices.iter().max().expect("indices") as u64;
        assert!(indices.len() <= capacity(lowest, highest));
        let mut order = Order::new(indices, lowest, highest).expect("memory");
        let packing = order.packing;
        let mut all = Vec::new();
        for bucket in order.buckets().expect("memory") {
            assert!(!bucket.is_empty());
            bucket.sort_unstable();
            all.extend(bucket.iter().map(|&key| (packing.step(key), packing.position(key))));
        }
        all
    }

    fn expected(indices: &[i64]) -> Vec<(u64, usize)> {
        let mut pairs: Vec<_> = indices.iter().map(|&i| i as u64).zip(0..).collect();
        pairs.sort_unstable();
        pairs
    }

    #[test]
    fn buckets_are_in_the_order_of_the_steps() {
        let mut numbers = testing::random();
        let mut random = |below: u64| numbers(below) as i64;
        let spread: Vec<_> = (0..5000).map(|_| random(1 << 40)).collect();
        let duplicates: Vec<_> = (0..5000).map(|_| random(7)).collect();
        let crowded: Vec<_> =
            (0..5000).map(|i| if i == 17 { 1 << 50 } else { random(100) }).collect();
        for indices in [spread, duplicates, crowded, vec![3; 600], vec![9], vec![0, i64::MAX - 1]] {
            assert_eq!(sorted(&indices), expected(&indices));
        }
    }

    #[test]
    fn as_many_fit_as_the_keys_have_bits_for() {
        assert_eq!(capacity(5, 5), MAX_ROWS);
        assert_eq!(capacity(0, (1 << 50) - 1), 1 << 14);
        assert_eq!(capacity(0, i64::MAX as u64 - 1), 2);
    }
}
