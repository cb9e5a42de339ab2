"""Simple landscapes, drawn: sky, grass, night, water, snow, beach, sunset, forest, room."""
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

S = 128


def jitter(c, r, d=9): return tuple(max(0, min(255, v + r.randint(-d, d))) for v in c)


def gradient(top, bottom, height=S):
    t = np.linspace(0, 1, S)[:, None, None]; a = np.array(top) * (1 - t) + np.array(bottom) * t
    return Image.fromarray(np.broadcast_to(np.concatenate([a, np.full((S, 1, 1), 255.)], 2), (S, S, 4)).astype(np.uint8).copy())


def drawn(im, f):
    """What `f` draws, with smooth edges, on the picture."""
    big = Image.new("RGBA", (3 * S, 3 * S)); d = ImageDraw.Draw(big); f(lambda shape, box, fill: getattr(d, shape)([3 * v for v in box], fill=tuple(fill) + (255,))); im.alpha_composite(big.resize((S, S), Image.BOX)); return im


def cloud(draw, x, y, k, c):
    for dx, dy, q in ((-9, 2, 6), (0, -2, 9), (9, 2, 7)): draw("ellipse", (x + (dx - q) * k, y + (dy - q * .8) * k, x + (dx + q) * k, y + (dy + q * .8) * k), c)


def sky(r):
    im = gradient(jitter((88, 166, 240), r), jitter((190, 224, 250), r))
    drawn(im, lambda draw: [cloud(draw, r.randint(8, 120), r.randint(10, 118), r.uniform(.8, 1.5), (246, 250, 255)) for _ in range(r.randint(3, 5))]); return im, None, None


def hill(r, high, low, c, trees=False):
    im = gradient(high, low); y = r.randint(76, 86); c = jitter(c, r); drawn(im, lambda draw: draw("ellipse", (-60, y, 188, 300), c)); return im, y + 8, None


def grass(r): return hill(r, jitter((140, 200, 248), r), (220, 240, 252), (104, 186, 84))
def snow(r):
    im, y, _ = hill(r, jitter((150, 178, 214), r), (206, 220, 238), (242, 246, 252)); drawn(im, lambda draw: [draw("ellipse", (x, v, x + 3, v + 3), (255, 255, 255)) for x, v in ((r.randint(2, 122), r.randint(2, 118)) for _ in range(24))]); return im, y, None
def night(r):
    im = gradient(jitter((14, 18, 52), r, 6), jitter((44, 52, 104), r, 8))
    def f(draw):
        for _ in range(22): x, y, q = r.randint(2, 124), r.randint(2, 124), r.choice([1, 1, 2]); draw("ellipse", (x, y, x + q, y + q), (250, 244, 200))
    return drawn(im, f), None, None
def water(r):
    im = gradient(jitter((168, 214, 248), r), (226, 242, 252)); y = r.randint(60, 70); c = jitter((52, 140, 216), r); drawn(im, lambda draw: draw("rectangle", (-1, y, 129, 129), c)); light = tuple(min(255, v + 44) for v in c); front = Image.new("RGBA", (S, S)); w = r.randint(96, 104)
    def waves(draw):
        draw("rectangle", (-1, w + 4, 129, 129), c)
        for x in range(-8, 136, 16): draw("ellipse", (x, w, x + 16, w + 10), c)
        for _ in range(6): x, v = r.randint(0, 110), r.randint(w + 8, 122); draw("ellipse", (x, v, x + 16, v + 2.4), light)
    drawn(front, waves); return im, w - 2, front
def beach(r):
    im = gradient(jitter((120, 196, 246), r), (206, 236, 250)); y = r.randint(56, 64)
    drawn(im, lambda draw: [draw("rectangle", (-1, y, 129, 129), jitter((64, 164, 220), r)), draw("ellipse", (-70, y + 20, 198, 300), jitter((242, 214, 150), r))]); return im, y + 30, None
def sunset(r):
    im = gradient(jitter((116, 70, 150), r), jitter((252, 164, 84), r)); x = r.randint(30, 98); y = r.randint(84, 92)
    drawn(im, lambda draw: [draw("ellipse", (x - 20, y - 22, x + 20, y + 18), (255, 226, 130)), draw("rectangle", (-1, y, 129, 129), jitter((78, 52, 96), r))]); return im, y + 6, None
def forest(r):
    im = gradient(jitter((176, 216, 190), r), (220, 240, 220)); y = r.randint(78, 86)
    def f(draw):
        for x in range(-6, 134, 14):
            h = r.randint(38, 62); c = jitter((44, 122, 70), r, 14); x += r.randint(-3, 3)
            draw("rectangle", (x - 2, y - 6, x + 2, y + 4), (104, 74, 48)); draw("polygon", (x - 12, y, x, y - h, x + 12, y), c)
        draw("rectangle", (-1, y, 129, 129), jitter((92, 158, 82), r))
    return drawn(im, f), y + 6, None
def room(r):
    wall, floor = jitter((232, 216, 190), r, 16), jitter((176, 124, 80), r, 12); im = gradient(wall, wall); y = r.randint(84, 92); x = r.choice([12, 84])
    drawn(im, lambda draw: [draw("rectangle", (-1, y, 129, 129), floor), draw("rectangle", (-1, y, 129, y + 3), (250, 246, 240)), draw("rectangle", (x, 12, x + 32, 46), (250, 250, 250)), draw("rectangle", (x + 3, 15, x + 29, 43), (150, 204, 246)), draw("rectangle", (x + 15, 12, x + 17, 46), (250, 250, 250))]); return im, y + 6, None


SCENES = dict(sky=(sky, [" in the sky", " in the sky", ", sky", " in the clouds", " on a sky background"]), grass=(grass, [" on grass", " in a meadow", " on the grass", " in a field", " outside", " on a green hill"]),
              night=(night, [" at night", " at night", " in the night sky", " under the stars", " among the stars"]), water=(water, [" on water", " in the water", " in the sea", " on the sea", " in a lake"]), snow=(snow, [" in the snow", " in winter", " on snow"]),
              beach=(beach, [" on the beach", " at the beach", " on sand"]), sunset=(sunset, [" at sunset", " in the evening", " at sunset"]), forest=(forest, [" in a forest", " in the forest", " in the woods"]), room=(room, [" in a room", " indoors", " at home"]))


def draw(name, r):
    """Picture, the line where things stand (None: they float), what is before them (or None), and the words for it."""
    f, words = SCENES[name]; return *f(r), words
