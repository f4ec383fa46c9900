"""Row counts that PyTorch's matrix products like.

On a CPU, products of 16-bit floats go through oneDNN, which builds a program per shape: 4 ms for a
row count never seen before, against 0.5 ms for the product. Kept tokens come in any number, so the
number of rows is rounded up to one of about a hundred; the rows added are zeros, and are counted.
"""

from __future__ import annotations

import torch

__all__ = ["rounded_rows"]

EXACT = 16


def rounded_rows(rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """``rows``, rounded up by at most a thirty-second (or by 15) where shapes are expensive."""
    if device.type != "cpu" or dtype == torch.float32 or rows <= EXACT:
        return rows
    step = max(EXACT, (1 << (rows.bit_length() - 1)) // 32)
    return -(-rows // step) * step
