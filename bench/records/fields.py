"""Every field of a record, declared once: what it means, which records have it, and how reports show it.

Reading, the glossary, the terminal, the HTML page, Markdown and CSV follow this table, and tests hold what is built
against it: a new field takes one entry here and one line that computes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import UnionType
from typing import Any

from bench.records.schema import PERCENTILES

CELLS, LOADS, COSTS, CERTIFICATES = KINDS = ("cells", "loads", "costs", "certificates")
DECODED = (CELLS, LOADS)
MEASURED = (CELLS, LOADS, COSTS)
INTERVAL = " [95 %]"  # of the heading of a column with intervals


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a record.

    type: of its value, which may also be None; a list has one value for each prompt, request or position.
    unit: SI, "1" for a ratio, "" for what is not a number. meaning: one sentence that stands alone.
    heading: of its column; its name in words by default. form, scale: numbers are shown as format(value * scale, form).
    tables: names of the reports' tables that show it, with spaces between; columns are in the order of this file.
    ends: fields with the ends of its interval. beside: fields that share its column.
    kinds: of records that have it. needed: those of them that cannot be shown without it.
    default: what a record is read as that was written before the field existed.
    """

    name: str
    type: type | UnionType
    unit: str
    meaning: str
    heading: str = ""
    form: str = ""
    scale: float = 1
    tables: str = ""
    ends: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    default: Any = None

    @property
    def title(self) -> str:
        return self.heading or self.name.replace("_", " ")

    def text(self, value: Any) -> str:
        """A value as reports show it."""
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int | float):
            return format(value * self.scale, self.form or ("," if isinstance(value, int) else ".3g"))
        return str(value)


def _interval(field: Field, kinds: tuple[str, ...] = ()) -> list[Field]:
    """A field, and the ends of its 95 % interval over prompts or, under load, over parts of the time.

    kinds: of records that have the ends, if not all that have the field do.
    """
    low, high = (
        Field(
            f"{field.name}_{end}", float, field.unit, f"{word} end of the 95 % interval of {field.name}.", kinds=kinds
        )
        for end, word in (("low", "Lower"), ("high", "Upper"))
    )
    return [replace(field, heading=f"{field.title}{INTERVAL}", ends=(low.name, high.name)), low, high]


def _by_position(field: Field) -> list[Field]:
    """A rate by draft position, and the ends of its 95 % intervals over prompts."""
    ends = (
        Field(f"{field.name}_{end}", list, "1", f"{word} ends of the 95 % intervals of {field.name}.")
        for end, word in (("low", "Lower"), ("high", "Upper"))
    )
    return [field, *ends]


def _per_text(each: str) -> list[Field]:
    """What is known of each prompt or request and its answer."""
    return [
        Field(f"per_{each}_category", list, "", f"Category of each {each} in its data set; empty if it has none."),
        Field(f"per_{each}_turn", list, "", f"Turn of its conversation that each {each} is, from 1."),
        Field(f"per_{each}_conversation", list, "", f"Number of the conversation that each {each} belongs to."),
        Field(f"per_{each}_length", list, "tokens", f"Tokens of each {each} before the answer."),
        Field(f"per_{each}_steps", list, "steps", f"Decode steps of each {each}."),
        Field(f"per_{each}_emitted", list, "tokens", f"Tokens emitted by the decode steps of each {each}."),
        Field(f"per_{each}_drafted", list, "tokens", f"Tokens proposed for each {each}."),
        Field(f"per_{each}_accepted", list, "tokens", f"Proposed tokens of each {each} that were accepted."),
    ]


def _percentiles(name: str, what: str, heading: str = "", form: str = ".3f", scale: float = 1) -> list[Field]:
    """Percentiles of a time over all requests of a load cell, which share a column."""
    first, *others = (
        Field(f"{name}_p{percent}_s", float, "s", f"{what}: percentile over requests, unfinished ones slowest.")
        for percent in PERCENTILES
    )
    names = tuple(each.name for each in others)
    tables = "load" if heading else ""
    return [replace(first, heading=heading, form=form, scale=scale, beside=names, tables=tables), *others]


