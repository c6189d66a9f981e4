//! Reads chosen rows by position, in parallel, into the caller's buffer in the caller's order.
//!
//! Rows are taken in the order of the files; neighbours that lie near enough are read in one run. A run that the page
//! cache holds is read at once. One that it does not hold is announced to the kernel and read later, in turn,
//! so that each thread keeps many reads in flight. No file is mapped: a shard that shrinks is an error, never
//! a signal.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::error::Error;
use crate::file::{self, Cached};
use crate::npy::Layout;
use crate::order::{self, Order, Packing};
use crate::sampling::Interrupt;
use crate::scatter::Scatter;
use crate::shards::{Pool, Shard};

/// Bytes between two rows up to which reading them too costs less than another call.
const CACHED_GAP: u64 = 6 << 10;
/// The same where a read waits for the disk.
const DISK_GAP: u64 = 16 << 10;
/// Bytes of a run, unless one row is larger; a part of the second-level cache.
const MAX_RUN: u64 = 256 << 10;
/// Rows from which another thread pays off.
const THREAD_ROWS: usize = 512;
/// Reads that a thread keeps in flight on a disk.
const IN_FLIGHT: usize = 256;
/// Runs between two questions to the caller whether to go on.
const INTERRUPT_EVERY: u32 = 16;

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
    let Some((lowest, highest)) = bounds(pool, indices)? else { return Ok(()) };
    let capacity = order::capacity(lowest, highest);
    let limits = pool.limits;
    let threads = (indices.len() / THREAD_ROWS).clamp(1, limits.cores);
    let parts = indices.chunks(capacity).zip(out.chunks_mut(capacity * column.width()));
    for (indices, out) in parts {
        let mut order = Order::new(indices, lowest, highest);
        let packing = order.packing;
        let buckets = order.buckets();
        let call = Call {
            pool,
            column,
            packing,
            out: Scatter::new(out, column.width()),
            buckets: Mutex::new(buckets.into_iter()),
            files: (limits.files / threads).max(1),
            stop: AtomicBool::new(false),
            failure: Mutex::new(None),
        };
        call.run(threads, interrupt)?;
    }
    Ok(())
}

/// The smallest and the largest index, or nothing where there are none.
fn bounds(pool: &Pool, indices: &[i64]) -> Result<Option<(u64, u64)>, Error> {
    let rows = pool.rows();
    let fits = |index: i64| u64::try_from(index).is_ok_and(|index| index < rows);
    let (lowest, highest) = indices
        .iter()
        .fold((i64::MAX, i64::MIN), |(lowest, highest), &i| (lowest.min(i), highest.max(i)));
    if indices.is_empty() {
        return Ok(None);
    }
    if fits(lowest) && fits(highest) {
        return Ok(Some((lowest as u64, highest as u64)));
    }
    let position = indices.iter().position(|&index| !fits(index));
    let position = position.expect("the lowest or the highest does not fit");
    Err(Error::StepIndex { position, index: indices[position], rows })
}

/// One call's work, shared by its threads.
struct Call<'c, C> {
    pool: &'c Pool,
    column: &'c C,
    packing: Packing,
    out: Scatter<'c>,
    buckets: Mutex<std::vec::IntoIter<&'c mut [u64]>>,
    /// Files that one thread may have open.
    files: usize,
    stop: AtomicBool,
    failure: Mutex<Option<Error>>,
}

impl<C: Column> Call<'_, C> {
    fn run(&self, threads: usize, interrupt: Interrupt<'_>) -> Result<(), Error> {
        thread::scope(|scope| {
            for _ in 1..threads {
                // Without another thread, this one does it all.
                let _ = thread::Builder::new().spawn_scoped(scope, || self.work(&mut || Ok(())));
            }
            self.work(interrupt);
        });
        lock(&self.failure).take().map_or(Ok(()), Err)
    }

    fn work(&self, interrupt: Interrupt<'_>) {
        if let Err(error) = Reader::new(self, interrupt).read_buckets() {
            self.stop.store(true, Ordering::Relaxed);
            lock(&self.failure).get_or_insert(error);
        }
    }
}

/// Sorted keys of one shard, and the bytes of its file that cover them.
#[derive(Clone, Copy)]
struct Run<'c> {
    shard: usize,
    keys: &'c [u64],
    start: u64,
    length: usize,
}

/// One thread of a call: its open file, its buffer, and the runs that it has announced to the disk.
struct Reader<'r, 'i, 'c, C> {
    call: &'r Call<'c, C>,
    interrupt: Interrupt<'i>,
    runs: u32,
    file: Option<(usize, Rc<File>)>,
    /// Whether the file at hand can be read from the page cache alone.
    asks_cache: bool,
    buffer: Vec<u8>,
    announced: VecDeque<(Run<'c>, Rc<File>)>,
    /// Files that the announced runs keep open.
    announced_files: usize,
}

