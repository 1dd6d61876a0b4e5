"Benchmarks: forms that are compared have one value, ratios are what they say, the page is written whole or not at all. No test looks at a time."

import copy
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from vlkd.core.settings import preset, scale
from vlkd.losses.crd import CRD
from vlkd.losses.kd import chunked_soft_label, nst, objective, soft_label
from vlkd.models.bert import QUICK_DROPOUT
from vlkd.tools import bench, bench_steps
from vlkd.tools.bench import (
    benchmarks,
    goal,
    interleave,
    machine,
    machine_stamp,
    peak_memory,
    publish_benchmarks,
    register,
    results_file,
    run_benchmarks,
    summary,
)
from vlkd.tools.bench_peer import (
    broadcast_nst,
    fill_queue,
    plain_crd,
    plain_nst,
    public_nst,
    public_nt_xent,
    STEP_LEVERS,
)
from vlkd.tools.bench_steps import (
    objective_forms,
    objective_rows,
    padded,
    peak_at,
    StopWatch,
    Workbench,
    worth,
)
from vlkd.train.text_student import StudentObjective
from vlkd.train.trainer import ObjectiveTrainer


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def with_grad(f, x, *more):
    x = x.clone().requires_grad_()
    v = f(x, *more)
    return v.detach(), torch.autograd.grad(v, x)[0]


READINGS = {
    "paper": preset("paper")["nst"],
    "released": preset("released")["nst"],
    "micro": preset("micro")["nst"],
    "raw": dict(normalize=None, sigma=2.0),
}


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (2, 7, 6, 3), (1, 2, 9, 5)])
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(
    "form",
    [plain_nst, broadcast_nst, lambda *a, **k: broadcast_nst(*a, loop=True, **k)],
    ids=["plain", "broadcast", "loop"],
)
def test_forms_of_nst(form, reading, shape):
    B, L, ds, dt = shape
    s, t, kw = rand(B, L, ds), rand(B, L, dt, seed=1), READINGS[reading]
    for a, b in zip(with_grad(lambda x: form(x, t, **kw), s), with_grad(lambda x: nst(x, t, **kw), s)):
        same(a, b, 1e-8)


@pytest.mark.parametrize("B, L, d", [(2, 3, 4), (5, 2, 3)])
def test_public_objectives(B, L, d):
    s, t = rand(B, L, d), rand(B, L, d, seed=1)
    for f, name in ((public_nst, "nst"), (public_nt_xent, "nt_xent")):
        for a, b in zip(with_grad(f, s, t), with_grad(objective(name, "released"), s, t)):
            same(a, b)


@pytest.mark.skipif(
    not os.environ.get("VLKD_GOLDEN"), reason="VLKD_GOLDEN does not name the folder of the peers' values"
)
def test_public_objectives_are_the_peers():
    def get(name):
        g = json.loads((Path(os.environ["VLKD_GOLDEN"]) / f"{name}.json").read_text())
        return g, *(torch.tensor(g[k], dtype=torch.float64) for k in ("s", "t"))

    g, s, t = get("nst_vidlankd")
    same(public_nst(s, t), torch.tensor(g["loss_as_trained"], dtype=torch.float64), 1e-9)
    g, s, t = get("contrastive_item_vidlankd")
    same(public_nt_xent(s, t), torch.tensor(g["loss_as_trained"], dtype=torch.float64), 1e-9)


def test_plain_crd():
    crd = fill_queue(CRD(5, 4, 3, negatives=7, bank_size=16).double()).eval()
    s, t = rand(6, 5), rand(6, 4, seed=1)
    i = crd._draw(16, 7)
    for a, b in zip(
        with_grad(lambda x: plain_crd(crd, x, t, i.expand(6, 7)), s), with_grad(lambda x: crd(x, t), s)
    ):
        same(a, b, 1e-7)
    assert not torch.equal(plain_crd(crd, s, t), plain_crd(crd, s, t)), "each sample draws its own negatives"
    twin = copy.deepcopy(crd).train()
    crd.train()
    plain_crd(crd, s, t)
    twin(s, t)
    assert torch.equal(crd.memory_v1, twin.memory_v1) and int(crd.seen) == int(twin.seen) == 22, (
        "what was seen is stored"
    )


