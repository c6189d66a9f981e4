//! Reads scattered bytes of files in bare loops on 64 threads, for benchmarks to compare with.
//!
//! `bare_reads LENGTH PLAN FILE...`: PLAN holds pairs of little-endian u64, the number of a file and
//! an offset in it. Reads LENGTH bytes at each, and prints the seconds that took.

use std::error::Error;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

const THREADS: usize = 64;
const PER_TURN: usize = 16;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [length, plan, paths @ ..] = &arguments[..] else {
        return Err("usage: bare_reads LENGTH PLAN FILE...".into());
    };
    let length: usize = length.parse()?;
    let words = std::fs::read(plan)?;
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
    let plan: Vec<(usize, u64)> =
        words.chunks_exact(16).map(|pair| (word(&pair[..8]) as usize, word(&pair[8..]))).collect();
    let files = paths.iter().map(File::open).collect::<Result<Vec<_>, _>>()?;
    for file in &files {
        advise_random(file);
    }
    let started = Instant::now();
    read(&files, &plan, length);
    println!("{}", started.elapsed().as_secs_f64());
    Ok(())
}

#[allow(unsafe_code)]
fn advise_random(file: &File) {
    // SAFETY: the descriptor is open.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) };
}

fn read(files: &[File], plan: &[(usize, u64)], length: usize) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let mut buffer = vec![0; length];
                loop {
                    let start = next.fetch_add(PER_TURN, Ordering::Relaxed);
                    let Some(rest) = plan.get(start..).filter(|rest| !rest.is_empty()) else {
                        return;
                    };
                    for &(file, offset) in rest.iter().take(PER_TURN) {
                        files[file].read_exact_at(&mut buffer, offset).expect("readable");
                    }
                }
            });
        }
    });
}
