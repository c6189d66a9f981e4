//! Spans of an output file: written, or read back, and digested in the same pass.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::checksum::{Digest, Digester, Element};
use crate::memory::grown;

/// Digested at a time, so that a block is still in the cache when it is copied.
const BLOCK: usize = 256 << 10;

/// Written at a time past the page cache.
const DIRECT_BLOCK: usize = 4 << 20;

/// Where direct writes start and end, in the file: a page, so that no page is written both ways.
const DIRECT_OFFSETS: u64 = 4096;

/// What direct writes want of addresses in memory, in bytes.
const DIRECT_ADDRESSES: usize = 512;

/// Direct writes shorter than this cost more than they save.
const MIN_DIRECT: usize = 256 << 10;

/// Writes `data` at `offset` and digests it.
///
/// `direct` is the same file opened past the page cache, where `supports_direct` says that it can
/// be; the edges of the span that do not fill a page go through the cache all the same. A short
/// write is continued and an interrupted one repeated.
pub fn write_span(
    file: &File,
    direct: Option<&File>,
    offset: u64,
    data: &[u8],
    element: Element,
) -> io::Result<Digest> {
    check_addressable(offset, data.len() as u64, libc::EFBIG)?;
    let mut digester = Digester::new(element);
    let head_len = (offset.next_multiple_of(DIRECT_OFFSETS) - offset) as usize;
    let (head, rest) = data.split_at(head_len.min(data.len()));
    let tail_len = rest.len() % DIRECT_OFFSETS as usize;
    let (middle, tail) = rest.split_at(rest.len() - tail_len);
    match direct {
        Some(direct) if middle.len() >= MIN_DIRECT => {
            let middle_at = offset + head.len() as u64;
            write_cached(file, offset, head, &mut digester)?;
            write_direct(file, direct, middle_at, middle, &mut digester)?;
            write_cached(file, middle_at + middle.len() as u64, tail, &mut digester)?;
        }
        _ => write_cached(file, offset, data, &mut digester)?,
    }
    Ok(digester.finish())
}

fn write_cached(file: &File, offset: u64, data: &[u8], digester: &mut Digester) -> io::Result<()> {
    let mut position = offset;
    for block in data.chunks(BLOCK) {
        digester.update(block);
        file.write_all_at(block, position)?;
        position += block.len() as u64;
    }
    Ok(())
}

fn write_direct(
    file: &File,
    direct: &File,
    offset: u64,
    data: &[u8],
    digester: &mut Digester,
) -> io::Result<()> {
    thread_local! {
        static ALIGNED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    let mut position = offset;
    for block in data.chunks(DIRECT_BLOCK) {
        if block.as_ptr().addr().is_multiple_of(DIRECT_ADDRESSES) {
            digester.update(block);
            write_direct_block(file, direct, position, block)?;
        } else {
            ALIGNED.with_borrow_mut(|memory| {
                let aligned = aligned_copy(memory, block, digester)?;
                write_direct_block(file, direct, position, aligned)
            })?;
        }
        position += block.len() as u64;
    }
    Ok(())
}

/// Digests `data` and copies it to a page boundary in `memory`, in one pass.
fn aligned_copy<'a>(
    memory: &'a mut Vec<u8>,
    data: &[u8],
    digester: &mut Digester,
) -> io::Result<&'a [u8]> {
    let alignment = DIRECT_OFFSETS as usize;
    let memory = grown(memory, DIRECT_BLOCK + alignment)?;
    let start = memory.as_ptr().addr().next_multiple_of(alignment) - memory.as_ptr().addr();
    let aligned = &mut memory[start..start + data.len()];
    for (to, from) in aligned.chunks_mut(BLOCK).zip(data.chunks(BLOCK)) {
        digester.update(from);
        to.copy_from_slice(from);
    }
    Ok(aligned)
}

fn write_direct_block(
    file: &File,
    direct: &impl FileExt,
    offset: u64,
    block: &[u8],
) -> io::Result<()> {
    let written = loop {
        match direct.write_at(block, offset) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The file system, or the kind of memory, has some further condition; the page
            // cache has none.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EFAULT)) => {
                break 0;
            }
            other => break other?,
        }
    };
    // What is left may no longer be aligned.
    file.write_all_at(&block[written..], offset + written as u64)
}

