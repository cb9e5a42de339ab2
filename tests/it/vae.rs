//! `--vae`: another decoder than the model's own, in every form in which one is found.
//! `--vae-tiling`: decoding in parts.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use sdgen::image::read_metadata;
use sdgen::model::Autoencoder;
use sdgen::nn::Forward;
use sdgen::weights::{Checkpoint, Origin};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::Path;

/// `sd1/` and the same with TAESD for its VAE.
fn models(folder: &Path) {
    with_base("sd1", &folder.join("kl"));
    with_base("taesd", &folder.join("tiny"));
}

fn draw(folder: &Path, model: &str, options: &[&str], output: &str) -> Vec<u8> {
    let small = [
        "a frog", "-s", "7", "--steps", "2", "-W", "16", "-H", "16", "-q", "-m", model, "-o",
        output,
    ];
    succeed(sdgen(folder).args(small).args(options));
    std::fs::read(folder.join(output)).unwrap()
}

#[test]
fn a_vae_decodes_the_same_inside_of_a_model_and_beside_it_in_any_layout() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    let kl = draw(dir.path(), "kl", &["--no-metadata"], "kl.png");
    let tiny = draw(dir.path(), "tiny", &["--no-metadata"], "tiny.png");
    assert!(kl != tiny);
    let weights = |model: &str| {
        dir.path()
            .join(model)
            .join("vae/diffusion_pytorch_model.safetensors")
    };
    // the original layouts: TAESD's decoder alone, and the VAE of a whole checkpoint, with its
    // prefix and without
    let renamed: HashMap<_, _> = load(&weights("tiny"))
        .into_iter()
        .filter_map(|(key, tensor)| {
            let (layer, rest) = key.strip_prefix("decoder.layers.")?.split_once('.')?;
            Some((
                format!("{}.{rest}", layer.parse::<usize>().unwrap() + 1),
                tensor,
            ))
        })
        .collect();
    save(&renamed, &dir.path().join("taesd_decoder.safetensors"));
    single_file(
        "single_sd1.json",
        &dir.path().join("kl"),
        &dir.path().join("whole.safetensors"),
    );
    let whole = load(&dir.path().join("whole.safetensors"));
    let alone = whole.into_iter().filter_map(|(key, tensor)| {
        Some((key.strip_prefix("first_stage_model.")?.to_string(), tensor))
    });
    save(&alone.collect(), &dir.path().join("alone.safetensors"));
    let file = "vae/diffusion_pytorch_model.safetensors";
    let (in_tiny, in_kl) = (format!("tiny/{file}"), format!("kl/{file}"));
    for (i, vae) in ["tiny/vae", "tiny", &in_tiny, "taesd_decoder.safetensors"]
        .into_iter()
        .enumerate()
    {
        assert!(
            draw(
                dir.path(),
                "kl",
                &["--no-metadata", "--vae", vae],
                &format!("a{i}.png")
            ) == tiny,
            "{vae}"
        );
    }
    for (i, vae) in [
        "kl/vae",
        "kl",
        &in_kl,
        "whole.safetensors",
        "alone.safetensors",
    ]
    .into_iter()
    .enumerate()
    {
        assert!(
            draw(
                dir.path(),
                "tiny",
                &["--no-metadata", "--vae", vae],
                &format!("b{i}.png")
            ) == kl,
            "{vae}"
        );
    }
}

#[test]
fn a_file_without_a_configuration_takes_the_scale_of_the_model_that_it_decodes_for() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    edit_json(&dir.path().join("kl/vae/config.json"), |c| {
        drop(c.insert("scaling_factor".into(), 0.13025.into()))
    });
    let mut pictures = vec![];
    for (i, shift) in [None, Some(0.4)].into_iter().enumerate() {
        let [own, file] = ["own", "file"].map(|name| format!("{name}-{i}.png"));
        edit_json(&dir.path().join("kl/vae/config.json"), |c| {
            drop(c.insert("shift_factor".into(), shift.into()))
        });
        let own = draw(dir.path(), "kl", &["--no-metadata"], &own);
        let file = draw(
            dir.path(),
            "kl",
            &[
                "--no-metadata",
                "--vae",
                "kl/vae/diffusion_pytorch_model.safetensors",
            ],
            &file,
        );
        assert!(own == file, "{shift:?}");
        pictures.push(own);
    }
    assert!(pictures[0] != pictures[1], "the shift changes nothing");
}

