//! NumPy's draws without replacement, bit for bit, in memory that grows with the draw alone.

use crate::error::Error;
use crate::interrupt::Interrupt;
use crate::memory::{self, OutOfMemory};
use crate::random::Generator;

/// Draws made ahead of their use, so that the memory they need is on its way; also how often the
/// caller's interrupt is asked.
const BLOCK: usize = 1024;
/// Entries that are passed over at a time, a matter of milliseconds, where there is nothing to
/// draw.
const STRETCH: usize = 1 << 20;
/// `Generator.choice` shuffles the tail of a range when the population is larger than this ...
const MIN_TAIL_POPULATION: u64 = 10_000;
/// ... and the sample larger than the population over this; otherwise it runs Floyd's method.
const TAIL_CUTOFF: u64 = 50;

/// `Generator.choice(rows, size=out.len(), replace=False)` of the fresh `generator`.
pub fn without_replacement(
    rows: u64,
    generator: Generator,
    out: &mut [i64],
    interrupt: Interrupt<'_>,
) -> Result<(), Error> {
    let sample = out.len() as u64;
    if sample > rows || rows > i64::MAX as u64 {
        return Err(Error::Sample { sample, rows });
    }
    if rows > MIN_TAIL_POPULATION && sample > rows / TAIL_CUTOFF {
        tail_shuffle(rows, generator, out, interrupt)
    } else {
        floyd(rows, generator, out, interrupt)
    }
}

/// Shuffles positions `rows - 1` down to `rows - n` of the identity over `rows`, and keeps those n.
///
/// The n positions are `out` itself. Of the positions below them only those drawn more than once
/// matter, since what the first draw leaves there is seen by the second alone; `Repeats` finds them
/// in a first pass over the same draws.
fn tail_shuffle(
    rows: u64,
    generator: Generator,
    out: &mut [i64],
    interrupt: Interrupt<'_>,
) -> Result<(), Error> {
    let head = rows - out.len() as u64;
    // Position 0 is not drawn for: a range of one leaves no choice.
    let first = head.max(1);
    let mut repeats = Repeats::new(head)?;
    let mut draws = Descending::new(generator.clone(), first, rows)?;
    while let Some((_, block)) = draws.next_block() {
        interrupt()?;
        for &target in block {
            repeats.prefetch(target);
        }
        for &target in block {
            repeats.see(target);
        }
    }
    let mut displaced = repeats.finish(interrupt)?;

    let mut next = head as i64;
    for stretch in out.chunks_mut(STRETCH) {
        interrupt()?;
        for (value, position) in stretch.iter_mut().zip(next..) {
            *value = position;
        }
        next += stretch.len() as i64;
    }
    let mut draws = Descending::new(generator, first, rows)?;
    while let Some((top, block)) = draws.next_block() {
        interrupt()?;
        for &target in block {
            displaced.prefetch(target);
        }
        for (step, &target) in block.iter().enumerate() {
            let here = (top - head) as usize - step;
            if target >= head {
                out.swap(here, (target - head) as usize);
            } else {
                out[here] = displaced.exchange(target, out[here]);
            }
        }
    }
    Ok(())
}

/// Draws on [0, i] for i from `rows - 1` down to `first`, a block at a time.
struct Descending {
    generator: Generator,
    first: u64,
    next: u64,
    block: Vec<u64>,
}

impl Descending {
    fn new(generator: Generator, first: u64, rows: u64) -> Result<Self, OutOfMemory> {
        Ok(Self { generator, first, next: rows, block: memory::with_capacity(BLOCK)? })
    }

    /// The largest i of the next block and its draws, or nothing at the end.
    fn next_block(&mut self) -> Option<(u64, &[u64])> {
        let length = (self.next - self.first).min(BLOCK as u64);
        let top = self.next.checked_sub(1).filter(|_| length > 0)?;
        self.block.clear();
        let generator = &mut self.generator;
        self.block.extend((0..length).map(|step| generator.bounded(top - step)));
        self.next -= length;
        Some((top, &self.block))
    }
}