impl<'r, 'i, 'c, C: Column> Reader<'r, 'i, 'c, C> {
    fn new(call: &'r Call<'c, C>, interrupt: Interrupt<'i>) -> Self {
        Self {
            call,
            interrupt,
            runs: 0,
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
        if self.runs.is_multiple_of(INTERRUPT_EVERY) {
            (self.interrupt)()?;
        }
        self.runs = self.runs.wrapping_add(1);
        Ok(!self.call.stop.load(Ordering::Relaxed))
    }

    /// Deals with the first run of `keys` and gives its number of keys.
    fn read_or_announce(&mut self, keys: &'c [u64]) -> Result<usize, Error> {
        let run = self.next_run(keys, CACHED_GAP);
        let file = self.open(run)?;
        if self.asks_cache {
            let buffer = room(&mut self.buffer, run.length);
            let cached = file::read_cached(&file, buffer, run.start);
            if cached == Cached::Filled {
                self.write(run);
                return Ok(run.keys.len());
            }
            self.asks_cache = cached == Cached::Missing;
        }
        let run = self.next_run(keys, DISK_GAP);
        file::announce(&file, run.length, run.start);
        if self.announced.len() >= IN_FLIGHT {
            self.finish_announced()?;
        }
        self.announced_files += usize::from(self.last_announced() != Some(run.shard));
        self.announced.push_back((run, file));
        Ok(run.keys.len())
    }

    fn last_announced(&self) -> Option<usize> {
        self.announced.back().map(|(run, _)| run.shard)
    }

    /// Waits for the run that was announced first and writes it; false if there is none.
    fn finish_announced(&mut self) -> Result<bool, Error> {
        let Some((run, file)) = self.announced.pop_front() else { return Ok(false) };
        let next = self.announced.front().map(|(run, _)| run.shard);
        self.announced_files -= usize::from(next != Some(run.shard));
        let buffer = room(&mut self.buffer, run.length);
        file::read_full(&file, buffer, run.start)
            .map_err(|(done, source)| self.row_error(run, done as u64, source))?;
        self.write(run);
        Ok(true)
    }

    /// The file of `run`, opened where it is not the one at hand.
    fn open(&mut self, run: Run<'c>) -> Result<Rc<File>, Error> {
        if let Some((shard, file)) = &self.file
            && *shard == run.shard
        {
            return Ok(file.clone());
        }
        self.file = None;
        while self.announced_files >= self.call.files {
            self.finish_announced()?;
        }
        let (file, _) = file::open(&self.shard(run.shard).path)
            .map_err(|source| self.row_error(run, 0, source))?;
        let file = Rc::new(file);
        self.file = Some((run.shard, file.clone()));
        self.asks_cache = true;
        Ok(file)
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
    fn next_run(&self, keys: &'c [u64], gap: u64) -> Run<'c> {
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
                offset <= end + gap && offset + length - start <= MAX_RUN
            };
            if near {
                end = self.offset(shard, key) + length;
            }
            near
        });
        let keys = &keys[..1 + more.count()];
        Run { shard: index, keys, start, length: (end - start) as usize }
    }

    /// The error of the first row of `run` that is not within its first `done` bytes.
    fn row_error(&self, run: Run<'c>, done: u64, source: io::Error) -> Error {
        let shard = self.shard(run.shard);
        let length = self.call.column.span(shard.layout).len() as u64;
        let missing = |&&key: &&u64| self.offset(shard, key) + length > run.start + done;
        let key = run.keys.iter().find(missing).unwrap_or(&run.keys[0]);
        let source = match source.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::other("the file was cut short before it"),
            _ => source,
        };
        Error::Row { path: shard.path.clone(), step: self.call.packing.step(*key), source }
    }

    /// Writes the rows of `run`, whose bytes are in the buffer, to their places.
    fn write(&self, run: Run<'c>) {
        let call = self.call;
        let shard = self.shard(run.shard);
        let length = call.column.span(shard.layout).len();
        for &key in run.keys {
            let at = (self.offset(shard, key) - run.start) as usize;
            // SAFETY: every position is in one key alone, and every key in one run.
            #[allow(unsafe_code)]
            let out = unsafe { call.out.place(call.packing.position(key)) };
            call.column.write(shard.layout, &self.buffer[at..at + length], out);
        }
    }
}

/// The first `length` bytes of `buffer`, which grows where it must.
fn room(buffer: &mut Vec<u8>, length: usize) -> &mut [u8] {
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    &mut buffer[..length]
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
        (Pool::open(directory).expect("a pool"), rows)
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
        let outcome = read_rows(&pool, &indices, &mut || Err(Error::Interrupted));
        assert!(matches!(outcome, Err(Error::Interrupted)));
    }
}
