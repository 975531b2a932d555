"""Draw the registry's icon and banner as SVG, and as PNG with Chromium: `.venv/bin/python scripts/icon.py`.

A star on blue, drawn cell by cell in reading order; the cells that are still to come are bits.
"""

import math
import random

from playwright.sync_api import sync_playwright

from environment import ROOT, find_chromium

FOLDER = ROOT / "docs"
CELLS, CELL, GAP = 12, 30, 3  # of a side; pixels
DRAWN = 8.5  # rows of cells
GROUND, STAR, STILL, ONE, ZERO = "#2450dc", "#e0202c", "#14161c", "#8f98ab", "#2b303c"
FONT = "font-family='DejaVu Sans, Arial, sans-serif'"


def main() -> None:
    icon = svg(400, 400, picture(20, 20))
    words = (
        f"<text x='520' y='250' {FONT} font-size='112' font-weight='bold' fill='#ffffff'>BitDance</text>"
        f"<text x='526' y='318' {FONT} font-size='34' fill='#b9c2d6'>pictures as bits, drawn patch by patch</text>"
    )
    banner = svg(1260, 540, picture(90, 90) + words)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox", "--disable-gpu"])
        for name, (width, height, text) in {"icon": icon, "banner": banner}.items():
            (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_content(f"<body style='margin:0'>{text}</body>")
            page.screenshot(path=FOLDER / f"{name}.png", omit_background=True)
        browser.close()


def svg(width: int, height: int, inside: str) -> tuple[int, int, str]:
    frame = f"<rect width='{width}' height='{height}' rx='40' fill='{STILL}'/>"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'>"
    return width, height, f"{head}{frame}{inside}</svg>\n"


def picture(left: int, top: int) -> str:
    bits = random.Random(16)
    return "".join(cell(row, column, left, top, bits) for row in range(CELLS) for column in range(CELLS))


def cell(row: int, column: int, left: int, top: int, bits: random.Random) -> str:
    """Draw a cell: the picture's colour, or a bit as a smaller square."""
    is_drawn = row * CELLS + column < DRAWN * CELLS
    if is_drawn:
        colour = STAR if in_star(column + 0.5 - CELLS / 2, row + 0.5 - CELLS / 2) else GROUND
    else:
        colour = bits.choice((ONE, ZERO))
    side = CELL - GAP if is_drawn else CELL // 2
    x, y = (start + place * CELL + (CELL - side) / 2 for start, place in ((left, column), (top, row)))
    return f"<rect x='{x:g}' y='{y:g}' width='{side}' height='{side}' rx='4' fill='{colour}'/>"


def in_star(x: float, y: float) -> bool:
    """Whether a point, in cells from the middle, lies in a star of five points."""
    outer, inner, step = CELLS * 0.52, CELLS * 0.24, math.pi / 5
    angle = math.atan2(x, -y) % (2 * step)
    angle = min(angle, 2 * step - angle)  # from the nearest point's axis, up to `step`
    # the edge from (outer, 0) to (inner, step) in polar coordinates
    edge = outer * inner * math.sin(step) / (inner * math.sin(step - angle) + outer * math.sin(angle))
    return math.hypot(x, y) <= edge


if __name__ == "__main__":
    main()
