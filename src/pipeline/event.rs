//! What a pipeline tells its caller while it works, and how the caller answers.

use crate::image::Image;
use std::cell::RefCell;
use std::ops::ControlFlow;

use super::fingerprint::Trace;

/// Something that happened while images were being generated.
///
/// The caller answers every event with [`ControlFlow`]. `Break` in answer to
/// [`Event::NextBatch`] ends the run there, with everything before it finished; in answer to
/// [`Event::Step`] it abandons the images of that batch with an error of kind
/// [`Cancelled`](crate::error::ErrorKind::Cancelled). Elsewhere the answer does not matter.
#[non_exhaustive]
pub enum Event<'a> {
    /// The next batch is about to begin.
    NextBatch {
        /// How many images are left to generate.
        remaining: usize,
    },
    /// A stage begins, such as `reading the VAE`.
    Stage(&'a str),
    /// The denoising of a batch begins.
    Batch {
        /// The images of the batch, by their place in the run, from 0.
        images: &'a [usize],
        /// How many images came before.
        before: usize,
        /// How many images the run has.
        total: usize,
    },
    /// One evaluation of the denoising network is done.
    Step {
        /// How many evaluations of the batch are done, from 1.
        done: usize,
        /// How many evaluations the batch takes.
        total: usize,
    },
    /// An estimate of the finished images of the batch is at hand.
    Preview(&'a Preview<'a>),
    /// Something is not as the caller may think.
    Warning(String),
    /// An image is finished.
    Image {
        /// Its place in the run, from 0.
        index: usize,
        /// The image.
        image: &'a Image,
    },
}

/// A finished image, and what was noted on the way to it.
pub struct Generated {
    pub image: Image,
    /// seconds of denoising, divided by the size of the batch
    pub sampling_s: f64,
    pub decoding_s: f64,
    /// a hash of every stage, if the run asks for it
    pub trace: Option<Trace>,
}

/// An estimate of what the images of a batch will be, made only when it is looked at.
pub struct Preview<'a> {
    pub(super) make: &'a dyn Fn() -> candle_core::Result<Image>,
    /// Width of all images of the batch side by side, in pixels of the finished images.
    pub width: usize,
    /// Height of the finished images in pixels.
    pub height: usize,
}

impl Preview<'_> {
    /// Returns the images of the batch side by side, smaller than they will be. Errors if the
    /// device fails.
    pub fn image(&self) -> candle_core::Result<Image> {
        (self.make)()
    }
}

/// A caller's function that takes events.
pub type OnEvent<'a> = dyn FnMut(Event) -> ControlFlow<()> + 'a;

/// Gives events to the caller, from wherever in a run they happen.
pub struct Events<'a>(RefCell<&'a mut OnEvent<'a>>);

impl<'a> Events<'a> {
    /// Events that go to this function.
    pub fn new(to: &'a mut OnEvent<'a>) -> Self {
        Self(RefCell::new(to))
    }

    /// Gives an event to the caller and returns the answer.
    pub fn emit(&self, event: Event) -> ControlFlow<()> {
        match self.0.try_borrow_mut() {
            Ok(mut to) => to(event),
            // an event that the caller caused while it was answering another one
            Err(_) => ControlFlow::Continue(()),
        }
    }

    /// Tells that a stage begins.
    pub fn stage(&self, name: &str) {
        // a stage is not a place where a run can end
        let _ = self.emit(Event::Stage(name));
    }

    /// Tells what is not as the caller may think.
    pub fn warn(&self, text: String) {
        let _ = self.emit(Event::Warning(text));
    }
}
