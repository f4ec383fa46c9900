"""Row and head kernels against the same sums in torch, both dtypes, one and several threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gateskip import kernels
from gateskip.errors import ConfigError
from gateskip.kernels import heads, rows

pytestmark = pytest.mark.skipif(not kernels.available(), reason="numba is not installed")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
N, H = 37, 50


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    step = 2**-7 if dtype == torch.bfloat16 else 1e-5  # one rounding may fall the other way
    torch.testing.assert_close(found.float(), expected.float(), atol=step, rtol=step)


def chosen() -> Tensor:
    return torch.arange(0, N, 3)


@dtypes
def test_score_and_norm(dtype: torch.dtype) -> None:
    h, w, gamma = normal(N, H, dtype=dtype) * 5, normal(H, seed=1), normal(H, dtype=dtype, seed=2)
    score, inverse = rows.score_rows(h, w, 0.3, 1e-5)
    expected = torch.rsqrt(h.float().square().mean(-1) + 1e-5)
    torch.testing.assert_close(inverse, expected, atol=0, rtol=1e-5)
    torch.testing.assert_close(score, h.float() @ w * expected + 0.3, atol=1e-4, rtol=1e-4)
    one_by_one = torch.cat([rows.score_rows(row[None], w, 0.3, 1e-5)[0] for row in h])
    assert torch.equal(score, one_by_one), "a token's score depends on its neighbours"
    u = rows.norm_rows(h, inverse, gamma, chosen(), 20)
    reference = gamma * (h.float() * expected[:, None]).to(dtype)
    close(u[:13], reference[chosen()], dtype)
    assert u.shape == (20, H)
    assert not u[13:].any(), "rows added are zero"
    close(rows.norm_rows(h, inverse, gamma, None, N), reference, dtype)


@dtypes
def test_join(dtype: torch.dtype) -> None:
    h, index = normal(N, H, dtype=dtype), chosen()
    o, u = normal(13, H, dtype=dtype, seed=1), normal(13, H, dtype=dtype, seed=2)
    w, z = normal(H, seed=3), normal(13, H, seed=4)
    scores = normal(N, seed=5)
    for g, given in (
        (torch.sigmoid(u.float() @ w + 0.5)[:, None], {"one": (u, w, 0.5)}),
        (torch.sigmoid(z), {"logits_MH": z}),
        (torch.sigmoid(scores[index] * 1.5 - 0.2)[:, None], {"scored": (scores, 1.5, -0.2)}),
    ):
        out = h.clone()
        rows.join_rows(out, out, o, index, **given)  # type: ignore[arg-type]
        expected = h.clone()
        expected[index] = (h[index].float() + g * o.float()).to(dtype)
        close(out, expected, dtype)
        untouched = torch.ones(N, dtype=torch.bool)
        untouched[index] = False
        assert torch.equal(out[untouched], h[untouched])


@dtypes
def test_add_and_swiglu(dtype: torch.dtype) -> None:
    h, c, bias = (normal(n, H, dtype=dtype, seed=n) for n in (N, 13, 1))
    for given in (c, None):
        out = h.clone()
        rows.add_rows_(out, given, bias[0], chosen())
        expected = h.float().clone()
        expected[chosen()] += bias.float() + (0 if given is None else given.float())
        close(out, expected, dtype)
    a, b = normal(5, H, dtype=dtype) * 4, normal(5, H, dtype=dtype, seed=1)
    expected = functional.silu(a) * b
    close(rows.swiglu_(a.clone(), b), expected, dtype)


def test_exponentials_hold_far_out_and_nan_stays() -> None:
    x = torch.tensor([-1e4, -100.0, -87.5, -1.0, 0.0, 1.0, 80.0, 1e4])
    found = rows.swiglu_(x.clone()[None], torch.ones(1, 8))[0]
    torch.testing.assert_close(found, functional.silu(x), atol=1e-30, rtol=1e-6)
    h = torch.ones(1, H)
    h[0, 3] = float("nan")
    score, _ = rows.score_rows(h, torch.ones(H), 0.0, 1e-5)
    assert bool(score.isnan()), "a NaN in the stream must not turn into a decision"


@dtypes
def test_rotate_and_gather(dtype: torch.dtype) -> None:
    batch, length, count, width = 2, 5, 6, 8
    x = normal(batch * length, count * width, dtype=dtype)
    cos, sin = (normal(length, width, dtype=dtype, seed=seed) for seed in (1, 2))
    token = torch.arange(batch * length)
    out = torch.empty(batch, count, length, width, dtype=dtype)
    place = (token // length * (count * length) + token % length) * width
    rotate: dict[str, Any] = {
        "source_R": None, "place_R": place, "token_R": token, "heads": count,
        "stride": length * width,
    }  # fmt: skip
    heads.rotate_heads(x, out, (cos, sin), **rotate)
    q = x.float().view(batch, length, count, width)
    half = torch.cat([-q[..., width // 2 :], q[..., : width // 2]], -1)
    c, s = (t.float()[None, :, None] for t in (cos, sin))
    close(out, (q * c + half * s).transpose(1, 2), dtype)
    gamma = normal(width, dtype=dtype, seed=3)
    straight = torch.ones_like(cos), torch.zeros_like(sin)
    heads.rotate_heads(x, out, straight, norm=(gamma, 1e-6), **rotate)
    normed = gamma * (q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
    close(out, normed.transpose(1, 2), dtype)
    target = torch.arange(batch * length).view(batch, length).flip(1).contiguous()
    target[0, 1] = -1
    back = torch.full_like(x, 7.0)
    heads.gather_heads(out, back, target)
    plain = normed.reshape(batch, length, -1)
    for b in range(batch):
        for i in range(length):
            row = int(target[b, i])
            if row >= 0:
                close(back[row], plain[b, i], dtype)
    assert bool((back[3] == 7.0).all()), "a dropped cell was written"


def test_choice_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.zeros(2, 2)
    assert not kernels.supported(t), "a graph is being recorded"
    with torch.no_grad():
        assert kernels.supported(t)
        assert not kernels.supported(t.T[:1].T)
        assert not kernels.supported(t.half())
        with kernels.using("torch"):
            assert not kernels.supported(t)
        with pytest.raises(ConfigError, match="cuda"), kernels.using("cuda"):
            pass
        monkeypatch.setattr(kernels, "available", lambda: False)
        assert kernels.backend() == "torch"
        with pytest.raises(ConfigError, match="gateskip\\[cpu\\]"), kernels.using("numba"):
            pass


@dtypes
@pytest.mark.parametrize("outputs", [64, 1001])
@torch.no_grad()
def test_a_few_rows_at_once_are_each_alone(dtype: torch.dtype, outputs: int) -> None:
    weight, x = normal(outputs, 96, dtype=dtype), normal(5, 96, dtype=dtype, seed=1)
    found = rows.matmul(weight, x)
    close(found, functional.linear(x.float(), weight.float()), dtype)
    for row in range(5):
        assert torch.equal(rows.matvec(weight, x[row]), found[row]), "to the bit"
        assert torch.equal(rows.matmul(weight, x[row : row + 1])[0], found[row])
