//! The grammar of A1111's prompts: attention weights, prompt editing, alternating words, and `AND`.
//!
//! Only text goes in and out; [`super::tokenizer`] makes tokens of it and [`super::encoder`]
//! embeddings. As in A1111 everything that is not syntax stands for itself, and [`notes`] says what
//! only looks like syntax. Malformed weights and prompts that are too long are errors.

use super::tags::{Tag, unclosed_tag};
use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::sync::Arc;

/// The factors of round and square brackets without a number.
const ROUND: f64 = 1.1;
const SQUARE: f64 = 1.0 / 1.1;
/// The deepest nesting of brackets in which prompt editing is read; deeper ones stand for themselves.
const MAX_DEPTH: usize = 64;
/// The most bytes of a prompt: about 170 chunks of 75 tokens.
const MAX_BYTES: usize = 1 << 16;
/// The most bytes of all texts that a picture's prompts are on their way.
const MAX_BYTES_OF_ALL: usize = 1 << 19;
/// The most prompts that `AND` joins, each of which is a forward pass in every step.
const MAX_PARTS: usize = 64;
/// What stands for `BREAK` among weighted texts, as in A1111: any other weight makes it a word.
const BREAK: (&str, f64) = ("BREAK", -1.0);

/// The syntax of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Syntax {
    /// with weights and the rest, in as many chunks of tokens as it needs
    A1111,
    /// every character for itself, cut where the model's tokens end, as diffusers does; pictures of
    /// older versions do not say it
    #[default]
    Plain,
}

/// The calls of the network in which a prompt is edited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Calls {
    /// those of all steps, also where only the last of them are run
    pub count: usize,
    /// whether as many came before, in a first pass, whose edits have been made
    pub is_second_pass: bool,
}

/// Calls of a first or only pass.
impl From<usize> for Calls {
    fn from(count: usize) -> Self {
        Self {
            count,
            is_second_pass: false,
        }
    }
}

/// A part of a prompt, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Segment {
    Text {
        text: String,
        weight: f32,
    },
    /// `BREAK`: the next chunk of tokens begins; a word where brackets give it a weight
    Break,
}

/// All prompts of one image.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompts {
    /// at least one
    pub parts: Vec<ComposablePrompt>,
    pub negative: ScheduledPrompt,
    /// the prompt to interpolate to, and its weight 0..=1
    pub to: Option<(ScheduledPrompt, f64)>,
}

impl Prompts {
    /// Parses a prompt, a negative prompt and perhaps one to interpolate to, for the calls of the
    /// network in a run. Errors name what cannot be parsed, and where, or say that a prompt is too long.
    pub fn parse(
        prompt: &Arc<str>,
        negative: &Arc<str>,
        to: Option<(&Arc<str>, f64)>,
        syntax: Syntax,
        calls: Calls,
    ) -> Result<Self> {
        let all = [Some(prompt), Some(negative), to.map(|(text, _)| text)];
        for text in all.into_iter().flatten() {
            ensure!(
                text.len() <= MAX_BYTES,
                "a prompt has {} bytes, at most {MAX_BYTES} are read\n\nhint: make it shorter",
                text.len()
            );
        }
        let one = |text: &Arc<str>| match syntax {
            Syntax::A1111 => ScheduledPrompt::parse(text, calls),
            Syntax::Plain => ScheduledPrompt::constant(text.clone()),
        };
        let parts = match syntax {
            Syntax::A1111 => composable(prompt, calls)?,
            Syntax::Plain => vec![ComposablePrompt {
                prompt: one(prompt),
                weight: 1.0,
            }],
        };
        ensure!(
            to.is_none() || parts.len() == 1,
            "prompts that `AND` joins cannot go to another\n\nhint: write it in lower case, or leave `--to` out"
        );
        let prompts = Self {
            parts,
            negative: one(negative),
            to: to.map(|(text, weight)| (one(text), weight)),
        };
        ensure!(
            prompts.texts().map(|text| text.len()).sum::<usize>() <= MAX_BYTES_OF_ALL,
            "a prompt comes to more than {MAX_BYTES_OF_ALL} bytes in {} calls of the network\n\nhint: make what `[a:b:0.5]` and `[a|b]` change shorter, or write fewer of them",
            calls.count
        );
        if syntax == Syntax::A1111 {
            prompts
                .texts()
                .try_for_each(|text| segments(text).map(|_| ()))?;
        }
        Ok(prompts)
    }

