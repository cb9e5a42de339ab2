"""Trains the embedded model of sdgen: 64x64 pictures of some forty things in one style, with hats.

    python train.py vae MINUTES && python train.py unet MINUTES && python export.py

Needs the rendered emoji of fetch.sh, common.py, render.py and compose.py (one folder up in EMOJI_ROOT), torch, diffusers,
transformers and tokenizers. Every stage works for a fixed time, checkpoints once a minute into out/ and resumes from there.
"""
import json, os, random, sys, time
import numpy as np, torch
from torch.utils.data import DataLoader, IterableDataset
import compose as C
from compose import Synth, art, clean
from diffusers import AutoencoderKL, UNet2DConditionModel, DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from PIL import Image

torch.set_num_threads(int(os.environ.get("THREADS", "2")))
SIZE, MAX_TOKENS, OUT = 64, 32, os.environ.get("OUT", "out")
STYLE_SET = "fluentfl"
FACES = ["frog", "cat face", "dog face", "panda", "bear", "lion", "tiger face", "fox", "rabbit face", "mouse face", "koala", "pig face",
         "cow face", "monkey face", "unicorn", "wolf", "penguin", "robot", "alien", "ghost", "skull", "octopus", "grinning face"]
OBJECTS = ["red apple", "banana", "strawberry", "pear", "lemon", "cherries", "pineapple", "tomato", "carrot", "mushroom", "hamburger", "pizza",
           "doughnut", "sunflower", "cactus", "evergreen tree", "sun", "star", "cloud", "fire", "rainbow", "red heart", "rocket", "airplane",
           "automobile", "sailboat", "house", "top hat", "crown", "soccer ball", "key", "light bulb", "umbrella", "fish"]
COLORS = ["white", "black", "red", "orange", "green", "light blue", "purple", "pink", "yellow"]
HATS = ["top hat", "crown", "graduation cap"]
HAND = ["party hat", "wizard hat", "santa hat", "cowboy hat", "chef hat", "beanie"]


class Pictures(Synth):
    """The composer of compose.py, narrowed to one style and a short list of things."""
    KINDS = [("single", .46), ("accessory", .44), ("two", .10)]

    def __init__(self, seed):
        super().__init__(seed, sets=[STYLE_SET])
        self.labels = [l for l in FACES + OBJECTS if l in self.by]
        self.obj = self.labels
        self.faces = [f for f in self.faces if f[0] in FACES]
        C.COLORS = {k: C.COLORS[k] for k in COLORS}
        C.ACC_HAT = {k: v for k, v in C.ACC_HAT.items() if k in HATS}
        C.HAND = {k: v for k, v in C.HAND.items() if k in HAND}
        for m in self.meta: m["tags"] = []

    def style(self, s, cap): return cap

    def single(self):
        r = self.r; l, s, i = self.pick(); im = self.canvas()
        self.put(im, self.crop(i), 64 + r.randint(-3, 3), 64 + r.randint(-3, 3), r.choice([100, 104, 108]))
        return self.done(im, self.bgcap(art(clean(l)) if r.random() < .85 else clean(l)))


class Stream(IterableDataset):
    def __init__(self, seed, batch): self.seed, self.batch = seed, batch

    def __iter__(self):
        pictures = Pictures(self.seed * 1_000_003 + int(time.time()) % 100_000)
        while True:
            items = [pictures.sample()[:2] for _ in range(self.batch)]
            small = [np.asarray(Image.fromarray(a).resize((SIZE, SIZE), Image.BOX)) for a, _ in items]
            yield torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float().div(127.5).sub(1), [c for _, c in items]


def stream(batch, seed): return iter(DataLoader(Stream(seed, batch), batch_size=None, num_workers=1, prefetch_factor=8))


def rate(k, done, peak, warm=100, floor=.02):
    """Learning rate: warm-up, flat for half of the time, then a straight line down."""
    return peak * min(1, (k + 1) / warm) * (1 if done < .5 else max(floor, (1 - done) / .5))


def psnr(a, b): return 10 * np.log10(4 / ((a - b) ** 2).mean().item())


def resume(path, *parts):
    if not os.path.exists(path): return 0., 0
    state = torch.load(path, weights_only=False)
    for part, s in zip(parts, state["parts"]): part.load_state_dict(s)
    print("resumed at", state["spent"], "s", flush=True)
    return state["spent"], state["k"]


