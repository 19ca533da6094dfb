"""A method written as CONTRIBUTING describes appears in Python, on the command line and in checkpoints by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
import torch
from msgspec import Meta
from safetensors.torch import load_file, save_file

import dcmerge_ext as dcm
from dcmerge_ext.cli import main
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.registry import _METHODS, register
from dcmerge_ext.updates import Updates


class Strongest(Method, frozen=True):
    """The update of the task with the largest norm."""

    name = "strongest"
    paper = "https://example.org/strongest"

    factor: Annotated[float, Meta(gt=0, description="multiplies the result")] = 1.0

    def merge(self, updates: Updates, ctx: Context) -> Update:
        dense = [u.dense() if isinstance(u, LowRank) else u for u in updates]
        return self.factor * max(dense, key=lambda u: float(u.norm()))


@pytest.fixture
def strongest() -> Iterator[object]:
    yield register(Strongest)
    del _METHODS["strongest"]


def test_in_python(strongest) -> None:
    weak, strong = torch.ones(3, 4), 2 * torch.ones(3, 4)
    assert torch.equal(strongest([weak, strong], factor=3), 6 * torch.ones(3, 4))
    assert torch.equal(dcm.merge_updates([weak, strong], method="strongest"), strong)
    with pytest.raises(ValueError, match="did you mean 'factor'"):
        strongest([weak], facter=1)


def test_on_the_command_line(strongest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("base", 0.0), ("a", 1.0), ("b", -2.0)):
        (tmp_path / name).mkdir()
        weights = {"w": torch.full((3, 4), value), "bias": torch.full((3,), value)}
        save_file(weights, tmp_path / name / "model.safetensors")
    arguments = ["merge", "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--method", "strongest"]
    assert (
        main([*arguments, "--task", str(tmp_path / "a"), "--task", str(tmp_path / "b"), "--set", "factor=2", "-q"]) == 0
    )
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["w"], torch.full((3, 4), -4.0))
    assert torch.equal(merged["bias"], torch.full((3,), -0.5))
    assert main(["methods", "strongest"]) == 0
    assert "multiplies the result" in capsys.readouterr().out
