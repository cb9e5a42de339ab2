//! What pictures will be, while they are denoised: a linear map from latents to small pictures.

use crate::image::Image;
use crate::model::{Autoencoder, BackboneConfig, LatentFormat};
use candle_core::{DType, Result, Tensor};

/// The latents of Stable Diffusion 1.x's and 2.x's VAEs.
const STABLE_DIFFUSION: LatentFormat = LatentFormat {
    channels: 4,
    scaling_factor: 0.18215,
    shift_factor: 0.0,
};
/// Each latent's share of red, green and blue in -1..=1, K. Turner 2022
/// (discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204).
const SHARES: [[f32; 3]; 4] = [
    [0.298, 0.207, 0.208],
    [0.187, 0.286, 0.173],
    [-0.158, 0.189, 0.264],
    [-0.184, -0.271, -0.473],
];
/// The latents of SDXL's VAE.
const SDXL: LatentFormat = LatentFormat {
    scaling_factor: 0.13025,
    ..STABLE_DIFFUSION
};
/// The same shares of its latents and, last, a constant: those that are published with ComfyUI
/// (comfy/latent_formats.py).
const SDXL_SHARES: [[f32; 3]; 5] = [
    [0.3651, 0.4232, 0.4341],
    [-0.2533, -0.0042, 0.1068],
    [0.1076, 0.1111, -0.0362],
    [-0.3165, -0.2492, -0.2188],
    [0.1084, -0.0175, -0.0011],
];
/// The latents of FLUX.1's VAE, and their shares, from the same place.
const FLUX1: LatentFormat = LatentFormat {
    channels: 16,
    scaling_factor: 0.3611,
    shift_factor: 0.1159,
};
const FLUX1_SHARES: [[f32; 3]; 17] = [
    [-0.0346, 0.0244, 0.0681],
    [0.0034, 0.021, 0.0687],
    [0.0275, -0.0668, -0.0433],
    [-0.0174, 0.016, 0.0617],
    [0.0859, 0.0721, 0.0329],
    [0.0004, 0.0383, 0.0115],
    [0.0405, 0.0861, 0.0915],
    [-0.0236, -0.0185, -0.0259],
    [-0.0245, 0.025, 0.118],
    [0.1008, 0.0755, -0.0421],
    [-0.0515, 0.0201, 0.0011],
    [0.0428, -0.0012, -0.0036],
    [0.0817, 0.0765, 0.0749],
    [-0.1264, -0.0522, -0.1103],
    [-0.028, -0.0881, -0.0499],
    [-0.1262, -0.0982, -0.0778],
    [-0.0329, -0.0718, -0.0851],
];
/// The latents of Stable Diffusion 3's VAE, and their shares, from the same place.
const SD3: LatentFormat = LatentFormat {
    channels: 16,
    scaling_factor: 1.5305,
    shift_factor: 0.0609,
};
const SD3_SHARES: [[f32; 3]; 17] = [
    [-0.0922, -0.0175, 0.0749],
    [0.0311, 0.0633, 0.0954],
    [0.1994, 0.0927, 0.0458],
    [0.0856, 0.0339, 0.0902],
    [0.0587, 0.0272, -0.0496],
    [-0.0006, 0.1104, 0.0309],
    [0.0978, 0.0306, 0.0427],
    [-0.0042, 0.1038, 0.1358],
    [-0.0194, 0.002, 0.0669],
    [-0.0488, 0.013, -0.0268],
    [0.0922, 0.0988, 0.0951],
    [-0.0278, 0.0524, -0.0542],
    [0.0332, 0.0456, 0.0895],
    [-0.0069, -0.003, -0.081],
    [-0.0596, -0.0465, -0.0293],
    [-0.1448, -0.1463, -0.1189],
    [0.2394, 0.2135, 0.1925],
];
/// The latents of FLUX.2's VAE as its network sees them, each of 2x2 of the VAE's, and the shares of
/// these, from the same place.
const FLUX2: LatentFormat = LatentFormat {
    channels: 128,
    scaling_factor: 1.0,
    shift_factor: 0.0,
};
const FLUX2_SHARES: [[f32; 3]; 33] = [
    [0.0058, 0.0113, 0.0073],
    [0.0495, 0.0443, 0.0836],
    [-0.0099, 0.0096, 0.0644],
    [0.2144, 0.3009, 0.3652],
    [0.0166, -0.0039, -0.0054],
    [0.0157, 0.0103, -0.016],
    [-0.0398, 0.0902, -0.0235],
    [-0.0052, 0.0095, 0.0109],
    [-0.3527, -0.2712, -0.1666],
    [-0.0301, -0.0356, -0.018],
    [-0.0107, 0.0078, 0.0013],
    [0.0746, 0.009, -0.0941],
    [0.0156, 0.0169, 0.007],
    [-0.0034, -0.004, -0.0114],
    [0.0032, 0.0181, 0.008],
    [-0.0939, -0.0008, 0.0186],
    [0.0018, 0.0043, 0.0104],
    [0.0284, 0.0056, -0.0127],
    [-0.0024, -0.0022, -0.003],
    [0.1207, -0.0026, 0.0065],
    [0.0128, 0.0101, 0.0142],
    [0.0137, -0.0072, -0.0007],
    [0.0095, 0.0092, -0.0059],
    [0.0, -0.0077, -0.0049],
    [-0.0465, -0.0204, -0.0312],
    [0.0095, 0.0012, -0.0066],
    [0.029, -0.0034, 0.0025],
    [0.022, 0.0169, -0.0048],
    [-0.0332, -0.0457, -0.0468],
    [-0.0085, 0.0389, 0.0609],
    [-0.0076, 0.0003, -0.0043],
    [-0.0111, -0.046, -0.0614],
    [-0.0329, -0.0718, -0.0851],
];
/// The latents of the embedded model's VAE.
const MINI: LatentFormat = LatentFormat {
    channels: 32,
    scaling_factor: 0.7492,
    shift_factor: 0.0,
};
/// Fitted by `assets/mini/preview.py`: a row for each value of [4, 4, 3], with a share for each
/// latent and a constant.
const MINI_ROWS: &str = include_str!("../../assets/mini/preview.json");

