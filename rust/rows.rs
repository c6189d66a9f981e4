//! Reads chosen rows by position, in parallel, into the caller's buffer in the caller's order.
//!
//! Rows are taken in the order of the files; neighbours that lie near enough are read in one
//! extent. An extent that the page cache holds is read at once. One that it does not hold is
//! announced to the kernel and read later, in turn, so that each thread keeps many reads in flight.
//! No file is mapped: a shard that shrinks is an error, never a signal.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::error::Error;
use crate::file::{self, Cached};
use crate::interrupt::Interrupt;
use crate::layout::Layout;
use crate::order::{self, Order, Packing};
use crate::scatter::Scatter;
use crate::shards::{Pool, Shard};

/// Bytes between two rows up to which reading them too costs less than another call.
const CACHED_GAP: u64 = 10 << 10;
/// The same where a read waits for the disk.
const DISK_GAP: u64 = 16 << 10;
/// Bytes of an extent, unless one row is larger; a part of the second-level cache.
const MAX_EXTENT: u64 = 256 << 10;
/// Rows from which another thread pays off.
const THREAD_ROWS: usize = 512;
/// Reads that a thread keeps in flight on a disk.
const IN_FLIGHT: usize = 256;
/// Extents between two questions to the caller whether to go on.
const INTERRUPT_EVERY: u32 = 16;
/// Time between such questions once the calling thread has nothing left to read.
const INTERRUPT_PAUSE: Duration = Duration::from_millis(20);

/// Threads of all calls in this process that are reading, which share its descriptors.
static READERS: AtomicUsize = AtomicUsize::new(0);

/// What is taken from each row.
pub trait Column: Sync {
    /// Bytes that a row becomes.
    fn width(&self) -> usize;
    /// The bytes of a row that are needed.
    fn span(&self, layout: Layout) -> Range<usize>;
    /// Turns the bytes of `span` into `width` bytes.
    fn write(&self, layout: Layout, bytes: &[u8], out: &mut [u8]);
}

/// Rows as they are in the file. The shards agree in their rows.
pub struct WholeRows {
    pub itemsize: usize,
}

impl Column for WholeRows {
    fn width(&self) -> usize {
        self.itemsize
    }

    fn span(&self, layout: Layout) -> Range<usize> {
        0..layout.itemsize
    }

    fn write(&self, _: Layout, bytes: &[u8], out: &mut [u8]) {
        out.copy_from_slice(bytes);
    }
}

