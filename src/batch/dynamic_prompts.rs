//! Templates of prompts, as A1111's Dynamic Prompts extension reads them: `{red|green} frog`,
//! `__colour__`.
//!
//! Pure but for the files of wildcards, each of which is read once. Parsed into a tree whose size,
//! depth and length are bounded, so that neither lists that name each other nor braces in braces
//! run away. What a template draws depends on its own text and a seed alone. Used by
//! [`crate::batch::jobs`], before there are pictures to speak of. The reference is the library
//! `dynamicprompts` 0.31; where this differs is in `sdgen help batches`.

use crate::suggest::nearest;
use crate::weights::file::{is_absent, read_text};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Braces and lists within each other.
const MAX_DEPTH: usize = 64;
/// Characters that a template may come to, each choice counted as one more.
const MAX_LENGTH: usize = 100_000;
/// A larger share than any that is meant, so that sums stay finite.
const MAX_WEIGHT: f64 = 1e9;
/// Bytes of all texts of a template.
const MAX_BYTES_OF_ALL: u64 = 1 << 28;
/// The characters that a backslash makes literal.
const ESCAPED: &str = "{}|_$#";
/// What joins several alternatives.
const JOINT: &str = ",";

/// `--dynamic`: what becomes of a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Dynamic {
    /// one text for each seed
    Random,
    /// every text it can come to
    All,
}

/// The lists that templates name, from the files of a folder.
pub struct Wildcards {
    folder: PathBuf,
    lists: HashMap<String, Arc<Options>>,
    /// whose lines are being read, outermost first
    open: Vec<String>,
}

/// A prompt with choices.
#[derive(Debug)]
pub struct Template {
    tree: Tree,
    /// of its text
    hash: u64,
}

#[derive(Debug)]
struct Tree {
    nodes: Vec<Node>,
    /// how many texts it can come to, saturating
    count: u64,
    /// the longest text in characters, and the choices on the way
    length: usize,
    depth: usize,
    /// whether something in it is chosen in a way of its own
    ways: Ways,
}

/// The ways to choose that are said in a template.
#[derive(Debug, Clone, Copy, Default)]
struct Ways {
    /// `~` or `@`
    drawn: bool,
    /// `!`
    all: bool,
}

impl Ways {
    fn and(self, other: Self) -> Self {
        Self {
            drawn: self.drawn || other.drawn,
            all: self.all || other.all,
        }
    }
}

#[derive(Debug)]
enum Node {
    Text(String),
    Choice(Choice),
}

/// So many different ones of some alternatives.
#[derive(Debug)]
struct Choice {
    way: Option<Way>,
    options: Arc<Options>,
    least: usize,
    most: usize,
    joint: String,
}

/// How a choice is made where it says so itself.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    /// `~`: at random
    Random,
    /// `@`: one after the other, seed by seed
    InTurn,
    /// `!`: every one
    All,
}

impl Way {
    /// The way that a text begins with.
    fn of(text: &str) -> Option<Self> {
        match text.bytes().next()? {
            b'~' => Some(Self::Random),
            b'@' => Some(Self::InTurn),
            b'!' => Some(Self::All),
            _ => None,
        }
    }
}

/// At least one alternative, with weights above 0.
#[derive(Debug)]
struct Options {
    all: Vec<(f64, Tree)>,
    total_weight: f64,
    length: usize,
    depth: usize,
    ways: Ways,
}

impl Template {
    /// Reads a template. Errors name the place, or the file and the line of a list.
    pub fn parse(text: &str, wildcards: &mut Wildcards) -> Result<Self> {
        // FNV-1a
        let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Ok(Self {
            tree: Reader {
                text,
                at: 0,
                depth: 0,
                wildcards,
            }
            .tree(false)?,
            hash,
        })
    }