/// 64 positions: which were drawn, and which were drawn again.
#[derive(Clone, Copy, Default)]
struct Word {
    seen: u64,
    again: u64,
}

/// Which positions of `[0, head)` are drawn more than once. A tail shuffle has head < 50 n, so this
/// is O(n).
struct Repeats {
    words: Vec<Word>,
}

impl Repeats {
    fn new(head: u64) -> Result<Self, OutOfMemory> {
        Ok(Self { words: memory::filled(Word::default(), head.div_ceil(64) as usize)? })
    }

    fn prefetch(&self, position: u64) {
        prefetch(&self.words, (position / 64) as usize);
    }

    fn see(&mut self, position: u64) {
        // Positions of the tail are past the end.
        if let Some(word) = self.words.get_mut((position / 64) as usize) {
            let bit = 1 << (position % 64);
            word.again |= word.seen & bit;
            word.seen |= bit;
        }
    }

    /// Gives every repeated position a value of its own, found by its rank among them.
    fn finish(self, interrupt: Interrupt<'_>) -> Result<Displaced, Error> {
        let mut words = self.words;
        let mut rank = 0;
        for stretch in words.chunks_mut(STRETCH) {
            interrupt()?;
            for word in stretch {
                word.seen = rank;
                rank += u64::from(word.again.count_ones());
            }
        }
        Ok(Displaced { words, values: memory::filled(UNMOVED, rank as usize)? })
    }
}

const UNMOVED: i64 = -1;

/// What now stands at the positions that are drawn more than once.
struct Displaced {
    /// `seen` counts the repeated positions before the word.
    words: Vec<Word>,
    values: Vec<i64>,
}

impl Displaced {
    fn prefetch(&self, position: u64) {
        prefetch(&self.words, (position / 64) as usize);
    }

