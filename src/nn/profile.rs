//! Calls, seconds and floating-point operations of layers by kind and shape, for benchmarks.

use candle_core::Device;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Sums over the calls of one layer on one shape.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    pub calls: u64,
    pub time: Duration,
    /// floating-point operations of the plain algorithm's products
    pub flops: u64,
}

/// A kind of layer, and the sides m, k, n of its product [m, k] [k, n]; the last two are 0 for
/// layers that do not multiply.
pub type Layer = (&'static str, [usize; 3]);

/// The costs of the layers of some forward passes.
#[derive(Debug)]
pub struct Profile {
    costs: Mutex<BTreeMap<Layer, Cost>>,
    sync_on: Option<Device>,
}

impl Profile {
    /// An empty profile. On a GPU, whose work is launched and not awaited, every layer waits until
    /// the device is done.
    pub fn new(device: &Device) -> Self {
        Self {
            costs: Mutex::default(),
            sync_on: (!device.is_cpu()).then(|| device.clone()),
        }
    }

    /// Runs a layer and adds its cost.
    pub(super) fn timed<R>(&self, layer: Layer, work: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = work();
        if let Some(device) = &self.sync_on {
            // a failure shows in the results
            device.synchronize().ok();
        }
        if let Ok(mut costs) = self.costs.lock() {
            let cost = costs.entry(layer).or_default();
            cost.calls += 1;
            cost.time += start.elapsed();
            cost.flops += 2 * layer.1.iter().product::<usize>() as u64;
        }
        result
    }

    /// Takes the costs so far and starts anew.
    pub fn take(&self) -> BTreeMap<Layer, Cost> {
        self.costs
            .lock()
            .map(|mut costs| std::mem::take(&mut *costs))
            .unwrap_or_default()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::nn::Forward;
    use crate::nn::layers::Linear;
    use crate::nn::weights::Weights;
    use candle_core::{DType, Tensor};

    #[test]
    fn a_profile_counts_the_layers_of_the_passes_that_it_is_given_to() {
        let device = Device::Cpu;
        let layer = Linear::new(&Weights::random(&device, DType::F32), 3, 5).unwrap();
        let x = Tensor::zeros((2, 3), DType::F32, &device).unwrap();
        let (profile, cx) = (Profile::new(&device), Forward::on(&device));
        let profiled = Forward {
            profile: Some(&profile),
            ..cx
        };
        for cx in [cx, profiled, profiled] {
            layer.forward(cx, &x).unwrap();
        }
        let costs = profile.take();
        let cost = costs[&("linear", [2, 3, 5])];
        assert_eq!((costs.len(), cost.calls, cost.flops), (1, 2, 2 * 2 * 30));
        assert!(profile.take().is_empty());
    }
}