@pytest.mark.parametrize("chunk", [1, 3, 10, 99])
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_soft_label(chunk, bias):
    x, w, y, v = rand(10, 4), rand(20, 4, seed=1), rand(10, 6, seed=2), rand(20, 6, seed=3)
    b, c = (rand(20, seed=4), rand(20, seed=5)) if bias else (None, None)
    leaves = [z.requires_grad_() for z in (x, w, b) if z is not None]
    want = 3 * soft_label(F.linear(x, w, b), F.linear(y, v, c), temperature=1.7)
    got = 3 * chunked_soft_label(x, w, b, y, v, c, temperature=1.7, chunk=chunk)
    same(got, want)
    [same(a, e) for a, e in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))]


def test_chunked_soft_label_in_half_precision_and_without_gradient():
    x, w, y, v = (
        z.bfloat16() for z in (rand(8, 4), rand(20, 4, seed=1), rand(8, 6, seed=2), rand(20, 6, seed=3))
    )
    want = soft_label(F.linear(x.double(), w.double()), F.linear(y.double(), v.double()))
    with torch.autocast("cpu", torch.bfloat16):
        w.requires_grad_()
        got = chunked_soft_label(x, w, None, y, v, chunk=3)
        got.backward()
    assert got.dtype == torch.float32 and w.grad.dtype == torch.bfloat16 and w.grad.isfinite().all()
    same(got.double(), want, 1e-5)
    with torch.no_grad():
        same(chunked_soft_label(x, w, None, y, v).double(), want, 1e-5)


def test_chunked_soft_label_takes_less_memory():
    x, w, y, v = (
        z.float() for z in (rand(256, 8), rand(2000, 8, seed=1), rand(256, 8, seed=2), rand(2000, 8, seed=3))
    )
    x.requires_grad_()
    whole, chunked = (
        peak_memory(lambda: f().backward())
        for f in (
            lambda: soft_label(F.linear(x, w), F.linear(y, v)),
            lambda: chunked_soft_label(x, w, None, y, v, chunk=16),
        )
    )
    assert whole > 3 * 4 * 256 * 2000 and chunked < whole / 8


@pytest.fixture(scope="module")
def desk():
    w = Workbench(scale("smoke", layers=1, dropout=0.0, max_tokens=12), 4, 12, "paper")
    w.lm.double(), w.teacher.double()
    return w


def loss_and_grads(o, w):
    o = o.double()
    fill_queue(o.crd) if hasattr(o, "crd") else None
    w.lm.zero_grad()
    l = o(**w.batch)["loss"]
    l.backward()
    return torch.cat([l.detach()[None], *(p.grad.flatten() for p in o.parameters() if p.requires_grad)])


@pytest.mark.parametrize("without", [*((k,) for k in STEP_LEVERS), tuple(STEP_LEVERS)], ids="+".join)
@pytest.mark.parametrize("form", ["loop", "plain"])
def test_levers_do_not_change_a_step(desk, without, form):
    same(
        loss_and_grads(desk.objective(without=without, nst_form=form, shared=True), desk),
        loss_and_grads(desk.objective(), desk),
        1e-6,
    )


def test_ours_is_the_student_objective(desk):
    o = desk.objective()
    torch.manual_seed(1)
    twin = StudentObjective(desk.lm, desk.teacher, "nst+crd", s=desk.s, args=desk.args)
    assert desk.args == preset("paper")
    same(loss_and_grads(o, desk), loss_and_grads(twin, desk))


