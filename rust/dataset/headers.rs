//! Opens the shards of a directory and cuts their `.npy` headers.
//!
//! `numpy.lib.format` documents the format. Its versions 1.0, 2.0 and 3.0 are read. The dtype of
//! the rows stays text: NumPy reads it, once per distinct text. A header is hostile, so its length
//! is checked against the file before memory is taken for it.

use std::collections::HashMap;
use std::ffi::OsString;
use std::iter;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::error::{Error, Interrupt, Interrupted};
use crate::rows::Limits;
use crate::rows::files::{self, FileId, Opened};

/// Threads that open shards: enough to hide the latency of a network file system.
const OPENERS: usize = 32;
/// Shards an opener takes at once, and the fewest that are worth a thread.
const OPEN_BATCH: usize = 32;
/// Bytes read at first: all of a usual header.
const FIRST_READ: u64 = 1024;
const MAGIC: &[u8] = b"\x93NUMPY";
/// Characters of a header. NumPy itself refuses more than 10,000 unless told otherwise.
const MAX_TEXT: usize = 1 << 16;
/// Brackets within brackets of a dtype.
const MAX_DEPTH: usize = 32;

const TRUNCATED: &str = "truncated in its .npy header; copy the shard again or remove it";
const MALFORMED: &str = "its header must be a dict of descr, fortran_order and shape; \
                         write the shard with numpy.save";

/// The shards of a directory in order, and the distinct dtypes of their rows.
#[derive(Debug)]
pub struct Shards {
    pub directory: PathBuf,
    pub files: Vec<Shard>,
    /// Each `descr` text once, and the path of the first shard that has it.
    pub layouts: Vec<(PathBuf, String)>,
}

#[derive(Debug)]
pub struct Shard {
    pub path: PathBuf,
    pub id: FileId,
    /// Bytes of the file.
    pub size: u64,
    /// Bytes before the first row.
    pub data_offset: u64,
    pub rows: u64,
    /// The place of its `descr` among the distinct texts.
    pub layout: usize,
}

impl Shards {
    /// Reads the headers of a directory's shards, given by name, and keeps no file open.
    pub fn read(
        directory: &Path,
        names: &[OsString],
        interrupt: Interrupt<'_>,
    ) -> Result<Self, Error> {
        let paths: Vec<_> = names.iter().map(|name| directory.join(name)).collect();
        let (mut places, mut layouts) = (HashMap::new(), Vec::new());
        let mut files = Vec::with_capacity(paths.len());
        for outcome in read_headers(&paths, interrupt)? {
            let (mut shard, descr) = outcome?;
            shard.layout = *places.entry(descr).or_insert_with_key(|descr| {
                layouts.push((shard.path.clone(), descr.clone()));
                layouts.len() - 1
            });
            files.push(shard);
        }
        Ok(Self { directory: directory.to_owned(), files, layouts })
    }
}

/// Each shard and its `descr`, or the error of it, in order.
fn read_headers(
    paths: &[PathBuf],
    interrupt: Interrupt<'_>,
) -> Result<impl Iterator<Item = Result<(Shard, String), Error>>, Interrupted> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let open_batch = || {
        let start = next.fetch_add(OPEN_BATCH, Ordering::Relaxed);
        let rest = paths.get(start..).filter(|rest| !rest.is_empty())?;
        let batch = rest.iter().take(OPEN_BATCH);
        Some((start, batch.map(|path| read_header(path)).collect::<Vec<_>>()))
    };
    let open_batches = || {
        iter::from_fn(open_batch).take_while(|_| !stop.load(Ordering::Relaxed)).collect::<Vec<_>>()
    };
    let openers = Limits::of_process().files.min(OPENERS);
    let threads = paths.len().div_ceil(OPEN_BATCH).clamp(1, openers);
    let mut batches = thread::scope(|scope| {
        // If no thread can be started, this one reads all headers.
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
        Ok(batches)
    })?;
    batches.sort_unstable_by_key(|&(start, _)| start);
    Ok(batches.into_iter().flat_map(|(_, shards)| shards))
}

