"""Row counts that PyTorch's matrix products like.

On a CPU, products of 16-bit floats go through oneDNN, which builds a program per shape: 4 ms for a
row count never seen before, against 0.5 ms for the product. Kept tokens come in any number, so the
number of rows is rounded up to one of about a hundred; the rows added are zeros, and are counted.
That many row counts times a model's products, trained at changing budgets, are more programs than
oneDNN keeps (1,024): training took 1.6 times as long. It reads the limit once, at its first
product; a user's own setting stays.
"""

from __future__ import annotations

import os

import torch

__all__ = ["repeated", "rounded_rows"]

EXACT = 16
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")


def rounded_rows(rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """``rows``, rounded up by at most a thirty-second (or by 15) where shapes are expensive.

    Where a graph is recorded by at most a sixteenth: a backward pass has three times the shapes.
    """
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if device.type != "cpu" or dtype == torch.float32 or rows <= EXACT:
        return rows
    parts = 16 if torch.is_grad_enabled() else 32
    step = max(EXACT, (1 << (rows.bit_length() - 1)) // parts)
    return -(-rows // step) * step


def repeated(index_M: torch.Tensor, rows: int) -> torch.Tensor:
    """``index_M`` with its last entry repeated up to ``rows`` entries."""
    more = rows - index_M.shape[0]
    return index_M if more <= 0 else torch.cat((index_M, index_M[-1:].expand(more)))
