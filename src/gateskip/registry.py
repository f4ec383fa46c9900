"""One lazy registry: names to classes or specs, with entry points and "did you mean".

Built-ins use the same door as a third party: a ``"module:attribute"`` string, imported when it is
first asked for. A third party registers through an entry point of the registry's group.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from typing import Generic, TypeVar

from gateskip.errors import ConfigError

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to lazily imported objects.

    Args:
        what: what is registered, for messages, such as ``"gate kind"``.
        group: entry-point group that third parties use, such as ``"gateskip.gates"``.
    """

    def __init__(self, what: str, group: str) -> None:
        self.what = what
        self.group = group
        self._targets: dict[str, str | T] = {}
        self._scanned = False

    def register(self, name: str, target: str | T) -> None:
        """Add ``name``; ``target`` is the object or ``"module:attribute"``. Raises ConfigError."""
        if name in self._targets:
            raise ConfigError(f"{self.what} {name!r} is registered already; choose another name.")
        self._targets[name] = target

    def names(self) -> list[str]:
        """All registered names, sorted."""
        if not self._scanned:
            self._scanned = True
            for point in importlib.metadata.entry_points(group=self.group):
                self._targets.setdefault(point.name, point.value)
        return sorted(self._targets)

    def get(self, name: str) -> T:
        """The object behind ``name``. Raises ConfigError that lists the names."""
        if name not in self.names():
            close = difflib.get_close_matches(name, self.names(), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"{self.what}={name!r} is unknown; there are {', '.join(self.names())}.{hint}"
            )
        target = self._targets[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            loaded: T = getattr(importlib.import_module(module), attribute)
            self._targets[name] = loaded
            return loaded
        return target