/// Writes what `column` makes of row `indices[i]` of the pool to the i-th `width` bytes of `out`.
pub fn read(
    pool: &Pool,
    indices: &[i64],
    column: &impl Column,
    out: &mut [u8],
    interrupt: Interrupt<'_>,
) -> Result<(), Error> {
    assert_eq!(out.len(), indices.len() * column.width(), "one place for each row");
    check_inside(pool, indices, 0)?;
    let capacity = order::capacity(0, pool.rows().saturating_sub(1));
    let threads = (indices.len() / THREAD_ROWS).clamp(1, pool.limits.cores);
    let parts = indices.chunks(capacity).zip(out.chunks_mut(capacity * column.width()));
    for (part, (indices, out)) in parts.enumerate() {
        // A copy: the caller's other threads may write to the array meanwhile.
        let indices = indices.to_vec();
        check_inside(pool, &indices, part * capacity)?;
        let (lowest, highest) = extremes(&indices);
        let mut order = Order::new(&indices, lowest as u64, highest as u64);
        drop(indices);
        let packing = order.packing;
        let buckets = order.buckets();
        let call = Call {
            pool,
            column,
            packing,
            out: Scatter::new(out, column.width()),
            buckets: Mutex::new(buckets.into_iter()),
            stop: AtomicBool::new(false),
            failure: Mutex::new(None),
            helpers: Mutex::new(0),
            helper_left: Condvar::new(),
        };
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

/// Refuses indices outside the pool; the first of them is at `position` of the caller's.
fn check_inside(pool: &Pool, indices: &[i64], position: usize) -> Result<(), Error> {
    let rows = pool.rows();
    let fits = |index: i64| u64::try_from(index).is_ok_and(|index| index < rows);
    let (lowest, highest) = extremes(indices);
    if indices.is_empty() || fits(lowest) && fits(highest) {
        return Ok(());
    }
    match indices.iter().enumerate().find(|&(_, &index)| !fits(index)) {
        Some((at, &index)) => Err(Error::StepIndex { position: position + at, index, rows }),
        None => Ok(()),
    }
}

/// One call's work, shared by its threads.
struct Call<'c, C> {
    pool: &'c Pool,
    column: &'c C,
    packing: Packing,
    out: Scatter<'c>,
    buckets: Mutex<std::vec::IntoIter<&'c mut [u64]>>,
    stop: AtomicBool,
    failure: Mutex<Option<Error>>,
    /// Threads beside the calling one that have not ended.
    helpers: Mutex<usize>,
    helper_left: Condvar,
}

impl<C: Column> Call<'_, C> {
    fn run(&self, threads: usize, interrupt: Interrupt<'_>) -> Result<(), Error> {
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
        if let Err(error) = Reader::new(self, interrupt).read_buckets() {
            self.fail(error);
        }
    }

    fn fail(&self, error: Error) {
        self.stop.store(true, Ordering::Relaxed);
        lock(&self.failure).get_or_insert(error);
    }

    /// Waits for the other threads, and goes on asking the caller.
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

/// Says that a helper is gone, however it ends.
struct Leaving<'c, 'r, C>(&'r Call<'c, C>);

impl<C> Drop for Leaving<'_, '_, C> {
    fn drop(&mut self) {
        *lock(&self.0.helpers) -= 1;
        self.0.helper_left.notify_one();
    }
}

/// Sorted keys of one shard, and the bytes of its file that cover them.
#[derive(Clone, Copy)]
struct Extent<'c> {
    shard: usize,
    keys: &'c [u64],
    start: u64,
    length: usize,
}

/// One thread of a call: its open file, its buffer, and the extents that it has announced to the
/// disk.
struct Reader<'r, 'i, 'c, C> {
    call: &'r Call<'c, C>,
    interrupt: Interrupt<'i>,
    extents: u32,
    file: Option<(usize, Rc<File>)>,
    /// Whether the file at hand can be read from the page cache alone.
    asks_cache: bool,
    buffer: Vec<u8>,
    announced: VecDeque<(Extent<'c>, Rc<File>)>,
    /// Files that the announced extents keep open.
    announced_files: usize,
}

impl<'r, 'i, 'c, C: Column> Reader<'r, 'i, 'c, C> {
    fn new(call: &'r Call<'c, C>, interrupt: Interrupt<'i>) -> Self {
        READERS.fetch_add(1, Ordering::Relaxed);
        Self {
            call,
            interrupt,
            extents: 0,
            file: None,
            asks_cache: true,
            buffer: Vec::new(),
            announced: VecDeque::new(),
            announced_files: 0,
        }
    }

    fn read_buckets(&mut self) -> Result<(), Error> {
        while let Some(bucket) = self.next_bucket() {
            bucket.sort_unstable();
            let mut keys: &'c [u64] = bucket;
            while !keys.is_empty() && self.go_on()? {
                keys = &keys[self.read_or_announce(keys)?..];
            }
        }
        while self.go_on()? && self.finish_announced()? {}
        Ok(())
    }

