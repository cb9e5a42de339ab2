//! Pictures from outside: every kind of file, and every kind of broken one.

use std::path::{Path, PathBuf};

use crate::common::fixture;
use image::codecs::gif::GifEncoder;
use image::{DynamicImage, Frame, ImageBuffer, Luma, LumaA, Rgb, RgbImage, Rgba, RgbaImage};
use sdgen::image::Image;
use sdgen::image::load::{Fit, Input};

fn read(name: &str) -> Input {
    Input::read(&fixture("input").join(name)).unwrap()
}

fn saved(folder: &Path, name: &str, picture: impl Into<DynamicImage>) -> PathBuf {
    let path = folder.join(name);
    picture.into().save(&path).unwrap();
    path
}

fn refused(path: &Path, texts: &[&str]) {
    let error = format!("{:#}", Input::read(path).unwrap_err());
    let name = path.display().to_string();
    for text in texts.iter().chain(&[name.as_str(), "\n\nhint: "]) {
        assert!(error.contains(text), "`{text}` is missing in: {error}");
    }
}

fn largest_difference(a: &Image, b: &Image) -> u8 {
    assert_eq!((a.width, a.height), (b.width, b.height));
    a.difference(b).largest
}

#[test]
fn every_kind_of_file_gives_the_same_pixels() {
    let folder = tempfile::tempdir().unwrap();
    let slope = read("slope.png");
    let picture = RgbImage::from_raw(10, 6, slope.picture.rgb.clone()).unwrap();
    for name in ["a.png", "a.webp", "a.tiff", "a.bmp"] {
        assert_eq!(
            Input::read(&saved(folder.path(), name, picture.clone())).unwrap(),
            slope,
            "{name}"
        );
    }
    // A file's kind is in its bytes.
    std::fs::copy(folder.path().join("a.bmp"), folder.path().join("a.jpg")).unwrap();
    assert_eq!(Input::read(&folder.path().join("a.jpg")).unwrap(), slope);
}

#[test]
fn a_cmyk_jpeg_has_the_colours_of_its_original() {
    // JPEG at 100 with halved chroma is that near.
    assert!(largest_difference(&read("cmyk.jpg").picture, &read("slope.png").picture) < 16);
}

#[test]
fn a_photograph_is_turned_as_its_exif_says() {
    let (turned, slope) = (read("turned.jpg").picture, read("slope.png").picture);
    let upright = image::imageops::rotate90(&RgbImage::from_raw(10, 6, slope.rgb).unwrap());
    assert!(
        largest_difference(
            &turned,
            &Image {
                width: 6,
                height: 10,
                rgb: upright.into_raw()
            }
        ) < 6
    );
}

#[test]
fn sixteen_bits_are_rounded_to_eight() {
    let folder = tempfile::tempdir().unwrap();
    let levels = ImageBuffer::<Rgb<u16>, _>::from_fn(2, 1, |x, _| {
        if x == 0 {
            Rgb([0, 128, 129])
        } else {
            Rgb([65535, 257, 32639])
        }
    });
    assert_eq!(
        Input::read(&saved(folder.path(), "a.png", levels))
            .unwrap()
            .picture
            .rgb,
        [0, 0, 1, 255, 1, 127]
    );
    let grey = ImageBuffer::<Luma<u16>, _>::from_fn(1, 1, |_, _| Luma([65535 / 2 + 1]));
    assert_eq!(
        Input::read(&saved(folder.path(), "b.png", grey))
            .unwrap()
            .picture
            .rgb,
        [128, 128, 128]
    );
}

#[test]
fn grey_and_transparent_pictures_keep_their_alpha_apart() {
    let folder = tempfile::tempdir().unwrap();
    let picture =
        ImageBuffer::<LumaA<u8>, _>::from_fn(3, 1, |x, _| LumaA([100, [0, 128, 255][x as usize]]));
    let input = Input::read(&saved(folder.path(), "a.png", picture)).unwrap();
    assert_eq!(input.picture.rgb, [100; 9]);
    assert_eq!(input.alpha, Some(vec![0, 128, 255]));
    assert_eq!(
        input.over_white().rgb,
        [255, 255, 255, 177, 177, 177, 100, 100, 100]
    );
    assert_eq!(
        input.transparency(3, 1, Fit::Stretch),
        Some(vec![255, 127, 0])
    );
    // What is painted is the mask, not what is left transparent.
    assert_eq!(input.mask(3, 1, Fit::Stretch), [0, 50, 100]);
}

