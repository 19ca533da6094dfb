"""The classes for fusion_bench against fusion_bench's own, the real package and its real command."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fusion_bench")
from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.method import ISO_C_Merge, ISO_CTS_Merge
from fusion_bench.method import TaskSingularVectorMerging as TheirTsvM
from fusion_bench.utils import instantiate
from omegaconf import OmegaConf

import dcmerge_ext as dcm
from dcmerge_ext.errors import DcmergeError, InputError, OptionError
from dcmerge_ext.integrations import fusion_bench as ours

CONFIGS = Path(ours.__file__).parent / "fusion_bench_config" / "method" / "dcmerge"
TOLERANCE = 1e-4
"""Relative to the update of a tensor, in the Frobenius norm; float32."""

TWINS: list[tuple[type[BaseAlgorithm], type[BaseAlgorithm], dict[str, Any]]] = [
    (TheirTsvM, ours.TaskSingularVectorMerging, {}),
    (TheirTsvM, ours.TaskSingularVectorMerging, {"alpha": 0.7}),
    (TheirTsvM, ours.TaskSingularVectorMerging, {"alpha": 2}),
    (TheirTsvM, ours.TaskSingularVectorMerging, {"alpha": [0.7, 1.0, -0.2]}),
    (TheirTsvM, ours.TaskSingularVectorMerging, {"exclude_keys": ["1.weight"]}),
    (ISO_C_Merge, ours.IsotropicMergingInCommonSubspace, {"scaling_factor": 1.3}),
    (ISO_C_Merge, ours.IsotropicMergingInCommonSubspace, {"scaling_factor": 1.0, "exclude_keys": ["4.weight"]}),
    (
        ISO_CTS_Merge,
        ours.IsotropicMergingInCommonAndTaskSubspace,
        {"scaling_factor": 1.3, "common_space_fraction": 0.8},
    ),
    (
        ISO_CTS_Merge,
        ours.IsotropicMergingInCommonAndTaskSubspace,
        {"scaling_factor": 0.5, "common_space_fraction": 0.3, "exclude_keys": ["0.weight"]},
    ),
]


class Net(nn.Sequential):
    """A table, matrices both ways, vectors, a convolution."""

    def __init__(self) -> None:
        super().__init__(
            nn.Embedding(40, 24), nn.Linear(24, 32), nn.LayerNorm(32), nn.Conv2d(3, 4, 2), nn.Linear(32, 20)
        )


class Pool(BaseModelPool):
    """As from files: a model of its own for each call. fusion_bench's algorithms change what a pool of modules holds."""

    def load_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        return copy.deepcopy(super().load_model(*args, **kwargs))


Update = Callable[[str, Tensor, int], Tensor]


def pool(update: Update, tasks: int = 3, dtype: torch.dtype = torch.float32) -> Pool:
    torch.manual_seed(0)
    base = Net().to(dtype)
    models = {"_pretrained_": base}
    for task in range(tasks):
        model = copy.deepcopy(base)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += update(name, parameter, task).to(dtype)
        models[f"task_{task}"] = model
    return Pool(models)


def noise(name: str, parameter: Tensor, task: int) -> Tensor:
    return 0.1 * torch.randn(parameter.shape)


def low_rank(name: str, parameter: Tensor, task: int) -> Tensor:
    if parameter.ndim != 2:
        return noise(name, parameter, task)
    m, n = parameter.shape
    return 0.1 * torch.randn(m, 2) @ torch.randn(2, n)


def few_rows(name: str, parameter: Tensor, task: int) -> Tensor:
    """Six rows of a matrix: the others stay exactly as they were."""
    update = noise(name, parameter, task)
    if parameter.ndim == 2:
        update[6:] = 0
    return update


def distance(found: nn.Module, expected: nn.Module, base: nn.Module) -> float:
    """The largest over all tensors, relative to its update."""
    assert type(found) is type(expected)
    worst = 0.0
    for (name, a), b, c in zip(
        found.state_dict().items(), expected.state_dict().values(), base.state_dict().values(), strict=True
    ):
        assert a.dtype == b.dtype, name
        size = (b - c).double().norm()
        worst = max(worst, float((a - b).double().norm() / size) if size else float((a - b).abs().max()))
    return worst


