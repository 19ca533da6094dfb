"""From what a user names - a directory, a file, a Hub id - to a path."""

from __future__ import annotations

import re
from pathlib import Path

from dcmerge_ext.errors import InputError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PATTERNS = ["*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


def locate(name: str | Path) -> Path:
    """The path itself if it exists; otherwise a Hub model, downloaded where huggingface_hub is installed.

    Raises:
        InputError: neither is there.
    """
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a name too long, a null character
        raise InputError(f"{name}: no such file or directory ({error})") from error
    if not _HUB_ID.fullmatch(str(name)):
        raise InputError(f"{name}: no such file or directory")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{name}: no such file or directory (and huggingface_hub is not installed to look for a Hub model)"
        ) from None
    try:
        return Path(snapshot_download(str(name), allow_patterns=_PATTERNS))
    except Exception as error:  # the library raises many kinds: network, authorisation, missing repository
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name}: neither a file or directory here nor a Hub model that can be had ({reason})"
        ) from error
