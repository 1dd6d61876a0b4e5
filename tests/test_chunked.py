"The chunked soft label is the soft label of whole logits, in less memory."

import pytest
import torch
import torch.nn.functional as F

from vlkd.losses.kd import chunked_soft_label, soft_label
from vlkd.tools.bench import peak_memory


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("chunk", [1, 3, 10, 99])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradient(chunk, bias):
    x, w, y, v = rand(10, 4), rand(20, 4, seed=1), rand(10, 6, seed=2), rand(20, 6, seed=3)
    b, c = (rand(20, seed=4), rand(20, seed=5)) if bias else (None, None)
    leaves = [z.requires_grad_() for z in (x, w, b) if z is not None]
    want = 3 * soft_label(F.linear(x, w, b), F.linear(y, v, c), temperature=1.7)
    got = 3 * chunked_soft_label(x, w, b, y, v, c, temperature=1.7, chunk=chunk)
    assert_same(got, want)
    gradients = (torch.autograd.grad(loss, leaves) for loss in (got, want))
    for a, e in zip(*gradients, strict=True):
        assert_same(a, e)


def test_half_precision_and_no_gradient():
    shapes = [(8, 4), (20, 4), (8, 6), (20, 6)]
    x, w, y, v = (rand(*shape, seed=i).bfloat16() for i, shape in enumerate(shapes))
    want = soft_label(F.linear(x.double(), w.double()), F.linear(y.double(), v.double()))
    w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = chunked_soft_label(x, w, None, y, v, chunk=3)
        got.backward()
    assert got.dtype == torch.float32
    assert w.grad.dtype == torch.bfloat16
    assert w.grad.isfinite().all()
    assert_same(got.double(), want, 1e-5)
    with torch.no_grad():
        assert_same(chunked_soft_label(x, w, None, y, v).double(), want, 1e-5)


def test_memory():
    shapes = [(256, 8), (2000, 8), (256, 8), (2000, 8)]
    x, w, y, v = (rand(*shape, seed=i).float() for i, shape in enumerate(shapes))
    x.requires_grad_()
    whole = peak_memory(lambda: soft_label(F.linear(x, w), F.linear(y, v)).backward())
    chunked = peak_memory(lambda: chunked_soft_label(x, w, None, y, v, chunk=16).backward())
    assert whole > 3 * 4 * 256 * 2000
    assert chunked < whole / 8
