LARGEST_PANEL: int
MOST_STEPS: int
MOST_TASKS: int
MOST_BLOCKS: int

def description() -> str: ...
def shared_bytes() -> int: ...
def kth_magnitude_workspace(rows: int, length: int, itemsize: int) -> int: ...
def project_workspace(batch: int, tasks: int, itemsize: int) -> int: ...
def small_svd_limit(shared_bytes: int, itemsize: int) -> int: ...
def newton_schulz_limit(shared_bytes: int, itemsize: int) -> int: ...
def kth_magnitude(
    x: int, counts: int, out: int, rows: int, length: int, itemsize: int, workspace: int, stream: int
) -> None: ...
def magnitude_histogram(
    x: int, out: int, length: int, shift: int, width: int, prefix: int, itemsize: int, stream: int
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
    stream: int,
) -> None: ...
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
    workspace: int,
    stream: int,
) -> None: ...
def rademacher(out: int, length: int, key: int, task: int, stream_number: int, itemsize: int, stream: int) -> None: ...
def panel(gram: int, out: int, pivots: int, batch: int, order: int, stream: int) -> None: ...
def small_svd(
    a: int, u: int, s: int, vh: int, sweeps: int, batch: int, order: int, itemsize: int, stream: int
) -> None: ...
def newton_schulz(
    x: int, out: int, coefficients: int, batch: int, order: int, steps: int, itemsize: int, stream: int
) -> None: ...
def smooth(
    s: int, out: int, rows: int, length: int, kind: int, parameter: float, itemsize: int, stream: int
) -> None: ...
