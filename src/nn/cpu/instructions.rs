//! Which instructions the kernels use: the one place that asks the processor.

use anyhow::{Result, bail};
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

/// The environment variable that names the instructions, for tests.
pub const VARIABLE: &str = "SDGEN_INSTRUCTIONS";

/// The instructions of matrix products, from the fastest down. Each has those below it for
/// everything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Instructions {
    /// Intel's tiles: `tdpbf16ps`
    Amx,
    /// `vdpbf16ps`
    Avx512Bf16,
    Avx512,
    Avx2,
    /// whatever the compiler makes of plain loops
    Portable,
}

impl Instructions {
    pub const ALL: [Self; 5] = [
        Self::Amx,
        Self::Avx512Bf16,
        Self::Avx512,
        Self::Avx2,
        Self::Portable,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Whether this processor has them, and the system lets this process use them.
    pub fn is_there(self) -> bool {
        static THERE: OnceLock<[bool; 5]> = OnceLock::new();
        let there = THERE.get_or_init(|| Self::ALL.map(detect));
        there[self as usize]
    }

    /// Whether kernels can be made to use them: those of bf16 products are emulated, bit for bit,
    /// where they are not there.
    fn can_be_forced(self) -> bool {
        self.is_there() || matches!(self, Self::Amx | Self::Avx512Bf16)
    }

    /// Whether they are faster than those below them. Intel's processors start a `vdpbf16ps` in every
    /// second cycle and two `vfmadd` of f32 in each: 172 and 354 GFLOP/s in registers, on two cores of
    /// one of the fifth generation. AMD's start as many of both.
    fn pays(self) -> bool {
        self != Self::Avx512Bf16 || !is_intel()
    }

    /// The instructions that are not those of matrix products: the best that are there.
    fn of_vectors(self) -> Vectors {
        match self {
            Self::Portable => Vectors::Portable,
            Self::Avx2 => Vectors::Avx2,
            _ if Self::Avx512.is_there() => Vectors::Avx512,
            _ if Self::Avx2.is_there() => Vectors::Avx2,
            _ => Vectors::Portable,
        }
    }
}

impl fmt::Display for Instructions {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Instructions {
    type Err = String;

    /// Errors, with what is possible, if the name is unknown or this processor has none of them.
    fn from_str(name: &str) -> Result<Self, String> {
        let possible = || Self::ALL.into_iter().filter(|set| set.can_be_forced());
        let found = possible().find(|set| set.name() == name);
        found.ok_or_else(|| {
            let names: Vec<_> = possible().map(Self::name).collect();
            format!("on this processor it may be {}", names.join(", "))
        })
    }
}

/// The instructions of everything but matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Vectors {
    Avx512,
    Avx2,
    Portable,
}

impl fmt::Display for Vectors {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let set = match self {
            Self::Avx512 => Instructions::Avx512,
            Self::Avx2 => Instructions::Avx2,
            Self::Portable => Instructions::Portable,
        };
        set.fmt(f)
    }
}

/// What was chosen, plus one: a set of [`Instructions`] times 8, its [`Vectors`] times 2, and whether
/// somebody named it; 0 before.
static CHOSEN: AtomicU8 = AtomicU8::new(0);

fn chosen() -> u8 {
    match CHOSEN.load(Ordering::Relaxed) {
        0 => {
            // an impossible name is told by `of_environment`, which programs ask first
            match of_environment().ok().flatten() {
                Some(named) => force(named),
                None => choose(best(), false),
            }
            CHOSEN.load(Ordering::Relaxed) - 1
        }
        chosen => chosen - 1,
    }
}

/// The fastest that are there.
fn best() -> Instructions {
    let mut all = Instructions::ALL.into_iter();
    all.find(|set| set.is_there() && set.pays())
        .unwrap_or(Instructions::Portable)
}

/// The instructions of matrix products.
pub fn instructions() -> Instructions {
    Instructions::ALL[usize::from(chosen() / 8)]
}

/// The instructions of everything else.
#[inline]
pub fn vectors() -> Vectors {
    match chosen() / 2 % 4 {
        0 => Vectors::Avx512,
        1 => Vectors::Avx2,
        _ => Vectors::Portable,
    }
}

