"""Several processes that merge one model together, started by torchrun; one process alone does nothing here.

The processes meet by counting in torchrun's store, and wait there in Python: a signal ends the wait at once, and so does the
failure of any of them. What they send each other is small and lies in CPU memory, so gloo carries it, on GPUs too.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist

from dcmerge_ext.errors import DcmergeError, InputError, RunError
from dcmerge_ext.methods.base import SurveyState

_T = TypeVar("_T")

_TIMEOUT = timedelta(minutes=10)
"""For the other processes to start, and for one exchange once all have met."""
_POLL_SECONDS = 0.1
_BEAT_SECONDS = 5.0
_POLLS_PER_BEAT = 100
_SILENT_BEATS = 12
"""Without a sign of life of some process: two minutes of waiting, not counting what this one was itself stopped for."""

_groups = count()


class Processes:
    """One process alone; and what several have to offer."""

    rank = 0
    size = 1
    local_rank = 0
    """Among the processes of this machine."""

    @property
    def first(self) -> bool:
        """Whether this process makes directories, writes the record and speaks."""
        return self.rank == 0

    def check(self) -> None:
        """Raise the failure of another process, if there is one. Cheap."""

    def meet(self) -> None:
        """Wait until every process is here. Raises the failure of another process."""

    def gather(self, value: _T) -> list[_T]:
        """The values of all processes, by rank."""
        return [value]

    def total(self, state: SurveyState) -> SurveyState:
        """The shares of all processes, joined. ``state`` is used up."""
        return state


class Group(Processes):
    """The processes that torchrun started."""

    def __init__(self) -> None:
        # torch may be built without them
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]
        from torch.distributed.rendezvous import rendezvous

        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self._meetings = 0
        group = next(_groups)
        store, _, _ = next(rendezvous("env://", timeout=_TIMEOUT))
        self._store = PrefixStore(f"dcmerge-{group}", store)
        dist.init_process_group(
            "gloo",
            store=PrefixStore(f"dcmerge-gloo-{group}", store),
            rank=self.rank,
            world_size=self.size,
            timeout=_TIMEOUT,
        )
        self._over = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        with _exchange():
            failed = self._store.check(["failure"])
        if failed:
            raise self._failure()

    def meet(self) -> None:
        self._meetings += 1
        with _exchange():
            self._wait(f"meeting-{self._meetings}", until_failure=True)

    def gather(self, value: _T) -> list[_T]:
        self.meet()
        values: list[Any] = [None] * self.size
        with _exchange():
            dist.all_gather_object(values, value)
        return values

    def total(self, state: SurveyState) -> SurveyState:
        """Joined along a binary tree, then sent to all: the traffic of a process grows with the logarithm of their number."""
        self.meet()
        answer: list[Any] = [state]
        received: list[Any] = [None]
        step = 1
        with _exchange():
            while step < self.size:
                if self.rank % (2 * step) == step:
                    dist.send_object_list([state], dst=self.rank - step)
                    break
                if self.rank + step < self.size:
                    dist.recv_object_list(received, src=self.rank + step)
                    state.join(received[0])
                step *= 2
            dist.broadcast_object_list(answer, src=0)
        total: SurveyState = answer[0]
        return total

    def fail(self, error: Exception) -> None:
        """Tell the other processes of a failure of this one; the first to be told of counts."""
        text = str(error) if isinstance(error, DcmergeError) else f"{type(error).__name__}: {error}"
        failure: dict[str, Any] = {"input": isinstance(error, InputError), "text": text}
        if isinstance(error, OSError):
            failure |= {"errno": error.errno, "text": error.strerror or str(error)}
        if not self.first:
            failure["text"] += f" (process {self.rank} on {socket.gethostname()})"
        self._store.compare_set("failure", "", json.dumps(failure))

    def leave(self) -> None:
        """Wait until every process has come to its end: torchrun ends all others when one exits with an error."""
        self._wait("end", until_failure=False)

    def close(self) -> None:
        self._over.set()
        dist.destroy_process_group()

    def _failure(self) -> Exception:
        failure = json.loads(self._store.get("failure"))
        if "errno" in failure:
            return OSError(failure["errno"], failure["text"])
        return (InputError if failure["input"] else RunError)(failure["text"])

    def _wait(self, key: str, *, until_failure: bool) -> None:
        beats: list[int] = []
        silent = [0] * self.size
        arrived, polls = self._store.add(key, 1), 0
        while arrived < self.size:
            if until_failure:
                self.check()
            if polls % _POLLS_PER_BEAT == 0:
                before, beats = beats, [self._store.add(f"beats-{rank}", 0) for rank in range(self.size)]
                silent = [n + 1 if beats[r : r + 1] == before[r : r + 1] else 0 for r, n in enumerate(silent)]
                if max(silent) > _SILENT_BEATS:
                    raise RunError(
                        f"process {silent.index(max(silent))} no longer answers; continue with --resume once that is mended"
                    )
            time.sleep(_POLL_SECONDS)
            arrived, polls = self._store.add(key, 0), polls + 1

    def _beat(self) -> None:
        with suppress(Exception):  # the store goes with torchrun
            while not self._over.wait(_BEAT_SECONDS):
                self._store.add(f"beats-{self.rank}", 1)


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this run. A failure of any one inside the block is raised in all of them.

    Raises:
        InputError, RunError: the same in every process.
    """
    if not several():
        yield Processes()
        return
    group = Group()
    try:
        yield group
        group.leave()
    except Exception as error:
        with suppress(Exception, KeyboardInterrupt):  # torchrun may end this process, and the store with itself
            group.fail(error)
            group.leave()
        if isinstance(error, OSError):
            raise RunError(str(error)) from error
        raise
    finally:
        group.close()


@contextmanager
def _exchange() -> Iterator[None]:
    """Errors of the connection inside the block become RunError."""
    try:
        yield
    except DcmergeError:
        raise
    except RuntimeError as error:
        raise RunError(
            f"the connection to the other processes was lost ({error}); continue with --resume once that is mended"
        ) from error


def several() -> bool:
    """Whether torchrun started this process beside others."""
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def is_first() -> bool:
    """Whether this process speaks for all."""
    return not several() or os.environ["RANK"] == "0"
