//! `sdgen help` and `sdgen man`.

use crate::common::*;

const TOPICS: [&str; 10] = [
    "models",
    "prompts",
    "sampling",
    "pictures",
    "lora",
    "batches",
    "scripting",
    "parity",
    "benchmarks",
    "gpu",
];

fn help(args: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    stdout(&succeed(sdgen(dir.path()).arg("help").args(args)))
}

#[test]
fn help_alone_is_the_usual_help_and_the_list_of_topics() {
    let dir = tempfile::tempdir().unwrap();
    let all = help(&[]);
    let usual = stdout(&succeed(sdgen(dir.path()).arg("-h")));
    let (before_examples, _) = usual.split_once("Examples:").unwrap();
    assert!(all.starts_with(before_examples), "{all}");
    let (_, list) = all.rsplit_once("Topics").unwrap();
    let listed: Vec<&str> = list
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(listed, TOPICS);
}

#[test]
fn every_topic_is_a_page_of_plain_text() {
    for topic in TOPICS {
        let page = help(&[topic]);
        let source = fixture(&format!("../../assets/docs/{topic}.md"));
        let source = std::fs::read_to_string(source).unwrap();
        let title = source.lines().next().unwrap();
        assert!(title.starts_with("# ") && page.starts_with(title), "{page}");
        assert!(
            page.lines().count() > 10 && !page.contains("```") && !page.contains("!["),
            "{topic}"
        );
        assert!(!page.contains("\n\n\n"), "{topic} has a gap");
    }
    // code is indented
    assert!(help(&["batches"]).contains("\n    {\"prompt\": \"a frog\""));
}

#[test]
fn the_help_of_a_command_is_what_the_command_says() {
    let dir = tempfile::tempdir().unwrap();
    for command in ["check", "upscale", "inspect", "help"] {
        let said = stdout(&succeed(sdgen(dir.path()).args([command, "-h"])));
        assert_eq!(help(&[command]), said, "{command}");
    }
}

#[test]
fn an_unknown_topic_is_an_error_that_names_the_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("promts", "did you mean `prompts`?"),
        ("upscal", "did you mean `upscale`?"),
        ("cooking", "topics are models, prompts"),
    ];
    for (topic, text) in cases {
        fail(
            sdgen(dir.path()).args(["help", topic]),
            2,
            &[&format!("there is no help on `{topic}`"), text],
        );
    }
}

#[test]
fn the_man_page_has_every_option() {
    let dir = tempfile::tempdir().unwrap();
    let page = stdout(&succeed(sdgen(dir.path()).arg("man")));
    assert!(page.contains(".TH sdgen 1"), "{page}");
    for option in ["model", "seed", r"vae\-tiling", r"dry\-run"] {
        assert!(page.contains(&format!(r"\-\-{option}")), "{option}");
    }
    // what it is for, also of one that -h leaves out
    assert!(page.contains("Decode in tiles"), "{page}");
}

#[test]
fn a_prompt_that_is_the_name_of_a_command_goes_behind_two_dashes() {
    let dir = tempfile::tempdir().unwrap();
    let output = succeed(sdgen(dir.path()).args(["-s", "1", "--steps", "1", "--", "man"]));
    assert_eq!(stdout(&output), "man-1.png\n");
}
