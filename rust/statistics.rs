//! Moments of the vectors of a batch in float64: per layer and feature, in the order of the rows.
//!
//! There is one order of operations and no fused multiply-add, so that the same bytes give the same
//! bits on every processor.

use crate::checksum::Element;

/// Values that a layer's record holds per feature: mean, M2 (the sum of squared deviations from the
/// mean), min, max, and how many elements are beyond 6 in magnitude.
pub const PER_FEATURE: usize = 5;

/// Values that follow them: the sums of the vectors' norms and squared norms.
pub const PER_LAYER: usize = 2;

/// Vectors whose deviations from the first of them are summed before Chan's rule merges the sums.
/// Subtracting the squared sum from the sum of squares then loses at most a factor of `TILE`.
const TILE: usize = 256;

/// Vectors that are widened and added at once.
const GROUP: usize = 4;

const LANES: usize = 8;

type Lanes = [f64; LANES];

/// A tensor as a sequence of vectors: `run` of the first layer, as many of the next, and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vectors {
    pub element: Element,
    pub layers: usize,
    pub run: usize,
    pub width: usize,
}

impl Vectors {
    /// Bytes of one vector of each run and layer.
    pub fn row_nbytes(&self) -> usize {
        self.layers * self.run * self.width * self.element.nbytes()
    }

    /// Values of a layer's record.
    pub fn record_len(&self) -> usize {
        PER_FEATURE * self.width + PER_LAYER
    }
}

/// Measures whole rows of a tensor into a record per layer, with vectors as wide as the processor
/// has them.
pub fn measure(vectors: Vectors, data: &[u8], records: &mut [f64]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has the instructions that the function is compiled for.
        #[allow(unsafe_code)]
        return unsafe { measure_avx2(vectors, data, records) };
    }
    measure_portably(vectors, data, records);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn measure_avx2(vectors: Vectors, data: &[u8], records: &mut [f64]) {
    measure_portably(vectors, data, records);
}

#[inline(always)]
fn measure_portably(vectors: Vectors, data: &[u8], records: &mut [f64]) {
    match vectors.element {
        Element::Float64 => measure_layers(vectors, data, records, f64::from_le_bytes),
        Element::Float16 => measure_layers(vectors, data, records, from_float16),
        Element::BFloat16 => measure_layers(vectors, data, records, from_bfloat16),
        Element::Float32 | Element::Integer => measure_layers(vectors, data, records, from_float32),
    }
}

#[inline(always)]
fn measure_layers<const N: usize>(
    vectors: Vectors,
    data: &[u8],
    records: &mut [f64],
    widen: impl Fn([u8; N]) -> f64 + Copy,
) {
    let Vectors { layers, run, width, .. } = vectors;
    let (elements, _) = data.as_chunks::<N>();
    for (layer, record) in records.chunks_exact_mut(vectors.record_len()).enumerate() {
        let spans = || elements.chunks_exact(run * width).skip(layer).step_by(layers);
        let mut moments = Moments::new(record, width);
        let mut tile = Tile::new(width);
        for group in spans().flat_map(|span| span.chunks(GROUP * width)) {
            tile.add(group, width, widen);
            if tile.count >= TILE {
                moments.merge(&mut tile);
            }
        }
        moments.merge(&mut tile);
        if moments.mean.iter().any(|mean| !mean.is_finite()) {
            let all = spans().flatten().map(|&element| widen(element));
            moments.mark_nan(all);
        }
    }
}

/// The record of a layer.
struct Moments<'a> {
    count: f64,
    mean: &'a mut [f64],
    m2: &'a mut [f64],
    min: &'a mut [f64],
    max: &'a mut [f64],
    beyond: &'a mut [f64],
    norms: &'a mut [f64],
}

impl<'a> Moments<'a> {
    #[inline(always)]
    fn new(record: &'a mut [f64], width: usize) -> Self {
        record.fill(0.0);
        let (mean, rest) = record.split_at_mut(width);
        let (m2, rest) = rest.split_at_mut(width);
        let (min, rest) = rest.split_at_mut(width);
        let (max, rest) = rest.split_at_mut(width);
        let (beyond, norms) = rest.split_at_mut(width);
        min.fill(f64::INFINITY);
        max.fill(f64::NEG_INFINITY);
        Self { count: 0.0, mean, m2, min, max, beyond, norms }
    }