/// A map from the channels of a latent to `side` x `side` pixels of RGB.
pub struct PreviewMap {
    side: usize,
    /// [side * side * 3][channels + 1]: the channels' shares and a constant, for values in 0..=1
    rows: Vec<Vec<f32>>,
}

impl PreviewMap {
    /// The map of a VAE's latents, if one is known. TAESD's own scale does not tell whose latents
    /// it decodes: those of its model, which may be of SDXL's family.
    pub fn of(vae: &Autoencoder, model: &BackboneConfig, is_sdxl: bool) -> Option<Self> {
        let of_model = match model {
            BackboneConfig::UNet(_) if is_sdxl => SDXL,
            BackboneConfig::UNet(_) => STABLE_DIFFUSION,
            BackboneConfig::Sd3(_) => SD3,
            BackboneConfig::Flux(_) | BackboneConfig::ZImage(_) => FLUX1,
            BackboneConfig::Flux2(_) => FLUX2,
        };
        let format = match vae {
            Autoencoder::Kl(vae) => vae.latent_format(),
            Autoencoder::Tiny(vae) if vae.latent_channels == of_model.channels => of_model,
            Autoencoder::Tiny(_) => return None,
        };
        let of_table = |table: &[[f32; 3]], side| {
            let (constant, shares) = table.split_last()?;
            Some(Self::of_shares(shares, *constant, side))
        };
        if format == STABLE_DIFFUSION {
            Some(Self::of_shares(&SHARES, [0.0; 3], 1))
        } else if format == SDXL {
            of_table(&SDXL_SHARES, 1)
        } else if format == FLUX1 {
            of_table(&FLUX1_SHARES, 1)
        } else if format == SD3 {
            of_table(&SD3_SHARES, 1)
        } else if format == FLUX2 {
            of_table(&FLUX2_SHARES, 2)
        } else if format == MINI {
            Some(Self {
                side: 4,
                rows: serde_json::from_str(MINI_ROWS).ok()?,
            })
        } else {
            None
        }
    }

