//! Learned words (textual inversion): `--embedding`. Goldens: `fixtures/embeddings.py`.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use sdgen::image::{Image, read_metadata};
use sdgen::text::prompt::segments;
use sdgen::text::tokenizer::Tokenizer;
use sdgen::weights::{Checkpoint, Origin};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;

/// A folder with the fixture's files.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a1111", "diffusers", "pair"] {
        let file = format!("{name}.safetensors");
        std::fs::copy(fixture("embeddings").join(&file), folder.path().join(&file)).unwrap();
    }
    folder
}

fn draw(folder: &Path, name: &str, model: &str, args: &[&str]) -> Image {
    let mut command = sdgen(folder);
    command
        .args(["-m"])
        .arg(fixture(model))
        .args(["-s", "3", "--steps", "5", "-q", "--force", "-o", name]);
    succeed(command.args(args));
    Image::decode(&std::fs::read(folder.join(name)).unwrap()).unwrap()
}

const SD1: [&str; 4] = [
    "--embedding",
    "diffusers.safetensors:<toy>",
    "--embedding",
    "a1111.safetensors:easy-style",
];

#[test]
fn pictures_are_those_of_diffusers_in_both_syntaxes() {
    let dir = folder();
    let tensors = load(&fixture("embeddings/goldens.safetensors"));
    let runs = &goldens("embeddings")["runs"];
    let runs = runs.as_array().unwrap();
    assert_eq!(runs.len(), 8);
    for run in runs {
        let text = |key: &str| run[key].as_str().unwrap();
        let args = [
            "-n",
            text("negative_prompt"),
            "-g",
            "7.5",
            "-W",
            "16",
            "-H",
            "16",
            text("prompt"),
        ];
        let given = if text("model") == "sdxl" {
            vec!["--embedding", "pair.safetensors:<pair>"]
        } else {
            SD1.to_vec()
        };
        let golden = levels(&tensors[&format!("run.{}.image", text("name"))]);
        let golden = Image {
            width: 16,
            height: 16,
            rgb: golden,
        };
        for syntax in ["plain", "a1111"] {
            // what diffusers cuts off is in another chunk there
            if syntax == "a1111" && text("name") == "sd1.cut" {
                continue;
            }
            let with_syntax = [&args[..], &["--prompt-syntax", syntax]].concat();
            let ours = draw(
                dir.path(),
                "x.png",
                text("model"),
                &[&with_syntax[..], &given].concat(),
            )
            .difference(&golden);
            assert!(
                ours.largest <= 1,
                "{} {syntax}: {} levels",
                text("name"),
                ours.largest
            );
            let without =
                draw(dir.path(), "x.png", text("model"), &with_syntax).difference(&golden);
            assert!(
                without.largest > 1,
                "{}: the embedding should matter",
                text("name")
            );
        }
    }
}

#[test]
fn every_format_draws_the_same_picture() {
    let dir = folder();
    let place = |name: &str| dir.path().join(name);
    let picture = |model: &str, asked: &str| {
        draw(
            dir.path(),
            "x.png",
            model,
            &["a toy cat", "--embedding", asked],
        )
    };
    let vectors = load(&place("a1111.safetensors"))["emb_params"].clone();
    save(
        &HashMap::from([("<any>".into(), vectors.clone())]),
        &place("toy.safetensors"),
    );
    // a file's name is its word
    let golden = picture("sd1", "a1111.safetensors:toy");
    assert!(picture("sd1", "toy.safetensors") == golden);
    assert!(picture("sd1", "toy.safetensors:ToY") == golden);
    save(
        &HashMap::from([("<any>".into(), vectors.get(0).unwrap())]),
        &place("flat.safetensors"),
    );
    save(
        &HashMap::from([("emb_params".into(), vectors.narrow(0, 0, 1).unwrap())]),
        &place("one.safetensors"),
    );
    assert!(picture("sd1", "flat.safetensors:toy") == picture("sd1", "one.safetensors:toy"));
    let halves = vectors.to_dtype(DType::F16).unwrap();
    save(
        &HashMap::from([("emb_params".into(), halves.clone())]),
        &place("halves.safetensors"),
    );
    save(
        &HashMap::from([("emb_params".into(), halves.to_dtype(DType::F32).unwrap())]),
        &place("widened.safetensors"),
    );
    assert!(picture("sd1", "halves.safetensors:toy") == picture("sd1", "widened.safetensors:toy"));
    let pair = load(&place("pair.safetensors"));
    let renamed = [("clip_l", "text_encoders_0"), ("clip_g", "text_encoders_1")]
        .map(|(old, new)| (new.into(), pair[old].clone()));
    save(
        &HashMap::from(renamed),
        &place("diffusers_pair.safetensors"),
    );
    assert!(
        picture("sdxl", "diffusers_pair.safetensors:toy")
            == picture("sdxl", "pair.safetensors:toy")
    );
}