    fn next_bucket(&self) -> Option<&'c mut [u64]> {
        lock(&self.call.buckets).next()
    }

    /// Whether no other thread has failed; asks the caller now and then.
    fn go_on(&mut self) -> Result<bool, Error> {
        if self.extents.is_multiple_of(INTERRUPT_EVERY) {
            (self.interrupt)()?;
        }
        self.extents = self.extents.wrapping_add(1);
        Ok(!self.call.stop.load(Ordering::Relaxed))
    }

    /// Deals with the first extent of `keys` and gives its number of keys.
    fn read_or_announce(&mut self, keys: &'c [u64]) -> Result<usize, Error> {
        let extent = self.next_extent(keys, CACHED_GAP);
        let file = self.open(extent)?;
        if self.asks_cache {
            let buffer = match room(&mut self.buffer, extent.length) {
                Ok(buffer) => buffer,
                Err(source) => return Err(self.row_error(extent, 0, source)),
            };
            let cached = file::read_cached(&file, buffer, extent.start);
            if cached == Cached::Filled {
                self.write(extent);
                return Ok(extent.keys.len());
            }
            self.asks_cache = cached == Cached::Missing;
        }
        let extent = self.next_extent(keys, DISK_GAP);
        file::announce(&file, extent.length, extent.start);
        if self.announced.len() >= IN_FLIGHT {
            self.finish_announced()?;
        }
        self.announced_files += usize::from(self.last_announced() != Some(extent.shard));
        self.announced.push_back((extent, file));
        Ok(extent.keys.len())
    }

    fn last_announced(&self) -> Option<usize> {
        self.announced.back().map(|(extent, _)| extent.shard)
    }

    /// Waits for the extent that was announced first and writes it; false if there is none.
    fn finish_announced(&mut self) -> Result<bool, Error> {
        let Some((extent, file)) = self.announced.pop_front() else { return Ok(false) };
        let next = self.announced.front().map(|(extent, _)| extent.shard);
        self.announced_files -= usize::from(next != Some(extent.shard));
        room(&mut self.buffer, extent.length)
            .map_err(|source| (0, source))
            .and_then(|buffer| file::read_full(&file, buffer, extent.start))
            .map_err(|(done, source)| self.row_error(extent, done as u64, source))?;
        self.write(extent);
        Ok(true)
    }

    /// The file of `extent`, opened where it is not the one at hand.
    fn open(&mut self, extent: Extent<'c>) -> Result<Rc<File>, Error> {
        if let Some((shard, file)) = &self.file
            && *shard == extent.shard
        {
            return Ok(file.clone());
        }
        self.file = None;
        while self.announced_files >= self.files_allowed() {
            self.finish_announced()?;
        }
        let shard = self.shard(extent.shard);
        let opened = file::open(&shard.path).map_err(|source| self.row_error(extent, 0, source))?;
        if opened.id != shard.file {
            let source = io::Error::other("another file has taken its place");
            return Err(self.row_error(extent, 0, source));
        }
        let file = Rc::new(opened.file);
        self.file = Some((extent.shard, file.clone()));
        self.asks_cache = true;
        Ok(file)
    }

    /// Files that this thread may keep open.
    fn files_allowed(&self) -> usize {
        (self.call.pool.limits.files / READERS.load(Ordering::Relaxed).max(1)).max(1)
    }

    fn shard(&self, shard: usize) -> &'c Shard {
        &self.call.pool.shards()[shard]
    }

    /// Where in the file of `shard` the wanted bytes of the row of `key` lie.
    fn offset(&self, shard: &Shard, key: u64) -> u64 {
        let row = self.call.packing.step(key) - shard.first;
        let span = self.call.column.span(shard.layout);
        shard.data_offset + row * shard.layout.itemsize as u64 + span.start as u64
    }

    /// The longest prefix of `keys` that lies in one shard with no gap over `gap`.
    fn next_extent(&self, keys: &'c [u64], gap: u64) -> Extent<'c> {
        let step = self.call.packing.step(keys[0]);
        let index = match &self.file {
            Some((index, _)) if self.shard(*index).contains(step) => *index,
            _ => self.call.pool.shard_of(step),
        };
        let shard = self.shard(index);
        let length = self.call.column.span(shard.layout).len() as u64;
        let start = self.offset(shard, keys[0]);
        let mut end = start + length;
        let more = keys[1..].iter().take_while(|&&key| {
            let near = shard.contains(self.call.packing.step(key)) && {
                let offset = self.offset(shard, key);
                offset <= end + gap && offset + length - start <= MAX_EXTENT
            };
            if near {
                end = self.offset(shard, key) + length;
            }
            near
        });
        let keys = &keys[..1 + more.count()];
        Extent { shard: index, keys, start, length: (end - start) as usize }
    }

    /// The error of the first row of `extent` that is not within its first `done` bytes.
    fn row_error(&self, extent: Extent<'c>, done: u64, source: io::Error) -> Error {
        let shard = self.shard(extent.shard);
        let length = self.call.column.span(shard.layout).len() as u64;
        let missing = |&&key: &&u64| self.offset(shard, key) + length > extent.start + done;
        let key = extent.keys.iter().find(missing).unwrap_or(&extent.keys[0]);
        let source = match source.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::other("the file was cut short before it"),
            _ => source,
        };
        Error::Row { path: shard.path.clone(), step: self.call.packing.step(*key), source }
    }

    /// Writes the rows of `extent`, whose bytes are in the buffer, to their places.
    fn write(&self, extent: Extent<'c>) {
        let call = self.call;
        let shard = self.shard(extent.shard);
        let length = call.column.span(shard.layout).len();
        for &key in extent.keys {
            let at = (self.offset(shard, key) - extent.start) as usize;
            // SAFETY: every position is in one key alone, and every key in one extent.
            #[allow(unsafe_code)]
            let out = unsafe { call.out.place(call.packing.position(key)) };
            call.column.write(shard.layout, &self.buffer[at..at + length], out);
        }
    }
}

