"""Gram matrices of a running model equal those of its activations stored by hand; and the command that writes them."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import families
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dcmerge_ext.calibration import Grams, collect_grams, find_gram, save_grams, stored_names
from dcmerge_ext.errors import InputError, RunError

pytest.importorskip("transformers")

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "far", "away"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with families.quiet():
        yield


def stored_activations(model: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
    """All inputs of all linear layers, (tokens, in), by the name of the module."""
    found = defaultdict(list)
    handles = [
        module.register_forward_hook(
            lambda _, inputs, __, name=name: found[name].append(inputs[0].double().flatten(0, -2))
        )
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def batches_for(kind: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    if kind == "vit":
        return [{"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)} for _ in range(2)]
    return [{"input_ids": torch.randint(40, (3, length), generator=generator)} for length in (5, 9)]


class TestCollect:
    @pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "llama-lm"])
    def test_equals_stored_activations(self, kind: str, backend: str) -> None:
        model, batches = families.tiny(kind), batches_for(kind)
        stored, found = stored_activations(model, batches), collect_grams(model, batches)
        suffix = {name: ".mT" if type(model.get_submodule(name)).__name__ == "Conv1D" else "" for name in stored}
        assert set(found) == {f"{name}.weight{suffix[name]}" for name in stored}
        assert len(found) >= 6
        for name, X in stored.items():
            gram = found[f"{name}.weight{suffix[name]}"]
            assert gram.dtype == torch.float64
            torch.testing.assert_close(gram, X.mT @ X, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "llama-lm"])
    def test_names_of_the_checkpoint(self, kind: str, tmp_path: Path) -> None:
        """Transformers stores some weights under other names than its modules have; tied ones are left out."""
        model = families.tiny(kind)
        families.save_pretrained(model, tmp_path / "model")
        weights, own = load_file(tmp_path / "model" / "model.safetensors"), model.state_dict()
        names = stored_names(model, tmp_path / "model")
        assert all(torch.equal(own[name], weights[stored]) for name, stored in names.items())
        assert len(set(names.values())) == len(names)
        plain, found = collect_grams(model, batches_for(kind)), collect_grams(model, batches_for(kind), names=names)
        assert len(found) == len(plain) - (kind == "llama-lm")
        for name, stored in names.items():
            suffix = "" if name in plain else ".mT"
            assert torch.equal(found[stored + suffix], plain[name + suffix])
            assert len(found[stored + suffix]) == weights[stored].shape[0 if suffix else 1]

    def test_weights_that_are_alike_are_told_apart_by_name_alone(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        same = model[0].weight.detach().clone()
        model[1].weight.data.copy_(same)
        families.write_model(tmp_path / "model", {"a": same, "b": same.clone(), "c": model[2].weight.detach().clone()})
        assert stored_names(model, tmp_path / "model") == {"2.weight": "c"}

    def test_only_the_names_asked_for(self) -> None:
        model, batches = families.tiny("bert"), batches_for("bert")
        names = ["encoder.layer.1.output.dense.weight", "encoder.layer.0.intermediate.dense.weight"]
        found, whole = collect_grams(model, batches, names=names), collect_grams(model, batches)
        assert set(found) == set(names)
        assert all(torch.equal(found[name], whole[name]) for name in names)

    def test_masked_tokens_are_left_out(self) -> None:
        model = families.tiny("bert")
        ids, mask = torch.randint(40, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
        mask[1, 5:] = 0
        padded = collect_grams(model, [{"input_ids": ids, "attention_mask": mask}])
        apart = collect_grams(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :5]}])
        for name, gram in padded.items():
            torch.testing.assert_close(gram, apart[name], rtol=1e-4, atol=1e-4)
        with_padding = collect_grams(model, [{"input_ids": ids}])
        name = "encoder.layer.0.attention.self.query.weight"
        assert (with_padding[name] - padded[name]).norm() > 0.1 * padded[name].norm()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_plain_modules_in_any_dtype(self, dtype: torch.dtype) -> None:
        model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 3)).to(dtype)
        x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
        found = collect_grams(model, [x, (x[:1],)])
        rows = torch.cat([x, x[:1]]).double().flatten(0, 1)
        torch.testing.assert_close(found["0.weight"], rows.mT @ rows, rtol=1e-12, atol=1e-12)
        assert found["3.weight"].shape == (4, 4)

    def test_inputs_by_keyword_and_layers_that_run_twice(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(input=self.fc(input=x))

        model = Twice()
        x = torch.randn(7, 4)
        found = collect_grams(model, [x])
        hidden = model.fc(x).detach()
        assert set(found) == {"fc.weight"}
        torch.testing.assert_close(found["fc.weight"].float(), x.mT @ x + hidden.mT @ hidden)

    def test_the_model_is_as_before(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)))
        model[1].eval()
        model.train(True)
        model[1][0].eval()
        modes = [module.training for module in model.modules()]
        for batch in (torch.ones(3, 4), torch.ones(3, 5)):  # the second one does not fit
            try:
                found = collect_grams(model, [batch])
                assert found["1.1.weight"].grad_fn is None
            except RuntimeError:
                assert batch.shape == (3, 5)
            assert [module.training for module in model.modules()] == modes
            assert not any(module._forward_pre_hooks for module in model.modules())
        assert model(torch.ones(3, 4)).requires_grad

    def test_refused(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4))
        with pytest.raises(
            InputError, match=r"'0.weigth' is not the weight of a linear layer.*did you mean '0.weight'"
        ):
            collect_grams(model, [torch.ones(1, 4)], names=["0.weigth"])
        with pytest.raises(InputError, match=r"no linear layer of the model ran; give at least one batch"):
            collect_grams(model, [])
        with pytest.raises(InputError, match=r"the inputs of '0.weight' lead to \d+ NaN or Inf values"):
            collect_grams(model, [torch.full((1, 4), torch.inf)])


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        grams = {"a.weight": torch.eye(3).double(), "b.weight.mT": 2 * torch.eye(4).double()}
        save_grams(grams, tmp_path / "new" / "grams.safetensors")
        assert [p.name for p in (tmp_path / "new").iterdir()] == ["grams.safetensors"]
        for source in (str(tmp_path / "new" / "grams.safetensors"), Grams.of(grams)):
            a, b = find_gram(source, "a.weight"), find_gram(source, "b.weight")
            assert a is not None
            assert b is not None
            assert torch.equal(a.read(), grams["a.weight"])
            assert torch.equal(b.read(), grams["b.weight.mT"])
            assert (a.transposed, b.transposed) == (False, True)
            assert find_gram(source, "c.weight") is None

    def test_an_existing_file_is_kept_unless_told(self, tmp_path: Path) -> None:
        path = tmp_path / "grams.safetensors"
        save_grams({"a": torch.eye(2)}, path)
        with pytest.raises(InputError, match=r"exists already; choose another file or pass --overwrite"):
            save_grams({"a": torch.eye(3)}, path)
        save_grams({"a": torch.eye(3)}, path, overwrite=True)
        assert load_file(path)["a"].shape == (3, 3)

    def test_a_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"is a directory; name a file"):
            save_grams({"a": torch.eye(2)}, tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError, match=r"writing failed"):
            save_grams({"a": torch.eye(2)}, tmp_path / "file" / "grams.safetensors")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with a tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    families.save_pretrained(families.tiny("bert-classifier"), folder / "model")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    with families.quiet():
        transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer with what prepares its pictures."""
    folder = tmp_path_factory.mktemp("vit")
    families.save_pretrained(families.tiny("vit"), folder / "model")
    (folder / "model" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}})
    )
    return folder / "model"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("the cat sat on a mat\n\n  a dog ran far away  \nthe mat\n" + "cat " * 30 + "\n")
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "pictures").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i, suffix in enumerate(("png", "JPG", "png")):
        pixels = torch.randint(256, (12, 10, 3), generator=generator, dtype=torch.uint8).numpy()
        image.fromarray(pixels if i else pixels[:, :, 0]).save(tmp_path / "pictures" / f"{i}.{suffix}")
    (tmp_path / "pictures" / "notes.md").write_text("not a picture")
    return tmp_path / "pictures"