    /// Errors if its choices are not made in this way.
    pub fn check(&self, how: Dynamic) -> Result<()> {
        let Ways { drawn, all } = self.tree.ways;
        ensure!(
            how == Dynamic::Random || !drawn,
            "`~` and `@` in a template choose by the seed, not every text\n\nhint: leave them out, or `--dynamic` without `=all`"
        );
        ensure!(
            how == Dynamic::All || !all,
            "`!` in a template takes every text, not one for each seed\n\nhint: leave it out, or `--dynamic=all`"
        );
        Ok(())
    }

    /// The text of a seed, the same one wherever the template stands.
    pub fn draw(&self, seed: u64) -> String {
        // two templates with one seed shall not both take their first alternative
        let state = Random(self.hash).next().wrapping_add(Random(seed).next());
        let mut random = Seeded {
            random: Random(state),
            seed,
        };
        let mut text = String::new();
        self.tree.write(&mut random, &mut text);
        text
    }

    /// How many texts [`Self::all`] goes through, perhaps some of them twice; as many as there can
    /// be where they would take too much memory.
    pub fn count(&self) -> u64 {
        let bytes = self.tree.count.saturating_mul(self.tree.length as u64);
        if bytes > MAX_BYTES_OF_ALL {
            return u64::MAX;
        }
        self.tree.count
    }

    /// Every text once, the last choice innermost; of several the shorter first, in every order,
    /// and none of them twice.
    pub fn all(&self) -> Vec<String> {
        let mut seen = HashSet::new();
        let mut texts = self.tree.texts();
        texts.retain(|text| seen.insert(text.clone()));
        texts
    }
}

impl Tree {
    fn new(nodes: Vec<Node>) -> Result<Self> {
        let (mut count, mut length, mut depth) = (1u64, 1usize, 0);
        let mut ways = Ways::default();
        for node in &nodes {
            match node {
                Node::Text(text) => length = length.saturating_add(text.len()),
                Node::Choice(choice) => {
                    let of_one = choice.options.length.saturating_add(choice.joint.len());
                    count = count.saturating_mul(choice.count());
                    length = length
                        .saturating_add(choice.most.saturating_mul(of_one))
                        .saturating_add(1);
                    depth = depth.max(choice.options.depth + 1);
                    ways = ways.and(choice.options.ways).and(Ways {
                        drawn: matches!(choice.way, Some(Way::Random | Way::InTurn)),
                        all: choice.way == Some(Way::All),
                    });
                }
            }
        }
        ensure!(
            length <= MAX_LENGTH,
            "this template may come to more than {MAX_LENGTH} characters\n\nhint: its lists name too many others"
        );
        ensure!(
            depth <= MAX_DEPTH,
            "braces and lists lie more than {MAX_DEPTH} deep in each other"
        );
        Ok(Self {
            nodes,
            count,
            length,
            depth,
            ways,
        })
    }

    fn write(&self, random: &mut Seeded, to: &mut String) {
        for node in &self.nodes {
            match node {
                Node::Text(text) => to.push_str(text),
                Node::Choice(choice) => choice.write(random, to),
            }
        }
    }

    fn texts(&self) -> Vec<String> {
        let part = |node: &Node| match node {
            Node::Text(text) => vec![text.clone()],
            Node::Choice(choice) => choice.texts(),
        };
        let parts: Vec<Vec<String>> = self.nodes.iter().map(part).collect();
        product(parts.iter().map(Vec::as_slice))
    }
}

/// Every way to take one text of each part.
fn product<'a>(parts: impl Iterator<Item = &'a [String]>) -> Vec<String> {
    let mut texts = vec![String::new()];
    for part in parts {
        texts = texts
            .iter()
            .flat_map(|text| part.iter().map(move |more| format!("{text}{more}")))
            .collect();
    }
    texts
}

impl Choice {
    /// One of these alternatives.
    fn one(options: Arc<Options>, way: Option<Way>) -> Self {
        Self {
            way,
            options,
            least: 1,
            most: 1,
            joint: String::new(),
        }
    }

