//! Why a shard's header is refused.

use crate::literal::{ParseError, SyntaxError};
use crate::memory::OutOfMemory;

/// Why a header was refused. The text follows the file's name and ends with the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("not a .npy file (bad magic); shards are written by numpy.save")]
    Magic,
    #[error("truncated in its .npy header; copy the shard again or remove it")]
    Truncated,
    #[error(".npy format version {0}.{1} is not supported; write it as 1.0, 2.0 or 3.0")]
    Version(u8, u8),
    #[error(
        "its header claims {length} bytes, more than the {allowed} allowed; the shard is damaged"
    )]
    TooLong { length: u64, allowed: u64 },
    #[error("its header is not text in the encoding of its version; the shard is damaged")]
    Encoding,
    #[error(
        "its header is not a Python literal: expected {} at byte {}; the shard is damaged",
        .0.expected, .0.at
    )]
    Syntax(SyntaxError),
    #[error("its header has no valid '{0}'; write the shard with numpy.save")]
    Key(&'static str),
    #[error(
        "its header has keys other than descr, fortran_order and shape; \
         write the shard with numpy.save"
    )]
    Keys,
    #[error("its array is in Fortran order; save it in C order")]
    FortranOrder,
    #[error("its array has {0} dimensions; a shard is one-dimensional, one row a step")]
    Dimensions(usize),
    #[error("its dtype is not structured; a shard's rows have named fields")]
    NotStructured,
    #[error("{0} holds pickled Python objects, which are never loaded; save plain numbers")]
    Pickled(String),
    #[error("field {field} has the dtype {code}, which NumPy does not write; the shard is damaged")]
    Dtype { field: String, code: String },
    #[error("{0} is not a valid dtype entry; the shard is damaged")]
    Field(String),
    #[error("two fields are named {0}; the shard is damaged")]
    Duplicate(String),
    #[error("its rows or its size are too large to address; the shard is damaged")]
    TooLarge,
    #[error(
        "its rows have {itemsize} bytes, more than the {allowed} allowed; \
         keep what is not read elsewhere"
    )]
    RowTooLarge { itemsize: usize, allowed: usize },
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    #[error("field '{field}' is {found}, not {wanted}; convert it and save the shard again")]
    Unreadable { field: &'static str, found: String, wanted: &'static str },
    #[error(
        "its rows have neither 'board' nor 'exps', only {fields}; this is not a dataset of steps"
    )]
    NoBoard { fields: String },
}

impl From<ParseError> for HeaderError {
    fn from(error: ParseError) -> Self {
        match error {
            ParseError::Syntax(error) => Self::Syntax(error),
            ParseError::Memory(error) => Self::Memory(error),
        }
    }
}
