"""compat.official: each function against the published algorithm written out in float64, their scripts with one line changed."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext import LowRank
from dcmerge_ext.compat.official import vision_fft, vision_lora, vlm
from dcmerge_ext.compat.official.shared import cuda_or
from dcmerge_ext.errors import InputError

DOC = Path(__file__).parents[1] / "docs" / "official.md"

# --- the published algorithms, written out ---------------------------------------------------------------------------


def svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(X, full_matrices=False)


def procrustes(X: Tensor) -> Tensor:
    P, _, Qh = svd(X)
    return P @ Qh


def side_by_side(blocks: Sequence[Tensor], width: int) -> Tensor:
    """Columns of all tasks, then columns of zeros."""
    X = torch.cat(list(blocks), 1)
    return torch.cat([X, X.new_zeros(len(X), max(0, width - X.shape[1]))], 1)


def spread(S: Tensor, kind: str, rho: float) -> Tensor:
    weights = torch.ones_like(S)
    if kind == "linear":
        weights = torch.linspace(min(rho, (S[0] / S[-1]).item()), 1, len(S), dtype=S.dtype)
    return S if kind == "none" else S.sum() * weights / weights.sum()


def trimmed(X: Tensor, fraction: float) -> Tensor:
    magnitudes = sorted((abs(x) for x in X.flatten().tolist()), reverse=True)
    limit = magnitudes[max(1, int(fraction * X.numel())) - 1]
    return torch.tensor([x if abs(x) >= limit else 0.0 for x in X.flatten().tolist()], dtype=X.dtype).reshape(X.shape)


def elected(matrices: Sequence[Tensor]) -> Tensor:
    stack = torch.stack(list(matrices))
    total = stack.sum(0)
    votes = (stack.sign() == total.sign()) & (total != 0)
    return (stack * votes).sum(0) / votes.sum(0).clamp(min=1)


def published_dc(
    updates: Sequence[Tensor], rank: int, kind: str = "none", rho: float = 5.0, pad: bool = True
) -> Tensor:
    """``pad``: bases and cores of q columns, as for full fine-tunes; otherwise of T rank, as for adapters."""
    q, tasks = min(updates[0].shape), len(updates)
    parts = [(U[:, :rank], spread(S[:rank], kind, rho), Vh[:rank]) for U, S, Vh in map(svd, updates)]
    width = q if pad else tasks * rank
    left = procrustes(side_by_side([U for U, _, _ in parts], q))[:, :width]
    right = procrustes(side_by_side([Vh.T for _, _, Vh in parts], q))[:, :width]
    core = elected([trimmed(left.T @ (U * S @ Vh) @ right, 1e-3) for U, S, Vh in parts])
    place = torch.arange(width) // (width // tasks)
    core = core * ((place[:, None] == place) & (place[:, None] < tasks))
    return left @ core @ right.T


def published_tsv(updates: Sequence[Tensor], rank: int) -> Tensor:
    q, parts = min(updates[0].shape), [svd(u) for u in updates]
    left = procrustes(side_by_side([U[:, :rank] for U, _, _ in parts], q))
    right = procrustes(side_by_side([Vh[:rank].T for _, _, Vh in parts], q))
    values = torch.cat([S[:rank] for _, S, _ in parts])
    return left[:, : len(values)] * values @ right[:, : len(values)].T


def published_iso_cts(updates: Sequence[Tensor], fraction: float, budget: int) -> Tensor:
    """``budget``: directions in all, q for full fine-tunes and 16 T for adapters."""
    tasks, total = len(updates), torch.stack(list(updates)).sum(0)
    own = round((budget - int(budget * fraction)) / tasks)
    common = budget - own * tasks
    U, S, Vh = svd(total)
    basis = U[:, :common]
    rests = [svd(u - basis @ basis.T @ u) for u in updates]
    left = torch.cat([P[:, :own] for P, _, _ in rests] + [basis], 1)
    right = torch.cat([Qh[:own].T for _, _, Qh in rests] + [Vh[:common].T], 1)
    values = torch.cat([s[:own] for _, s, _ in rests] + [S[:common]])
    return values.mean() * procrustes(left) @ procrustes(right).T


def published_wudi(updates: Sequence[Tensor], steps: int) -> Tensor:
    merged = torch.stack(list(updates)).sum(0).requires_grad_()
    optimizer = torch.optim.Adam([merged], lr=1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            torch.stack([((merged - u) @ u.T).square().sum() / u.square().sum() for u in updates]).sum().backward()
        optimizer.step()
    return merged.detach()


def published_mean(updates: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(updates)).mean(0)


# --- inputs ----------------------------------------------------------------------------------------------------------

FFT_SHAPES = {
    "visual.proj": (24, 40),
    "transformer.attn.in_proj_weight": (48, 16),
    "ln.weight": (7,),
    "conv1.weight": (3, 2, 2, 2),
    "text_projection": (6, 6),
    "aaa.mlp.c_fc.weight": (30, 20),
    "logit_scale": (),
}


def task_vectors(
    tasks: int, dtype: torch.dtype = torch.float64, shapes: Mapping[str, tuple[int, ...]] = FFT_SHAPES
) -> list[SimpleNamespace]:
    def vector(task: int) -> dict[str, Tensor]:
        found = {}
        for place, (name, shape) in enumerate(shapes.items()):
            if len(shape) == 2:
                found[name] = cases.full_updates(tasks, *shape, seed=place, exponent=0.7)[task].to(dtype)
            else:
                found[name] = cases.normal(*shape, seed=100 * place + task, dtype=dtype)
        return found

    return [SimpleNamespace(vector=vector(task)) for task in range(tasks)]


def config(tasks: int, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(DATASETS=[f"set {i}" for i in range(tasks)], device="cpu", **more)


def wudi_config(tasks: int, steps: int) -> SimpleNamespace:
    return config(tasks, method=SimpleNamespace(iter_num=steps))


def deltas(
    tasks: int, dtype: torch.dtype = torch.float64, size: tuple[int, int] = (90, 100)
) -> dict[str, list[Tensor]]:
    """Of rank 16, under names that are not in alphabetical order."""
    names = {"z.weight": size, "b.weight": size[::-1], "k.weight": size}
    return {
        name: [u.dense().to(dtype) for u in cases.lora_updates([16] * tasks, *shape, seed=place)]
        for place, (name, shape) in enumerate(names.items())
    }


def oracle_fft(vectors: Sequence[SimpleNamespace], merge: Callable[[list[Tensor]], Tensor], only: str = "") -> dict:
    merged = {}
    for name, first in vectors[0].vector.items():
        updates = [v.vector[name].double() for v in vectors]
        matrix = first.ndim == 2 and name != "text_projection" and only in name
        merged[name] = merge(updates) if matrix else published_mean(updates)
    return merged


def share(q: int, tasks: int) -> int:
    return int(q * (1 / tasks))


FFT: dict[str, tuple[Callable[..., dict], Callable[[list[Tensor]], Tensor]]] = {
    "dc_merge": (vision_fft.dc_merge, lambda us: published_dc(us, share(min(us[0].shape), len(us)))),
    "tsv_m": (
        vision_fft.compute_and_sum_svd_mem_reduction,
        lambda us: published_tsv(us, share(min(us[0].shape), len(us))),
    ),
    "iso_cts": (vision_fft.iso_cts, lambda us: published_iso_cts(us, 0.8, min(us[0].shape))),
}
LORA: dict[str, tuple[Callable[..., OrderedDict], Callable[[list[Tensor]], Tensor]]] = {
    "dc_merge avg": (vision_lora.dc_merge, lambda us: published_dc(us, 16, "average", pad=False)),
    "dc_merge linear": (
        lambda d: vision_lora.dc_merge(d, smoothing_strategy="linear", rho=3.0),
        lambda us: published_dc(us, 16, "linear", 3.0, pad=False),
    ),
    "TSVM": (vision_lora.TSVM, lambda us: published_tsv(us, 16)),
    "iso_cts": (vision_lora.iso_cts, lambda us: published_iso_cts(us, 0.8, 16 * len(us))),
    "iso_cts 0.5": (
        lambda d: vision_lora.iso_cts(d, k_frac=0.5),
        lambda us: published_iso_cts(us, 0.5, 16 * len(us)),
    ),
    "TA": (vision_lora.TA, lambda us: torch.stack(us).sum(0)),
}
fft = pytest.mark.parametrize("name", FFT)
lora = pytest.mark.parametrize("name", LORA)


def assert_equal_dicts(merged: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    for name, wanted in expected.items():
        assert cases.error(merged[name], wanted) < tolerance, name


def assert_no_worse_than_float32(
    merged: Tensor, updates: Sequence[Tensor], published: Callable[[list[Tensor]], Tensor]
) -> None:
    """``merged`` is as close to the float64 result as the published algorithm in float32, twice at most."""
    exact = published([u.double() for u in updates])
    theirs = cases.error(published([u.float() for u in updates]), exact)
    assert theirs < 2e-2
    assert cases.error(merged, exact) < 2 * theirs


# --- names, arguments, defaults --------------------------------------------------------------------------------------

EMPTY = inspect.Parameter.empty
SIGNATURES: list[tuple[ModuleType, str, list[tuple[str, Any]]]] = [
    (vision_fft, "dc_merge", [("task_vectors", EMPTY), ("config", EMPTY)]),
    (vision_fft, "compute_and_sum_svd_mem_reduction", [("task_vectors", EMPTY), ("config", EMPTY)]),
    (vision_fft, "iso_cts", [("task_vectors", EMPTY), ("config", EMPTY), ("common_space_fraction", 0.8)]),
    (vision_fft, "wudi_merge", [("task_vectors", EMPTY), ("config", EMPTY)]),
    (vision_fft, "get_redundant_task_vector", [("vectors", EMPTY), ("device", EMPTY), ("iter_num", 300)]),
    (vision_lora, "dc_merge", [("deltas_dict", EMPTY), ("smoothing_strategy", "avg"), ("rho", 5.0)]),
    (vision_lora, "TSVM", [("deltas_dict", EMPTY)]),
    (vision_lora, "iso_cts", [("deltas_dict", EMPTY), ("k_frac", 0.8)]),
    (vision_lora, "wudi_merge", [("deltas_dict", EMPTY), ("iter_num", 300)]),
    (vision_lora, "get_redundant_task_vector", [("vectors", EMPTY), ("iter_num", 300)]),
    (vision_lora, "TA", [("deltas_dict", EMPTY)]),
    (vlm, "dc_merge", [("deltas_dict", EMPTY), ("smoothing_strategy", "avg"), ("rho", 5.0)]),
    (vlm, "delta_to_AB", [("task_parameters", EMPTY)]),
    *((m, "keep_topk_percent", [("tensor_list", EMPTY), ("percent", 0.1)]) for m in (vision_fft, vision_lora, vlm)),
    *((m, "ties_small", [("mat_list", EMPTY)]) for m in (vision_fft, vision_lora, vlm)),
]


@pytest.mark.parametrize(
    ("module", "name", "expected"), SIGNATURES, ids=[f"{m.__name__.split('.')[-1]}.{n}" for m, n, _ in SIGNATURES]
)
def test_signature(module: ModuleType, name: str, expected: list[tuple[str, Any]]) -> None:
    parameters = inspect.signature(getattr(module, name)).parameters.values()
    assert [(p.name, p.default) for p in parameters] == expected
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("module", [vision_fft, vision_lora, vlm])
def test_every_public_name_has_a_signature_here(module: ModuleType) -> None:
    assert sorted(module.__all__) == sorted(name for m, name, _ in SIGNATURES if m is module)


# --- helpers ---------------------------------------------------------------------------------------------------------


class TestKeepTopkPercent:
    @pytest.mark.parametrize("shape", [(1,), (37,), (12, 9), (3, 4, 5)])
    @pytest.mark.parametrize("percent", [0.1, 1e-3, 0.5, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_agrees(self, shape: tuple[int, ...], percent: float, dtype: torch.dtype, backend: str) -> None:
        tensors = [cases.normal(*shape, seed=s, dtype=dtype) for s in range(2)]
        before = [x.clone() for x in tensors]
        kept = vision_lora.keep_topk_percent(tensors, percent)
        assert isinstance(kept, list)
        for x, same, y in zip(tensors, before, kept, strict=True):
            assert torch.equal(x, same)
            assert y.dtype == dtype
            assert torch.equal(y, trimmed(x, percent))

    def test_default_is_a_tenth(self) -> None:
        (kept,) = vlm.keep_topk_percent([cases.normal(20, 10, seed=1)])
        assert int((kept != 0).sum()) == 20

    def test_all_ties_stay(self) -> None:
        x = torch.tensor([[3.0, -2.0, 2.0], [1.0, 2.0, -2.0]])
        (kept,) = vision_fft.keep_topk_percent([x], 0.34)  # two entries: the second is one of four
        assert torch.equal(kept, torch.tensor([[3.0, -2.0, 2.0], [0.0, 2.0, -2.0]]))

    def test_zeros_views_and_no_tensors(self) -> None:
        assert vision_fft.keep_topk_percent([]) == []
        assert torch.equal(vision_fft.keep_topk_percent([torch.zeros(3, 3)])[0], torch.zeros(3, 3))
        view = cases.normal(8, 6, seed=3).T[::2]
        assert torch.equal(vision_fft.keep_topk_percent([view], 0.2)[0], trimmed(view, 0.2))

    @pytest.mark.parametrize(("x", "percent"), [(torch.zeros(0), 0.1), (torch.zeros(4), 1.5)])
    def test_what_theirs_refuses(self, x: Tensor, percent: float) -> None:
        with pytest.raises(ValueError, match="kth_magnitude"):
            vision_fft.keep_topk_percent([x], percent)


class TestTiesSmall:
    @pytest.mark.parametrize("tasks", [1, 2, 3, 8])
    @pytest.mark.parametrize("shape", [(), (7,), (6, 5), (2, 3, 4)])
    def test_agrees(self, tasks: int, shape: tuple[int, ...], backend: str) -> None:
        matrices = [cases.normal(*shape, seed=s) * (cases.normal(*shape, seed=50 + s) > 0) for s in range(tasks)]
        before = [x.clone() for x in matrices]
        merged = vision_lora.ties_small(matrices)
        torch.testing.assert_close(merged, elected(matrices), rtol=1e-14, atol=0)
        assert all(map(torch.equal, matrices, before))

    def test_a_sum_of_zero_gives_zero_not_the_majority(self) -> None:
        first, second = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([-1.0, -2.0, 1.0])
        assert torch.equal(vlm.ties_small([first, second]), torch.tensor([0.0, -2.0, 2.0]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_keeps_the_dtype(self, dtype: torch.dtype) -> None:
        matrices = [cases.normal(4, 4, seed=s, dtype=dtype) for s in range(3)]
        merged = vision_fft.ties_small(matrices)
        assert merged.dtype == dtype
        assert cases.error(merged, elected([x.double() for x in matrices])) < 2 * torch.finfo(dtype).eps

    def test_what_theirs_refuses(self) -> None:
        for matrices in ([], [torch.zeros(2), torch.zeros(3)]):
            with pytest.raises(RuntimeError, match="stack"):
                vision_fft.ties_small(matrices)


# --- full fine-tunes -------------------------------------------------------------------------------------------------


class TestVisionFFT:
    WUDIED = ("visual.attn.out_proj.weight", "visual.mlp.c_proj.weight")

    @fft
    @pytest.mark.parametrize("tasks", [1, 2, 3, 5])
    def test_agrees_in_float64(self, name: str, tasks: int) -> None:
        """3 and 5 tasks leave columns of padding."""
        merge, published = FFT[name]
        vectors = task_vectors(tasks)
        assert_equal_dicts(merge(vectors, config(tasks)), oracle_fft(vectors, published), 1e-9)

    @fft
    def test_agrees_in_float32(self, name: str, backend: str) -> None:
        """At a size where more than one entry per task is kept (9 of 96 x 96)."""
        merge, published = FFT[name]
        vectors = task_vectors(4, torch.float32, {"w": (96, 120), "v": (128, 96)})
        merged = merge(vectors, config(4))
        for key in ("w", "v"):
            assert merged[key].dtype == torch.float32
            assert_no_worse_than_float32(merged[key], [v.vector[key] for v in vectors], published)

    @fft
    def test_what_comes_back(self, name: str) -> None:
        vectors = task_vectors(3)
        before = copy.deepcopy(vectors)
        merged = FFT[name][0](vectors, config(3))
        assert type(merged) is dict
        assert list(merged) == list(FFT_SHAPES)
        for task, same in zip(vectors, before, strict=True):
            assert all(torch.equal(task.vector[key], same.vector[key]) for key in FFT_SHAPES)
        for key, x in merged.items():
            assert (x.shape, x.dtype) == (FFT_SHAPES[key], torch.float64)
            assert x.device == torch.device("cpu")
            assert not x.requires_grad

    @fft
    def test_a_single_task_is_not_handed_through(self, name: str) -> None:
        vectors = task_vectors(1)
        merged = FFT[name][0](vectors, config(1))
        for key, x in merged.items():
            assert x.untyped_storage().data_ptr() != vectors[0].vector[key].untyped_storage().data_ptr()

    def test_worked_numbers_of_the_authors(self) -> None:
        vectors = [SimpleNamespace(vector={"w": u.dense()}) for u in cases.worked_pair()]
        expected = torch.tensor(cases.WORKED_DC_MERGE["truncation, 1e-3"][1], dtype=torch.float64)
        torch.testing.assert_close(vision_fft.dc_merge(vectors, config(2))["w"], expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", ["dc_merge", "tsv_m"])
    def test_fewer_rows_than_tasks_give_zero(self, name: str) -> None:
        vectors = task_vectors(5, shapes={"narrow": (4, 9), "wide": (9, 12)})
        merged = FFT[name][0](vectors, config(5))
        assert torch.equal(merged["narrow"], torch.zeros(4, 9, dtype=torch.float64))
        assert merged["wide"].norm() > 0

    @pytest.mark.parametrize("name", ["dc_merge", "tsv_m"])
    def test_49_tasks_of_49_rows_give_zero(self, name: str) -> None:
        """int(49 (1 / 49)) = 0."""
        vectors = [SimpleNamespace(vector={"w": cases.normal(49, 50, seed=s)}) for s in range(49)]
        assert torch.equal(FFT[name][0](vectors, config(49))["w"], torch.zeros(49, 50, dtype=torch.float64))

    def test_49_tasks_round_their_share_down(self) -> None:
        """int(98 (1 / 49)) = 1 component per task, in blocks of 98 // 49 = 2: neighbours are merged."""
        assert share(98, 49) == 1
        vectors = [SimpleNamespace(vector={"w": cases.normal(98, 98, seed=s)}) for s in range(49)]
        merged = vision_fft.dc_merge(vectors, config(49))["w"]
        updates = [v.vector["w"] for v in vectors]
        assert cases.error(merged, published_dc(updates, 1)) < 1e-9
        assert cases.error(merged, published_dc(updates, 1, pad=False)) > 1e-2

    @pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
    def test_iso_cts_takes_its_fraction(self, fraction: float) -> None:
        vectors = task_vectors(4, shapes={"w": (20, 24)})
        expected = published_iso_cts([v.vector["w"] for v in vectors], fraction, 20)
        assert cases.error(vision_fft.iso_cts(vectors, config(4), fraction)["w"], expected) < 1e-9

    def test_wudi(self) -> None:
        vectors = task_vectors(3, shapes={**FFT_SHAPES, **dict.fromkeys(self.WUDIED, (16, 12))})
        for task in vectors:
            for x in task.vector.values():
                x *= 5e-3
        before = copy.deepcopy(vectors)
        merged = vision_fft.wudi_merge(vectors, wudi_config(3, 60))
        assert list(merged) == list(vectors[0].vector)
        for key, x in merged.items():
            updates = [v.vector[key] for v in vectors]
            if key not in {"transformer.attn.in_proj_weight", "aaa.mlp.c_fc.weight", *self.WUDIED}:
                assert cases.error(x, published_mean(updates)) < 1e-15, key
                continue
            total = torch.stack(updates).sum(0)
            assert cases.error(x - total, published_wudi(updates, 60) - total) < 1e-6, key
            again = vision_fft.get_redundant_task_vector(torch.stack(updates), "cpu", 60)
            assert torch.equal(x, again)
        for task, same in zip(vectors, before, strict=True):
            assert all(torch.equal(task.vector[key], same.vector[key]) for key in merged)

    def test_wudi_of_one_task_is_that_task(self) -> None:
        (task,) = task_vectors(1)
        merged = vision_fft.wudi_merge([task], wudi_config(1, 5))
        assert all(torch.equal(merged[key], task.vector[key]) for key in merged)

    def test_a_zero_update_takes_no_part_in_wudi(self) -> None:
        updates = [5e-3 * u for u in cases.full_updates(2, 8, 6)]
        stacked = torch.stack([*updates, torch.zeros_like(updates[0])])
        merged = vision_fft.get_redundant_task_vector(stacked, torch.device("cpu"), 10)
        assert cases.error(merged, published_wudi(updates, 10)) < 1e-9

    @pytest.mark.parametrize("form", ["attributes", "dict", "mapping"])
    def test_forms_of_the_configuration(self, form: str) -> None:
        class Settings(Mapping[str, Any]):
            """By key and by attribute, as an OmegaConf DictConfig."""

            def __init__(self, **values: Any) -> None:
                self.values_ = values

            def __getitem__(self, key: str) -> Any:
                return self.values_[key]

            def __iter__(self) -> Iterator[str]:
                return iter(self.values_)

            def __len__(self) -> int:
                return len(self.values_)

        make = {"attributes": SimpleNamespace, "dict": dict, "mapping": Settings}[form]
        vectors = task_vectors(2)
        settings = make(DATASETS=("a", "b"), device=torch.device("cpu"), method=make(iter_num=3))
        for merge, reference in (
            (vision_fft.dc_merge, vision_fft.dc_merge(vectors, config(2))),
            (vision_fft.wudi_merge, vision_fft.wudi_merge(vectors, wudi_config(2, 3))),
        ):
            merged = merge(vectors, settings)
            assert all(torch.equal(merged[key], reference[key]) for key in reference)

    @pytest.mark.parametrize("missing", ["DATASETS", "device", "method"])
    def test_a_setting_that_is_missing_is_named(self, missing: str) -> None:
        settings = {"DATASETS": ["a"], "device": "cpu", "method": {"iter_num": 1}}
        del settings[missing]
        with pytest.raises(InputError, match=f"config has no {missing}"):
            vision_fft.wudi_merge(task_vectors(1), settings)

    def test_task_vectors_beyond_the_datasets_are_ignored(self) -> None:
        vectors = task_vectors(3)
        merged, expected = vision_fft.dc_merge(vectors, config(2)), vision_fft.dc_merge(vectors[:2], config(2))
        assert all(torch.equal(merged[key], expected[key]) for key in expected)
        with pytest.raises(InputError, match="3 task vectors for 2 DATASETS"):
            vision_fft.iso_cts(vectors, config(2))

    @pytest.mark.parametrize(("given", "asked"), [(2, 3), (0, 0), (1, 0)])
    def test_too_few_task_vectors(self, given: int, asked: int) -> None:
        with pytest.raises(InputError, match=f"{given} task vectors for {asked} DATASETS"):
            vision_fft.dc_merge(task_vectors(given), config(asked))

    def test_half_precision(self) -> None:
        """Theirs cannot decompose it; tensors that take the mean keep their dtype in both."""
        vectors = task_vectors(2, torch.float16)
        merged = vision_fft.dc_merge(vectors, config(2))
        assert {x.dtype for x in merged.values()} == {torch.float16}
        expected = oracle_fft(vectors, FFT["dc_merge"][1])
        assert_equal_dicts(merged, expected, 1e-3)

    def test_a_value_that_is_not_finite_is_named(self) -> None:
        vectors = task_vectors(2)
        vectors[1].vector["visual.proj"][0, 0] = torch.nan
        with pytest.raises(InputError, match=r"update 1 of 'visual\.proj' holds 1 NaN"):
            vision_fft.dc_merge(vectors, config(2))


