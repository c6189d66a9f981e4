//! Opens datasets of 2048 steps, samples their rows and reads boards.
//! Writes and digests spans of output files, and reads their rows.

pub mod dataset;
pub mod error;
mod memory;
pub mod output;
#[cfg(feature = "python")]
mod python;
mod rows;
pub mod sampling;
pub mod statistics;
#[cfg(test)]
mod testing;

pub use error::Error;
