//! Statistics of a tensor of vectors: exact, so that they depend on its elements alone and not on
//! the order or the pieces in which these come.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::checksum::{Digest, Digester, Element};
use crate::exact::{ExactSums, NBYTES};
use crate::load::{from_float16, from_float16_by_f16c, load};
use crate::memory::{self, OutOfMemory};
use crate::norms;
use crate::tile::{self, LANES, Lanes, ROWS, STRIPES, Scan, Sums, Tile};

/// Tiles that are filled at once, so that rows are read in long pieces.
const TILES: usize = 4;

/// Read at a time: enough vectors of each layer to fill a tile.
const READ: usize = 4 << 20;

/// A tensor as a sequence of vectors: `run` of the first layer, as many of the next, and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vectors {
    pub element: Element,
    pub layers: usize,
    pub run: usize,
    pub width: usize,
}

impl Vectors {
    pub fn nbytes(&self) -> usize {
        self.width * self.element.nbytes()
    }
}

/// The statistics of a tensor, taken from any threads.
pub struct Statistics {
    vectors: Vectors,
    layers: Vec<Mutex<Layer>>,
}

/// The statistics of a layer's vectors.
///
/// What is not finite is in no exact sum: NaN and infinite values add up by themselves, to zero
/// where there are none.
struct Layer {
    count: u64,
    special_norms: f64,
    norms: ExactSums,
    sums: ExactSums,
    squares: ExactSums,
    special: Vec<f64>,
    /// NaN where there is one among the elements.
    min: Vec<f32>,
    max: Vec<f32>,
    outliers: Vec<u64>,
}

impl Statistics {
    pub fn new(vectors: Vectors) -> Result<Self, OutOfMemory> {
        let mut layers = memory::with_capacity(vectors.layers)?;
        for _ in 0..vectors.layers {
            layers.push(Mutex::new(Layer::new(vectors.width)?));
        }
        Ok(Self { vectors, layers })
    }

    pub fn vectors(&self) -> Vectors {
        self.vectors
    }

    fn layer(&self, number: usize) -> MutexGuard<'_, Layer> {
        self.layers[number].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds vectors that lie one after the other in the tensor, from the `first`.
    pub fn add(&self, first: u64, data: &[u8]) -> Result<(), OutOfMemory> {
        let mut block = Block::new(self.vectors)?;
        let count = data.len() / self.vectors.nbytes();
        for number in 0..self.layers.len() {
            let runs = runs_of(self.vectors, number as u64, first..first + count as u64);
            let starts = runs.flatten().map(|vector| (vector - first) as usize);
            let mut starts = starts.map(|vector| vector * self.vectors.nbytes());
            while block.fill(data, &mut starts) {
                block.add_to(&mut self.layer(number));
            }
        }
        Ok(())
    }

    /// Reads vectors at an offset in a file, digests and adds them.
    pub fn read(&self, file: &File, offset: u64, first: u64, count: u64) -> io::Result<Digest> {
        let nbytes = self.vectors.nbytes();
        let at_once = (READ / nbytes).max(1).min(count as usize);
        let mut data = memory::filled(0, at_once * nbytes)?;
        let mut digester = Digester::new(self.vectors.element);
        let mut done = 0;
        while done < count {
            let some = (count - done).min(at_once as u64);
            let data = &mut data[..some as usize * nbytes];
            file.read_exact_at(data, offset + done * nbytes as u64)?;
            digester.update(data);
            self.add(first + done, data)?;
            done += some;
        }
        Ok(digester.finish())
    }

    /// Adds what others saw of the same tensor, by their state; says whether it can be one.
    pub fn merge(&self, state: &[u8]) -> bool {
        let nbytes = Layer::nbytes(self.vectors.width);
        let is_one = state.len() == nbytes * self.layers.len();
        if is_one {
            for (number, state) in state.chunks_exact(nbytes).enumerate() {
                self.layer(number).merge(&Layer::from_bytes(state, self.vectors.width));
            }
        }
        is_one
    }

