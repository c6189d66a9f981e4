//! Rows of a read -> extents of files, one call each, and their bytes -> the caller's buffer.

use std::marker::PhantomData;
use std::ops::Range;

use super::Column;
use super::files::RowFiles;
use super::order::Packing;

/// Bytes of an extent, unless one row is larger: it leaves room in the second-level cache.
const MAX_EXTENT: u64 = 256 << 10;

/// Sorted keys of rows of one file, and the bytes of it that cover them.
#[derive(Debug, Clone, Copy)]
pub struct Extent<'c> {
    pub file: usize,
    pub keys: &'c [u64],
    pub start: u64,
    pub length: usize,
}

/// The files of a call, the bytes it takes of their rows, and the buffer it fills.
pub struct Extents<'c, C> {
    pub files: &'c RowFiles,
    pub column: &'c C,
    pub packing: Packing,
    pub out: Scatter<'c>,
}

/// The column's bytes in the rows of one file.
struct View<F> {
    field: F,
    rows: Range<u64>,
    /// The offset of these bytes in the first row.
    start: u64,
    length: usize,
    itemsize: u64,
}

impl<F> View<F> {
    /// The offset of these bytes in `row`.
    fn offset(&self, row: u64) -> u64 {
        self.start + (row - self.rows.start) * self.itemsize
    }
}

impl<'c, C: Column> Extents<'c, C> {
    /// The longest prefix of `keys` that lies in one file with no gap over `gap`. The file
    /// `hint` is tried first.
    pub fn next(&self, keys: &'c [u64], gap: u64, hint: Option<usize>) -> Extent<'c> {
        let row = self.packing.step(keys[0]);
        let holds = |file: &usize| self.rows_of(*file).contains(&row);
        let file = hint.filter(holds).unwrap_or_else(|| self.files.holder(row));
        let view = self.view(file);
        let length = view.length as u64;
        let start = view.offset(row);
        let mut end = start + length;
        let more = keys[1..].iter().take_while(|&&key| {
            let row = self.packing.step(key);
            if !view.rows.contains(&row) {
                return false;
            }
            let offset = view.offset(row);
            let near = offset <= end + gap && offset + length - start <= MAX_EXTENT;
            if near {
                end = offset + length;
            }
            near
        });
        let keys = &keys[..1 + more.count()];
        Extent { file, keys, start, length: (end - start) as usize }
    }

    /// The first row of `extent` that is not within its first `done` bytes.
    pub fn row_past(&self, extent: Extent<'_>, done: u64) -> u64 {
        let view = self.view(extent.file);
        let mut rows = extent.keys.iter().map(|&key| self.packing.step(key));
        let missing = |row: &u64| view.offset(*row) + view.length as u64 > extent.start + done;
        rows.find(missing).unwrap_or_else(|| self.packing.step(extent.keys[0]))
    }

    /// Writes the column's bytes of the rows of `extent`, which holds `bytes`, to their places.
    ///
    /// # Safety
    ///
    /// No key of a call may be in two extents that are written.
    #[allow(unsafe_code)]
    pub unsafe fn write(&self, extent: Extent<'_>, bytes: &[u8]) {
        let view = self.view(extent.file);
        for &key in extent.keys {
            let at = (view.offset(self.packing.step(key)) - extent.start) as usize;
            // SAFETY: every position is in one key alone, and no key is written twice.
            let out = unsafe { self.out.place(self.packing.position(key)) };
            C::write(view.field, &bytes[at..at + view.length], out);
        }
    }

    fn rows_of(&self, file: usize) -> Range<u64> {
        let first = self.files.first(file);
        first..first + self.files.files()[file].rows
    }

    fn view(&self, file: usize) -> View<C::Field> {
        let rows = &self.files.files()[file];
        let field = self.column.field(file);
        let range = C::range(field);
        View {
            field,
            rows: self.rows_of(file),
            start: rows.data_offset + range.start as u64,
            length: range.len(),
            itemsize: rows.itemsize as u64,
        }
    }
}

/// A buffer of equal places, which several threads fill. Each place is written by one thread.
pub struct Scatter<'a> {
    start: *mut u8,
    places: usize,
    width: usize,
    buffer: PhantomData<&'a mut [u8]>,
}

// SAFETY: callers of `place` ask for each place once.
#[allow(unsafe_code)]
unsafe impl Sync for Scatter<'_> {}

impl<'a> Scatter<'a> {
    pub fn new(buffer: &'a mut [u8], width: usize) -> Self {
        let places = buffer.len() / width;
        Self { start: buffer.as_mut_ptr(), places, width, buffer: PhantomData }
    }

    /// # Safety
    ///
    /// No place may be asked for twice.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub unsafe fn place(&self, place: usize) -> &mut [u8] {
        assert!(place < self.places, "a place within the buffer");
        // SAFETY: the place lies in the buffer, which is borrowed for as long as `self` lives.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(place * self.width), self.width) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::WholeRows;
    use crate::rows::order::Order;
    use crate::testing;

    /// The extents of `rows` in a file of as many as `count`, each with its number of rows.
    fn extents(count: usize, itemsize: usize, rows: &[i64], gap: u64) -> Vec<(u64, usize, usize)> {
        let directory = tempfile::tempdir().expect("a directory");
        let (files, _) = testing::row_files(directory.path(), &[0, count], itemsize);
        let highest = *rows.last().expect("rows") as u64;
        let mut order = Order::new(rows, rows[0] as u64, highest).expect("memory");
        let column = WholeRows { itemsize };
        let out = Scatter::new(&mut [], itemsize);
        let wanted = Extents { files: &files, column: &column, packing: order.packing, out };
        let mut keys: Vec<u64> = order.buckets().expect("memory").concat();
        keys.sort_unstable();
        let (mut found, mut rest) = (Vec::new(), &keys[..]);
        while !rest.is_empty() {
            let extent = wanted.next(rest, gap, None);
            found.push((extent.start - 13, extent.length, extent.keys.len()));
            rest = &rest[extent.keys.len()..];
        }
        found
    }

    #[test]
    fn an_extent_ends_before_it_outgrows_the_cache() {
        let all: Vec<i64> = (0..20_000).collect();
        let most = MAX_EXTENT as usize / 46;
        let expected: Vec<_> = (0..20_000)
            .step_by(most)
            .map(|first| (first, most.min(20_000 - first)))
            .map(|(first, rows)| (46 * first as u64, 46 * rows, rows))
            .collect();
        assert!(expected.len() > 2);
        assert_eq!(extents(20_000, 46, &all, 0), expected);
    }

    #[test]
    fn a_row_larger_than_an_extent_is_one() {
        let itemsize = MAX_EXTENT as usize + 1;
        let expected = [(0, itemsize, 1), (itemsize as u64, itemsize, 1)];
        assert_eq!(extents(2, itemsize, &[0, 1], u64::MAX / 4), expected);
    }

    #[test]
    fn rows_that_lie_near_are_read_together() {
        let rows = [2, 3, 3, 5, 9, 10];
        assert_eq!(extents(11, 10, &rows, 0), [(20, 20, 3), (50, 10, 1), (90, 20, 2)]);
        assert_eq!(extents(11, 10, &rows, 10), [(20, 40, 4), (90, 20, 2)]);
        assert_eq!(extents(11, 10, &rows, 30), [(20, 90, 6)]);
    }
}
