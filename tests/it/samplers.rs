//! Samplers equal diffusers' schedulers, and k-diffusion where diffusers has none. Goldens:
//! `fixtures/samplers.py`.

use std::collections::HashMap;

use crate::common::{sdgen, stdout, succeed};
use candle_core::{Device, Tensor};
use sdgen::sampling::noise::Generator;
use sdgen::sampling::{
    NamedSampler, Prediction, Sampler, SamplingPlan, Schedule, SchedulerConfig, Step, plan, sample,
};
use serde_json::{Value, json};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/samplers/");

struct Goldens {
    configs: HashMap<String, Value>,
    runs: Vec<Value>,
    tensors: HashMap<String, Tensor>,
}

/// How many runs `samplers.py` stores.
const RUNS: usize = 581;

fn goldens() -> Goldens {
    let text = std::fs::read_to_string(format!("{FIXTURES}runs.json")).unwrap();
    let manifest: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(manifest["runs"].as_array().unwrap().len(), RUNS);
    Goldens {
        configs: serde_json::from_value(manifest["configs"].clone()).unwrap(),
        runs: serde_json::from_value(manifest["runs"].clone()).unwrap(),
        tensors: candle_core::safetensors::load(
            format!("{FIXTURES}runs.safetensors"),
            &Device::Cpu,
        )
        .unwrap(),
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
fn run(plan: &SamplingPlan, seed: u64) -> (Vec<Vec<f64>>, Vec<f64>) {
    let generator = std::cell::RefCell::new(Generator::new(seed));
    let mut noise = || generator.borrow_mut().latents(2, 3, 4);
    let x = (noise().unwrap() * plan.init_noise_sigma()).unwrap();
    let mut latents = Vec::new();
    let mut denoise = |x: &Tensor, sigma: f64, timestep: f64| {
        let scalings = plan.scalings(sigma);
        let output = network(&(x * scalings.c_in)?, timestep)?;
        (x * scalings.c_skip)? + (output * scalings.c_out)?
    };
    let result = sample(plan, x, &mut denoise, &mut noise, &mut |step| {
        assert_eq!(step.index, latents.len());
        latents.push(values(step.latents));
        Ok(None)
    });
    (latents, values(&result.unwrap()))
}

fn plan_of(case: &Value, configs: &HashMap<String, Value>) -> SamplingPlan {
    let config = SchedulerConfig::from_json(&configs[case["config"].as_str().unwrap()]).unwrap();
    let sampler: Sampler = case["sampler"].as_str().unwrap().parse().unwrap();
    let schedule: Option<Schedule> = case["schedule"].as_str().map(|name| name.parse().unwrap());
    let steps = case["steps"].as_u64().unwrap() as usize;
    let plan = plan(&config, sampler, schedule, steps, case["eta"].as_f64());
    plan.unwrap_or_else(|error| panic!("{case}: {error:#}"))
}

fn difference(actual: &[f64], expected: &[f64], scale: f64) -> f64 {
    if actual.len() != expected.len() {
        return f64::INFINITY;
    }
    let worst = |worst: f64, (a, e): (&f64, &f64)| worst.max((a - e).abs() / e.abs().max(scale));
    actual
        .iter()
        .zip(expected)
        .map(|p| if p.0.is_nan() { (&f64::MAX, p.1) } else { p })
        .fold(0.0, worst)
}

/// diffusers computes in f32: where its ancestral noise leaves a small remainder of two large
/// squares, or a sigma of 4096 makes the latents large, the last digits are its rounding.
fn tolerance(case: &Value) -> f64 {
    match (
        case["sampler"].as_str().unwrap(),
        case["config"].as_str().unwrap(),
    ) {
        ("euler-a" | "dpm2-a", _) => 4e-4,
        (_, "zero_snr") => 1e-4,
        _ => 3e-5,
    }
}

#[test]
fn latents_after_every_evaluation_equal_diffusers() {
    let goldens = goldens();
    for case in &goldens.runs {
        let plan = plan_of(case, &goldens.configs);
        let seed = case["seed"].as_u64().unwrap();
        let (latents, result) = run(&plan, seed);
        let golden = &goldens.tensors[&format!("{seed}.latents")];
        assert_eq!(latents.len(), golden.dims()[0], "evaluations of {case}");
        for (i, actual) in latents.iter().enumerate() {
            let expected = values(&golden.get(i).unwrap());
            let worst = difference(actual, &expected, 1.0);
            assert!(
                worst < tolerance(case),
                "latents {i} of {case} differ by {worst}:\n{actual:?}\n{expected:?}"
            );
        }
        assert!(
            difference(&result, &latents[latents.len() - 1], 1.0) < 1e-6,
            "result of {case}"
        );
    }
}

/// diffusers' lists of two-stage samplers hold each level twice, or a middle after each level.
fn levels(list: Vec<f64>, n: usize) -> Vec<f64> {
    let doubled = list.len() > n + 1;
    list.iter()
        .enumerate()
        .filter(|(i, _)| !doubled || *i == 0 || i % 2 == 1)
        .map(|(_, value)| *value)
        .take(n)
        .collect()
}

#[test]
fn sigmas_and_timesteps_equal_diffusers() {
    let goldens = goldens();
    let mut with_sigmas = 0;
    for case in &goldens.runs {
        let mut plan = plan_of(case, &goldens.configs);
        let n = plan.timesteps.len();
        let golden = |key: &str| {
            goldens
                .tensors
                .get(&format!("{}.{key}", case["seed"]))
                .map(values)
        };
        // where diffusers lacks a sampler, the goldens are k-diffusion's
        let spec = plan.sampler.spec();
        let of_flow = case["config"].as_str().unwrap().starts_with("flow");
        let two_stage = spec.is_two_stage() && spec.class.is_some() && !of_flow;
        let mut timesteps = golden("timesteps").unwrap();
        if two_stage {
            // level 0, then pairs: a repeat or a middle, and the level
            timesteps = timesteps.into_iter().step_by(2).collect();
        }
        // f32 keeps 6e-5 of a timestep near 1000; numpy's f32 logarithm may be off in its last bit
        if of_flow && plan.init_noise_sigma() > 1.0 {
            // pure noise is told to solvers in log(sigma / (1 - sigma)) as almost pure
            timesteps[0] = timesteps[0].min(1000.0 * (1.0 - 1e-6));
            let sigmas = plan.sigmas.iter().map(|ratio| ratio / (1.0 + ratio));
            plan.sigmas = sigmas.collect();
        }
        let worst = difference(&plan.timesteps, &timesteps, 1.0);
        assert!(
            worst < 3e-6,
            "timesteps of {case} differ by {worst}:\n{:?}\n{timesteps:?}",
            plan.timesteps
        );
        if let Some(sigmas) = golden("sigmas") {
            with_sigmas += 1;
            let expected = if two_stage {
                levels(sigmas, n)
            } else {
                sigmas[..n].to_vec()
            };
            let worst = difference(&plan.sigmas[..n], &expected, 1e-3);
            assert!(
                worst < 3e-6,
                "sigmas of {case} differ by {worst}:\n{:?}\n{expected:?}",
                plan.sigmas
            );
        }
    }
    // the others' schedulers have timesteps alone
    assert_eq!(with_sigmas, 469);
}

fn sd1() -> SchedulerConfig {
    SchedulerConfig::from_json(&goldens().configs["sd1"]).unwrap()
}

/// SD1.5's betas and nothing else, of a class and with other keys.
fn config(class: &str, others: Value) -> anyhow::Result<SchedulerConfig> {
    let mut config = json!({"_class_name": class, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"});
    for (key, value) in others.as_object().unwrap() {
        config[key] = value.clone();
    }
    SchedulerConfig::from_json(&config)
}

/// Data of mean 0.5 and deviation 0.8 in every element: the best denoiser is linear, and the ODE
/// moves x - mean in proportion to the deviation of the noisy data.
const MEAN: f64 = 0.5;
const DEVIATION: f64 = 0.8;

fn gaussian_denoised(x: &Tensor, sigma: f64, _timestep: f64) -> candle_core::Result<Tensor> {
    let (data, noise) = (DEVIATION.powi(2), sigma * sigma);
    x.affine(data / (data + noise), MEAN * noise / (data + noise))
}

fn no_noise() -> candle_core::Result<Tensor> {
    panic!("an ODE sampler draws no noise")
}

/// The error of an ODE sampler on Gaussian data at the last level that still has noise, where
/// every sampler has used its full order, relative to the closed form.
fn gaussian_error(config: &SchedulerConfig, sampler: Sampler, steps: usize) -> f64 {
    let schedule = Some(Schedule::Exponential)
        .filter(|schedule| sampler != Sampler::Ddim && sampler.spec().accepts(*schedule));
    let plan = plan(config, sampler, schedule, steps, None).unwrap();
    let start = 1.7 * plan.init_noise_sigma();
    let level = plan.sigmas[plan.timesteps.len() - 1];
    let x = Tensor::full(start as f32, (1, 1, 1, 1), &Device::Cpu).unwrap();
    let mut reached = Vec::new();
    let mut on_step = |step: &Step| {
        reached.push(values(step.latents)[0]);
        Ok(None)
    };
    sample(
        &plan,
        x,
        &mut gaussian_denoised,
        &mut no_noise,
        &mut on_step,
    )
    .unwrap();
    let spread = |sigma: f64| DEVIATION.hypot(sigma);
    let exact = MEAN + (start - MEAN) * spread(level) / spread(plan.sigmas[0]);
    let exact = if sampler.spec().is_variance_preserving() {
        exact / level.hypot(1.0)
    } else {
        exact
    };
    (reached[reached.len() - 2] - exact).abs() / exact.abs()
}

#[test]
fn ode_samplers_converge_to_the_closed_form_on_gaussian_data_with_their_order() {
    let config = config(
        "DPMSolverMultistepScheduler",
        json!({"clip_sample": false, "skip_prk_steps": true}),
    )
    .unwrap();
    let orders = [
        (Sampler::Ddim, 1.0),
        (Sampler::Euler, 1.0),
        (Sampler::Dpmpp2m, 2.0),
        (Sampler::Heun, 2.0),
        (Sampler::Dpm2, 2.0),
        (Sampler::Lms, 2.0),
        (Sampler::UniPc, 2.0),
        (Sampler::Deis, 2.0),
        (Sampler::ResMultistep, 2.0),
        (Sampler::Pndm, 1.0),
    ];
    for (sampler, order) in orders {
        let (coarse, fine) = (
            gaussian_error(&config, sampler, 25),
            gaussian_error(&config, sampler, 50),
        );
        let measured = (coarse / fine).log2();
        println!("{sampler}: {coarse:.2e} {fine:.2e} order {measured:.2}");
        assert!(
            measured > order - 0.3,
            "{sampler}: error {coarse} with 25 steps, {fine} with 50: order {measured}"
        );
    }
}

/// Compares the mean and the spread of 16,384 values with those of the data.
fn assert_gaussian(sampler: Sampler, result: &[f64]) {
    let count = result.len() as f64;
    let mean = result.iter().sum::<f64>() / count;
    let squares = result.iter().map(|value| (value - mean).powi(2));
    let deviation = (squares.sum::<f64>() / count).sqrt();
    println!("{sampler}: mean {mean:.4}, deviation {deviation:.4}");
    // the standard error of both is below 0.01; the rest is 60 steps' error
    assert!((mean - MEAN).abs() < 0.03, "{sampler}: mean {mean}");
    // diffusers' third order has the wrong sign on a term, see `dpm_weights`
    let tolerance = if sampler == Sampler::Dpmpp3mSde {
        0.12
    } else {
        0.06
    };
    assert!(
        (deviation - DEVIATION).abs() < tolerance,
        "{sampler}: deviation {deviation}"
    );
}

#[test]
fn random_samplers_give_the_mean_and_spread_of_gaussian_data() {
    let config = config("DPMSolverMultistepScheduler", json!({"clip_sample": false})).unwrap();
    for sampler in Sampler::ALL {
        let Ok(plan) = plan(&config, sampler, None, 60, None) else {
            continue; // distilled for fewer steps
        };
        let mut generator = Generator::new(7);
        let mut latents = || generator.latents(64, 64, 4);
        let x = (latents().unwrap() * plan.init_noise_sigma()).unwrap();
        let mut draws = 0;
        let mut noise = || {
            draws += 1;
            latents()
        };
        let result = sample(&plan, x, &mut gaussian_denoised, &mut noise, &mut |_| {
            Ok(None)
        })
        .unwrap();
        if draws == 0 {
            continue;
        }
        assert_gaussian(sampler, &values(&result));
    }
}

/// The same data on the line of flow matching.
fn gaussian_on_the_line(x: &Tensor, sigma: f64, _timestep: f64) -> candle_core::Result<Tensor> {
    let (signal, data) = (1.0 - sigma, DEVIATION.powi(2));
    let gain = signal * data / (signal * signal * data + sigma * sigma);
    x.affine(gain, MEAN * (1.0 - gain * signal))
}

#[test]
fn samplers_of_flow_matching_give_gaussian_data_and_the_rest_name_them() {
    let config = json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0});
    let config = SchedulerConfig::from_json(&config).unwrap();
    let mut refused = vec![];
    for sampler in Sampler::ALL {
        let plan = match plan(&config, sampler, None, 60, None) {
            Ok(plan) => plan,
            Err(error) => {
                assert!(
                    error
                        .to_string()
                        .contains("hint: `euler`, `euler-a`, `dpmpp-2m`,")
                );
                refused.push(sampler);
                continue;
            }
        };
        if sampler == Sampler::Lcm {
            continue; // ends on an estimate of x0, which is the mean of all data that it may be
        }
        let mut generator = Generator::new(7);
        let mut latents = || generator.latents(64, 64, 4);
        let x = latents().unwrap();
        let start = (&x * plan.init_noise_sigma()).unwrap();
        let mut draws = 0;
        let mut noise = || {
            draws += 1;
            latents()
        };
        let by_ratio = plan.init_noise_sigma() > 1.0;
        let mut denoise = if by_ratio {
            gaussian_denoised
        } else {
            gaussian_on_the_line
        };
        let result = sample(&plan, start, &mut denoise, &mut noise, &mut |_| Ok(None)).unwrap();
        let (x, result) = (values(&x), values(&result));
        assert_gaussian(sampler, &result);
        if draws == 0 {
            // the ODE maps each noise to one picture
            let expected: Vec<f64> = x.iter().map(|x| MEAN + DEVIATION * x).collect();
            let worst = difference(&result, &expected, 1.0);
            println!("{sampler}: {worst:.1e}");
            let allowed = if sampler == Sampler::Euler {
                0.06
            } else {
                0.01
            };
            assert!(worst < allowed, "{sampler} is {worst} off");
        }
    }
    let [ddim, pndm, ddpm, tcd] = [Sampler::Ddim, Sampler::Pndm, Sampler::Ddpm, Sampler::Tcd];
    assert_eq!(refused, [ddim, pndm, ddpm, tcd]);
}

#[test]
fn schedulers_of_flow_matching_say_which_sampler_and_which_levels() {
    let read = |value: Value| SchedulerConfig::from_json(&value);
    let class = "FlowMatchEulerDiscreteScheduler";
    let config = read(json!({"_class_name": "FlowMatchLCMScheduler", "shift": 3.0})).unwrap();
    assert_eq!(config.sampler().unwrap(), Sampler::Lcm);
    let own = read(json!({"_class_name": class, "shift": 3.0})).unwrap();
    assert_eq!(own.sampler().unwrap(), Sampler::Euler);
    let karras = json!({"_class_name": class, "shift": 3.0, "use_karras_sigmas": true});
    let karras = plan(&read(karras).unwrap(), Sampler::Heun, None, 7, None).unwrap();
    let chosen = plan(&own, Sampler::Heun, Some(Schedule::Karras), 7, None).unwrap();
    assert_eq!(karras.sigmas, chosen.sigmas);
    assert!(karras.sigmas[3] < plan(&own, Sampler::Heun, None, 7, None).unwrap().sigmas[3]);
    for (key, value) in [
        ("stochastic_sampling", json!(true)),
        ("invert_sigmas", json!(true)),
        ("scale_factors", json!([0.5, 1.0])),
    ] {
        let error = read(json!({"_class_name": class, key: value}))
            .unwrap_err()
            .to_string();
        assert!(error.contains(key), "{error}");
    }
    let error = read(json!({"_class_name": "FlowMatchHeunDiscreteScheduler"})).unwrap_err();
    assert!(error.to_string().contains("FlowMatchHeun"), "{error}");
}

#[test]
fn a_sampler_keeps_nothing_from_one_run_to_the_next() {
    let config = sd1();
    for sampler in Sampler::ALL {
        let plan = plan(&config, sampler, None, 6, None).unwrap();
        let first = run(&plan, 3);
        let other = run(&plan, 4);
        assert_ne!(first, other, "{sampler}");
        assert_eq!(first, run(&plan, 3), "{sampler}");
    }
}

#[test]
fn every_sampler_is_finite_with_every_schedule_and_number_of_steps() {
    let config = sd1();
    for sampler in Sampler::ALL {
        for schedule in [None].into_iter().chain(Schedule::ALL.map(Some)) {
            for steps in [1, 2, 3, 4, 13, 14, 15, 16, 50, 61] {
                let Ok(plan) = plan(&config, sampler, schedule, steps, None) else {
                    let distilled = matches!(sampler, Sampler::Lcm | Sampler::Tcd);
                    assert!(
                        schedule.is_some_and(|schedule| !sampler.spec().accepts(schedule))
                            || (distilled && steps > 50),
                        "{sampler} {schedule:?} {steps}"
                    );
                    continue;
                };
                let evaluations = match sampler {
                    Sampler::Pndm => steps + usize::from(steps > 1),
                    _ if sampler.spec().is_two_stage() => 2 * steps - 1,
                    _ => steps,
                };
                assert_eq!(
                    plan.evaluations(),
                    evaluations,
                    "{sampler} {schedule:?} {steps}"
                );
                assert_eq!(
                    plan.sigmas.len(),
                    plan.timesteps.len() + 1,
                    "{sampler} {schedule:?} {steps}"
                );
                let (_, result) = run(&plan, 1);
                assert!(
                    result.iter().all(|value| value.is_finite()),
                    "{sampler} {schedule:?} {steps}: {result:?}"
                );
            }
        }
    }
}

#[test]
fn no_number_of_steps_makes_a_plan_panic() {
    let configs = [
        sd1(),
        config(
            "DDIMScheduler",
            json!({"num_train_timesteps": 40, "steps_offset": 3}),
        )
        .unwrap(),
    ];
    for config in &configs {
        for sampler in Sampler::ALL {
            for schedule in [None].into_iter().chain(Schedule::ALL.map(Some)) {
                for steps in [
                    0,
                    1,
                    2,
                    3,
                    39,
                    40,
                    41,
                    499,
                    500,
                    998,
                    999,
                    1000,
                    1001,
                    usize::MAX,
                ] {
                    if let Ok(plan) = plan(config, sampler, schedule, steps, None) {
                        assert!((1..=1000).contains(&steps));
                        assert!(
                            plan.timesteps
                                .iter()
                                .chain(&plan.sigmas)
                                .all(|value| value.is_finite())
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn align_your_steps_gives_the_published_levels_and_interpolates_between_them() {
    let config = sd1();
    let ten = plan(&config, Sampler::Euler, Some(Schedule::Ays), 10, None).unwrap();
    let published = [
        14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0,
    ];
    assert!(
        difference(&ten.sigmas, &published, 1e-3) < 1e-6,
        "{:?}",
        ten.sigmas
    );
    // the list of timesteps that the authors publish beside the sigmas is rounded by them
    let timesteps = [
        999.0, 850.0, 736.0, 645.0, 545.0, 455.0, 343.0, 233.0, 124.0, 24.0,
    ];
    for (actual, expected) in ten.timesteps.iter().zip(timesteps) {
        assert!(
            (actual - expected).abs() < 10.0,
            "{actual} is far from {expected}"
        );
    }
    let twenty = plan(&config, Sampler::Dpmpp2m, Some(Schedule::Ays), 20, None).unwrap();
    let every_second: Vec<f64> = twenty.sigmas.iter().copied().step_by(2).collect();
    assert!(
        difference(&every_second, &published, 1e-3) < 1e-6,
        "{:?}",
        twenty.sigmas
    );
    assert!((twenty.sigmas[1] - (14.615_f64 * 6.475).sqrt()).abs() < 1e-5);
    let sdxl = plan(&config, Sampler::Euler, Some(Schedule::AysSdxl), 10, None).unwrap();
    assert!((sdxl.sigmas[1] - 6.315).abs() < 1e-5);
}

#[test]
fn a_schedule_that_diffusers_lacks_for_a_class_is_followed_or_refused_by_name() {
    let config = sd1();
    for sampler in [Sampler::Ddim, Sampler::Ddpm, Sampler::EulerA] {
        let euler = plan(&config, Sampler::Euler, Some(Schedule::Linspace), 8, None).unwrap();
        let karras = plan(&config, sampler, Some(Schedule::Karras), 8, None).unwrap();
        assert!(
            karras.sigmas[4] < euler.sigmas[4],
            "{sampler}: Karras' levels fall faster"
        );
        assert!(
            karras.sigmas.windows(2).all(|pair| pair[0] > pair[1]),
            "{sampler}"
        );
    }
    for sampler in [Sampler::Pndm, Sampler::Lcm, Sampler::Tcd] {
        let error = plan(&config, sampler, Some(Schedule::Karras), 8, None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(&format!("`{sampler}`")) && error.contains("`karras`"),
            "{error}"
        );
    }
}

#[test]
fn every_row_of_the_tables_has_names_of_its_own() {
    // a name that two rows share is read as the first of them
    for sampler in Sampler::ALL {
        let spec = sampler.spec();
        let names = [&spec.name, &spec.a1111];
        for name in names.into_iter().chain(spec.aliases) {
            assert_eq!(name.parse::<Sampler>().unwrap(), sampler, "{name}");
        }
        if let Some(class) = spec.class {
            let default = config(class, json!({})).unwrap().sampler().unwrap();
            assert_eq!(default.spec().class, Some(class));
        }
    }
    for schedule in Schedule::ALL {
        let spec = schedule.spec();
        for name in [&spec.name].into_iter().chain(spec.aliases) {
            assert_eq!(name.parse::<Schedule>().unwrap(), schedule, "{name}");
        }
    }
}

#[test]
fn every_name_that_people_use_for_a_sampler_is_understood() {
    let names = [
        ("dpm++2m", Sampler::Dpmpp2m),
        ("DPM++ 2M", Sampler::Dpmpp2m),
        ("dpmpp_2m", Sampler::Dpmpp2m),
        ("k_dpmpp_2m", Sampler::Dpmpp2m),
        ("DPM++ 2M SDE", Sampler::Dpmpp2mSde),
        ("dpmpp_2m_sde", Sampler::Dpmpp2mSde),
        ("DPM++ SDE", Sampler::DpmppSde),
        ("DPM++ 3M SDE", Sampler::Dpmpp3mSde),
        ("DPM++ 2S a", Sampler::Dpmpp2sA),
        ("dpm++2s_a", Sampler::Dpmpp2sA),
        ("dpmpp_2s_ancestral", Sampler::Dpmpp2sA),
        ("euler_a", Sampler::EulerA),
        ("Euler a", Sampler::EulerA),
        ("euler_ancestral", Sampler::EulerA),
        ("DPM2 a", Sampler::Dpm2A),
        ("k_dpm_2", Sampler::Dpm2),
        ("dpm_2_ancestral", Sampler::Dpm2A),
        ("PLMS", Sampler::Pndm),
        ("UniPC", Sampler::UniPc),
        ("uni_pc", Sampler::UniPc),
        ("LMS", Sampler::Lms),
        (" DDIM ", Sampler::Ddim),
    ];
    for (name, sampler) in names {
        assert_eq!(name.parse::<Sampler>().unwrap(), sampler, "{name}");
    }
    for (name, schedule) in [
        ("SGM Uniform", Schedule::Trailing),
        ("sgm_uniform", Schedule::Trailing),
        ("Karras", Schedule::Karras),
        ("align your steps", Schedule::Ays),
        ("ays_sdxl", Schedule::AysSdxl),
    ] {
        assert_eq!(name.parse::<Schedule>().unwrap(), schedule, "{name}");
    }
}

#[test]
fn samplers_and_schedules_are_called_by_the_names_of_other_programs() {
    for (text, name) in [
        ("DPM++ 2M Karras", "dpmpp-2m karras"),
        ("DPM++ 2M SDE Karras", "dpmpp-2m-sde karras"),
        ("DPM++ 3M SDE Exponential", "dpmpp-3m-sde exponential"),
        ("DPM2 a Karras", "dpm2-a karras"),
        ("DPM++ 2M SGM Uniform", "dpmpp-2m trailing"),
        ("Euler A", "euler-a"),
        ("LMS Karras", "lms karras"),
        ("dpmpp_2m_sde_gpu", "dpmpp-2m-sde"),
        ("uni_pc", "unipc"),
        ("euler-a-beta", "euler-a beta"),
    ] {
        let named: NamedSampler = text.parse().unwrap();
        assert_eq!(String::from(named), name, "{text}");
    }
    for text in ["DPM++ 9M Karras", "Karras", "Euler a Karas", "", " Karras"] {
        assert!(text.parse::<NamedSampler>().is_err(), "{text}");
    }
    // what the metadata has can be given again
    for sampler in Sampler::ALL {
        assert_eq!(sampler.spec().a1111.parse::<Sampler>().unwrap(), sampler);
    }
    for schedule in Schedule::ALL {
        let again: Schedule = schedule.spec().a1111.parse().unwrap();
        assert_eq!(again.spec().a1111, schedule.spec().a1111);
    }
    let dir = tempfile::tempdir().unwrap();
    let planned = |args: &[&str]| {
        let mut command = sdgen(dir.path());
        command
            .args(["a frog", "-s", "1", "--dry-run", "--json"])
            .args(args);
        let record: Value = serde_json::from_str(&stdout(&succeed(&mut command))).unwrap();
        [&record["sampler"], &record["schedule"]].map(|name| name.as_str().map(String::from))
    };
    let named = |a: &str, b: &str| [Some(a.to_string()), Some(b.to_string())];
    let long = "DPM++ 2M Karras";
    assert_eq!(planned(&["--sampler", long]), named("dpmpp-2m", "karras"));
    assert_eq!(
        planned(&["--sampler", long, "--schedule", "beta"]),
        named("dpmpp-2m", "beta")
    );
    assert_eq!(
        planned(&["--sweep", "sampler=Euler a Karras", "--schedule", "beta"]),
        named("euler-a", "karras")
    );
}

#[test]
fn an_unknown_name_is_answered_with_the_nearest_ones() {
    let error = "dpmp2m".parse::<Sampler>().unwrap_err().to_string();
    assert!(
        error.contains("unknown sampler `dpmp2m`")
            && error.contains("hint: did you mean `dpmpp-2m`"),
        "{error}"
    );
    let error = "karas".parse::<Schedule>().unwrap_err().to_string();
    assert!(
        error.contains("unknown schedule `karas`") && error.contains("did you mean `karras`"),
        "{error}"
    );
    assert!("".parse::<Sampler>().is_err());
}

#[test]
fn the_checkpoints_scheduler_class_is_the_default_sampler() {
    for (class, sampler) in [
        ("PNDMScheduler", Sampler::Pndm),
        ("EulerAncestralDiscreteScheduler", Sampler::EulerA),
        ("KDPM2AncestralDiscreteScheduler", Sampler::Dpm2A),
        ("DPMSolverSDEScheduler", Sampler::DpmppSde),
        ("UniPCMultistepScheduler", Sampler::UniPc),
        ("TCDScheduler", Sampler::Tcd),
    ] {
        assert_eq!(
            config(class, json!({})).unwrap().sampler().unwrap(),
            sampler
        );
    }
    for (order, algorithm, sampler) in [
        (2, "dpmsolver++", Sampler::Dpmpp2m),
        (3, "dpmsolver++", Sampler::Dpmpp2m),
        (2, "sde-dpmsolver++", Sampler::Dpmpp2mSde),
        (3, "sde-dpmsolver++", Sampler::Dpmpp3mSde),
    ] {
        let others = json!({"solver_order": order, "algorithm_type": algorithm});
        assert_eq!(
            config("DPMSolverMultistepScheduler", others)
                .unwrap()
                .sampler()
                .unwrap(),
            sampler
        );
    }
}

#[test]
fn an_unsupported_setting_is_an_error_that_names_key_and_value() {
    for (key, value) in [
        ("_class_name", json!("FlowMatchHeunDiscreteScheduler")),
        ("prediction_type", json!("flow_prediction")),
        ("prediction_type", json!("flow")),
        ("beta_schedule", json!("quadratic")),
        ("beta_start", json!("small")),
        ("thresholding", json!(true)),
        ("timestep_spacing", json!("log")),
        ("variance_type", json!("learned_range")),
        ("use_flow_sigmas", json!(true)),
        ("solver_order", json!(4)),
        ("num_train_timesteps", json!(0)),
        ("trained_betas", json!([0.1, 0.2])),
    ] {
        let error = config("DDIMScheduler", json!({key: value}))
            .unwrap_err()
            .to_string();
        let value = if key == "trained_betas" {
            "2 values".into()
        } else {
            value.to_string()
        };
        assert!(
            error.contains(&format!("`{key}`")) && error.contains(&value),
            "{error}"
        );
    }
    assert!(SchedulerConfig::from_json(&json!([])).is_err());
    assert!(
        SchedulerConfig::from_json(&json!({}))
            .unwrap_err()
            .to_string()
            .contains("`_class_name`")
    );
    let twice = json!({"use_karras_sigmas": true, "use_beta_sigmas": true});
    assert!(
        config("EulerDiscreteScheduler", twice)
            .unwrap_err()
            .to_string()
            .contains("`use_beta_sigmas`")
    );
    let dpm = config(
        "DPMSolverMultistepScheduler",
        json!({"algorithm_type": "dpmsolver"}),
    )
    .unwrap();
    let error = plan(&dpm, Sampler::Dpmpp2m, None, 5, None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`algorithm_type`") && error.contains("\"dpmsolver\""),
        "{error}"
    );
    let sample = config(
        "PNDMScheduler",
        json!({"prediction_type": "sample", "skip_prk_steps": true}),
    )
    .unwrap();
    let error = plan(&sample, Sampler::Pndm, None, 5, None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("`prediction_type`"), "{error}");
}

#[test]
fn an_outdated_config_is_read_as_diffusers_pipelines_read_it() {
    // an offset in the file changes for every class, one that is missing only for the file's own;
    // clipping is off for all
    let timestep = |config: &SchedulerConfig, sampler| {
        plan(config, sampler, None, 10, None).unwrap().timesteps[0]
    };
    let written = config(
        "DDIMScheduler",
        json!({"steps_offset": 0, "clip_sample": true}),
    )
    .unwrap();
    assert_eq!(timestep(&written, Sampler::Ddim), 900.0);
    let corrected = written.for_pipeline();
    assert_eq!(
        (
            timestep(&corrected, Sampler::Ddim),
            timestep(&corrected, Sampler::Ddpm)
        ),
        (901.0, 901.0)
    );
    let missing = config("DDIMScheduler", json!({})).unwrap();
    let large = |config: &SchedulerConfig, sampler| {
        let plan = plan(config, sampler, None, 10, None).unwrap();
        let x = Tensor::full(
            3f32 * plan.init_noise_sigma() as f32,
            (1, 1, 1, 1),
            &Device::Cpu,
        )
        .unwrap();
        let mut far = |x: &Tensor, _: f64, _: f64| x.affine(0.0, 5.0);
        let mut noise = || Tensor::zeros((1, 1, 1, 1), candle_core::DType::F32, &Device::Cpu);
        values(&sample(&plan, x, &mut far, &mut noise, &mut |_| Ok(None)).unwrap())[0] > 2.0
    };
    assert!(!large(&missing, Sampler::Ddim), "clips by default");
    let corrected = missing.for_pipeline();
    assert_eq!(
        (
            timestep(&corrected, Sampler::Ddim),
            timestep(&corrected, Sampler::Ddpm)
        ),
        (901.0, 900.0)
    );
    assert!(large(&corrected, Sampler::Ddim) && large(&corrected, Sampler::Ddpm));
}

#[test]
fn eta_is_refused_where_it_would_do_nothing() {
    let config = sd1();
    for sampler in Sampler::ALL {
        let name = sampler.to_string();
        let takes = sampler.spec().takes_eta();
        match plan(&config, sampler, None, 5, Some(0.5)) {
            Ok(half) => {
                let full = plan(&config, sampler, None, 5, Some(1.0)).unwrap();
                assert!(takes, "{name}");
                assert_ne!(run(&half, 1), run(&full, 1), "{name}");
            }
            Err(error) => assert!(
                !takes
                    && error
                        .to_string()
                        .contains(&format!("`{name}` takes no `--eta`"))
            ),
        }
    }
    assert!(plan(&config, Sampler::Ddim, None, 5, Some(-0.1)).is_err());
    assert!(plan(&config, Sampler::Ddim, None, 5, Some(f64::NAN)).is_err());
}

#[test]
fn scalings_recover_the_picture_from_a_perfect_prediction() {
    // eq. 7 of Karras et al. 2022 on x = x0 + sigma * noise, v = alpha * noise - sigma_vp * x0
    let (x0, noise) = (0.7, -1.3);
    for sigma in [0.03, 1.0, 14.6, 4096.0] {
        let alpha = 1.0 / f64::hypot(sigma, 1.0);
        for (prediction, output) in [
            (Prediction::Epsilon, noise),
            (Prediction::V, alpha * noise - sigma * alpha * x0),
            (Prediction::Sample, x0),
        ] {
            let scalings = prediction.scalings(sigma);
            let denoised = scalings.c_skip * (x0 + sigma * noise) + scalings.c_out * output;
            assert!(
                (denoised - x0).abs() < 1e-9,
                "{prediction:?} at {sigma}: {denoised}"
            );
            assert!((scalings.c_in - alpha).abs() < 1e-12);
        }
    }
}
