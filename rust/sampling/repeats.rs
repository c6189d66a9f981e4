//! The positions of a range that a shuffle visits more than once, and the values there.

use super::CHUNK;
use crate::error::{Error, Interrupt};
use crate::memory::{self, OutOfMemory, prefetch};

/// 64 positions: one bit for each visited one, and one for each that is visited again.
#[derive(Clone, Copy, Default)]
struct Word {
    seen: u64,
    again: u64,
}

/// Finds the positions of `[0, head)` that are visited more than once.
pub struct Repeats {
    words: Vec<Word>,
}

impl Repeats {
    pub fn new(head: u64) -> Result<Self, OutOfMemory> {
        Ok(Self { words: memory::filled(Word::default(), head.div_ceil(64) as usize)? })
    }

    pub fn prefetch(&self, position: u64) {
        prefetch(&self.words, (position / 64) as usize);
    }

    pub fn visit(&mut self, position: u64) {
        // Positions of the tail are past the end.
        if let Some(word) = self.words.get_mut((position / 64) as usize) {
            let bit = 1 << (position % 64);
            word.again |= word.seen & bit;
            word.seen |= bit;
        }
    }

    /// Gives each repeated position a value, at the place of its rank among them.
    pub fn finish(self, interrupt: Interrupt<'_>) -> Result<Displaced, Error> {
        let mut words = self.words;
        let mut rank = 0;
        for chunk in words.chunks_mut(CHUNK) {
            interrupt()?;
            for word in chunk {
                word.seen = rank;
                rank += u64::from(word.again.count_ones());
            }
        }
        Ok(Displaced { words, values: memory::filled(UNMOVED, rank as usize)? })
    }
}

const UNMOVED: i64 = -1;

/// The values at the positions that are visited more than once.
pub struct Displaced {
    /// `seen` counts the repeated positions before the word.
    words: Vec<Word>,
    values: Vec<i64>,
}

impl Displaced {
    pub fn prefetch(&self, position: u64) {
        prefetch(&self.words, (position / 64) as usize);
    }

    /// Puts `value` at `position` and returns the value that stood there.
    pub fn exchange(&mut self, position: u64, value: i64) -> i64 {
        let word = self.words[(position / 64) as usize];
        let bit = 1 << (position % 64);
        if word.again & bit == 0 {
            return position as i64;
        }
        let rank = word.seen + u64::from((word.again & (bit - 1)).count_ones());
        match std::mem::replace(&mut self.values[rank as usize], value) {
            UNMOVED => position as i64,
            value => value,
        }
    }
}
