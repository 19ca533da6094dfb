"""The command line ``dcmerge``. Exit status: 0 done; 1 the inputs or options are wrong, nothing was written; 2 the
command line cannot be parsed; 3 the run failed (disk full, device lost); 130 interrupted; 143 terminated."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from dcmerge_ext.cli import merge
from dcmerge_ext.cli.display import make_console
from dcmerge_ext.cli.parser import build_parser
from dcmerge_ext.distributed import several
from dcmerge_ext.errors import BackendUnavailable, DcmergeError, InputError

_NOTHING_LEFT = "nothing was left behind"


def entry() -> None:
    """The installed command."""
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn every error into one message and a status."""
    args = build_parser().parse_args(arguments)
    errors = make_console(stderr=True)
    level = logging.ERROR if args.quiet else logging.INFO if args.verbose else logging.WARNING
    package = logging.getLogger("dcmerge_ext")
    handler = _ConsoleHandler(errors)
    handler.setLevel(level)
    package.addHandler(handler)
    package.setLevel(min(level, logging.WARNING))  # what is not shown is recorded all the same
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(handler)
    before = (
        signal.signal(signal.SIGTERM, _terminate) if threading.current_thread() is threading.main_thread() else None
    )
    try:
        if several() and args.run not in (merge.run_merge, merge.run_plan):
            raise InputError("torchrun: only dcmerge merge runs in several processes; start this command without it")
        status: int = args.run(args)
        return status
    except (InputError, BackendUnavailable) as error:
        errors.print(Text("error:", "bold red"), str(error))
        return 1
    except DcmergeError as error:
        errors.print(Text("failed:", "bold red"), str(error))
        return 3
    except _Terminated as stop:
        errors.print(f"terminated; {str(stop) or _NOTHING_LEFT}")
        return 143
    except KeyboardInterrupt as stop:
        errors.print(f"interrupted; {str(stop) or _NOTHING_LEFT}")
        return 130
    except Exception:
        Console(stderr=True, soft_wrap=True).print_exception()  # of any process
        errors.print(Text("failed:", "bold red"), "an internal error; please report it with the lines above")
        return 3
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        package.removeHandler(handler)
        logging.getLogger("py.warnings").removeHandler(handler)
        logging.captureWarnings(False)


class _Terminated(KeyboardInterrupt):
    """By a scheduler, ``timeout`` or the end of a container: cleans up as Ctrl-C does."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


class _ConsoleHandler(logging.Handler):
    """Log lines in one piece, above a progress bar. (rich's own handler breaks them at the width of the terminal.)"""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(f"{record.levelname.lower()}: {record.getMessage()}")
