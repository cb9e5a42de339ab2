"""The exam of the embedded model: 140 prompts, drawn by sdgen, scored by nearest-neighbour retrieval, and a contact sheet.

    python exam.py path/to/sdgen FOLDER [MODEL ...]      # pictures into FOLDER, the sheet into FOLDER/exam.png; of several models into FOLDER/NAME

60 plain things, 20 styles, backgrounds and counts, 20 compositions, and 40 more: coloured things, relations, counts to five,
landscapes, rarer things, synonyms. No training picture shows the pairs asked for (compose.held_out).
A picture passes if its nearest neighbour among rendered references is what the prompt names. The features are blurred colours
and histograms of edge directions (HOG, Dalal and Triggs 2005), so nothing in the measure was trained. References: for a thing
every thing in every style, as it is and mirrored; for a background those on the palette's colour that is nearest to the picture's corners; for a count one to five of many things; for a dressed
face every face in every style with every hat, glasses or scarf, or none; two things side by side are cut apart and both halves
must be right; for a coloured thing every thing in that colour and in its own, and the thing in every colour; for a relation or
landscape many things there, and the thing at many others. One thing on an even ground is moved to the middle and to one size first.
Also: sharpness, the gradient energy of the plain things against that of their nearest references, and diversity, the mean distance between
pictures of one prompt over eight seeds. `python exam.py ceiling` scores fresh training-like pictures instead of drawn ones: the measure's own limit.
"""
import itertools, random
import subprocess, sys, tempfile
from pathlib import Path
import numpy as np
from PIL import Image
import compose, scenes, train
from recolor import Body, THING_COLORS
from compose import COLORS, EXAM_PAIRS, HAND, NECK, PLACES, S, NUM, art, clean, plur

PLAIN = """frog|dog face|lion|panda|penguin|owl|butterfly|octopus|dolphin|turtle|snail|honeybee|elephant|giraffe|flamingo|crab|red apple|banana|strawberry|
pineapple|watermelon|grapes|carrot|broccoli|avocado|hamburger|pizza|doughnut|croissant|birthday cake|ice cream|hot beverage|sunflower|tulip|cactus|mushroom|
palm tree|rainbow|cloud|fire|snowman|crescent moon|house|castle|automobile|bicycle|rocket|airplane|sailboat|soccer ball|trophy|guitar|camera|light bulb|key|
hammer|umbrella|robot|ghost|crown""".replace("\n", "").split("|")
STYLES = [("rose", "fluent3d"), ("cherries", "fluentfl"), ("teddy bear", "fluent3d"), ("volcano", "fluentfl"), ("fish", "fluent3d"), ("alarm clock", "fluentfl"), ("tractor", "fluent3d")]
GROUNDS = [("parrot", "yellow"), ("lemon", "blue"), ("violin", "green"), ("zebra", "pink"), ("cupcake", "purple"), ("scissors", "orange"), ("star", "black")]
COUNTS = [("red apple", 3), ("pear", 2), ("lady beetle", 4), ("key", 3), ("duck", 2), ("doughnut", 4)]
WORN = {"top hat": "a top hat", "crown": "a crown", "graduation cap": "a graduation cap", "glasses": "glasses", "sunglasses": "sunglasses", **{k: "a " + k for k in {**HAND, **NECK}}}
STYLE_WORD = {"fluent3d": "3d", "fluentfl": "flat"}
COLORED = [("fish", "red", None), ("car", "blue", None), ("dog", "green", None), ("cat", "purple", None), ("elephant", "pink", None), ("umbrella", "orange", None), ("apple", "blue", None), ("horse", "green", None), ("house", "yellow", None),
           ("mushroom", "purple", None), ("rabbit", "black", None), ("octopus", "blue", None), ("butterfly", "red", "blue"), ("t-shirt", "pink", "black"), ("guitar", "green", "yellow")]
RELATED = [("cat", "on", "table"), ("frog", "under", "umbrella"), ("penguin", "on", "skateboard"), ("dog", "in", "box"), ("bear", "with", "balloon"), ("owl", "under", "tree"), ("rabbit", "before", "house"), ("star", "above", "house")]
RELATION_WORD = {"on": "on", "under": "under", "in": "in", "with": "holding", "before": "in front of", "above": "above"}
MORE = [("strawberry", 5), ("balloon", 5), ("penguin", 2), ("rose", 4), ("star", 5)]
SCENES = [("lion", "snow", "in the snow"), ("cow", "grass", "on grass"), ("balloon", "sky", "in the sky"), ("duck", "water", "on water"), ("rocket", "night", "at night")]
RARER = ["kiwi fruit", "stethoscope", "astronaut", "treasure chest"]
SYNONYMS = [("poodle", "poodle"), ("bunny", "rabbit"), ("automobile", "car")]
SEEDS, DIVERSE = 8, ["a frog", "a car", "a fish", "a house"]


