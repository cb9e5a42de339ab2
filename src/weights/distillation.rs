//! What a model's name says of its distillation to few steps: neither weights nor the scheduler of a
//! folder say for how many steps a model was made.
//!
//! A name is read by its words, never by letters inside of them, and only words that belong to a
//! distillation count: `lightning` and `turbo` alone are what other models are of.

use serde_json::{Value, json};

/// The eta of TCD's sampler in the examples of Zheng et al. 2024 (arXiv 2402.19159).
pub const TCD_ETA: f64 = 0.3;

/// The most steps that a distilled model is for: the numbers of a training are larger.
const MAX_STEPS: usize = 16;

/// A method of distillation, as names have it.
struct Method {
    /// its word in names
    word: &'static str,
    /// the words that say it wherever they stand in a name
    alone: &'static [&'static [&'static str]],
    /// whether a base model's name, or `lora`, may follow the word: `lcm-lora`, `hyper-sdxl`
    leads: bool,
    /// for people
    method: &'static str,
    /// where the name says none
    steps: usize,
    /// the scheduler of single files
    scheduler: &'static str,
}

const ADVERSARIAL: Method = Method {
    word: "turbo",
    alone: &[],
    leads: false,
    method: "adversarial distillation, by its name",
    steps: 4,
    scheduler: "EulerDiscreteScheduler",
};

const METHODS: [Method; 7] = [
    Method {
        word: "sdxs",
        alone: &[&["sdxs"]],
        method: "one-step distillation, by its name",
        ..ADVERSARIAL
    },
    ADVERSARIAL,
    Method {
        word: "lightning",
        method: "progressive adversarial distillation, by its name",
        ..ADVERSARIAL
    },
    Method {
        word: "hyper",
        alone: &[&["hypersd"], &["hypersdxl"]],
        leads: true,
        method: "trajectory segmented consistency, by its name",
        steps: 8,
        scheduler: "DDIMScheduler",
    },
    Method {
        word: "tcd",
        leads: true,
        method: "trajectory consistency, by its name",
        scheduler: "TCDScheduler",
        ..ADVERSARIAL
    },
    Method {
        word: "lcm",
        leads: true,
        method: "latent consistency, by its name",
        scheduler: "LCMScheduler",
        ..ADVERSARIAL
    },
    Method {
        word: "dmd",
        alone: &[&["dmd", "2"]],
        leads: true,
        method: "distribution matching, by its name",
        scheduler: "LCMScheduler",
        ..ADVERSARIAL
    },
];

/// Words that name no model: precision, packaging, version.
const PACKAGING: [&str; 20] = [
    "v",
    "fp",
    "bf",
    "f",
    "full",
    "pruned",
    "emaonly",
    "ema",
    "baked",
    "vae",
    "bakedvae",
    "unet",
    "comfyui",
    "inpainting",
    "lora",
    "sampler",
    "dpm",
    "sde",
    "dpmsde",
    "dpmpp",
];

/// Who bears a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bearer {
    /// a whole model, which ends its name with the method: `dreamshaper_8LCM`
    Model,
    /// a LoRA: its name tells of a style more often than not
    Lora,
}

/// How a model was distilled, and what to draw with.
#[derive(Debug)]
pub struct Distillation {
    /// for people: the method
    pub method: &'static str,
    pub steps: usize,
    /// 1 is off
    pub guidance: f64,
    /// eta of TCD's sampler
    pub eta: f64,
    /// size in pixels that the model was distilled at, where that is not its family's
    pub side_px: Option<usize>,
    /// scheduler settings over those of the family, where a file brings none; diffusers' keys
    pub scheduler: Value,
}

