//! The layers of the program (DESIGN: `cli > batch > pipeline > sampling, text, model, image >
//! weights > nn`), checked in the sources: no file imports a folder of a layer above its own, and
//! folders of one layer do not import each other in a circle.
//!
//! What counts is every path that begins with `crate`, `super` or `self` outside `#[cfg(test)]`, in
//! `use` lines, in code and in the arguments of macros. Comments and documentation may point
//! anywhere.

use crate::common::project;
use proc_macro2::{Delimiter, TokenStream, TokenTree};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The layers from the lowest up, and the files and folders of `src` in each.
const LAYERS: [&[&str]; 7] = [
    &["alloc", "error", "hex", "suggest"],
    &["nn"],
    &["weights", "hub"],
    &["sampling", "text", "model", "image"],
    &["pipeline"],
    &["batch"],
    &["cli"],
];

/// Imports that break the rule today, as (who, whom). The list can only shrink: an entry that no
/// longer occurs fails the test as well.
const KNOWN: &[(&str, &str)] = &[];

/// The crate's roots, which may name everything.
const ROOTS: [&str; 2] = ["lib.rs", "main.rs"];

type Imports = BTreeSet<(String, String)>;

/// Every source file, relative to `src`, with `/` between folders.
fn sources() -> BTreeMap<String, String> {
    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let root = project().join("src");
    let mut files = vec![];
    walk(&root, &mut files);
    files
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            (name.replace('\\', "/"), text)
        })
        .collect()
}

/// The path of the module that a file holds: `["nn", "cpu"]` for `nn/cpu/mod.rs`.
fn module(file: &str) -> Vec<String> {
    let mut parts: Vec<String> = file
        .trim_end_matches(".rs")
        .split('/')
        .map(String::from)
        .collect();
    if parts.last().is_some_and(|part| part == "mod") || ROOTS.contains(&file) {
        parts.pop();
    }
    parts
}

/// The file that a path of the crate leads to: that of the longest beginning which is a module.
fn file_of(path: &[String], modules: &BTreeMap<Vec<String>, String>) -> String {
    (0..=path.len())
        .rev()
        .find_map(|length| modules.get(&path[..length]))
        .cloned()
        .unwrap_or_else(|| ROOTS[0].to_owned())
}

/// Collects the paths in code, each from the crate's root.
struct Paths {
    /// The module that the tokens stand in.
    module: Vec<String>,
    found: BTreeSet<Vec<String>>,
}

impl Paths {
    fn of(file: &str, text: &str) -> BTreeSet<Vec<String>> {
        let mut paths = Self {
            module: module(file),
            found: BTreeSet::new(),
        };
        let tokens: TokenStream = text
            .parse()
            .unwrap_or_else(|error| panic!("{file}: {error}"));
        paths.walk(tokens);
        paths.found
    }

    fn walk(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            let after_path = is_separator(&tokens[..at]);
            match &tokens[at..] {
                [TokenTree::Punct(hash), TokenTree::Group(attribute), ..]
                    if hash.as_char() == '#' && is_for_tests(attribute.stream()) =>
                {
                    at = end_of_item(&tokens, at + 2);
                    continue;
                }
                [
                    TokenTree::Ident(keyword),
                    TokenTree::Ident(name),
                    TokenTree::Group(body),
                    ..,
                ] if keyword == "mod" => {
                    self.module.push(name.to_string());
                    self.walk(body.stream());
                    self.module.pop();
                    at += 3;
                    continue;
                }
                [TokenTree::Ident(first), ..]
                    if !after_path
                        && ["crate", "self", "super"].iter().any(|word| first == word) =>
                {
                    at = self.path(&tokens, at, None);
                    continue;
                }
                [TokenTree::Group(group), ..] => self.walk(group.stream()),
                _ => {}
            }
            at += 1;
        }
    }

    /// Reads a path, or a tree of them as in `use`, behind what it begins with, and returns where
    /// it ends.
    fn path(&mut self, tokens: &[TokenTree], mut at: usize, from: Option<Vec<String>>) -> usize {
        let mut path = from;
        loop {
            match tokens.get(at) {
                Some(TokenTree::Ident(word)) if word == "crate" => path = Some(vec![]),
                Some(TokenTree::Ident(word)) if word == "self" => {
                    path.get_or_insert_with(|| self.module.clone());
                }
                Some(TokenTree::Ident(word)) if word == "super" => {
                    path.get_or_insert_with(|| self.module.clone()).pop();
                }
                Some(TokenTree::Ident(word)) => {
                    path.get_or_insert_default().push(word.to_string());
                }
                Some(TokenTree::Group(tree)) if tree.delimiter() == Delimiter::Brace => {
                    let tree: Vec<TokenTree> = tree.stream().into_iter().collect();
                    for branch in tree.split(|token| is_punct(token, ',')) {
                        self.path(branch, 0, path.clone());
                    }
                    return at + 1;
                }
                // a glob, generic arguments, or what follows the last comma
                _ => break,
            }
            at += 1;
            if !tokens.get(at..at + 2).is_some_and(is_separator) {
                break;
            }
            at += 2;
        }
        self.found.extend(path);
        at
    }
}

