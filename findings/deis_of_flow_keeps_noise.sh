#!/usr/bin/env bash
# One would guess: with use_flow_sigmas diffusers' multistep schedulers all run down to a sigma of 0, as DPMSolverMultistep, DPMSolverSinglestep and UniPC do.
# So it is not: DEISMultistep and SASolver end their list by its last level once more, so that the last step goes nowhere: with a shift of 3 the result holds 0.5 of the noise after 4 steps, and 0.14 after 20.
# It hits whoever swaps the scheduler of Z-Image, FLUX or SANA for one of these two: pictures are grainy at any number of steps, and no setting of the class ends the run at 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PY'
import warnings

warnings.filterwarnings("ignore")
import diffusers
import torch

SHAPE = (1, 4, 16, 16)
left = {}
print(f"diffusers {diffusers.__version__}: noise left in the result, of 1")
for name in ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
             "DEISMultistepScheduler", "SASolverScheduler"]:
    for steps in (4, 20):
        scheduler = getattr(diffusers, name)(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
        scheduler.set_timesteps(steps)
        g = torch.Generator().manual_seed(1)
        picture, x = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g)
        step = {"generator": g} if name == "SASolverScheduler" else {}
        for i, t in enumerate(scheduler.timesteps):
            # the exact velocity where there is one picture only
            velocity = (x - picture) / scheduler.sigmas[i]
            x = scheduler.step(velocity, t, x, **step).prev_sample
        end = float(scheduler.sigmas[-1])
        # the part of the result that is not the picture
        rest = x - (1 - end) * picture
        left[name, steps] = float(rest.std())
        print(f"{name}, {steps} steps: {left[name, steps]:.4f}, last sigmas {[round(float(s), 4) for s in scheduler.sigmas[-3:]]}")
for name in ["DEISMultistepScheduler", "SASolverScheduler"]:
    assert 0.4 < left[name, 4] < 0.6 and 0.1 < left[name, 20] < 0.2, "this has changed"
for name in ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]:
    assert left[name, 4] < 0.01 and left[name, 20] < 0.01, "this has changed"
PY
