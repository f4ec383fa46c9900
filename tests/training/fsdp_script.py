# ruff: noqa: E402
"""A step under ``fully_shard`` on two CPU processes against the unsharded one: ``FOLDER``."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import pytest
import torch
from torch import distributed

import gateskip
from gateskip.errors import UnsupportedError
from gateskip.execution.api import dense
from gateskip.skipping.state import override, state_of
from gateskip.training.sharding import average_added, shard
from models import gated, medians, random_ids, tiny

ROWS = 4


def loss_of(model: torch.nn.Module, ids: torch.Tensor, thresholds: dict, mode: str) -> torch.Tensor:
    """A loss of every position, at decisions that differ by row."""
    with override(state_of(model), thresholds=thresholds), gateskip.execution(model, mode):
        return model(ids, use_cache=False).logits.square().mean()


def main(folder: Path) -> None:
    """Compare loss, gradients and the saved checkpoint."""
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    mesh = distributed.device_mesh.init_device_mesh("cpu", (world,))
    whole = gated(compensation="low_rank", protected_first=2)
    thresholds = medians(whole)
    sharded = shard(copy.deepcopy(whole), mesh)
    # The second process's rows are so short that none of their tokens may be skipped.
    parts = [random_ids(ROWS, 14, seed=1), random_ids(ROWS, 2, seed=2)]
    for mode in ("compacted", "masked"):
        whole.zero_grad()
        sharded.zero_grad()
        losses = [loss_of(whole, part, thresholds, mode) for part in parts]
        (sum(losses) / world).backward()
        mine = loss_of(sharded, parts[rank], thresholds, mode)
        torch.testing.assert_close(mine, losses[rank], atol=1e-5, rtol=1e-5)
        mine.backward()
        average_added(sharded)
        expected = dict(whole.named_parameters())
        for name, parameter in sharded.named_parameters():
            grad = parameter.grad
            assert grad is not None, name
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            other = expected[name].grad
            other = torch.zeros_like(grad) if other is None else other
            error = float((grad - other).abs().max())
            assert error <= 1e-5 + 1e-4 * float(other.abs().max()), (mode, name, error)
            if ".skip_" in name:
                assert not hasattr(parameter, "full_tensor"), "gates stay whole"
                assert parameter.dtype == torch.float32
    with pytest.raises(UnsupportedError, match="before it is"), dense(sharded):
        pass
    state_of(sharded).backbone_trained = True
    gateskip.save(sharded, folder / "gates")
    distributed.barrier()
    if rank == 0:
        again = gateskip.load(folder / "gates", base=tiny())
        with torch.no_grad():
            found, wanted = (m.eval()(parts[0]).logits for m in (again, whole))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        (folder / "done").write_text("done")
    distributed.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
