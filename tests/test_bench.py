"Benchmarks: forms that are compared have one value, ratios are what they say. No test looks at a time."

import copy
import gc
import json
import os
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from toys import cell

from vlkd.core.records import run_folder
from vlkd.core.settings import path, preset, scale
from vlkd.losses.crd import CRD
from vlkd.losses.kd import nst, objective
from vlkd.models.bert import QUICK_DROPOUT
from vlkd.tools import bench
from vlkd.tools.bench import (
    begin_benchmark,
    benchmarks,
    interleave,
    machine,
    machine_stamp,
    peak_memory,
    publish_benchmarks,
    record_benchmark,
    run_benchmarks,
    summary,
    target,
)
from vlkd.tools.cli import main
from vlkd.train.text_student import StudentObjective

sys.path.append(str(path("nbs") / "benchmarks"))
from peer import (
    TRAINING_OPTIONS,
    broadcast_nst,
    fill_queues,
    loop_nst,
    plain_crd,
    plain_nst,
    public_nst,
    public_nt_xent,
)
from resident import peak_growth
from workbench import StepInProcess, Workbench, attention, dropout_rate, torch_dropout

# ---- the peer's formulation and plain forms


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def with_gradient(function, x, *more):
    x = x.clone().requires_grad_()
    value = function(x, *more)
    return torch.cat([value.detach()[None], torch.autograd.grad(value, x)[0].flatten()])


KERNELS = {name: preset(name)["nst"] for name in ("paper", "released", "tuned")}
KERNELS["raw"] = dict(normalize=None, sigma=2.0)


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (2, 7, 6, 3), (1, 2, 9, 5)])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", [plain_nst, broadcast_nst, loop_nst])
def test_forms_of_nst(form, kernel, shape):
    B, L, student_width, teacher_width = shape
    s, t = rand(B, L, student_width), rand(B, L, teacher_width, seed=1)

    def value(f):
        return with_gradient(lambda x: f(x, t, **KERNELS[kernel]), s)

    assert_same(value(form), value(nst), 1e-8)


def test_plain_nst_leaves_padding_out():
    s, t = rand(4, 6, 5), rand(4, 6, 5, seed=1)
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 5])[:, None]
    assert_same(plain_nst(s, t, mask), nst(s, t, mask), 1e-8)


@pytest.mark.parametrize("shape", [(2, 3, 4), (5, 2, 3)])
@pytest.mark.parametrize("form, name", [(public_nst, "nst"), (public_nt_xent, "nt_xent")])
def test_public_objectives(form, name, shape):
    s, t = rand(*shape), rand(*shape, seed=1)
    assert_same(with_gradient(form, s, t), with_gradient(objective(name, "released"), s, t))


@pytest.mark.skipif("VLKD_GOLDEN" not in os.environ, reason="VLKD_GOLDEN, the peers' values, is not set")
@pytest.mark.parametrize(
    "form, name", [(public_nst, "nst_vidlankd"), (public_nt_xent, "contrastive_item_vidlankd")]
)
def test_public_objectives_are_the_peers(form, name):
    golden = json.loads((Path(os.environ["VLKD_GOLDEN"]) / f"{name}.json").read_text())
    s, t, loss = (torch.tensor(golden[k], dtype=torch.float64) for k in ("s", "t", "loss_as_trained"))
    assert_same(form(s, t), loss, 1e-9)


def test_plain_crd():
    crd = fill_queues(CRD(5, 4, 3, negatives=7, bank_size=16).double()).eval()
    s, t = rand(6, 5), rand(6, 4, seed=1)
    state = crd.generator.get_state()
    negatives = torch.randint(16, (7,), generator=crd.generator).expand(6, -1)
    crd.generator.set_state(state)  # in eval mode CRD draws the same
    shared = with_gradient(lambda x: plain_crd(crd, x, t, negatives), s)
    assert_same(shared, with_gradient(lambda x: crd(x, t), s), 1e-7)
    assert not torch.equal(plain_crd(crd, s, t), plain_crd(crd, s, t)), "each sample draws its own"
    twin = copy.deepcopy(crd).train()
    plain_crd(crd.train(), s, t)
    twin(s, t)
    assert torch.equal(crd.memory_v1, twin.memory_v1), "what was seen is stored"
    assert int(crd.seen) == int(twin.seen) == 22
    with pytest.raises(ValueError, match="needs a full queue: 0 of 16"):
        plain_crd(CRD(5, 4, 3, bank_size=16), s, t)


