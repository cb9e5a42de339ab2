#!/usr/bin/env bash
# CUDA 13.0 build environment for Rust crates on candle (features "cuda" and "cudnn"), for an x86-64
# Linux machine with no GPU, no driver and no CUDA toolkit.
#
#   source .ci/cuda-env.sh DIR [CAP]        then: cargo build --release --features cuda
#
# DIR  where the toolkit is put (about 1.7 GB; kept and reused).
# CAP  compute capability to build for. 90 (the default): Hopper alone (H100, H200). 80: every GPU from
#      8.0 on, with ready code for 8.0 and 9.0 in the linked kernels. Takes effect on a clean build:
#      cargo sees that CUDA_COMPUTE_CAP changed, but not NVCC_APPEND_FLAGS.
# Needs bash, python3 with pip (PYTHON names another python3), and gcc with g++ up to version 15.
# Versions are those of CUDA 13.0.2, as in PyTorch 2.11+cu130: a driver for CUDA 13.0 refuses the PTX of a
# newer nvcc. All are pinned: nvcc names no version of nvvm and crt, and 13.0's fails beside the newest.

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  echo "source this file instead: source $0 DIR [CAP]" >&2
  exit 2
fi

_cuda_env() {
  local dir=${1:?usage: source .ci/cuda-env.sh DIR [CAP]} cap=${2:-90} root f
  local reqs="cuda-toolkit[nvcc,crt,nvvm,cccl,cudart,cublas,curand,nvrtc]==13.0.2 nvidia-cudnn-cu13==9.19.0.56"
  mkdir -p "$dir" && dir=$(cd "$dir" && pwd) || return
  root=$dir/nvidia/cu13

  # 1. The wheels, once. The stamp is written last, so an interrupted install is done again.
  if [ "$(cat "$dir/.cuda-env" 2>/dev/null)" != "$reqs" ]; then
    # shellcheck disable=SC2086
    "${PYTHON:-python3}" -m pip install -q --upgrade --only-binary=:all: --no-cache-dir \
      --root-user-action=ignore --disable-pip-version-check --target "$dir" $reqs || return
    echo "$reqs" > "$dir/.cuda-env"
  fi

  # 2. A toolkit's usual shape: lib64, lib*.so without a version, cuDNN beside the rest.
  ln -sfn lib "$root/lib64"
  for f in "$dir"/nvidia/cudnn/lib/lib*.so.*; do ln -sf "../../cudnn/lib/${f##*/}" "$root/lib/"; done
  for f in "$dir"/nvidia/cudnn/include/*.h; do ln -sf "../../cudnn/include/${f##*/}" "$root/include/"; done
  for f in "$root"/lib/lib*.so.*; do ln -sf "${f##*/}" "${f%.so.*}.so"; done

  # 3. libcuda is the driver's; no wheel holds it. The linker gets a stub with every name in cuda.h.
  #    Each function answers 100 (CUDA_ERROR_NO_DEVICE), so that a program built here also starts here
  #    and finds no GPU. Never take the stub to a machine that has a GPU.
  if [ ! -e "$root/lib/stubs/libcuda.so" ]; then
    mkdir -p "$root/lib/stubs"
    grep -oE '\bcu[A-Z][A-Za-z0-9_]*' "$root/include/cuda.h" | sort -u |
      sed 's/.*/int &(void) { return 100; }/' |
      gcc -w -x c - -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$root/lib/stubs/libcuda.so.1" || return
    ln -sf libcuda.so.1 "$root/lib/stubs/libcuda.so"
  fi

  # 4. What cudarc (CUDA_HOME, CUDARC_CUDA_VERSION) and cudaforge (NVCC, CUDA_COMPUTE_CAP,
  #    CUDAFORGE_THREADS: else half of the cores) read, and flags for nvcc: compressed kernels
  #    (a program of 40 MB instead of 57) and, below 9.0, code for newer GPUs too.
  export CUDA_HOME=$root NVCC=$root/bin/nvcc CUDARC_CUDA_VERSION=13000 CUDA_COMPUTE_CAP=$cap
  export CUDAFORGE_THREADS=${CUDAFORGE_THREADS:-$(nproc)} NVCC_APPEND_FLAGS=--compress-mode=size
  case $cap in [78][0-9]) NVCC_APPEND_FLAGS+=" -gencode=arch=compute_$cap,code=[compute_$cap,sm_90]" ;; esac
  case ":$PATH:" in *":$root/bin:"*) ;; *) export PATH=$root/bin:$PATH ;; esac
  # To start what was built, on this machine: LD_LIBRARY_PATH=$CUDA_RUN_LIBS ./program
  export CUDA_RUN_LIBS=$root/lib:$root/lib/stubs
}
_cuda_env "$@"
