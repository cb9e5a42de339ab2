#!/usr/bin/env bash
# One would guess: in candle `tensor / 3.0` is a division, rounded once, as `x / 3.0` of two f32 is.
# So it is: candle-core multiplies by the reciprocal of the scalar, which is rounded before; about a third of f32 quotients by 3 differ in the last bit.
# It hits whoever ports a network to candle and compares bits with another program: latents divided by a scaling factor, scores by a root.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > Cargo.toml <<'TOML'
[package]
name = "probe"
version = "0.0.0"
edition = "2021"
[dependencies]
candle-core = "=0.11.1"
TOML
mkdir src
cat > src/main.rs <<'RUST'
use candle_core::{Device, Result, Tensor};

fn main() -> Result<()> {
    let values: Vec<f32> = (1..=100_000u32).map(|i| i as f32 / 7.0).collect();
    let tensor = Tensor::new(values.as_slice(), &Device::Cpu)?;
    for divisor in [3.0f64, 0.18215, 8.0] {
        let candle = (&tensor / divisor)?.to_vec1::<f32>()?;
        let differ = candle.iter().zip(&values).filter(|(c, v)| **c != **v / divisor as f32).count();
        println!("candle-core 0.11.1: {differ} of {} quotients by {divisor} differ from f32 division", values.len());
        // a power of two has an exact reciprocal
        assert_eq!(differ > 0, divisor != 8.0, "this has changed");
    }
    Ok(())
}
RUST
cargo run --quiet