    /// All that is known, layer after layer; see `Layer::to_bytes`.
    pub fn state(&self) -> Vec<u8> {
        (0..self.layers.len()).flat_map(|number| self.layer(number).to_bytes()).collect()
    }
}

/// The vectors of a layer among some of the tensor's.
fn runs_of(vectors: Vectors, layer: u64, among: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let (layers, run) = (vectors.layers as u64, vectors.run as u64);
    let first = among.start / run;
    let skipped = (layer + layers - first % layers) % layers;
    let numbers = (first + skipped..among.end.div_ceil(run)).step_by(vectors.layers);
    numbers.map(move |number| (number * run).max(among.start)..((number + 1) * run).min(among.end))
}

impl Layer {
    fn new(width: usize) -> Result<Self, OutOfMemory> {
        Ok(Self {
            count: 0,
            special_norms: 0.0,
            norms: ExactSums::zeros(1)?,
            sums: ExactSums::zeros(width)?,
            squares: ExactSums::zeros(width)?,
            special: memory::filled(0.0, width)?,
            min: memory::filled(f32::INFINITY, width)?,
            max: memory::filled(f32::NEG_INFINITY, width)?,
            outliers: memory::filled(0, width)?,
        })
    }

    /// Bytes of its state.
    fn nbytes(width: usize) -> usize {
        8 + 8 + NBYTES + width * (2 * NBYTES + 8 + 4 + 4 + 8)
    }

    /// The fields in their order, little-endian and without padding; a sum is a number of `NBYTES`.
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.count.to_le_bytes().to_vec();
        bytes.extend(self.special_norms.to_le_bytes());
        bytes.extend(self.norms.to_bytes());
        bytes.extend(self.sums.to_bytes());
        bytes.extend(self.squares.to_bytes());
        bytes.extend(self.special.iter().flat_map(|value| value.to_le_bytes()));
        bytes.extend(self.min.iter().flat_map(|value| value.to_le_bytes()));
        bytes.extend(self.max.iter().flat_map(|value| value.to_le_bytes()));
        bytes.extend(self.outliers.iter().flat_map(|count| count.to_le_bytes()));
        bytes
    }

    /// What `to_bytes` gave.
    fn from_bytes(mut bytes: &[u8], width: usize) -> Self {
        let mut take = |nbytes| {
            let (head, rest) = bytes.split_at(nbytes);
            bytes = rest;
            head
        };
        let eights = |bytes: &[u8]| bytes.as_chunks().0.to_vec();
        let fours = |bytes: &[u8]| bytes.as_chunks().0.to_vec();
        Self {
            count: u64::from_le_bytes(eights(take(8))[0]),
            special_norms: f64::from_le_bytes(eights(take(8))[0]),
            norms: ExactSums::from_bytes(take(NBYTES)),
            sums: ExactSums::from_bytes(take(width * NBYTES)),
            squares: ExactSums::from_bytes(take(width * NBYTES)),
            special: eights(take(8 * width)).into_iter().map(f64::from_le_bytes).collect(),
            min: fours(take(4 * width)).into_iter().map(f32::from_le_bytes).collect(),
            max: fours(take(4 * width)).into_iter().map(f32::from_le_bytes).collect(),
            outliers: eights(take(8 * width)).into_iter().map(u64::from_le_bytes).collect(),
        }
    }

    fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.sums.merge(&other.sums);
        self.squares.merge(&other.squares);
        self.norms.merge(&other.norms);
        self.special_norms += other.special_norms;
        let add =
            |to: &mut Vec<f64>, from: &[f64]| to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
        add(&mut self.special, &other.special);
        self.outliers.iter_mut().zip(&other.outliers).for_each(|(to, from)| *to += from);
        self.min.iter_mut().zip(&other.min).for_each(|(to, &from)| lower(to, from));
        self.max.iter_mut().zip(&other.max).for_each(|(to, &from)| raise(to, from));
    }
}