/// diffusers' pipelines: latents = (encoded - shift) * scale, decoded = latents / scale + shift.
#[test]
fn the_shift_factor_of_a_vae_is_obeyed_and_one_that_is_not_a_number_is_refused() {
    for model in ["sd1", "taesd"] {
        let dir = tempfile::tempdir().unwrap();
        with_base(model, dir.path());
        let checkpoint = Checkpoint::open(Origin::Path(dir.path())).unwrap();
        let cx = Forward::on(&Device::Cpu);
        let vae = |shift: Value| {
            let mut config = checkpoint.config("vae").unwrap().clone();
            config["scaling_factor"] = 0.5.into();
            config["shift_factor"] = shift;
            Autoencoder::from_json(&config)
        };
        let run = |shift: Value, latents: &Tensor, rgb: &Tensor| {
            let vae = vae(shift).unwrap();
            let weights = checkpoint.weights("vae", &Device::Cpu, DType::F32);
            let (encoder, decoder) = (
                vae.encoder(&weights).unwrap(),
                vae.decoder(&weights).unwrap(),
            );
            (
                decoder.decode(cx, latents).unwrap(),
                encoder.encode(cx, rgb, None).unwrap(),
            )
        };
        let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let same = |a: &Tensor, b: &Tensor| {
            let pairs = values(a).into_iter().zip(values(b));
            pairs.map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) < 1e-4
        };
        let latents = Tensor::randn(0f32, 1.0, (1, 4, 6, 4), &Device::Cpu).unwrap();
        let rgb = Tensor::rand(0f32, 1.0, (1, 32, 48, 3), &Device::Cpu).unwrap();
        let (decoded, encoded) = run(0.25.into(), &latents, &rgb);
        let (of_shifted, unshifted) = run(Value::Null, &(&latents + 0.125).unwrap(), &rgb);
        assert!(same(&decoded, &of_shifted), "{model}");
        let mean = (&unshifted.mean - 0.125).unwrap();
        assert!(same(&encoded.mean, &mean), "{model}");
        if let (Some(std), Some(unshifted)) = (&encoded.std, &unshifted.std) {
            assert!(same(std, unshifted), "{model}");
        }
        assert!(vae("0.25".into()).is_err(), "{model}");
    }
}

#[test]
fn pictures_remember_their_vae_and_resume_and_check_know_it() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    draw(dir.path(), "kl", &[], "own.png");
    draw(dir.path(), "kl", &["--vae", "tiny/vae"], "other.png");
    let metadata =
        sdgen::image::read_metadata(&std::fs::read(dir.path().join("other.png")).unwrap())
            .unwrap()
            .unwrap();
    let file = dir
        .path()
        .join("tiny/vae/diffusion_pytorch_model.safetensors");
    let hash = sdgen::hex::hex(&Sha256::digest(std::fs::read(file).unwrap()));
    assert_eq!(metadata.sdgen["vae"], "tiny");
    assert!(
        metadata
            .parameters
            .contains(&format!("VAE: tiny, VAE hash: {}", &hash[..10])),
        "{}",
        metadata.parameters
    );

    let resume = |options: &[&str]| {
        let small = [
            "a frog", "-s", "7", "--steps", "2", "-W", "16", "-H", "16", "-m", "kl", "-o",
            "own.png", "--resume",
        ];
        stderr(&succeed(sdgen(dir.path()).args(small).args(options)))
    };
    assert!(resume(&[]).contains("1 of 1 pictures are there already"));
    assert!(resume(&["--vae", "tiny/vae"]).contains("0 of 1 pictures are there already"));
    assert!(resume(&["--vae", "tiny/vae"]).contains("1 of 1 pictures are there already"));
    assert!(resume(&[]).contains("0 of 1 pictures are there already"));

    let check = |options: &[&str]| {
        let output = sdgen(dir.path())
            .args(["check", "own.png", "other.png", "-m", "kl"])
            .args(options)
            .output()
            .unwrap();
        (output.status.code(), stdout(&output), stderr(&output))
    };
    assert_eq!(
        check(&["--vae", "tiny/vae"]).1,
        "own.png: identical\nother.png: identical\n"
    );
    let (code, said, errors) = check(&[]);
    assert_eq!(
        (code, &*said),
        (Some(6), "own.png: identical\nother.png: failed\n"),
        "{errors}"
    );
    assert!(
        errors.contains("it was drawn with the VAE `tiny`\n\nhint: pass that with `--vae`"),
        "{errors}"
    );
    assert!(check(&["--vae", "kl/vae"]).1.contains("other.png: failed"));
}

