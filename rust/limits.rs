//! What a call may take of the machine.

use std::{env, thread};

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
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let cores = (cores / neighbours()).clamp(1, READERS);
        let files = (file::descriptor_limit() / 4).clamp(1, 1024) as usize;
        Self { cores, files, asks_cache: true }
    }
}

/// How many processes of a run share this machine: torchrun says it.
fn neighbours() -> usize {
    let said = env::var("LOCAL_WORLD_SIZE").ok().and_then(|text| text.parse().ok());
    said.unwrap_or(1).max(1)
}
