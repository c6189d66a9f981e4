//! Errors, each with the path, row or argument at fault. The text is one line for the user.

use std::io;
use std::path::{Path, PathBuf};

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
    #[error("{}: {problem}", .path.display())]
    Dataset { path: PathBuf, problem: String },

    #[error(
        "step index {index} at position {position} is outside the dataset, which has {rows} rows"
    )]
    StepIndex { position: usize, index: i64, rows: u64 },

    /// A finished output file is at fault.
    #[error("{0}")]
    Output(String),

    #[error("{0}")]
    Argument(String),

    #[error("cannot sample: {0}; sample fewer rows")]
    Memory(#[from] OutOfMemory),

    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

impl Error {
    /// The dataset, or a shard of it, is at fault.
    pub fn dataset(path: &Path, problem: impl Into<String>) -> Self {
        Self::Dataset { path: path.to_owned(), problem: problem.into() }
    }

    /// A shard cannot be opened.
    pub fn open(path: &Path, source: &io::Error) -> Self {
        Self::dataset(path, format!("cannot be opened: {source}"))
    }
}
