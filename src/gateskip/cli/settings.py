"""``--config FILE`` and ``--set KEY=VALUE``: a command's options from YAML or TOML.

Keys are option names. A command may also have *sections*, the fields of the dataclasses behind it:
``gate:``, ``training:``, ``method:`` and, of Hugging Face's TrainingArguments, ``trainer:``. The
later of these wins: preset, file, options, ``--set``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gateskip.config import GateConfig, one_of
from gateskip.errors import ConfigError

__all__ = ["checked_fields", "configurable", "keep_preset", "section"]

#: Training arguments that are ours to pass on; steps, batch and folders are options.
TRAINER = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "bf16", "fp16", "logging_steps",
    "report_to", "run_name", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "dataloader_num_workers", "train_sampling_strategy", "save_total_limit", "data_seed",
)  # fmt: skip
FILE, SET, PRESET = ("gateskip.config", "gateskip.set", "gateskip.preset")


def configurable(*sections: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command ``--config`` and ``--set``; with sections of that name."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)

        def load(context: typer.Context, path: Path | None) -> Path | None:
            if path is not None:
                _keep(context, FILE, _read(path), str(path), sections)
            return path

        def assign(context: typer.Context, pairs: list[str]) -> list[str]:
            if pairs:
                _keep(context, SET, _assignments(pairs), "--set", sections)
            return pairs

        more = {
            "config": (Annotated[Path | None, typer.Option(
                "--config", metavar="FILE", is_eager=True, callback=load,
                help="Options from a .yaml or .toml file.",
            )], None),
            "assignments": (Annotated[list[str], typer.Option(
                "--set", metavar="KEY=VALUE", is_eager=True, callback=assign,
                help=_set_help(sections),
            )], ()),
        }  # fmt: skip
        added = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
            )
            for name, (hint, default) in more.items()
        ]

        mine = signature.parameters
        own = next((n for n, p in mine.items() if p.annotation is typer.Context), None)
        name = own or "typer_context"  # not an option's

        @functools.wraps(command)
        def run(**given: Any) -> None:
            context: typer.Context = given[name]
            passed = {option: value for option, value in given.items() if option in mine}
            command(**(passed | _set_options(context, sections)))

        keyword = inspect.Parameter.KEYWORD_ONLY
        first = [] if own else [inspect.Parameter(name, keyword, annotation=typer.Context)]
        parameters = [p.replace(kind=keyword) for p in (*first, *mine.values(), *added)]
        vars(run)["__signature__"] = signature.replace(parameters=parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return wrap


def _set_options(context: typer.Context, sections: tuple[str, ...]) -> dict[str, Any]:
    """Options by ``--set``, typed, also where the option itself was given."""
    asked = {_name(k): v for k, v in context.meta.get(SET, {}).items() if k not in sections}
    options = {p.name: p for p in context.command.params}
    return {name: options[name].process_value(context, value) for name, value in asked.items()}


def _set_help(sections: tuple[str, ...]) -> str:
    where = "".join(f", {name}.FIELD=VALUE" for name in sections)
    return f"An option as KEY=VALUE{where}; before everything else."


def section(
    name: str, given: Mapping[str, Any], context: typer.Context, flags: Mapping[str, str]
) -> dict[str, Any]:
    """Fields of a section: ``given`` by options, and what preset, file and ``--set`` say.

    Args:
        flags: names of options, of fields that are called otherwise.
    """
    found = dict(given)
    for source in (PRESET, FILE):
        for field, value in context.meta.get(source, {}).get(name, {}).items():
            if not explicit(context, flags.get(field, field)):
                found[field] = value
    return found | context.meta.get(SET, {}).get(name, {})


def explicit(context: typer.Context, option: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def keep_preset(context: typer.Context, values: dict[str, Any], sections: tuple[str, ...]) -> None:
    """Take a preset's options and sections."""
    _keep(context, PRESET, values, "preset", sections)


def _keep(
    context: typer.Context, source: str, values: dict[str, Any], where: str,
    sections: tuple[str, ...],
) -> None:  # fmt: skip
    """Check the keys, and let them be the options' defaults."""
    options = {p.name for p in context.command.params if p.name} - {"config", "assignments"}
    for key, value in values.items():
        if key in sections:
            values[key] = _checked(key, value, where)
            continue
        name = _name(key)
        if name not in options:
            one_of(f"{where}: key", key, tuple(sorted({*options, *sections})))
        if isinstance(value, dict):
            raise ConfigError(f"{where}: {key} is an option and takes a value, not a section.")
    context.meta[source] = values
    merged: dict[str, Any] = {}
    for part in (PRESET, FILE, SET):
        plain = context.meta.get(part, {}).items()
        merged |= {_name(key): value for key, value in plain if key not in sections}
    context.default_map = merged


def _name(key: str) -> str:
    return key.replace("-", "_")


def _checked(name: str, values: Any, where: str) -> dict[str, Any]:
    """A section's fields, their types held against the dataclass."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {name} is a section; give it fields, as in {name}.FIELD.")
    if name == "trainer":
        for key in values:
            one_of(f"{where}: {name} field", key, TRAINER)
        return {key: _number(value) for key, value in values.items()}
    if name == "method":
        return values  # of which one, an argument says; the command checks them
    return checked_fields(name, values, where, _dataclass(name))


def checked_fields(
    name: str, values: Mapping[str, Any], where: str, dataclass: type
) -> dict[str, Any]:
    """Fields of a dataclass, their names and types held against it. Raises ConfigError."""
    found = {}
    hints = typing.get_type_hints(dataclass)
    fields = tuple(field.name for field in dataclasses.fields(dataclass))
    for key, value in values.items():
        one_of(f"{where}: {name} field", key, fields)
        found[key] = value if _fits(value, hints[key]) else _number(value)
        if not _fits(found[key], hints[key]):
            raise ConfigError(
                f"{where}: {name}.{key}={value!r} is of the wrong type; it takes "
                f"{_described(hints[key])}."
            )
    return found


def _dataclass(name: str) -> Any:
    if name == "gate":
        return GateConfig
    from gateskip.training.config import GateSkipTrainingConfig  # imports torch

    return GateSkipTrainingConfig


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return isinstance(value, str)  # which one is the dataclass's to say
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(v, arguments[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)


def _read(path: Path) -> dict[str, Any]:
    """The file's mapping. Raises ConfigError."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {str(path)!r} cannot be read: {error}.") from error
    try:
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {str(path)!r} is damaged: {error}.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"--config {str(path)!r} has to be a mapping of options to values.")
    return values


def _assignments(pairs: list[str]) -> dict[str, Any]:
    """``["a=1", "gate.rank=8"]`` as a mapping; values are YAML."""
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set {pair!r} must look like KEY=VALUE.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {pair!r}: the value cannot be read: {error}.") from error
        part, dot, field = key.partition(".")
        if dot:
            found.setdefault(part, {})[field] = value
        else:
            found[key] = value
    return found


def _number(value: Any) -> Any:
    """YAML takes 1e-3 for a text, since it has no point."""
    plain = isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value)
    return float(value) if plain else value