def ours_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Lightning has messages of its own."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("dcmerge_ext")]


class TestTwins:
    @pytest.mark.parametrize(("theirs", "twin", "arguments"), TWINS)
    def test_same_arguments_same_model(
        self, theirs: type[BaseAlgorithm], twin: type[BaseAlgorithm], arguments: dict[str, Any]
    ) -> None:
        models = pool(noise)
        found, expected = twin(**arguments).run(models), theirs(**arguments).run(models)
        assert distance(found, expected, models.load_pretrained_model()) < TOLERANCE

    @pytest.mark.parametrize(("theirs", "twin", "arguments"), TWINS)
    @pytest.mark.parametrize("tasks", [1, 25])
    def test_one_task_and_more_than_rows(
        self, theirs: type[BaseAlgorithm], twin: type[BaseAlgorithm], arguments: dict[str, Any], tasks: int
    ) -> None:
        if isinstance(arguments.get("alpha"), list):
            arguments = {"alpha": [1.0] * tasks}
        models = pool(noise, tasks)
        if arguments.get("common_space_fraction") == 0.3 and tasks == 25:  # of 20 rows: its own sizes do not fit
            outcomes = []
            for cls in (theirs, twin):
                with pytest.raises((RuntimeError, ValueError, IndexError)) as caught:
                    cls(**arguments).run(models)
                outcomes.append((type(caught.value), str(caught.value)))
            assert outcomes[0] == outcomes[1]
            return
        found, expected = twin(**arguments).run(models), theirs(**arguments).run(models)
        assert distance(found, expected, models.load_pretrained_model()) < TOLERANCE

    def test_float64(self) -> None:
        models = pool(noise, dtype=torch.float64)
        found, expected = ours.TaskSingularVectorMerging().run(models), TheirTsvM().run(models)
        assert distance(found, expected, models.load_pretrained_model()) < 1e-12

    def test_half_precision(self) -> None:
        """fusion_bench's TSV-M computes in float32 and rounds, as here; its Iso-C has no SVD for it."""
        models = pool(noise, dtype=torch.bfloat16)
        found, expected = ours.TaskSingularVectorMerging().run(models), TheirTsvM().run(models)
        assert distance(found, expected, models.load_pretrained_model()) < 0.02
        with pytest.raises(RuntimeError, match=r"(?i)bfloat16"):
            ISO_C_Merge(scaling_factor=1.0).run(models)
        merged = ours.IsotropicMergingInCommonSubspace(scaling_factor=1.0).run(models).state_dict()
        assert all(tensor.isfinite().all() for tensor in merged.values())

    def test_updates_of_low_rank_are_told(self, caplog: pytest.LogCaptureFixture) -> None:
        """int(20 / 3) = 6 components of which 2 are not null: fusion_bench takes LAPACK's vectors for the others."""
        models = pool(low_rank)
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            merged = ours.TaskSingularVectorMerging().run(models).state_dict()
        (message,) = ours_of(caplog)
        assert message.startswith("3 matrices, the first of them 0.weight")
        base = models.load_pretrained_model().state_dict()
        deltas = [models.load_model(name).state_dict()["1.weight"] - base["1.weight"] for name in models.model_names]
        expected = dcm.methods.tsv_m(deltas, rank=2)
        assert torch.linalg.matrix_norm(merged["1.weight"] - base["1.weight"] - expected) < 1e-5 * expected.norm()

    def test_a_sum_of_low_rank_keeps_the_mean_over_all_directions(self, caplog: pytest.LogCaptureFixture) -> None:
        models = pool(few_rows)
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            merged = ours.IsotropicMergingInCommonSubspace(scaling_factor=1.0).run(models).state_dict()["4.weight"]
        assert "arbitrary null vectors" in ours_of(caplog)[0]
        base = models.load_pretrained_model().state_dict()["4.weight"]
        total = sum(models.load_model(name).state_dict()["4.weight"] - base for name in models.model_names)
        U, S, Vh = (part[..., :6] if part.ndim < 2 else part for part in torch.linalg.svd(total, full_matrices=False))
        expected = S.sum() / 20 * U[:, :6] @ Vh[:6]
        assert torch.linalg.matrix_norm(merged - base - expected) < 1e-5 * expected.norm()

    def test_updates_of_low_rank_that_fill_their_share_agree(self, caplog: pytest.LogCaptureFixture) -> None:
        models = pool(low_rank, tasks=10)  # int(20 / 10) = 2
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            found = ours.TaskSingularVectorMerging(exclude_keys=["0.weight", "1.weight"]).run(models)
        assert ours_of(caplog) == []
        expected = TheirTsvM(exclude_keys=["0.weight", "1.weight"]).run(models)
        assert distance(found, expected, models.load_pretrained_model()) < TOLERANCE

    def test_bases_that_are_nearly_singular_together_keep_their_last_direction(self) -> None:
        """Two tasks with a left direction in common but for 3e-7: fusion_bench's result is right there, and kept."""
        P, Q = torch.linalg.qr(torch.randn(20, 20))[0], torch.linalg.qr(torch.randn(32, 32))[0]
        other = P.clone()
        other[:, 0] = torch.nn.functional.normalize(P[:, 0] + 3e-7 * P[:, 19], dim=0)

        def update(name: str, parameter: Tensor, task: int) -> Tensor:
            if name != "4.weight":
                return noise(name, parameter, task)
            scale, left = torch.linspace(2, 1, 10), (P, other)[task]
            shift = 0 if task == 0 else 9
            columns = [0, *range(1 + shift, 10 + shift)]
            return (left[:, columns] * scale) @ Q[:, 10 * task : 10 * task + 10].T

        models = pool(update, tasks=2)
        found = ours.TaskSingularVectorMerging().run(models).state_dict()["4.weight"]
        base = models.load_pretrained_model().state_dict()["4.weight"]
        assert torch.linalg.matrix_rank(found - base, rtol=1e-3) == 20

    def test_single_task_models_are_left_to_fusion_bench(self, caplog: pytest.LogCaptureFixture) -> None:
        models = pool(noise)
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            found = ours.TaskSingularVectorMerging(return_single_task_models=True).run(models)
        assert ours_of(caplog) == ["return_single_task_models: merged by fusion_bench's own code"]
        expected = TheirTsvM(return_single_task_models=True).run(models)
        assert list(found) == list(expected)
        base = models.load_pretrained_model()
        assert all(distance(found[name], expected[name], base) == 0 for name in found)

    @pytest.mark.parametrize(("theirs", "twin", "arguments"), TWINS)
    def test_nan_is_named(
        self, theirs: type[BaseAlgorithm], twin: type[BaseAlgorithm], arguments: dict[str, Any]
    ) -> None:
        def broken(name: str, parameter: Tensor, task: int) -> Tensor:
            return noise(name, parameter, task) * (float("nan") if (name, task) == ("4.bias", 1) else 1)

        if arguments == {}:
            with pytest.raises(InputError, match=r"update 1 of '1\.weight' holds 768 NaN"):
                twin().run(
                    pool(lambda name, p, t: noise(name, p, t) * (torch.nan if (name, t) == ("1.weight", 1) else 1))
                )
        merged = twin(**arguments).run(pool(broken)).state_dict()["4.bias"]
        assert merged.isnan().all()  # a mean, which fusion_bench's code takes

    def test_models_that_do_not_fit(self) -> None:
        models = pool(noise)
        models._models["task_1"] = nn.Sequential(nn.Linear(24, 32))
        for twin, arguments in ((ours.TaskSingularVectorMerging, {}), (TWINS[5][1], TWINS[5][2])):
            with pytest.raises(ValueError, match="keys"):
                twin(**arguments).run(models)


