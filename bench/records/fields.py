"""What each number of a record means, in a sentence: the glossary of the reports, and the order of their columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_IDENTITY = """
engine | | What decoded: specdec, transformers, vllm, or a vLLM server.
engine_version | | The engine's version.
pair | | The pair of models, by its name in pairs.toml.
target | | The large model, whose distribution is sampled.
draft | | What proposes tokens: a model, a head or a table; empty if the method needs none.
method | | How tokens are proposed; autoregressive is plain decoding, which proposes none.
gamma | tokens | Tokens proposed per step; auto: as many as are worth verifying.
placement | | Where the layers of target and draft are on several devices.
workload | | Where the prompts are from.
prompt_format | | Prompts as a chat (instruct) or as text to go on with (raw).
prompt_lengths | tokens | The least and the largest length of the prompts that were chosen; empty if all.
dtype | | Number format of the weights.
device | | What the models ran on.
batch_size | prompts | Prompts decoded together.
verification | | The rule that accepts drafted tokens: token by token, as a block, or coupled to the draft's noise.
load_format | | How the weights were had; dummy are random ones, whose times alone mean anything.
quantisation | | How the weights are stored, if not in the number format.
engine_options | | Options that were handed to vLLM.
max_tokens | tokens | The most that a prompt may be answered with.
temperature | 1 | Of sampling; 0 is greedy.
top_p | 1 | Mass of the likeliest tokens that are sampled from; 1 is all.
top_k | tokens | Number of the likeliest tokens that are sampled from; 0 is all.
seed | | Of prompts and draws.
rate | requests/s | Requests that arrive in a second, as asked for, whether or not the earlier ones are done.
arrivals | | Whether requests arrive at random (poisson) or at equal distances (constant).
duration_s | s | How long requests arrived.
drain_s | s | How long after the last arrivals a request may still be finished.
ttft_limit_s | s | The longest time to a first token of a request that counts as good.
inter_token_limit_s | s | The longest time from token to token of a request that counts as good.
num_prompts | prompts | Prompts that were decoded.
num_rows_skipped | rows | Malformed rows of the workload that were left out.
num_rows_passed_over | rows | Sound rows of the workload without a prompt, as a dialogue that begins with an answer.
reference_engine | | The engine that the others are compared with.
"""
_RESULTS = """
throughput_tok_s | tokens/s | Tokens emitted for all prompts, over the time of all rounds.
latency_s | s | From a request's start to its last token, mean over prompts.
ttft_s | s | From a request's start to its first token, mean over prompts.
inter_token_s | s | From a token to the next, mean over prompts.
speedup | 1 | Time per emitted token of the same engine's plain decoding beside it, over its own; geometric mean.
speedup_low | 1 | Lower end of the 95 % bootstrap interval of the speed-up, over prompts.
speedup_high | 1 | Upper end of the 95 % bootstrap interval of the speed-up, over prompts.
predicted_speedup | 1 | What measured acceptance by position and times of drafting, scoring and verifying imply.
expected_speedup | 1 | What the closed form of Leviathan et al. 2023 gives with the first position's acceptance rate.
speedup_from_truncation | 1 | Measured less predicted that is due to tokens cut behind a stop token.
speedup_from_bookkeeping | 1 | Measured less predicted that is due to bookkeeping around the phases.
speedup_from_prefill | 1 | Measured less predicted that is due to the prompt, which speculation does not shorten.
speedup_from_averaging | 1 | The rest: means over prompts against ratios of total times.
speedup_of_reference | 1 | How many times as fast the reference engine is beside it, with the same method and gamma.
speedup_of_reference_low | 1 | Lower end of the 95 % interval of the speed-up of the reference engine.
speedup_of_reference_high | 1 | Upper end of the 95 % interval of the speed-up of the reference engine.
cost_ratio | 1 | One drafted token over one plain step of the target.
step_cost_ratio | 1 | Scoring and verifying a step over one plain step.
acceptance_rate | 1 | Accepted over drafted tokens.
acceptance_rate_low | 1 | Lower end of the 95 % bootstrap interval of the acceptance rate, over prompts.
acceptance_rate_high | 1 | Upper end of the 95 % bootstrap interval of the acceptance rate, over prompts.
mean_acceptance_length | tokens | Tokens out per target call, the recovered or bonus token included.
system_efficiency | 1 | Emitted tokens over what a perfect draft would have emitted.
num_steps | steps | Decode steps, that is target calls, of all prompts.
num_drafted | tokens | Tokens proposed.
num_accepted | tokens | Proposed tokens that were kept.
num_tokens | tokens | Tokens emitted.
draft_time_per_token_s | s | Time spent proposing, over tokens proposed.
prefill_time_s | s | Time in the target's forward passes over prompts, all prompts together.
scoring_time_s | s | Time in the target's forward passes of decode steps, all prompts together.
verification_time_s | s | Time in accepting, recovering and drawing, all prompts together.
bookkeeping_time_s | s | Time in everything else, all prompts together.
recording_time_s | s | Time in recording shapes for the device, all prompts together.
warm_up_time_s | s | Time before the measurement, compilation included.
overhead_rate | 1 | Share of the time outside model forwards; empty where drafting is a model's work, too.
num_outputs_equal | prompts | Greedy outputs that equal the same engine's plain decoding, token for token.
num_outputs_equal_reference | prompts | Greedy outputs that equal the reference engine's, token for token.
output_sha256 | | Digest of the emitted token ids.
"""
_QUALITY = """
quality_metric | | The workload's own score: exact_match, pass_at_1 or rouge_1.
quality | 1 | Mean score of the outputs, from 0 to 1.
quality_baseline | 1 | Mean score of plain decoding's outputs.
quality_difference | 1 | Mean of the paired differences between the two.
quality_difference_low | 1 | Lower end of the 95 % bootstrap interval of the difference in quality, over prompts.
quality_difference_high | 1 | Upper end of the 95 % bootstrap interval of the difference in quality, over prompts.
quality_reason | | Why there is no score.
"""
_ENERGY = """
energy_j | J | Energy of the whole device while the prompts were decoded, idle power included.
energy_per_token_j | J | Energy of the GPUs over emitted tokens.
energy_per_accepted_token_j | J | Energy of the GPUs over accepted tokens.
average_power_w | W | Mean power of the GPUs over the time of the measured rounds.
peak_power_w | W | Highest power sampled.
average_utilisation_rate | 1 | Mean share of the time in which the GPUs worked.
peak_memory_bytes | bytes | Most memory in use on the GPUs.
peak_temperature_c | °C | Highest temperature of a GPU.
energy_reason | | Why there is no energy.
counted_energy_j | J | Energy by the GPUs' own counters; empty where they have none.
energy_difference_rate | 1 | By how much the counters say more than the integral of sampled power, over the latter.
cpu_energy_j | J | Energy of the processor packages over the time of the measured rounds.
cpu_energy_reason | | Why there is no energy of the processors.
telemetry_hz | 1/s | Samples a second.
telemetry_overhead_rate | 1 | Share of the time that sampling took.
"""
_PUBLISHED = """
published_speedup | 1 | What others measured with this pair and method.
published_acceptance_rate | 1 | The acceptance rate that others measured.
published_mean_acceptance_length | tokens | The mean acceptance length that others measured.
published_setting | | What they measured it on.
published_source | | Where they say so.
"""
_COSTS = """
axis | | What is made larger: a step's width, context, batch, the vocabulary, or a text.
size | | How large.
tokens | tokens | Tokens that this work handles.
median_s | s | Median time of doing it once.
bytes_read | bytes | What must be read from memory, at the least.
read_bandwidth | bytes/s | At which this machine reads memory, measured in the same run.
prompt_tokens | tokens | Of all prompts together that went through the slots.
roofline_s | s | What reading takes at the least.
roofline_share | 1 | The time that the machine could take at best over the time measured.
depth | 1 | Levels of the tree that was drawn and scored.
expected_tokens | 1 | Tokens that a step with this tree emits, by what was measured of the draft.
step_s | s | Time of a decode step of the whole batch.
draft_share | 1 | Share of a step spent proposing.
scoring_share | 1 | Share of a step in target forward passes.
verification_share | 1 | Share of a step in accepting, recovering and drawing.
bookkeeping_share | 1 | Share of a step in everything else.
"""
_CERTIFICATES = """
verdict | | Of an audit: lossless, lossy or inconclusive, with the distance that it rests on.
p_value | 1 | How likely such outputs are under the target's distribution; the least of all instruments, corrected.
control_p_value | 1 | Corrected p-value of the engine's own plain decoding.
arms_p_value | 1 | That speculation and plain decoding have one distribution, without a reference.
tv_lower_bound | 1 | The distance to the target's distribution in total variation is at least this.
tv_upper_bound | 1 | Along the direction looked at it is at most this.
min_detectable_tv | 1 | The least distance along the direction that the audit would have found.
max_tv | 1 | The distance that it was asked to find.
direction | | The direction looked at: equality, towards the draft, or towards what the text suggests.
num_draws | tokens | Tokens that were judged.
num_draws_needed | tokens | How many it takes to find what was asked for.
num_outputs | outputs | Outputs that were judged.
control_num_draws | tokens | Tokens of plain decoding that were judged.
control_num_outputs | outputs | Outputs of plain decoding that were judged.
surprise_z | 1 | Surprise of the tokens in standard deviations, for reading only.
control_surprise_z | 1 | Surprise of plain decoding, in standard deviations.
largest_gap | logits | The most by which a token missed the distribution's support.
control_largest_gap | logits | The most by which a token of plain decoding missed the distribution's support.
alpha | 1 | The probability that a lossless engine is called lossy, at the most.
beta | 1 | The probability that a detectable distance is missed, at the most.
logit_noise | logits | What rounding explains.
options | | Options of the engine that was audited.
command | | How to do it again.
schema_version | | Of the record's form.
"""
_LOAD = """
num_requests | requests | Requests that arrived.
num_finished | requests | Requests that were done in time.
num_unfinished | requests | Requests that were not done when duration and drain were over.
num_refused | requests | Requests that the server, or a client with too much in flight, did not take.
offered_rate | requests/s | Requests that arrived, over the duration.
achieved_rate | requests/s | Finished requests over the time until the last token.
goodput | requests/s | Finished requests that kept both limits, over the time until the last token.
within_limits_rate | 1 | Share of all requests that kept both limits.
ttft_p50_s | s | Half of all requests have their first token within this time of their arrival.
ttft_p95_s | s | Of all requests 95 % have their first token within this time of their arrival.
ttft_p99_s | s | Of all requests 99 % have their first token within this time of their arrival.
inter_token_p50_s | s | Half of all requests have at most this time from token to token.
inter_token_p95_s | s | Of all requests 95 % have at most this time from token to token.
inter_token_p99_s | s | Of all requests 99 % have at most this time from token to token.
latency_p50_s | s | Half of all requests are done within this time of their arrival; unfinished ones are the slowest.
latency_p95_s | s | Of all requests 95 % are done within this time of their arrival; unfinished ones are the slowest.
latency_p99_s | s | Of all requests 99 % are done within this time of their arrival; unfinished ones are the slowest.
queue_s | s | From the arrival to the slot, mean over finished requests.
queue_p50_s | s | Half of all requests wait at most so long for a slot.
queue_p95_s | s | Of all requests 95 % wait at most so long for a slot.
queue_p99_s | s | Of all requests 99 % wait at most so long for a slot.
mean_num_in_flight | requests | Requests that have arrived and are not done, on the average.
peak_num_in_flight | requests | The most requests that had arrived and were not done at any time.
busy_rate | 1 | Share of the time that was not spent waiting for an arrival.
peak_send_delay_s | s | How late a client was at the most; empty where nothing is sent.
"""
_TEXTS = (_IDENTITY, _RESULTS, _LOAD, _QUALITY, _ENERGY, _PUBLISHED, _COSTS, _CERTIFICATES)
# names of a family: what is measured, then which value of its distribution
_FAMILIES = (
    (r"(?P<of>.+?)_?p(?P<percent>50|90|95|99)(?P<unit>_s)?", "{percent} % of requests have a {of} of at most this."),
    (r"(?P<of>.+)_(?P<end>low|high)", "The {end} end of the 95 % interval of {of}."),
    (r"per_prompt_(?P<of>.+)", "The {of} of each prompt."),
    (r"(?P<arm>baseline|reference)_(?P<of>.+)", "The {of} of the {arm} beside it."),
)


@dataclass(frozen=True, slots=True)
class Column:
    """A field of a record. unit: SI, "1" for a ratio, "" for what is no number. meaning: one sentence."""

    name: str
    unit: str
    meaning: str

    @property
    def heading(self) -> str:
        """The name in words."""
        return re.sub(r"_(s|j|w|c|tok_s)$", "", self.name).replace("_", " ")


def _parse(text: str) -> list[Column]:
    return [Column(*(part.strip() for part in line.split("|"))) for line in text.strip().splitlines()]


COLUMNS = {column.name: column for text in _TEXTS for column in _parse(text)}


def column(name: str) -> Column:
    """What a field means; of a field that is not known here, what its name tells."""
    if name in COLUMNS:
        return COLUMNS[name]
    unit = "s" if name.endswith("_s") else "J" if name.endswith("_j") else ""
    for pattern, meaning in _FAMILIES:
        if found := re.fullmatch(pattern, name):
            words = {key: (part or "").replace("_", " ") for key, part in found.groupdict().items()}
            return Column(name, unit, meaning.format(**words))
    return Column(name, unit, f"The record's field {name}.")


def scalars(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that are one value each; of those that are None the known ones, as others may be lists."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, str | int | float) or (value is None and name in COLUMNS)
    }


def ordered(names: Iterable[str]) -> list[str]:
    """Names in the order of the glossary, then those that it lacks, by alphabet."""
    places = {name: place for place, name in enumerate(COLUMNS)}
    return sorted(set(names), key=lambda name: (places.get(name, len(places)), name))
