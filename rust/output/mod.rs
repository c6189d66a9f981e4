//! Output files: spans are written and digested, finished files are read by rows.

pub mod checksum;
pub mod rows;
pub mod spans;
