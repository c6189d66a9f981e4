//! The fields of a row -> where in it the board, its mask or its exponents lie.

use std::ops::Range;

use crate::dtype::{Fields, quoted};
use crate::header_error::HeaderError;

/// Bytes of a row: no row of a dataset comes near, and whatever lies between `board` and its mask is
/// read with them.
const MAX_ITEMSIZE: usize = 1 << 20;
/// Fields that an error lists.
const NAMES_SHOWN: usize = 20;

/// Where the bytes that are read lie in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub itemsize: usize,
    pub board: BoardField,
}

impl Layout {
    pub(crate) fn of(fields: &Fields) -> Result<Self, HeaderError> {
        if fields.itemsize > MAX_ITEMSIZE {
            let (itemsize, allowed) = (fields.itemsize, MAX_ITEMSIZE);
            return Err(HeaderError::RowTooLarge { itemsize, allowed });
        }
        Ok(Self { itemsize: fields.itemsize, board: board_field(fields)? })
    }
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
            Self::Exponents { exps } => exps..exps + 16,
        }
    }

    /// The names of the fields, wherever they lie.
    pub fn names(self) -> &'static str {
        match self {
            Self::Packed { mask: None, .. } => "'board' without 'tile_65536_mask'",
            Self::Packed { mask: Some(_), .. } => "'board' with 'tile_65536_mask'",
            Self::Exponents { .. } => "'exps'",
        }
    }
}

/// A field that holds a part of the board, as it must be to be read.
struct Wanted {
    name: &'static str,
    code: &'static str,
    shape: &'static [u64],
    meaning: &'static str,
}

const BOARD: Wanted = Wanted {
    name: "board",
    code: "<u8",
    shape: &[],
    meaning: "a little-endian unsigned 8-byte integer",
};
const MASK: Wanted = Wanted {
    name: "tile_65536_mask",
    code: "<u2",
    shape: &[],
    meaning: "a little-endian unsigned 2-byte integer",
};
const EXPS: Wanted =
    Wanted { name: "exps", code: "|u1", shape: &[16], meaning: "16 unsigned bytes" };

impl Wanted {
    /// The offset of the field in a row, if it is there.
    fn find(&self, fields: &Fields) -> Result<Option<usize>, HeaderError> {
        let Some(field) = fields.named.iter().find(|field| field.name == self.name) else {
            return Ok(None);
        };
        if field.dtype.is(self.code, self.shape) {
            return Ok(Some(field.offset));
        }
        let (found, wanted) = (field.dtype.describe(), self.meaning);
        Err(HeaderError::Unreadable { field: self.name, found, wanted })
    }
}

/// Finds the board: `board` wins over `exps`.
fn board_field(fields: &Fields) -> Result<BoardField, HeaderError> {
    if let Some(board) = BOARD.find(fields)? {
        return Ok(BoardField::Packed { board, mask: MASK.find(fields)? });
    }
    if let Some(exps) = EXPS.find(fields)? {
        return Ok(BoardField::Exponents { exps });
    }
    let names = fields.named.iter().take(NAMES_SHOWN).map(|field| quoted(&field.name));
    let names: Vec<_> = names.collect();
    let fields = match fields.named.len().saturating_sub(NAMES_SHOWN) {
        0 if names.is_empty() => "padding".to_owned(),
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    };
    Err(HeaderError::NoBoard { fields })
}