fn lower(least: &mut f32, value: f32) {
    if value < *least || value.is_nan() {
        *least = value;
    }
}

fn raise(most: &mut f32, value: f32) {
    if value > *most || value.is_nan() {
        *most = value;
    }
}

/// What is taken of some vectors of one layer before it is added to what is known of that.
struct Block {
    vectors: Vectors,
    count: usize,
    /// Tiles side by side.
    tiles: Vec<Tile>,
    class: Box<Tile>,
    /// Partial sums of each vector's squares.
    squares: Box<[[f64; STRIPES]; ROWS]>,
    /// With the number of the first feature.
    sums: Vec<(usize, Sums)>,
    min: Vec<f32>,
    max: Vec<f32>,
    outliers: Vec<u32>,
    special: Vec<(usize, f64)>,
    /// Terms of the sum of norms.
    norms: Vec<f64>,
}

impl Block {
    fn new(vectors: Vectors) -> Result<Self, OutOfMemory> {
        let width = vectors.width.next_multiple_of(LANES);
        Ok(Self {
            vectors,
            count: 0,
            tiles: memory::filled(Tile::new(), TILES)?,
            class: Box::new(Tile::new()),
            squares: Box::new([[0.0; STRIPES]; ROWS]),
            sums: Vec::new(),
            min: memory::filled(0.0, width)?,
            max: memory::filled(0.0, width)?,
            outliers: memory::filled(0, width)?,
            special: Vec::new(),
            norms: Vec::new(),
        })
    }

    /// Takes as many vectors as a tile has rows, by where in `data` they start; says whether there
    /// was one.
    fn fill(&mut self, data: &[u8], starts: &mut impl Iterator<Item = usize>) -> bool {
        let mut taken = [0; ROWS];
        self.count = taken.iter_mut().zip(starts).map(|(to, start)| *to = start).count();
        self.take(data, &taken[..self.count]);
        self.count > 0
    }

