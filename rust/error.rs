//! Errors, each with the path, row or field at fault. The text is one line for the user.

use std::io;
use std::path::PathBuf;

use crate::memory::OutOfMemory;

/// The caller asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Long work calls it every few milliseconds, and stops at an error.
pub type Interrupt<'a> = &'a mut dyn FnMut() -> Result<(), Interrupted>;

/// Everything the crate reports.
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
    Header { path: PathBuf, problem: String },

    #[error(
        "{}: truncated: the header promises {rows} rows ({expected} bytes) but the file has \
         {found} bytes; copy the shard again or remove it", .path.display()
    )]
    Truncated { path: PathBuf, rows: u64, expected: u128, found: u64 },

    #[error(
        "{}: its rows have {found}, but the rows of {} have {expected}; convert one of them, so \
         that all shards have the same board fields", .path.display(), .first.display()
    )]
    BoardsDiffer { path: PathBuf, first: PathBuf, found: &'static str, expected: &'static str },

    #[error(
        "{}: its rows have other fields than the rows of {}; read boards, or convert one of them",
        .path.display(), .first.display()
    )]
    RowsDiffer { path: PathBuf, first: PathBuf },

    #[error("{}: a field must end within a row of {itemsize} bytes; got byte {stop}", .path.display())]
    OutsideRow { path: PathBuf, stop: usize, itemsize: usize },

    #[error(
        "layouts must be one for each of the {layouts} layouts of rows, with fields of equal sizes"
    )]
    Layouts { layouts: usize },

    #[error("{}: more rows than a step index can count; split the dataset", .path.display())]
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
    OutputRow { path: PathBuf, name: String, row: u64, source: io::Error },

    #[error("cannot read {}: {source}", .path.display())]
    OutputFile { path: PathBuf, source: io::Error },

    #[error("cannot sample: {0}; sample fewer rows")]
    Memory(#[from] OutOfMemory),

    #[error(
        "a tail shuffle must sample a fiftieth to all of at most 2**63 - 1 rows; got {sample} of \
         {population}"
    )]
    Sample { sample: u64, population: u64 },

    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}
