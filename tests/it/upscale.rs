//! `sdgen upscale`: networks of every naming, tiles, where results go, and what they remember.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use sdgen::image::load::{Fit, Input, resized_levels};
use sdgen::image::{Image, read_metadata};
use sdgen::model::upscaler::{TILE_PX, Upscaler, UpscalerConfig};
use sdgen::nn::Forward;
use sdgen::weights::Checkpoint;
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

fn network(name: &str) -> PathBuf {
    fixture("upscaler").join(format!("{name}.safetensors"))
}

/// A folder with the fixture's picture and the network for four times its size.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        fixture("upscaler/source.png"),
        folder.path().join("source.png"),
    )
    .unwrap();
    std::fs::copy(network("rrdb_x4"), folder.path().join("x4.safetensors")).unwrap();
    folder
}

fn read(path: &Path) -> Image {
    Input::read(path).unwrap().picture
}

fn golden(name: &str) -> Image {
    let golden = load(&fixture("upscaler/goldens.safetensors"))[name]
        .unsqueeze(0)
        .unwrap();
    Image::from_tensor(&golden).unwrap().remove(0)
}

fn open(path: &Path) -> Upscaler {
    let checkpoint = Checkpoint::open_upscaler(path).unwrap();
    let config = UpscalerConfig::of(&checkpoint).unwrap();
    Upscaler::new(
        &checkpoint.weights("upscaler", &Device::Cpu, DType::F32),
        config,
    )
    .unwrap()
}

fn renamed(from: &Path, to: &Path, name: impl Fn(&str) -> String) {
    save(
        &load(from)
            .into_iter()
            .map(|(key, tensor)| (name(&key), tensor))
            .collect(),
        to,
    );
}

#[test]
fn pictures_are_those_of_pytorch() {
    let dir = folder();
    for name in [
        "rrdb_x4",
        "rrdb_x2",
        "rrdb_x1",
        "compact_x2",
        "compact_x3",
        "compact_x4",
        "esrgan_plus_x4",
        "span_x2",
        "span_x4",
        "plksr_x2",
        "plksr_x4",
    ] {
        succeed(
            sdgen(dir.path())
                .args([
                    "upscale",
                    "-q",
                    "source.png",
                    "-o",
                    &format!("{name}.png"),
                    "-m",
                ])
                .arg(network(name)),
        );
        let (ours, torchs) = (read(&dir.path().join(format!("{name}.png"))), golden(name));
        assert_eq!((ours.width, ours.height), (torchs.width, torchs.height));
        // a value between two levels may be rounded to either
        assert!(ours.difference(&torchs).largest <= 1, "{name}");
    }
}

#[test]
fn a_network_is_known_by_any_of_its_names() {
    let dir = folder();
    let place = |name: &str| dir.path().join(name);
    // ESRGAN's first code: layers numbered through, 23 the last of the blocks in the original, here
    // the second
    let numbered = |key: &str| {
        let (layer, last) = key.rsplit_once('.').unwrap();
        let layer = match layer {
            "conv_first" => "model.0".into(),
            "conv_body" => "model.1.sub.2".into(),
            "conv_up1" => "model.3".into(),
            "conv_up2" => "model.6".into(),
            "conv_hr" => "model.8".into(),
            "conv_last" => "model.10".into(),
            layer => format!(
                "{}.0",
                layer.replace("body.", "model.1.sub.").replace("rdb", "RDB")
            ),
        };
        format!("{layer}.{last}")
    };
    renamed(
        &place("x4.safetensors"),
        &place("old.safetensors"),
        numbered,
    );
    let trunk = |key: &str| {
        let names = [
            ("conv_body", "trunk_conv"),
            ("body.", "RRDB_trunk."),
            ("rdb", "RDB"),
            ("conv_up", "upconv"),
            ("conv_hr", "HRconv"),
        ];
        names
            .iter()
            .fold(key.to_string(), |key, (new, old)| key.replace(new, old))
    };
    renamed(&place("x4.safetensors"), &place("trunk.safetensors"), trunk);
    renamed(&place("x4.safetensors"), &place("ema.safetensors"), |key| {
        format!("params_ema.{key}")
    });
    // the weights of the last step lie beside their average
    let mut both = load(&place("ema.safetensors"));
    both.extend(
        load(&network("rrdb_x4"))
            .into_iter()
            .map(|(key, tensor)| (format!("params.{key}"), tensor.zeros_like().unwrap())),
    );
    save(&both, &place("both.safetensors"));
    for (name, start) in [("module", "module."), ("netg", "netG.params_ema.")] {
        let to = place(&format!("{name}.safetensors"));
        renamed(&place("x4.safetensors"), &to, |key| format!("{start}{key}"));
    }
    for name in ["x4", "old", "trunk", "ema", "both", "module", "netg"] {
        let (model, output) = (format!("{name}.safetensors"), format!("{name}.png"));
        succeed(sdgen(dir.path()).args([
            "upscale",
            "-q",
            "--no-metadata",
            "source.png",
            "-m",
            &model,
            "-o",
            &output,
        ]));
        let bytes = |name: &str| std::fs::read(place(name)).unwrap();
        assert!(bytes(&output) == bytes("x4.png"), "{name}");
    }
}

