//! Consecutive rows -> a buffer for each selected field, read in the order of the files.

use std::ops::Range;

use super::layouts::{CELLS, Selected, Selection};
use crate::error::Interrupt;
use crate::rows::files::{self, RowFiles};
use crate::rows::{Column, ReadError};

/// The buffers that the values of consecutive rows fill.
pub struct Columns<'o> {
    /// 16 bytes per row.
    pub boards: Option<&'o mut [u8]>,
    /// A buffer for each field.
    pub fields: Vec<&'o mut [u8]>,
}

impl Columns<'_> {
    /// Copies the selected bytes of whole `rows` to the rows from number `place` on.
    fn fill(&mut self, selection: &Selection, rows: &[u8], itemsize: usize, place: usize) {
        if let Some(boards) = &mut self.boards {
            let board = selection.board;
            let range = board.range();
            let places = boards[place * CELLS..].chunks_exact_mut(CELLS);
            for (row, out) in rows.chunks_exact(itemsize).zip(places) {
                out.copy_from_slice(&board.decode(&row[range.clone()]));
            }
        }
        for (field, out) in selection.fields.iter().zip(&mut self.fields) {
            let out = &mut out[place * field.len()..];
            match field.len() {
                0 => {}
                1 => gather::<1>(rows, itemsize, field.start, out),
                2 => gather::<2>(rows, itemsize, field.start, out),
                4 => gather::<4>(rows, itemsize, field.start, out),
                8 => gather::<8>(rows, itemsize, field.start, out),
                16 => gather::<16>(rows, itemsize, field.start, out),
                length => {
                    for (row, out) in rows.chunks_exact(itemsize).zip(out.chunks_exact_mut(length))
                    {
                        out.copy_from_slice(&row[field.clone()]);
                    }
                }
            }
        }
    }
}

/// Copies the `N` bytes at `offset` of each row.
fn gather<const N: usize>(rows: &[u8], itemsize: usize, offset: usize, out: &mut [u8]) {
    for (row, out) in rows.chunks_exact(itemsize).zip(out.as_chunks_mut::<N>().0) {
        *out = *row[offset..].first_chunk().expect("a field lies within its row");
    }
}

/// Fills `columns` from consecutive `rows` of `files`.
///
/// One read takes as many rows as `scratch` holds, which is one at least.
pub fn read(
    files: &RowFiles,
    selected: &Selected<'_>,
    rows: Range<u64>,
    scratch: &mut [u8],
    columns: &mut Columns<'_>,
    interrupt: Interrupt<'_>,
) -> Result<(), ReadError> {
    let mut row = rows.start;
    while row < rows.end {
        let number = files.holder(row);
        let (shard, first) = (&files.files()[number], files.first(number));
        let (itemsize, end) = (shard.itemsize, rows.end.min(first + shard.rows));
        let file = shard.open().map_err(|source| ReadError::of_row(number, row, source))?;
        files::advise_sequential(&file);
        while row < end {
            interrupt()?;
            let count = (scratch.len() / itemsize).min((end - row) as usize);
            let bytes = &mut scratch[..count * itemsize];
            let offset = shard.data_offset + (row - first) * itemsize as u64;
            files::read_full(&file, bytes, offset).map_err(|(done, source)| {
                ReadError::of_row(number, row + (done / itemsize) as u64, source)
            })?;
            let place = (row - rows.start) as usize;
            columns.fill(selected.field(number), bytes, itemsize, place);
            row += count as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::layouts::BoardField;
    use crate::testing;

    const ITEMSIZE: usize = 46;
    const BOARD: BoardField = BoardField::Packed { board: 8, mask: Some(20) };

    fn selection() -> Selection {
        Selection::new(BOARD, vec![0..4, 25..26, 30..46, 22..22, 3..10, 8..16, 20..22])
    }

    fn scan(files: &RowFiles, rows: Range<u64>) -> (Vec<u8>, Vec<Vec<u8>>) {
        let (selections, layout_of) = ([selection()], vec![0; files.files().len()]);
        let count = (rows.end - rows.start) as usize;
        let mut boards = vec![0; count * CELLS];
        let mut fields: Vec<Vec<u8>> =
            selections[0].fields.iter().map(|field| vec![0; count * field.len()]).collect();
        let mut columns = Columns {
            boards: Some(&mut boards),
            fields: fields.iter_mut().map(Vec::as_mut_slice).collect(),
        };
        let selected = Selected { selections: &selections, layout_of: &layout_of, width: 0 };
        let scratch = &mut [0; 100_000];
        read(files, &selected, rows, scratch, &mut columns, &mut || Ok(())).expect("columns");
        (boards, fields)
    }

    #[test]
    fn columns_are_those_of_the_rows_through_all_files() {
        let directory = tempfile::tempdir().expect("a directory");
        let counts = [20_000, 0, 1, 3_000];
        let (files, all) = testing::row_files(directory.path(), &counts, ITEMSIZE);
        for rows in [0..23_001, 19_999..20_002, 5_000..5_000, 7..19_000] {
            let (boards, fields) = scan(&files, rows.clone());
            let expected = &all[rows.start as usize * ITEMSIZE..rows.end as usize * ITEMSIZE];
            let expected: Vec<_> = expected.chunks_exact(ITEMSIZE).collect();
            let decoded = expected.iter().flat_map(|row| BOARD.decode(&row[BOARD.range()]));
            assert!(boards.into_iter().eq(decoded));
            for (range, field) in selection().fields.iter().zip(fields) {
                let bytes = expected.iter().flat_map(|row| &row[range.clone()]);
                assert!(field.iter().eq(bytes), "{range:?}");
            }
        }
    }
}