    /// Merges a tile by Chan's rule and empties it.
    #[inline(always)]
    fn merge(&mut self, tile: &mut Tile) {
        if tile.count == 0 {
            return;
        }
        let more = tile.count as f64;
        let total = self.count + more;
        for feature in 0..self.mean.len() {
            let (sums, lane) = (&tile.sums[feature / LANES], feature % LANES);
            let sum = sums.sum[lane];
            let mean = sums.shift[lane] + sum / more;
            let m2 = (sums.squares[lane] - sum * (sum / more)).max(0.0);
            let delta = mean - self.mean[feature];
            // The difference of two infinite means is NaN, their sum is what NumPy has.
            let step = if delta.is_finite() { delta * (more / total) } else { mean };
            self.mean[feature] += step;
            self.m2[feature] += m2 + delta * delta * (self.count * more / total);
            self.min[feature] = lesser(sums.min[lane], self.min[feature]);
            self.max[feature] = greater(sums.max[lane], self.max[feature]);
            self.beyond[feature] += sums.beyond[lane];
        }
        self.norms[0] += tile.norms;
        self.norms[1] += tile.squared_norms;
        self.count = total;
        tile.count = 0;
    }

    /// Comparisons skip NaN, which is the min and the max of a feature that has one.
    fn mark_nan(&mut self, elements: impl Iterator<Item = f64>) {
        let width = self.mean.len();
        for (at, _) in elements.enumerate().filter(|(_, element)| element.is_nan()) {
            self.min[at % width] = f64::NAN;
            self.max[at % width] = f64::NAN;
        }
    }
}

/// Sums of some features of the vectors of a tile.
#[derive(Clone, Copy)]
struct Sums {
    /// The first vector, which the deviations are from.
    shift: Lanes,
    sum: Lanes,
    squares: Lanes,
    min: Lanes,
    max: Lanes,
    beyond: Lanes,
}

/// Sums of up to about `TILE` vectors of one layer.
struct Tile {
    count: usize,
    norms: f64,
    squared_norms: f64,
    sums: Vec<Sums>,
    /// A group of vectors, each with zeros up to whole lanes.
    group: [Vec<Lanes>; GROUP],
}

impl Tile {
    fn new(width: usize) -> Self {
        let zero = [0.0; LANES];
        let sums =
            Sums { shift: zero, sum: zero, squares: zero, min: zero, max: zero, beyond: zero };
        let lanes = width.div_ceil(LANES);
        Self {
            count: 0,
            norms: 0.0,
            squared_norms: 0.0,
            sums: vec![sums; lanes],
            group: std::array::from_fn(|_| vec![zero; lanes]),
        }
    }

    /// Adds up to `GROUP` vectors.
    #[inline(always)]
    fn add<const N: usize>(
        &mut self,
        elements: &[[u8; N]],
        width: usize,
        widen: impl Fn([u8; N]) -> f64 + Copy,
    ) {
        if self.count == 0 {
            (self.norms, self.squared_norms) = (0.0, 0.0);
        }
        let rows = elements.len() / width;
        for (vector, lanes) in elements.chunks_exact(width).zip(&mut self.group) {
            let square = widen_vector(vector, lanes, widen);
            self.squared_norms += square;
            self.norms += square.sqrt();
        }
        if self.count == 0 {
            self.start();
        }
        if rows == GROUP {
            self.sum::<GROUP>(0);
        } else {
            (0..rows).for_each(|row| self.sum::<1>(row));
        }
        self.count += rows;
    }

    /// Takes the first vector for the shift, but 0 where it is not finite.
    #[inline(always)]
    fn start(&mut self) {
        for (sums, first) in self.sums.iter_mut().zip(&self.group[0]) {
            *sums = Sums {
                shift: first.map(|value| if value.is_finite() { value } else { 0.0 }),
                sum: [0.0; LANES],
                squares: [0.0; LANES],
                min: [f64::INFINITY; LANES],
                max: [f64::NEG_INFINITY; LANES],
                beyond: [0.0; LANES],
            };
        }
    }

    /// Adds vectors of the group from the `first`.
    #[inline(always)]
    fn sum<const ROWS: usize>(&mut self, first: usize) {
        let lanes = self.sums.len();
        let rows: [&[Lanes]; ROWS] = std::array::from_fn(|row| &self.group[first + row][..lanes]);
        for (at, to) in self.sums.iter_mut().enumerate() {
            let mut sums = *to;
            for row in rows {
                for (lane, &value) in row[at].iter().enumerate() {
                    let deviation = value - sums.shift[lane];
                    sums.sum[lane] += deviation;
                    sums.squares[lane] += deviation * deviation;
                    sums.min[lane] = lesser(value, sums.min[lane]);
                    sums.max[lane] = greater(value, sums.max[lane]);
                    sums.beyond[lane] += if value.abs() > 6.0 { 1.0 } else { 0.0 };
                }
            }
            *to = sums;
        }
    }
}

