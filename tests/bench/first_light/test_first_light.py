"""The first run on a GPU, rehearsed without one: it reaches its last line, and a failing part loses no facts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.first_light import __main__ as entry
from bench.first_light import correctness, facts, running, tiny
from bench.first_light.__main__ import LIMITS_S, main
from bench.first_light.nudges import LAST, Nudge, nudge
from bench.first_light.report import FACTS_FILE, Report, num_failed, read, table
from bench.first_light.running import ARCHIVE_FILE, Interrupts, Part, run_parts
from specdec import Engine, assembly
from specdec.models.causal import CausalLM
from specdec.sampling.randomness import Role
from specdec.verification import Rule, verify_tokens

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
REPORTS = "from pathlib import Path; from bench.first_light.report import Report; import sys, os, time; "
REPORTS += (
    "Report(sys.argv[1], Path(sys.argv[2])).fact('first', text='a fact of ' + sys.argv[1]); print('out', flush=True); "
)


def part(name: str, then: str, limit_s: float = 120) -> Part:
    """A part that writes a fact and then does something."""
    return Part(name, (sys.executable, "-c", REPORTS + then, name, "{facts}"), limit_s)


def outcomes(facts: list[dict]) -> dict[str, str]:
    """How each part ended."""
    return {fact["of"]: fact["outcome"] for fact in facts if fact.get("fact") == "end"}


@pytest.mark.slow
def test_without_a_gpu_all_parts_run_to_the_last_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.first_light", str(tmp_path), "--device", "cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    facts = read(tmp_path / FACTS_FILE)
    assert outcomes(facts) == dict.fromkeys(LIMITS_S, "ended"), done.stdout
    assert [fact for fact in facts if fact.get("ok") is False] == []
    assert done.returncode == 0
    assert done.stdout.startswith("no GPU: everything is scaled down (--device cpu)\n")
    assert done.stdout.splitlines()[-1].endswith(" s on cpu")
    assert len(done.stdout) < 12_000
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([FACTS_FILE, ARCHIVE_FILE, "first_light.txt"])
    assert {name for fact in facts for name in ("fact", "check") if name in fact} == {"fact", "check"}


def test_only_the_named_parts_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is a process that ends at once; the test above runs the real parts."""
    monkeypatch.setattr(entry, "part", lambda name, limit_s, device: part(name, "pass", limit_s))
    assert main([str(tmp_path), "--device", "cpu", "--parts", "facts,kernels"]) == 0
    assert outcomes(read(tmp_path / FACTS_FILE)) == {"facts": "ended", "kernels": "ended"}
    printed = capsys.readouterr().out
    assert printed.startswith("no GPU: everything is scaled down (--device cpu)\n")
    assert printed.splitlines()[-1].endswith(" s on cpu")


