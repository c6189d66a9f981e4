//! Rows -> 16 exponents per board, and chosen fields: their places in a row, and how they are read.
//!
//! A board is a u64 of 16 nibbles, cell 0 (top left) in the most significant one. A tile of 65536
//! or more does not fit: its bit in `tile_65536_mask` is set (bit 0 = cell 0), and it decodes to
//! exponent 16.

use std::ops::Range;

use crate::rows::Column;

/// Cells of a board, and bytes of a decoded one.
pub const CELLS: usize = 16;

const LOW_NIBBLES: u128 = 0x0f0f_0f0f_0f0f_0f0f_0f0f_0f0f_0f0f_0f0f;

/// The bytes of a row and the place of its board.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub itemsize: usize,
    pub board: BoardField,
}

/// Byte offsets in a row of the fields that hold the board.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BoardField {
    /// `board`, 16 nibbles in a little-endian u64, and `tile_65536_mask`, a little-endian u16.
    Packed { board: usize, mask: Option<usize> },
    /// `exps`, 16 bytes.
    Exponents { exps: usize },
}

impl BoardField {
    /// The bytes of a row that hold the board.
    pub fn range(self) -> Range<usize> {
        match self {
            Self::Packed { board, mask: None } => board..board + 8,
            Self::Packed { board, mask: Some(mask) } => board.min(mask)..(board + 8).max(mask + 2),
            Self::Exponents { exps } => exps..exps + CELLS,
        }
    }

    /// The names of the fields, which all shards of a dataset share.
    pub fn names(self) -> &'static str {
        match self {
            Self::Packed { mask: None, .. } => "'board' without 'tile_65536_mask'",
            Self::Packed { mask: Some(_), .. } => "'board' with 'tile_65536_mask'",
            Self::Exponents { .. } => "'exps'",
        }
    }

    /// The exponents in `bytes`, the bytes of a row that `range` names.
    #[inline]
    pub fn decode(self, bytes: &[u8]) -> [u8; CELLS] {
        let start = self.range().start;
        match self {
            Self::Packed { board, mask } => {
                let board = u64::from_le_bytes(array(bytes, board - start));
                let mask = mask.map_or(0, |mask| u16::from_le_bytes(array(bytes, mask - start)));
                decode(board, mask)
            }
            Self::Exponents { .. } => array(bytes, 0),
        }
    }
}

/// The `N` bytes at `at`.
#[inline]
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    *bytes[at..].first_chunk().expect("a range holds its fields")
}

/// The exponents of `board`, cell 0 first.
#[inline]
pub fn decode(board: u64, mask: u16) -> [u8; CELLS] {
    let mut cells = spread_nibbles(board);
    if mask != 0 {
        let high = spread_bits(mask);
        cells = (cells & !(high * 0xff)) | (high * 16);
    }
    cells.to_be_bytes()
}

/// Each nibble in a byte of its own, in the same order.
#[inline]
fn spread_nibbles(board: u64) -> u128 {
    let wide = |half: u32| {
        let half = u64::from(half);
        let half = (half | half << 16) & 0x0000_ffff_0000_ffff;
        let half = (half | half << 8) & 0x00ff_00ff_00ff_00ff;
        (half | half << 4) & LOW_NIBBLES as u64
    };
    u128::from(wide((board >> 32) as u32)) << 64 | u128::from(wide(board as u32))
}

/// Bit i of `mask` in the byte of cell i.
fn spread_bits(mask: u16) -> u128 {
    (0..CELLS)
        .fold(0, |bytes, cell| bytes | u128::from(mask >> cell & 1) << (8 * (CELLS - 1 - cell)))
}

/// The board and other fields of the rows of one layout.
#[derive(Debug)]
pub struct Selection {
    pub board: BoardField,
    /// The bytes of a row that each field holds.
    pub fields: Vec<Range<usize>>,
    /// The bytes of a row that hold all of it.
    range: Range<usize>,
}

impl Selection {
    pub fn new(board: BoardField, fields: Vec<Range<usize>>) -> Self {
        let widen = |all: Range<usize>, field: &Range<usize>| {
            all.start.min(field.start)..all.end.max(field.end)
        };
        let range = fields.iter().fold(board.range(), widen);
        Self { board, fields, range }
    }

    /// Bytes that a row becomes: 16 exponents and the fields.
    pub fn width(&self) -> usize {
        CELLS + self.fields.iter().map(Range::len).sum::<usize>()
    }
}

/// The column of decoded boards, each followed by the other selected fields in their order.
pub struct Selected<'s> {
    /// One per layout.
    pub selections: &'s [Selection],
    /// The layout of each file's rows.
    pub layout_of: &'s [usize],
    /// Bytes that a row becomes, in all layouts.
    pub width: usize,
}

impl<'s> Column for Selected<'s> {
    type Field = &'s Selection;

    fn width(&self) -> usize {
        self.width
    }

    fn field(&self, file: usize) -> &'s Selection {
        &self.selections[self.layout_of[file]]
    }

    fn range(selection: &Selection) -> Range<usize> {
        selection.range.clone()
    }

    #[inline]
    fn write(selection: &Selection, bytes: &[u8], out: &mut [u8]) {
        let start = selection.range.start;
        let (cells, mut rest) = out.split_at_mut(CELLS);
        let board = &bytes[selection.board.range().start - start..];
        cells.copy_from_slice(&selection.board.decode(board));
        for field in &selection.fields {
            let (value, after) = rest.split_at_mut(field.len());
            value.copy_from_slice(&bytes[field.start - start..field.end - start]);
            rest = after;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn naive(board: u64, mask: u16) -> [u8; CELLS] {
        std::array::from_fn(|cell| match (board >> (60 - 4 * cell) & 15) as u8 {
            _ if mask >> cell & 1 == 1 => 16,
            exponent => exponent,
        })
    }

    #[test]
    fn equals_a_cell_by_cell_decoder() {
        let mut random = testing::random();
        for _ in 0..10_000 {
            let board = random(1 << 32) << 32 | random(1 << 32);
            let mask = random(1 << 16) as u16;
            assert_eq!(decode(board, mask), naive(board, mask));
            assert_eq!(decode(board, 0), naive(board, 0));
        }
    }
}