    /// Iterates over every text of every step.
    pub fn texts(&self) -> impl Iterator<Item = &Arc<str>> {
        let prompts = self
            .parts
            .iter()
            .map(|part| &part.prompt)
            .chain([&self.negative])
            .chain(self.to.iter().map(|(to, _)| to));
        prompts.flat_map(ScheduledPrompt::texts)
    }
}

/// One of the prompts that `AND` joins, with its weight.
#[derive(Debug, Clone, PartialEq)]
pub struct ComposablePrompt {
    pub prompt: ScheduledPrompt,
    pub weight: f64,
}

/// A prompt that may change from step to step (A1111's prompt editing): the texts, each with the
/// first step that it is used in. The first text begins at step 0.
#[derive(Debug, Clone, PartialEq)]
pub struct ScheduledPrompt(Vec<(usize, Arc<str>)>);

impl ScheduledPrompt {
    /// Returns a prompt that is the same in all steps.
    pub fn constant(text: Arc<str>) -> Self {
        Self(vec![(0, text)])
    }

    /// Parses `[a:b:when]` and `[a|b]` for the calls of the network in a run.
    ///
    /// A1111 makes a list of texts, each with the last step, counted from 1, that it is for, and
    /// compares it to steps that are counted from 0: `[a:b:3]` is `a` for four steps.
    pub fn parse(prompt: &str, calls: Calls) -> Self {
        let nodes = match Editing::of(prompt).nodes {
            Some(nodes) if prompt.contains('[') => nodes,
            _ => return Self::constant(prompt.into()),
        };
        let count = calls.count.max(1);
        let calls = Calls { count, ..calls };
        let mut is_end = vec![false; count + 1];
        is_end[count] = true;
        nodes.iter().for_each(|node| node.ends(calls, &mut is_end));
        let mut texts: Vec<(usize, Arc<str>)> = vec![];
        let (mut first, mut bytes) = (0, 0);
        // what is beyond the limit is an error in `Prompts::parse`
        for end in (1..=count).filter(|end| is_end[*end]) {
            if first >= count || bytes > MAX_BYTES_OF_ALL {
                break;
            }
            let mut text = String::new();
            nodes
                .iter()
                .for_each(|node| node.write(end, calls, &mut text));
            if texts.last().is_none_or(|(_, last)| **last != *text) {
                bytes += text.len();
                texts.push((first, text.into()));
            }
            first = end + 1;
        }
        Self(texts)
    }

    /// The text of a step.
    pub fn at(&self, step: usize) -> &Arc<str> {
        let after = self.0.partition_point(|(first, _)| *first <= step);
        &self.0[after.saturating_sub(1).min(self.0.len() - 1)].1
    }

    /// Iterates over all texts.
    pub fn texts(&self) -> impl Iterator<Item = &Arc<str>> {
        self.0.iter().map(|(_, text)| text)
    }
}

/// Splits a prompt at `AND` (Liu et al. 2022, arXiv 2206.01714) and parses the weights behind its
/// parts (`a cat AND a dog:0.5`), of which a prompt without `AND` may have one, too.
fn composable(prompt: &str, calls: Calls) -> Result<Vec<ComposablePrompt>> {
    let parts = split_at_and(prompt);
    ensure!(
        parts.len() <= MAX_PARTS,
        "`AND` joins more than {MAX_PARTS} prompts\n\nhint: write it in lower case"
    );
    let part = |text: &str| {
        let (text, weight) = trailing_weight(text).unwrap_or((text.trim_end(), 1.0));
        ComposablePrompt {
            prompt: ScheduledPrompt::parse(text, calls),
            weight,
        }
    };
    Ok(parts.into_iter().map(part).collect())
}

