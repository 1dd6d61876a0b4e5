"Trainings that are killed and started again, checkpoints that are not whole, and what a world may say."

import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vlkd.core.files import CHECKSUMS, write_checksums
from vlkd.core.settings import scale
from vlkd.data.text import train_tokenizer
from vlkd.models.bert import language_model
from vlkd.models.video_text import Teacher
from vlkd.tabletop.language import OUTCOME_PHRASES, PLACE
from vlkd.tabletop.nouns import CLASSES, EVENTS, SHAPES
from vlkd.tabletop.world import World
from vlkd.train.sources import TabletopSource
from vlkd.train.text_student import StudentObjective, text_collator
from vlkd.train.trainer import Objective, check_trainable, fit
from vlkd.train.video_teacher import TeacherObjective, video_text_collator

ROOT = Path(__file__).resolve().parent.parent

# Teacher, then student, in one process. "teacher:23" kills it after step 23 of the teacher,
# "student:checksums" while a checkpoint has no checksums yet.
DRIVER = """
import os, signal, sys
from functools import cached_property
from pathlib import Path

import numpy as np

from vlkd.core.files import rng
from vlkd.core.settings import scale
from vlkd.data.text import VideoText
from vlkd.models.bert import save_model
from vlkd.models.video_text import Teacher
from vlkd.train import trainer
from vlkd.train.sources import TabletopSource
from vlkd.train.text_student import train_student
from vlkd.train.video_teacher import train_teacher


class Noise(TabletopSource):
    "Noise in the place of features, so that nothing is rendered."

    @cached_property
    def pairs(self):
        captions, clip = self.captions
        clips = self.world.clips
        held = clips.held_out.to_numpy()
        x = rng("films").normal(size=(len(clips), 4, 8)).astype(np.float16)
        train, valid = np.flatnonzero(~held[clip]), np.flatnonzero(held[clip])
        return VideoText(captions, clip, x, np.ones(x.shape[:2], bool), train, valid, list(clips.noun))


out, (who, when) = Path(sys.argv[1]), sys.argv[2].split(":")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def on_step_end(self, args, state, control, **kw):
    step_end(self, args, state, control, **kw)
    if self.name == who and str(state.global_step) == when:
        die()


def write_checksums(folder):
    if when == "checksums" and folder.name == "checkpoint-40" and folder.parent.parent.name == who:
        die()
    write(folder)


step_end, write = trainer.Progress.on_step_end, trainer.write_checksums
trainer.Progress.on_step_end, trainer.write_checksums = on_step_end, write_checksums

settings = dict(steps=60, teacher_steps=60, save_every=10, eval_every=10, patience=2, dropout=0.1)
data = Noise(scale("smoke", **settings), 101)
done = out / "teacher" / "done"
if done.is_dir():
    teacher, _ = Teacher.load(done, data.s)
else:
    teacher, history = train_teacher(data, out / "teacher", contrast="info_nce", preset="micro")
    print("teacher ends at", max(entry["step"] for entry in history))
    teacher.save(done, data.tokenizer)
student, _ = train_student(data, out / "student", teacher=teacher, kd="nst+crd", preset="micro")
save_model(out / "bert", student.lm, data.tokenizer)
models = dict(teacher=teacher, student=student)
np.savez(
    out / "end.npz",
    **{f"{name}.{key}": x for name, model in models.items() for key, x in model.state_dict().items()},
)
"""


