//! A shard's header and the layout of its rows, from hostile bytes.
//!
//! `cargo +nightly fuzz run header -- -dict=fuzz/header.dict -max_len=2048`

#![no_main]

use dump_activations::npy::{Header, Preamble};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    let Ok(preamble) = Preamble::parse(file, file.len() as u64) else { return };
    let (text, rows) = file[preamble.length..].split_at(preamble.text);
    let Ok(header) = Header::parse(preamble, text) else { return };
    let layout = header.layout;
    assert!(layout.board.range().end <= layout.itemsize);
    assert_eq!(header.size() - header.data_offset, header.rows * layout.itemsize as u64);
    for row in rows.chunks_exact(layout.itemsize) {
        layout.board.decode(&row[layout.board.range()]);
    }
});
