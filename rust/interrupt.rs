//! How the work of a call asks its caller whether to go on.

/// The caller asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Asked now and then whether to go on.
pub type Interrupt<'a> = &'a mut dyn FnMut() -> Result<(), Interrupted>;
