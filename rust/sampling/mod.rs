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