# a table: each field takes one or two lines
# fmt: off
_IDENTITY = [
    Field("engine", str, "", "Engine: specdec, transformers, vllm or a vLLM server.",
          kinds=(*DECODED, CERTIFICATES), needed=DECODED),
    Field("engine_version", str, "", "Version of the engine.", kinds=(*DECODED, CERTIFICATES)),
    Field("pair", str, "", "Pair of models, by its name in pairs.toml.", kinds=KINDS, needed=MEASURED),
    Field("target", str, "", "The large model, whose distribution is sampled."),
    Field("draft", str, "", "What proposes tokens: a model, a head or a table; empty if the method needs none."),
    Field("method", str, "", "Drafting method; autoregressive is plain decoding, without drafts.",
          kinds=KINDS, needed=DECODED),
    Field("gamma", int | str, "tokens", "Tokens proposed per step; auto adapts the number to what is accepted.",
          kinds=KINDS, needed=DECODED),
    Field("placement", str, "", "How the layers of target and draft are placed on several devices.", default="same"),
    Field("workload", str, "", "Data set that the prompts are from.", needed=DECODED),
    Field("prompt_source", str, "", "Prompts are a text, or random tokens, with which only times are meaningful.",
          default="text"),
    Field("prompt_format", str, "", "Prompts as a chat (instruct) or as text to continue (raw).", default="instruct"),
    Field("turns", str, "", "Turns of conversations that were asked: the first, or all.", default="first"),
    Field("template_arguments", str, "", "Variables of the chat template that were set, as JSON.", default="{}"),
    Field("prompt_lengths", str, "tokens", "Shortest and longest prompt that was selected; empty if all were."),
    Field("dtype", str, "", "Number format of the weights.", kinds=MEASURED, needed=MEASURED),
    Field("device", str, "", "Device that the models ran on.", kinds=MEASURED, needed=MEASURED),
    Field("num_devices", int, "devices", "Devices that the models are on; empty if the engine or a server decides it."),
    Field("batch_size", int, "prompts", "Prompts decoded together.", needed=DECODED),
    Field("verification", str, "", "Acceptance rule: by token, by block, or coupled to the draft's noise.",
          tables="audits", kinds=(*DECODED, CERTIFICATES)),
    Field("synthetic_acceptance_rates", list, "1", "Prescribed acceptance rates by position; empty for real drafts."),
    Field("synthetic_acceptance_length", float, "tokens", "Prescribed acceptance length, from which the rates follow."),
    Field("load_format", str, "", "How the weights were loaded; dummy means random weights, for timing only."),
    Field("quantisation", str, "", "How the weights are quantized.", "quantization", default="none"),
    Field("engine_options", str, "", "Options passed to vLLM."),
    Field("max_tokens", int, "tokens", "Maximum number of tokens per answer.", needed=(LOADS,)),
    Field("temperature", float, "1", "Sampling temperature; 0 is greedy.", kinds=MEASURED, needed=DECODED),
    Field("top_p", float, "1", "Probability mass of the tokens that are sampled from; 1 keeps all."),
    Field("top_k", int, "tokens", "Number of the most likely tokens that are sampled from; 0 keeps all."),
    Field("seed", int, "", "Seed of the prompt selection and of the random draws."),
    Field("num_prompts", int, "prompts", "Prompts that were decoded.", needed=(CELLS,)),
    Field("num_rows_skipped", int, "rows", "Malformed rows of the workload that were left out."),
    Field("num_rows_passed_over", int, "rows", "Well-formed rows of the workload that contain no prompt."),
]
_TIMES = [
    *_interval(
        Field("throughput_tok_s", float, "tokens/s",
              "Tokens emitted for all prompts, over the time of all rounds; under load, of the steady window.",
              "tokens/s", ".1f", tables="fastest cells load", needed=DECODED), (LOADS,)
    ),
    *_interval(
        Field("user_throughput_tok_s", float, "tokens/s",
              "Tokens that a request gets after its first: 1 / inter_token_s.",
              "tokens/s per user", ".1f", tables="details load"), (LOADS,)
    ),
    *_interval(
        Field("device_throughput_tok_s", float, "tokens/s", "Tokens emitted for all requests, over time and devices.",
              "tokens/s per device", ".1f", tables="details load"), (LOADS,)
    ),
    Field("latency_s", float, "s", "Time from a request's start to its last token, mean over prompts.",
          "latency, s", ".3f", tables="cells", needed=(CELLS,)),
    Field("ttft_s", float, "s", "Time from a request's start to its first token, mean over prompts.",
          "first token, s", ".3f", tables="details"),
    Field("inter_token_s", float, "s", "Time from one token to the next, mean over prompts.",
          "between tokens, ms", ".2f", 1e3, "details"),
]
_SPEEDUPS = [
    *_interval(
        Field("speedup", float, "1", "Time per token of plain decoding over that of this cell, side by side.",
              "speed-up", ".2f", tables="fastest cells parts published")
    ),
    Field("predicted_speedup", float, "1", "Speed-up that acceptance by position and the times of the phases imply.",
          "predicted", ".2f", tables="parts"),
    Field("speedup_from_truncation", float, "1", "Measured less predicted speed-up: tokens cut off after a stop token.",
          "truncation", "+z.3f", tables="parts"),
    Field("speedup_from_bookkeeping", float, "1", "Measured less predicted speed-up: work around the phases.",
          "bookkeeping", "+z.3f", tables="parts"),
    Field("speedup_from_prefill", float, "1", "Measured less predicted speed-up: the prompt, read at full cost.",
          "prefill", "+z.3f", tables="parts"),
    Field("speedup_from_averaging", float, "1", "Measured less predicted speed-up: the rest, from averaging ratios.",
          "averaging", "+z.3f", tables="parts"),
    Field("expected_speedup", float, "1", "Closed form of Leviathan et al. 2023 with the first position's acceptance.",
          "closed form", ".2f", tables="parts"),
    *_interval(
        Field("speedup_of_reference", float, "1", "Speed of the reference engine over this one's with the same method.",
              "reference is faster", ".2f", tables="cells")
    ),
    Field("reference_engine", str, "", "Engine that the others are compared with."),
    Field("cost_ratio", float, "1", "Time to draft one token over one plain step of the target."),
    Field("step_cost_ratio", float, "1", "Time to score and verify one step over one plain step of the target."),
    Field("num_outputs_equal", int, "prompts", "Greedy outputs equal to plain decoding's; its own to the reference's.",
          "same outputs", tables="fastest cells"),
    Field("num_outputs_equal_reference", int, "prompts", "Greedy outputs equal to the reference engine's."),
    Field("first_difference_at", list, "tokens", "Position at which each output first differs from the other arm's."),
    Field("margin_at_difference", list, "logits", "Gap between the two most likely tokens at the first difference."),
]
_ACCEPTANCE = [
    Field("acceptance_reason", str, "", "Why there are no counters of drafted and accepted tokens."),
    *_interval(
        Field("acceptance_rate", float, "1", "Accepted over drafted tokens.",
              "accepted", ".1%", tables="fastest cells published")
    ),
    *_by_position(
        Field("acceptance_rate_at", list, "1", "Share of steps in which each draft position was accepted: joint rate.")
    ),
    *_by_position(
        Field("conditional_acceptance_rate_at", list, "1",
              "Share of the steps that accepted the previous draft position in which this one was accepted, too.")
    ),
    Field("acceptance_histogram", list, "steps", "Steps that accepted exactly 0, 1, 2, ... draft tokens."),
    *_interval(
        Field("mean_acceptance_length", float, "tokens", "Tokens emitted per target call, also recovered and bonus.",
              "length", ".2f", tables="fastest cells published")
    ),
    Field("acceptance_length_over_text", list, "tokens",
          "Mean acceptance length by position in the text, prompt included, in bins of text_bin_tokens tokens."),
    Field("text_bin_tokens", int, "tokens", "Width of the bins of acceptance_length_over_text."),
    Field("text_drift", float, "tokens", "Change of the acceptance length from one step of a text to the next.",
          "change per 100 steps", "+z.3f", 100, "drift"),
    Field("text_drift_p_value", float, "1", "Chance of such a change without drift, by sign flips of texts.",
          "p", ".2g", tables="drift"),
    Field("system_efficiency", float, "1", "Emitted tokens over those that a perfect draft would have emitted.",
          "efficiency", ".1%", tables="details"),
    Field("num_steps", int, "steps", "Decode steps, that is target calls, of all prompts.", kinds=MEASURED),
    Field("num_drafted", int, "tokens", "Tokens proposed.", kinds=(*DECODED, CERTIFICATES)),
    Field("num_accepted", int, "tokens", "Proposed tokens that were accepted.", kinds=(*DECODED, CERTIFICATES)),
    Field("num_tokens", int, "tokens", "Tokens emitted."),
    Field("draft_time_per_token_s", float, "s", "Time spent proposing, over tokens proposed.",
          "ms per proposed token", ".3f", 1e3, "details"),
    Field("prefill_time_s", float, "s", "Time in the target's forward passes over prompts, all prompts together.",
          "prefill, s", ".3f", tables="details"),
    Field("scoring_time_s", float, "s", "Time in the target's forward passes of decode steps, all prompts together.",
          "scoring, s", ".3f", tables="details"),
    Field("verification_time_s", float, "s", "Time to accept, recover and draw tokens, all prompts together.",
          "verification, s", ".3f", tables="details"),
    Field("bookkeeping_time_s", float, "s", "Time outside the other phases, all prompts together."),
    Field("recording_time_s", float, "s", "Time spent recording shapes for the device, all prompts together."),
    Field("warm_up_time_s", float, "s", "Time before the measurement, compilation included."),
    Field("overhead_rate", float, "1", "Share of time outside model forwards; empty where a model drafts, too."),
    Field("output_sha256", str, "", "SHA-256 of the emitted token ids."),
]
_PER_PROMPT = [
    Field("per_prompt_latency_s", list, "s", "Latency of each prompt."),
    Field("per_prompt_ttft_s", list, "s", "Time to first token of each prompt."),
    Field("per_prompt_tokens", list, "tokens", "Tokens emitted for each prompt."),
    *_per_text("prompt"),
    Field("baseline_per_prompt_latency_s", list, "s", "Latency of each prompt in plain decoding."),
    Field("baseline_per_prompt_tokens", list, "tokens", "Tokens emitted for each prompt in plain decoding."),
    Field("reference_per_prompt_latency_s", list, "s", "Latency of each prompt by the reference engine."),
    Field("reference_per_prompt_tokens", list, "tokens", "Tokens emitted for each prompt by the reference engine."),
]
_LOAD = [
    Field("rate", float, "requests/s",
          "Requested rate of arrivals, whether or not earlier requests are finished; of conversations with all turns."),
    Field("concurrency", int, "clients", "Clients that each wait for an answer before the next request: closed loop.",
          "clients"),
    Field("think_time_s", float, "s", "Time from an answer to the next request of a conversation or a client."),
    Field("arrivals", str, "", "Arrival process: random (poisson) or equally spaced (constant).", needed=(LOADS,)),
    Field("duration_s", float, "s", "Time during which requests arrive.", needed=(LOADS,)),
    Field("drain_s", float, "s", "Time after the last arrival in which requests may still finish.", needed=(LOADS,)),
    Field("ttft_limit_s", float, "s", "Longest time to first token of a good request.", needed=(LOADS,)),
    Field("inter_token_limit_s", float, "s", "Longest mean time between tokens of a good request.", needed=(LOADS,)),
    Field("window_start_s", float, "s", "Start of the steady window, which the statistics are of."),
    Field("window_end_s", float, "s", "End of the steady window; requests that arrive later only keep the load up."),
    Field("num_requests", int, "requests", "Requests that arrived.", "requests", needed=(LOADS,)),
    Field("num_finished", int, "requests", "Requests that finished before the drain time was over.",
          "finished", tables="load", needed=(LOADS,)),
    Field("num_unfinished", int, "requests", "Requests that were not finished when the drain time was over."),
    Field("num_refused", int, "requests", "Requests refused by the server, or by a client with too many in flight."),
    Field("num_steady", int, "requests", "Requests that arrived within the steady window."),
    Field("offered_rate", float, "requests/s", "Requests that arrived within the steady window, over its length."),
    *_interval(
        Field("achieved_rate", float, "requests/s", "Requests finished within the steady window, over its length.",
              "finished per s", ".2f", tables="load")
    ),
    Field("achieved_rate_by_part", list, "requests/s", "Requests finished per second in each tenth of the window."),
    Field("latency_growth", float, "1", "Growth of latency, in seconds per second: r - 1 at r times the capacity.",
          "latency growth, s/s", "+z.3f", tables="load"),
    Field("latency_growth_low", float, "1", "Lower bound of the growth of latency, one-sided, 99 %."),
    Field("is_saturated", bool, "", "Whether the server falls behind: latency grows surely, or requests are refused.",
          "saturated", tables="load"),
    Field("goodput", float, "requests/s", "Requests finished within both limits, per second of the steady window.",
          form=".2f", tables="load", needed=(LOADS,)),
    Field("within_limits_rate", float, "1", "Share of the window's requests that kept both limits.",
          "within limits", ".1%", tables="load", needed=(LOADS,)),
    Field("mean_num_in_flight", float, "requests", "Mean number of requests that have arrived and are not finished.",
          "in flight", ".1f", tables="load", needed=(LOADS,)),
    Field("peak_num_in_flight", int, "requests", "Largest number of requests in flight at one time."),
    *_percentiles("ttft", "Time from arrival to first token", "first token p50 p95 p99, s"),
    *_percentiles("inter_token", "Mean time between tokens", "between tokens p50 p95 p99, ms", ".1f", 1e3),
    *_percentiles("latency", "Time from arrival to last token", "latency p50 p95 p99, s"),
    Field("queue_s", float, "s", "Time from arrival to a free slot, mean over finished requests."),
    *_percentiles("queue", "Time from arrival to a free slot"),
    Field("busy_rate", float, "1", "Share of time not spent waiting for an arrival; empty if the engine cannot tell."),
    Field("peak_send_delay_s", float, "s", "Longest delay of the client in sending a request; empty if none is sent."),
    Field("per_request_arrival_s", list, "s", "Arrival of each request, from the start of the run."),
    Field("per_request_ttft_s", list, "s", "Time to first token of each request; empty if it did not finish."),
    Field("per_request_latency_s", list, "s", "Latency of each request; empty if it did not finish."),
    Field("per_request_tokens", list, "tokens", "Tokens emitted for each request; empty if it did not finish."),
    *_per_text("request"),
    Field("acceptance_length_over_service", list, "tokens",
          "Mean acceptance length of the requests that arrived in each tenth of the duration."),
    Field("service_drift", float, "tokens/s", "Change of the acceptance length per second of service.",
          "change per minute", "+z.3f", 60, "drift"),
    Field("service_drift_p_value", float, "1", "Chance of such a change without drift, by permutations of requests.",
          "p over time", ".2g", tables="drift"),
]
_QUALITY = [
    Field("quality_metric", str, "", "Score of the workload: exact_match, pass_at_1 or rouge_1.", tables="quality"),
    Field("quality", float, "1", "Mean score of the outputs, from 0 to 1.", "score", ".3f", tables="quality"),
    Field("quality_baseline", float, "1", "Mean score of plain decoding's outputs.",
          "of plain decoding", ".3f", tables="quality"),
    *_interval(
        Field("quality_difference", float, "1", "Mean difference in score from plain decoding, prompt by prompt.",
              "difference", "+z.3f", tables="quality")
    ),
    Field("quantization_tv", float, "1", "Mean total variation per token of the quantized target from the same in its "
          "dtype, over a sample text.", "TV from dtype", ".2g", tables="details"),
    Field("quantization_kl_nats", float, "nats", "Mean divergence per token of the quantized target from the same in "
          "its dtype, over a sample text.", "KL from dtype", ".2g", tables="details"),
    Field("quality_reason", str, "", "Why there is no score."),
    Field("per_prompt_quality", list, "1", "Score of each prompt's output."),
    Field("baseline_per_prompt_quality", list, "1", "Score of each prompt's output in plain decoding."),
]
ENERGY = [
    Field("energy_j", float, "J", "Energy of the whole device while the prompts were decoded, idle power included.",
          "J", ".1f", tables="energy"),
    Field("energy_per_token_j", float, "J", "Energy per emitted token.", "J per emitted token", ".3f", tables="energy"),
    Field("energy_per_accepted_token_j", float, "J", "Energy per accepted token.",
          "J per accepted token", ".3f", tables="energy"),
    Field("average_power_w", float, "W", "Mean power over the measured rounds.", "W", ".1f", tables="energy"),
    Field("peak_power_w", float, "W", "Highest sampled power of the GPUs.", "peak W", ".1f", tables="energy"),
    Field("average_utilisation_rate", float, "1", "Mean share of time in which the GPUs were busy.",
          "utilization", ".1%", tables="energy"),
    Field("peak_memory_bytes", float, "bytes", "Peak memory in use on the GPUs.",
          "peak memory, GB", ".1f", 1e-9, "energy"),
    Field("peak_temperature_c", float, "°C", "Highest temperature of a GPU.", "peak °C", ".0f", tables="energy"),
    Field("energy_reason", str, "", "Why there is no energy."),
    Field("counted_energy_j", float, "J", "Energy by the GPUs' own counters; empty where they have none."),
    Field("energy_difference_rate", float, "1", "Counted energy over the integral of sampled power, less 1."),
    Field("cpu_energy_j", float, "J", "Energy of the processor packages over the measured rounds."),
    Field("cpu_energy_reason", str, "", "Why there is no energy of the processors."),
    Field("telemetry_hz", float, "1/s", "Samples per second."),
    Field("telemetry_overhead_rate", float, "1", "Share of the time that sampling took."),
]
_PUBLISHED = [
    Field("published_speedup", float, "1", "Speed-up that others measured with this pair and method.",
          "their speed-up", ".2f", tables="published"),
    Field("published_acceptance_rate", float, "1", "Acceptance rate that others measured with this pair and method.",
          "their acceptance", ".1%", tables="published"),
    Field("published_mean_acceptance_length", float, "tokens", "Mean acceptance length that others measured.",
          "their length", ".2f", tables="published"),
    Field("published_setting", str, "", "Hardware and prompts of the published result.", "setting", tables="published"),
    Field("published_source", str, "", "Where the result was published.", "source", tables="published"),
]
_COSTS = [
    Field("axis", str, "", "What is varied: width of a step, context, batch, vocabulary or length of a text.",
          needed=(COSTS,)),
    Field("size", int, "", "Value on the axis: tokens, rows, nodes, slots or vocabulary entries.", needed=(COSTS,)),
    Field("tokens", int, "tokens", "Tokens that the work handles.", needed=(COSTS,)),
    Field("median_s", float, "s", "Median time to do the work once.", "ms", ".3f", 1e3, "sizes", needed=(COSTS,)),
    Field("bytes_read", int, "bytes", "Bytes that must be read from memory at least."),
    Field("experts_read", int, "1", "Experts that the step's tokens were routed to, summed over layers."),
    Field("num_experts", int, "1", "Experts of all layers."),
    Field("read_bandwidth", float, "bytes/s", "Memory read bandwidth of this machine, measured in the same run."),
    Field("prompt_tokens", int, "tokens", "Tokens of all prompts that went through the slots."),
    Field("roofline_s", float, "s", "Shortest possible time, to read those bytes."),
    Field("roofline_share", float, "1", "Shortest possible time over the measured time.",
          "of the roofline", ".0%", tables="sizes"),
    Field("depth", int, "1", "Levels of the tree."),
    Field("expected_tokens", float, "1", "Tokens that a step with this tree is expected to emit."),
    Field("step_s", float, "s", "Time of a decode step of the whole batch.", "ms per step", ".2f", 1e3, "steps"),
    Field("draft_share", float, "1", "Share of a step spent proposing.", "draft", ".1%", tables="steps"),
    Field("scoring_share", float, "1", "Share of a step in target forward passes.", "scoring", ".1%", tables="steps"),
    Field("verification_share", float, "1", "Share of a step spent accepting, recovering and drawing tokens.",
          "verification", ".1%", tables="steps"),
    Field("bookkeeping_share", float, "1", "Share of a step in everything else.", "bookkeeping", ".1%", tables="steps"),
]
_CERTIFICATES = [
    Field("verdict", str, "", "Verdict of an audit, with its bound on the distance in total variation (TV).",
          tables="audits", needed=(CERTIFICATES,)),
    Field("reasons", list, "", "Reasons for the verdict."),
    Field("p_value", float, "1", "Smallest p-value of all tests against the target's distribution, corrected.",
          "p", ".2g", tables="audits", needed=(CERTIFICATES,)),
    Field("control_p_value", float, "1", "Corrected p-value of the engine's own plain decoding.",
          "p of plain decoding", ".2g", tables="audits"),
    Field("arms_p_value", float, "1", "The p-value of speculation and plain decoding having one distribution."),
    Field("num_draws", int, "tokens", "Tokens that were judged.", "tokens judged", tables="audits"),
    Field("tv_lower_bound", float, "1", "Lower bound on the distance to the target's distribution."),
    Field("tv_upper_bound", float, "1", "Upper bound on the distance in the tested direction.",
          "TV at most", ".2g", tables="audits"),
    Field("min_detectable_tv", float, "1", "Smallest distance in the tested direction that would have been detected.",
          "detectable TV", ".2g", tables="audits"),
    Field("max_tv", float, "1", "Distance that the audit was asked to detect."),
    Field("direction", str, "", "Direction tested: equality, towards the draft, or towards what the text suggests."),
    Field("num_draws_needed", int, "tokens", "Tokens needed to detect the distance asked for."),
    Field("num_outputs", int, "outputs", "Outputs that were judged."),
    Field("control_num_draws", int, "tokens", "Tokens of plain decoding that were judged."),
    Field("control_num_outputs", int, "outputs", "Outputs of plain decoding that were judged."),
    Field("surprise_z", float, "1", "Surprise of the tokens in standard deviations; no verdict rests on it."),
    Field("control_surprise_z", float, "1", "Surprise of plain decoding's tokens in standard deviations."),
    Field("largest_gap", float, "logits", "Largest distance of a token from the support of the distribution."),
    Field("control_largest_gap", float, "logits", "Largest distance of plain decoding's tokens from the support."),
    Field("alpha", float, "1", "Maximum probability of calling a lossless engine lossy."),
    Field("beta", float, "1", "Maximum probability of missing a detectable distance."),
    Field("logit_noise", float, "logits", "Rounding error that is tolerated."),
    Field("options", str, "", "Options of the audited engine."),
    Field("command", str, "", "Command that repeats the audit."),
    Field("sampling", dict, "", "Sampling parameters of the audit."),
    Field("versions", dict, "", "Versions of the packages."),
    Field("date", str, "", "Day of the audit, UTC."),
]
_ARMS = [
    Field(f"{arm}{name}", type_, "", f"{what} {whose}.")
    for arm, whose in (("", "with speculation"), ("control_", "in plain decoding"))
    for name, type_, what in (
        ("p_values", dict, "The p-value of each test"),
        ("found_after", dict, "Tokens after which each test rejects"),
        ("shifts", dict, "Shift of each test's statistic from its exact mean"),
        ("seeds", list, "First and last seed"),
        ("num_outside", dict, "Tokens outside the support of the distribution"),
        ("errors", list, "Impossible outputs"),
    )
]
# fmt: on
_VERSION = [Field("schema_version", int, "", "Version of the record's format.", kinds=KINDS)]
_GROUPS = (
    (DECODED, _IDENTITY + _TIMES),
    ((CELLS,), _SPEEDUPS),
    (DECODED, _ACCEPTANCE),
    ((CELLS,), _PER_PROMPT + _QUALITY),
    ((LOADS,), _LOAD),
    (DECODED, ENERGY + _PUBLISHED),
    ((COSTS,), _COSTS),
    ((CERTIFICATES,), _CERTIFICATES + _ARMS),
    (KINDS, _VERSION),
)
FIELDS = {each.name: each if each.kinds else replace(each, kinds=kinds) for kinds, group in _GROUPS for each in group}


def field(name: str) -> Field:
    """The declaration of a field; one that other versions may have written says so."""
    return FIELDS.get(name) or Field(name, object, "", "A field that this version does not know.")


def names(kind: str) -> set[str]:
    """The fields of a kind of record; for a cost cell, those of its axis."""
    return {each.name for each in FIELDS.values() if kind in each.kinds}


def shown_in(table: str) -> list[Field]:
    """The columns of a report's table."""
    return [each for each in FIELDS.values() if table in each.tables.split()]


def needed(kind: str) -> list[str]:
    """What a record of a kind cannot be shown without."""
    return [each.name for each in FIELDS.values() if kind in each.needed]


def scalars(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that have a single value."""
    return {name: value for name, value in record.items() if _is_scalar(name, value)}


def _is_scalar(name: str, value: Any) -> bool:
    if value is None:
        return name in FIELDS and FIELDS[name].type not in (list, dict)
    return isinstance(value, str | int | float)


def ordered(names: Iterable[str]) -> list[str]:
    """Names in the order of this file, then those that are not declared, in alphabetical order."""
    places = {name: place for place, name in enumerate(FIELDS)}
    return sorted(set(names), key=lambda name: (places.get(name, len(places)), name))
