//! What is in memory beside what. In a process of its own, as the system counts for whole
//! processes.
#![cfg(target_os = "linux")]

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use clap::{Args, FromArgMatches};
use sdgen::batch::jobs::JobList;
use sdgen::batch::work_list::WorkList;
use sdgen::cli::args::DrawArgs;
use sdgen::nn::device::{Compute, DTypeChoice, DeviceChoice, peak_memory};
use sdgen::pipeline::event::Generated;
use sdgen::pipeline::{Pipeline, RunOptions};
use sdgen::weights::{Checkpoint, Origin};
use std::ops::ControlFlow;
use std::path::Path;

/// Sinusoids of each number that SDXL's U-Nets are told: so many that the weights for them outweigh
/// all else, at the largest width that is taken.
const WIDE: usize = 65_536;

/// A fixture whose U-Net is that heavy; the bytes of it.
fn heavy(name: &str, numbers: usize, to: &Path) -> u64 {
    copy_folder(&fixture(name), to);
    let inputs = 40 + numbers * WIDE;
    edit_json(&to.join("unet/config.json"), |c| {
        c.insert("addition_time_embed_dim".into(), WIDE.into());
        c.insert(
            "projection_class_embeddings_input_dim".into(),
            inputs.into(),
        );
    });
    let path = to.join("unet/diffusion_pytorch_model.safetensors");
    let mut weights = load(&path);
    weights.insert(
        "add_embedding.linear_1.weight".into(),
        Tensor::zeros((128, inputs), DType::F16, &Device::Cpu).unwrap(),
    );
    save(&weights, &path);
    (2 * 128 * inputs) as u64
}

#[test]
fn the_bases_weights_are_freed_before_the_refiners_are_read_unless_another_picture_needs_them() {
    if alone(
        "memory::the_bases_weights_are_freed_before_the_refiners_are_read_unless_another_picture_needs_them",
    ) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (base, refiner) = (dir.path().join("base"), dir.path().join("refiner"));
    heavy("sdxl", 6, &base);
    let weight = heavy("sdxl_refiner", 5, &refiner);
    let peak = |with_refiner: bool, seeds: &str| -> u64 {
        let mut arguments = vec![
            "sdgen", "a frog", "--steps", "2", "-W", "16", "-H", "16", "-b", "1", "-s", seeds,
        ];
        arguments.extend(if with_refiner {
            &["--refine-at", "0.5"][..]
        } else {
            &[]
        });
        let matches = DrawArgs::augment_args(clap::Command::new("sdgen"))
            .try_get_matches_from(arguments)
            .unwrap();
        let args = DrawArgs::from_arg_matches(&matches).unwrap();
        let mut checkpoint = Checkpoint::open(Origin::Path(&base)).unwrap();
        if with_refiner {
            checkpoint.use_refiner(Checkpoint::open(Origin::Path(&refiner)).unwrap());
        }
        let compute = Compute::choose(DeviceChoice::Cpu, DTypeChoice::Auto).unwrap();
        let pipeline = Pipeline::new(checkpoint, compute, args.pipeline_options()).unwrap();
        let list = JobList::read(&args.source()).unwrap();
        let work = WorkList::resolve(&list, &pipeline).unwrap();
        // forgets the peak until now
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        let options = RunOptions {
            batch_size: 1,
            trace: false,
            keep_networks: false,
        };
        let mut finished = 0;
        let mut sink = |_: usize, result: anyhow::Result<Generated>| {
            finished += usize::from(result.is_ok());
        };
        pipeline
            .generate_all(
                &work.jobs(),
                options,
                &mut |_| ControlFlow::Continue(()),
                &mut sink,
            )
            .unwrap();
        assert_eq!(finished, work.tasks.len());
        peak_memory().unwrap()
    };
    let (alone, refined, two) = (peak(false, "1"), peak(true, "1"), peak(true, "1,2"));
    assert!(
        refined < alone + weight / 2,
        "{refined} bytes with a refiner of {weight}, {alone} without"
    );
    assert!(
        two > alone + weight / 2,
        "{two} bytes with both in memory, {alone} without the refiner of {weight}"
    );
}