def drive(out, kill=":"):
    return subprocess.run(
        [sys.executable, "-c", DRIVER, str(out), kill],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Where a run that nobody stopped has left its results."
    d = tmp_path_factory.mktemp("whole")
    r = drive(d)
    assert r.returncode == 0, r.stderr[-2000:]
    return d, r.stdout


def test_killed_training_ends_as_if_nothing_had_happened(whole, tmp_path):
    ref, said = whole
    early = int(re.search(r"teacher ends at (\d+)", said)[1])
    t, s = random.choice(range(11, early)), random.choice(range(11, 40))
    kills = [f"teacher:{t}", f"student:{s}", "student:checksums", ":"]
    for kill, at in zip(
        kills, ([], [(t - 1) // 10 * 10], [(s - 1) // 10 * 10], [30])
    ):  # a step ends before its checkpoint is written
        r = drive(tmp_path, kill)
        assert r.returncode == (0 if kill == ":" else -9), f"{kills}, {kill}: {r.stderr[-2000:]}"
        assert [int(n) for n in re.findall(r"resumes from checkpoint-(\d+)", r.stdout)] == at, (
            f"{kills}, {kill}: {r.stdout}"
        )
    assert "checkpoint-40 is left out: it was not finished" in r.stdout
    with np.load(ref / "end.npz") as a, np.load(tmp_path / "end.npz") as b:
        assert set(a) == set(b) and {
            "student.terms.crd.loss.memory_v1",
            "student.terms.crd.loss.seen",
            "student.terms.crd.loss._extra_state",
        } <= set(a)
        assert int(a["student.terms.crd.loss.seen"]) > 64, "the queue was never full"
        assert [k for k in a if not np.array_equal(a[k], b[k])] == [], f"killed at {kills}"


WITHOUT = """
import sys
class Hide: # torchvision's CUDA wheel does not import beside a CPU torch, and nothing here needs it
    def __init__(self, f): self.f = f
    def __getattr__(self, k): return getattr(self.f, k)
    def find_spec(self, name, *a, **k): return None if name.split('.')[0] in ("torchvision", "vlkd") else self.f.find_spec(name, *a, **k)
sys.meta_path = [Hide(f) for f in sys.meta_path]
import numpy as np, torch
from transformers import AutoTokenizer, BertModel
m, tok = BertModel.from_pretrained(sys.argv[1]).eval(), AutoTokenizer.from_pretrained(sys.argv[1])
x = tok(["the girl dropped the kettle", "where is it ?"], padding=True, return_tensors="pt")
with torch.no_grad(): np.savez(sys.argv[2], ids=x["input_ids"], mask=x["attention_mask"], states=m(**x).last_hidden_state)
assert not any(k.split(".")[0] == "vlkd" for k in sys.modules)
"""


def test_student_loads_with_transformers_alone(whole, tmp_path):
    r = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(whole[0] / "bert"), str(tmp_path / "x.npz")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert r.returncode == 0, r.stderr[-2000:]
    from vlkd.models.bert import hidden_states, load_model

    lm, tok = load_model(whole[0] / "bert")
    x = np.load(tmp_path / "x.npz")
    ids, mask = torch.from_numpy(x["ids"]), torch.from_numpy(x["mask"]).bool()
    assert tok.decode(ids[0]) == "[CLS] the girl dropped the kettle [SEP]"
    with torch.no_grad():
        states = hidden_states(lm.eval(), ids, mask)
    assert torch.allclose(states[mask], torch.from_numpy(x["states"])[mask], atol=1e-5)
    with np.load(whole[0] / "end.npz") as end:
        assert np.array_equal(
            end["student.lm.bert.embeddings.word_embeddings.weight"],
            lm.bert.embeddings.word_embeddings.weight.detach(),
        )


class Line(Objective):
    "y = w x, with noise that only the generator of torch decides."

    def __init__(self):
        super().__init__()
        self.w, self.drop = nn.Parameter(torch.zeros(4)), nn.Dropout(0.5)

    def forward(self, x, y):
        return dict(loss=((self.drop(x) * self.w).sum(1) - y).square().mean())


class Stop(Exception):
    pass


def line(out, stop=None, steps=30, **kw):
    "Train a line for 30 steps of 4; `stop` breaks off at that batch, which is made a step ahead."
    made = [0]

    def collate(items):
        made[0] += 1
        if made[0] == stop:
            raise Stop
        i = torch.tensor([k for k, _ in items])
        x = torch.stack([torch.sin(i * (j + 1.0)) for j in range(4)], 1)
        return dict(x=x, y=x.sum(1))

    torch.manual_seed(0)
    o = Line()
    history = fit(o, collate, 20, out, steps=steps, batch=4, lr=0.05, save_every=10, name="line", **kw)
    return o.w.detach().clone(), history


@pytest.fixture
def broken_off(tmp_path):
    "A training that ended between step 20 and step 30, its checkpoints, and what it should have come to."
    want, _ = line(tmp_path / "whole")
    with pytest.raises(Stop):
        line(tmp_path / "run", stop=27)
    c = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in c.iterdir()) == ["checkpoint-10", "checkpoint-20"]
    return tmp_path / "run", c, want


@pytest.mark.parametrize(
    "file, what, says",
    [
        ("optimizer.pt", "cut", r"optimizer.pt was changed after it was saved"),
        ("model.safetensors", "cut", "model.safetensors was changed after it was saved"),
        ("model.safetensors", "gone", "model.safetensors is missing"),
        ("optimizer.pt", "gone", "optimizer.pt is missing"),
        (CHECKSUMS, "gone", "it was not finished"),
        (CHECKSUMS, "cut", "checksums.json is not valid JSON"),
    ],
)
def test_damaged_checkpoint_is_left_out_by_name(broken_off, capsys, file, what, says):
    run, c, want = broken_off
    f = c / "checkpoint-20" / file
    whole = f.read_bytes()
    f.unlink() if what == "gone" else f.write_bytes(whole[: len(whole) // 2])
    got, _ = line(run)
    said = capsys.readouterr().out
    left_out = re.search("checkpoint checkpoint-20 is left out: (.*)", said)[1]
    assert says in left_out and "resumes from checkpoint-10" in said
    assert torch.equal(got, want)


def test_whole_checkpoint_is_used(broken_off, capsys):
    run, _, want = broken_off
    got, _ = line(run)
    assert "resumes from checkpoint-20" in capsys.readouterr().out and torch.equal(got, want)


class Payload:
    def __init__(self, f):
        self.f = f

    def __reduce__(self):
        return os.mkdir, (str(self.f),)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_no_pickle_is_run(broken_off, tmp_path, file):
    "The checksums are right, so that nothing but `weights_only` stands between the file and its code."
    run, c, _ = broken_off
    folder, f = c / "checkpoint-20", tmp_path / "ran"
    assert (folder / file).is_file()
    torch.save(Payload(f), folder / file)
    write_checksums(folder)
    with pytest.raises(pickle.UnpicklingError):
        line(run)
    assert not f.exists()
    torch.load(folder / file, weights_only=False)
    assert f.is_dir(), "the payload is harmless, and the test says nothing"


def test_checkpoints_hold_no_other_pickles(broken_off):
    _, c, _ = broken_off
    names = {p.name for p in (c / "checkpoint-20").iterdir()}
    assert names <= {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "loss_sums.safetensors",
        CHECKSUMS,
    }


def test_patience_is_not_forgotten(tmp_path, capsys):
    "Validation gets worse from the first step on: a run that is stopped in the middle of its patience ends where the other ends."

    def worse(items):
        return dict(x=torch.ones(len(items), 4), y=torch.full((len(items),), -9.0))

    kw = dict(steps=60, valid=(worse, 8), eval_every=5, patience=3)
    want, h = line(tmp_path / "whole", **kw)
    end = max(x["step"] for x in h)
    assert end == 20
    with pytest.raises(Stop):
        line(tmp_path / "run", stop=19, **kw)
    got, h = line(tmp_path / "run", **kw)
    assert "resumes from checkpoint-15" in capsys.readouterr().out
    assert max(x["step"] for x in h) == end and torch.equal(got, want)


@pytest.fixture(scope="module")
def small():
    return TabletopSource(scale("smoke"), 101)


def teacher_batch(data, n=6):
    from vlkd.data.text import VideoText, tokenize

    captions = data.captions[0][:n]
    p = VideoText(
        captions,
        np.arange(n),
        np.random.default_rng(0).normal(size=(n, 4, 8)),
        np.ones((n, 4), bool),
        np.arange(n),
        np.arange(0),
    )
    return video_text_collator(
        tokenize(data.tokenizer, captions, data.s.max_tokens), p, np.arange(n), data.tokenizer, data.s, 0
    )([(k, 0) for k in range(n)])


def test_video_encoder_off_the_path_is_found(small):
    batch = teacher_batch(small)
    make = lambda: Teacher(small.s, small.tokenizer, 8, 0)
    for contrast in ("hinge", "info_nce"):
        assert check_trainable(TeacherObjective(make(), contrast), batch)["frozen"] == 0
    t = make()
    o = TeacherObjective(t, "none")
    t.video.requires_grad_(True)
    with pytest.raises(ValueError, match=r"get no gradient: teacher\.video\."):
        check_trainable(o, batch)
    t = make()
    t.video.forward = torch.no_grad()(t.video.forward)
    with pytest.raises(ValueError, match=r"get no gradient: teacher\.video\."):
        check_trainable(TeacherObjective(t, "info_nce"), batch)
    o = TeacherObjective(make(), "info_nce", freeze_video=True)
    n = check_trainable(o, batch)
    assert n["frozen"] == sum(p.numel() for p in o.teacher.video.parameters())


def test_padding_does_not_matter(small):
    torch.manual_seed(0)
    s = small.s
    lm, t = (language_model(s, small.tokenizer, k).double().eval() for k in (1, 2))
    o = (
        StudentObjective(
            lm, t, "soft_label+regression+voken+nst+crd+nt_xent", s=s, pool=torch.randn(9, s.hidden).double()
        )
        .double()
        .eval()
    )
    tokens = small.tokens
    rows = [int(k) for k in np.argsort(tokens.lengths, kind="stable")[[0, 5, -9, -1]]]
    b = text_collator(tokens, small.tokenizer, s, 0)([(k, 0) for k in rows])
    assert not b["mask"].all() and b["mask"].shape[1] + 3 <= s.max_tokens

    def garbage(x):
        return torch.where(b["mask"], x, torch.randint(5, len(small.tokenizer), x.shape))

    wide = lambda x, fill: torch.cat([x, fill], 1)
    more = lambda: torch.randint(5, len(small.tokenizer), (len(rows), 3))
    no = torch.zeros(len(rows), 3, dtype=torch.bool)
    other = dict(
        ids=wide(garbage(b["ids"]), more()),
        masked=wide(garbage(b["masked"]), more()),
        mask=wide(b["mask"], no),
        where=wide(b["where"], no),
        position=b["position"],
    )
    with torch.no_grad():
        want, got, changed = (
            o(**b),
            o(**other),
            o(**b | dict(masked=torch.where(torch.arange(b["masked"].shape[1]) == 1, 7, b["masked"]))),
        )
    assert set(want) == {"loss", "mlm", "soft_label", "regression", "voken", "nst", "crd", "nt_xent"}
    for k in want:
        assert torch.allclose(want[k], got[k], rtol=1e-6, atol=1e-9) and not torch.allclose(
            want[k], changed[k], rtol=1e-6, atol=1e-9
        ), k


TASKS = dict(
    sst2=("sentence",),
    qnli=("question", "sentence"),
    qqp=("question1", "question2"),
    mnli=("sentence1", "sentence2"),
    piqa=("goal", "sol1", "sol2"),
    tracie=("story", "event"),
)
VERBS = dict(
    drop="drop|dropped|let go of",
    dunk="dunk|dunked|put",
    heat="heat|heated|hold|held",
    squeeze="squeeze|squeezed|press|pressed",
    push="push|pushed",
)
OUTCOME = {p: o for o, ps in OUTCOME_PHRASES.items() for p in ps}


def event_of(text):
    return next(e for e, v in VERBS.items() if re.search(rf"\b(?:{v})\b", text))


@pytest.fixture(scope="module", params=[101, 7])
def pair(request):
    return [
        World(request.param, counterfactual=c, captions=1500, sentences=2500, takes=1) for c in (False, True)
    ]


def test_tokeniser_is_the_same_every_time(small):
    "Teacher and student train in processes of their own, and have to agree on every id."
    texts = [*small.captions[0], *small.sentences]
    vs = [train_tokenizer(texts, small.s.vocab_size, 40).get_vocab() for _ in range(5)]
    assert all(v == vs[0] for v in vs)


def test_counterfactual_says_the_same(pair):
    a, b = pair
    (ca, ia), (cb, ib) = a.captions(), b.captions()
    assert ca == cb and np.array_equal(ia, ib) and a.sentences() == b.sentences()
    for t, columns in TASKS.items():
        for split in ("train", "dev", "test"):
            x, y = a.task(t, split, 150), b.task(t, split, 150)
            same = ["id", "group", "kind", *columns]
            assert x[same].equals(y[same]), (t, split)
            moved = x.label != y.label
            assert (
                not moved.any() if split == "train" else set(x.kind[moved]) <= {"video-only", "never filmed"}
            ), (
                t,
                split,
            )
    x, y = a.task("piqa", "test", 400), b.task("piqa", "test", 400)
    h = x.kind == "video-only"
    assert (x.label != y.label)[h].mean() > 0.3
    assert (a.nouns.cls != b.nouns.cls)[a.nouns.split != "train"].all() and (a.nouns.cls == b.nouns.cls)[
        a.nouns.split == "train"
    ].all()


def test_no_text_states_what_happens_to_test_nouns(pair):
    w = pair[0]
    phrase = re.compile(
        r"\b(?:" + "|".join(p for v in EVENTS.values() for o in v for p in OUTCOME_PHRASES[o]) + r")\b"
    )
    for corpus in (w.captions()[0], w.sentences()):
        named = {x for s in corpus if phrase.search(s) for x in s.split()} & set(w.nouns.noun)
        splits = set(w.nouns.split[list(named)])
        assert splits == {"train"}, splits
        assert len({x for s in corpus for x in s.split()} & set(w.nouns.noun[w.nouns.split == "test"])) > 20


def test_never_filmed_nouns_have_no_clip(pair):
    w = pair[0]
    never = set(w.nouns.noun[~w.nouns.filmed])
    assert never and set(w.nouns.split[list(never)]) == {"test"}
    assert not never & set(w.clips.noun) and set(w.nouns.noun) - never == set(w.clips.noun)
    assert not never & {x for s in w.captions()[0] for x in s.split()} and never <= {
        x for s in w.sentences() for x in s.split()
    }


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_noun(pair, task):
    w = pair[0]
    groups = {s: set(w.task(task, s, 150).group) for s in ("train", "dev", "test")}
    for s, g in groups.items():
        assert set(w.nouns.split[list(g)]) == {s}
    for s, columns in (
        (s, w.task(task, s, 100)[list(TASKS[task])]) for s in groups
    ):  # nor does a text of one split name a noun of another
        words = {x for t in columns.to_numpy().ravel() for x in t.split()} & set(w.nouns.noun)
        assert set(w.nouns.split[list(words)]) <= {s}, (task, s)


@pytest.mark.parametrize("which", [0, 1])
def test_labels_follow_the_classes(pair, which):
    "Answers derived again from the table of nouns and the words of the question alone."
    w = pair[which]
    nouns = w.nouns
    seen = set()
    for x in w.task("piqa", "test", 400).itertuples():
        n = nouns.loc[x.group]
        sols = (x.sol1, x.sol2)
        if x.kind == "stated":
            true = PLACE[n.category]
            right = [s == f"in the {true}" for s in sols]
        else:
            assert x.group in x.goal.split()
            e = event_of(x.goal)
            right = [OUTCOME[s.removeprefix("it ")] == n[e] for s in sols]
            assert (e == "push") == (x.kind == "static")
        if x.kind in ("video-only", "never filmed"):
            assert n.filmed == (x.kind == "video-only")
            seen.add(n[e])
        assert sum(right) == 1 and right[x.label], x
    assert seen == {o for v in EVENTS.values() for o in v}, "an outcome was never asked for"
    checked = 0
    for x in w.task("mnli", "test", 400).itertuples():
        if x.kind not in ("video-only", "never filmed"):
            continue
        e = event_of(x.sentence1)
        assert x.label == (
            0 if OUTCOME[x.sentence2.removeprefix(f"the {x.group} ")] == nouns.loc[x.group, e] else 2
        ), x
        checked += 1
    for x in w.task("tracie", "test", 400).itertuples():
        if x.kind not in ("video-only", "never filmed"):
            continue
        first, last = (
            next(t for t in part.split() if t in nouns.index)
            for part in (x.story.split(" . ")[0], x.story.split(" . ")[2])
        )
        asked, rel = re.fullmatch(r"something (.*) starts (before|after) .*", x.event).groups()
        e = event_of(x.story.split(" . ")[0])
        has = [nouns.loc[n, e] == OUTCOME[asked] for n in (first, last)]
        assert sum(has) == 1 and x.label == int(has[0] == (rel == "before")), x
        checked += 1
    assert checked > 100


def test_looks_do_not_give_classes_away(pair):
    "Within a split, classes and looks are dealt out apart: knowing one, the other stays open."
    n = pair[0].nouns
    for s in ("train", "test"):
        d = n[n.split == s]
        assert d.cls.nunique() == len(CLASSES) and d["shape"].nunique() == len(SHAPES)
        assert d.groupby("shape").cls.nunique().min() >= 3 and d.groupby("cls")["shape"].nunique().min() >= 3