#[test]
fn an_opaque_alpha_channel_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let picture = ImageBuffer::<Rgba<u8>, _>::from_pixel(2, 2, Rgba([1, 2, 3, 255]));
    let input = Input::read(&saved(folder.path(), "a.png", picture)).unwrap();
    assert_eq!(
        (input.alpha.clone(), input.transparency(2, 2, Fit::Crop)),
        (None, None)
    );
    let plain = Input::read(&saved(
        folder.path(),
        "b.webp",
        ImageBuffer::from_pixel(2, 2, Rgb([1u8, 2, 3])),
    ))
    .unwrap();
    assert_eq!(input.sha256(), plain.sha256());
}

#[test]
fn the_hash_knows_colours_and_transparency() {
    let folder = tempfile::tempdir().unwrap();
    let hash = |name, pixel| {
        Input::read(&saved(
            folder.path(),
            name,
            RgbaImage::from_pixel(2, 2, Rgba(pixel)),
        ))
        .unwrap()
        .sha256()
    };
    let hashes = [
        hash("a.png", [1, 2, 3, 255]),
        hash("b.png", [1, 2, 3, 4]),
        hash("c.png", [1, 2, 4, 4]),
    ];
    assert!(
        hashes[0] != hashes[1] && hashes[1] != hashes[2],
        "{hashes:?}"
    );
    assert_eq!(hash("d.tiff", [1, 2, 3, 4]), hashes[1]);
}

#[test]
fn a_palette_with_a_transparent_entry_becomes_colours_and_alpha() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.png");
    let mut encoder = png::Encoder::new(std::fs::File::create(&path).unwrap(), 2, 1);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_palette(vec![10, 20, 30, 40, 50, 60]);
    encoder.set_trns(vec![255, 0]);
    encoder
        .write_header()
        .unwrap()
        .write_image_data(&[0, 1])
        .unwrap();
    let input = Input::read(&path).unwrap();
    assert_eq!(
        (input.picture.rgb, input.alpha),
        (vec![10, 20, 30, 40, 50, 60], Some(vec![255, 0]))
    );
}

#[test]
fn of_an_animation_the_first_frame_counts() {
    let folder = tempfile::tempdir().unwrap();
    let frame = |level| RgbaImage::from_pixel(4, 4, Rgba([level, 0, 0, 255]));
    let gif = folder.path().join("a.gif");
    let mut encoder = GifEncoder::new(std::fs::File::create(&gif).unwrap());
    encoder
        .encode_frames([frame(255), frame(0)].map(Frame::new))
        .unwrap();
    drop(encoder);
    let apng = folder.path().join("a.png");
    let mut encoder = png::Encoder::new(std::fs::File::create(&apng).unwrap(), 4, 4);
    encoder.set_color(png::ColorType::Rgba);
    encoder.set_animated(2, 0).unwrap();
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(frame(255).as_raw()).unwrap();
    writer.write_image_data(frame(0).as_raw()).unwrap();
    writer.finish().unwrap();
    for path in [gif, apng] {
        let input = Input::read(&path).unwrap();
        assert_eq!(
            (input.picture.rgb, input.alpha),
            ([255, 0, 0].repeat(16), None),
            "{path:?}"
        );
    }
}

#[test]
fn what_is_cut_short_is_refused_at_any_length() {
    let folder = tempfile::tempdir().unwrap();
    let noise = read("noise.png").picture;
    let picture = RgbImage::from_raw(37, 23, noise.rgb).unwrap();
    for name in ["a.png", "a.jpg", "a.webp", "a.tiff", "a.bmp", "a.gif"] {
        let bytes = std::fs::read(saved(folder.path(), name, picture.clone())).unwrap();
        for length in (1..bytes.len() - 64).step_by(7) {
            let path = folder.path().join("cut");
            std::fs::write(&path, &bytes[..length]).unwrap();
            assert!(
                Input::read(&path).is_err(),
                "{name} of {length} of {} bytes",
                bytes.len()
            );
        }
        let path = folder.path().join(format!("cut-{name}"));
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        refused(&path, &["damaged or cut short"]);
    }
}

