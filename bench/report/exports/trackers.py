"""Logs runs to MLflow and to Weights & Biases, whose environment variables set the destination.

A run of the benchmarks becomes a run there, with its options, machine and file. MLflow has a nested run for each cell,
whose identity is in its parameters; Weights & Biases has a table of all cells, and the main values as a summary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.records import fields
from bench.records.results import Results, cell_id
from bench.records.schema import Record
from bench.report.exports.frames import rows

INSTALL = "pip install -e '.[tracking]'"
SUMMARY = ("speedup", "speedup_low", "speedup_high", "acceptance_rate", "mean_acceptance_length", "throughput_tok_s")


def log_to_mlflow(runs: Sequence[Results], experiment: str) -> None:
    """Log runs to an experiment, on the server or in the folder of MLFLOW_TRACKING_URI.

    Raises ValueError with the remedy without MLflow.
    """
    try:
        import mlflow
    except ImportError as error:
        raise ValueError(f"mlflow={experiment} needs MLflow ({error}); {INSTALL}") from error
    mlflow.set_experiment(experiment)
    for run in runs:
        with mlflow.start_run(run_name=run.name, tags=dict(_facts(run))):
            mlflow.log_params(dict(_options(run)))
            for record in run.records:
                with mlflow.start_run(run_name=cell_id(record), nested=True):
                    mlflow.log_params(_texts(record))
                    mlflow.log_metrics(_numbers(record))


def log_to_wandb(runs: Sequence[Results], project: str) -> None:
    """Log runs to a project, by WANDB_MODE. Raises ValueError with the remedy without wandb."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"wandb={project} needs wandb ({error}); {INSTALL}") from error
    for run in runs:
        configuration = {**dict(_options(run)), **dict(_facts(run))}
        with wandb.init(project=project, name=run.name, config=configuration, reinit="finish_previous") as logged:
            found = rows([run])
            names = list(dict.fromkeys(name for row in found for name in row))
            data = [[_for_table(row.get(name)) for name in names] for row in found]
            logged.log({"cells": wandb.Table(columns=names, data=data)})
            for record in run.records:
                values = _numbers(record)
                logged.summary.update({f"{cell_id(record)}/{name}": values[name] for name in SUMMARY if name in values})


def _facts(run: Results) -> Iterator[tuple[str, str]]:
    """When, where and from which sources."""
    machine = run.machine
    facts = {"date": run.date, "commit": run.commit, "command": run.command, "cpu_model": machine.get("cpu_model")}
    facts |= {"gpus": ", ".join(machine.get("gpus") or ()), **(machine.get("versions") or {})}
    return ((name, str(value)) for name, value in facts.items() if value)


def _options(run: Results) -> Iterator[tuple[str, str]]:
    """The options, cut to the length that MLflow allows."""
    return ((name, str(value)[:500]) for name, value in (run.configuration or {}).items() if value is not None)


def _texts(record: Record) -> dict[str, str]:
    """Fields that identify or describe a cell."""
    return {name: str(value)[:500] for name, value in fields.scalars(record).items() if _is_text(name, value)}


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Fields that were measured."""
    found = fields.scalars(record).items()
    return {name: float(value) for name, value in found if value is not None and not _is_text(name, value)}


def _is_text(name: str, value: Any) -> bool:
    return value is not None and (isinstance(value, str | bool) or fields.field(name).type not in (int, float))


def _for_table(value: Any) -> Any:
    """W&B's tables hold one type in a column: what is text in some cells, as gamma, is text in all."""
    return value if value is None or isinstance(value, float) else str(value)
