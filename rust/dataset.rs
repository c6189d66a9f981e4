//! A dataset: the shards of a directory, read by global step index.

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::boards::Boards;
use crate::column::{Column, WholeRows};
use crate::descrs::Descrs;
use crate::error::Error;
use crate::fields::{BoardsAndFields, Selection};
use crate::file::FileId;
use crate::interrupt::Interrupt;
use crate::layout::BoardField;
use crate::limits::Limits;
use crate::memory::{self, OutOfMemory};
use crate::npy::Header;
use crate::read_error::ReadError;
use crate::row_files::{RowFile, RowFiles};
use crate::rows;
use crate::scan::{Columns, Scan};
use crate::shards;

/// Threads that open shards: enough to hide the latency of a network file system.
const OPENERS: usize = 32;

/// The shards of a dataset directory in order; their headers are read, no file is kept open.
#[derive(Debug)]
pub struct Dataset {
    path: PathBuf,
    files: RowFiles,
    /// Where the rows of each shard hold the board.
    boards: Vec<BoardField>,
    descrs: Descrs,
    pub(crate) limits: Limits,
}

impl Dataset {
    /// Opens the directory `path`.
    pub fn open(path: &Path, interrupt: Interrupt<'_>) -> Result<Self, Error> {
        let limits = Limits::of_process();
        let paths = shards::shard_paths(path)?;
        let headers = shards::read_headers(&paths, limits.files.min(OPENERS), interrupt)?;
        let dataset = Self::new(path, limits, paths, headers)?;
        dataset.check_boards()?;
        Ok(dataset)
    }

