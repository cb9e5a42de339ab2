//! Pictures of every family, sampler and feature have the pixels that they had when they were taken
//! down.
//!
//! `fixtures/pictures.txt` has a command a line, and below it what it drew: SHA-256 of the pixels,
//! and the mean colours on a grid of 4x4. A processor with AVX2 and without AVX-512, like the one
//! that they were taken down on, draws these very pixels; where instructions sum in another order,
//! the colours decide, within [`TOLERANCE`]. `SDGEN_UPDATE_PICTURES=1` takes the pictures down anew,
//! and `SDGEN_TEST_PROGRAM` names another program that draws them.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use image::{Rgb, RgbImage, Rgba, RgbaImage};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Levels that a mean of a 16th of a picture may be off: two sums of f32 in another order move single values by a level at
/// most, and another seed, sampler or weight moves means by tens.
const TOLERANCE: u8 = 2;
/// The side of the grid of mean colours.
const GRID: u32 = 4;

/// The words of a command, in which double quotes hold words together.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (vec![], None::<String>, false);
    for c in line.chars() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            ' ' if !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// The checkpoints and files that the commands name.
fn prepare(folder: &Path) {
    for model in [
        "sd1",
        "sd2",
        "odd",
        "sdxl",
        "sdxl_refiner",
        "lcm",
        "turbo",
        "ztsnr",
        "bksdm",
        "ssd",
        "vega",
        "taesd",
    ] {
        with_base(model, &folder.join(model));
    }
    for model in ["sd1", "sd2", "sdxl"] {
        let whole = folder.join(format!("{model}-whole"));
        with_full_vocabulary(model, &whole);
        single_file(
            &format!("single_{model}.json"),
            &whole,
            &folder.join(format!("{model}.safetensors")),
        );
    }
    for part in ["lora", "embeddings", "upscaler"] {
        copy_folder(&fixture(part), &folder.join(part));
    }
    let unet = "unet/diffusion_pytorch_model.safetensors";
    for (model, factor) in [("sd1_b", 0.95), ("sd1_c", 1.05)] {
        with_base("sd1", &folder.join(model));
        let path = folder.join(model).join(unet);
        save(
            &load(&path)
                .into_iter()
                .map(|(name, t)| (name, (t * factor).unwrap()))
                .collect(),
            &path,
        );
    }
    for (model, base, more) in [
        ("sd1_inpaint", "sd1", 5),
        ("sdxl_inpaint", "sdxl", 5),
        ("sd1_edit", "sd1", 4),
    ] {
        with_base(base, &folder.join(model));
        let path = folder.join(model).join(unet);
        let mut tensors = load(&path);
        let conv_in = tensors["conv_in.weight"].to_dtype(DType::F32).unwrap();
        let (outputs, inputs, h, w) = conv_in.dims4().unwrap();
        let values = (0..outputs * more * h * w)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 400.0)
            .collect();
        let added = Tensor::from_vec(values, (outputs, more, h, w), &Device::Cpu).unwrap();
        tensors.insert(
            "conv_in.weight".into(),
            Tensor::cat(&[&conv_in, &added], 1).unwrap(),
        );
        save(&tensors, &path);
        edit_json(&folder.join(model).join("unet/config.json"), |config| {
            config.insert("in_channels".into(), (inputs + more).into());
        });
    }
    let colour = |x: u32, y: u32| {
        [255 * x / 40, 255 * y / 28, (7 * x + 13 * y) % 256].map(|level| level as u8)
    };
    let is_inside = |x: u32, y: u32| (10..26).contains(&x) && (6..20).contains(&y);
    RgbImage::from_fn(40, 28, |x, y| Rgb(colour(x, y)))
        .save(folder.join("picture.png"))
        .unwrap();
    RgbImage::from_fn(40, 28, |x, y| {
        Rgb([if is_inside(x, y) { 255 } else { 0 }; 3])
    })
    .save(folder.join("mask.png"))
    .unwrap();
    let transparent = |x: u32, y: u32| {
        let [r, g, b] = colour(x, y);
        Rgba([r, g, b, if is_inside(x, y) { 0 } else { 255 }])
    };
    RgbaImage::from_fn(40, 28, transparent)
        .save(folder.join("alpha.png"))
        .unwrap();
    std::fs::copy(fixture("mini/frog.png"), folder.join("mini.png")).unwrap();
    std::fs::copy(fixture("input/turned.jpg"), folder.join("turned.jpg")).unwrap();
}

