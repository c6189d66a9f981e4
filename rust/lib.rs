//! Reads datasets of 2048 steps: finds shards, draws step indices, decodes boards.
//! Writes and digests spans of output files, and reads their rows.

pub mod boards;
pub mod checksum;
mod column;
pub mod dataset;
mod descrs;
mod dtype;
pub mod error;
mod extents;
mod fields;
mod file;
mod header_error;
pub mod interrupt;
pub mod layout;
mod limits;
mod literal;
mod memory;
pub mod npy;
mod order;
mod prefetch;
#[cfg(feature = "python")]
mod python;
pub mod random;
mod read_error;
mod reader;
mod repeats;
mod row_files;
mod row_set;
mod rows;
pub mod sampling;
mod scan;
mod scatter;
mod shards;
pub mod spans;
pub mod statistics;
pub mod stored;
mod sync;
#[cfg(test)]
mod testing;

pub use error::Error;
