#!/usr/bin/env bash
# One would guess: a fresh OFT adapter of a convolution changes nothing, and merging it into the weight gives what the layer gives.
# So it is not: PEFT's OFT turns the patches under a 3x3 kernel and adds them up where they overlap, so a fresh adapter (identity) already changes the output several times over, and merging it changes nothing.
# It hits whoever trains OFT on a U-Net's convolutions and then merges it, and every program that applies such a file to weights; 1x1 kernels and linear layers are as expected.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 peft==0.21.2 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import warnings

warnings.filterwarnings("ignore")
import peft
import torch
from peft import OFTConfig, get_peft_model

torch.manual_seed(0)
for kernel, is_kept in ((1, True), (3, False)):
    base = torch.nn.Sequential(torch.nn.Conv2d(8, 8, kernel, padding=kernel // 2))
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        before = base(x)
        model = get_peft_model(base, OFTConfig(oft_block_size=4, target_modules=["0"]))
        adapted = model(x)
        merged = model.merge_and_unload()(x)
    change = lambda y: ((y - before).abs().max() / before.abs().max()).item()
    print(f"peft {peft.__version__}, {kernel}x{kernel}: fresh OFT changes the output by {change(adapted):.2g} of its largest value, merged by {change(merged):.2g}")
    assert (change(adapted) < 1e-5) == is_kept, "this has changed"
    assert change(merged) < 1e-5, "this has changed"
PY
