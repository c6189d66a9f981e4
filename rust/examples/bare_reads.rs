//! Reads scattered pieces of files in a bare loop: what a disk gives, for benchmarks to compare
//! with.
//!
//! `bare_reads threads|uring LENGTH PLAN FILE...`: PLAN holds pairs of little-endian u64, the
//! number of a file and an offset in it; LENGTH bytes are read at each. Prints the seconds that
//! took.

use std::error::Error;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

const THREADS: usize = 64;
const PER_TURN: usize = 16;
const QUEUE_DEPTH: usize = 256;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [method, length, plan, paths @ ..] = &arguments[..] else {
        return Err("usage: bare_reads threads|uring LENGTH PLAN FILE...".into());
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
    match &method[..] {
        "threads" => read_with_threads(&files, &plan, length),
        "uring" => read_with_uring(&files, &plan, length)?,
        _ => return Err("the method is threads or uring".into()),
    }
    println!("{}", started.elapsed().as_secs_f64());
    Ok(())
}

#[allow(unsafe_code)]
fn advise_random(file: &File) {
    // SAFETY: the descriptor is open.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) };
}

fn read_with_threads(files: &[File], plan: &[(usize, u64)], length: usize) {
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

#[allow(unsafe_code)]
fn read_with_uring(files: &[File], plan: &[(usize, u64)], length: usize) -> std::io::Result<()> {
    let mut ring = io_uring::IoUring::new(QUEUE_DEPTH as u32)?;
    let mut buffers = vec![0u8; plan.len() * length];
    let mut reads = plan.iter().zip(buffers.chunks_mut(length));
    let mut in_flight = 0;
    loop {
        for (&(file, offset), buffer) in reads.by_ref().take(QUEUE_DEPTH - in_flight) {
            let descriptor = io_uring::types::Fd(files[file].as_raw_fd());
            let read = io_uring::opcode::Read::new(descriptor, buffer.as_mut_ptr(), length as u32)
                .offset(offset)
                .build();
            // SAFETY: the files and buffers outlive the ring's work on them, which is waited for
            // below.
            unsafe { ring.submission().push(&read) }.expect("a free entry");
            in_flight += 1;
        }
        if in_flight == 0 {
            return Ok(());
        }
        ring.submit_and_wait(1)?;
        for completion in ring.completion() {
            assert_eq!(usize::try_from(completion.result()), Ok(length), "a whole read");
            in_flight -= 1;
        }
    }
}
