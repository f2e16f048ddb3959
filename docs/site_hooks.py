"""What the site shows besides its pages: committed results, reports of runs, import levels, formulas as MathML."""

from __future__ import annotations

import ast
import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "bench" / "baselines", ROOT / "specdec" / "weights")  # become part of the site, as do these pages
MATH = re.compile(r"(<(pre|code|script|style)\b.*?</\2>)|\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.S)
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
SUFFIXES = {".md", ".html", ".json", ".jsonl", ".png", ".svg", ".py"}


def on_files(files: Any, config: Any) -> Any:
    """Add FOLDERS and PAGES at the top of the site."""
    from mkdocs.structure.files import File

    shown = [(path, folder.parent) for folder in FOLDERS for path in sorted(folder.rglob("*"))]
    for path, parent in [*shown, *((ROOT / name, ROOT) for name in PAGES)]:
        if path.suffix in SUFFIXES:
            name = path.relative_to(parent).as_posix()
            files.append(File(name, str(parent), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in reports and import levels, and lead links that work in a checkout to the same pages of the site."""
    inside = r"\]\(((?:\.\./)*?)(?:\.\./)?(?:docs/|bench/(?=baselines)|specdec/(?=weights))"
    markdown = re.sub(inside, r"](\1", markdown)
    markdown = re.sub(r"<!-- report: (\S+) -->", lambda match: _report(match[1]), markdown)
    return re.sub(r"<!-- import levels: (\w+) -->", lambda match: _levels(match[1]), markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Turn the notebook's formulas into MathML, which browsers show without a script from elsewhere."""
    return MATH.sub(_formula, content) if page.file.src_path.endswith(".ipynb") else content


def _formula(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    code, _, block, inline = match.groups()
    if block:  # may be wider than a narrow screen
        return f'<span class="formula">{convert(html.unescape(block), display="block")}</span>'
    return code or convert(html.unescape(inline))


def _report(run: str) -> str:
    """What `python -m bench.report` prints of a committed run."""
    command = [sys.executable, "-m", "bench.report", run]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return f"```text\n{printed.strip()}\n```"


def _levels(package: str) -> str:
    """ROOMS of tests/project/test_imports.py as a table, from the bottom to the top."""
    tree = ast.parse((ROOT / "tests" / "project" / "test_imports.py").read_text())
    named = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    levels = ast.literal_eval(named["ROOMS"])[package]
    rows = [f"| {number} | {', '.join(f'`{name}`' for name in sorted(names))} |" for number, names in enumerate(levels)]
    return "\n".join(["| level | modules |", "|---|---|", *rows])
