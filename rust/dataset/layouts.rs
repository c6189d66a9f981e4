//! The places of the board and of chosen fields in a row, and the column that reads them.

use std::ops::Range;

use super::boards::CELLS;
use crate::rows::Column;

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