#[test]
fn a_word_stands_by_itself_and_the_longest_wins() {
    let checkpoint = Checkpoint::open(Origin::Path(&fixture("sd1"))).unwrap();
    let source = checkpoint.tokenizer("text_encoder").unwrap();
    let mut tokenizer = Tokenizer::new(&source.files, &source.config).unwrap();
    let plain = tokenizer.ids("a cat").unwrap();
    for (token, ids) in [
        ("cat", 1000..1001),
        ("Cat-Toy", 2000..2003),
        ("<toy>", 3000..3001),
        ("été", 4000..4001),
    ] {
        tokenizer.add_token(&token.into(), ids, 77).unwrap();
    }
    let learned = |text: &str| {
        tokenizer
            .ids(text)
            .unwrap()
            .into_iter()
            .filter(|id| *id >= 1000)
            .collect::<Vec<_>>()
    };
    assert_eq!(learned("a cat, CAT's (cat) cat"), [1000; 4]);
    assert_eq!(learned("cats concatenate"), [0; 0]);
    assert_eq!(learned("a cat-toy cat -toy"), [2000, 2001, 2002, 1000]);
    assert_eq!(learned("<toy>, x<TOY>!"), [3000; 2]);
    assert_eq!(learned("e\u{301}te\u{301} \u{130} ÉTÉ"), [4000; 2]);
    assert_ne!(tokenizer.ids("a cat").unwrap(), plain);
    // what is cut off is told as typed
    let long = "a ".repeat(73);
    let cut = tokenizer
        .encode(&format!("{long} Cat-TOY Red"), 77)
        .unwrap();
    assert_eq!(
        (cut.ids[74], cut.ids[75], cut.cut.as_deref()),
        (2000, 2001, Some("Cat-TOY Red"))
    );
}

#[test]
fn vectors_that_do_not_fit_into_a_chunk_begin_the_next_one_with_their_weight() {
    let checkpoint = Checkpoint::open(Origin::Path(&fixture("sd1"))).unwrap();
    let source = checkpoint.tokenizer("text_encoder").unwrap();
    let mut tokenizer = Tokenizer::new(&source.files, &source.config).unwrap();
    tokenizer
        .add_token(&"style".into(), 1000..1004, 77)
        .unwrap();
    let chunks = |words: usize| {
        tokenizer
            .chunks(
                &segments(&format!("{}(style:1.5) a", "a ".repeat(words))).unwrap(),
                77,
            )
            .unwrap()
    };
    let fits = chunks(71);
    assert_eq!(
        (fits.len(), &fits[0].ids[72..76], &fits[0].weights[72..76]),
        (2, &[1000, 1001, 1002, 1003][..], &[1.5; 4][..])
    );
    let next = chunks(72);
    assert_eq!(
        (next.len(), next[0].ids.len(), &next[1].ids[1..5]),
        (2, 77, &[1000, 1001, 1002, 1003][..])
    );
    assert!(
        next[0].ids[73..].iter().all(|id| *id == next[0].ids[73]),
        "the first chunk ends before them"
    );
    assert_eq!(
        (&next[1].weights[1..5], next[1].weights[5]),
        (&[1.5; 4][..], 1.0)
    );
    let error = tokenizer
        .add_token(&"large".into(), 2000..2076, 77)
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("`large` has 76 vectors, the model takes 75 tokens at once"),
        "{error}"
    );
}

#[test]
fn weights_steps_and_chunks_count_for_learned_words() {
    let dir = folder();
    let picture = |prompt: &str| draw(dir.path(), "x.png", "sd1", &[&[prompt], &SD1[..]].concat());
    let plain = picture("the cat <toy>");
    assert!(picture("the cat (<toy>:1.5)") != plain);
    assert!(picture("[the cat <toy>:the dog:0.5]") != plain);
    let far = format!("{} easy-style", "a ".repeat(90));
    assert!(
        picture(&far) != picture(&far.replace("easy-style", "<toy>")),
        "the second chunk's word was lost"
    );
}

