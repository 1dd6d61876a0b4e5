"Exact retrieval: the answers of a full sort, ties included."

import numpy as np
import pytest
import torch

from vlkd.retrieval.nearest import KeyIndex, nearest


def by_sorting(queries, keys, k):
    return np.argsort(-(queries.numpy() @ keys.numpy().T), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 9001])
@pytest.mark.parametrize("tile", [1000, 4096])
@pytest.mark.parametrize("flat_from", [1, 128_000])
def test_the_best_are_those_of_a_full_sort_ties_included(n, tile, flat_from, monkeypatch):
    "Scores are small integers, exact in any order of summation; they tie in many places."
    monkeypatch.setattr("vlkd.retrieval.nearest.FLAT_FROM", flat_from)
    generator = torch.Generator().manual_seed(n)
    keys, queries = (torch.randint(-1, 2, (m, 6), generator=generator).float() for m in (n, 17))
    ready = KeyIndex(keys, normalize=False)
    for k in {1, min(n, 3), min(n, 20), min(n, 200), n}:
        scores, found = nearest(queries, keys, k, normalize=False, tile=tile)
        want = by_sorting(queries, keys, k)
        assert (found.numpy() == want).all()
        assert torch.equal(scores, (queries @ keys.T).gather(1, torch.from_numpy(want)))
        again = nearest(queries, ready, k, tile=tile)
        assert torch.equal(scores, again[0])
        assert torch.equal(found, again[1])


def test_what_ties_for_the_last_place_comes_in_order():
    keys = torch.zeros(64 * 64, 1)
    keys[[70, 1000, 3000, 4000]] = torch.tensor([[1.0], [2.0], [1.0], [1.0]])
    assert nearest(torch.ones(1, 1), keys, 3, normalize=False)[1].tolist() == [[1000, 70, 3000]]
    assert nearest(torch.ones(1, 1), keys, 6, normalize=False)[1].tolist() == [[1000, 70, 3000, 4000, 0, 1]]


@pytest.mark.parametrize("k", [1, 2, 5, 40])
@pytest.mark.parametrize("kind", ["random", "half copies", "all ties"])
def test_faiss_and_torch_give_equal_answers(k, kind, monkeypatch):
    pytest.importorskip("faiss", reason="faiss is not installed: torch alone searches")
    generator = torch.Generator().manual_seed(7)
    keys, queries = torch.randn(700, 16, generator=generator), torch.randn(300, 16, generator=generator)
    if kind == "half copies":
        keys[1::2] = keys[::2]
    if kind == "all ties":
        keys, queries = (torch.randint(-1, 2, x.shape, generator=generator).float() for x in (keys, queries))
    options = dict(normalize=kind == "random")
    monkeypatch.setattr("vlkd.retrieval.nearest.FLAT_FROM", 1)
    by_faiss = nearest(queries, keys, k, **options)
    monkeypatch.setattr("vlkd.retrieval.nearest._flat_index", lambda rows: None)
    by_torch = nearest(queries, keys, k, **options)
    torch.testing.assert_close(by_faiss[0], by_torch[0], atol=1e-5, rtol=0)
    assert torch.equal(by_faiss[1], by_torch[1])


def test_what_is_refused():
    x = torch.ones(5, 3)
    for k in (0, 6):
        for keys in (x, KeyIndex(x)):
            with pytest.raises(ValueError, match="from 1 to the number of keys, 5"):
                nearest(x, keys, k)
    with pytest.raises(ValueError, match=r"\(5, 3\) and keys \(N, D\), got|got \(5, 3\) and \(5, 2\)"):
        nearest(x, KeyIndex(x[:, :2]))
    with pytest.raises(ValueError, match="made with normalize=False"):
        nearest(x, KeyIndex(x, normalize=False), normalize=True)
