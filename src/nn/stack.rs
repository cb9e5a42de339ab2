//! The blocks of a network, one after the other: kept in memory, or, where that is short, read again
//! each time that they are needed, the next one while one computes.

use super::weights::{OwnedWeights, Weights};
use anyhow::Result;
use candle_core::Result as TensorResult;
use std::thread::{Builder, ScopedJoinHandle, scope};

/// Makes a block of the weights at its place.
type Build<T> = Box<dyn Fn(&Weights, usize) -> Result<T> + Send + Sync>;

/// Blocks of one kind.
pub struct Stack<T>(Blocks<T>);

enum Blocks<T> {
    Kept(Vec<T>),
    Read {
        weights: OwnedWeights,
        n: usize,
        build: Build<T>,
    },
}

impl<T: Send> Stack<T> {
    /// Reads the n blocks at `w`, which are numbered from 0. Errors if one of them cannot be read,
    /// also where they will be read again.
    pub fn new(
        w: &Weights,
        n: usize,
        build: impl Fn(&Weights) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        Self::numbered(w, n, move |w, _| build(w))
    }

    /// The same of blocks that are made otherwise by their number.
    pub fn numbered(
        w: &Weights,
        n: usize,
        build: impl Fn(&Weights, usize) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        let Some(weights) = w.to_read_again() else {
            let blocks = (0..n).map(|i| build(&w.at(i), i));
            return Ok(Self(Blocks::Kept(blocks.collect::<Result<_>>()?)));
        };
        for i in 0..n {
            build(&w.at(i), i)?;
        }
        let build = Box::new(build);
        Ok(Self(Blocks::Read { weights, n, build }))
    }

    /// Calls `run` with each block in order.
    pub fn each(&self, mut run: impl FnMut(&T) -> TensorResult<()>) -> TensorResult<()> {
        let (weights, n, build) = match &self.0 {
            Blocks::Kept(blocks) => return blocks.iter().try_for_each(run),
            Blocks::Read { weights, n, build } => (weights, *n, build),
        };
        let read = &|i: usize| build(&weights.at(i), i).map_err(candle_core::Error::wrap);
        scope(|scope| {
            let mut next: Option<ScopedJoinHandle<TensorResult<T>>> = None;
            for i in 0..n {
                let block = match next.take() {
                    Some(reader) => match reader.join() {
                        Ok(block) => block?,
                        Err(_) => candle_core::bail!("a thread that read weights ended early"),
                    },
                    None => read(i)?,
                };
                // a system that gives no thread has it read in turn
                let ahead = || Builder::new().spawn_scoped(scope, move || read(i + 1)).ok();
                next = (i + 1 < n).then(ahead).flatten();
                run(&block)?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::nn::weights::TensorSource;
    use anyhow::ensure;
    use candle_core::{DType, Device, Tensor};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    /// Tensors of their own numbers, up to `n`, which may vanish.
    struct Numbered {
        n: AtomicUsize,
        read: Mutex<Vec<String>>,
    }

    impl TensorSource for Numbered {
        fn name(&self) -> &str {
            "numbered"
        }

        fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
            self.read.lock().unwrap().push(name.into());
            let number: usize = name.split('.').nth(1).unwrap().parse()?;
            ensure!(number < self.n.load(Ordering::SeqCst), "no tensor `{name}`");
            Ok(Tensor::full(number as f32, shape, &Device::Cpu)?)
        }
    }

    #[test]
    fn blocks_that_are_read_again_are_those_that_are_kept() {
        let source = Arc::new(Numbered {
            n: AtomicUsize::new(5),
            read: Mutex::default(),
        });
        let weights = Weights::new(&*source, "blocks", &Device::Cpu, DType::F32);
        let build = |w: &Weights| w.get("weight", &[1]);
        let numbers = |stack: &Stack<Tensor>| {
            let mut numbers = vec![];
            let run = stack.each(|block| {
                numbers.push(block.to_vec1::<f32>()?[0]);
                Ok(())
            });
            run.map(|()| numbers)
        };
        let kept = Stack::new(&weights, 5, build).unwrap();
        let read = Stack::new(&weights.reading_again(Some(source.clone())), 5, build).unwrap();
        let before = source.read.lock().unwrap().len();
        assert_eq!(before, 10);
        for _ in 0..2 {
            assert_eq!(numbers(&kept).unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0]);
            assert_eq!(numbers(&read).unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0]);
        }
        assert_eq!(source.read.lock().unwrap().len(), before + 10);
        // what a file no longer has ends the pass, after the blocks before it
        source.n.store(3, Ordering::SeqCst);
        let error = numbers(&read).unwrap_err().to_string();
        assert!(error.contains("no tensor `blocks.3.weight`"), "{error}");
        let error = read.each(|_| candle_core::bail!("enough")).unwrap_err();
        assert!(error.to_string().contains("enough"));
        assert!(Stack::new(&weights, 5, build).is_err());
    }
}
