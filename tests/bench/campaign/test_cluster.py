"""The parts of a campaign on a cluster, what each reserves, and a part in a process of its own."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_runs import decoded, write

import bench.campaign.__main__ as command
from bench.campaign import cluster, part, shards
from bench.campaign.cluster import ClusterError, Needs, Part
from bench.campaign.config import BenchConfig
from bench.campaign.part import Outcome, PartLostError, Started
from bench.campaign.plan import plan
from bench.catalogue.pairs import Pair
from bench.records import campaigns

MakeConfig = Callable[..., BenchConfig]
PAIRS = (Pair("small", "tiny", "tiny"), Pair("large", "tiny", "tiny"))
GPU_NODES = [{"CPU": 4.0}, {"CPU": 64.0, "GPU": 8.0}, {"CPU": 96.0, "GPU": 8.0}]


# -- parts are pairs of models -------------------------------------------------------------------------------


def test_the_cells_of_a_pair_and_placement_are_one_part(make_config: MakeConfig) -> None:
    config = make_config(pairs=PAIRS, placements=("same", "separate"), shard="1/4", shard_by="pair")
    found: dict[int, set[tuple[str, str]]] = {}
    for each in plan(config):
        found.setdefault(shards.part_of_cell(each.cell, config), set()).add((each.cell.pair, each.cell.placement))
    models = [("small", "same"), ("small", "separate"), ("large", "same"), ("large", "separate")]
    assert found == {index: {each} for index, each in enumerate(models, 1)}


def test_pairs_take_turns_if_there_are_more_than_parts(make_config: MakeConfig) -> None:
    config = make_config(pairs=(*PAIRS, Pair("third", "tiny")), shard="1/2", shard_by="pair")
    parts = {each.cell.pair: shards.part_of_cell(each.cell, config) for each in plan(config)}
    assert parts == {"small": 1, "large": 2, "third": 1}


def test_a_pair_of_another_part_need_not_fit_into_this_machine(make_config: MakeConfig) -> None:
    def no_room(_: str, pair: Pair, placement: str) -> str | None:
        return "too large" if pair.name == "large" else None

    named = frozenset({"pairs"})
    assert plan(make_config(pairs=PAIRS, shard="1/2", shard_by="pair", named=named), no_room)
    for changes in ({"shard": "2/2", "shard_by": "pair"}, {"shard": "1/2"}):
        with pytest.raises(ValueError, match="pairs=large was requested and must be able to run, but too large"):
            plan(make_config(pairs=PAIRS, named=named, **changes), no_room)


# -- what a part reserves ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "num_gpus"),
    [
        ({"device": "cpu"}, 0),
        ({"device": "auto"}, 1),
        ({"placements": ("separate",), "device": "cuda"}, 2),
        ({"placements": ("ratio:4:2",), "device": "cuda"}, 6),
        ({"placements": ("auto",), "device": "cuda"}, 8),
        ({"device": "cuda", "engines": ("vllm",), "vllm_options": '{"tensor_parallel_size": 4}'}, 4),
        ({"device": "cuda", "vllm_options": '{"tensor_parallel_size": 4}'}, 1),
    ],
)
def test_a_part_has_the_gpus_of_its_placement(changes: Any, num_gpus: int, make_config: MakeConfig) -> None:
    (only,) = cluster.parts_of(make_config(**changes), GPU_NODES)
    assert only.num_gpus == num_gpus


def test_device_auto_is_the_cpu_in_a_cluster_without_gpus(make_config: MakeConfig) -> None:
    (only,) = cluster.parts_of(make_config(device="auto"), [{"CPU": 4.0}])
    assert (only.num_gpus, only.shard) == (0, "1/1")


def test_a_named_gpu_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ClusterError, match="device=cuda:1 must be auto, cpu or cuda: Ray chooses"):
        cluster.parts_of(make_config(device="cuda:1"), GPU_NODES)


def test_parts_do_not_share_processors() -> None:
    """On the CPU a part has all of a node, of the smallest; with GPUs the processors are divided by GPU."""
    nodes = [{"CPU": 0.0}, {"CPU": 8.0}, {"CPU": 4.0}]
    assert cluster.needs_of(Part(1, 1, "small", "same", 0), nodes, {}) == Needs(4, 0, {})
    assert cluster.needs_of(Part(1, 1, "small", "separate", 2), GPU_NODES, {}) == Needs(16, 2, {})
    assert cluster.needs_of(Part(1, 1, "small", "same", 1), [{"CPU": 4.0, "GPU": 8.0}], {}) == Needs(1, 1, {})


def test_a_part_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"part 1/1 \(small, ratio:8:1\) must fit on one node with 9 GPUs"):
        cluster.needs_of(Part(1, 1, "small", "ratio:8:1", 9), GPU_NODES, {})
    with pytest.raises(ClusterError, match="with 1 GPUs and h100, but"):
        cluster.needs_of(Part(1, 1, "small", "same", 1), GPU_NODES, {"h100": 0.1})


def test_gpus_of_two_kinds_are_refused() -> None:
    nodes = [{"CPU": 8.0, "GPU": 1.0, f"accelerator_type:{kind}": 1.0} for kind in ("H100", "A100")]
    part, chosen = Part(1, 1, "small", "same", 1), {"accelerator_type:A100": 0.001}
    with pytest.raises(ClusterError, match=r"must run on one kind of GPU, but .*A100, .*H100; choose one"):
        cluster.needs_of(part, nodes, {})
    assert cluster.needs_of(part, nodes, chosen) == Needs(8, 1, chosen)
    assert cluster.needs_of(Part(1, 1, "small", "same", 0), nodes, {}) == Needs(8, 0)


# -- a part in a process of its own --------------------------------------------------------------------------

STAND_IN = """
import os, signal, sys, time
paths = dict(word[2:].partition("=")[::2] for word in sys.argv if "=" in word)
with open(paths["journal"], "a") as journal:
    for line in os.environ["LINES"].split(","):
        journal.write(line + "\\n"); journal.flush(); time.sleep(0.2)
    journal.write("half a line")