/// The parts between `AND`s; where there are too many, the last is all that is left.
fn split_at_and(prompt: &str) -> Vec<&str> {
    const AND: &str = "AND";
    let (mut parts, mut rest) = (vec![], prompt);
    while let Some(at) = word(rest, AND).filter(|_| parts.len() < MAX_PARTS) {
        parts.push(&rest[..at]);
        rest = &rest[at + AND.len()..];
    }
    parts.push(rest);
    parts
}

/// Splits `a cat:1.5` into the text and the number.
fn trailing_weight(text: &str) -> Option<(&str, f64)> {
    let (before, number) = text.rsplit_once(':')?;
    let number = number.trim();
    let weight = is_plain_number(number).then(|| number.parse().ok())??;
    Some((before.trim_end(), weight))
}

fn is_plain_number(text: &str) -> bool {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    digits.contains(|c: char| c.is_ascii_digit())
        && digits.chars().all(|c| c.is_ascii_digit() || c == '.')
        && digits.matches('.').count() < 2
}

/// The position of a word that stands by itself.
fn word(text: &str, wanted: &str) -> Option<usize> {
    let is_letter = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    text.match_indices(wanted).map(|(at, _)| at).find(|at| {
        !is_letter(text[..*at].chars().next_back())
            && !is_letter(text[at + wanted.len()..].chars().next())
    })
}

/// Parses the weights of a prompt. Brackets that are never closed reach to its end. Errors name a
/// weight that is not a number.
pub fn segments(prompt: &str) -> Result<Vec<Segment>> {
    let segment = |(text, weight): (String, f64)| {
        if (&*text, weight) == BREAK {
            return Segment::Break;
        }
        let weight = weight as f32;
        Segment::Text { text, weight }
    };
    Ok(weighted(prompt)?.into_iter().map(segment).collect())
}

