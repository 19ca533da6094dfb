"""What the tests share: random updates with known spectra, and the tables that they run over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcmerge_ext import LowRank
from dcmerge_ext.lowrank import Update
from dcmerge_ext.updates import UpdateSpec

# --- inputs ----------------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """(rows, columns) float64 with orthonormal columns."""
    return torch.linalg.qr(normal(rows, columns, seed=seed)).Q


def with_spectrum(m: int, n: int, spectrum: Sequence[float] | Tensor, seed: int) -> Tensor:
    """(m, n) float64 with the given singular values and random singular vectors."""
    s = torch.as_tensor(spectrum, dtype=torch.float64)
    return orthonormal(m, len(s), seed) * s @ orthonormal(n, len(s), seed + 50_000).T


def power_law(count: int, exponent: float) -> Tensor:
    """Singular values j^-exponent, the shape of a fine-tune's spectrum."""
    return torch.arange(1, count + 1, dtype=torch.float64) ** -exponent


def task_basis(rows: int, columns: int, seed: int, task: int) -> Tensor:
    """Orthonormal columns that lean towards those of the other tasks of the same seed: fine-tunes share directions."""
    shared, own = (normal(columns, rows, seed=1_000 * seed + s).T for s in (0, 1 + task))
    return torch.linalg.qr(shared + own).Q


