"""The README's Python runs as written, its YAML is valid, and its tables name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

import dcmerge_ext as dcm
from dcmerge_ext.checkpoints.config import build_config
from dcmerge_ext.cli.merge import config_of
from dcmerge_ext.cli.parser import build_parser
from dcmerge_ext.methods import create

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_runs() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = {"layer.weight": normal(12, 8), "layer.bias": normal(12)}
    namespace = {
        "base": base,
        "model_a": {name: w + 0.1 * normal(*w.shape) for name, w in base.items()},
        "model_b": {name: w + 0.1 * normal(*w.shape) for name, w in base.items()},
        **{f"A{i}": normal(4, 8) for i in (1, 2)},
        **{f"B{i}": normal(12, 4) for i in (1, 2)},
        "weight": base["layer.weight"],
    }
    (code,) = blocks("python")
    exec(code, namespace)
    assert namespace["merged"].keys() == base.keys()
    assert not torch.equal(namespace["merged"]["layer.weight"], base["layer.weight"])
    assert namespace["update"].rank == 8
    assert namespace["weight"].shape == (12, 8)


def test_yaml_is_a_valid_configuration() -> None:
    (text,) = blocks("yaml")
    config = build_config(yaml.safe_load(text))
    assert [override.match for override in config.overrides] == [".*embed_tokens.*", ".*mlp.*", r"lm_head\.weight"]


@pytest.mark.parametrize(
    "line", [line for block in blocks("bash") for line in block.splitlines() if "dcmerge " in line]
)
def test_commands_parse(line: str) -> None:
    command = line.split("#")[0].split("dcmerge ", 1)[1]
    build_parser().parse_args(command.split())


def test_the_configuration_goes_with_the_command_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "merge.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("bash") for line in block.splitlines() if "--config" in line]
    assert lines
    for line in lines:
        command = line.split("#")[0].split("dcmerge ", 1)[1]
        config = config_of(build_parser().parse_args(command.split()))
        method = create(config.method, config.options)
        for override in config.overrides:
            create(override.method or method.name, {**({} if override.method else config.options), **override.options})


def test_every_method_has_a_row() -> None:
    listed = set(re.findall(r"\| `methods\.(\w+)` \|", README))
    assert listed == set(dcm.list_methods())


def test_every_option_named_for_dc_merge_exists() -> None:
    table = README.split("those of DC-Merge that matter first:")[1].split("## ")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert named
    assert named <= set(dcm.list_methods()["dc_merge"].__struct_fields__)
