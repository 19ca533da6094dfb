"""Mutations of bytes and of JSON structures, drawn from a seeded generator."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from random import Random
from typing import Any

# Raw text that json.dumps cannot produce, put in place of these strings afterwards.
_RAW = {
    "@deep list@": "[" * 100_000 + "]" * 100_000,
    "@deep object@": '{"a":' * 30_000 + "1" + "}" * 30_000,
    "@many digits@": "9" * 5_000,
    "@many decimals@": "0." + "3" * 100_000,
    "@huge exponent@": "1e999999999",
    "@nested empties@": "[" + ",".join(["[]"] * 20_000) + "]",
}

CATASTROPHIC = (
    r"(\w|\w\w|.)*[A-Z]",
    r"((.)|(..)|(.)(.))*\d{9}",
    r"(?:(?:.|..)(?:.|..))*?[^\x00-\x7f]",
    r"((.+)+)+!", r"(.*)*(.*)*(.*)*(.*)*=", r"([a-z_.0-9]+)*\$!", r"(\w|\w\w|.)*!", r"(?:(?:a|.)*)*x{3}!", "(.+.+)+@",
    r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(?=(.*)*!)", r"(.*?,){30}!", r"(.)(.+)*\1{40}!",
)  # fmt: skip
STRINGS = (
    "", " ", ".", "..", "/", "../outside/secret.safetensors", "../../../../../../etc/passwd", "/etc/passwd", "/dev/zero",
    "\0", "a\0b", "\ud800", "\udcff", "é", "e\u0301", "\u202egnp", "\x1b[31mred", "two\nlines", "x" * 5_000, "y" * 300,
    "NaN", "null", "true", "None", "__metadata__", "__class__", "%s%n", "[/bold]", "{0}", "~", "~nobody-here/x", "\\", "*",
    "someone/model", "con", "-", "--out", "C:\\x", "file:///etc/passwd", "model.safetensors", "base", "task", "adapter",
    "(", "[a", "a{99999999999}", "(?P<n>x", "(?z)", "(?i)LAYERS.*", "(" * 400 + ")" * 400, "a{1,1000}" * 50, "(?<=a+)b",
    "((a{1,999}){1,999}){1,999}", ".*", *CATASTROPHIC,
)  # fmt: skip
NUMBERS = (
    0, -0.0, -1, 1, 2, 3, 4, 7, 64, 1.5, 0.1, -2.5, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
    2**64, -(2**31), -(2**63), -(2**63) - 1, 10**15, 10**400, -(10**400), 1e15, 1e-300, 1e308, -1e308, 5e-324, float("inf"),
    float("-inf"), float("nan"),
)  # fmt: skip


def scalar(random: Random, extra: Sequence[Any] = ()) -> Any:
    """A value that a file should not have held; or one of ``extra``."""
    kind = random.random()
    if extra and kind < 0.3:
        return copy.deepcopy(random.choice(extra))
    if kind < 0.55:
        return random.choice(STRINGS)
    if kind < 0.85:
        return random.choice(NUMBERS)
    if kind < 0.95:
        return random.choice([None, True, False])
    return random.choice(list(_RAW))


def value(random: Random, extra: Sequence[Any] = ()) -> Any:
    kind = random.random()
    if kind < 0.75:
        return scalar(random, extra)
    items = [scalar(random, extra) for _ in range(random.choice([0, 1, 2, 3]))]
    return items if kind < 0.87 else {str(random.choice(STRINGS)): item for item in items}


def mutate(random: Random, root: Any, extra: Sequence[Any] = ()) -> Any:
    """A copy of a JSON value with one to three edits anywhere in it."""
    root = [copy.deepcopy(root)]  # so that the whole can be replaced, too
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        places = [p for p in _places(root) if p[0] is not root]
        if not places or random.random() < 0.02:
            root[0] = value(random, extra)
        else:
            _edit(random, *random.choice(places), extra)
    return root[0]


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    found: list[tuple[Any, Any]] = []
    todo = [node]
    while todo:
        container = todo.pop()
        keys = container if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                todo.append(container[key])
    return found


def _edit(random: Random, container: Any, key: Any, extra: Sequence[Any]) -> None:
    kind = random.randrange(10)
    if kind == 0:
        del container[key]
    elif kind == 1:
        container[key] = [container[key]]
    elif kind == 2:
        container[key] = {"a": container[key]}
    elif kind == 3 and isinstance(container, dict):
        container[str(scalar(random, extra))] = container.pop(key)
    elif kind == 4 and isinstance(container, dict):
        container[str(scalar(random, extra))] = value(random, extra)
    elif kind == 4:
        container.insert(key, value(random, extra))
    elif kind == 5 and isinstance(container[key], str):
        container[key] = _respelt(random, container[key])
    elif kind == 6 and isinstance(container[key], (int, float)) and container[key] == container[key]:
        container[key] = random.choice([-container[key], container[key] + 1, container[key] * 2, str(container[key])])
    else:
        container[key] = value(random, extra)


def _respelt(random: Random, text: str) -> str:
    at = random.randrange(len(text) + 1)
    return random.choice([
        text[:at], text[at:], text.upper(), text + text, text[:at] + str(scalar(random)) + text[at:], text + "/", f" {text}",
    ])  # fmt: skip


def json_bytes(random: Random, content: Any) -> bytes:
    """A JSON value as text, sometimes damaged as text can be: cut short, a key twice, another encoding, a byte changed."""
    text = json.dumps(content, ensure_ascii=random.random() < 0.5)
    for marker, raw in _RAW.items():
        text = text.replace(json.dumps(marker), raw)
    if isinstance(content, dict) and content and random.random() < 0.05:
        key = random.choice(list(content))
        text = "{" + json.dumps(key) + ":" + json.dumps(scalar(random)) + "," + text[1:]
    data = text.encode("utf-8", "surrogatepass")
    if random.random() < 0.05:
        data = random.choice([
            b"\xef\xbb\xbf" + data, text.encode("utf-16", "surrogatepass"), data + b"\0", data + data, b"",
            b"\xff" + data, data.replace(b'"', b"'"), data + b" " * 100,
        ])  # fmt: skip
    return mutate_bytes(random, data) if random.random() < 0.1 else data


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """One to four edits of a byte string: bits, bytes, words, pieces dropped, doubled, moved, the end cut off."""
    content = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 4])):
        at = random.randrange(len(content) + 1)
        size = random.choice([1, 1, 2, 4, 8, 16, 64])
        kind = random.randrange(8)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            content[at : at + 1] = random.randbytes(1)
        elif kind == 2:
            word = random.choice([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 10**15, len(content)])
            content[at : at + 8] = word.to_bytes(8, "little")
        elif kind == 3:
            del content[at : at + size]
        elif kind == 4:
            content[at:at] = content[at : at + size]
        elif kind == 5:
            other = random.randrange(len(content) + 1)
            content[at : at + size] = content[other : other + size]
        elif kind == 6:
            content[at : at + size] = bytes([random.choice([0, 255, 0x7F, 0x80])]) * size
        else:
            del content[at:]
    return bytes(content)