    fn write(&self, random: &mut Seeded, to: &mut String) {
        let chosen = match self.way {
            Some(Way::InTurn) => self.in_turn(random.seed),
            _ => self.drawn(&mut random.random),
        };
        let texts: Vec<String> = chosen
            .into_iter()
            .map(|tree| {
                let mut text = String::new();
                tree.write(random, &mut text);
                text
            })
            .collect();
        to.push_str(&self.joined(&texts));
    }

    /// Joins texts. An empty one at an end leaves no separator there.
    fn joined<T: AsRef<str>>(&self, texts: &[T]) -> String {
        if let [one] = texts {
            return one.as_ref().into();
        }
        let texts: Vec<&str> = texts.iter().map(AsRef::as_ref).collect();
        let text = texts.join(&self.joint);
        let text = text.strip_prefix(&*self.joint).unwrap_or(&text);
        text.strip_suffix(&*self.joint).unwrap_or(text).into()
    }

    /// Different alternatives at random, by their weights.
    fn drawn(&self, random: &mut Random) -> Vec<&Tree> {
        let Options {
            all, total_weight, ..
        } = &*self.options;
        let many = self.least + random.below(self.most - self.least + 1);
        let mut left = *total_weight;
        let mut taken = vec![false; all.len()];
        let mut trees = vec![];
        for _ in 0..many {
            let mut at = random.unit() * left;
            let mut chosen = None;
            for (option, taken) in all.iter().zip(&mut taken).filter(|(_, taken)| !**taken) {
                at -= option.0;
                chosen = Some((option, taken));
                if at < 0.0 {
                    break;
                }
            }
            let Some(((weight, tree), taken)) = chosen else {
                break;
            };
            (*taken, left) = (true, left - weight);
            trees.push(tree);
        }
        trees
    }

    /// The alternatives whose turn it is, in the order of [`Self::texts`].
    fn in_turn(&self, seed: u64) -> Vec<&Tree> {
        let mut left: Vec<&Tree> = self.options.all.iter().map(|(_, tree)| tree).collect();
        let orders = |of: usize, many: usize| {
            let factors = (0..many).map(|i| (of - i) as u64);
            factors.fold(1, u64::saturating_mul)
        };
        let sizes = self.least..=self.most;
        let total = sizes
            .clone()
            .map(|many| orders(left.len(), many))
            .fold(0, u64::saturating_add);
        let mut at = seed % total.max(1);
        for many in sizes {
            let of_size = orders(left.len(), many);
            if at >= of_size {
                at -= of_size;
                continue;
            }
            let mut trees = vec![];
            for i in 0..many {
                let each = orders(left.len() - 1, many - i - 1);
                trees.push(left.remove((at / each) as usize));
                at %= each;
            }
            return trees;
        }
        vec![]
    }

    /// How many texts, saturating: the elementary symmetric polynomials of the alternatives'
    /// counts, each in every order.
    fn count(&self) -> u64 {
        let counts = self.options.all.iter().map(|(_, tree)| tree.count);
        if self.most.saturating_mul(self.options.all.len()) > 1 << 26 {
            return u64::MAX; // nobody waits for so many
        }
        let mut of_many = vec![0u64; self.most + 1];
        of_many[0] = 1;
        for count in counts {
            for k in (1..=self.most).rev() {
                of_many[k] = of_many[k].saturating_add(of_many[k - 1].saturating_mul(count));
            }
        }
        let mut orders = 1u64;
        let mut sum = 0u64;
        for (k, count) in of_many.iter().enumerate() {
            orders = orders.saturating_mul(k.max(1) as u64);
            if k >= self.least {
                sum = sum.saturating_add(count.saturating_mul(orders));
            }
        }
        sum
    }

    fn texts(&self) -> Vec<String> {
        let mut texts = vec![];
        if self.least == 0 {
            texts.push(String::new());
        }
        if self.most == 0 {
            return texts;
        }
        let trees = self.options.all.iter().map(|(_, tree)| tree);
        let options: Vec<Vec<String>> = trees.map(Tree::texts).collect();
        for many in self.least.max(1)..=self.most {
            self.add_orders(&options, many, &mut vec![], &mut vec![], &mut texts);
        }
        texts
    }

