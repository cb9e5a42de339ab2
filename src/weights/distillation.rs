//! What a model's name says of its distillation to few steps: neither weights nor the scheduler of a
//! folder say for how many steps a model was made.

use serde_json::{Value, json};

/// The eta of TCD's sampler in the examples of Zheng et al. 2024 (arXiv 2402.19159).
pub const TCD_ETA: f64 = 0.3;

/// Distillations: the word in a name (without punctuation), the method, the number of steps where
/// the name says none, and the scheduler of single files. The words of one-step models must begin
/// the name, as other models were only trained like them.
const DISTILLATIONS: [(&str, &str, usize, &str); 9] = [
    (
        "sdturbo",
        "adversarial distillation, by its name",
        1,
        "EulerDiscreteScheduler",
    ),
    (
        "sdxlturbo",
        "adversarial distillation, by its name",
        1,
        "EulerDiscreteScheduler",
    ),
    (
        "sdxs",
        "one-step distillation, by its name",
        1,
        "EulerDiscreteScheduler",
    ),
    (
        "turbo",
        "adversarial distillation, by its name",
        4,
        "EulerDiscreteScheduler",
    ),
    (
        "lightning",
        "progressive adversarial distillation, by its name",
        4,
        "EulerDiscreteScheduler",
    ),
    (
        "hypersd",
        "trajectory segmented consistency, by its name",
        8,
        "DDIMScheduler",
    ),
    (
        "tcd",
        "trajectory consistency, by its name",
        4,
        "TCDScheduler",
    ),
    ("lcm", "latent consistency, by its name", 4, "LCMScheduler"),
    (
        "dmd2",
        "distribution matching, by its name",
        4,
        "LCMScheduler",
    ),
];

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
    /// Returns the distillation that a model's name tells of; an owner before it does not count.
    pub fn named(name: &str) -> Option<Self> {
        let name = name.rsplit('/').next().unwrap_or(name).to_lowercase();
        let named_steps = steps_in(&name);
        let mut letters: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
        // models with Hyper-SD merged in; without a number of steps this may be `hyperrealism`
        if named_steps.is_some() && !letters.contains("hypersd") {
            letters = letters.replace("hyper", "hypersd");
        }
        let has = |word: &str| letters.contains(word);
        let fits = |word: &str, steps| {
            if steps == 1 {
                letters.starts_with(word)
            } else {
                has(word)
            }
        };
        let (word, method, steps, class) = DISTILLATIONS
            .into_iter()
            .find(|(word, _, steps, _)| fits(word, *steps))?;
        let mut scheduler = json!({ "_class_name": class, "timestep_spacing": "trailing" });
        let (mut guidance, mut eta) = (1.0, TCD_ETA);
        match word {
            "lightning" if has("x0") => scheduler["prediction_type"] = "sample".into(),
            "hypersd" => {
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
            method,
            steps: named_steps.unwrap_or(steps),
            guidance,
            eta,
            side_px: (steps == 1).then_some(512),
            scheduler,
        })
    }
}

/// The number in `4step`, `8-steps` and the like, up to 16: those of a training are larger.
fn steps_in(name: &str) -> Option<usize> {
    let before = |(end, _)| {
        name.get(..end)
            .unwrap_or_default()
            .trim_end_matches(['-', '_', ' '])
    };
    let numbers = name.match_indices("step").map(before).filter_map(|text| {
        text.rsplit(|c: char| !c.is_ascii_digit())
            .next()?
            .parse()
            .ok()
    });
    numbers.into_iter().find(|steps| (1..=16).contains(steps))
}
