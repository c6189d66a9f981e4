//! Writes spans of an output file, or reads them back, and digests them in the same pass.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::checksum::{Digest, Digester, Element};
use crate::memory::grown;

/// Bytes digested at a time, so that a block is still in the cache when it is copied.
const BLOCK: usize = 256 << 10;

/// Bytes of one write past the page cache.
const DIRECT_BLOCK: usize = 4 << 20;

/// Direct writes start and end at multiples of a page, so that no page is written both ways.
const DIRECT_OFFSETS: u64 = 4096;

/// Alignment in memory that direct writes need, in bytes.
const DIRECT_ADDRESSES: usize = 512;

/// Direct writes shorter than this cost more than they save.
const MIN_DIRECT: usize = 256 << 10;

/// Writes `data` at `offset` and digests it.
///
/// `direct` is the same file opened with O_DIRECT, if `supports_direct` allows it. The ends of the
/// span that do not fill a page still go through the cache. A short write is continued and an
/// interrupted one repeated.
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
            // The file system, or the kind of memory, has a further condition. The cache has none.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EFAULT)) => {
                break 0;
            }
            other => break other?,
        }
    };
    // The rest may no longer be aligned.
    file.write_all_at(&block[written..], offset + written as u64)
}

/// Reads `len` bytes at `offset` and digests them. An earlier end of the file is an error.
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

/// Refuses, with an error number, a span past the largest offset of a file.
fn check_addressable(offset: u64, len: u64, errno: i32) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= i64::MAX as u64 => Ok(()),
        _ => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Reserves `size` bytes of disk for the file, and sets its size.
///
/// Returns false if the file system cannot reserve space: the file is sparse then.
#[allow(unsafe_code)]
pub fn reserve(file: &File, size: u64) -> io::Result<bool> {
    let len = libc::off_t::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    loop {
        // SAFETY: the descriptor is open as long as `file` lives, and no memory is passed.
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

/// True if the file, opened with O_DIRECT, takes the writes of `write_span`.
///
/// False on a file system that does not report its alignment: in memory, and most network ones.
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

    use tempfile::NamedTempFile;

    use super::*;

    /// A temporary file, opened once more with O_DIRECT if that is supported.
    fn scratch() -> io::Result<(NamedTempFile, Option<File>)> {
        let scratch = NamedTempFile::new()?;
        let mut direct = File::options();
        direct.write(true).custom_flags(libc::O_DIRECT);
        let direct = supports_direct(scratch.as_file()).then(|| direct.open(scratch.path()));
        Ok((scratch, direct.transpose()?))
    }

    fn pattern(len: usize, seed: u64) -> Vec<u8> {
        (0..len as u64).map(|i| (i.wrapping_mul(i + seed) >> 7) as u8).collect()
    }

    #[test]
    fn a_span_is_read_back_with_the_digest_it_was_written_with() -> io::Result<()> {
        let (scratch, _) = scratch()?;
        reserve(scratch.as_file(), 2_000_000)?;
        assert_eq!(scratch.as_file().metadata()?.len(), 2_000_000);
        let data = pattern(1_000_003, 1);
        let written = write_span(scratch.as_file(), None, 77, &data, Element::Integer)?;
        assert_eq!(written.crc32, crc32fast::hash(&data));
        let len = data.len() as u64;
        assert_eq!(digest_span(scratch.as_file(), 77, len, Element::Integer)?, written);
        assert!(digest_span(scratch.as_file(), 1_999_999, 2, Element::Integer).is_err());
        Ok(())
    }

    #[test]
    fn neighbouring_spans_keep_clear_of_each_other_on_either_way() -> io::Result<()> {
        let (scratch, direct) = scratch()?;
        // The spans begin on and off page boundaries in the file, and anywhere in memory.
        let lens = [300_000, 4096, 5_000_001, 262_144, 1, 8_388_608, 700_000];
        let content = pattern(lens.iter().sum(), 2);
        reserve(scratch.as_file(), content.len() as u64)?;
        let mut start = 0;
        for (i, len) in lens.into_iter().enumerate() {
            let direct = direct.as_ref().filter(|_| i % 3 != 1);
            let span = &content[start..start + len];
            let digest =
                write_span(scratch.as_file(), direct, start as u64, span, Element::Integer)?;
            assert_eq!(digest.crc32, crc32fast::hash(span), "span {i}");
            start += len;
        }
        assert!(std::fs::read(scratch.path())? == content);
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
            unreachable!("only writes")
        }

        fn write_at(&self, block: &[u8], offset: u64) -> io::Result<usize> {
            match self.taken.take() {
                Some(taken) => self.file.write_at(&block[..taken], offset),
                None => Err(io::Error::from_raw_os_error(self.errno)),
            }
        }
    }

    /// Writes three pages past a file that takes `taken` bytes and then refuses with `errno`.
    fn write_refused(taken: Option<usize>, errno: i32) -> io::Result<bool> {
        let data = pattern(3 * 4096, 3);
        let (scratch, _) = scratch()?;
        let direct = Refusing { errno, taken: Cell::new(taken), file: scratch.reopen()? };
        write_direct_block(scratch.as_file(), &direct, 4096, &data)?;
        Ok(std::fs::read(scratch.path())?[4096..] == data)
    }

    #[test]
    fn a_refused_or_short_direct_write_goes_through_the_cache() -> io::Result<()> {
        assert!(write_refused(None, libc::EINVAL)?);
        assert!(write_refused(None, libc::EFAULT)?);
        assert!(write_refused(Some(512), libc::EIO)?);
        let error = write_refused(None, libc::ENOSPC).expect_err("no space");
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        Ok(())
    }

    #[test]
    fn a_file_system_that_supports_direct_writes_takes_them() -> io::Result<()> {
        let (_scratch, Some(direct)) = scratch()? else { return Ok(()) };
        let memory = vec![0; 3 * 4096];
        let start = memory.as_ptr().addr().next_multiple_of(4096) - memory.as_ptr().addr() + 512;
        assert_eq!(direct.write_at(&memory[start..start + 4096], 4096)?, 4096);
        Ok(())
    }

    #[test]
    fn spans_that_no_file_can_hold_are_errors() -> io::Result<()> {
        let (scratch, _) = scratch()?;
        let past = i64::MAX as u64;
        for (offset, len) in
            [(past, 1), (past - 1, 2), (u64::MAX, 1), (u64::MAX, u64::MAX), (8, past)]
        {
            let error = digest_span(scratch.as_file(), offset, len, Element::Integer);
            assert_eq!(error.expect_err("refused").raw_os_error(), Some(libc::EOVERFLOW));
        }
        for offset in [past, past - 1, u64::MAX - 1, u64::MAX] {
            let error = write_span(scratch.as_file(), None, offset, &[1, 2], Element::Integer);
            assert_eq!(error.expect_err("refused").raw_os_error(), Some(libc::EFBIG));
        }
        assert_eq!(scratch.as_file().metadata()?.len(), 0);
        Ok(())
    }
}