@pytest.mark.slow
def test_parts_that_die_or_hang_lose_no_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is killed, one raises, one ignores SIGINT, one ends at SIGINT; the last one still runs."""
    monkeypatch.setattr(running, "_GRACE_S", 2.0)
    parts = [
        part("killed", "os.kill(os.getpid(), 9)"),
        part("raises", "1 / 0"),
        part("deaf", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)", 6),
        part("slow", "time.sleep(600)", 6),
        part("good", "pass"),
    ]
    run_parts(parts, tmp_path, 1000, Interrupts())
    facts = read(tmp_path / FACTS_FILE)
    assert [fact["text"] for fact in facts if fact.get("fact") == "first"] == [f"a fact of {p.name}" for p in parts]
    assert outcomes(facts) == {
        "killed": "died of SIGKILL",
        "raises": "failed with exit status 1",
        "deaf": "was stopped at its limit of 6 s",
        "slow": "was stopped at its limit of 6 s",
        "good": "ended",
    }
    failed = {fact["check"]: fact for fact in facts if fact.get("ok") is False}
    assert list(failed) == [f"{name} ends by itself" for name in ("killed", "raises", "deaf", "slow")]
    assert "ZeroDivisionError: division by zero" in failed["raises ends by itself"]["detail"]
    assert "KeyboardInterrupt" in failed["slow ends by itself"]["log"]
    printed = table(facts)
    assert "a fact of deaf" in printed
    assert "FAILED raises ends by itself: failed with exit status 1; ZeroDivisionError" in printed
    with tarfile.open(tmp_path / ARCHIVE_FILE) as archive:
        assert archive.getnames() == [f"{p.name}.log" for p in parts]
        assert archive.extractfile("good.log").read() == b"out\n"  # type: ignore[union-attr]


def test_child_processes_of_a_part_end_with_it(tmp_path: Path) -> None:
    child = "import subprocess; child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True)"
    run_parts([part("parent", child)], tmp_path, 1000, Interrupts())
    with tarfile.open(tmp_path / ARCHIVE_FILE) as archive:
        pid = int(archive.extractfile("parent.log").read().split()[-1])  # type: ignore[union-attr]
    deadline_s = time.monotonic() + 30
    while _runs(pid):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_part_without_time_is_skipped_by_name(tmp_path: Path) -> None:
    run_parts([part("late", "pass")], tmp_path, 1, Interrupts())
    (fact,) = read(tmp_path / FACTS_FILE)
    assert (fact["skipped"], fact["detail"]) == ("late", "1 s were left of the budget of 1 s")


def test_an_interrupt_while_a_part_starts_stops_it_and_starts_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception of the signal's handler would leave Popen without an object for the process it has started."""
    started = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self.pid)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(running.subprocess, "Popen", Popen)
    with Interrupts() as interrupts:
        run_parts([part("first", "time.sleep(600)"), part("second", "pass")], tmp_path, 1000, interrupts)
    ends = {fact["of"]: fact["outcome"] for fact in read(tmp_path / FACTS_FILE) if fact.get("fact") == "end"}
    assert ends == {"first": "was interrupted"}
    assert [_runs(pid) for pid in started] == [False]


def runs_a_part(visit: int) -> bool:
    """Whether a process has a child that is past its start, and runs a part."""
    children = Path(f"/proc/{visit}/task/{visit}/children").read_text().split()
    return any(b"first_light.part" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)


def test_an_interrupted_visit_still_prints_its_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.first_light", str(tmp_path), "--device", "cpu", "--parts", "facts"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while not runs_a_part(process.pid):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate()
    assert process.returncode == 1
    assert "interrupted" in printed
    assert "parts: facts was interrupted in" in printed


def test_a_requested_but_missing_gpu_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([str(tmp_path), "--device", "cuda", "--parts", "facts"]) == 1
    (failed,) = [fact for fact in read(tmp_path / FACTS_FILE) if fact.get("ok") is False]
    assert "device=cuda must be usable, but it is not: " in failed["detail"]


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--parts", "facts,nonsense"])
    assert "parts=nonsense must be of facts,correctness," in capsys.readouterr().err


def test_a_fallback_is_a_failed_check_and_so_is_an_exception(tmp_path: Path) -> None:
    import logging

    report = Report("correctness", tmp_path / FACTS_FILE)
    report.watch_fallbacks()
    handler = logging.getLogger("specdec").handlers[-1]
    try:
        with report.attempt("llama"):
            logging.getLogger("specdec").warning("a step could not be recorded as a CUDA graph: %s", "why")
            raise RuntimeError("the first line\nand another")
    finally:
        logging.getLogger("specdec").removeHandler(handler)
    first, second = (fact for fact in read(tmp_path / FACTS_FILE) if fact.get("ok") is False)
    assert (first["check"], first["detail"]) == (
        "no fallback during llama",
        "a step could not be recorded as a CUDA graph: why",
    )
    assert (second["check"], second["detail"]) == ("llama", "RuntimeError: the first line")
    assert "Traceback" in second["traceback"]