    fn new(
        path: &Path,
        limits: Limits,
        paths: Vec<PathBuf>,
        headers: Vec<(FileId, Header)>,
    ) -> Result<Self, Error> {
        let no_memory =
            |error: OutOfMemory| Error::Open { path: path.to_owned(), source: error.into() };
        let mut files = RowFiles::with_capacity(paths.len()).map_err(no_memory)?;
        let mut boards = memory::with_capacity(paths.len()).map_err(no_memory)?;
        let mut descrs = memory::with_capacity(paths.len()).map_err(no_memory)?;
        for (path, (id, header)) in paths.into_iter().zip(headers) {
            let Header { rows, data_offset, layout, descr } = header;
            let refused = Error::TooManyRows { path: path.clone() };
            let file = RowFile { path, id, rows, data_offset, itemsize: layout.itemsize };
            files.push(file).map_err(|_| refused)?;
            boards.push(layout.board);
            descrs.push(descr);
        }
        let descrs = Descrs::new(descrs).map_err(no_memory)?;
        Ok(Self { path: path.to_owned(), files, boards, descrs, limits })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The shards.
    pub fn files(&self) -> &RowFiles {
        &self.files
    }

    /// Rows in all shards.
    pub fn rows(&self) -> u64 {
        self.files.rows()
    }

    /// Bytes of a row of the first shard.
    pub fn itemsize(&self) -> usize {
        self.files.files()[0].itemsize
    }

    /// Where the rows of each shard hold the board.
    pub fn boards(&self) -> &[BoardField] {
        &self.boards
    }

    /// The dtype of a row of each shard, as the Python literal in its header.
    pub fn descrs(&self) -> &Descrs {
        &self.descrs
    }

    /// Writes the 16 exponents of board `indices[i]` to the i-th 16 bytes of `out`.
    pub fn read_boards(
        &self,
        indices: &[i64],
        out: &mut [u8],
        interrupt: Interrupt<'_>,
    ) -> Result<(), Error> {
        self.read(indices, &Boards { fields: &self.boards }, out, interrupt)
    }

    /// Writes row `indices[i]` to the i-th `itemsize` bytes of `out`, unless rows differ.
    pub fn read_rows(
        &self,
        indices: &[i64],
        out: &mut [u8],
        interrupt: Interrupt<'_>,
    ) -> Result<(), Error> {
        self.check_same_rows()?;
        self.read(indices, &WholeRows { itemsize: self.itemsize() }, out, interrupt)
    }

    /// The board and `fields` of the rows of each layout, as `read_boards_and_fields` wants them.
    ///
    /// `fields` holds their bytes in a row, for each of the distinct `descrs` in its order.
    pub fn select(&self, fields: Vec<Vec<Range<usize>>>) -> Result<Vec<Selection>, Error> {
        let layouts = self.descrs.distinct().len();
        let widths = |fields: &[Range<usize>]| fields.iter().map(Range::len).collect::<Vec<_>>();
        if fields.len() != layouts || fields.iter().any(|each| widths(each) != widths(&fields[0])) {
            return Err(Error::Selection { layouts });
        }
        let places = self.descrs.places();
        let select = |(layout, fields): (usize, Vec<Range<usize>>)| {
            let shard = places.iter().position(|&place| place == layout).unwrap_or(0);
            let RowFile { path, itemsize, .. } = &self.files.files()[shard];
            match fields.iter().find(|field| field.end > *itemsize) {
                Some(field) => Err(Error::OutsideRow {
                    path: path.clone(),
                    stop: field.end,
                    itemsize: *itemsize,
                }),
                None => Ok(Selection::new(self.boards[shard], fields)),
            }
        };
        fields.into_iter().enumerate().map(select).collect()
    }

    /// Writes the 16 exponents of board `indices[i]`, and after them the selected fields of its
    /// row, to the i-th of equal parts of `out`.
    pub fn read_boards_and_fields(
        &self,
        indices: &[i64],
        selections: &[Selection],
        out: &mut [u8],
        interrupt: Interrupt<'_>,
    ) -> Result<(), Error> {
        let width = selections[0].width();
        let column = BoardsAndFields { selections, layouts: self.descrs.places(), width };
        self.read(indices, &column, out, interrupt)
    }

    /// Fills `columns` with what is selected of consecutive rows, read into `scratch`.
    pub fn read_columns(
        &self,
        rows: Range<u64>,
        selections: &[Selection],
        scratch: &mut [u8],
        columns: &mut Columns<'_>,
        interrupt: Interrupt<'_>,
    ) -> Result<(), Error> {
        let scan = Scan { files: &self.files, selections, layouts: self.descrs.places() };
        scan.read(rows, scratch, columns, interrupt).map_err(|error| self.named(error))
    }

    fn read(
        &self,
        indices: &[i64],
        column: &impl Column,
        out: &mut [u8],
        interrupt: Interrupt<'_>,
    ) -> Result<(), Error> {
        rows::read(&self.files, self.limits, indices, column, out, interrupt)
            .map_err(|error| self.named(error))
    }

    /// The error with the names that its numbers stand for.
    fn named(&self, error: ReadError) -> Error {
        match error {
            ReadError::Outside { position, row } => {
                Error::StepIndex { position, index: row, rows: self.rows() }
            }
            ReadError::Row { file, row, source } => {
                Error::Row { path: self.files.files()[file].path.clone(), step: row, source }
            }
            ReadError::Memory(source) => Error::Read { path: self.path.clone(), source },
            ReadError::Interrupted(interrupted) => interrupted.into(),
        }
    }

    /// Refuses a dataset whose shards agree in the board alone: its whole rows have no one dtype.
    fn check_same_rows(&self) -> Result<(), Error> {
        let Some(odd) = self.descrs.odd() else { return Ok(()) };
        let files = self.files.files();
        Err(Error::RowsDiffer { path: files[odd].path.clone(), first: files[0].path.clone() })
    }

    /// Refuses shards that differ in the fields that hold the board.
    fn check_boards(&self) -> Result<(), Error> {
        let wanted = self.boards[0].names();
        let Some(odd) = self.boards.iter().position(|board| board.names() != wanted) else {
            return Ok(());
        };
        let found = self.boards[odd].names();
        let files = self.files.files();
        let (path, first) = (files[odd].path.clone(), files[0].path.clone());
        Err(Error::BoardsDiffer { path, first, found, wanted })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::boards::{CELLS, decode};
    use crate::interrupt::Interrupted;
    use crate::shards::OPEN_BATCH;
    use crate::testing::{PACKED, shard, write};

    fn open(path: &Path) -> Result<Dataset, Error> {
        Dataset::open(path, &mut || Ok(()))
    }

    fn names(dataset: &Dataset) -> Vec<String> {
        let names = dataset.files().files().iter().map(|shard| shard.path.file_name());
        names.map(|name| name.expect("a name").to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn shards_come_in_lexicographic_order_and_before_steps_npy() {
        let directory = tempfile::tempdir().expect("a directory");
        for (name, rows) in [("steps-2.npy", 3), ("steps-10.npy", 2), ("steps.npy", 9)] {
            write(directory.path(), name, &shard(PACKED, rows));
        }
        write(directory.path(), "annotations-0.npy", b"not a shard");
        write(directory.path(), "steps-0.npy.partial", b"not a shard");
        let dataset = open(directory.path()).expect("a dataset");
        assert_eq!(names(&dataset), ["steps-10.npy", "steps-2.npy"]);
        assert_eq!(dataset.rows(), 5);
        let shards: Vec<_> = (0..5).map(|step| dataset.files().holder(step)).collect();
        assert_eq!(shards, [0, 0, 1, 1, 1]);
    }

    #[test]
    fn steps_npy_alone_and_empty_shards() {
        let directory = tempfile::tempdir().expect("a directory");
        write(directory.path(), "steps.npy", &shard(PACKED, 4));
        assert_eq!(names(&open(directory.path()).expect("a dataset")), ["steps.npy"]);
        for (name, rows) in [("steps-0.npy", 0), ("steps-1.npy", 1), ("steps-2.npy", 0)] {
            write(directory.path(), name, &shard(PACKED, rows));
        }
        let dataset = open(directory.path()).expect("a dataset");
        assert_eq!((dataset.rows(), dataset.files().holder(0)), (1, 1));
    }

    #[test]
    fn many_shards_keep_their_order() {
        let directory = tempfile::tempdir().expect("a directory");
        for index in 0..1000 {
            write(directory.path(), &format!("steps-{index:04}.npy"), &shard(PACKED, index % 3));
        }
        let dataset = open(directory.path()).expect("a dataset");
        let rows: Vec<_> = dataset.files().files().iter().map(|shard| shard.rows).collect();
        assert!(rows.into_iter().eq((0..1000).map(|index| index % 3)));
    }

    #[test]
    fn trailing_bytes_are_tolerated_and_missing_ones_are_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut bytes = shard(PACKED, 4);
        bytes.extend(b"more");
        write(directory.path(), "steps.npy", &bytes);
        assert_eq!(open(directory.path()).expect("a dataset").rows(), 4);
        write(directory.path(), "steps.npy", &bytes[..bytes.len() - 5]);
        let error = open(directory.path()).expect_err("a truncated shard");
        assert!(error.to_string().contains("truncated: the header promises 4 rows"), "{error}");
    }

    #[test]
    fn a_header_longer_than_the_first_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let extra: String = (0..200).map(|field| format!("('field_{field}', '<f4'), ")).collect();
        let fields = format!("[{extra}('board', '<u8')]");
        write(directory.path(), "steps.npy", &shard(&fields, 2));
        assert_eq!(open(directory.path()).expect("a dataset").itemsize(), 808);
    }

    #[test]
    fn what_is_not_a_dataset() {
        let directory = tempfile::tempdir().expect("a directory");
        let refused = |path: &Path, expected: &str| {
            let error = open(path).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error:?} should say {expected:?}");
        };
        refused(&directory.path().join("none"), "no such directory");
        refused(directory.path(), "no shards");
        write(directory.path(), "steps-0.npy", &shard("[('board', '<u8')]", 2));
        refused(&directory.path().join("steps-0.npy"), "not a directory");
        write(directory.path(), "steps-1.npy", &shard("[('exps', '|u1', (16,))]", 2));
        refused(directory.path(), "steps-1.npy: its rows have 'exps', but those of");
        fs::remove_file(directory.path().join("steps-1.npy")).expect("removed");
        fs::create_dir(directory.path().join("steps-1.npy")).expect("created");
        refused(directory.path(), "steps-1.npy: cannot be opened: not a regular file");
    }

    #[test]
    fn shards_may_differ_in_what_is_not_read() {
        let directory = tempfile::tempdir().expect("a directory");
        write(directory.path(), "steps-0.npy", &shard("[('board', '<u8')]", 2));
        write(directory.path(), "steps-1.npy", &shard("[('x', '|u1'), ('board', '<u8')]", 2));
        let dataset = open(directory.path()).expect("a dataset");
        assert_eq!(dataset.descrs().of(1), "[('x', '|u1'), ('board', '<u8')]");
        let error = dataset.check_same_rows().expect_err("rows that differ").to_string();
        assert!(error.contains("steps-1.npy: its rows have other fields"), "{error}");
    }

    #[test]
    fn opening_can_be_interrupted() {
        let directory = tempfile::tempdir().expect("a directory");
        for index in 0..3 * OPEN_BATCH {
            write(directory.path(), &format!("steps-{index:04}.npy"), &shard(PACKED, 1));
        }
        let outcome = Dataset::open(directory.path(), &mut || Err(Interrupted));
        assert!(matches!(outcome, Err(Error::Interrupted(_))));
    }

    #[test]
    fn boards_and_rows_of_shards_that_hold_them_elsewhere() {
        let directory = tempfile::tempdir().expect("a directory");
        let other = "[('x', '|u1'), ('tile_65536_mask', '<u2'), ('y', '<f4'), ('board', '<u8')]";
        let shards = [("steps-0.npy", shard(PACKED, 900)), ("steps-1.npy", shard(other, 800))];
        for (name, bytes) in &shards {
            write(directory.path(), name, bytes);
        }
        let dataset = open(directory.path()).expect("a dataset");
        let indices: Vec<i64> = (0..1700).map(|at| (at * 37) % 1700).collect();
        let mut boards = vec![0; indices.len() * CELLS];
        dataset.read_boards(&indices, &mut boards, &mut || Ok(())).expect("boards");
        for (&index, board) in indices.iter().zip(boards.chunks(CELLS)) {
            let (shard, row, size, at, mask_at) =
                if index < 900 { (0, index, 46, 8, 20) } else { (1, index - 900, 15, 7, 1) };
            let bytes = &shards[shard].1;
            let rows = &bytes[bytes.len() - size * if shard == 0 { 900 } else { 800 }..];
            let row = &rows[row as usize * size..][..size];
            let packed = u64::from_le_bytes(row[at..at + 8].try_into().expect("8 bytes"));
            let mask = u16::from_le_bytes([row[mask_at], row[mask_at + 1]]);
            assert_eq!(board, decode(packed, mask));
        }

        fs::remove_file(directory.path().join("steps-1.npy")).expect("removed");
        let dataset = open(directory.path()).expect("a dataset");
        let mut rows = vec![0; 2 * 46];
        dataset.read_rows(&[899, 0], &mut rows, &mut || Ok(())).expect("rows");
        let bytes = &shards[0].1;
        let data = &bytes[bytes.len() - 900 * 46..];
        assert_eq!(rows, [&data[899 * 46..], &data[..46]].concat());
    }

    #[test]
    fn errors_name_the_shard_and_the_step() {
        let directory = tempfile::tempdir().expect("a directory");
        for (name, rows) in [("steps-0.npy", 5), ("steps-1.npy", 5)] {
            write(directory.path(), name, &shard(PACKED, rows));
        }
        let dataset = open(directory.path()).expect("a dataset");
        let refused = |index: i64| {
            let outcome = dataset.read_boards(&[index], &mut [0; CELLS], &mut || Ok(()));
            outcome.expect_err("no such row").to_string()
        };
        assert_eq!(
            refused(10),
            "step index 10 at position 0 is outside the dataset, which has 10 rows"
        );
        fs::remove_file(directory.path().join("steps-1.npy")).expect("removed");
        assert!(refused(7).contains("steps-1.npy: step 7 cannot be read: No such file"));
    }
}
