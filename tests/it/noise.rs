//! Noise equals torch's CPU generator. Goldens: `fixtures/samplers.py`.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use sdgen::sampling::noise::{Generator, Variation};

const SEEDS: [u64; 5] = [0, 42, (1 << 32) + 5, (1 << 63) + 12345, u64::MAX];

fn goldens() -> HashMap<String, Tensor> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/samplers/noise.safetensors"
    );
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// torch's logarithm, sine and cosine depend on the processor it ran on, in the last bits: of
/// radius times cosine, that is an absolute error of a few ulp of the radius, which is below 7
/// (5e-7 measured).
fn assert_same(actual: &[f32], expected: &Tensor, name: &str) {
    let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(actual.len(), expected.len(), "{name}");
    for (i, (a, e)) in actual.iter().zip(&expected).enumerate() {
        assert!((a - e).abs() <= 1e-6, "{name}[{i}]: {a} is not {e}");
    }
}

#[test]
fn every_size_around_the_blocks_of_sixteen_equals_torch() {
    let goldens = goldens();
    for (k, seed) in SEEDS.into_iter().enumerate() {
        for n in (1..=40).chain([1000]) {
            let name = format!("{k}.{n}");
            assert_same(&Generator::new(seed).randn(n), &goldens[&name], &name);
        }
    }
}

#[test]
fn successive_draws_keep_the_spare_normal_as_torch_does() {
    let goldens = goldens();
    for (k, seed) in SEEDS.into_iter().enumerate() {
        let mut generator = Generator::new(seed);
        let sizes = [1, 16, 3, 7, 33, 2, 1, 256];
        let drawn: Vec<f32> = sizes.into_iter().flat_map(|n| generator.randn(n)).collect();
        let name = format!("{k}.mixed");
        assert_same(&drawn, &goldens[&name], &name);
    }
}

#[test]
fn latents_of_512_pixels_equal_torch() {
    let goldens = goldens();
    let drawn = Generator::new(42).randn(16384);
    let sampled: Vec<f32> = drawn.iter().step_by(16).copied().collect();
    assert_same(&sampled, &goldens["1.16384"], "every sixteenth of 16384");
    let drawn = Generator::new(42).randn(16385);
    assert_same(
        &drawn[16385 - 2048..],
        &goldens["1.16385"],
        "the end of 16385",
    );
}

#[test]
fn a_picture_is_drawn_channels_first_and_laid_out_channels_last() {
    let latents = Generator::new(42).latents(6, 5, 4).unwrap();
    assert_eq!(latents.dims(), [1, 6, 5, 4]);
    let values = latents.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_same(&values, &goldens()["picture"], "picture");
}

#[test]
fn only_the_low_half_of_a_seed_counts_as_in_torch() {
    assert_eq!(
        Generator::new(5).randn(20),
        Generator::new((1 << 32) + 5).randn(20)
    );
    assert_ne!(Generator::new(5).randn(20), Generator::new(6).randn(20));
}

/// Values of torch for `sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b`, w the angle between all
/// of a and all of b.
#[test]
fn varied_noise_lies_on_the_arc_between_two_seeds() {
    let noise = |seed| Generator::new(seed).latents(8, 8, 4).unwrap();
    let values = |latents: Tensor| latents.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let varied = |seed, strength| values(Variation { seed: 9, strength }.of(&noise(seed)).unwrap());
    let between = varied(7, 0.3);
    let expected = [-1.211711, 0.678762, 0.548919, -0.250605, -0.11751, 0.546373];
    for (a, e) in between[..4].iter().chain(&between[254..]).zip(expected) {
        assert!((a - e).abs() <= 1e-6, "{a} is not {e}");
    }
    assert_eq!(varied(7, 0.0), values(noise(7)));
    assert_eq!(varied(7, 1.0), values(noise(9)));
    // no angle to divide by
    assert!(
        varied(9, 0.4)
            .iter()
            .zip(values(noise(9)))
            .all(|(a, b)| (a - b).abs() <= 1e-6)
    );
}