#[test]
fn tiles_do_not_show() {
    let noise = Input::read(&fixture("input/noise.png")).unwrap().picture;
    let picture = noise.fit(301, 277, Fit::Stretch);
    for name in ["rrdb_x4", "rrdb_x2", "compact_x3"] {
        let upscaler = open(&network(name));
        let cx = Forward::on(upscaler.device());
        let mut steps = vec![];
        let (whole, _) = upscaler
            .upscale(cx, &picture, None, 1000, &mut |done, of| {
                steps.push((done, of))
            })
            .unwrap();
        assert!(
            steps
                .last()
                .is_some_and(|(done, of)| done == of && steps.len() == *of),
            "{steps:?}"
        );
        let tiled = upscaler
            .upscale(cx, &picture, None, 200, &mut |_, _| ())
            .unwrap()
            .0;
        assert!(whole.difference(&tiled).largest <= 1, "{name}");
    }
}

#[test]
fn a_large_result_needs_little_more_memory_than_its_pixels() {
    let dir = folder();
    let large = read(&dir.path().join("source.png")).fit(1000, 1000, Fit::Stretch);
    std::fs::write(
        dir.path().join("large.png"),
        large.encode(sdgen::image::Format::Png, None).unwrap(),
    )
    .unwrap();
    let upscaler = open(&dir.path().join("x4.safetensors"));
    // 8 channels: far less than the 64 of published networks, whose tiles take 0.8 GB
    assert!(
        upscaler.bytes(10_000, 10_000) == upscaler.bytes(TILE_PX, TILE_PX)
            && upscaler.bytes(10_000, 10_000) < 150_000_000
    );
    succeed(sdgen(dir.path()).args(["upscale", "-q", "-m", "x4.safetensors", "large.png"]));
    assert_eq!(read(&dir.path().join("large-4x.png")).width, 4000);
}

#[test]
fn another_scale_than_the_networks_is_lanczos_of_its_result() {
    let dir = folder();
    let up = |options: &[&str]| {
        stdout(&succeed(
            sdgen(dir.path())
                .args(["upscale", "-q", "source.png"])
                .args(options),
        ))
    };
    assert_eq!(up(&["-m", "x4.safetensors"]), "source-4x.png\n");
    let whole = read(&dir.path().join("source-4x.png"));
    for (scale, name, width, height) in [
        ("2", "source-2x.png", 36, 30),
        ("1.5x", "source-1.5x.png", 27, 23),
        ("x6", "source-6x.png", 108, 90),
    ] {
        assert_eq!(
            up(&["-m", "x4.safetensors", "--scale", scale]),
            format!("{name}\n")
        );
        assert_eq!(
            read(&dir.path().join(name)),
            whole.fit(width, height, Fit::Stretch)
        );
    }
    up(&["-m", "lanczos", "--scale", "3", "-o", "plain.png"]);
    assert_eq!(
        read(&dir.path().join("plain.png")),
        read(&dir.path().join("source.png")).fit(54, 45, Fit::Stretch)
    );
}

