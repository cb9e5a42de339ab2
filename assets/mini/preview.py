"""Fits what `--show` draws while sdgen denoises: a linear map from the embedded model's latents to small pictures.

    python preview.py path/to/sdgen ../mini.safetensors preview.json

Draws the exam's things in both styles with sdgen, encodes them with the model's own VAE, and fits by least squares, with a ridge, from a
latent of 32 channels and a 1 to the 4x4 pixels of RGB, each the mean of 4x4 of the picture's, that its 16x16 pixels become.
A row of the map for each value, in the order of [4, 4, 3].
"""
import json, subprocess, sys, tempfile
from pathlib import Path
import numpy as np, torch
from PIL import Image
from diffusers import AutoencoderKL
from safetensors import safe_open

SIDE = 4
RIDGE = 0.01
PLAIN = Path(__file__).with_name("exam.py").read_text().split('PLAIN = """')[1].split('"""')[0].replace("\n", "").split("|")
sdgen, model, out = sys.argv[1:]
with safe_open(model, "pt") as file:
    config = json.loads(file.metadata()["sdgen.configs"])["vae"]
    weights = {key: file.get_tensor(key).float() for key in file.keys() if key.startswith("vae.")}
for key in [key for key in weights if key.endswith("_scale")]:
    weights[key.removesuffix("_scale")] *= weights.pop(key).reshape(-1, *[1] * (weights[key.removesuffix("_scale")].ndim - 1))
vae = AutoencoderKL.from_config(config)
vae.load_state_dict({key.removeprefix("vae."): value for key, value in weights.items()})
with tempfile.TemporaryDirectory() as folder:
    prompts = "\n".join(f"a {thing}{style}" for thing in PLAIN for style in ["", ", 3d", " on a blue background"])
    subprocess.run([sdgen, "--from", "-", "-s", "1", "-o", f"{folder}/{{index}}.png"], input=prompts, text=True, check=True, stdout=subprocess.DEVNULL)
    pictures = [np.asarray(Image.open(path)) / 255 for path in sorted(Path(folder).glob("*.png"))]
rgb = torch.tensor(np.stack(pictures)).float().permute(0, 3, 1, 2)  # [n, 3, 128, 128]
with torch.no_grad():
    latents = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in rgb.split(16)]) * config["scaling_factor"]  # [n, 32, 8, 8]
small = torch.nn.functional.interpolate(rgb, size=8 * SIDE, mode="area")
patches = small.unflatten(3, (8, SIDE)).unflatten(2, (8, SIDE)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(0, 2)  # [n * 64, 48]
ones = torch.cat([latents.permute(0, 2, 3, 1).flatten(0, 2), torch.ones(len(patches), 1)], 1)  # [n * 64, 33]
ones, patches = ones.double(), patches.double()
# a ridge: channels that hardly vary in finished pictures would have shares that turn a guess's errors into noise
ridge = RIDGE * len(ones) * torch.eye(ones.shape[1]).double()
fitted = torch.linalg.solve(ones.T @ ones + ridge, ones.T @ patches).T  # [48, 33]
error = ((ones @ fitted.T).clamp(0, 1) - patches).square().mean()
rows = ",\n".join("[" + ",".join(f"{value:.3f}" for value in row) + "]" for row in fitted.tolist())
Path(out).write_text(f"[{rows}]\n")
print(f"{len(pictures)} pictures, {-10 * error.log10():.1f} dB")