/// Reads `len` bytes at `offset` and digests them; an end of file before that is an error.
pub fn digest_span(file: &File, offset: u64, len: u64, element: Element) -> io::Result<Digest> {
    check_addressable(offset, len, libc::EOVERFLOW)?;
    let mut digester = Digester::new(element);
    let mut block = vec![0; BLOCK];
    let mut position = offset;
    let end = offset + len;
    while position < end {
        let want = (BLOCK as u64).min(end - position) as usize;
        file.read_exact_at(&mut block[..want], position)?;
        digester.update(&block[..want]);
        position += want as u64;
    }
    Ok(digester.finish())
}

/// Refuses, with an error number, a span that ends where no file does.
fn check_addressable(offset: u64, len: u64, errno: i32) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= i64::MAX as u64 => Ok(()),
        _ => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Takes `size` bytes of disk for the file, and sets its size; says whether it could.
///
/// A file system that cannot reserve space gets a sparse file of that size instead.
#[allow(unsafe_code)]
pub fn reserve(file: &File, size: u64) -> io::Result<bool> {
    let len = libc::off_t::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    loop {
        // SAFETY: the descriptor is open as long as `file` is borrowed; no memory is passed.
        if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => {
                file.set_len(size)?;
                return Ok(false);
            }
            _ => return Err(error),
        }
    }
}

