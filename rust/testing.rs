//! Shards for the tests of other modules.

use std::fs;
use std::path::Path;

pub const PACKED: &str = "[('run_id', '<u4'), ('step_index', '<u4'), ('board', '<u8'), \
    ('board_eval', '<i4'), ('tile_65536_mask', '<u2'), ('rest', '|u1', (24,))]";

/// A `.npy` file with `rows` rows of random bytes.
pub fn shard(descr: &str, rows: usize) -> Vec<u8> {
    let text = format!("{{'descr': {descr}, 'fortran_order': False, 'shape': ({rows},), }}\n");
    let length = u16::try_from(text.len()).expect("a short header").to_le_bytes();
    let mut bytes = [b"\x93NUMPY\x01\x00", &length[..], text.as_bytes()].concat();
    let preamble = crate::npy::Preamble::parse(&bytes, bytes.len() as u64).expect("a preamble");
    let header = crate::npy::Header::parse(preamble, text.as_bytes()).expect("a header");
    let mut state = 1u64;
    bytes.extend((0..rows * header.layout.itemsize).map(|_| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 56) as u8
    }));
    bytes
}

pub fn write(directory: &Path, name: &str, bytes: &[u8]) {
    fs::write(directory.join(name), bytes).expect("a writable directory");
}
