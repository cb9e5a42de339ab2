"""Packs a diffusers folder into the one file that sdgen embeds: python export.py out/model ../mini.safetensors

Weights in f16 under sdgen's canonical names; configurations and tokenizer in the header. The VAE's encoder stays out.
"""
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file

folder, out = Path(sys.argv[1]), sys.argv[2]
tensors = {}
for part, file in [("text_encoder", "model"), ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")]:
    for key, value in load_file(folder / part / f"{file}.safetensors").items():
        if part == "vae" and (key.startswith("encoder.") or key.startswith("quant_conv.")) or key.endswith("position_ids"): continue
        if part == "text_encoder" and not key.startswith("text_model."): key = "text_model." + key
        tensors[f"{part}.{key}"] = value.to(torch.float16).contiguous()
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
print(out, sum(t.numel() for t in tensors.values()) / 1e6, "M parameters")
