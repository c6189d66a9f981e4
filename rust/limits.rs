//! What a call may take of the machine.

use std::thread;

use crate::file;

/// The most threads of a read: more would only take cores from the forward pass.
const READERS: usize = 16;

#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub cores: usize,
    /// Open files: a part of what the process may have.
    pub files: usize,
    /// Whether the page cache is asked before the disk is.
    pub asks_cache: bool,
}

impl Limits {
    pub fn of_process() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from).min(READERS);
        let files = (file::descriptor_limit() / 4).clamp(1, 1024) as usize;
        Self { cores, files, asks_cache: true }
    }
}
