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
        device: where tokens come from. Sums stay there while a fifth of its memory is left, else on
            the CPU; solutions are computed there and returned on the CPU.
    """

    def __init__(self, features: int, targets: int, device: torch.device | str = "cpu") -> None:
        self.count = 0.0
        self.device = torch.device(device)
        place = _place(self.device, 8 * (features + 1) * (features + 1 + targets))
        like = {"dtype": torch.float64, "device": place}
        self.xx = torch.zeros(features + 1, features + 1, **like)  # type: ignore[call-overload]
        self.xy = torch.zeros(features + 1, targets, **like)  # type: ignore[call-overload]
        self.yy = torch.zeros(targets, **like)  # type: ignore[call-overload]

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

    def include(self, other: Moments) -> None:
        """Add the tokens of another."""
        self.count += other.count
        for mine, more in ((self.xx, other.xx), (self.xy, other.xy), (self.yy, other.yy)):
            mine += more.to(mine.device)

    def _centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        xx, xy = self.xx.to(self.device), self.xy.to(self.device)
        mean_x, mean_y = xx[:-1, -1] / self.count, xy[-1] / self.count
        gram = xx[:-1, :-1] - self.count * torch.outer(mean_x, mean_x)
        gram = (gram + gram.T) / 2  # some libraries' float32 XᵀX is not quite symmetric
        cross = xy[:-1] - self.count * torch.outer(mean_x, mean_y)
        return gram, cross, mean_x, mean_y

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(M [F, Y], intercept [Y]), float64.

        Args:
            ridge: penalty as a share of the features' mean variance.
        """
        gram, cross, mean_x, mean_y = self._centred()
        penalty = ridge * gram.diagonal().mean().clamp(min=1e-12)
        m = torch.linalg.solve(gram + penalty * torch.eye(gram.shape[0]).to(gram), cross)
        return m.cpu(), (mean_y - mean_x @ m).cpu()

    def solve_low_rank(self, ridge: float, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """(down [R, F], up [Y, R], intercept [Y]) of the best rank-R map, float64."""
        gram, cross, mean_x, mean_y = self._centred()
        penalty = ridge * gram.diagonal().mean().clamp(min=1e-12)
        # White features Z = X·W with WᵀGW = 1: the best rank-R map of Z is the SVD of ZᵀY.
        whiten = _whitening(gram, penalty)
        left, singular, right = _leading(whiten.T @ cross, rank)
        root = singular.sqrt()
        down = (whiten @ (left * root)).T
        up = right.T * root
        return down.cpu(), up.cpu(), (mean_y - up @ (down @ mean_x)).cpu()

    def mean_target(self) -> Tensor:
        """Mean of the targets, ``[Y]``."""
        return (self.xy[-1] / self.count).cpu()

    def r2(self, m_FY: Tensor, intercept_Y: Tensor) -> float:
        """Share of the targets' variance that the map explains, on the tokens added."""
        full = torch.cat([m_FY, intercept_Y[None]]).to(self.xx.device)
        error = self.yy - 2 * (full * self.xy).sum(0) + (full * (self.xx @ full)).sum(0)
        total = self.yy - self.count * self.mean_target().to(self.yy.device).square()
        return float(1.0 - error.sum() / total.sum().clamp(min=1e-30))


def _place(device: torch.device, size: int) -> torch.device:
    if device.type != "cuda":
        return torch.device("cpu")
    free, total = torch.cuda.mem_get_info(device)
    return device if free - size > total // 5 else torch.device("cpu")


def _whitening(gram: Tensor, penalty: Tensor) -> Tensor:
    """W with Wᵀ(G + penalty)W = 1, float64 ``[F, F]``."""
    eye = torch.eye(gram.shape[0]).to(gram)
    lower, failed = torch.linalg.cholesky_ex(gram + penalty * eye)
    if not bool(failed):
        return torch.linalg.solve_triangular(lower.T, eye, upper=True)
    # Float32 products left an eigenvalue below 0 by more than the penalty.
    values, vectors = torch.linalg.eigh(gram)
    return vectors / (values.clamp(min=0.0) + penalty).sqrt()


def _leading(a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``rank`` (or all) singular triples (U, S, Vᵀ) of a matrix.

    Of a matrix much larger than that by subspace iteration (Halko, Martinsson and Tropp 2011,
    algorithm 4.4) from a fixed start: a full decomposition takes minutes for a branch of a large
    model.
    """
    rank = min(rank, *a.shape)
    columns = 2 * rank + 16
    if min(a.shape) < 4 * columns:
        left, singular, right = torch.linalg.svd(a, full_matrices=False)
        return left[:, :rank], singular[:rank], right[:rank]
    start = torch.randn(a.shape[1], columns, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(a @ start.to(a)).Q
    for _ in range(8):
        basis = torch.linalg.qr(a @ torch.linalg.qr(a.T @ basis).Q).Q
    left, singular, right = torch.linalg.svd(basis.T @ a, full_matrices=False)
    return (basis @ left)[:, :rank], singular[:rank], right[:rank]
