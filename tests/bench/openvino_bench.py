"""The same step and decode as diffusers_bench.py with OpenVINO, whose model is traced from diffusers'.

    pip install torch diffusers==0.42.1 openvino==2026.4.1 && python tests/bench/openvino_bench.py [f32|bf16]
"""
import sys
import time
import warnings
import openvino
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

HINT = sys.argv[1] if len(sys.argv) > 1 else "f32"
warnings.filterwarnings("ignore")

class Step(torch.nn.Module):
    def __init__(self): super().__init__(); self.unet = UNet2DConditionModel(cross_attention_dim=768)
    def forward(self, x, t, context): return self.unet(x, t, context, return_dict=False)[0]

class Decode(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    def forward(self, z): return self.vae.decode(z, return_dict=False)[0]

def report(name, module, inputs):
    core = openvino.Core()
    with torch.no_grad():
        model = openvino.convert_model(module.eval(), example_input=inputs)
    del module
    model = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": HINT, "PERFORMANCE_HINT": "LATENCY"})
    arrays, seconds = [x.numpy() for x in inputs], []
    for _ in range(4):
        start = time.time(); model(arrays); seconds.append(time.time() - start)
    seconds = sorted(seconds[1:])
    print(f"{name:<22}{seconds[1]:8.2f} s median, {seconds[0]:.2f} s best", flush=True)

report("U-Net step, guided", Step(), (torch.randn(2, 4, 64, 64), torch.tensor(500), torch.randn(2, 77, 768)))
report("VAE decode", Decode(), (torch.randn(1, 4, 64, 64),))
