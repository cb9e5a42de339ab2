//! Samplers equal diffusers' schedulers, and k-diffusion where diffusers has none. Goldens:
//! `fixtures/samplers.py`.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use sdgen::noise::Generator;
use sdgen::sampler::{Sampler, sample};
use sdgen::schedule::{Plan, Prediction, Schedule, SchedulerConfig, plan};
use serde_json::Value;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/samplers/");

struct Goldens {
    configs: HashMap<String, Value>,
    runs: Vec<Value>,
    tensors: HashMap<String, Tensor>,
}

fn goldens() -> Goldens {
    let text = std::fs::read_to_string(format!("{FIXTURES}runs.json")).unwrap();
    let manifest: Value = serde_json::from_str(&text).unwrap();
    Goldens {
        configs: serde_json::from_value(manifest["configs"].clone()).unwrap(),
        runs: serde_json::from_value(manifest["runs"].clone()).unwrap(),
        tensors: candle_core::safetensors::load(format!("{FIXTURES}runs.safetensors"), &Device::Cpu).unwrap(),
    }
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    flat.into_iter().map(f64::from).collect()
}

/// The stand-in for a network of `samplers.py`.
fn network(x: &Tensor, timestep: f64) -> candle_core::Result<Tensor> {
    let bend = (x * 2.0)?.tanh()? * (0.1 * (timestep / 300.0).cos());
    bend? + (x * 0.9)?
}

/// The latents after every evaluation, [evaluations, h, w, c] flattened, and the result.
fn run(plan: &Plan, prediction: Prediction, seed: u64) -> (Vec<Vec<f64>>, Vec<f64>) {
    let generator = std::cell::RefCell::new(Generator::new(seed));
    let mut noise = || generator.borrow_mut().latents(2, 3, 4);
    let x = (noise().unwrap() * plan.init_noise_sigma()).unwrap();
    let mut latents = Vec::new();
    let mut denoise = |x: &Tensor, sigma: f64, timestep: f64| {
        let scalings = prediction.scalings(sigma);
        let output = network(&(x * scalings.c_in)?, timestep)?;
        (x * scalings.c_skip)? + (output * scalings.c_out)?
    };
    let result = sample(plan, x, &mut denoise, &mut noise, &mut |step| {
        assert_eq!((step.index, step.total), (latents.len(), plan.evaluations()));
        latents.push(values(step.latents));
        Ok(())
    });
    (latents, values(&result.unwrap()))
}

fn plan_of(case: &Value, configs: &HashMap<String, Value>) -> (Plan, Prediction) {
    let config = SchedulerConfig::from_json(&configs[case["config"].as_str().unwrap()]).unwrap();
    let sampler: Sampler = case["sampler"].as_str().unwrap().parse().unwrap();
    let schedule: Option<Schedule> = case["schedule"].as_str().map(|name| name.parse().unwrap());
    let steps = case["steps"].as_u64().unwrap() as usize;
    let plan = plan(&config, sampler, schedule, steps, case["eta"].as_f64());
    (plan.unwrap_or_else(|error| panic!("{case}: {error:#}")), config.prediction)
}

fn difference(actual: &[f64], expected: &[f64], scale: f64) -> f64 {
    if actual.len() != expected.len() {
        return f64::INFINITY;
    }
    let worst = |worst: f64, (a, e): (&f64, &f64)| worst.max((a - e).abs() / e.abs().max(scale));
    actual.iter().zip(expected).map(|p| if p.0.is_nan() { (&f64::MAX, p.1) } else { p }).fold(0.0, worst)
}

/// diffusers computes in f32: where its ancestral noise leaves a small remainder of two large
/// squares, or a sigma of 4096 makes the latents large, the last digits are its rounding.
fn tolerance(case: &Value) -> f64 {
    match (case["sampler"].as_str().unwrap(), case["config"].as_str().unwrap()) {
        ("euler-a" | "dpm2-a", _) => 4e-4,
        (_, "zero_snr") => 1e-4,
        _ => 3e-5,
    }
}

#[test]
fn latents_after_every_evaluation_equal_diffusers() {
    let goldens = goldens();
    for case in &goldens.runs {
        let (plan, prediction) = plan_of(case, &goldens.configs);
        let seed = case["seed"].as_u64().unwrap();
        let (latents, result) = run(&plan, prediction, seed);
        let golden = &goldens.tensors[&format!("{seed}.latents")];
        assert_eq!(latents.len(), golden.dims()[0], "evaluations of {case}");
        for (i, actual) in latents.iter().enumerate() {
            let expected = values(&golden.get(i).unwrap());
            let worst = difference(actual, &expected, 1.0);
            assert!(worst < tolerance(case), "latents {i} of {case} differ by {worst}:\n{actual:?}\n{expected:?}");
        }
        assert!(difference(&result, &latents[latents.len() - 1], 1.0) < 1e-6, "result of {case}");
    }
}

/// diffusers' lists of two-stage samplers hold each level twice, or a middle after each level.
fn levels(list: Vec<f64>, n: usize) -> Vec<f64> {
    let doubled = list.len() > n + 1;
    list.iter().enumerate().filter(|(i, _)| !doubled || *i == 0 || i % 2 == 1).map(|(_, value)| *value).take(n).collect()
}

#[test]
fn sigmas_and_timesteps_equal_diffusers() {
    let goldens = goldens();
    for case in &goldens.runs {
        let (plan, _) = plan_of(case, &goldens.configs);
        let n = plan.timesteps.len();
        let golden = |key: &str| goldens.tensors.get(&format!("{}.{key}", case["seed"])).map(values);
        let two_stage = ["heun", "dpm2", "dpm2-a", "dpmpp-sde"].contains(&case["sampler"].as_str().unwrap());
        let mut timesteps = golden("timesteps").unwrap();
        if two_stage {
            // level 0, then pairs: a repeat or a middle, and the level
            timesteps = timesteps.into_iter().step_by(2).collect();
        }
        // f32 keeps 6e-5 of a timestep near 1000; numpy's f32 logarithm may be off in its last bit
        let worst = difference(&plan.timesteps, &timesteps, 1.0);
        assert!(worst < 3e-6, "timesteps of {case} differ by {worst}:\n{:?}\n{timesteps:?}", plan.timesteps);
        if let Some(sigmas) = golden("sigmas") {
            let expected = if two_stage { levels(sigmas, n) } else { sigmas[..n].to_vec() };
            let worst = difference(&plan.sigmas[..n], &expected, 1e-3);
            assert!(worst < 3e-6, "sigmas of {case} differ by {worst}:\n{:?}\n{expected:?}", plan.sigmas);
        }
    }
}
