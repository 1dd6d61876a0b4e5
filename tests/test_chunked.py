"The chunked soft label: half precision and memory; its notebook has value and gradients."

import torch
import torch.nn.functional as F

from vlkd.losses.kd import chunked_soft_label, soft_label
from vlkd.tools.bench import peak_memory


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


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
