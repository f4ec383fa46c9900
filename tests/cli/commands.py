"""Running commands."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from gateskip.cli.main import app, main


def run(*arguments: object) -> str:
    """Run a command that must succeed; its standard output."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return str(result.stdout)


def as_json(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json", "-"))


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail; its one line on standard error."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]