#[test]
fn a_picture_remembers_what_its_prompts_use_and_check_asks_for_it() {
    let dir = folder();
    draw(
        dir.path(),
        "x.png",
        "sd1",
        &[&["a cat", "-n", "easy-style"], &SD1[..], &["--trace"]].concat(),
    );
    let metadata = read_metadata(&std::fs::read(dir.path().join("x.png")).unwrap())
        .unwrap()
        .unwrap();
    let used = metadata.sdgen["embeddings"].as_array().unwrap();
    let hash = used[0]["hash"].as_str().unwrap();
    assert_eq!(
        (used.len(), used[0]["name"].as_str().unwrap(), hash.len()),
        (1, "easy-style", 64)
    );
    assert!(
        metadata
            .parameters
            .contains(&format!("TI hashes: \"easy-style: {}\"", &hash[..12])),
        "{}",
        metadata.parameters
    );
    draw(dir.path(), "plain.png", "sd1", &["a cat <toy>"]);
    let plain = read_metadata(&std::fs::read(dir.path().join("plain.png")).unwrap())
        .unwrap()
        .unwrap();
    assert_eq!(
        (
            plain.sdgen.get("embeddings"),
            plain.parameters.contains("TI hashes")
        ),
        (None, false)
    );

    let check = |args: &[&str]| {
        let mut command = sdgen(dir.path());
        command
            .arg("check")
            .args(args)
            .arg("-m")
            .arg(fixture("sd1"));
        command.output().unwrap()
    };
    let refused = check(&["x.png"]);
    assert_eq!(refused.status.code(), Some(6));
    for text in [
        "its prompt uses the embedding `easy-style`",
        "hint: pass its file with `--embedding`",
        &hash[..10],
    ] {
        assert!(stderr(&refused).contains(text), "{}", stderr(&refused));
    }
    assert_eq!(
        check(&["x.png", "--embedding", "diffusers.safetensors"])
            .status
            .code(),
        Some(6)
    );
    // a word that meant nothing when the second was drawn means nothing now; ids depend on what
    // else was given, the trace does not
    let same = check(&[
        "x.png",
        "plain.png",
        "--embedding",
        "diffusers.safetensors:<toy>",
        "--embedding",
        "a1111.safetensors",
    ]);
    assert!(same.status.success(), "{}", stderr(&same));
    assert!(!stderr(&same).contains("first differs"));
}

#[test]
fn resume_draws_again_what_a_changed_embedding_changes_and_nothing_else() {
    let dir = folder();
    let base = ["--prompt-syntax", "plain", "-m"];
    let skipped = |args: &[&str]| {
        std::fs::write(dir.path().join("list.txt"), "a toy\na cat\n").unwrap();
        let mut command = sdgen(dir.path());
        command.args(base).arg(fixture("sd1")).args([
            "--from",
            "list.txt",
            "-s",
            "1",
            "--steps",
            "2",
            "-o",
            "{index}.png",
            "--resume",
        ]);
        stderr(&succeed(command.args(args)))
            .lines()
            .find(|line| line.contains("are there already"))
            .unwrap()
            .to_string()
    };
    let given = ["--embedding", "a1111.safetensors:toy"];
    assert!(skipped(&given).starts_with("0 of 2"));
    assert!(skipped(&given).starts_with("2 of 2"));
    assert!(skipped(&["--embedding", "diffusers.safetensors:toy"]).starts_with("1 of 2"));
    assert!(skipped(&[]).starts_with("1 of 2"));
    assert!(
        skipped(&SD1).starts_with("2 of 2"),
        "what no prompt uses changes nothing"
    );
}

#[test]
fn an_embedding_that_no_prompt_uses_is_a_warning() {
    let dir = folder();
    let said = |prompt: &str| {
        let mut command = sdgen(dir.path());
        command
            .args([prompt, "-s", "1", "--steps", "2", "--force", "-o", "x.png"])
            .args(SD1)
            .arg("-m")
            .arg(fixture("sd1"));
        stderr(&succeed(&mut command))
    };
    let warning = |token: &str, file: &str| {
        format!(
            "warning: no prompt has the word `{token}`, so the embedding `{file}` has no effect"
        )
    };
    let one = said("a <toy>");
    assert!(
        one.contains(&warning("easy-style", "a1111.safetensors")),
        "{one}"
    );
    assert!(!one.contains("`<toy>`"), "{one}");
    assert!(!said("a <toy> easy-style").contains("warning"));
}

