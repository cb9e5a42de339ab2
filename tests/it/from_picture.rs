//! Pictures drawn from pictures: the same as diffusers', and what is around them.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use sdgen::image::{Format, Image};
use serde_json::Value;
use std::path::Path;

/// Levels [h, w, 3] or [h, w] as a picture.
fn picture(t: &Tensor) -> Image {
    let values = levels(t);
    let rgb = if t.rank() == 2 {
        values.into_iter().flat_map(|level| [level; 3]).collect()
    } else {
        values
    };
    Image {
        height: t.dim(0).unwrap(),
        width: t.dim(1).unwrap(),
        rgb,
    }
}

fn save(path: &Path, picture: &Image) {
    std::fs::write(path, picture.encode(Format::Png, None).unwrap()).unwrap();
}

fn read(path: &Path) -> Image {
    Image::decode(&std::fs::read(path).unwrap()).unwrap()
}

/// A fixture with another first convolution.
fn widened(model: &str, conv_in: &Tensor, to: &Path) {
    copy_folder(&fixture(model), to);
    let path = to.join("unet/diffusion_pytorch_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    tensors.insert(
        "conv_in.weight".into(),
        conv_in.to_dtype(DType::F16).unwrap(),
    );
    candle_core::safetensors::save(&tensors, &path).unwrap();
    edit_json(&to.join("unet/config.json"), |config| {
        config.insert("in_channels".into(), conv_in.dim(1).unwrap().into());
    });
}

