//! Draws many pictures in batches, tells how far it is, and saves each as soon as it is finished:
//! `cargo run --release --example batch`.

use sdgen::{Event, Format, ModelSpec, Params, Pipeline};
use std::ops::ControlFlow;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pipeline = Pipeline::load(&ModelSpec::embedded())?;
    let prompts = [
        "a cat wearing a crown",
        "a panda on light blue",
        "three strawberries, 3d",
    ];
    let params: Vec<Params> = (1..=2)
        .flat_map(|seed| prompts.map(|prompt| Params::new(prompt).seed(seed)))
        .collect();
    let mut failed = None;
    let results = pipeline.generate_batch(&params, |event| {
        match event {
            Event::Batch { images, total, .. } => eprintln!("{images:?} of {total}"),
            Event::Step { done, total } => eprint!("\rstep {done} of {total} "),
            Event::Image { index, image } => {
                let path = format!("batch-{index}.png");
                let saved = image
                    .to_bytes(Format::Png)
                    .and_then(|png| Ok(std::fs::write(&path, png)?));
                match saved {
                    Ok(()) => println!("{path}"),
                    Err(error) => failed = Some(error),
                }
            }
            _ => {}
        }
        // nothing more is drawn once a file cannot be written
        if failed.is_some() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    results.into_iter().collect::<Result<Vec<_>, _>>()?;
    failed.map_or(Ok(()), |error| Err(error.into()))
}
