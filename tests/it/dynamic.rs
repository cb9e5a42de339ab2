//! Prompts as templates: what they come to, for which seed, and what is none.

use crate::common::*;
use sdgen::batch::dynamic_prompts::{Template, Wildcards};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;
use std::process::Command;

fn template(text: &str) -> Template {
    Template::parse(text, &mut Wildcards::new(Path::new("none"))).unwrap()
}

/// Everything that a template comes to, by its own account, and by many seeds.
fn texts(text: &str) -> Vec<String> {
    let template = template(text);
    let all = template.all();
    let drawn: BTreeSet<String> = (0..2000).map(|seed| template.draw(seed)).collect();
    assert!(template.count() >= all.len() as u64);
    if !text.contains("$$") {
        assert_eq!(drawn, all.iter().cloned().collect(), "{text}");
    }
    all
}

fn lists(folder: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        let path = folder.join("wildcards").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

/// Prompts of the work list, and negative ones.
fn planned(command: &mut Command) -> Vec<(String, String)> {
    let output = succeed(command.args(["--dry-run", "--json"]));
    let records = stdout(&output)
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .collect::<Vec<_>>();
    let text = |value: &Value| value.as_str().unwrap().to_string();
    records
        .iter()
        .map(|record| (text(&record["prompt"]), text(&record["negative"])))
        .collect()
}

fn dynamic(folder: &Path, args: &[&str]) -> Command {
    let mut command = sdgen(folder);
    command
        .args(["--dynamic", "--steps", "2", "-W", "16", "-H", "16", "-m"])
        .arg(fixture("sd1"))
        .args(args);
    command
}

#[test]
fn a_template_comes_to_every_combination_in_order() {
    for (text, all) in [
        ("a frog", &["a frog"][..]),
        (
            "{red|green|blue} frog",
            &["red frog", "green frog", "blue frog"],
        ),
        ("{a|b}{1|2}", &["a1", "a2", "b1", "b2"]),
        ("{{a|b} x|c{|d}}", &["a x", "b x", "c", "cd"]),
        ("{red |}frog", &["red frog", "frog"]),
        ("{a|a|b}", &["a", "b"]),
        ("{0::a|2::b|.5::c}", &["b", "c"]),
        ("{ red | green }", &["red ", "green "]),
        ("a {red|green} # note", &["a red", "a green"]),
        ("{}", &[""]),
        ("{2$$a|b|c}", &["a,b", "a,c", "b,a", "b,c", "c,a", "c,b"]),
        (
            "{1-2$$ and $$a|b|c}",
            &[
                "a", "b", "c", "a and b", "a and c", "b and a", "b and c", "c and a", "c and b",
            ],
        ),
        ("{0-1$$a|b}", &["", "a", "b"]),
        ("{-2$$a|b}", &["a", "b", "a,b", "b,a"]),
        ("{2-1$$a|b}", &["a", "b", "a,b", "b,a"]),
        ("{2-$$/$$a|b}", &["a/b", "b/a"]),
        ("{5$$a|b}", &["a,b", "b,a"]),
        ("{2$$a|}", &["a"]),
        ("{2$$a|a|b}", &["a,b", "b,a"]),
        ("{2$${x|y}|b}", &["x,b", "y,b", "b,x", "b,y"]),
        ("a{1-2$$|$$x|y}b", &["axb", "ayb", "ax|yb", "ay|xb"]),
        (
            r"\{a\|b\} {c\|d|e} \(f\) \__g__",
            &[r"{a|b} c|d \(f\) __g__", r"{a|b} e \(f\) __g__"],
        ),
        (
            "a | b::c, ^__^, score_9, x__, 3::d",
            &["a | b::c, ^__^, score_9, x__, 3::d"],
        ),
        (
            "{(käfer:1.2)|[a:b:0.5]} 🐞",
            &["(käfer:1.2) 🐞", "[a:b:0.5] 🐞"],
        ),
    ] {
        assert_eq!(texts(text), all, "{text}");
    }
}

#[test]
fn several_are_different_ones_in_any_order() {
    let template = template("{2$$a|b|c}");
    let drawn: BTreeSet<String> = (0..200).map(|seed| template.draw(seed)).collect();
    assert_eq!(
        Vec::from_iter(&drawn),
        ["a,b", "a,c", "b,a", "b,c", "c,a", "c,b"]
    );
}

#[test]
fn lines_of_a_list_are_a_set_and_choices_say_how_they_are_made() {
    let dir = tempfile::tempdir().unwrap();
    lists(dir.path(), &[("c.txt", "red # warm\ngreen\ngreen\nblue\n")]);
    let prompts = |args: &[&str]| -> Vec<String> {
        let pairs = planned(&mut dynamic(dir.path(), args));
        pairs.into_iter().map(|(prompt, _)| prompt).collect()
    };
    assert_eq!(
        prompts(&["__c__", "-s", "1", "--dynamic=all"]),
        ["blue", "green", "red"]
    );
    assert_eq!(
        prompts(&["__@c__ {@a|b} {@2$$x|y}", "-s", "0..4"]),
        ["blue a x,y", "green b y,x", "red a x,y", "blue b y,x"]
    );
    assert_eq!(prompts(&["{~a|b}", "-s", "0..9"]).len(), 9);
    assert_eq!(prompts(&["{!a|b}", "-s", "1", "--dynamic=all"]), ["a", "b"]);
    for (template, how, text) in [
        ("{!a|b}", "random", "`!` in a template takes every text"),
        (
            "x {a|{@b|c}}",
            "all",
            "`~` and `@` in a template choose by the seed",
        ),
        (
            "__~c__",
            "all",
            "`~` and `@` in a template choose by the seed",
        ),
        ("{3$$a|a|a}", "all", "comes to no text"),
    ] {
        let how = format!("--dynamic={how}");
        fail(
            &mut dynamic(dir.path(), &[template, "-s", "1", &how]),
            2,
            &[text],
        );
    }
}

#[test]
fn lines_of_options_are_no_prompts() {
    let dir = tempfile::tempdir().unwrap();
    let line = "--prompt \"a cat\" --steps 3";
    fs::write(dir.path().join("list.txt"), format!("a frog\n{line}\n")).unwrap();
    fail(
        sdgen(dir.path()).args(["--from", "list.txt", "-s", "1"]),
        2,
        &["line 2 of `list.txt`", "are options", ".jsonl"],
    );
    let plain = ["--from", "list.txt", "-s", "1", "--prompt-syntax", "plain"];
    assert_eq!(planned(sdgen(dir.path()).args(plain))[1].0, line);
    fs::write(dir.path().join("list.txt"), "# mine\na frog\n  # more\n").unwrap();
    let mut command = sdgen(dir.path());
    assert_eq!(
        planned(command.args(["--from", "list.txt", "-s", "1"])).len(),
        1
    );
}

#[test]
fn every_text_of_a_template_fits_into_memory() {
    let dir = tempfile::tempdir().unwrap();
    let digits = "{1|2|3|4|5|6|7|8|9|0}".repeat(4);
    let long = format!("{}{digits}", "x ".repeat(30_000));
    let seed = ["-s", "1", "--dynamic=all"];
    fail(
        dynamic(dir.path(), &[&long]).args(seed),
        2,
        &["more than 1000000 texts"],
    );
    let weights = format!("{{{}1::a}}", "1::a|".repeat(15_000));
    let start = std::time::Instant::now();
    assert_eq!(template(&weights).count(), 15_001);
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}

#[test]
fn alternatives_come_as_often_as_their_weights_say() {
    let template = template("{3::red|blue} {1-3$$a|b|c}");
    let mut counts = HashMap::new();
    for seed in 0..12_000 {
        let text = template.draw(seed);
        let (colour, letters) = text.split_once(' ').unwrap();
        *counts.entry(colour.to_string()).or_insert(0) += 1;
        *counts
            .entry(letters.matches(',').count().to_string())
            .or_insert(0) += 1;
    }
    // five standard deviations of 12,000 throws are 237 and 258
    let near = |name: &str, expected: i32| {
        assert!((counts[name] - expected).abs() < 260, "{name}: {counts:?}")
    };
    near("red", 9000);
    near("blue", 3000);
    ["0", "1", "2"]
        .into_iter()
        .for_each(|joints| near(joints, 4000));
}

#[test]
fn a_seed_draws_the_same_text_for_ever_and_another_of_another_template() {
    let drawn = |text: &str| {
        (0..8)
            .map(|seed| template(text).draw(seed))
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(drawn("{a|b|c}"), drawn("{a|b|c}"));
    assert_eq!(
        drawn("{a|b|c}"),
        GOLDEN,
        "pictures that were drawn with `--dynamic` would be other ones now"
    );
    assert_ne!(drawn("x{a|b|c}").replace('x', ""), GOLDEN);
}
const GOLDEN: &str = "a c c c b c b c";

#[test]
fn lists_lie_in_folders_and_name_others() {
    let dir = tempfile::tempdir().unwrap();
    lists(
        dir.path(),
        &[
            ("colour.txt", "\u{feff}# warm\nred\n\n  {dark |}blue  \r\n"),
            ("animals/cats.txt", "a __colour__ lion\na tiger\n"),
        ],
    );
    let mut command = dynamic(
        dir.path(),
        &[
            "__animals/cats__, {2$$__colour__}",
            "-s",
            "1",
            "--dynamic=all",
        ],
    );
    // as in dynamicprompts lines are in alphabetical order
    let ends = ["red,dark blue", "red,blue", "dark blue,red", "blue,red"];
    let all = ["a red lion", "a dark blue lion", "a blue lion", "a tiger"]
        .map(|cat| ends.map(|end| format!("{cat}, {end}")));
    let prompts: Vec<String> = planned(&mut command)
        .into_iter()
        .map(|(prompt, _)| prompt)
        .collect();
    assert_eq!(prompts, all.concat());
    fs::rename(dir.path().join("wildcards"), dir.path().join("mine")).unwrap();
    assert_eq!(
        planned(&mut dynamic(
            dir.path(),
            &["__colour__", "-s", "0..9", "--wildcards", "mine"]
        ))
        .len(),
        9
    );
}

#[test]
fn without_the_option_braces_are_plain_characters() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = sdgen(dir.path());
    let prompts = planned(
        command
            .args(["{red|green} __frog__ {", "-s", "1..3", "-m"])
            .arg(fixture("sd1")),
    );
    assert_eq!(
        prompts,
        vec![("{red|green} __frog__ {".to_string(), String::new()); 2]
    );
    fail(
        sdgen(dir.path()).args(["x", "--wildcards", "mine"]),
        2,
        &["--dynamic"],
    );
}

#[test]
fn negative_prompts_lines_of_objects_and_animations_are_templates_too() {
    let dir = tempfile::tempdir().unwrap();
    let lines = "{\"prompt\": \"{a|b}\", \"negative\": \"{c|d}\", \"seed\": \"0..2\"}\n{\"prompt\": \"e\", \"seed\": 4}\n";
    fs::write(dir.path().join("list.jsonl"), lines).unwrap();
    let pairs = planned(&mut dynamic(
        dir.path(),
        &["--from", "list.jsonl", "--dynamic=all", "-n", "{f|g}"],
    ));
    let pairs: Vec<String> = pairs
        .into_iter()
        .map(|(prompt, negative)| format!("{prompt}-{negative}"))
        .collect();
    assert_eq!(pairs.join(" "), "a-c a-d b-c b-d a-c a-d b-c b-d e-f e-g");
    // a list whose name does not tell may begin with a template
    fs::write(dir.path().join("list"), "{a|a}\n{\"prompt\": 1}\n").unwrap();
    fail(
        &mut dynamic(
            dir.path(),
            &[
                "--from",
                "list",
                "-s",
                "1",
                "--prompt-syntax",
                "plain",
                "-g",
                "0",
                "-n",
                "{",
            ],
        ),
        2,
        &["line 1", "the negative prompt"],
    );
    // all frames of one go to the same prompt
    let output = succeed(
        dynamic(
            dir.path(),
            &[
                "{a|b}",
                "--to",
                "{c|d}",
                "--frames",
                "3",
                "-s",
                "5",
                "--dry-run",
                "--json",
            ],
        )
        .arg("-v"),
    );
    let tos: BTreeSet<String> = stdout(&output)
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["to"]["prompt"].to_string())
        .collect();
    assert_eq!(tos.len(), 1, "{tos:?}");
    assert!(tos.contains("\"c\"") || tos.contains("\"d\""), "{tos:?}");
}

