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
