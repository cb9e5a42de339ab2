//! Prompts as people paste them: A1111's grammar against an implementation of its own
//! (fixtures/prompts.py), and pictures.

use crate::common::*;
use candle_core::{DType, Device};
use sdgen::image::Image;
use sdgen::nn::device::Compute;
use sdgen::text::encoder::{PromptEncoder, TextEncoderConfigs};
use sdgen::text::prompt::{Prompts, Segment, Syntax, segments};
use sdgen::text::tokenizer::Tokenizer;
use sdgen::weights::{Checkpoint, Origin};
use serde_json::Value;
use std::path::Path;

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open(Origin::Path(&fixture(name))).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n.as_f64().unwrap())
        .collect()
}

#[test]
fn tokens_weights_and_chunks_are_a1111s() {
    let checkpoint = checkpoint("sd1");
    let source = checkpoint.tokenizer("text_encoder").unwrap();
    let tokenizer = Tokenizer::new(&source.files, &source.config).unwrap();
    let prompts = goldens("prompts")["prompts"].as_array().unwrap().clone();
    assert_eq!(prompts.len(), 300);
    for case in &prompts {
        let prompt = case["prompt"].as_str().unwrap();
        let chunks = tokenizer.chunks(&segments(prompt).unwrap(), 77).unwrap();
        assert_eq!(
            chunks.len(),
            case["ids"].as_array().unwrap().len(),
            "chunks of {prompt:?}"
        );
        for (i, chunk) in chunks.iter().enumerate() {
            let ids = numbers(&case["ids"][i]);
            let body: Vec<f64> = chunk.ids[1..=ids.len()]
                .iter()
                .map(|id| f64::from(*id))
                .collect();
            assert_eq!(body, ids, "chunk {i} of {prompt:?}");
            assert_eq!((chunk.ids.len(), chunk.weights.len()), (77, 77));
            let mut weights = numbers(&case["weights"][i]);
            weights.resize(ids.len().max(weights.len()), 1.0);
            for (at, (ours, theirs)) in chunk.weights[1..].iter().zip(weights).enumerate() {
                let off = (f64::from(*ours) - theirs).abs();
                assert!(
                    off <= 1e-5 * theirs.abs().max(1.0),
                    "weight {at} of chunk {i} of {prompt:?}: {ours}, not {theirs}"
                );
            }
            assert!(
                chunk.weights[1 + ids.len()..]
                    .iter()
                    .all(|weight| *weight == 1.0)
            );
        }
    }
}

