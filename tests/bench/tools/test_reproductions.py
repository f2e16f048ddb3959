"""The page of reproductions: its tables are those of the committed runs, and its commands are such as can be run."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

from bench.campaign.config import options_of
from bench.catalogue.pairs import catalogue
from bench.tools.reproductions import BASELINES, PAGE, filled, records_of, table

OPTIONS = {option.flag: option for option in options_of()}
COMMANDS = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)


def options_of(block: str, line: int) -> dict[str, Any]:
    """The parsed options of a block's command, with the variables that a line sets."""
    *variables, command = block.replace("\\\n", "").strip().split("\n")
    values = dict(item.split("=", 1) for item in shlex.split(variables[line], comments=True))
    for name, value in values.items():
        command = command.replace(f"${name}", value)
    words = shlex.split(command.replace("DATA", str(BASELINES)))
    assert words[:2] == ["pytest", "bench/"]
    given: dict[str, Any] = {}
    while words := [word for word in words if word not in ("pytest", "bench/")]:
        flag, _, value = words.pop(0).partition("=")
        if flag == "--benchmark-json":
            given["benchmark-json"] = value
            continue
        option = OPTIONS[flag]
        text = words.pop(0) if option.metavar else "1"
        given[option.name] = option.parse(option.name, text)
    return given


@pytest.mark.parametrize("block", COMMANDS)
def test_a_full_size_command_is_the_scaled_down_one_with_another_pair(block: str) -> None:
    full, small = options_of(block, 0), options_of(block, 1)
    scale = {"pairs", "num_prompts", "max_tokens", "data_dir", "placements"}
    assert {name: full[name] for name in full.keys() - scale} == {name: small[name] for name in small.keys() - scale}
    assert [pair.name for pair in small["pairs"]] == ["smollm2-135m"]
    assert full["pairs"][0].target_params > 5 * catalogue()["smollm2-135m"].target_params


@pytest.mark.parametrize("block", COMMANDS)
def test_the_committed_run_is_that_of_the_scaled_down_command(block: str) -> None:
    given = options_of(block, 1)
    records = records_of(given["benchmark-json"].removesuffix(".json"))
    assert {record["method"] for record in records} == set(given["methods"])
    assert {record["gamma"] for record in records} == set(given["gammas"])
    for record in records:
        assert (record["pair"], record["num_prompts"], record["workload"], record["max_tokens"]) == (
            "smollm2-135m",
            given["num_prompts"],
            given["workloads"][0],
            given.get("max_tokens", 64),
        )
        assert record.get("prompt_format", "instruct") == given.get("prompt_format", "instruct")
        assert record["engine"] != "specdec" or record["num_outputs_equal"] == record["num_prompts"]


def test_the_tables_are_those_of_the_committed_runs() -> None:
    page = PAGE.read_text()
    assert len(COMMANDS) == page.count(": begin -->")
    assert page == filled(page)


def test_a_table_by_hand() -> None:
    record = {
        "engine": "specdec",
        "method": "ngram",
        "gamma": 24,
        "acceptance_rate": 0.256,
        "mean_acceptance_length": 1.5,
        "speedup": 1.234,
        "speedup_low": 1.0,
        "speedup_high": 1.5,
        "predicted_speedup": None,
        "quality_metric": "pass_at_1",
        "quality": 0.25,
        "quality_baseline": 0.125,
        "average_power_w": None,
        "energy_reason": "no meter",
    }
    powered = record | {"average_power_w": 301.7, "energy_reason": None, "quality": None, "acceptance_rate": None}
    plain = record | {"method": "autoregressive"}
    assert table([plain, record, powered]).splitlines()[2:] == [
        "| specdec | ngram | 24 | 26% | 1.50 | 1.23 [1.00, 1.50] | - | pass at 1 0.125, 0.250 | - |",
        "| specdec | ngram | 24 | - | 1.50 | 1.23 [1.00, 1.50] | - | - | 302 W |",
        "",
        "No power: no meter.",
    ]


def test_committed_runs_tell_nothing_of_where_they_were_made() -> None:
    for path in BASELINES.glob("reproduction-*.json"):
        assert not re.search(r"/(home|root|work|tmp)/|\"node\"", path.read_text()), path.name