#[test]
fn parts_and_resumed_runs_draw_the_pictures_of_the_whole_and_check_draws_them_again() {
    let dir = tempfile::tempdir().unwrap();
    lists(dir.path(), &[("colour.txt", "red\nblue\ngreen\nblack\n")]);
    fs::write(
        dir.path().join("list.txt"),
        "{the|a} __colour__ cat\n{2$$the house|the dog|red}\n",
    )
    .unwrap();
    let run = |to: &str, more: &[&str]| {
        let mut command = dynamic(
            dir.path(),
            &["--from", "list.txt", "-s", "0..4", "-q", "-n", "__colour__"],
        );
        succeed(
            command
                .args(["-o", &format!("{to}/{{prompt}}-{{negative}}-{{seed}}.png")])
                .args(more),
        );
        let entries = fs::read_dir(dir.path().join(to))
            .unwrap()
            .map(|entry| entry.unwrap());
        entries
            .map(|entry| {
                (
                    entry.file_name().into_string().unwrap(),
                    fs::read(entry.path()).unwrap(),
                )
            })
            .collect::<BTreeMap<_, _>>()
    };
    let whole = run("whole", &["-b", "3"]);
    assert_eq!(whole.len(), 8);
    for part in ["2/3", "0/3"] {
        run("parts", &["--shard", part, "-b", "1"]);
    }
    assert!(run("parts", &["--resume"]) == whole);
    succeed(&mut dynamic(
        dir.path(),
        &[
            "--from",
            "list.txt",
            "-s",
            "0..4",
            "-n",
            "__colour__",
            "-o",
            "whole/{prompt}-{negative}-{seed}.png",
            "--verify",
        ],
    ));
    let names: Vec<String> = whole
        .keys()
        .take(2)
        .map(|name| format!("whole/{name}"))
        .collect();
    succeed(
        sdgen(dir.path())
            .arg("check")
            .args(&names)
            .arg("-m")
            .arg(fixture("sd1")),
    );
}