def test_public_step_is_the_released_reading(desk):
    p = desk.objective("public").double()
    out = p(**desk.batch)
    h, t = (m.bert(desk.batch["masked"]).last_hidden_state for m in (desk.lm, desk.teacher))
    w = desk.batch["where"]
    same(out["mlm"], F.cross_entropy(desk.lm.cls(h)[w], desk.batch["ids"][w]))
    same(out["nst"], objective("nst", "released")(p.heads["nst"](h), t), 1e-8)
    same(out["nt_xent"], objective("nt_xent", "released")(p.heads["nt_xent"](h), t), 1e-8)
    assert len(p.seen) == 4


def test_a_batch_masks_as_many_tokens_in_each_sentence():
    w = Workbench(scale("smoke"), 3, 20)
    assert (
        (w.batch["where"].sum(1) == w.masked).all()
        and w.masked == round(0.15 * 18)
        and not w.batch["where"][:, [0, -1]].any()
    )


def test_steps_at_toy_size(monkeypatch, tmp_path):
    "The whole of benchmark 1, with a model that takes no time."
    monkeypatch.setenv("VLKD_RUNS", str(tmp_path))
    monkeypatch.setattr(
        bench_steps, "shapes_of", lambda quick: [("6L/512H", scale("smoke", dropout=0.1), 4, 12, "paper")]
    )
    said = []
    r = run_benchmarks(["steps"], quick=True, repeats=1, say=said.append)["results"]["steps"]
    v = {x["variant"]: x for x in r["rows"]}
    assert (
        {"public", "plain", "ours fp32"} <= set(v)
        and v["public"]["x public"] == 1
        and all(x["tokens/s"] == pytest.approx(48 / x["step s"]) for x in v.values())
    )
    g = {x["goal"]: x for x in r["goals"]}
    cpu = g["6L/512H against the public formulation, CPU, float32"]
    assert (
        cpu["held"] == (v["ours fp32"]["x public"] >= 4)
        and g["6L/512H against the public formulation, GPU"]["held"] is None
    )
    levers = {x["lever"]: x for x in r["tables"]["Worth of each lever"]["rows"]}
    assert (
        set(STEP_LEVERS.values()) <= set(levers)
        and levers["teacher under inference mode"]["in ours"] == "no"
        and f"| {cpu['measured']} |" in said[1]
    )


def test_options_of_a_lever_are_put_back():
    w = Workbench(scale("smoke"), 2, 8)
    worth("", w, 2, 8, repeats=1, seconds=1)
    assert w.lm.config._attn_implementation == w.teacher.config._attn_implementation == "sdpa"
    w = Workbench(scale("smoke", dropout=0.1), 2, 8)
    worth("", w, 2, 8, repeats=1, seconds=1)
    assert QUICK_DROPOUT == [True] and {m.p for m in w.lm.modules() if isinstance(m, torch.nn.Dropout)} == {
        0.1
    }


class Clock:
    now = 0.0

    def __call__(self):
        return self.now

    def work(self, *seconds):
        left = list(seconds)

        def f():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return f


def test_ratios_are_within_rounds():
    c = Clock()
    df = interleave({"a": c.work(10, 10, 40), "b": c.work(5, 2, 20)}, 3, warmup=0, clock=c).set_index(
        "variant"
    )
    assert (
        df.ratio["b"] == 2
        and df.ratio["a"] == 1
        and df["median"]["a"] / df["median"]["b"] == 2
        and (df.ratio_q25["b"], df.ratio_q75["b"]) == (2, 3.5)
    )
    assert df["median"]["b"] == 5 and (df.q25["b"], df.q75["b"]) == (3.5, 12.5)


def test_a_load_that_lasts_takes_nothing_from_a_ratio():
    load = [1, 9, 3, 1, 7]
    c = Clock()
    df = interleave(
        {"a": c.work(*(6 * x for x in load)), "b": c.work(*(2 * x for x in load))}, 5, warmup=0, clock=c
    ).set_index("variant")
    assert df.ratio["b"] == df.ratio_q25["b"] == df.ratio_q75["b"] == pytest.approx(3)


