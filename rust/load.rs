//! Elements of a tensor -> float32, which holds each of them exactly.

use std::ops::Range;

use crate::checksum::Element;
use crate::tile::{LANES, Lanes, Tile, each};

/// Fills tiles side by side with the columns from `first`, of `width` in all, of the rows that
/// start at `starts` in `data`.
#[inline(always)]
pub fn load(
    tiles: &mut [Tile],
    data: &[u8],
    starts: &[usize],
    columns: Range<usize>,
    element: Element,
    from_float16: impl Fn(&[[u8; 2]; LANES]) -> Lanes<f32>,
) {
    match element {
        Element::Float16 => fill(tiles, data, starts, columns, from_float16),
        Element::BFloat16 => fill(tiles, data, starts, columns, from_bfloat16),
        _ => fill(tiles, data, starts, columns, from_float32),
    }
}

#[inline(always)]
fn fill<const N: usize>(
    tiles: &mut [Tile],
    data: &[u8],
    starts: &[usize],
    columns: Range<usize>,
    convert: impl Fn(&[[u8; N]; LANES]) -> Lanes<f32>,
) {
    tiles.iter_mut().for_each(|tile| tile.rows = starts.len());
    for (number, &start) in starts.iter().enumerate() {
        let (elements, _) = data[start + N * columns.start..start + N * columns.end].as_chunks();
        let (whole, rest) = elements.as_chunks::<LANES>();
        for (tile, elements) in tiles.iter_mut().zip(whole) {
            tile.values[number] = convert(elements);
        }
        if let Some(tile) = tiles.get_mut(whole.len()) {
            let mut elements = [[0; N]; LANES];
            elements[..rest.len()].copy_from_slice(rest);
            tile.values[number] = convert(&elements);
        }
    }
}

#[inline(always)]
fn from_float32(elements: &[[u8; 4]; LANES]) -> Lanes<f32> {
    each(|lane| f32::from_le_bytes(elements[lane]))
}

#[inline(always)]
fn from_bfloat16(elements: &[[u8; 2]; LANES]) -> Lanes<f32> {
    each(|lane| f32::from_bits(u32::from(u16::from_le_bytes(elements[lane])) << 16))
}

#[inline(always)]
pub fn from_float16(elements: &[[u8; 2]; LANES]) -> Lanes<f32> {
    each(|lane| widened(u16::from_le_bytes(elements[lane])))
}

/// Does the same with the processor's own instruction.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
pub fn from_float16_by_f16c(elements: &[[u8; 2]; LANES]) -> Lanes<f32> {
    use std::arch::x86_64::{__m256, _mm_set_epi64x, _mm256_cvtph_ps};
    let (bytes, _) = elements.as_flattened().as_chunks();
    let quads: [i64; 4] = std::array::from_fn(|quad| i64::from_le_bytes(bytes[quad]));
    let low = _mm256_cvtph_ps(_mm_set_epi64x(quads[1], quads[0]));
    let high = _mm256_cvtph_ps(_mm_set_epi64x(quads[3], quads[2]));
    // SAFETY: both are 64 bytes, in which any bits are numbers.
    #[allow(unsafe_code)]
    unsafe {
        std::mem::transmute::<[__m256; 2], Lanes<f32>>([low, high])
    }
}

/// Without arithmetic on subnormal numbers, which threads may be set to take for zero.
#[inline(always)]
fn widened(half: u16) -> f32 {
    const REBIAS: u32 = (127 - 15) << 23;
    const INFINITY: u32 = 0x1f << 23;
    const SMALLEST_NORMAL: u32 = 1 << 23;
    let bits = u32::from(half);
    let magnitude = (bits & 0x7fff) << 13;
    let more = if magnitude >= INFINITY { REBIAS } else { 0 };
    let normal = f32::from_bits(magnitude + REBIAS + more);
    let hidden = REBIAS + SMALLEST_NORMAL;
    let subnormal = f32::from_bits(magnitude + hidden) - f32::from_bits(hidden);
    let value = if magnitude < SMALLEST_NORMAL { subnormal } else { normal };
    f32::from_bits(value.to_bits() | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By what its fields mean: an exponent of 5 bits less 15, and 10 bits after the point.
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
    fn every_float16_is_widened_alike_by_all_processors() {
        for first in (0..=u16::MAX).step_by(LANES) {
            let halves: Lanes<u16> = each(|lane| first + lane as u16);
            let widened = from_float16(&halves.map(u16::to_le_bytes));
            for (half, value) in halves.into_iter().zip(widened) {
                let expected = value_of(half);
                assert_eq!(value.is_nan(), expected.is_nan(), "{half:#x}");
                assert!(value.is_nan() || f64::from(value) == expected, "{half:#x}");
                assert_eq!(value.is_sign_negative(), half >> 15 == 1, "{half:#x}");
            }
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("f16c") {
                // SAFETY: the processor has the instructions that the function is compiled for.
                #[allow(unsafe_code)]
                let others = unsafe { from_float16_by_f16c(&halves.map(u16::to_le_bytes)) };
                assert_eq!(widened.map(|x| x.is_nan()), others.map(|x| x.is_nan()));
                let bits = |x: f32| if x.is_nan() { 0 } else { x.to_bits() };
                assert_eq!(widened.map(bits), others.map(bits));
            }
        }
    }
}
