"""`python -m fledge.data.world docs/`: the pictures and the counts of docs/world.md, drawn and counted anew."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fledge.data import world
from fledge.data.world.drawing import draw_all, font_folder

BEGIN, END = "<!-- counts: begin -->", "<!-- counts: end -->"


def sheet(rows: list[tuple[str, np.ndarray]], columns: int, label: int = 200) -> Image.Image:
    """Rows of a title and pictures (n, S, S), ink on white; 16 greys, so that the file stays small."""
    size, gap = world.SIZE, 4
    page = Image.new("L", (label + columns * (size + gap), len(rows) * (size + gap) + gap), 255)
    pen, font = ImageDraw.Draw(page), ImageFont.truetype(str(font_folder() / "DejaVuSans.ttf"), 13)
    for row, (title, pictures) in enumerate(rows):
        top = gap + row * (size + gap)
        pen.text((gap, top + size // 2), title, fill=0, font=font, anchor="lm")
        for column, picture in enumerate(pictures[:columns]):
            page.paste(Image.fromarray(255 - picture), (label + column * (size + gap), top))
    return page.quantize(16)


def by_script(columns: int = 24) -> Image.Image:
    """Pictures of every script and class, drawn at random from the seen fonts."""
    glyphs, rng = world.glyphs(fonts="seen"), random.Random(0)
    count = Counter(glyphs.script.tolist())
    rows = []
    for script, n in count.most_common():
        ids = np.flatnonzero(glyphs.script == script)
        rows.append((f"{script} ({n:,})", glyphs.images(sorted(rng.sample(ids.tolist(), min(columns, n))))))
    return sheet(rows, columns)


def by_font(text: str = "AGQRaegqyßéñΩδжאش9@&∮⇄♞✈") -> Image.Image:
    """The same characters in every font; a gap where a font has no glyph; the unseen family last."""
    glyphs, rows = world.glyphs(), []
    place = {(f, c): i for i, (f, c) in enumerate(zip(glyphs.font.tolist(), glyphs.codepoint.tolist(), strict=True))}
    blank = np.zeros((world.SIZE, world.SIZE), np.uint8)
    for f, font in enumerate(world.FONTS):
        have = [place.get((f, ord(char))) for char in text]
        if sum(i is not None for i in have) > 3:
            pictures = np.stack([blank if i is None else glyphs.image(i) for i in have])
            rows.append((f"{font.family}, {font.style}{'' if font.seen else ' *'}", pictures))
    return sheet(rows, len(text), label=270)


def counts() -> str:
    """A Markdown table: how many of everything each split has."""
    rows = {
        "characters": lambda s: len(world.characters(s)),
        "pictures, seen fonts": lambda s: len(world.glyphs(s, "seen")),
        "pictures, unseen family": lambda s: len(world.glyphs(s, "unseen")),
        "statements": lambda s: len(world.documents("statements", s)),
        "statements, characters of text": lambda s: sum(map(len, world.documents("statements", s))),
        "prose documents": lambda s: len(world.documents("prose", s)),
        "prose, characters of text": lambda s: sum(map(len, world.documents("prose", s))),
        "questions": lambda s: len(world.questions(s)),
        **{f"· {k}": lambda s, k=k: sum(q["kind"] == k for q in world.questions(s)) for k in world.KINDS},
        "preferences": lambda s: len(world.preferences(s)),
    }
    lines = [f"| | {' | '.join(world.SPLITS)} | all |", "|---|" + "---:|" * (len(world.SPLITS) + 1)]
    for title, count in rows.items():
        numbers = [count(split) for split in world.SPLITS]
        lines.append(f"| {title} | " + " | ".join(f"{n:,}" for n in [*numbers, sum(numbers)]) + " |")
    return "\n".join(lines)


def main(folder: Path) -> None:
    begin = time.perf_counter()
    drawn = len(draw_all()[0])
    print(f"{drawn:,} pictures drawn in {time.perf_counter() - begin:.1f} s")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, picture in {"world-scripts": by_script(), "world-fonts": by_font()}.items():
        picture.save(folder / "images" / f"{name}.png", optimize=True)
    page = folder / "world.md"
    if page.exists():
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}\n{counts()}\n{END}{after}", encoding="utf-8")
    else:
        print(counts())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