if os.environ.get("KILLED"):
    os.kill(os.getpid(), signal.SIGKILL)
open(paths["benchmark-json"], "w").write("results")
print("printed"); sys.exit(1)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of Python: writes a journal, then ends."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\n{STAND_IN}")
    path.chmod(0o755)
    monkeypatch.setattr(part.sys, "executable", str(path))


@pytest.mark.usefixtures("program")
def test_lines_are_handed_over_as_they_are_written() -> None:
    pieces = list(part.measure(["bench/"], {"LINES": "a,b,c"}, poll_s=0.01))
    assert isinstance(pieces[0], Started)
    assert len(pieces) > 3
    assert b"".join(each for each in pieces if isinstance(each, bytes)) == b"a\nb\nc\n"
    assert pieces[-1] == Outcome(1, "printed\n", b"results")


@pytest.mark.usefixtures("program")
def test_finished_lines_are_not_handed_over_twice() -> None:
    pieces = list(part.measure(["bench/"], {"LINES": "b"}, b"a\n", poll_s=0.01))
    assert b"".join(each for each in pieces if isinstance(each, bytes)) == b"b\n"


@pytest.mark.usefixtures("program")
def test_a_killed_process_is_a_lost_part() -> None:
    found = part.measure(["bench/"], {"LINES": "a", "KILLED": "1"}, poll_s=0.01)
    pieces = [next(found), next(found)]
    assert pieces[1] == b"a\n"
    with pytest.raises(PartLostError, match=f"killed by {signal.SIGKILL.name}"):
        list(found)


def test_parts_run_on_one_kind_of_machine() -> None:
    first = {"cpu_model": "a processor", "seed": 0, "shard": "1/2"}
    cluster.check_same(first, {**first, "shard": "2/2"})
    with pytest.raises(ClusterError, match="but cpu_model was a processor and is another; choose nodes"):
        cluster.check_same(first, {**first, "cpu_model": "another"})


# -- the command ---------------------------------------------------------------------------------------------


def test_options_are_read_by_pytest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = cluster.read_command(["bench/", "--gammas=3", f"--benchmark-json={tmp_path / 'out.json'}"])
    assert (found.config.gammas, found.results) == ((3,), tmp_path / "out.json")
    for wrong, message in (
        (["--gammas=0", f"--benchmark-json={tmp_path / 'out.json'}"], "gammas=0 must be an integer of at least 1"),
        (["--gammas=2"], "--benchmark-json must name a file"),
        (["--shard=1/2", f"--benchmark-json={tmp_path / 'out.json'}"], "shard=1/2 must be left out"),
    ):
        with pytest.raises(ClusterError, match=r"pytest must accept bench/ .* but ended with status 4"):
            cluster.read_command(["bench/", *wrong])
        assert message in capfd.readouterr().err


def test_without_ray_the_command_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sys, "argv", ["bench.campaign", "--ray", "auto"])
    with pytest.raises(SystemExit):
        command.main()
    printed = capsys.readouterr().err
    assert "--ray needs Ray (import of ray halted; None in sys.modules); pip install -e '.[ray]'" in printed


def test_journals_of_an_earlier_campaign_are_kept(tmp_path: Path) -> None:
    for expected in ("journal.bak", "journal.bak2"):
        (tmp_path / "journal").mkdir()
        assert command._folder(tmp_path / "journal.jsonl", is_resumed=False) == tmp_path / "journal"
        assert (tmp_path / expected).is_dir()
    (tmp_path / "journal").mkdir()
    command._folder(tmp_path / "journal.jsonl", is_resumed=True)
    assert (tmp_path / "journal").is_dir()


def part_file(folder: Path, index: int, gamma: int, **changes: Any) -> Path:
    configuration = {"seed": 0, "shard": f"{index}/2", **changes}
    return write(
        folder / f"{index}.json",
        [decoded("ngram", gamma)],
        configuration=configuration,
        shard=f"{index}/2",
        cells_of_shards=[1, 1],
        datetime=f"2026-01-0{3 - index}T00:00:00+00:00",
    )


def test_parts_become_one_run(tmp_path: Path) -> None:
    document = campaigns.joined_files([part_file(tmp_path, index, index) for index in (1, 2)], "the command")
    assert [each["extra_info"]["gamma"] for each in document["benchmarks"]] == [1, 2]
    assert (document["shard"], document["configuration"], document["command"]) == (
        None,
        {"seed": 0, "shard": None},
        "the command",
    )
    assert (document["cells_of_shards"], document["datetime"]) == ([2], "2026-01-01T00:00:00+00:00")
    (tmp_path / "whole.json").write_text(json.dumps(document))
    (run,) = campaigns.read_all([tmp_path / "whole.json"])
    assert (len(run.cells), run.missing_shards) == (2, ())


def test_parts_of_different_campaigns_do_not_become_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be shards of one campaign, but seed was 0 and is 1"):
        campaigns.joined_files([part_file(tmp_path, 1, 1), part_file(tmp_path, 2, 2, seed=1)], "")
    with pytest.raises(ValueError, match=r"must be all parts of one campaign\. Not the whole campaign: part 2"):
        campaigns.joined_files([part_file(tmp_path, 1, 1)], "")