/// The texts of a prompt with their weights, and [`BREAK`]s.
fn weighted(prompt: &str) -> Result<Vec<(String, f64)>> {
    let mut texts: Vec<(String, f64)> = vec![];
    let push = |texts: &mut Vec<(String, f64)>, text: &str| texts.push((text.into(), 1.0));
    // the texts at which brackets were opened
    let (mut round, mut square): (Vec<usize>, Vec<usize>) = (vec![], vec![]);
    let mut at = 0;
    while let Some(c) = prompt[at..].chars().next() {
        let rest = &prompt[at..];
        let mut length = c.len_utf8();
        match c {
            '\\' => {
                // a backslash escapes a bracket that follows it, and is removed
                let escaped = rest[1..]
                    .chars()
                    .next()
                    .filter(|next| r"()[]\".contains(*next));
                length += escaped.map_or(0, char::len_utf8);
                push(&mut texts, &rest[1..length]);
            }
            '(' => round.push(texts.len()),
            '[' => square.push(texts.len()),
            ')' if !round.is_empty() => multiply(&mut texts, round.pop(), ROUND),
            ']' if !square.is_empty() => multiply(&mut texts, square.pop(), SQUARE),
            ':' if !round.is_empty() && weight_length(rest).is_some() => {
                length = weight_length(rest).unwrap_or(1);
                let number = rest[1..length - 1].trim();
                let weight = number
                    .parse()
                    .ok()
                    .filter(|weight: &f64| (*weight as f32).is_finite());
                let Some(weight) = weight else {
                    let place = prompt[..at].chars().count() + 2;
                    bail!(
                        "`{number}` is not a weight, at character {place} of the prompt `{prompt}`\n\nhint: `(word:1.2)`, or `\\(` for a bracket itself"
                    );
                };
                multiply(&mut texts, round.pop(), weight);
            }
            ')' | ']' | ':' => push(&mut texts, &rest[..length]),
            _ => {
                length = rest
                    .find(['\\', '(', ')', '[', ']', ':'])
                    .unwrap_or(rest.len());
                let mut text = &rest[..length];
                while let Some(place) = word(text, BREAK.0) {
                    push(&mut texts, text[..place].trim_end());
                    texts.push((BREAK.0.into(), BREAK.1));
                    text = text[place + BREAK.0.len()..].trim_start();
                }
                push(&mut texts, text);
            }
        }
        at += length;
    }
    let opened = round.into_iter().map(|at| (at, ROUND));
    for (opened, factor) in opened.chain(square.into_iter().map(|at| (at, SQUARE))) {
        multiply(&mut texts, Some(opened), factor);
    }
    // neighbours of one weight are one text, whose words may run on
    let mut joined: Vec<(String, f64)> = vec![];
    for (text, weight) in texts {
        match joined.last_mut() {
            Some((before, same)) if *same == weight => before.push_str(&text),
            _ => joined.push((text, weight)),
        }
    }
    Ok(joined)
}

fn multiply(texts: &mut [(String, f64)], from: Option<usize>, factor: f64) {
    for (_, weight) in texts.iter_mut().skip(from.unwrap_or(usize::MAX)) {
        *weight *= factor;
    }
}

/// The length of `: 1.2 )` at the beginning of a text, if it is there.
fn weight_length(text: &str) -> Option<usize> {
    let after = text.strip_prefix(':')?;
    let number = after.trim_start();
    let digits = number.strip_prefix(['+', '-']).unwrap_or(number);
    let length = digits
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .filter(|length| *length > 0)?;
    digits[length..]
        .trim_start()
        .strip_prefix(')')
        .map(|rest| text.len() - rest.len())
}

/// A node of the syntax tree of prompt editing.
enum Node<'a> {
    Text(&'a str),
    /// `[before:after:when]`
    EditAt {
        before: Vec<Self>,
        after: Vec<Self>,
        when: When,
    },
    /// `[a|b]`: one after the other, step by step
    Alternate(Vec<Vec<Self>>),
}

/// When a text is replaced.
#[derive(Clone, Copy)]
enum When {
    Step(f64),
    Fraction(f64),
}

impl When {
    /// Parses `0.5`, which is a fraction, or `12`.
    fn parse(text: &str) -> Option<Self> {
        let is_number = |c: char| c.is_ascii_digit() || ".+-eE".contains(c);
        let number: f64 = text.chars().all(is_number).then(|| text.parse().ok())??;
        let is_fraction = text.contains('.');
        Some(if is_fraction {
            Self::Fraction
        } else {
            Self::Step
        }(number))
    }

    /// The last step, from 1, of the text that is replaced; 0 for none.
    fn step(self, calls: Calls) -> usize {
        let Calls {
            count,
            is_second_pass,
        } = calls;
        let step = match self {
            Self::Step(step) => step,
            Self::Fraction(fraction) => fraction * count as f64,
        };
        let before = if is_second_pass { count } else { 0 };
        ((step - before as f64) as usize).min(count)
    }
}

impl Node<'_> {
    /// Marks the steps, from 1, after which the text may be another.
    fn ends(&self, calls: Calls, is_end: &mut [bool]) {
        let mut of = |nodes: &[Self]| nodes.iter().for_each(|node| node.ends(calls, is_end));
        match self {
            Self::Text(_) => {}
            Self::EditAt {
                before,
                after,
                when,
            } => {
                of(before);
                of(after);
                is_end[when.step(calls)] = true;
            }
            // in every step, whatever changes in it
            Self::Alternate(_) => is_end.fill(true),
        }
    }

    /// Writes the text of a step, from 1.
    fn write(&self, step: usize, calls: Calls, to: &mut String) {
        let mut write = |nodes: &[Self]| nodes.iter().for_each(|node| node.write(step, calls, to));
        match self {
            Self::Text(text) => to.push_str(text),
            Self::EditAt {
                before,
                after,
                when,
            } => write(if step <= when.step(calls) {
                before
            } else {
                after
            }),
            Self::Alternate(alternatives) => write(
                alternatives
                    .get((step - 1) % alternatives.len().max(1))
                    .map_or(&[], Vec::as_slice),
            ),
        }
    }
}

