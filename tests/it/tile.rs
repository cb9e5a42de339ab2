//! Seamless pictures: `--tile`. Goldens: `fixtures/tile.py`.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use sdgen::model::unet::{UNet, UNetInputs};
use sdgen::model::unet_config::UNetConfig;
use sdgen::model::{AddedCond, Autoencoder, Conditioning, tiles};
use sdgen::nn::Forward;
use sdgen::nn::padding::PaddingMode::{Circular, Zeros};
use sdgen::weights::{Checkpoint, Origin};
use std::path::Path;

fn draw(folder: &Path, name: &str, args: &[&str]) -> RgbImage {
    succeed(sdgen(folder).args(["-q", "--force", "-o", name]).args(args));
    image::open(folder.join(name)).unwrap().to_rgb8()
}

#[test]
fn pictures_are_those_of_diffusers_with_circular_convolutions() {
    let dir = tempfile::tempdir().unwrap();
    with_base("taesd", &dir.path().join("tiny"));
    let tensors = load(&fixture("tile/goldens.safetensors"));
    let runs = &goldens("tile")["runs"];
    let runs = runs.as_array().unwrap();
    assert_eq!(runs.len(), 8);
    for run in runs {
        let text = |key: &str| run[key].as_str().unwrap().to_string();
        let [name, tile] = ["name", "tile"].map(text);
        let mut args = vec![
            text("prompt"),
            "-n".into(),
            text("negative_prompt"),
            "-m".into(),
        ];
        args.push(
            fixture(run["model"].as_str().unwrap())
                .to_str()
                .unwrap()
                .into(),
        );
        for key in ["seed", "steps", "guidance", "width", "height"] {
            args.extend([format!("--{key}"), run[key].to_string()]);
        }
        args.extend(
            run["vae"]
                .as_str()
                .into_iter()
                .flat_map(|_| ["--vae".into(), "tiny/vae".into()]),
        );
        args.extend(
            run["scheduler"]
                .as_str()
                .into_iter()
                .flat_map(|_| ["--sampler".into(), "euler".into()]),
        );
        let mut args: Vec<&str> = args.iter().map(|arg| &**arg).collect();
        let plain = draw(dir.path(), "plain.png", &args);
        args.extend(["--tile", &tile]);
        let tiled = draw(dir.path(), "tiled.png", &args);
        let golden = levels(&tensors[&format!("run.{name}.image")]);
        assert_same_levels(&name, tiled.as_raw(), &golden);
        // measured: 149 and more
        assert!(
            worst_level(plain.as_raw(), &golden) > VISIBLE,
            "{name}: circular convolutions should matter"
        );
    }
}

/// [b, h, w, c], begun elsewhere.
fn moved(x: &Tensor, down: usize, right: usize) -> Tensor {
    x.roll(down as i32, 1)
        .unwrap()
        .roll(right as i32, 2)
        .unwrap()
}

type Run<'a> = dyn Fn(&Tensor) -> Tensor + 'a;

