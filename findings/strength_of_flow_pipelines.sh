#!/usr/bin/env bash
# One would guess: --strength 0.6 of 4 steps leaves out the same steps whatever the model, as diffusers' image-to-image pipelines all have a `get_timesteps` that looks alike.
# So it is not: Stable Diffusion's takes int(4 * 0.6) = 2 steps, those of FLUX, FLUX.2 klein and Z-Image 4 - int(4 - 4 * 0.6) = 3, so the same strength begins at another noise level.
# It hits whoever ports a script or a program from one to the other: at the few steps of distilled models one step more is another picture.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 diffusers==0.42.1 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import warnings

warnings.filterwarnings("ignore")
import diffusers
import numpy
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinInpaintPipeline,
    FluxImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    ZImageImg2ImgPipeline,
)


def steps(pipeline, scheduler, n, strength, **levels):
    scheduler.set_timesteps(**({"num_inference_steps": n} | levels))
    # the method alone, on an object that has nothing but the scheduler
    holder = type("Holder", (), {"scheduler": scheduler})()
    return len(pipeline.get_timesteps(holder, n, strength, "cpu")[0])


seen = set()
for n, strength in ((4, 0.6), (8, 0.3), (10, 0.75), (4, 0.5)):
    old = steps(StableDiffusionImg2ImgPipeline, diffusers.DDIMScheduler(), n, strength)
    flows = {
        steps(pipeline, FlowMatchEulerDiscreteScheduler(shift=3.0), n, strength, sigmas=numpy.linspace(1, 1 / n, n))
        for pipeline in (FluxImg2ImgPipeline, Flux2KleinInpaintPipeline, ZImageImg2ImgPipeline)
    }
    (flow,) = flows
    print(f"diffusers {diffusers.__version__}, strength {strength} of {n} steps: Stable Diffusion takes {old}, FLUX, FLUX.2 klein and Z-Image {flow}")
    assert (old, flow) == (int(n * strength), n - int(n - n * strength)), "this has changed"
    seen.add(flow - old)
assert seen == {0, 1}, "this has changed"
PY