# --- adapters --------------------------------------------------------------------------------------------------------


class TestVisionLora:
    @lora
    @pytest.mark.parametrize("tasks", [2, 4])
    def test_agrees_in_float64(self, name: str, tasks: int) -> None:
        merge, published = LORA[name]
        inputs = deltas(tasks)
        expected = {key: published(updates) for key, updates in inputs.items()}
        assert_equal_dicts(merge(inputs), expected, 1e-9)

    @lora
    def test_agrees_in_float32(self, name: str, backend: str) -> None:
        """As far as float32 goes: Iso-CTS loses up to five digits of it on adapters, in either code."""
        merge, published = LORA[name]
        inputs = deltas(3, torch.float32)
        merged = merge(inputs)
        for key, updates in inputs.items():
            assert_no_worse_than_float32(merged[key], updates, published)

    @lora
    def test_what_comes_back(self, name: str) -> None:
        inputs = defaultdict(list, deltas(2, torch.float32))
        before = copy.deepcopy(inputs)
        merged = LORA[name][0](inputs)
        assert type(merged) is OrderedDict
        assert list(merged) == ["b.weight", "k.weight", "z.weight"]
        assert list(inputs) == ["z.weight", "b.weight", "k.weight"]
        for key, x in merged.items():
            assert (x.shape, x.dtype) == (inputs[key][0].shape, torch.float32)
            assert all(map(torch.equal, inputs[key], before[key]))

    @pytest.mark.parametrize("name", [name for name in LORA if name != "dc_merge avg"])
    def test_a_single_task(self, name: str) -> None:
        """One entry survives "avg", of sixteen that are equal but for round-off: not compared."""
        merge, published = LORA[name]
        inputs = deltas(1)
        merged = merge(inputs)
        assert_equal_dicts(merged, {key: published(updates) for key, updates in inputs.items()}, 1e-9)
        for key, x in merged.items():
            assert x.untyped_storage().data_ptr() != inputs[key][0].untyped_storage().data_ptr()

    @lora
    def test_factors_in_place_of_deltas(self, name: str) -> None:
        factors = {"w": cases.lora_updates([16, 16], 90, 100)}
        merged = LORA[name][0](factors)["w"]
        assert isinstance(merged, Tensor)
        assert cases.error(merged, LORA[name][0]({"w": [u.dense() for u in factors["w"]]})["w"]) < 1e-9

    @pytest.mark.parametrize("name", ["dc_merge linear", "TSVM", "iso_cts"])
    def test_adapters_of_a_higher_rank(self, name: str) -> None:
        """Cut to 16 components, but for the sum of Iso-CTS."""
        merge, published = LORA[name]
        updates = [
            cases.with_spectrum(110, 100, cases.power_law(40, 0.5), seed=7 + i)
            + 0.2 * cases.with_spectrum(110, 100, cases.power_law(40, 0.5), seed=9)
            for i in range(3)
        ]
        assert cases.error(merge({"w": updates})["w"], published(updates)) < 1e-8

    def test_adapters_of_a_lower_rank_get_no_made_up_directions(self) -> None:
        """Theirs gives the arbitrary null directions energy; here an adapter of rank 4 has 4."""
        updates = [u.dense() for u in cases.lora_updates([4, 4], 60, 50)]
        for merge in (vision_lora.dc_merge, vision_lora.TSVM, vision_lora.iso_cts):
            merged = merge({"w": updates})["w"]
            assert int(torch.linalg.matrix_rank(merged, rtol=1e-8)) <= 8
            bases = [torch.linalg.svd(torch.cat([u.T if i else u for u in updates], 1)).U[:, :8] for i in range(2)]
            assert cases.error(bases[0] @ (bases[0].T @ merged @ bases[1]) @ bases[1].T, merged) < 1e-9

    def test_the_mean_of_iso_cts_is_over_sixteen_per_task(self) -> None:
        updates = [u.dense() for u in cases.lora_updates([4, 4], 60, 50)]
        merged = vision_lora.iso_cts({"w": updates})["w"]
        # all of the sum's 8 values are among the common ones, and the rests are round-off
        expected = torch.linalg.svdvals(sum(updates)).sum() / 32
        values = torch.linalg.svdvals(merged)
        torch.testing.assert_close(values[:8], expected.expand(8), rtol=1e-9, atol=0)

    def test_more_directions_than_rows(self) -> None:
        """Theirs fails on the shapes."""
        inputs = deltas(4, size=(40, 50))
        for merge, _ in LORA.values():
            assert all(bool(x.isfinite().all()) for x in merge(inputs).values())

    @pytest.mark.parametrize("steps", [1, 40])
    def test_wudi(self, steps: int) -> None:
        inputs = {key: [5e-3 * u for u in updates] for key, updates in deltas(2, size=(30, 24)).items()}
        before = copy.deepcopy(inputs)
        merged = vision_lora.wudi_merge(inputs, iter_num=steps)
        assert type(merged) is OrderedDict
        assert list(merged) == sorted(inputs)
        for key, updates in inputs.items():
            total = torch.stack(updates).sum(0)
            assert cases.error(merged[key] - total, published_wudi(updates, steps) - total) < 1e-6
            assert torch.equal(merged[key], vision_lora.get_redundant_task_vector(torch.stack(updates), steps))
            assert all(map(torch.equal, updates, before[key]))

    def test_tasks_may_differ_in_number(self) -> None:
        inputs = {"a": deltas(2)["z.weight"], "b": deltas(3)["z.weight"]}
        for name in ("dc_merge avg", "TSVM"):
            merge, published = LORA[name]
            assert_equal_dicts(merge(inputs), {key: published(us) for key, us in inputs.items()}, 1e-9)

    def test_nothing_in_nothing_out(self) -> None:
        for merge in (
            vision_lora.dc_merge,
            vision_lora.TSVM,
            vision_lora.iso_cts,
            vision_lora.wudi_merge,
            vlm.dc_merge,
        ):
            assert merge({}) == OrderedDict()
            with pytest.raises(InputError, match="'w': needs at least one task"):
                merge({"w": []})

    @pytest.mark.parametrize("module", [vision_lora, vlm])
    def test_what_is_refused(self, module: ModuleType) -> None:
        inputs = deltas(2)
        with pytest.raises(ValueError, match="must be 'avg' or 'linear', got 'average'"):
            module.dc_merge(inputs, "average")
        with pytest.raises(InputError, match="rho"):
            module.dc_merge(inputs, "linear", 0.5)
        inputs["k.weight"][1] = inputs["k.weight"][1][1:]
        with pytest.raises(InputError, match=r"update 1 of 'k\.weight' has shape"):
            module.dc_merge(inputs)

    @pytest.mark.parametrize("fraction", [0.0, 0.33, 0.95])
    def test_iso_cts_takes_its_fraction(self, fraction: float) -> None:
        updates = deltas(3)["z.weight"]
        expected = published_iso_cts(updates, fraction, 48)
        assert cases.error(vision_lora.iso_cts({"w": updates}, fraction)["w"], expected) < 1e-9

    def test_every_task_keeps_one_direction_of_its_own(self) -> None:
        """Where its share rounds to 0: 30 common directions, and one of each task."""
        updates = [u.dense() for u in cases.lora_updates([16, 16], 90, 100)]
        merged = vision_lora.iso_cts({"w": updates}, k_frac=1.0)["w"]
        assert int(torch.linalg.matrix_rank(merged, rtol=1e-9)) == 32

    def test_a_fraction_outside_its_range(self) -> None:
        with pytest.raises(InputError, match=r"k_frac must lie in 0 \.\. 1, got 1\.2"):
            vision_lora.iso_cts(deltas(2), 1.2)