#[test]
fn results_go_where_they_are_told_and_overwrite_nothing() {
    let dir = folder();
    let place = |name: &str| dir.path().join(name);
    std::fs::copy(place("source.png"), place("second {x}.v2.png")).unwrap();
    let mut twice = sdgen(dir.path());
    let twice = twice.args([
        "upscale",
        "-m",
        "lanczos",
        "--scale",
        "2",
        "source.png",
        "second {x}.v2.png",
    ]);
    let output = succeed(twice.args(["-o", "out/"]));
    assert_eq!(
        stdout(&output),
        "out/source-2x.png\nout/second {x}.v2-2x.png\n"
    );
    fail(
        twice,
        2,
        &["`out/source-2x.png` exists already, and 1 more", "--force"],
    );
    succeed(twice.arg("--force"));
    let one = |options: &[&str]| {
        let mut command = sdgen(dir.path());
        command
            .args([
                "upscale",
                "-q",
                "-m",
                "lanczos",
                "--scale",
                "2",
                "source.png",
            ])
            .args(options);
        command
    };
    assert_eq!(
        stdout(&succeed(&mut one(&[
            "-o",
            "{index}/{name}",
            "--format",
            "webp"
        ]))),
        "0/source.webp\n"
    );
    assert!(
        std::fs::read(place("0/source.webp"))
            .unwrap()
            .starts_with(b"RIFF")
    );
    let bytes = succeed(&mut one(&["-o", "-"])).stdout;
    assert!(bytes.starts_with(b"\x89PNG"));
    let json: Value = serde_json::from_str(&stdout(&succeed(&mut one(&["--json"])))).unwrap();
    assert_eq!(
        (
            json["path"].as_str(),
            json["width"].as_u64(),
            json["upscale"].as_f64()
        ),
        (Some("source-2x.png"), Some(36), Some(2.0))
    );
    assert_eq!(json["sha256"], read(&place("source-2x.png")).sha256());

    fail(
        &mut one(&["source.png", "-o", "a.png"]),
        2,
        &["would both become `a.png`", "{index}"],
    );
    fail(
        &mut one(&["source.png", "-o", "-"]),
        2,
        &["`-o -` takes one picture, but 2"],
    );
    fail(&mut one(&["-o", "-", "--json"]), 2, &["both want stdout"]);
    fail(
        &mut one(&["-o", "{seed}.png"]),
        2,
        &["placeholder", "{name}, {scale}, {index}"],
    );
    fail(
        &mut one(&["-o", "nowhere/a.png"]),
        2,
        &["no folder `nowhere`"],
    );
    fail(
        &mut one(&["-o", "a.tiff"]),
        2,
        &["cannot write pictures as `tiff`"],
    );
}

#[test]
fn pictures_that_fail_leave_the_others_alone() {
    let dir = folder();
    std::fs::write(dir.path().join("bad.png"), "no picture").unwrap();
    let mut command = sdgen(dir.path());
    let output = command
        .args([
            "upscale",
            "-m",
            "lanczos",
            "--scale",
            "2",
            "bad.png",
            "source.png",
            "none.png",
        ])
        .output()
        .unwrap();
    assert_eq!(
        (output.status.code(), stdout(&output)),
        (Some(6), "source-2x.png\n".into())
    );
    let said = stderr(&output);
    for text in [
        "`bad.png`: it is no picture",
        "`none.png`",
        "2 of 3 pictures failed, 1 are saved",
    ] {
        assert!(said.contains(text), "`{text}` is missing in: {said}");
    }
    fail(
        sdgen(dir.path()).args(["upscale", "-m", "lanczos", "--scale", "2", "bad.png"]),
        2,
        &["it is no picture of a known kind"],
    );
    fail(
        sdgen(dir.path())
            .args([
                "upscale",
                "-m",
                "lanczos",
                "--scale",
                "64",
                "-o",
                "large.png",
            ])
            .arg(large(dir.path())),
        1,
        &["16384"],
    );
}

fn large(folder: &Path) -> PathBuf {
    let path = folder.join("wide.png");
    image::GrayImage::new(300, 2).save(&path).unwrap();
    path
}

