//! A tile: some rows of some lanes of a matrix of floats, and its sums without a rounding error.
//!
//! A plain sum of floats is exact where their exponents lie close together, as those of a lane
//! mostly do; where not, the lane is summed in classes of elements whose exponents do.

use crate::checksum::Element;

pub const ROWS: usize = 256;
pub const LANES: usize = 16;

/// Lanes that are summed at once: more would not fit the registers.
const HALF: usize = LANES / 2;

/// Partial sums of a row's squares.
pub const STRIPES: usize = 4;

const INFINITY: u32 = 0x7f80_0000;
const SIX: u32 = 6.0_f32.to_bits();

pub type Lanes<T> = [T; LANES];

/// Values, zero where there are none.
#[derive(Clone)]
pub struct Tile {
    pub values: [Lanes<f32>; ROWS],
    pub rows: usize,
}

/// What a look at the lanes of a tile tells.
pub struct Scan {
    /// Of all elements that are no NaN.
    pub min: Lanes<f32>,
    pub max: Lanes<f32>,
    /// Bits of the smallest magnitude but zero, less one.
    least: Lanes<u32>,
}

/// Terms of the sums of a tile: each lane's elements add up to `sum`, their squares to `high + low`.
#[derive(Clone)]
pub struct Sums {
    pub sum: Lanes<f64>,
    pub high: Lanes<f64>,
    pub low: Lanes<f64>,
}

impl Tile {
    pub fn new() -> Self {
        Self { values: [[0.0; LANES]; ROWS], rows: 0 }
    }
}

impl Scan {
    #[inline(always)]
    pub fn of(tile: &Tile) -> Self {
        let mut scan = Self {
            min: [f32::INFINITY; LANES],
            max: [f32::NEG_INFINITY; LANES],
            least: [u32::MAX; LANES],
        };
        for row in &tile.values[..tile.rows] {
            for (lane, &value) in row.iter().enumerate() {
                let magnitude = value.to_bits() & !(1 << 31);
                scan.min[lane] = if value < scan.min[lane] { value } else { scan.min[lane] };
                scan.max[lane] = if value > scan.max[lane] { value } else { scan.max[lane] };
                scan.least[lane] = scan.least[lane].min(magnitude.wrapping_sub(1));
            }
        }
        scan
    }

    /// Bits of the greatest magnitudes.
    #[inline(always)]
    fn most(&self) -> Lanes<u32> {
        std::array::from_fn(|lane| {
            let bits = |value: f32| value.to_bits() & !(1 << 31);
            if self.min[lane] > self.max[lane] {
                0
            } else {
                bits(self.min[lane]).max(bits(self.max[lane]))
            }
        })
    }

    pub fn has_outliers(&self) -> bool {
        self.most().iter().any(|&most| most > SIX)
    }

    pub fn has_nonzero(&self) -> bool {
        self.most().iter().any(|&most| most > 0)
    }

    /// Whether each lane's sums are exact: from its least to its greatest exponent it is not far.
    pub fn is_narrow(&self, element: Element) -> bool {
        let range = max_range(element) << 23;
        let least = self.least.iter().map(|least| least.wrapping_add(1) & INFINITY);
        self.most().iter().zip(least).all(|(most, least)| most & INFINITY <= least + range)
    }

    /// For each lane, a power of two above the sum of its squares.
    #[inline(always)]
    fn above_squares(&self) -> Lanes<f64> {
        self.most()
            .map(|most| f64::from_bits(u64::from((most >> 23) * 2 + 1023 - 254 + 2 + 8) << 52))
    }
}

/// Counts the elements beyond 6 in magnitude, NaN not among them.
#[inline(always)]
pub fn outliers(tile: &Tile) -> Lanes<u32> {
    let mut counts = [0; LANES];
    for row in &tile.values[..tile.rows] {
        for lane in 0..LANES {
            counts[lane] += u32::from(row[lane].abs() > 6.0);
        }
    }
    counts
}

/// The furthest that exponents in a lane may lie apart.
///
/// With elements below 2^(E+1) whose last bits are at least 2^(e+1-p), `ROWS` of them add up to less
/// than 2^(E+9), in 53 bits if E - e <= 45 - p. Their squares are added to 2^(2E+10), which rounds
/// each by at most 2^(2E-43); these errors, multiples of 2^(2e+2-2p), add up to at most 2^(2E-35), in
/// 53 bits if E - e <= 45 - p again.
fn max_range(element: Element) -> u32 {
    match element {
        Element::Float16 => 45 - 11,
        Element::BFloat16 => 45 - 8,
        _ => 45 - 24,
    }
}

/// The sums of a tile that is narrow, and of its rows the squares' partial sums added to `squares`.
#[inline(always)]
pub fn sums(tile: &Tile, scan: &Scan, squares: &mut [[f64; STRIPES]; ROWS]) -> Sums {
    let above = scan.above_squares();
    let mut sums = Sums { sum: [0.0; LANES], high: above, low: [0.0; LANES] };
    for half in [0, HALF] {
        let mut sum: [f64; HALF] = [0.0; HALF];
        let mut high: [f64; HALF] = std::array::from_fn(|lane| above[half + lane]);
        let mut low: [f64; HALF] = [0.0; HALF];
        for (row, stripes) in tile.values[..tile.rows].iter().zip(squares.iter_mut()) {
            let value: [f64; HALF] = each(|lane| f64::from(row[half + lane]));
            sum = each(|lane| sum[lane] + value[lane]);
            let raised: [f64; HALF] = each(|lane| value[lane].mul_add(value[lane], high[lane]));
            let left: [f64; HALF] = each(|lane| high[lane] - raised[lane]);
            let left: [f64; HALF] = each(|lane| value[lane].mul_add(value[lane], left[lane]));
            low = each(|lane| low[lane] + left[lane]);
            high = raised;
            let square: [f64; STRIPES] = each(|lane| value[lane] * value[lane]);
            let other = &value[STRIPES..];
            let square: [f64; STRIPES] =
                each(|lane| other[lane].mul_add(other[lane], square[lane]));
            *stripes = each(|lane| stripes[lane] + square[lane]);
        }
        sums.sum[half..half + HALF].copy_from_slice(&sum);
        sums.high[half..half + HALF].copy_from_slice(&high);
        sums.low[half..half + HALF].copy_from_slice(&low);
    }
    sums.high.iter_mut().zip(above).for_each(|(high, above)| *high -= above);
    sums
}

#[inline(always)]
pub fn each<T, const N: usize>(value: impl FnMut(usize) -> T) -> [T; N] {
    std::array::from_fn(value)
}

/// Moves, out of each lane of `rest`, the elements near the greatest to `class`.
#[inline(always)]
pub fn take_class(rest: &mut Tile, class: &mut Tile, scan: &Scan, element: Element) {
    let range = max_range(element) << 23;
    let bounds = scan.most().map(|most| (most & INFINITY).saturating_sub(range).max(1));
    class.rows = rest.rows;
    for (rest, class) in rest.values.iter_mut().zip(&mut class.values).take(class.rows) {
        for lane in 0..LANES {
            let bits = rest[lane].to_bits();
            let mask = u32::from(bits & !(1 << 31) >= bounds[lane]).wrapping_neg();
            class[lane] = f32::from_bits(bits & mask);
            rest[lane] = f32::from_bits(bits & !mask);
        }
    }
}
