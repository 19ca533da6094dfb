"""Input made to do harm, through the command line: refused with one message, or merged without what it was after.

What the fuzzer found (tests/fuzz), each as one case. Plainly wrong input is in test_bad_input.py.
"""

from __future__ import annotations

import io
import json
import os
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import refused, run, tasks
from safetensors.torch import save_file

from dcmerge_ext import compare, merge_checkpoints
from dcmerge_ext.checkpoints.blame import of_tensor
from dcmerge_ext.errors import ConvergenceError, InputError, OptionError, RunError

BASE = families.toy()
TUNED = families.tuned(BASE, 1)
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
NAME = "layers.0.attn.weight"
LONG = "layers.0.attention.self.query_projection"  # a pattern that backtracks runs for years on it
CATASTROPHIC = r"(\w|\w\w|.)*[A-Z]"
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """A pipe that nobody writes to, or a pattern that backtracks: an error after 30 s instead of a test without end."""

    def stop(*_: object) -> None:
        raise TimeoutError("took longer than 30 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return families.write_model(tmp_path / "base", BASE)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return families.write_model(tmp_path / "task", TUNED)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return families.write_adapter(tmp_path / "adapter", BASE)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def configure(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class TestFilesThatAreNone:
    @pytest.mark.parametrize("role", ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", f"task/{MODEL}", f"task/{INDEX}"])  # fmt: skip
    @pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
    def test_a_pipe_is_not_waited_for(
        self, kind: str, role: str, base: Path, task: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        file = tmp_path / role
        (task / MODEL).unlink() if role.startswith("task") else file.unlink()
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "device":
            file.symlink_to("/dev/zero")
        else:
            file.mkdir()
        result = run(capsys, "merge", "--base", base, "--task", file.parent, "--out", out)
        assert result.status == 1
        assert str(file) in result.err
        assert not out.exists()

    def test_an_endless_json_file(self, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        file = adapter / "adapter_config.json"
        file.unlink()
        with open(file, "wb") as sparse:
            sparse.truncate(1 << 40)
        result = run(capsys, "merge", "--base", base, "--task", adapter, "--out", out)
        assert result.status == 1
        assert f"{file}: larger than" in result.err


class TestSideFiles:
    """What lies beside the weights of the base, and goes into the output."""

    def test_pipes_devices_and_links_to_directories_stay_behind(
        self, base: Path, task: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        os.mkfifo(base / "vocab.txt")
        (base / "merges.txt").symlink_to("/dev/zero")
        (base / "everything").symlink_to("/")
        (base / "loop").symlink_to(base)
        (base / "loop.json").symlink_to("loop.json")
        (base / "README.md").mkdir()
        (base / "README.md" / "a.json").write_text("{}")
        (base / "dcmerge.json").mkdir()
        families.merged(capsys, out, "--base", base, "--task", task)
        kept = {"config.json", MODEL, "dcmerge.json", "dcmerge_timings.json", "README.md"}
        assert {p.name for p in out.rglob("*")} == kept

    @pytest.mark.parametrize("name", ["notes.txt", "config.json", "1_Pooling/config.json"])
    def test_a_link_out_of_the_model_is_refused(
        self, name: str, base: Path, task: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        """Else a downloaded model could carry somebody's files into what he publishes."""
        secret = tmp_path / "elsewhere" / "credentials.json"
        secret.parent.mkdir()
        secret.write_text("{}")
        (base / name).unlink(missing_ok=True)
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).symlink_to(secret)
        refused(
            capsys, tmp_path, "--base", base, "--task", task, "--out", out, says=[base / name, "is a link to", secret]
        )

    def test_links_within_the_model_and_into_a_download_cache_are_copied(
        self, task: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        blobs = tmp_path / "models--someone--model" / "blobs"
        base = families.write_model(blobs.parent / "snapshots" / "1234", BASE)
        blobs.mkdir()
        for i, file in enumerate([base / "config.json", base / MODEL]):
            file.rename(blobs / str(i))
            file.symlink_to(f"../../blobs/{i}")
        (base / "generation_config.json").symlink_to("config.json")
        families.merged(capsys, out, "--base", base, "--task", task)
        for name in ("config.json", "generation_config.json"):
            assert not (out / name).is_symlink()
            assert (out / name).read_bytes() == (blobs / "0").read_bytes()

    def test_an_adapter_configuration_from_elsewhere(
        self, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        file = adapter / "adapter_config.json"
        file.rename(tmp_path / "other.json")
        file.symlink_to("../other.json")
        refused(capsys, tmp_path, "--task", adapter, "--out", out, says=[file, "is a link to"])


def test_names_of_tensors_lead_nowhere(out: Path, tmp_path: Path, capsys: Capsys) -> None:
    odd = {name: torch.ones(2, 2) for name in ("../../x", "/tmp/x", "a/b", "..", "\x1b[31m", "two\nlines", "w" * 5_000)}
    base = families.write_model(tmp_path / "base", odd)
    task = families.write_model(tmp_path / "task", {name: 2 * values for name, values in odd.items()})
    before = families.tree(tmp_path)
    found = families.merged(capsys, out, "--base", base, "--task", task, "--shard-size", "16")
    assert found.keys() == odd.keys()
    assert {path for path in families.tree(tmp_path) if path.split("/")[0] != "out"} == before.keys()


class TestJson:
    @pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"r": ' + "9" * 5_000 + "}"])
    @pytest.mark.parametrize("role", ["base/config.json", "adapter/adapter_config.json", f"task/{INDEX}"])
    def test_nested_deeply_or_with_numbers_without_end(
        self, text: str, role: str, base: Path, task: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        (task / MODEL).rename(task / "a.safetensors")
        (tmp_path / role).write_text(text)
        refused(
            capsys, tmp_path, "--base", base, *tasks(adapter, task), "--out", out, "--extra", "ignore",
            says=[tmp_path / role],
        )  # fmt: skip

    @pytest.mark.parametrize("alpha", [10**400, float("nan"), float("inf"), -float("inf"), 1e300, True, "2", [1], None])
    def test_a_lora_alpha_that_is_no_factor(
        self, alpha: Any, base: Path, adapter: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        configure(adapter, lora_alpha=alpha)
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out,
            says=[adapter / "adapter_config.json", "lora_alpha", "layers."],
        )  # fmt: skip

    @pytest.mark.parametrize(
        "change",
        [
            {"config": 5}, {"config": {"tasks": 3, "out": "x"}}, {"config": {"tasks": [1], "out": "x"}}, {"options": [1]},
            {"options": {"official": {}}}, {"options": {"keep": "much"}}, {"weights": "x"}, {"scale": []}, {"method": 1},
        ],
    )  # fmt: skip
    def test_a_record_that_is_none(
        self, change: dict[str, Any], base: Path, task: Path, out: Path, tmp_path: Path
    ) -> None:
        merge_checkpoints(base, [task], out)
        record = json.loads((out / "dcmerge.json").read_text())
        (out / "dcmerge.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(InputError):
            compare(out)


class TestPatterns:
    """No pattern out of a file runs for ever."""

    @pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
    @pytest.mark.parametrize(
        ("pattern", "says"), [(CATASTROPHIC, "takes longer"), ("a{99999999999}", "regular"), ("(" * 5_000, "regular")]
    )
    def test_of_an_adapter(self, pattern: str, says: str, key: str, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        base = {f"{LONG}.weight": torch.ones(4, 4)}
        adapter = families.write_adapter(tmp_path / "adapter", base, [LONG], **{key: {pattern: 1}})
        refused(capsys, tmp_path, "--task", adapter, "--out", out, says=[adapter / "adapter_config.json", says])

    @pytest.mark.parametrize("pattern", [CATASTROPHIC, "a{99999999999}"])
    def test_of_an_override(self, pattern: str, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        base = families.write_model(tmp_path / "base", {f"{LONG}.weight": torch.ones(4, 4)})
        (tmp_path / "m.yaml").write_text(json.dumps({"overrides": [{"match": pattern, "action": "copy"}]}))
        refused(
            capsys, tmp_path, "--base", base, "--task", base, "--out", out, "--config", tmp_path / "m.yaml",
            says=["override", "pattern"],
        )  # fmt: skip

    def test_of_a_comparison(self, tmp_path: Path) -> None:
        base = families.write_model(tmp_path / "base", {f"{LONG}.weight": torch.ones(4, 4)})
        task = families.write_model(tmp_path / "task", {f"{LONG}.weight": torch.eye(4)})
        with pytest.raises(OptionError, match="takes longer"):
            compare(task, base, [task], match=CATASTROPHIC)


class TestYaml:
    BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))

    @pytest.mark.parametrize(
        "text",
        [
            BOMB + "options: *a29",
            BOMB.replace("[x]", "{k: v}").replace("[*", "{<<: [*").replace("]\n", "]}\n") + "options: *a29",
            "options: &a {b: *a}",
            "tasks: &a [*a]",
            "scale: 2001-99-99",
            "scale: 2001-01-01T00:00:00+99:99",
            "scale: !!timestamp x",
            "scale: !!int x",
            "scale: !!bool x",
            "scale: " + "9" * 5_000,
            "options: " + "[" * 5_000,
        ],
        ids=lambda text: text[-30:],
    )
    def test_refused(self, text: str, base: Path, task: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        file = tmp_path / "m.yaml"
        file.write_text(text)
        refused(
            capsys, tmp_path, "--base", base, "--task", task, "--out", out, "--config", file,
            says=[file, "not valid YAML"],
        )  # fmt: skip

    def test_aliases_as_people_use_them(
        self, base: Path, task: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        text = "overrides:\n- &a {match: lm.*, action: copy}\n- {<<: *a, match: embed.*}\n"
        (tmp_path / "m.yaml").write_text(text)
        found = families.merged(capsys, out, "--base", base, "--task", task, "--config", tmp_path / "m.yaml")
        assert families.same_bits(found["embed_tokens.weight"], BASE["embed_tokens.weight"])

    @pytest.mark.parametrize("value", ["a\0b", "~nobody-of-this-name/x", "\ud800"])
    def test_an_output_that_is_no_path(self, value: str, base: Path, task: Path) -> None:
        with pytest.raises(OptionError, match=r"out|no text"):
            merge_checkpoints(base, [task], value)
        with pytest.raises(InputError, match=r"no such file|no text"):
            merge_checkpoints(value, [task], "out")


class TestPickles:
    """What ``weights_only`` lets through."""

    @pytest.mark.parametrize(
        ("name", "value", "says"),
        [
            (NAME, torch.zeros(1).expand(10**8, 10**7), "claims 1000000000000000 elements"),
            (NAME, torch.zeros(12, 8, device="meta"), "stored as meta"),
            (NAME, torch.zeros(12, 8).to_sparse(), "stored as sparse_coo"),
            (7, torch.zeros(2), "named by a int"),
            (("a", "b"), torch.zeros(2), "named by a tuple"),
            ("__metadata__", torch.zeros(2), "cannot be named"),
            ("\ud800", torch.zeros(2), "cannot be named"),
        ],
    )
    def test_refused(
        self, name: Any, value: Any, says: str, base: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        file = tmp_path / "task.bin"
        torch.save({**TUNED, name: value}, file)
        refused(capsys, tmp_path, "--base", base, "--task", file, "--out", out, "--extra", "ignore", says=[file, says])

    def test_a_packed_archive(self, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        plain, file = io.BytesIO(), tmp_path / "task.bin"
        torch.save(TUNED, plain)
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in source.namelist():
                packed.writestr(entry, source.read(entry))
            packed.writestr("archive/data/99", bytes(1 << 24))
        assert file.stat().st_size < 1 << 20
        refused(capsys, tmp_path, "--base", base, "--task", file, "--out", out, says=[file, "is compressed"])

    def test_says_what_was_refused(self, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        file = tmp_path / "task.bin"
        file.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        refused(capsys, tmp_path, "--base", base, "--task", file, "--out", out, says=[file, "GLOBAL os.system"])


class TestHeaders:
    @pytest.mark.parametrize("shape", [[10**15, 0], [0, 2**63 - 1, 2**63 - 1], [2**62, 0], [1] * 70])
    def test_shapes_that_no_tensor_has(
        self, shape: list[int], base: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        size = 4 * (0 not in shape)
        entry = {NAME: {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
        file = families.raw_safetensors(tmp_path / "x.safetensors", entry, bytes(size))
        refused(capsys, tmp_path, "--base", base, "--task", file, "--out", out, says=[file, NAME, "no tensor can have"])

    @pytest.mark.parametrize("length", [10**15, 2**63 - 1, 2**63, 2**64 - 1])
    def test_lengths_beyond_the_file(self, length: int, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        file = tmp_path / "x.safetensors"
        file.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(1_000))
        refused(
            capsys, tmp_path, "--base", base, "--task", file, "--out", out, says=[file, "not a complete safetensors"]
        )

    def test_a_name_twice(self, base: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        one, other = (f'"w":{{"dtype":"F32","shape":[1],"data_offsets":[{i},{i + 4}]}}' for i in (0, 4))
        file = families.raw_safetensors(tmp_path / "x.safetensors", f"{{{one},{other}}}".encode(), bytes(8))
        refused(
            capsys, tmp_path, "--base", base, "--task", file, "--out", out, says=[file, "not a complete safetensors"]
        )


class TestAdapters:
    def edited(self, tmp_path: Path, **changes: Any) -> Path:
        """An adapter of one module with further tensors, or others in place of its own."""
        module = "base_model.model.layers.0.attn."
        adapter = families.write_adapter(tmp_path / "edited", BASE, ["layers.0.attn"])
        save_file(
            {
                f"{module}lora_A.weight": torch.ones(2, 8),
                f"{module}lora_B.weight": torch.ones(12, 2),
                **{name if "." in name else f"{module}{name}.weight": value for name, value in changes.items()},
            },
            adapter / "adapter_model.safetensors",
        )
        return adapter

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"lora_magnitude_vector": torch.ones(8)}, "DoRA magnitude"),
            ({"lora_B": torch.ones(12, 2, 1)}, "do not fit"),
            ({"lora_A.default": torch.ones(2, 8)}, "have one meaning"),
            ({"layers.0.attn.lora_B.weight": torch.ones(12, 2)}, "have one meaning"),
            ({"layers.0.x": torch.ones(3), "base_model.model.layers.0.x": torch.ones(3)}, "have one meaning"),
        ],
    )
    def test_refused(
        self, changes: dict[str, Any], says: str, base: Path, out: Path, tmp_path: Path, capsys: Capsys
    ) -> None:
        changes = {
            f"base_model.model.layers.0.attn.{n}.weight" if n.endswith("default") else n: v for n, v in changes.items()
        }
        adapter = self.edited(tmp_path, **changes)
        refused(
            capsys, tmp_path, "--base", base, "--task", adapter, "--out", out, "--extra", "ignore",
            says=[adapter / "adapter_model.safetensors", says],
        )  # fmt: skip

    def test_factors_that_overflow(self, out: Path, tmp_path: Path, capsys: Capsys) -> None:
        adapter = self.edited(tmp_path, lora_B=torch.full((12, 2), 1e38))
        refused(
            capsys, tmp_path, "--task", adapter, "--out", out, "--method", "averaging", "--scale", "1e9",
            says=["'layers.0.attn.weight'", "factors overflow"],
        )  # fmt: skip


def test_gram_matrices_beyond_float64(base: Path, task: Path, out: Path, tmp_path: Path, capsys: Capsys) -> None:
    file = tmp_path / "grams.safetensors"
    save_file({NAME: torch.full((8, 8), 1e308, dtype=torch.float64).triu() - torch.eye(8) * 1e300}, file)
    refused(
        capsys, tmp_path, "--base", base, "--task", task, "--out", out, "--method", "esm", "--set", f"activations=[{file}]",
        says=[repr(NAME), file, "calibrate that model again"],
    )  # fmt: skip


class TestMessages:
    def test_one_line_that_any_terminal_prints(self) -> None:
        text = str(InputError("a\nb\x1b[31m \ud800\u202e é 日本 " + "x" * 10_000 + " the end"))
        assert text.isprintable()
        assert text.startswith("a b\\x1b[31m \\ud800\\u202e é 日本 x")
        assert text.endswith("x the end")
        assert len(text) < 2_000

    def test_memory_that_runs_out_has_the_name_of_its_tensor(self) -> None:
        with pytest.raises(RunError, match="tensor 'w': not enough memory"), of_tensor("w"):
            torch.empty(1 << 60)
        with pytest.raises(RunError, match="tensor 'w': not enough memory"), of_tensor("w"):
            bytearray(1 << 60)
        with pytest.raises(ConvergenceError, match="tensor 'w': no"), of_tensor("w"):
            raise ConvergenceError("no")
        with pytest.raises(RuntimeError, match=r"^another$"), of_tensor("w"):
            raise RuntimeError("another")