def prompts(p):
    """(prompt, kind, what it must show)"""
    out = [(art(clean(l)), "plain", clean(l)) for l in PLAIN]
    out += [(f"{art(clean(l))}, {STYLE_WORD[s]}", "style", (clean(l), s)) for l, s in STYLES]
    out += [(f"{art(clean(l))} on {'an' if c[0] in 'o' else 'a'} {c} background", "ground", (clean(l), c)) for l, c in GROUNDS]
    out += [(f"{NUM[k]} {plur(clean(l))}", "count", (clean(l), k)) for l, k in COUNTS]
    later = {(n, c) for n, c, _ in COLORED} | {(x, y) for x, _, y in RELATED} | {(n, NUM[k]) for n, k in MORE} | {(n, k) for n, k, _ in SCENES}
    pairs = sorted(EXAM_PAIRS - later, key=lambda pair: (pair[1] not in WORN, pair != ("frog", "top hat"), pair))
    faces = {clean(f[0]) for f in p.faces}
    for a, b in pairs:
        if b in WORN:
            assert a in faces, a
            out.append((f"{art(a)} {'with' if 'glasses' in b else 'wearing' if a < 'f' else 'in'} {WORN[b]}", "dressed", (a, b)))
        else: out.append((f"{art(a)} and {art(b)}", "two", (a, b)))
    out += [(art(f"{c} {n}") + (f" on a {g} background" if g else ""), "colored", (n, c)) for n, c, g in COLORED]
    out += [(f"{art(a)} {RELATION_WORD[k]} {art(b)}", "relation", (a, k, b)) for a, k, b in RELATED]
    out += [(f"{NUM[k]} {plur(n)}", "more", (n, k)) for n, k in MORE] + [(f"{art(n)} {w}", "scene", (n, k)) for n, k, w in SCENES]
    out += [(art(n), "rarer", n) for n in RARER] + [(art(w), "synonym", n) for w, n in SYNONYMS]
    known = {p.noun_of[l] for l in p.labels}; assert len(out) == 140, len(out)
    for _, kind, want in out[100:]: assert (want if isinstance(want, str) else want[0]) in known, want
    return out


