//! The embedded model: sentence in, picture out, with nothing but the program.
//!
//! The goldens are pictures of this program. Platforms differ in the last bits of their sums, so
//! they are compared by PSNR.

use crate::common::{fixture, sdgen, stderr, succeed};
use image::RgbImage;
use std::path::Path;

fn draw(folder: &Path, prompt: &str, options: &[&str]) -> RgbImage {
    let path = folder.join("drawn.png");
    succeed(
        sdgen(folder)
            .arg(prompt)
            .args(["--force", "-q", "-o"])
            .arg(&path)
            .args(options),
    );
    image::open(path).unwrap().to_rgb8()
}

/// Peak signal-to-noise ratio, dB.
fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    assert_eq!(a.dimensions(), b.dimensions());
    let square: f64 = a
        .as_raw()
        .iter()
        .zip(b.as_raw())
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
        .sum();
    10.0 * (255f64.powi(2) * a.as_raw().len() as f64 / square).log10()
}

/// dB of a difference of one level in every value, 20 log10(255). What another order of sums or a
/// narrower type does is less: here the goldens are met by 95 dB and more.
const ONE_LEVEL_DB: f64 = 48.1;

/// dB of a difference that everybody sees: 8 levels in the mean square.
const VISIBLE_DB: f64 = 30.0;

/// Mean step between neighbouring pixels of a row, in levels: 2 to 5 in what the model draws, about
/// 85 in noise.
fn roughness(picture: &RgbImage) -> f64 {
    let (w, h) = picture.dimensions();
    let step = |(x, y): (u32, u32)| {
        f64::from(picture.get_pixel(x, y)[0].abs_diff(picture.get_pixel(x + 1, y)[0]))
    };
    (0..h)
        .flat_map(|y| (0..w - 1).map(move |x| (x, y)))
        .map(step)
        .sum::<f64>()
        / f64::from((w - 1) * h)
}

#[test]
fn known_sentences_give_the_golden_pictures() {
    let dir = tempfile::tempdir().unwrap();
    for (prompt, golden) in [
        ("a frog in a top hat", "frog.png"),
        ("three apples on a yellow background, flat", "apples.png"),
    ] {
        let golden = image::open(fixture("mini").join(golden)).unwrap().to_rgb8();
        let close = psnr(&draw(dir.path(), prompt, &["--seed", "1"]), &golden);
        assert!(close > ONE_LEVEL_DB, "{prompt}: {close} dB");
    }
}

#[test]
fn other_seeds_and_other_words_give_other_pictures() {
    let dir = tempfile::tempdir().unwrap();
    let [first, again, other] =
        ["1", "1", "2"].map(|seed| draw(dir.path(), "a rocket", &["--seed", seed]));
    assert_eq!(first, again);
    // measured: 18 dB for another seed, 10 for another thing
    assert!(psnr(&first, &other) < VISIBLE_DB);
    assert!(psnr(&first, &draw(dir.path(), "a pineapple", &["--seed", "1"])) < VISIBLE_DB);
}

#[test]
fn guidance_changes_the_picture() {
    let dir = tempfile::tempdir().unwrap();
    let [without, with] = ["1", "4"].map(|g| {
        draw(
            dir.path(),
            "a cat wearing a crown",
            &["--seed", "1", "-g", g],
        )
    });
    // measured: 23 dB
    assert!(psnr(&without, &with) < VISIBLE_DB);
}

#[test]
fn words_that_it_does_not_know_give_a_picture_and_no_noise() {
    let dir = tempfile::tempdir().unwrap();
    for prompt in [
        "",
        "qwertz jklö",
        "the mortgage crisis of 2008",
        "🐸",
        "a frog a frog a frog a frog a frog a frog a frog a frog a frog a frog",
    ] {
        let picture = draw(dir.path(), prompt, &["--seed", "3"]);
        // twice what the roughest of them has, a seventh of noise
        assert!(
            roughness(&picture) < 12.0,
            "`{prompt}`: {}",
            roughness(&picture)
        );
    }
}

#[test]
fn narrower_weights_draw_nearly_the_same_picture() {
    let dir = tempfile::tempdir().unwrap();
    let [f32, bf16, f16, int8] = ["f32", "bf16", "f16", "int8"].map(|dtype| {
        draw(
            dir.path(),
            "a frog in a top hat",
            &["--seed", "1", "--dtype", dtype],
        )
    });
    // measured: 59 and 68 dB, where three bits more are 18 dB, and levels are rounded; 42 to 60 dB of
    // 8 bits on 80 prompts
    for (name, narrow, least) in [
        ("bf16", &bf16, ONE_LEVEL_DB),
        ("f16", &f16, ONE_LEVEL_DB + 10.0),
        ("int8", &int8, 40.0),
    ] {
        let close = psnr(&f32, narrow);
        assert!(close > least && close.is_finite(), "{name}: {close} dB");
    }
}

/// What a run says of the embedded model, without drawing.
fn said(args: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut command = sdgen(dir.path());
    stderr(&succeed(command.args(["-s", "1", "--dry-run"]).args(args)))
}

#[test]
fn words_colours_and_sizes_that_the_embedded_model_does_not_know_are_said() {
    for (args, text) in [
        (&["a castle at dusk"][..], "does not know `dusk`\n"),
        (
            &["Zeppelin over a KITCHEN"],
            "does not know `Zeppelin`, `over`, `KITCHEN`\n",
        ),
        (&["a red fish"], "not of things (`red fish`)"),
        (
            &["a frog", "-W", "256"],
            "trained for 128x128 alone, not 256x128",
        ),
    ] {
        let said = said(args);
        assert!(
            said.contains(text) && said.contains("-m sd15"),
            "{args:?}: {said}"
        );
    }
    for args in [
        &["a frog in a top hat"][..],
        &["three strawberries, 3d"],
        &["a robot on a light blue background"],
        &["a black cat, flat on red"],
        &["a frog next to a green apple on yellow background"],
        &["a fox wearing sunglasses and a scarf"],
    ] {
        let said = said(args);
        assert!(!said.contains("warning"), "{args:?}: {said}");
    }
    let other = said(&["a zeppelin", "-m", fixture("sd1").to_str().unwrap()]);
    assert!(!other.contains("embedded"), "{other}");
}
