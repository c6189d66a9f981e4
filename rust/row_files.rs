//! Files of rows of one size, whose rows are counted through all of them.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use crate::file::{self, FileId};
use crate::memory::{self, OutOfMemory};

/// A file that holds rows of one size, one after the other.
#[derive(Debug, Clone)]
pub struct RowFile {
    pub path: PathBuf,
    /// The file that was found at the path.
    pub id: FileId,
    pub rows: u64,
    /// Bytes before its first row.
    pub data_offset: u64,
    /// Bytes of a row, at least one.
    pub itemsize: usize,
}

impl RowFile {
    /// Opens the file that was found, and no other that has its path by now.
    pub fn open(&self) -> io::Result<File> {
        let opened = file::open(&self.path)?;
        if opened.id != self.id {
            return Err(io::Error::other("another file has taken its place"));
        }
        Ok(opened.file)
    }
}

/// A row of it lies where no file has bytes, or cannot be counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooManyRows;

/// Files in order.
#[derive(Debug, Default)]
pub struct RowFiles {
    files: Vec<RowFile>,
    /// Of each file, the number of the row after its last.
    ends: Vec<u64>,
}

impl RowFiles {
    /// None yet, with room for so many.
    pub fn with_capacity(files: usize) -> Result<Self, OutOfMemory> {
        let ends = memory::with_capacity(files)?;
        Ok(Self { files: memory::with_capacity(files)?, ends })
    }

    /// Adds a file after the others.
    pub fn push(&mut self, file: RowFile) -> Result<(), TooManyRows> {
        let addressable = |end: &u64| *end <= i64::MAX as u64;
        let bytes = file.rows.checked_mul(file.itemsize as u64).filter(|_| file.itemsize > 0);
        let size = bytes.and_then(|bytes| bytes.checked_add(file.data_offset));
        let end = self.rows().checked_add(file.rows).filter(addressable);
        let (Some(_), Some(end)) = (size.filter(addressable), end) else { return Err(TooManyRows) };
        self.files.push(file);
        self.ends.push(end);
        Ok(())
    }

    pub fn files(&self) -> &[RowFile] {
        &self.files
    }

    /// Rows in all files.
    pub fn rows(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The number of the first row of a file.
    pub fn first(&self, file: usize) -> u64 {
        self.ends[file] - self.files[file].rows
    }

    /// The file that holds `row`, which is below `rows`.
    pub fn holder(&self, row: u64) -> usize {
        self.ends.partition_point(|&end| end <= row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file;

    fn files(sizes: &[(u64, u64, usize)]) -> Result<RowFiles, TooManyRows> {
        let opened = file::open("Cargo.toml".as_ref()).expect("a file");
        let mut files = RowFiles::default();
        for &(rows, data_offset, itemsize) in sizes {
            files.push(RowFile {
                path: "rows".into(),
                id: opened.id,
                rows,
                data_offset,
                itemsize,
            })?;
        }
        Ok(files)
    }

    #[test]
    fn rows_are_counted_through_the_files() {
        let files = files(&[(0, 0, 1), (3, 9, 2), (0, 0, 1), (2, 0, 5), (0, 0, 1)]).expect("files");
        assert_eq!(files.rows(), 5);
        assert!((0..5).map(|row| files.holder(row)).eq([1, 1, 1, 3, 3]));
        assert!((0..5).map(|file| files.first(file)).eq([0, 0, 3, 3, 5]));
    }

    #[test]
    fn what_cannot_be_addressed_is_refused() {
        let most = i64::MAX as u64;
        files(&[(most, 0, 1)]).expect("files");
        files(&[(most - 1, 1, 1), (1, 0, 1)]).expect("files");
        for sizes in [
            &[(most, 0, 1), (1, 0, 1)][..],
            &[(most, 1, 1)],
            &[(most, 0, 2)],
            &[(u64::MAX, 0, usize::MAX)],
            &[(1, u64::MAX, 1)],
            &[(1, 0, 0)],
        ] {
            assert!(files(sizes).is_err(), "{sizes:?}");
        }
    }
}
