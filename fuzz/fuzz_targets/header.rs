//! A shard's header, cut from hostile bytes.
//!
//! `cargo +nightly fuzz run header -- -dict=fuzz/header.dict -max_len=2048`

#![no_main]

use dump_activations::dataset::headers::Header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    match Header::parse(file) {
        Ok(header) => {
            assert!(header.data_offset as usize <= file.len());
            assert!(header.descr.len() <= 2 * file.len());
            assert_eq!(header.descr.trim(), header.descr);
        }
        Err(problem) => assert!(problem.len() < 10_000 && !problem.contains('\n')),
    }
});
