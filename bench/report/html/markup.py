"""Elements of HTML and SVG. Text is escaped wherever it comes from: only `Markup` is taken as it is."""

from __future__ import annotations

import html


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


EMPTY = frozenset(("br", "meta", "input", "path", "line", "circle", "rect"))  # elements without an end


def element(tag: str, /, *children: str, **attributes: str | float | bool | None) -> Markup:
    """An element. attributes: by their names, with _ for - and at the end of `class_`; None is left out."""
    start = f"<{tag}{''.join(_attribute(*each) for each in attributes.items())}>"
    if tag in EMPTY:
        return Markup(start if tag in ("br", "meta", "input") else f"{start[:-1]}/>")
    return Markup(f"{start}{join(*children)}</{tag}>")


def join(*children: str) -> Markup:
    """Children one after the other, text escaped."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    if name == "viewbox":
        name = "viewBox"  # names of SVG have capitals
    if value is True:
        return f" {name}"
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {name}="{html.escape(text)}"'
