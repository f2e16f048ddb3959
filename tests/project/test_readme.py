"""What the README shows and claims."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_example_runs(capsys) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert "assert" in code
    exec(compile(code, "README.md", "exec"), {})
    assert "cat" in capsys.readouterr().out


def test_the_constrained_example_runs() -> None:
    (code,) = (each for each in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "json_schema=" in each)
    assert "assert" in code
    exec(compile(code, "README.md", "exec"), {})


def test_the_example_of_an_own_pair_runs(capsys) -> None:
    """As it stands, for the bundled pair and a short answer."""
    (code,) = (each for each in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if '"TARGET"' in each)
    names = {"TARGET": "smollm2-135m", "DRAFT": "smollm2-135m-draft", "temperature=0": "temperature=0, max_tokens=8"}
    for name, ours in names.items():
        code = code.replace(name, ours)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("Engine(LlamaForCausalLM ")


def test_the_example_of_an_audit_runs(capsys) -> None:
    """With few tokens, which are too few for a verdict, and it says so."""
    (code,) = (each for each in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class Mine" in each)
    exec(compile(code.replace("20_000", "60").replace("max_tokens=64", "max_tokens=8"), "README.md", "exec"), {})
    told = capsys.readouterr().out
    assert re.match(r"inconclusive: num_draws=60 must be at least \d+ to see a distance of max_tv=0.05", told)
    assert re.search(r"\d+ tokens were drafted, \d+ of them accepted", told)
    assert "With speculation: " in told


def test_every_test_it_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?", README)
    assert len(named) >= 5
    for path, name in named:
        text = (ROOT / path).read_text()
        assert not name or f"def {name}(" in text, f"{path} has no {name}"


def test_the_results_are_those_of_the_committed_run() -> None:
    """`python -m bench.report bench/baselines/engines-cpu.json` prints what the README shows."""
    from bench.report.rendering import render

    shown = re.search(r"<!-- results: begin -->\n```\n(.*?)\n```\n<!-- results: end -->", README, re.DOTALL).group(1)
    assert shown == render(ROOT / "bench" / "baselines" / "engines-cpu.json")
