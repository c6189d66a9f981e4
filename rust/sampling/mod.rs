//! NumPy's sample of a large share of a range, bit for bit, in memory that grows with the sample.
//!
//! `Generator.choice(population, n, replace=False)` shuffles the tail of the whole range, in memory
//! that grows with the range, if n is more than a fiftieth of it. Smaller samples are NumPy's own.

pub mod random;
mod repeats;

use self::random::Generator;
use self::repeats::Repeats;
use crate::error::{Error, Interrupt};

/// Targets made ahead of their use, so that the memory they need is on its way.
const BATCH: usize = 1024;
/// Entries passed over between two questions to the caller whether to stop.
const CHUNK: usize = 1 << 20;
/// NumPy shuffles a tail if the sample is larger than the population over this.
const CUTOFF: u64 = 50;

/// Shuffles positions `population - 1` down to `population - n` of the identity, and keeps these n.
///
/// The n positions are `out` itself. A position below them matters only if the shuffle visits it
/// more than once, because only a second visit sees the value that the first one left there.
/// `Repeats` finds such positions in a first pass over the same random targets.
pub fn shuffle_tail(
    population: u64,
    generator: Generator,
    out: &mut [i64],
    interrupt: Interrupt<'_>,
) -> Result<(), Error> {
    let sample = out.len() as u64;
    let range = (population / CUTOFF).max(1)..=population.min(i64::MAX as u64);
    if !range.contains(&sample) {
        return Err(Error::Argument(format!(
            "a tail shuffle must sample a fiftieth to all of its rows; got {sample} of {population}"
        )));
    }
    let head = population - sample;
    // Position 0 has no target: a range of one leaves no choice.
    let first = head.max(1);
    let mut repeats = Repeats::new(head)?;
    let mut targets = Targets::new(generator.clone(), first, population);
    while let Some((_, batch)) = targets.next_batch() {
        interrupt()?;
        batch.iter().for_each(|&target| repeats.prefetch(target));
        batch.iter().for_each(|&target| repeats.visit(target));
    }
    let mut displaced = repeats.finish(interrupt)?;

    let mut next = head as i64;
    for chunk in out.chunks_mut(CHUNK) {
        interrupt()?;
        for (value, position) in chunk.iter_mut().zip(next..) {
            *value = position;
        }
        next += chunk.len() as i64;
    }
    let mut targets = Targets::new(generator, first, population);
    while let Some((top, batch)) = targets.next_batch() {
        interrupt()?;
        batch.iter().for_each(|&target| displaced.prefetch(target));
        for (step, &target) in batch.iter().enumerate() {
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

/// The random target in [0, i] of each position i from `population - 1` down to `first`.
struct Targets {
    generator: Generator,
    first: u64,
    next: u64,
    batch: Vec<u64>,
}

impl Targets {
    fn new(generator: Generator, first: u64, population: u64) -> Self {
        Self { generator, first, next: population, batch: Vec::with_capacity(BATCH) }
    }

    /// The largest i of the next batch and the targets, or nothing at the end.
    fn next_batch(&mut self) -> Option<(u64, &[u64])> {
        let length = (self.next - self.first).min(BATCH as u64);
        let top = self.next.checked_sub(1).filter(|_| length > 0)?;
        self.batch.clear();
        let generator = &mut self.generator;
        self.batch.extend((0..length).map(|step| generator.bounded(top - step)));
        self.next -= length;
        Some((top, &self.batch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Interrupted;

    fn sample(population: u64, n: usize, interrupt: Interrupt<'_>) -> Result<Vec<i64>, Error> {
        let mut out = vec![0; n];
        shuffle_tail(population, Generator::new(1, 1), &mut out, interrupt)?;
        Ok(out)
    }

    /// Each line has seed, state, increment, population, n and the digest of NumPy's sample.
    #[test]
    fn long_samples_equal_numpy() {
        let lines = include_str!("../../tests/data/samples/digests.txt").lines().skip(1);
        let mut compared = 0;
        for line in lines {
            let words: Vec<_> = line.split([' ', ':']).collect();
            let wide = |at: usize| u128::from_str_radix(words[at], 16).expect("hexadecimal digits");
            let (population, n): (u64, usize) =
                (words[3].parse().expect("population"), words[4].parse().expect("n"));
            if population <= 10_000 || n as u64 <= population / CUTOFF {
                continue;
            }
            let mut out = vec![0; n];
            let generator = Generator::new(wide(1), wide(2));
            shuffle_tail(population, generator, &mut out, &mut || Ok(())).expect("a sample");
            let digest = (1u64..).zip(out).fold(0u64, |digest, (place, index)| {
                digest.wrapping_add(place.wrapping_mul(index as u64))
            });
            assert_eq!(digest.to_string(), words[6], "{n} of {population}");
            compared += 1;
        }
        assert!(compared >= 5);
    }

    #[test]
    fn impossible_samples_are_refused() {
        for (population, n) in [(0, 0), (0, 1), (4, 5), (u64::MAX, 1), (1 << 40, 1)] {
            let outcome = sample(population, n, &mut || Ok(()));
            assert!(matches!(outcome, Err(Error::Argument(_))), "{n} of {population}");
        }
    }

    #[test]
    fn a_sample_can_be_interrupted() {
        let mut questions = 0;
        let outcome = sample(20 * BATCH as u64, 10 * BATCH, &mut || {
            questions += 1;
            if questions == 3 { Err(Interrupted) } else { Ok(()) }
        });
        assert!(matches!(outcome, Err(Error::Interrupted(_))));
        assert_eq!(questions, 3);
    }
}