fn read_header(path: &Path) -> Result<(Shard, String), Error> {
    let open_error = |error| Error::open(path, &error);
    let refuse = |problem: String| Error::dataset(path, problem);
    let Opened { file, id, size } = files::open(path).map_err(open_error)?;
    let mut start = vec![0; size.min(FIRST_READ) as usize];
    file.read_exact_at(&mut start, 0).map_err(open_error)?;
    let (_, text) = text_range(&start).map_err(refuse)?;
    if text.end as u64 > size {
        return Err(refuse(TRUNCATED.into()));
    }
    if text.end > start.len() {
        start.resize(text.end, 0);
        file.read_exact_at(&mut start, 0).map_err(open_error)?;
    }
    let Header { data_offset, rows, descr } = Header::parse(&start).map_err(refuse)?;
    let path = path.to_owned();
    Ok((Shard { path, id, size, data_offset, rows, layout: 0 }, descr))
}

/// A header, cut but for its dtype.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Bytes before the first row.
    pub data_offset: u64,
    pub rows: u64,
    /// The dtype of a row, a Python literal.
    pub descr: String,
}

impl Header {
    /// Parses the first bytes of a file. The problem it returns follows the file's name.
    pub fn parse(start: &[u8]) -> Result<Self, String> {
        let (version, range) = text_range(start)?;
        let bytes = start.get(range.clone()).ok_or(TRUNCATED)?;
        // Versions 1.0 and 2.0 are Latin-1, 3.0 is UTF-8.
        let text = match version {
            3 => str::from_utf8(bytes)
                .map_err(|_| "its header must be UTF-8; copy the shard again")?
                .to_owned(),
            _ => bytes.iter().map(|&byte| char::from(byte)).collect(),
        };
        let (descr, shape) = Scanner { rest: &text }.header().ok_or(MALFORMED)?;
        let (descr, rows) = (descr.to_owned(), rows_of(shape)?);
        Ok(Self { data_offset: range.end as u64, rows, descr })
    }
}

/// The major version of a `.npy` file, and the range of its header's text.
fn text_range(start: &[u8]) -> Result<(u8, Range<usize>), String> {
    let Some(rest) = start.strip_prefix(MAGIC) else {
        let short = MAGIC.starts_with(start);
        let magic = "not a .npy file (bad magic); write the shard with numpy.save";
        return Err(if short { TRUNCATED } else { magic }.into());
    };
    let (version, begin, length) = match *rest {
        [1, 0, a, b, ..] => (1, 10, usize::from(u16::from_le_bytes([a, b]))),
        [version @ (2 | 3), 0, a, b, c, d, ..] => {
            (version, 12, u32::from_le_bytes([a, b, c, d]) as usize)
        }
        [] | [_] | [1..=3, 0, ..] => return Err(TRUNCATED.into()),
        [major, minor, ..] => {
            return Err(format!(
                ".npy format version {major}.{minor} is not supported; write it as 1.0, 2.0 or 3.0"
            ));
        }
    };
    if length > MAX_TEXT {
        return Err(format!(
            "its header must have at most {MAX_TEXT} bytes; got {length}; copy the shard again"
        ));
    }
    Ok((version, begin..begin + length))
}

/// The rows of a one-dimensional shape: `(5,)`, or `(5L,)` as Python 2 wrote it.
fn rows_of(shape: &str) -> Result<u64, String> {
    let inside =
        shape.strip_prefix('(').and_then(|rest| rest.strip_suffix(')')).ok_or(MALFORMED)?;
    let lengths: Vec<&str> = inside.split(',').map(str::trim).collect();
    match lengths[..] {
        [rows, ""] => rows.strip_suffix('L').unwrap_or(rows).parse().map_err(|_| MALFORMED.into()),
        [one] if !one.is_empty() => Err(MALFORMED.into()),
        _ => Err(format!(
            "its array must have one dimension, one row per step; got {}",
            lengths.iter().filter(|length| !length.is_empty()).count()
        )),
    }
}