fn is_punct(token: &TokenTree, wanted: char) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == wanted)
}

/// Whether the tokens end with `::`.
fn is_separator(tokens: &[TokenTree]) -> bool {
    matches!(tokens, [.., first, second] if is_punct(first, ':') && is_punct(second, ':'))
}

/// Whether an attribute is `cfg(test)` or `cfg(all(test, ...))`.
fn is_for_tests(attribute: TokenStream) -> bool {
    let text: String = attribute.to_string().split_whitespace().collect();
    text == "cfg(test)" || text.starts_with("cfg(all(test,")
}

/// Where the item ends that begins here: behind its body in braces, or its semicolon.
fn end_of_item(tokens: &[TokenTree], from: usize) -> usize {
    let end = tokens[from..].iter().position(|token| match token {
        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
        token => is_punct(token, ';'),
    });
    end.map_or(tokens.len(), |end| from + end + 1)
}

/// Who imports whom, of different files.
fn imports(sources: &BTreeMap<String, String>) -> Imports {
    let modules: BTreeMap<Vec<String>, String> = sources
        .keys()
        .filter(|file| **file != "main.rs")
        .map(|file| (module(file), file.clone()))
        .collect();
    let mut imports = Imports::new();
    for (file, text) in sources {
        for path in Paths::of(file, text) {
            imports.insert((file.clone(), file_of(&path, &modules)));
        }
    }
    imports.retain(|(from, to)| from != to);
    imports
}

/// The folder of `src` that a file is in, or the file itself if it is in none.
fn folder(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

fn layer(file: &str) -> usize {
    LAYERS
        .iter()
        .position(|layer| layer.contains(&folder(file)))
        .unwrap_or_else(|| panic!("src/{file} is in none of the LAYERS: say where it belongs"))
}

/// The imports that break the rule, each with its reason.
fn violations(imports: &Imports) -> BTreeMap<(String, String), &'static str> {
    let between: Vec<&(String, String)> = imports
        .iter()
        .filter(|(from, to)| {
            folder(from) != folder(to) && !ROOTS.contains(&&**from) && !ROOTS.contains(&&**to)
        })
        .collect();
    // the folders of one layer that a folder reaches
    let mut reached: BTreeSet<(&str, &str)> = between
        .iter()
        .filter(|(from, to)| layer(from) == layer(to))
        .map(|(from, to)| (folder(from), folder(to)))
        .collect();
    loop {
        let further: Vec<(&str, &str)> = reached
            .iter()
            .flat_map(|(from, by)| {
                let next = reached.iter().filter(move |(start, _)| start == by);
                next.map(move |(_, to)| (*from, *to))
            })
            .collect();
        let before = reached.len();
        reached.extend(further);
        if reached.len() == before {
            break;
        }
    }
    between
        .into_iter()
        .filter_map(|import| {
            let (from, to) = import;
            let reason = if layer(from) < layer(to) {
                "points upwards"
            } else if layer(from) == layer(to) && reached.contains(&(folder(to), folder(from))) {
                "is part of a circle"
            } else {
                return None;
            };
            Some((import.clone(), reason))
        })
        .collect()
}

