"""Every case, with the ratio to its first rival that it must reach (floor) and that we want (aim)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from case import Case, Problem
from factorizations import polar, truncated_svd
from llava import llava
from merges import Source, fine_tuned_digits, full_fine_tunes, lora, power_law, trim_elect_mask
from method_rows import core_space, doge, elementwise, esm, iso_c, iso_cts, knots, robust_merge, score, tsv_m, wudi

GROWTH_N, GROWTH_RANK, GROWTH_T = (
    "truncated_svd, n x n, rank n / 8",
    "truncated_svd, 768 x 768, growing rank",
    "dc_merge, 768 x 768, growing T",
)
_SOURCES: dict[str, Source] = {"j^-0.5": power_law(0.5), "j^-1": power_law(1.0), "digits": fine_tuned_digits}


_FLOORS = {(3072, 768, 8): (4.0, 8.0), (768, 768, 20): (7.0, 12.0), (1024, 4096, 14): (5.0, 10.0)}


def _full(m: int, n: int, tasks: int, inputs: str = "j^-0.5") -> Case:
    # With few tasks nearly all components are kept: then LAPACK does little that is not needed.
    floor, aim = (1.0, None) if tasks <= 4 else _FLOORS.get((m, n, tasks), (3.0, 5.0))
    return Case(
        f"full/{m}x{n}/T{tasks}/{inputs}",
        partial(full_fine_tunes, m=m, n=n, tasks=tasks, source=_SOURCES[inputs]),
        floor,
        aim,
        [(GROWTH_T, tasks)] if (m, n, inputs) == (768, 768, "j^-0.5") else [],
    )


def _fast(inputs: str) -> Case:
    prepare = partial(full_fine_tunes, m=768, n=768, tasks=8, source=_SOURCES[inputs], accuracy="fast")
    return Case(f"fast/768x768/T8/{inputs}", prepare, floor=4.0, aim=8.0)


def _svd(n: int, rank: int) -> Case:
    curves = [(GROWTH_N, float(n))] if n == 8 * rank else []
    curves += [(GROWTH_RANK, float(rank))] if n == 768 else []
    main = (n, rank) == (768, 96)
    floor, aim = (3.5, None) if main else (1.0, None)
    return Case(f"svd/{n}x{n}/r{rank}", partial(truncated_svd, n=n, rank=rank, rivals=main), floor, aim, curves)


_FULL_AND_LORA: dict[str, Callable[..., Problem]] = {
    **{
        name: partial(elementwise, method=name)
        for name in ("averaging", "task_arithmetic", "ties", "dare", "consensus", "pcb")
    },
    "tsv_m": tsv_m,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "score": score,
    "esm": esm,
    "wudi": wudi,
    "doge": doge,
}
_LORA_ALONE: dict[str, Callable[..., Problem]] = {
    "knots": knots,
    "core_space": core_space,
    "robust_merge": robust_merge,
}


def _methods() -> Iterator[Case]:
    """DC-Merge has rows of its own."""
    for name, prepare in _FULL_AND_LORA.items():
        yield Case(f"method/{name}/768x768/T8", partial(prepare, m=768, n=768, tasks=8), floor=1.0)
        yield Case(f"method/{name}/lora/4096x4096/T8", partial(prepare, m=4096, n=4096, tasks=8, lora=True), floor=1.0)
    for name, prepare in _LORA_ALONE.items():
        yield Case(f"method/{name}/lora/4096x4096/T8", partial(prepare, m=4096, n=4096, tasks=8), floor=1.0)
    yield Case("method/knots/lora/768x768/T8", partial(knots, m=768, n=768, tasks=8), floor=20.0)


CASES = [
    *(_full(768, 768, tasks) for tasks in (2, 3, 4, 6, 8, 12, 16, 20)),
    _full(768, 768, 8, "j^-1"),
    _full(768, 768, 8, "digits"),
    *(_full(3072, 768, tasks) for tasks in (2, 3, 4, 8)),
    _full(1024, 4096, 14),
    *(_fast(inputs) for inputs in _SOURCES),
    Case("lora/768x768/T8/independent", partial(lora, m=768, n=768, tasks=8), floor=100.0),
    Case(
        "lora/768x768/T8/shared-A",
        partial(lora, m=768, n=768, tasks=8, movement=0.02),
        floor=100.0,
    ),
    Case(
        "lora/4096x4096/T8",
        partial(lora, m=4096, n=4096, tasks=8, form="extrapolated"),
        floor=3000.0,
    ),
    Case("lora/4096x11008/T8", partial(lora, m=4096, n=11008, tasks=8, form="llava"), floor=20.0),
    _svd(768, 96),
    Case("svd/8x768x768/r96", partial(truncated_svd, n=768, rank=96, batch=8, rivals=True), floor=3.5),
    *(_svd(n, n // 8) for n in (256, 512, 1024, 1536, 2048)),
    *(_svd(768, rank) for rank in (8, 16, 32, 64, 128, 192, 256, 384)),
    Case("polar/768x768", partial(polar, m=768, blocks=8, width=96), floor=1.0),
    Case("polar/3072x768", partial(polar, m=3072, blocks=8, width=96), floor=1.0),
    Case("trim-elect-mask/8x768x768", partial(trim_elect_mask, n=768, tasks=8), floor=10.0, aim=20.0),
    Case(
        "model/llava-1.5-7b/T8",
        partial(llava, layers=32, hidden=4096, intermediate=11008, tasks=8),
        floor=5.0,
        aim=10.0,
    ),
    *_methods(),
]
