def description() -> str: ...
def kth_magnitude(x: int, counts: int, out: int, rows: int, length: int, itemsize: int, threads: int) -> None: ...
def magnitude_histogram(
    x: int, out: int, length: int, shift: int, width: int, prefix: int, itemsize: int, threads: int
) -> None: ...
def elect(
    stack: int,
    thresholds: int,
    out: int,
    batch: int,
    tasks: int,
    rows: int,
    cols: int,
    blocks: int,
    num_blocks: int,
    zero_sum: int,
    mean: bool,
    itemsize: int,
    threads: int,
) -> None: ...
def rademacher(out: int, length: int, key: int, task: int, stream: int, itemsize: int, threads: int) -> None: ...
def drop(
    values: int,
    out: int,
    length: int,
    offset: int,
    dropped_below: int,
    gain: float,
    key: int,
    task: int,
    stream: int,
    itemsize: int,
    threads: int,
) -> None: ...
def orthonormalize(rows: int, out: int, count: int, length: int, worst_pivot: float, itemsize: int) -> bool: ...
def gram(x: int, out: int, count: int, length: int, row: int, column: int, threads: int) -> None: ...
def gram_apply(x: int, a: int, image: int, back: int, count: int, m: int, n: int, threads: int) -> None: ...
def project(
    left: int,
    right: int,
    s: int,
    counts: int,
    thresholds: int,
    largest: int,
    blocks: int,
    batch: int,
    tasks: int,
    k: int,
    ranks: int,
    sizes: int,
    num_blocks: int,
    itemsize: int,
    threads: int,
) -> None: ...
