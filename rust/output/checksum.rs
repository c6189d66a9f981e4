//! Digests of tensor data: CRC-32 (IEEE 802.3, the polynomial of zip files) and counts of NaN and
//! infinite values, in one pass, joined from spans without a second pass.

use crc32fast::Hasher;

/// The elements of a tensor, among which NaN and infinite values are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    Float64,
    Float32,
    Float16,
    BFloat16,
    /// Holds neither NaN nor infinities.
    Integer,
}

impl Element {
    /// The element of a dtype by its NumPy name, or `None` if output files never hold it.
    pub fn from_dtype(dtype: &str) -> Option<Self> {
        match dtype {
            "float64" => Some(Self::Float64),
            "float32" => Some(Self::Float32),
            "float16" => Some(Self::Float16),
            "bfloat16" => Some(Self::BFloat16),
            "int64" | "uint8" => Some(Self::Integer),
            _ => None,
        }
    }

    /// Bytes of an element. Integers count as single bytes.
    pub fn nbytes(self) -> usize {
        match self {
            Self::Float64 => 8,
            Self::Float32 => 4,
            Self::Float16 | Self::BFloat16 => 2,
            Self::Integer => 1,
        }
    }
}

/// The CRC-32 of a span of bytes, and its counts of NaN and infinite elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest {
    pub crc32: u32,
    pub nan: u64,
    pub inf: u64,
}

impl Digest {
    pub fn as_tuple(self) -> (u32, u64, u64) {
        (self.crc32, self.nan, self.inf)
    }
}

/// The CRC-32 of two spans of bytes, one after the other, from the CRC-32 of each.
pub fn combine(first: u32, second: u32, second_len: u64) -> u32 {
    let mut hasher = Hasher::new_with_initial_len(first, 0);
    hasher.combine(&Hasher::new_with_initial_len(second, second_len));
    hasher.finalize()
}

/// Bytes that the CRC and then the count read, while they are in the innermost cache. 16 bits count
/// the elements of so many.
const STEP: usize = 8 << 10;

/// Digests a span of bytes that comes in blocks.
pub struct Digester {
    hasher: Hasher,
    element: Element,
    nan: u64,
    inf: u64,
}

impl Digester {
    pub fn new(element: Element) -> Self {
        Self { hasher: Hasher::new(), element, nan: 0, inf: 0 }
    }

    /// Adds a block. Every block but the last holds whole elements.
    pub fn update(&mut self, block: &[u8]) {
        for step in block.chunks(STEP) {
            self.hasher.update(step);
            let (nan, inf) = count_specials(step, self.element);
            self.nan += nan;
            self.inf += inf;
        }
    }

    pub fn finish(self) -> Digest {
        Digest { crc32: self.hasher.finalize(), nan: self.nan, inf: self.inf }
    }
}

/// Counts (NaN, infinite) among little-endian floats, by their bits as signed words.
///
/// IEEE 754: without the sign bit, infinity is the pattern of an all-ones exponent and every NaN is
/// above it. Adding one to the exponent carries into the sign bit for these alone, so that three
/// vector operations tell if a block needs counting.
macro_rules! count_specials_as {
    ($word:ty, $infinity:literal, $block:expr) => {{
        const EXPONENT_ONE: $word = <$word>::MAX - $infinity + 1;
        let magnitudes = || {
            let (words, _) = $block.as_chunks::<{ size_of::<$word>() }>();
            words.iter().map(|word| <$word>::from_le_bytes(*word) & <$word>::MAX)
        };
        if magnitudes().fold(0, |carries, bits| carries | bits.wrapping_add(EXPONENT_ONE)) >= 0 {
            return (0, 0);
        }
        let above = |bound| magnitudes().map(|bits| <$word>::from(bits > bound)).sum::<$word>();
        let nan = above($infinity);
        (nan as u64, (above($infinity - 1) - nan) as u64)
    }};
}

/// Counts (NaN, infinite) elements, with vectors as wide as the processor has them.
fn count_specials(block: &[u8], element: Element) -> (u64, u64) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has the instructions that the function is compiled for.
        #[allow(unsafe_code)]
        return unsafe { count_specials_avx2(block, element) };
    }
    count_specials_portably(block, element)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn count_specials_avx2(block: &[u8], element: Element) -> (u64, u64) {
    count_specials_portably(block, element)
}

