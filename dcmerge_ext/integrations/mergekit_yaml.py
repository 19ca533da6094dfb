"""``dcmerge-mergekit-yaml``: mergekit's ``mergekit-yaml`` with the methods of this package in its register."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import click
import msgspec
import yaml
from mergekit import merge_methods
from mergekit.scripts import run_yaml

from dcmerge_ext.checkpoints.config import load_yaml
from dcmerge_ext.errors import DcmergeError, OptionError
from dcmerge_ext.integrations.mergekit import PREFIX, TWINS, register_all, why_not
from dcmerge_ext.methods.registry import create, list_methods, nearest


def command() -> click.Command:
    """mergekit's command. Our errors are one message and exit status 1, and a parameter that a method does not have is one
    of them; mergekit ignores such parameters, and so do the methods that stand for its own."""
    register_all()
    ours: click.Command = copy.copy(run_yaml.main)

    def run(config_file: str, **others: Any) -> None:
        try:
            with open(config_file, encoding="utf-8") as file:
                _check(yaml.safe_load(file))
            run_yaml.main.callback(config_file=config_file, **others)
        except DcmergeError as error:
            raise click.ClickException(str(error)) from error

    ours.callback = run
    return ours


def _check(config: Any) -> None:
    """Raise OptionError for one of our methods that is not offered, or a parameter that it does not have."""
    name = config.get("merge_method") if isinstance(config, dict) else None
    if not isinstance(name, str) or not name.startswith(PREFIX):
        return
    specs = {method.spec.name: method.spec for method in merge_methods.registered_methods()}
    if name not in specs:
        own = name.removeprefix(PREFIX)
        why = f": {own} {why_not(own)}" if own in list_methods() else nearest(name, list(specs))
        raise OptionError(f"merge_method {name!r} does not exist{why}")
    known = [p.name for p in specs[name].parameters]
    own = name.removeprefix(PREFIX)
    if own in TWINS:
        return
    options = {f.name for f in msgspec.structs.fields(list_methods()[own])}
    for parameters in _parameters(config):
        for given in map(str, parameters):
            if given not in known:
                raise OptionError(
                    f"{name} has no parameter {given!r}{nearest(given, known)} (it has {', '.join(known)})"
                )
        # lists are gradients over the layers, or filters by name: mergekit resolves them later
        plain = {k: v for k, v in parameters.items() if k in options and not isinstance(v, (list, dict))}
        create(own, {k: load_yaml(v) if isinstance(v, str) else v for k, v in plain.items()})


def _parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Every ``parameters`` of a configuration."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "parameters" and isinstance(value, dict):
                yield value
            else:
                yield from _parameters(value)
    elif isinstance(config, list):
        for value in config:
            yield from _parameters(value)
