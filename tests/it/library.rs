//! The library as others use it: one pipeline in many threads, several pipelines at once, events
//! and errors.

use crate::common::*;
use sdgen::{Error, ErrorKind, Event, Image, ModelSpec, Params, Pipeline};
use std::ops::ControlFlow;

fn proceed(_: Event) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn pipeline(model: &str) -> Pipeline {
    Pipeline::load(&ModelSpec::new(fixture(model))).unwrap()
}

fn small(prompt: &str, seed: u64) -> Params {
    Params::new(prompt).seed(seed).size(16, 16).steps(3)
}

/// What threads draw at once: each differs from the next in a setting that a network could keep.
fn mixed() -> Vec<Params> {
    let guided = |scale: f64| small("the cat", 2).guidance(scale);
    vec![
        small("a frog", 7),
        small("a frog", 7).seamless(),
        small("a frog in a top hat", 7)
            .negative("the dog")
            .size(24, 16),
        guided(1.0),
        guided(4.0),
        guided(4.0).seamless(),
        small("the house", 3).sampler("euler-a".parse().unwrap()),
        small("the house", 3)
            .sampler("dpmpp-2m".parse().unwrap())
            .seamless(),
    ]
}

fn draw(pipeline: &Pipeline, params: &Params) -> Image {
    pipeline.generate(params, proceed).unwrap()
}

#[test]
fn threads_that_share_a_pipeline_get_the_images_that_they_get_alone() {
    for model in ["sd1", "sdxl"] {
        let params = mixed();
        let alone: Vec<Image> = params.iter().map(|p| draw(&pipeline(model), p)).collect();
        assert!(alone[0] != alone[1], "a seamless image should differ");
        let shared = pipeline(model);
        for _ in 0..3 {
            let together: Vec<Image> = std::thread::scope(|scope| {
                let start = |p| {
                    let shared = &shared;
                    scope.spawn(move || draw(shared, p))
                };
                let threads: Vec<_> = params.iter().map(start).collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().unwrap())
                    .collect()
            });
            assert!(together == alone, "{model}");
        }
    }
}

#[test]
fn two_pipelines_at_once_do_not_know_of_each_other() {
    let plain = small("a frog", 7);
    let seamless = plain.clone().seamless();
    let (first, second) = (pipeline("sd1"), pipeline("sd2"));
    let alone = (draw(&first, &plain), draw(&second, &seamless));
    for _ in 0..5 {
        let (one, other) = std::thread::scope(|scope| {
            let one = scope.spawn(|| draw(&first, &plain));
            let other = scope.spawn(|| draw(&second, &seamless));
            (one.join().unwrap(), other.join().unwrap())
        });
        assert!((one, other) == alone);
    }
}

#[test]
fn the_library_and_the_command_draw_the_same_image_and_a_batch_the_same_images() {
    let dir = tempfile::tempdir().unwrap();
    let shared = pipeline("sd1");
    let command = |seed: &str| {
        let file = format!("{seed}.png");
        let small = [
            "a frog", "-W", "16", "-H", "16", "--steps", "3", "-s", seed, "-o", &file,
        ];
        succeed(sdgen(dir.path()).args(small).arg("-m").arg(fixture("sd1")));
        image::open(dir.path().join(file))
            .unwrap()
            .to_rgb8()
            .into_raw()
    };
    let params: Vec<Params> = (4..7).map(|seed| small("a frog", seed)).collect();
    let batch = shared.generate_batch(&params, proceed).unwrap();
    assert_eq!(batch.len(), 3);
    for (seed, (params, image)) in ["4", "5", "6"].into_iter().zip(params.iter().zip(batch)) {
        assert!(image.unwrap() == draw(&shared, params));
        assert!(draw(&shared, params).rgb == command(seed), "seed {seed}");
    }
}

#[test]
fn events_tell_every_step_and_an_answer_ends_the_run() {
    let shared = pipeline("sd1");
    let (mut steps, mut previews, mut images) = (vec![], 0, 0);
    let image = shared
        .generate(&small("a frog", 1), |event| {
            match event {
                Event::Step { done, total } => steps.push((done, total)),
                Event::Preview(preview) => {
                    assert_eq!((preview.width, preview.height), (16, 16));
                    previews += usize::from(preview.image().is_ok());
                }
                Event::Image { index, image } => {
                    assert_eq!((index, image.width), (0, 16));
                    images += 1;
                }
                _ => {}
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(
        (image.width, image.height, image.rgb.len()),
        (16, 16, 16 * 16 * 3)
    );
    // PNDM evaluates its second step twice
    assert_eq!(steps, [(1, 4), (2, 4), (3, 4), (4, 4)]);
    assert_eq!((previews, images), (4, 1));

    let cancelled = shared.generate(&small("a frog", 1), |event| match event {
        Event::Step { done: 2, .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert_eq!(cancelled.unwrap_err().kind(), ErrorKind::Cancelled);
    // of several the first stay
    let params: Vec<Params> = [16, 24, 32]
        .map(|width| small("a", 1).size(width, 16))
        .into();
    let mut batches = 0;
    let images = shared.generate_batch(&params, |event| match event {
        Event::NextBatch { .. } => {
            batches += 1;
            if batches > 2 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        }
        _ => ControlFlow::Continue(()),
    });
    assert_eq!(images.unwrap().len(), 2);
}

#[test]
fn errors_have_a_kind_a_message_and_a_remedy() {
    let kind = |result: Result<Pipeline, Error>| result.err().unwrap();
    let missing = kind(Pipeline::load(&ModelSpec::new(
        "/nowhere/model.safetensors",
    )));
    assert_eq!(missing.kind(), ErrorKind::Model);
    assert!(
        missing.to_string().contains("/nowhere/model.safetensors"),
        "{missing}"
    );
    assert!(missing.remedy().unwrap().contains("diffusers folder"));
    let shared = pipeline("sd1");
    let wrong = shared
        .generate(&Params::new("a frog").size(17, 16), proceed)
        .unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::Params);
    assert!(wrong.to_string().contains("multiple of 8"), "{wrong}");
    assert!(wrong.remedy().unwrap().contains("16"));
    assert!(!wrong.to_string().contains("hint"), "{wrong}");
    // and the pipeline goes on
    draw(&shared, &small("a frog", 1));
}

#[test]
fn pipelines_can_be_shared_by_threads() {
    fn is_shared<T: Send + Sync>() {}
    is_shared::<Pipeline>();
    is_shared::<Error>();
}
