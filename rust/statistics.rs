//! Moments of the vectors of a batch in float64: per layer and feature, in the order of the rows.
//!
//! There is one order of operations and no fused multiply-add, so that the same bytes give the same
//! bits on every processor.

use crate::output::checksum::Element;

/// Values that a layer's record holds per feature: mean, M2 (the sum of squared deviations from the
/// mean), min, max, and how many elements are beyond 6 in magnitude.
pub const PER_FEATURE: usize = 5;

/// Values that follow them: the means of the vectors' norms and squared norms.
pub const PER_LAYER: usize = 2;

/// Vectors whose deviations from the first of them are summed before Chan's rule merges the sums.
/// Subtracting the squared sum from the sum of squares then loses at most a factor of `TILE`.
const TILE: usize = 256;

/// Elements that are widened at once: they stay in the inner caches.
const GROUP: usize = 4096;

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
    /// Bytes of a row: `run` vectors per layer.
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
    for (number, record) in records.chunks_exact_mut(vectors.record_len()).enumerate() {
        let spans = || elements.chunks_exact(run * width).skip(number).step_by(layers);
        let mut layer = Layer::new(width);
        for vector in spans().flat_map(|span| span.chunks_exact(width)) {
            layer.add(vector, widen);
        }
        layer.sum_group();
        layer.merge_tile();
        layer.write(record, width);
        // Comparisons skip NaN, which is the min and the max of a feature that has one.
        if record[..width].iter().any(|mean| !mean.is_finite()) {
            let elements = spans().flatten().enumerate();
            for (at, _) in elements.filter(|&(_, &element)| widen(element).is_nan()) {
                record[2 * width + at % width] = f64::NAN;
                record[3 * width + at % width] = f64::NAN;
            }
        }
    }
}

/// State of some features of a layer.
#[derive(Clone, Copy)]
struct Features {
    mean: Lanes,
    m2: Lanes,
    min: Lanes,
    max: Lanes,
    beyond: Lanes,
    /// First vector of the tile, but 0 where it is not finite.
    shift: Lanes,
    /// Sum of the tile's deviations from `shift`, and the sum of their squares.
    sum: Lanes,
    squares: Lanes,
}

/// State of a layer: merged vectors, and a tile of vectors that are summed but not merged yet.
struct Layer {
    count: usize,
    norms: [f64; PER_LAYER],
    features: Vec<Features>,
    tile: usize,
    tile_norms: [f64; PER_LAYER],
    /// Vectors of the tile that are not summed yet, each with zeros up to whole lanes.
    group: Vec<Lanes>,
    grouped: usize,
}

impl Layer {
    fn new(width: usize) -> Self {
        let zero = [0.0; LANES];
        let features = Features {
            mean: zero,
            m2: zero,
            min: [f64::INFINITY; LANES],
            max: [f64::NEG_INFINITY; LANES],
            beyond: zero,
            shift: zero,
            sum: zero,
            squares: zero,
        };
        let lanes = width.div_ceil(LANES);
        Self {
            count: 0,
            norms: [0.0; PER_LAYER],
            features: vec![features; lanes],
            tile: 0,
            tile_norms: [0.0; PER_LAYER],
            group: vec![zero; (GROUP / LANES / lanes).clamp(1, TILE) * lanes],
            grouped: 0,
        }
    }

    /// Adds a vector to the group. A full group is added to the tile, a full tile to the layer.
    #[inline(always)]
    fn add<const N: usize>(&mut self, vector: &[[u8; N]], widen: impl Fn([u8; N]) -> f64) {
        let lanes = self.features.len();
        let to = self.group[self.grouped * lanes..][..lanes].as_flattened_mut();
        for (to, &element) in to.iter_mut().zip(vector) {
            *to = widen(element);
        }
        self.grouped += 1;
        if self.grouped * lanes == self.group.len() || self.tile + self.grouped == TILE {
            self.sum_group();
        }
        if self.tile == TILE {
            self.merge_tile();
        }
    }

    /// Adds the group to the sums of the tile.
    #[inline(always)]
    fn sum_group(&mut self) {
        let lanes = self.features.len();
        let group = &self.group[..self.grouped * lanes];
        for vector in group.chunks_exact(lanes) {
            let square = sum_of_squares(vector);
            self.tile_norms[0] += square.sqrt();
            self.tile_norms[1] += square;
        }
        for (at, to) in self.features.iter_mut().enumerate() {
            let mut features = *to;
            if self.tile == 0 {
                for (shift, value) in features.shift.iter_mut().zip(self.group[at]) {
                    *shift = if value.is_finite() { value } else { 0.0 };
                }
            }
            let mut beyond = [0_u64; LANES];
            for vector in group.chunks_exact(lanes) {
                for (lane, &value) in vector[at].iter().enumerate() {
                    let deviation = value - features.shift[lane];
                    let (min, max) = (features.min[lane], features.max[lane]);
                    features.sum[lane] += deviation;
                    features.squares[lane] += deviation * deviation;
                    features.min[lane] = if value < min { value } else { min };
                    features.max[lane] = if value > max { value } else { max };
                    beyond[lane] += u64::from(value.abs() > 6.0);
                }
            }
            for (count, more) in features.beyond.iter_mut().zip(beyond) {
                *count += more as f64;
            }
            *to = features;
        }
        self.tile += std::mem::take(&mut self.grouped);
    }

    /// Merges the tile by Chan's rule and begins another.
    #[inline(always)]
    fn merge_tile(&mut self) {
        let (count, tile) = (self.count as f64, self.tile as f64);
        let weight = tile / (count + tile);
        for features in self.features.iter_mut().filter(|_| tile > 0.0) {
            for lane in 0..LANES {
                let sum = features.sum[lane];
                let mean = features.shift[lane] + sum / tile;
                let m2 = features.squares[lane] - sum * (sum / tile);
                let delta = mean - features.mean[lane];
                // The difference of two infinite means is NaN. Their sum is NumPy's mean.
                let step = if delta.is_finite() { delta * weight } else { mean };
                features.mean[lane] += step;
                features.m2[lane] += m2.max(0.0) + delta * delta * weight * count;
            }
            features.sum = [0.0; LANES];
            features.squares = [0.0; LANES];
        }
        for (norm, more) in self.norms.iter_mut().zip(&mut self.tile_norms) {
            *norm += std::mem::take(more);
        }
        self.count += std::mem::take(&mut self.tile);
    }

    fn write(&self, record: &mut [f64], width: usize) {
        for feature in 0..width {
            let (features, lane) = (&self.features[feature / LANES], feature % LANES);
            record[feature] = features.mean[lane];
            record[width + feature] = features.m2[lane];
            record[2 * width + feature] = features.min[lane];
            record[3 * width + feature] = features.max[lane];
            record[4 * width + feature] = features.beyond[lane];
        }
        for (to, norm) in record[PER_FEATURE * width..].iter_mut().zip(self.norms) {
            *to = norm / self.count as f64;
        }
    }
}

#[inline(always)]
fn sum_of_squares(vector: &[Lanes]) -> f64 {
    let mut squares = [0.0; LANES];
    for values in vector {
        for lane in 0..LANES {
            squares[lane] += values[lane] * values[lane];
        }
    }
    let [a, b, c, d, e, f, g, h] = squares;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
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
