//! Finds and orders the shards of a pool; global step index -> shard and row.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::iter;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::descrs::Descrs;
use crate::error::Error;
use crate::file::{self, FileId};
use crate::header_error::HeaderError;
use crate::interrupt::{Interrupt, Interrupted};
use crate::layout::Layout;
use crate::npy::{Header, Preamble};

/// Threads that open shards: enough to hide the latency of a network file system.
const OPENERS: usize = 32;
/// The most threads of a read: more would only take cores from the forward pass.
const READERS: usize = 16;
/// Shards an opener takes at once, and the fewest that are worth a thread.
const OPEN_BATCH: usize = 32;
/// Bytes read at first: the preamble and any usual header.
const FIRST_READ: usize = 1024;

/// One `.npy` file of a pool.
#[derive(Debug, Clone)]
pub struct Shard {
    pub path: PathBuf,
    /// The file that was found at the path when the pool was opened.
    pub file: FileId,
    pub rows: u64,
    /// Global index of its first row.
    pub first: u64,
    /// Bytes before its first row.
    pub data_offset: u64,
    pub layout: Layout,
}

impl Shard {
    pub fn contains(&self, step: u64) -> bool {
        step >= self.first && step - self.first < self.rows
    }
}

/// What a call may take of the machine.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub cores: usize,
    /// Open files: a part of what the process may have.
    pub files: usize,
}

impl Limits {
    fn of_process() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from).min(READERS);
        let files = (file::descriptor_limit() / 4).clamp(1, 1024) as usize;
        Self { cores, files }
    }
}

/// The shards of a dataset directory in order; their headers are read, no file is kept open.
#[derive(Debug)]
pub struct Pool {
    path: PathBuf,
    shards: Vec<Shard>,
    rows: u64,
    descrs: Descrs,
    pub(crate) limits: Limits,
}

impl Pool {
    /// Opens the directory `path`: its `steps-*.npy` in lexicographic order, or else its
    /// `steps.npy`.
    pub fn open(path: &Path, interrupt: Interrupt<'_>) -> Result<Self, Error> {
        let limits = Limits::of_process();
        let paths = shard_paths(path)?;
        let (files, headers) = read_headers(&paths, limits.files.min(OPENERS), interrupt)?;
        let shards = place(paths, &files, &headers)?;
        let descrs = Descrs::new(headers.into_iter().map(|header| header.descr));
        check_boards(&shards)?;
        let rows = shards.last().map_or(0, |last| last.first + last.rows);
        Ok(Self { path: path.to_owned(), shards, rows, descrs, limits })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Rows in all shards.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Bytes of a row of the first shard.
    pub fn itemsize(&self) -> usize {
        self.shards[0].layout.itemsize
    }

    /// The dtype of a row of the first shard, as the Python literal in its header.
    pub fn descr(&self) -> &str {
        self.descrs.of(0)
    }

    /// The same of every shard.
    pub fn descrs(&self) -> &Descrs {
        &self.descrs
    }

    /// Refuses a pool whose shards agree in the board alone, since its whole rows have no one
    /// dtype.
    pub fn check_same_rows(&self) -> Result<(), Error> {
        let Some(odd) = self.descrs.odd() else { return Ok(()) };
        let (path, first) = (self.shards[odd].path.clone(), self.shards[0].path.clone());
        Err(Error::RowsDiffer { path, first })
    }

    /// The shard that holds row `step` of the pool, which has more rows than that.
    pub fn shard_of(&self, step: u64) -> usize {
        self.shards.partition_point(|shard| shard.first + shard.rows <= step)
    }
}

fn shard_paths(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let listing = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Error::NoDirectory { path: path.to_owned() },
        io::ErrorKind::NotADirectory => Error::NotADirectory { path: path.to_owned() },
        _ => Error::Open { path: path.to_owned(), source: error },
    };
    let mut names: Vec<OsString> = Vec::new();
    for entry in fs::read_dir(path).map_err(listing)? {
        let name = entry.map_err(listing)?.file_name();
        let bytes = name.as_encoded_bytes();
        if bytes.starts_with(b"steps-") && bytes.ends_with(b".npy") {
            names.push(name);
        }
    }
    if names.is_empty() {
        let single = path.join("steps.npy");
        return match single.symlink_metadata() {
            Ok(_) => Ok(vec![single]),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Error::NoShards { path: path.to_owned() })
            }
            Err(source) => Err(Error::Open { path: single, source }),
        };
    }
    names.sort_unstable();
    Ok(names.into_iter().map(|name| path.join(name)).collect())
}