#[inline(always)]
fn count_specials_portably(block: &[u8], element: Element) -> (u64, u64) {
    match element {
        // Few tensors are float64. The compiler makes vectors of floats, but not of 64-bit words.
        Element::Float64 => {
            let values = block.as_chunks().0.iter().map(|word| f64::from_le_bytes(*word));
            values.fold((0, 0), |(nan, inf), value| {
                (nan + u64::from(value.is_nan()), inf + u64::from(value.is_infinite()))
            })
        }
        Element::Float32 => count_specials_as!(i32, 0x7f80_0000, block),
        Element::Float16 => count_specials_as!(i16, 0x7c00, block),
        Element::BFloat16 => count_specials_as!(i16, 0x7f80, block),
        Element::Integer => (0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CRC-32 bit by bit, from the reflected polynomial.
    fn crc32_bitwise(data: &[u8]) -> u32 {
        !data.iter().fold(!0_u32, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 }
            })
        })
    }

    fn digest(element: Element, data: &[u8], block: usize) -> Digest {
        let mut digester = Digester::new(element);
        data.chunks(block).for_each(|chunk| digester.update(chunk));
        digester.finish()
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * i + 7 * i) as u8).collect()
    }

    #[test]
    fn crc_is_that_of_zip() {
        assert_eq!(digest(Element::Integer, b"123456789", 9).crc32, 0xcbf4_3926);
        for len in [0, 1, 15, 16, 63, 64, 1000, 5000] {
            let data = pattern(len);
            assert_eq!(digest(Element::Integer, &data, 96).crc32, crc32_bitwise(&data), "{len}");
        }
    }

    #[test]
    fn spans_combine_to_the_whole() {
        let data = pattern(3000);
        for cut in [0, 1, 64, 1499, 3000] {
            let (head, tail) = data.split_at(cut);
            let joined = combine(crc32_bitwise(head), crc32_bitwise(tail), tail.len() as u64);
            assert_eq!(joined, crc32_bitwise(&data), "{cut}");
        }
    }

    #[test]
    fn spans_longer_than_32_bits_count_combine() {
        // By zlib over the bytes themselves: nine digits, then 2^32 + 5 zeros.
        let (digits, zeros) = (b"123456789", (1_u64 << 32) + 5);
        let mut doubled = (crc32_bitwise(&[0]), 1_u64);
        let mut all = (0, 0);
        while all.1 < zeros {
            if zeros & doubled.1 != 0 {
                all = (combine(all.0, doubled.0, doubled.1), all.1 + doubled.1);
            }
            doubled = (combine(doubled.0, doubled.0, doubled.1), 2 * doubled.1);
        }
        assert_eq!(all.1, zeros);
        assert_eq!(combine(crc32_bitwise(digits), all.0, zeros), 0x58f8_652e);
    }

    #[test]
    fn a_block_may_hold_more_specials_than_16_bits_count() {
        for (element, infinity) in [(Element::Float16, 0x7c00_u16), (Element::BFloat16, 0x7f80)] {
            let [nan, infinite] = [infinity + 1, infinity].map(u16::to_le_bytes);
            let data = [nan.repeat(70_000), infinite.repeat(140_000)].concat();
            let digest = digest(element, &data, data.len());
            assert_eq!((digest.nan, digest.inf), (70_000, 140_000), "{element:?}");
        }
    }

    #[test]
    fn every_float16_pattern_is_counted_once() {
        let data: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        // float16 has 10 bits of mantissa, bfloat16 has 7. Each sign has one infinity among them.
        let half = digest(Element::Float16, &data, 4096);
        assert_eq!((half.nan, half.inf), (2 * 1023, 2));
        let brain = digest(Element::BFloat16, &data, 4096);
        assert_eq!((brain.nan, brain.inf), (2 * 127, 2));
    }

    #[test]
    fn float32_and_float64_specials_are_counted() {
        let [inf, nan] = [f64::INFINITY, f64::NAN];
        let values = [0.0, -0.0, f64::MAX, f64::MIN_POSITIVE / 2.0, nan, -nan, inf, -inf];
        let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let payload = 0x7ff0_0000_0000_0001_u64.to_le_bytes();
        let found = digest(Element::Float64, &[&data[..], &payload].concat(), 8);
        assert_eq!((found.nan, found.inf), (3, 2));

        let values = values.map(|value| if value == f64::MAX { f32::MAX } else { value as f32 });
        let tiny = [f32::MIN, f32::MIN_POSITIVE / 2.0, f32::from_bits(0x7f80_0001)];
        let data = values.iter().chain(&tiny).flat_map(|value| value.to_le_bytes());
        let found = digest(Element::Float32, &data.collect::<Vec<u8>>(), 8);
        assert_eq!((found.nan, found.inf), (3, 2));
    }
}
