//! Keeps the pool's threads from sleeping: a small kernel takes less time than waking them.

use rayon::Yield;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A thread that was without work for `PATIENCE` sleeps for a `NAP` before it looks again.
const PATIENCE: Duration = Duration::from_micros(500);
const NAP: Duration = Duration::from_micros(50);

/// A guard: while it lives, all other threads of the pool poll for work instead of sleeping.
pub struct KeepAwake(Arc<AtomicBool>);

impl KeepAwake {
    /// Wakes the pool of the current thread.
    pub fn start() -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let (mine, flag) = (rayon::current_thread_index(), done.clone());
        rayon::spawn_broadcast(move |context| {
            let mut since = Instant::now();
            // the thread that started it has its own work
            while Some(context.index()) != mine && !flag.load(Ordering::Relaxed) {
                match rayon::yield_now() {
                    Some(Yield::Executed) => since = Instant::now(),
                    _ if since.elapsed() < PATIENCE => std::thread::yield_now(),
                    _ => std::thread::sleep(NAP),
                }
            }
        });
        Self(done)
    }
}

impl Drop for KeepAwake {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    #[test]
    fn work_is_done_on_any_number_of_threads_and_ends() {
        for threads in [1, 2, 5] {
            let Ok(pool) = rayon::ThreadPoolBuilder::new().num_threads(threads).build() else {
                continue;
            };
            let sum = || {
                let _awake = KeepAwake::start();
                (0..1000)
                    .map(|_| (0..100u64).into_par_iter().sum::<u64>())
                    .sum::<u64>()
            };
            assert_eq!(pool.install(sum), 4_950_000);
            // and what comes after finds the threads free again
            assert_eq!(
                pool.install(|| (0..100u64).into_par_iter().sum::<u64>()),
                4950
            );
        }
    }
}
