//! CLIP's byte-level BPE (Radford et al. 2021) on the `tokenizers` crate.
//!
//! Built from a checkpoint's `tokenizer.json`, or `vocab.json` and `merges.txt`, or CLIP's own
//! vocabulary, which is part of the program: a single-file checkpoint brings none. It also knows the
//! tokens of textual inversions.

use super::prompt::Segment;
use crate::weights::TokenizerFiles;
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{
    Lowercase, NFC, Replace, Sequence as Normalizers, replace::ReplacePattern,
};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::normalizer::Range as In;
use tokenizers::{AddedToken, NormalizedString, Normalizer, SplitDelimiterBehavior};

/// CLIP's 48,894 merges; its vocabulary follows from them.
const CLIP_MERGES: &str = include_str!("../../assets/clip/merges.txt");
const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// Contractions, runs of letters, single digits, runs of anything else.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// Tokens that CLIP was trained on, start and end included.
const CLIP_TOKENS: usize = 77;

/// The token ids of a prompt, and what did not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// start, text, end, padding: always the model's number of tokens
    pub ids: Vec<u32>,
    /// the text that was cut off, if any
    pub cut: Option<String>,
}

/// As many tokens of a long prompt as the model takes at once.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// start, text, end, padding
    pub ids: Vec<u32>,
    /// the factor of each token's embedding
    pub weights: Vec<f32>,
}

/// Rows that an encoder may have beyond its tokenizer's: their number is rounded up to a multiple
/// of this by some.
const SPARE_ROWS: usize = 128;

/// The number of last tokens among which a chunk may end early at a comma, so that a phrase stays
/// whole; A1111's default.
const COMMA_REACH: usize = 20;

/// Tokens that stay in one chunk: a single one, or all vectors of a textual inversion.
struct Word {
    ids: Vec<u32>,
    /// the position in the text, in bytes
    from: usize,
}

/// A token of a textual inversion, beyond the vocabulary.
struct TextualInversion {
    token: Arc<str>,
    /// the token as the tokenizer normalizes text: in lower case
    normalized: String,
    ids: Range<u32>,
}

/// Turns text into token ids.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    comma: Option<u32>,
    start: u32,
    end: u32,
    pad: u32,
    max_tokens: usize,
    /// the longest first
    inversions: Vec<TextualInversion>,
}

