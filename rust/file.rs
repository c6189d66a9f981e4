//! The system calls on a shard: opening for scattered reads, and reads that do not wait for the
//! disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Which file it is, whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

pub struct Opened {
    pub file: File,
    pub id: FileId,
    /// Bytes.
    pub size: u64,
}

/// Opens a regular file and turns read-ahead off.
pub fn open(path: &Path) -> io::Result<Opened> {
    // Not blocking, or a named pipe called steps-0.npy would hang the caller.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    advise_random(&file);
    let id = FileId { device: metadata.dev(), inode: metadata.ino() };
    Ok(Opened { file, id, size: metadata.len() })
}

#[cfg(target_os = "linux")]
fn advise_random(file: &File) {
    advise(file, 0, 0, libc::POSIX_FADV_RANDOM);
}

/// Turns read-ahead on, for a file that is read from front to back.
///
/// What the kernel reads ahead by itself it keeps in large pages where it can, and what is
/// announced in small ones, which take longer to read, then and later.
#[cfg(target_os = "linux")]
pub fn advise_sequential(file: &File) {
    advise(file, 0, 0, libc::POSIX_FADV_SEQUENTIAL);
}

/// Starts reading `length` bytes into the page cache, without waiting for them.
#[cfg(target_os = "linux")]
pub fn announce(file: &File, length: usize, offset: u64) {
    advise(file, offset, length, libc::POSIX_FADV_WILLNEED);
}

#[cfg(target_os = "linux")]
fn advise(file: &File, offset: u64, length: usize, advice: libc::c_int) {
    let (offset, length) = (offset as libc::off_t, length as libc::off_t);
    // SAFETY: the descriptor is open for as long as `file` lives. A refusal costs speed alone.
    #[allow(unsafe_code)]
    unsafe {
        libc::posix_fadvise(file.as_raw_fd(), offset, length, advice);
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_random(_: &File) {}

#[cfg(not(target_os = "linux"))]
pub fn advise_sequential(_: &File) {}

#[cfg(not(target_os = "linux"))]
pub fn announce(_: &File, _: usize, _: u64) {}

/// What a read from the page cache alone came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cached {
    Filled,
    /// It would wait, fail or end early.
    Missing,
    /// The file system cannot say.
    Unknown,
}

/// Fills `buffer` from the page cache.
#[cfg(target_os = "linux")]
pub fn read_cached(file: &File, buffer: &mut [u8], offset: u64) -> Cached {
    let part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: `part` covers `buffer`, which outlives the call, and the descriptor is open.
    #[allow(unsafe_code)]
    let read = unsafe {
        libc::preadv2(file.as_raw_fd(), &part, 1, offset as libc::off_t, libc::RWF_NOWAIT)
    };
    match usize::try_from(read) {
        Ok(read) if read == buffer.len() => Cached::Filled,
        Err(_) if io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP) => {
            Cached::Unknown
        }
        _ => Cached::Missing,
    }
}

#[cfg(not(target_os = "linux"))]
pub fn read_cached(_: &File, _: &mut [u8], _: u64) -> Cached {
    Cached::Unknown
}

/// Fills `buffer`, or gives how many bytes were read before the error or the end of the file.
pub fn read_full(file: &File, buffer: &mut [u8], offset: u64) -> Result<(), (usize, io::Error)> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => return Err((done, io::Error::from(io::ErrorKind::UnexpectedEof))),
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err((done, error)),
        }
    }
    Ok(())
}

/// Descriptors that this process may have open.
pub fn descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a live rlimit for the call to fill.
    #[allow(unsafe_code)]
    let status = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    if status == 0 { limit.rlim_cur } else { 256 }
}
