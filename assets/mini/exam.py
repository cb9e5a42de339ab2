"""The exam of the embedded model: 100 prompts, drawn by sdgen, scored by nearest-neighbour retrieval, and a contact sheet.

    python exam.py path/to/sdgen FOLDER [MODEL]      # pictures into FOLDER, the sheet into FOLDER/exam.png

60 plain things, 20 styles, backgrounds and counts, 20 compositions of pairs that no training picture shows (compose.held_out).
A picture passes if its nearest neighbour among rendered references is what the prompt names. The features are blurred colours
and histograms of edge directions (HOG, Dalal and Triggs 2005), so nothing in the measure was trained. References: for a thing
every thing in every style; for a background those on the palette's colour that is nearest to the picture's corners; for a count one to four of every thing; for a dressed
face every face in every style with every hat, glasses or scarf, or none; two things side by side are cut apart and both halves
must be right. `python exam.py ceiling` scores fresh training-like pictures instead of drawn ones: the measure's own limit.
"""
import subprocess, sys
from pathlib import Path
import numpy as np
from PIL import Image
import compose, train
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


def prompts(p):
    """(prompt, kind, what it must show)"""
    out = [(art(clean(l)), "plain", clean(l)) for l in PLAIN]
    out += [(f"{art(clean(l))}, {STYLE_WORD[s]}", "style", (clean(l), s)) for l, s in STYLES]
    out += [(f"{art(clean(l))} on {'an' if c[0] in 'o' else 'a'} {c} background", "ground", (clean(l), c)) for l, c in GROUNDS]
    out += [(f"{NUM[k]} {plur(clean(l))}", "count", (clean(l), k)) for l, k in COUNTS]
    pairs = sorted(EXAM_PAIRS, key=lambda pair: (pair[1] not in WORN, pair != ("frog", "top hat"), pair))
    faces = {clean(f[0]) for f in p.faces}
    for a, b in pairs:
        if b in WORN:
            assert a in faces, a
            out.append((f"{art(a)} {'with' if 'glasses' in b else 'wearing' if a < 'f' else 'in'} {WORN[b]}", "dressed", (a, b)))
        else: out.append((f"{art(a)} and {art(b)}", "two", (a, b)))
    return out


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
            names, pictures = zip(*self.draw(kind)); self.cache[kind] = (names, features(np.stack(pictures)), pictures)
        return self.cache[kind]

    def draw(self, kind):
        p = self.p; pairs = [(l, s) for l in p.labels for s in p.by[l]]
        if kind == "plain":
            for l, s in pairs: yield clean(l), still(p, l, s)
        elif kind == "style":
            for l, s in pairs: yield (clean(l), s), still(p, l, s)
        elif kind in train.COLORS:
            for l, s in pairs: yield (clean(l), kind), still(p, l, s, kind)
        elif kind == "count":
            for l, s in pairs:
                for k in (1, 2, 3, 4): yield (clean(l), k), still(p, l, s, count=k)
        elif kind == "half":
            for l, s in pairs: yield clean(l), still(p, l, s, box=58)
        elif kind == "dressed":
            dice, p.r = p.r, Flat(p.r); p.canvas = lambda: (setattr(p, "bgname", "white"), Image.new("RGBA", (S, S), (255, 255, 255, 255)))[1]
            for l, s, i, f in p.faces:
                yield (clean(l), None), still(p, l, s)
                for w in WORN:
                    glasses = w if "glasses" in w else None
                    yield (clean(l), w), np.asarray(p.dress(l, s, i, f, glasses, None if glasses else w)[0].convert("RGB"))
            p.r = dice; del p.canvas

    def nearest(self, kind, picture):
        names, f, pictures = self.get(kind); d = ((f - features(picture[None])) ** 2).sum(1); i = int(d.argmin()); return names[i], pictures[i]

    def passes(self, kind, want, picture):
        if kind == "ground":
            corners = np.median(picture[[2, 2, -3, -3], [2, -3, 2, -3]].astype(np.float32), 0)
            color = min(train.COLORS, key=lambda c: np.abs(corners - COLORS[c]).sum()); got = self.nearest(color, picture)[0]; return got == want, got
        if kind != "two":
            got, near = self.nearest(kind, picture); return got == want, got
        white = np.full_like(picture, 255); got = []
        for half in (0, 1):
            canvas = white.copy(); canvas[:, 32:96] = picture[:, 64 * half:64 * half + 64]; got.append(self.nearest("half", canvas)[0])
        return sorted(got) == sorted(want), tuple(got)


