"""Random signs: the published generator, the layout of its bits, and that nothing else has a say."""

from __future__ import annotations

import pytest
import torch
import xxhash
from torch import Tensor

from dcmerge_ext import ops, reference, use_backend
from dcmerge_ext.backends import available

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(0, 5), (5, 0), (1, 1), (1, 127), (1, 128), (129, 1), (3, 43), (16, 8), (37, 33), (128, 128), (257, 131)]

# counter, key, random words: the known answers that Random123 publishes for philox4x32-10
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def philox(counter: list[int], key: int) -> list[int]:
    return [int(word) for word in reference.philox([torch.tensor(c) for c in counter], key)]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers_of_philox(counter: str, key: str, expected: str) -> None:
    low, high = (int(word, 16) for word in key.split())
    words = philox([int(word, 16) for word in counter.split()], low | high << 32)
    assert [f"{word:08x}" for word in words] == expected.split()


def test_the_bits_of_a_block_are_the_signs_in_order(backend: str) -> None:
    seed, name, task, stream = 2**64 - 3, "encoder.größe.weight", 2**32 - 1, 5
    key = xxhash.xxh3_64_intdigest(name.encode("utf-8"), seed=seed)
    expected = []
    for e in range(19 * 31):
        words = philox([e // 128, 0, task, stream], key)
        expected.append(-1.0 if words[e % 128 // 32] >> e % 32 & 1 else 1.0)
    found = ops.rademacher(19, 31, seed=seed, key=name, task=task, stream=stream)
    assert found.flatten().tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_backend_and_dtype_draws_the_same_signs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    results = []
    for name in ("reference", "cpu"):
        if available(name):
            with use_backend(name):
                results.append(ops.rademacher(*shape, seed=7, key="w", task=3, stream=1, dtype=dtype))
    for found in results:
        assert found.shape == shape
        assert found.dtype == dtype
        assert torch.equal(found.abs(), torch.ones(shape, dtype=dtype))
        assert torch.equal(found.float(), ops.rademacher(*shape, seed=7, key="w", task=3, stream=1))


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_the_same_signs_for_any_number_of_threads(threads: int, backend: str, restore_threads: None) -> None:
    expected = ops.rademacher(1_001, 131, seed=0)
    torch.set_num_threads(threads)
    assert torch.equal(ops.rademacher(1_001, 131, seed=0), expected)


def test_a_taller_matrix_begins_with_the_shorter_one(backend: str) -> None:
    tall = ops.rademacher(500, 77, seed=1, key="w")
    for rows in (0, 1, 2, 213, 499):
        assert torch.equal(ops.rademacher(rows, 77, seed=1, key="w"), tall[:rows])


def test_global_generators_are_neither_read_nor_changed(backend: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ops.rademacher(9, 9, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(ops.rademacher(9, 9, seed=1), first)


def agreement(a: Tensor, b: Tensor) -> float:
    """Mean of the products, in standard deviations of independent signs."""
    return (a * b).sum().item() / a.numel() ** 0.5


def test_every_argument_gives_other_signs_and_all_are_balanced(backend: str) -> None:
    draws = [ops.rademacher(300, 400, seed=seed) for seed in (0, 1, 2, 2**32, 2**63, 2**64 - 1)]
    draws += [ops.rademacher(300, 400, seed=0, key=key) for key in ("w", "W", "w ", "layers.0.w", "layers.1.w")]
    draws += [ops.rademacher(300, 400, seed=0, task=task) for task in (1, 2, 2**32 - 1)]
    draws += [ops.rademacher(300, 400, seed=0, stream=stream) for stream in (1, 2, 2**32 - 1)]
    one = torch.ones(300, 400)
    for i, x in enumerate(draws):
        assert abs(agreement(x, one)) < 5
        assert (x.sum(0).abs() < 5.5 * 300**0.5).all()
        assert (x.sum(1).abs() < 5.5 * 400**0.5).all()
        assert all(abs(agreement(x, y)) < 5 for y in draws[:i])


def test_products_with_a_sign_matrix_keep_lengths_on_average() -> None:
    signs = ops.rademacher(64, 4_096, seed=3, dtype=torch.float64)
    gram = signs @ signs.T / 4_096
    assert (gram.diagonal() == 1).all()
    assert (gram - torch.eye(64)).abs().max() < 5.5 / 4_096**0.5


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"rows": -1}, ValueError, r"rademacher: rows and cols must not be negative, got -1 x 3"),
        ({"cols": -2}, ValueError, r"got 2 x -2"),
        ({"seed": -1}, ValueError, r"rademacher: seed must lie in 0 \.\. 2\*\*64-1, got -1"),
        ({"seed": 2**64}, ValueError, r"seed must lie in 0 \.\. 2\*\*64-1, got 18446744073709551616"),
        ({"task": 2**32}, ValueError, r"task must lie in 0 \.\. 2\*\*32-1, got 4294967296"),
        ({"stream": -1}, ValueError, r"stream must lie in 0 \.\. 2\*\*32-1, got -1"),
        ({"dtype": torch.int64}, TypeError, r"rademacher: needs a floating dtype, got torch.int64"),
        ({"dtype": torch.complex64}, TypeError, r"got torch.complex64"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message):
        ops.rademacher(**{"rows": 2, "cols": 3, "seed": 0} | arguments)
