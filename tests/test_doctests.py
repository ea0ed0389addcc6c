"""The examples in the docstrings of the public names run as they stand."""

import doctest
import inspect
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import afpq

ERRORS = {name for name in afpq.__all__ if name.endswith("Error")}
NAMES = {"afpq": afpq, "np": np, "Path": Path}


def public(name: str) -> Iterator[tuple[str, Any]]:
    thing = getattr(afpq, name)
    yield name, thing
    if inspect.isclass(thing):
        for method, value in vars(thing).items():
            if not method.startswith("_") and inspect.isfunction(value):
                yield f"{name}.{method}", value


THINGS = {path: thing for name in afpq.__all__ for path, thing in public(name)}


@pytest.fixture
def workplace(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder with the shipped models."""
    shutil.copytree(models, tmp_path / "models")
    monkeypatch.chdir(tmp_path)


def run(name: str, text: str) -> int:
    """Runs the examples; returns their number."""
    test = doctest.DocTestParser().get_doctest(inspect.cleandoc(text), dict(NAMES), name, None, 0)
    runner = doctest.DocTestRunner(verbose=False)
    report: list[str] = []
    runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
    return len(test.examples)


@pytest.mark.parametrize("name", THINGS)
def test_examples_run(name: str, workplace: None) -> None:
    assert THINGS[name].__doc__, f"{name} has no docstring"
    run(name, THINGS[name].__doc__)


@pytest.mark.parametrize(
    "name", [n for n in THINGS if inspect.isfunction(THINGS[n]) and "." not in n]
)
def test_every_function_has_an_example(name: str) -> None:
    assert ">>>" in THINGS[name].__doc__


@pytest.mark.parametrize("method", ["save", "report", "summary", "session", "compare"])
def test_every_step_of_a_model_has_an_example(method: str) -> None:
    assert ">>>" in THINGS[f"QuantizedModel.{method}"].__doc__


@pytest.mark.skipif(find_spec("onnxscript") is None, reason="needs the extra `torch`")
@pytest.mark.parametrize("name", ["quantize", "load"])
def test_examples_of_the_torch_door_run(name: str, workplace: None) -> None:
    torch_door = pytest.importorskip("afpq.torch")
    assert run(name, getattr(torch_door, name).__doc__) > 0
