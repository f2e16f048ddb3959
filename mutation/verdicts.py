"""The committed lists of survivors, survivors/MODULE.md, and the table of their counts in README.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / "survivors"
VERDICTS = ("wanted", "accepted", "equivalent")
HEAD = ("| line | mutant | the line as changed | verdict |", "|---|---|---|---|")
COLUMNS = ("module", "mutants", "run", "killed", "timed out", "survived", *VERDICTS)


@dataclass(frozen=True, slots=True)
class Survivors:
    """The list of one module: how many mutants there are, were run and timed out, notes, and a row per survivor."""

    module: str
    counts: tuple[int, int, int]
    notes: tuple[str, ...]
    rows: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Survivors:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and line not in HEAD]
        found = re.match(r"(\d+) mutants, (\d+) run.*, (\d+) timed out", lines[1])
        if not found:
            raise ValueError(f"{path.name}: {lines[1]!r} must begin with the numbers of mutants, run and timed out")
        rows = tuple(line for line in lines[2:] if line.startswith("| "))
        notes = tuple(line for line in lines[2:] if not line.startswith("| "))
        total, run, late = map(int, found.groups())
        return cls(lines[0].removeprefix("# "), (total, run, late), notes, rows)

    def with_new(self, counts: tuple[int, int, int], rows: Iterable[str]) -> Survivors:
        """With the counts of now, and rows for survivors that are not listed yet; rows that have a verdict stay."""
        listed = {_mutant(row) for row in self.rows}
        both = (*self.rows, *(row for row in rows if _mutant(row) not in listed))
        return Survivors(self.module, counts, self.notes, tuple(sorted(both, key=line_number)))

    def summary(self) -> list[int]:
        """The counts of COLUMNS, without the module. Raises ValueError for a row without a verdict."""
        verdicts = Counter(map(_verdict, self.rows))
        if unknown := verdicts.keys() - set(VERDICTS):
            raise ValueError(f"{self.module}: verdicts {sorted(unknown)} must be one of {', '.join(VERDICTS)}")
        total, run, late = self.counts
        num_survived = len(self.rows)
        return [total, run, run - late - num_survived, late, num_survived, *(verdicts[each] for each in VERDICTS)]

    def write(self) -> None:
        total, run, late = self.counts
        sample = "" if total == run else ", a random sample with `--seed 0`"
        text = [
            f"# {self.module}",
            "",
            f"{total} mutants, {run} run{sample}, {late} timed out, {len(self.rows)} survived.",
        ]
        text += [*self.notes, "", *HEAD, *self.rows, ""]
        _path(self.module).write_text("\n".join(text), encoding="utf-8")


def update(module: str, counts: tuple[int, int, int], rows: Iterable[str]) -> None:
    """Add the survivors of a run to the module's list, to be given verdicts by hand."""
    path = _path(module)
    old = Survivors.read(path) if path.exists() else Survivors(module, counts, (), ())
    old.with_new(counts, rows).write()


def settled(module: str) -> set[str]:
    """The mutants of a module that are equivalent or accepted: running them again tells nothing."""
    rows = Survivors.read(_path(module)).rows if _path(module).exists() else ()
    return {_mutant(row) for row in rows if _verdict(row) in ("equivalent", "accepted")}


def summarize(modules: Iterable[str]) -> None:
    """Count the lists of survivors again, into the table of README.md."""
    counted = {module: Survivors.read(_path(module)).summary() for module in modules if _path(module).exists()}
    sums = [sum(column) for column in zip(*counted.values(), strict=True)]
    rows = [_cells(COLUMNS), "|" + "---|" * len(COLUMNS)]
    rows += [_cells((f"`{module}`", *counts)) for module, counts in counted.items()] + [_cells(("all", *sums))]
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    table = re.compile(r"^\| module \|.*?(?=^$)", re.MULTILINE | re.DOTALL)
    readme.write_text(table.sub(lambda _: "\n".join([*rows, ""]), text, count=1), encoding="utf-8")


def line_number(row: str) -> int:
    return int(row.split("|")[1])


def _cells(values: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, values))} |"


def _mutant(row: str) -> str:
    return row.split("|")[2].strip()


def _verdict(row: str) -> str:
    return row.split(" | ")[-1].strip(" |").partition(":")[0]


def _path(module: str) -> Path:
    return FOLDER / f"{module.removesuffix('.py').replace('/', '.')}.md"
