//! Prompts as people paste them: A1111's grammar against an implementation of its own
//! (fixtures/prompts.py), and pictures.

use crate::common::*;
use sdgen::image::Image;
use sdgen::nn::device::Compute;
use sdgen::text::encoder::{PromptEncoder, TextEncoderConfigs};
use sdgen::text::prompt::{Calls, Prompts, ScheduledPrompt, Segment, Syntax, segments};
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
fn a_prompt_is_in_every_call_what_it_is_in_a1111() {
    let goldens: Value =
        serde_json::from_slice(&std::fs::read(fixture("prompts/editing.json")).unwrap()).unwrap();
    let rows = goldens["prompts"].as_array().unwrap();
    assert_eq!(rows.len(), 449);
    for row in rows {
        let prompt = row["prompt"].as_str().unwrap();
        let calls = row["calls"].as_u64().unwrap() as usize;
        let place = format!("{prompt:?} in {calls} calls");
        let ours = Prompts::parse(
            &prompt.into(),
            &"".into(),
            None,
            Syntax::A1111,
            calls.into(),
        );
        let Ok(ours) = ours else {
            // what A1111 fails on, too
            assert!(segments(prompt).is_err(), "{place}");
            continue;
        };
        let parts = row["parts"].as_array().unwrap();
        assert_eq!(ours.parts.len(), parts.len(), "{place}");
        for (part, expected) in ours.parts.iter().zip(parts) {
            assert_eq!(part.weight, expected["weight"].as_f64().unwrap(), "{place}");
            let texts = expected["texts"].as_array().unwrap();
            for call in 0..calls {
                // one text that never changes is stored once
                let text = texts[call.min(texts.len() - 1)].as_str().unwrap();
                assert_eq!(&**part.prompt.at(call), text, "call {call} of {place}");
            }
        }
    }
}

