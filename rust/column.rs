//! What becomes of the bytes of a row that is read.

use std::ops::Range;

/// What is taken from each row.
pub trait Column: Sync {
    /// Where it lies in the rows of one file.
    type Field: Copy;

    /// Bytes that a row becomes.
    fn width(&self) -> usize;
    /// The field in the rows of file number `file`.
    fn field(&self, file: usize) -> Self::Field;
    /// The bytes of a row that are needed.
    fn range(field: Self::Field) -> Range<usize>;
    /// Turns the bytes of `range` into `width` bytes.
    fn write(field: Self::Field, bytes: &[u8], out: &mut [u8]);
}

/// Rows as they are in files whose rows have one size.
pub struct WholeRows {
    pub itemsize: usize,
}

impl Column for WholeRows {
    type Field = usize;

    fn width(&self) -> usize {
        self.itemsize
    }

    fn field(&self, _: usize) -> usize {
        self.itemsize
    }

    fn range(itemsize: usize) -> Range<usize> {
        0..itemsize
    }

    fn write(_: usize, bytes: &[u8], out: &mut [u8]) {
        out.copy_from_slice(bytes);
    }
}