#[test]
fn transparency_is_kept_and_on_white_in_a_jpeg_which_is_said() {
    let dir = folder();
    let picture = image::RgbaImage::from_fn(9, 7, |x, y| {
        let [x, y] = [x, y].map(|at| u8::try_from(at).unwrap());
        image::Rgba([x * 20, y * 30, 90, x * 25])
    });
    picture.save(dir.path().join("clear.png")).unwrap();
    let upscale = |options: &[&str]| {
        let mut command = sdgen(dir.path());
        succeed(
            command
                .args(["upscale", "clear.png", "--force"])
                .args(options),
        )
    };
    let alpha = |name: &str| {
        let picture = image::open(dir.path().join(name)).unwrap();
        assert!(picture.color().has_alpha(), "{name}");
        let picture = picture.to_rgba8();
        picture
            .pixels()
            .map(|pixel| pixel.0[3])
            .collect::<Vec<u8>>()
    };
    let own: Vec<u8> = picture.pixels().map(|pixel| pixel.0[3]).collect();
    for output in ["large.png", "large.webp"] {
        let said = upscale(&["-m", "lanczos", "--scale", "2", "-o", output]);
        assert!(!stderr(&said).contains("transparent"));
        assert_eq!(
            alpha(output),
            resized_levels(&own, [9, 7], [18, 14]),
            "{output}"
        );
    }
    upscale(&["-m", "x4.safetensors", "-o", "net.png"]);
    assert_eq!(alpha("net.png"), resized_levels(&own, [9, 7], [36, 28]));
    // a picture of the same size is the same picture
    upscale(&["-m", "lanczos", "--scale", "1", "-o", "same.png"]);
    assert_eq!(alpha("same.png"), own);
    let said = stderr(&upscale(&["-m", "lanczos", "-o", "large.jpg"]));
    assert!(
        said.contains("a JPEG cannot be, and shows it on white"),
        "{said}"
    );
    let white = read(&dir.path().join("large.jpg")).rgb;
    assert!(
        white[..3].iter().all(|level| *level > 240),
        "{:?}",
        &white[..3]
    );
}

#[test]
fn the_colour_profile_of_rgb_is_kept_in_every_format() {
    use image::{ImageDecoder, ImageEncoder};
    let dir = folder();
    let place = |name: &str| dir.path().join(name);
    let profile = |space: &[u8]| [&[0; 16], space, &[7; 108]].concat();
    let save_with = |name: &str, profile: &[u8]| {
        let mut bytes = vec![];
        let mut encoder = image::codecs::png::PngEncoder::new(&mut bytes);
        encoder.set_icc_profile(profile.to_vec()).unwrap();
        let pixels = [90u8; 4 * 4 * 3];
        encoder
            .write_image(&pixels, 4, 4, image::ExtendedColorType::Rgb8)
            .unwrap();
        std::fs::write(place(name), bytes).unwrap();
    };
    save_with("rgb.png", &profile(b"RGB "));
    save_with("cmyk.png", &profile(b"CMYK"));
    let kept = |source: &str, output: &str| {
        let mut command = sdgen(dir.path());
        succeed(command.args(["upscale", "-m", "lanczos", source, "--force", "-o", output]));
        let reader = image::ImageReader::open(place(output)).unwrap();
        reader.into_decoder().unwrap().icc_profile().unwrap()
    };
    for output in ["a.png", "a.jpg", "a.webp"] {
        assert_eq!(kept("rgb.png", output), Some(profile(b"RGB ")), "{output}");
        assert_eq!(kept("cmyk.png", output), None, "{output}");
    }
}

