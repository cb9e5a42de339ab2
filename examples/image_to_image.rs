//! Draws a picture over another one: `cargo run --release --example image_to_image -- photo.jpg`.
//! Without a file it draws a dog first, and then a panda over it.

use sdgen::{Format, ModelSpec, Params, Pipeline};
use std::ops::ControlFlow;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pipeline = Pipeline::load(&ModelSpec::embedded())?;
    let proceed = |_: sdgen::Event| ControlFlow::Continue(());
    let source = match std::env::args().nth(1) {
        Some(path) => path,
        None => {
            let dog = pipeline.generate(&Params::new("a dog").seed(3), proceed)?;
            std::fs::write("dog.png", dog.to_bytes(Format::Png)?)?;
            "dog.png".into()
        }
    };
    let over = Params::new("a panda")
        .seed(3)
        .size(128, 128)
        .init_image(source, 0.7);
    let image = pipeline.generate(&over, proceed)?;
    std::fs::write("panda.png", image.to_bytes(Format::Png)?)?;
    println!("panda.png");
    Ok(())
}
