//! Compiles `kernels/` for the feature `cuda`: ready code for the GPUs of `CUDA_COMPUTE_CAP` (80 if
//! it is not set), and PTX, which drivers compile for newer ones.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let kernels = Path::new("src/nn/gpu/kernels");
    println!("cargo:rerun-if-changed={}", kernels.display());
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    for name in ["NVCC", "CUDA_HOME", "CUDA_COMPUTE_CAP"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let cap = env::var("CUDA_COMPUTE_CAP").unwrap_or_default();
    let cap = cap
        .rsplit(',')
        .next()
        .and_then(|cap| cap.trim().replace('.', "").parse::<u32>().ok())
        .unwrap_or(80);
    if cap < 80 {
        return Err(format!(
            "CUDA_COMPUTE_CAP is {cap}: the kernels need a GPU of compute capability 8.0 or newer"
        )
        .into());
    }
    println!("cargo:rustc-env=SDGEN_CUDA_COMPUTE_CAP={cap}");
    let of_home = env::var("CUDA_HOME")
        .ok()
        .map(|home| format!("{home}/bin/nvcc"))
        .filter(|nvcc| Path::new(nvcc).exists());
    let nvcc = env::var("NVCC")
        .ok()
        .or(of_home)
        .unwrap_or_else(|| "nvcc".into());
    let output = Path::new(&env::var("OUT_DIR")?).join("kernels.fatbin");
    let mut command = Command::new(&nvcc);
    command.args([
        "-std=c++17",
        "-O3",
        "--fatbin",
        &format!("-gencode=arch=compute_{cap},code=[compute_{cap},sm_{cap}]"),
        "-o",
    ]);
    // the flags in the environment are for candle's kernels
    command
        .arg(output)
        .arg(kernels.join("kernels.cu"))
        .env_remove("NVCC_APPEND_FLAGS");
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{nvcc} failed: {status}").into()),
        Err(error) => {
            Err(format!("{nvcc} cannot be run: {error}; NVCC or CUDA_HOME says where it is").into())
        }
    }
}