def score(rows):
    by = {}
    for kind, ok in rows: by.setdefault(kind, []).append(ok)
    for name, kinds in [("plain things", ["plain"]), ("styles, backgrounds, counts", ["style", "ground", "count"]), ("compositions, held out", ["dressed", "two"])]:
        v = [x for k in kinds for x in by.get(k, [])]
        print(f"{name}: {sum(v)} of {len(v)} ({100*sum(v)/max(1, len(v)):.0f} %)", {k: f"{sum(by[k])}/{len(by[k])}" for k in kinds if k in by})


def ceiling(p, refs):
    """Pictures as the composer draws them, jitter and all, put to the same test."""
    rows = []; fresh = train.pictures("small", 77)
    for _, kind, want in prompts(p) * 3:
        r = fresh.r; fresh.bg = lambda: ("white", COLORS["white"])
        if kind == "two": l = [next(x for x in fresh.labels if clean(x) == w) for w in want]; s = r.choice(train.PRESETS["small"].sets)
        if kind == "dressed":
            l, s, i, f = r.choice([f for f in fresh.faces if clean(f[0]) == want[0]]); glasses = want[1] if "glasses" in want[1] else None
            im = np.asarray(fresh.dress(l, s, i, f, glasses, None if glasses else want[1])[0].convert("RGB"))
        elif kind == "two":
            c = Image.new("RGBA", (S, S), (255, 255, 255, 255))
            for x, q in zip((34, 94), l): fresh.put(c, fresh.crop(fresh.by[q][s][0]), x, 64 + r.randint(-4, 4), 58)
            im = np.asarray(c.convert("RGB"))
        else:
            name = want if kind == "plain" else want[0]; l = r.choice([x for x in fresh.labels if clean(x) == name])
            s = want[1] if kind == "style" else r.choice(sorted(fresh.by[l])); c = COLORS[want[1]] if kind == "ground" else (255, 255, 255)
            c = Image.new("RGBA", (S, S), tuple(max(0, min(255, v + r.randint(-10, 10))) for v in c) + (255,) if kind == "ground" else tuple(c) + (255,)); o = fresh.crop(fresh.by[l][s][0])
            if kind == "count": im = still(fresh, l, s, count=want[1])
            else: fresh.put(c, o, S / 2 + r.randint(-3, 3), S / 2 + r.randint(-3, 3), r.choice([104, 104, 110, 96])); im = np.asarray(c.convert("RGB"))
        ok, got = refs.passes(kind, want, im); rows.append((kind, ok))
        if not ok: print("missed", kind, want, got)
    score(rows)


def main():
    p = train.pictures("small", 1); refs = References(p)
    if sys.argv[1] == "ceiling": return ceiling(p, refs)
    program, folder = sys.argv[1], Path(sys.argv[2]); folder.mkdir(parents=True, exist_ok=True)
    model = ["-m", sys.argv[3]] if len(sys.argv) > 3 else []
    rows, cells, closest = [], [], []
    for n, (prompt, kind, want) in enumerate(prompts(p)):
        path = folder / f"{n:03}.png"
        subprocess.run([program, prompt, "--seed", "1", "-o", path, "-q", "--force", *model], check=True, stdout=subprocess.DEVNULL)
        picture = np.asarray(Image.open(path).convert("RGB").resize((S, S), Image.BICUBIC)); ok, got = refs.passes(kind, want, picture); rows.append((kind, ok))
        if not ok: print(f"{prompt}: nearest is {got}")
        if kind == "dressed":
            known = [q for w, q in zip(*refs.get("dressed")[::2]) if w[1] and not compose.held_out(*w)]
            closest.append(10 * np.log10(255**2 / min(((q.astype(np.float32) - picture) ** 2).mean() for q in known)))
        cells.append((picture, ("" if ok else "- ") + prompt))
    score(rows); print(f"dressed pictures against the nearest picture of training's pairs: {np.median(closest):.1f} dB in the middle, {max(closest):.1f} at most")
    compose.grid(cells, folder / "exam.png", cols=10)


if __name__ == "__main__": main()