/// A picture that repeats without end has no beginning, so networks must not care where it is cut.
#[test]
fn no_network_knows_where_a_seamless_picture_begins() {
    let device = Device::Cpu;
    let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &device).unwrap();
    for model in ["sd1", "odd", "sdxl", "taesd"] {
        let dir = tempfile::tempdir().unwrap();
        with_base(model, dir.path());
        let checkpoint = Checkpoint::open(Origin::Path(dir.path())).unwrap();
        let weights = |part| checkpoint.weights(part, &device, DType::F32);
        let config = UNetConfig::from_json(checkpoint.config("unet").unwrap()).unwrap();
        let unet = UNet::new(&weights("unet"), &config).unwrap();
        let added = checkpoint.config("unet").unwrap()["addition_embed_type"].is_string();
        let added = added.then(|| AddedCond {
            text_embeds: random(&[1, 40]),
            time_ids: vec![vec![16.0; 6]],
        });
        let width = checkpoint.config("unet").unwrap()["cross_attention_dim"]
            .as_u64()
            .unwrap() as usize;
        let conditioning = Conditioning {
            context: random(&[1, 7, width]),
            lengths: vec![],
            added_cond: added,
            guidance: None,
        };
        let cx = Forward::on(&device);
        let vae = Autoencoder::from_json(checkpoint.config("vae").unwrap()).unwrap();
        let (encoder, decoder) = (
            vae.encoder(&weights("vae")).unwrap(),
            vae.decoder(&weights("vae")).unwrap(),
        );
        let (latents, factor) = (random(&[1, 8, 12, config.in_channels]), vae.factor());
        let picture = decoder.decode(cx, &latents).unwrap();
        for (padding, down, right) in [
            ([Zeros, Circular], 0, 4),
            ([Circular, Zeros], 4, 0),
            ([Circular; 2], 4, 8),
        ] {
            let cx = cx.padded(padding);
            let unet = unet.with_conditioning(cx, &conditioning, None).unwrap();
            let networks: [(&str, &Tensor, usize, &Run); 3] = [
                ("U-Net", &latents, 1, &|x| {
                    unet.forward(UNetInputs::new(x, 500.0)).unwrap()
                }),
                ("decoder", &latents, 1, &|x| decoder.decode(cx, x).unwrap()),
                ("encoder", &picture, factor, &|x| {
                    encoder.encode(cx, x, None).unwrap().mean
                }),
            ];
            for (network, x, scale, run) in networks {
                let y = run(x);
                let scaled = |n: usize| n * scale * y.dim(1).unwrap() / x.dim(1).unwrap();
                let of_moved = run(&moved(x, down * scale, right * scale));
                let off = difference(&of_moved, &moved(&y, scaled(down), scaled(right)));
                // sums in another order, as Winograd's tiles lie elsewhere
                assert!(off < 1e-4, "{model}, {network}, {padding:?}: {off}");
                // and each direction that is not asked for has its edges
                if padding != [Circular; 2] {
                    let across = difference(
                        &run(&moved(x, right * scale, down * scale)),
                        &moved(&y, scaled(right), scaled(down)),
                    );
                    // ten times what sums in another order may do
                    assert!(across > 1e-3, "{model}, {network}, {padding:?}: {across}");
                }
            }
        }
    }
}

/// Nothing of a forward pass is kept in the networks, so threads that share them do not disturb
/// each other.
#[test]
fn threads_that_share_networks_may_pad_differently() {
    fn is_shared<T: Send + Sync>(_: &T) {}
    let device = Device::Cpu;
    let checkpoint = Checkpoint::open(Origin::Path(&fixture("sd1"))).unwrap();
    let weights = |part| checkpoint.weights(part, &device, DType::F32);
    let config = UNetConfig::from_json(checkpoint.config("unet").unwrap()).unwrap();
    let width = checkpoint.config("unet").unwrap()["cross_attention_dim"]
        .as_u64()
        .unwrap() as usize;
    let unet = UNet::new(&weights("unet"), &config).unwrap();
    let vae = Autoencoder::from_json(checkpoint.config("vae").unwrap()).unwrap();
    let (encoder, decoder) = (
        vae.encoder(&weights("vae")).unwrap(),
        vae.decoder(&weights("vae")).unwrap(),
    );
    is_shared(&encoder);
    let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &device).unwrap();
    let (latents, context) = (
        random(&[1, 8, 12, config.in_channels]),
        random(&[1, 7, width]),
    );
    let bits = |x: Tensor| {
        let values = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let run = |padding| {
        let cx = Forward::on(&device).padded(padding);
        let unet = unet
            .with_conditioning(cx, &context.clone().into(), None)
            .unwrap();
        let predicted = unet.forward(UNetInputs::new(&latents, 500.0)).unwrap();
        let rgb = decoder.decode(cx, &predicted).unwrap();
        let mean = encoder.encode(cx, &rgb, None).unwrap().mean;
        [predicted, rgb, mean].map(bits)
    };
    let each = [[Zeros; 2], [Circular; 2], [Zeros, Circular]];
    let alone = each.map(run);
    assert!(alone[0] != alone[1] && alone[1] != alone[2]);
    let run = &run;
    std::thread::scope(|scope| {
        for (padding, alone) in each.iter().zip(&alone) {
            scope.spawn(move || {
                for _ in 0..5 {
                    assert!(run(*padding) == *alone, "{padding:?}");
                }
            });
        }
    });
}