def checkpoint(path, spent, k, *parts):
    torch.save(dict(spent=spent, k=k, parts=[p.state_dict() for p in parts]), path + ".tmp"); os.replace(path + ".tmp", path)


def train_vae(minutes):
    torch.manual_seed(0)
    vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(16, 32, 64, 128), layers_per_block=1, norm_num_groups=4,
                        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, sample_size=SIZE).to(memory_format=torch.channels_last)
    print("vae", sum(p.numel() for p in vae.parameters()) / 1e6, "M")
    opt = torch.optim.AdamW(vae.parameters(), 2e-3, betas=(.9, .95), weight_decay=1e-3)
    spent, k = resume(f"{OUT}/vae.pt", vae, opt); it = stream(12, 1); start = time.time() - spent; saved = time.time(); log = []
    while (el := time.time() - start) < minutes * 60:
        for g in opt.param_groups: g["lr"] = rate(k, el / minutes / 60, 2e-3)
        x = next(it)[0].to(memory_format=torch.channels_last)
        dist = vae.encode(x).latent_dist; y = vae.decode(dist.sample()).sample
        edges = (y.diff(dim=-1) - x.diff(dim=-1)).abs().mean() + (y.diff(dim=-2) - x.diff(dim=-2)).abs().mean()
        loss = (y - x).abs().mean() + edges + ((y - x) ** 2).mean() + 1e-4 * dist.kl().mean() / (3 * SIZE * SIZE)
        opt.zero_grad(set_to_none=True); loss.backward(); torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.); opt.step(); k += 1; log.append(psnr(y, x))
        if k % 200 == 0: print(f"{el:.0f}s {k} {12*k/el:.0f} img/s psnr {np.mean(log[-200:]):.2f} z {dist.mean.std().item():.2f}", flush=True)
        if time.time() - saved > 60: checkpoint(f"{OUT}/vae.pt", el, k, vae, opt); saved = time.time()
    vae.eval(); held_out = stream(64, 99)
    with torch.no_grad():
        z = torch.cat([vae.encode(next(held_out)[0]).latent_dist.mean for _ in range(8)])
        vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
        x, _ = next(held_out); y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        print("scale", vae.config.scaling_factor, "held-out psnr", psnr(y, x))
    g = torch.cat([x[:12], y[:12]]).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    Image.fromarray(np.concatenate([np.concatenate(list(g[:12]), 1), np.concatenate(list(g[12:]), 1)])).resize((1536, 256), Image.NEAREST).save(f"{OUT}/vae.png")
    vae.save_pretrained(f"{OUT}/vae")


