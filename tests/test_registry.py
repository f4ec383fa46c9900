"""The registry: lazy, with suggestions and entry points."""

from __future__ import annotations

import importlib.metadata

import pytest

from gateskip.errors import ConfigError
from gateskip.gates import GATES
from gateskip.registry import Registry
from gateskip.retrofit.families import FAMILIES


def made() -> Registry[object]:
    registry: Registry[object] = Registry("animal", "gateskip.tests.animals")
    registry.register("json", "json:loads")
    registry.register("seven", 7)
    return registry


def test_lazy_and_direct() -> None:
    import json

    registry = made()
    assert registry.names() == ["json", "seven"]
    assert registry.get("json") is json.loads
    assert registry.get("json") is json.loads
    assert registry.get("seven") == 7


def test_broken_targets_fail_when_asked_for_only() -> None:
    registry = made()
    registry.register("broken", "gateskip.does_not_exist:x")
    assert "broken" in registry.names()
    with pytest.raises(ModuleNotFoundError):
        registry.get("broken")


def test_unknown_names_list_and_suggest() -> None:
    with pytest.raises(ConfigError, match=r"animal='jsn'.*json, seven.*Did you mean 'json'"):
        made().get("jsn")


def test_names_are_taken_once() -> None:
    with pytest.raises(ConfigError, match="registered already"):
        made().register("seven", 8)


def test_entry_points_are_found_and_never_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        importlib.metadata.EntryPoint("os", "os:getcwd", "gateskip.tests.animals"),
        importlib.metadata.EntryPoint("seven", "os:getcwd", "gateskip.tests.animals"),
    ]
    groups = []

    def found(*, group: str) -> list[importlib.metadata.EntryPoint]:
        groups.append(group)
        return points

    monkeypatch.setattr(importlib.metadata, "entry_points", found)
    registry = made()
    assert registry.names() == ["json", "os", "seven"]
    assert registry.get("seven") == 7
    import os

    assert registry.get("os") is os.getcwd
    registry.names()
    assert groups == ["gateskip.tests.animals"]


def test_built_ins_load() -> None:
    for registry in (GATES, FAMILIES):
        for name in registry.names():
            assert registry.get(name) is not None
    for name in FAMILIES.names():
        assert FAMILIES.get(name).model_type == name
