"""``--verify``: the output is read again, and every difference is found and named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import run, tasks
from safetensors.torch import load_file, save_file

from dcmerge_ext import merge_checkpoints
from dcmerge_ext.checkpoints import run as run_module
from dcmerge_ext.checkpoints.verify import verify_output
from dcmerge_ext.errors import RunError

BASE = families.toy()
NAME = "layers.0.mlp.weight"
Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return families.write_model(tmp_path / "base", BASE)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [families.write_model(tmp_path / f"task{i}", families.tuned(BASE, i)) for i in range(2)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], object]], None]:
    """Changes the output between its last rename and its verification."""

    def prepare(change: Callable[[Path], object]) -> None:
        def spoiled(out: Path, *given: Any, **options: Any) -> None:
            change(out)
            verify_output(out, *given, **options)

        monkeypatch.setattr(run_module, "verify_output", spoiled)

    return prepare


@pytest.mark.parametrize("method", ["dc_merge", "ties"])
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
@pytest.mark.parametrize("shard_size", ["5GB", "1KB"])
def test_good_output(
    method: str, dtype: str, shard_size: str, base: Path, models: list[Path], out: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    with caplog.at_level("INFO", logger="dcmerge_ext"):
        merge_checkpoints(base, models, out, method, dtype=dtype, shard_size=shard_size, verify=True)
    assert f"{out}: verified {len(BASE)} tensors" in caplog.text
    assert "transformers cannot tell" in caplog.text  # of model type "toy"


def test_panels_of_large_tensors(tmp_path: Path, out: Path) -> None:
    """Tensors that are read in several panels, the last one short."""
    start = {"a.weight": torch.randn(1031, 517), "b": torch.randn(700_001), "c.weight": torch.randn(3, 300_000)}
    base = families.write_model(tmp_path / "large", start)
    task = families.write_model(tmp_path / "tuned", families.tuned(start, 0))
    merge_checkpoints(base, [task], out, "averaging", verify=True)


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def spoil(out: Path) -> None:
        content = load_file(out / "model.safetensors")
        content[name] = change(content[name])
        save_file(content, out / "model.safetensors")

    return spoil


def _drop(out: Path) -> None:
    content = load_file(out / "model.safetensors")
    del content[NAME]
    save_file(content, out / "model.safetensors")


def _flip_a_bit(out: Path) -> None:
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (replaced(NAME, lambda t: t + 1e-6), [repr(NAME), "does not hold the bytes that were written"]),
        (replaced(NAME, lambda t: t.half()), [repr(NAME), "is 8x12 float16 and was written as 8x12 float32"]),
        (replaced(NAME, lambda t: t.mT.contiguous()), [repr(NAME), "is 12x8 float32"]),
        (replaced(NAME, lambda t: t * torch.inf), [repr(NAME), "holds 96 NaN or Inf values"]),
        (_drop, [repr(NAME), "is missing"]),
        (_flip_a_bit, ["does not hold the bytes"]),
        (lambda out: os.truncate(out / "model.safetensors", 4000), ["not a complete safetensors file"]),
        (lambda out: (out / "model.safetensors").unlink(), ["cannot be read"]),
    ],
    ids=["value", "dtype", "shape", "inf", "missing", "bit", "cut", "gone"],
)
def test_spoilt_output(
    change: Callable[[Path], None], says: list[str], base: Path, models: list[Path], out: Path, spoil: Any,
    capsys: Capsys,
) -> None:  # fmt: skip
    spoil(change)
    result = run(capsys, "merge", "--base", base, *tasks(*models), "--out", out, "--verify")
    assert result.status == 3
    (message,) = [line for line in result.err.splitlines() if line.startswith("failed: ")]
    for part in (str(out / "model.safetensors"), *says):
        assert part in message
    assert "Traceback" not in result.err


def test_without_verify_nothing_is_read_again(base: Path, models: list[Path], out: Path, spoil: Any) -> None:
    spoil(lambda out: pytest.fail("read again"))
    merge_checkpoints(base, models, out)


def test_what_the_base_holds_is_no_mistake(tmp_path: Path, out: Path) -> None:
    """Masks of minus infinity, copied."""
    start = {**BASE, "attention.mask": torch.full((4, 4), -torch.inf)}
    base = families.write_model(tmp_path / "masked", start)
    adapter = families.write_adapter(tmp_path / "adapter", BASE)
    merge_checkpoints(base, [adapter], out, verify=True)
    assert families.read_model(out)["attention.mask"].isinf().all()


@pytest.mark.parametrize("kind", ["bert", "bert-classifier", "gpt2-lm", "llama-lm", "t5", "vit"])
def test_transformers_takes_it(kind: str, tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = families.save_pretrained(families.tiny(kind), tmp_path / "model")
    task = families.perturbed(base, tmp_path / "tuned", 0)
    with caplog.at_level("INFO", logger="dcmerge_ext"):
        merge_checkpoints(base, [task], out, verify=True)
    (line,) = [m for m in caplog.messages if "of transformers takes" in m]
    found, wanted = (int(word) for word in line.split() if word.isdigit())
    assert 0 < found <= wanted


def test_transformers_does_not_take_it(tmp_path: Path, out: Path, spoil: Any) -> None:
    base = families.save_pretrained(families.tiny("bert"), tmp_path / "model")
    task = families.perturbed(base, tmp_path / "tuned", 0)

    def wider(out: Path) -> None:
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))

    spoil(wider)
    with pytest.raises(RunError, match=rf"{out}: tensor '.*' is .* and BertModel of transformers expects"):
        merge_checkpoints(base, [task], out, verify=True)
    shutil.rmtree(out)

    def other(out: Path) -> None:
        families.tiny("gpt2").config.save_pretrained(out)

    spoil(other)
    with pytest.raises(RunError, match=r"has none of its tensors"):
        merge_checkpoints(base, [task], out, verify=True)


def test_peft_takes_it(tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture, spoil: Any) -> None:
    adapters = [families.write_adapter(tmp_path / f"a{i}", BASE, rank=2 + i, seed=i) for i in range(2)]
    with caplog.at_level("INFO", logger="dcmerge_ext"):
        merge_checkpoints(None, adapters, out, verify=True)
    assert f"{out}: verified 4 tensors" in caplog.text
    shutil.rmtree(out)

    def lower(out: Path) -> None:
        config = json.loads((out / "adapter_config.json").read_text())
        (out / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))

    spoil(lower)
    with pytest.raises(RunError, match=r"lora_A.weight' is 5x8 float32, and adapter_config.json gives it rank 3"):
        merge_checkpoints(None, adapters, out, verify=True)
    shutil.rmtree(out)

    def broken(out: Path) -> None:
        config = json.loads((out / "adapter_config.json").read_text())
        (out / "adapter_config.json").write_text(json.dumps({**config, "r": -1}))

    spoil(broken)
    with pytest.raises(RunError, match=r"rank -1|PEFT does not take"):
        merge_checkpoints(None, adapters, out, verify=True)


def test_ranks_by_pattern(tmp_path: Path, out: Path) -> None:
    modules = [["layers.0.attn", "layers.1.attn"], ["layers.0.attn"]]
    adapters = [families.write_adapter(tmp_path / f"a{i}", BASE, m, rank=2) for i, m in enumerate(modules)]
    merge_checkpoints(None, adapters, out, verify=True)
    assert json.loads((out / "adapter_config.json").read_text())["rank_pattern"]


def test_without_the_libraries(base: Path, models: list[Path], out: Path) -> None:
    """transformers and PEFT are optional."""
    code = (
        "import sys\n"
        "sys.modules['transformers'] = sys.modules['peft'] = None\n"
        "from dcmerge_ext.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["merge", "-v", "--base", base, *tasks(*models), "--out", out, "--verify"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=tempfile.gettempdir(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "transformers is not installed; whether it loads the model was not checked" in done.stderr
