//! The grammar of prompts that people paste, A1111's: weights, parts that change on the way,
//! several prompts at once.
//!
//! Pure text: what becomes of it in tokens is [`super::tokenizer`]'s, in embeddings
//! [`super::encoder`]'s. Whatever is no syntax stands for itself, as there; the errors are numbers
//! that are none, and they name the place.

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What a pair of brackets without a number does to a weight.
const ROUND: f32 = 1.1;
const SQUARE: f32 = 1.0 / 1.1;
/// Brackets within brackets; more stand for themselves.
const MAX_DEPTH: usize = 64;

/// How a prompt is read.
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

/// Part of a prompt, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    Text {
        text: String,
        weight: f32,
    },
    /// the next chunk of tokens begins
    Break,
}

/// What a picture is drawn from.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompts {
    /// at least one
    pub parts: Vec<Composed>,
    pub negative: Changing,
    /// where the prompt goes, and how far, 0..=1
    pub to: Option<(Changing, f64)>,
}

impl Prompts {
    /// Reads a prompt and a negative one for a run of so many steps, and perhaps one that it goes
    /// to. Errors name what cannot be read, and where.
    pub fn parse(
        prompt: &Arc<str>,
        negative: &Arc<str>,
        to: Option<(&Arc<str>, f64)>,
        syntax: Syntax,
        steps: usize,
    ) -> Result<Self> {
        let one = |text: &Arc<str>| match syntax {
            Syntax::A1111 => Changing::parse(text, steps),
            Syntax::Plain => Ok(Changing::never(text.clone())),
        };
        let parts = match syntax {
            Syntax::A1111 => composed(prompt, steps)?,
            Syntax::Plain => vec![Composed {
                prompt: one(prompt)?,
                weight: 1.0,
            }],
        };
        let to = to
            .map(|(text, share)| Ok::<_, anyhow::Error>((one(text)?, share)))
            .transpose()?;
        ensure!(
            to.is_none() || parts.len() == 1,
            "prompts that `AND` joins cannot go to another\n\nhint: write it in lower case, or leave `--to` out"
        );
        let prompts = Self {
            parts,
            negative: one(negative)?,
            to,
        };
        if syntax == Syntax::A1111 {
            prompts
                .texts()
                .try_for_each(|text| pieces(text).map(|_| ()))?;
        }
        Ok(prompts)
    }

    /// Every text of every step.
    pub fn texts(&self) -> impl Iterator<Item = &Arc<str>> {
        let prompts = self
            .parts
            .iter()
            .map(|part| &part.prompt)
            .chain([&self.negative])
            .chain(self.to.iter().map(|(to, _)| to));
        prompts.flat_map(Changing::texts)
    }
}

/// A prompt and how strongly it counts beside others.
#[derive(Debug, Clone, PartialEq)]
pub struct Composed {
    pub prompt: Changing,
    pub weight: f64,
}

/// A prompt that may change from step to step: from which step on, from 0, which text. The first
/// begins at 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Changing(Vec<(usize, Arc<str>)>);

impl Changing {
    /// One text for all steps.
    pub fn never(text: Arc<str>) -> Self {
        Self(vec![(0, text)])
    }

    /// Reads `[a:b:when]` and `[a|b]` for a run of so many steps.
    pub fn parse(prompt: &str, steps: usize) -> Result<Self> {
        if !prompt.contains('[') {
            return Ok(Self::never(prompt.into()));
        }
        let nodes = Reader::new(prompt).nodes(prompt, steps)?;
        let mut texts: Vec<(usize, Arc<str>)> = vec![];
        for step in 0..steps.max(1) {
            let mut text = String::new();
            nodes.iter().for_each(|node| node.write(step, &mut text));
            if texts.last().is_none_or(|(_, last)| **last != *text) {
                texts.push((step, text.into()));
            }
        }
        Ok(Self(texts))
    }

    /// The text of a step.
    pub fn at(&self, step: usize) -> &Arc<str> {
        let after = self.0.partition_point(|(first, _)| *first <= step);
        &self.0[after.saturating_sub(1).min(self.0.len() - 1)].1
    }

    /// Every text.
    pub fn texts(&self) -> impl Iterator<Item = &Arc<str>> {
        self.0.iter().map(|(_, text)| text)
    }
}

/// The prompts that `AND` joins (Liu et al. 2022, arXiv 2206.01714), with the weights behind them
/// (`a cat AND a dog:0.5`).
fn composed(prompt: &str, steps: usize) -> Result<Vec<Composed>> {
    let mut parts = vec![];
    let mut rest = prompt;
    while let Some(at) = word(rest, "AND") {
        parts.push(&rest[..at]);
        rest = &rest[at + 3..];
    }
    parts.push(rest);
    let is_one = parts.len() == 1;
    let part = |text: &str| {
        let (text, weight) = match text
            .rsplit_once(':')
            .map(|(text, number)| (text, number.trim()))
        {
            Some((before, number)) if !is_one && is_plain_number(number) => {
                (before, number.parse().unwrap_or(1.0))
            }
            _ => (text, 1.0),
        };
        Ok(Composed {
            prompt: Changing::parse(text, steps)?,
            weight,
        })
    };
    parts.into_iter().map(part).collect()
}

