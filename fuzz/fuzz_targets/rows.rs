//! Boards and rows of a dataset whose two shards are the hostile bytes. The last bytes of them
//! choose the layout of a row, which NumPy reads from the header elsewhere.
//!
//! `cargo +nightly fuzz run rows -- -dict=fuzz/header.dict -max_len=2048`

#![no_main]

use std::fs;
use std::path::Path;

use dump_activations::Error;
use dump_activations::dataset::Dataset;
use dump_activations::dataset::headers::Shards;
use dump_activations::dataset::layouts::{BoardField, CELLS, Layout};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

thread_local! {
    static DIRECTORY: TempDir = tempfile::tempdir().expect("a directory");
}

fuzz_target!(|bytes: &[u8]| {
    DIRECTORY.with(|directory| read(directory.path(), bytes));
});

fn read(directory: &Path, bytes: &[u8]) {
    let names = ["steps-0.npy", "steps-1.npy"].map(Into::into);
    for name in &names {
        fs::write(directory.join(name), bytes).expect("a writable directory");
    }
    let Ok(shards) = Shards::read(directory, &names, &mut || Ok(())) else { return };
    let layout = layout_of(bytes);
    let Ok(dataset) = Dataset::new(shards, vec![layout]) else { return };
    let shard = &dataset.files.files()[0];
    let (itemsize, rows) = (shard.itemsize, dataset.rows() as i64);
    assert_eq!(rows as u64, 2 * shard.rows);
    let data = &bytes[shard.data_offset as usize..][..shard.rows as usize * itemsize];

    // Rows that the bytes choose, and one past each end among them.
    let chosen = bytes.iter().rev().take(64).enumerate();
    let indices: Vec<i64> =
        chosen.map(|(at, &byte)| (at as i64 + 7919 * i64::from(byte)) % (rows + 2) - 1).collect();
    let inside: Vec<i64> = indices.iter().copied().filter(|row| (0..rows).contains(row)).collect();
    let mut boards = vec![0; indices.len() * CELLS];
    let outcome = dataset.read_boards(&indices, &mut boards, &mut || Ok(()));
    match outcome {
        Ok(()) => assert_eq!(inside.len(), indices.len()),
        Err(Error::StepIndex { position, index, .. }) => {
            assert!(indices[position] == index && !(0..rows).contains(&index));
        }
        Err(error) => panic!("{error}"),
    }

    let boards = &mut boards[..inside.len() * CELLS];
    dataset.read_boards(&inside, boards, &mut || Ok(())).expect("boards");
    let mut read = vec![0; inside.len() * itemsize];
    dataset.read_rows(&inside, &mut read, &mut || Ok(())).expect("rows");
    let field = layout.board;
    let rows = read.chunks_exact(itemsize).zip(boards.chunks_exact(CELLS));
    for (&index, (row, board)) in inside.iter().zip(rows) {
        let expected = &data[(index as u64 % shard.rows) as usize * itemsize..][..itemsize];
        assert_eq!(row, expected);
        assert_eq!(board, field.decode(&expected[field.range()]));
    }
}

fn layout_of(bytes: &[u8]) -> Layout {
    let mut last = bytes.iter().rev().map(|&byte| usize::from(byte));
    let mut next = || last.next().unwrap_or(0);
    let (itemsize, kind, at, mask) = (8 + next() % 64, next(), next() % 64, next() % 64);
    let board = match kind % 3 {
        0 => BoardField::Packed { board: at, mask: None },
        1 => BoardField::Packed { board: at, mask: Some(mask) },
        _ => BoardField::Exponents { exps: at },
    };
    Layout { itemsize, board }
}