/// A bracket that is open, with what stands in it so far.
struct Open<'a> {
    /// its position in the prompt
    at: usize,
    /// what stands between separators
    parts: Vec<Vec<Node<'a>>>,
    /// the positions of the separators
    separators: Vec<usize>,
}

/// Prompt editing and alternating words, read as A1111's grammar does: a bracket in which something
/// is no syntax is text, and so are all around it; a `|` outside of `[a|b]` makes the whole prompt
/// text.
struct Editing<'a> {
    /// none if the whole prompt is text
    nodes: Option<Vec<Node<'a>>>,
    /// what looks like editing and is text
    text: Vec<&'a str>,
}

impl<'a> Editing<'a> {
    /// Parses a prompt in one pass.
    fn of(prompt: &'a str) -> Self {
        let mut parser = Parser {
            prompt,
            done: vec![],
            open: vec![],
            is_text: false,
        };
        let mut text = vec![];
        let mut at = 0;
        while let Some(c) = prompt[at..].chars().next() {
            let mut length = c.len_utf8();
            match c {
                '\\' => match prompt[at + 1..].chars().next().filter(|next| *next != '\n') {
                    Some(next) => {
                        length += next.len_utf8();
                        parser.push(at..at + length);
                    }
                    None => {
                        parser.is_text = true;
                        parser.push(at..at + length);
                    }
                },
                '(' | '[' => parser.open(at),
                ':' | '|' => parser.separate(at),
                ')' | ']' => {
                    if let Some(from) = parser.close(at) {
                        text.push(&prompt[from..=at]);
                    }
                }
                _ => {
                    length = prompt[at..]
                        .find(['\\', '(', ')', '[', ']', ':', '|'])
                        .unwrap_or(prompt.len() - at);
                    parser.push(at..at + length);
                }
            }
            at += length;
        }
        parser.all_is_text();
        let nodes = Some(parser.done).filter(|_| !parser.is_text);
        Self { nodes, text }
    }
}

struct Parser<'a> {
    prompt: &'a str,
    /// what is outside of brackets
    done: Vec<Node<'a>>,
    open: Vec<Open<'a>>,
    is_text: bool,
}

impl<'a> Parser<'a> {
    fn byte(&self, at: usize) -> u8 {
        self.prompt.as_bytes().get(at).copied().unwrap_or_default()
    }

