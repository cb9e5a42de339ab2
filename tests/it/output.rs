//! Pictures as files: pixels, formats, metadata, names, and how they are written.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{Device, Tensor};
use sdgen::batch::output_path::{self, Destination, Naming, Overwrite, plan_paths};
use sdgen::image::{Format, Image, Metadata, Parameters, parameters, read_metadata};
use serde_json::json;

const FORMATS: [Format; 3] = [Format::Png, Format::Jpg, Format::Webp];

fn picture() -> Image {
    let (width, height) = (24, 16);
    let rgb = (0..height * width)
        .flat_map(|i| [(i % width * 10) as u8, (i / width * 15) as u8, 77])
        .collect();
    Image { width, height, rgb }
}

fn metadata(prompt: &str) -> Metadata {
    Metadata {
        parameters: parameters(&Parameters { prompt, ..FIELDS }),
        sdgen: json!({"prompt": prompt, "seed": u64::MAX, "guidance": 7.5, "steps": 20}),
    }
}

const FIELDS: Parameters<'static> = Parameters {
    prompt: "a frog",
    negative: "",
    steps: 20,
    sampler: "Euler a",
    schedule: None,
    guidance: 7.5,
    seed: 1,
    width: 512,
    height: 768,
    model_hash: None,
    model: "v1-5",
    extra: &[],
};

fn naming(prompt: &str, seed: u64) -> Naming<'_> {
    Naming {
        prompt,
        negative: "",
        seed,
        index: 0,
        model: "sd15",
        width: 512,
        height: 768,
        steps: 20,
        guidance: 7.5,
        sampler: "euler-a",
        sweep: "",
        frame: None,
        image: "",
    }
}

fn overwrite(force: bool) -> Overwrite {
    if force {
        Overwrite::All
    } else {
        Overwrite::Never
    }
}

fn save(path: &Path, bytes: &[u8], force: bool) -> Result<()> {
    output_path::save(path, bytes, overwrite(force))
}

fn check_writable(
    destination: &Destination,
    paths: &[PathBuf],
    force: bool,
) -> Result<output_path::MadeFolders> {
    let paths: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    output_path::check_writable(
        &paths,
        matches!(destination, Destination::Template(_)),
        overwrite(force),
    )
}

fn parse(output: &str) -> Result<(Destination, Format)> {
    Destination::parse(Some(OsStr::new(output)), None)
}