#[test]
fn a_prompt_changes_from_step_to_step_as_in_a1111() {
    let goldens = goldens("prompts");
    let changes = goldens["changes"].as_array().unwrap();
    assert_eq!(changes.len(), 12);
    for case in changes {
        let prompt = case["prompt"].as_str().unwrap();
        let prompts = Prompts::parse(&prompt.into(), &"".into(), None, Syntax::A1111, 8).unwrap();
        let ours: Vec<&str> = (0..8)
            .map(|step| &**prompts.parts[0].prompt.at(step))
            .collect();
        let theirs: Vec<&str> = case["texts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|text| text.as_str().unwrap())
            .collect();
        assert_eq!(ours, theirs, "{prompt}");
    }
}

#[test]
fn embeddings_keep_their_mean_in_every_chunk_and_encoder() {
    let (goldens, tensors) = (
        goldens("prompts"),
        load(&fixture("prompts/goldens.safetensors")),
    );
    let mut compared = 0;
    let compute = Compute {
        device: Device::Cpu,
        dtype: DType::F32,
    };
    for model in ["sd1", "sd2", "sdxl"] {
        let checkpoint = checkpoint(model);
        let encoder = PromptEncoder::new(
            &checkpoint,
            &TextEncoderConfigs::of(&checkpoint).unwrap(),
            &compute,
        )
        .unwrap();
        for (i, prompt) in goldens["embedded"].as_array().unwrap().iter().enumerate() {
            // the last, of two chunks, was made with sd1 alone
            let Some(golden) = tensors.get(&format!("{model}.{i}")) else {
                continue;
            };
            compared += 1;
            let ours = encoder
                .encode(prompt.as_str().unwrap(), 0, Syntax::A1111)
                .unwrap()
                .0
                .prompt_embeds;
            assert_eq!(ours.dims(), golden.dims(), "{model}: {prompt}");
            let off = difference(&ours, golden);
            // parity.rs: `NETWORK`
            assert!(off < 1e-4, "{model}: {prompt} is off by {off:e}");
        }
    }
    assert_eq!(compared, tensors.len());
    assert_eq!(compared, 10);
}

fn draw(folder: &Path, name: &str, args: &[&str]) -> Image {
    let path = format!("{name}.png");
    let mut command = sdgen(folder);
    command
        .args(["-m"])
        .arg(fixture("sd1"))
        .args(["-s", "1", "--steps", "4", "-q", "--force", "-o", &path]);
    succeed(command.args(args));
    Image::decode(&std::fs::read(folder.join(path)).unwrap()).unwrap()
}

#[test]
fn weights_change_the_picture_and_what_is_no_syntax_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let picture = |args: &[&str]| draw(dir.path(), "x", args);
    let plain = picture(&["the cat in the house"]);
    assert_eq!(
        picture(&["the cat in the house", "--prompt-syntax", "plain"]),
        plain
    );
    assert_eq!(
        picture(&["the (cat:1.0) in [(the:1)] house"
            .replace("[(the:1)]", "the")
            .as_str()]),
        plain
    );
    assert_ne!(picture(&["the (cat:1.4) in the house"]), plain);
    assert_ne!(
        picture(&["the (cat:1.4) in the house", "--prompt-syntax", "plain"]),
        picture(&["the (cat:1.4) in the house"])
    );
    assert_ne!(
        picture(&["the cat in the house", "-n", "(dog:1.5)"]),
        picture(&["the cat in the house", "-n", "dog"])
    );
}

#[test]
fn a_long_prompt_counts_to_its_end_beside_a_short_negative_one_and_in_any_batch() {
    let dir = tempfile::tempdir().unwrap();
    let long = format!("{}the dog", "the house, ".repeat(60));
    let other = format!("{}the cat", "the house, ".repeat(60));
    let [dog, cat] = [&long, &other].map(|prompt| draw(dir.path(), "x", &[prompt, "-n", "red"]));
    assert_ne!(dog, cat, "the end of the prompt was lost");
    std::fs::write(
        dir.path().join("list.txt"),
        format!("the cat\n{long}\nthe cat in the house\n{other}\n"),
    )
    .unwrap();
    let mut command = sdgen(dir.path());
    command
        .args(["--from", "list.txt", "-m"])
        .arg(fixture("sd1"))
        .args([
            "-n",
            "red",
            "-s",
            "1",
            "--steps",
            "4",
            "-q",
            "-o",
            "{index}.png",
        ]);
    succeed(&mut command);
    for (name, alone) in [("1.png", &dog), ("3.png", &cat)] {
        assert_eq!(
            &Image::decode(&std::fs::read(dir.path().join(name)).unwrap()).unwrap(),
            alone
        );
    }
    succeed(
        sdgen(dir.path())
            .args(["check", "1.png", "2.png", "-m"])
            .arg(fixture("sd1")),
    );
}

#[test]
fn keys_that_are_repeated_to_a_common_length_change_no_picture() {
    // one chunk beside three: the same network sees the short text three times
    let dir = tempfile::tempdir().unwrap();
    let short = draw(dir.path(), "x", &["the cat", "-n", "dog"]);
    let repeated = draw(
        dir.path(),
        "y",
        &[
            "the cat BREAK the cat BREAK the cat",
            "-n",
            "dog BREAK dog BREAK dog",
        ],
    );
    let difference = short.difference(&repeated);
    assert!(difference.largest <= 1, "{} levels", difference.largest);
}

