#!/usr/bin/env bash
# One would guess: guidance_scale=1.0 is off in diffusers' ZImagePipeline, as in its other pipelines and as its own documentation says ("enabled by setting guidance_scale > 1").
# So it is not: there it counts from 0, so that 1.0 runs the network twice a step and guides as strongly as 2.0 elsewhere; only 0.0 is off.
# It hits whoever takes a scale from ComfyUI, stable-diffusion.cpp or another pipeline: Z-Image-Turbo at 1.0 takes twice the time and is no longer the picture without guidance.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 diffusers==0.42.1 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import warnings

warnings.filterwarnings("ignore")
import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

torch.set_grad_enabled(False)
torch.manual_seed(1)
transformer = ZImageTransformer2DModel(
    in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
    axes_dims=[8, 4, 4], axes_lens=[64, 32, 32],
)
vae = AutoencoderKL(latent_channels=4, block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
                    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
pipe = ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, None, None, transformer)
pipe.set_progress_bar_config(disable=True)
prompt, negative = torch.randn(5, 16), torch.randn(7, 16)
rows = []
forward = transformer.forward


def counted(x, *args, **options):
    rows.append(len(x))
    return forward(x, *args, **options)


transformer.forward = counted


def latents(scale, prompt=prompt):
    rows.clear()
    return pipe(prompt_embeds=[prompt], negative_prompt_embeds=[negative], height=64, width=64, num_inference_steps=1,
                guidance_scale=scale, generator=torch.Generator().manual_seed(3), output_type="latent").images


off, runs_off = latents(0.0), sum(rows)
at_one, runs_at_one = latents(1.0), sum(rows)
# the same step with the negative prompt alone; everybody else's guidance of 2 is negative + 2 (prompt - negative)
alone = latents(0.0, negative)
of_two = alone + 2.0 * (off - alone)
print(f"diffusers {diffusers.__version__}: guidance_scale=0.0 runs the network for {runs_off} picture a step, 1.0 for {runs_at_one}")
print(f"1.0 differs from no guidance by {(at_one - off).abs().max():.3f}, from others' guidance of 2.0 by {(at_one - of_two).abs().max():.6f}")
assert (runs_off, runs_at_one) == (1, 2), "this has changed"
assert (at_one - off).abs().max() > 1e-3 > (at_one - of_two).abs().max(), "this has changed"
PY
