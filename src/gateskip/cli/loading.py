"""What commands share on the way in: models, tokenizers, budgets and common options."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateskip.config import Budget, one_of
from gateskip.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = [
    "BaseOption",
    "ComputeOption",
    "ComputesOption",
    "DataOption",
    "DraftStoreOption",
    "DtypeOption",
    "GatesArgument",
    "KeepOption",
    "KeepsOption",
    "LatencyOption",
    "WorkloadOption",
    "budgets_of",
    "dtype_of",
    "load_base",
    "load_gated",
    "one_budget",
    "stored",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")

GatesArgument = Annotated[
    str, typer.Argument(metavar="GATES", help="Folder or hub name of gates that were saved.")
]
DataOption = Annotated[
    Path, typer.Option("--data", metavar="FILE", help="A .jsonl file of rows, or a text file.")
]
DraftStoreOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Texts to look drafts up in, such as earlier answers; as for --data."
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Base model; the saved name where left out."),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16; auto as stored.")
]
KeepOption = Annotated[
    float | None, typer.Option("--keep", help="Share of token×branch pairs computed, in (0, 1].")
]
ComputeOption = Annotated[
    float | None, typer.Option("--compute", help="Share of decoder MACs spent, net, in (0, 1].")
]
LatencyOption = Annotated[
    float | None,
    typer.Option("--latency", help="Share of the dense model's time on this machine, in (0, 1]."),
]
WorkloadOption = Annotated[
    tuple[int, int] | None,
    typer.Option(
        "--workload", metavar="PROMPT NEW", help="Tokens that --compute or --latency is about."
    ),
]
KeepsOption = Annotated[
    list[float] | None, typer.Option("--keep", help="As a budget; may be repeated.")
]
ComputesOption = Annotated[
    list[float] | None, typer.Option("--compute", help="As a budget; may be repeated.")
]


def dtype_of(name: str) -> torch.dtype | str:
    """The torch dtype of a name, or ``"auto"``. Raises ConfigError for another name."""
    one_of("dtype", name, DTYPES)
    if name == "auto":
        return name
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def one_budget(
    keep: float | None,
    compute: float | None,
    latency: float | None = None,
    workload: tuple[int, int] | None = None,
) -> Budget | None:
    """The budget that was asked for, or None. Raises BudgetError where several were."""
    if (keep, compute, latency, workload) == (None, None, None, None):
        return None
    return Budget(keep=keep, compute=compute, latency=latency, workload=workload)


def budgets_of(keeps: Sequence[float] | None, computes: Sequence[float] | None) -> list[Budget]:
    """Budgets in the order keep, compute; everything kept where none was asked for."""
    asked = [Budget(keep=k) for k in keeps or ()] + [Budget(compute=c) for c in computes or ()]
    return asked or [Budget(keep=1.0)]


def _quiet() -> None:
    """Leave standard output and the progress of commands to the commands themselves."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _warn_if_slow(model: Any) -> None:
    """Say so where PyTorch has no fast bfloat16 products: x86 without AVX-512."""
    import torch

    weights = next(model.parameters())
    here = platform.machine() in ("x86_64", "AMD64") and weights.device.type == "cpu"
    lacking = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    if here and lacking and weights.dtype == torch.bfloat16:
        warnings.warn(
            "dtype bfloat16: this CPU has no AVX-512, and PyTorch's bfloat16 products take "
            "several times as long as float32's; add --dtype float32.",
            stacklevel=2,
        )


def load_base(name: str, dtype: str = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) of a Hugging Face folder or name.

    Raises:
        ConfigError: an unknown dtype. CheckpointError: neither there nor loadable.
    """
    chosen = dtype_of(dtype)
    from transformers import AutoModelForCausalLM

    _quiet()
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=chosen)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model {name!r} could not be loaded ({_first_line(error)}); give a Hugging Face "
            "folder or name."
        ) from error
    _warn_if_slow(model)
    return model.eval(), load_tokenizer(name)


def load_gated(gates: str, base: str | None, dtype: str = "auto") -> tuple[Any, Any]:
    """(gated model, tokenizer of its base).

    Raises:
        ConfigError: an unknown dtype. CheckpointError: damaged, missing, or for another base.
    """
    chosen = dtype_of(dtype)
    import gateskip

    _quiet()
    model = gateskip.load(gates, base=base, dtype=chosen if dtype != "auto" else None)
    _warn_if_slow(model)
    return model, load_tokenizer(base or model.config._name_or_path)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a base model. Raises CheckpointError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"model {name!r} has no tokenizer that loads ({_first_line(error)}); save one there."
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def stored(path: Path | None, tokenizer: Any) -> list[Any]:
    """The draft that looks up in a file's texts, or nothing."""
    if path is None:
        return []
    from gateskip.data import read_texts
    from gateskip.decoding import LookupDraft

    return [LookupDraft.of(read_texts(path), tokenizer)]
