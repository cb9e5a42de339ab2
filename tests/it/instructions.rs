//! What the compiler made of the kernels.

use std::collections::BTreeSet;

/// What kernels do with vectors, beside loading them, which the compiler may leave a call.
const ARITHMETIC: [&str; 9] = [
    "_add_epi32",
    "_cvtepu16_epi32",
    "_div_ps",
    "_fmadd_ps",
    "_max_ps",
    "_mul_ps",
    "_set1_ps",
    "_slli_epi32",
    "_sub_ps",
];

/// A kernel part that is not inlined into a function with the instructions is compiled without
/// them: each becomes a call, and the kernel takes twenty times as long, with the same result. Then
/// the program has a function for each.
#[test]
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn no_vector_instruction_is_a_function_of_the_program() {
    let program = std::fs::read(env!("CARGO_BIN_EXE_sdgen")).unwrap();
    let names = functions(&program);
    assert!(names.len() > 1000, "{} functions", names.len());
    let found: BTreeSet<_> = names
        .iter()
        .filter(|name| name.contains("core_arch"))
        .filter_map(|name| {
            let start = name.find("_mm512_").or_else(|| name.find("_mm256_"))?;
            let len = name[start..].find("17h").unwrap_or(name.len() - start);
            Some(&name[start..start + len])
        })
        .filter(|name| ARITHMETIC.iter().any(|operation| name.ends_with(operation)))
        .collect();
    assert!(found.is_empty(), "{found:?}");
}

/// The names in the symbol table of an ELF file of 64 bits, as they stand there.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn functions(file: &[u8]) -> Vec<String> {
    const SYMBOLS: usize = 2;
    const FUNCTION: u8 = 2;
    const SYMBOL: usize = 24;
    let number = |at: usize, len: usize| {
        let bytes = file[at..at + len].iter().rev();
        bytes.fold(0usize, |number, byte| number << 8 | usize::from(*byte))
    };
    assert_eq!(&file[..5], b"\x7fELF\x02");
    let (sections, size, count) = (number(0x28, 8), number(0x3a, 2), number(0x3c, 2));
    let bytes = |section: usize| {
        let start = number(sections + section * size + 0x18, 8);
        &file[start..start + number(sections + section * size + 0x20, 8)]
    };
    let mut names = vec![];
    for section in 0..count {
        let header = sections + section * size;
        if number(header + 4, 4) != SYMBOLS {
            continue;
        }
        let strings = bytes(number(header + 0x28, 4));
        for symbol in bytes(section).chunks_exact(SYMBOL) {
            if symbol[4] & 15 == FUNCTION {
                let start = u32::from_le_bytes(symbol[..4].try_into().unwrap()) as usize;
                let name = strings[start..].split(|byte| *byte == 0).next().unwrap();
                names.push(String::from_utf8_lossy(name).into_owned());
            }
        }
    }
    names
}
