//! Which rows were drawn.

use crate::memory::{self, OutOfMemory};
use crate::prefetch::prefetch;

/// A set of rows: open addressing with linear probing, at most two thirds full.
pub struct RowSet {
    slots: Vec<u64>,
}

/// Above every row.
const EMPTY: u64 = u64::MAX;

impl RowSet {
    pub fn new(capacity: usize) -> Result<Self, OutOfMemory> {
        let slots = capacity.saturating_add(capacity / 2 + 1);
        Ok(Self { slots: memory::filled(EMPTY, slots)? })
    }

    /// Where to look first: a mixed value, scaled to the slots.
    fn slot(&self, value: u64) -> usize {
        let mixed = (value ^ value >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((u128::from(mixed) * self.slots.len() as u128) >> 64) as usize
    }

    pub fn prefetch(&self, value: u64) {
        prefetch(&self.slots, self.slot(value));
    }

    /// Whether `value` is new.
    pub fn insert(&mut self, value: u64) -> bool {
        let mut slot = self.slot(value);
        loop {
            match self.slots[slot] {
                EMPTY => {
                    self.slots[slot] = value;
                    return true;
                }
                found if found == value => return false,
                _ => slot = if slot + 1 == self.slots.len() { 0 } else { slot + 1 },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_larger_than_memory_is_an_error() {
        assert!(RowSet::new(1 << 55).is_err());
        assert!(RowSet::new(usize::MAX).is_err());
    }

    #[test]
    fn a_row_is_new_once() {
        let mut set = RowSet::new(300).expect("memory");
        let rows = || (0..300).map(|row| row << 55 | row);
        assert!(rows().all(|row| set.insert(row)));
        assert!(rows().all(|row| !set.insert(row)));
    }
}