#[test]
fn a_switch_half_way_begins_as_one_prompt_and_ends_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let picture = |prompt: &str| draw(dir.path(), "x", &[prompt]);
    assert_eq!(picture("[the cat:red blue:4]"), picture("the cat"));
    assert_eq!(picture("[the cat:red blue:0]"), picture("red blue"));
    let half = picture("[the cat:red blue:0.5]");
    assert!(half != picture("the cat") && half != picture("red blue"));
    assert_ne!(picture("[the cat|red blue]"), half);
    draw(dir.path(), "turns", &["[the cat|red blue] in the house"]);
    succeed(
        sdgen(dir.path())
            .args(["check", "turns.png", "-m"])
            .arg(fixture("sd1")),
    );
}

#[test]
fn prompts_joined_by_and_count_by_their_weights() {
    let dir = tempfile::tempdir().unwrap();
    let picture = |args: &[&str]| draw(dir.path(), "x", args);
    let cat = picture(&["the cat"]);
    let both = picture(&["the cat AND red blue"]);
    assert_ne!(both, cat);
    let off = picture(&["the cat AND red blue:0"]).difference(&cat);
    assert!(
        off.largest <= 1,
        "a prompt of no weight changes {} levels",
        off.largest
    );
    let halves = picture(&["the cat:0.5 AND the cat:0.5"]).difference(&cat);
    assert!(
        halves.largest <= 1,
        "two halves are a whole: {} levels",
        halves.largest
    );
    let mut command = sdgen(dir.path());
    command
        .args(["a AND b", "-g", "1", "-s", "1", "-o", "y.png", "-m"])
        .arg(fixture("sd1"));
    fail(&mut command, 2, &["`AND` joins need guidance"]);
}

#[test]
fn a_number_that_is_none_is_an_error_that_names_the_place() {
    let dir = tempfile::tempdir().unwrap();
    for (prompt, texts) in [
        (
            "a (cat:1.2.3)",
            ["`1.2.3` is not a weight", "at character 8 of the prompt"],
        ),
        (
            "a [cat:dog:0.5.5]",
            ["`0.5.5` is not a step", "at character 3 of the prompt"],
        ),
    ] {
        fail(
            sdgen(dir.path()).args([prompt, "-s", "1", "-o", "x.png"]),
            2,
            &texts,
        );
        std::fs::write(dir.path().join("list.txt"), format!("a cat\n{prompt}\n")).unwrap();
        fail(
            sdgen(dir.path()).args(["--from", "list.txt", "-s", "1"]),
            2,
            &["line 2 of `list.txt`", texts[0]],
        );
    }
}

#[test]
fn no_text_makes_the_grammar_panic() {
    // the characters that mean something, and some that do not
    let alphabet: Vec<char> = "()[]:|\\.,0159- aANDBREAK\u{e9}\u{1f600}\n\0\"'+e"
        .chars()
        .collect();
    let mut random = random_numbers();
    for _ in 0..20_000 {
        let prompt: String = (0..random(40))
            .map(|_| alphabet[random(alphabet.len())])
            .collect();
        let read = Prompts::parse(
            &prompt.as_str().into(),
            &prompt.as_str().into(),
            None,
            Syntax::A1111,
            1 + random(9),
        );
        if let (Ok(read), Ok(found)) = (read, segments(&prompt)) {
            assert!(!read.parts.is_empty());
            assert!(
                found.iter().all(
                    |segment| !matches!(segment, Segment::Text { weight, .. } if weight.is_nan())
                ),
                "{prompt:?}"
            );
        }
    }
    let deep = "[(".repeat(100_000);
    assert!(Prompts::parse(&deep.as_str().into(), &"".into(), None, Syntax::A1111, 4).is_ok());
}
