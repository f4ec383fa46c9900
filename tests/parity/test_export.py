"""Static export: a plain checkpoint has the logits of the masked form with branches off."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import gateskip
from gateskip.retrofit.attach import gate_of, gated_branches
from gateskip.skipping.compensation import compensation_of
from gateskip.skipping.policy import OFF, ThresholdTable
from gateskip.skipping.state import override, state_of
from models import FAMILIES, LAYERS, gated, random_ids, tiny

SOME = [(1, "attention"), (1, "mlp"), (2, "attention"), (3, "mlp")]


def with_off(model: Any, off: list[tuple[int, str]]) -> Any:
    """A table that switches branches off at keep=0.5, and skips nothing else."""
    state = state_of(model)
    row = tuple(OFF if key in off else -math.inf for key in state.branches)
    state.policy = ThresholdTable(
        allocation="searched", weigh_cost=True, keep=(1.0, 0.5), compute=(1.0, 0.5),
        thresholds=((-math.inf,) * len(state.branches), row), tokens=1000, mean_keys=8.0,
    )  # fmt: skip
    return model


@torch.no_grad()
def masked(model: Any, ids: torch.Tensor, off: list[tuple[int, str]]) -> torch.Tensor:
    state = state_of(model)
    thresholds = {key: OFF if key in off else -math.inf for key in state.branches}
    with override(state, thresholds=thresholds), gateskip.execution(model, "masked"):
        logits: torch.Tensor = model(ids).logits
    return logits


def plain(path: Path, model: Any) -> Any:
    options = {"attn_implementation": model.config._attn_implementation}
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_masked_form(family: str, tmp_path: Path) -> None:
    """Constant gates folded, one layer gone, two branches zero; also through a cache."""
    model = gateskip.attach(tiny(family), gateskip.GateConfig(kind="vector", init_std=0.0))
    generator = torch.Generator().manual_seed(4)
    for module in gated_branches(model, state_of(model).family).values():
        gate_of(module).bias.normal_(2.0, 1.0, generator=generator)
    ids = random_ids(2, 14)
    expected = masked(with_off(model, SOME), ids, SOME)
    gateskip.set_budget(model, keep=0.5)
    report = gateskip.export_static(model, tmp_path / "out")
    assert report.removed == tuple(SOME)
    assert (report.layers_removed, report.layers) == ((1,), LAYERS - 1)
    assert report.zeroed == ((2, "attention"), (3, "mlp"))
    assert 0.0 < report.macs_saved < 0.5
    exported = plain(tmp_path / "out", model)
    assert exported.config.num_hidden_layers == LAYERS - 1
    torch.testing.assert_close(exported(ids).logits, expected, atol=2e-5, rtol=1e-4)
    cache = exported(ids[:, :9], use_cache=True).past_key_values
    steps = [
        exported(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
        for at in range(9, 14)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), expected[:, 9:], atol=1e-4, rtol=1e-4)
    assert not any("skip_" in name for name in exported.state_dict())
    # The gated model is as it was.
    torch.testing.assert_close(masked(model, ids, SOME), expected, atol=0, rtol=0)


@torch.no_grad()
def test_what_has_no_place_is_named_or_left_out(tmp_path: Path) -> None:
    model = gated(compensation="low_rank")
    with pytest.raises(gateskip.UnsupportedError, match=r"gate values of 6 .*compensation of 2"):
        gateskip.export_static(model, tmp_path / "a", remove=[(1, "mlp"), (1, "attention")])
    assert not (tmp_path / "a").exists()
    report = gateskip.export_static(
        model, tmp_path / "a", remove=[(1, "mlp"), (1, "attention")], exact=False
    )
    assert len(report.left_out) == 2
    dense = gateskip.detach(model)
    dense.model.layers = torch.nn.ModuleList(
        layer for i, layer in enumerate(dense.model.layers) if i != 1
    )
    ids = random_ids(2, 9)
    expected = dense(ids, use_cache=False).logits
    assert torch.equal(plain(tmp_path / "a", dense)(ids, use_cache=False).logits, expected)
    assert compensation_of(dense.model.layers[0].mlp) is None


def test_layers_of_peft_are_merged_first(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(gated(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(gateskip.UnsupportedError, match="merge_and_unload"):
        gateskip.export_static(wrapped, tmp_path / "a", remove=[(0, "mlp")], exact=False)


def test_bad_input(tmp_path: Path) -> None:
    model = with_off(gated(), [])
    with pytest.raises(gateskip.BudgetError, match="always off"):
        gateskip.export_static(model, tmp_path / "a", budget=gateskip.Budget(keep=0.5))
    for bad in ([(9, "mlp")], [(0, "mpl")], []):
        with pytest.raises(gateskip.ConfigError, match="remove"):
            gateskip.export_static(model, tmp_path / "a", remove=bad)
    every = state_of(model).branches
    with pytest.raises(gateskip.ConfigError, match="no layer"):
        gateskip.export_static(model, tmp_path / "a", remove=every, exact=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(gateskip.OutputError, match="not empty"):
        gateskip.export_static(model, tmp_path / "full", remove=[(0, "mlp")], exact=False)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