def test_every_round_runs_all_in_another_order():
    seen, c = [], Clock()
    interleave({k: (lambda k=k: seen.append(k)) for k in "abcd"}, 20, warmup=1, clock=c)
    rounds = [tuple(seen[i : i + 4]) for i in range(0, 84, 4)]
    assert all(sorted(r) == list("abcd") for r in rounds) and len(set(rounds)) > 5


def test_warmup_seconds_and_repeats(monkeypatch):
    c = Clock()
    assert interleave({"a": c.work(50, 1)}, 4, warmup=1, clock=c)["median"].tolist() == [1]
    for each, budget, want in ((1, 4.5, 5), (60, 1, 2), (1, None, 9)):
        c = Clock()
        assert interleave({"a": c.work(each)}, 9, warmup=0, seconds=budget, clock=c).rounds.tolist() == [want]
    monkeypatch.setattr(bench, "repeats_override", [3])
    c = Clock()
    assert interleave({"a": c.work(1)}, 9, clock=c).rounds.tolist() == [3]
    for a, msg in ((({}, 1), "no variants"), (({"a": len}, 0), "at least 1")):
        monkeypatch.setattr(bench, "repeats_override", [0])
        with pytest.raises(ValueError, match=msg):
            interleave(*a)


def test_collector_is_on_again_after_a_failure():
    import gc

    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0}, 1, warmup=0)
    assert gc.isenabled()


def test_summary_takes_another_base():
    df = interleave({"a": (c := Clock()).work(8), "b": c.work(2)}, 2, clock=c)
    assert summary(df.attrs["times"], "b").ratio.tolist() == [0.25, 1]


def test_peak_memory():
    x = torch.zeros(64, 1024)
    mb = x.nbytes
    at = lambda f: round(peak_memory(f) / mb, 1)
    assert (
        at(lambda: x + 1) == 1
        and at(lambda: (x + 1) + 1) == 2
        and at(lambda: x.add_(1)) == 0
        and at(lambda: [x + i for i in range(4)]) == 4
    )

    def released():
        a = x + 1
        b = a + 1
        del a
        del b
        return x + 2

    assert at(released) == 2 and at(released) == 2, "a second measurement says the same"


def test_peak_drawn_out():
    make = lambda n: lambda: torch.zeros(n, 50000) + 1
    assert abs(peak_at(make, 16, (1, 2)) - peak_at(make, 16)) < 1000


def test_memory_of_nst(desk):
    rows = {
        r["form"]: r
        for r in objective_rows("NST poly", 64, objective_forms(64, True, L=32, B=8)["NST poly"][0], 8, 1, 1)
    }
    b = rows["broadcast"]
    assert (
        b["peak MB"] * 1e6 > 2 * 8 * 64 * 64 * 32 * 4
        and b["x ours' memory"] > 5
        and rows["ours"]["of items"] == 8
        and b["items"] == 1
    )


def test_stopwatch_puts_everything_back():
    from accelerate import Accelerator
    from transformers import Trainer

    before = [
        ObjectiveTrainer.__dict__["compute_loss"],
        Trainer.__dict__["training_step"],
        Accelerator.__dict__["backward"],
    ]
    with pytest.raises(ZeroDivisionError), StopWatch():
        assert ObjectiveTrainer.__dict__["compute_loss"] is not before[0]
        1 / 0
    assert before == [
        ObjectiveTrainer.__dict__["compute_loss"],
        Trainer.__dict__["training_step"],
        Accelerator.__dict__["backward"],
    ]


def test_stopwatch_counts_parts_once():
    w = StopWatch()
    inner = w.wrap(lambda: sum(range(20000)), "backward")
    outer = w.wrap(lambda: [inner() for _ in range(3)], "forward")
    outer()
    assert w.t["backward"] == 0 < w.t["forward"]


def test_padded_puts_the_function_back():
    import vlkd.train.text_student as a

    old = a.hidden_states
    with padded():
        assert a.hidden_states is not old
    assert a.hidden_states is old