#[test]
fn networks_of_one_and_four_channels_draw_what_those_of_three_draw() {
    let dir = folder();
    let place = |name: &str| dir.path().join(name);
    let source = read(&place("source.png"));
    let cx = Forward::on(&Device::Cpu);
    let cat = |all: &[&Tensor], dim| Tensor::cat(all, dim).unwrap().contiguous().unwrap();
    // a grey picture: each of three equal channels is the one channel's third
    let grey: Vec<u8> = source
        .rgb
        .chunks_exact(3)
        .flat_map(|pixel| [pixel[1]; 3])
        .collect();
    let grey = Image {
        rgb: grey,
        ..source.clone()
    };
    for (name, first, last) in [
        ("compact_x2", "body.0", ""),
        ("rrdb_x4", "conv_first", "conv_last"),
    ] {
        let mut tensors = load(&network(name));
        let is_body = |key: &&String| key.starts_with("body.");
        let numbers = tensors
            .keys()
            .filter(is_body)
            .filter_map(|key| key.split('.').nth(1)?.parse::<usize>().ok());
        let last = match last {
            "" => format!("body.{}", numbers.max().unwrap()),
            last => last.to_string(),
        };
        let wide = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
        let one = wide(&tensors[&format!("{first}.weight")])
            .narrow(1, 0, 1)
            .unwrap();
        let [weight, bias] = ["weight", "bias"].map(|end| {
            let t = wide(&tensors[&format!("{last}.{end}")]);
            let outputs = t.dim(0).unwrap() / 3;
            t.narrow(0, 0, outputs).unwrap().contiguous().unwrap()
        });
        let mut made = |first_weight: Tensor, weight: Tensor, bias: Tensor, file: &str| {
            tensors.insert(format!("{first}.weight"), first_weight);
            tensors.insert(format!("{last}.weight"), weight);
            tensors.insert(format!("{last}.bias"), bias);
            save(&tensors, &place(file));
            open(&place(file))
        };
        let third = (&one / 3.0).unwrap();
        let of_one = made(
            one.contiguous().unwrap(),
            weight.clone(),
            bias.clone(),
            "1.safetensors",
        );
        let three = cat(&[&third, &third, &third], 1);
        let of_three = made(
            three.clone(),
            cat(&[&weight, &weight, &weight], 0),
            cat(&[&bias, &bias, &bias], 0),
            "3.safetensors",
        );
        let nothing = third.zeros_like().unwrap();
        let of_four = made(
            cat(&[&three, &nothing], 1),
            cat(&[&weight, &weight, &weight, &weight], 0),
            cat(&[&bias, &bias, &bias, &bias], 0),
            "4.safetensors",
        );
        let expected = of_three
            .upscale(cx, &grey, None, 1000, &mut |_, _| ())
            .unwrap()
            .0;
        let largest = |other: &Image| expected.difference(other).largest;
        // sums in another order: a value may be rounded to the next level
        let own = of_one
            .upscale(cx, &grey, None, 1000, &mut |_, _| ())
            .unwrap()
            .0;
        assert!(largest(&own) <= 1, "{name}: one channel");
        let alpha: Vec<u8> = grey.rgb.chunks_exact(3).map(|pixel| pixel[0]).collect();
        let (own, shown) = of_four
            .upscale(cx, &grey, Some(&alpha), 1000, &mut |_, _| ())
            .unwrap();
        assert!(largest(&own) <= 1, "{name}: four channels");
        // as the fourth channel has the weights of the others, and its own picture is the grey one
        let shown = shown.unwrap();
        let levels = expected.rgb.chunks_exact(3).map(|pixel| pixel[0]);
        assert!(
            levels.zip(&shown).all(|(a, b)| a.abs_diff(*b) <= 1),
            "{name}: transparency"
        );
    }
}

#[test]
fn a_compact_network_may_enlarge_by_more_than_four() {
    let dir = folder();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let tensors = [
        ("body.0.weight", zeros(&[4, 3, 3, 3])),
        ("body.0.bias", zeros(&[4])),
        ("body.1.weight", zeros(&[4])),
        ("body.2.weight", zeros(&[3 * 64, 4, 3, 3])),
        ("body.2.bias", zeros(&[3 * 64])),
    ];
    let path = dir.path().join("x8.safetensors");
    save(
        &HashMap::from(tensors.map(|(key, t)| (key.to_string(), t))),
        &path,
    );
    let source = read(&dir.path().join("source.png"));
    let cx = Forward::on(&Device::Cpu);
    let (large, _) = open(&path)
        .upscale(cx, &source, None, 1000, &mut |_, _| ())
        .unwrap();
    // nothing is added to the enlarged picture
    assert_eq!(
        (large.width, large.height),
        (8 * source.width, 8 * source.height)
    );
    assert_eq!(large.rgb[..3], source.rgb[..3]);
    assert_eq!(large.rgb[8 * 3..][..3], source.rgb[3..6]);
}

