"""Trains the embedded model of sdgen.

    python train.py data [--preset small|full]                   a sheet of training pictures
    python train.py vae PICTURES [--start PACKED] [--preset ...]     the autoencoder
    python train.py unet PICTURES [--start PACKED] [--preset ...]    text encoder and U-Net, on latents of that autoencoder
    python train.py decoder PICTURES [--preset ...]              the decoder once more; its latents stay what they are

`small` is what two CPU cores can do in some hours; `full` (every style) wants a GPU, which is used when there is one: bf16,
compiled, larger batches. Needs the pictures of fetch.sh, render.py and words.py, torch, diffusers, transformers, tokenizers.
Each stage works for PICTURES pictures in all, however many sessions that takes: it writes a checkpoint every two minutes into
$OUT (default: out) and goes on from it when it is started again. While the file $PAUSE (default: PAUSE) is there it waits.
--start: a packed model (export.py) whose weights are the beginning where the shapes match.
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
PAUSE = os.environ.get("PAUSE", "PAUSE")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
COLORS = ["white", "black", "gray", "red", "orange", "yellow", "green", "blue", "light blue", "purple", "pink"]


@dataclass
class Preset:
    sets: tuple             # styles
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
    "small": Preset(("fluentfl", "fluent3d", "noto"), (8, 16, 32, 64, 128), 32, (64, 160), (2, 4), 1, (128, 3), 3300, 16, 128, 131_072, 8),
    "full": Preset(("noto", "noto1", "twemoji", "fluent3d", "fluent", "fluentfl", "fx", "streamline"), (32, 64, 96, 128), 8, (80, 128, 192), (2, 4, 6), 1,
                   (192, 4), 4000, 64, 512, 400_000, 1),
}


def pictures(preset, seed):
    p = PRESETS[preset]
    kinds = dict(sets=p.sets, styled=.45)
    group = {m["label"] for m in json.load(open(f"{compose.ROOT}/emoji.json"))}
    return Synth(seed, things=things.known(group), colors=COLORS, hats=["top hat", "crown", "graduation cap"], **kinds)


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
        yield scaled(x), captions


def scaled(x): return x.to(DEVICE, non_blocking=True).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def fixed(preset, n, seed):
    """`n` pictures that are the same in every session."""
    source = pictures(preset, seed); return scaled(torch.from_numpy(np.stack([source.sample()[0] for _ in range(n)])))


def rate(k, done, peak, flat, warm=100, floor=.02):
    """Learning rate: warm-up, flat for the share `flat` of the pictures, then a straight line down."""
    return peak * min(1, (k + 1) / warm) * (1 if done < flat else max(floor, (1 - done) / (1 - flat)))


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
                # the steps on the small side: with a = u u^T every iterate is a polynomial of a times u
                a = u @ u.T; eye = torch.eye(len(a), device=a.device); whole = eye
                for _ in range(5): q = 3.4445 * eye - 4.7750 * a + 2.0315 * a @ a; whole = q @ whole; a = q @ a @ q
                u = whole @ u; u = u.T if tall else u
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


def descend(loss, optimizers, peaks, run, flat=.5):
    for opt, peak in zip(optimizers, peaks): opt.param_groups[0]["lr"] = rate(run.k, run.done(), peak, flat); opt.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([q for opt in optimizers for q in opt.param_groups[0]["params"]], 1.)
    for opt in optimizers: opt.step()


class Run:
    """The clock, the checkpoint and the log of one stage. `budget` counts pictures, whatever the session."""
    def __init__(self, name, budget, batch, parts):
        self.budget, self.batch, self.parts, self.path = budget, batch, parts, f"{OUT}/{name}.pt"
        self.spent, self.k, self.log, self.steps = 0., 0, [], 0.
        if os.path.exists(self.path):
            state = torch.load(self.path, weights_only=False, map_location=DEVICE); self.spent, self.k = state["spent"], state["k"]
            for part, s in zip(parts, state["parts"]): part.load_state_dict(s)
            print("resumed at", round(self.spent), "s, step", self.k, flush=True)
        self.last = self.saved = time.time()

    def done(self): return self.k * self.batch / self.budget

    def save(self):
        torch.save(dict(spent=self.spent, k=self.k, parts=[p.state_dict() for p in self.parts]), self.path + ".tmp")
        os.replace(self.path + ".tmp", self.path); self.saved = time.time()

    def after_step(self, value, unit):
        """Counts a step; true when it is time for a checkpoint. While the file PAUSE is there, it waits."""
        now = time.time(); self.spent += now - self.last; self.steps += now - self.last; self.k += 1; self.log.append(value)
        if self.k % 50 == 0:
            mean = torch.stack(self.log).mean().item()
            print(f"{time.strftime('%H:%M:%S')} {self.spent:.0f}s step {self.k} pictures {self.batch*self.k} {self.batch*len(self.log)/self.steps:.1f}/s {unit} {mean:.4f}", flush=True); self.log, self.steps = [], 0.
        while os.path.exists(PAUSE): time.sleep(1)
        self.last = time.time(); return self.last - self.saved > 120


def autocast(): return torch.autocast("cuda", torch.bfloat16, enabled=CUDA)
def compiled(f): return torch.compile(f) if CUDA else f


def packed(path):
    """Configurations, weights, vocabulary and merges of a packed model (export.py)."""
    from safetensors import safe_open
    with safe_open(path, "pt") as f: meta = f.metadata(); w = {k: f.get_tensor(k).float() for k in f.keys()}
    for k in [k for k in w if k.endswith("_scale")]: b = k.removesuffix("_scale"); w[b] *= w.pop(k).reshape(-1, *[1] * (w[b].ndim - 1))
    return json.loads(meta["sdgen.configs"]), w, json.loads(meta["sdgen.vocab"]), meta["sdgen.merges"]


def part_of(weights, name): return {k.removeprefix(name + "."): v for k, v in weights.items() if k.startswith(name + ".")}


def recolored(x):
    """A third of the pictures with their channels in another order, so that no colour is strange to the autoencoder."""
    swap = torch.rand(len(x)) < .33
    for i in swap.nonzero().flatten().tolist(): x[i] = x[i, torch.randperm(3)]
    return x


def train_vae(preset, budget, stage, start):
    p = PRESETS[preset]; torch.manual_seed(0); alone = stage == "decoder"; levels = len(p.vae)
    if alone: vae = AutoencoderKL.from_pretrained(f"{OUT}/vae")
    else:
        vae = quiet(AutoencoderKL(in_channels=3, out_channels=3, latent_channels=p.latents, block_out_channels=p.vae, layers_per_block=1, norm_num_groups=4,
                                  down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels, sample_size=SIZE))
        if start: vae.load_state_dict(part_of(packed(start)[1], "vae"))
    vae = vae.to(DEVICE, memory_format=torch.channels_last)
    if alone: vae.encoder.requires_grad_(False); vae.quant_conv.requires_grad_(False)
    opts, peaks, flat = optimizers(vae), (.005, 5e-4) if start else (.02, 2e-3), .15 if start else .5
    print("vae", sum(q.numel() for q in vae.parameters()) / 1e6, "M", flush=True)
    run = Run(stage, budget, p.vae_batch, [vae, *opts]); batches = stream(preset, p.vae_batch, 5 if alone else 1)

    @compiled
    def step(x, noise):
        dist = vae.encode(x).latent_dist; y = vae.decode(dist.mean + dist.std * noise).sample.float()
        edges = (y.diff(dim=-1) - x.diff(dim=-1)).abs().mean() + (y.diff(dim=-2) - x.diff(dim=-2)).abs().mean()
        square = ((y - x) ** 2).mean()
        return (y - x).abs().mean() + edges + square + 1e-4 * dist.kl().mean() / (3 * 64 * 64), square

    side = SIZE >> (levels - 1); torch.manual_seed(run.k)
    kept = fixed(preset, 96, 99)

    def report():
        vae.eval()
        with torch.no_grad(): y = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) for x in kept.split(16)])
        vae.train(); each = [psnr(a, b) for a, b in zip(kept, y)]
        print(f"held-out psnr {psnr(kept, y):.2f} median {np.median(each):.2f}", flush=True); return y
    report()
    while run.done() < 1:
        x = recolored(next(batches)[0])
        with autocast(): loss, square = step(x, torch.randn(len(x), p.latents, side, side, device=DEVICE))
        descend(loss, opts, peaks, run, flat)
        if run.after_step(10 * torch.log10(4 / square.detach()), "psnr"): run.save()
        if run.k % 200 == 0: report()
    run.save(); y = report(); vae.eval()
    if not alone:
        # one scale for all channels: their spread about their own mean is what the U-Net must model
        with torch.no_grad(): z = torch.cat([vae.encode(x).latent_dist.mean for x in fixed(preset, 512, 98).split(64)])
        vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4)); print("scale", vae.config.scaling_factor)
    rows = [np.concatenate(list(v[:12].add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()), 1) for v in (kept, y)]
    Image.fromarray(np.concatenate(rows)).save(f"{OUT}/vae.png"); vae.save_pretrained(f"{OUT}/vae")
    if alone: vae.save_pretrained(f"{OUT}/model/vae")


def tokenizer(preset):
    """CLIP's kind of byte-level BPE, trained on the captions."""
    from tokenizers import Tokenizer, models, trainers, pre_tokenizers, normalizers, Regex
    p = pictures(preset, 3); r = random.Random(0)
    words = [clean(l) for l in p.labels] * 20 + [t for l in p.labels for t in p.synonyms[l]] * 8 + [t for v in p.kinds.values() for t in v] * 3 + [t for v in p.others.values() for t in v]
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
    """Latents (f16) with their token ids; fresh ones join while training goes on, and at the limit take the place of the oldest."""
    def __init__(self, preset, vae, tok):
        p = PRESETS[preset]; self.vae, self.tok, self.limit, self.at = vae, tok, p.pool, 0
        self.batches = stream(preset, p.unet_batch, int(time.time()) % 1000 + 2); self.path = f"{OUT}/latents.pt"; begin = time.time()
        if os.path.exists(self.path): self.z, self.ids, self.at = torch.load(self.path); self.z, self.ids = self.z.to(DEVICE), self.ids.to(DEVICE); self.saved = len(self.z); return
        parts = []
        while len(parts) * p.unet_batch < p.pool // 16:
            while os.path.exists(PAUSE): time.sleep(1)
            parts.append(self.fresh())
        self.z, self.ids = torch.cat([z for z, _ in parts]), torch.cat([i for _, i in parts]); self.save(); print("latents", len(self.z), f"{time.time()-begin:.0f}s", flush=True)

    def save(self): torch.save((self.z, self.ids, self.at), self.path + ".tmp"); os.replace(self.path + ".tmp", self.path); self.saved = len(self.z)

    def tokens(self, captions): return self.tok(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids.to(DEVICE)

    def encode(self, x):
        with torch.no_grad(), autocast(): return (self.vae.encode(x).latent_dist.mean.float() * self.vae.config.scaling_factor)

    def fresh(self):
        x, captions = next(self.batches); return torch.cat([self.encode(part) for part in x.split(32)]).half(), self.tokens(captions).to(torch.int16)

    def refresh(self):
        z, ids = self.fresh()
        if len(self.z) + len(z) <= self.limit: self.z, self.ids = torch.cat([self.z, z]), torch.cat([self.ids, ids]); return
        at = self.at % (len(self.z) - len(z) + 1); self.z[at:at+len(z)] = z; self.ids[at:at+len(z)] = ids; self.at = at + len(z)

    def draw(self, n):
        i = torch.randint(len(self.z), (n,), device=DEVICE); return self.z[i].float(), self.ids[i].long()


def begin_from(start, tok, text, unet):
    """Another model's weights where the shapes match; of its tokens those that are tokens here too, the rest from their pieces."""
    configs, weights, vocab, _ = packed(start)
    known = lambda own, other: {k: v for k, v in other.items() if k in own and own[k].shape == v.shape}
    state = unet.state_dict(); print("unet: begins with", len(known(state, part_of(weights, "unet"))), "of", len(state)); unet.load_state_dict(known(state, part_of(weights, "unet")), strict=False)
    other = part_of(weights, "text_encoder"); state = text.state_dict()
    if not any(k.startswith("text_model.") for k in state): other = {k.removeprefix("text_model."): v for k, v in other.items()}
    text.load_state_dict(known(state, other), strict=False); key = next(k for k in other if k.endswith("token_embedding.weight")); old, new = other[key], text.get_input_embeddings().weight.data

    def pieces(word):
        """The longest known pieces of a token, from the left."""
        end = word.endswith("</w>"); word = word.removesuffix("</w>"); out = []
        while word:
            for n in range(len(word), 0, -1):
                piece = word[:n] + ("</w>" if end and n == len(word) else "")
                if piece in vocab: out.append(vocab[piece]); word = word[n:]; break
            else: word = word[1:]
        return out
    kept = 0
    for token, at in tok.get_vocab().items():
        if token in vocab: new[at] = old[vocab[token]]; kept += 1
        elif p := pieces(token): new[at] = old[p].mean(0)
    print("text: begins with", kept, "of", len(new), "tokens", flush=True)


def train_unet(preset, budget, start):
    p = PRESETS[preset]; torch.manual_seed(0); folder = f"{OUT}/model/tokenizer"
    tok = CLIPTokenizer.from_pretrained(folder) if os.path.exists(folder) else tokenizer(preset); n = len(tok); print("vocabulary", n, tok("a frog in a top hat").input_ids)
    vae = AutoencoderKL.from_pretrained(f"{OUT}/vae").to(DEVICE, memory_format=torch.channels_last).eval()
    width, depth = p.text
    text = CLIPTextModel(CLIPTextConfig(vocab_size=n, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=width // 32, max_position_embeddings=MAX_TOKENS,
                                        hidden_act="quick_gelu", bos_token_id=n - 2, eos_token_id=n - 1, pad_token_id=n - 1, projection_dim=width)).to(DEVICE)
    levels = len(p.unet)
    unet = quiet(UNet2DConditionModel(sample_size=SIZE >> (len(p.vae) - 1), in_channels=p.latents, out_channels=p.latents, block_out_channels=p.unet, layers_per_block=p.layers,
                                cross_attention_dim=width, attention_head_dim=list(p.heads), norm_num_groups=16,
                                down_block_types=["CrossAttnDownBlock2D"] * levels, up_block_types=["CrossAttnUpBlock2D"] * levels)).to(DEVICE, memory_format=torch.channels_last)
    if start: begin_from(start, tok, text, unet)
    print("unet", sum(q.numel() for q in unet.parameters()) / 1e6, "text", sum(q.numel() for q in text.parameters()) / 1e6, flush=True)
    sch = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing", steps_offset=1)
    sch.alphas_cumprod = sch.alphas_cumprod.to(DEVICE)
    pool = Pool(preset, vae, tok); empty = pool.tokens([""])
    ps = list(unet.parameters()) + list(text.parameters()); opts = optimizers(unet, text)
    ema_unet, ema_text = UNet2DConditionModel.from_config(unet.config).to(DEVICE), CLIPTextModel(text.config).to(DEVICE)
    ema_unet.load_state_dict(unet.state_dict()); ema_text.load_state_dict(text.state_dict()); ema = list(ema_unet.parameters()) + list(ema_text.parameters())
    run = Run("unet", budget, p.unet_batch, [unet, text, ema_unet, ema_text, *opts]); torch.manual_seed(run.k + 1)

    @compiled
    def step(xt, t, tokens, target):
        return ((unet(xt, t, text(tokens).last_hidden_state).sample.float() - target) ** 2).mean()

    source = pictures(preset, 4242); kept = [source.sample() for _ in range(384)]; dice = torch.Generator().manual_seed(1)
    kept_z = torch.cat([pool.encode(scaled(torch.from_numpy(np.stack([k[0] for k in part])))) for part in (kept[i:i+32] for i in range(0, len(kept), 32))])
    kept_ids, kept_t = pool.tokens([k[1] for k in kept]), torch.arange(len(kept)) * 1000 // len(kept); kept_t = kept_t[torch.randperm(len(kept), generator=dice)].to(DEVICE)
    kept_noise = torch.randn(kept_z.shape, generator=dice).to(DEVICE)

    @torch.no_grad()
    def held_out_loss(unet, text):
        """Loss on pictures, times and noise that are the same in every session, over all and by kind."""
        xt, target = sch.add_noise(kept_z, kept_noise, kept_t), sch.get_velocity(kept_z, kept_noise, kept_t)
        each = torch.cat([((unet(a, t, text(i).last_hidden_state).sample - v) ** 2).mean((1, 2, 3)) for a, t, i, v in zip(xt.split(64), kept_t.split(64), kept_ids.split(64), target.split(64))])
        return each.mean().item(), {name: round(each[[k for k, v in enumerate(kept) if v[2] == name]].mean().item(), 4) for name, _ in Synth.KINDS}

    def save():
        run.save()
        if len(pool.z) - pool.saved > 6000: pool.save()
    def export():
        StableDiffusionPipeline(vae=vae, text_encoder=ema_text, tokenizer=tok, unet=ema_unet, scheduler=sch, safety_checker=None, feature_extractor=None,
                                requires_safety_checker=False).save_pretrained(f"{OUT}/model", safe_serialization=True)
    if run.k == 0: print("held-out loss at the start", *held_out_loss(unet, text), flush=True)
    while run.done() < 1:
        if run.k % (p.refresh if len(pool.z) > p.pool // 3 else p.refresh // 2) == 0: pool.refresh()
        x0, tokens = pool.draw(p.unet_batch); tokens[torch.rand(len(tokens), device=DEVICE) < .1] = empty
        t = torch.randint(0, 1000, (len(x0),), device=DEVICE); noise = torch.randn_like(x0); xt = sch.add_noise(x0, noise, t)
        with autocast(): loss = step(xt.contiguous(memory_format=torch.channels_last), t, tokens, sch.get_velocity(x0, noise, t))
        descend(loss, opts, (.01, 1e-3), run, .6)
        d = min(.9995, (run.k + 1) / (run.k + 10))
        with torch.no_grad(): torch._foreach_lerp_(ema, ps, 1 - d)
        if run.after_step(loss.detach(), "loss"): save()
        if run.k % 150 == 0: print(f"{time.strftime('%H:%M:%S')} pictures {run.batch*run.k} held-out loss of the mean {(h := held_out_loss(ema_unet, ema_text))[0]:.4f}", h[1], "latents", len(pool.z), flush=True)
        if run.k % 150 == 0 or run.done() >= 1: export()
    save(); export()


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("stage", choices=["data", "vae", "unet", "decoder"]); a.add_argument("pictures", nargs="?", type=float, default=100_000); a.add_argument("--start", help="a packed model whose weights are the beginning"); a.add_argument("--preset", choices=PRESETS, default="small")
    a = a.parse_args(); os.makedirs(OUT, exist_ok=True)
    if not CUDA: torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    if a.stage in ("vae", "decoder"): train_vae(a.preset, a.pictures, a.stage, a.start)
    elif a.stage == "unet": train_unet(a.preset, a.pictures, a.start)
    else:
        p = pictures(a.preset, 1); print(len(p.labels), "things,", len({f[0] for f in p.faces}), "faces")
        compose.grid([p.sample(k)[:2] for k in ["single"] * 24 + ["accessory"] * 48 + ["two"] * 12 + ["count"] * 12], f"{OUT}/data.png", cols=12)
