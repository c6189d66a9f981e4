//! A buffer that several threads fill, each its own places.

use std::marker::PhantomData;

/// A buffer of equal places, each written by one thread.
pub struct Scatter<'a> {
    start: *mut u8,
    places: usize,
    width: usize,
    buffer: PhantomData<&'a mut [u8]>,
}

// SAFETY: `place` leaves it to its caller that no place is handed out twice.
#[allow(unsafe_code)]
unsafe impl Sync for Scatter<'_> {}

impl<'a> Scatter<'a> {
    pub fn new(buffer: &'a mut [u8], width: usize) -> Self {
        let places = buffer.len() / width;
        Self { start: buffer.as_mut_ptr(), places, width, buffer: PhantomData }
    }

    /// # Safety
    ///
    /// No place may be asked for twice.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub unsafe fn place(&self, place: usize) -> &mut [u8] {
        assert!(place < self.places, "a place within the buffer");
        // SAFETY: the place lies in the buffer, which is borrowed for as long as `self` lives.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(place * self.width), self.width) }
    }
}