#[test]
fn what_is_no_upscaler_is_refused_by_what_it_is() {
    let dir = folder();
    let place = |name: &str| dir.path().join(name);
    let up = |model: &str, code: i32, texts: &[&str]| {
        fail(
            sdgen(dir.path()).args(["upscale", "source.png", "-m", model]),
            code,
            texts,
        )
    };
    fail(
        sdgen(dir.path()).args(["upscale", "source.png"]),
        2,
        &["no upscaler is named", "-m FILE.safetensors", "-m lanczos"],
    );
    up(
        "none.safetensors",
        3,
        &["there is no file `none.safetensors`"],
    );
    std::fs::write(place("net.pth"), b"PK\x03\x04").unwrap();
    up(
        "net.pth",
        3,
        &["PyTorch pickle", "params_ema", "safetensors"],
    );
    for (key, says) in [
        (
            "model.diffusion_model.out.2.weight",
            "is a checkpoint, not an upscaler",
        ),
        ("lora_unet_down.lora_up.weight", "is a LoRA"),
        ("layers.0.residual_group.blocks.0.norm1.weight", "SwinIR"),
        ("residual_layer.0.residual_layer.0.conv.weight", "OmniSR"),
        ("to_img.init_pos", "DySample"),
        ("something.weight", "not an upscaler that sdgen knows"),
        ("conv_first.weight", "sizes that no known upscaler has"),
    ] {
        let tensor = Tensor::zeros((8, 4, 3, 3), DType::F32, &Device::Cpu).unwrap();
        save(
            &HashMap::from([(key.to_string(), tensor)]),
            &place("odd.safetensors"),
        );
        up("odd.safetensors", 3, &["`odd", says, "RRDBNet"]);
    }
    // one layer more than any known network has, or one less
    let whole = load(&place("x4.safetensors"));
    let mut plus = whole.clone();
    plus.insert(
        "body.0.rdb1.conv6.weight".into(),
        plus["conv_hr.weight"].clone(),
    );
    save(&plus, &place("plus.safetensors"));
    up("plus.safetensors", 3, &["`body.0.rdb1.conv6.weight`"]);
    let mut less = whole;
    less.remove("body.1.rdb2.conv3.bias");
    save(&less, &place("less.safetensors"));
    up(
        "less.safetensors",
        3,
        &["no tensor `upscaler.body.1.rdb2.conv3.bias`"],
    );
    let mut nan = load(&network("compact_x2"));
    let bias = nan["body.0.bias"].to_dtype(DType::F32).unwrap();
    nan.insert("body.0.bias".into(), (bias * f64::NAN).unwrap());
    save(&nan, &place("nan.safetensors"));
    up("nan.safetensors", 5, &["not finite"]);
    fail(
        sdgen(dir.path()).args(["a frog", "-m", "x4.safetensors"]),
        3,
        &["is an upscaler", "sdgen upscale -m"],
    );
}

#[test]
fn a_drawn_picture_stays_one_that_can_be_drawn_again() {
    let dir = folder();
    let place = |name: &str| dir.path().join(name);
    let known = |name: &str| {
        read_metadata(&std::fs::read(place(name)).unwrap())
            .unwrap()
            .unwrap()
    };
    let run = |args: &[&str]| succeed(sdgen(dir.path()).args(args));
    run(&[
        "a frog", "-s", "7", "--steps", "2", "-W", "64", "-H", "48", "-o", "frog.png", "-q",
    ]);
    run(&[
        "upscale",
        "-q",
        "-m",
        "x4.safetensors",
        "--scale",
        "3",
        "frog.png",
        "-o",
        "large.webp",
    ]);
    run(&[
        "upscale",
        "-q",
        "-m",
        "lanczos",
        "--scale",
        "2",
        "frog.png",
        "-o",
        "plain.png",
    ]);
    let metadata = known("large.webp");
    assert_eq!(
        (
            metadata.sdgen["prompt"].as_str(),
            metadata.sdgen["upscale"].as_f64()
        ),
        (Some("a frog"), Some(3.0))
    );
    assert!(
        metadata
            .parameters
            .contains("Postprocess upscale by: 3, Postprocess upscaler: x4"),
        "{}",
        metadata.parameters
    );
    let output = run(&[
        "check",
        "-q",
        "--upscaler",
        "x4.safetensors",
        "frog.png",
        "large.webp",
        "plain.png",
    ]);
    assert_eq!(
        stdout(&output).matches("identical").count(),
        3,
        "{}",
        stdout(&output)
    );
    let output = sdgen(dir.path())
        .args(["check", "large.webp"])
        .output()
        .unwrap();
    assert!(
        stderr(&output).contains("the network `x4`") && stderr(&output).contains("--upscaler"),
        "{}",
        stderr(&output)
    );
    std::fs::copy(network("rrdb_x2"), place("other.safetensors")).unwrap();
    let output = sdgen(dir.path())
        .args(["check", "large.webp", "--upscaler", "other.safetensors"])
        .output()
        .unwrap();
    assert!(
        stderr(&output).contains("the network `x4`"),
        "{}",
        stderr(&output)
    );

    // what has lost bits on its way, was upscaled before, or was never drawn keeps what is known,
    // and says that it is not redrawn
    run(&[
        "a frog", "-s", "7", "--steps", "2", "-W", "64", "-H", "48", "-o", "frog.jpg", "-q",
    ]);
    for (source, result) in [
        ("frog.jpg", "a.png"),
        ("plain.png", "b.png"),
        ("source.png", "c.png"),
        ("b.png", "d.png"),
    ] {
        run(&[
            "upscale",
            "-q",
            "-m",
            "x4.safetensors",
            source,
            "-o",
            result,
        ]);
        let metadata = known(result);
        assert_eq!(metadata.sdgen["upscaler"], "x4");
        assert_eq!(
            metadata.sdgen["upscaled_from"],
            Input::read(&place(source)).unwrap().sha256()
        );
        assert_eq!(
            metadata.sdgen["prompt"].as_str(),
            (source != "source.png").then_some("a frog"),
            "{source}"
        );
        let output = sdgen(dir.path()).args(["check", result]).output().unwrap();
        assert_eq!(output.status.code(), Some(6));
        assert!(
            stderr(&output).contains("upscaled from a file"),
            "{}",
            stderr(&output)
        );
    }
    run(&[
        "upscale",
        "-q",
        "-m",
        "lanczos",
        "--scale",
        "2",
        "frog.png",
        "-o",
        "bare.png",
        "--no-metadata",
    ]);
    assert!(
        read_metadata(&std::fs::read(place("bare.png")).unwrap())
            .unwrap()
            .is_none()
    );
}