fn is_plain_number(text: &str) -> bool {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    digits.contains(|c: char| c.is_ascii_digit())
        && digits.chars().all(|c| c.is_ascii_digit() || c == '.')
        && digits.matches('.').count() < 2
}

/// Where a word stands by itself.
fn word(text: &str, wanted: &str) -> Option<usize> {
    let is_letter = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    text.match_indices(wanted).map(|(at, _)| at).find(|at| {
        !is_letter(text[..*at].chars().next_back())
            && !is_letter(text[at + wanted.len()..].chars().next())
    })
}

/// Reads the weights of a prompt. Brackets that are never closed reach to its end. Errors name a
/// weight that is no number.
pub fn pieces(prompt: &str) -> Result<Vec<Piece>> {
    let mut pieces: Vec<Piece> = vec![];
    // where brackets have been opened, in pieces
    let (mut round, mut square): (Vec<usize>, Vec<usize>) = (vec![], vec![]);
    let mut at = 0;
    while let Some(c) = prompt[at..].chars().next() {
        let rest = &prompt[at..];
        let mut length = c.len_utf8();
        match c {
            '\\' => {
                // it takes the meaning from what follows, and goes away
                let escaped = rest[1..]
                    .chars()
                    .next()
                    .filter(|next| r"()[]\".contains(*next));
                length += escaped.map_or(0, char::len_utf8);
                push(&mut pieces, &rest[1..length]);
            }
            '(' => round.push(pieces.len()),
            '[' => square.push(pieces.len()),
            ')' if !round.is_empty() => multiply(&mut pieces, round.pop(), ROUND),
            ']' if !square.is_empty() => multiply(&mut pieces, square.pop(), SQUARE),
            ':' if !round.is_empty() && weight_length(rest).is_some() => {
                length = weight_length(rest).unwrap_or(1);
                let number = rest[1..length - 1].trim();
                let weight = number
                    .parse()
                    .ok()
                    .filter(|weight: &f32| weight.is_finite());
                let Some(weight) = weight else {
                    let place = prompt[..at].chars().count() + 2;
                    bail!(
                        "`{number}` is no weight, at character {place} of the prompt `{prompt}`\n\nhint: `(word:1.2)`, or `\\(` for a bracket itself"
                    );
                };
                multiply(&mut pieces, round.pop(), weight);
            }
            ')' | ']' | ':' => push(&mut pieces, &rest[..length]),
            _ => {
                length = rest
                    .find(['\\', '(', ')', '[', ']', ':'])
                    .unwrap_or(rest.len());
                let mut text = &rest[..length];
                while let Some(place) = word(text, "BREAK") {
                    push(&mut pieces, text[..place].trim_end());
                    pieces.push(Piece::Break);
                    text = text[place + 5..].trim_start();
                }
                push(&mut pieces, text);
            }
        }
        at += length;
    }
    for (opened, factor) in round
        .into_iter()
        .map(|at| (at, ROUND))
        .chain(square.into_iter().map(|at| (at, SQUARE)))
    {
        multiply(&mut pieces, Some(opened), factor);
    }
    // neighbours of one weight are one text, whose words may run on
    let mut joined: Vec<Piece> = vec![];
    for piece in pieces {
        match (joined.last_mut(), piece) {
            (
                Some(Piece::Text { text, weight }),
                Piece::Text {
                    text: more,
                    weight: other,
                },
            ) if *weight == other => text.push_str(&more),
            (_, piece) => joined.push(piece),
        }
    }
    Ok(joined)
}

fn push(pieces: &mut Vec<Piece>, text: &str) {
    pieces.push(Piece::Text {
        text: text.into(),
        weight: 1.0,
    });
}

fn multiply(pieces: &mut [Piece], from: Option<usize>, factor: f32) {
    for piece in pieces.iter_mut().skip(from.unwrap_or(usize::MAX)) {
        if let Piece::Text { weight, .. } = piece {
            *weight *= factor;
        }
    }
}

/// How long `: 1.2 )` is, if that is what a text begins with.
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

/// A part of a prompt that may change.
enum Node {
    Text(String),
    /// what is there before a step, and from it on
    Switch {
        before: Vec<Node>,
        after: Vec<Node>,
        step: usize,
    },
    /// what is there by turns
    Turns(Vec<Vec<Node>>),
}

impl Node {
    fn write(&self, step: usize, to: &mut String) {
        let mut write = |nodes: &[Node]| nodes.iter().for_each(|node| node.write(step, to));
        match self {
            Self::Text(text) => to.push_str(text),
            Self::Switch {
                before,
                after,
                step: at,
            } => write(if step < *at { before } else { after }),
            Self::Turns(turns) => write(
                turns
                    .get(step % turns.len().max(1))
                    .map_or(&[], Vec::as_slice),
            ),
        }
    }
}

/// Reads brackets that change with the step; those that only weigh stay as they are.
struct Reader<'a> {
    rest: &'a str,
    depth: usize,
}

