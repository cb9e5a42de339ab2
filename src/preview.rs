//! What pictures will be, while they are denoised: a linear map from latents to small pictures.

use crate::image::Picture;
use crate::model::vae::VaeConfig;
use candle_core::{DType, Result, Tensor};

/// Latent channels and scaling factor of Stable Diffusion 1.x's and 2.x's VAEs.
const STABLE_DIFFUSION: (usize, f64) = (4, 0.18215);
/// Each latent's share of red, green and blue in -1..=1, K. Turner 2022
/// (discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204).
const SHARES: [[f32; 3]; 4] = [[0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473]];
/// Of the embedded model's VAE.
const MINI: (usize, f64) = (32, 0.7492);
/// Fitted by `assets/mini/preview.py`: a row for each value of [4, 4, 3], with a share for each latent and a constant.
const MINI_ROWS: &str = include_str!("../assets/mini/preview.json");

/// A map from the channels of a latent to `side` x `side` pixels of RGB.
pub struct Preview {
    side: usize,
    /// [side * side * 3][channels + 1]: the channels' shares and a constant, for values in 0..=1
    rows: Vec<Vec<f32>>,
}

impl Preview {
    /// The map of a VAE, if one is known.
    pub fn of(vae: &VaeConfig) -> Option<Self> {
        match (vae.latent_channels, vae.scaling_factor) {
            STABLE_DIFFUSION => {
                let row = |colour: usize| SHARES.iter().map(|shares| shares[colour] / 2.0).chain([0.5]).collect();
                Some(Self { side: 1, rows: (0..3).map(row).collect() })
            }
            MINI => Some(Self { side: 4, rows: serde_json::from_str(MINI_ROWS).ok()? }),
            _ => None,
        }
    }

    /// Latents [b, h, w, c] to pictures, side by side. What is not finite is black. Errors if the tensor cannot be read.
    pub fn picture(&self, latents: &Tensor) -> Result<Picture> {
        let (b, h, w, c) = latents.dims4()?;
        let values = latents.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?; // [b*h*w*c]
        let side = self.side;
        let (width, height) = (b * w * side, h * side);
        let mut rgb = vec![0; width * height * 3];
        for (place, latent) in values.chunks_exact(c.max(1)).enumerate() {
            let (picture, y, x) = (place / (h * w), place / w % h, place % w);
            for (i, row) in self.rows.iter().enumerate() {
                let (pixel_y, pixel_x) = (y * side + i / 3 / side, (picture * w + x) * side + i / 3 % side);
                let value: f32 = row.iter().zip(latent.iter().chain([&1.0])).map(|(share, value)| share * value).sum();
                rgb[(pixel_y * width + pixel_x) * 3 + i % 3] = (value * 255.0).round_ties_even() as u8;
            }
        }
        Ok(Picture { width, height, rgb })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::vae::Decoder;
    use crate::noise::Generator;
    use crate::weights::{Checkpoint, Origin};
    use anyhow::Context;
    use candle_core::Device;

    #[test]
    fn what_is_not_finite_is_black_and_pictures_stand_side_by_side() -> Result<()> {
        let Some(preview) = Preview::of(&VaeConfig::default()) else { candle_core::bail!("no preview of Stable Diffusion") };
        let latents = [[0.0; 4], [1.0, 0.0, 0.0, 0.0], [f32::NAN, 0.0, 0.0, 0.0], [f32::NEG_INFINITY, 0.0, 0.0, 0.0]];
        let picture = preview.picture(&Tensor::new(&latents, &Device::Cpu)?.reshape((2, 2, 1, 4))?)?;
        // [2, 2, 3]: the second picture's pixels are to the right of the first's
        let rgb = [[128, 128, 128], [0, 0, 0], [165, 154, 154], [0, 0, 0]].concat();
        assert_eq!(picture, Picture { width: 2, height: 2, rgb });
        Ok(())
    }

    /// The map has to be fitted again when the VAE is another.
    #[test]
    fn a_preview_of_the_embedded_models_latents_looks_like_what_they_decode_to() -> anyhow::Result<()> {
        let checkpoint = Checkpoint::open(Origin::Embedded)?;
        let vae = VaeConfig::from_json(checkpoint.config("vae")?)?;
        let preview = Preview::of(&vae).context("no preview of the embedded model")?;
        let decoder = Decoder::new(&checkpoint.weights("vae", &Device::Cpu, DType::F32), &vae)?;
        let latents = Generator::new(1).latents(8, 8, 32)?;
        let decoded = decoder.decode(&latents)?.clamp(0f32, 1f32)?; // [1, 128, 128, 3]
        let small = decoded.reshape((32, 4, 32, 4, 3))?.mean((1, 3))?.flatten_all()?.to_vec1::<f32>()?; // [32*32*3]
        let shown = preview.picture(&latents)?;
        assert_eq!((shown.width, shown.height), (32, 32));
        let mean = small.iter().sum::<f32>() / small.len() as f32;
        let variance: f32 = small.iter().map(|value| (value - mean).powi(2)).sum();
        let error: f32 = small.iter().zip(&shown.rgb).map(|(value, shown)| (value - f32::from(*shown) / 255.0).powi(2)).sum();
        // noise is no picture, and the map is one of pictures: 0.70; a map of other latents has more error than variance
        assert!(error < 0.85 * variance, "{}", error / variance);
        Ok(())
    }
}
