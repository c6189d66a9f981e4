//! Shards and other files of rows, for tests.

use std::fs;
use std::path::Path;

use crate::dataset::layouts::{BoardField, Layout};
use crate::rows::files::{self, RowFile, RowFiles};

pub const PACKED: &str = "[('run_id', '<u4'), ('step_index', '<u4'), ('board', '<u8'), \
    ('board_eval', '<i4'), ('tile_65536_mask', '<u2'), ('rest', '|u1', (24,))]";
pub const MASK_FIRST: &str =
    "[('x', '|u1'), ('tile_65536_mask', '<u2'), ('y', '<f4'), ('board', '<u8')]";

/// The layout of a dtype. Any but the two above is a bare board.
pub fn layout(descr: &str) -> Layout {
    let packed = |board, mask| BoardField::Packed { board, mask };
    let (itemsize, board) = match descr {
        PACKED => (46, packed(8, Some(20))),
        MASK_FIRST => (15, packed(7, Some(1))),
        _ => (8, packed(0, None)),
    };
    Layout { itemsize, board }
}

/// A `.npy` file with `rows` rows of random bytes.
pub fn shard(descr: &str, rows: usize) -> Vec<u8> {
    let text = format!("{{'descr': {descr}, 'fortran_order': False, 'shape': ({rows},), }}\n");
    let length = u16::try_from(text.len()).expect("a short header").to_le_bytes();
    let header = [b"\x93NUMPY\x01\x00", &length[..], text.as_bytes()].concat();
    [header, random_bytes(rows * layout(descr).itemsize, 1)].concat()
}

pub fn write(directory: &Path, name: &str, bytes: &[u8]) {
    fs::write(directory.join(name), bytes).expect("a writable directory");
}

/// Files of `counts` rows, each after some other bytes, and all their rows.
pub fn row_files(directory: &Path, counts: &[usize], itemsize: usize) -> (RowFiles, Vec<u8>) {
    let (mut files, mut all) = (RowFiles::default(), Vec::new());
    for (number, &count) in counts.iter().enumerate() {
        let rows = random_bytes(count * itemsize, number as u64);
        let path = directory.join(format!("rows-{number}"));
        let data_offset = 13 * number;
        fs::write(&path, [&vec![0xff; data_offset], &rows[..], b"more"].concat()).expect("written");
        let id = files::open(&path).expect("a file").id;
        let (rows, data_offset) = (count as u64, data_offset as u64);
        files.push(RowFile { path, id, rows, data_offset, itemsize }).expect("few rows");
        all.extend(random_bytes(count * itemsize, number as u64));
    }
    (files, all)
}

fn random_bytes(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 56) as u8
    };
    (0..count).map(next).collect()
}
