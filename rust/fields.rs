//! The board and other fields of a row, read at once.

use std::ops::Range;

use crate::boards::CELLS;
use crate::column::Column;
use crate::layout::BoardField;

/// What is read of the rows of one layout.
#[derive(Debug)]
pub struct Selection {
    board: BoardField,
    fields: Vec<Range<usize>>,
    /// The bytes of a row that hold all of it.
    range: Range<usize>,
}

impl Selection {
    /// The board and the bytes `fields` of a row.
    pub fn new(board: BoardField, fields: Vec<Range<usize>>) -> Self {
        let widest = |all: Range<usize>, field: &Range<usize>| {
            all.start.min(field.start)..all.end.max(field.end)
        };
        let range = fields.iter().fold(board.range(), widest);
        Self { board, fields, range }
    }

    pub fn board(&self) -> BoardField {
        self.board
    }

    /// Bytes of all fields.
    pub fn width(&self) -> usize {
        self.fields.iter().map(Range::len).sum()
    }

    pub fn fields(&self) -> &[Range<usize>] {
        &self.fields
    }
}

/// The column of decoded boards, each followed by the other fields in their order.
pub struct BoardsAndFields<'s> {
    /// One for each layout.
    pub selections: &'s [Selection],
    /// The layout of each file's rows.
    pub layouts: &'s [usize],
    /// Bytes of the fields.
    pub width: usize,
}

impl<'s> Column for BoardsAndFields<'s> {
    type Field = &'s Selection;

    fn width(&self) -> usize {
        CELLS + self.width
    }

    fn field(&self, file: usize) -> &'s Selection {
        &self.selections[self.layouts[file]]
    }

    fn range(selection: &Selection) -> Range<usize> {
        selection.range.clone()
    }

    #[inline]
    fn write(selection: &Selection, bytes: &[u8], out: &mut [u8]) {
        let start = selection.range.start;
        let board = selection.board.range();
        let (cells, mut rest) = out.split_at_mut(CELLS);
        cells.copy_from_slice(&selection.board.decode(&bytes[board.start - start..]));
        for field in &selection.fields {
            let (place, after) = rest.split_at_mut(field.len());
            place.copy_from_slice(&bytes[field.start - start..field.end - start]);
            rest = after;
        }
    }
}
