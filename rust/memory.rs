//! Memory whose size callers choose: too much of it is an error, never an abort.

use std::io;

/// An allocation failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not enough memory for {bytes} more bytes")]
pub struct OutOfMemory {
    bytes: usize,
}

impl From<OutOfMemory> for io::Error {
    fn from(error: OutOfMemory) -> Self {
        Self::new(io::ErrorKind::OutOfMemory, error)
    }
}

pub fn with_capacity<T>(capacity: usize) -> Result<Vec<T>, OutOfMemory> {
    let mut items = Vec::new();
    let bytes = capacity.saturating_mul(size_of::<T>());
    items.try_reserve_exact(capacity).map_err(|_| OutOfMemory { bytes })?;
    Ok(items)
}

/// `length` copies of `item`.
pub fn filled<T: Clone>(item: T, length: usize) -> Result<Vec<T>, OutOfMemory> {
    let mut items = with_capacity(length)?;
    items.resize(length, item);
    Ok(items)
}

/// The first `length` bytes of `buffer`, which grows to hold them and never shrinks.
pub fn grown(buffer: &mut Vec<u8>, length: usize) -> Result<&mut [u8], OutOfMemory> {
    if buffer.len() < length {
        let bytes = length - buffer.len();
        buffer.try_reserve_exact(bytes).map_err(|_| OutOfMemory { bytes })?;
        buffer.resize(length, 0);
    }
    Ok(&mut buffer[..length])
}

/// Starts loading `slice[index]` into the cache, if there is one.
#[inline]
pub fn prefetch<T>(slice: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(item) = slice.get(index) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing and cannot fault, and the item is live.
        #[allow(unsafe_code)]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(item).cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (slice, index);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_much_memory_is_an_error() {
        for length in [1 << 62, usize::MAX] {
            assert!(grown(&mut Vec::new(), length).is_err());
            assert!(filled(0u64, length).is_err());
        }
        let error = with_capacity::<u64>(1 << 50).expect_err("too large").to_string();
        assert_eq!(error, "not enough memory for 9007199254740992 more bytes");
    }
}