#[test]
fn embeddings_keep_their_mean_in_every_chunk_and_encoder() {
    let (goldens, tensors) = (
        goldens("prompts"),
        load(&fixture("prompts/goldens.safetensors")),
    );
    let mut compared = 0;
    let compute = Compute::cpu();
    for model in ["sd1", "sd2", "sdxl"] {
        let checkpoint = checkpoint(model);
        let encoder = PromptEncoder::new(
            &checkpoint,
            &TextEncoderConfigs::of(&checkpoint).unwrap(),
            &compute,
            None,
        )
        .unwrap();
        for (i, prompt) in goldens["embedded"].as_array().unwrap().iter().enumerate() {
            // the last, of two chunks, was made with sd1 alone
            let Some(golden) = tensors.get(&format!("{model}.{i}")) else {
                continue;
            };
            compared += 1;
            let ours = encoder
                .encode(prompt.as_str().unwrap(), 0, Syntax::A1111, None)
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
    // A1111 goes over in the call after the fourth
    assert_eq!(picture("[the cat:red blue:3]"), picture("the cat"));
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
            "[b:c] (a:1..2)",
            ["`1..2` is not a weight", "at character 10 of the prompt"],
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

/// What a run says of a prompt, without drawing it.
fn said(folder: &Path, args: &[&str]) -> String {
    let mut command = sdgen(folder);
    command.args(["-s", "1", "--dry-run"]).args(args);
    stderr(&succeed(&mut command))
}

#[test]
fn what_looks_like_syntax_and_is_text_is_said() {
    let dir = tempfile::tempdir().unwrap();
    for (prompt, texts) in [
        (
            "[photo:3d render] of a cat",
            &["`[photo:3d render]` is text"][..],
        ),
        ("a clock at [12:30 pm]", &["`[12:30 pm]` is text"]),
        (
            "[landscape, 16:9 ratio]",
            &["`[landscape, 16:9 ratio]` is text"],
        ),
        ("[a:b:0.5.5]", &["`[a:b:0.5.5]` is text"]),
        ("a | b [cat:dog:3]", &["has a `|`"]),
        (
            "(a BREAK b:1.2)",
            &["`BREAK` in brackets with a weight is a word"],
        ),
        ("a cat:1.5", &["multiplies its guidance", "`:1.5`"]),
        ("a photo in 16:9", &["multiplies its guidance", "`:9`"]),
        (
            "a cat # with notes",
            &["`# with notes` is a comment and left out"],
        ),
        ("a cat <hypernet:x:1>", &["`<hypernet:x:1>` is left out"]),
        ("a cat <Lora:x:1>", &["`<Lora:x:1>` is left out", "<lora:"]),
        ("a cat <lora:x:1", &["`<lora:x:1` is text: it has no `>`"]),
        ("(a:1,2) cat", &["`:1,2)` is text", "`(word:1.2)`"]),
        ("a {cat|dog}", &["`{cat|dog}` is text", "`--dynamic`"]),
        (
            "a cat --steps 5",
            &["`--steps` is text", "outside of the quotes"],
        ),
        (
            "a cat\nNegative prompt: ugly\nSteps: 20, Sampler: Euler a",
            &["as A1111 writes them, are text"],
        ),
    ] {
        let said = said(dir.path(), &[prompt]);
        for text in texts.iter().chain(&["warning: ", "--prompt-syntax plain"]) {
            assert!(said.contains(text), "{prompt}: {said}");
        }
    }
    let negative = said(dir.path(), &["a cat", "-n", "ugly <lora:x:1>"]);
    assert!(
        negative.contains("`<lora:x:1>` is text in a negative prompt"),
        "{negative}"
    );
    for args in [
        &[
            "{x} a--b (a, b: c, 1,2) [cat:dog:0.5] (a:1.2) [b|c] \\(d\\) BREAK [e] <3 a <toy> [f::2], 3 > 2",
        ][..],
        &[
            "a cat: old # 1 [photo:3d] <x:y>",
            "--prompt-syntax",
            "plain",
        ],
        &["a cat", "-n", "16:9"],
    ] {
        let said = said(dir.path(), args);
        assert!(!said.contains("A1111"), "{args:?}: {said}");
    }
}

#[test]
fn comments_are_left_out_before_anything_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let picture = |args: &[&str]| draw(dir.path(), "x", args);
    let cat = picture(&["the cat", "-n", "red"]);
    for prompt in [
        "the cat # in <lora:x:1> (a:1.2.3)",
        "# the house\nthe cat",
        "the # house\ncat#",
    ] {
        assert_eq!(picture(&[prompt, "-n", "red # blue"]), cat, "{prompt}");
    }
    let json = stdout(&succeed(sdgen(dir.path()).args([
        "the # house\ncat",
        "-s",
        "1",
        "--dry-run",
        "--json",
    ])));
    assert!(json.contains(r#""prompt":"the\ncat""#), "{json}");
    assert_ne!(
        picture(&["the cat # house", "--prompt-syntax", "plain"]),
        picture(&["the cat", "--prompt-syntax", "plain"])
    );
}

#[test]
fn a_weight_behind_the_prompt_multiplies_guidance() {
    let dir = tempfile::tempdir().unwrap();
    let picture = |args: &[&str]| draw(dir.path(), "x", args);
    assert_eq!(
        picture(&["the cat:1.5", "-n", "dog", "-g", "4"]),
        picture(&["the cat", "-n", "dog", "-g", "6"])
    );
    assert_eq!(
        picture(&["the cat:1.5", "-g", "1"]),
        picture(&["the cat", "-g", "1"])
    );
}

#[test]
fn samplers_of_two_stages_count_calls_as_in_a1111() {
    let dir = tempfile::tempdir().unwrap();
    let picture = |prompt: &str| draw(dir.path(), "x", &[prompt, "--sampler", "heun"]);
    // of seven calls in four steps the last is number 6
    assert_eq!(picture("[the cat:red blue:6]"), picture("the cat"));
    assert_ne!(picture("[the cat:red blue:5]"), picture("the cat"));
}

#[test]
fn in_img2img_steps_of_prompts_are_counted_from_the_first_that_is_run() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "source", &["the cat"]);
    let picture = |prompt: &str| {
        let options = [prompt, "-i", "source.png", "--strength", "0.5"];
        draw(dir.path(), "x", &options)
    };
    // of the two that are run none is beyond the second of all four
    assert_eq!(picture("[the cat:red blue:0.5]"), picture("the cat"));
    assert_ne!(picture("[red blue:the cat:0.0]"), picture("red blue"));
}

#[test]
fn in_a_second_pass_what_a_prompt_was_edited_to_stays() {
    let text = |prompt: &str| {
        let calls = Calls {
            count: 10,
            is_second_pass: true,
        };
        let read = ScheduledPrompt::parse(prompt, calls);
        (0..10)
            .map(|call| read.at(call).to_string())
            .collect::<String>()
    };
    assert_eq!(text("[a:b:0.9]"), "bbbbbbbbbb");
    assert_eq!(text("[a:b:9]"), "bbbbbbbbbb");
    assert_eq!(text("[a:b:1.5]"), "aaaaaabbbb");
    assert_eq!(text("[a:b:13]"), "aaaabbbbbb");
    assert_eq!(text("[a|b]"), "aababababa");

    let dir = tempfile::tempdir().unwrap();
    let picture = |prompt: &str| draw(dir.path(), "x", &[prompt, "--hires", "2"]);
    // in the first pass the cat in every step, in the second in none
    let edited = picture("[the cat:red blue:0.9]");
    assert_eq!(edited, picture("[the cat:red blue:1.0]"));
    assert_ne!(edited, picture("the cat"));
}

#[test]
fn a_prompt_of_any_kind_needs_bounded_time_and_memory() {
    let parse = |prompt: &str, calls: usize| {
        Prompts::parse(
            &prompt.into(),
            &"".into(),
            None,
            Syntax::A1111,
            calls.into(),
        )
        .map_err(|error| format!("{error:#}"))
    };
    let words = "word, ".repeat(200_000);
    assert!(
        parse(&words, 4)
            .unwrap_err()
            .contains("1200000 bytes, at most 65536")
    );
    let many = format!("[{}|b] [c|d|e|f|g] [h|i|j|k|l|m|n]", "a ".repeat(20_000));
    assert!(parse(&many, 1000).unwrap_err().contains("in 1000 calls"));
    assert!(
        parse(&"a AND ".repeat(100), 4)
            .unwrap_err()
            .contains("more than 64 prompts")
    );
    for nested in ["[a:b:0.5", "[a|b", "(a", "[[a:", "(a:b"] {
        let text = format!("{}{}", nested.repeat(5_000), "]".repeat(5_000));
        let _ = parse(&text, 1000);
        sdgen::text::prompt::notes(&text, false);
    }
    // each level adds a chunk, so that the texts have lengths without a small common multiple
    let mut nested = "x".to_owned();
    for step in (1..20).rev() {
        nested = format!("[{}:{nested}:{step}]", "cat ".repeat(76 * step / 3));
    }
    let dir = tempfile::tempdir().unwrap();
    let mut command = sdgen(dir.path());
    let sizes = [
        "-W", "16", "-H", "16", "--steps", "20", "-s", "1", "-n", "blue",
    ];
    succeed(
        command
            .args([&nested, "-m"])
            .arg(fixture("sd1"))
            .args(sizes),
    );
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
            (1 + random(9)).into(),
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
    let deep = "[(".repeat(30_000);
    assert!(
        Prompts::parse(
            &deep.as_str().into(),
            &"".into(),
            None,
            Syntax::A1111,
            4.into()
        )
        .is_ok()
    );
}
