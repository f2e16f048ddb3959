"""Results as data frames and Parquet files, and in experiment trackers, which are installed by `tox -e exports`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_runs import audited, decoded, loaded, write

from bench.records import results
from bench.records.results import Results
from bench.report import rendering
from bench.report.exports import frames

NEEDED = "needs the extras frames and tracking: tox -e exports"


def run_of(folder: Path, name: str = "run") -> Results:
    records = [decoded("ngram", "auto"), decoded("ngram", 2), loaded(2.0, "ngram", 2), audited("lossy")]
    configuration = {"seed": 0, "gammas": ["auto", 2], "max_tokens": 10}
    return results.read(write(folder / f"{name}.json", records, configuration=configuration, command="pytest bench/"))


def test_a_parquet_file_has_typed_columns(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason=NEEDED)
    runs = [run_of(tmp_path), run_of(tmp_path, "later")]
    frames.write_parquet(runs, tmp_path / "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names[:4] == ["run", "date", "commit", "kind"]
    types = {name: str(table.schema.field(name).type) for name in ("gamma", "speedup", "num_tokens", "engine")}
    assert types == {"gamma": "string", "speedup": "double", "num_tokens": "int64", "engine": "string"}
    rows = table.to_pylist()
    assert [(row["run"], row["kind"], row["gamma"]) for row in rows[:4]] == [
        ("run", "cell", "auto"),
        ("run", "cell", "2"),
        ("run", "load", "2"),
        ("run", "certificate", "2"),
    ]
    assert (rows[1]["speedup"], rows[1]["num_tokens"], rows[3]["speedup"]) == (2.0, 20, None)
    assert (rows[7]["run"], rows[7]["date"], rows[7]["commit"]) == ("later", "2026-01-02T03:04:05+00:00", "abc")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason=NEEDED)
    with pytest.raises(ValueError, match=r"parquet=.*missing/out must be a writable file \(No such file"):
        frames.write_parquet([run_of(tmp_path)], tmp_path / "missing" / "out")


def test_a_data_frame_has_a_row_for_each_cell(tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason=NEEDED)
    frame = frames.frame([run_of(tmp_path)])
    assert frame.groupby("kind").size().to_dict() == {"cell": 2, "load": 1, "certificate": 1}
    assert frame["speedup"].mean() == 2.0


@pytest.mark.parametrize(
    ("package", "option", "message"),
    [
        ("pyarrow", "--parquet", r"typed columns need pyarrow .*; pip install -e '\.\[frames\]'"),
        ("mlflow", "--mlflow", r"mlflow=name needs MLflow .*; pip install -e '\.\[tracking\]'"),
        ("wandb", "--wandb", r"wandb=name needs wandb .*; pip install -e '\.\[tracking\]'"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, option: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", "run.json", option, "name"])
    with pytest.raises(SystemExit):
        rendering.main()
    assert re.search(message, capsys.readouterr().err)


def test_a_data_frame_without_pandas_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match=r"a data frame needs pandas .*; pip install -e '\.\[frames\]'"):
        frames.frame([run_of(tmp_path)])


def in_a_process(code: str, folder: Path, **variables: str) -> str:
    """What code prints that runs with the variables of a tracker; these packages change the process they are in."""
    root = str(Path(__file__).parents[3])
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": root, **variables}
    done = subprocess.run(
        [sys.executable, "-c", code, folder / "run.json"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


MLFLOW = """
import json, sys
from pathlib import Path
import mlflow
from bench.records import results
from bench.report.exports.trackers import log_to_mlflow
log_to_mlflow([results.read(Path(sys.argv[1]))], "speculative decoding")
runs = mlflow.search_runs(experiment_names=["speculative decoding"], output_format="list")
print(json.dumps([[run.data.tags, run.data.params, run.data.metrics] for run in runs]))
"""


@pytest.mark.slow
def test_mlflow_has_a_run_with_a_nested_run_for_each_cell(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason=NEEDED)
    run_of(tmp_path)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    printed = in_a_process(MLFLOW, tmp_path, MLFLOW_TRACKING_URI=store)
    logged = {tags["mlflow.runName"]: (tags, *rest) for tags, *rest in json.loads(printed.splitlines()[-1])}
    assert set(logged) == {
        "run",
        "specdec-tiny-ngram-auto-same-smoke-1",
        "specdec-tiny-ngram-2-same-smoke-1",
        "specdec-tiny-ngram-2-same-smoke-1-2.0",
        "equivalence-specdec-tiny-ngram-2",
    }
    tags, parameters, _ = logged["run"]
    assert (tags["commit"], tags["cpu_model"], tags["torch"]) == ("abc", "a processor", "2.13.0")
    assert (parameters["seed"], parameters["gammas"]) == ("0", "['auto', 2]")
    tags, parameters, metrics = logged["specdec-tiny-ngram-2-same-smoke-1"]
    assert "mlflow.parentRunId" in tags
    assert (parameters["gamma"], parameters["engine"]) == ("2", "specdec")
    assert (metrics["speedup"], metrics["acceptance_rate"], metrics["num_tokens"]) == (2.0, 0.5, 20.0)


WANDB = """
import sys
from pathlib import Path
from bench.records import results
from bench.report.exports.trackers import log_to_wandb
log_to_wandb([results.read(Path(sys.argv[1]))], "speculative-decoding")
"""


@pytest.mark.slow
def test_wandb_has_a_table_and_a_summary(tmp_path: Path) -> None:
    """Offline: what is kept in the run's folder until it is synchronized."""
    pytest.importorskip("wandb", reason=NEEDED)
    run_of(tmp_path)
    in_a_process(WANDB, tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = kept.read_bytes()
    for text in (b"specdec-tiny-ngram-2-same-smoke-1/speedup", b"cpu_model", b"a processor"):
        assert text in content
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/cells*.json")
    found = json.loads(table.read_text())
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]
    assert [(row["kind"], row["gamma"], row["speedup"]) for row in rows] == [
        ("cell", "auto", 2.0),
        ("cell", "2", 2.0),
        ("load", "2", None),
        ("certificate", "2", None),
    ]