#[test]
fn what_is_no_picture_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    refused(folder.path(), &["is a folder"]);
    refused(&folder.path().join("none.png"), &["cannot read"]);
    for (name, bytes, says) in [
        ("empty.png", &b""[..], "it is empty"),
        (
            "a.png",
            b"a frog in a top hat\n",
            "no picture of a known kind",
        ),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        refused(&path, &[says, "PNG, JPEG, WebP, TIFF, BMP or GIF"]);
    }
}

#[test]
fn a_picture_too_large_is_refused_by_its_header() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bomb.png");
    for (width, height, color) in [
        (30_000, 30_000, png::ColorType::Rgb),
        (30_000, 1, png::ColorType::Grayscale),
        (16_384, 16_384, png::ColorType::Rgba),
    ] {
        let mut encoder = png::Encoder::new(std::fs::File::create(&path).unwrap(), width, height);
        encoder.set_color(color);
        encoder.set_depth(if color == png::ColorType::Rgba {
            png::BitDepth::Sixteen
        } else {
            png::BitDepth::Eight
        });
        encoder
            .write_header()
            .unwrap()
            .write_chunk(png::chunk::IDAT, &[])
            .unwrap();
        refused(
            &path,
            &[
                &format!("{width}x{height} pixels"),
                "16384",
                "scale it down",
            ],
        );
    }
}

#[test]
fn a_single_pixel_fills_any_size() {
    let folder = tempfile::tempdir().unwrap();
    let input = Input::read(&saved(
        folder.path(),
        "a.png",
        RgbImage::from_pixel(1, 1, Rgb([9, 8, 7])),
    ))
    .unwrap();
    for fit in [Fit::Crop, Fit::Pad, Fit::Stretch] {
        assert_eq!(
            input.picture.fit(5, 3, fit),
            Image {
                width: 5,
                height: 3,
                rgb: [9, 8, 7].repeat(15)
            }
        );
    }
}

#[test]
fn resizing_gives_the_bits_of_pillow() {
    let noise = read("noise.png");
    let cases = [
        ("down.png", 11, 9, Fit::Stretch),
        ("up.png", 64, 50, Fit::Stretch),
        ("rows.png", 37, 10, Fit::Stretch),
        ("crop.png", 16, 24, Fit::Crop),
        ("pad.png", 24, 24, Fit::Pad),
    ];
    for (name, width, height, fit) in cases {
        let (ours, pillow) = (noise.picture.fit(width, height, fit), read(name).picture);
        assert_eq!(largest_difference(&ours, &pillow), 0, "{name}");
    }
    let mask = read("mask.png").picture.rgb;
    assert_eq!(
        noise.mask(11, 9, Fit::Stretch),
        mask.chunks_exact(3)
            .map(|pixel| pixel[0])
            .collect::<Vec<u8>>()
    );
}

#[test]
fn a_picture_of_the_size_stays_as_it_is() {
    let noise = read("noise.png").picture;
    for fit in [Fit::Crop, Fit::Pad, Fit::Stretch] {
        assert_eq!(noise.fit(37, 23, fit), noise);
    }
}

#[test]
fn extreme_shapes_are_fitted_too() {
    let folder = tempfile::tempdir().unwrap();
    let line = saved(
        folder.path(),
        "line.png",
        ImageBuffer::from_fn(4000, 1, |x, _| Luma([(x % 251) as u8])),
    );
    let line = Input::read(&line).unwrap().picture;
    for fit in [Fit::Crop, Fit::Pad, Fit::Stretch] {
        let fitted = line.fit(8, 512, fit);
        assert_eq!(fitted.rgb.len(), 8 * 512 * 3, "{fit:?}");
    }
}