class TestVLM:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("strategy", "rho"), [("avg", 5.0), ("linear", 5.0), ("linear", 2.0)])
    def test_agrees(self, dtype: torch.dtype, strategy: str, rho: float) -> None:
        """Whatever the dtype of the deltas, float32 is what they are merged in."""
        inputs = deltas(2, dtype)
        before = copy.deepcopy(inputs)
        merged = vlm.dc_merge(inputs, strategy, rho)
        assert type(merged) is OrderedDict
        assert list(merged) == sorted(inputs)
        kind = {"avg": "average", "linear": "linear"}[strategy]
        for key, updates in inputs.items():
            assert merged[key].dtype == torch.float32
            assert_no_worse_than_float32(
                merged[key], [u.float() for u in updates], lambda us: published_dc(us, 16, kind, rho, pad=False)
            )
            assert all(map(torch.equal, updates, before[key]))

    def test_leaves_the_random_generator_alone(self) -> None:
        before = torch.random.get_rng_state()
        vlm.dc_merge(deltas(2))
        vlm.delta_to_AB({"model.q.weight": cases.normal(140, 130, seed=0)})
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_delta_to_ab(self) -> None:
        merged = {
            "model.layers.1.q_proj.weight": cases.with_spectrum(150, 200, cases.power_law(20, 0.5), seed=1).float(),
            "model.layers.0.model.weight": cases.with_spectrum(130, 140, cases.power_law(130, 1.0), seed=2),
        }
        before = copy.deepcopy(merged)
        factors = vlm.delta_to_AB(merged)
        assert type(factors) is OrderedDict
        twice = "base_model.model.model.layers.0.base_model.model.model."  # every "model" is replaced
        once = "base_model.model.model.layers.1.q_proj."
        assert list(factors) == [name + side for name in (twice, once) for side in ("lora_A.weight", "lora_B.weight")]
        for key, prefix in (("model.layers.1.q_proj.weight", once), ("model.layers.0.model.weight", twice)):
            A, B = factors[prefix + "lora_A.weight"], factors[prefix + "lora_B.weight"]
            m, n = merged[key].shape
            assert (A.shape, B.shape) == ((128, n), (m, 128))
            assert A.dtype == B.dtype == torch.bfloat16
            # two roundings to 8 bits, of entries that are independent
            assert cases.error(B.double() @ A.double(), cases.truncated(merged[key], 128)) < 2**-8
            assert torch.equal(merged[key], before[key])
            # B = U diag(s), A = V'
            values = torch.linalg.svdvals(merged[key].double())[:128]
            torch.testing.assert_close(B.double().norm(dim=0), values, rtol=4e-3, atol=1e-5)
            live = int((values > 1e-6 * values[0]).sum())
            torch.testing.assert_close(A.double().norm(dim=1)[:live], torch.ones(live).double(), rtol=4e-3, atol=0)

    def test_delta_to_ab_takes_factors(self) -> None:
        factors = cases.lora_updates([20], 150, 140)[0]
        one, other = (vlm.delta_to_AB({"weight": x}) for x in (factors, factors.dense()))
        products = [x["lora_B.weight"].double() @ x["lora_A.weight"].double() for x in (one, other)]
        assert cases.error(*products) < 2**-7

    def test_delta_to_ab_needs_128_rows(self) -> None:
        with pytest.raises(ValueError, match=r"rank must lie in 1 \.\. 100"):
            vlm.delta_to_AB({"model.weight": torch.zeros(100, 200)})


