//! What layers cost: calls, seconds and floating-point operations by kind and shape, for
//! benchmarks.

use candle_core::Device;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What the calls of one layer on one shape cost together.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    pub calls: u64,
    pub time: Duration,
    /// floating-point operations of the plain algorithm's products
    pub flops: u64,
}

/// A kind of layer, and the sides m, k, n of its product [m, k] [k, n]; k is 0 for those that do
/// not multiply.
pub type Layer = (&'static str, [usize; 3]);

static COSTS: Mutex<BTreeMap<Layer, Cost>> = Mutex::new(BTreeMap::new());
/// The GPU that layers wait for.
static AWAITED: Mutex<Option<Device>> = Mutex::new(None);

/// From now on layers on this device wait until their work is done; with none, their time on a GPU
/// is that of the launch.
pub fn wait_for(device: Option<&Device>) {
    if let Ok(mut awaited) = AWAITED.lock() {
        *awaited = device.cloned();
    }
}

/// Whether layers wait for a device.
pub fn waits() -> bool {
    AWAITED.lock().is_ok_and(|awaited| awaited.is_some())
}

/// Does the work of a layer and takes note of its cost.
pub fn measured<R>(layer: Layer, work: impl FnOnce() -> R) -> R {
    let start = Instant::now();
    let result = work();
    if let Ok(awaited) = AWAITED.lock()
        && let Some(device) = &*awaited
    {
        // what failed shows in the results
        device.synchronize().ok();
    }
    if let Ok(mut costs) = COSTS.lock() {
        let cost = costs.entry(layer).or_default();
        cost.calls += 1;
        cost.time += start.elapsed();
        cost.flops += 2 * layer.1.iter().product::<usize>() as u64;
    }
    result
}

/// All costs since the last call.
pub fn take() -> BTreeMap<Layer, Cost> {
    COSTS
        .lock()
        .map(|mut costs| std::mem::take(&mut *costs))
        .unwrap_or_default()
}
