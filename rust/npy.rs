//! `.npy` header -> where its rows start, how many there are, and what lies in one.
//!
//! The format is the one that `numpy.lib.format` documents, versions 1.0, 2.0 and 3.0. A header is
//! hostile: every length is checked against the file before anything is allocated for it.

use crate::dtype::Fields;
use crate::header_error::HeaderError;
use crate::layout::Layout;
use crate::literal::{self, Entry, Literal};
use crate::memory;

const MAGIC: &[u8] = b"\x93NUMPY";
/// Far above what any row needs; NumPy itself refuses headers over 10,000 characters unless told
/// otherwise.
const MAX_TEXT: u64 = 1 << 20;

/// What a shard's header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Bytes before the first row.
    pub data_offset: u64,
    pub rows: u64,
    /// The source text of the `descr` entry, a Python literal.
    pub descr: String,
    pub layout: Layout,
}

/// The bytes in front of a header's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// Bytes of magic, version and length.
    pub length: usize,
    /// Bytes of header text.
    pub text: usize,
    version: u8,
}

impl Preamble {
    /// As many bytes as the longest preamble takes.
    pub const MAX: usize = 12;

    /// Reads the first bytes of a file of `size` bytes.
    pub fn parse(start: &[u8], size: u64) -> Result<Self, HeaderError> {
        let Some(rest) = start.strip_prefix(MAGIC) else {
            let short = start.len() < MAGIC.len() && MAGIC.starts_with(start);
            return Err(if short { HeaderError::Truncated } else { HeaderError::Magic });
        };
        let &[version, minor, ref rest @ ..] = rest else { return Err(HeaderError::Truncated) };
        let (length, text) = match (version, minor, rest) {
            (1, 0, &[a, b, ..]) => (10, u64::from(u16::from_le_bytes([a, b]))),
            (2 | 3, 0, &[a, b, c, d, ..]) => (12, u64::from(u32::from_le_bytes([a, b, c, d]))),
            (1..=3, 0, _) => return Err(HeaderError::Truncated),
            _ => return Err(HeaderError::Version(version, minor)),
        };
        if text > MAX_TEXT {
            return Err(HeaderError::TooLong { length: text, allowed: MAX_TEXT });
        }
        if length as u64 + text > size {
            return Err(HeaderError::Truncated);
        }
        Ok(Self { length, text: text as usize, version })
    }

    /// Bytes before the first row.
    pub fn data_offset(self) -> usize {
        self.length + self.text
    }
}

impl Header {
    /// Parses the text that `preamble` announced.
    pub fn parse(preamble: Preamble, text: &[u8]) -> Result<Self, HeaderError> {
        let text = decode_text(preamble.version, text)?;
        let Literal::Dict(entries) = literal::parse(&text)? else {
            return Err(HeaderError::Keys);
        };
        if entries.len() != 3 {
            return Err(HeaderError::Keys);
        }
        let descr = entry(&entries, "descr")?;
        let fields = match &descr.value {
            Literal::List(fields) => fields,
            Literal::Str(code) if code.contains('O') => {
                return Err(HeaderError::Pickled("its array".into()));
            }
            _ => return Err(HeaderError::NotStructured),
        };
        match entry(&entries, "fortran_order")?.value {
            Literal::Bool(false) => {}
            Literal::Bool(true) => return Err(HeaderError::FortranOrder),
            _ => return Err(HeaderError::Key("fortran_order")),
        }
        let Literal::Tuple(shape) = &entry(&entries, "shape")?.value else {
            return Err(HeaderError::Key("shape"));
        };
        let rows = match shape[..] {
            [Literal::Int(rows)] => rows,
            [_] => return Err(HeaderError::Key("shape")),
            _ => return Err(HeaderError::Dimensions(shape.len())),
        };
        let header = Self {
            data_offset: preamble.data_offset() as u64,
            rows,
            descr: memory::copied_text(descr.text)?,
            layout: Layout::of(&Fields::parse(fields)?)?,
        };
        header.checked_size().ok_or(HeaderError::TooLarge)?;
        Ok(header)
    }

