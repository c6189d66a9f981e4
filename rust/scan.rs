//! Consecutive rows -> a buffer for each wanted field, read in the order of the files.

use std::ops::Range;

use crate::boards::CELLS;
use crate::fields::Selection;
use crate::file;
use crate::interrupt::Interrupt;
use crate::read_error::ReadError;
use crate::row_files::RowFiles;

/// Where the values of consecutive rows go.
pub struct Columns<'o> {
    /// 16 bytes a row.
    pub boards: Option<&'o mut [u8]>,
    /// A buffer for each field.
    pub fields: Vec<&'o mut [u8]>,
}

impl Columns<'_> {
    /// Takes what is selected of whole rows, which become those from number `place` on.
    fn fill(&mut self, selection: &Selection, rows: &[u8], itemsize: usize, place: usize) {
        if let Some(boards) = &mut self.boards {
            let board = selection.board();
            let range = board.range();
            let places = boards[place * CELLS..].chunks_exact_mut(CELLS);
            for (row, out) in rows.chunks_exact(itemsize).zip(places) {
                out.copy_from_slice(&board.decode(&row[range.clone()]));
            }
        }
        for (field, out) in selection.fields().iter().zip(&mut self.fields) {
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

/// Files to be scanned, and what is wanted of their rows.
pub struct Scan<'s> {
    pub files: &'s RowFiles,
    /// One for each layout.
    pub selections: &'s [Selection],
    /// The layout of each file's rows.
    pub layouts: &'s [usize],
}

impl Scan<'_> {
    /// Fills `columns` from `rows`, which all lie in the files.
    ///
    /// As many rows as `scratch` holds, which is one at least, are read in one extent.
    pub fn read(
        &self,
        rows: Range<u64>,
        scratch: &mut [u8],
        columns: &mut Columns<'_>,
        interrupt: Interrupt<'_>,
    ) -> Result<(), ReadError> {
        let mut row = rows.start;
        while row < rows.end {
            let file = self.files.holder(row);
            let end = rows.end.min(self.files.first(file) + self.files.files()[file].rows);
            let place = (row - rows.start) as usize;
            self.read_file(file, row..end, place, scratch, columns, interrupt)?;
            row = end;
        }
        Ok(())
    }

    /// Fills `columns` from number `place` on from `rows`, which all lie in one file.
    fn read_file(
        &self,
        number: usize,
        rows: Range<u64>,
        place: usize,
        scratch: &mut [u8],
        columns: &mut Columns<'_>,
        interrupt: Interrupt<'_>,
    ) -> Result<(), ReadError> {
        let wanted = &self.files.files()[number];
        let (first, itemsize) = (self.files.first(number), wanted.itemsize);
        let offset = |row| wanted.data_offset + (row - first) * itemsize as u64;
        let file = wanted.open().map_err(|source| ReadError::of_row(number, rows.start, source))?;
        file::advise_sequential(&file);
        let per_extent = scratch.len() / itemsize;
        for start in rows.clone().step_by(per_extent) {
            interrupt()?;
            let count = per_extent.min((rows.end - start) as usize);
            let bytes = &mut scratch[..count * itemsize];
            file::read_full(&file, bytes, offset(start)).map_err(|(done, source)| {
                ReadError::of_row(number, start + (done / itemsize) as u64, source)
            })?;
            let place = place + (start - rows.start) as usize;
            columns.fill(&self.selections[self.layouts[number]], bytes, itemsize, place);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::interrupt::Interrupted;
    use crate::layout::BoardField;
    use crate::testing;

    const ITEMSIZE: usize = 46;
    const BOARD: BoardField = BoardField::Packed { board: 8, mask: Some(20) };

    fn selection() -> Selection {
        Selection::new(BOARD, vec![0..4, 25..26, 30..46, 22..22, 3..10, 8..16, 20..22])
    }

    fn scan(
        files: &RowFiles,
        rows: Range<u64>,
        interrupt: Interrupt<'_>,
    ) -> Result<(Vec<u8>, Vec<Vec<u8>>), ReadError> {
        let (selections, layouts) = ([selection()], vec![0; files.files().len()]);
        let count = (rows.end - rows.start) as usize;
        let mut boards = vec![0; count * CELLS];
        let mut fields: Vec<Vec<u8>> =
            selections[0].fields().iter().map(|field| vec![0; count * field.len()]).collect();
        let mut columns = Columns {
            boards: Some(&mut boards),
            fields: fields.iter_mut().map(Vec::as_mut_slice).collect(),
        };
        let scan = Scan { files, selections: &selections, layouts: &layouts };
        scan.read(rows, &mut [0; 100_000], &mut columns, interrupt)?;
        Ok((boards, fields))
    }

    #[test]
    fn columns_are_those_of_the_rows_through_all_files() {
        let directory = tempfile::tempdir().expect("a directory");
        let counts = [20_000, 0, 1, 3_000];
        let (files, all) = testing::row_files(directory.path(), &counts, ITEMSIZE);
        for rows in [0..23_001, 19_999..20_002, 5_000..5_000, 7..19_000] {
            let (boards, fields) = scan(&files, rows.clone(), &mut || Ok(())).expect("columns");
            let expected = &all[rows.start as usize * ITEMSIZE..rows.end as usize * ITEMSIZE];
            let expected: Vec<_> = expected.chunks_exact(ITEMSIZE).collect();
            let decoded = expected.iter().flat_map(|row| BOARD.decode(&row[BOARD.range()]));
            assert!(boards.into_iter().eq(decoded));
            for (range, field) in selection().fields().iter().zip(fields) {
                let bytes = expected.iter().flat_map(|row| &row[range.clone()]);
                assert!(field.iter().eq(bytes), "{range:?}");
            }
        }
    }

    #[test]
    fn a_file_cut_short_names_the_row() {
        let directory = tempfile::tempdir().expect("a directory");
        let (files, _) = testing::row_files(directory.path(), &[10, 20_000], ITEMSIZE);
        let last = &files.files()[1];
        let file = fs::OpenOptions::new().write(true).open(&last.path).expect("the file");
        file.set_len(last.data_offset + 46 * 12_345 + 9).expect("shorter");
        let outcome = scan(&files, 0..20_010, &mut || Ok(()));
        let Err(ReadError::Row { file: 1, row: 12_355, source }) = outcome else {
            panic!("{:?}", outcome.map(|_| ()))
        };
        assert_eq!(source.to_string(), "the file was cut short before it");
    }

    #[test]
    fn an_interrupt_ends_the_scan() {
        let directory = tempfile::tempdir().expect("a directory");
        let (files, _) = testing::row_files(directory.path(), &[20_000], ITEMSIZE);
        let mut questions = 0;
        let outcome = scan(&files, 0..20_000, &mut || {
            questions += 1;
            if questions == 3 { Err(Interrupted) } else { Ok(()) }
        });
        assert!(matches!(outcome, Err(ReadError::Interrupted(_))));
    }
}