impl Tokenizer {
    /// Builds the tokenizer of a checkpoint. `config` is its `tokenizer_config.json`. Errors if the
    /// files do not fit together.
    pub fn new(files: &TokenizerFiles, config: &Value) -> Result<Self> {
        let mut inner = match files {
            TokenizerFiles::Json(json) => {
                let mut inner: tokenizers::Tokenizer = json
                    .parse()
                    .map_err(|e| anyhow!("tokenizer.json is damaged: {e}"))?;
                require_merges_of_json(json)?;
                inner.with_padding(None);
                inner.with_truncation(None).map_err(|e| anyhow!("{e}"))?;
                inner
            }
            TokenizerFiles::VocabMerges { vocab, merges } => {
                let vocab: HashMap<String, u32> =
                    serde_json::from_str(vocab).context("vocab.json is damaged")?;
                let merges = pairs(merges)?;
                require_merges("merges.txt", vocab.keys().map(String::as_str), &merges)?;
                build(vocab, merges)?
            }
            TokenizerFiles::Clip => {
                let merges = pairs(CLIP_MERGES)?;
                build(clip_vocab(&merges), merges)?
            }
        };
        let named = |key: &str, default: &str| {
            let value = config.get(key);
            value
                .and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str()))
                .unwrap_or(default)
                .to_string()
        };
        let (start, end, pad) = (
            named("bos_token", START),
            named("eos_token", END),
            named("pad_token", END),
        );
        if let Some(missing) = [&start, &end, &pad]
            .into_iter()
            .find(|token| inner.token_to_id(token).is_none())
        {
            bail!(
                "the vocabulary of the tokenizer lacks its token `{missing}`\n\nhint: fetch the tokenizer again"
            );
        }
        add_tokens(&mut inner, config)?;
        // as in transformers these are never split, and stand for themselves in a prompt: SD2.x's
        // padding `!` does (transformers matches the start token, and the end token unless it pads,
        // in lower-cased text)
        let token =
            |text: &str, normalized: bool| AddedToken::from(text, true).normalized(normalized);
        let special = [
            token(&pad, false),
            token(&start, true),
            token(&end, pad != end),
        ];
        inner
            .add_special_tokens(special)
            .map_err(|e| anyhow!("{e}"))?;
        let id = |token: &str| {
            inner
                .token_to_id(token)
                .with_context(|| format!("the tokenizer has no token `{token}`"))
        };
        let (start, end, pad) = (id(&start)?, id(&end)?, id(&pad)?);
        let max_tokens = config
            .get("model_max_length")
            .and_then(Value::as_u64)
            .map_or(CLIP_TOKENS, |n| n.min(100_000) as usize);
        if max_tokens < 3 {
            bail!("model_max_length of the tokenizer is {max_tokens}, too few for any word");
        }
        Ok(Self {
            start,
            end,
            pad,
            max_tokens,
            comma: inner.token_to_id(",</w>"),
            inner,
            inversions: vec![],
        })
    }

    /// Errors if its vocabulary is not that of an encoder with so many rows of embeddings: each id
    /// needs one. Encoders may have some more, as their number is rounded up.
    pub fn require_rows(&self, rows: usize, encoder: &str) -> Result<()> {
        let ids = self.inner.get_vocab(true);
        let size = ids.values().max().map_or(0, |last| *last as usize + 1);
        ensure!(
            size <= rows && rows <= ids.len() + SPARE_ROWS,
            "the tokenizer has {} tokens, up to id {}, `{encoder}` has {rows} embeddings\n\n\
             hint: the two do not belong together; fetch both again",
            ids.len(),
            size.saturating_sub(1)
        );
        Ok(())
    }

    /// Adds a token of these ids, which is matched wherever it stands by itself. Errors if no text
    /// can contain it, or if the ids do not fit into a chunk.
    pub fn add_token(&mut self, token: &Arc<str>, ids: Range<u32>, positions: usize) -> Result<()> {
        let normalized = self.normalized(token)?.get().trim().to_string();
        ensure!(
            !normalized.is_empty(),
            "`{token}` is not a word that a prompt can contain"
        );
        let (n, room) = (ids.len(), self.room(positions));
        ensure!(
            n <= room,
            "`{token}` has {n} vectors, the model takes {room} tokens at once"
        );
        self.inversions.push(TextualInversion {
            token: token.clone(),
            normalized,
            ids,
        });
        self.inversions
            .sort_by_key(|inversion| std::cmp::Reverse(inversion.normalized.len()));
        Ok(())
    }

    /// Returns the added tokens that a text contains, in order.
    pub fn added_tokens(&self, text: &str) -> Result<Vec<Arc<str>>> {
        Ok(self
            .find_inversions(&self.normalized(text)?)
            .into_iter()
            .map(|(_, inversion)| inversion.token.clone())
            .collect())
    }

    /// Whether a word is in the vocabulary, and not spelled with parts of others.
    pub fn knows(&self, word: &str) -> Result<bool> {
        Ok(self.words(word)?.len() <= 1)
    }

    /// The number of tokens in a chunk, without start and end.
    fn room(&self, positions: usize) -> usize {
        self.max_tokens.min(positions).saturating_sub(2)
    }

    fn normalized(&self, text: &str) -> Result<NormalizedString> {
        let mut normalized = NormalizedString::from(text);
        let normalizer = self.inner.get_normalizer();
        normalizer
            .map_or(Ok(()), |normalizer| normalizer.normalize(&mut normalized))
            .map_err(unreadable)?;
        Ok(normalized)
    }

    /// Finds textual inversions in a normalized text, leftmost-longest: their byte ranges in it.
    fn find_inversions(&self, text: &NormalizedString) -> Vec<(Range<usize>, &TextualInversion)> {
        let text = text.get();
        let mut found: Vec<(Range<usize>, &TextualInversion)> = vec![];
        for (from, _) in text.char_indices().filter(|_| !self.inversions.is_empty()) {
            let (before, rest) = text.split_at(from);
            let matches = |inversion: &&TextualInversion| {
                let token = &*inversion.normalized;
                rest.strip_prefix(token)
                    .is_some_and(|after| !runs_on(before, token) && !runs_on(token, after))
            };
            if found.last().is_none_or(|(last, _)| last.end <= from)
                && let Some(inversion) = self.inversions.iter().find(matches)
            {
                found.push((from..from + inversion.normalized.len(), inversion));
            }
        }
        found
    }

    /// Tokenizes a text, without start and end.
    fn words(&self, text: &str) -> Result<Vec<Word>> {
        let (mut words, mut at) = (vec![], 0);
        if !self.inversions.is_empty() {
            let normalized = self.normalized(text)?;
            for (range, inversion) in self.find_inversions(&normalized) {
                let range = normalized
                    .convert_offsets(In::Normalized(range))
                    .context("an added token lies outside of the prompt")?;
                self.push_words(text, at..range.start, &mut words)?;
                words.push(Word {
                    ids: inversion.ids.clone().collect(),
                    from: range.start,
                });
                at = range.end;
            }
        }
        self.push_words(text, at..text.len(), &mut words)?;
        Ok(words)
    }

    /// Tokenizes a byte range of a text with the vocabulary alone.
    fn push_words(&self, text: &str, range: Range<usize>, words: &mut Vec<Word>) -> Result<()> {
        let encoding = self
            .inner
            .encode(text.get(range.clone()).unwrap_or_default(), false)
            .map_err(unreadable)?;
        let each = encoding.get_ids().iter().zip(encoding.get_offsets());
        words.extend(each.map(|(id, (from, _))| Word {
            ids: vec![*id],
            from: range.start + from,
        }));
        Ok(())
    }

    /// Returns all ids with start and end, neither cut nor padded: what tests compare.
    #[cfg(any(feature = "internals", test))]
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let words = self.words(text)?.into_iter().flat_map(|word| word.ids);
        Ok(std::iter::once(self.start)
            .chain(words)
            .chain([self.end])
            .collect())
    }

    /// Returns exactly `max_tokens` ids (at most `positions`, the encoder's): cut after the last that
    /// fits, or padded.
    pub fn encode(&self, text: &str, positions: usize) -> Result<Tokens> {
        let length = self.max_tokens.min(positions);
        let words = self.words(text)?;
        let all = || {
            words
                .iter()
                .flat_map(|word| word.ids.iter().map(|id| (*id, word.from)))
        };
        let room = self.room(positions);
        let cut = all()
            .nth(room)
            .and_then(|(_, from)| text.get(from..))
            .map(|s| s.trim().to_string());
        let mut ids = vec![self.start];
        ids.extend(all().map(|(id, _)| id).take(room).chain([self.end]));
        ids.resize(length, self.pad);
        Ok(Tokens { ids, cut })
    }

    /// Splits a whole prompt into chunks of `max_tokens` ids (at most `positions`, the encoder's), at
    /// least one. As in A1111 each segment is tokenized by itself.
    pub fn chunks(&self, segments: &[Segment], positions: usize) -> Result<Vec<Chunk>> {
        let room = self.room(positions).max(1);
        let mut chunker = Chunker {
            tokenizer: self,
            room,
            done: vec![],
            open: vec![],
            comma: None,
        };
        for segment in segments {
            match segment {
                Segment::Break => chunker.close(),
                Segment::Text { text, weight } => self
                    .words(text)?
                    .iter()
                    .for_each(|word| chunker.push(&word.ids, *weight)),
            }
        }
        if !chunker.open.is_empty() || chunker.done.is_empty() {
            chunker.close();
        }
        Ok(chunker.done)
    }
}

