//! What can go wrong with a dataset, each with the path, row or field that it is about.

use std::io;
use std::path::PathBuf;

use crate::header_error::HeaderError;
use crate::interrupt::Interrupted;
use crate::memory::OutOfMemory;

/// Everything the crate reports. The text is one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: no such directory; name the directory that holds the shards", .path.display())]
    NoDirectory { path: PathBuf },

    #[error("{}: not a directory; name the directory that holds the shards", .path.display())]
    NotADirectory { path: PathBuf },

    #[error("{}: no shards; a dataset holds steps-*.npy files or one steps.npy", .path.display())]
    NoShards { path: PathBuf },

    #[error("{}: cannot be opened: {source}", .path.display())]
    Open { path: PathBuf, source: io::Error },

    #[error("{}: {problem}", .path.display())]
    Header { path: PathBuf, problem: HeaderError },

    #[error(
        "{}: truncated: the header promises {rows} rows ({expected} bytes) but the file has \
         {found} bytes; copy the shard again or remove it", .path.display()
    )]
    Truncated { path: PathBuf, rows: u64, expected: u64, found: u64 },

    #[error(
        "{}: its rows have {found}, but those of {} have {wanted}; shards of one dataset must agree",
        .path.display(), .first.display()
    )]
    BoardsDiffer { path: PathBuf, first: PathBuf, found: &'static str, wanted: &'static str },

    #[error(
        "{}: its rows have other fields than those of {}; only boards can be read from such a dataset",
        .path.display(), .first.display()
    )]
    RowsDiffer { path: PathBuf, first: PathBuf },

    #[error("{}: byte {stop} of a row is wanted, of {itemsize}", .path.display())]
    OutsideRow { path: PathBuf, stop: usize, itemsize: usize },

    #[error("fields of equal sizes are wanted for each of the {layouts} layouts of rows")]
    Selection { layouts: usize },

    #[error("{}: its shards hold more rows than a step index can count", .path.display())]
    TooManyRows { path: PathBuf },

    #[error(
        "step index {index} at position {position} is outside the dataset, which has {rows} rows"
    )]
    StepIndex { position: usize, index: i64, rows: u64 },

    #[error(
        "{}: step {step} cannot be read: {source}; restore the shard and run again",
        .path.display()
    )]
    Row { path: PathBuf, step: u64, source: io::Error },

    #[error("{}: its rows cannot be read: {source}; read fewer at once", .path.display())]
    Read { path: PathBuf, source: OutOfMemory },

    #[error("{}: row {row} of {name} cannot be read: {source}", .path.display())]
    StoredRow { path: PathBuf, name: String, row: u64, source: io::Error },

    #[error("cannot read {}: {source}", .path.display())]
    StoredFile { path: PathBuf, source: io::Error },

    /// A draw.
    #[error("a draw: {0}; draw fewer")]
    Memory(#[from] OutOfMemory),

    #[error("{sample} distinct rows cannot be drawn from {rows}, of which i64 must count all")]
    Sample { sample: u64, rows: u64 },

    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}
