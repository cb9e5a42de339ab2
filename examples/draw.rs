//! Draws one picture with the embedded model: `cargo run --release --example draw -- "a frog"`.

use sdgen::{Format, ModelSpec, Params, Pipeline};
use std::ops::ControlFlow;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let prompt = std::env::args()
        .nth(1)
        .unwrap_or("a frog in a top hat".into());
    let pipeline = Pipeline::load(&ModelSpec::embedded())?;
    let image = pipeline.generate(&Params::new(prompt).seed(7), |_| ControlFlow::Continue(()))?;
    std::fs::write("drawn.png", image.to_bytes(Format::Png)?)?;
    println!("drawn.png");
    Ok(())
}