    /// Bytes of the header and all rows.
    pub fn size(&self) -> u64 {
        self.checked_size().expect("parse checks that the size is addressable")
    }

    fn checked_size(&self) -> Option<u64> {
        let rows = self.rows.checked_mul(self.layout.itemsize as u64)?;
        self.data_offset.checked_add(rows).filter(|&size| size <= i64::MAX as u64)
    }
}

/// Versions 1.0 and 2.0 are latin-1, 3.0 is UTF-8.
fn decode_text(version: u8, text: &[u8]) -> Result<String, HeaderError> {
    if version < 3 {
        let mut decoded = String::new();
        for &byte in text {
            memory::push_char(&mut decoded, char::from(byte))?;
        }
        return Ok(decoded);
    }
    let text = str::from_utf8(text).map_err(|_| HeaderError::Encoding)?;
    Ok(memory::copied_text(text)?)
}

fn entry<'a, 'b>(
    entries: &'b [Entry<'a>],
    key: &'static str,
) -> Result<&'b Entry<'a>, HeaderError> {
    entries.iter().find(|entry| entry.key == key).ok_or(HeaderError::Key(key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::BoardField;

    const PACKED_46: &[u8] = include_bytes!("../tests/data/layouts/packed_46/steps.npy");
    const ALIGNED_48: &[u8] = include_bytes!("../tests/data/layouts/aligned_48/steps.npy");
    const LEGACY: &[u8] = include_bytes!("../tests/data/layouts/legacy/steps.npy");
    const SELFPLAY_V1: &[u8] = include_bytes!("../tests/data/layouts/selfplay_v1/steps.npy");

    fn parse(file: &[u8]) -> Result<Header, HeaderError> {
        let preamble = Preamble::parse(file, file.len() as u64)?;
        Header::parse(preamble, &file[preamble.length..preamble.data_offset()])
    }

    fn version_1(text: &str) -> Vec<u8> {
        let length = u16::try_from(text.len()).expect("a short header");
        [b"\x93NUMPY\x01\x00", &length.to_le_bytes()[..], text.as_bytes()].concat()
    }

    fn descr(descr: &str) -> Vec<u8> {
        version_1(&format!("{{'descr': {descr}, 'fortran_order': False, 'shape': (5,), }}\n"))
    }

    fn layout_of(fields: &str) -> Layout {
        parse(&descr(fields)).expect("a valid header").layout
    }

    #[test]
    fn every_row_kind() {
        let board = |file: &[u8]| {
            let header = parse(file).expect("a sample");
            assert_eq!(header.size(), file.len() as u64);
            (header.layout.itemsize, header.layout.board)
        };
        let packed = BoardField::Packed { board: 8, mask: Some(20) };
        assert_eq!(board(PACKED_46), (46, packed));
        assert_eq!(board(ALIGNED_48), (48, packed));
        assert_eq!(board(LEGACY), (29, BoardField::Packed { board: 1, mask: None }));
        assert_eq!(board(SELFPLAY_V1), (28, BoardField::Exponents { exps: 12 }));
    }

    #[test]
    fn any_order_padding_titles_and_nested_fields() {
        let packed = |board, mask| BoardField::Packed { board, mask };
        let layout = layout_of("[('tile_65536_mask', '<u2'), ('', '|V3'), ('board', '<u8')]");
        assert_eq!((layout.itemsize, layout.board), (13, packed(5, Some(0))));
        assert_eq!(layout.board.range(), 0..13);
        let layout = layout_of("[('m', '<f4', (2, 3)), (('Board', 'board'), '<u8'), ('', '|V1')]");
        assert_eq!((layout.itemsize, layout.board), (33, packed(24, None)));
        let layout =
            layout_of("[('n', [('x', '<u2'), ('', '|V2')], (3,)), ('u', '<U5'), ('board', '<u8')]");
        assert_eq!((layout.itemsize, layout.board), (40, packed(32, None)));
        let layout = layout_of("[('t', '<M8[25us]'), ('exps', '|u1', (16,)), ('board', '=u8')]");
        assert_eq!((layout.itemsize, layout.board), (32, packed(24, None)));
        let layout = layout_of("[('z', '|S0'), ('exps', '|u1', 16)]");
        assert_eq!((layout.itemsize, layout.board), (16, BoardField::Exponents { exps: 0 }));
    }

    #[test]
    fn keys_in_any_order_and_other_versions() {
        let text = "{'shape':(7,),'fortran_order':False,'descr':[('board','<u8'),('é','<u2')]}";
        for version in [2, 3] {
            let encoded = match version {
                2 => text.chars().map(|c| u8::try_from(u32::from(c)).expect("latin-1")).collect(),
                _ => text.as_bytes().to_vec(),
            };
            let length = (encoded.len() as u32).to_le_bytes();
            let header = [b"\x93NUMPY", &[version, 0][..], &length, &encoded].concat();
            let file = [header, vec![0; 70]].concat();
            let header = parse(&file).expect("a valid header");
            assert_eq!((header.rows, header.layout.itemsize), (7, 10));
            assert_eq!(header.descr, "[('board','<u8'),('é','<u2')]");
        }
    }

    #[test]
    fn refusals_say_why() {
        let shape = |shape: &str| {
            version_1(&format!(
                "{{'descr': [('board', '<u8')], 'fortran_order': False, 'shape': {shape}}}"
            ))
        };
        let fortran = "{'descr': [('board', '<u8')], 'fortran_order': True, 'shape': (5,)}";
        let twice = "{'descr': [], 'descr': [], 'shape': (5,)}";
        let cases: &[(Vec<u8>, &str)] = &[
            (b"PK\x03\x04".to_vec(), "not a .npy file"),
            (b"".to_vec(), "truncated in its .npy header"),
            (b"\x93NUM".to_vec(), "truncated in its .npy header"),
            (b"\x93NUMPY\x01".to_vec(), "truncated in its .npy header"),
            (b"\x93NUMPY\x01\x00\x10".to_vec(), "truncated in its .npy header"),
            (b"\x93NUMPY\x01\x00\xff\xff{}".to_vec(), "truncated in its .npy header"),
            (b"\x93NUMPY\x04\x00\x00\x00\x00\x00".to_vec(), "version 4.0"),
            (b"\x93NUMPY\x01\x01\x00\x00\x00\x00".to_vec(), "version 1.1"),
            (b"\x93NUMPY\x02\x00\xff\xff\xff\xff".to_vec(), "claims 4294967295 bytes"),
            (b"\x93NUMPY\x03\x00\x01\x00\x00\x00\xff".to_vec(), "not text"),
            (version_1("{'descr'"), "not a Python literal: expected ':' at byte 8"),
            (version_1("[]"), "keys other than"),
            (version_1("{}"), "keys other than"),
            (version_1(twice), "no valid 'fortran_order'"),
            (version_1(fortran), "Fortran order"),
            (shape("()"), "0 dimensions"),
            (shape("(5, 2)"), "2 dimensions"),
            (shape("5"), "no valid 'shape'"),
            (shape("('5',)"), "no valid 'shape'"),
            (shape("(18446744073709551615,)"), "too large"),
            (descr("'<u8'"), "not structured"),
            (descr("'|O'"), "its array holds pickled"),
            (descr("[]"), "only padding"),
            (descr("[('a', '<u8'), ('b', '|u1')]"), "only 'a', 'b'"),
            (descr("[('board', '>u8')]"), "field 'board' is >u8, not a little-endian unsigned 8"),
            (descr("[('board', '<i8')]"), "field 'board' is <i8"),
            (descr("[('board', '<u8', (2,))]"), "field 'board' is <u8 [2]"),
            (descr("[('board', [('x', '<u8')])]"), "field 'board' is [...]"),
            (
                descr("[('board', '<u8'), ('tile_65536_mask', '>u2')]"),
                "field 'tile_65536_mask' is >u2",
            ),
            (descr("[('exps', '|i1', (16,))]"), "field 'exps' is |i1 [16]"),
            (descr("[('exps', '|u1', (4, 4))]"), "field 'exps' is |u1 [4, 4]"),
            (descr("[('board', '<u8'), ('x', '|O')]"), "field 'x' holds pickled"),
            (descr("[('board', '<u8'), ('x', [('y', 'O')])]"), "field 'y' holds pickled"),
            (descr("[('board', '<u8'), ('board', '<u8')]"), "two fields are named 'board'"),
            (descr("[('board', '<u8'), ('x', '<u3')]"), "field 'x' has the dtype '<u3'"),
            (descr("[('board', '<u8'), ('x', '<u8[s]')]"), "field 'x' has the dtype"),
            (descr("[('board', '<u8'), ('x', '')]"), "field 'x' has the dtype"),
            (descr("[('board', '<u8'), ('', '<u8')]"), "field number 1 is not a valid"),
            (descr(r"[('board', '<u8'), ('a\nb', '<u3')]"), r"field 'a\nb' has the dtype"),
            (descr(r"[('a\nb', '<u8')]"), r"only 'a\nb'"),
            (descr("[('board',)]"), "field number 0 is not a valid"),
            (descr("['board']"), "field number 0 is not a valid"),
            (descr("[('board', 8)]"), "field 'board' is not a valid"),
            (descr("[('board', '<u8', 'x')]"), "field 'board' is not a valid"),
            (descr("[('board', '<u8'), ('x', '|V2147483647')]"), "field 'x' has the dtype"),
            (
                descr(
                    "[('board', '<u8'), ('x', '|u1', (1500000000,)), ('tile_65536_mask', '<u2')]",
                ),
                "its rows have 1500000010 bytes, more than the 1048576 allowed",
            ),
            (descr("[('board', '<u8'), ('x', '|u1', (1048569,))]"), "have 1048577 bytes"),
            (descr("[('board', '<u8'), ('x', '|u1', (2147483648,))]"), "too large"),
            (descr("[('board', '<u8'), ('x', '|u1', (4294967296, 4294967296))]"), "too large"),
        ];
        for (file, expected) in cases {
            let error = parse(file).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error:?} should say {expected:?}");
            assert!(!error.contains('\n'), "{error:?} is one line");
        }
    }

    /// Valid headers with bytes changed, cut, repeated and swapped: an error or a layout within the
    /// row, no panic.
    #[test]
    fn mutated_headers_are_refused_or_sound() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/header");
        let mut paths: Vec<_> = std::fs::read_dir(corpus)
            .expect("a corpus")
            .map(|entry| entry.expect("a file").path())
            .collect();
        paths.sort();
        let seeds: Vec<_> = paths.iter().map(|path| std::fs::read(path).expect("a file")).collect();
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut below = |count: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % count as u64) as usize
        };
        let tokens: [&[u8]; 12] =
            [b"'", b"(", b")", b"[", b"]", b",", b"\\", b"O", b"<u8", b"9999999999", b"\xff", b"{"];
        let mut sound = 0;
        for round in 0..100_000 {
            let mut file = seeds[round % seeds.len()].to_vec();
            for _ in 0..=below(4) {
                let at = below(file.len());
                match below(4) {
                    0 => file[at] = below(256) as u8,
                    1 => drop(file.splice(at..at, tokens[below(tokens.len())].iter().copied())),
                    2 => drop(file.drain(at..(at + 1 + below(8)).min(file.len()))),
                    _ => {
                        let other = below(file.len());
                        file.swap(at, other);
                    }
                }
                if file.is_empty() {
                    break;
                }
            }
            if let Ok(header) = parse(&file) {
                assert!(header.layout.board.range().end <= header.layout.itemsize);
                assert!(header.data_offset <= file.len() as u64);
                sound += 1;
            }
        }
        assert!(sound > 1000, "mutations that spare the header exercise the checks on layouts");
    }
}
