r"""Streaming ridge regression, and its best low-rank form.

Shapes: N tokens, F features (an intercept is added), Y targets, R rank.

Ridge: M = (XᵀX + ρ·diag)⁻¹ XᵀY, the intercept unpenalised. Reduced rank (Izenman 1975): among all
M of rank R the fitted values' squared error is least for the truncated SVD of G^{1/2} M, with
G = XᵀX of centred X. Products are float32, sums float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Moments"]


class Moments:
    """Second moments of features and targets, added up batch by batch.

    Args:
        features: F. targets: Y.
    """

    def __init__(self, features: int, targets: int) -> None:
        self.count = 0.0
        self.xx = torch.zeros(features + 1, features + 1, dtype=torch.float64)
        self.xy = torch.zeros(features + 1, targets, dtype=torch.float64)
        self.yy = torch.zeros(targets, dtype=torch.float64)

    def add(self, x_NF: Tensor, y_NY: Tensor) -> None:
        """Add tokens; any float dtype."""
        if x_NF.shape[0] == 0:
            return
        x = torch.nn.functional.pad(x_NF.float(), (0, 1), value=1.0)
        y = y_NY.float()
        self.count += x.shape[0]
        self.xx += (x.T @ x).double().to(self.xx.device)
        self.xy += (x.T @ y).double().to(self.xy.device)
        self.yy += y.square().sum(0).double().to(self.yy.device)

    def _centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean_x, mean_y = self.xx[:-1, -1] / self.count, self.xy[-1] / self.count
        gram = self.xx[:-1, :-1] - self.count * torch.outer(mean_x, mean_x)
        cross = self.xy[:-1] - self.count * torch.outer(mean_x, mean_y)
        return gram, cross, mean_x, mean_y

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(M [F, Y], intercept [Y]), float64.

        Args:
            ridge: penalty as a share of the features' mean variance.
        """
        gram, cross, mean_x, mean_y = self._centred()
        penalty = ridge * gram.diagonal().mean().clamp(min=1e-12)
        eye = torch.eye(gram.shape[0], dtype=gram.dtype)
        m = torch.linalg.solve(gram + penalty * eye, cross)
        return m, mean_y - mean_x @ m

    def solve_low_rank(self, ridge: float, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """(down [R, F], up [Y, R], intercept [Y]) of the best rank-R map, float64."""
        gram, cross, mean_x, mean_y = self._centred()
        penalty = ridge * gram.diagonal().mean().clamp(min=1e-12)
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp(min=0.0) + penalty
        # White features Z = X·V·Λ^{-1/2}: the best rank-R map of Z is the SVD of ZᵀY.
        whiten = vectors / values.sqrt()
        left, singular, right = torch.linalg.svd(whiten.T @ cross, full_matrices=False)
        rank = min(rank, singular.shape[0])
        root = singular[:rank].sqrt()
        down = (whiten @ (left[:, :rank] * root)).T
        up = right[:rank].T * root
        return down, up, mean_y - up @ (down @ mean_x)

    def mean_target(self) -> Tensor:
        """Mean of the targets, ``[Y]``."""
        return self.xy[-1] / self.count

    def r2(self, m_FY: Tensor, intercept_Y: Tensor) -> float:
        """Share of the targets' variance that the map explains, on the tokens added."""
        full = torch.cat([m_FY, intercept_Y[None]])
        error = self.yy - 2 * (full * self.xy).sum(0) + (full * (self.xx @ full)).sum(0)
        total = self.yy - self.count * self.mean_target().square()
        return float(1.0 - error.sum() / total.sum().clamp(min=1e-30))
