//! One thread of a read.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::extents::{Extent, Extents};
use super::files::{self, Cached};
use super::{Column, Limits, ReadError, lock};
use crate::error::Interrupt;
use crate::memory::grown;

/// Bytes between two rows up to which reading them too costs less than another call.
const CACHED_GAP: u64 = 10 << 10;
/// The same where a read waits for the disk.
const DISK_GAP: u64 = 16 << 10;
/// Reads that a thread keeps in flight on a disk.
const IN_FLIGHT: usize = 256;
/// Extents between two questions to the caller whether to stop.
const INTERRUPT_EVERY: u32 = 16;

/// Threads of all calls in this process that are reading, which share its descriptors.
static READERS: AtomicUsize = AtomicUsize::new(0);

/// The state that the threads of a call share.
pub struct Work<'c, C> {
    pub extents: Extents<'c, C>,
    pub limits: Limits,
    /// Keys that no thread has taken.
    pub buckets: Mutex<std::vec::IntoIter<&'c mut [u64]>>,
    /// Tells all threads to end.
    pub stop: AtomicBool,
}

/// A thread's open file, its buffer, and the extents that it has announced to the disk.
pub struct Reader<'r, 'i, 'c, C> {
    work: &'r Work<'c, C>,
    interrupt: Interrupt<'i>,
    turns: u32,
    file: Option<(usize, Rc<File>)>,
    /// True while the open file may be read from the page cache alone.
    asks_cache: bool,
    buffer: Vec<u8>,
    announced: VecDeque<(Extent<'c>, Rc<File>)>,
    /// Files that the announced extents keep open.
    announced_files: usize,
}

impl<'r, 'i, 'c, C: Column> Reader<'r, 'i, 'c, C> {
    pub fn new(work: &'r Work<'c, C>, interrupt: Interrupt<'i>) -> Self {
        READERS.fetch_add(1, Ordering::Relaxed);
        Self {
            work,
            interrupt,
            turns: 0,
            file: None,
            asks_cache: work.limits.asks_cache,
            buffer: Vec::new(),
            announced: VecDeque::new(),
            announced_files: 0,
        }
    }

    /// Takes and reads buckets until none is left.
    pub fn read_buckets(&mut self) -> Result<(), ReadError> {
        while let Some(bucket) = self.take_bucket() {
            bucket.sort_unstable();
            let mut keys: &'c [u64] = bucket;
            while !keys.is_empty() && self.go_on()? {
                keys = &keys[self.read_or_announce(keys)?..];
            }
        }
        while self.go_on()? && self.finish_announced()? {}
        Ok(())
    }

    fn take_bucket(&self) -> Option<&'c mut [u64]> {
        lock(&self.work.buckets).next()
    }

    /// False once another thread has failed. Every few calls it asks the caller too.
    fn go_on(&mut self) -> Result<bool, ReadError> {
        if self.turns.is_multiple_of(INTERRUPT_EVERY) {
            (self.interrupt)()?;
        }
        self.turns = self.turns.wrapping_add(1);
        Ok(!self.work.stop.load(Ordering::Relaxed))
    }

    /// Reads or announces the first extent of `keys`, and returns its number of keys.
    fn read_or_announce(&mut self, keys: &'c [u64]) -> Result<usize, ReadError> {
        let extent = self.next_extent(keys, CACHED_GAP);
        let file = self.open(extent)?;
        if self.asks_cache {
            let buffer = grown(&mut self.buffer, extent.length)?;
            let cached = files::read_cached(&file, buffer, extent.start);
            if cached == Cached::Filled {
                self.write(extent);
                return Ok(extent.keys.len());
            }
            self.asks_cache = cached == Cached::Missing;
        }
        let extent = self.next_extent(keys, DISK_GAP);
        files::announce(&file, extent.length, extent.start);
        if self.announced.len() >= IN_FLIGHT {
            self.finish_announced()?;
        }
        let last = self.announced.back().map(|(extent, _)| extent.file);
        self.announced_files += usize::from(last != Some(extent.file));
        self.announced.push_back((extent, file));
        Ok(extent.keys.len())
    }

    fn next_extent(&self, keys: &'c [u64], gap: u64) -> Extent<'c> {
        self.work.extents.next(keys, gap, self.file.as_ref().map(|&(file, _)| file))
    }

    /// Waits for the extent that was announced first and writes it. False if none is left.
    fn finish_announced(&mut self) -> Result<bool, ReadError> {
        let Some((extent, file)) = self.announced.pop_front() else { return Ok(false) };
        let next = self.announced.front().map(|(extent, _)| extent.file);
        self.announced_files -= usize::from(next != Some(extent.file));
        let buffer = grown(&mut self.buffer, extent.length)?;
        files::read_full(&*file, buffer, extent.start)
            .map_err(|(done, source)| self.row_error(extent, done as u64, source))?;
        self.write(extent);
        Ok(true)
    }

    /// The file of `extent`, opened unless it is the open one.
    fn open(&mut self, extent: Extent<'c>) -> Result<Rc<File>, ReadError> {
        if let Some((number, file)) = &self.file
            && *number == extent.file
        {
            return Ok(file.clone());
        }
        self.file = None;
        while self.announced_files >= self.files_allowed() {
            self.finish_announced()?;
        }
        let row_file = &self.work.extents.files.files()[extent.file];
        let file = row_file.open().map_err(|source| self.row_error(extent, 0, source))?;
        let file = Rc::new(file);
        self.file = Some((extent.file, file.clone()));
        self.asks_cache = self.work.limits.asks_cache;
        Ok(file)
    }

    /// Files that this thread may keep open.
    fn files_allowed(&self) -> usize {
        (self.work.limits.files / READERS.load(Ordering::Relaxed).max(1)).max(1)
    }

    /// The error of the first row of `extent` that is not within its first `done` bytes.
    fn row_error(&self, extent: Extent<'c>, done: u64, source: io::Error) -> ReadError {
        ReadError::of_row(extent.file, self.work.extents.row_past(extent, done), source)
    }

    /// Writes the rows of `extent`, whose bytes are in the buffer, to their places.
    fn write(&self, extent: Extent<'c>) {
        // SAFETY: a bucket is taken once, and each of its keys is in one extent.
        #[allow(unsafe_code)]
        unsafe {
            self.work.extents.write(extent, &self.buffer);
        }
    }
}

impl<C> Drop for Reader<'_, '_, '_, C> {
    fn drop(&mut self) {
        READERS.fetch_sub(1, Ordering::Relaxed);
    }
}
