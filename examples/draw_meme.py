"""Draws meme.jpg: a blackboard on which a model writes its promise, and a model that has finished early.

Needs Pillow and nothing else: its own font, and a seeded random generator, so every run draws the same picture.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

SCALE = 2  # drawn twice as large and reduced, for smooth edges
WIDTH, PANEL_HEIGHT, CAPTION_HEIGHT = 1200, 620, 110
LINE = "I will not recompute the prompt."
DITTO = "ditto"  # stands for a mark under each word of LINE
NUM_LINES = 7

Colour = tuple[int, int, int]
WHITE, INK = (255, 255, 255), (24, 24, 27)
BOARD, WOOD, CHALK = (38, 77, 63), (150, 104, 62), (238, 240, 230)
METAL, DARK_METAL, GLOW, RED = (176, 186, 200), (92, 102, 120), (118, 235, 214), (235, 87, 87)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw meme.jpg, at the top level of the repository.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "meme.jpg", metavar="FILE")
    draw_meme().save(parser.parse_args(argv).output, quality=88, optimize=True)


def draw_meme() -> Image.Image:
    chance = random.Random(0)
    meme = Image.new("RGB", (WIDTH * SCALE, 2 * (PANEL_HEIGHT + CAPTION_HEIGHT) * SCALE), WHITE)
    detention = draw_panel(chance, [LINE] * NUM_LINES, is_tired=True)
    home_early = draw_panel(chance, [LINE] + [DITTO] * (NUM_LINES - 1), is_tired=False)
    top = 0
    for caption, panel in (("480 prompts, the plain way", detention), ("480 prompts, with backprompt", home_early)):
        draw_caption(meme, top, caption)
        meme.paste(panel, (0, (top + CAPTION_HEIGHT) * SCALE))
        top += CAPTION_HEIGHT + PANEL_HEIGHT
    return meme.resize((WIDTH, meme.height // SCALE), Image.Resampling.LANCZOS)


def draw_caption(meme: Image.Image, top: int, caption: str) -> None:
    centre = (WIDTH // 2 * SCALE, (top + CAPTION_HEIGHT // 2) * SCALE)
    ImageDraw.Draw(meme).text(centre, caption, INK, font(68), anchor="mm", stroke_width=SCALE, stroke_fill=INK)


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * SCALE)


def draw_panel(chance: random.Random, lines: Sequence[str], *, is_tired: bool) -> Image.Image:
    """A classroom wall, a blackboard with the lines on it, and the model in front of its right end."""
    panel = Image.new("RGB", (WIDTH * SCALE, PANEL_HEIGHT * SCALE), (243, 233, 214))
    draw = Pen(ImageDraw.Draw(panel))
    draw.box(0, 560, WIDTH, PANEL_HEIGHT, (205, 176, 140))  # the floor
    draw.box(30, 24, 1170, 524, WOOD, radius=14)
    draw.box(48, 42, 1152, 506, BOARD, radius=6)
    draw.box(60, 524, 1140, 540, (122, 82, 46), radius=6)  # the ledge
    for idx, line in enumerate(lines):
        write_in_chalk(panel, chance, line, left=80 + chance.randint(-4, 4), middle=84 + idx * 63, size=51)
    write_in_chalk(panel, chance, "7 / 480" if is_tired else "480 / 480", left=925, middle=84, size=46)
    draw_model(draw, is_tired=is_tired)
    return panel


def write_in_chalk(panel: Image.Image, chance: random.Random, line: str, left: int, middle: int, size: int) -> None:
    """One line by hand: slightly askew, and worn where the board is rough."""
    stencil = Image.new("L", panel.size, 0)
    place = (left * SCALE, middle * SCALE)
    if line == DITTO:
        draw_ditto_marks(ImageDraw.Draw(stencil), *place, size)
    else:
        ImageDraw.Draw(stencil).text(place, line, 255, font(size), anchor="lm", stroke_width=SCALE, stroke_fill=255)
    stencil = stencil.rotate(chance.uniform(-0.5, 0.5), Image.Resampling.BICUBIC, center=place)
    coarse = (panel.width // 3, panel.height // 3)
    grain = Image.frombytes("L", coarse, chance.randbytes(coarse[0] * coarse[1]))
    grain = grain.resize(panel.size, Image.Resampling.BICUBIC).point(lambda value: 165 + value * 90 // 255)
    panel.paste(CHALK, mask=ImageChops.multiply(stencil, grain))


def draw_ditto_marks(draw: ImageDraw.ImageDraw, left: int, middle: int, size: int) -> None:
    """Two short strokes below the middle of each word of LINE."""
    begin = 0
    for word in LINE.split():
        x = left + font(size).getlength(LINE[:begin] + word) - font(size).getlength(word) / 2
        for offset in (-6, 6):
            top, bottom = (
                (x + (offset + 3) * SCALE, middle - 13 * SCALE),
                (x + (offset - 3) * SCALE, middle + 13 * SCALE),
            )
            draw.line((*top, *bottom), 255, 6 * SCALE)
        begin += len(word) + 1


class Pen:
    """Draws in the picture's own coordinates, whatever the scale."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self._draw = draw

    def box(self, left: int, top: int, right: int, bottom: int, fill: Colour, radius: int = 0) -> None:
        self._draw.rounded_rectangle(_scaled(left, top, right, bottom), radius * SCALE, fill)

    def disc(self, x: int, y: int, radius: int, fill: Colour) -> None:
        self._draw.circle(_scaled(x, y), radius * SCALE, fill)

    def line(self, *points: int, fill: Colour, width: int) -> None:
        self._draw.line(_scaled(*points), fill, width * SCALE, joint="curve")
        for x, y in zip(points[::2], points[1::2], strict=True):
            self.disc(x, y, width // 2, fill)

    def arc(self, left: int, top: int, right: int, bottom: int, start: int, end: int, fill: Colour, width: int) -> None:
        self._draw.arc(_scaled(left, top, right, bottom), start, end, fill, width * SCALE)

    def shape(self, *points: int, fill: Colour) -> None:
        self._draw.polygon(_scaled(*points), fill)

    def label(self, x: int, y: int, string: str, fill: Colour, size: int) -> None:
        self._draw.text(_scaled(x, y), string, fill, font(size), anchor="mm")


def _scaled(*numbers: int) -> tuple[int, ...]:
    return tuple(number * SCALE for number in numbers)


def draw_model(draw: Pen, *, is_tired: bool) -> None:
    """The model: a small robot that is writing on, or that has finished early."""
    for x in (1010, 1070):
        draw.line(x, 500, x, 570, fill=DARK_METAL, width=26)
        draw.box(x - 28, 562, x + 22, 590, INK, radius=12)
    draw.line(1040, 190, 1040, 225, fill=DARK_METAL, width=8)
    draw.disc(1040, 180, 15, RED if is_tired else GLOW)
    draw.box(965, 355, 1115, 515, METAL, radius=26)
    draw.box(995, 390, 1085, 450, DARK_METAL, radius=10)
    draw.label(1040, 420, "LM", GLOW, 40)
    draw.box(955, 222, 1125, 348, METAL, radius=34)
    draw.box(973, 242, 1107, 326, INK, radius=22)
    if is_tired:
        draw_tired_face(draw)
    else:
        draw_cool_face(draw)


def draw_tired_face(draw: Pen) -> None:
    """Half-closed eyes, sweat, and an arm that goes on writing."""
    for x in (1010, 1070):
        draw.disc(x, 276, 15, GLOW)
        draw.box(x - 17, 258, x + 17, 274, INK)
        draw.line(x - 16, 275, x + 16, 275, fill=GLOW, width=4)
    draw.arc(1020, 298, 1060, 326, 190, 350, GLOW, 5)
    for x, y in ((1136, 206), (1139, 252), (942, 246)):
        draw.shape(x, y - 16, x - 9, y + 3, x + 9, y + 3, fill=(108, 180, 245))
        draw.disc(x, y + 4, 9, (108, 180, 245))
    draw.line(1112, 385, 1150, 430, 1128, 480, fill=DARK_METAL, width=24)
    draw.line(970, 385, 925, 430, 900, 452, fill=DARK_METAL, width=24)
    draw.disc(896, 456, 17, METAL)
    draw.line(884, 458, 868, 462, fill=CHALK, width=10)


def draw_cool_face(draw: Pen) -> None:
    """Sunglasses, a smile, and a hand that has nothing left to do."""
    draw.box(978, 258, 1036, 292, (70, 76, 92), radius=12)
    draw.box(1044, 258, 1102, 292, (70, 76, 92), radius=12)
    draw.line(960, 264, 1120, 264, fill=(70, 76, 92), width=8)
    for x in (992, 1058):
        draw.line(x, 284, x + 14, 268, fill=WHITE, width=5)
    draw.arc(1005, 276, 1075, 318, 20, 160, GLOW, 6)
    draw.line(970, 385, 930, 430, 962, 470, fill=DARK_METAL, width=24)
    draw.line(1112, 385, 1152, 350, 1146, 290, fill=DARK_METAL, width=24)
    draw.disc(1146, 282, 18, METAL)


if __name__ == "__main__":
    main()
