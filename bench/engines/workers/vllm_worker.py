"""A worker that runs vLLM: a script for the interpreter that has it, without other dependencies.

The first request describes the engine, each later one a batch of prompts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args, get_type_hints

from protocol import Refused, main  # beside this file

COUNTERS = {
    "num_drafts": "vllm:spec_decode_num_drafts",
    "num_drafted": "vllm:spec_decode_num_draft_tokens",
    "num_accepted": "vllm:spec_decode_num_accepted_tokens",
    "accepted_at": "vllm:spec_decode_num_accepted_tokens_per_pos",
}
FILLED_IN_BY_VLLM = {"target_model_config", "target_parallel_config", "draft_model_config", "draft_parallel_config"}


def serve(requests: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Answer each request; the first one starts the engine."""
    llm, answer = start(**next(requests))
    yield answer
    for request in requests:
        yield generate(llm, **request)


def start(
    engine: dict[str, Any], speculative: dict[str, Any] | None, optional: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Start the engine; returns it and its description. Arguments and errors as for `checked`."""
    import vllm

    arguments = checked(engine, speculative, optional)
    llm = vllm.LLM(**arguments)
    check_rule(llm.llm_engine.vllm_config, vllm.__version__)
    dropped = sorted(set(optional) - set(arguments))
    return llm, {"version": vllm.__version__, "dropped": dropped, **described(llm)}


def checked(engine: dict[str, Any], speculative: dict[str, Any] | None, optional: dict[str, Any]) -> dict[str, Any]:
    """The engine's arguments, checked against the installed version.

    engine, speculative: of vLLM's EngineArgs and SpeculativeConfig. optional: EngineArgs that are dropped if unknown.
    Raises Refused for other unknown arguments.
    """
    import vllm
    from vllm import EngineArgs
    from vllm.config import SpeculativeConfig

    known = field_names(EngineArgs)
    check_keys("engine arguments", engine, known, vllm.__version__)
    if speculative is not None:
        names = field_names(SpeculativeConfig) - FILLED_IN_BY_VLLM
        check_keys("speculative_config", speculative, names, vllm.__version__)
        check_method(speculative.get("method"), SpeculativeConfig, vllm.__version__)
        engine = {**engine, "speculative_config": speculative}
    return {**engine, **{key: value for key, value in optional.items() if key in known}}


def field_names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def check_keys(name: str, given: Iterable[str], known: set[str], version: str) -> None:
    """Raise Refused for keys that this version does not have."""
    if unknown := sorted(set(given) - known):
        raise Refused(
            f"{name} {', '.join(unknown)} must be known to vLLM {version}, which is installed; "
            f"use {', '.join(sorted(known))}"
        )


def check_method(method: str | None, kind: Any, version: str) -> None:
    """Raise Refused for a method that this version does not list, if it lists methods."""
    hint = get_type_hints(kind).get("method")
    known = {name for part in (hint, *get_args(hint)) for name in get_args(part) if isinstance(name, str)}
    if known and method is not None and method not in known:
        raise Refused(
            f"method={method} must be known to vLLM {version}, which is installed; use {', '.join(sorted(known))}"
        )


def check_rule(config: Any, version: str) -> None:
    """Raise Refused if vLLM would ignore the verification rule: only its newer model runner implements block."""
    rule = getattr(config.speculative_config, "rejection_sample_method", "standard")
    if rule == "block" and not getattr(config, "use_v2_model_runner", False):
        raise Refused(
            f"rejection_sample_method=block must be implemented by the model runner, but that of vLLM {version} for "
            "this configuration does not; use --verification token"
        )


def described(llm: Any) -> dict[str, Any]:
    """The configuration in effect."""
    import torch

    config = llm.llm_engine.vllm_config
    return {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "device": config.device_config.device.type,
        "max_model_len": config.model_config.max_model_len,
        "num_threads": torch.get_num_threads(),
    }


def generate(llm: Any, prompts: list[list[int]], sampling: list[dict[str, Any]]) -> dict[str, Any]:
    """Continue all prompts together, recording each step of the engine.

    prompts: token ids. sampling: arguments of vLLM's SamplingParams for each. Times are in seconds from the start of
    this call; counters are the increase of vLLM's counters during this call.
    """
    before = counters(llm)
    rows = {str(index): Row() for index in range(len(prompts))}
    start_s = time.perf_counter()
    for name, prompt, arguments in zip(rows, prompts, sampling, strict=True):
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params(arguments))
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        now_s = time.perf_counter() - start_s
        for output in outputs:
            rows[output.request_id].take(output.outputs[0], now_s)
            if output.finished and list(output.prompt_token_ids) != prompts[int(output.request_id)]:
                raise RuntimeError(f"prompt {output.request_id} must be continued unchanged, but vLLM changed it")
    return {
        "results": [dataclasses.asdict(row) for row in rows.values()],
        "counters": difference(counters(llm), before),
    }


def params(arguments: Mapping[str, Any]) -> Any:
    """vLLM's SamplingParams, for outputs after every step, as token ids only."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(**arguments, detokenize=False, output_kind=RequestOutputKind.DELTA)


@dataclasses.dataclass
class Row:
    """The result of a prompt.

    emitted: number of tokens per step, the prefill's first. first_s, last_s: time of the first and last token.
    drafts: vLLM's draft statistics of this prompt, if available.
    """

    token_ids: list[int] = dataclasses.field(default_factory=list)
    emitted: list[int] = dataclasses.field(default_factory=list)
    first_s: float | None = None
    last_s: float | None = None
    finish_reason: str | None = None
    drafts: dict[str, Any] | None = None

    def take(self, output: Any, now_s: float) -> None:
        """Add the output of a step."""
        if output.token_ids:
            self.token_ids += output.token_ids
            self.emitted.append(len(output.token_ids))
            self.first_s = now_s if self.first_s is None else self.first_s
            self.last_s = now_s
        self.finish_reason = output.finish_reason
        drafts = getattr(output, "spec_decode_metrics", None)  # missing in older versions
        if drafts is not None:
            self.drafts = {"histogram": list(drafts.histogram), "num_drafted": drafts.num_draft_tokens}


def counters(llm: Any) -> dict[str, Any] | None:
    """vLLM's cumulative draft counters under the names of COUNTERS; None without drafting."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    if not set(COUNTERS.values()) <= set(metrics):
        return None
    return {name: getattr(metrics[key], "values", None) or metrics[key].value for name, key in COUNTERS.items()}


def difference(after: dict[str, Any] | None, before: dict[str, Any] | None) -> dict[str, Any] | None:
    if after is None or before is None:
        return None
    return {
        name: [new - old for new, old in zip(after[name], before[name], strict=True)]
        if isinstance(after[name], list)
        else after[name] - before[name]
        for name in after
    }


if __name__ == "__main__":
    main(serve)