# ---- the step


@pytest.fixture(scope="module")
def desk():
    desk = Workbench(scale("smoke", layers=1, dropout=0.0, max_tokens=12), 4)
    desk.lm.double()
    desk.teacher.double()
    return desk


def loss_and_gradients(objective, desk):
    objective = objective.double()
    fill_queues(objective)
    desk.lm.zero_grad()
    loss = objective(**desk.batch)["loss"]
    loss.backward()
    gradients = [p.grad.flatten() for p in objective.parameters() if p.requires_grad]
    return torch.cat([loss.detach()[None], *gradients])


@pytest.mark.parametrize("without", [*((name,) for name in TRAINING_OPTIONS), tuple(TRAINING_OPTIONS)])
@pytest.mark.parametrize("form", [loop_nst, plain_nst])
def test_training_options_do_not_change_a_step(desk, without, form):
    ablated = desk.ablated(*without, nst_form=form, share_draw=True)
    assert_same(loss_and_gradients(ablated, desk), loss_and_gradients(desk.ablated(), desk), 1e-6)


def test_the_ablated_objective_is_the_students(desk):
    torch.manual_seed(1)
    ours = StudentObjective(desk.lm, desk.teacher, "nst+crd", s=desk.s, args=desk.preset)
    assert desk.preset == preset("paper")
    values = (loss_and_gradients(o, desk).sort().values for o in (ours, desk.ablated()))
    assert_same(*values)
    with pytest.raises(ValueError, match="no training option 'bert'; there are mlm"):
        desk.ablated("bert")


def test_the_public_step_has_the_official_values(desk):
    public, batch = desk.public().double(), desk.batch
    out = public(**batch)
    student, teacher = (m.bert(batch["masked"]).last_hidden_state for m in (desk.lm, desk.teacher))
    where = batch["where"]
    assert_same(out["mlm"], F.cross_entropy(desk.lm.cls(student)[where], batch["ids"][where]))
    for name in ("nst", "nt_xent"):
        assert_same(out[name], objective(name, "released")(public.heads[name](student), teacher), 1e-8)


def test_a_batch_masks_as_many_tokens_in_each_sentence():
    bench = Workbench(scale("smoke"), 3, 20)
    where = bench.batch["where"]
    assert (where.sum(1) == round(scale("smoke").mask_prob * 18)).all()
    assert bench.masked == round(scale("smoke").mask_prob * 18)
    assert not where[:, [0, -1]].any()


