//! Sinusoidal embedding of timesteps and sizes (Vaswani et al. 2017, as in Ho et al. 2020).

use candle_core::{Device, Result, Tensor};

/// Embeds n numbers as [n, dim] in f32. `flip_sin_to_cos` puts the cosines first; `freq_shift` is
/// subtracted from the number of frequencies. Angles are computed in f32 as diffusers does: half
/// precision is off by up to 0.3 at t = 999.
pub fn sinusoids(
    numbers: &[f64],
    dim: usize,
    flip_sin_to_cos: bool,
    freq_shift: f64,
    device: &Device,
) -> Result<Tensor> {
    let half = dim / 2;
    let log_period = -(10_000f32.ln());
    let embed = |t: &f64| {
        let angle = |i: usize| {
            *t as f32 * (log_period * i as f32 / (half as f32 - freq_shift as f32)).exp()
        };
        let (sin, cos): (Vec<f32>, Vec<f32>) = (0..half).map(|i| angle(i).sin_cos()).unzip();
        let mut values = if flip_sin_to_cos {
            [cos, sin].concat()
        } else {
            [sin, cos].concat()
        };
        values.resize(dim, 0.0);
        values
    };
    Tensor::from_vec(
        numbers.iter().flat_map(embed).collect::<Vec<f32>>(),
        (numbers.len(), dim),
        device,
    )
}

/// Embeds a guidance scale as [1, dim] in f32, as latent consistency models take it (Luo et al.
/// 2023, arXiv 2310.04378): w = scale - 1, which is 0 where classifier-free guidance is off.
pub fn guidance(scale: f64, dim: usize, device: &Device) -> Result<Tensor> {
    sinusoids(&[1000.0 * (scale - 1.0)], dim, false, 1.0, device)
}
