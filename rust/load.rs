//! Elements of a tensor -> float32, which holds each of them exactly.

use std::ops::Range;

use crate::checksum::Element;
use crate::prefetch::prefetch;
use crate::tile::{LANES, Scan, Tile};

/// Rows from one that is loaded to one that is on its way.
const AHEAD: usize = 12;

/// Fills a tile with some columns of the rows that start at `starts` in `data`.
#[inline(always)]
pub fn load(
    tile: &mut Tile,
    data: &[u8],
    starts: &[usize],
    columns: Range<usize>,
    element: Element,
) -> Scan {
    match element {
        Element::Float16 => fill(tile, data, starts, columns, from_float16),
        Element::BFloat16 => fill(tile, data, starts, columns, from_bfloat16),
        _ => fill(tile, data, starts, columns, f32::from_le_bytes),
    }
}

#[inline(always)]
fn fill<const N: usize>(
    tile: &mut Tile,
    data: &[u8],
    starts: &[usize],
    columns: Range<usize>,
    convert: impl Fn([u8; N]) -> f32,
) -> Scan {
    let mut scan = Scan::new();
    tile.rows = starts.len();
    let rows = tile.values.iter_mut().zip(starts);
    if columns.len() == LANES {
        for (number, (row, &start)) in rows.enumerate() {
            let later = starts.get(number + AHEAD).copied().unwrap_or(start);
            prefetch(data, later + N * columns.start);
            let (elements, _) = data[start + N * columns.start..].as_chunks();
            for (to, &from) in row.iter_mut().zip(&elements[..LANES]) {
                *to = convert(from);
            }
            scan.see(row);
        }
    } else {
        for (row, &start) in rows {
            let (elements, _) = data[start + N * columns.start..].as_chunks();
            *row = [0.0; LANES];
            for (to, &from) in row.iter_mut().zip(&elements[..columns.len()]) {
                *to = convert(from);
            }
            scan.see(row);
        }
    }
    scan
}

#[inline(always)]
fn from_bfloat16(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// Without arithmetic on subnormal numbers, which threads may be set to take for zero.
#[inline(always)]
fn from_float16(bytes: [u8; 2]) -> f32 {
    const REBIAS: u32 = (127 - 15) << 23;
    const INFINITY: u32 = 0x1f << 23;
    const SMALLEST_NORMAL: u32 = 1 << 23;
    let bits = u32::from(u16::from_le_bytes(bytes));
    let magnitude = (bits & 0x7fff) << 13;
    let more = if magnitude >= INFINITY { REBIAS } else { 0 };
    let normal = f32::from_bits(magnitude + REBIAS + more);
    let hidden = REBIAS + SMALLEST_NORMAL;
    let subnormal = f32::from_bits(magnitude + hidden) - f32::from_bits(hidden);
    let value = if magnitude < SMALLEST_NORMAL { subnormal } else { normal };
    f32::from_bits(value.to_bits() | (bits & 0x8000) << 16)
}
