//! Reads chosen rows by number, in parallel, into the caller's buffer in the caller's order.
//!
//! Rows are taken in the order of the files, and near neighbours are read in one extent. An extent
//! in the page cache is read at once. Any other is announced to the kernel and read later, so that
//! each thread keeps many reads in flight. No file is mapped: a file that shrinks is an error, never
//! a signal.

mod extents;
pub mod files;
mod order;
mod reader;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{env, thread};

use self::extents::{Extents, Scatter};
use self::files::RowFiles;
use self::order::Order;
use self::reader::{Reader, Work};
use crate::error::{Interrupt, Interrupted};
use crate::memory::{self, OutOfMemory};

/// Rows that pay for another thread. On a busy machine a shorter read would wait for it.
const THREAD_ROWS: usize = 1024;
/// Time between questions to the caller whether to stop, once its thread has nothing left to read.
const INTERRUPT_PAUSE: Duration = Duration::from_millis(20);

/// The most threads of a read: more would only take cores from the forward pass.
const MAX_THREADS: usize = 16;

/// The bytes that a read takes from each row.
pub trait Column: Sync {
    /// Their place in the rows of one file.
    type Field: Copy;

    /// Bytes that a row becomes.
    fn width(&self) -> usize;
    /// The field in the rows of file number `file`.
    fn field(&self, file: usize) -> Self::Field;
    /// The bytes of a row that are read.
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

/// The share of the machine that a call may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub cores: usize,
    /// Open files.
    pub files: usize,
    /// Ask the page cache before the disk.
    pub asks_cache: bool,
}

impl Limits {
    pub fn of_process() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        // torchrun sets it to the processes that share this machine.
        let processes = env::var("LOCAL_WORLD_SIZE").ok().and_then(|text| text.parse().ok());
        let cores = (cores / processes.unwrap_or(1).max(1)).clamp(1, MAX_THREADS);
        let files = (files::descriptor_limit() / 4).clamp(1, 1024) as usize;
        Self { cores, files, asks_cache: true }
    }
}

/// A failed read. The caller knows the names that the numbers stand for.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("row {row} at position {position} is in no file")]
    Outside { position: usize, row: i64 },
    #[error("row {row} of file number {file} cannot be read: {source}")]
    Row { file: usize, row: u64, source: io::Error },
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
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

/// Locks a mutex, even if a thread panicked while it held it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes the column's bytes of row `indices[i]` of `files` to the i-th `width` bytes of `out`.
pub fn read(
    files: &RowFiles,
    limits: Limits,
    indices: &[i64],
    column: &impl Column,
    out: &mut [u8],
    interrupt: Interrupt<'_>,
) -> Result<(), ReadError> {
    assert_eq!(indices.len().checked_mul(column.width()), Some(out.len()), "a place per row");
    check_inside(files, indices, 0)?;
    let capacity = order::capacity(0, files.rows().saturating_sub(1));
    let threads = (indices.len() / THREAD_ROWS).clamp(1, limits.cores);
    let outs = out.chunks_mut(capacity.saturating_mul(column.width()));
    for (chunk, (shared, out)) in indices.chunks(capacity).zip(outs).enumerate() {
        // A copy: the caller's other threads may write to the array meanwhile.
        let mut indices = memory::with_capacity(shared.len())?;
        indices.extend_from_slice(shared);
        check_inside(files, &indices, chunk * capacity)?;
        let (lowest, highest) = extremes(&indices);
        let mut order = Order::new(&indices, lowest as u64, highest as u64)?;
        drop(indices);
        let packing = order.packing;
        let buckets = order.buckets()?;
        let out = Scatter::new(out, column.width());
        let call = Call::new(Work {
            extents: Extents { files, column, packing, out },
            limits,
            buckets: Mutex::new(buckets.into_iter()),
            stop: AtomicBool::new(false),
        });
        call.run(threads, interrupt)?;
    }
    Ok(())
}

/// The smallest and the largest index.
fn extremes(indices: &[i64]) -> (i64, i64) {
    indices
        .iter()
        .fold((i64::MAX, i64::MIN), |(lowest, highest), &i| (lowest.min(i), highest.max(i)))
}

/// Refuses indices outside the files. The first index is at `position` of the caller's.
fn check_inside(files: &RowFiles, indices: &[i64], position: usize) -> Result<(), ReadError> {
    let rows = files.rows();
    let fits = |index: i64| u64::try_from(index).is_ok_and(|index| index < rows);
    let (lowest, highest) = extremes(indices);
    if indices.is_empty() || fits(lowest) && fits(highest) {
        return Ok(());
    }
    match indices.iter().enumerate().find(|&(_, &index)| !fits(index)) {
        Some((at, &row)) => Err(ReadError::Outside { position: position + at, row }),
        None => Ok(()),
    }
}

/// One call's work, and the threads that do it.
struct Call<'c, C> {
    work: Work<'c, C>,
    failure: Mutex<Option<ReadError>>,
    /// Threads other than the calling one that have not ended.
    helpers: Mutex<usize>,
    helper_left: Condvar,
}

impl<'c, C: Column> Call<'c, C> {
    fn new(work: Work<'c, C>) -> Self {
        let (helpers, helper_left) = (Mutex::new(0), Condvar::new());
        Self { work, failure: Mutex::new(None), helpers, helper_left }
    }

    fn run(&self, threads: usize, interrupt: Interrupt<'_>) -> Result<(), ReadError> {
        thread::scope(|scope| {
            for _ in 1..threads {
                *lock(&self.helpers) += 1;
                let helper = thread::Builder::new().spawn_scoped(scope, || {
                    let _leaving = Leaving(self);
                    self.work(&mut || Ok(()));
                });
                // Without another thread, this one does it all.
                if helper.is_err() {
                    drop(Leaving(self));
                }
            }
            self.work(&mut *interrupt);
            self.wait_for_helpers(interrupt);
        });
        lock(&self.failure).take().map_or(Ok(()), Err)
    }

