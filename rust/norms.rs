//! Norms of vectors, and terms that add up to theirs without a rounding error.

use crate::tile::{ROWS, STRIPES};

/// Sums that are formed side by side.
const LANES: usize = 8;

/// The furthest that exponents may lie apart.
///
/// Norms below 2^(E+1) are added to 2^(E+9), which rounds each by at most 2^(E-44); `ROWS` of these
/// errors, multiples of 2^(e-52), add up to at most 2^(E-36), in 53 bits if E - e <= 37.
const MAX_RANGE: u64 = 37 << 52;

const EXPONENT: u64 = 0x7ff << 52;

/// Takes the roots of sums of squares; returns terms that add up to them.
#[inline(always)]
pub fn terms(squares: &[[f64; STRIPES]], terms: &mut Vec<f64>) {
    let mut norms = [0.0; ROWS];
    let (mut least, mut most) = (f64::MAX, 0.0);
    for (norm, [a, b, c, d]) in norms.iter_mut().zip(squares) {
        *norm = ((a + b) + (c + d)).sqrt();
        let or_more = if *norm == 0.0 { f64::MAX } else { *norm };
        least = if or_more < least { or_more } else { least };
        most = if *norm <= most { most } else { *norm };
    }
    terms.clear();
    let [least, most] = [least, most].map(|norm: f64| norm.to_bits() & EXPONENT);
    if most == EXPONENT || most > least + MAX_RANGE {
        terms.extend(&norms[..squares.len()]);
        return;
    }
    let above = f64::from_bits(most + (9 << 52));
    let (mut high, mut low) = ([above; LANES], [0.0; LANES]);
    let (rows, _) = norms.as_chunks::<LANES>();
    for row in &rows[..squares.len().div_ceil(LANES)] {
        for lane in 0..LANES {
            let raised = high[lane] + row[lane];
            low[lane] += row[lane] - (raised - high[lane]);
            high[lane] = raised;
        }
    }
    terms.extend(high.map(|high| high - above));
    terms.extend(low);
}
