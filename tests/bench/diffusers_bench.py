"""One guided SD1.5 step and one VAE decode at 512x512 with diffusers on the CPU, to stand beside `sdgen bench`.

    pip install torch diffusers==0.42.1 && python tests/bench/diffusers_bench.py [f32|bf16]
"""
import sys
import time
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

DTYPE = {"f32": torch.float32, "bf16": torch.bfloat16}[sys.argv[1] if len(sys.argv) > 1 else "f32"]

def report(name, work):
    seconds = []
    for _ in range(4):
        start = time.time(); work(); seconds.append(time.time() - start)
    seconds = sorted(seconds[1:])
    print(f"{name:<22}{seconds[1]:8.2f} s median, {seconds[0]:.2f} s best", flush=True)

def ready(model):
    return model.eval().to(DTYPE).to(memory_format=torch.channels_last)

with torch.no_grad():
    unet = ready(UNet2DConditionModel(cross_attention_dim=768))
    x, context = torch.randn(2, 4, 64, 64).to(DTYPE).to(memory_format=torch.channels_last), torch.randn(2, 77, 768).to(DTYPE)
    report("U-Net step, guided", lambda: unet(x, 500, context).sample)
    del unet
    vae = ready(AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4))
    report("VAE decode", lambda: vae.decode(x[:1]).sample)