impl Distillation {
    /// Returns the distillation that a name tells of; an owner before it does not count.
    pub fn named(name: &str, bearer: Bearer) -> Option<Self> {
        let name = name.rsplit('/').next().unwrap_or(name);
        // one word, whose capitals begin none
        let words = words(&name.replace("LoRA", "Lora"));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let named_steps = steps_in(&words);
        let method = METHODS
            .iter()
            .find(|method| method.is_said(&words, named_steps.is_some(), bearer))?;
        let is_one_step = method.word == "sdxs" || is_plain_turbo(&words);
        let has = |word: &str| words.contains(&word);
        let class = method.scheduler;
        let mut scheduler = json!({ "_class_name": class, "timestep_spacing": "trailing" });
        let (mut guidance, mut eta) = (1.0, TCD_ETA);
        match method.word {
            "lightning" if words.windows(2).any(|pair| pair == ["x", "0"]) => {
                scheduler["prediction_type"] = "sample".into();
            }
            "hyper" => {
                // weights for any number of steps were made with all of TCD's noise, some to be
                // guided
                (guidance, eta) = (if has("cfg") { 5.0 } else { 1.0 }, 1.0);
                if named_steps == Some(1) {
                    // its one step is from timestep 800; this is from the one below
                    scheduler =
                        json!({ "_class_name": "LCMScheduler", "original_inference_steps": 800 });
                }
            }
            _ => (),
        }
        Some(Self {
            method: method.method,
            steps: named_steps.unwrap_or(if is_one_step { 1 } else { method.steps }),
            guidance,
            eta,
            side_px: is_one_step.then_some(512),
            scheduler,
        })
    }
}

impl Method {
    /// Whether a name of these words says this method: by words of its own, with a number of steps,
    /// or next to what it was made of.
    fn is_said(&self, words: &[&str], has_steps: bool, bearer: Bearer) -> bool {
        let is_alone = |own: &&[&str]| words.windows(own.len()).any(|part| part == *own);
        if self.alone.iter().any(is_alone) {
            return true;
        }
        let mut places = (0..words.len()).filter(|&at| words.get(at) == Some(&self.word));
        places.any(|at| {
            let (before, after) = (&words[..at], &words[at + 1..]);
            let is_named = |word: &&&str| !is_number(word) && **word != "v";
            let follows = before.iter().rfind(is_named).is_some_and(|w| is_base(w));
            let is_followed = after
                .iter()
                .find(is_named)
                .is_some_and(|w| is_base(w) || *w == "lora");
            let is_last = after.iter().all(|w| is_packaging(w));
            let of_model =
                bearer == Bearer::Model && (self.leads || before.iter().any(|w| is_base(w)));
            has_steps || self.leads && (follows || is_followed) || is_last && (follows || of_model)
        })
    }
}

/// Whether a name is that of SD-Turbo or SDXL-Turbo themselves, which draw in one step; what was
/// trained like them takes more.
fn is_plain_turbo(words: &[&str]) -> bool {
    let starts: [&[&str]; 4] = [
        &["sd", "turbo"],
        &["sdxl", "turbo"],
        &["sd", "xl", "turbo"],
        &["sdturbo"],
    ];
    starts.iter().any(|start| {
        words
            .strip_prefix(*start)
            .is_some_and(|rest| rest.iter().all(|word| is_packaging(word)))
    })
}

/// Whether a word names what models are made of: `sd`, `sdv`, `ssd`, `sdxl`, and all that end with
/// `xl`.
fn is_base(word: &str) -> bool {
    matches!(word, "sd" | "sdv" | "ssd") || word.ends_with("xl")
}

fn is_packaging(word: &str) -> bool {
    is_number(word) || PACKAGING.contains(&word)
}

fn is_number(word: &str) -> bool {
    word.bytes().all(|byte| byte.is_ascii_digit())
}