def test_contexts_put_back_what_they_change():
    bench = Workbench(scale("smoke", dropout=0.1), 2, 8)
    before = bench.lm.config._attn_implementation
    contexts = torch_dropout(), dropout_rate(bench.lm, 0.0), attention([bench.lm, bench.teacher], "eager")
    for context in contexts:
        with pytest.raises(ZeroDivisionError), context:
            assert 1 / 0
    assert QUICK_DROPOUT[0]
    assert {m.p for m in bench.lm.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert bench.lm.config._attn_implementation == bench.teacher.config._attn_implementation == before


def test_a_step_in_a_process_of_its_own():
    bench = Workbench(scale("smoke"), 4, 12)
    here, there = bench.step(bench.ours()), StepInProcess(bench.s, (4, 12), "paper")
    assert float(here()) == pytest.approx(there(), rel=1e-5)
    assert here.held_bytes() == there.held_bytes() > 3 * 4 * sum(p.numel() for p in bench.lm.parameters())
    assert there.peak_bytes() > 0
    there.close()
    with pytest.raises(ValueError, match="optimizer should be fused, foreach, loop"):
        bench.step(bench.ours(), optimizer="sgd")


# ---- measuring


class Clock:
    now = 0.0

    def __call__(self):
        return self.now

    def work(self, *seconds):
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_ratios_are_within_rounds():
    clock = Clock()
    variants = {"a": clock.work(10, 10, 40), "b": clock.work(5, 2, 20)}
    df = interleave(variants, 3, warmup=0, clock=clock).set_index("variant")
    assert df.loc["a", ["median", "ratio"]].tolist() == [10, 1]
    assert df.loc["b"].tolist() == [5, 3.5, 12.5, 2, 2, 3.5, 3]


def test_a_load_that_lasts_does_not_change_a_ratio():
    clock, load = Clock(), [1, 9, 3, 1, 7]
    variants = {"a": clock.work(*(6 * x for x in load)), "b": clock.work(*(2 * x for x in load))}
    df = interleave(variants, 5, warmup=0, clock=clock).set_index("variant")
    assert df.ratio["b"] == df.ratio_q25["b"] == df.ratio_q75["b"] == pytest.approx(3)
    assert summary(df.attrs["times"], "b").ratio.tolist() == pytest.approx([1 / 3, 1])


def test_every_round_runs_all_in_another_order():
    seen = []
    interleave({k: (lambda k=k: seen.append(k)) for k in "abcd"}, 8, warmup=1, clock=Clock())
    rounds = [tuple(seen[i : i + 4]) for i in range(0, 36, 4)]
    assert all(sorted(r) == list("abcd") for r in rounds)
    assert len(set(rounds)) > 3


@pytest.mark.parametrize("each, budget, rounds", [(1, 4.5, 5), (60, 1, 2), (1, float("inf"), 9)])
def test_a_budget_of_seconds(each, budget, rounds):
    clock = Clock()
    df = interleave({"a": clock.work(each)}, 9, warmup=0, seconds=budget, clock=clock)
    assert df.rounds.tolist() == [rounds]


def test_collector_is_on_again_after_a_failure():
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0}, 1, warmup=0)
    assert gc.isenabled()


def test_peak_memory():
    x = torch.zeros(64, 1024)

    def released():
        a = x + 1
        b = a + 1
        del a, b
        return x + 2

    def sums(function):
        return round(peak_memory(function) / x.nbytes, 1)

    assert sums(lambda: x + 1) == 1
    assert sums(lambda: (x + 1) + 1) == 2
    assert sums(lambda: x.add_(1)) == 0
    assert sums(lambda: [x + i for i in range(4)]) == 4
    assert sums(released) == sums(released) == 2


def test_memory_of_a_process_follows_what_is_allocated():
    code = """
import numpy as np
x = np.ones(300 * 2**20, np.uint8)
del x
begin()
y = np.ones(n * 2**20, np.uint8)
"""
    small, large = (peak_growth(code, n=n)["bytes"] / 2**20 for n in (40, 90))
    assert large - small == pytest.approx(50, abs=4)
    with pytest.raises(RuntimeError, match="no such thing"):
        peak_growth("raise KeyError('no such thing')")


# ---- running and publishing


