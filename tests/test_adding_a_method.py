"""A method written as CONTRIBUTING describes appears in Python, on the command line and in checkpoints by itself."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dcmerge_ext as dcm
from dcmerge_ext.cli import main
from dcmerge_ext.lowrank import LowRank
from dcmerge_ext.methods.registry import _METHODS

CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


@pytest.fixture
def my_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """The code of the guide, as written."""
    (code,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
    (tmp_path / "guide.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("guide").my_method
    del _METHODS["my_method"]
    del sys.modules["guide"]


def test_in_python(my_method) -> None:
    first, second = torch.ones(3, 4), 2 * torch.ones(3, 4)
    assert torch.equal(my_method([first, second], strength=3), 9 * torch.ones(3, 4))
    assert torch.equal(dcm.merge_updates([first, second], method="my_method"), 3 * torch.ones(3, 4))
    with pytest.raises(ValueError, match="did you mean 'strength'"):
        my_method([first], strenght=1)


def test_on_factors(my_method) -> None:
    update = LowRank(torch.ones(3, 2), torch.ones(2, 4))
    merged = my_method([update, update], strength=0.5)
    assert (type(merged), merged.rank) == (LowRank, 4)
    assert torch.equal(merged.dense(), update.dense())


def test_on_the_command_line(my_method, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("base", 0.0), ("a", 1.0), ("b", -2.0)):
        (tmp_path / name).mkdir()
        weights = {"w": torch.full((3, 4), value), "bias": torch.full((3,), value)}
        save_file(weights, tmp_path / name / "model.safetensors")
    arguments = ["merge", "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--method", "my_method"]
    tasks = ["--task", str(tmp_path / "a"), "--task", str(tmp_path / "b")]
    assert main([*arguments, *tasks, "--set", "strength=2", "-q"]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["w"], torch.full((3, 4), -2.0))
    assert torch.equal(merged["bias"], torch.full((3,), -2.0))
    assert main(["methods", "my_method"]) == 0
    assert "factor of the sum of the updates" in capsys.readouterr().out