def test_a_card_that_is_lost_ends_the_part_and_full_memory_does_not(tmp_path: Path) -> None:
    report = Report("shapes-8b", tmp_path / FACTS_FILE)
    with report.attempt("too large"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with (
        pytest.raises(SystemExit, match="lost: the device failed: AcceleratorError: CUDA error"),
        report.attempt("lost"),
    ):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")
    assert num_failed(read(tmp_path / FACTS_FILE)) == 2


def test_values_of_any_name_are_kept(tmp_path: Path) -> None:
    report = Report("facts", tmp_path / FACTS_FILE)
    report.fact("card", **{"name": "a card", "self": 1, "ok": True}, text="its text")
    report.check("holds", True, **{"name": "a card", "self": 1})
    fact, check = read(tmp_path / FACTS_FILE)
    assert (fact["fact"], fact["name"], fact["self"], fact["text"]) == ("card", "a card", 1, "its text")
    assert (check["check"], check["name"], check["ok"]) == ("holds", "a card", True)


def test_values_cannot_overwrite_the_name_of_a_fact(tmp_path: Path) -> None:
    report = Report("facts", tmp_path / FACTS_FILE)
    with pytest.raises(ValueError, match="fact='else' must not be the name of a value; rename it"):
        report.fact("card", **{"fact": "else"})
    with pytest.raises(ValueError, match="part='else' must not be"):
        report.check("card", True, **{"part": "else"})


def test_the_gpu_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="a card", multi_processor_count=132, L2_cache_size=2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 2 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    facts._card(Report("facts", tmp_path / FACTS_FILE), torch.device("cuda"))
    (fact,) = [each for each in read(tmp_path / FACTS_FILE) if each.get("fact") == "card"]
    assert fact["text"] == "a card, 132 SMs, L2 1 MB, 1.0 of 2.0 GB free"
    assert (fact["name"], fact["capability"], fact["total_bytes"]) == ("a card", [9, 0], 2 * 10**9)


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / FACTS_FILE
    Report("facts", path).fact("whole")
    with path.open("a") as stream:
        stream.write(json.dumps({"part": "facts", "fact": "cut"})[:20])
    assert [fact["fact"] for fact in read(path)] == ["whole"]


def test_the_table_is_short_for_any_number_of_findings(tmp_path: Path) -> None:
    report = Report("facts", tmp_path / FACTS_FILE)
    for name in ("facts", "kernels", "shapes-8b", "correctness", "else"):
        report = Report(name, tmp_path / FACTS_FILE)
        for number in range(300):
            report.check(f"check {number}", False, "x" * 500)
    printed = table(read(tmp_path / FACTS_FILE))
    assert len(printed) <= 11_000
    assert printed.endswith("== 0 of 1500 checks hold")
    assert "more lines in first_light.jsonl" in printed


# ---- the checks can fail


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> correctness.Models:
    folders = tiny.save(tiny.SIZES["llama"], tmp_path_factory.mktemp("tiny"))
    return correctness.Models.load(folders, torch.float32, CPU)


def checks(tmp_path: Path, models: correctness.Models, methods: tuple[str, ...]) -> list[dict]:
    share = correctness.Share(("llama",), torch.float32, 0.0, ("token",), methods)
    for _ in correctness.Checks(Report("correctness", tmp_path / FACTS_FILE), "llama", share, models, models).all():
        pass
    return [fact for fact in read(tmp_path / FACTS_FILE) if "check" in fact]


def test_tiny_drafts_are_accepted_and_rejected(models: correctness.Models, tmp_path: Path) -> None:
    """Otherwise the checks would see one branch only."""
    found = checks(tmp_path, models, correctness.METHODS[:-1])
    assert all(fact["ok"] for fact in found)
    details = {fact["check"]: fact["detail"] for fact in found if fact["check"].endswith("= plain")}
    for method in correctness.METHODS[1:-1]:
        accepted, drafted = (int(details[f"llama float32 T=0 {method} token = plain"].split()[i]) for i in (0, 2))
        assert 0 < accepted < drafted, method


def test_errors_of_recorded_decoding_only_are_found(
    models: correctness.Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of another token, from a position on that only the second phase reaches."""
    forward_at = CausalLM.forward_at

    def wrong(self: CausalLM, tokens: torch.Tensor, starts: torch.Tensor, *others: Any) -> torch.Tensor:
        logits = forward_at(self, tokens, starts, *others)
        return torch.where(starts.max() > 250, logits.roll(1, -1), logits)

    monkeypatch.setattr(CausalLM, "forward_at", wrong)
    failed = [fact for fact in checks(tmp_path, models, ("autoregressive",)) if not fact["ok"]]
    assert {fact["check"] for fact in failed} == {
        "llama float32 T=0 autoregressive token = CPU",
        "llama float32 T=0 autoregressive token recorded = unrecorded",
    }
    for fact in failed:
        assert "first difference at phase 1, row 0, token " in fact["detail"]
        assert "(logits differ by" in fact["detail"]


def test_a_rule_that_accepts_always_is_found(
    models: correctness.Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @Rule
    def accept_always(target: Any, draft: Any, accept_uniforms: torch.Tensor, final_uniforms: torch.Tensor) -> Any:
        return verify_tokens(target, draft, torch.zeros_like(accept_uniforms) - 1, final_uniforms)

    monkeypatch.setitem(assembly.VERIFICATIONS, "token", accept_always)
    failed = [fact for fact in checks(tmp_path, models, ("autoregressive", "draft_model")) if not fact["ok"]]
    assert [fact["check"] for fact in failed] == ["llama float32 T=0 draft_model token = plain"]


ROUNDING = correctness.Share(("llama",), torch.bfloat16, 1.0, ("token", "coupled"), ("autoregressive",), varies=True)


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> tuple[correctness.Models, correctness.Models]:
    """A model in bfloat16 and, standing for a device that rounds otherwise, in float32."""
    folders = tiny.save(tiny.SIZES["llama"], tmp_path_factory.mktemp("rounded"))
    rounded, there = (correctness.Models.load(folders, dtype, CPU) for dtype in (torch.bfloat16, torch.float32))
    return rounded, there


def against(cpu: correctness.Models, there: correctness.Models, share: correctness.Share, path: Path) -> list[dict]:
    for _ in correctness.Checks(Report("correctness", path), "llama", share, cpu, there).all():
        pass
    return [fact for fact in read(path) if fact.get("check", "").endswith("= CPU")]


def test_rounding_is_distinguished_from_errors_in_sampled_tokens(
    in_bfloat16: tuple[correctness.Models, correctness.Models], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 against float32: tokens differ, and each first one that does is explained; by other uniforms none is."""
    cpu, there = in_bfloat16
    found = against(cpu, there, ROUNDING, tmp_path / "sound.jsonl")
    assert [fact for fact in found if not fact["ok"]] == []
    assert sum("explained by distributions" in fact["detail"] for fact in found) >= 4
    engine_of = correctness.Models.engine

    def faulty(self: correctness.Models, *arguments: Any, **options: Any) -> Engine:
        made = engine_of(self, *arguments, **options)
        if self is there:
            nudge(made, Nudge(0, tuple(Role), -0.3))
        return made

    monkeypatch.setattr(correctness.Models, "engine", faulty)
    found = against(cpu, there, ROUNDING, tmp_path / "faulty.jsonl")
    assert len(found) == 7
    assert [fact for fact in found if fact["ok"]] == []


@pytest.mark.parametrize(("shift", "is_explained"), [(8e-5, True), (0.02, False)])
def test_a_uniform_near_a_boundary_explains_a_drafted_token(
    shift: float, is_explained: bool, models: correctness.Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device whose uniforms are shifted by as little as rounding does, and one with a larger shift."""
    there, engine_of = correctness.Models(models.target, models.drafts), correctness.Models.engine

    def shifted(self: correctness.Models, *arguments: Any, **options: Any) -> Engine:
        made = engine_of(self, *arguments, **options)
        if self is there:
            nudge(made, Nudge(0, (*LAST, Role.DRAFT), shift))
        return made

    monkeypatch.setattr(correctness.Models, "engine", shifted)
    share = correctness.Share(("llama",), torch.float32, 1.0, ("token",), ("autoregressive", "draft_model"))
    found = against(models, there, share, tmp_path / "found.jsonl")
    assert [fact["ok"] for fact in found] == [is_explained] * 2
    assert ["explained by distributions" in fact["detail"] for fact in found] == [is_explained] * 2


def test_all_shares_have_names_and_different_work() -> None:
    shares = correctness.shares()
    assert len(set(shares.values())) == len(shares) == 8
    assert {kind for share in shares.values() for kind in share.kinds} == set(tiny.SIZES)
    assert {verification for share in shares.values() for verification in share.verifications} == {
        "token",
        "block",
        "coupled",
    }


def test_parts_have_time_for_one_visit() -> None:
    assert sum(LIMITS_S.values()) <= 400