/// The chunks that [`Tokenizer::chunks`] has filled so far.
struct Chunker<'a> {
    tokenizer: &'a Tokenizer,
    room: usize,
    done: Vec<Chunk>,
    /// tokens of the chunk that is filled, with their weights
    open: Vec<(u32, f32)>,
    /// the position of its last comma
    comma: Option<usize>,
}

impl Chunker<'_> {
    /// Adds tokens that stay together.
    fn push(&mut self, ids: &[u32], weight: f32) {
        if self.tokenizer.comma.is_some_and(|comma| ids == [comma]) {
            self.comma = Some(self.open.len());
        } else if self.open.len() == self.room
            && let Some(comma) = self.comma.filter(|comma| self.room - comma <= COMMA_REACH)
        {
            let next = self.open.split_off(comma + 1);
            self.close();
            self.open = next;
        }
        if self.open.len() + ids.len() > self.room {
            self.close();
        }
        self.open.extend(ids.iter().map(|id| (*id, weight)));
    }

    /// Pads the open chunk and begins the next one.
    fn close(&mut self) {
        let Tokenizer {
            start, end, pad, ..
        } = *self.tokenizer;
        let (mut ids, mut weights): (Vec<u32>, Vec<f32>) = std::iter::once((start, 1.0))
            .chain(self.open.drain(..))
            .unzip();
        ids.push(end);
        ids.resize(self.room + 2, pad);
        weights.resize(self.room + 2, 1.0);
        self.done.push(Chunk { ids, weights });
        self.comma = None;
    }
}