def centered(picture):
    """What stands on an even ground, moved to the middle and to 104 pixels; other pictures as they are."""
    edge = np.concatenate([picture[:3].reshape(-1, 3), picture[-3:].reshape(-1, 3), picture[:, :3].reshape(-1, 3), picture[:, -3:].reshape(-1, 3)]).astype(np.float32)
    ground = np.median(edge, 0); away = np.abs(picture.astype(np.float32) - ground).max(-1) > 40
    if (np.abs(edge - ground).max(-1) > 40).mean() > .25 or away.sum() < 100: return picture
    rows, columns = np.where(away.sum(1) > 1)[0], np.where(away.sum(0) > 1)[0]
    if len(rows) < 12 or len(columns) < 12: return picture
    crop = Image.fromarray(picture[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]); k = 104 / max(crop.size); crop = crop.resize((max(1, round(crop.width * k)), max(1, round(crop.height * k))), Image.BICUBIC)
    out = Image.new("RGB", (S, S), tuple(int(v) for v in ground)); out.paste(crop, ((S - crop.width) // 2, (S - crop.height) // 2)); return np.asarray(out)


def energy(picture):
    x = picture.astype(np.float32).mean(-1) / 255; return (np.diff(x, axis=0) ** 2).mean() + (np.diff(x, axis=1) ** 2).mean()


def features(pictures):
    """[n, 128, 128, 3] u8 -> [n, d]: colours on a grid of 16x16, blurred, and edge directions in 16x16 cells of 8x8 pixels."""
    if len(pictures) > 128: return np.concatenate([features(pictures[i:i+128]) for i in range(0, len(pictures), 128)])
    x = np.asarray(pictures, np.float32) / 255; n = len(x)
    color = x.reshape(n, 16, 8, 16, 8, 3).mean((2, 4))
    x = x.mean(-1); gx = np.zeros_like(x); gy = np.zeros_like(x)
    gx[:, :, 1:-1] = x[:, :, 2:] - x[:, :, :-2]; gy[:, 1:-1] = x[:, 2:] - x[:, :-2]
    size, angle = np.hypot(gx, gy), (np.arctan2(gy, gx) % np.pi) / np.pi * 8
    low = np.floor(angle).astype(int) % 8; part = angle - np.floor(angle)
    hog = np.zeros((n, 16, 16, 8), np.float32)
    for o in range(8):
        weight = (size * ((low == o) * (1 - part) + ((low + 1) % 8 == o) * part)).astype(np.float32)
        hog[..., o] = weight.reshape(n, 16, 8, 16, 8).mean((2, 4))
    def blur(v):
        for axis in (1, 2): v = (np.roll(v, 1, axis) + 2 * v + np.roll(v, -1, axis)) / 4
        return v
    hog = np.sqrt(blur(hog))
    return np.concatenate([blur(color).reshape(n, -1) * 1.0, hog.reshape(n, -1) * 1.2], 1)


class Flat:
    """Stands in for the composer's dice: everything in the middle, on white."""
    def __init__(self, r): self.r = r
    def randint(self, a, b): return (a + b) // 2
    def random(self): return 0.
    def choice(self, v): return sorted(v, key=str)[0]


def still(p, l, s, ground="white", count=1, box=104):
    """One thing, or several, as the composer draws them but without jitter."""
    im = Image.new("RGBA", (S, S), tuple(COLORS[ground]) + (255,)); o = p.crop(p.by[l][s][0])
    for x, y, b in PLACES[count] if count > 1 else [(64, 64, box)]: p.put(im, o, x, y, b)
    return np.asarray(im.convert("RGB"))


class References:
    def __init__(self, p):
        self.p, self.cache = p, {}

    def get(self, kind):
        if kind not in self.cache:
            names, pictures = zip(*self.draw(kind)); self.cache = {kind: (names, features(np.stack(pictures)), pictures), **dict(list(self.cache.items())[-3:])}
        return self.cache[kind]

    def some(self, wanted, n):
        """The wanted nouns' labels and `n` others, the same each time."""
        p = self.p; dice = random.Random(5); return [l for l in p.labels if p.noun_of[l] in wanted] + [l for l in dice.sample(p.obj, n) if p.noun_of[l] not in wanted]

    def draw(self, kind):
        p = self.p; pairs = [(l, s) for l in p.labels for s in p.by[l]]; name = p.noun_of; what = kind[0] if isinstance(kind, tuple) else kind
        flip = lambda a: np.ascontiguousarray(a[:, ::-1])
        if what in ("plain", "style") or what in train.COLORS:
            for l, s in pairs:
                tag = name[l] if what == "plain" else (name[l], s if what == "style" else what); a = centered(still(p, l, s, what if what in train.COLORS else "white")); yield tag, a; yield tag, flip(a)
        elif what == "count":
            for l in self.some({kind[1]}, 90):
                for s in p.by[l]:
                    for k in (1, 2, 3, 4, 5): yield (name[l], k), still(p, l, s, count=k)
        elif what == "half":
            for l, s in pairs: yield name[l], still(p, l, s, box=58)
        elif what == "colored":
            noun, color, ground = kind[1:]; ground = ground or "white"
            def shown(o): im = Image.new("RGBA", (S, S), tuple(COLORS[ground]) + (255,)); p.put(im, o, 64, 64, 104); return centered(np.asarray(im.convert("RGB")))
            for l in self.some({noun}, 130):
                for s in p.by[l]:
                    i = p.by[l][s][0]; body = Body(p.crop_array(i)); own = [(body.color, p.crop(i))]
                    if p.paintable(i): own += [(c, Image.fromarray(body.painted(c, random.Random(1)))) for c in (THING_COLORS if name[l] == noun else [color])]
                    for c, o in own: a = shown(o); yield (name[l], c), a; yield (name[l], c), flip(a)
        elif what in ("relation", "scene"):
            dice, p.r = p.r, random.Random(2); noun, k, *b = kind[1:]
            if what == "scene": cases = [(l, k) for l in self.some({noun}, 90)] + [(l, x) for l in p.named[noun] for x in scenes.SCENES if x != k]
            else:
                lists = dict(on=compose.ON, under=compose.UNDER, before=compose.BEFORE, above=compose.BEFORE); second = sorted(set(lists.get(k, compose.IN if k == "in" else compose.HELD_THINGS)))
                cases = [(l, b[0]) for l in self.some({noun}, 80)] + [(l, x) for l in p.named[noun] for x in second if x != b[0] and x in p.named]
            for l, x in cases:
                for s in p.by[l]:
                    o = p.crop(p.by[l][s][0])
                    for o, _ in ((o, 0), (o.transpose(Image.FLIP_LEFT_RIGHT), 1)):
                        if what == "scene":
                            im, ground, front, _ = scenes.draw(x, p.r); p.put(im, o, 64, 64 if ground is None else ground + 14, 78, "mid" if ground is None else "bot")
                            if front is not None: im.alpha_composite(front)
                            yield (name[l], x), np.asarray(im.convert("RGB"))
                        else:
                            im = Image.new("RGBA", (S, S), (255, 255, 255, 255)); table = x == "table"; p.arrange(im, k, o, p.table() if table else p.crop(p.drawing(p.named[x][0], s)[1]), table); yield (name[l], k, x), np.asarray(im.convert("RGB"))
            p.r = dice
        elif what == "dressed":
            dice, p.r = p.r, Flat(p.r); p.canvas = lambda: (setattr(p, "bgname", "white"), Image.new("RGBA", (S, S), (255, 255, 255, 255)))[1]
            for l, s, i, f in p.faces:
                yield (clean(l), None), still(p, l, s)
                for w in WORN:
                    glasses = w if "glasses" in w else None
                    yield (clean(l), w), np.asarray(p.dress(l, s, i, f, glasses, None if glasses else w)[0].convert("RGB"))
            p.r = dice; del p.canvas

    def nearest(self, kind, picture):
        names, f, pictures = self.get(kind); d = ((f - features(picture[None])) ** 2).sum(1); i = int(d.argmin()); return names[i], pictures[i]

    def passes(self, kind, want, picture, ground=None):
        if kind == "ground":
            corners = np.median(picture[[2, 2, -3, -3], [2, -3, 2, -3]].astype(np.float32), 0)
            color = min(train.COLORS, key=lambda c: np.abs(corners - COLORS[c]).sum()); got = self.nearest(color, centered(picture))[0]; return got == want, got
        if kind == "colored": got, _ = self.nearest((kind, *want, ground), centered(picture)); return got == want, got
        if kind in ("relation", "scene"): got, _ = self.nearest((kind, *want), picture); return got == want, got
        if kind in ("count", "more"): got, _ = self.nearest(("count", want[0]), picture); return got == want, got
        if kind != "two":
            got, near = self.nearest("plain" if kind in ("rarer", "synonym") else kind, picture if kind == "dressed" else centered(picture)); return got == want, got
        white = np.full_like(picture, 255); got = []
        for half in (0, 1):
            canvas = white.copy(); canvas[:, 32:96] = picture[:, 64 * half:64 * half + 64]; got.append(self.nearest("half", canvas)[0])
        return sorted(got) == sorted(want), tuple(got)


def score(rows):
    by = {}
    for kind, ok in rows: by.setdefault(kind, []).append(ok)
    for name, kinds in [("plain things", ["plain"]), ("styles, backgrounds, counts", ["style", "ground", "count"]), ("compositions, held out", ["dressed", "two"]),
                        ("colours of things", ["colored"]), ("relations, counts, landscapes, rarer things, synonyms", ["relation", "more", "scene", "rarer", "synonym"])]:
        v = [x for k in kinds for x in by.get(k, [])]
        print(f"{name}: {sum(v)} of {len(v)} ({100*sum(v)/max(1, len(v)):.0f} %)", {k: f"{sum(by[k])}/{len(by[k])}" for k in kinds if k in by})


def ceiling(p, refs):
    """Pictures as the composer draws them, jitter and all, put to the same test."""
    rows = []; fresh = train.pictures("small", 77); r = fresh.r; white = ("white", COLORS["white"])
    for _, kind, want in sorted(prompts(p) * 3, key=lambda a: a[1]):
        name = want if isinstance(want, str) else want[0]; fresh.bg = lambda: white; kind = "plain" if kind in ("rarer", "synonym") else kind; ground = next((g for a, c, g in COLORED if (a, c) == want), None)
        c = Image.new("RGBA", (S, S), tuple(COLORS[want[1] if kind == "ground" else ground or "white"]) + (255,))
        if kind == "dressed":
            l, s, i, f = r.choice([f for f in fresh.faces if clean(f[0]) == want[0]]); glasses = want[1] if "glasses" in want[1] else None
            im = np.asarray(fresh.dress(l, s, i, f, glasses, None if glasses else want[1])[0].convert("RGB"))
        else:
            l = r.choice(fresh.named[name]); s, i = fresh.drawing(l, want[1] if kind == "style" else None); o = fresh.crop(i)
            if kind == "two":
                for x, q in zip((34, 94), want): fresh.put(c, fresh.crop(fresh.drawing(r.choice(fresh.named[q]), s)[1]), x, 64 + r.randint(-6, 6), 58)
            elif kind in ("count", "more"): c = Image.fromarray(still(fresh, l, s, count=want[1]))
            elif kind == "scene":
                c, line, front, _ = scenes.draw(want[1], r); fresh.put(c, fresh.posed(o, l, .2), 64 + r.randint(-14, 14), 64 if line is None else line + 14, r.randint(66, 90), "mid" if line is None else "bot")
                if front is not None: c.alpha_composite(front)
            elif kind == "relation": table = want[2] == "table"; fresh.arrange(c, want[1], o, fresh.table() if table else fresh.crop(fresh.drawing(r.choice(fresh.named[want[2]]), s)[1]), table)
            else:
                if kind == "colored": o = Image.fromarray(Body(np.asarray(o)).painted(want[1], r))
                fresh.put(c, fresh.posed(o, l, .2), S / 2 + r.randint(-8, 8), S / 2 + r.randint(-8, 8), r.randint(90, 112))
            im = np.asarray(c.convert("RGB"))
        ok, got = refs.passes(kind, want, im, ground); rows.append((kind, ok))
        if not ok: print("missed", kind, want, got, flush=True)
    score(rows)


def draw(program, prompts, seeds, folder, model):
    """Pictures of every prompt with every seed, drawn by sdgen in one go."""
    subprocess.run([program, "--from", "-", "-s", ",".join(map(str, seeds)), "-o", f"{folder}/{{index}}.png", "-q", "--force", *(["-m", model] if model else [])], input="\n".join(prompts), text=True, check=True, stdout=subprocess.DEVNULL)
    return [np.asarray(Image.open(f).convert("RGB").resize((S, S), Image.BICUBIC)) for f in sorted(Path(folder).glob("[0-9]*.png"), key=lambda f: int(f.stem))]


def main():
    p = train.pictures("small", 1); refs = References(p)
    if sys.argv[1] == "ceiling": return ceiling(p, refs)
    program, folder, models = sys.argv[1], Path(sys.argv[2]), sys.argv[3:] or ["embedded"]; asked = prompts(p); drawn = {}
    for model in models:
        place = folder / Path(model).stem if len(models) > 1 else folder; place.mkdir(parents=True, exist_ok=True)
        for path in place.glob("[0-9]*.png"): path.unlink()
        drawn[model] = place, draw(program, [a[0] for a in asked], [1], place, None if model == "embedded" else model), {}, [], []; assert len(drawn[model][1]) == len(asked)
    # kind by kind, as the references of one are many
    for n in sorted(range(len(asked)), key=lambda n: (asked[n][1], n)):
        prompt, kind, want = asked[n]
        for model, (_, pictures, result, sharp, closest) in drawn.items():
            result[n] = refs.passes(kind, want, pictures[n], next((g for a, c, g in COLORED if (a, c) == want), None))
            if not result[n][0]: print(f"{model}: {prompt}: nearest is {result[n][1]}", flush=True)
            if kind == "plain": a = centered(pictures[n]); sharp.append(energy(a) / energy(refs.nearest("plain", a)[1]))
            if kind == "dressed":
                known = [q for w, q in zip(*refs.get("dressed")[::2]) if w[1] and not compose.held_out(*w)]
                closest.append(10 * np.log10(255**2 / min(((q.astype(np.float32) - pictures[n]) ** 2).mean() for q in known)))
    for model, (place, pictures, result, sharp, closest) in drawn.items():
        print(model); score([(asked[n][1], result[n][0]) for n in result]); print(f"dressed pictures against the nearest picture of training's pairs: {np.median(closest):.1f} dB in the middle, {max(closest):.1f} at most")
        print(f"sharpness: {np.median(sharp):.2f} of the references' gradient energy")
        with tempfile.TemporaryDirectory() as scratch:
            many = np.stack(draw(program, DIVERSE, range(1, SEEDS + 1), scratch, None if model == "embedded" else model)); values = many.astype(np.float32).reshape(len(DIVERSE), SEEDS, -1) / 255
        apart = [np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in itertools.combinations(v, 2)]) for v in values]
        print(f"diversity: {np.mean(apart):.3f} between the pictures of a prompt", dict(zip(DIVERSE, np.round(apart, 3).tolist())), flush=True)
        compose.grid([(pictures[n], ("" if result[n][0] else "- ") + asked[n][0]) for n in range(len(asked))], place / "exam.png", cols=10)
        compose.grid([(a, DIVERSE[k // SEEDS]) for k, a in enumerate(many)], place / "seeds.png", cols=SEEDS)


if __name__ == "__main__": main()
