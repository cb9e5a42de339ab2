#!/usr/bin/env bash
# Checks and times a CUDA build on a machine with a GPU, beside diffusers in the same run, and prints one table.
#
#   tests/bench/gpu.sh [FOLDER]     FOLDER holds `sdgen` and `tests`, as `.ci/cuda build` leaves them in target/gpu
#
# Without FOLDER both are built here, which needs cargo and a CUDA toolkit. Needs python3 with torch and diffusers.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-}
if [ -z "$folder" ]; then
  .ci/cuda build
  folder=target/gpu
fi
wheels=$(python3 -c 'import glob, nvidia; print(":".join(d for p in nvidia.__path__ for d in glob.glob(p + "/*/lib")))')
export LD_LIBRARY_PATH=$wheels${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
if ldd "$folder/sdgen" | grep 'not found'; then exit 1; fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

echo "== is it right: every network beside diffusers' goldens, on the device, f32"
CARGO_MANIFEST_DIR=$PWD SDGEN_TEST_DEVICE=cuda "$folder/tests" parity:: || echo "PARITY FAILED"
echo "== the same picture as on the CPU"
out=$(mktemp -d)
for type in f32 f16 bf16; do
  "$folder/sdgen" "a frog in a top hat" -s 7 --device cuda --dtype $type -o "$out/$type.png" -q || echo "DRAWING IN $type FAILED"
done
"$folder/sdgen" "a frog in a top hat" -s 7 --device cpu -o "$out/cpu.png" -q
for type in f32 f16 bf16; do
  "$folder/sdgen" check "$out/cpu.png" --device cpu --expect "$out/$type.png" --min-psnr 40 || true
done

echo "== where the time goes: each layer waited for, so the sum is larger than a step"
for size in sd15 sdxl; do "$folder/sdgen" bench --device cuda --size $size --dtype f16 -n 10 || echo FAILED; done
echo "== how fast, beside diffusers"
python3 tests/bench/gpu_bench.py "$folder/sdgen"
