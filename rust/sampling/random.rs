//! NumPy's random stream: `PCG64` and bounded integers.
//!
//! `PCG64` is XSL-RR 128/64 of O'Neill's PCG paper. Bounded integers follow Lemire ("Fast Random
//! Integer Generation in an Interval", 2019), as in `numpy.random.Generator`.

/// NumPy's `Generator(PCG64)`, as far as bounded integers need it.
#[derive(Debug, Clone)]
pub struct Generator {
    state: u128,
    increment: u128,
    /// The high half of a 64-bit word, kept for the next 32-bit one.
    half: Option<u32>,
}

impl Generator {
    const MULTIPLIER: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;

    /// The generator of a fresh `default_rng`, by the `state` and `inc` of its PCG64.
    pub fn new(state: u128, increment: u128) -> Self {
        Self { state, increment, half: None }
    }

    fn advance(&mut self) {
        self.state = self.state.wrapping_mul(Self::MULTIPLIER).wrapping_add(self.increment);
    }

    fn next_u64(&mut self) -> u64 {
        self.advance();
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        folded.rotate_right((self.state >> 122) as u32)
    }

    /// The low half of a 64-bit word, then its high half, even if 64-bit words come between.
    fn next_u32(&mut self) -> u32 {
        self.half.take().unwrap_or_else(|| {
            let both = self.next_u64();
            self.half = Some((both >> 32) as u32);
            both as u32
        })
    }

    /// Puts 0 up to the length of `out` in the order of `Generator.permutation`.
    pub fn permute(&mut self, out: &mut [i64]) {
        for (item, number) in out.iter_mut().zip(0..) {
            *item = number;
        }
        for last in (1..out.len()).rev() {
            out.swap(last, self.masked(last as u64) as usize);
        }
    }

    /// A random integer of [0, last], from as few bits as `last` has, again until it is inside.
    fn masked(&mut self, last: u64) -> u64 {
        let mask = u64::MAX >> last.leading_zeros();
        loop {
            let narrow = last <= u64::from(u32::MAX);
            let bits = if narrow { u64::from(self.next_u32()) } else { self.next_u64() };
            if bits & mask <= last {
                return bits & mask;
            }
        }
    }

    /// A random integer of the closed range [0, last].
    pub fn bounded(&mut self, last: u64) -> u64 {
        match u32::try_from(last) {
            Ok(0) => 0,
            Ok(u32::MAX) => u64::from(self.next_u32()),
            Ok(last) => u64::from(self.bounded_u32(last + 1)),
            Err(_) => self.bounded_u64(last + 1),
        }
    }

    fn bounded_u32(&mut self, count: u32) -> u32 {
        let mut product = u64::from(self.next_u32()) * u64::from(count);
        if (product as u32) < count {
            let threshold = count.wrapping_neg() % count;
            while (product as u32) < threshold {
                product = u64::from(self.next_u32()) * u64::from(count);
            }
        }
        (product >> 32) as u32
    }

    fn bounded_u64(&mut self, count: u64) -> u64 {
        let mut product = u128::from(self.next_u64()) * u128::from(count);
        if (product as u64) < count {
            let threshold = count.wrapping_neg() % count;
            while (product as u64) < threshold {
                product = u128::from(self.next_u64()) * u128::from(count);
            }
        }
        (product >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `default_rng(0).integers(0, last, size=3, dtype=np.uint64, endpoint=True)`, with rejections.
    #[test]
    fn bounded_integers_are_those_of_numpy() {
        let state = 0x1aa1_b534_5996_452d_0958_5eb7_a695_61e3;
        let generator = Generator::new(state, 0x418d_dadb_3af7_1a82_5881_33bc_4478_73a9);
        for (last, expected) in [
            (9, [8, 6, 5]),
            (3 << 30, [2051797211, 1646485849, 869043834]),
            (u64::from(u32::MAX), [3653403231, 2735729615, 2195314465]),
            ((1 << 40) + 12345, [700346789521, 296633632133, 45050866504]),
            (1 << 63, [2488343231644625808, 152440531369162766, 8418684267946577447]),
        ] {
            let mut generator = generator.clone();
            assert_eq!([(); 3].map(|()| generator.bounded(last)), expected, "{last}");
        }
    }
}
