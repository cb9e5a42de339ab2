//! Schedules of sigmas that replace the levels found at evenly spaced timesteps: n levels that
//! fall from the noisiest to the last but zero.
//!
//! Read next: `plan`, which asks for them.

/// A rule that gives the sigmas of a run from their highest and lowest alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum SigmaSchedule {
    /// Karras et al. 2022 (arXiv 2206.00364), eq. 5.
    Karras,
    /// Log-linear in sigma, as k-diffusion has it.
    Exponential,
    /// Quantiles of a beta distribution, Lee et al. 2024 (arXiv 2407.12173).
    Beta,
    /// Log-linear in sigma, Lu et al. 2022 (arXiv 2206.00927), with logarithms in f32.
    Lu,
    /// A published list of sigmas, the last of them replaced by 0.
    Table(&'static [f64]),
}

/// Align Your Steps for SD 1.5, Sabour et al. 2024 (arXiv 2404.14507), as its authors published it
/// for ten steps.
pub(crate) const AYS_SD: [f64; 11] = [
    14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029,
];
/// The same for SDXL.
pub(crate) const AYS_SDXL: [f64; 11] = [
    14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029,
];

impl SigmaSchedule {
    /// `n` sigmas that fall from `high` to `low`; a published list keeps to its own ends.
    pub(super) fn sigmas(self, high: f64, low: f64, n: usize) -> Vec<f64> {
        match self {
            Self::Karras => karras(high, low, n),
            Self::Exponential => exponential(high, low, n),
            Self::Lu => {
                let logs = linspace(f64::from(high.ln() as f32), f64::from(low.ln() as f32), n);
                logs.into_iter().map(f64::exp).collect()
            }
            Self::Beta => beta(high, low, n),
            Self::Table(levels) => log_linear(levels, n),
        }
    }
}

/// Karras et al. 2022, eq. 5, rho = 7.
fn karras(high: f64, low: f64, n: usize) -> Vec<f64> {
    let rho = 7.0;
    let (high, low) = (high.powf(1.0 / rho), low.powf(1.0 / rho));
    let ramp = linspace(0.0, 1.0, n);
    ramp.into_iter()
        .map(|t| (high + t * (low - high)).powf(rho))
        .collect()
}

/// `n` sigmas, evenly spaced in log(sigma).
pub(super) fn exponential(high: f64, low: f64, n: usize) -> Vec<f64> {
    linspace(high.ln(), low.ln(), n)
        .into_iter()
        .map(f64::exp)
        .collect()
}

/// Quantiles of the beta distribution with alpha = beta = 0.6, Lee et al. 2024 (arXiv 2407.12173).
fn beta(high: f64, low: f64, n: usize) -> Vec<f64> {
    let ramp = linspace(0.0, 1.0, n);
    ramp.into_iter()
        .map(|t| low + beta_quantile(1.0 - t) * (high - low))
        .collect()
}

/// A published list of noise levels stretched to n steps, log-linearly, as its authors do; the
/// last level gives way to the end of the run.
fn log_linear(levels: &[f64], n: usize) -> Vec<f64> {
    let at = |position: f64| {
        let low = (position as usize).min(levels.len() - 2);
        let (a, b) = (levels[low].ln(), levels[low + 1].ln());
        (a + (position - low as f64) * (b - a)).exp()
    };
    let positions = linspace(0.0, (levels.len() - 1) as f64, n + 1);
    positions.into_iter().take(n).map(at).collect()
}

/// The quantile of the symmetric beta distribution with both parameters 0.6, by bisection on its
/// distribution function, which leaves no error. (Other ways, as statrs', leave some of the last
/// bits, which once in a while decides about an f32.)
fn beta_quantile(p: f64) -> f64 {
    if p > 0.5 {
        return 1.0 - beta_quantile(1.0 - p);
    }
    let (mut low, mut high) = (0.0, 0.5);
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        if beta_distribution(middle) < p {
            low = middle
        } else {
            high = middle
        }
    }
    0.5 * (low + high)
}

/// The distribution function of that beta distribution for x in 0..=0.5: the power series of the
/// incomplete beta function (Abramowitz and Stegun 26.5.4).
fn beta_distribution(x: f64) -> f64 {
    const A: f64 = 0.6;
    /// The beta function B(0.6, 0.6).
    const B: f64 = 2.415_344_208_002_472_3;
    let (mut sum, mut power) = (0.0, 1.0);
    for k in 0..64 {
        sum += power / (A + f64::from(k));
        power *= x * (f64::from(k) + 1.0 - A) / (f64::from(k) + 1.0);
    }
    x.powf(A) * sum / B
}

/// The values of torch.linspace in f32: from both ends towards the middle.
pub(super) fn linspace_f32(start: f64, end: f64, n: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (n - 1) as f32;
    let at = |i: usize| {
        if i < n / 2 {
            start + step * i as f32
        } else {
            end - step * (n - 1 - i) as f32
        }
    };
    (0..n).map(at).collect()
}

/// The values of numpy.linspace.
pub(super) fn linspace(start: f64, end: f64, n: usize) -> Vec<f64> {
    let step = (end - start) / n.saturating_sub(1).max(1) as f64;
    let at = |i: usize| {
        if i > 0 && i + 1 == n {
            end
        } else {
            start + i as f64 * step
        }
    };
    (0..n).map(at).collect()
}
