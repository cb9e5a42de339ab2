//! `--save-steps`: files of what images look like on the way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common::*;
use sdgen::image::Image;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The images of a folder by name.
fn images(folder: &Path) -> BTreeMap<String, Image> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let image = |entry: fs::DirEntry| {
        let bytes = fs::read(entry.path()).unwrap();
        let name = entry.file_name().into_string().unwrap();
        (name, Image::decode(&bytes).unwrap())
    };
    entries.map(image).collect()
}

#[test]
fn every_step_or_every_nth_is_saved_and_is_the_same_in_any_batch() {
    let dir = tempfile::tempdir().unwrap();
    let draw = |steps: &str, batch: &str| {
        let mut command = sdgen(dir.path());
        command.args(["a frog", "-s", "1,2", "--steps", "4", "-q", "--force"]);
        succeed(command.args(["--save-steps", steps, "-b", batch]));
    };
    draw("all", "2");
    let all = images(&dir.path().join("all"));
    let name = |seed: usize, step: usize| format!("a-frog-{seed}-step-{step:03}.png");
    let mut expected = vec![];
    for seed in [1, 2] {
        expected.extend((1..=4).map(|step| name(seed, step)));
    }
    assert_eq!(all.keys().cloned().collect::<Vec<_>>(), expected);
    // four pixels a latent of the embedded model, whose images are 128x128
    assert!(
        all.values()
            .all(|image| (image.width, image.height) == (32, 32))
    );
    assert!(all[&name(1, 4)] != all[&name(2, 4)] && all[&name(1, 1)] != all[&name(1, 4)]);

    draw("alone", "1");
    let alone = images(&dir.path().join("alone"));
    assert_eq!(alone.len(), all.len());
    for (name, image) in &alone {
        assert!(all[name] == *image, "{name}");
    }
    draw("some:3", "2");
    let some = images(&dir.path().join("some"));
    assert_eq!(
        some.keys().cloned().collect::<Vec<_>>(),
        [name(1, 3), name(2, 3)]
    );
    assert!(some[&name(1, 3)] == all[&name(1, 3)]);
    // the last preview looks like the image, small
    let image = Image::decode(&fs::read(dir.path().join("a-frog-1.png")).unwrap()).unwrap();
    let small = image.fit(32, 32, sdgen::image::load::Fit::Stretch);
    let psnr = all[&name(1, 4)].difference(&small).psnr_db;
    assert!(psnr > 15.0, "{psnr} dB");
}

#[test]
fn steps_that_are_there_are_not_overwritten_unless_asked() {
    let dir = tempfile::tempdir().unwrap();
    let draw = |seed: &str| {
        let mut command = sdgen(dir.path());
        command.args([
            "a frog",
            "--steps",
            "1",
            "-q",
            "--save-steps",
            "steps",
            "-s",
        ]);
        command.arg(seed);
        command
    };
    succeed(&mut draw("1"));
    fs::remove_file(dir.path().join("a-frog-1.png")).unwrap();
    fail(
        &mut draw("1"),
        2,
        &["a-frog-1-step-001.png` exists already", "--force"],
    );
    succeed(draw("1").arg("--force"));
    succeed(&mut draw("2"));
    assert_eq!(images(&dir.path().join("steps")).len(), 2);
    // a dry run makes nothing
    let mut command = sdgen(dir.path());
    succeed(command.args(["x", "-s", "1", "--save-steps", "new", "--dry-run", "-q"]));
    assert!(!dir.path().join("new").exists());
    // images of one name in two folders, and one that goes to stdout
    let list = "{\"prompt\": \"x\", \"seed\": 1, \"output\": \"a/x.png\"}\n{\"prompt\": \"x\", \"seed\": 2, \"output\": \"b/x.png\"}\n";
    fs::write(dir.path().join("list.jsonl"), list).unwrap();
    fs::create_dir(dir.path().join("a")).unwrap();
    fs::create_dir(dir.path().join("b")).unwrap();
    let mut command = sdgen(dir.path());
    command.args(["--from", "list.jsonl", "--steps", "1", "-q"]);
    succeed(command.args(["--save-steps", "two"]));
    let names: Vec<String> = images(&dir.path().join("two")).into_keys().collect();
    assert_eq!(names, ["x-2-step-001.png", "x-step-001.png"]);
    let mut command = sdgen(dir.path());
    command.args(["x", "-s", "1", "--steps", "1", "-q", "-o", "-"]);
    let output = succeed(command.args(["--save-steps", "piped"]));
    assert!(Image::decode(&output.stdout).is_ok());
    let names: Vec<String> = images(&dir.path().join("piped")).into_keys().collect();
    assert_eq!(names, ["image-step-001.png"]);
}