#[test]
fn pictures_can_be_made_larger_as_they_are_drawn() {
    let dir = folder();
    let frog = [
        "a frog", "-s", "7..9", "--steps", "2", "-W", "48", "-H", "32", "-q",
    ];
    let draw = |options: &[&str]| succeed(sdgen(dir.path()).args(frog).args(options));
    draw(&["-o", "small-{seed}.png"]);
    succeed(sdgen(dir.path()).args([
        "upscale",
        "-q",
        "-m",
        "x4.safetensors",
        "--scale",
        "3",
        "small-7.png",
        "small-8.png",
        "-o",
        "{name}-large.png",
    ]));
    draw(&["-o", "large-{seed}.png", "--upscale", "x4.safetensors:3"]);
    for seed in [7, 8] {
        let [direct, later] = ["large-SEED.png", "small-SEED-large.png"]
            .map(|name| dir.path().join(name.replace("SEED", &seed.to_string())));
        assert!(
            std::fs::read(direct).unwrap() == std::fs::read(later).unwrap(),
            "seed {seed}"
        );
    }
    let mut again = sdgen(dir.path());
    let again = again.args(&frog[..frog.len() - 1]).args([
        "-o",
        "large-{seed}.png",
        "--resume",
        "--upscale",
    ]);
    assert!(
        stderr(&succeed(again.arg("x4.safetensors:3")))
            .contains("2 of 2 pictures are there already")
    );
    succeed(sdgen(dir.path()).args([
        "check",
        "-q",
        "large-7.png",
        "large-8.png",
        "--upscaler",
        "x4.safetensors",
    ]));
    draw(&["-o", "plain-{seed}.png", "--upscale", "lanczos"]);
    assert_eq!(
        read(&dir.path().join("plain-7.png")),
        read(&dir.path().join("small-7.png")).fit(96, 64, Fit::Stretch)
    );

    fail(
        sdgen(dir.path())
            .args(frog)
            .args(["-W", "512", "-o", "x/", "--upscale", "lanczos:64"]),
        2,
        &["32768x2048", "16384"],
    );
    fail(
        sdgen(dir.path())
            .args(frog)
            .args(["-o", "x/", "--upscale", "source.png:2"]),
        3,
        &["`source.png`"],
    );
}

#[test]
fn what_was_made_larger_from_a_lossy_file_is_drawn_again() {
    let dir = folder();
    let draw = |options: &[&str]| {
        let frog = ["a frog", "-s", "7", "--steps", "2", "-W", "32", "-H", "32"];
        stderr(&succeed(sdgen(dir.path()).args(frog).args(options)))
    };
    draw(&["-o", "frog.jpg"]);
    succeed(sdgen(dir.path()).args([
        "upscale",
        "-q",
        "-m",
        "lanczos",
        "frog.jpg",
        "-o",
        "large.png",
    ]));
    assert!(
        draw(&["-o", "large.png", "--resume", "--upscale", "lanczos"])
            .contains("0 of 1 pictures are there already")
    );
    assert!(
        draw(&["-o", "large.png", "--resume", "--upscale", "lanczos"])
            .contains("1 of 1 pictures are there already")
    );
}