#[test]
fn what_does_not_fit_is_an_error_that_says_why() {
    let dir = folder();
    let place = |name: &str| dir.path().join(name);
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let write = |name: &str, tensors: &[(&str, &[usize])]| {
        save(
            &tensors
                .iter()
                .map(|(key, shape)| (key.to_string(), zeros(shape)))
                .collect(),
            &place(name),
        );
    };
    write("sd15.safetensors", &[("emb_params", &[3, 768])]);
    write("sd21.safetensors", &[("<x>", &[3, 1024])]);
    write(
        "sdxl.safetensors",
        &[("clip_l", &[2, 768]), ("clip_g", &[2, 1280])],
    );
    write(
        "uneven.safetensors",
        &[("clip_l", &[2, 32]), ("clip_g", &[3, 64])],
    );
    write("large.safetensors", &[("emb_params", &[76, 64])]);
    write("empty.safetensors", &[("emb_params", &[0, 64])]);
    write(
        "lora.safetensors",
        &[
            ("lora_unet_x.lora_down.weight", &[2, 2]),
            ("lora_unet_x.lora_up.weight", &[2, 2]),
        ],
    );
    std::fs::write(place("old.pt"), b"PK\x03\x04").unwrap();
    for (model, args, texts) in [
        (
            "sd1",
            &["sd15.safetensors"][..],
            &[
                "`sd15.safetensors` are 768 wide",
                "takes 64",
                "hint: it was made for Stable Diffusion 1.x",
            ][..],
        ),
        (
            "sd1",
            &["sd21.safetensors"],
            &["1024 wide", "Stable Diffusion 2.x"],
        ),
        (
            "sd1",
            &["sdxl.safetensors"],
            &["768 and 1280 wide", "Stable Diffusion XL"],
        ),
        (
            "sd1",
            &["pair.safetensors"],
            &["32 and 64 wide", "it was made for another model"],
        ),
        ("sdxl", &["a1111.safetensors"], &["64 wide", "takes 32"]),
        (
            "sdxl",
            &["uneven.safetensors"],
            &["`uneven.safetensors` has 2 and 3 vectors"],
        ),
        (
            "sd1",
            &["large.safetensors"],
            &["`large` has 76 vectors, the model takes 75 tokens at once"],
        ),
        (
            "sd1",
            &["empty.safetensors"],
            &["`empty.safetensors` has 0 vectors"],
        ),
        (
            "sd1",
            &["lora.safetensors"],
            &["is a LoRA, not an embedding"],
        ),
        (
            "sd1",
            &["old.pt"],
            &[
                "is a PyTorch pickle",
                "hint: convert it once",
                "'string_to_param'",
            ],
        ),
        (
            "sd1",
            &["none.safetensors:x"],
            &["there is no file `none.safetensors`", "FILE:TOKEN"],
        ),
        ("sd1", &["a1111.safetensors: "], &["names no token"]),
        (
            "sd1",
            &["a1111.safetensors:x", "diffusers.safetensors:X"],
            &[
                "two embeddings stand for `X`",
                "--embedding diffusers.safetensors:TOKEN",
            ],
        ),
    ] {
        let mut command = sdgen(dir.path());
        command
            .args(["a cat", "-s", "1", "-o", "x.png", "-m"])
            .arg(fixture(model));
        command.args(args.iter().flat_map(|asked| ["--embedding", asked]));
        fail(&mut command, 3, texts);
    }
    fail(
        sdgen(dir.path()).args(["a cat", "-m", "a1111.safetensors"]),
        3,
        &["is an embedding, not a whole model", "`--embedding`"],
    );
}

#[test]
fn inspect_tells_what_an_embedding_is() {
    let dir = folder();
    let pair = [("clip_l", 768), ("clip_g", 1280)].map(|(key, width)| {
        (
            key.to_string(),
            Tensor::zeros((8, width), DType::F32, &Device::Cpu).unwrap(),
        )
    });
    save(&HashMap::from(pair), &dir.path().join("neg.safetensors"));
    let said = stdout(&succeed(
        sdgen(dir.path()).args(["inspect", "neg.safetensors"]),
    ));
    assert!(
        said.starts_with("neg: embedding (textual inversion) for Stable Diffusion XL\n"),
        "{said}"
    );
    assert!(
        said.contains("vectors       8, 768 and 1280 wide\n"),
        "{said}"
    );
    let json: Value = serde_json::from_slice(
        &succeed(sdgen(dir.path()).args(["inspect", "--json", "a1111.safetensors"])).stdout,
    )
    .unwrap();
    assert_eq!(
        (&json["kind"], &json["vectors"], &json["widths"][0]),
        (&"embedding".into(), &4.into(), &64.into())
    );
    assert!(json["family"].is_null());
}