@pytest.fixture
def toy(monkeypatch, tmp_path):
    "A benchmark of its own, with folders of its own."
    monkeypatch.setenv("VLKD_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("VLKD_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setattr(bench, "BENCHMARKS", {})
    monkeypatch.setattr(bench, "MODULES", ())

    @bench.register("toy", "A <toy> | of 2")
    def toy(quick):
        df = pd.DataFrame({"what": ["a", "b|c"], "x": [1 / 3, np.nan], "n": [1, 2]})
        df.attrs = dict(
            method="As is.",
            goals=[goal("fast", 2.5, at_least=2), goal("small", None, at_most=1, unit=" GB")],
            tables={"More": pd.DataFrame({"s": [12345.678]})},
        )
        return df

    return toy


def test_a_quick_run_of_all_leaves_out_what_is_long(toy):
    ran = []

    @bench.register("long", "Long", quick=False)
    def long(quick):
        ran.append(quick)
        return pd.DataFrame(dict(x=[1.0]))

    run_benchmarks(quick=True, say=list().append)
    assert ran == []
    run_benchmarks(say=list().append)
    run_benchmarks(["long"], quick=True, say=list().append)
    assert ran == [False, True]


def test_names():
    assert {"steps", "objectives", "micro"} <= set(benchmarks())
    with pytest.raises(ValueError, match="unknown benchmark 'step'; did you mean 'steps'"):
        run_benchmarks(["step"], quick=True)
    with pytest.raises(ValueError, match="there is a benchmark 'steps' already"):
        register("steps", "")(lambda quick: None)


def test_a_module_that_does_not_import_is_no_module_that_is_missing(monkeypatch, tmp_path):
    (tmp_path / "half_done.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(bench, "MODULES", ("half_done",))
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        benchmarks()
    monkeypatch.setattr(bench, "MODULES", ("not_there_at_all",))
    benchmarks()


def test_goals():
    assert [goal("g", m, at_least=2)["held"] for m in (2, 1.99, None, float("nan"))] == [
        True,
        False,
        None,
        None,
    ] and [goal("g", m, at_most=2)["held"] for m in (2, 2.01)] == [True, False]
    assert (
        goal("g", 2.345, at_least=2)["measured"] == "2.35x"
        and goal("g", 0.5, at_most=0.1, unit="")["asked"] == "at most 0.1"
    )


def test_results_are_filed_one_by_one(toy):
    r = run_benchmarks(quick=True, say=lambda s: None)
    f = json.loads(results_file(quick=True).read_text())
    assert (
        f["results"]["toy"]["rows"] == [dict(what="a", x=1 / 3, n=1), dict(what="b|c", x=None, n=2)]
        and f["machine"] == machine()
    )
    assert f["results"]["toy"]["quick"] and not r["failed"] and f["results"]["toy"]["goals"][0]["held"]

    @bench.register("other", "Other")
    def other(quick):
        raise RuntimeError("no luck")

    r = run_benchmarks(quick=True, say=lambda s: None)
    assert (
        r["failed"] == {"other": "RuntimeError: no luck"}
        and set(json.loads(results_file(quick=True).read_text())["results"]) == {"toy"}
        and not results_file().exists()
    )


def test_a_quick_run_takes_nothing_from_a_full_one(toy):
    run_benchmarks(quick=True, say=lambda s: None)
    assert "Quick run of" in (publish_benchmarks() / "README.md").read_text()
    run_benchmarks(say=lambda s: None)
    run_benchmarks(quick=True, say=lambda s: None)
    md = (publish_benchmarks() / "README.md").read_text()
    assert "Full run of" in md and "Quick run of" not in md


def test_repeats_reach_a_benchmark_and_no_further(toy):
    @bench.register("times", "Times")
    def times(quick):
        return interleave({"a": lambda: None}, 9)

    assert (
        run_benchmarks(["times"], repeats=2, say=lambda s: None)["results"]["times"]["rows"][0]["rounds"] == 2
        and run_benchmarks(["times"], say=lambda s: None)["results"]["times"]["rows"][0]["rounds"] == 9
    )
    with pytest.raises(ValueError, match="repeats should be 0"):
        run_benchmarks(["times"], repeats=-1)


def test_page_says_what_was_filed(toy):
    run_benchmarks(say=lambda s: None)
    d = publish_benchmarks()
    md, page = (d / "README.md").read_text(), (d / "index.html").read_text()
    m = machine()
    assert (
        "| toy: fast | at least 2x | 2.5x | yes |" in md
        and "| toy: small | at most 1 GB | not measured here | – |" in md
        and "| a | 0.333 | 1 |" in md
        and "| b\\|c | – | 2 |" in md
        and "12,346" in md
    )
    assert (
        f"torch {m['versions']['torch']}" in md
        and m["cpu"] in md
        and f"{m['threads']} threads" in md
        and "A &lt;toy&gt; | of 2" in page
        and "Full run of" in md
    )
    assert (
        pd.read_csv(d / machine_stamp() / "toy.csv").x[0] == 1 / 3
        and (d / machine_stamp() / "toy-more.csv").is_file()
    )
    for l in __import__("re").findall(r"\]\(([^)]+)\)", md):
        assert (d / l).is_file(), l


def test_page_keeps_other_machines(toy):
    run_benchmarks(say=lambda s: None)
    d = publish_benchmarks()
    rec = json.loads((d / f"{machine_stamp()}.json").read_text())
    rec["machine"]["device"] = "NVIDIA Z9"
    (d / "z9.json").write_text(json.dumps(rec))
    publish_benchmarks()
    md = (d / "README.md").read_text()
    assert "NVIDIA Z9" in md and machine()["cpu"] in md and (d / "z9" / "toy.csv").is_file()


@pytest.mark.parametrize("what", ["to_csv", "rename"])
def test_page_is_whole_or_as_it_was(toy, monkeypatch, what):
    run_benchmarks(say=lambda s: None)
    d = publish_benchmarks()
    before = {p.name: p.read_bytes() for p in d.glob("*.*")}
    (d / "README.md").write_text("before")

    def broken(*a, **k):
        raise OSError("No space left on device")

    if what == "to_csv":
        monkeypatch.setattr(pd.DataFrame, "to_csv", broken)
    else:
        rename, n = os.rename, [0]

        def second(*a):
            n[0] += 1
            return broken() if n[0] == 2 else rename(*a)

        monkeypatch.setattr(bench.os, "rename", second)
    with pytest.raises(OSError, match="No space left"):
        publish_benchmarks()
    assert (
        (d / "README.md").read_text() == "before"
        and sorted(p.name for p in d.glob("*.*")) == sorted(before)
        and [p.name for p in d.parent.iterdir()] == ["bench"]
    ), "nothing half-written stays behind"


def test_nothing_to_publish(toy):
    with pytest.raises(ValueError, match="nothing to publish"):
        publish_benchmarks()


@pytest.mark.parametrize(
    "args, code, text",
    [
        (["bench", "nosuch"], 2, "unknown benchmark 'nosuch'"),
        (["bench", "--list"], 0, "steps"),
        (["bench", "steps", "--repeats", "-1"], 2, "repeats should be 0"),
    ],
)
def test_command(args, code, text, capsys):
    from vlkd.tools.cli import main

    with pytest.raises(SystemExit) as e:
        main(args)
    out = capsys.readouterr()
    assert e.value.code == code and text in out.out + out.err


def test_command_says_that_a_benchmark_failed(toy, capsys):
    from vlkd.tools.cli import main

    @bench.register("broken", "Broken")
    def broken(quick):
        raise RuntimeError("no luck")

    with pytest.raises(SystemExit) as e:
        main(["bench", "broken", "--publish"])
    assert (
        e.value.code == 1
        and "broken failed: RuntimeError: no luck" in capsys.readouterr().err
        and not (Path(os.environ["VLKD_REPORTS"]) / "bench").exists()
    )