/// Cuts a dict of Python literals without evaluating them.
struct Scanner<'a> {
    rest: &'a str,
}

impl<'a> Scanner<'a> {
    /// The texts of `descr` and `shape`. An array of one dimension is the same in either order.
    fn header(mut self) -> Option<(&'a str, &'a str)> {
        let (mut descr, mut order, mut shape) = (None, None, None);
        self.take('{').then_some(())?;
        while !self.take('}') {
            let value = match self.key()? {
                "descr" => &mut descr,
                "fortran_order" => &mut order,
                "shape" => &mut shape,
                _ => return None,
            };
            if value.replace(self.value()?).is_some() {
                return None;
            }
            if !self.take(',') && !self.rest.starts_with('}') {
                return None;
            }
        }
        matches!(order, Some("True" | "False")).then_some(())?;
        self.rest.trim().is_empty().then_some((descr?, shape?))
    }

    /// Takes `character` after any white space, or leaves it.
    fn take(&mut self, character: char) -> bool {
        self.rest = self.rest.trim_start();
        let after = self.rest.strip_prefix(character);
        self.rest = after.unwrap_or(self.rest);
        after.is_some()
    }

    fn key(&mut self) -> Option<&'a str> {
        let quote = self.rest.chars().next().filter(|quote| matches!(quote, '\'' | '"'))?;
        let (key, rest) = self.rest[1..].split_once(quote)?;
        self.rest = rest;
        self.take(':').then_some(key)
    }

    /// The text up to the next comma or brace outside all brackets and strings.
    fn value(&mut self) -> Option<&'a str> {
        self.rest = self.rest.trim_start();
        let mut depth = 0;
        let mut characters = self.rest.char_indices();
        while let Some((at, character)) = characters.next() {
            match character {
                '\'' | '"' => loop {
                    match characters.next()?.1 {
                        '\\' => drop(characters.next()?),
                        end if end == character => break,
                        _ => {}
                    }
                },
                '(' | '[' if depth < MAX_DEPTH => depth += 1,
                ')' | ']' if depth > 0 => depth -= 1,
                ',' | '}' if depth == 0 => {
                    let (value, rest) = self.rest.split_at(at);
                    self.rest = rest;
                    return Some(value.trim_end());
                }
                ',' => {}
                // No sign and no operator: they would let literals nest without brackets.
                _ if character.is_ascii_alphanumeric() || character.is_ascii_whitespace() => {}
                _ => return None,
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing;

    fn file(version: u8, text: &[u8]) -> Vec<u8> {
        let length = (text.len() as u32).to_le_bytes();
        let length = if version == 1 { &length[..2] } else { &length[..] };
        [b"\x93NUMPY", &[version, 0][..], length, text].concat()
    }

    fn shaped(shape: &str) -> Vec<u8> {
        let text = format!("{{'descr': '<u8', 'fortran_order': False, 'shape': {shape}, }}\n");
        file(1, text.as_bytes())
    }

    #[test]
    fn descr_and_rows_are_cut_out() {
        let descr =
            r#"[(('a "title"', 'näme'), '<i4', (2, 3)), ("it's {\"}", [('x', '<u2')], (2,))]"#;
        for (order, shape) in [("False", "(7,)"), ("True", "( 7 , )"), ("False", "(7L,)")] {
            let text =
                format!("{{'shape':{shape},\"descr\": {descr}, 'fortran_order':{order}}}  \n");
            for version in [1, 2, 3] {
                let encoded = match version {
                    3 => text.as_bytes().to_vec(),
                    _ => text.chars().map(|c| u32::from(c) as u8).collect(),
                };
                let start = file(version, &encoded);
                let header = Header::parse(&start).expect("a valid header");
                assert_eq!((header.rows, &header.descr[..]), (7, descr));
                assert_eq!(header.data_offset, start.len() as u64);
            }
        }
    }

    #[test]
    fn refusals_say_why() {
        let text = |text: &str| file(1, text.as_bytes());
        let deep = format!("{{'descr': {}", "[".repeat(60_000));
        let twice = "{'descr': [], 'descr': [], 'fortran_order': False, 'shape': (5,)}";
        let fourth = "{'descr': [], 'fortran_order': False, 'shape': (5,), 'x': 1}";
        let summed = "{'descr': 1+1+1, 'fortran_order': False, 'shape': (5,)}";
        let order = "{'descr': [], 'fortran_order': 0, 'shape': (5,)}";
        for (start, expected) in [
            (b"PK\x03\x04".to_vec(), "not a .npy file"),
            (b"".to_vec(), TRUNCATED),
            (b"\x93NUM".to_vec(), TRUNCATED),
            (b"\x93NUMPY\x01".to_vec(), TRUNCATED),
            (b"\x93NUMPY\x02\x00\x10\x00\x00".to_vec(), TRUNCATED),
            (b"\x93NUMPY\x01\x00\xff\xff{}".to_vec(), TRUNCATED),
            (b"\x93NUMPY\x04\x00\x00\x00\x00\x00".to_vec(), "version 4.0 is not supported"),
            (b"\x93NUMPY\x01\x01\x00\x00\x00\x00".to_vec(), "version 1.1 is not supported"),
            (b"\x93NUMPY\x02\x00\xff\xff\xff\xff".to_vec(), "at most 65536 bytes; got 4294967295"),
            (file(3, b"\xff"), "must be UTF-8"),
            (text("{'descr'"), MALFORMED),
            (text("[]"), MALFORMED),
            (text("{}"), MALFORMED),
            (text("{'descr': ')"), MALFORMED),
            (text("{'descr': [}"), MALFORMED),
            (text(&deep), MALFORMED),
            (text(twice), MALFORMED),
            (text(fourth), MALFORMED),
            (text(summed), MALFORMED),
            (text(order), MALFORMED),
            (shaped("5"), MALFORMED),
            (shaped("(5)"), MALFORMED),
            (shaped("('5',)"), MALFORMED),
            (shaped("(18446744073709551616,)"), MALFORMED),
            (shaped("()"), "one dimension, one row per step; got 0"),
            (shaped("(5, 2)"), "one dimension, one row per step; got 2"),
        ] {
            let problem = Header::parse(&start).expect_err(expected);
            assert!(problem.contains(expected), "{problem:?} should say {expected:?}");
            assert!(!problem.contains('\n'), "{problem:?} is one line");
        }
    }

    #[test]
    fn opening_can_be_interrupted() {
        let directory = tempfile::tempdir().expect("a directory");
        let names: Vec<_> =
            (0..3 * OPEN_BATCH).map(|index| format!("steps-{index}.npy").into()).collect();
        for name in &names {
            fs::write(directory.path().join(name), []).expect("a writable directory");
        }
        let outcome = Shards::read(directory.path(), &names, &mut || Err(Interrupted));
        assert!(matches!(outcome, Err(Error::Interrupted(_))));
    }

    /// Valid headers, changed, cut and swapped at random, give an error or a header, no panic.
    #[test]
    fn mutated_headers_do_not_panic() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/header");
        let seeds: Vec<Vec<u8>> = fs::read_dir(corpus)
            .expect("a corpus")
            .map(|entry| fs::read(entry.expect("a file").path()).expect("a file"))
            .collect();
        let mut random = testing::random();
        let mut below = |count: usize| random(count as u64) as usize;
        let mut sound = 0;
        for round in 0..50_000 {
            let mut start = seeds[round % seeds.len()].clone();
            for _ in 0..=below(4) {
                let (at, other) = (below(start.len()), below(start.len()));
                match below(3) {
                    0 => start[at] = b"'()[],\\L9{\xff\n"[below(12)],
                    1 => start.truncate(at + 1),
                    _ => start.swap(at, other),
                }
            }
            sound += usize::from(Header::parse(&start).is_ok());
        }
        assert!(sound > 1000, "some mutations spare the header");
    }
}