@pytest.fixture
def folders(monkeypatch, tmp_path):
    monkeypatch.setenv("VLKD_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("VLKD_REPORTS", str(tmp_path / "reports"))
    return tmp_path


def write_run(quick=False, name="micro", value=1 / 3):
    folder = run_folder(name, bench.bench_scale(quick))
    frame = pd.DataFrame({"what": ["a", "b|c"], "x": [value, None], "n": [1, 12345.6]})
    targets = [target("fast", 2.5, at_least=2), target("small", None, at_most=1, unit=" GB")]
    begun = begin_benchmark("quick" if quick else "full")
    record_benchmark(folder, begun, "A <toy> | of 2", {"": frame, "More": frame}, targets=targets)
    receipt = dict(git=dict(commit="0123456789ab"), started="2030-01-01T00:00:00", seconds=1.0, files={})
    (folder / "run.json").write_text(json.dumps(receipt))


def test_the_page_has_what_was_recorded(folders):
    write_run()
    folder = publish_benchmarks()
    page, here = (folder / "README.md").read_text(), machine()
    for text in (
        "| micro: fast | at least 2x | 2.5x | yes |",
        "| micro: small | at most 1 GB | not measured here | – |",
        "| a | 0.333 | 1 |",
        "12,346",
        f"torch {here['versions']['torch']}",
        here["cpu"],
        "Full run of 2030-01-01, 1 s, commit 0123456789, load average",
    ):
        assert text in page, text
    assert pd.read_csv(folder / machine_stamp(here) / "micro.csv").x[0] == 1 / 3
    for link in ("micro.csv", "micro-more.csv"):
        assert f"({machine_stamp(here)}/{link})" in page
        assert (folder / machine_stamp(here) / link).is_file()


def test_a_quick_run_is_not_published_over_a_full_one(folders):
    write_run(quick=True)
    assert "Quick run of" in (publish_benchmarks() / "README.md").read_text()
    write_run()
    page = (publish_benchmarks() / "README.md").read_text()
    assert "Full run of" in page
    assert "Quick run of" not in page


def test_the_page_keeps_other_machines_and_other_benchmarks(folders):
    write_run(name="cost")
    folder = publish_benchmarks()
    stamp = machine_stamp(machine())
    record = json.loads((folder / f"{stamp}.json").read_text())
    record["machine"]["device"] = "NVIDIA Z9"
    (folder / "z9.json").write_text(json.dumps(record))
    (folder / stamp).rename(folder / "z9")
    (folder / f"{stamp}.json").unlink()
    write_run(name="steps")
    publish_benchmarks()
    page = (folder / "README.md").read_text()
    assert "NVIDIA Z9" in page
    assert machine()["cpu"] in page
    assert (folder / "z9" / "cost.csv").is_file()
    assert "steps: fast" in page


@pytest.mark.parametrize("broken", [(bench.shutil, "copyfile"), (bench, "benchmarks_page")])
def test_the_page_is_whole_or_as_it_was(folders, monkeypatch, broken):
    write_run()
    folder = publish_benchmarks()
    before = {p.name: p.read_bytes() for p in folder.glob("*.*")}

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(*broken, fail)
    with pytest.raises(OSError, match="No space left"):
        publish_benchmarks()
    assert {p.name: p.read_bytes() for p in folder.glob("*.*")} == before
    assert [p.name for p in folder.parent.iterdir()] == ["bench"], "nothing half-written stays behind"


@pytest.mark.parametrize(
    "args, code, text",
    [
        (["bench", "nosuch"], 2, "unknown benchmark 'nosuch'"),
        (["bench", "headline", "--quick"], 2, "unknown benchmark 'headline'"),
        (["bench", "--list"], 0, "steps"),
    ],
)
def test_command(args, code, text, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    out = capsys.readouterr()
    assert end.value.code == code
    assert text in out.out + out.err


RECORD = """import pandas as pd
from vlkd.tools.bench import begin_benchmark, record_benchmark
begun = begin_benchmark(effort)
record_benchmark(out, begun, "Toy", {"": pd.DataFrame(dict(number=[42]))})"""
PLAN = """[[table]]
id = "toy"
title = "Toy"
notebook = "toy.ipynb"
params = { effort = "full" }
at = { smoke = { effort = "quick" } }
scales = ["smoke", "micro"]
"""


def write_plan(folder, code: str):
    "A plan of one benchmark, whose notebook records a number after some code."
    parameters = 'effort: str = "toy"  # as ever\nout: str = ""  # folder of results'
    cells = [cell(0, parameters, tags=["parameters"]), cell(1, code), cell(2, RECORD)]
    kernel = dict(name="python3", display_name="python3", language="python")
    notebook = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    (folder / "toy.ipynb").write_text(json.dumps(notebook))
    (folder / "plan.toml").write_text(PLAN)
    return folder / "plan.toml"


def test_a_benchmark_is_a_run_of_the_graph(folders, monkeypatch, capsys):
    plan = write_plan(folders, "assert effort == 'quick'")
    monkeypatch.setattr(bench, "bench_plan", lambda: plan)
    for _ in range(2):  # the second time measures anew
        assert run_benchmarks(["toy"], quick=True)["done"] == ["toy@1"]
    assert "| 42 |" in capsys.readouterr().out
    write_plan(folders, "raise RuntimeError('no luck')")
    with pytest.raises(SystemExit) as end:
        main(["bench", "toy", "--quick", "--publish"])
    out = capsys.readouterr()
    assert end.value.code == 1
    assert "no luck" in out.out + out.err
    assert not (folders / "reports" / "bench").exists()


def test_the_experiments_plan_has_no_benchmarks():
    from vlkd.reproduce.plan import load_plan

    assert not set(benchmarks()) & set(load_plan())
