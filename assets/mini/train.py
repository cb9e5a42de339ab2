"""Trains the embedded model of sdgen.

    python train.py data [--preset small|full]           a sheet of training pictures
    python train.py vae MINUTES [--preset small|full]    the autoencoder
    python train.py unet MINUTES [--preset small|full]   text encoder and U-Net, on latents of that autoencoder
    python train.py decoder MINUTES [--preset ...]       the decoder once more; its latents stay what they are

`small` is what two CPU cores can do in some hours; `full` (every thing, every style) wants a GPU, which is used when there is
one: bf16, compiled, larger batches. Needs the pictures of fetch.sh and render.py, torch, diffusers, transformers, tokenizers.
Each stage works for a fixed time, writes a checkpoint every two minutes into $OUT (default: out), and goes on from it when it
is started again; the learning rate depends on the share of the time that is spent, so an interruption changes nothing else.
"""
import argparse, json, os, random, time
from dataclasses import dataclass
import numpy as np, torch
from torch.utils.data import DataLoader, IterableDataset
import compose, things
from compose import Synth, clean
from diffusers import AutoencoderKL, UNet2DConditionModel, DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from PIL import Image

SIZE, MAX_TOKENS, OUT = compose.S, 32, os.environ.get("OUT", "out")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
COLORS = ["white", "black", "gray", "red", "orange", "yellow", "green", "blue", "light blue", "purple", "pink"]


@dataclass
class Preset:
    sets: tuple             # styles
    small: bool             # the things of things.py, or all
    vae: tuple              # channels of each level
    latents: int            # channels of the latent
    unet: tuple             # channels of each level
    heads: tuple
    layers: int             # residual blocks a level
    text: tuple             # width, layers
    words: int              # size of the vocabulary
    vae_batch: int
    unet_batch: int
    pool: int               # latents kept in memory; old ones are replaced by fresh ones all the time
    refresh: int            # steps per fresh batch


PRESETS = {
    "small": Preset(("fluentfl", "fluent3d"), True, (8, 16, 32, 64, 128), 32, (64, 160), (2, 4), 1, (128, 3), 2000, 16, 128, 65_536, 16),
    "full": Preset(("noto", "noto1", "twemoji", "fluent3d", "fluent", "fluentfl", "fx", "streamline"), False, (32, 64, 96, 128), 8, (80, 128, 192), (2, 4, 6), 1,
                   (192, 4), 4000, 64, 512, 400_000, 1),
}


def pictures(preset, seed):
    p = PRESETS[preset]
    kinds = dict(sets=p.sets, styled=.45)
    if not p.small: return Synth(seed, **kinds)
    group = {m["label"]: m["group"] for m in json.load(open(f"{compose.ROOT}/emoji.json"))}
    return Synth(seed, things=things.small(group), colors=COLORS, hats=["top hat", "crown", "graduation cap"], **kinds)


class Stream(IterableDataset):
    """Batches of pictures in -1..1, [b, 3, 128, 128], with their captions."""
    def __init__(self, preset, seed, batch): self.preset, self.seed, self.batch = preset, seed, batch

    def __iter__(self):
        worker = torch.utils.data.get_worker_info(); torch.set_num_threads(1)
        source = pictures(self.preset, self.seed * 1_000_003 + worker.id + int(time.time()) % 100_000 * 64)
        while True:
            items = [source.sample()[:2] for _ in range(self.batch)]
            yield torch.from_numpy(np.stack([a for a, _ in items])), [c for _, c in items]


def stream(preset, batch, seed):
    workers = max(1, (os.cpu_count() or 2) - 2) if CUDA else 1
    for x, captions in DataLoader(Stream(preset, seed, batch), batch_size=None, num_workers=workers, prefetch_factor=4):
        yield x.to(DEVICE, non_blocking=True).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last), captions


def rate(k, done, peak, warm=100, floor=.02):
    """Learning rate: warm-up, flat for half of the time, then a straight line down."""
    return peak * min(1, (k + 1) / warm) * (1 if done < .5 else max(floor, (1 - done) / .5))