    /// The nodes of the innermost bracket's last part.
    fn nodes(&mut self) -> &mut Vec<Node<'a>> {
        let part = self.open.last_mut().and_then(|open| open.parts.last_mut());
        part.unwrap_or(&mut self.done)
    }

    fn push(&mut self, range: std::ops::Range<usize>) {
        let text = &self.prompt[range];
        self.nodes().push(Node::Text(text));
    }

    fn open(&mut self, at: usize) {
        if self.open.len() == MAX_DEPTH {
            self.all_is_text();
        }
        self.open.push(Open {
            at,
            parts: vec![vec![]],
            separators: vec![],
        });
    }

    /// Reads a `:` or a `|`.
    fn separate(&mut self, at: usize) {
        let fits = self.open.last().is_some_and(|open| {
            let same = open
                .separators
                .iter()
                .all(|other| self.byte(*other) == self.byte(at));
            let most = match (self.byte(open.at), self.byte(at)) {
                (b'(', b':') => 1,
                (b'[', b':') => 2,
                (b'[', _) => usize::MAX,
                _ => 0,
            };
            same && open.separators.len() < most
        });
        if !fits {
            self.all_is_text();
            self.is_text |= self.byte(at) == b'|';
            return self.push(at..at + 1);
        }
        if let Some(open) = self.open.last_mut() {
            open.separators.push(at);
            open.parts.push(vec![]);
        }
    }

    /// Reads a `)` or a `]`. Returns where the bracket begins if it looks like editing and is not.
    fn close(&mut self, at: usize) -> Option<usize> {
        let pair = |open: &Open| {
            matches!(
                (self.byte(open.at), self.byte(at)),
                (b'(', b')') | (b'[', b']')
            )
        };
        if !self.open.last().is_some_and(pair) {
            // of brackets that cross, the innermost square one is what was meant
            let from = self.open.iter().rev().find(|open| {
                self.byte(at) == b']' && self.byte(open.at) == b'[' && !open.separators.is_empty()
            });
            let from = from.map(|open| open.at);
            self.all_is_text();
            self.push(at..at + 1);
            return from;
        }
        let mut open = self.open.pop()?;
        let from = open.at;
        match (
            self.byte(from),
            open.separators.last().map(|last| (*last, self.byte(*last))),
        ) {
            (b'[', Some((_, b'|'))) => {
                let alternatives = Node::Alternate(open.parts);
                self.nodes().push(alternatives);
            }
            (b'[', Some((last, _))) => {
                let Some(when) = When::parse(self.prompt[last + 1..at].trim()) else {
                    self.open.push(open);
                    self.all_is_text();
                    self.push(at..at + 1);
                    return Some(from);
                };
                open.parts.pop();
                let after = open.parts.pop().unwrap_or_default();
                let before = open.parts.pop().unwrap_or_default();
                self.nodes().push(Node::EditAt {
                    before,
                    after,
                    when,
                });
            }
            _ => {
                self.as_text(open);
                self.push(at..at + 1);
            }
        }
        None
    }

    /// Adds a bracket as it was typed, with the nodes in it.
    fn as_text(&mut self, open: Open<'a>) {
        let Open {
            at,
            parts,
            separators,
        } = open;
        self.push(at..at + 1);
        let mut separators = separators.into_iter();
        for (i, part) in parts.into_iter().enumerate() {
            if let Some(at) = (i > 0).then(|| separators.next()).flatten() {
                self.is_text |= self.byte(at) == b'|';
                self.push(at..at + 1);
            }
            self.nodes().extend(part);
        }
    }

    /// Makes all open brackets text.
    fn all_is_text(&mut self) {
        for open in std::mem::take(&mut self.open) {
            self.as_text(open);
        }
    }
}

/// A prompt without its comments: A1111 leaves out what is between a `#` and the end of the line.
pub fn without_comments(prompt: &str) -> Cow<'_, str> {
    if !prompt.contains('#') {
        return Cow::Borrowed(prompt);
    }
    let line = |line: &str| {
        line.split('#')
            .next()
            .unwrap_or_default()
            .trim_end()
            .to_owned()
    };
    let lines: Vec<String> = prompt.lines().map(line).collect();
    Cow::Owned(lines.join("\n").trim().into())
}