#[test]
fn what_is_no_template_is_an_error_that_names_the_place() {
    let dir = tempfile::tempdir().unwrap();
    lists(
        dir.path(),
        &[
            ("colour.txt", "red\n{blue\n"),
            ("empty.txt", "# none\n\n"),
            ("a.txt", "x\n__b__\n"),
            ("b.txt", "{y|__a__}\n"),
        ],
    );
    for (prompt, texts) in [
        (
            "ä {red|{blue}",
            &[
                "`{` is never closed, at character 3 of `ä {red|{blue}`",
                r"`\{`",
            ][..],
        ),
        (
            "a red} frog",
            &["`}` closes nothing, at character 6", r"`\}`"],
        ),
        (
            "a {x$$b|c}",
            &["`x` is not a count, at character 4", "{2$$red|green|blue}"],
        ),
        ("{b|-1::c}", &["`-1` is not a weight, at character 4"]),
        ("{1.2.3::b|c}", &["`1.2.3` is not a weight, at character 2"]),
        ("{0::b|0::c}", &["every weight is 0", "at character 1"]),
        ("${x=1} frog", &["variables are not read, at character 1"]),
        (
            "a __colr__ frog",
            &[
                "`__colr__` has no list `wildcards/colr.txt`",
                "did you mean `__colour__`?",
            ],
        ),
        ("__zzzzzzzzzz__", &["--wildcards"]),
        (
            "__colour__",
            &[
                "line 2 of `wildcards/colour.txt`",
                "`{` is never closed, at character 1 of `{blue`",
            ],
        ),
        ("__empty__", &["`wildcards/empty.txt` has no lines"]),
        (
            "__a__",
            &[
                "line 2 of `wildcards/a.txt`",
                "line 1 of `wildcards/b.txt`",
                "leads back to itself: a -> b -> a",
            ],
        ),
        ("__../list__", &["leads out of the folder"]),
        ("__/etc/hosts__", &["leads out of the folder"]),
    ] {
        fail(&mut dynamic(dir.path(), &[prompt, "-s", "1"]), 2, texts);
        fs::write(dir.path().join("list.txt"), format!("fine\n{prompt}\n")).unwrap();
        fail(
            &mut dynamic(dir.path(), &["--from", "list.txt", "-s", "1"]),
            2,
            &["line 2 of `list.txt`", texts[0]],
        );
    }
    let many = "{1|2|3|4|5|6|7|8|9|0}".repeat(7);
    fail(
        &mut dynamic(dir.path(), &[&many, "-s", "1", "--dynamic=all"]),
        2,
        &["more than 1000000 texts"],
    );
    fail(
        &mut dynamic(
            dir.path(),
            &[&many[..5 * 21], "-s", "0..11", "--dynamic=all"],
        ),
        2,
        &["more than 1000000 pictures"],
    );
}