/// Whether the file, opened past the page cache, takes writes as `write_span` makes them.
///
/// A file system that does not say (memory-backed ones, most network ones) is taken not to.
#[allow(unsafe_code)]
pub fn supports_direct(file: &File) -> bool {
    // SAFETY: `statx` is plain integers, for which all zeros is a value.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let mask = libc::STATX_DIOALIGN;
    // SAFETY: the path is empty and ends in NUL, `stat` outlives the call.
    let status = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, mask, &raw mut stat)
    };
    status == 0
        && stat.stx_mask & mask != 0
        && (1..=DIRECT_ADDRESSES as u32).contains(&stat.stx_dio_mem_align)
        && (1..=DIRECT_OFFSETS as u32).contains(&stat.stx_dio_offset_align)
        && u64::from(stat.stx_blksize) <= DIRECT_OFFSETS
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::{Path, PathBuf};

    use super::*;

    /// A file that is gone with the test, and the same file past the page cache if that can be.
    struct Scratch {
        path: PathBuf,
        file: File,
        direct: Option<File>,
    }

    impl Scratch {
        fn new(name: &str) -> io::Result<Self> {
            let path = std::env::temp_dir().join(format!("spans-{}-{name}", std::process::id()));
            let file = File::options().read(true).write(true).create_new(true).open(&path)?;
            let direct = supports_direct(&file)
                .then(|| File::options().write(true).custom_flags(libc::O_DIRECT).open(&path))
                .transpose()?;
            Ok(Self { path, file, direct })
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    fn pattern(len: usize, seed: u64) -> Vec<u8> {
        (0..len as u64).map(|i| (i.wrapping_mul(i + seed) >> 7) as u8).collect()
    }

    #[test]
    fn a_span_is_read_back_with_the_digest_it_was_written_with() -> io::Result<()> {
        let scratch = Scratch::new("digest")?;
        reserve(&scratch.file, 2_000_000)?;
        assert_eq!(scratch.file.metadata()?.len(), 2_000_000);
        let data = pattern(1_000_003, 1);
        let written = write_span(&scratch.file, None, 77, &data, Element::Integer)?;
        assert_eq!(written.crc32, crc32fast::hash(&data));
        let len = data.len() as u64;
        assert_eq!(digest_span(&scratch.file, 77, len, Element::Integer)?, written);
        assert!(digest_span(&scratch.file, 1_999_999, 2, Element::Integer).is_err());
        Ok(())
    }

    #[test]
    fn neighbouring_spans_keep_clear_of_each_other_on_either_way() -> io::Result<()> {
        let scratch = Scratch::new("neighbours")?;
        // On and off page boundaries in the file; the spans also begin anywhere in memory.
        let lens = [300_000, 4096, 5_000_001, 262_144, 1, 8_388_608, 700_000];
        let content = pattern(lens.iter().sum(), 2);
        reserve(&scratch.file, content.len() as u64)?;
        let mut start = 0;
        for (i, len) in lens.into_iter().enumerate() {
            let direct = scratch.direct.as_ref().filter(|_| i % 3 != 1);
            let span = &content[start..start + len];
            let digest = write_span(&scratch.file, direct, start as u64, span, Element::Integer)?;
            assert_eq!(digest.crc32, crc32fast::hash(span), "span {i}");
            start += len;
        }
        assert!(std::fs::read(&scratch.path)? == content);
        Ok(())
    }

    /// A file that takes `limit` bytes of a write and then answers with an error number.
    struct Refusing {
        errno: i32,
        taken: Cell<Option<usize>>,
        file: File,
    }

    impl FileExt for Refusing {
        fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
            unreachable!("it is written to")
        }

        fn write_at(&self, block: &[u8], offset: u64) -> io::Result<usize> {
            match self.taken.take() {
                Some(taken) => self.file.write_at(&block[..taken], offset),
                None => Err(io::Error::from_raw_os_error(self.errno)),
            }
        }
    }

    #[test]
    fn a_direct_write_that_is_refused_goes_through_the_cache() -> io::Result<()> {
        let data = pattern(3 * 4096, 3);
        for errno in [libc::EINVAL, libc::EFAULT] {
            let scratch = Scratch::new(&format!("refused-{errno}"))?;
            let file = scratch.file.try_clone()?;
            let direct = Refusing { errno, taken: Cell::new(None), file };
            write_direct_block(&scratch.file, &direct, 4096, &data)?;
            assert!(std::fs::read(&scratch.path)?[4096..] == data);
        }
        Ok(())
    }

    #[test]
    fn a_direct_write_that_is_short_ends_in_the_cache() -> io::Result<()> {
        let data = pattern(3 * 4096, 4);
        let scratch = Scratch::new("short")?;
        let file = scratch.file.try_clone()?;
        let direct = Refusing { errno: libc::EIO, taken: Cell::new(Some(512)), file };
        write_direct_block(&scratch.file, &direct, 0, &data)?;
        assert!(std::fs::read(&scratch.path)? == data);
        Ok(())
    }

    #[test]
    fn any_other_refusal_of_a_direct_write_is_an_error() -> io::Result<()> {
        let scratch = Scratch::new("failed")?;
        let file = scratch.file.try_clone()?;
        let direct = Refusing { errno: libc::ENOSPC, taken: Cell::new(None), file };
        let error = write_direct_block(&scratch.file, &direct, 0, &[0; 4096]);
        assert_eq!(error.expect_err("refused").raw_os_error(), Some(libc::ENOSPC));
        Ok(())
    }

    /// Whether a page can be written past the page cache, by trying it.
    fn takes_direct_writes(path: &Path) -> bool {
        let Ok(direct) = File::options().write(true).custom_flags(libc::O_DIRECT).open(path) else {
            return false;
        };
        let memory = vec![0; 3 * 4096];
        let start = memory.as_ptr().addr().next_multiple_of(4096) - memory.as_ptr().addr() + 512;
        direct.write_at(&memory[start..start + 4096], 4096).is_ok()
    }

    #[test]
    fn a_file_system_that_takes_direct_writes_and_says_so_gets_them() -> io::Result<()> {
        let scratch = Scratch::new("direct")?;
        let takes = takes_direct_writes(&scratch.path);
        // What a file system does not take is never tried; ext4 says what it takes from Linux 6.1.
        if !takes || !is_ext4(&scratch.file)? || !kernel_is_at_least(6, 1) {
            assert!(takes || !supports_direct(&scratch.file));
            eprintln!("not on ext4 of Linux 6.1 or later: nothing to see here");
            return Ok(());
        }
        assert!(supports_direct(&scratch.file));
        Ok(())
    }

    #[allow(unsafe_code)]
    fn is_ext4(file: &File) -> io::Result<bool> {
        // SAFETY: `statfs` is plain integers, for which all zeros is a value.
        let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open, and `stat` outlives the call.
        if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(stat.f_type == libc::EXT4_SUPER_MAGIC)
    }

    fn kernel_is_at_least(major: u32, minor: u32) -> bool {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        let mut next = || numbers.next().and_then(Result::ok).unwrap_or(0);
        (next(), next()) >= (major, minor)
    }

    #[test]
    fn spans_that_no_file_can_hold_are_errors() -> io::Result<()> {
        let scratch = Scratch::new("absurd")?;
        let past = i64::MAX as u64;
        for (offset, len) in
            [(past, 1), (past - 1, 2), (u64::MAX, 1), (u64::MAX, u64::MAX), (8, past)]
        {
            let error = digest_span(&scratch.file, offset, len, Element::Integer);
            assert_eq!(error.expect_err("refused").raw_os_error(), Some(libc::EOVERFLOW));
        }
        for offset in [past, past - 1, u64::MAX - 1, u64::MAX] {
            let error = write_span(&scratch.file, None, offset, &[1, 2], Element::Integer);
            assert_eq!(error.expect_err("refused").raw_os_error(), Some(libc::EFBIG));
        }
        assert_eq!(scratch.file.metadata()?.len(), 0);
        Ok(())
    }
}