#[test]
fn no_file_imports_a_layer_above_its_own() {
    let found = violations(&imports(&sources()));
    let known: BTreeSet<(String, String)> = KNOWN
        .iter()
        .map(|(from, to)| (String::from(*from), String::from(*to)))
        .collect();
    let new: Vec<String> = found
        .iter()
        .filter(|(import, _)| !known.contains(import))
        .map(|((from, to), reason)| format!("    (\"{from}\", \"{to}\"), // {reason}\n"))
        .collect();
    let gone: Vec<String> = known
        .iter()
        .filter(|import| !found.contains_key(import))
        .map(|(from, to)| format!("    (\"{from}\", \"{to}\"),\n"))
        .collect();
    assert!(
        new.is_empty() && gone.is_empty(),
        "imports against the order of the layers:\n{}no longer there, to be taken out of KNOWN:\n{}",
        new.concat(),
        gone.concat()
    );
}

#[test]
fn every_way_to_name_a_module_is_seen_and_tests_are_not() {
    let text = r#"
        //! [`crate::cli`]
        use crate::nn::{self, layers::{Conv2d as Convolution, Linear}, cpu::*};
        use super::mapping;
        /// [`crate::batch`]
        fn f(x: &Vec<crate::text::Tokenizer>) -> Result<()> {
            let _ = "crate::cli::text";
            println!("{}", crate::image::load::read(x)?);
            self.x.crate_name::other()
        }
        mod inner {
            use super::super::outer;
            use self::own;
        }
        pub(crate) mod declared;
        #[cfg(test)]
        use crate::hub;
        #[cfg(all(test, target_os = "linux"))]
        #[allow(clippy::unwrap_used)]
        mod tests {
            use crate::cli;
        }
        fn g() -> crate::sampling::Plan {}
    "#;
    let paths: Vec<String> = Paths::of("weights/lora.rs", text)
        .iter()
        .map(|path| path.join("::"))
        .collect();
    let mut expected = [
        "nn",
        "nn::layers::Conv2d",
        "nn::layers::Linear",
        "nn::cpu",
        "weights::mapping",
        "text::Tokenizer",
        "image::load::read",
        "weights::outer",
        "weights::lora::inner::own",
        "sampling::Plan",
        // `self.x` and `pub(crate)` name the module itself and the root
        "weights::lora",
        "",
    ];
    expected.sort_unstable();
    let mut paths = paths;
    paths.sort_unstable();
    assert_eq!(paths, expected);
}

#[test]
fn imports_upwards_and_circles_of_one_layer_are_found_and_no_others() {
    let import = |(from, to): (&str, &str)| (from.to_owned(), to.to_owned());
    let imports: Imports = [
        ("cli/draw.rs", "pipeline/mod.rs"),
        ("nn/mod.rs", "nn/layers.rs"),
        ("nn/layers.rs", "weights/mod.rs"),
        ("weights/mod.rs", "hex.rs"),
        ("image/mod.rs", "sampling/schedule.rs"),
        ("sampling/noise.rs", "text/mod.rs"),
        ("text/clip.rs", "image/load.rs"),
        ("model/vae.rs", "image/mod.rs"),
        ("main.rs", "cli/mod.rs"),
        ("cli/mod.rs", "lib.rs"),
    ]
    .into_iter()
    .map(import)
    .collect();
    let found: Vec<(String, String)> = violations(&imports).into_keys().collect();
    let expected = [
        ("image/mod.rs", "sampling/schedule.rs"),
        ("nn/layers.rs", "weights/mod.rs"),
        ("sampling/noise.rs", "text/mod.rs"),
        ("text/clip.rs", "image/load.rs"),
    ];
    assert_eq!(found, expected.map(import));
}
