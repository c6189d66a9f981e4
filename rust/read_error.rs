//! What can go wrong with a read of rows.

use std::io;

use crate::interrupt::Interrupted;
use crate::memory::OutOfMemory;

#[derive(Debug)]
pub enum ReadError {
    /// The caller's row at `position` is in no file.
    Outside {
        position: usize,
        row: i64,
    },
    /// A row of file number `file` cannot be read.
    Row {
        file: usize,
        row: u64,
        source: io::Error,
    },
    Memory(OutOfMemory),
    Interrupted(Interrupted),
}

impl ReadError {
    /// `row` of file number `file` cannot be read.
    pub fn of_row(file: usize, row: u64, source: io::Error) -> Self {
        let source = match source.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::other("the file was cut short before it"),
            _ => source,
        };
        Self::Row { file, row, source }
    }
}

impl From<OutOfMemory> for ReadError {
    fn from(error: OutOfMemory) -> Self {
        Self::Memory(error)
    }
}

impl From<Interrupted> for ReadError {
    fn from(error: Interrupted) -> Self {
        Self::Interrupted(error)
    }
}
