"""The Python in docs/ runs as it is printed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"


def blocks() -> list[tuple[str, str]]:
    return [
        (path.name, code)
        for path in sorted(DOCS.glob("*.md"))
        for code in re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
    ]


def test_there_are_blocks() -> None:
    assert "torch_compile.md" in {name for name, _ in blocks()}


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
)
@pytest.mark.parametrize(("name", "code"), blocks(), ids=[name for name, _ in blocks()])
def test_a_printed_block_runs(name: str, code: str) -> None:
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    exec(compile(code, name, "exec"), namespace)
    for value in namespace.values():
        assert not isinstance(value, torch.Tensor) or bool(value.isfinite().all())
