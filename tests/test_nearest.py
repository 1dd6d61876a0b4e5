"Exact retrieval: the answers of a full sort, ties included."

import numpy as np
import pytest
import torch

from vlkd.retrieval.nearest import KeyIndex, nearest


def by_sorting(queries, keys, k):
    return np.argsort(-(queries.numpy() @ keys.numpy().T), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 9001])
@pytest.mark.parametrize("tile", [1000, 4096])
def test_the_best_are_those_of_a_full_sort_ties_included(n, tile):
    "Scores are small integers, exact in any order of summation; they tie in blocks, at edges, across tiles."
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


def test_a_block_whose_maximum_ties_with_the_last_place_comes_after_it():
    keys = torch.zeros(64 * 64, 1)
    keys[[70, 1000, 3000, 4000]] = torch.tensor([[1.0], [2.0], [1.0], [1.0]])
    assert nearest(torch.ones(1, 1), keys, 3, normalize=False)[1].tolist() == [[1000, 70, 3000]]
    assert nearest(torch.ones(1, 1), keys, 6, normalize=False)[1].tolist() == [[1000, 70, 3000, 4000, 0, 1]]


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
