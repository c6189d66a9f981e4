//! NumPy's random stream: `SeedSequence`, `PCG64` and bounded integers.
//!
//! `SeedSequence` and `PCG64` (XSL-RR 128/64) as in O'Neill's `randutils` and PCG papers; bounded draws by Lemire's
//! method ("Fast Random Integer Generation in an Interval", 2019), as `numpy.random.Generator` does them.

/// NumPy's `Generator(PCG64(seed))`, as far as bounded integers need it.
#[derive(Debug, Clone)]
pub struct Generator {
    state: u128,
    increment: u128,
    /// The high half of a 64-bit draw, kept for the next 32-bit one.
    half: Option<u32>,
}

impl Generator {
    const MULTIPLIER: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;

    pub fn new(seed: &[u32]) -> Self {
        let [state_high, state_low, stream_high, stream_low] = seed_state(seed);
        let wide = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
        let increment = wide(stream_high, stream_low) << 1 | 1;
        let mut generator = Self { state: 0, increment, half: None };
        generator.advance();
        generator.state = generator.state.wrapping_add(wide(state_high, state_low));
        generator.advance();
        generator
    }

    fn advance(&mut self) {
        self.state = self.state.wrapping_mul(Self::MULTIPLIER).wrapping_add(self.increment);
    }

    fn next_u64(&mut self) -> u64 {
        self.advance();
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        folded.rotate_right((self.state >> 122) as u32)
    }

    /// The low half of a 64-bit draw, then its high half, whatever 64-bit draws come between.
    fn next_u32(&mut self) -> u32 {
        self.half.take().unwrap_or_else(|| {
            let both = self.next_u64();
            self.half = Some((both >> 32) as u32);
            both as u32
        })
    }

    /// A draw on the closed range [0, last].
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

/// `SeedSequence(seed).generate_state(4, uint64)`.
fn seed_state(seed: &[u32]) -> [u64; 4] {
    const POOL: usize = 4;
    let mut constant: u32 = 0x43b0_d7e5;
    let mut hash = |value: u32| {
        let value = value ^ constant;
        constant = constant.wrapping_mul(0x931e_8875);
        let value = value.wrapping_mul(constant);
        value ^ value >> 16
    };
    let mix = |one: u32, two: u32| {
        let mixed = one.wrapping_mul(0xca01_f9dd).wrapping_sub(two.wrapping_mul(0x4973_f715));
        mixed ^ mixed >> 16
    };
    let mut pool: [u32; POOL] =
        std::array::from_fn(|word| hash(seed.get(word).copied().unwrap_or(0)));
    for source in 0..POOL {
        for target in 0..POOL {
            if source != target {
                pool[target] = mix(pool[target], hash(pool[source]));
            }
        }
    }
    for &word in seed.iter().skip(POOL) {
        for target in &mut pool {
            *target = mix(*target, hash(word));
        }
    }

    let mut constant: u32 = 0x8b51_f9dd;
    let words: [u32; 2 * POOL] = std::array::from_fn(|word| {
        let value = pool[word % POOL] ^ constant;
        constant = constant.wrapping_mul(0x58f3_8ded);
        let value = value.wrapping_mul(constant);
        value ^ value >> 16
    });
    std::array::from_fn(|word| u64::from(words[2 * word]) | u64::from(words[2 * word + 1]) << 32)
}