impl<'a> Reader<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            rest: text,
            depth: 0,
        }
    }

    fn nodes(&mut self, prompt: &str, steps: usize) -> Result<Vec<Node>> {
        let mut nodes = self.until(&[], prompt, steps)?;
        // brackets that are closed without being opened
        while let Some(c) = self.rest.chars().next() {
            nodes.push(Node::Text(self.take(c.len_utf8()).into()));
            nodes.extend(self.until(&[], prompt, steps)?);
        }
        Ok(nodes)
    }

    fn take(&mut self, length: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(length);
        self.rest = rest;
        taken
    }

    /// Reads up to one of these characters, which it leaves there, or to the end.
    fn until(&mut self, ends: &[char], prompt: &str, steps: usize) -> Result<Vec<Node>> {
        let mut nodes = vec![];
        let mut text = String::new();
        let mut round = 0;
        while let Some(c) = self.rest.chars().next() {
            if ends.contains(&c) && (round == 0 || c == ']') {
                break;
            }
            match c {
                '\\' => {
                    let length = 1 + self.rest[1..].chars().next().map_or(0, char::len_utf8);
                    text.push_str(self.take(length));
                }
                '[' if self.depth < MAX_DEPTH => {
                    nodes.push(Node::Text(std::mem::take(&mut text)));
                    nodes.extend(self.brackets(prompt, steps)?);
                }
                _ => {
                    round = match c {
                        '(' => round + 1,
                        ')' if round > 0 => round - 1,
                        _ => round,
                    };
                    text.push_str(self.take(c.len_utf8()));
                }
            }
        }
        nodes.push(Node::Text(text));
        Ok(nodes)
    }

    /// Reads `[...]` of any kind.
    fn brackets(&mut self, prompt: &str, steps: usize) -> Result<Vec<Node>> {
        let begun = self.rest;
        let opening = self.take(1);
        self.depth += 1;
        let mut parts = vec![];
        let mut separators = vec![];
        let closed = loop {
            let start = self.rest;
            let part = self.until(&[':', '|', ']'], prompt, steps)?;
            parts.push((part, &start[..start.len() - self.rest.len()]));
            match self.rest.chars().next() {
                Some(']') => {
                    self.take(1);
                    break true;
                }
                Some(c) => {
                    separators.push(c);
                    self.take(1);
                }
                None => break false,
            }
        };
        self.depth -= 1;
        let has = |c: char| separators.iter().all(|other| *other == c) && !separators.is_empty();
        if closed && has('|') {
            return Ok(vec![Node::Turns(
                parts.into_iter().map(|(nodes, _)| nodes).collect(),
            )]);
        }
        let when = parts.last().map_or("", |(_, text)| text.trim());
        if closed
            && has(':')
            && parts.len() <= 3
            && when.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        {
            let place = prompt.len() - begun.len();
            let place = prompt
                .get(..place)
                .map_or(0, |before| before.chars().count())
                + 1;
            let at = when.parse().ok().filter(|at: &f64| at.is_finite());
            let hint = "a share of the steps below 1, or a step: `[cat:dog:0.5]`, `[cat:dog:12]`";
            ensure!(
                at.is_some(),
                "`{when}` is no step, in the brackets at character {place} of the prompt `{prompt}`\n\nhint: {hint}"
            );
            let at = at.unwrap_or(0.0);
            let share = at < 1.0 || when.contains('.');
            let step = if share { at * steps as f64 } else { at } as usize;
            parts.pop();
            let after = parts.pop().map(|(nodes, _)| nodes).unwrap_or_default();
            let before = parts.pop().map(|(nodes, _)| nodes).unwrap_or_default();
            return Ok(vec![Node::Switch {
                before,
                after,
                step,
            }]);
        }
        // weights, or nothing that is known: as it was typed, with what changes inside
        let mut nodes = vec![Node::Text(opening.into())];
        for (i, (part, _)) in parts.into_iter().enumerate() {
            nodes.extend(
                i.checked_sub(1)
                    .and_then(|i| separators.get(i))
                    .map(|c| Node::Text(c.to_string())),
            );
            nodes.extend(part);
        }
        nodes.extend(closed.then(|| Node::Text("]".into())));
        Ok(nodes)
    }
}
