//! Rows -> 16 exponents per board.
//!
//! A board is a u64 of 16 nibbles, cell 0 (top left) in the most significant one. A tile of 65536
//! or more does not fit: its bit in `tile_65536_mask` is set (bit 0 = cell 0), and it decodes to
//! exponent 16.

use super::layouts::BoardField;

/// Cells of a board, and bytes of a decoded one.
pub const CELLS: usize = 16;

const LOW_NIBBLES: u128 = 0x0f0f_0f0f_0f0f_0f0f_0f0f_0f0f_0f0f_0f0f;

/// The exponents of `board`, cell 0 first.
#[inline]
pub fn decode(board: u64, mask: u16) -> [u8; CELLS] {
    let mut cells = spread_nibbles(board);
    if mask != 0 {
        let high = spread_bits(mask);
        cells = (cells & !(high * 0xff)) | (high * 16);
    }
    cells.to_be_bytes()
}

/// Each nibble in a byte of its own, in the same order.
#[inline]
fn spread_nibbles(board: u64) -> u128 {
    let wide = |half: u32| {
        let half = u64::from(half);
        let half = (half | half << 16) & 0x0000_ffff_0000_ffff;
        let half = (half | half << 8) & 0x00ff_00ff_00ff_00ff;
        (half | half << 4) & LOW_NIBBLES as u64
    };
    u128::from(wide((board >> 32) as u32)) << 64 | u128::from(wide(board as u32))
}

/// Bit i of `mask` in the byte of cell i.
fn spread_bits(mask: u16) -> u128 {
    (0..CELLS)
        .fold(0, |bytes, cell| bytes | u128::from(mask >> cell & 1) << (8 * (CELLS - 1 - cell)))
}

impl BoardField {
    /// The exponents in `bytes`, the bytes of a row that `range` names.
    #[inline]
    pub fn decode(self, bytes: &[u8]) -> [u8; CELLS] {
        let start = self.range().start;
        match self {
            Self::Packed { board, mask } => {
                let board = u64::from_le_bytes(array(bytes, board - start));
                let mask = mask.map_or(0, |mask| u16::from_le_bytes(array(bytes, mask - start)));
                decode(board, mask)
            }
            Self::Exponents { .. } => array(bytes, 0),
        }
    }
}

/// The `N` bytes at `at`.
#[inline]
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    *bytes[at..].first_chunk().expect("a range holds its fields")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(board: u64, mask: u16) -> [u8; CELLS] {
        std::array::from_fn(|cell| match (board >> (60 - 4 * cell) & 15) as u8 {
            _ if mask >> cell & 1 == 1 => 16,
            exponent => exponent,
        })
    }

    #[test]
    fn equals_a_cell_by_cell_decoder() {
        let mut state = 1u64;
        for _ in 0..10_000 {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let (board, mask) = (state.rotate_left(17), (state >> 40) as u16);
            assert_eq!(decode(board, mask), naive(board, mask));
            assert_eq!(decode(board, 0), naive(board, 0));
        }
    }
}
