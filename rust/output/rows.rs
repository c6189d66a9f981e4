//! Rows of a tensor in finished output files, or equal parts of its rows, read by number.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use crate::error::{Error, Interrupt};
use crate::rows::files::{self, RowFile, RowFiles};
use crate::rows::{self, Limits, ReadError, WholeRows};

/// A tensor whose rows are counted through all files, and its parts through all rows.
#[derive(Debug)]
pub struct StoredTensor {
    name: String,
    files: RowFiles,
    /// Equal parts of a row.
    parts: u64,
}

impl StoredTensor {
    /// The tensor `name`, whose rows are `parts` parts of `nbytes` bytes each.
    ///
    /// `places` holds the path, the offset of the data and the number of rows of each file.
    pub fn open(
        name: String,
        places: Vec<(PathBuf, u64, u64)>,
        parts: u64,
        nbytes: usize,
    ) -> Result<Self, Error> {
        let mut files = RowFiles::default();
        for (path, data_offset, rows) in places {
            let id = files::open(&path).map_err(|error| unreadable(&path, error))?.id;
            let rows = rows.saturating_mul(parts);
            files.push(RowFile { path, id, rows, data_offset, itemsize: nbytes })?;
        }
        Ok(Self { name, files, parts })
    }

    /// Bytes of a part.
    pub fn nbytes(&self) -> usize {
        self.files.files().first().map_or(0, |file| file.itemsize)
    }

    /// Writes part `indices[i]` to the i-th `nbytes` bytes of `out`, on at most `threads` threads.
    pub fn read(
        &self,
        indices: &[i64],
        out: &mut [u8],
        threads: Option<usize>,
        interrupt: Interrupt<'_>,
    ) -> Result<(), Error> {
        let limits = Limits::of_process();
        let limits = Limits { cores: threads.unwrap_or(limits.cores).max(1), ..limits };
        let column = WholeRows { itemsize: self.nbytes() };
        rows::read(&self.files, limits, indices, &column, out, interrupt)
            .map_err(|error| self.named(error))
    }

    fn named(&self, error: ReadError) -> Error {
        match error {
            ReadError::Outside { position, row } => {
                Error::StepIndex { position, index: row, rows: self.files.rows() }
            }
            ReadError::Row { file, row, source } => {
                let path = self.files.files()[file].path.display();
                let row = (row - self.files.first(file)) / self.parts;
                let name = &self.name;
                Error::Output(format!("{path}: row {row} of {name} cannot be read: {source}"))
            }
            ReadError::Memory(error) => unreadable(&self.files.files()[0].path, error),
            ReadError::Interrupted(interrupted) => interrupted.into(),
        }
    }
}

fn unreadable(path: &Path, error: impl Display) -> Error {
    Error::Output(format!("cannot read {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing;

    const NBYTES: usize = 10;
    const PARTS: u64 = 4;

    /// Two files of 3 and 5 rows, and all their parts.
    fn tensor(directory: &Path) -> (StoredTensor, Vec<u8>) {
        let (files, all) = testing::row_files(directory, &[12, 20], NBYTES);
        let place = |file: &RowFile| (file.path.clone(), file.data_offset, file.rows / PARTS);
        let places = files.files().iter().map(place).collect();
        (StoredTensor::open("x".into(), places, PARTS, NBYTES).expect("files"), all)
    }

    fn read(tensor: &StoredTensor, parts: &[i64]) -> Result<Vec<u8>, Error> {
        let mut out = vec![0; parts.len() * NBYTES];
        tensor.read(parts, &mut out, Some(1), &mut || Ok(()))?;
        Ok(out)
    }

    #[test]
    fn an_error_names_the_file_the_tensor_and_the_row() {
        let directory = tempfile::tempdir().expect("a directory");
        let (tensor, _) = tensor(directory.path());
        let path = directory.path().join("rows-1");
        let file = fs::OpenOptions::new().write(true).open(&path).expect("a file");
        file.set_len(13 + 6 * NBYTES as u64).expect("shorter");
        read(&tensor, &[17, 0]).expect("rows before the end");
        let error = read(&tensor, &[2, 19]).expect_err("cut short").to_string();
        let expected = "rows-1: row 1 of x cannot be read: the file was cut short before it";
        assert!(error.ends_with(expected), "{error}");
        assert!(matches!(read(&tensor, &[32]), Err(Error::StepIndex { .. })));
        fs::remove_file(&path).expect("a file");
        fs::write(&path, [0; 1000]).expect("written");
        let error = read(&tensor, &[17]).expect_err("another file").to_string();
        assert!(error.contains("another file has taken its place"), "{error}");
    }
}