def psnr(a, b): return 10 * torch.log10(4 / ((a.float() - b.float()) ** 2).mean()).item()


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal by five Newton-Schulz steps (Jordan 2024, "Muon"); a kernel counts as a matrix [out, in * k * k]."""
    def __init__(self, parameters, lr): super().__init__(parameters, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state: state["momentum"] = torch.zeros_like(p)
                u = p.grad.lerp(state["momentum"].lerp_(p.grad, .05), .95).flatten(1); tall = u.shape[0] > u.shape[1]
                u = u.T if tall else u; u = u / (u.norm() + 1e-7)
                for _ in range(5): a = u @ u.T; u = 3.4445 * u + (-4.7750 * a + 2.0315 * a @ a) @ u
                u = u.T if tall else u
                p.mul_(1 - .01 * group["lr"]).add_(u.reshape(p.shape), alpha=-group["lr"] * max(1, p.shape[0] / p[0].numel()) ** .5)


def optimizers(*modules):
    """Muon for the matrices and kernels inside, AdamW for embeddings, biases, norms, and the first and last convolution."""
    edges = {"conv_in.weight", "conv_out.weight", "encoder.conv_in.weight", "decoder.conv_out.weight"}
    named = [(n, q) for m in modules for n, q in m.named_parameters() if q.requires_grad]
    inside = {q for n, q in named if q.ndim > 1 and n not in edges and "embed" not in n}
    return Muon([q for _, q in named if q in inside], 0.), torch.optim.AdamW([q for _, q in named if q not in inside], 0., betas=(.9, .95), weight_decay=1e-3)


def quiet(module):
    """Residual branches that begin as nothing: the network starts nearly linear and learns some four times as fast."""
    for n, q in module.named_parameters():
        if n.endswith(("conv2.weight", "proj_out.weight", "to_out.0.weight", "ff.net.2.weight")): torch.nn.init.zeros_(q)
    for n, m in module.named_modules():
        if n.endswith(("conv_shortcut", "samplers.0.conv")): m.weight.data.mul_(1.7)  # their share of the signal at the start
    return module


def descend(loss, optimizers, peaks, run):
    for opt, peak in zip(optimizers, peaks): opt.param_groups[0]["lr"] = rate(run.k, run.done(), peak); opt.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([q for opt in optimizers for q in opt.param_groups[0]["params"]], 1.)
    for opt in optimizers: opt.step()


class Run:
    """The clock, the checkpoint and the log of one stage."""
    def __init__(self, name, minutes, parts):
        self.budget, self.parts, self.path = minutes * 60, parts, f"{OUT}/{name}.pt"
        self.spent, self.k, self.log = 0., 0, []
        if os.path.exists(self.path):
            state = torch.load(self.path, weights_only=False, map_location=DEVICE); self.spent, self.k = state["spent"], state["k"]
            for part, s in zip(parts, state["parts"]): part.load_state_dict(s)
            print("resumed at", round(self.spent), "s", flush=True)
        self.last = self.saved = time.time()

    def done(self): return self.spent / self.budget

    def save(self):
        torch.save(dict(spent=self.spent, k=self.k, parts=[p.state_dict() for p in self.parts]), self.path + ".tmp")
        os.replace(self.path + ".tmp", self.path); self.saved = time.time()

    def after_step(self, batch, value, unit):
        """Counts a step; true when it is time for a checkpoint."""
        now = time.time(); self.spent += min(now - self.last, 20); self.last = now  # a pause does not count
        self.k += 1; self.log.append(value)
        if self.k % 100 == 0:
            mean = torch.stack(self.log).mean().item(); self.log = []
            print(f"{self.spent:.0f}s step {self.k} pictures {batch*self.k} {batch*self.k/self.spent:.0f}/s {unit} {mean:.4f}", flush=True)
        return time.time() - self.saved > 120


def autocast(): return torch.autocast("cuda", torch.bfloat16, enabled=CUDA)
def compiled(f): return torch.compile(f) if CUDA else f


def train_vae(preset, minutes, stage):
    p = PRESETS[preset]; torch.manual_seed(0); alone = stage == "decoder"
    levels = len(p.vae)
    vae = AutoencoderKL.from_pretrained(f"{OUT}/vae").to(DEVICE, memory_format=torch.channels_last) if alone else quiet(AutoencoderKL(in_channels=3, out_channels=3, latent_channels=p.latents, block_out_channels=p.vae, layers_per_block=1, norm_num_groups=4,
                        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels, sample_size=SIZE)).to(DEVICE, memory_format=torch.channels_last)
    if alone: vae.encoder.requires_grad_(False); vae.quant_conv.requires_grad_(False)
    opts, peaks = optimizers(vae), (.02, 2e-3)
    print("vae", sum(q.numel() for q in vae.parameters()) / 1e6, "M", flush=True)
    run = Run(stage, minutes, [vae, *opts]); batches = stream(preset, p.vae_batch, 5 if alone else 1)

    @compiled
    def step(x, noise):
        dist = vae.encode(x).latent_dist; y = vae.decode(dist.mean + dist.std * noise).sample.float()
        edges = (y.diff(dim=-1) - x.diff(dim=-1)).abs().mean() + (y.diff(dim=-2) - x.diff(dim=-2)).abs().mean()
        square = ((y - x) ** 2).mean()
        return (y - x).abs().mean() + edges + square + 1e-4 * dist.kl().mean() / (3 * 64 * 64), square

    side = SIZE >> (levels - 1)
    while run.done() < 1:
        x, _ = next(batches)
        with autocast(): loss, square = step(x, torch.randn(len(x), p.latents, side, side, device=DEVICE))
        descend(loss, opts, peaks, run)
        if run.after_step(p.vae_batch, 10 * torch.log10(4 / square.detach()), "psnr"): run.save()
    run.save(); vae.eval(); held_out = stream(preset, 64, 99)
    with torch.no_grad():
        # one scale for all channels: their spread about their own mean is what the U-Net must model
        z = torch.cat([vae.encode(next(held_out)[0]).latent_dist.mean for _ in range(8)])
        if not alone: vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
        x, _ = next(held_out); y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        print("scale", vae.config.scaling_factor, "held-out psnr", psnr(y, x), "median", np.median([psnr(a, b) for a, b in zip(x, y)]))
    rows = [np.concatenate(list(v[:12].add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()), 1) for v in (x, y)]
    Image.fromarray(np.concatenate(rows)).save(f"{OUT}/vae.png"); vae.save_pretrained(f"{OUT}/vae")
    if alone: vae.save_pretrained(f"{OUT}/model/vae")


def tokenizer(preset):
    """CLIP's kind of byte-level BPE, trained on the captions."""
    from tokenizers import Tokenizer, models, trainers, pre_tokenizers, normalizers, Regex
    p = pictures(preset, 3); r = random.Random(0)
    words = [clean(l) for l in p.labels] * 20 + [t for l in p.labels for t in p.synonyms[l]] * 8
    captions = [p.sample()[1] for _ in range(6000)] + words; r.shuffle(captions)
    t = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=PRESETS[preset].words, end_of_word_suffix="</w>", initial_alphabet=alphabet, special_tokens=[]))
    merges = [" ".join(m) if isinstance(m, list) else m for m in json.loads(t.to_str())["model"]["merges"]]
    vocab = list(dict.fromkeys(alphabet + [a + "</w>" for a in alphabet] + ["".join(m.split()) for m in merges])) + ["<|startoftext|>", "<|endoftext|>"]
    folder = f"{OUT}/model/tokenizer"; os.makedirs(folder, exist_ok=True)
    json.dump({w: i for i, w in enumerate(vocab)}, open(f"{folder}/vocab.json", "w"), ensure_ascii=False)
    open(f"{folder}/merges.txt", "w").write("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    json.dump(special, open(f"{folder}/special_tokens_map.json", "w"))
    json.dump(dict(tokenizer_class="CLIPTokenizer", model_max_length=MAX_TOKENS, do_lower_case=True, **special), open(f"{folder}/tokenizer_config.json", "w"))
    return CLIPTokenizer.from_pretrained(folder)


class Pool:
    """Latents with their token ids, some of them replaced by fresh ones while training goes on."""
    def __init__(self, preset, vae, tok):
        p = PRESETS[preset]; self.vae, self.tok, self.limit, self.at = vae, tok, p.pool, 0
        self.batches = stream(preset, p.unet_batch, int(time.time()) % 1000 + 2)
        cache, begin = f"{OUT}/latents.pt", time.time()
        if os.path.exists(cache): self.z, self.ids = (v.to(DEVICE) for v in torch.load(cache)); return
        parts = [self.fresh() for _ in range(p.pool // 3 // p.unet_batch)]
        self.z, self.ids = torch.cat([z for z, _ in parts]), torch.cat([i for _, i in parts])
        torch.save((self.z, self.ids), cache); print("latents", len(self.z), f"{time.time()-begin:.0f}s", flush=True)

    def tokens(self, captions): return self.tok(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids.to(DEVICE)

    @torch.no_grad()
    def fresh(self):
        x, captions = next(self.batches)
        with autocast(): z = self.vae.encode(x).latent_dist.mean.float() * self.vae.config.scaling_factor
        return z, self.tokens(captions)

    def refresh(self):
        z, ids = self.fresh()
        if len(self.z) + len(z) <= self.limit: self.z, self.ids = torch.cat([self.z, z]), torch.cat([self.ids, ids]); return
        at = self.at % (len(self.z) - len(z) + 1); self.z[at:at+len(z)] = z; self.ids[at:at+len(z)] = ids; self.at = at + len(z)

    def draw(self, n):
        i = torch.randint(len(self.z), (n,), device=DEVICE); return self.z[i], self.ids[i]


def train_unet(preset, minutes):
    p = PRESETS[preset]; torch.manual_seed(0); tok = tokenizer(preset); n = len(tok); print("vocabulary", n, tok("a frog in a top hat").input_ids)
    vae = AutoencoderKL.from_pretrained(f"{OUT}/vae").to(DEVICE, memory_format=torch.channels_last).eval()
    width, depth = p.text
    text = CLIPTextModel(CLIPTextConfig(vocab_size=n, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=width // 32, max_position_embeddings=MAX_TOKENS,
                                        hidden_act="quick_gelu", bos_token_id=n - 2, eos_token_id=n - 1, pad_token_id=n - 1, projection_dim=width)).to(DEVICE)
    levels = len(p.unet)
    unet = quiet(UNet2DConditionModel(sample_size=SIZE >> (len(p.vae) - 1), in_channels=p.latents, out_channels=p.latents, block_out_channels=p.unet, layers_per_block=p.layers,
                                cross_attention_dim=width, attention_head_dim=list(p.heads), norm_num_groups=16,
                                down_block_types=["CrossAttnDownBlock2D"] * levels, up_block_types=["CrossAttnUpBlock2D"] * levels)).to(DEVICE, memory_format=torch.channels_last)
    print("unet", sum(q.numel() for q in unet.parameters()) / 1e6, "text", sum(q.numel() for q in text.parameters()) / 1e6, flush=True)
    sch = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing", steps_offset=1)
    sch.alphas_cumprod = sch.alphas_cumprod.to(DEVICE)
    pool = Pool(preset, vae, tok); empty = pool.tokens([""])
    ps = list(unet.parameters()) + list(text.parameters()); opts = optimizers(unet, text)
    ema_unet, ema_text = UNet2DConditionModel.from_config(unet.config).to(DEVICE), CLIPTextModel(text.config).to(DEVICE)
    ema_unet.load_state_dict(unet.state_dict()); ema_text.load_state_dict(text.state_dict()); ema = list(ema_unet.parameters()) + list(ema_text.parameters())
    run = Run("unet", minutes, [unet, text, ema_unet, ema_text, *opts])

    @compiled
    def step(xt, t, tokens, target):
        return ((unet(xt, t, text(tokens).last_hidden_state).sample.float() - target) ** 2).mean()

    def save():
        run.save()
        StableDiffusionPipeline(vae=vae, text_encoder=ema_text, tokenizer=tok, unet=ema_unet, scheduler=sch, safety_checker=None, feature_extractor=None,
                                requires_safety_checker=False).save_pretrained(f"{OUT}/model", safe_serialization=True)
    while run.done() < 1:
        if run.k % p.refresh == 0: pool.refresh()
        x0, tokens = pool.draw(p.unet_batch); tokens[torch.rand(len(tokens), device=DEVICE) < .1] = empty
        t = torch.randint(0, 1000, (len(x0),), device=DEVICE); noise = torch.randn_like(x0); xt = sch.add_noise(x0, noise, t)
        with autocast(): loss = step(xt.contiguous(memory_format=torch.channels_last), t, tokens, sch.get_velocity(x0, noise, t))
        descend(loss, opts, (.01, 1e-3), run)
        d = min(.9995, (run.k + 1) / (run.k + 10))
        with torch.no_grad(): torch._foreach_lerp_(ema, ps, 1 - d)
        if run.after_step(p.unet_batch, loss.detach(), "loss"): save()
    save()


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("stage", choices=["data", "vae", "unet", "decoder"]); a.add_argument("minutes", nargs="?", type=float, default=30); a.add_argument("--preset", choices=PRESETS, default="small")
    a = a.parse_args(); os.makedirs(OUT, exist_ok=True)
    if not CUDA: torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    if a.stage in ("vae", "decoder"): train_vae(a.preset, a.minutes, a.stage)
    elif a.stage == "unet": train_unet(a.preset, a.minutes)
    else:
        p = pictures(a.preset, 1); print(len(p.labels), "things,", len({f[0] for f in p.faces}), "faces")
        compose.grid([p.sample(k)[:2] for k in ["single"] * 24 + ["accessory"] * 48 + ["two"] * 12 + ["count"] * 12], f"{OUT}/data.png", cols=12)
