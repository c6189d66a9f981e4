//! NumPy's draws without replacement, bit for bit, in memory that grows with the draw alone.

use crate::error::Error;
use crate::interrupt::Interrupt;
use crate::memory::{self, OutOfMemory};
use crate::prefetch::prefetch;
use crate::random::Generator;
use crate::repeats::Repeats;
use crate::row_set::RowSet;

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

/// Floyd's method, then a shuffle of its results.
fn floyd(
    rows: u64,
    mut generator: Generator,
    out: &mut [i64],
    interrupt: Interrupt<'_>,
) -> Result<(), Error> {
    let mut set = RowSet::new(out.len())?;
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