impl<C> Drop for Reader<'_, '_, '_, C> {
    fn drop(&mut self) {
        READERS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The first `length` bytes of `buffer`, which grows where it must: a row may claim to be
/// gigabytes.
fn room(buffer: &mut Vec<u8>, length: usize) -> io::Result<&mut [u8]> {
    if buffer.len() < length {
        buffer
            .try_reserve_exact(length - buffer.len())
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        buffer.resize(length, 0);
    }
    Ok(&mut buffer[..length])
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::boards::{Boards, CELLS};
    use crate::interrupt::Interrupted;
    use crate::testing::{PACKED, shard, write};

    /// Three shards of 46-byte rows, 100,000 in all, and their rows one after the other.
    fn pool(directory: &Path) -> (Pool, Vec<u8>) {
        let mut rows = Vec::new();
        for (name, count) in [("steps-0.npy", 30_000), ("steps-1.npy", 1), ("steps-2.npy", 69_999)]
        {
            let bytes = shard(PACKED, count);
            rows.extend(&bytes[bytes.len() - 46 * count..]);
            write(directory, name, &bytes);
        }
        (Pool::open(directory, &mut || Ok(())).expect("a pool"), rows)
    }

    fn random_indices(count: usize, below: u64) -> Vec<i64> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            ((state >> 20) % below) as i64
        };
        (0..count).map(|_| next()).collect()
    }

    fn read_rows(pool: &Pool, indices: &[i64], interrupt: Interrupt<'_>) -> Result<Vec<u8>, Error> {
        let mut out = vec![0; indices.len() * 46];
        read(pool, indices, &WholeRows { itemsize: 46 }, &mut out, interrupt)?;
        Ok(out)
    }

    #[test]
    fn rows_come_in_the_order_of_the_indices() {
        let directory = tempfile::tempdir().expect("a directory");
        let (pool, rows) = pool(directory.path());
        let dense = random_indices(200_000, 100_000);
        let sparse = random_indices(500, 100_000);
        let ends = vec![99_999, 0, 29_999, 30_000, 30_001, 0, 99_999];
        for indices in [dense, sparse, ends, vec![30_000; 5], vec![]] {
            let expected: Vec<u8> = indices
                .iter()
                .flat_map(|&index| &rows[index as usize * 46..][..46])
                .copied()
                .collect();
            assert!(read_rows(&pool, &indices, &mut || Ok(())).expect("rows") == expected);
            let mut boards = vec![0; indices.len() * CELLS];
            read(&pool, &indices, &Boards, &mut boards, &mut || Ok(())).expect("boards");
            let layout = pool.shards()[0].layout;
            let decoded =
                expected.chunks(46).flat_map(|row| layout.board.decode(&row[layout.board.span()]));
            assert!(boards.iter().copied().eq(decoded));
        }
    }

    #[test]
    fn indices_outside_the_pool() {
        let directory = tempfile::tempdir().expect("a directory");
        let (pool, _) = pool(directory.path());
        for (indices, expected) in [
            (vec![0, 5, -1, 100_000], "step index -1 at position 2"),
            (
                vec![0, 100_000],
                "step index 100000 at position 1 is outside the pool, which has 100000 rows",
            ),
        ] {
            let error =
                read_rows(&pool, &indices, &mut || Ok(())).expect_err("out of bounds").to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn a_shard_cut_short_during_the_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let (mut pool, _) = pool(directory.path());
        // Another thread might have read it all by then.
        pool.limits.cores = 1;
        let path = directory.path().join("steps-2.npy");
        let keep = pool.shards()[2].data_offset + 46 * 20_000;
        let truncate = || {
            let file = fs::OpenOptions::new().write(true).open(&path).expect("the shard");
            file.set_len(keep).expect("shorter");
        };
        let indices: Vec<_> = (0..100_000).collect();
        let mut questions = 0;
        let error = read_rows(&pool, &indices, &mut || {
            questions += 1;
            if questions == 1 {
                truncate();
            }
            Ok(())
        });
        let error = error.expect_err("a row is missing").to_string();
        assert!(error.contains("steps-2.npy: step 5"), "{error}");
        assert!(error.contains("cannot be read: the file was cut short before it"), "{error}");
        // Rows before the cut are still there.
        read_rows(&pool, &[50_000, 3], &mut || Ok(())).expect("rows");
        let error = read_rows(&pool, &[50_001, 3], &mut || Ok(())).expect_err("a row is missing");
        assert!(error.to_string().contains("step 50001 "), "{error}");
    }

    #[test]
    fn a_shard_deleted_during_the_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let (pool, _) = pool(directory.path());
        let mut questions = 0;
        let error = read_rows(&pool, &[1, 30_000, 7], &mut || {
            questions += 1;
            if questions == 1 {
                fs::remove_file(directory.path().join("steps-1.npy")).expect("removed");
            }
            Ok(())
        });
        let error = error.expect_err("a shard is missing").to_string();
        assert!(error.contains("steps-1.npy: step 30000 cannot be read: No such file"), "{error}");
    }

    #[test]
    fn an_interrupt_ends_the_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let (pool, _) = pool(directory.path());
        let indices: Vec<_> = (0..100_000).collect();
        let outcome = read_rows(&pool, &indices, &mut || Err(Interrupted));
        assert!(matches!(outcome, Err(Error::Interrupted(_))));
    }

    #[test]
    fn an_interrupt_is_heard_while_other_threads_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let (pool, _) = pool(directory.path());
        let call = Call {
            pool: &pool,
            column: &Boards,
            packing: Order::new(&[0], 0, 0).packing,
            out: Scatter::new(&mut [], CELLS),
            buckets: Mutex::new(Vec::new().into_iter()),
            stop: AtomicBool::new(false),
            failure: Mutex::new(None),
            helpers: Mutex::new(1),
            helper_left: Condvar::new(),
        };
        call.wait_for_helpers(&mut || Err(Interrupted));
        assert!(call.stop.load(Ordering::Relaxed));
        assert!(matches!(*lock(&call.failure), Some(Error::Interrupted(_))));
    }

    #[test]
    fn a_shard_replaced_by_another_file() {
        let directory = tempfile::tempdir().expect("a directory");
        let (pool, _) = pool(directory.path());
        write(directory.path(), "other", &shard(PACKED, 30_000));
        fs::rename(directory.path().join("other"), directory.path().join("steps-0.npy"))
            .expect("renamed");
        let error = read_rows(&pool, &[40_000, 7], &mut || Ok(())).expect_err("another file");
        let expected = "steps-0.npy: step 7 cannot be read: another file has taken its place";
        assert!(error.to_string().contains(expected), "{error}");
    }

    #[test]
    fn a_buffer_larger_than_memory_is_an_error() {
        let error = room(&mut Vec::new(), 1 << 62).expect_err("too large");
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
    }
}