/// Gives every shard the global index of its first row.
fn place(paths: Vec<PathBuf>, files: &[FileId], headers: &[Header]) -> Result<Vec<Shard>, Error> {
    let mut shards = Vec::with_capacity(paths.len());
    let mut first = 0u64;
    for ((path, &file), header) in paths.into_iter().zip(files).zip(headers) {
        let (rows, layout, data_offset) = (header.rows, header.layout, header.data_offset);
        let next = first.checked_add(rows).filter(|&next| next <= i64::MAX as u64);
        let Some(next) = next else { return Err(Error::TooManyRows { path }) };
        shards.push(Shard { path, file, rows, first, data_offset, layout });
        first = next;
    }
    Ok(shards)
}

/// Refuses shards that differ in the fields that hold the board.
fn check_boards(shards: &[Shard]) -> Result<(), Error> {
    let wanted = shards[0].layout.board.names();
    let Some(odd) = shards.iter().find(|shard| shard.layout.board.names() != wanted) else {
        return Ok(());
    };
    let found = odd.layout.board.names();
    let (path, first) = (odd.path.clone(), shards[0].path.clone());
    Err(Error::BoardsDiffer { path, first, found, wanted })
}

/// What the files of `paths` are, and their headers, in order; the error of the first shard that
/// has one.
fn read_headers(
    paths: &[PathBuf],
    openers: usize,
    interrupt: Interrupt<'_>,
) -> Result<(Vec<FileId>, Vec<Header>), Error> {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let open_batch = || {
        let start = next.fetch_add(OPEN_BATCH, Ordering::Relaxed);
        let rest = paths.get(start..).filter(|rest| !rest.is_empty())?;
        let batch = &rest[..rest.len().min(OPEN_BATCH)];
        Some((start, batch.iter().map(|path| read_header(path)).collect::<Vec<_>>()))
    };
    let open_batches = || {
        iter::from_fn(open_batch).take_while(|_| !stop.load(Ordering::Relaxed)).collect::<Vec<_>>()
    };
    let threads = paths.len().div_ceil(OPEN_BATCH).clamp(1, openers);
    let mut batches = thread::scope(|scope| {
        // Where no thread can be started, this one does it all.
        let others: Vec<_> = (1..threads)
            .map_while(|_| thread::Builder::new().spawn_scoped(scope, open_batches).ok())
            .collect();
        let mut batches = Vec::new();
        loop {
            interrupt().inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
            let Some(batch) = open_batch() else { break };
            batches.push(batch);
        }
        for other in others {
            batches.extend(other.join().expect("an opener does not panic"));
        }
        Ok::<_, Interrupted>(batches)
    })?;
    batches.sort_unstable_by_key(|&(start, _)| start);
    batches.into_iter().flat_map(|(_, headers)| headers).collect()
}

