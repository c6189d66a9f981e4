//! Files of rows and random numbers, for tests.

use std::fs;
use std::path::Path;

use crate::rows::files::{self, RowFile, RowFiles};

/// Files of `counts` rows, each after some other bytes, and all their rows.
pub fn row_files(directory: &Path, counts: &[usize], itemsize: usize) -> (RowFiles, Vec<u8>) {
    let (mut files, mut all, mut random) = (RowFiles::default(), Vec::new(), random());
    for (number, &count) in counts.iter().enumerate() {
        let rows: Vec<u8> = (0..count * itemsize).map(|_| random(256) as u8).collect();
        all.extend(&rows);
        let path = directory.join(format!("rows-{number}"));
        let data_offset = 13 * number;
        fs::write(&path, [&vec![0xff; data_offset], &rows[..], b"more"].concat()).expect("written");
        let id = files::open(&path).expect("a file").id;
        let (rows, data_offset) = (count as u64, data_offset as u64);
        files.push(RowFile { path, id, rows, data_offset, itemsize }).expect("few rows");
    }
    (files, all)
}

/// Numbers below an argument.
pub fn random() -> impl FnMut(u64) -> u64 {
    let mut state = 1u64;
    move |below| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 20) % below
    }
}
