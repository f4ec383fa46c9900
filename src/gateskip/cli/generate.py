"""``gateskip generate``: text from a gated model, and what it cost."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from gateskip.cli.loading import (
    BaseOption,
    ComputeOption,
    DraftStoreOption,
    DtypeOption,
    GatesArgument,
    KeepOption,
    LatencyOption,
    WorkloadOption,
    load_gated,
    one_budget,
    stored,
)
from gateskip.cli.output import JsonOption, check_json, console_for, write_json
from gateskip.cli.settings import configurable
from gateskip.errors import ConfigError

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
    speculative: Annotated[
        bool, typer.Option("--speculative", help="Draft cheaply and check: the same tokens.")
    ] = False,
    draft: Annotated[
        str | None,
        typer.Option(
            help="A share kept (0.5), 'lookup', 'dense', or 'exit:N', the first N layers."
        ),
    ] = None,
    draft_tokens: Annotated[
        str | None, typer.Option(help="Tokens drafted before a check, or 'auto' (if left out).")
    ] = None,
    draft_store: DraftStoreOption = None,
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
    for option, value in (("--draft", draft), ("--draft-tokens", draft_tokens)):
        if value is not None and not speculative:
            raise ConfigError(f"{option} {value}: give --speculative with it.")
    drafting = draft_options(draft or "0.5", draft_tokens or "auto") if speculative else None
    if draft_store is not None and (drafting is None or draft != "lookup"):
        raise ConfigError(
            f"--draft-store {draft_store}: give --speculative --draft lookup with it."
        )
    import gateskip

    console = console_for(json)
    model, tokenizer = load_gated(gates, base, dtype)
    if drafting is not None and draft_store is not None:
        drafting |= {"draft_policy": stored(draft_store, tokenizer)[0]}
    inputs = _encode(tokenizer, prompt, chat).to(model.device)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "do_sample": False, "gateskip_budget": budget,
    }  # fmt: skip
    stats = gateskip.DecodingStats()
    started = time.perf_counter()
    with gateskip.trace(model) as trace:
        if drafting is None:
            ids = model.generate(**inputs, **options)
        else:
            ids = gateskip.generate_speculative(model, inputs, stats=stats, **drafting, **options)
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
    if drafting is not None:
        console.print(
            f"{stats.acceptance:.1%} of {stats.drafted} drafted tokens were right; "
            f"{stats.tokens_per_pass:.2f} tokens a pass.",
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
        "speculative": None if drafting is None else stats.to_json(),
    }
    write_json(json, result)


def draft_options(draft: str, draft_tokens: str) -> dict[str, Any]:
    """``generate_speculative``'s arguments from the command line's. Raises ConfigError."""
    from gateskip.decoding import ExitLayer
    from gateskip.decoding.length import length_of

    policy: Any = draft
    if draft.startswith("exit:") and draft[5:].isdigit():
        policy = ExitLayer(int(draft[5:]))
    elif draft not in ("lookup", "dense"):
        try:
            policy = float(draft)
        except ValueError:
            raise ConfigError(
                f"--draft {draft!r} must be a share kept, lookup, dense, or exit:N."
            ) from None
    tokens = int(draft_tokens) if draft_tokens.isdigit() else draft_tokens
    length_of(tokens)
    return {"draft_policy": policy, "draft_tokens": tokens}


def _encode(tokenizer: Any, prompt: str, chat: bool | None) -> Any:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ConfigError("--chat: this tokenizer has no chat template; use --no-chat.")
    if has_template and chat is not False:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    return tokenizer(prompt, return_tensors="pt")