#[test]
fn what_is_no_vae_or_one_for_other_latents_says_so() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    with_base("odd", &dir.path().join("odd"));
    let run = |vae: &str| {
        let mut command = sdgen(dir.path());
        command.args(["x", "-m", "kl", "--vae", vae, "-o", "x.png"]);
        command
    };
    fail(
        &mut run("nothing"),
        3,
        &[
            "there is no VAE `nothing`",
            "hint: `--vae` takes a folder",
            "taesdxl",
        ],
    );
    // short names are those of the hub, which is not asked here
    fail(
        &mut run("taesd"),
        3,
        &[
            "`madebyollin/taesd` is not in the hub's cache",
            "sdgen pull madebyollin/taesd",
        ],
    );
    fail(
        &mut run("kl/tokenizer"),
        3,
        &["`kl/tokenizer` is not a VAE", "config.json"],
    );
    fail(
        &mut run("kl/unet/diffusion_pytorch_model.safetensors"),
        3,
        &["is only a U-Net, not a VAE"],
    );
    fail(
        &mut run("odd/vae"),
        3,
        &["`odd` decodes 8 channels, `kl` draws in 4", "hint:"],
    );
    edit_json(&dir.path().join("tiny/vae/config.json"), |c| {
        drop(c.insert("upsampling_scaling_factor".into(), 4.into()))
    });
    fail(
        &mut run("tiny/vae"),
        3,
        &["`upsampling_scaling_factor` of the VAE is 4"],
    );
}

/// Draws a quick picture and returns what it says of its tiles.
fn draw_tiled(folder: &Path, options: &[&str], output: &str) -> Value {
    succeed(
        sdgen(folder)
            .args(["a frog", "-s", "7", "--steps", "2", "-q", "-o", output])
            .args(options),
    );
    let metadata = read_metadata(&std::fs::read(folder.join(output)).unwrap())
        .unwrap()
        .unwrap();
    let tiled = metadata.sdgen["vae_tiling"].clone();
    assert_eq!(
        metadata.parameters.contains("VAE tiling: True"),
        tiled == true,
        "{}",
        metadata.parameters
    );
    tiled
}

#[test]
fn a_picture_in_tiles_is_close_to_the_whole_one_and_remembers_it() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    let check = |args: &[&str]| {
        let output = sdgen(dir.path()).arg("check").args(args).output().unwrap();
        (
            output.status.code().unwrap(),
            stdout(&output) + &stderr(&output),
        )
    };
    // random weights in tiles of 16 pixels (measured: 23 dB); trained ones in tiles of 128 (31 to
    // 38 dB on seven pictures); TAESD, which has no norms (64 dB)
    for (options, least_db) in [
        (&["-m", "kl", "-W", "40", "-H", "24"][..], "20"),
        (&["-W", "256", "-H", "192"], "30"),
        (&["-m", "tiny", "-W", "600", "-H", "16"], "50"),
    ] {
        let draw = |tiling: &str, output: &str| {
            draw_tiled(
                dir.path(),
                &[options, &["--force", "--vae-tiling", tiling]].concat(),
                output,
            )
        };
        assert_eq!(draw("off", "whole.png"), false);
        assert_eq!(draw("auto", "auto.png"), false, "there is memory enough");
        assert_eq!(draw("on", "tiled.png"), true);
        let (code, said) = check(&["whole.png", "auto.png", "tiled.png"]);
        assert_eq!((code, said.matches("identical").count()), (0, 3), "{said}");
        assert_eq!(
            check(&["tiled.png", "--expect", "whole.png"]).0,
            1,
            "tiles change a picture"
        );
        let (code, said) = check(&["tiled.png", "--expect", "whole.png", "--min-psnr", least_db]);
        assert_eq!(code, 0, "{options:?}: {said}");
    }
}