/// Says what a prompt has that is left out or stands for itself although it looks like syntax, and
/// what few would expect of it: all of it as in A1111. `is_negative` says that it is a negative one,
/// in which tags are text.
pub fn notes(prompt: &str, is_negative: bool) -> Vec<String> {
    let mut notes = vec![];
    let mut text = without_comments(prompt);
    if let Some((_, comment)) = prompt.split_once('#') {
        let comment = comment.lines().next().unwrap_or_default();
        notes.push(format!("`#{}` is a comment and left out", short(comment)));
    }
    notes.extend(of_other_places(&text));
    let mut bare = String::new();
    let mut rest = &*text;
    while let Some(tag) = Tag::find(rest) {
        bare += tag.before;
        if is_negative {
            let whole = short(tag.whole);
            notes.push(format!("`{whole}` is text in a negative prompt"));
        } else if !matches!(tag.name, "lora" | "lyco") {
            notes.push(format!(
                "`{}` is left out: of such tags `<lora:...>` and `<lyco:...>` are read",
                short(tag.whole)
            ));
        }
        rest = tag.after;
    }
    if let Some(tag) = unclosed_tag(rest) {
        notes.push(format!("`{}` is text: it has no `>`", short(tag)));
    }
    if !is_negative {
        bare += rest;
        text = Cow::Owned(bare);
    }
    let parts = match is_negative {
        true => vec![&*text],
        false => split_at_and(&text),
    };
    let is_one = parts.len() == 1;
    for part in parts {
        let (part, weight) = trailing_weight(part)
            .filter(|_| !is_negative)
            .unwrap_or((part, 1.0));
        if is_one && weight != 1.0 {
            notes.push(format!(
                "the prompt ends in `:{weight}`, which multiplies its guidance; a full stop behind it makes it text"
            ));
        }
        let editing = Editing::of(part);
        for brackets in editing.text {
            notes.push(format!(
                "`{}` is text: prompt editing is `[a:b:0.5]`, `[a:b:12]` or `[a|b]`",
                short(brackets)
            ));
        }
        if editing.nodes.is_none() && part.contains('[') && part.contains([':', '|']) {
            notes.push(format!(
                "`{}` has a `|` or a backslash that stands alone, which makes all its prompt editing text",
                short(part)
            ));
        }
        let has_word = |(text, weight): &(String, f64)| text == BREAK.0 && *weight != BREAK.1;
        if weighted(part).is_ok_and(|texts| texts.iter().any(has_word)) {
            notes.push("`BREAK` in brackets with a weight is a word".into());
        }
    }
    notes
}

/// Says what belongs in another place than a prompt: settings, options, templates; and numbers that
/// were meant as weights.
fn of_other_places(text: &str) -> Vec<String> {
    let mut notes = vec![];
    if text.contains("\nNegative prompt: ")
        || text.contains("Steps: ") && text.contains(", Sampler: ")
    {
        notes.push("the settings behind the prompt, as A1111 writes them, are text: give them as options, `-n` and `--steps`".into());
    }
    let option = text.split_whitespace().find(|word| {
        let name = word.strip_prefix("--");
        name.is_some_and(|name| name.starts_with(|c: char| c.is_ascii_lowercase()))
    });
    if let Some(option) = option {
        let option = short(option);
        notes.push(format!(
            "`{option}` is text: options stand outside of the quotes"
        ));
    }
    let within = |text: &'_ str, open: char, close: char| -> Option<(usize, usize)> {
        let end = text.find(close)?;
        Some((text[..end].rfind(open)?, end))
    };
    if let Some((from, to)) = within(text, '{', '}')
        && text[from..to].contains('|')
    {
        let choice = short(&text[from..=to]);
        notes.push(format!(
            "`{choice}` is text: `--dynamic` reads it as a choice"
        ));
    }
    for (at, _) in text.match_indices(':') {
        let rest = &text[at..];
        let Some(end) = rest.find(')') else { break };
        let number = rest[1..end].trim();
        let is_meant = number.starts_with(|c: char| c.is_ascii_digit())
            && number.contains(',')
            && number
                .chars()
                .all(|c| c.is_ascii_digit() || ", ".contains(c));
        if is_meant && text[..at].contains('(') {
            let weight = short(&rest[..=end]);
            notes.push(format!(
                "`{weight}` is text: a weight has a point, as in `(word:1.2)`"
            ));
        }
    }
    notes
}

/// The beginning of a text, for messages.
fn short(text: &str) -> Cow<'_, str> {
    const CHARACTERS: usize = 60;
    match text.char_indices().nth(CHARACTERS) {
        Some((end, _)) => Cow::Owned(format!("{}...", &text[..end])),
        None => Cow::Borrowed(text),
    }
}