/// Widens a vector and returns the sum of its squares.
#[inline(always)]
fn widen_vector<const N: usize>(
    vector: &[[u8; N]],
    lanes: &mut [Lanes],
    widen: impl Fn([u8; N]) -> f64 + Copy,
) -> f64 {
    for (to, &element) in lanes.as_flattened_mut().iter_mut().zip(vector) {
        *to = widen(element);
    }
    let mut squares = [0.0; LANES];
    for values in lanes.iter() {
        for lane in 0..LANES {
            squares[lane] += values[lane] * values[lane];
        }
    }
    let [a, b, c, d, e, f, g, h] = squares;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

#[inline(always)]
fn lesser(value: f64, least: f64) -> f64 {
    if value < least { value } else { least }
}

#[inline(always)]
fn greater(value: f64, most: f64) -> f64 {
    if value > most { value } else { most }
}

#[inline(always)]
fn from_float32(bytes: [u8; 4]) -> f64 {
    f32::from_le_bytes(bytes).into()
}

#[inline(always)]
fn from_bfloat16(bytes: [u8; 2]) -> f64 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16).into()
}

/// Without arithmetic on subnormal numbers, which threads may be set to take for zero.
#[inline(always)]
fn from_float16(bytes: [u8; 2]) -> f64 {
    const SMALLEST_NORMAL: u32 = 0x400 << 13;
    const INFINITY: u32 = 0x7c00 << 13;
    const REBIAS: u32 = (127 - 15) << 23;
    let bits = u32::from(u16::from_le_bytes(bytes));
    let magnitude = (bits & 0x7fff) << 13;
    let more = if magnitude >= INFINITY { REBIAS } else { 0 };
    let normal = f32::from_bits(magnitude + REBIAS + more);
    let hidden = REBIAS + SMALLEST_NORMAL;
    let subnormal = f32::from_bits(magnitude + hidden) - f32::from_bits(hidden);
    let value = if magnitude < SMALLEST_NORMAL { subnormal } else { normal };
    f32::from_bits(value.to_bits() | (bits & 0x8000) << 16).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the meaning of its fields: an exponent of 5 bits less 15, and 10 bits after the point.
    fn value_of(half: u16) -> f64 {
        let (exponent, fraction) = (i32::from(half >> 10 & 0x1f), f64::from(half & 0x3ff) / 1024.0);
        let magnitude = match exponent {
            0 => fraction * 2_f64.powi(-14),
            31 if fraction == 0.0 => f64::INFINITY,
            31 => f64::NAN,
            _ => (1.0 + fraction) * 2_f64.powi(exponent - 15),
        };
        if half >> 15 == 0 { magnitude } else { -magnitude }
    }

    #[test]
    fn every_float16_is_widened_exactly() {
        for half in 0..=u16::MAX {
            let (found, expected) = (from_float16(half.to_le_bytes()), value_of(half));
            assert_eq!(found.is_nan(), expected.is_nan(), "{half:#x}");
            assert!(found.is_nan() || found.to_bits() == expected.to_bits(), "{half:#x}");
        }
    }

    fn measured(vectors: Vectors, values: &[f32]) -> Vec<f64> {
        let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut records = vec![0.0; vectors.layers * vectors.record_len()];
        measure(vectors, &data, &mut records);
        records
    }

    #[test]
    fn layers_have_their_own_vectors() {
        let vectors = Vectors { element: Element::Float32, layers: 2, run: 2, width: 1 };
        let values = [1.0, 3.0, 10.0, 10.0, 5.0, 7.0, 10.0, 10.0];
        let expected =
            [[4.0, 20.0, 1.0, 7.0, 1.0, 16.0, 84.0], [10.0, 0.0, 10.0, 10.0, 4.0, 40.0, 400.0]];
        assert_eq!(measured(vectors, &values), expected.concat());
    }

    #[test]
    fn every_processor_finds_the_same_bits() {
        for element in [Element::Float64, Element::Float32, Element::Float16, Element::BFloat16] {
            for width in [1, 16, 75] {
                let vectors = Vectors { element, layers: 2, run: 5, width };
                let byte = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 & 0xbb;
                let data: Vec<u8> = (0..200 * vectors.row_nbytes() as u64).map(byte).collect();
                let [mut ours, mut portable] =
                    [(); 2].map(|()| vec![0.0; 2 * vectors.record_len()]);
                measure(vectors, &data, &mut ours);
                measure_portably(vectors, &data, &mut portable);
                assert!(ours.iter().all(|value| value.is_finite()), "{element:?} {width}");
                assert_eq!(ours, portable, "{element:?} {width}");
            }
        }
    }
}