/// Reads and checks one shard's header, and that the file is as long as it says.
fn read_header(path: &Path) -> Result<(FileId, Header), Error> {
    let open_error = |source| Error::Open { path: path.to_owned(), source };
    let refuse = |problem| Error::Header { path: path.to_owned(), problem };
    let file::Opened { file, id, size } = file::open(path).map_err(open_error)?;
    let mut bytes = vec![0; size.min(FIRST_READ as u64) as usize];
    let read = |bytes: &mut [u8], offset| match file::read_full(&file, bytes, offset) {
        Ok(()) => Ok(()),
        Err((_, error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(refuse(HeaderError::Truncated))
        }
        Err((_, error)) => Err(open_error(error)),
    };
    read(&mut bytes, 0)?;
    let preamble = Preamble::parse(&bytes, size).map_err(refuse)?;
    let known = bytes.len();
    bytes.resize(preamble.data_offset().max(known), 0);
    read(&mut bytes[known..], known as u64)?;
    let text = &bytes[preamble.length..preamble.data_offset()];
    let header = Header::parse(preamble, text).map_err(refuse)?;
    if size < header.size() {
        let (rows, expected) = (header.rows, header.size());
        return Err(Error::Truncated { path: path.to_owned(), rows, expected, found: size });
    }
    Ok((id, header))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{PACKED, shard, write};

    fn open(path: &Path) -> Result<Pool, Error> {
        Pool::open(path, &mut || Ok(()))
    }

    fn names(pool: &Pool) -> Vec<String> {
        let names = pool.shards().iter().map(|shard| shard.path.file_name());
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
        let pool = open(directory.path()).expect("a pool");
        assert_eq!(names(&pool), ["steps-10.npy", "steps-2.npy"]);
        assert_eq!(pool.rows(), 5);
        let shards: Vec<_> = (0..5).map(|step| pool.shard_of(step)).collect();
        assert_eq!(shards, [0, 0, 1, 1, 1]);
    }

    #[test]
    fn steps_npy_alone_and_empty_shards() {
        let directory = tempfile::tempdir().expect("a directory");
        write(directory.path(), "steps.npy", &shard(PACKED, 4));
        assert_eq!(names(&open(directory.path()).expect("a pool")), ["steps.npy"]);
        for (name, rows) in [("steps-0.npy", 0), ("steps-1.npy", 1), ("steps-2.npy", 0)] {
            write(directory.path(), name, &shard(PACKED, rows));
        }
        let pool = open(directory.path()).expect("a pool");
        assert_eq!((pool.rows(), pool.shard_of(0)), (1, 1));
    }

    #[test]
    fn many_shards_keep_their_order() {
        let directory = tempfile::tempdir().expect("a directory");
        for index in 0..1000 {
            write(directory.path(), &format!("steps-{index:04}.npy"), &shard(PACKED, index % 3));
        }
        let pool = open(directory.path()).expect("a pool");
        let rows: Vec<_> = pool.shards().iter().map(|shard| shard.rows).collect();
        assert!(rows.into_iter().eq((0..1000).map(|index| index % 3)));
    }

    #[test]
    fn trailing_bytes_are_tolerated_and_missing_ones_are_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut bytes = shard(PACKED, 4);
        bytes.extend(b"more");
        write(directory.path(), "steps.npy", &bytes);
        assert_eq!(open(directory.path()).expect("a pool").rows(), 4);
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
        assert_eq!(open(directory.path()).expect("a pool").itemsize(), 808);
    }

    #[test]
    fn what_is_not_a_pool() {
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
        let pool = open(directory.path()).expect("a pool");
        assert_eq!(pool.descrs().of(1), "[('x', '|u1'), ('board', '<u8')]");
        let error = pool.check_same_rows().expect_err("rows that differ").to_string();
        assert!(error.contains("steps-1.npy: its rows have other fields"), "{error}");
    }

    #[test]
    fn opening_can_be_interrupted() {
        let directory = tempfile::tempdir().expect("a directory");
        for index in 0..3 * OPEN_BATCH {
            write(directory.path(), &format!("steps-{index:04}.npy"), &shard(PACKED, 1));
        }
        let outcome = Pool::open(directory.path(), &mut || Err(Interrupted));
        assert!(matches!(outcome, Err(Error::Interrupted(_))));
    }
}