    /// Puts `value` at `position` and gives what stood there.
    fn exchange(&mut self, position: u64, value: i64) -> i64 {
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

/// Floyd's method, then a shuffle of its results.
fn floyd(
    rows: u64,
    mut generator: Generator,
    out: &mut [i64],
    interrupt: Interrupt<'_>,
) -> Result<(), Error> {
    let mut set = Set::new(out.len())?;
    let mut next = rows - out.len() as u64;
    for block in out.chunks_mut(BLOCK) {
        interrupt()?;
        for (draw, last) in block.iter_mut().zip(next..) {
            let value = generator.bounded(last);
            set.prefetch(value);
            *draw = value as i64;
        }
        for (draw, last) in block.iter_mut().zip(next..) {
            if !set.insert(*draw as u64) {
                set.insert(last);
                *draw = last as i64;
            }
        }
        next += block.len() as u64;
    }
    drop(set);

    let mut draws = Descending::new(generator, 1, out.len().max(1) as u64)?;
    while let Some((top, block)) = draws.next_block() {
        interrupt()?;
        for &target in block {
            prefetch(out, target as usize);
        }
        for (step, &target) in block.iter().enumerate() {
            out.swap(top as usize - step, target as usize);
        }
    }
    Ok(())
}

/// A set of step indices: open addressing with linear probing, at most two thirds full.
struct Set {
    slots: Vec<u64>,
}

/// Above every step index.
const EMPTY: u64 = u64::MAX;

impl Set {
    fn new(capacity: usize) -> Result<Self, OutOfMemory> {
        let slots = capacity.saturating_add(capacity / 2 + 1);
        Ok(Self { slots: memory::filled(EMPTY, slots)? })
    }

    /// Where to look first: a mixed value, scaled to the slots.
    fn slot(&self, value: u64) -> usize {
        let mixed = (value ^ value >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((u128::from(mixed) * self.slots.len() as u128) >> 64) as usize
    }

    fn prefetch(&self, value: u64) {
        prefetch(&self.slots, self.slot(value));
    }

    /// Whether `value` is new.
    fn insert(&mut self, value: u64) -> bool {
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

/// Starts loading `slice[index]`, if there is one.
#[inline]
fn prefetch<T>(slice: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(item) = slice.get(index) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing and cannot fault; the address is that of a live item.
        #[allow(unsafe_code)]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(item).cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (slice, index);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::Interrupted;

    /// Each line's draw, and what NumPy drew: seed, state and increment (hexadecimal), rows, n, and
    /// what follows the colon.
    fn numpy_draws(text: &'static str) -> impl Iterator<Item = (Vec<i64>, Vec<u64>)> {
        text.lines().filter(|line| !line.starts_with('#')).map(|line| {
            let (call, values) = line.split_once(": ").expect("a colon");
            let [_, state, increment, rows, n] = call.split(' ').collect::<Vec<_>>()[..] else {
                panic!("five words before the colon: {call}")
            };
            let wide = |digits| u128::from_str_radix(digits, 16).expect("hexadecimal digits");
            let generator = Generator::new(wide(state), wide(increment));
            let mut out = vec![0; n.parse().expect("n")];
            let rows = rows.parse().expect("rows");
            without_replacement(rows, generator, &mut out, &mut || Ok(())).expect("a draw");
            let values = values.split(' ').map(|value| value.parse().expect("an integer"));
            (out, values.collect())
        })
    }

    #[test]
    fn equals_numpy_index_for_index() {
        for (drawn, expected) in numpy_draws(include_str!("../tests/data/draws/vectors.txt")) {
            let expected: Vec<_> = expected.into_iter().map(|index| index as i64).collect();
            assert_eq!(drawn, expected);
        }
    }

    #[test]
    fn equals_numpy_in_long_draws() {
        for (drawn, expected) in numpy_draws(include_str!("../tests/data/draws/digests.txt")) {
            let digest = (1u64..).zip(drawn).fold(0u64, |digest, (place, index)| {
                digest.wrapping_add(place.wrapping_mul(index as u64))
            });
            assert_eq!(vec![digest], expected);
        }
    }

    fn draw(rows: u64, out: &mut [i64], interrupt: Interrupt<'_>) -> Result<(), Error> {
        without_replacement(rows, Generator::new(1, 1), out, interrupt)
    }

    #[test]
    fn nothing_is_drawn_for_no_indices() {
        draw(5, &mut [], &mut || Ok(())).expect("a draw");
        draw(0, &mut [], &mut || Ok(())).expect("a draw");
    }

    #[test]
    fn more_than_there_are_or_than_can_be_counted_is_refused() {
        for (rows, n) in [(0, 1), (4, 5), (1 << 63, 1), (u64::MAX, 1)] {
            let outcome = draw(rows, &mut vec![0; n], &mut || Ok(()));
            assert!(matches!(outcome, Err(Error::Sample { .. })), "{n} of {rows}");
        }
        draw((1 << 63) - 1, &mut [0; 3], &mut || Ok(())).expect("a draw");
    }

    #[test]
    fn tables_larger_than_memory_are_errors() {
        assert!(Repeats::new(1 << 60).is_err());
        assert!(Set::new(1 << 55).is_err());
        assert!(Set::new(usize::MAX).is_err());
    }

    #[test]
    fn every_way_of_drawing_can_be_interrupted() {
        let stopped = |rows, n| {
            let mut questions = 0;
            let outcome = draw(rows, &mut vec![0; n], &mut || {
                questions += 1;
                if questions == 3 { Err(Interrupted) } else { Ok(()) }
            });
            assert!(matches!(outcome, Err(Error::Interrupted(_))));
            assert_eq!(questions, 3);
        };
        stopped(20 * BLOCK as u64, 10 * BLOCK);
        stopped(1 << 40, 10 * BLOCK);
    }
}
