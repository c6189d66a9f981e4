//! Exact sums of floats: wide fixed-point numbers, to which terms are added in any order.

use crate::memory::{self, OutOfMemory};

/// Digits of 32 bits in a sum, the least first. The highest also holds what is above it.
const DIGITS: usize = 21;

/// Bits below the point: what the last bit of the square of a float32 takes as a float64.
pub const FRACTION_BITS: u32 = 352;

/// Bytes of a sum as a number.
pub const NBYTES: usize = 4 * (DIGITS - 1) + 8;

/// Terms after which digits are made 32 bits long again; a term adds less than 2^32 to one.
const MAX_TERMS: u32 = 1 << 30;

/// Sums of terms that are multiples of 2^-298 and less than 2^264 in magnitude.
///
/// No bit is lost in up to 2^56 terms, hence what a sum is depends on the terms alone.
#[derive(Clone)]
pub struct ExactSums {
    sums: Vec<[i64; DIGITS]>,
    /// At least as many terms as any of the sums has taken since its digits were 32 bits long.
    terms: u32,
}

impl ExactSums {
    pub fn zeros(count: usize) -> Result<Self, OutOfMemory> {
        Ok(Self { sums: memory::filled([0; DIGITS], count)?, terms: 0 })
    }

    /// Adds some terms to one of the sums.
    pub fn add(&mut self, number: usize, terms: impl IntoIterator<Item = f64>) {
        for term in terms {
            self.count_term();
            add_term(&mut self.sums[number], term);
        }
    }

    pub fn merge(&mut self, other: &Self) {
        let mut other = other.clone();
        other.carry();
        self.carry();
        for (sum, term) in self.sums.iter_mut().zip(&other.sums) {
            sum.iter_mut().zip(term).for_each(|(digit, more)| *digit += more);
        }
        self.count_term();
    }

    /// The sums as numbers, little-endian two's complement: multiples of 2^-`FRACTION_BITS`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut whole = self.clone();
        whole.carry();
        let bytes = |sum: &[i64; DIGITS]| {
            let [low @ .., high] = sum;
            let low = low.iter().flat_map(|&digit| (digit as u32).to_le_bytes());
            low.chain(high.to_le_bytes()).collect::<Vec<_>>()
        };
        whole.sums.iter().flat_map(bytes).collect()
    }

    /// The sums that `to_bytes` gave.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let sum = |bytes: &[u8]| {
            let mut digits = [0; DIGITS];
            let (low, high) = bytes.split_at(NBYTES - 8);
            let (low, _) = low.as_chunks();
            digits
                .iter_mut()
                .zip(low)
                .for_each(|(to, &from)| *to = u32::from_le_bytes(from).into());
            digits[DIGITS - 1] = high.first_chunk().map_or(0, |&high| i64::from_le_bytes(high));
            digits
        };
        Self { sums: bytes.chunks_exact(NBYTES).map(sum).collect(), terms: 1 }
    }

    fn count_term(&mut self) {
        if self.terms == MAX_TERMS {
            self.carry();
        }
        self.terms += 1;
    }

    /// Makes all digits but the highest 32 bits long.
    fn carry(&mut self) {
        for sum in &mut self.sums {
            for place in 0..DIGITS - 1 {
                sum[place + 1] += sum[place] >> 32;
                sum[place] &= 0xffff_ffff;
            }
        }
        self.terms = 1;
    }
}

fn add_term(sum: &mut [i64; DIGITS], term: f64) {
    const HIDDEN: u64 = 1 << 52;
    /// Exponent of a float64 whose last bit is the last of a sum.
    const LAST_PLACE: usize = 1075 - FRACTION_BITS as usize;
    let bits = term.to_bits();
    let exponent = (bits >> 52 & 0x7ff) as usize;
    if exponent == 0 {
        return;
    }
    let place = exponent - LAST_PLACE;
    let significand = u128::from(bits & (HIDDEN - 1) | HIDDEN) << (place % 32);
    let sign = (term.to_bits() as i64) >> 63;
    let signed = |digit: u32| (i64::from(digit) ^ sign) - sign;
    let digits = &mut sum[place / 32..place / 32 + 3];
    digits[0] += signed(significand as u32);
    digits[1] += signed((significand >> 32) as u32);
    digits[2] += signed((significand >> 64) as u32);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(terms: &[f64]) -> Vec<u8> {
        let mut sums = ExactSums::zeros(1).expect("memory");
        sums.add(0, terms.iter().copied());
        sums.to_bytes()
    }

    /// A whole number of units of 2^-352 as bytes.
    fn number(units: i128, shift: usize) -> Vec<u8> {
        let mut bytes = vec![0; shift / 8];
        bytes.extend((units << (shift % 8)).to_le_bytes());
        bytes.resize(NBYTES, if units < 0 { 0xff } else { 0 });
        bytes
    }

    #[test]
    fn terms_land_on_their_bits() {
        let two = |exponent: i32| 2_f64.powi(exponent);
        assert_eq!(bytes_of(&[two(-298)]), number(1, 54));
        assert_eq!(bytes_of(&[-two(-298)]), number(-1, 54));
        assert_eq!(bytes_of(&[1.5, -0.25]), number(5, 350));
        assert_eq!(bytes_of(&[two(200), two(100), -two(200)]), number(1, 452));
        assert_eq!(bytes_of(&[-3.0, two(263), 3.0, -two(263)]), number(0, 0));
        assert_eq!(bytes_of(&[0.0, -0.0]), number(0, 0));
    }

    #[test]
    fn order_and_grouping_do_not_matter() {
        let term = |i: i32| (f64::from(i * i % 97) - 48.0) * 2_f64.powi(i * 37 % 240 - 120);
        let terms: Vec<f64> = (0..500).map(term).collect();
        let whole = bytes_of(&terms);
        let reversed: Vec<f64> = terms.iter().rev().copied().collect();
        assert_eq!(bytes_of(&reversed), whole);
        for cut in [0, 1, 77, 500] {
            let (head, tail) = terms.split_at(cut);
            let mut merged = ExactSums::from_bytes(&bytes_of(head));
            merged.merge(&ExactSums::from_bytes(&bytes_of(tail)));
            assert_eq!(merged.to_bytes(), whole, "{cut}");
        }
    }

    #[test]
    fn digits_are_carried_before_they_are_full() {
        let full = f64::from_bits(f64::to_bits(2.0) - 1);
        let mut sums = ExactSums::zeros(1).expect("memory");
        sums.add(0, [full; 3]);
        sums.terms = MAX_TERMS;
        sums.add(0, [full]);
        assert_eq!(sums.terms, 2);
        assert_eq!(sums.to_bytes(), number(4 * ((1 << 53) - 1), 300));
    }
}