fn unreadable(e: tokenizers::Error) -> anyhow::Error {
    anyhow!("cannot tokenize the prompt: {e}")
}

/// Whether a word of one text continues in the next one.
fn runs_on(text: &str, next: &str) -> bool {
    text.chars().next_back().is_some_and(char::is_alphabetic)
        && next.chars().next().is_some_and(char::is_alphabetic)
}

/// Adds the words that were added to a vocabulary: those of `added_tokens.json`, and those of
/// `added_tokens_decoder`, which says how they are matched. Errors if an id is not the next one.
fn add_tokens(inner: &mut tokenizers::Tokenizer, config: &Value) -> Result<()> {
    let flag = |token: &Value, key: &str, default: bool| {
        token.get(key).and_then(Value::as_bool).unwrap_or(default)
    };
    let mut added = BTreeMap::new();
    let plain = config.get("added_tokens").and_then(Value::as_object);
    for (text, id) in plain.into_iter().flatten() {
        let id = id
            .as_u64()
            .with_context(|| format!("the id of `{text}` in added_tokens.json is {id}"))?;
        added.insert(id, AddedToken::from(text.clone(), false));
    }
    let described = config
        .get("added_tokens_decoder")
        .and_then(Value::as_object);
    for (id, token) in described.into_iter().flatten() {
        let text = token.get("content").and_then(Value::as_str);
        if let (Some(text), Ok(id)) = (text, id.parse()) {
            let special = flag(token, "special", false);
            let token = AddedToken::from(text, special)
                .normalized(flag(token, "normalized", !special))
                .lstrip(flag(token, "lstrip", false))
                .rstrip(flag(token, "rstrip", false))
                .single_word(flag(token, "single_word", false));
            added.insert(id, token);
        }
    }
    for (id, token) in added {
        let text = token.content.clone();
        if inner.token_to_id(&text).is_none() {
            inner.add_tokens([token]).map_err(|e| anyhow!("{e}"))?;
        }
        ensure!(
            inner.token_to_id(&text).map(u64::from) == Some(id),
            "the tokenizer's added token `{text}` has the id {id}, which its vocabulary does not reach or gives to another\n\nhint: fetch the tokenizer again"
        );
    }
    Ok(())
}

/// Errors if a vocabulary has words that no merge makes: they would be spelled out.
fn require_merges<'a>(
    file: &str,
    vocab: impl Iterator<Item = &'a str>,
    merges: &[(String, String)],
) -> Result<()> {
    let made: HashSet<String> = merges.iter().map(|(a, b)| format!("{a}{b}")).collect();
    let is_byte = |word: &str| word.trim_end_matches("</w>").chars().count() <= 1;
    let is_special = |word: &str| word.starts_with("<|") && word.ends_with("|>");
    let mut unmade: Vec<&str> = vocab
        .filter(|word| !is_byte(word) && !is_special(word) && !made.contains(*word))
        .collect();
    unmade.sort_unstable();
    match unmade.first() {
        None => Ok(()),
        Some(first) => bail!(
            "{file} has {} merges, which do not make {} words of the vocabulary, such as `{first}`\n\nhint: it was cut short, or belongs to another vocabulary; fetch the tokenizer again",
            merges.len(),
            unmade.len()
        ),
    }
}