    /// Takes vectors, with instructions as wide as the processor has them.
    fn take(&mut self, data: &[u8], starts: &[usize]) {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2")
            && std::arch::is_x86_feature_detected!("fma")
            && std::arch::is_x86_feature_detected!("f16c")
        {
            // SAFETY: the processor has the instructions that the function is compiled for.
            #[allow(unsafe_code)]
            return unsafe { self.take_avx2(data, starts) };
        }
        self.take_portably(data, starts, from_float16);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn take_avx2(&mut self, data: &[u8], starts: &[usize]) {
        self.take_portably(data, starts, |halves| from_float16_by_f16c(halves));
    }

    #[inline(always)]
    fn take_portably(
        &mut self,
        data: &[u8],
        starts: &[usize],
        from_float16: impl Fn(&[[u8; 2]; LANES]) -> Lanes<f32>,
    ) {
        let Vectors { element, width, .. } = self.vectors;
        self.squares.fill([0.0; STRIPES]);
        self.sums.clear();
        self.special.clear();
        for first in (0..width).step_by(TILES * LANES) {
            let columns = first..width.min(first + TILES * LANES);
            let count = columns.len().div_ceil(LANES);
            load(&mut self.tiles[..count], data, starts, columns, element, &from_float16);
            for number in 0..count {
                self.sum(number, first + number * LANES);
            }
        }
        norms::terms(&self.squares[..self.count], &mut self.norms);
    }

    /// Sums a tile up, whose first feature is the `first`.
    #[inline(always)]
    fn sum(&mut self, number: usize, first: usize) {
        let element = self.vectors.element;
        let tile = &mut self.tiles[number];
        let mut scan = Scan::of(tile);
        let features = first..first + LANES;
        self.min[features.clone()].copy_from_slice(&scan.min);
        self.max[features.clone()].copy_from_slice(&scan.max);
        if scan.has_outliers() {
            self.outliers[features].copy_from_slice(&tile::outliers(tile));
        } else {
            self.outliers[features].fill(0);
        }
        let sums = tile::sums(tile, &scan, &mut self.squares);
        if sums.sum.iter().any(|sum| !sum.is_finite()) {
            self.set_apart(number, first);
            scan = Scan::of(&self.tiles[number]);
        } else if scan.is_narrow(element) {
            self.sums.push((first, sums));
            return;
        }
        let mut unused = Box::new([[0.0; STRIPES]; ROWS]);
        while scan.has_nonzero() {
            tile::take_class(&mut self.tiles[number], &mut self.class, &scan, element);
            self.sums.push((first, tile::sums(&self.class, &scan, &mut unused)));
            scan = Scan::of(&self.tiles[number]);
        }
    }

    /// Leaves zeros in the tile where it is not finite.
    fn set_apart(&mut self, number: usize, first: usize) {
        for row in &mut self.tiles[number].values[..self.count] {
            for (lane, value) in row.iter_mut().enumerate().filter(|(_, value)| !value.is_finite())
            {
                let feature = first + lane;
                if value.is_nan() {
                    self.min[feature] = f32::NAN;
                    self.max[feature] = f32::NAN;
                }
                self.special.push((feature, f64::from(*value)));
                *value = 0.0;
            }
        }
    }

    fn add_to(&self, layer: &mut Layer) {
        layer.count += self.count as u64;
        for (first, sums) in &self.sums {
            for (lane, feature) in (*first..self.vectors.width).take(LANES).enumerate() {
                layer.sums.add(feature, [sums.sum[lane]]);
                layer.squares.add(feature, [sums.high[lane], sums.low[lane]]);
            }
        }
        layer.min.iter_mut().zip(&self.min).for_each(|(to, &from)| lower(to, from));
        layer.max.iter_mut().zip(&self.max).for_each(|(to, &from)| raise(to, from));
        layer
            .outliers
            .iter_mut()
            .zip(&self.outliers)
            .for_each(|(to, &from)| *to += u64::from(from));
        self.special.iter().for_each(|&(feature, value)| layer.special[feature] += value);
        for &norm in &self.norms {
            if norm.is_finite() {
                layer.norms.add(0, [norm]);
            } else {
                layer.special_norms += norm;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of which few are zero, so that elements are of all magnitudes.
    fn bytes(count: usize) -> Vec<u8> {
        (0..count as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
    }

    fn state_of(
        vectors: Vectors,
        data: &[u8],
        take: impl Fn(&mut Block, &[u8], &[usize]),
    ) -> Vec<u8> {
        let mut block = Block::new(vectors).expect("memory");
        let starts: Vec<_> = (0..data.len()).step_by(vectors.nbytes()).collect();
        block.count = starts.len();
        take(&mut block, data, &starts);
        let mut layer = Layer::new(vectors.width).expect("memory");
        block.add_to(&mut layer);
        layer.to_bytes()
    }

    #[test]
    fn all_processors_find_the_same() {
        for element in [Element::Float32, Element::Float16, Element::BFloat16] {
            for width in [1, 16, 75, 130] {
                let vectors = Vectors { element, layers: 1, run: 1, width };
                let data = bytes(ROWS * vectors.nbytes());
                let portably = state_of(vectors, &data, |block, data, starts| {
                    block.take_portably(data, starts, from_float16);
                });
                assert_eq!(state_of(vectors, &data, Block::take), portably, "{element:?} {width}");
            }
        }
    }

    #[test]
    fn vectors_belong_to_their_layers() {
        let vectors = Vectors { element: Element::Float32, layers: 3, run: 2, width: 1 };
        for (among, layer, expected) in [
            (0..12, 1, vec![2, 3, 8, 9]),
            (3..9, 1, vec![3, 8]),
            (3..9, 0, vec![6, 7]),
            (4..5, 2, vec![4]),
            (4..5, 0, vec![]),
            (5..5, 2, vec![]),
        ] {
            let found: Vec<u64> = runs_of(vectors, layer, among.clone()).flatten().collect();
            assert_eq!(found, expected, "{among:?} {layer}");
        }
    }
}
