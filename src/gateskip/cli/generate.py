"""``gateskip generate``: text from a gated model, and what it cost."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from gateskip.cli.loading import (
    BaseOption,
    ComputeOption,
    DtypeOption,
    GatesArgument,
    KeepOption,
    LatencyOption,
    WorkloadOption,
    load_gated,
    one_budget,
)
from gateskip.cli.output import JsonOption, check_json, console_for, write_json
from gateskip.cli.settings import configurable

__all__ = ["generate"]


@configurable()
def generate(
    gates: GatesArgument,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What to continue.")],
    keep: KeepOption = None,
    compute: ComputeOption = None,
    latency: LatencyOption = None,
    workload: WorkloadOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="As a chat message; where the tokenizer has a template."
        ),
    ] = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
) -> None:
    """Continue a prompt greedily at a budget; without one, at the budget that was saved."""
    budget = one_budget(keep, compute, latency, workload)
    check_json(json)
    import gateskip

    console = console_for(json)
    model, tokenizer = load_gated(gates, base, dtype)
    inputs = _encode(tokenizer, prompt, chat).to(model.device)
    started = time.perf_counter()
    with gateskip.trace(model) as trace:
        ids = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, gateskip_budget=budget
        )
    seconds = time.perf_counter() - started
    new = ids[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    ledger = trace.ledger
    console.print(text, markup=False)
    console.print(
        f"{new.shape[0]} tokens in {seconds:.1f} s; skipped {ledger.skip_rate:.1%} of "
        f"token×branch pairs, {1 - ledger.compute:.1%} of decoder MACs saved (net).",
        style="dim",
    )
    result = {
        "prompt": prompt,
        "text": text,
        "budget": None if budget is None else budget.to_json(),
        "new_tokens": new.shape[0],
        "seconds": seconds,
        "skip_rate": ledger.skip_rate,
        "macs_saved": 1 - ledger.compute,
    }
    write_json(json, result)


def _encode(tokenizer: Any, prompt: str, chat: bool | None) -> Any:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        from gateskip.errors import ConfigError

        raise ConfigError("--chat: this tokenizer has no chat template; use --no-chat.")
    if has_template and chat is not False:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    return tokenizer(prompt, return_tensors="pt")