/// The same of a `tokenizer.json`, which holds both.
fn require_merges_of_json(json: &str) -> Result<()> {
    let value: Value = serde_json::from_str(json).context("tokenizer.json is damaged")?;
    let model = value.get("model");
    let vocab = model.and_then(|model| model.get("vocab")?.as_object());
    let merges = model.and_then(|model| model.get("merges")?.as_array());
    let (Some(vocab), Some(merges)) = (vocab, merges) else {
        return Ok(());
    };
    let merges: Vec<(String, String)> = merges
        .iter()
        .filter_map(|merge| match merge {
            Value::String(text) => text.split_once(' ').map(|(a, b)| (a.into(), b.into())),
            pair => Some((pair.get(0)?.as_str()?.into(), pair.get(1)?.as_str()?.into())),
        })
        .collect();
    let added: HashSet<&str> = value
        .get("added_tokens")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|token| token.get("content")?.as_str())
        .collect();
    let words = vocab.keys().map(String::as_str);
    require_merges(
        "tokenizer.json",
        words.filter(|word| !added.contains(word)),
        &merges,
    )
}

/// vocab.json and merges.txt of CLIP's own tokenizer.
pub fn clip_files() -> Result<[String; 2]> {
    let vocab = clip_vocab(&pairs(CLIP_MERGES)?);
    let mut sorted: Vec<(&String, &u32)> = vocab.iter().collect();
    sorted.sort_by_key(|(_, id)| **id);
    let vocab: serde_json::Map<String, Value> = sorted
        .into_iter()
        .map(|(token, id)| (token.clone(), (*id).into()))
        .collect();
    Ok([Value::Object(vocab).to_string(), CLIP_MERGES.into()])
}

/// Parses the merges file, without its version line.
fn pairs(merges: &str) -> Result<Vec<(String, String)>> {
    let lines = merges
        .lines()
        .filter(|l| !l.starts_with("#version") && !l.trim().is_empty());
    lines
        .map(|l| {
            l.split_once(' ')
                .map(|(a, b)| (a.into(), b.into()))
                .with_context(|| format!("merges.txt has a line without two parts: `{l}`"))
        })
        .collect()
}

/// Builds CLIP's vocabulary in its order: bytes, bytes that end a word, merges, start and end.
fn clip_vocab(merges: &[(String, String)]) -> HashMap<String, u32> {
    // GPT-2's byte alphabet: printable bytes stand for themselves, the others follow from 256 up
    let printable =
        |b: &u32| (33..=126).contains(b) || (161..=172).contains(b) || (174..=255).contains(b);
    let others = (0..256u32).filter(|b| !printable(b)).count() as u32;
    let alphabet = (0..256u32)
        .filter(printable)
        .chain(256..256 + others)
        .filter_map(char::from_u32)
        .map(String::from);
    let bytes: Vec<String> = alphabet.collect();
    let ends = bytes.iter().map(|b| format!("{b}</w>"));
    let merged = merges.iter().map(|(a, b)| format!("{a}{b}"));
    let all = bytes
        .iter()
        .cloned()
        .chain(ends)
        .chain(merged)
        .chain([START.to_string(), END.to_string()]);
    all.zip(0..).collect()
}

fn build(
    vocab: HashMap<String, u32>,
    merges: Vec<(String, String)>,
) -> Result<tokenizers::Tokenizer> {
    let wrong = |e: tokenizers::Error| {
        anyhow!("the tokenizer's vocabulary and merges do not fit together: {e}")
    };
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
        .unk_token(END.into())
        .end_of_word_suffix("</w>".into())
        .build()
        .map_err(wrong)?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(wrong)?;
    inner
        .with_normalizer(Some(Normalizers::new(vec![
            NFC.into(),
            spaces.into(),
            Lowercase.into(),
        ])))
        .map_err(wrong)?;
    let words = Split::new(
        SplitPattern::Regex(WORDS.into()),
        SplitDelimiterBehavior::Removed,
        true,
    )
    .map_err(wrong)?;
    let bytes = ByteLevel::new(false, true, true);
    inner.with_pre_tokenizer(Some(PreTokenizers::new(vec![words.into(), bytes.into()])));
    Ok(inner)
}