    fn work(&self, interrupt: Interrupt<'_>) {
        if let Err(error) = Reader::new(&self.work, interrupt).read_buckets() {
            self.fail(error);
        }
    }

    fn fail(&self, error: ReadError) {
        self.work.stop.store(true, Ordering::Relaxed);
        lock(&self.failure).get_or_insert(error);
    }

    /// Waits for the other threads, and keeps asking the caller whether to stop.
    fn wait_for_helpers(&self, interrupt: Interrupt<'_>) {
        let mut helpers = lock(&self.helpers);
        while *helpers > 0 {
            let waited = self.helper_left.wait_timeout(helpers, INTERRUPT_PAUSE);
            helpers = waited.unwrap_or_else(PoisonError::into_inner).0;
            if let Err(error) = interrupt() {
                self.fail(error.into());
                return;
            }
        }
    }
}

/// Counts a helper out, even one that panics.
struct Leaving<'c, 'r, C>(&'r Call<'c, C>);

impl<C> Drop for Leaving<'_, '_, C> {
    fn drop(&mut self) {
        *lock(&self.0.helpers) -= 1;
        self.0.helper_left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::testing;

    const ITEMSIZE: usize = 46;
    const LIMITS: Limits = Limits { cores: 3, files: 64, asks_cache: true };

    /// Three files, 100,000 rows in all, and their rows one after the other.
    fn files(directory: &Path) -> (RowFiles, Vec<u8>) {
        testing::row_files(directory, &[30_000, 1, 69_999], ITEMSIZE)
    }

    fn random_indices(count: usize, below: u64) -> Vec<i64> {
        let mut random = testing::random();
        (0..count).map(|_| random(below) as i64).collect()
    }

    fn read_rows(
        files: &RowFiles,
        limits: Limits,
        indices: &[i64],
        interrupt: Interrupt<'_>,
    ) -> Result<Vec<u8>, ReadError> {
        let column = WholeRows { itemsize: ITEMSIZE };
        let mut out = vec![0; indices.len() * ITEMSIZE];
        read(files, limits, indices, &column, &mut out, interrupt)?;
        Ok(out)
    }

    #[test]
    fn rows_come_in_the_order_of_the_indices() {
        let directory = tempfile::tempdir().expect("a directory");
        let (files, rows) = files(directory.path());
        let dense = random_indices(200_000, 100_000);
        let sparse = random_indices(500, 100_000);
        let ends = vec![99_999, 0, 29_999, 30_000, 30_001, 0, 99_999];
        for indices in [dense, sparse, ends, vec![30_000; 5], vec![]] {
            let expected: Vec<u8> = indices
                .iter()
                .flat_map(|&index| &rows[index as usize * ITEMSIZE..][..ITEMSIZE])
                .copied()
                .collect();
            for asks_cache in [true, false] {
                let limits = Limits { asks_cache, ..LIMITS };
                let read = read_rows(&files, limits, &indices, &mut || Ok(())).expect("rows");
                assert!(read == expected);
            }
        }
    }

    fn no_work<'c>(files: &'c RowFiles, column: &'c WholeRows) -> Work<'c, WholeRows> {
        let packing = Order::new(&[0], 0, 0).expect("memory").packing;
        let out = Scatter::new(&mut [], 1);
        Work {
            extents: Extents { files, column, packing, out },
            limits: LIMITS,
            buckets: Mutex::new(Vec::new().into_iter()),
            stop: AtomicBool::new(false),
        }
    }

    #[test]
    fn an_interrupt_is_heard_while_other_threads_read() {
        let (files, column) = (RowFiles::default(), WholeRows { itemsize: 1 });
        let mut call = Call::new(no_work(&files, &column));
        call.helpers = Mutex::new(1);
        call.wait_for_helpers(&mut || Err(Interrupted));
        assert!(call.work.stop.load(Ordering::Relaxed));
        assert!(matches!(*lock(&call.failure), Some(ReadError::Interrupted(_))));
    }

    /// Files below `directory` that this process has open.
    fn open_files(directory: &Path) -> usize {
        let links = fs::read_dir("/proc/self/fd").expect("descriptors");
        let paths = links.filter_map(|link| fs::read_link(link.ok()?.path()).ok());
        paths.filter(|path| path.starts_with(directory)).count()
    }

    #[test]
    fn extents_that_wait_for_the_disk_keep_few_files_open() {
        let directory = tempfile::tempdir().expect("a directory");
        let directory = directory.path().canonicalize().expect("a path");
        let (files, rows) = testing::row_files(&directory, &[1; 400], ITEMSIZE);
        let indices: Vec<_> = (0..400).collect();
        let limits = Limits { cores: 1, files: 160, asks_cache: false };
        let (none, column) = (RowFiles::default(), WholeRows { itemsize: 1 });
        let (idle, mut go_on) = (no_work(&none, &column), [|| Ok(()); 3]);
        let others: Vec<_> = go_on.iter_mut().map(|go_on| Reader::new(&idle, go_on)).collect();
        let mut most = 0;
        let read = read_rows(&files, limits, &indices, &mut || {
            most = most.max(open_files(&directory));
            Ok(())
        });
        assert!(read.expect("rows") == rows);
        // All readers of the process share the files of one call. Other tests run readers too.
        let share = limits.files / (others.len() + 1);
        assert!((2..=share).contains(&most), "{most} files were open");
    }
}