fn paths(output: &str, jobs: &[Naming<'_>]) -> Result<Vec<String>> {
    let (destination, format) = parse(output)?;
    let paths = plan_paths(&destination, format, jobs)?;
    Ok(paths
        .iter()
        .map(|path| path.display().to_string())
        .collect())
}

fn path(output: &str, job: Naming<'_>) -> String {
    paths(output, &[job]).unwrap().remove(0)
}

fn default_name(prompt: &str) -> String {
    let (destination, format) = Destination::parse(None, None).unwrap();
    plan_paths(&destination, format, &[naming(prompt, 7)]).unwrap()[0]
        .display()
        .to_string()
}

/// The message of an error, which names its cause in one line and, where there is one, the remedy.
fn error<T: std::fmt::Debug>(result: Result<T>) -> String {
    let message = format!("{:#}", result.unwrap_err());
    let (cause, hint) = message.split_once("\n\n").unwrap_or((&message, "hint: "));
    assert!(
        !cause.contains('\n') && hint.starts_with("hint: ") && !hint.contains('\n'),
        "{message}"
    );
    message
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

// Pixels

#[test]
fn levels_are_rounded_half_to_even_and_clamped() {
    // 0.5/255 and 1.5/255 are not exact in f32; 0.5 * 255 = 127.5 is.
    let values = [
        0.0f32,
        0.9999,
        1.0,
        0.5,
        0.999 / 255.0,
        1.4 / 255.0,
        1.6 / 255.0,
        -3.0,
        7.0,
    ];
    let t = Tensor::from_slice(&values, (1, 1, 3, 3), &Device::Cpu).unwrap();
    let pictures = Image::from_tensor(&t).unwrap();
    assert_eq!(pictures.len(), 1);
    assert_eq!((pictures[0].width, pictures[0].height), (3, 1));
    assert_eq!(pictures[0].rgb, [0, 255, 255, 128, 1, 1, 2, 0, 255]);
}

#[test]
fn a_batch_becomes_one_picture_for_each_item_also_when_transposed() {
    let values: Vec<f32> = (0..2 * 2 * 4 * 3).map(|i| i as f32 / 255.0).collect();
    let t = Tensor::from_vec(values, (2, 2, 4, 3), &Device::Cpu).unwrap(); // [b, h, w, 3]
    // The same through channels first, so that the memory is not in the order of the shape.
    let t = t
        .permute((0, 3, 1, 2))
        .unwrap()
        .contiguous()
        .unwrap()
        .permute((0, 2, 3, 1))
        .unwrap();
    let pictures = Image::from_tensor(&t).unwrap();
    assert_eq!(pictures.len(), 2);
    for (i, picture) in pictures.iter().enumerate() {
        assert_eq!((picture.width, picture.height), (4, 2));
        assert_eq!(
            picture.rgb,
            (24 * i as u8..24 * (i as u8 + 1)).collect::<Vec<_>>()
        );
    }
}

#[test]
fn values_that_are_not_finite_are_an_error() {
    for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let t = Tensor::from_slice(&[0.0, broken, 0.0], (1, 1, 1, 3), &Device::Cpu).unwrap();
        let message = Image::from_tensor(&t).unwrap_err().to_string();
        assert!(message.contains("not finite: 1 of 3"), "{message}");
    }
    let t = Tensor::zeros((1, 1, 1, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
    assert!(Image::from_tensor(&t).is_err());
}

#[test]
fn the_hash_is_of_the_pixels_alone() {
    let picture = Image {
        width: 1,
        height: 1,
        rgb: b"abc".to_vec(),
    };
    // FIPS 180-2, appendix B.1
    assert_eq!(
        picture.sha256(),
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
}

#[test]
fn a_picture_of_one_colour_is_flat() {
    let mut picture = Image {
        width: 4,
        height: 4,
        rgb: [1, 2, 3].repeat(16),
    };
    assert!(picture.is_flat());
    picture.rgb[47] = 4;
    assert!(!picture.is_flat());
}

// Formats and metadata

#[test]
fn png_and_webp_keep_every_pixel_and_jpeg_nearly() {
    let picture = picture();
    for metadata in [None, Some(&metadata("a frog"))] {
        for format in FORMATS {
            let bytes = picture.encode(format, metadata).unwrap();
            let decoded = image::load_from_memory(&bytes).unwrap().into_rgb8();
            assert_eq!(decoded.dimensions(), (24, 16));
            let worst = decoded
                .as_raw()
                .iter()
                .zip(&picture.rgb)
                .map(|(a, b)| a.abs_diff(*b))
                .max()
                .unwrap();
            // Quality 95 quantises smooth areas by a few levels.
            assert!(
                worst <= if format == Format::Jpg { 8 } else { 0 },
                "{format}: {worst}"
            );
        }
    }
}

#[test]
fn jpeg_keeps_colour_at_full_resolution() {
    let bytes = picture().encode(Format::Jpg, None).unwrap();
    let frame = bytes
        .windows(2)
        .position(|marker| marker == [0xff, 0xc0])
        .unwrap();
    // marker 2, length 2, precision 1, size 4, components 1, then id, sampling, table for each
    assert_eq!(
        [bytes[frame + 11], bytes[frame + 14], bytes[frame + 17]],
        [0x11, 0x11, 0x11]
    );
}

#[test]
fn metadata_comes_back_from_every_format_in_any_script() {
    let long = "слово 🐸 ".repeat(1000);
    for prompt in [
        "a frog",
        "café ¿é?",
        "青蛙戴礼帽",
        "🐸🎩 top hat",
        "ضفدع, \"quotes\"\nline\ttab",
        "",
        &long,
        "odd",
    ] {
        let metadata = metadata(prompt);
        for format in FORMATS {
            let bytes = picture().encode(format, Some(&metadata)).unwrap();
            assert_eq!(
                read_metadata(&bytes).unwrap(),
                Some(metadata.clone()),
                "{format} {prompt}"
            );
        }
    }
}

#[test]
fn a_picture_without_metadata_has_none() {
    for format in FORMATS {
        assert_eq!(
            read_metadata(&picture().encode(format, None).unwrap()).unwrap(),
            None
        );
    }
}

#[test]
fn png_text_is_latin1_where_it_can_be_and_utf8_else() {
    let has = |bytes: &[u8], part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    let latin1 = picture()
        .encode(Format::Png, Some(&metadata("café")))
        .unwrap();
    assert!(has(&latin1, b"tEXtparameters\0caf\xe9\nSteps: 20") && !has(&latin1, b"iTXt"));
    assert!(has(&latin1, b"tEXtsdgen\0{\"prompt\":\"caf\xe9\""));
    for prompt in ["青蛙", "bell \u{7}"] {
        let utf8 = picture()
            .encode(Format::Png, Some(&metadata(prompt)))
            .unwrap();
        assert!(has(
            &utf8,
            [b"iTXtparameters\0\0\0\0\0", prompt.as_bytes()]
                .concat()
                .as_slice()
        ));
    }
}

#[test]
fn a_nul_in_the_prompt_does_not_end_the_text_of_a_png() {
    let bytes = picture()
        .encode(Format::Png, Some(&metadata("a\0b")))
        .unwrap();
    let read = read_metadata(&bytes).unwrap().unwrap();
    assert!(read.parameters.starts_with("a\u{fffd}b\n"));
    assert_eq!(read.sdgen["prompt"], "a\0b");
}

#[test]
fn more_metadata_than_a_jpeg_holds_is_an_error_that_is_known_before_drawing() {
    let metadata = metadata(&"x".repeat(30_000)); // twice as UTF-16, once in the JSON
    let message = error(metadata.check(Format::Jpg));
    assert!(message.contains("--format png"), "{message}");
    assert_eq!(
        error(picture().encode(Format::Jpg, Some(&metadata))),
        message
    );
    for format in [Format::Png, Format::Webp] {
        metadata.check(format).unwrap();
        let bytes = picture().encode(format, Some(&metadata)).unwrap();
        assert_eq!(read_metadata(&bytes).unwrap().as_ref(), Some(&metadata));
    }
}

#[test]
fn the_largest_metadata_of_a_jpeg_comes_back() {
    let sized = |len: usize| Metadata {
        parameters: String::new(),
        sdgen: json!("x".repeat(len)),
    };
    let most = (60_000..70_000)
        .rev()
        .find(|&len| sized(len).check(Format::Jpg).is_ok())
        .unwrap();
    let bytes = picture().encode(Format::Jpg, Some(&sized(most))).unwrap();
    assert_eq!(read_metadata(&bytes).unwrap(), Some(sized(most)));
}

#[test]
fn pictures_of_a1111_are_read_too() {
    // What piexif writes: big endian, UserComment alone; and the same as a camera would, in ASCII.
    let comment = [
        b"UNICODE\0".to_vec(),
        "frög".encode_utf16().flat_map(u16::to_be_bytes).collect(),
    ]
    .concat();
    let big = [
        b"MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x1a\0\0\0\0".as_slice(),
        b"\0\x01\x92\x86\0\x07\0\0\0\x10\0\0\0\x2c\0\0\0\0",
        &comment,
    ]
    .concat();
    let little = [
        b"II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x1a\0\0\0\0\0\0\0".as_slice(),
        b"\x01\0\x86\x92\x07\0\x0c\0\0\0\x2c\0\0\0\0\0\0\0",
        b"ASCII\0\0\0frog",
    ]
    .concat();
    for (exif, parameters) in [(big, "frög"), (little, "frog")] {
        let mut bytes = Vec::new();
        let mut encoder = image::codecs::jpeg::JpegEncoder::new(&mut bytes);
        image::ImageEncoder::set_exif_metadata(&mut encoder, exif.clone()).unwrap();
        encoder
            .encode(&[0; 3], 1, 1, image::ExtendedColorType::Rgb8)
            .unwrap();
        let read = read_metadata(&bytes).unwrap();
        assert_eq!(
            read,
            Some(Metadata {
                parameters: parameters.to_owned(),
                sdgen: serde_json::Value::Null
            })
        );
        // Cut or garbled anywhere, it is an answer or an error, never a crash.
        for at in 0..bytes.len() {
            read_metadata(&bytes[..at]).ok();
            for value in [0, 0x7f, 0xff] {
                let mut garbled = bytes.clone();
                garbled[at] = value;
                read_metadata(&garbled).ok();
            }
        }
    }
}

#[test]
fn bytes_that_are_no_picture_are_an_error() {
    for bytes in [b"".as_slice(), b"GIF89a", b"\x89PNG\r\n\x1a\n", b"{}"] {
        assert!(read_metadata(bytes).is_err());
    }
}

#[test]
fn a_size_that_a_format_cannot_hold_is_an_error() {
    let wide = |width: usize| Image {
        width,
        height: 1,
        rgb: vec![0; width * 3],
    };
    assert!(wide(65_536).encode(Format::Jpg, None).is_err());
    assert!(wide(20_000).encode(Format::Webp, None).is_err());
    assert!(wide(65_536).encode(Format::Png, None).is_ok());
    for format in FORMATS {
        assert!(wide(0).encode(format, None).is_err());
        assert!(
            Image {
                width: 2,
                height: 2,
                rgb: vec![0; 11]
            }
            .encode(format, None)
            .is_err()
        );
    }
}

#[test]
fn parameters_are_a1111s_text() {
    assert_eq!(
        parameters(&FIELDS),
        format!(
            "a frog\nSteps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 1, Size: 512x768, Model: v1-5, Version: sdgen {}",
            env!("CARGO_PKG_VERSION")
        )
    );
    let text = parameters(&Parameters {
        negative: "ugly, blurry",
        schedule: Some("Karras"),
        guidance: 7.0,
        model_hash: Some("e1441589a6"),
        model: "my, model",
        extra: &[("Clip skip", "2".to_owned())],
        ..FIELDS
    });
    assert_eq!(
        text.split(", Version").next().unwrap(),
        "a frog\nNegative prompt: ugly, blurry\nSteps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 1, \
         Size: 512x768, Model hash: e1441589a6, Model: \"my, model\", Clip skip: 2"
    );
    assert!(
        parameters(&Parameters {
            prompt: "",
            ..FIELDS
        })
        .starts_with("Steps: 20")
    );
}

// Destinations

#[test]
fn the_format_is_the_one_asked_for_then_the_extension_then_png() {
    let format = |output: Option<&str>, format| {
        Destination::parse(output.map(OsStr::new), format).map(|parsed| parsed.1)
    };
    for (output, asked, expected) in [
        (None, None, Format::Png),
        (None, Some(Format::Webp), Format::Webp),
        (Some("-"), None, Format::Png),
        (Some("-"), Some(Format::Jpg), Format::Jpg),
        (Some("x.jpg"), None, Format::Jpg),
        (Some("x.JPEG"), None, Format::Jpg),
        (Some("x.jpeg"), Some(Format::Jpg), Format::Jpg),
        (Some("{seed}.webp"), None, Format::Webp),
        (Some("x"), None, Format::Png),
        (Some("x"), Some(Format::Webp), Format::Webp),
        (Some("v1.5"), Some(Format::Jpg), Format::Jpg),
        (Some("out.d/"), None, Format::Png),
        (Some("out.jpg/"), Some(Format::Webp), Format::Webp),
        (Some("out.d/{prompt}.{seed}"), None, Format::Png),
    ] {
        assert_eq!(format(output, asked).unwrap(), expected, "{output:?}");
    }
    let message = error(format(Some("x.jpg"), Some(Format::Png)));
    assert!(
        message.starts_with("`x.jpg` names jpg, but `--format` asks for png"),
        "{message}"
    );
    assert!(error(format(Some("x.gif"), None)).contains("the formats are `png`, `jpg` and `webp`"));
    assert_eq!("jpeg".parse::<Format>().unwrap(), Format::Jpg);
}

#[test]
fn paths_that_name_no_file_are_errors() {
    assert!(error(parse("")).contains("empty"));
    assert!(error(parse(".")).contains("`-o ./`"));
    assert!(error(parse("a/..")).contains("`-o a/../`"));
    assert!(error(parse("a/.")).contains("`-o a/./`"));
}

#[test]
fn the_default_name_is_prompt_and_seed_in_the_current_folder() {
    assert_eq!(
        default_name("A frog, in a top hat!"),
        "a-frog-in-a-top-hat-7.png"
    );
    let (destination, format) = Destination::parse(None, Some(Format::Webp)).unwrap();
    assert_eq!(
        plan_paths(&destination, format, &[naming("x", 3)]).unwrap(),
        [PathBuf::from("x-3.webp")]
    );
}

#[test]
fn a_folder_gets_default_names() {
    assert_eq!(path("out/", naming("a frog", 1)), "out/a-frog-1.png");
    assert_eq!(
        path("/tmp/a.b/", naming("a frog", 1)),
        "/tmp/a.b/a-frog-1.png"
    );
    assert_eq!(path("{model}/", naming("a frog", 1)), "sd15/a-frog-1.png");
}

#[test]
fn names_are_numbered_where_two_would_be_equal() {
    let jobs = [
        naming("a frog", 1),
        naming("A  frog!", 1),
        naming("frog", 1),
        naming("a frog", 1),
        naming("a frog 1", 2),
    ];
    assert_eq!(
        paths("out/", &jobs).unwrap(),
        [
            "out/a-frog-1.png",
            "out/a-frog-1-2.png",
            "out/frog-1.png",
            "out/a-frog-1-3.png",
            "out/a-frog-1-2-2.png"
        ]
    );
}

#[test]
fn ten_thousand_equal_prompts_get_ten_thousand_names() {
    let names = paths("out/", &[naming("a frog", 1); 10_000]).unwrap();
    assert_eq!(names.iter().collect::<HashSet<_>>().len(), 10_000);
    assert_eq!(names[9_999], "out/a-frog-1-10000.png");
}

#[test]
fn a_template_is_filled_with_every_value() {
    let job = Naming {
        index: 3,
        negative: "Ugly, bad",
        model: "owner/Name v1.5",
        guidance: 6.25,
        ..naming("A frog", 42)
    };
    assert_eq!(
        path(
            "{model}/{prompt}_{negative}_{seed:05}_{index:03}_{width}x{height}_{steps}_{guidance}_{sampler}.jpg",
            job
        ),
        "owner-name-v1-5/a-frog_ugly-bad_00042_003_512x768_20_6.25_euler-a.jpg"
    );
    assert_eq!(path("{seed:02}.png", naming("x", 12345)), "12345.png");
    assert_eq!(path("{{{seed}}}.png", naming("x", 5)), "{5}.png");
    assert_eq!(path("{{x}}.png", naming("x", 5)), "{x}.png");
    assert!(matches!(
        parse("{{x}}.png").unwrap().0,
        Destination::File(_)
    ));
}

#[test]
fn a_template_without_an_extension_gets_one_and_a_file_stays_as_typed() {
    assert_eq!(path("{prompt}", naming("a frog", 5)), "a-frog.png");
    assert_eq!(path("{prompt}.{seed}", naming("a frog", 5)), "a-frog.5.png");
    assert_eq!(
        path("{model}.s{seed}x", naming("a frog", 5)),
        "sd15.s5x.png"
    );
    assert_eq!(path("{guidance}", naming("a frog", 5)), "7.5.png");
    assert_eq!(path("frog", naming("a frog", 5)), "frog");
}

#[test]
fn a_template_that_cannot_be_read_is_an_error_that_names_the_remedy() {
    let message = error(parse("{promt}.png"));
    assert!(
        message.starts_with("unknown placeholder `{promt}`"),
        "{message}"
    );
    for known in [
        "prompt", "seed", "index", "model", "width", "height", "steps", "guidance", "sampler",
        "negative", "sweep", "frame",
    ] {
        assert!(message.contains(&format!("`{{{known}}}`")), "{message}");
        parse(&format!("{{{known}}}.png")).unwrap();
    }
    assert!(error(parse("{seed.png")).contains("lone `{`"));
    assert!(error(parse("seed}.png")).contains("lone `}`"));
    assert!(error(parse("{}.png")).contains("unknown placeholder `{}`"));
    for padding in [
        "{seed:}",
        "{seed:5}",
        "{seed:0}",
        "{seed:0x}",
        "{seed:099}",
        "{seed:0999999999999999999999}",
        "{seed:0é}",
    ] {
        assert!(error(parse(padding)).contains("`{seed:05}`"), "{padding}");
    }
    for padding in ["{prompt:05}", "{guidance:05}"] {
        assert!(error(parse(padding)).contains("not a whole number"));
    }
}

#[test]
fn several_pictures_do_not_go_to_one_file() {
    let message = error(paths(
        "a/frog.jpg",
        &[naming("a frog", 1), naming("a frog", 2)],
    ));
    assert!(message.contains("`-o 'a/frog-{seed}.jpg'`"), "{message}");
    let message = error(paths("frog", &[naming("a frog", 1), naming("a hat", 1)]));
    assert!(message.contains("`-o 'frog-{index}.png'`"), "{message}");
    let message = error(paths("-", &[naming("a frog", 1), naming("a frog", 2)]));
    assert!(message.contains("`-o '{prompt}-{seed}.png'`"), "{message}");
    assert_eq!(
        paths("frog.jpg", &[naming("a frog", 1)]).unwrap(),
        ["frog.jpg"]
    );
    assert!(paths("-", &[naming("a frog", 1)]).unwrap().is_empty());
}

#[test]
fn a_template_that_gives_two_pictures_one_name_is_an_error() {
    let message = error(paths(
        "{prompt}.png",
        &[naming("a hat", 1), naming("a frog", 1), naming("A frog", 2)],
    ));
    assert!(
        message.contains("picture 2 and picture 3 `a-frog.png`"),
        "{message}"
    );
    assert!(
        paths(
            "{prompt}-{seed}.png",
            &[naming("a frog", 1), naming("A frog", 2)]
        )
        .is_ok()
    );
}

#[test]
fn only_pictures_that_say_that_sdgen_has_made_them_are_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let foreign = Metadata {
        sdgen: serde_json::Value::Null,
        ..metadata("a frog")
    };
    for format in FORMATS {
        let own = picture().encode(format, Some(&metadata("a frog"))).unwrap();
        fs::write(path("own"), own).unwrap();
        output_path::save(&path("own"), b"new", Overwrite::Own).unwrap();
        for (name, bytes) in [
            ("plain", picture().encode(format, None).unwrap()),
            ("a1111", picture().encode(format, Some(&foreign)).unwrap()),
            ("text", b"my notes".to_vec()),
            ("empty", vec![]),
        ] {
            fs::write(path(name), &bytes).unwrap();
            let paths = [path(name)];
            let paths: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
            for result in [
                output_path::check_writable(&paths, false, Overwrite::Own).map(drop),
                output_path::save(&path(name), b"new", Overwrite::Own),
            ] {
                let message = error(result);
                assert!(
                    message.contains("does not say that sdgen has made it")
                        && message.contains("`--force`"),
                    "{message}"
                );
            }
            assert_eq!(fs::read(path(name)).unwrap(), bytes, "{format} {name}");
        }
    }
    output_path::save(&path("new"), b"new", Overwrite::Own).unwrap();
}

#[cfg(unix)]
#[test]
fn a_path_that_is_not_utf8_is_kept() {
    use std::os::unix::ffi::OsStrExt;
    let parse = |bytes| Destination::parse(Some(OsStr::from_bytes(bytes)), None).unwrap();
    let (destination, format) = parse(b"\xff.jpg");
    assert_eq!(format, Format::Jpg);
    assert_eq!(
        plan_paths(&destination, format, &[naming("x", 1)]).unwrap()[0]
            .as_os_str()
            .as_bytes(),
        b"\xff.jpg"
    );
    let (destination, format) = parse(b"\xff/");
    assert_eq!(
        plan_paths(&destination, format, &[naming("x", 1)]).unwrap()[0]
            .as_os_str()
            .as_bytes(),
        b"\xff/x-1.png"
    );
    // a template in such a folder is one
    let (destination, format) = parse(b"\xff/{seed:03}.png");
    assert_eq!(
        plan_paths(&destination, format, &[naming("x", 1)]).unwrap()[0]
            .as_os_str()
            .as_bytes(),
        b"\xff/001.png"
    );
}

// Names

#[test]
fn prompts_become_words_joined_by_dashes() {
    for (prompt, name) in [
        ("Don't stop", "dont-stop"),
        ("rock ’n’ roll", "rock-n-roll"),
        ("../../etc/passwd", "etc-passwd"),
        ("..", "picture"),
        (".hidden", "hidden"),
        ("--force", "force"),
        ("C:\\Windows\\System32", "c-windows-system32"),
        ("(frog:1.2) [hat]", "frog-1-2-hat"),
        ("", "picture"),
        ("🐸🎩", "picture"),
        ("🐸 frog", "frog"),
        ("a\0b\nc\u{7f}", "a-b-c"),
        ("CON", "picture-con"),
        ("nul", "picture-nul"),
        ("Com1", "picture-com1"),
        ("com10", "com10"),
        ("console", "console"),
        ("Größe", "größe"),
        ("ЛЯГУШКА в шляпе", "лягушка-в-шляпе"),
        ("青蛙戴礼帽", "青蛙戴礼帽"),
        ("हिन्दी मेंढक", "हिन्दी-मेंढक"),
        ("กบใส่หมวก", "กบใส่หมวก"),
        ("e\u{301}te\u{301}", "e\u{301}te\u{301}"),
        ("evil\u{202e}gnp.exe", "evilgnp-exe"),
        ("zero\u{200b}width", "zerowidth"),
        ("\u{3164}\u{feff}", "picture"),
    ] {
        assert_eq!(default_name(prompt), format!("{name}-7.png"), "{prompt:?}");
    }
}

#[test]
fn long_prompts_are_cut_at_a_word() {
    let prompt = "a watercolour painting of a small green frog wearing a tall black silk hat";
    assert_eq!(
        default_name(prompt),
        "a-watercolour-painting-of-a-small-green-frog-wearing-a-tall-7.png"
    );
    assert_eq!(
        default_name(&"x".repeat(61)),
        format!("{}-7.png", "x".repeat(60))
    );
    assert_eq!(
        default_name(&"蛙".repeat(400)),
        format!("{}-7.png", "蛙".repeat(50))
    );
    assert_eq!(
        default_name(&format!("a {}", "蛙".repeat(400))),
        format!("a-{}-7.png", "蛙".repeat(49))
    );
}

#[test]
fn hostile_prompts_make_one_legal_component() {
    let nasty = [
        "..",
        "/",
        "\\",
        "\0",
        "\n",
        "\r",
        "\u{1b}[31m",
        ".",
        "~",
        "$HOME",
        "`id`",
        "$(id)",
        "|",
        "<",
        ">",
        ":",
        "\"",
        "?",
        "*",
        "'",
        "{seed}",
        "{{",
        "%s",
        "-",
        "--",
        " ",
        "\u{202e}",
        "\u{feff}",
        "\u{fffd}",
        "\u{10ffff}",
        "\u{2215}",
        "\u{ff0f}",
        "\u{2024}",
        "con",
        "aux.",
        "LPT9",
        "com¹",
        "İ",
        "ß",
        "ﬁ",
        "𝕳",
        "蛙",
        "e\u{301}",
        "\u{301}",
        "🐸",
        "👩‍👩‍👧",
        "a",
        "1",
        "½",
        "Ǆ",
    ];
    let folder = tempfile::tempdir().unwrap();
    let mut tried = 0;
    for (i, first) in nasty.iter().enumerate() {
        for (j, repeat) in [1, 2, 7, 80, 300, 5000].into_iter().enumerate() {
            let second = nasty[(i * 7 + j * 3 + 1) % nasty.len()];
            let prompt = format!("{first}{second}").repeat(repeat);
            // alone in the name, so that nothing but the slug makes it legal
            let name = path("{prompt}.webp", naming(&prompt, u64::MAX));
            let stem = name.strip_suffix(".webp").unwrap();
            assert!(
                !stem.is_empty() && stem.chars().count() <= 80 && stem.len() <= 160,
                "{name:?}"
            );
            assert!(
                !stem.contains(|c: char| c.is_control()
                    || c.is_whitespace()
                    || "/\\<>:\"|?*.'$`{}~".contains(c)),
                "{name:?}"
            );
            assert!(!stem.starts_with('-') && !stem.ends_with('-'), "{name:?}");
            assert!(
                !["con", "prn", "aux", "nul", "com¹", "lpt9"].contains(&stem),
                "{name:?}"
            );
            assert_eq!(Path::new(&name).components().count(), 1);
            // and the longest default name fits the file system
            let output = format!("{}/", folder.path().display());
            let path = path(&output, naming(&prompt, u64::MAX));
            save(Path::new(&path), b"x", true).unwrap();
            assert_eq!(Path::new(&path).parent().unwrap(), folder.path());
            tried += 1;
        }
    }
    assert!(tried >= 300, "{tried}");
    assert!(
        names_in(folder.path())
            .iter()
            .all(|name| !name.starts_with('.'))
    );
}

// Checks before drawing

#[test]
fn an_existing_file_is_refused_unless_forced() {
    let folder = tempfile::tempdir().unwrap();
    let (destination, format) = parse(&format!("{}/", folder.path().display())).unwrap();
    let jobs = [
        naming("a frog", 1),
        naming("a frog", 2),
        naming("a frog", 3),
    ];
    let paths = plan_paths(&destination, format, &jobs).unwrap();
    check_writable(&destination, &paths, false).unwrap();
    fs::write(&paths[1], "old").unwrap();
    let message = error(check_writable(&destination, &paths, false));
    assert!(
        message.contains("a-frog-2.png` exists already\n")
            && message.contains("`--force`")
            && message.contains("another name"),
        "{message}"
    );
    fs::write(&paths[2], "old").unwrap();
    assert!(
        error(check_writable(&destination, &paths, false)).contains("exists already, and 1 more\n")
    );
    check_writable(&destination, &paths, true).unwrap();
    assert_eq!(names_in(folder.path()), ["a-frog-2.png", "a-frog-3.png"]);
}

#[test]
fn a_template_makes_its_folders_and_a_file_needs_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let output = |name: &str| format!("{}/{name}", folder.path().display());
    let check = |output: &str| {
        let (destination, format) = parse(output)?;
        let paths = plan_paths(&destination, format, &[naming("a frog", 1)])?;
        check_writable(&destination, &paths, false)
    };
    let made = check(&output("new/deep/")).unwrap();
    assert!(folder.path().join("new/deep").is_dir());
    // what holds nothing at the end goes again
    drop(made);
    assert!(!folder.path().join("new").exists());
    let made = check(&output("{model}/{seed}.png")).unwrap();
    assert!(folder.path().join("sd15").is_dir());
    fs::write(output("sd15/mine"), "").unwrap();
    drop(made);
    assert!(folder.path().join("sd15").is_dir());
    let message = error(check(&output("missing/x.png")));
    assert!(
        message.contains("there is no folder") && message.contains("mkdir -p"),
        "{message}"
    );
    assert!(!folder.path().join("missing").exists());
    fs::write(output("file"), "").unwrap();
    assert!(error(check(&output("file/x.png"))).contains("file` is a file, not a folder"));
    assert!(error(check(&output("file/"))).contains("file` is a file, not a folder"));
    assert!(error(check(&output("sd15"))).contains("/sd15/'` puts the pictures into it"));
    assert!(error(check(&output(&"x".repeat(300)))).contains("cannot write"));
    check(&output("x.png")).unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_cannot_be_written_is_found_before_drawing() {
    // not even root makes files here
    let path = PathBuf::from("/sys/x.png");
    let destination = Destination::File(path.clone());
    assert!(
        error(check_writable(
            &destination,
            std::slice::from_ref(&path),
            false
        ))
        .contains("no permission")
    );
    assert!(error(save(&path, b"x", false)).contains("no permission"));
}

#[cfg(unix)]
#[test]
fn a_device_is_never_replaced() {
    let path = PathBuf::from("/dev/null");
    let message = error(check_writable(
        &Destination::File(path.clone()),
        std::slice::from_ref(&path),
        true,
    ));
    assert!(
        message.contains("is not a file") && message.contains("`-o -`"),
        "{message}"
    );
    assert!(error(save(&path, b"x", true)).contains("is not a file"));
    // Also through a link, as /dev/stdout is one.
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("x.png");
    std::os::unix::fs::symlink("/dev/null", &link).unwrap();
    assert!(error(save(&link, b"x", true)).contains("is not a file"));
}

// Writing

#[test]
fn a_saved_picture_has_the_bytes_and_nothing_else_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.png");
    save(&path, b"first", false).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"first");
    let message = error(save(&path, b"second", false));
    assert!(
        message.contains("exists already") && message.contains("--force"),
        "{message}"
    );
    assert_eq!(fs::read(&path).unwrap(), b"first");
    save(&path, b"third", true).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"third");
    assert_eq!(names_in(folder.path()), ["x.png"]);
}

