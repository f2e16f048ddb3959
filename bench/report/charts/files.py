"""Charts as self-contained SVG files, for `--plots`."""

from __future__ import annotations

import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from bench.report.charts import svg
from bench.report.charts.model import Picture
from bench.report.charts.scales import LETTER
from bench.report.charts.words import heading

MARGIN = 12.0
SIZE = 1.6  # pixels per user unit where nothing else gives the image a width


def write(pictures: Sequence[Picture], folder: Path, prefix: str, footer: str) -> list[Path]:
    """Write the charts to FOLDER/PREFIX-NAME.svg and return the paths. footer: where the numbers come from."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{prefix}-{picture.name}.svg" for picture in pictures]
    for path, picture in zip(paths, pictures, strict=True):
        path.write_text(document(picture, footer), encoding="utf-8")
    return paths


def document(picture: Picture, footer: str) -> str:
    """The chart with its title above, the footer below and the style sheet inside."""
    what, about = heading(picture)
    chart, chart_height = svg.chart(picture)
    title, title_end = _lines(what, 16, "title", 0)
    subject, top = _lines(about, 11, "about", title_end)
    below, height = _lines(footer, 9, "foot", top + 8 + chart_height)
    box = (-MARGIN, -MARGIN, svg.WIDTH + 2 * MARGIN, height + 2 * MARGIN)
    root = svg.image(
        picture,
        svg.element("style", text=svg.STYLE.read_text()),
        svg.element("rect", class_="ground", x=box[0], y=box[1], width=box[2], height=box[3]),
        *title,
        *subject,
        svg.element("g", *chart, transform=f"translate(0 {top + 8:g})"),
        *below,
        box=box,
    )
    root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "width": f"{SIZE * box[2]:g}"}
    return ET.tostring(root, encoding="unicode") + "\n"


def _lines(text: str, size: float, class_: str, top: float) -> tuple[list[ET.Element], float]:
    """Wrapped text of a font size, from `top` downward, and where it ends."""
    lines = textwrap.wrap(text, int(svg.WIDTH / LETTER * 11 / size))
    placed = [svg.text(0, top + (size + 3) * index + size, line, class_) for index, line in enumerate(lines)]
    return placed, top + (size + 3) * len(lines)
