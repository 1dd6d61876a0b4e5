"What the notebooks of retrieval, the cost model and their benchmarks do not show: exactness against numpy for all shapes, FLOPs against torch's count, the tables that the benchmarks return."

import numpy as np
import pytest
import torch

from vlkd.core.settings import scale
from vlkd.retrieval.nearest import Keys, nearest
from vlkd.tools.cost import student_flops

bench = pytest.importorskip("vlkd.tools.bench_more", reason="the benchmarks need torch and the extra `video`")


def by_numpy(q, keys, k):
    return np.argsort(-(q.numpy() @ keys.numpy().T), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 9001])
@pytest.mark.parametrize("tile", [1000, 4096])
def test_the_best_are_those_of_a_full_sort_ties_included(n, tile):
    "Scores are small integers, exact in any order of summation, and tie by the thousand: in blocks, at their edges, at the last place, across tiles."
    r = torch.Generator().manual_seed(n)
    keys, q = (torch.randint(-1, 2, (m, 6), generator=r).float() for m in (n, 17))
    for k in {1, min(n, 3), min(n, 20), min(n, 200), n}:
        s, i = nearest(q, keys, k, normalize=False, tile=tile)
        want = by_numpy(q, keys, k)
        assert (i.numpy() == want).all() and torch.equal(s, (q @ keys.T).gather(1, torch.from_numpy(want)))
        assert all(
            torch.equal(a, b)
            for a, b in zip((s, i), nearest(q, Keys(keys, normalize=False, tile=7), k, tile=tile))
        )


def test_a_block_whose_maximum_ties_with_the_last_place_comes_after_it():
    keys = torch.zeros(64 * 64, 1)
    keys[[70, 1000, 3000, 4000]] = torch.tensor([[1.0], [2.0], [1.0], [1.0]])
    assert nearest(torch.ones(1, 1), keys, 3, normalize=False)[1].tolist() == [[1000, 70, 3000]]
    assert nearest(torch.ones(1, 1), keys, 6, normalize=False)[1].tolist() == [[1000, 70, 3000, 4000, 0, 1]]


def test_more_than_there_are_and_keys_made_otherwise_are_refused():
    x = torch.ones(5, 3)
    for k in (0, 6):
        with pytest.raises(ValueError, match="from 1 to the number of keys, 5"):
            nearest(x, x, k)
        with pytest.raises(ValueError, match="from 1 to the number of keys, 5"):
            nearest(x, Keys(x), k)
    with pytest.raises(ValueError, match=r"\(5, 3\) and keys \(N, D\), got|got \(5, 3\) and \(5, 2\)"):
        nearest(x, Keys(x[:, :2]))
    with pytest.raises(ValueError, match="made with normalize=False"):
        nearest(x, Keys(x, normalize=False), normalize=True)


@pytest.mark.parametrize("kd", ["", "nst+crd", "soft_label"])
@pytest.mark.parametrize(
    "shape",
    [dict(), dict(layers=3, hidden=48, heads=3, intermediate=100, dropout=0.1, batch=5, max_tokens=33)],
)
def test_predicted_flops_are_within_a_hundredth_of_the_count(kd, shape):
    s = scale("smoke", vocab_size=300, **shape)
    o, step, batch = bench.student_step(s, kd)
    step()
    if kd == "nst+crd":
        o.terms["crd"].loss.seen.fill_(s.crd_bank)
    assert sum(student_flops(s, kd, kernel="poly").values()) == pytest.approx(
        bench.counted_flops(o, batch), rel=0.01
    )
    assert sum(student_flops(s, kd, kernel="poly", tokens=s.max_tokens - 8).values()) != pytest.approx(
        bench.counted_flops(o, batch), rel=0.01
    )


def test_peak_memory_follows_what_is_allocated_and_says_why_a_process_failed():
    code = (
        "import numpy as np\nx = np.ones(300*2**20, np.uint8); del x; begin()\ny = np.ones(n*2**20, np.uint8)"
    )
    a, b = (bench.peak_growth(code, n=n)["bytes"] / 2**20 for n in (40, 90))
    assert b - a == pytest.approx(50, abs=4)
    with pytest.raises(RuntimeError, match="no such thing"):
        bench.peak_growth("raise KeyError('no such thing')")


def test_tables_of_the_benchmarks(monkeypatch):
    t = bench.retrieval_bench(True, sizes=(2000,), d=32, memory=False)
    assert (
        {"clips", "queries", "k", "way", "ms", "ms_q25", "ms_q75", "GFLOPs"} <= set(t.columns)
        and {"nearest", "Keys", "product alone", "full sort"} <= set(t.way)
        and (t.ms > 0).all()
    )
    assert t.attrs["wrong"] == 0 and t.attrs["goals"][0]["held"] and "thread" in t.attrs["method"]
    monkeypatch.setattr(bench, "_faiss", lambda: None)
    t = bench.retrieval_bench(True, sizes=(2000,), d=32, memory=False)
    assert (
        "faiss is not installed" in t.attrs["method"]
        and "faiss" not in set(t.way)
        and t.attrs["wrong"] == 0
        and t.attrs["goals"][1]["held"] is None
    )
    monkeypatch.setattr(bench, "peak_growth", lambda code, **kw: dict(bytes=10**7))
    c = bench.cost_bench(True, models=dict(smoke=(("smoke",), dict(vocab_size=300))))
    assert (
        list(c.quantity) == ["GFLOPs", "seconds", "GB"]
        and abs(c.error[0]) < 0.01
        and c.attrs["goals"][0]["held"]
    )
    grow = next(v for k, v in c.attrs["tables"].items() if "256 sequences a GPU" in k)
    assert set(grow.GPUs) == {1, 8, 64} and (grow.efficiency <= 1.001).all()


def test_table_of_extraction(monkeypatch):
    pytest.importorskip("av")
    from vlkd.features.encoders import GridPixels

    monkeypatch.setattr(bench, "_encoders", lambda: {"grid": (GridPixels(4), GridPixels(4))})
    t = bench.extraction_bench(True, films=dict(small=3, web=1), processes=False)
    assert (
        set(t.stage) == {"decode", "encode", "both, 1 process"}
        and set(t.films) == {"small", "web"}
        and (t.clips_s > 0).all()
        and t.attrs["method"].count("is the bottleneck") == 2
    )
