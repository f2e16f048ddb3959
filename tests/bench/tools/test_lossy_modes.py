"""The cost of lossy rules: exact distances of real outputs on a toy, and none for lossless verification."""

from __future__ import annotations

import pytest
import torch
from helpers.audited import DRAFT, PROMPTS, TARGET

from bench.tools import lossy_modes
from specdec import SamplingParams
from specdec.conformance.reference import Reference
from specdec.conformance.statistics.lossy_sizes import first_token
from specdec.conformance.statistics.sizes import total_variation
from specdec.lossy import lossy_rule

NAMES = (
    "lossy:typical(epsilon=0.3, delta=0.3)",
    "lossy:threshold(single=0.3, acc=1)",
    "lossy:fly(window=1, entropy=0.3)",
)


def test_costs_on_a_toy() -> None:
    references = [Reference(model, SamplingParams(max_tokens=40)) for model in (TARGET, DRAFT)]
    lossless, typical, threshold, fly = lossy_modes.measure(TARGET, DRAFT, references, PROMPTS * 2, NAMES)
    assert (lossless.tv.estimate, lossless.kl.estimate, lossless.logprob_change.estimate) == (0, 0, 0)
    assert lossless.speedup.estimate == 1
    for each in (typical, threshold):
        assert 0.02 < each.tv.low <= each.tv.estimate <= each.tv.high < 1
        assert each.tv.estimate**2 * 2 <= each.kl.estimate  # Pinsker
        assert each.num_tokens == 6 * 40
    assert fly.tv is fly.kl is None
    assert fly.acceptance_rate > lossless.acceptance_rate
    assert "| no formula | no formula |" in lossy_modes.line(fly)


def test_distances_by_hand() -> None:
    """Each accepted or recovered token by the formula with its own two rows, and 0 for the prefill's and the bonus."""
    references = [Reference(model, SamplingParams(max_tokens=12)) for model in (TARGET, DRAFT)]
    engine = lossy_modes.Engine(TARGET, method="draft_model", draft=DRAFT, verification=NAMES[0])
    (completion,) = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=12, ignore_eos=True))
    text, expected = [*PROMPTS[0]], 0.0
    for token, source in zip(completion.token_ids, completion.sources, strict=True):
        rows = [model.table[text[-2], text[-1]].double()[None] for model in (TARGET, DRAFT)]
        if source in ("accepted", "recovered"):
            expected += float(total_variation(first_token(lossy_rule(NAMES[0]), *rows), rows[0]))
        text.append(token)
    found = lossy_modes.distances(NAMES[0], references, [completion])
    assert found is not None
    assert found[0] == pytest.approx([expected / 12], abs=1e-6)
    assert {"accepted", "bonus"} & set(completion.sources)
    assert torch.isfinite(torch.tensor(found[1])).all()
