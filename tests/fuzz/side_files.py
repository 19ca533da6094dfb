"""Odd entries of a model's directory."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

_NAMES = (
    "config.json", "tokenizer.json", "vocab.txt", "chat_template.jinja", "modeling.py", "spiece.model", "sub", "1_Pooling",
    ".hidden.json", "dcmerge.json", "README.md", "model.safetensors", "model.safetensors.index.json", "adapter_config.json",
    "adapter_model.safetensors", "é.txt", "two\nlines.json", "x" * 200 + ".txt", "-rf.json", "pytorch_model.bin", "a.partial.json",
)  # fmt: skip
_LINKS = (
    "../outside/secret.txt", "../outside/secret.json", "/etc/passwd", "/etc/hostname", "/dev/zero", "/dev/null", "/proc/self/environ", "/", "..", ".", "nowhere",
    "../outside", "config.json", "/proc/self/fd/0", "loop", "../base", "/usr",
)  # fmt: skip


def odd_side_file(random: Random, folder: Path) -> None:
    """One entry: a link, a pipe, a directory, an empty or unreadable file."""
    if not folder.is_dir():
        folder.unlink(missing_ok=True)
        folder.mkdir()
    path = folder / random.choice(_NAMES)
    if path.is_dir() and not path.is_symlink():
        return
    kept = path.read_bytes() if path.is_file() else b"{}"
    path.unlink(missing_ok=True)
    kind = random.randrange(6)
    if kind in (0, 1):
        path.symlink_to(path.name if random.random() < 0.05 else random.choice(_LINKS))
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.mkdir()
        (path / "config.json").write_bytes(kept)
    elif kind == 4:
        path.write_bytes(random.choice([b"", b"\0" * 100, b"{}", b"\xff\xfe", kept]))
    else:
        path.write_bytes(kept)
        path.chmod(0)