class TestCommand:
    def test_texts(self, bert: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        import transformers

        out = tmp_path / "grams.safetensors"
        result = families.run(capsys, "calibrate", bert, "--texts", texts, "--out", out)
        assert result.status == 0, result.err
        assert "Gram matrices of 14 layers from 4 samples" in result.out
        tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
        lines = [line for line in texts.read_text().splitlines() if line.strip()]
        batches = [tokenizer(line, truncation=True, max_length=16, return_tensors="pt") for line in lines]
        assert [b["input_ids"].shape[1] for b in batches] == [8, 7, 4, 16]
        model = families.load_pretrained(transformers.BertForSequenceClassification, bert)
        stored, found = stored_activations(model, [dict(b) for b in batches]), load_file(out)
        assert set(found) == {f"{name}.weight" for name in stored}
        for name, X in stored.items():
            torch.testing.assert_close(found[f"{name}.weight"], X.mT @ X, rtol=1e-9, atol=1e-9)

    def test_pictures(self, vit: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        import transformers
        from PIL import Image as image

        out = tmp_path / "grams.safetensors"
        result = families.run(capsys, "calibrate", vit, "--images", pictures, "--out", out)
        assert result.status == 0, result.err
        assert "from 3 samples" in result.out
        found, weights = load_file(out), load_file(vit / "model.safetensors")
        assert len(found) == 13
        assert set(found) == {name for name, w in weights.items() if w.ndim == 2}
        assert all(gram.shape == (weights[name].shape[1],) * 2 for name, gram in found.items())
        processor = transformers.ViTImageProcessor.from_pretrained(vit)
        batches = []
        for file in sorted(pictures.iterdir())[:3]:
            batches.append(dict(processor(images=image.open(file).convert("RGB"), return_tensors="pt")))
        stored = stored_activations(families.load_pretrained(transformers.ViTModel, vit), batches)
        assert len(stored) == 13
        name = "encoder.layer.1.output.dense.weight"
        assert any(cases.error(found[name], X.mT @ X) < 1e-9 for X in stored.values() if X.shape[1] == len(found[name]))

    def test_first_samples_and_chosen_layers(
        self, bert: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole, some = tmp_path / "whole.safetensors", tmp_path / "some.safetensors"
        (tmp_path / "two.txt").write_text("\n".join(texts.read_text().splitlines()[:3]))
        arguments = ("calibrate", bert, "--texts")
        assert families.run(capsys, *arguments, tmp_path / "two.txt", "--out", whole).status == 0
        result = families.run(
            capsys, *arguments, texts, "--samples", "2", "--match", r".*\.0\..*dense\.weight", "--out", some, "-v"
        )
        assert result.status == 0, result.err
        assert "the first 2 of 4 lines are used" in result.err
        found, reference = load_file(some), load_file(whole)
        assert set(found) == {
            f"bert.encoder.layer.0.{name}.dense.weight" for name in ("attention.output", "intermediate", "output")
        }
        assert all(torch.equal(gram, reference[name]) for name, gram in found.items())

    def test_then_merge(self, bert: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tasks = [families.perturbed(bert, tmp_path / f"task{i}", i) for i in range(2)]
        files = [tmp_path / f"grams{i}.safetensors" for i in range(2)]
        for task, file in zip(tasks, files, strict=True):
            assert families.run(capsys, "calibrate", task, "--texts", texts, "--out", file, "-q").status == 0
        setting = f"activations=[{files[0]},{files[1]}]"
        families.merged(
            capsys, tmp_path / "out", "--base", bert, *families.tasks(*tasks), "--method", "esm", "--set", setting
        )
        record = json.loads((tmp_path / "out" / "dcmerge.json").read_text())
        merged = {t["name"]: t for t in record["tensors"] if t["action"] == "merge"}
        fallback = {name for name, t in merged.items() if "fallback" in t}
        assert fallback == {name for name in merged if "embeddings" in name}
        assert {name for name in merged if name not in fallback} == set(load_file(files[0]))
        import transformers

        model = families.load_pretrained(transformers.BertForSequenceClassification, tmp_path / "out")
        assert families.outputs(model).isfinite().all()


class TestRefused:
    def refused(self, capsys: pytest.CaptureFixture[str], folder: Path, *arguments: Any, says: list[Any]) -> None:
        families.refused(capsys, folder, *arguments, says=says, command="calibrate")

    def test_without_transformers(
        self,
        bert: Path,
        texts: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
        self.refused(
            capsys, tmp_path, bert, "--texts", texts, "--out", tmp_path / "o.safetensors",
            says=["calibrate needs transformers; install it with: pip install transformers"],
        )  # fmt: skip

    def test_samples(
        self, bert: Path, vit: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        empty, picture = tmp_path / "empty", tmp_path / "broken"
        empty.mkdir()
        picture.mkdir()
        (picture / "a.png").write_bytes(b"not a picture")
        (tmp_path / "blank.txt").write_text("\n \n")
        out = ("--out", tmp_path / "o.safetensors")
        for model, arguments, says in (
            (bert, ("--texts", tmp_path / "none.txt"), ["none.txt: cannot be read"]),
            (bert, ("--texts", tmp_path / "blank.txt"), ["holds no text; write one sample per line"]),
            (bert, ("--texts", texts, "--samples", "0"), ["--samples 0: needs at least 1"]),
            (bert, ("--texts", texts, "--match", "x("), ["--match x(: not a regular expression"]),
            (bert, ("--texts", texts, "--match", "dense"), ["fits the whole name of none of 14 weights"]),
            (vit, ("--texts", texts), ["transformers finds no tokenizer in it"]),
            (vit, ("--images", tmp_path / "nowhere"), ["no such directory"]),
            (vit, ("--images", empty), ["holds no pictures"]),
            (vit, ("--images", picture), ["a.png: not a picture that can be read"]),
            (bert, ("--images", picture), ["transformers finds no image processor in it"]),
            (tmp_path / "no model", ("--texts", texts), ["no such file or directory"]),
        ):
            self.refused(capsys, tmp_path, model, *arguments, *out, says=says)

    def test_the_place(self, bert: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.refused(capsys, tmp_path, bert, "--texts", texts, "--out", texts, says=["exists already", "--overwrite"])

    def test_an_adapter(self, bert: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The message says how to get there; the adapters then merge with what was found."""
        import transformers

        adapters, files = [], []
        for i in range(2):
            settings = {"r": 2, "target_modules": ["query", "dense"], "exclude_modules": ["bert.pooler.dense"]}
            adapters.append(
                families.save_lora(
                    bert, transformers.BertForSequenceClassification, tmp_path / f"a{i}", seed=i, **settings
                )
            )
            files.append(tmp_path / f"grams{i}.safetensors")
            self.refused(
                capsys, tmp_path, adapters[i], "--texts", texts, "--out", files[i],
                says=[f"is an adapter; make the model that it adapts first, by `dcmerge merge --base BASE --task {adapters[i]}"],
            )  # fmt: skip
            made = tmp_path / f"made{i}"
            families.merged(capsys, made, "--base", bert, "--task", adapters[i], "--method", "averaging")
            assert families.run(capsys, "calibrate", made, "--texts", texts, "--out", files[i]).status == 0
        setting = f"activations=[{files[0]},{files[1]}]"
        out = tmp_path / "out"
        result = families.run(
            capsys, "merge", "--base", bert, *families.tasks(*adapters), "--save-as", "adapter", "--method", "esm",
            "--set", setting, "--out", out,
        )  # fmt: skip
        assert result.status == 0, result.err
        record = json.loads((out / "dcmerge.json").read_text())
        merged = [t for t in record["tensors"] if t["action"] == "merge"]
        assert len(merged) == 8
        assert not any("fallback" in t for t in merged)

    def test_models_that_take_more_than_texts(
        self, bert: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        t5 = families.save_pretrained(families.tiny("t5"), tmp_path / "t5")
        for file in bert.glob("*token*"):
            (t5 / file.name).write_bytes(file.read_bytes())
        self.refused(
            capsys, tmp_path, t5, "--texts", texts, "--out", tmp_path / "o.safetensors",
            says=["needs inputs for its encoder and its decoder", "collect_grams"],
        )  # fmt: skip

    def test_a_model_that_does_not_run_on_them(
        self, bert: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        vit = families.save_pretrained(families.tiny("vit"), tmp_path / "vit")
        for file in bert.glob("*token*"):
            (vit / file.name).write_bytes(file.read_bytes())
        self.refused(
            capsys, tmp_path, vit, "--texts", texts, "--out", tmp_path / "o.safetensors",
            says=["ViTModel does not run on these samples", "collect_grams"],
        )  # fmt: skip

    def test_neither_texts_nor_images(self, bert: Path, tmp_path: Path) -> None:
        from dcmerge_ext.cli import main

        with pytest.raises(SystemExit) as error:
            main(["calibrate", str(bert), "--out", str(tmp_path / "o.safetensors")])
        assert error.value.code == 2
