"""sdgen beside diffusers on a GPU, one after the other in one run, as one table: guided steps, decodes, a whole picture.

    python tests/bench/gpu_bench.py SDGEN [cuda|cpu]      SDGEN: the program; cpu: tiny sizes, to see that it runs

diffusers runs eagerly, and compiled with channels_last (max-autotune-no-cudagraphs). The ceiling is this GPU's best matrix product.
"""
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

SDGEN = sys.argv[1]
DEVICE = sys.argv[2] if len(sys.argv) > 2 else "cuda"
SMALL = DEVICE == "cpu"
TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def synchronize():
    if not SMALL:
        torch.cuda.synchronize()


def seconds(work, repeats=10):
    """The median of some runs after two that are not counted."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


def ceiling():
    """Floating-point operations a second of a large matrix product in f16."""
    side = 512 if SMALL else 8192
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.float32 if SMALL else torch.float16) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b)


def sdgen(*arguments):
    """What `sdgen bench` says, or nothing if it fails, which it then says itself."""
    command = [SDGEN, "bench", "--device", DEVICE, *arguments, "--json"]
    result = subprocess.run(command, stdout=subprocess.PIPE)
    return json.loads(result.stdout) if result.returncode == 0 else {}


def unet(size):
    if SMALL:
        return UNet2DConditionModel(cross_attention_dim=32, block_out_channels=(32, 64), attention_head_dim=4, norm_num_groups=8,
                                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    if size == "sd15":
        return UNet2DConditionModel(cross_attention_dim=768)
    return UNet2DConditionModel(
        cross_attention_dim=2048, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20), use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))


def step(model, size, batch, dtype):
    """A guided step: two rows a picture."""
    side = 8 if SMALL else {"sd15": 64, "sdxl": 128}[size]
    width = 32 if SMALL else {"sd15": 768, "sdxl": 2048}[size]
    kwargs = {"device": DEVICE, "dtype": dtype}
    x = torch.randn(2 * batch, 4, side, side, **kwargs).to(memory_format=torch.channels_last)
    context = torch.randn(2 * batch, 77, width, **kwargs)
    t = torch.tensor(500, device=DEVICE)
    added = None
    if size == "sdxl" and not SMALL:
        added = {"text_embeds": torch.randn(2 * batch, 1280, **kwargs), "time_ids": torch.full((2 * batch, 6), 1024.0, **kwargs)}
    return lambda: model(x, t, context, added_cond_kwargs=added).sample


def timed(work):
    """Milliseconds, or nothing if it fails: one row must not end the table."""
    try:
        return 1e3 * seconds(work, 3 if SMALL else 10)
    except Exception as error:
        print(f"failed: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return None


def row(name, ours, eager, compiled, limit, memory):
    """`ours` is a part of the report of `sdgen bench`."""
    ms = ours.get("best_s") and 1e3 * ours["median_s"]
    show = lambda x: "failed" if x is None else f"{x:.2f}"
    ratio = lambda theirs: "" if ms is None or theirs is None else f" ({theirs / ms:.2f}x)"
    share = "" if ms is None else f"{100 * ours['tflop'] * 1e12 / (ms / 1e3) / limit:.0f} %"
    peak = "" if memory is None else f"{memory / 1024:.2f} GiB"
    print(f"| {name} | {show(ms)} | {show(eager)}{ratio(eager)} | {show(compiled)}{ratio(compiled)} | {share} | {peak} |", flush=True)


def whole_picture():
    """SD1.5 with random weights, from start to saved file, and what a further picture takes; with and without a warm disk cache."""
    shapes = json.load(open(os.path.join(os.path.dirname(__file__), "../fixtures/real_sd1.json")))
    with tempfile.TemporaryDirectory() as folder:
        make = lambda shape: torch.randn(shape) * 0.7 / max(1, torch.Size(shape[1:]).numel()) ** 0.5 if len(shape) > 1 else torch.zeros(shape)
        weights = {name: make(shape).half() for name, shape in shapes.items() if not name.endswith("position_ids")}
        weights |= {name: torch.ones_like(w) for name, w in weights.items() if w.ndim == 1 and name.endswith("weight")}
        save_file(weights, f"{folder}/sd15.safetensors")
        took = []
        for count in (1, 1, 5):
            start = time.perf_counter()
            command = [SDGEN, "a frog", "-m", f"{folder}/sd15.safetensors", "--device", DEVICE, "--steps", "20", "-n", str(count), "-o", f"{folder}/out/", "-q"]
            subprocess.run(command, check=False)
            took.append(time.perf_counter() - start)
    print(f"\nSD1.5 at 512x512, 20 steps, start to file: {took[1]:.2f} s; a further picture: {(took[2] - took[1]) / 4:.2f} s")


@torch.no_grad()
def main():
    limit = ceiling()
    print(f"this GPU's ceiling: {limit / 1e12:.0f} TFLOP/s\n")
    print("| milliseconds | sdgen | diffusers, eager | diffusers, compiled | of the ceiling | sdgen's GPU memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, dtype in TYPES.items():
        dtype = torch.float32 if SMALL else dtype
        for size in ("sd15", "sdxl"):
            model = unet(size).to(DEVICE, dtype).to(memory_format=torch.channels_last).eval()
            fast = torch.compile(model, mode="max-autotune-no-cudagraphs") if not SMALL else model
            for batch in (1, 16) if size == "sd15" else (1,):
                theirs = [timed(step(m, size, batch, dtype)) for m in (model, fast)]
                torch.cuda.empty_cache()
                ours = sdgen("--size", "mini" if SMALL else size, "--batch", str(batch), "--dtype", name, "--only", "unet", "-n", "2" if SMALL else "20")
                row(f"{size} step, batch {batch}, {name}", ours.get("unet_step") or {}, *theirs, limit, ours.get("peak_gpu_memory_mb"))
            del model, fast
        vae = AutoencoderKL(block_out_channels=(32, 64) if SMALL else (128, 256, 512, 512), layers_per_block=2,
                            down_block_types=["DownEncoderBlock2D"] * (2 if SMALL else 4),
                            up_block_types=["UpDecoderBlock2D"] * (2 if SMALL else 4)).to(DEVICE, dtype).eval()
        z = torch.randn(1, 4, 8 if SMALL else 64, 8 if SMALL else 64, device=DEVICE, dtype=dtype)
        theirs = timed(lambda: vae.decode(z).sample)
        ours = sdgen("--size", "mini" if SMALL else "sd15", "--only", "vae", "-n", "2" if SMALL else "10")
        row(f"VAE decode, ours f32, theirs {name}", ours.get("vae_decode") or {}, theirs, None, limit, ours.get("peak_gpu_memory_mb"))
        if SMALL:
            return
    whole_picture()


main()
