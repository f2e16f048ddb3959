"""Extensions: what a name stands for, and how one that cannot be used is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.catalogue.pairs import catalogue
from bench.engines.registry import EngineKind, engine_kind, extension_files, parse_engine, parse_method, why_not
from bench.measure import machine
from bench.workloads import registry
from bench.workloads.base import Prompt
from specdec import Engine
from specdec.conformance.toys import grid_pair
from specdec.runtime import extensions
from specdec.runtime.extensions import ExtensionError

MODULE = """
from bench.engines.registry import EngineKind
from bench.workloads.base import Prompt
from specdec.methods import MethodSpec

drafting = MethodSpec("drafting", "a draft model", draft_kinds=("model",))
growing = MethodSpec("growing", "trees of a draft model", draft_kinds=("model",), drafts_trees=True)
kind = EngineKind("torch", ("autoregressive", "ngram"), load="outside.data:load", max_batch_size=2)
absent = EngineKind("not-installed", ("ngram",), load="outside.data:load")
number = 3


def prompts(data_dir, malformed):
    return [Prompt("one", "a"), Prompt("two", "b")]


def texts(data_dir, malformed):
    return ["one", "two"]


def load(pair, options):
    return pair, options
"""


@pytest.fixture(autouse=True)
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package on the path that nobody has imported, and no entry points from earlier tests."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "__init__.py").touch()
    (tmp_path / "outside" / "data.py").write_text(MODULE)
    (tmp_path / "outside" / "broken.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    extensions.entry_points.cache_clear()
    yield tmp_path
    extensions.entry_points.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "outside"]:
        del sys.modules[name]


def declare(folder: Path, distribution: str, group: str, **points: str) -> None:
    """As an installed distribution does."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {value}\n" for name, value in points.items()]
    (info / "entry_points.txt").write_text("".join([f"[{group}]\n", *lines]))
    extensions.entry_points.cache_clear()


def test_a_workload_may_have_categories_and_keeps_its_name_in_results(outside: Path) -> None:
    declare(outside, "mine", "specdec.workloads", mine="outside.data:prompts")
    for name in ("mine", "outside.data:prompts"):
        assert registry.parse_workloads("workloads", f"smoke, {name}, {name}:b") == ("smoke", name, f"{name}:b")
        assert registry.read(name, None) == [Prompt("one", "a"), Prompt("two", "b")]
        assert registry.read(f"{name}:b", None) == [Prompt("two", "b")]
        assert (registry.label(name), registry.label(f"{name}:b")) == (name, f"{name}:b")
        with pytest.raises(ValueError, match=f"must name a category of {name}; it has a, b"):
            registry.read(f"{name}:c", None)


