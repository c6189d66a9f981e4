//! Finds and orders the shards of a dataset, and reads their headers.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::iter;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::error::Error;
use crate::file::{self, FileId};
use crate::header_error::HeaderError;
use crate::interrupt::{Interrupt, Interrupted};
use crate::memory::room;
use crate::npy::{Header, Preamble};

/// Shards an opener takes at once, and the fewest that are worth a thread.
pub const OPEN_BATCH: usize = 32;
/// Bytes read at first: the preamble and any usual header.
const FIRST_READ: usize = 1024;

/// The shards of the directory `path`: its `steps-*.npy` in lexicographic order, or else its
/// `steps.npy`.
pub fn shard_paths(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let listing = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Error::NoDirectory { path: path.to_owned() },
        io::ErrorKind::NotADirectory => Error::NotADirectory { path: path.to_owned() },
        _ => Error::Open { path: path.to_owned(), source: error },
    };
    let mut names: Vec<OsString> = Vec::new();
    for entry in fs::read_dir(path).map_err(listing)? {
        let name = entry.map_err(listing)?.file_name();
        let bytes = name.as_encoded_bytes();
        if bytes.starts_with(b"steps-") && bytes.ends_with(b".npy") && !is_copy(&name) {
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

/// Tells copies that browsers, desktops and synchronisers make of a shard; `shards.py` warns.
fn is_copy(name: &OsStr) -> bool {
    let name = name.to_string_lossy().to_lowercase();
    [" (", " copy", ".sync-conflict-"].iter().any(|mark| name.contains(mark))
}

/// What the files of `paths` are, and their headers, in order; the error of the first shard that
/// has one.
pub fn read_headers(
    paths: &[PathBuf],
    openers: usize,
    interrupt: Interrupt<'_>,
) -> Result<Vec<(FileId, Header)>, Error> {
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
    let mut bytes = Vec::new();
    let first = size.min(FIRST_READ as u64) as usize;
    room(&mut bytes, first).map_err(|error| refuse(error.into()))?;
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
    room(&mut bytes, preamble.data_offset().max(known)).map_err(|error| refuse(error.into()))?;
    read(&mut bytes[known..], known as u64)?;
    let text = &bytes[preamble.length..preamble.data_offset()];
    let header = Header::parse(preamble, text).map_err(refuse)?;
    if size < header.size() {
        let (rows, expected) = (header.rows, header.size());
        return Err(Error::Truncated { path: path.to_owned(), rows, expected, found: size });
    }
    Ok((id, header))
}
