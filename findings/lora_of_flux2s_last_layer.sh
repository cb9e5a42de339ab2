#!/usr/bin/env bash
# One would guess: a LoRA of FLUX.2 in original names (ai-toolkit, ComfyUI) changes in diffusers what it changes in the original network, layer by layer.
# So it is not for the last layer: the original's rows are (shift, scale), diffusers' are (scale, shift); the reader of single files swaps the weight's halves, that of LoRAs does not swap B's.
# It hits whoever trains all layers: what was learned for the shift of the last modulation scales in diffusers, and the other way round.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PY'
import logging
import warnings

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

torch.set_grad_enabled(False)
torch.manual_seed(1)
dim = 3072  # that of klein 4B, which the converter of single files is written for
scale, shift = torch.ones(dim, 1), torch.zeros(dim, 1)
original = torch.cat([shift, scale])  # the original layer's rows: first the shift, then the scale
# the layer's weight, from a single file
converted = convert_flux2_transformer_checkpoint_to_diffusers({"final_layer.adaLN_modulation.1.weight": original.clone()})
weight = converted["norm_out.linear.weight"]
# a LoRA on the same layer, whose B has a row for each of the layer's
transformer = Flux2Transformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                                      num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4),
                                      guidance_embeds=False)
small = torch.cat([torch.zeros(32, 1), torch.ones(32, 1)])
pipe = Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
layer = "diffusion_model.final_layer.adaLN_modulation.1"
pipe.load_lora_weights({f"{layer}.lora_A.weight": torch.ones(1, 32), f"{layer}.lora_B.weight": small}, adapter_name="x")
b = transformer.norm_out.linear.lora_B["x"].weight
first = {"weight": float(weight[0, 0]), "LoRA": float(b[0, 0])}
last = {"weight": float(weight[-1, 0]), "LoRA": float(b[-1, 0])}
for name in first:
    halves = ["scale" if x == 1.0 else "shift" for x in (first[name], last[name])]
    print(f"diffusers {diffusers.__version__}: the {name} of original rows (shift, scale) is loaded as ({', '.join(halves)})")
assert (first["weight"], last["weight"]) == (1.0, 0.0), "this has changed"
assert (first["LoRA"], last["LoRA"]) == (0.0, 1.0), "this has changed"
PY