#[test]
fn pictures_from_pictures_are_diffusers_own() {
    let tensors = load(&fixture("from_picture/goldens.safetensors"));
    let runs = &goldens("from_picture")["runs"];
    let runs = runs.as_array().unwrap();
    assert_eq!(runs.len(), 52);
    let mut wrong = vec![];
    for run in runs {
        let name = run["name"].as_str().unwrap();
        let golden = |part: &str| tensors.get(&format!("run.{name}.{part}"));
        let dir = tempfile::tempdir().unwrap();
        let model = run["model"].as_str().unwrap();
        match tensors.get(&format!("{}.conv_in", name.rsplit_once('.').unwrap().0)) {
            Some(conv_in) => widened(model, conv_in, &dir.path().join(model)),
            None => with_base(model, &dir.path().join(model)),
        }
        save(
            &dir.path().join("source.png"),
            &picture(golden("picture").unwrap()),
        );
        let mut command = sdgen(dir.path());
        command.args(["-m", model, "-i", "source.png", "-o", "drawn.png", "-q"]);
        for key in [
            "seed",
            "steps",
            "guidance",
            "strength",
            "eta",
            "image_guidance",
        ] {
            let value = &run[key];
            if value.is_null()
                || (key == "eta" && value == 0.0)
                || (key == "strength" && !run["image_guidance"].is_null())
            {
                continue;
            }
            command.arg(format!("--{}={value}", key.replace('_', "-")));
        }
        command
            .args([
                "-n",
                run["negative_prompt"].as_str().unwrap(),
                run["prompt"].as_str().unwrap(),
            ])
            .args(sampler_options(run));
        if let Some(mask) = golden("mask") {
            save(&dir.path().join("mask.png"), &picture(mask));
            command.args(["--mask", "mask.png", "--feather", "0"]);
        }
        succeed(&mut command);
        let drawn = read(&dir.path().join("drawn.png"));
        let mut want = picture(&golden("image").unwrap().squeeze(0).unwrap());
        if let Some(mask) = golden("mask") {
            // diffusers does not put the source back
            let (mask, source) = (picture(mask), picture(golden("picture").unwrap()));
            for ((want, mask), source) in want.rgb.iter_mut().zip(&mask.rgb).zip(&source.rgb) {
                *want = if *mask < 128 { *source } else { *want };
            }
        }
        let difference = drawn.difference(&want);
        if difference.largest > 1 || difference.psnr_db < 60.0 {
            wrong.push(format!(
                "{name}: {} levels, {:.1} dB",
                difference.largest, difference.psnr_db
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Colours that go from left to right and from top to bottom, and some of neither.
fn gradient(width: usize, height: usize) -> Image {
    let level = |x: usize, y: usize, i: usize| match i {
        0 => 255 * x / width,
        1 => 255 * y / height,
        _ => (7 * x + 13 * y) % 256,
    };
    let rgb = (0..width * height * 3)
        .map(|n| level(n / 3 % width, n / 3 / width, n % 3) as u8)
        .collect();
    Image { width, height, rgb }
}

/// White in a rectangle.
fn mask(
    width: usize,
    height: usize,
    left: usize,
    top: usize,
    right: usize,
    bottom: usize,
) -> Image {
    let is_white =
        |i: usize| (left..right).contains(&(i % width)) && (top..bottom).contains(&(i / width));
    Image {
        width,
        height,
        rgb: (0..width * height)
            .flat_map(|i| [if is_white(i) { 255 } else { 0 }; 3])
            .collect(),
    }
}

fn pixel(picture: &Image, x: usize, y: usize) -> &[u8] {
    &picture.rgb[(y * picture.width + x) * 3..][..3]
}

/// Draws two quick steps with the embedded model over `source.png`.
fn over(folder: &Path, args: &[&str]) -> Image {
    let mut command = sdgen(folder);
    command.args([
        "a frog",
        "-i",
        "source.png",
        "--steps",
        "2",
        "-s",
        "1",
        "-o",
        "drawn.png",
        "--force",
        "-q",
    ]);
    succeed(command.args(args));
    read(&folder.join("drawn.png"))
}

#[test]
fn pixels_outside_the_mask_stay_as_they_are_and_those_inside_fade_in() {
    let dir = tempfile::tempdir().unwrap();
    let source = gradient(96, 64);
    save(&dir.path().join("source.png"), &source);
    save(&dir.path().join("mask.png"), &mask(96, 64, 32, 16, 80, 64));
    for feather in ["0", "8"] {
        let drawn = over(
            dir.path(),
            &[
                "--mask",
                "mask.png",
                "--strength",
                "1",
                "--feather",
                feather,
            ],
        );
        assert_eq!((drawn.width, drawn.height), (96, 64));
        let is_inside = |x: usize, y: usize| (32..80).contains(&x) && (16..64).contains(&y);
        let changed = |x: usize, y: usize| pixel(&drawn, x, y) != pixel(&source, x, y);
        let all = || (0..64).flat_map(|y| (0..96).map(move |x| (x, y)));
        assert!(
            !all().any(|(x, y)| !is_inside(x, y) && changed(x, y)),
            "a pixel outside changed"
        );
        let inside = all()
            .filter(|(x, y)| is_inside(*x, *y) && changed(*x, *y))
            .count();
        assert!(inside > 48 * 48 * 9 / 10, "only {inside} pixels changed");
        // the first column inside is nearly all the source's with a feather
        let step: i32 = (20..60)
            .map(|y| {
                (i32::from(pixel(&drawn, 32, y)[2]) - i32::from(pixel(&source, 32, y)[2])).abs()
            })
            .sum::<i32>()
            / 40;
        assert_eq!(
            step < 16,
            feather == "8",
            "feather {feather}: {step} levels"
        );
    }
}

#[test]
fn transparent_parts_are_repainted_unless_a_mask_says_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let source = gradient(64, 64);
    let alpha = |i: usize| if i % 64 < 32 { 0 } else { 255 };
    let rgba = source
        .rgb
        .chunks_exact(3)
        .enumerate()
        .flat_map(|(i, p)| [p[0], p[1], p[2], alpha(i)])
        .collect();
    image::RgbaImage::from_raw(64, 64, rgba)
        .unwrap()
        .save(dir.path().join("source.png"))
        .unwrap();
    let drawn = over(dir.path(), &["--feather", "0"]);
    let changed = |drawn: &Image, x: usize| {
        (0..64)
            .filter(|y| pixel(drawn, x, *y) != pixel(&source, x, *y))
            .count()
    };
    assert!(changed(&drawn, 10) > 60 && changed(&drawn, 40) == 0);
    save(&dir.path().join("mask.png"), &mask(64, 64, 32, 0, 64, 64));
    let drawn = over(dir.path(), &["--mask", "mask.png", "--feather", "0"]);
    assert!(changed(&drawn, 40) > 60, "the mask was not used");
}

#[test]
fn only_masked_draws_the_part_at_full_size_and_puts_it_back_into_a_picture_of_any_size() {
    let dir = tempfile::tempdir().unwrap();
    let source = gradient(301, 203);
    save(&dir.path().join("source.png"), &source);
    save(
        &dir.path().join("mask.png"),
        &mask(301, 203, 120, 90, 150, 120),
    );
    let drawn = over(
        dir.path(),
        &["--mask", "mask.png", "--only-masked", "--feather", "0"],
    );
    assert_eq!((drawn.width, drawn.height), (301, 203));
    for y in 0..203 {
        for x in 0..301 {
            let is_inside = (120..150).contains(&x) && (90..120).contains(&y);
            assert!(
                is_inside || pixel(&drawn, x, y) == pixel(&source, x, y),
                "{x}, {y} changed"
            );
        }
    }
    assert_ne!(drawn, source);
    let near = over(
        dir.path(),
        &["--mask", "mask.png", "--only-masked=4", "--feather", "0"],
    );
    assert_ne!(near, drawn, "the padding does nothing");
}

#[test]
fn extend_adds_borders_and_keeps_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let source = gradient(64, 64);
    save(&dir.path().join("source.png"), &source);
    let drawn = over(dir.path(), &["--extend", "left=32,bottom=20"]);
    assert_eq!(
        (drawn.width, drawn.height),
        (96, 96),
        "rounded up to what the model can draw"
    );
    for y in 0..64 - 8 {
        for x in 8..64 {
            assert_eq!(pixel(&drawn, 32 + x, y), pixel(&source, x, y));
        }
    }
    let drawn = over(dir.path(), &["--extend", "16"]);
    assert_eq!((drawn.width, drawn.height), (96, 96));
    assert_eq!(pixel(&drawn, 48, 48), pixel(&source, 32, 32));
}

#[test]
fn the_size_is_the_sources_unless_that_is_far_too_large_or_said() {
    let dir = tempfile::tempdir().unwrap();
    let size = |source: (usize, usize), args: &[&str]| {
        save(
            &dir.path().join("source.png"),
            &gradient(source.0, source.1),
        );
        let mut command = sdgen(dir.path());
        let output = succeed(
            command
                .args(["x", "-i", "source.png", "-s", "1", "--dry-run", "--json"])
                .args(args),
        );
        let said: Value = serde_json::from_str(&stdout(&output)).unwrap();
        (
            said["width"].as_u64().unwrap(),
            said["height"].as_u64().unwrap(),
        )
    };
    assert_eq!(size((160, 96), &[]), (160, 96));
    assert_eq!(size((170, 100), &[]), (160, 96), "steps of 16");
    assert_eq!(
        size((800, 400), &[]),
        (176, 80),
        "the embedded model's 128x128 pixels in these proportions"
    );
    assert_eq!(size((800, 400), &["-W", "256"]), (256, 128));
    assert_eq!(size((800, 400), &["-H", "64"]), (128, 64));
    assert_eq!(size((800, 400), &["-W", "64", "-H", "64"]), (64, 64));
    assert_eq!(size((5, 5), &[]), (16, 16));
}

#[test]
fn how_a_source_fits_is_chosen_and_changes_the_picture() {
    let dir = tempfile::tempdir().unwrap();
    save(&dir.path().join("source.png"), &gradient(160, 64));
    let fit = |how: &str| over(dir.path(), &["--fit", how, "-W", "64", "-H", "64"]);
    let [crop, pad, stretch] = ["crop", "pad", "stretch"].map(fit);
    assert!(crop != pad && pad != stretch && crop != stretch);
    assert_eq!(over(dir.path(), &["-W", "64", "-H", "64"]), crop);
}

#[test]
fn a_folder_of_sources_is_drawn_picture_by_picture_and_a_list_names_its_own() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("in")).unwrap();
    for (name, side) in [("b.png", 64), ("a.png", 48), ("c.png", 64)] {
        save(&dir.path().join("in").join(name), &gradient(side, side));
    }
    std::fs::write(dir.path().join("in/notes.txt"), "no picture").unwrap();
    let draw = |args: &[&str]| {
        let mut command = sdgen(dir.path());
        stdout(&succeed(
            command
                .args(["a frog", "--steps", "2", "-s", "1..3", "-q"])
                .args(args),
        ))
    };
    let said = draw(&["-i", "in", "-o", "out/"]);
    let expected = [
        "a-frog-1-a",
        "a-frog-1-b",
        "a-frog-1-c",
        "a-frog-2-a",
        "a-frog-2-b",
        "a-frog-2-c",
    ];
    assert_eq!(
        said.lines().collect::<Vec<_>>(),
        expected.map(|name| format!("out/{name}.png"))
    );
    draw(&["-i", "in", "-o", "own/{image}-{seed}.png"]);
    // neighbours in a batch change nothing
    draw(&["-i", "in/b.png", "-o", "one/{seed}.png", "-b", "1"]);
    for (one, many) in [
        ("one/2.png", "out/a-frog-2-b.png"),
        ("one/2.png", "own/b-2.png"),
    ] {
        assert_eq!(read(&dir.path().join(one)), read(&dir.path().join(many)));
    }
    let list = r#"{"prompt": "a frog", "image": "in/b.png", "strength": 0.75, "seed": 2, "steps": 2, "output": "listed.png"}"#;
    std::fs::write(dir.path().join("list.jsonl"), list).unwrap();
    succeed(sdgen(dir.path()).args(["--from", "list.jsonl", "-q"]));
    assert_eq!(
        read(&dir.path().join("listed.png")),
        read(&dir.path().join("one/2.png"))
    );
}

#[test]
fn check_draws_it_again_from_the_same_source_only_and_resume_knows_it() {
    let dir = tempfile::tempdir().unwrap();
    save(&dir.path().join("source.png"), &gradient(64, 64));
    save(&dir.path().join("mask.png"), &mask(64, 64, 8, 8, 50, 50));
    over(dir.path(), &["--mask", "mask.png"]);
    succeed(sdgen(dir.path()).args(["check", "drawn.png"]));
    let again = |strength: &str| {
        let mut command = sdgen(dir.path());
        command.args([
            "a frog",
            "-i",
            "source.png",
            "--mask",
            "mask.png",
            "--steps",
            "2",
            "-s",
            "1",
            "-o",
            "drawn.png",
            "--resume",
            "--json",
        ]);
        serde_json::from_str::<Value>(&stdout(&succeed(command.args(["--strength", strength]))))
            .unwrap()["skipped"]
            .clone()
    };
    assert_eq!(
        (again("0.75"), again("0.5")),
        (Value::Bool(true), Value::Null)
    );
    save(&dir.path().join("mask.png"), &mask(64, 64, 8, 8, 50, 51));
    let output = sdgen(dir.path())
        .args(["check", "drawn.png"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(6));
    assert!(
        stderr(&output).contains("`mask.png` is another picture than it was"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn what_cannot_be_done_with_a_source_is_an_error_before_drawing() {
    let dir = tempfile::tempdir().unwrap();
    save(&dir.path().join("source.png"), &gradient(64, 64));
    save(&dir.path().join("black.png"), &mask(64, 64, 0, 0, 0, 0));
    std::fs::write(dir.path().join("text.png"), "no picture").unwrap();
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    let cases: [(&[&str], i32, &[&str]); 15] = [
        (
            &["--strength", "0.5"],
            2,
            &[
                "`--strength` is for pictures that start from another",
                "--image FILE",
            ],
        ),
        (&["--mask", "source.png"], 2, &["`--mask` is for"]),
        (&["-i", "gone.png"], 2, &["`gone.png`"]),
        (
            &["-i", "text.png"],
            2,
            &["`text.png`", "no picture of a known kind"],
        ),
        (
            &["-i", "empty"],
            2,
            &["`empty` is a folder without pictures"],
        ),
        (
            &["-i", "source.png", "--mask", "gone.png"],
            2,
            &["`gone.png`"],
        ),
        (
            &["-i", "source.png", "--strength", "0.01"],
            2,
            &["leaves none of 20 steps", "at least 0.05"],
        ),
        (
            &["-i", "source.png", "--strength", "1.5"],
            2,
            &["a number from 0 to 1"],
        ),
        (
            &["-i", "source.png", "--only-masked"],
            2,
            &["`--only-masked` needs a mask"],
        ),
        (
            &["-i", "source.png", "--extend", "16", "--mask", "black.png"],
            2,
            &["`--extend` and `--mask`"],
        ),
        (
            &["-i", "source.png", "--extend", "16", "-W", "64"],
            2,
            &["`--extend` and `--width`"],
        ),
        (
            &["-i", "source.png", "--extend", "up=16"],
            2,
            &["left=128,top=64"],
        ),
        (&["-i", "source.png", "--extend", "0"], 2, &["adds nothing"]),
        (
            &["-i", "source.png", "--image-guidance", "2"],
            2,
            &["means nothing to `mini`"],
        ),
        (
            &["-i", "source.png", "--mask", "black.png"],
            1,
            &["`black.png` leaves nothing to repaint"],
        ),
    ];
    for (args, code, texts) in cases {
        fail(
            sdgen(dir.path())
                .args(["x", "-s", "1", "-o", "x.png", "-q"])
                .args(args),
            code,
            texts,
        );
        assert!(!dir.path().join("x.png").exists());
    }
}

#[test]
fn models_that_take_a_picture_as_an_input_say_what_they_need() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = load(&fixture("from_picture/goldens.safetensors"));
    save(&dir.path().join("source.png"), &gradient(16, 16));
    widened(
        "sd1",
        &tensors["inpaint9.sd1.conv_in"],
        &dir.path().join("inpaint"),
    );
    widened(
        "sd1",
        &tensors["edit.sd1.conv_in"],
        &dir.path().join("edit"),
    );
    let cases: [(&str, &[&str], &[&str]); 5] = [
        (
            "inpaint",
            &[],
            &["`inpaint` is for inpainting", "--mask FILE"],
        ),
        (
            "inpaint",
            &["-i", "source.png"],
            &["`inpaint` is for inpainting", "white is repainted"],
        ),
        ("edit", &[], &["`edit` edits pictures", "--image FILE"]),
        (
            "edit",
            &["-i", "source.png", "--strength", "0.5"],
            &["`--strength` means nothing to `edit`", "--image-guidance"],
        ),
        (
            "sd1",
            &["-i", "source.png", "--image-guidance", "1.5"],
            &["means nothing to"],
        ),
    ];
    for (model, args, texts) in cases {
        let model = if model == "sd1" {
            fixture("sd1")
        } else {
            dir.path().join(model)
        };
        fail(
            sdgen(dir.path())
                .args(["x", "-s", "1", "-o", "x.png", "-q", "-m"])
                .arg(model)
                .args(args),
            2,
            texts,
        );
    }
    for (model, told) in [
        ("inpaint", "takes         a picture and a mask"),
        ("edit", "takes         a picture, which it edits"),
    ] {
        let said = stdout(&succeed(sdgen(dir.path()).args(["inspect", model])));
        assert!(said.contains(told), "{said}");
    }
}

#[test]
fn hires_draws_the_picture_again_larger_and_alone_or_in_a_batch_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let draw = |args: &[&str]| {
        let mut command = sdgen(dir.path());
        succeed(
            command
                .args(["a frog", "--steps", "4", "-W", "64", "-H", "48", "-q"])
                .args(args),
        )
    };
    draw(&[
        "-s",
        "1..3",
        "-o",
        "two/{seed}.png",
        "--hires",
        "1.5x",
        "--trace",
    ]);
    draw(&["-s", "2", "-o", "one.png", "--hires", "1.5"]);
    draw(&[
        "-s",
        "2",
        "-o",
        "more.png",
        "--hires",
        "1.5",
        "--hires-strength",
        "0.8",
    ]);
    draw(&["-s", "2", "-o", "small.png"]);
    draw(&["-s", "1", "-o", "other.png"]);
    let [two, one, more, small, other] =
        ["two/2.png", "one.png", "more.png", "small.png", "other.png"]
            .map(|name| read(&dir.path().join(name)));
    assert_eq!(
        (one.width, one.height),
        (96, 80),
        "72 rounds to a step of 16"
    );
    assert!(two == one && one != more);
    // the same thing in the same place
    let fit = |picture: &Image| picture.fit(16, 16, sdgen::image::load::Fit::Stretch);
    let near = fit(&one).difference(&fit(&small)).psnr_db;
    let far = fit(&one).difference(&fit(&other)).psnr_db;
    // measured: 19 dB, and 11 for the other seed; 3 dB are half of the square error
    assert!(near > far + 3.0, "{near} dB, {far} dB for another seed");
    succeed(sdgen(dir.path()).args(["check", "one.png", "two/1.png"]));
    save(&dir.path().join("source.png"), &gradient(64, 48));
    save(&dir.path().join("mask.png"), &mask(64, 48, 8, 8, 50, 40));
    let drawn = over(dir.path(), &["--hires", "2x", "--strength", "0.5"]);
    assert_eq!((drawn.width, drawn.height), (128, 96));
    let cases: [(&[&str], &[&str]); 4] = [
        (&["--hires", "1"], &["a factor above 1"]),
        (
            &["--hires-strength", "0.5"],
            &["`--hires-strength` without `--hires`"],
        ),
        (
            &["--hires", "2", "--hires-strength", "0.01"],
            &["`--hires-strength`", "leaves none of 20 steps"],
        ),
        (
            &["--hires", "2", "-i", "source.png", "--mask", "mask.png"],
            &["`--hires` and `--mask`"],
        ),
    ];
    for (args, texts) in cases {
        fail(
            sdgen(dir.path())
                .args(["x", "-s", "1", "-o", "x.png", "-q"])
                .args(args),
            2,
            texts,
        );
    }
}