/// Mean step from each column to the next, the last one's to the first; and of rows.
fn steps(picture: &RgbImage) -> [Vec<f64>; 2] {
    let (w, h) = picture.dimensions();
    let apart = |a: (u32, u32), b: (u32, u32)| {
        let (a, b) = (picture.get_pixel(a.0, a.1), picture.get_pixel(b.0, b.1));
        a.0.iter()
            .zip(&b.0)
            .map(|(a, b)| f64::from(a.abs_diff(*b)))
            .sum::<f64>()
            / 3.0
    };
    [
        (0..w)
            .map(|x| (0..h).map(|y| apart((x, y), ((x + 1) % w, y))).sum::<f64>() / f64::from(h))
            .collect(),
        (0..h)
            .map(|y| (0..w).map(|x| apart((x, y), (x, (y + 1) % h))).sum::<f64>() / f64::from(w))
            .collect(),
    ]
}

#[test]
fn opposite_edges_of_a_tiled_picture_fit_together_whole_or_decoded_in_tiles() {
    let dir = tempfile::tempdir().unwrap();
    for (size, tiling) in [("128", "off"), ("256", "on")] {
        let args = [
            "a rocket and a cat, 3d",
            "-s",
            "3",
            "-W",
            size,
            "-H",
            size,
            "--vae-tiling",
            tiling,
        ];
        let tiled = draw(
            dir.path(),
            "tiled.png",
            &[&args[..], &["--tile", "xy"]].concat(),
        );
        for (direction, steps) in ["columns", "rows"].into_iter().zip(steps(&tiled)) {
            let (seam, inside) = steps.split_last().unwrap();
            let (mean, most) = (
                inside.iter().sum::<f64>() / inside.len() as f64,
                inside.iter().copied().fold(0.0, f64::max),
            );
            assert!(
                *seam < most && *seam < 2.0 * mean,
                "{size}, {direction}: {seam:.2} at the seam, {mean:.2} inside, {most:.2} at most"
            );
            // where nothing is at the edges, everything fits
            assert!(
                *seam > 0.5,
                "{size}, {direction}: there is nothing at the seam"
            );
        }
    }
}

#[test]
fn tiles_of_a_seamless_picture_are_blended_over_its_edge() {
    // each tile is told from the next by its brightness, as norms of real decoders do it
    let latents = Tensor::arange(0f32, 24.0, &Device::Cpu)
        .unwrap()
        .reshape((1, 1, 24, 1))
        .unwrap();
    let decode = |cx: Forward, x: &Tensor| {
        assert_eq!(
            cx.padding, [Zeros; 2],
            "a tile's other end is not the picture's"
        );
        Tensor::ones_like(x)?.broadcast_mul(&x.mean_all()?)
    };
    let decoded = |padding| {
        let cx = Forward::on(&Device::Cpu).padded(padding);
        tiles::apply(cx, &latents, 8, decode)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
    };
    let (plain, seamless) = (decoded([Zeros; 2]), decoded([Zeros, Circular]));
    assert_eq!((plain.len(), seamless.len()), (24, 24));
    // the means of the first tile, 0 to 7, and of the last, 16 to 23, are 16 apart
    assert!((plain[0] - plain[23]).abs() > 15.0, "{plain:?}");
    // the first is of the last tile, the second is on the way to the first one
    assert!(
        seamless[0] == seamless[23] && seamless[0] > seamless[1] && seamless[1] > seamless[2],
        "{seamless:?}"
    );
    assert_eq!(seamless[2..18], plain[2..18]);
    assert_eq!(decoded([Circular, Zeros]).len(), 24);
}

