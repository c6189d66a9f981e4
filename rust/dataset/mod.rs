//! A dataset: the shards of a directory, read by global step index.

pub mod headers;
pub mod layouts;
pub mod scan;

use std::ops::Range;
use std::path::{Path, PathBuf};

use self::headers::Shards;
use self::layouts::{Layout, Selected, Selection};
use self::scan::Columns;
use crate::error::{Error, Interrupt};
use crate::rows::files::{RowFile, RowFiles};
use crate::rows::{self, Column, Limits, ReadError, WholeRows};

/// The shards of a dataset in order. No file is kept open.
#[derive(Debug)]
pub struct Dataset {
    pub path: PathBuf,
    /// The shards.
    pub files: RowFiles,
    /// The distinct layouts of rows and, in the same order, their dtypes as the headers have them.
    layouts: Vec<Layout>,
    pub descrs: Vec<String>,
    /// The place of each shard's layout among the distinct ones.
    pub layout_of: Vec<usize>,
    /// The board alone, for each layout.
    boards: Vec<Selection>,
    limits: Limits,
}

impl Dataset {
    /// Takes the layout of each distinct `descr` of `shards`, and checks the files' sizes by it.
    pub fn new(shards: Shards, layouts: Vec<Layout>) -> Result<Self, Error> {
        check_layouts(&shards, &layouts)?;
        let descrs = shards.layouts.into_iter().map(|(_, descr)| descr).collect();
        let (path, shards) = (shards.directory, shards.files);
        let (mut files, mut layout_of) = (RowFiles::default(), Vec::with_capacity(shards.len()));
        for shard in shards {
            let itemsize = layouts[shard.layout].itemsize;
            let (path, rows, found) = (shard.path, shard.rows, shard.size);
            let nbytes = u128::from(rows) * itemsize as u128;
            let expected = u128::from(shard.data_offset) + nbytes;
            if u128::from(found) < expected {
                let problem = format!(
                    "truncated: the header promises {rows} rows ({expected} bytes) but the file \
                     has {found} bytes; copy the shard again or remove it"
                );
                return Err(Error::Dataset { path, problem });
            }
            let (id, data_offset) = (shard.id, shard.data_offset);
            files.push(RowFile { path, id, rows, data_offset, itemsize })?;
            layout_of.push(shard.layout);
        }
        let boards = layouts.iter().map(|layout| Selection::new(layout.board, vec![])).collect();
        let limits = Limits::of_process();
        Ok(Self { path, files, layouts, descrs, layout_of, boards, limits })
    }

    /// Rows in all shards.
    pub fn rows(&self) -> u64 {
        self.files.rows()
    }

    /// Bytes of a row of the first shard.
    pub fn itemsize(&self) -> usize {
        self.files.files()[0].itemsize
    }

    /// Writes the 16 exponents of board `indices[i]` to the i-th 16 bytes of `out`.
    pub fn read_boards(
        &self,
        indices: &[i64],
        out: &mut [u8],
        interrupt: Interrupt<'_>,
    ) -> Result<(), Error> {
        self.read_selected(indices, &self.boards, out, interrupt)
    }

    /// Writes row `indices[i]` to the i-th `itemsize` bytes of `out`, unless layouts differ.
    pub fn read_rows(
        &self,
        indices: &[i64],
        out: &mut [u8],
        interrupt: Interrupt<'_>,
    ) -> Result<(), Error> {
        if let Some(other) = self.layout_of.iter().position(|&layout| layout != 0) {
            let (path, first) = (self.shard(other), self.shard(0).display());
            let problem = format!(
                "its rows have other fields than the rows of {first}; read boards, or convert one \
                 of them"
            );
            return Err(Error::dataset(path, problem));
        }
        self.read(indices, &WholeRows { itemsize: self.itemsize() }, out, interrupt)
    }

    /// The board and `fields` of each layout, given by their bytes in a row.
    pub fn select(&self, fields: Vec<Vec<Range<usize>>>) -> Result<Vec<Selection>, Error> {
        let widths = |fields: &[Range<usize>]| fields.iter().map(Range::len).collect::<Vec<_>>();
        let layouts = self.layouts.len();
        if fields.len() != layouts || fields.iter().any(|each| widths(each) != widths(&fields[0])) {
            let problem = format!("fields must have equal sizes in each of {layouts} layouts");
            return Err(Error::Argument(problem));
        }
        let select = |(layout, fields): (&Layout, Vec<Range<usize>>)| {
            let ends = fields.iter().map(|field| field.end);
            check_inside_row(ends.max().unwrap_or(0), layout.itemsize)?;
            Ok(Selection::new(layout.board, fields))
        };
        self.layouts.iter().zip(fields).map(select).collect()
    }

    /// Writes the 16 exponents of board `indices[i]`, and after them the selected fields of its
    /// row, to the i-th of equal places in `out`.
    pub fn read_selected(
        &self,
        indices: &[i64],
        selections: &[Selection],
        out: &mut [u8],
        interrupt: Interrupt<'_>,
    ) -> Result<(), Error> {
        self.read(indices, &self.selected(selections), out, interrupt)
    }

    /// Fills `columns` with the selected bytes of consecutive rows, read into `scratch`.
    pub fn read_columns(
        &self,
        rows: Range<u64>,
        selections: &[Selection],
        scratch: &mut [u8],
        columns: &mut Columns<'_>,
        interrupt: Interrupt<'_>,
    ) -> Result<(), Error> {
        let selected = self.selected(selections);
        scan::read(&self.files, &selected, rows, scratch, columns, interrupt)
            .map_err(|error| self.named(error))
    }

    fn shard(&self, number: usize) -> &Path {
        &self.files.files()[number].path
    }

    fn selected<'s>(&'s self, selections: &'s [Selection]) -> Selected<'s> {
        let width = selections[0].width();
        Selected { selections, layout_of: &self.layout_of, width }
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
                let advice = "restore the shard and run again";
                let problem = format!("step {row} cannot be read: {source}; {advice}");
                Error::dataset(self.shard(file), problem)
            }
            ReadError::Memory(error) => {
                let problem = format!("its rows cannot be read: {error}; read fewer at once");
                Error::dataset(&self.path, problem)
            }
            ReadError::Interrupted(interrupted) => interrupted.into(),
        }
    }
}

/// Refuses layouts whose board is outside the row, or that hold it in other fields than the first.
fn check_layouts(shards: &Shards, layouts: &[Layout]) -> Result<(), Error> {
    if layouts.is_empty() || layouts.len() != shards.layouts.len() {
        let problem = format!("a dataset of {} layouts must get as many", shards.layouts.len());
        return Err(Error::Argument(problem));
    }
    let expected = layouts[0].board.names();
    for (Layout { itemsize, board }, (path, _)) in layouts.iter().zip(&shards.layouts) {
        check_inside_row(board.range().end, *itemsize)?;
        if board.names() != expected {
            let (first, found) = (shards.layouts[0].0.display(), board.names());
            let problem = format!(
                "its rows have {found}, but the rows of {first} have {expected}; convert one of \
                 them, so that all shards have the same board fields"
            );
            return Err(Error::dataset(path, problem));
        }
    }
    Ok(())
}

fn check_inside_row(stop: usize, itemsize: usize) -> Result<(), Error> {
    if stop <= itemsize {
        return Ok(());
    }
    let problem = format!("fields must end within a row of {itemsize} bytes; got byte {stop}");
    Err(Error::Argument(problem))
}
