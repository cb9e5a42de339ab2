//! `--save-steps`: files of what images look like on the way, from the previews of a batch.

use crate::batch::output_path::{self, MadeFolders, Overwrite};
use crate::batch::work_list::Task;
use crate::batch::writer::WriteOptions;
use crate::image::{Format, Image, Metadata};
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// The name of an image that goes to stdout.
const UNNAMED: &str = "image";

/// Saves every `every`-th preview of each image.
pub struct StepImages {
    folder: PathBuf,
    every: usize,
    options: WriteOptions,
    /// Kept while the run lives, as the folder may stay empty.
    _made: MadeFolders,
    /// The stem of each image's files, by the image's index; no two are equal.
    stems: HashMap<usize, String>,
}

impl StepImages {
    /// Makes the folder. Errors if that cannot be, or if it has files of one of the images and
    /// these may not be overwritten.
    pub fn new(
        folder: &Path,
        every: usize,
        tasks: &[&Task],
        options: WriteOptions,
    ) -> Result<Self> {
        let mut made = MadeFolders::default();
        made.make(folder)?;
        let steps = Self {
            folder: folder.into(),
            every,
            options,
            _made: made,
            stems: stems(tasks),
        };
        if options.overwrite == Overwrite::Never {
            steps.require_none()?;
        }
        Ok(steps)
    }

    /// Errors if the folder has step images of these images.
    fn require_none(&self) -> Result<()> {
        let stems: HashSet<&str> = self.stems.values().map(String::as_str).collect();
        let entries = std::fs::read_dir(&self.folder)
            .with_context(|| format!("cannot read the folder `{}`", self.folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if let Some((stem, _)) = name.rsplit_once("-step-")
                && stems.contains(stem)
            {
                bail!(
                    "`{}` exists already\n\nhint: `--force` overwrites, another folder in `--save-steps` keeps it",
                    path.display()
                );
            }
        }
        Ok(())
    }

    /// Whether the previews of a step, counted from 1, are saved.
    pub fn takes(&self, step: usize) -> bool {
        step.is_multiple_of(self.every)
    }

    /// Saves the previews of a batch, which stand side by side in one image.
    pub fn save(&self, indices: &[usize], step: usize, previews: &Image) -> Result<()> {
        let width = previews.width / indices.len().max(1);
        for (place, index) in indices.iter().enumerate() {
            let Some(stem) = self.stems.get(index) else {
                continue;
            };
            let path = self.folder.join(format!("{stem}-step-{step:03}.png"));
            let preview = columns(previews, place * width, width);
            let metadata = self.options.metadata.then(|| Metadata {
                parameters: format!("step {step} of a picture"),
                sdgen: json!({ "step": step }),
            });
            let bytes = preview.encode(Format::Png, metadata.as_ref())?;
            output_path::save(&path, &bytes, self.options.overwrite)?;
        }
        Ok(())
    }
}

/// A name for each image's files: that of the image, numbered where two images have one name.
fn stems(tasks: &[&Task]) -> HashMap<usize, String> {
    let mut taken = HashSet::new();
    let mut stems = HashMap::new();
    for task in tasks {
        let stem = task.path.as_deref().and_then(Path::file_stem);
        let first = stem.map_or(UNNAMED.into(), |stem| stem.to_string_lossy().into_owned());
        let mut name = first.clone();
        let mut number = 2;
        while !taken.insert(name.to_lowercase()) {
            name = format!("{first}-{number}");
            number += 1;
        }
        stems.insert(task.index, name);
    }
    stems
}

/// `width` columns of an image, from `left` on.
fn columns(image: &Image, left: usize, width: usize) -> Image {
    let rows = image.rgb.chunks_exact((image.width * 3).max(1));
    let row = |row: &[u8]| {
        let row = row.iter().skip(left * 3).take(width * 3);
        row.copied().collect::<Vec<u8>>()
    };
    Image {
        width,
        height: image.height,
        rgb: rows.flat_map(row).collect(),
    }
}