#[test]
fn a_save_that_fails_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("x.png");
    fs::create_dir(&target).unwrap();
    for force in [false, true] {
        assert!(error(save(&target, b"x", force)).contains("is a folder"));
        assert!(
            error(save(&folder.path().join("missing/x.png"), b"x", force)).contains("cannot write")
        );
        assert!(
            error(save(&folder.path().join("y".repeat(300)), b"x", force)).contains("cannot write")
        );
    }
    assert_eq!(names_in(folder.path()), ["x.png"]);
}

#[test]
fn of_many_that_race_for_a_name_one_wins_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.png");
    let wins: Vec<u8> = std::thread::scope(|scope| {
        let racers: Vec<_> = (0..8u8)
            .map(|i| {
                scope.spawn({
                    let path = &path;
                    move || save(path, &vec![i; 100_000], false).is_ok().then_some(i)
                })
            })
            .collect();
        racers
            .into_iter()
            .filter_map(|racer| racer.join().unwrap())
            .collect()
    });
    assert_eq!(wins.len(), 1);
    assert_eq!(fs::read(&path).unwrap(), vec![wins[0]; 100_000]);
    assert_eq!(names_in(folder.path()), ["x.png"]);
}

#[test]
fn a_reader_never_sees_part_of_a_picture_that_is_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.png");
    save(&path, &[0; 1 << 20], false).unwrap();
    std::thread::scope(|scope| {
        let writer =
            scope.spawn(|| (1..20u8).for_each(|i| save(&path, &vec![i; 1 << 20], true).unwrap()));
        while !writer.is_finished() {
            let bytes = fs::read(&path).unwrap();
            assert!(bytes.len() == 1 << 20 && bytes.iter().all(|byte| *byte == bytes[0]));
        }
        writer.join().unwrap();
    });
}

#[cfg(unix)]
#[test]
fn a_saved_picture_has_the_permissions_of_any_new_file() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (saved, plain) = (folder.path().join("x.png"), folder.path().join("y.png"));
    save(&saved, b"x", false).unwrap();
    fs::write(&plain, b"x").unwrap();
    let mode = |path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&saved), mode(&plain));
}
