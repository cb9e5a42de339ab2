"""Guided steps and decodes with diffusers on a GPU, eager and compiled with channels_last, to stand beside `sdgen bench --device cuda`.

    python tests/bench/gpu_bench.py [cuda|cpu]      (cpu: tiny sizes, to see that it runs)
"""
import sys
import time

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"
SMALL = DEVICE == "cpu"


def seconds(work, repeats):
    """The median of some runs after two that are not counted."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        if not SMALL:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


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


def report(name, work, repeats):
    if not SMALL:
        torch.cuda.reset_peak_memory_stats()
    try:
        took = f"{1e3 * seconds(work, repeats):9.2f} ms"
    except Exception as error:  # one row must not end the table
        took = f"failed: {type(error).__name__}: {str(error)[:80]}"
    peak = "" if SMALL else f", peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    print(f"{name:<46}{took}{peak}", flush=True)


@torch.no_grad()
def main():
    for dtype in (torch.float16, torch.bfloat16):
        if SMALL:
            dtype = torch.float32
        kind = str(dtype).removeprefix("torch.")
        for size in ("sd15", "sdxl"):
            model = unet(size).to(DEVICE, dtype).to(memory_format=torch.channels_last).eval()
            fast = torch.compile(model, mode="max-autotune-no-cudagraphs") if not SMALL else model
            for batch in (1, 16) if size == "sd15" else (1,):
                report(f"diffusers {size} batch {batch} {kind}, eager", step(model, size, batch, dtype), 10)
                report(f"diffusers {size} batch {batch} {kind}, compiled", step(fast, size, batch, dtype), 10)
            del model, fast
        vae = AutoencoderKL(block_out_channels=(32, 64) if SMALL else (128, 256, 512, 512), layers_per_block=2,
                            down_block_types=["DownEncoderBlock2D"] * (2 if SMALL else 4),
                            up_block_types=["UpDecoderBlock2D"] * (2 if SMALL else 4)).to(DEVICE, dtype).eval()
        z = torch.randn(1, 4, 8 if SMALL else 64, 8 if SMALL else 64, device=DEVICE, dtype=dtype)
        report(f"diffusers VAE decode {kind}, eager", lambda: vae.decode(z).sample, 10)
        if SMALL:
            break


main()
