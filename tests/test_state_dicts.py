"""merge_state_dicts: state dicts in memory, through the same plan as files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import cases
import families
import pytest
import torch
from families import same_bits
from torch import Tensor, nn

from dcmerge_ext import list_methods, merge_state_dicts, merge_updates
from dcmerge_ext.errors import InputError, OptionError

METHODS = [name for name in list_methods() if name not in cases.LORA_ONLY]
BASE = families.toy()
TUNED = [families.tuned(BASE, seed) for seed in range(3)]
MATRICES = [
    name
    for name, values in BASE.items()
    if (values.ndim == 2 or "experts" in name) and values.is_floating_point() and values.numel()
]


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in state.items()}


class TestResult:
    @pytest.mark.parametrize("method", METHODS)
    def test_names_order_dtypes_and_inputs(self, method: str) -> None:
        base, tuned = copied(BASE), [copied(m) for m in TUNED]
        found = merge_state_dicts(base, tuned, method=method)
        assert type(found) is dict
        assert list(found) == list(BASE)
        for name, values in BASE.items():
            assert found[name].dtype == values.dtype
            assert found[name].shape == values.shape
            assert not found[name].requires_grad
        for before, after in zip((BASE, *TUNED), (base, *tuned), strict=True):  # the inputs are not written to
            assert all(same_bits(after[name], values) for name, values in before.items())
        stored = {v.untyped_storage().data_ptr() for m in (base, *tuned) for v in m.values() if v.numel()}
        assert not stored & {v.untyped_storage().data_ptr() for v in found.values() if v.numel()}

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("scale", [None, 0.0, 1.0, -0.5])
    def test_is_base_plus_scale_times_merged_update(self, method: str, scale: float | None) -> None:
        found = merge_state_dicts(BASE, TUNED, method=method, scale=scale)
        floating = [n for n, v in BASE.items() if v.is_floating_point() and v.numel()]
        names = floating if list_methods()[method].elementwise else MATRICES
        updates = merge_updates({n: [m[n] - BASE[n] for m in TUNED] for n in names}, method=method)
        factor = list_methods()[method]().default_scale(3) if scale is None else scale
        for name in names:
            torch.testing.assert_close(found[name], BASE[name] + factor * updates[name], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("method", METHODS)
    def test_of_a_module_s_state_dict(self, method: str) -> None:
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)) for _ in range(3)]
        found = merge_state_dicts(models[0].state_dict(), [m.state_dict() for m in models[1:]], method=method)
        merged = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        merged.load_state_dict(found)
        assert merged.eval()(torch.ones(2, 6)).isfinite().all()

    def test_parameters_and_ordered_dicts(self) -> None:
        base = OrderedDict((n, nn.Parameter(v) if v.is_floating_point() else v) for n, v in BASE.items())
        found = merge_state_dicts(base, TUNED)
        expected = merge_state_dicts(BASE, TUNED)
        assert all(same_bits(found[name], values) for name, values in expected.items())

    def test_tensors_that_are_not_contiguous(self) -> None:
        strided = {n: v.mT.contiguous().mT if v.ndim >= 2 else v for n, v in BASE.items()}
        assert not strided["lm_head.weight"].is_contiguous()
        found = merge_state_dicts(strided, TUNED)
        expected = merge_state_dicts(BASE, TUNED)
        assert all(same_bits(found[name], values) for name, values in expected.items())

    @pytest.mark.parametrize("method", [name for name in METHODS if name not in cases.FLATTENED])
    def test_one_task(self, method: str) -> None:
        """Nothing trimmed, nothing smoothed: the fine-tune itself comes back."""
        options = cases.NOTHING_TRIMMED.get(method, {})
        found = merge_state_dicts(BASE, TUNED[:1], method=method, scale=1.0, **options)
        for name, values in TUNED[0].items():
            expected = values if values.is_floating_point() else BASE[name]
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)

    def test_global_random_state_is_neither_read_nor_changed(self) -> None:
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = merge_state_dicts(BASE, TUNED, accuracy="fast")
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        second = merge_state_dicts(BASE, TUNED, accuracy="fast")
        assert all(same_bits(second[name], values) for name, values in first.items())

    @pytest.mark.parametrize("method", METHODS)
    def test_number_of_threads_is_put_back(self, method: str, restore_threads: None) -> None:
        torch.set_num_threads(2)
        merge_state_dicts(BASE, TUNED, method=method)
        found = [torch.get_num_threads()]
        # a thread takes over what was set last, in whichever thread
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [2, 2]


class TestTied:
    def test_stay_tied(self) -> None:
        shared = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
        base = {"embed.weight": shared, "norm": torch.ones(5), "head.weight": shared}
        task = {"embed.weight": shared + 1, "norm": torch.zeros(5), "head.weight": shared + 1}
        tied_task = {**task, "head.weight": task["embed.weight"]}
        for model in (task, tied_task):
            found = merge_state_dicts(base, [model], method="averaging")
            assert list(found) == list(base)
            assert found["embed.weight"].data_ptr() == found["head.weight"].data_ptr()
            torch.testing.assert_close(found["head.weight"], shared + 1)

    def test_ties_counts_a_tied_tensor_once(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shared, change = (torch.randn(6, 5, generator=generator) for _ in range(2))
        once = merge_state_dicts({"a": shared}, [{"a": shared + change}], method="ties")
        twice = merge_state_dicts(
            {"a": shared, "b": shared}, [{"a": shared + change, "b": shared + change}], method="ties"
        )
        assert same_bits(twice["a"], once["a"])

    def test_a_fine_tune_that_untied_them_is_refused(self) -> None:
        shared = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
        base = {"embed.weight": shared, "head.weight": shared}
        task = {"embed.weight": shared + 1, "head.weight": shared + 2}
        with pytest.raises(InputError, match=r"task 0.*head\.weight.*embed\.weight"):
            merge_state_dicts(base, [task], method="averaging")

    def test_views_of_one_storage_are_not_tied(self) -> None:
        """Halves of one buffer, and a matrix and its transpose, are different tensors."""
        buffer = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
        base = {"first": buffer[:4], "second": buffer[4:], "transposed": buffer[:4].T}
        task = {"first": buffer[:4] + 1, "second": buffer[4:] + 2, "transposed": buffer[:4].T + 3}
        found = merge_state_dicts(base, [task], method="averaging")
        for name, values in task.items():
            torch.testing.assert_close(found[name], values)


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"lm_head.weight": torch.zeros(20, 9)}, r"task 1: tensor 'lm_head\.weight' has shape 20x9.*20x8"),
            (
                {"layers.0.norm.weight": torch.full((8,), float("nan"))},
                r"task 1: tensor 'layers\.0\.norm\.weight' holds 8",
            ),
            ({"lm_head.weight": None}, r"task 1: lacks tensor 'lm_head\.weight'"),
            ({"more": torch.ones(2)}, r"task 1: tensor 'more' is not in the base"),
        ],
        ids=["shape", "NaN", "missing", "extra"],
    )
    def test_tasks_that_do_not_fit(self, change: dict[str, Any], message: str) -> None:
        broken = {n: v for n, v in {**TUNED[1], **change}.items() if v is not None}
        with pytest.raises(InputError, match=message):
            merge_state_dicts(BASE, [TUNED[0], broken, TUNED[2]])

    def test_messages_name_what_can_be_done_here(self) -> None:
        """There is no --extra and no extra= in this function."""
        with pytest.raises(InputError) as error:
            merge_state_dicts(BASE, [{**TUNED[0], "more": torch.ones(2)}])
        assert "--extra" not in str(error.value)

    def test_an_entry_that_is_no_tensor(self) -> None:
        with pytest.raises(InputError, match=r"task 0: entry 'epoch' is a int, not a tensor"):
            merge_state_dicts(BASE, [{**TUNED[0], "epoch": 3}])

    def test_not_finite_base(self) -> None:
        broken = {**BASE, "lm_head.weight": torch.full((20, 8), float("inf"))}
        with pytest.raises(InputError, match=r"base: tensor 'lm_head\.weight'.*160 NaN or Inf"):
            merge_state_dicts(broken, TUNED)

    def test_no_tasks(self) -> None:
        with pytest.raises(InputError, match="tasks"):
            merge_state_dicts(BASE, [])

    def test_weights(self) -> None:
        for weights in ([1.0], [1.0, 2.0, float("nan")]):
            with pytest.raises(InputError, match="weights: needs one finite number for each of 3 tasks"):
                merge_state_dicts(BASE, TUNED, weights=weights)

    def test_scale(self) -> None:
        for scale in (float("nan"), float("inf")):
            with pytest.raises(InputError, match="scale"):
                merge_state_dicts(BASE, TUNED, scale=scale)

    def test_options(self) -> None:
        with pytest.raises(OptionError, match=r"no option 'kep'; did you mean 'keep'\?"):
            merge_state_dicts(BASE, TUNED, kep=0.1)
        with pytest.raises(OptionError, match=r"did you mean 'dc_merge'\?"):
            merge_state_dicts(BASE, TUNED, method="dcmerge")

    def test_a_rank_per_task(self) -> None:
        found = merge_state_dicts(BASE, TUNED, rank=[1, 2, 3], scale=1.0, aggregate="sum", block_size=0)
        for name in MATRICES:
            change = sum(cases.truncated(m[name] - BASE[name], r) for r, m in enumerate(TUNED, 1))
            torch.testing.assert_close(found[name].double(), BASE[name].double() + change, rtol=1e-4, atol=1e-5)
