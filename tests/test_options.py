"""Options that are wrong are refused with one message that says what to do."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch

from dcmerge_ext import LowRank, list_methods, merge_updates
from dcmerge_ext.errors import DcmergeError, InputError, OptionError
from dcmerge_ext.methods import create, dc_merge
from dcmerge_ext.methods.registry import preset_of
from dcmerge_ext.updates import UpdateSpec


@pytest.mark.parametrize(("method", "options", "message"), cases.REFUSED_OPTIONS)
def test_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        merge_updates([torch.ones(6, 5)] * 2, method=method, **options)


def test_options_are_checked_before_the_updates() -> None:
    with pytest.raises(OptionError, match="keep"):
        merge_updates([torch.full((2, 2), float("nan"))], keep=-1)


def test_every_error_on_purpose_has_one_base() -> None:
    assert issubclass(OptionError, InputError)
    assert issubclass(InputError, (DcmergeError, ValueError))


PAIR = [torch.ones(6, 5), torch.eye(6, 5)]


class TestRank:
    @pytest.mark.parametrize("rank", [6, [5, 6]])
    def test_beyond_the_smaller_side_is_refused(self, rank: int | list[int]) -> None:
        with pytest.raises(OptionError, match=r"rank 6 exceeds min\(m, n\) = 5 of a 6 x 5 update"):
            dc_merge(PAIR, rank=rank)

    @pytest.mark.parametrize("rank", [[2], [2, 2, 2], []])
    def test_a_list_of_another_length_is_refused(self, rank: list[int]) -> None:
        with pytest.raises(OptionError, match=rf"rank has {len(rank)} entries for 2 tasks"):
            dc_merge(PAIR, rank=rank)

    def test_beyond_the_rank_of_an_adapter_keeps_what_there_is(self) -> None:
        merged = dc_merge(cases.lora_updates([2, 3], 6, 5), rank=4)
        assert isinstance(merged, LowRank)
        assert merged.rank == 5

    def test_a_list_gives_each_task_its_own(self) -> None:
        specs = [
            *cases.dense_specs(2, 6, 5),
            UpdateSpec((6, 5), 4, torch.float32),
            UpdateSpec((6, 5), 0, torch.float32),
        ]
        assert create("dc_merge", {"rank": [1, 5, 3, 2]}).ranks(specs, 4) == [1, 5, 3, 0]

    def test_a_preset_takes_matrices_with_fewer_than_its_components(self) -> None:
        assert dc_merge(PAIR, official="lora").shape == (6, 5)

    def test_a_rank_of_the_caller_is_checked_beside_a_preset(self) -> None:
        with pytest.raises(OptionError, match=r"rank 6 exceeds min\(m, n\) = 5"):
            dc_merge(PAIR, official="fft", rank=6)


class TestPresets:
    @pytest.mark.parametrize(
        ("preset", "rank", "smoothing", "count_base", "lora_scale"),
        [
            ("fft", None, "none", "min_dim", "apply"),
            ("lora", 16, "average", "cover", "ignore"),
            ("vlm", 16, "average", "cover", "ignore"),
        ],
    )
    def test_are_named_sets_of_options(
        self, preset: str, rank: int | None, smoothing: str, count_base: str, lora_scale: str
    ) -> None:
        chosen: Any = create("dc_merge", {"official": preset})
        assert (chosen.rank, chosen.smoothing, chosen.count_base) == (rank, smoothing, count_base)
        assert (chosen.keep, chosen.aggregate, chosen.block_size) == (1e-3, "ties", None)
        found = preset_of(list_methods()["dc_merge"], {"official": preset})
        assert found is not None
        assert found.lora_scale == lora_scale
        assert found.mean_tensors == ("text_projection" if preset == "fft" else None)

    def test_an_option_that_says_the_same_is_no_conflict(self) -> None:
        assert create("dc_merge", {"official": "lora", "rank": 16}) == create("dc_merge", {"official": "lora"})

    def test_other_options_may_be_added(self) -> None:
        chosen: Any = create("dc_merge", {"official": "fft", "block_size": 4, "rank": 3})
        assert (chosen.block_size, chosen.rank, chosen.keep) == (4, 3, 1e-3)

    def test_no_preset_is_the_default(self) -> None:
        assert preset_of(list_methods()["dc_merge"], {}) is None
        assert create("dc_merge", {"official": None}) == create("dc_merge", {})


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dc_merge", {"keep": 1}),  # whole numbers are numbers
        ("dc_merge", {"rank": (1, 2)}),
        ("dc_merge", {"basis_tol": 0.0, "block_size": 0}),
        ("dc_merge", {"smoothing": "linear"}),
        ("dc_merge", {"smoothing": "interpolate", "tau": 0.0}),
        ("ties", {"keep": 1, "disjoint": "sum"}),
    ],
)
def test_accepted(method: str, options: dict[str, Any]) -> None:
    merge_updates(PAIR, method=method, **options)


def test_methods_are_immutable() -> None:
    with pytest.raises(AttributeError):
        create("ties", {}).keep = 0.5  # type: ignore[attr-defined]