#[test]
fn what_fits_into_one_tile_is_drawn_whole() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(
        draw_tiled(
            dir.path(),
            &["-W", "128", "-H", "64", "--vae-tiling", "on"],
            "a.png"
        ),
        false
    );
    assert_eq!(
        draw_tiled(
            dir.path(),
            &["-W", "144", "-H", "64", "--vae-tiling", "on"],
            "b.png"
        ),
        true
    );
}

#[test]
fn resume_draws_again_only_where_tiles_are_asked_for_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let small = ["-W", "160", "-H", "64"];
    draw_tiled(
        dir.path(),
        &[&small[..], &["--vae-tiling", "on"]].concat(),
        "a.png",
    );
    let resume = |tiling: &str| {
        let args = [
            "a frog",
            "-s",
            "7",
            "--steps",
            "2",
            "-o",
            "a.png",
            "--resume",
            "--json",
            "--vae-tiling",
            tiling,
        ];
        let output = succeed(sdgen(dir.path()).args(small).args(args));
        let record: Value = serde_json::from_str(&stdout(&output)).unwrap();
        (
            record["skipped"] == true,
            record["vae_tiling"].as_bool().unwrap(),
        )
    };
    assert_eq!(resume("auto"), (true, true));
    assert_eq!(resume("on"), (true, true));
    assert_eq!(resume("off"), (false, false));
    assert_eq!(resume("auto"), (true, false));
    assert_eq!(resume("on"), (false, true));
}

#[test]
fn auto_decodes_in_tiles_what_does_not_fit_into_memory_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    // wider than any machine's memory
    edit_json(&dir.path().join("kl/vae/config.json"), |c| {
        drop(c.insert("block_out_channels".into(), json!([32, 1 << 24])))
    });
    let dry_run = |options: &[&str]| {
        let args = [
            "a frog",
            "-m",
            "kl",
            "-s",
            "7",
            "--dry-run",
            "--json",
            "--device",
            "cpu",
            "-W",
            "4096",
            "-H",
            "4096",
        ];
        let output = succeed(sdgen(dir.path()).args(args).args(options));
        let record: Value = serde_json::from_str(&stdout(&output)).unwrap();
        (record["vae_tiling"].as_bool().unwrap(), stderr(&output))
    };
    let (tiled, said) = dry_run(&[]);
    assert!(
        said.contains("4096x4096 is decoded in tiles: the whole would need about 140737"),
        "{said}"
    );
    assert!(tiled);
    let (tiled, said) = dry_run(&["--vae-tiling", "off"]);
    assert!(
        !tiled && said.contains("about 140737") && !said.contains("tiles"),
        "{said}"
    );
}

#[test]
fn the_memory_of_a_decode_is_that_of_its_widest_activation_or_of_a_tile() {
    let config = json!({ "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 512 });
    let vae = Autoencoder::from_json(&config).unwrap();
    let mb = |h: usize, w: usize, tiled: bool| vae.decode_bytes(h, w, tiled) / 1_000_000;
    // measured, `sdgen bench --only vae` above what 64x64 takes: 353 MB at 512x512, 487 MB at
    // 768x512
    assert_eq!(
        (mb(64, 64, false), mb(64, 96, false), mb(128, 128, false)),
        (344, 517, 1379)
    );
    assert_eq!(
        (vae.tile(), mb(128, 128, true), mb(512, 512, true)),
        (64, 373, 939)
    );
}