def test_a_file_may_be_named_like_a_reference(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(outside)
    (outside / "outside.data:prompts").write_text("of a file\n")
    assert registry.read("outside.data:prompts", None) == [Prompt("of a file")]


def test_an_engine_is_known_by_its_kind(outside: Path) -> None:
    declare(outside, "mine", "specdec.engines", mine="outside.data:kind")
    for name in ("mine", "outside.data:kind"):
        assert parse_engine("engines", name) == name
        assert engine_kind(name).max_batch_size == 2
        assert why_not(name, "ngram", 2) is None
        assert why_not(name, "eagle", 1) == f"engine={name} has no method=eagle; use autoregressive, ngram"
    reason = why_not("outside.data:absent", "ngram", 1)
    assert reason == "engine=outside.data:absent needs the package not-installed; pip install not-installed"


def test_a_method_uses_the_pairs_draft_of_the_right_kind() -> None:
    name, pair = "outside.data:drafting", catalogue()["tiny-random"]
    assert parse_method("methods", name) == name
    assert pair.draft_for(name) == pair.draft_for("draft_model") is not None
    assert not pair.lacks_draft(name)
    assert why_not("specdec", name, 4) is None
    for trees in ("tree", "outside.data:growing"):
        reason = f"method={trees} has no verification=block; use --verification token or coupled"
        assert why_not("specdec", trees, 1, "block") == reason
        assert why_not("specdec", trees, 1, "coupled") is None
    assert why_not("transformers", name, 1) == (
        f"engine=transformers has no method={name}; use autoregressive, ngram, draft_model"
    )
    with pytest.raises(ValueError, match=f'method="{name}" needs a draft'):
        method(name)


def test_built_in_names_come_first(outside: Path) -> None:
    declare(outside, "mine", "specdec.engines", specdec="outside.broken:kind")
    declare(outside, "too", "specdec.workloads", smoke="outside.broken:prompts")
    declare(outside, "three", "specdec.proposers", ngram="outside.broken:method")
    assert engine_kind("specdec").package == "specdec"
    assert registry.read("smoke", None)
    assert Engine(grid_pair(0)[0], method="ngram").method == "ngram"


def test_the_same_entry_point_of_two_packages_is_refused(outside: Path) -> None:
    declare(outside, "one", "specdec.workloads", mine="outside.data:prompts")
    declare(outside, "two", "specdec.workloads", mine="outside.data:texts")
    with pytest.raises(ExtensionError, match="'mine' must be declared once, but one and two declare it; use module:"):
        registry.read("mine", None)


def method(name: str) -> None:
    Engine(grid_pair(0)[0], method=name)


WRONG: list[tuple[Callable[[str], object], str, str]] = [
    (registry.read, "outside.dat:prompts", "needs module 'outside.dat' .ModuleNotFoundError: .*; install the package"),
    (registry.read, "outside.broken:prompts", "needs module 'outside.broken' .RuntimeError: no licence.; correct the"),
    (
        registry.read,
        "outside.data:prompt",
        "needs attribute 'prompt', which module 'outside.data' does not have; did you mean",
    ),
    (registry.read, "outside.data:zzz", ".* does not have; define it, or correct the name"),
    (registry.read, "outside.data:number", r"must be a function \(data_dir, malformed\) .*, but it is int 3"),
    (
        registry.read,
        "outside.data:texts",
        r"must return a list of bench.workloads.base.Prompt, but it returned \['one",
    ),
    (engine_kind, "outside.data:prompts", "must be a bench.engines.registry.EngineKind, but it is function"),
    (engine_kind, "mine", r"must be module:attribute or an installed entry point \(installed: none\); install"),
    (method, "outside.data:kind", "must be a specdec.methods.MethodSpec, but it is EngineKind"),
]


@pytest.mark.parametrize(("use", "name", "message"), WRONG, ids=[name for _, name, _ in WRONG])
def test_unusable_extensions_are_refused(use: Callable[[str], object], name: str, message: str) -> None:
    groups = {registry.read: "workloads"} | {engine_kind: "engines", method: "proposers"}
    with pytest.raises(ExtensionError, match=f"specdec.{groups[use]}: '{name}' {message}"):
        use(name) if use is not registry.read else registry.read(name, None)


def test_an_entry_point_must_be_a_reference(outside: Path) -> None:
    declare(outside, "mine", "specdec.engines", mine="outside.data")
    with pytest.raises(ExtensionError, match=r"'mine' must be declared as module:attribute, not as 'outside.data'"):
        engine_kind("mine")


def test_misspelt_names_are_no_extensions() -> None:
    with pytest.raises(ValueError, match=r"engines='triton' must be one of specdec, .* or module:attribute"):
        parse_engine("engines", "triton")
    with pytest.raises(ValueError, match=r"methods='magic' must be one of autoregressive, .* or module:attribute"):
        parse_method("methods", "magic")
    with pytest.raises(ValueError, match=r"method='ngrams' must be one of autoregressive, .*; did you mean 'ngram'"):
        method("ngrams")


def test_a_change_of_an_extension_makes_cells_incomparable(outside: Path) -> None:
    """The digest of the sources, by which a journal knows whether it may be resumed, covers named extensions."""

    def digest(engine: str) -> str:
        return machine.source_sha256(extension_files([engine], ["autoregressive", "ngram"]))

    built_in, before = digest("specdec"), digest("outside.data:kind")
    (outside / "outside" / "broken.py").write_text("# another comment\n")
    assert digest("outside.data:kind") not in (built_in, before)
    assert digest("specdec") == built_in == machine.source_sha256()


def test_a_kind_of_engine_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match="load='outside' must be module:function"):
        EngineKind("torch", (), load="outside")
    with pytest.raises(ValueError, match=r"extras='arrival' must be one of .*; did you mean 'arrivals'"):
        EngineKind("torch", (), load="outside.data:load", extras=("arrival",))