#[test]
fn no_text_makes_templates_panic_or_run_away() {
    let dir = tempfile::tempdir().unwrap();
    let alphabet: Vec<char> = "{}{}||$$__::\\-.0129 ab/\u{e9}\u{1f600}\n\0+e*"
        .chars()
        .collect();
    let mut random = random_numbers();
    lists(dir.path(), &[("a.txt", "x\n{y|z}\n")]);
    let mut wildcards = Wildcards::new(&dir.path().join("wildcards"));
    let mut read = 0;
    for _ in 0..50_000 {
        let text: String = (0..random(24))
            .map(|_| alphabet[random(alphabet.len())])
            .collect();
        let Ok(template) = Template::parse(&text, &mut wildcards) else {
            continue;
        };
        read += 1;
        template.draw(random(1 << 30) as u64);
        assert!(
            template.count() > 10_000 || template.all().len() as u64 <= template.count(),
            "{text:?}"
        );
    }
    assert!(read > 1000, "{read}");
    let mut error =
        |text: &str| format!("{:#}", Template::parse(text, &mut wildcards).unwrap_err());
    assert!(error(&"{".repeat(100_000)).contains("64 deep"));
    // each list names the next one twice: 2^60 words, or as many nothings
    for (word, kind) in [("x", "words"), ("{|}", "nothings")] {
        let name = |i: usize| format!("{kind}/{i}.txt");
        let line = |i: usize| {
            if i == 60 {
                word.to_string()
            } else {
                format!("__{kind}/{next}____{kind}/{next}__", next = i + 1)
            }
        };
        let files: Vec<(String, String)> = (0..=60).map(|i| (name(i), line(i))).collect();
        lists(
            dir.path(),
            &files
                .iter()
                .map(|(name, text)| (&**name, &**text))
                .collect::<Vec<_>>(),
        );
        assert!(error(&format!("__{kind}/0__")).contains("more than 100000 characters"));
    }
}