#[test]
fn tiling_is_remembered_drawn_again_and_may_be_swept_beside_other_pictures() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("sd1");
    let args = [
        "a cat",
        "-s",
        "3",
        "--steps",
        "2",
        "-W",
        "16",
        "-H",
        "16",
        "-q",
        "-m",
        model.to_str().unwrap(),
    ];
    succeed(sdgen(dir.path()).args(args).args(["-o", "plain.png"]));
    succeed(sdgen(dir.path()).args(args).args([
        "--sweep",
        "tile=x,y,xy",
        "--sweep",
        "guidance=1,7.5",
        "-b",
        "6",
        "-o",
        "{sweep}.png",
    ]));
    let file = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    let metadata = |name: &str| sdgen::image::read_metadata(&file(name)).unwrap().unwrap();
    for (tile, said) in [
        ("x", ", Tile X: True, "),
        ("y", ", Tile Y: True, "),
        ("xy", ", Tiling: True, "),
    ] {
        let name = format!("tile-{tile}-guidance-7.5.png");
        assert_eq!(metadata(&name).sdgen["tile"], tile);
        assert!(
            metadata(&name).parameters.contains(said),
            "{}",
            metadata(&name).parameters
        );
        // alone, and in a line
        std::fs::write(
            dir.path().join("jobs.jsonl"),
            format!(r#"{{"prompt": "a cat", "tile": "{tile}", "output": "alone.png"}}"#),
        )
        .unwrap();
        succeed(
            sdgen(dir.path())
                .args(&args[1..])
                .args(["--from", "jobs.jsonl", "--force"]),
        );
        assert!(file("alone.png") == file(&name));
    }
    let names = [
        "plain.png",
        "tile-x-guidance-7.5.png",
        "tile-y-guidance-1.png",
        "tile-xy-guidance-7.5.png",
    ];
    succeed(
        sdgen(dir.path())
            .args(["check", "-m", model.to_str().unwrap()])
            .args(names),
    );
    fail(
        sdgen(dir.path()).args(args).args(["--tile", "z"]),
        2,
        &["--tile", "x, y, xy"],
    );
}

#[test]
fn a_source_picture_is_encoded_as_seamless_as_what_is_drawn_over_it() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("sd1");
    let args = [
        "a cat",
        "-s",
        "3",
        "--steps",
        "4",
        "-W",
        "32",
        "-H",
        "16",
        "-m",
        model.to_str().unwrap(),
    ];
    let _source = draw(dir.path(), "source.png", &args);
    let over = [&args[..], &["-i", "source.png", "--strength", "0.5"]].concat();
    succeed(
        sdgen(dir.path())
            .args(&over)
            .args(["-q", "--sweep", "tile=x,y", "-o", "{sweep}.png"]),
    );
    let [plain, x, y] = [&[][..], &["--tile", "x"], &["--tile", "y"]]
        .map(|tile| draw(dir.path(), "alone.png", &[&over[..], tile].concat()));
    for (picture, name) in [(&x, "tile-x.png"), (&y, "tile-y.png")] {
        assert!(
            *picture == image::open(dir.path().join(name)).unwrap().to_rgb8(),
            "{name}"
        );
        assert!(*picture != plain);
    }
}

#[test]
fn a_picture_drawn_larger_over_a_small_one_is_seamless_throughout() {
    let dir = tempfile::tempdir().unwrap();
    // next to nothing of the second drawing is new: it shows how the first was decoded and encoded
    let args = [
        "a rocket and a cat, 3d",
        "-s",
        "3",
        "--tile",
        "xy",
        "--hires",
        "2x",
        "--hires-strength",
        "0.05",
    ];
    for steps in steps(&draw(dir.path(), "tiled.png", &args)) {
        let (seam, inside) = steps.split_last().unwrap();
        assert!(
            *seam < 2.0 * inside.iter().sum::<f64>() / inside.len() as f64,
            "{seam:.2} at the seam"
        );
    }
}
