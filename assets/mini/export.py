"""Packs a diffusers folder into the one file that sdgen embeds: python export.py out/model ../mini.safetensors

Matrices and kernels in 8 bits with one scale per row (output channel), all else in f16, under sdgen's canonical names;
configurations and tokenizer in the header.
"""
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file

folder, out = Path(sys.argv[1]), sys.argv[2]
tensors, error = {}, []
for part, file in [("text_encoder", "model"), ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")]:
    for key, value in load_file(folder / part / f"{file}.safetensors").items():
        if key.endswith("position_ids"): continue
        if part == "text_encoder" and not key.startswith("text_model."): key = "text_model." + key
        name, value = f"{part}.{key}", value.float()
        if value.ndim > 1 and value.numel() >= 2048:
            rows = value.flatten(1); scale = rows.abs().amax(1).clamp(min=1e-12) / 127
            steps = (rows / scale[:, None]).round().clamp(-127, 127)
            error.append((((steps * scale[:, None] - rows) ** 2).mean() / (rows ** 2).mean()).item())
            tensors[name], tensors[name + "_scale"] = steps.to(torch.int8).reshape(value.shape).contiguous(), scale
        else: tensors[name] = value.to(torch.float16).contiguous()
read = lambda path: json.loads((folder / path).read_text())
configs = {part: read(f"{part}/config.json") for part in ("text_encoder", "unet", "vae")}
configs["scheduler"] = read("scheduler/scheduler_config.json")
# chosen by eye from sheets of pictures
configs["scheduler"].update(_class_name="DPMSolverMultistepScheduler", timestep_spacing="trailing", final_sigmas_type="zero")
configs["tokenizer"] = read("tokenizer/tokenizer_config.json")
configs["defaults"] = {"steps": 20, "guidance": 2.5}
for config in configs.values(): config.pop("_name_or_path", None)
metadata = {"format": "pt", "sdgen.configs": json.dumps(configs), "sdgen.vocab": (folder / "tokenizer/vocab.json").read_text(), "sdgen.merges": (folder / "tokenizer/merges.txt").read_text()}
save_file(tensors, out, metadata)
print(out, sum(t.numel() for t in tensors.values()) / 1e6, "M parameters, relative error of 8 bits", (sum(error) / len(error)) ** .5)
