"""The CUDA kernels, run on the host (tests/cuda_host) under sanitizers and in several orders; planted bugs must fail them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from cuda_bugs import OF_KERNELS
from sanitized import OVERFLOW, RACE, ROOT, Bug, Build, Suite, builds_of, planted, run

SUITE = Suite(
    sources=[
        *sorted((ROOT / "csrc/cuda").glob("*.cu")),
        *sorted((ROOT / "csrc/cpu").glob("*.cpp")),
        *sorted((ROOT / "tests/cuda_host").glob("*.cpp")),
    ],
    folders=["csrc", "tests/cuda_host", "tests/native"],
    flags=["-std=c++20", "-g1", "-pthread", "-ffp-contract=off", "-DDCMERGE_STD_THREADS"],
    builds={
        "address": ["-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"],
        # -Og: at -O1 g++ copies inline, which ThreadSanitizer does not see.
        "thread": ["-Og", "-fsanitize=thread"],
    },
    compilers=["g++"],  # the ThreadSanitizer of clang misses races between fibers
)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Build]:
    return builds_of(SUITE, tmp_path_factory)


# Builds, and how they are run: blocks and threads in several orders, the shared memory of several architectures.
CLEAN = {
    "thread forward": ("thread", {"DCMERGE_HOST_ORDER": "forward"}),
    "thread reverse": ("thread", {"DCMERGE_HOST_ORDER": "reverse"}),
    "thread random": ("thread", {"DCMERGE_HOST_ORDER": "random"}),
    "address forward": ("address", {"DCMERGE_HOST_ORDER": "forward"}),
    "address reverse": ("address", {"DCMERGE_HOST_ORDER": "reverse"}),
    "address random": ("address", {"DCMERGE_HOST_ORDER": "random"}),
    "sm_75": ("address", {"DCMERGE_HOST_SHARED_BYTES": "65536"}),
    "sm_80": ("address", {"DCMERGE_HOST_SHARED_BYTES": "166912"}),
    "sm_120": ("address", {"DCMERGE_HOST_SHARED_BYTES": "101376"}),
}

Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def started(
    request: pytest.FixtureRequest, build: Callable[[str], Build], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Done]]]:
    """What the selected tests run, by the names of the tests: two at a time, as each keeps one core busy."""

    def clean(name: str) -> Done:
        kind, environment = CLEAN[name]
        return run(build(kind).program, **environment)

    def buggy(name: str) -> Done:
        program, test = planted(BUGS[name], build(BUGS[name].build), tmp_path_factory.mktemp("planted"))
        return run(program, test)

    work: dict[str, Callable[..., Done]] = {
        "test_the_kernels_pass_their_tests": clean,
        "test_a_planted_bug_is_reported": buggy,
    }
    with ThreadPoolExecutor(2) as pool:
        selected = [item for item in request.session.items if isinstance(item, pytest.Function)]
        futures = {
            item.name: pool.submit(work[item.originalname], **item.callspec.params)
            for item in selected
            if item.module is request.module and item.originalname in work
        }
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", CLEAN)
def test_the_kernels_pass_their_tests(
    name: str, started: dict[str, Future[Done]], request: pytest.FixtureRequest
) -> None:
    done = started[request.node.name].result()
    assert (done.returncode, done.stdout) == (0, "all passed\n")


@pytest.mark.parametrize("variable", ["DCMERGE_HOST_ORDER", "DCMERGE_HOST_SEED", "DCMERGE_HOST_SHARED_BYTES"])
def test_a_setting_that_means_nothing_is_refused(variable: str, build: Callable[[str], Build]) -> None:
    done = run(build("address").program, "samples", **{variable: "sideways"})
    assert done.returncode == 86
    assert f"{variable}=sideways: must be" in done.stdout


POISON = "AddressSanitizer: use-after-poison"

# Bugs in the small kernels of samples.cuh: one of every kind that the runner promises to report.
OF_SAMPLES = {
    "no barrier after zeroing": Bug(
        "thread", "samples.cuh", "__syncthreads();  // zeroed before any is counted", "", RACE
    ),
    "no barrier before reading what others left": Bug(
        "thread", "samples.cuh", "__syncthreads();  // both warps have their sum", "", RACE
    ),
    "blocks that write to one place": Bug(
        "thread", "samples.cuh", "atomicAdd(&counts[i], bins[i])", "counts[i] += bins[i]", RACE
    ),
    "no atomic in shared memory": Bug(
        "thread",
        "samples.cuh",
        "atomicAdd(&bins[__ldg(x + i) % kBins], 1u)",
        "bins[__ldg(x + i) % kBins] += 1",
        RACE,
    ),
    "no fence before the count": Bug("thread", "samples.cuh", "__threadfence();  // seen before the count", "", RACE),
    "no fence after the count": Bug(
        "thread", "samples.cuh", "__threadfence();  // of all blocks, if this is the last", "", RACE
    ),
    "no barrier of the warp": Bug("thread", "samples.cuh", "__syncwarp();  // all are there", "", RACE),
    "no barrier of the warp between rounds": Bug("thread", "samples.cuh", "__syncwarp();  // all are taken", "", RACE),
    "a shuffle in place of a barrier": Bug(
        "thread", "samples.cuh", "__syncwarp();  // all are there", "__shfl_sync(kFull, round, 0);", RACE
    ),
    "shared memory not initialised": Bug("address", "samples.cuh", "bins[i] = 0;", ";", "samples_test.cpp"),
    "beyond shared memory": Bug(
        "address",
        "samples.cuh",
        "i < kBins; i += blockDim.x) bins[i] = 0",
        "i <= kBins; i += blockDim.x) bins[i] = 0",
        "runtime error: index 64 out of bounds",
    ),
    "beyond shared memory, by pointer": Bug(
        "address",
        "samples.cuh",
        "i < kBins; i += blockDim.x) bins[i] = 0",
        "i <= kBins; i += blockDim.x) *(bins + i) = 0",
        POISON,
    ),
    "beyond global memory": Bug(
        "address", "samples.cuh", "i < n; i += stride", "n != 0 && i <= n; i += stride", OVERFLOW
    ),
    "too little dynamic shared memory": Bug(
        "address", "samples.cuh", "32 * 33 * sizeof(float)", "32 * 32 * sizeof(float)", POISON
    ),
    "misaligned vector": Bug(
        "address",
        "samples.cuh",
        "reinterpret_cast<const float4*>(x)",
        "reinterpret_cast<const float4*>(x + 1)",
        "misaligned address",
    ),
    "host memory read by a kernel": Bug(
        "address",
        "samples.cuh",
        "stream, x, by_value, out)",
        "stream, reinterpret_cast<const float*>(offsets), by_value, out)",
        POISON,
    ),
    "device memory read by the host": Bug(
        "address", "samples.cuh", "= offsets[i]", "= offsets[i] + (x[i] > 9)", POISON
    ),
    "more shared memory than the compiler takes": Bug(
        "address", "samples.cuh", "bins, [kBins]", "bins, [13'000]", "52000 bytes declared"
    ),
    "barrier of one warp": Bug(
        "address",
        "samples.cuh",
        "if (lane == 0) of_warp",
        "if (threadIdx.x < 32) __syncthreads();\n    if (lane == 0) of_warp",
        "__syncthreads: divergent barrier",
    ),
    "return before a barrier": Bug(
        "address",
        "samples.cuh",
        "if (lane == 0) of_warp",
        "if (lane == 5) return;\n    if (lane == 0) of_warp",
        "returned",
    ),
    "lane missing in a shuffle": Bug(
        "address", "samples.cuh", "sum += __shfl_down_sync", "if (lane != 7) sum += __shfl_down_sync", "samples.cuh"
    ),
    "shuffles of one warp in two places": Bug(
        "address",
        "samples.cuh",
        "sum += __shfl_xor_sync(0xffffu, sum, step, 16)",
        "if (threadIdx.x < 8)\n            sum += __shfl_xor_sync(0xffffu, sum, step, 16);\n"
        "        else\n            sum += __shfl_xor_sync(0xffffu, sum, step, 16)",
        "__shfl_xor_sync: divergent call",
    ),
    "mask without the caller": Bug(
        "address", "samples.cuh", "__shfl_xor_sync(0xffffu", "__shfl_xor_sync(0xfffeu", "not in its own mask"
    ),
    "mask of lanes that do not exist": Bug(
        "address",
        "samples.cuh",
        "__shfl_xor_sync(0xffffu",
        "__shfl_xor_sync(0x1ffffu",
        "lanes that the block does not have",
    ),
    "shuffle from outside the mask": Bug(
        "address",
        "samples.cuh",
        "__shfl_xor_sync(0xffffu, sum, step, 16)",
        "__shfl_xor_sync(threadIdx.x < 8 ? 0xffu : 0xff00u, sum, step, 16)",
        "which is not in mask",
    ),
    "width of no group": Bug(
        "address", "samples.cuh", "sum, step, 16)", "sum, step, 12)", "width 12 is not a power of 2"
    ),
    "lanes that wait for each other": Bug(
        "address",
        "samples.cuh",
        "__syncwarp();  // all are taken",
        "if (threadIdx.x % 32 != 9) __syncwarp(); else __syncthreads();",
        "deadlock in block",
    ),
}

# Bugs in the kernels, which their own tests must notice.
BUGS = OF_SAMPLES | {f"{bug.file} {i}": bug for i, bug in enumerate(OF_KERNELS)}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_reported(name: str, started: dict[str, Future[Done]], request: pytest.FixtureRequest) -> None:
    done = started[request.node.name].result()
    assert done.returncode != 0
    assert BUGS[name].report in done.stdout
