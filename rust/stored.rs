//! A tensor in finished files, read in equal parts of its rows, by number.

use std::path::PathBuf;

use crate::column::WholeRows;
use crate::error::Error;
use crate::file;
use crate::interrupt::Interrupt;
use crate::limits::Limits;
use crate::read_error::ReadError;
use crate::row_files::{RowFile, RowFiles};
use crate::rows;

/// Where the tensor lies in one of the files.
pub struct Stored {
    pub path: PathBuf,
    /// Bytes before its data.
    pub offset: u64,
    pub rows: u64,
}

/// A tensor whose rows are counted through all files, and its parts through all rows.
#[derive(Debug)]
pub struct StoredTensor {
    name: String,
    files: RowFiles,
    /// Of a row.
    parts: u64,
    limits: Limits,
}

impl StoredTensor {
    /// The tensor `name`, each row of which is `parts` parts of `nbytes` bytes.
    pub fn open(
        name: String,
        places: Vec<Stored>,
        parts: u64,
        nbytes: usize,
    ) -> Result<Self, Error> {
        let mut files = RowFiles::with_capacity(places.len())?;
        for Stored { path, offset, rows } in places {
            let opened = file::open(&path)
                .map_err(|source| Error::StoredFile { path: path.clone(), source })?;
            let refused = Error::TooManyRows { path: path.clone() };
            let rows = rows.saturating_mul(parts);
            let file = RowFile { path, id: opened.id, rows, data_offset: offset, itemsize: nbytes };
            files.push(file).map_err(|_| refused)?;
        }
        Ok(Self { name, files, parts, limits: Limits::of_process() })
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
        let cores = threads.unwrap_or(self.limits.cores);
        let limits = Limits { cores: cores.max(1), ..self.limits };
        let column = WholeRows { itemsize: self.nbytes() };
        rows::read(&self.files, limits, indices, &column, out, interrupt)
            .map_err(|error| self.name_error(error))
    }

    fn name_error(&self, error: ReadError) -> Error {
        let name = self.name.clone();
        match error {
            ReadError::Outside { position, row } => {
                Error::StepIndex { position, index: row, rows: self.files.rows() }
            }
            ReadError::Row { file, row, source } => {
                let path = self.files.files()[file].path.clone();
                let row = (row - self.files.first(file)) / self.parts;
                Error::StoredRow { path, name, row, source }
            }
            ReadError::Memory(source) => {
                let path = self.files.files()[0].path.clone();
                Error::StoredFile { path, source: source.into() }
            }
            ReadError::Interrupted(interrupted) => interrupted.into(),
        }
    }
}