/// SHA-256 of the pixels, and mean colours.
fn taken_down(picture: &RgbImage) -> String {
    let (width, height) = picture.dimensions();
    let hash: String = Sha256::digest(picture.as_raw())
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let mut means = String::new();
    for cell in 0..GRID * GRID {
        let part = |i: u32, side: u32| i * side / GRID..(i + 1) * side / GRID;
        let (xs, ys) = (part(cell % GRID, width), part(cell / GRID, height));
        for channel in 0..3 {
            let levels = ys.clone().flat_map(|y| {
                xs.clone()
                    .map(move |x| u32::from(picture.get_pixel(x, y)[channel]))
            });
            let (sum, count) = levels.fold((0, 0), |(sum, count), level| (sum + level, count + 1));
            means += &format!("{:02x}", sum / u32::max(count, 1));
        }
    }
    format!("{width}x{height} {hash} {means}")
}

/// Draws a command's pictures in a folder of its own beside the models, and takes them down.
fn drawn(models: &Path, nth: usize, command: &str) -> Vec<String> {
    let folder = models.join(format!("out-{nth}"));
    let program = std::env::var_os("SDGEN_TEST_PROGRAM");
    let mut sdgen = sdgen(models);
    if let Some(program) = program {
        let mut other = Command::new(program);
        other
            .env("HF_HUB_OFFLINE", "1")
            .current_dir(models)
            .stdin(std::process::Stdio::null());
        sdgen = other;
    }
    let output = sdgen
        .args(words(command))
        .args([
            "--threads",
            "1",
            "-q",
            "-o",
            &format!("out-{nth}/{{index:03}}.png"),
        ])
        .output()
        .unwrap();
    assert!(output.status.success(), "{command}\n{}", stderr(&output));
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
        .iter()
        .map(|file| taken_down(&image::open(file).unwrap().to_rgb8()))
        .collect()
}

/// Whether this processor has the instructions of the one that the pictures were taken down on.
fn has_the_same_instructions() -> bool {
    #[cfg(target_arch = "x86_64")]
    let has_them = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && !is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    let has_them = false;
    has_them
}

/// Whether two pictures that were taken down are the same, or as near as other instructions bring them.
fn is_same(a: &str, b: &str) -> bool {
    let parts = |line: &str| line.split(' ').map(String::from).collect::<Vec<_>>();
    let (a, b) = (parts(a), parts(b));
    let levels = |text: &str| {
        (0..text.len() / 2)
            .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
            .collect::<Vec<_>>()
    };
    let near = || {
        levels(&a[2])
            .iter()
            .zip(levels(&b[2]))
            .all(|(a, b)| a.abs_diff(b) <= TOLERANCE)
    };
    a == b || !has_the_same_instructions() && a[0] == b[0] && near()
}

#[test]
fn pictures_of_every_family_sampler_and_feature_stay_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let path = fixture("pictures.txt");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut commands: Vec<(&str, Vec<&str>)> = vec![];
    for line in text.lines() {
        match line.strip_prefix("= ") {
            Some(picture) => commands.last_mut().unwrap().1.push(picture),
            None if line.starts_with('#') => (),
            None => commands.push((line, vec![])),
        }
    }
    assert!(commands.len() >= 200, "{} commands", commands.len());
    let (next, results) = (
        AtomicUsize::new(0),
        Mutex::new(vec![vec![]; commands.len()]),
    );
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let nth = next.fetch_add(1, Ordering::Relaxed);
                    let Some((command, _)) = commands.get(nth) else {
                        break;
                    };
                    let pictures = drawn(dir.path(), nth, command);
                    results.lock().unwrap()[nth] = pictures;
                }
            });
        }
    });
    let results = results.into_inner().unwrap();
    if std::env::var_os("SDGEN_UPDATE_PICTURES").is_some() {
        let mut drawn = results.iter();
        let mut lines = vec![];
        for line in text.lines().filter(|line| !line.starts_with("= ")) {
            lines.push(line.to_string());
            if !line.starts_with('#') {
                lines.extend(
                    drawn
                        .next()
                        .unwrap()
                        .iter()
                        .map(|picture| format!("= {picture}")),
                );
            }
        }
        std::fs::write(&path, lines.join("\n") + "\n").unwrap();
        return;
    }
    let mut wrong = vec![];
    let mut exact = 0;
    for ((command, expected), drawn) in commands.iter().zip(&results) {
        if expected.is_empty()
            || expected.len() != drawn.len()
            || !expected.iter().zip(drawn).all(|(a, b)| is_same(a, b))
        {
            wrong.push(*command);
        }
        exact += usize::from(expected == drawn);
    }
    println!("{exact} of {} commands to the bit", commands.len());
    assert!(
        wrong.is_empty(),
        "{} of {} commands draw something else:\n{}",
        wrong.len(),
        commands.len(),
        wrong.join("\n")
    );
}