# --- their scripts, with the import changed --------------------------------------------------------------------------

FFT_SCRIPT = """
from src.utils.DC_utils import dc_merge, iso_cts, wudi_merge
from src.utils.TSVM_utils import compute_and_sum_svd_mem_reduction

if config.method.name == "TSVM":
    new_merged_tv = compute_and_sum_svd_mem_reduction(task_vectors, config)
elif config.method.name == "DC_Merge":
    new_merged_tv = dc_merge(task_vectors, config)
elif config.method.name == "Iso_CTS":
    new_merged_tv = iso_cts(task_vectors, config)
elif config.method.name == "WUDI":
    new_merged_tv = wudi_merge(task_vectors, config)
result = {key: base[key] + 1.5 * new_merged_tv[key] for key in base}
"""
LORA_SCRIPT = """
from merging_functions import TA, TSVM, iso_cts, dc_merge, wudi_merge

with torch.no_grad():
    if args.method == "dc_merge":
        merged_deltas = dc_merge(agg_deltas, smoothing_strategy=args.smoothing, rho=args.rho)
    elif args.method == "tsvm":
        merged_deltas = TSVM(agg_deltas)
    elif args.method == "wudi":
        merged_deltas = wudi_merge(agg_deltas, iter_num=args.iter_num)
    elif args.method == "ta":
        merged_deltas = TA(agg_deltas)
    elif args.method == "iso_cts":
        merged_deltas = iso_cts(agg_deltas, k_frac=args.k_frac)
sd = {key: value.clone() for key, value in base.items()}
for key, val in merged_deltas.items():
    sd[key].add_(val.cpu() * 1.5)
result = sd
"""
OURS = "dcmerge_ext.compat.official."
IMPORTS = {
    "src.utils.DC_utils": OURS + "vision_fft",
    "src.utils.TSVM_utils": OURS + "vision_fft",
    "merging_functions": OURS + "vision_lora",
    "llava.model.builder": OURS + "vlm",
}