    /// Adds every order of `many` different texts, each of another alternative, after those that are
    /// `chosen` from the alternatives `taken`.
    fn add_orders<'a>(
        &self,
        options: &'a [Vec<String>],
        many: usize,
        taken: &mut Vec<usize>,
        chosen: &mut Vec<&'a str>,
        texts: &mut Vec<String>,
    ) {
        if chosen.len() == many {
            texts.push(self.joined(chosen));
            return;
        }
        for (i, option) in options.iter().enumerate() {
            if taken.contains(&i) {
                continue;
            }
            taken.push(i);
            for text in option {
                if !chosen.contains(&text.as_str()) {
                    chosen.push(text);
                    self.add_orders(options, many, taken, chosen, texts);
                    chosen.pop();
                }
            }
            taken.pop();
        }
    }
}

impl Options {
    /// None if there is nothing to choose from.
    fn new(mut all: Vec<(f64, Tree)>) -> Option<Arc<Self>> {
        all.retain(|(weight, _)| *weight > 0.0);
        let total_weight = all.iter().map(|(weight, _)| weight).sum();
        let length = all.iter().map(|(_, tree)| tree.length).max()?;
        let depth = all.iter().map(|(_, tree)| tree.depth).max()?;
        let ways = all
            .iter()
            .fold(Ways::default(), |ways, (_, tree)| ways.and(tree.ways));
        Some(Arc::new(Self {
            all,
            total_weight,
            length,
            depth,
            ways,
        }))
    }
}

impl Wildcards {
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.into(),
            lists: HashMap::new(),
            open: vec![],
        }
    }

    fn list(&mut self, name: &str, depth: usize) -> Result<Arc<Options>> {
        if let Some(known) = self.lists.get(name) {
            return Ok(known.clone());
        }
        if self.open.iter().any(|open| open == name) {
            bail!(
                "`__{name}__` leads back to itself: {} -> {name}",
                self.open.join(" -> ")
            );
        }
        ensure!(
            name.split('/').all(|part| !matches!(part, "" | "." | "..")),
            "`__{name}__` leads out of the folder `{}`",
            self.folder.display()
        );
        let path = self.folder.join(format!("{name}.txt"));
        if is_absent(&path) {
            let mut names = vec![];
            names_in(&self.folder, "", 0, &mut names);
            let hint = match nearest(name, names.iter().map(String::as_str)) {
                Some(near) => format!("did you mean `__{near}__`?"),
                None => "`--wildcards FOLDER` says where the lists are; `\\__` are two underscores"
                    .into(),
            };
            bail!(
                "`__{name}__` has no list `{}`\n\nhint: {hint}",
                path.display()
            );
        }
        let text = read_text(&path)
            .with_context(|| format!("cannot read the list `{}`", path.display()))?;
        self.open.push(name.into());
        let lines = (1..)
            .zip(text.trim_start_matches('\u{feff}').lines())
            .map(|(number, line)| (number, line.trim()))
            .filter(|(_, line): &(usize, &str)| !line.is_empty() && !line.starts_with('#'));
        // lines are a set, in order
        let mut lines: Vec<_> = lines.collect();
        lines.sort_by_key(|(_, line)| *line);
        lines.dedup_by_key(|(_, line)| *line);
        let read = |(number, line)| {
            let tree = Reader {
                text: line,
                at: 0,
                depth,
                wildcards: self,
            }
            .tree(false);
            Ok((
                1.0,
                tree.with_context(|| format!("line {number} of `{}`", path.display()))?,
            ))
        };
        let all = lines.into_iter().map(read);
        let options = Options::new(all.collect::<Result<_>>()?)
            .ok_or_else(|| anyhow!("the list `{}` has no lines", path.display()))?;
        self.open.pop();
        self.lists.insert(name.into(), options.clone());
        Ok(options)
    }
}