class TestMerge:
    @pytest.mark.parametrize("method", ["dc_merge", "ties", "averaging", "score"])
    def test_a_pool_as_state_dicts(self, method: str) -> None:
        models = pool(noise)
        base = models.load_pretrained_model().state_dict()
        tasks = [models.load_model(name).state_dict() for name in models.model_names]
        found = ours.Merge(method, scaling_factor=0.4, weights=[1.0, 0.5, 2.0]).run(models)
        assert isinstance(found, Net)
        expected = dcm.merge_state_dicts(base, tasks, method, 0.4, [1.0, 0.5, 2.0])
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())

    def test_dc_merge_with_options_and_its_own_scale(self) -> None:
        models = pool(noise)
        base = models.load_pretrained_model().state_dict()
        tasks = [models.load_model(name).state_dict() for name in models.model_names]
        found = ours.DCMerge(smoothing="average", exclude_keys=["0.weight"]).run(models).state_dict()
        expected = dcm.merge_state_dicts(base, tasks, "dc_merge", smoothing="average")
        expected["0.weight"] = dcm.merge_state_dicts(base, tasks, "averaging", scale=2.0)["0.weight"]
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())

    def test_what_is_wrong_is_said(self) -> None:
        with pytest.raises(OptionError, match="smothing"):
            ours.DCMerge(smothing="average")
        with pytest.raises(DcmergeError, match="no_such"):
            ours.Merge("no_such")
        models = pool(noise)
        with pytest.raises(InputError, match=r"exclude_keys: the pretrained model has no 'head'"):
            ours.DCMerge(exclude_keys=["head"]).run(models)
        models._models["task_1"][1] = nn.Linear(24, 31)
        with pytest.raises(InputError, match=r"task 1: tensor '1\.(weight|bias)' has shape"):
            ours.DCMerge().run(models)


