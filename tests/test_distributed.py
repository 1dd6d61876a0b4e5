"One training over several processes has the gradients, the weights and the files of one; what is not finite stops it, and leaves its batch."
import json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vlkd.device # noqa: F401
from vlkd.train.loop import fit

ROOT = Path(__file__).resolve().parent.parent

# Three steps of each objective in double precision, with the gradients of each step. What a case is called: objective, then levers.
DRIVER = '''
import json, sys
from pathlib import Path
import numpy as np, torch
from torch.nn import functional as F
from vlkd.device import *
from vlkd.core import rng, scale
from vlkd.data.text import VideoText, tokenize
from vlkd.models.language import language_model
from vlkd.models.video import Teacher
from vlkd.train import loop
from vlkd.train.data import TabletopData
from vlkd.train.student import StudentObjective, text_collator
from vlkd.train.teacher import TeacherObjective, video_text_collator

out, cases, steps = Path(sys.argv[1]), sys.argv[2].split(), int(sys.argv[3]); rank, n = ranks(); grads = []
clip = loop.ObjectiveTrainer._clip_grad_norm
def keep(self, model):
    grads.append({k: p.grad.numpy().copy() for k, p in self.objective.named_parameters() if p.grad is not None}); return clip(self, model)
def mlm_double(lm, h, ids, where): logits = lm.cls(h[where]); return F.cross_entropy(logits, ids[where]) if len(logits) else h.sum()*0. # the library's is float32
loop.ObjectiveTrainer._clip_grad_norm, loop.mlm_loss = keep, mlm_double

s = scale("smoke", dropout=0., mask_prob=.05, batch=8, crd_bank=64, crd_negatives=40); data = TabletopData(s, 101); tok = data.tokenizer
captions = data.captions[0][:40]; pairs = VideoText(captions, np.arange(40), rng("films").normal(size=(40, 4, 8)), np.ones((40, 4), bool), np.arange(40), np.arange(0))
for case in cases:
    seed_everything(0); name, *more = case.split("/"); use = dict(x.split("=") for x in more); kw = dict(lengths=None)
    if name in ("info_nce", "token_nce", "hinge", "all"):
        kind = dict(token_nce="info_nce", all="hinge").get(name, name); o = TeacherObjective(Teacher(s, tok, 8, 0), kind, nce=dict(level="token") if name == "token_nce" else {}, hinge=dict(negatives="all") if name == "all" else {})
        collate, size = video_text_collator(tokenize(tok, captions, s.max_tokens), pairs, np.arange(40), tok, s, 0), 40; kw["lengths"] = tokenize(tok, captions, s.max_tokens).lengths
    else:
        kd = "" if name == "mlm" else name; args = dict(crd=dict(bank="queue")) if "crd" in kd else {}
        o = StudentObjective(language_model(s, tok, 1), language_model(s, tok, 2).eval() if kd else None, kd, s=s, args=args, pool=torch.randn(9, s.hidden).double()); collate, size = text_collator(data.tokens, tok, s, 0), len(data.tokens)
        if kd: o._teacher[0].double()
    o.double(); grads.clear(); seen = []
    def watch(items, collate=collate): seen.append([i for i, e in items]); return collate(items)
    history = loop.fit(o, watch, size, out/case.replace("/", ","), steps=steps, batch=s.batch, lr=1e-2, what=case, levers=use, **kw)
    state = {"w."+k: v.numpy() for k, v in o.state_dict().items()} | {f"g{i}.{k}": v for i, g in enumerate(grads) for k, v in g.items()}
    np.savez(out/f"{case.replace('/', ',')}.{rank}.npz", **state); (out/f"{case.replace('/', ',')}.{rank}.json").write_text(json.dumps(dict(history=history, seen=seen[1:])))
'''

CASES = ["mlm", "nst", "crd", "nst+crd", "regression", "soft_label", "voken", "nt_xent", "hinge", "all", "info_nce", "token_nce"]
APART = ["mlm", "nst", "regression", "soft_label", "voken"] # whose loss is a mean

def launch(n, *args, script=DRIVER, env=None, check=True):
    "Run a script in `n` processes of torchrun; one process is started as usual."
    cmd = [sys.executable, "-c", script] if n == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "--no-python", sys.executable, "-c", script]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLKD_") or k in ("VLKD_CACHE",)}
    r = subprocess.run([*cmd, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=400, env={**clean, "PYTHONPATH": str(ROOT), "VLKD_DEVICE": "cpu", "OMP_NUM_THREADS": "1", **(env or {})})
    if check: assert r.returncode == 0, (r.stdout+r.stderr)[-4000:]
    return r

@pytest.fixture(scope="module")
def alone(tmp_path_factory): d = tmp_path_factory.mktemp("alone"); launch(1, d, " ".join(CASES), 3); return d

@pytest.fixture(scope="module")
def together(tmp_path_factory): d = tmp_path_factory.mktemp("together"); launch(2, d, " ".join([*CASES, *(f"{c}/accumulate=2" for c in APART)]), 3); return d

@pytest.fixture(scope="module")
def in_parts(tmp_path_factory): d = tmp_path_factory.mktemp("parts"); launch(1, d, " ".join(f"{c}/accumulate=4" for c in APART), 3); return d

def same(a, b, tol=1e-9):
    with np.load(a) as x, np.load(b) as y:
        assert set(x) == set(y); assert sum(k.startswith("g2.") for k in x) > 5
        for k in x:
            if k.endswith("_extra_state"): assert np.array_equal(x[k], y[k]), k; continue
            scale = max(abs(x[k]).max(), 1e-3); assert np.allclose(x[k], y[k], rtol=0, atol=tol*scale), (k, abs(x[k]-y[k]).max(), scale)

@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradients_of_one(alone, together, case):
    for rank in (0, 1): same(alone/f"{case}.0.npz", together/f"{case}.{rank}.npz")
    a, b = (json.loads((d/f"{case}.0.json").read_text())["history"] for d in (alone, together)); assert len(a) == 3
    for x, y in zip(a, b): assert x.keys() == y.keys() and all(np.isclose(x[k], y[k], rtol=1e-5, atol=1e-7) for k in x), (x, y)

@pytest.mark.parametrize("case", APART)
def test_parts_of_a_batch_have_its_gradient(alone, together, in_parts, case):
    same(alone/f"{case}.0.npz", in_parts/f"{case},accumulate=4.0.npz"); same(alone/f"{case}.0.npz", together/f"{case},accumulate=2.1.npz")

def test_processes_share_the_draws_in_order(alone, together):
    for case in ("mlm", "hinge"):
        a, *parts = [json.loads(f.read_text())["seen"] for f in (alone/f"{case}.0.json", together/f"{case}.0.json", together/f"{case}.1.json")]
        assert a == [x+y for x, y in zip(*parts)] and len(a) == 3