/// The names of all lists of a folder.
fn names_in(folder: &Path, before: &str, depth: usize, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let name = format!("{before}{}", name.to_string_lossy());
        match name.strip_suffix(".txt") {
            // links may go round
            _ if path.is_dir() && depth < 8 => {
                names_in(&path, &format!("{name}/"), depth + 1, names)
            }
            Some(list) => names.push(list.into()),
            None => {}
        }
    }
}

/// Reads a template.
struct Reader<'a> {
    text: &'a str,
    /// in bytes
    at: usize,
    depth: usize,
    wildcards: &'a mut Wildcards,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// Where a byte stands, for people.
    fn place(&self, at: usize) -> String {
        let before = self
            .text
            .get(..at)
            .map_or(0, |before| before.chars().count());
        format!("at character {} of `{}`", before + 1, self.text)
    }

    /// Reads up to the end, or in braces up to `|` or `}`, which it leaves there.
    fn tree(&mut self, in_braces: bool) -> Result<Tree> {
        let mut nodes = vec![];
        let mut text = String::new();
        while let Some(c) = self.rest().chars().next() {
            let rest = self.rest();
            match c {
                '|' | '}' if in_braces => break,
                '}' => bail!(
                    "`}}` closes nothing, {}\n\nhint: `\\}}` is a brace itself",
                    self.place(self.at)
                ),
                '$' if rest.starts_with("${") => {
                    bail!(
                        "variables are not read, {}\n\nhint: write `\\$` for the sign itself",
                        self.place(self.at)
                    )
                }
                '{' => {
                    nodes.push(Node::Text(std::mem::take(&mut text)));
                    nodes.push(Node::Choice(self.braces()?));
                }
                '_' if rest.starts_with("__") => match list_name(rest) {
                    Some(name) => {
                        nodes.push(Node::Text(std::mem::take(&mut text)));
                        self.deeper()?;
                        let way = Way::of(name);
                        let list = &name[usize::from(way.is_some())..];
                        let options = self.wildcards.list(list, self.depth)?;
                        self.depth -= 1;
                        nodes.push(Node::Choice(Choice::one(options, way)));
                        self.at += name.len() + 4;
                    }
                    None => {
                        text.push_str("__");
                        self.at += 2;
                    }
                },
                '#' => {
                    text.truncate(text.trim_end().len());
                    self.at += rest.find('\n').unwrap_or(rest.len());
                }
                '\\' => {
                    // what it means elsewhere in a prompt it goes on to mean
                    let next = rest[1..].chars().next();
                    text.extend(
                        Some(c)
                            .filter(|_| !next.is_some_and(|next| ESCAPED.contains(next)))
                            .into_iter()
                            .chain(next),
                    );
                    self.at += 1 + next.map_or(0, char::len_utf8);
                }
                _ => {
                    text.push(c);
                    self.at += c.len_utf8();
                }
            }
        }
        nodes.push(Node::Text(text));
        nodes.retain(|node| !matches!(node, Node::Text(text) if text.is_empty()));
        Tree::new(nodes)
    }

    fn deeper(&mut self) -> Result<()> {
        self.depth += 1;
        ensure!(
            self.depth <= MAX_DEPTH,
            "braces and lists lie more than {MAX_DEPTH} deep in each other"
        );
        Ok(())
    }

    /// Reads `{...}`.
    fn braces(&mut self) -> Result<Choice> {
        let begun = self.at;
        self.at += 1;
        self.deeper()?;
        self.skip_blanks();
        let way = Way::of(self.rest());
        self.at += usize::from(way.is_some());
        let count = self.count()?;
        let mut all = vec![];
        loop {
            self.skip_blanks();
            let weight = self.weight()?;
            all.push((weight, self.tree(true)?));
            match self.rest().chars().next() {
                Some(end) => {
                    self.at += 1;
                    if end == '}' {
                        break;
                    }
                }
                None => bail!(
                    "`{{` is never closed, {}\n\nhint: `{{red|green}}`, or `\\{{` for a brace itself",
                    self.place(begun)
                ),
            }
        }
        self.depth -= 1;
        let options = Options::new(all)
            .ok_or_else(|| anyhow!("every weight is 0 in the braces {}", self.place(begun)))?;
        let Some((least, most, joint)) = count else {
            return Ok(Choice::one(options, way));
        };
        // several of a list are several of its lines
        let options = match &*options.all {
            [(_, Tree { nodes, .. })] => match &**nodes {
                [
                    Node::Choice(Choice {
                        options,
                        least: 1,
                        most: 1,
                        ..
                    }),
                ] => options.clone(),
                _ => options,
            },
            _ => options,
        };
        let most = most.unwrap_or(usize::MAX).min(options.all.len());
        Ok(Choice {
            way,
            least: least.min(most),
            most,
            joint,
            options,
        })
    }

    fn skip_blanks(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    /// Reads `2$$`, `1-3$$ and $$`: the least, the most if that is said, and what joins them.
    fn count(&mut self) -> Result<Option<(usize, Option<usize>, String)>> {
        let rest = self.rest();
        let head = &rest[..rest.find(['{', '|', '}']).unwrap_or(rest.len())];
        let Some((count, _)) = head.split_once("$$") else {
            return Ok(None);
        };
        // what joins may be a `|`
        let after = &rest[count.len() + 2..];
        let after = &after[..after.find(['{', '}']).unwrap_or(after.len())];
        let number = |text: &str| text.trim().parse::<usize>().ok();
        let range = match count.split_once('-') {
            None => number(count).map(|n| (n, Some(n))),
            Some((least, most)) if most.trim().is_empty() => {
                number(least).map(|least| (least, None))
            }
            Some((least, most)) => {
                let least = if least.trim().is_empty() {
                    Some(1)
                } else {
                    number(least)
                };
                least
                    .zip(number(most))
                    .map(|(least, most)| (least, Some(most)))
            }
        };
        let range = range.map(|(least, most)| match most {
            Some(most) => (least.min(most), Some(least.max(most))),
            None => (least, None),
        });
        let Some((least, most)) = range else {
            let place = self.place(self.at);
            bail!(
                "`{count}` is not a count, {place}\n\nhint: `{{2$$red|green|blue}}`, `{{1-2$$ and $$red|green}}`"
            );
        };
        let joint = after.split_once("$$").map(|(joint, _)| joint);
        self.at += count.len() + 2 + joint.map_or(0, |joint| joint.len() + 2);
        Ok(Some((least, most, joint.unwrap_or(JOINT).into())))
    }

    /// Reads `3::`, if that is there.
    fn weight(&mut self) -> Result<f64> {
        let rest = self.rest();
        let text = rest.trim_start();
        let length = text
            .find(|c: char| !c.is_ascii_digit() && !"+-.".contains(c))
            .unwrap_or(0);
        let (number, after) = text.split_at(length);
        if !after.starts_with("::") || number.is_empty() {
            return Ok(1.0);
        }
        let weight = number
            .parse()
            .ok()
            .filter(|weight| (0.0..=MAX_WEIGHT).contains(weight));
        let weight = weight.with_context(|| {
            let place = self.place(self.at + rest.len() - text.len());
            format!("`{number}` is not a weight, {place}\n\nhint: `{{3::red|blue}}`, from 0")
        })?;
        self.at += rest.len() - after.len() + 2;
        Ok(weight)
    }
}

/// The name in `__name__`, if that is what a text begins with.
fn list_name(text: &str) -> Option<&str> {
    let after = text.strip_prefix("__")?;
    let name = &after[..after.find("__")?];
    let is_name = !name.is_empty()
        && name.trim() == name
        && !name.contains(|c: char| c.is_control() || "{}|$()[]<>:,\"\\".contains(c));
    is_name.then_some(name)
}

/// A seed, and the random numbers that it starts.
struct Seeded {
    random: Random,
    seed: u64,
}

/// SplitMix64, Steele et al. 2014: small, and every seed is a good one.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0..1
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// 0..n, for n from 1
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}
