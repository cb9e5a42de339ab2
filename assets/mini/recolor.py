"""Colours of things: what colour a picture has, and the same picture in another one.

All in OKLab (Ottosson 2020): the part of a picture that has its main hue (or, where it has none, its greys) is moved to the
wanted hue, chroma and lightness; outlines, eyes, whites and small parts of other colours stay.
"""
import numpy as np

M1 = np.array([[.4122214708, .5363325363, .0514459929], [.2119034982, .6806995451, .1073969566], [.0883024619, .2817188376, .6299787005]], np.float32)
M2 = np.array([[.2104542553, .7936177850, -.0040720468], [1.9779984951, -2.4285922050, .4505937099], [.0259040371, .7827717662, -.8086757660]], np.float32)
N1, N2 = np.linalg.inv(M1).astype(np.float32), np.linalg.inv(M2).astype(np.float32)
LINEAR = np.where(np.arange(256) / 255 <= .04045, np.arange(256) / 255 / 12.92, ((np.arange(256) / 255 + .055) / 1.055) ** 2.4).astype(np.float32)


def to_lab(rgb): return np.cbrt(LINEAR[rgb] @ M1.T) @ M2.T
def to_rgb(lab):
    linear = ((lab @ N2.T) ** 3 @ N1.T).clip(0, 1)
    return (np.where(linear <= .0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - .055) * 255 + .5).clip(0, 255).astype(np.uint8)


# name -> lightness, chroma, hue in degrees
THING_COLORS = {"red": (.60, .22, 26), "orange": (.74, .17, 58), "yellow": (.87, .17, 95), "green": (.70, .18, 145), "blue": (.60, .17, 256), "purple": (.55, .19, 303),
                "pink": (.77, .14, 355), "brown": (.48, .08, 55), "black": (.30, .01, 280), "white": (.95, .006, 270), "gray": (.66, .01, 270)}


class Body:
    """The part of a picture [h, w, 4] that carries its colour. `share`: of what is opaque; `color`: its name."""
    def __init__(self, rgba):
        self.rgba = rgba; self.lab = to_lab(rgba[..., :3]); l, a, b = np.moveaxis(self.lab, -1, 0)
        opaque = rgba[..., 3] > 128; chroma, hue = np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360; self.hue = hue
        colored = opaque & (chroma > .045) & (l > .18); self.grey = False; n = max(1, opaque.sum())
        weight = np.zeros_like(l)
        if colored.sum() > .22 * n:
            h = np.bincount((hue[colored] / 10).astype(int) % 36, chroma[colored], minlength=36); h = h + np.roll(h, 1) + np.roll(h, -1); peak = h.argmax() * 10 + 5.
            # the mode, then the mean about it
            for _ in range(2):
                near = colored & (np.abs((hue - peak + 180) % 360 - 180) < 30); peak = (peak + np.mean((hue[near] - peak + 180) % 360 - 180)) % 360 if near.any() else peak
            away = np.abs((hue - peak + 180) % 360 - 180)
            weight = np.clip((58 - away) / 16, 0, 1) * np.clip((chroma - .025) / .035, 0, 1)
            self.peak = peak
        self.weight = weight * (rgba[..., 3] > 0); main = self.weight > .5
        self.share = (main & opaque).sum() / n
        if self.share < .30:
            # a grey, white or black thing: its greys between outline and highlight
            self.grey = True; pale = opaque & (chroma < .06); mid = l[pale]
            if pale.sum() > .4 * n:
                center = float(np.median(mid)); low, high = (.30, 1.1) if center > .45 else (.0, .45)
                self.weight = np.clip((.085 - chroma) / .03, 0, 1) * np.clip((l - low + .08) / .08, 0, 1) * np.clip((high - l + .08) / .08, 0, 1) * (rgba[..., 3] > 0); self.peak = 0.
                main = self.weight > .5; self.share = (main & opaque).sum() / n
            else: self.share = 0.
        if self.share == 0 or not (main & opaque).any(): self.share, self.color = 0., None; return
        self.l = float(np.median(l[main & opaque])); self.c = float(np.median(chroma[main & opaque])); self.color = self.name()

    def name(self):
        """The colour's name, or none where people would not agree on one."""
        a, b = self.c * np.cos(np.radians(self.peak)), self.c * np.sin(np.radians(self.peak)); d = []
        if self.c < .035: return "black" if self.l < .38 else "white" if self.l > .86 else "gray"
        for k, (l, c, h) in THING_COLORS.items():
            if c > .03: d.append((((self.l - l) * .7) ** 2 + (a - c * np.cos(np.radians(h))) ** 2 + (b - c * np.sin(np.radians(h))) ** 2, k))
        d.sort(); return d[0][1] if d[0][0] < .012 and d[1][0] > 1.5 * d[0][0] else None

    def painted(self, color, dice):
        """The picture in another colour, a little off its mean so that not two are the same."""
        l, c, h = THING_COLORS[color]; l += dice.uniform(-.03, .03); h += dice.uniform(-5, 5); lab = self.lab
        spread = lab[..., 0] - self.l
        # lightness keeps its ups and downs, less so where there is no room for them
        new_l = l + spread * (.55 if color in ("white", "black") else .85)
        chroma = np.hypot(lab[..., 1], lab[..., 2])
        if self.grey: ratio = np.ones_like(chroma) * np.clip(1.25 - np.abs(new_l - l) * 1.2, .35, 1)
        else: ratio = np.clip(chroma / self.c, .25, 1.35)
        turn = 0. if self.grey or c < .03 else ((self.hue - self.peak + 180) % 360 - 180) * .35
        angle = np.radians(h + turn); new = np.stack([new_l.clip(.03, .995), c * ratio * np.cos(angle), c * ratio * np.sin(angle)], -1).astype(np.float32)
        w = self.weight[..., None]; out = self.rgba.copy(); out[..., :3] = to_rgb(lab * (1 - w) + new * w); return out
