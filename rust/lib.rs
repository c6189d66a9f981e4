//! Reads pools of 2048 steps: finds shards, draws step indices, decodes boards.
//! Writes and digests spans of output files.

pub mod boards;
pub mod checksum;
mod descrs;
mod dtype;
pub mod error;
mod file;
mod header_error;
pub mod interrupt;
pub mod layout;
mod literal;
pub mod npy;
mod order;
#[cfg(feature = "python")]
mod python;
pub mod random;
pub mod rows;
pub mod sampling;
mod scatter;
pub mod shards;
pub mod spans;
#[cfg(test)]
mod testing;

pub use error::Error;
