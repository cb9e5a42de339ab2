//! `--merge` and `--minus`: shares of other checkpoints, added as weights are read.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;
use std::path::Path;

const FILES: [&str; 3] = [
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
];

/// The sd1 fixture with every floating-point tensor made anew from its own and its place in the
/// file.
fn changed(to: &Path, change: impl Fn(usize, Tensor) -> Tensor) {
    copy_folder(&fixture("sd1"), to);
    for file in FILES {
        let tensors = candle_core::safetensors::load(to.join(file), &Device::Cpu).unwrap();
        let mut names: Vec<&String> = tensors.keys().collect();
        names.sort();
        let change = |(i, name): (usize, &String)| {
            let tensor = &tensors[name];
            let made = match tensor.dtype() {
                DType::F16 => change(i, tensor.to_dtype(DType::F32).unwrap())
                    .to_dtype(DType::F16)
                    .unwrap(),
                _ => tensor.clone(),
            };
            (name.clone(), made)
        };
        let made: HashMap<String, Tensor> = names.into_iter().enumerate().map(change).collect();
        candle_core::safetensors::save(&made, to.join(file)).unwrap();
    }
}

fn draw(folder: &Path, args: &[&str]) -> Vec<u8> {
    let mut command = sdgen(folder);
    command.args([
        "the cat in the house",
        "-s",
        "1",
        "--steps",
        "3",
        "-q",
        "--no-metadata",
        "-o",
        "-",
    ]);
    succeed(command.args(args)).stdout
}

/// a, b and c, which differ a little, and what of them is merged by hand
fn models(folder: &Path) {
    let scaled = |i: usize, x: Tensor, by: f64| (x * (1.0 + by * (i % 7) as f64 / 7.0)).unwrap();
    let f16 = |x: Tensor| {
        x.to_dtype(DType::F16)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap()
    };
    changed(&folder.join("a"), |_, x| x);
    changed(&folder.join("b"), |i, x| scaled(i, x, 0.2));
    changed(&folder.join("c"), |i, x| scaled(i, x, -0.1));
    changed(&folder.join("sum"), |i, x| {
        let b = f16(scaled(i, x.clone(), 0.2));
        (&x + ((b - &x).unwrap() * 0.3).unwrap()).unwrap()
    });
    changed(&folder.join("difference"), |i, x| {
        let (b, c) = (
            f16(scaled(i, x.clone(), 0.2)),
            f16(scaled(i, x.clone(), -0.1)),
        );
        (&x + ((b - c).unwrap() * 0.5).unwrap()).unwrap()
    });
}

#[test]
fn a_merged_model_draws_as_one_that_was_merged_and_saved() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    let [a, b] = ["a", "b"].map(|model| draw(dir.path(), &["-m", model]));
    assert_ne!(a, b);
    assert!(draw(dir.path(), &["-m", "a", "--merge", "b:0.3"]) == draw(dir.path(), &["-m", "sum"]));
    assert!(
        draw(dir.path(), &["-m", "a", "--merge", "b:0.5", "--minus", "c"])
            == draw(dir.path(), &["-m", "difference"])
    );
    assert!(
        draw(dir.path(), &["-m", "a", "--merge", "b:0"]) == a,
        "a share of nothing changes nothing"
    );
    assert!(draw(dir.path(), &["-m", "a", "--merge", "b:1"]) == b);
}

#[test]
fn check_and_resume_know_what_was_merged() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    let run = |args: &[&str]| {
        let mut command = sdgen(dir.path());
        command.args([
            "the cat", "-m", "a", "-s", "1", "--steps", "2", "-o", "x.png", "--json", "-q",
        ]);
        stdout(&succeed(command.args(args)))
    };
    run(&["--merge", "b:0.3"]);
    assert!(run(&["--merge", "b:0.3", "--resume"]).contains(r#""skipped":true"#));
    succeed(sdgen(dir.path()).args(["check", "x.png", "--merge", "b:0.3"]));
    for args in [
        vec!["check", "x.png"],
        vec!["check", "x.png", "--merge", "b:0.4"],
        vec!["check", "x.png", "--merge", "c:0.3"],
    ] {
        let output = sdgen(dir.path()).args(args).output().unwrap();
        assert!(
            output.status.code() == Some(6)
                && stderr(&output).contains("`b:0.3` merged into the model"),
            "{}",
            stderr(&output)
        );
    }
    assert!(!run(&["--merge", "b:0.4", "--resume"]).contains(r#""skipped":true"#));
}

#[test]
fn models_that_do_not_go_together_are_an_error_that_names_a_tensor() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("sd1"), &dir.path().join("a"));
    copy_folder(&fixture("sd2"), &dir.path().join("other"));
    let cases: [(&[&str], i32, &[&str]); 4] = [
        (
            &["--merge", "other:0.5"],
            3,
            &["`other` does not go with `a`", "tensor `", "one family"],
        ),
        (&["--merge", "a"], 2, &["`--merge a`: it has no share"]),
        (
            &["--merge", "gone.safetensors:0.5"],
            3,
            &["`gone.safetensors` does not exist"],
        ),
        (&["--minus", "a"], 2, &["--merge"]),
    ];
    for (args, code, texts) in cases {
        let output = sdgen(dir.path())
            .args(["x", "-m", "a", "-s", "1", "-o", "x.png"])
            .args(args)
            .output()
            .unwrap();
        assert_eq!(
            output.status.code(),
            Some(code),
            "{args:?}: {}",
            stderr(&output)
        );
        texts.iter().for_each(|text| {
            assert!(
                stderr(&output).contains(text),
                "{args:?}: {}",
                stderr(&output)
            )
        });
    }
}
