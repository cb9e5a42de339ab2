//! `sdgen check`: pictures are drawn again from what their files say, and compared.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::*;
use std::path::Path;

/// Draws a quick picture with the embedded model.
fn draw(folder: &Path, name: &str, options: &[&str]) {
    succeed(sdgen(folder).args(["a frog", "--steps", "2", "-s", "1", "-q", "-o", name]).args(options));
}

/// Exit code and stdout of a check.
fn check(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let output = sdgen(folder).arg("check").args(args).output().unwrap();
    (output.status.code().unwrap(), stdout(&output), stderr(&output))
}

/// Changes the pixels of a PNG and leaves what it says of itself.
fn edit(folder: &Path, name: &str, change: impl Fn(&mut sdgen::image::Picture)) {
    let path = folder.join(name);
    let bytes = std::fs::read(&path).unwrap();
    let metadata = sdgen::image::read_metadata(&bytes).unwrap().unwrap();
    let mut picture = sdgen::image::Picture::decode(&bytes).unwrap();
    change(&mut picture);
    std::fs::write(&path, picture.encode(sdgen::image::Format::Png, Some(&metadata)).unwrap()).unwrap();
}

#[test]
fn pictures_that_are_drawn_the_same_again_are_identical_in_every_format() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "a.png", &[]);
    draw(dir.path(), "b.jpg", &["-g", "3.3", "--sampler", "euler-a"]);
    draw(dir.path(), "c.webp", &["-W", "64", "-n", "blue", "--schedule", "karras", "--dtype", "bf16"]);
    let (code, said, errors) = check(dir.path(), &["a.png", "b.jpg", "c.webp"]);
    assert_eq!((code, said.lines().count()), (0, 3), "{said}{errors}");
    for name in ["a.png", "b.jpg", "c.webp"] {
        assert!(said.contains(&format!("{name}: identical\n")), "{said}");
    }
}

#[test]
fn guidance_rescale_is_remembered_changes_the_picture_and_was_zero_before_it_was_an_option() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "plain.png", &["-W", "32", "-H", "32"]);
    draw(dir.path(), "rescaled.png", &["-W", "32", "-H", "32", "--guidance-rescale", "0.7"]);
    let read = |name: &str| sdgen::image::read_metadata(&std::fs::read(dir.path().join(name)).unwrap()).unwrap().unwrap();
    assert!(read("rescaled.png").parameters.contains("CFG Rescale: 0.7"), "{}", read("rescaled.png").parameters);
    assert_eq!(check(dir.path(), &["plain.png", "--expect", "rescaled.png"]).0, 1);
    // a picture of a version that did not know the option
    let mut metadata = read("plain.png");
    metadata.sdgen.as_object_mut().unwrap().remove("guidance_rescale").unwrap();
    let picture = sdgen::image::Picture::decode(&std::fs::read(dir.path().join("plain.png")).unwrap()).unwrap();
    std::fs::write(dir.path().join("old.png"), picture.encode(sdgen::image::Format::Png, Some(&metadata)).unwrap()).unwrap();
    assert_eq!(check(dir.path(), &["old.png", "rescaled.png"]).1, "old.png: identical\nrescaled.png: identical\n");
}

#[test]
fn a_picture_that_differs_is_an_error_unless_it_is_close_enough() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "a.png", &[]);
    edit(dir.path(), "a.png", |picture| picture.rgb[0] ^= 4);
    let (code, said, errors) = check(dir.path(), &["a.png"]);
    assert_eq!(code, 1);
    assert!(said.starts_with("a.png: differs, ") && said.contains(" 1 pixels by up to 4 levels"), "{said}");
    assert!(errors.contains("1 of 1 pictures are not the same"), "{errors}");
    let (code, said, _) = check(dir.path(), &["a.png", "--min-psnr", "60"]);
    assert!(code == 0 && said.starts_with("a.png: close, "), "{said}");
    assert_eq!(check(dir.path(), &["a.png", "--min-psnr", "90"]).0, 1);
    let (code, said, _) = check(dir.path(), &["a.png", "--json"]);
    let record: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!((code, &record["same"], &record["pixels"], &record["largest"]), (1, &false.into(), &1.into(), &4.into()));
}

#[test]
fn a_picture_that_cannot_be_drawn_again_is_told_and_the_others_are_compared() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "good.png", &[]);
    draw(dir.path(), "silent.png", &["--no-metadata"]);
    std::fs::write(dir.path().join("broken.png"), b"no picture").unwrap();
    let (code, said, errors) = check(dir.path(), &["silent.png", "missing.png", "broken.png", "good.png"]);
    assert_eq!(code, 1);
    for line in ["silent.png: failed", "missing.png: failed", "broken.png: failed", "good.png: identical"] {
        assert!(said.contains(line), "{said}");
    }
    assert!(errors.contains("`silent.png`: it does not say how it was drawn"), "{errors}");
    assert!(errors.contains("3 of 4 pictures are not the same"), "{errors}");
}

#[test]
fn other_weights_are_told_from_a_changed_program() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("sd1");
    draw(dir.path(), "a.png", &["-W", "16", "-H", "16", "-m", model.to_str().unwrap()]);
    let (code, said, errors) = check(dir.path(), &["a.png", "--model", "mini"]);
    assert!(code == 1 && said == "a.png: failed\n", "{said}");
    assert!(errors.contains("drawn with other weights") && errors.contains("--model"), "{errors}");
    let (code, said, errors) = check(dir.path(), &["a.png", "--model", model.to_str().unwrap()]);
    assert!(code == 0 && said == "a.png: identical\n", "{said}{errors}");
}

#[test]
fn a_golden_picture_can_stand_for_the_file() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "a.png", &[]);
    draw(dir.path(), "golden.webp", &["--no-metadata"]);
    draw(dir.path(), "other.png", &["-s", "2"]);
    assert_eq!(check(dir.path(), &["a.png", "--expect", "golden.webp"]).0, 0);
    let (code, said, _) = check(dir.path(), &["a.png", "--expect", "other.png"]);
    assert!(code == 1 && said.starts_with("a.png: differs"), "{said}");
}
