//! Memory that is refused by an error: how much of it is asked for is up to others.

use std::io;

/// There is not as much memory as was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not enough memory: {bytes} bytes more were wanted")]
pub struct OutOfMemory {
    bytes: usize,
}

impl OutOfMemory {
    /// There is none for `more` items.
    pub fn of<T>(more: usize) -> Self {
        Self { bytes: more.saturating_mul(size_of::<T>()) }
    }
}

impl From<OutOfMemory> for io::Error {
    fn from(error: OutOfMemory) -> Self {
        Self::new(io::ErrorKind::OutOfMemory, error)
    }
}

/// Makes room for `more` items.
pub fn reserve<T>(items: &mut Vec<T>, more: usize) -> Result<(), OutOfMemory> {
    items.try_reserve_exact(more).map_err(|_| OutOfMemory::of::<T>(more))
}

/// Adds an item, as `Vec::push` does.
pub fn push<T>(items: &mut Vec<T>, item: T) -> Result<(), OutOfMemory> {
    items.try_reserve(1).map_err(|_| OutOfMemory::of::<T>(1))?;
    items.push(item);
    Ok(())
}

pub fn with_capacity<T>(capacity: usize) -> Result<Vec<T>, OutOfMemory> {
    let mut items = Vec::new();
    reserve(&mut items, capacity)?;
    Ok(items)
}

/// `length` copies of `item`.
pub fn filled<T: Clone>(item: T, length: usize) -> Result<Vec<T>, OutOfMemory> {
    let mut items = with_capacity(length)?;
    items.resize(length, item);
    Ok(items)
}

pub fn copied<T: Copy>(items: &[T]) -> Result<Vec<T>, OutOfMemory> {
    let mut copy = with_capacity(items.len())?;
    copy.extend_from_slice(items);
    Ok(copy)
}

pub fn copied_text(text: &str) -> Result<String, OutOfMemory> {
    let mut copy = String::new();
    copy.try_reserve_exact(text.len()).map_err(|_| OutOfMemory::of::<u8>(text.len()))?;
    copy.push_str(text);
    Ok(copy)
}

/// Adds a character, as `String::push` does.
pub fn push_char(text: &mut String, character: char) -> Result<(), OutOfMemory> {
    text.try_reserve(character.len_utf8()).map_err(|_| OutOfMemory::of::<char>(1))?;
    text.push(character);
    Ok(())
}

/// The first `length` bytes of `buffer`, which grows where it must.
pub fn room(buffer: &mut Vec<u8>, length: usize) -> Result<&mut [u8], OutOfMemory> {
    if buffer.len() < length {
        let more = length - buffer.len();
        reserve(buffer, more)?;
        buffer.resize(length, 0);
    }
    Ok(&mut buffer[..length])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_there_is_is_an_error() {
        for length in [1 << 62, usize::MAX] {
            assert!(room(&mut Vec::new(), length).is_err());
            assert!(filled(0u64, length).is_err());
        }
        let error = with_capacity::<u64>(1 << 50).expect_err("too large").to_string();
        assert_eq!(error, "not enough memory: 9007199254740992 bytes more were wanted");
    }

    #[test]
    fn a_buffer_grows_and_never_shrinks() {
        let mut buffer = Vec::new();
        for (length, held) in [(3, 3), (9, 9), (4, 9)] {
            assert_eq!(room(&mut buffer, length).expect("memory").len(), length);
            assert_eq!(buffer.len(), held);
        }
    }
}
