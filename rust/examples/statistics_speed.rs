#![allow(unsafe_code)]
use dump_activations::checksum::Element;
use dump_activations::statistics::{Statistics, Vectors};

fn now() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}
fn main() {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 40) as f32 / 16777216.0
    };
    let n = 4 << 20;
    let data: Vec<f32> = (0..n).map(|_| next() + next() + next() + next() - 2.0).collect();
    let f32b: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
    let bf: Vec<u8> =
        data.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect();
    let h: Vec<u8> = data
        .iter()
        .flat_map(|x| {
            (((x.to_bits() >> 13 & 0x3ffff).wrapping_sub(112 << 10)) as u16 & 0x3fff).to_le_bytes()
        })
        .collect();
    let mut best = f64::MAX;
    for _ in 0..9 {
        let t = now();
        let mut d = dump_activations::checksum::Digester::new(Element::Float32);
        d.update(&f32b);
        std::hint::black_box(d.finish());
        best = best.min(now() - t);
    }
    println!("digest: {:.2} GB/s", f32b.len() as f64 / best / 1e9);
    for (name, element, bytes) in [
        ("f32", Element::Float32, &f32b),
        ("bf16", Element::BFloat16, &bf),
        ("f16", Element::Float16, &h),
    ] {
        for (layers, run, width) in
            [(4, 16, 64), (12, 16, 512), (1, 16, 64), (1, 4, 34), (4, 64, 16)]
        {
            let v = Vectors { element, layers, run, width };
            let s = Statistics::new(v).unwrap();
            let span = (4 << 20) / v.nbytes() * v.nbytes();
            let mut best = f64::MAX;
            for _ in 0..9 {
                let t = now();
                let mut first = 0u64;
                for piece in bytes.chunks(span) {
                    let piece = &piece[..piece.len() / v.nbytes() * v.nbytes()];
                    s.add(first, piece).unwrap();
                    first += (piece.len() / v.nbytes()) as u64;
                }
                best = best.min(now() - t);
            }
            println!("{name} {layers}x{run}x{width}: {:.2} GB/s", bytes.len() as f64 / best / 1e9);
        }
    }
}
