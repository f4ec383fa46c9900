"""The loss at the head, and its gradients, against the whole written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gateskip.training.head_loss import CHUNK, head_loss

HIDDEN, VOCAB = 16, 50


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("distill", [0.0, 0.3])
def test_by_chunks_is_the_whole(distill: float, trained: bool) -> None:
    n = CHUNK + 37
    head = nn.Linear(HIDDEN, VOCAB, bias=False).requires_grad_(trained)
    h = torch.randn(n, HIDDEN, requires_grad=True)
    teacher, target = torch.randn(n, HIDDEN), torch.randint(0, VOCAB, (n,))
    logits = head(h)
    entropy = cross_entropy(logits, target, reduction="sum")
    p = head(teacher).softmax(-1).detach()
    divergence = (p * (p.log() - logits.log_softmax(-1))).sum() if distill else torch.zeros(())
    expected = (1 - distill) * entropy + distill * divergence
    (3.0 * expected).backward()
    assert h.grad is not None
    wanted, h.grad = h.grad, None
    of_head, head.weight.grad = head.weight.grad, None
    total, *parts = head_loss(head, h, target, teacher, distill)
    (3.0 * total).backward()
    torch.testing.assert_close(total, expected, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(parts[0], entropy)
    torch.testing.assert_close(parts[1], divergence, atol=1e-3, rtol=1e-4)
    assert not parts[0].requires_grad
    torch.testing.assert_close(h.grad, wanted, atol=1e-5, rtol=1e-4)
    if trained:
        torch.testing.assert_close(head.weight.grad, of_head, atol=1e-3, rtol=1e-4)
    else:
        assert head.weight.grad is None


def test_another_teachers_head_is_asked() -> None:
    head, other = nn.Linear(HIDDEN, VOCAB), nn.Linear(HIDDEN, VOCAB)
    h, target = torch.randn(5, HIDDEN), torch.randint(0, VOCAB, (5,))
    same = head_loss(head, h, target, h, 0.5)[2]
    assert abs(float(same)) < 1e-4
    assert float(head_loss(head, h, target, h, 0.5, other)[2]) > 1e-2


def test_nothing_labelled_still_has_a_graph() -> None:
    h = torch.randn(0, HIDDEN, requires_grad=True)
    total, *_ = head_loss(nn.Linear(HIDDEN, VOCAB), h, torch.zeros(0, dtype=torch.int64))
    total.backward()
    assert total.item() == 0.0
    assert h.grad is not None


def test_bfloat16_and_no_graph() -> None:
    head = nn.Linear(HIDDEN, VOCAB).bfloat16()
    h, target = torch.randn(9, HIDDEN).bfloat16(), torch.randint(0, VOCAB, (9,))
    with torch.no_grad():
        total, entropy, _ = head_loss(head, h, target)
    assert total.dtype == torch.float32
    assert not total.requires_grad
    torch.testing.assert_close(total, entropy)
    expected = cross_entropy(head(h).float(), target, reduction="sum")
    torch.testing.assert_close(total, expected, atol=1e-3, rtol=1e-3)