def tokenizer():
    from tokenizers import Tokenizer, models, trainers, pre_tokenizers, normalizers, Regex
    p = Pictures(3); caps = [p.sample()[1] for _ in range(3000)] + [clean(l) for l in FACES + OBJECTS] * 20
    t = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(caps, trainers.BpeTrainer(vocab_size=1100, end_of_word_suffix="</w>", initial_alphabet=alphabet, special_tokens=[]))
    merges = [" ".join(m) if isinstance(m, list) else m for m in json.loads(t.to_str())["model"]["merges"]]
    vocab = list(dict.fromkeys(alphabet + [a + "</w>" for a in alphabet] + ["".join(m.split()) for m in merges])) + ["<|startoftext|>", "<|endoftext|>"]
    os.makedirs(f"{OUT}/model/tokenizer", exist_ok=True)
    json.dump({w: i for i, w in enumerate(vocab)}, open(f"{OUT}/model/tokenizer/vocab.json", "w"), ensure_ascii=False)
    open(f"{OUT}/model/tokenizer/merges.txt", "w").write("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    json.dump(special, open(f"{OUT}/model/tokenizer/special_tokens_map.json", "w"))
    json.dump(dict(tokenizer_class="CLIPTokenizer", model_max_length=MAX_TOKENS, do_lower_case=True, **special), open(f"{OUT}/model/tokenizer/tokenizer_config.json", "w"))
    return CLIPTokenizer.from_pretrained(f"{OUT}/model/tokenizer")


def train_unet(minutes):
    torch.manual_seed(0); tok = tokenizer(); n_vocab = len(tok); print("vocab", n_vocab, tok("a frog in a top hat").input_ids)
    vae = AutoencoderKL.from_pretrained(f"{OUT}/vae").eval(); scale = vae.config.scaling_factor
    text = CLIPTextModel(CLIPTextConfig(vocab_size=n_vocab, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=MAX_TOKENS,
                                        hidden_act="quick_gelu", bos_token_id=n_vocab - 2, eos_token_id=n_vocab - 1, pad_token_id=n_vocab - 1, projection_dim=128))
    unet = UNet2DConditionModel(sample_size=SIZE // 8, in_channels=16, out_channels=16, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=128, attention_head_dim=[2, 4],
                                norm_num_groups=16, down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2).to(memory_format=torch.channels_last)
    print("unet", sum(p.numel() for p in unet.parameters()) / 1e6, "text", sum(p.numel() for p in text.parameters()) / 1e6, flush=True)
    sch = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing", steps_offset=1)
    cache = f"{OUT}/latents.pt"
    if os.path.exists(cache): z, ids = torch.load(cache)
    else:
        it = stream(64, 2); z, caps, start = [], [], time.time()
        with torch.no_grad():
            while len(z) * 64 < int(os.environ.get("CACHE", "20000")): x, c = next(it); z.append(vae.encode(x).latent_dist.mean.float() * scale); caps += c
        z = torch.cat(z); ids = tok(caps, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids
        torch.save((z, ids), cache); print("cached", len(z), f"{time.time()-start:.0f}s", flush=True)
    empty = tok([""], padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    ps = list(unet.parameters()) + list(text.parameters()); opt = torch.optim.AdamW(ps, 1e-3, betas=(.9, .99), weight_decay=1e-2)
    ema_unet, ema_text = UNet2DConditionModel.from_config(unet.config), CLIPTextModel(text.config)
    ema_unet.load_state_dict(unet.state_dict()); ema_text.load_state_dict(text.state_dict()); ema = list(ema_unet.parameters()) + list(ema_text.parameters())
    spent, k = resume(f"{OUT}/unet.pt", unet, text, ema_unet, ema_text, opt); start = time.time() - spent; saved = time.time(); batch, log = 64, []
    def save():
        pipe = StableDiffusionPipeline(vae=vae, text_encoder=ema_text, tokenizer=tok, unet=ema_unet, scheduler=sch, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe.save_pretrained(f"{OUT}/model", safe_serialization=True)
    while (el := time.time() - start) < minutes * 60:
        for g in opt.param_groups: g["lr"] = rate(k, el / minutes / 60, 1e-3, 200)
        ix = torch.randint(len(z), (batch,)); x0, tokens = z[ix], ids[ix].clone(); tokens[torch.rand(batch) < .1] = empty
        t = torch.randint(0, 1000, (batch,)); noise = torch.randn_like(x0); xt = sch.add_noise(x0, noise, t); target = sch.get_velocity(x0, noise, t)
        out = unet(xt.to(memory_format=torch.channels_last), t, text(tokens).last_hidden_state).sample
        loss = ((out - target) ** 2).mean(); opt.zero_grad(set_to_none=True); loss.backward(); torch.nn.utils.clip_grad_norm_(ps, 1.); opt.step(); k += 1; log.append(loss.item())
        d = min(.9995, (k + 1) / (k + 10))
        with torch.no_grad(): torch._foreach_lerp_(ema, ps, 1 - d)
        if k % 100 == 0: print(f"{el:.0f}s {k} {batch*k/el:.0f} img/s loss {np.mean(log[-100:]):.4f}", flush=True)
        if time.time() - saved > 120: checkpoint(f"{OUT}/unet.pt", el, k, unet, text, ema_unet, ema_text, opt); save(); saved = time.time()
    save()


if __name__ == "__main__":
    os.makedirs(OUT, exist_ok=True)
    if sys.argv[1] == "vae": train_vae(float(sys.argv[2]))
    elif sys.argv[1] == "unet": train_unet(float(sys.argv[2]))
    else:
        p = Pictures(1); C.grid([p.sample()[:2] for _ in range(48)], f"{OUT}/data.png")