def full_updates(
    num_tasks: int, m: int, n: int, *, seed: int = 0, exponent: float = 0.5, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Full-rank updates with power-law spectra, each task a little larger than the last."""
    q = min(m, n)
    return [
        (
            task_basis(m, q, 2 * seed, i)
            * ((1 + 0.1 * i) * power_law(q, exponent))
            @ task_basis(n, q, 2 * seed + 1, i).T
        ).to(dtype)
        for i in range(num_tasks)
    ]


def lora_updates(
    ranks: Sequence[int], m: int, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[LowRank]:
    """Adapters of the given ranks with well separated singular values."""
    return [
        LowRank(
            (task_basis(m, r, 2 * seed, i) * 1.5 ** -torch.arange(r, dtype=torch.float64)).to(dtype),
            ((1 + 0.1 * i) * task_basis(n, r, 2 * seed + 1, i).T).to(dtype),
        )
        for i, r in enumerate(ranks)
    ]


def dense(update: Update) -> Tensor:
    return update.dense() if isinstance(update, LowRank) else update


def error(actual: Update, expected: Update) -> float:
    """Relative Frobenius error, computed in float64 (absolute where ``expected`` is zero)."""
    a, b = dense(actual).double(), dense(expected).double()
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    norm = b.norm().item()
    return (a - b).norm().item() / (norm or 1.0)


def truncated(update: Update, rank: int) -> Tensor:
    """Best approximation of the given rank, by LAPACK in float64."""
    U, S, Vh = torch.linalg.svd(dense(update).double(), full_matrices=False)
    return U[..., :rank] * S[..., None, :rank] @ Vh[..., :rank, :]


def dense_specs(count: int, m: int, n: int) -> list[UpdateSpec]:
    return [UpdateSpec((m, n), None, torch.float32)] * count


# --- worked numbers: a 4 x 4 pair of updates of rank 2, float64 ------------------------------------------------------

B1 = [[1, 0], [0, 1], [1, 1], [0, 1]]
A1 = [[1, 2, 0, 1], [0, 1, 1, 0]]
B2 = [[1, 1], [1, 0], [0, 1], [1, -1]]
A2 = [[0, 1, 0, 1], [2, 0, 1, 0]]


def worked_pair() -> list[LowRank]:
    return [
        LowRank(torch.tensor(b, dtype=torch.float64), torch.tensor(a, dtype=torch.float64))
        for b, a in ((B1, A1), (B2, A2))
    ]


# The first row equals what the authors' full fine-tune code returns for this input; the others follow section 3.
WORKED_DC_MERGE: dict[str, tuple[dict[str, Any], list[list[float]]]] = {
    "truncation, 1e-3": (
        {"smoothing": "none", "keep": 1e-3},
        [
            [1.017406, 0.548991, 0.505954, -0.073302],
            [0.999628, -0.655215, 0.580161, 0.246101],
            [1.681891, 2.311623, 0.738789, -0.495079],
            [-1.736133, 1.907592, -1.061117, -0.632374],
        ],
    ),
    "truncation, 0.25": (
        {"smoothing": "none", "keep": 0.25},
        [
            [1.173588, 0.884162, 0.028616, 1.309945],
            [0.422427, -0.379005, 1.554549, 1.028949],
            [1.680795, 2.147885, 0.826267, -1.132785],
            [-1.978008, 2.104422, -0.695069, 0.011200],
        ],
    ),
    "truncation, sum": (
        {"smoothing": "none", "aggregate": "sum"},
        [
            [1.212635, 1.135791, 0.282057, 1.905208],
            [0.503221, -0.274339, 1.717466, 1.675771],
            [1.901111, 2.730725, 0.990452, -1.271723],
            [-2.104971, 2.445665, -0.806641, -0.306099],
        ],
    ),
    "truncation, sum, 1 x 1 blocks": (
        {"smoothing": "none", "aggregate": "sum", "block_size": 1},
        [
            [1.227141, 1.153823, 0.206779, 1.709475],
            [0.487322, -0.397503, 1.659700, 1.445505],
            [1.994764, 2.645589, 0.884783, -1.473526],
            [-2.192725, 2.559389, -0.775563, 0.159466],
        ],
    ),
    "truncation, sum, no mask": (
        {"smoothing": "none", "aggregate": "sum", "block_size": 0},
        [[3, 3, 1, 2], [0, 2, 1, 1], [3, 3, 2, 1], [-2, 2, 0, 1]],
    ),
    "average, 1e-3": (
        {"smoothing": "average", "keep": 1e-3},
        [
            [1.427933, -0.161155, -1.077521, 0.495324],
            [0.057354, -0.226789, 2.118629, -0.327142],
            [0.647182, -0.212738, 0.882461, 0.004446],
            [-1.946405, 0.415923, -0.457033, -0.366037],
        ],
    ),
    "average, sum": (
        {"smoothing": "average", "aggregate": "sum"},
        [
            [1.232714, 0.914661, -0.606522, 2.267533],
            [-0.194197, 0.030622, 2.401718, 1.424699],
            [1.436574, 1.933437, 0.994369, -1.284493],
            [-1.951338, 1.976939, -0.332881, -0.000065],
        ],
    ),
    "linear, rho 2, 1e-3": (
        {"smoothing": "linear", "rho": 2.0, "keep": 1e-3},
        [
            [0.994799, 0.457052, 0.500254, -0.050439],
            [1.011205, -0.608133, 0.583080, 0.234393],
            [1.604803, 1.998130, 0.719356, -0.417120],
            [-1.778009, 1.737294, -1.071674, -0.590024],
        ],
    ),
}

WORKED_CORE_MAGNITUDES = [
    [3.231080, 0.256795, 0.904386, 1.929935],
    [0.243386, 1.270338, 0.035936, 0.110737],
    [1.333541, 0.459918, 0.387821, 0.912384],
    [1.256168, 0.304103, 0.346348, 0.708494],
]

# --- worked numbers: three task vectors of ten entries ---------------------------------------------------------------

TASK_VECTORS = [
    [0.5, -0.4, 0.3, -0.2, 0.1, 0, 0.6, -0.7, 0.05, 0.2],
    [0.2, 0.4, -0.5, -0.2, 0.3, 0.9, -0.6, -0.1, 0, 0.1],
    [-0.9, 0.1, 0.1, 0.3, -0.1, 0.2, 0.05, 0.4, 0.6, -0.3],
]

# keep, disjoint, entries kept of each task, merged; as the published code of TIES-Merging returns them
WORKED_TIES = [
    (0.2, "mean", (3, 3, 3), [-0.9, 0, -0.5, 0, 0, 0.9, -0.6, -0.7, 0.6, 0]),
    (0.3, "mean", (4, 4, 5), [-0.9, -0.4, -0.5, 0.3, 0, 0.9, -0.6, -0.7, 0.6, -0.3]),
    (0.5, "mean", (7, 7, 6), [-0.9, -0.4, -0.5, -0.2, 0.3, 0.55, -0.6, -0.7, 0.6, -0.3]),
    (0.5, "sum", (7, 7, 6), [-0.9, -0.4, -0.5, -0.4, 0.3, 1.1, -0.6, -0.7, 0.6, -0.3]),
    # the last coordinate sums to zero up to round-off, which decides it: nan is not compared
    (1.0, "mean", (9, 9, 10), [-0.9, 0.25, -0.5, -0.2, 0.2, 0.55, 0.325, -0.4, 0.325, math.nan]),
]

# --- what the published code of DC-Merge keeps -----------------------------------------------------------------------

# options, tasks, rank of each, q = min(m, n), entries kept of each core
KEPT_COUNTS = [
    ({"keep": 1e-3}, 8, 16, 768, 16),
    ({"keep": 1e-3}, 12, 16, 768, 36),
    ({"keep": 1e-3}, 16, 16, 768, 65),
    ({"official": "lora"}, 8, 16, 1024, 16),
    ({"official": "fft"}, 8, 96, 768, 589),
    ({"official": "fft"}, 14, 54, 768, 589),
    ({"official": "fft"}, 8, 128, 1024, 1048),
    ({"official": "fft"}, 8, 64, 512, 262),
    ({"official": "fft"}, 8, 6, 50, 2),
    ({}, 8, 16, 768, 16),
    ({}, 8, 96, 768, 589),
    ({}, 2, 16, 768, 16),  # our default never keeps fewer than the rank: int(1e-3 * 32^2) is 1
    ({"keep": 1e-3}, 2, 2, 4, 1),
]

# q, tasks, int(q / T)
FULL_RANKS = [
    (768, 8, 96),
    (768, 14, 54),
    (768, 20, 38),
    (1024, 8, 128),
    (1024, 14, 73),
    (1024, 20, 51),
    (512, 8, 64),
    (512, 14, 36),
    (512, 20, 25),
    (50, 8, 6),
    (50, 14, 3),
    (50, 20, 2),
    (98, 49, 1),  # 98 * (1 / 49) lies just below 2
]

# --- dc_merge against the algorithm written out ----------------------------------------------------------------------

# m, n, tasks, rank (None: the default), options
PUBLISHED = [
    (12, 9, 2, 3, {"aggregate": "sum"}),
    (9, 12, 3, 3, {"aggregate": "mean"}),
    (16, 16, 2, 8, {"aggregate": "sum"}),  # square concatenation
    (24, 40, 4, None, {}),
    (40, 24, 4, None, {"keep": 1e-3}),
    (24, 24, 3, 5, {"keep": 0.1}),
    (30, 20, 3, 4, {"keep": 0.5, "smoothing": "average"}),
    (30, 20, 3, 4, {"keep": 1.0, "smoothing": "linear"}),
    (30, 20, 3, 4, {"keep": 0.6, "smoothing": "linear", "rho": 2.0}),
    (30, 20, 3, 4, {"keep": 0.6, "smoothing": "linear", "rho": 1.0}),
    (30, 20, 3, 4, {"aggregate": "sum", "smoothing": "interpolate", "tau": 0.3}),
    (30, 20, 3, 4, {"keep": 0.6, "smoothing": "interpolate", "tau": 0.7}),
    (30, 20, 3, 4, {"keep": 0.6, "block_size": 0}),
    (30, 20, 3, 4, {"keep": 0.6, "block_size": 1}),
    (30, 20, 3, 4, {"keep": 0.6, "block_size": 2}),
    (30, 20, 3, 4, {"keep": 0.6, "block_size": 5}),  # 12 = 5 + 5 + 2
    (30, 20, 3, 4, {"aggregate": "sum", "block_size": 7}),
    (30, 20, 3, 4, {"aggregate": "mean", "block_size": 8}),
    (30, 20, 3, 4, {"keep": 0.6, "block_size": 100}),
    (10, 8, 3, 4, {"keep": 0.7}),  # k = 12 exceeds q = 8
    (10, 8, 3, 4, {"aggregate": "sum", "block_size": 3}),
    (48, 64, 8, None, {"keep": 0.5}),
    (33, 65, 5, None, {"keep": 0.6, "count_base": "min_dim"}),
    (6, 50, 5, None, {"keep": 0.6}),  # one component per task
]

# preset, m, n, tasks; fft with T r < q is (50, 8): r = 6 and two columns of padding
PRESET_CASES = [
    ("fft", 64, 64, 4),
    ("fft", 50, 80, 8),
    ("fft", 96, 70, 3),
    ("lora", 96, 80, 2),
    ("lora", 160, 144, 8),
    ("vlm", 96, 130, 4),
]

# --- options that are refused ----------------------------------------------------------------------------------------

# method, options, part of the message (a regular expression)
REFUSED_OPTIONS = [
    ("dc_merg", {}, r"unknown method 'dc_merg'; did you mean 'dc_merge'\? \(known: .*averaging"),
    ("tie", {}, r"did you mean 'ties'\?"),
    ("zzzz", {}, r"unknown method 'zzzz' \(known: "),
    ("dc_merge", {"smoothin": "none"}, r"has no option 'smoothin'; did you mean 'smoothing'\?"),
    ("dc_merge", {"blocksize": 4}, r"did you mean 'block_size'\?"),
    ("averaging", {"rank": 4}, r"method 'averaging' has no option 'rank' \(it has no options\)"),
    ("ties", {"kep": 0.2}, r"did you mean 'keep'\?"),
    ("dc_merge", {"rank": "3"}, r"dc_merge.*rank"),
    ("dc_merge", {"rank": 2.0}, r"dc_merge.*rank"),
    ("dc_merge", {"rank": True}, r"dc_merge.*rank"),
    ("dc_merge", {"rank": 0}, r"rank"),
    ("dc_merge", {"rank": [2, 0]}, r"rank"),
    ("dc_merge", {"smoothing": "avg"}, r"smoothing"),
    ("dc_merge", {"aggregate": "max"}, r"aggregate"),
    ("dc_merge", {"keep": 0.0}, r"keep"),
    ("dc_merge", {"keep": 1.5}, r"keep"),
    ("dc_merge", {"block_size": -1}, r"block_size"),
    ("dc_merge", {"count_base": "rank"}, r"count_base"),
    ("dc_merge", {"accuracy": "slow"}, r"accuracy"),
    ("dc_merge", {"seed": -1}, r"seed"),
    ("dc_merge", {"basis_tol": 2.0}, r"basis_tol"),
    ("dc_merge", {"smoothing": "linear", "rho": 0.5}, r"rho"),
    ("dc_merge", {"smoothing": "interpolate", "tau": 1.5}, r"tau"),
    ("dc_merge", {"smoothing": "interpolate"}, r"needs tau"),
    (
        "dc_merge",
        {"smoothing": "average", "rho": 5.0},
        r"rho belongs to smoothing='linear', and smoothing is 'average'",
    ),
    ("dc_merge", {"rho": 5.0}, r"rho belongs to smoothing='linear'"),
    ("dc_merge", {"smoothing": "linear", "tau": 0.5}, r"tau belongs to smoothing='interpolate'"),
    ("dc_merge", {"aggregate": "sum", "keep": 0.1}, r"keep belongs to aggregate='ties', and aggregate is 'sum'"),
    ("dc_merge", {"aggregate": "mean", "count_base": "cover"}, r"count_base belongs to aggregate='ties'"),
    ("dc_merge", {"official": "llm"}, r"has no preset 'llm'; it has: fft, lora, vlm"),
    ("dc_merge", {"official": "lora", "rank": 8}, r"rank=8 conflicts with official='lora', which sets rank=16"),
    ("dc_merge", {"official": "fft", "smoothing": "average"}, r"smoothing='average' conflicts with official='fft'"),
    ("dc_merge", {"official": "fft", "keep": 0.5}, r"keep=0.5 conflicts with official='fft'"),
    ("ties", {"keep": 0.0}, r"keep"),
    ("ties", {"keep": 20}, r"keep"),
    ("ties", {"disjoint": "max"}, r"disjoint"),
]

# --- registered methods ----------------------------------------------------------------------------------------------

# Options that leave a single task as it is; methods that are not here do so at their defaults.
NOTHING_TRIMMED: dict[str, dict[str, Any]] = {
    "dc_merge": {"smoothing": "none"},
    "ties": {"keep": 1.0},
    "dare": {"rate": 0.0},
    "knots": {"keep": 1.0},
}

# Methods whose steps do not grow with the updates.
ABSOLUTE_STEP = {"doge", "wudi"}

# Methods that give a single task one singular value, too.
FLATTENED = {"iso_c", "iso_cts"}

# Methods of LoRA factors, which refuse full updates.
LORA_ONLY = {"core_space", "robust_merge"}

# Methods whose result of LowRank updates has the largest of their ranks, not the sum.
LARGEST_RANK = {"robust_merge"}

# Methods that draw anew for each position of a task.
DRAWN_BY_POSITION = {"dare"}