    /// Of shares and constants for values in -1..=1, where each latent has `side` x `side` values of
    /// each share, one for each pixel.
    fn of_shares(shares: &[[f32; 3]], constant: [f32; 3], side: usize) -> Self {
        let pixels = side * side;
        let row = |i: usize| {
            let (pixel, colour) = (i / 3, i % 3);
            let share = |shares: &[f32; 3], at: usize| match at == pixel {
                true => shares[colour] / 2.0,
                false => 0.0,
            };
            let shares = shares.iter();
            shares
                .flat_map(|shares| (0..pixels).map(move |at| share(shares, at)))
                .chain([constant[colour] / 2.0 + 0.5])
                .collect()
        };
        Self {
            side,
            rows: (0..pixels * 3).map(row).collect(),
        }
    }

    /// Latents [b, h, w, c] to pictures, side by side. What is not finite is black. Errors if the
    /// tensor cannot be read.
    pub fn picture(&self, latents: &Tensor) -> Result<Image> {
        let (b, h, w, c) = latents.dims4()?;
        let values = latents
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1::<f32>()?; // [b*h*w*c]
        let side = self.side;
        let (width, height) = (b * w * side, h * side);
        let mut rgb = vec![0; width * height * 3];
        for (place, latent) in values.chunks_exact(c.max(1)).enumerate() {
            let (picture, y, x) = (place / (h * w), place / w % h, place % w);
            for (i, row) in self.rows.iter().enumerate() {
                let (pixel_y, pixel_x) = (
                    y * side + i / 3 / side,
                    (picture * w + x) * side + i / 3 % side,
                );
                let value: f32 = row
                    .iter()
                    .zip(latent.iter().chain([&1.0]))
                    .map(|(share, value)| share * value)
                    .sum();
                rgb[(pixel_y * width + pixel_x) * 3 + i % 3] =
                    (value * 255.0).round_ties_even() as u8;
            }
        }
        Ok(Image { width, height, rgb })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::flux::FluxConfig;
    use crate::model::vae::{Decoder, VaeConfig};
    use crate::nn::Forward;
    use crate::sampling::noise::Generator;
    use crate::weights::{Checkpoint, Origin};
    use anyhow::Context;
    use candle_core::Device;

    #[test]
    fn what_is_not_finite_is_black_and_pictures_stand_side_by_side() -> Result<()> {
        let vae = Autoencoder::Kl(VaeConfig::default());
        let Some(preview) = PreviewMap::of(&vae, &unet(), false) else {
            candle_core::bail!("no preview of Stable Diffusion")
        };
        let latents = [
            [0.0; 4],
            [1.0, 0.0, 0.0, 0.0],
            [f32::NAN, 0.0, 0.0, 0.0],
            [f32::NEG_INFINITY, 0.0, 0.0, 0.0],
        ];
        let picture =
            preview.picture(&Tensor::new(&latents, &Device::Cpu)?.reshape((2, 2, 1, 4))?)?;
        // [2, 2, 3]: the second picture's pixels are to the right of the first's
        let rgb = [[128, 128, 128], [0, 0, 0], [165, 154, 154], [0, 0, 0]].concat();
        assert_eq!(
            picture,
            Image {
                width: 2,
                height: 2,
                rgb
            }
        );
        Ok(())
    }

    fn unet() -> BackboneConfig {
        BackboneConfig::UNet(Box::default())
    }

    /// The picture of one pixel, if there is a map.
    fn pixel(vae: &str, is_sdxl: bool, latent: [f32; 4]) -> anyhow::Result<Option<Vec<u8>>> {
        let preview = PreviewMap::of(
            &Autoencoder::from_json(&serde_json::from_str(vae)?)?,
            &unet(),
            is_sdxl,
        );
        let latent = Tensor::new(&latent, &Device::Cpu)?.reshape((1, 1, 1, 4))?;
        Ok(preview
            .map(|preview| preview.picture(&latent))
            .transpose()?
            .map(|picture| picture.rgb))
    }

    #[test]
    fn sdxls_latents_have_a_map_of_their_own_and_taesd_takes_its_models() -> anyhow::Result<()> {
        let kl = |scale: f64| {
            format!(r#"{{"_class_name": "AutoencoderKL", "scaling_factor": {scale}}}"#)
        };
        let tiny = r#"{"_class_name": "AutoencoderTiny"}"#;
        let (grey, first) = ([0.0; 4], [1.0, 0.0, 0.0, 0.0]);
        for vae in [&*kl(0.13025), tiny] {
            assert_eq!(pixel(vae, true, grey)?, Some(vec![141, 125, 127]), "{vae}");
            assert_eq!(pixel(vae, true, first)?, Some(vec![188, 179, 183]), "{vae}");
        }
        for vae in [&*kl(0.18215), tiny] {
            assert_eq!(
                pixel(vae, false, first)?,
                Some(vec![165, 154, 154]),
                "{vae}"
            );
        }
        assert_eq!(pixel(&kl(0.37), true, grey)?, None);
        Ok(())
    }

    #[test]
    fn latents_of_flux_have_their_maps_and_those_of_the_second_four_pixels() -> anyhow::Result<()> {
        let map = |vae: &str| -> anyhow::Result<PreviewMap> {
            let vae = Autoencoder::from_json(&serde_json::from_str(vae)?)?;
            let flux = BackboneConfig::Flux(FluxConfig::default());
            PreviewMap::of(&vae, &flux, false).context("no map")
        };
        let first = map(
            r#"{"_class_name": "AutoencoderKL", "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}"#,
        )?;
        let mut latent = vec![0f32; 16];
        latent[9] = 2.0;
        let picture = first.picture(&Tensor::new(latent, &Device::Cpu)?.reshape((1, 1, 1, 16))?)?;
        // 127.5 * (1 + constant + 2 * share)
        assert_eq!(picture.rgb, [149, 138, 106]);
        let tiny = map(r#"{"_class_name": "AutoencoderTiny", "latent_channels": 16}"#)?;
        assert_eq!(tiny.rows, first.rows);
        // Stable Diffusion 3's is another one of as many channels
        let third = map(
            r#"{"_class_name": "AutoencoderKL", "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}"#,
        )?;
        let grey = third.picture(&Tensor::zeros((1, 1, 1, 16), DType::F32, &Device::Cpu)?)?;
        assert_eq!(grey.rgb, [158, 155, 152]);
        let second = map(r#"{"_class_name": "AutoencoderKLFlux2", "latent_channels": 32}"#)?;
        // the VAE's channel 3, of the pixel at the bottom left
        let mut latent = vec![0f32; 128];
        latent[3 * 4 + 2] = 1.0;
        let picture =
            second.picture(&Tensor::new(latent, &Device::Cpu)?.reshape((1, 1, 1, 128))?)?;
        assert_eq!((picture.width, picture.height), (2, 2));
        let grey = [123, 118, 117];
        assert_eq!(picture.rgb, [grey, grey, [151, 157, 163], grey].concat());
        Ok(())
    }

    /// The map has to be fitted again when the VAE is another.
    #[test]
    fn a_preview_of_the_embedded_models_latents_looks_like_what_they_decode_to()
    -> anyhow::Result<()> {
        let checkpoint = Checkpoint::open(Origin::Embedded)?;
        let vae = VaeConfig::from_json(checkpoint.config("vae")?)?;
        let preview = PreviewMap::of(&Autoencoder::Kl(vae.clone()), &unet(), false)
            .context("no preview of the embedded model")?;
        let decoder = Decoder::new(&checkpoint.weights("vae", &Device::Cpu, DType::F32), &vae)?;
        let latents = Generator::new(1).latents(8, 8, 32)?;
        let decoded = decoder
            .decode(Forward::on(&Device::Cpu), &latents)?
            .clamp(0f32, 1f32)?; // [1, 128, 128, 3]
        let small = decoded
            .reshape((32, 4, 32, 4, 3))?
            .mean((1, 3))?
            .flatten_all()?
            .to_vec1::<f32>()?; // [32*32*3]
        let shown = preview.picture(&latents)?;
        assert_eq!((shown.width, shown.height), (32, 32));
        let mean = small.iter().sum::<f32>() / small.len() as f32;
        let variance: f32 = small.iter().map(|value| (value - mean).powi(2)).sum();
        let error: f32 = small
            .iter()
            .zip(&shown.rgb)
            .map(|(value, shown)| (value - f32::from(*shown) / 255.0).powi(2))
            .sum();
        // noise is no picture, and the map is one of pictures: 0.70; a map of other latents has
        // more error than variance
        assert!(error < 0.85 * variance, "{}", error / variance);
        Ok(())
    }
}
