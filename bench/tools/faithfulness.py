"""What quantization and rounding change in a model's distributions, token by token.

    python -m bench.tools.faithfulness smollm2-135m --quantizations none,auto,int8,int4 --dtypes bfloat16

For each quantization and dtype, over the tokens of the texts, a Markdown row with the total variation and the
divergence from two float32 models: the one without quantization, and the one with the values of the quantized weights,
from which only rounding differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from specdec.conformance.faithfulness import Faithfulness, faithfulness
from specdec.drafts import load_with_drafts
from specdec.models.files.formats import OWN_QUANTIZATIONS
from specdec.models.vocabularies import SAMPLE
from specdec.runtime.command_line import Parser

TEXTS = tuple(f"docs/{name}.md" for name in ("index", "methods", "quantization", "limits"))
HEADER = (
    "| weights | dtype | compared with | mean TV | median | 95 % | largest | mean KL (nats) | same top token |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a bundled name, a folder, a GGUF file or a hub id")
    parser.add_argument("--quantizations", default=",".join(("none", *OWN_QUANTIZATIONS)), help="default: %(default)s")
    parser.add_argument("--dtypes", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--texts", default=",".join(TEXTS), help="files; missing ones are an error")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of each text (default: %(default)s)")
    options = parser.parse_args(arguments)
    texts = [SAMPLE, *(Path(name).read_text() for name in options.texts.split(",") if name)]
    exact = _load(options.target, dtype=torch.float32)
    tokens = [exact.tokenizer(text).input_ids[: options.max_tokens] for text in texts]
    print(f"{sum(map(len, tokens)):,} tokens of {len(tokens)} texts\n\n{HEADER}", flush=True)
    for name in options.quantizations.split(","):
        for dtype in options.dtypes.split(","):
            quantization = None if name == "none" else name
            for row in _rows(options.target, quantization, getattr(torch, dtype), exact, tokens):
                print(row, flush=True)


def _rows(source: str, name: str | None, dtype: torch.dtype, exact: Any, tokens: list[list[int]]) -> Iterator[str]:
    load = partial(_load, source, dtype=dtype, quantization=name)
    model = load()
    label = f"| {name or 'dequantized'} | {str(dtype).removeprefix('torch.')} |"
    yield f"{label} unquantized, float32 | {_figures(faithfulness(model, exact, tokens))} |"
    if name is not None:
        own = faithfulness(model, load(dequantize=True), tokens)
        yield f"{label} its own values, float32 | {_figures(own)} |"


def _figures(found: Faithfulness) -> str:
    tv = found.tv.quantile(torch.tensor([0.5, 0.95, 1.0], dtype=torch.float64)).tolist()
    figures = [f"{value:.4f}" for value in (found.mean_tv, *tv)]
    return " | ".join([*figures, f"{found.mean_kl_nats:.2g}", f"{found.same_top:.1%}"])


def _load(source: str, **options: Any) -> Any:
    return load_with_drafts(source, [], device="cpu", attention="auto", load_format="auto", **options)[0]


if __name__ == "__main__":
    main()