def with_our_imports(script: str) -> str:
    for theirs, ours in IMPORTS.items():
        script = script.replace(f"from {theirs} import", f"from {ours} import")
    return script


@pytest.fixture
def their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for their files, made of the algorithms above."""

    def module(name: str, **functions: Callable[..., Any]) -> None:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(functions)

    def of_deltas(merge: Callable[..., Tensor]) -> Callable[..., OrderedDict]:
        return lambda deltas_dict, **o: OrderedDict(sorted((k, merge(us, **o)) for k, us in deltas_dict.items()))

    def of_vectors(merge: Callable[[list[Tensor]], Tensor]) -> Callable[..., dict]:
        return lambda task_vectors, config: oracle_fft(task_vectors, merge)

    for package in ("src", "src.utils"):
        module(package)
    module(
        "src.utils.DC_utils",
        dc_merge=of_vectors(FFT["dc_merge"][1]),
        iso_cts=of_vectors(FFT["iso_cts"][1]),
        wudi_merge=lambda vectors, config: oracle_fft(
            vectors, lambda us: published_wudi(us, config.method.iter_num), "mlp.c_fc"
        ),
    )
    module("src.utils.TSVM_utils", compute_and_sum_svd_mem_reduction=of_vectors(FFT["tsv_m"][1]))
    kinds = {"avg": "average", "linear": "linear"}
    module(
        "merging_functions",
        dc_merge=of_deltas(
            lambda us, smoothing_strategy, rho: published_dc(us, 16, kinds[smoothing_strategy], rho, pad=False)
        ),
        TSVM=of_deltas(LORA["TSVM"][1]),
        TA=of_deltas(LORA["TA"][1]),
        wudi_merge=of_deltas(lambda us, iter_num: published_wudi(us, iter_num)),
        iso_cts=of_deltas(lambda us, k_frac: published_iso_cts(us, k_frac, 16 * len(us))),
    )


@pytest.mark.usefixtures("their_modules")
class TestScripts:
    @pytest.mark.parametrize("method", ["TSVM", "DC_Merge", "Iso_CTS", "WUDI"])
    def test_full_fine_tunes(self, method: str) -> None:
        vectors = task_vectors(3, shapes={"ln.bias": (5,), "mlp.c_fc.weight": (30, 20), "proj": (18, 21)})
        base = {key: cases.normal(*x.shape, seed=9) for key, x in vectors[0].vector.items()}
        settings = config(3, method=SimpleNamespace(name=method, iter_num=20))
        theirs, ours = self.results(FFT_SCRIPT, task_vectors=vectors, config=settings, base=base)
        assert list(theirs) == list(ours)
        assert_equal_dicts(ours, theirs, 1e-9)

    @pytest.mark.parametrize("method", ["dc_merge", "tsvm", "wudi", "ta", "iso_cts"])
    @pytest.mark.parametrize("smoothing", ["avg", "linear"])
    def test_adapters(self, method: str, smoothing: str) -> None:
        inputs = deltas(2)
        base = {key: cases.normal(*us[0].shape, seed=9) for key, us in inputs.items()}
        args = SimpleNamespace(method=method, smoothing=smoothing, rho=4.0, iter_num=20, k_frac=0.8)
        theirs, ours = self.results(LORA_SCRIPT, agg_deltas=inputs, args=args, base=base, torch=torch)
        assert_equal_dicts(ours, theirs, 1e-9)

    @staticmethod
    def results(script: str, **names: Any) -> list[dict[str, Tensor]]:
        found = []
        for text in (script, with_our_imports(script)):
            namespace = copy.deepcopy({k: v for k, v in names.items() if k != "torch"}) | {"torch": torch}
            exec(text, namespace)
            found.append(namespace["result"])
        assert with_our_imports(script) != script
        return found


def test_the_import_lines_of_the_page_work() -> None:
    changes = [line for block in re.findall(r"```diff\n(.*?)```", DOC.read_text(), re.S) for line in block.splitlines()]
    before = [line[1:].strip() for line in changes if line.startswith("-") and " import " in line]
    after = [line[1:].strip() for line in changes if line.startswith("+")]
    assert {with_our_imports(line) for line in before} <= set(after)
    for line in after:
        exec(line, {})
    imported = {name.strip() for line in after for name in line.split(" import ")[1].split(",")}
    assert {"dc_merge", "iso_cts", "wudi_merge", "TSVM", "TA", "delta_to_AB"} <= imported


def test_autocast_takes_no_precision() -> None:
    factors = {"w": [u.to(torch.float32) for u in cases.lora_updates([16, 16], 90, 100)]}
    expected = vision_lora.TSVM(factors)["w"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vision_lora.TSVM(factors)["w"], expected)


def test_theirs_computes_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.is_available() or cuda_or(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert cuda_or(torch.device("cpu")) == torch.device("cuda:1")


def test_lowrank_and_dense_deltas_mix() -> None:
    factors = cases.lora_updates([16, 16], 90, 100)
    mixed = [LowRank(factors[0].left, factors[0].right), factors[1].dense()]
    assert cases.error(vision_lora.TSVM({"w": mixed})["w"], vision_lora.TSVM({"w": factors})["w"]) < 1e-9


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([{"a": torch.ones(4, 3)}] * 2, r"task vector 0: needs an object whose attribute vector .* got a dict"),
        (
            [SimpleNamespace(vector={"a": torch.ones(4, 3)}), SimpleNamespace(vector={"b": torch.ones(4, 3)})],
            r"task vector 1 has no 'a', which task vector 0 has",
        ),
    ],
)
def test_task_vectors_that_are_none_or_of_two_models(given: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        vision_fft.dc_merge(given, SimpleNamespace(DATASETS=["x", "y"], device="cpu"))


def test_deltas_by_task_in_place_of_by_name() -> None:
    with pytest.raises(InputError, match=r"needs a mapping from each name to the deltas of all tasks, got a list"):
        vision_lora.TSVM([{"a": torch.ones(4, 3)}] * 2)  # type: ignore[arg-type]