class TestConfigurations:
    @pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
    def test_each_makes_its_algorithm(self, file: Path) -> None:
        config = OmegaConf.load(file)
        if file.stem == "merge":
            config.method = "ties"
        if file.stem == "dc_merge":
            config.smoothing, config.weights = "average", [1.0, 1.0, 0.5]
        algorithm = instantiate(config)
        assert isinstance(algorithm, BaseAlgorithm)
        assert isinstance(algorithm.run(pool(noise)), Net)

    def test_the_command(self, tmp_path: Path) -> None:
        """`fusion_bench` on tiny CLIP models; what it saves loads and computes as our result does."""
        from transformers import CLIPVisionConfig, CLIPVisionModel

        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = CLIPVisionModel(CLIPVisionConfig(**size, image_size=16, patch_size=8))
        lines = ["_target_: fusion_bench.modelpool.CLIPVisionModelPool", "_recursive_: false", "models:"]
        states = []
        for name in ("_pretrained_", "a", "b"):
            if name != "_pretrained_":
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter += 0.02 * torch.randn(parameter.shape)
            states.append(copy.deepcopy(model.state_dict()))
            model.save_pretrained(tmp_path / name)
            lines.append(f"  {name}: {tmp_path / name}")
        (tmp_path / "modelpool").mkdir()
        (tmp_path / "modelpool" / "tiny.yaml").write_text("\n".join(lines) + "\n")
        merged = tmp_path / "merged"
        command = [
            str(Path(sys.executable).with_name("fusion_bench")),
            f"hydra.searchpath=[pkg://dcmerge_ext.integrations.fusion_bench_config,file://{tmp_path}]",
            "method=dcmerge/tsv_m",
            "modelpool=tiny",
            "taskpool=dummy",
            f"merged_model_save_path={merged}",
        ]
        environment = {**os.environ, "FUSION_BENCH_PROJECT_ROOT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        loaded = CLIPVisionModel.from_pretrained(merged).eval()
        # matrices as the whole-model function merges them, at its scale of 1
        expected = dcm.merge_state_dicts(states[0], states[1:], "tsv_m")
        model.load_state_dict(expected)
        pixels = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            difference = loaded(pixels).pooler_output - model.eval()(pixels).pooler_output
        assert difference.abs().max() < 1e-4


def test_the_package_imports_no_fusion_bench() -> None:
    code = (
        "import sys, dcmerge_ext; sys.exit(any(m.split('.')[0] in ('fusion_bench', 'lightning') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_fusion_bench_the_message_says_so() -> None:
    code = "import sys; sys.modules['fusion_bench'] = None; import dcmerge_ext.integrations.fusion_bench"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: dcmerge_ext.integrations.fusion_bench needs fusion_bench" in done.stderr
