//! Files of rows of one size, counted through all of them, and the system calls that read them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::Error;

/// A file that holds rows of one size, one after the other.
#[derive(Debug)]
pub struct RowFile {
    pub path: PathBuf,
    pub id: FileId,
    pub rows: u64,
    /// Bytes before its first row.
    pub data_offset: u64,
    /// Bytes of a row, at least one.
    pub itemsize: usize,
}

impl RowFile {
    /// Opens the file that was found, and refuses another that has taken its path.
    pub fn open(&self) -> io::Result<File> {
        let opened = open(&self.path)?;
        if opened.id != self.id {
            return Err(io::Error::other("another file has taken its place"));
        }
        Ok(opened.file)
    }
}

/// Files in order.
#[derive(Debug, Default)]
pub struct RowFiles {
    files: Vec<RowFile>,
    /// The number of the row after the last one of each file.
    ends: Vec<u64>,
}

impl RowFiles {
    /// Adds a file after the others. Its bytes and all rows must be countable by i64.
    pub fn push(&mut self, file: RowFile) -> Result<(), Error> {
        let addressable = |end: &u64| *end <= i64::MAX as u64;
        let bytes = file.rows.checked_mul(file.itemsize as u64).filter(|_| file.itemsize > 0);
        let size = bytes.and_then(|bytes| bytes.checked_add(file.data_offset));
        let end = self.rows().checked_add(file.rows).filter(addressable);
        let (Some(_), Some(end)) = (size.filter(addressable), end) else {
            let problem = "more rows than a step index can count; split the dataset";
            return Err(Error::dataset(&file.path, problem));
        };
        self.files.push(file);
        self.ends.push(end);
        Ok(())
    }

    pub fn files(&self) -> &[RowFile] {
        &self.files
    }

    /// Rows in all files.
    pub fn rows(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The number of the first row of a file.
    pub fn first(&self, file: usize) -> u64 {
        self.ends[file] - self.files[file].rows
    }

    /// The file that holds `row`, which is below `rows`.
    pub fn holder(&self, row: u64) -> usize {
        self.ends.partition_point(|&end| end <= row)
    }
}

/// Tells a file from another that later has its name.
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
    advise(&file, 0, 0, libc::POSIX_FADV_RANDOM);
    let id = FileId { device: metadata.dev(), inode: metadata.ino() };
    Ok(Opened { file, id, size: metadata.len() })
}

/// Turns read-ahead on, for a file that is read from front to back.
///
/// The kernel keeps its own read-ahead in large pages where it can. It keeps announced bytes in small
/// pages, which take longer to read, then and later.
pub fn advise_sequential(file: &File) {
    advise(file, 0, 0, libc::POSIX_FADV_SEQUENTIAL);
}

/// Starts reading `length` bytes into the page cache, without waiting for them.
pub fn announce(file: &File, length: usize, offset: u64) {
    advise(file, offset, length, libc::POSIX_FADV_WILLNEED);
}

fn advise(file: &File, offset: u64, length: usize, advice: libc::c_int) {
    let (offset, length) = (offset as libc::off_t, length as libc::off_t);
    // SAFETY: the descriptor is open for as long as `file` lives. A refusal costs speed alone.
    #[allow(unsafe_code)]
    unsafe {
        libc::posix_fadvise(file.as_raw_fd(), offset, length, advice);
    }
}

/// The outcome of a read from the page cache alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cached {
    Filled,
    /// It would wait, fail or end early.
    Missing,
    /// The file system does not support such reads.
    Unknown,
}

/// Fills `buffer` from the page cache.
pub fn read_cached(file: &File, buffer: &mut [u8], offset: u64) -> Cached {
    let span = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: `span` covers `buffer`, which outlives the call, and the descriptor is open.
    #[allow(unsafe_code)]
    let read = unsafe {
        libc::preadv2(file.as_raw_fd(), &span, 1, offset as libc::off_t, libc::RWF_NOWAIT)
    };
    match usize::try_from(read) {
        Ok(read) if read == buffer.len() => Cached::Filled,
        Err(_) if io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP) => {
            Cached::Unknown
        }
        _ => Cached::Missing,
    }
}

/// Fills `buffer`, or returns the bytes that were read before the error or the end of the file.
pub fn read_full(
    file: &impl FileExt,
    buffer: &mut [u8],
    offset: u64,
) -> Result<(), (usize, io::Error)> {
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Five bytes, 0 to 4, of which every other call reads one and the others are interrupted.
    struct Halting(Cell<bool>);

    impl FileExt for Halting {
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            if self.0.replace(!self.0.get()) {
                return Err(io::Error::from_raw_os_error(libc::EINTR));
            }
            buffer[0] = offset as u8;
            Ok(usize::from(offset < 5))
        }

        fn write_at(&self, _: &[u8], _: u64) -> io::Result<usize> {
            unreachable!("only reads")
        }
    }

    #[test]
    fn an_interrupted_read_is_repeated_and_a_short_one_continued() {
        let file = Halting(Cell::new(true));
        let mut buffer = [9; 3];
        read_full(&file, &mut buffer, 1).expect("bytes");
        assert_eq!(buffer, [1, 2, 3]);
        let (done, error) = read_full(&file, &mut buffer, 3).expect_err("the end");
        assert_eq!((done, error.kind()), (2, io::ErrorKind::UnexpectedEof));
    }

    fn files(sizes: &[(u64, u64, usize)]) -> Result<RowFiles, Error> {
        let opened = open("Cargo.toml".as_ref()).expect("a file");
        let mut files = RowFiles::default();
        for &(rows, data_offset, itemsize) in sizes {
            let (path, id) = ("rows".into(), opened.id);
            files.push(RowFile { path, id, rows, data_offset, itemsize })?;
        }
        Ok(files)
    }

    #[test]
    fn rows_are_counted_through_the_files() {
        let files = files(&[(0, 0, 1), (3, 9, 2), (0, 0, 1), (2, 0, 5), (0, 0, 1)]).expect("files");
        assert_eq!(files.rows(), 5);
        assert!((0..5).map(|row| files.holder(row)).eq([1, 1, 1, 3, 3]));
        assert!((0..5).map(|file| files.first(file)).eq([0, 0, 3, 3, 5]));
    }

    #[test]
    fn rows_past_the_last_address_are_refused() {
        let most = i64::MAX as u64;
        files(&[(most, 0, 1)]).expect("files");
        files(&[(most - 1, 1, 1), (1, 0, 1)]).expect("files");
        for sizes in [
            &[(most, 0, 1), (1, 0, 1)][..],
            &[(most, 1, 1)],
            &[(most, 0, 2)],
            &[(u64::MAX, 0, usize::MAX)],
            &[(1, u64::MAX, 1)],
            &[(1, 0, 0)],
        ] {
            assert!(files(sizes).is_err(), "{sizes:?}");
        }
    }
}