/// Whether they are those that somebody named, not the fastest that are there.
pub fn are_named() -> bool {
    chosen() % 2 == 1
}

/// Uses these from now on.
pub fn force(set: Instructions) {
    choose(set, true);
}

fn choose(set: Instructions, is_named: bool) {
    let chosen = set as u8 * 8 + set.of_vectors() as u8 * 2 + u8::from(is_named);
    CHOSEN.store(chosen + 1, Ordering::Relaxed);
}

/// What the environment variable [`VARIABLE`] names, if it is set and not empty. Errors if that is
/// unknown, or impossible here.
pub fn of_environment() -> Result<Option<Instructions>> {
    let Some(name) = std::env::var_os(VARIABLE).filter(|name| !name.is_empty()) else {
        return Ok(None);
    };
    let name = name.to_string_lossy();
    match name.parse() {
        Ok(set) => Ok(Some(set)),
        Err(possible) => bail!("{VARIABLE} is `{name}`\n\nhint: {possible}"),
    }
}

#[cfg(target_arch = "x86_64")]
fn detect(set: Instructions) -> bool {
    match set {
        Instructions::Amx => is_x86_feature_detected!("avx512f") && has_tiles(),
        Instructions::Avx512Bf16 => {
            is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
        }
        Instructions::Avx512 => is_x86_feature_detected!("avx512f"),
        Instructions::Avx2 => {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
        }
        Instructions::Portable => true,
    }
}

#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    #[allow(unused_unsafe, reason = "unsafe in older compilers")]
    // SAFETY: every x86-64 processor has `cpuid`
    let vendor = unsafe { std::arch::x86_64::__cpuid(0) };
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    name.as_flattened() == b"GenuineIntel"
}

#[cfg(not(target_arch = "x86_64"))]
fn is_intel() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn detect(set: Instructions) -> bool {
    set == Instructions::Portable
}

/// Whether the processor has tiles of bf16, and the system lets this process use them; asks for
/// that, which holds for all threads that start later.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    const OSXSAVE: u32 = 1 << 27;
    /// the states XTILECFG and XTILEDATA of XCR0
    const STATES: u64 = 3 << 17;
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XTILEDATA: libc::c_long = 18;
    #[target_feature(enable = "xsave")]
    fn states() -> u64 {
        // SAFETY: the caller found OSXSAVE
        unsafe { _xgetbv(0) }
    }
    #[allow(unused_unsafe, reason = "unsafe in older compilers")]
    // SAFETY: every x86-64 processor has `cpuid`
    let (highest, known, extended) =
        unsafe { (__cpuid(0).eax, __cpuid(1).ecx, __cpuid_count(7, 0).edx) };
    // SAFETY: `xgetbv` is there with OSXSAVE; the call takes two numbers and changes no memory
    highest >= 7
        && known & OSXSAVE != 0
        && extended & (BF16 | TILE) == BF16 | TILE
        && unsafe { states() } & STATES == STATES
        && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) } == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn has_tiles() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_what_can_be_used_here_and_bf16_products_can_always_be() {
        for set in Instructions::ALL {
            let named = set.to_string().parse();
            match set.can_be_forced() {
                true => assert_eq!(named, Ok(set)),
                false => assert!(named.is_err_and(|error| error.contains("avx2, portable"))),
            }
        }
        assert!(Instructions::Amx.can_be_forced() && Instructions::Avx512Bf16.can_be_forced());
        let error = "sse2".parse::<Instructions>();
        assert!(error.is_err_and(|error| error.contains("be amx, avx512-bf16,")));
    }

    #[test]
    fn the_best_is_there_and_vectors_are_those_of_the_set() {
        assert!(best().is_there());
        assert!(best() != Instructions::Avx512Bf16 || !is_intel());
        assert_eq!(Instructions::Portable.of_vectors(), Vectors::Portable);
        assert_eq!(Instructions::Avx2.of_vectors(), Vectors::Avx2);
        let best_vectors = Instructions::Amx.of_vectors();
        assert_eq!(
            best_vectors == Vectors::Avx512,
            Instructions::Avx512.is_there()
        );
    }
}