/// The words of a name in lower case: parted by punctuation, between letters and digits, and where
/// capitals begin.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![];
    let mut word = String::new();
    let letters: Vec<char> = name.chars().collect();
    for (at, &letter) in letters.iter().enumerate() {
        let before = at.checked_sub(1).and_then(|at| letters.get(at));
        let begins = before.is_some_and(|before| {
            let is_digit = letter.is_ascii_digit();
            let ends_capitals = before.is_uppercase()
                && letter.is_uppercase()
                && letters.get(at + 1).is_some_and(|next| next.is_lowercase());
            is_digit != before.is_ascii_digit()
                || before.is_lowercase() && letter.is_uppercase()
                || ends_capitals
        });
        if (begins || !letter.is_alphanumeric()) && !word.is_empty() {
            words.push(std::mem::take(&mut word));
        }
        if letter.is_alphanumeric() {
            word.extend(letter.to_lowercase());
        }
    }
    words.extend((!word.is_empty()).then_some(word));
    words
}

/// The number in `4step`, `8-steps` and the like, up to [`MAX_STEPS`].
fn steps_in(words: &[&str]) -> Option<usize> {
    words
        .windows(2)
        .filter(|pair| matches!(pair[1], "step" | "steps"))
        .find_map(|pair| pair[0].parse().ok().filter(|n| (1..=MAX_STEPS).contains(n)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The steps that a name tells of.
    fn steps(name: &str, bearer: Bearer) -> Option<usize> {
        Distillation::named(name, bearer).map(|named| named.steps)
    }

    #[test]
    fn letters_and_words_of_other_things_tell_of_no_distillation() {
        for name in [
            "lightning_bolts_concept",
            "porsche_911_turbo",
            "greased-lightning-style",
            "magicalCM_v1",
            "art_cd_cover",
            "hyper-realism",
            "raiden_white_lightning_v2",
            "turbo_granny_dandadan",
            "concept_TCD_actor",
            "sd_turbojet_engine",
            "lightning_1500steps",
            "my_style_4steps",
            "sdxl_lightning_bolts",
            "sd_turbo_granny",
        ] {
            assert_eq!(steps(name, Bearer::Lora), None, "{name}");
        }
        for name in [
            "dreamshaper_8",
            "lightningStorm_v1",
            "turboMix_photoreal",
            "animagicalcm_v2",
            "realcmix",
            "hyperrealism_v3_12000steps",
            "hyperdriveV2_8steps",
            "dartcdesign",
            "blueLightning_v2",
            "whiteLightningXL_v1",
        ] {
            assert_eq!(steps(name, Bearer::Model), None, "{name}");
        }
    }

    #[test]
    fn names_of_published_distillations_tell_of_them() {
        for (name, told) in [
            ("latent-consistency/lcm-lora-sdv1-5", 4),
            ("latent-consistency/lcm-lora-ssd-1b", 4),
            ("lcm_lora_sdxl", 4),
            ("LCM_LoRA_Weights_SD15", 4),
            ("sdxl_lightning_4step_lora", 4),
            ("sdxl_lightning_8step_lora", 8),
            ("Hyper-SD15-8steps-CFG-lora", 8),
            ("Hyper-SDXL-1step-lora", 1),
            ("h1t/TCD-SDXL-LoRA", 4),
            ("dmd2_sdxl_4step_lora_fp16", 4),
            ("sd_xl_turbo_lora_v1", 1),
        ] {
            assert_eq!(steps(name, Bearer::Lora), Some(told), "{name}");
        }
        for (name, told) in [
            ("stabilityai/sd-turbo", 1),
            ("stabilityai/sdxl-turbo", 1),
            ("sd_xl_turbo_1.0_fp16", 1),
            ("dreamshaperXL_v21Turbo", 4),
            ("dreamshaperXL_lightning", 4),
            ("DreamShaperXL_Turbo_v2", 4),
            ("juggernautXL_v9Rdphoto2Lightning", 4),
            ("dreamshaper_8LCM", 4),
            ("Hyper_8step_CFG", 8),
            ("Lykon/dreamshaper-xl-v2-turbo", 4),
            ("latent-consistency/lcm-sdxl", 4),
        ] {
            assert_eq!(steps(name, Bearer::Model), Some(told), "{name}");
        }
    }
}
