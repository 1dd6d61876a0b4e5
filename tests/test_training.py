"Trainings that are killed and started again, checkpoints that are incomplete, and what a world states."

import os
import pickle
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from processes import script
from torch import nn

from vlkd.core.files import CHECKSUMS, write_checksums
from vlkd.core.settings import scale
from vlkd.data.text import VideoText, tokenize, train_tokenizer
from vlkd.models.bert import hidden_states, language_model, load_model
from vlkd.models.video_text import Teacher
from vlkd.tabletop.language import OUTCOME_PHRASES, PLACE
from vlkd.tabletop.nouns import CLASSES, EVENTS, SHAPES
from vlkd.tabletop.world import World
from vlkd.train.sources import TabletopSource
from vlkd.train.text_student import (
    DISTILLATION_FILE,
    StudentObjective,
    load_distillation,
    save_distillation,
    text_collator,
)
from vlkd.train.trainer import Objective, check_trainable, fit
from vlkd.train.video_teacher import TeacherObjective, video_text_collator

SETTINGS = scale("smoke", dropout=0.1)

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
from vlkd.train.text_student import save_distillation, train_student
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
    teacher, history = train_teacher(data, out / "teacher", contrast="info_nce", preset="tuned")
    print("teacher ends at", max(entry["step"] for entry in history))
    teacher.save(done, data.tokenizer)
student, _ = train_student(data, out / "student", teacher=teacher, kd="nst+crd", preset="tuned")
save_model(out / "bert", student.lm, data.tokenizer)
save_distillation(student, out / "bert")
models = dict(teacher=teacher, student=student)
np.savez(
    out / "end.npz",
    **{f"{name}.{key}": x for name, model in models.items() for key, x in model.state_dict().items()},
)
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The results of a run that nothing stopped, and what it printed."
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = script(DRIVER, folder, ":")
    assert ended.returncode == 0, ended.stdout[-2000:]
    return folder, ended.stdout


def test_killed_training_ends_as_if_nothing_had_happened(undisturbed, tmp_path):
    reference, printed = undisturbed
    last = int(re.search(r"teacher ends at (\d+)", printed)[1])
    teacher_step, student_step = random.choice(range(11, last)), random.choice(range(11, 40))
    kills = {  # when -> the checkpoints from which it resumes; a step ends before its checkpoint is written
        f"teacher:{teacher_step}": [],
        f"student:{student_step}": [(teacher_step - 1) // 10 * 10],
        "student:checksums": [(student_step - 1) // 10 * 10],
        ":": [30],
    }
    for kill, resumed in kills.items():
        ended = script(DRIVER, tmp_path, kill)
        assert ended.returncode == (0 if kill == ":" else -9), f"{kills}, {kill}: {ended.stdout[-2000:]}"
        found = [int(step) for step in re.findall(r"resumes from checkpoint-(\d+)", ended.stdout)]
        assert found == resumed, f"{kills}, {kill}: {ended.stdout}"
    assert "checkpoint-40 is left out: it was not finished" in ended.stdout
    with np.load(reference / "end.npz") as whole, np.load(tmp_path / "end.npz") as resumed:
        crd = "student.terms.crd.loss"
        assert set(whole) == set(resumed)
        assert {f"{crd}.memory_v1", f"{crd}.seen", f"{crd}._extra_state"} <= set(whole)
        assert int(whole[f"{crd}.seen"]) > 64, "the queue was never full"
        different = [name for name in whole if not np.array_equal(whole[name], resumed[name])]
        assert different == [], f"killed at {kills}"


def test_files_of_a_student_have_normal_permissions(undisturbed):
    umask = os.umask(0)
    os.umask(umask)
    files = [file for file in (undisturbed[0] / "bert").iterdir() if file.is_file()]
    assert {"model.safetensors", "distillation.safetensors"} <= {file.name for file in files}
    assert {file.name: file.stat().st_mode & 0o777 for file in files} == {
        file.name: 0o666 & ~umask for file in files
    }


def test_equal_students_have_equal_files(undisturbed, tmp_path):
    "Metadata have no order of their own: what two processes write differs in nothing."
    folder = undisturbed[0] / "bert"
    written = {(folder / DISTILLATION_FILE).read_bytes()}
    for k in range(5):
        shutil.copytree(folder, tmp_path / str(k))
        student, _ = load_distillation(folder, load_model(folder)[0], SETTINGS)
        written.add(save_distillation(student, tmp_path / str(k)).read_bytes())
    assert len(written) == 1


WITHOUT = """
import sys


class Hide:  # torchvision's CUDA wheel does not import beside a CPU torch, and nothing here needs it
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args, **kw):
        hidden = name.split(".")[0] in ("torchvision", "vlkd")
        return None if hidden else self.finder.find_spec(name, *args, **kw)


sys.meta_path = [Hide(finder) for finder in sys.meta_path]
import numpy as np
import torch
from transformers import AutoTokenizer, BertModel

model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (BertModel, AutoTokenizer))
batch = tokenizer(["the girl dropped the kettle", "where is it ?"], padding=True, return_tensors="pt")
with torch.no_grad():
    states = model.eval()(**batch).last_hidden_state
np.savez(sys.argv[2], ids=batch["input_ids"], mask=batch["attention_mask"], states=states)
assert not any(name.split(".")[0] == "vlkd" for name in sys.modules)
"""


def test_student_loads_with_transformers_alone(undisturbed, tmp_path):
    folder, _ = undisturbed
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(folder / "bert"), str(tmp_path / "states.npz")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    lm, tokenizer = load_model(folder / "bert")
    with np.load(tmp_path / "states.npz") as file:
        ids, mask, wanted = (torch.from_numpy(file[name]) for name in ("ids", "mask", "states"))
    mask = mask.bool()
    assert tokenizer.decode(ids[0]) == "[CLS] the girl dropped the kettle [SEP]"
    with torch.no_grad():
        states = hidden_states(lm.eval(), ids, mask)
    assert torch.allclose(states[mask], wanted[mask], atol=1e-5)
    with np.load(folder / "end.npz") as end:
        words = end["student.lm.bert.embeddings.word_embeddings.weight"]
    assert np.array_equal(words, lm.bert.embeddings.word_embeddings.weight.detach())


class Line(Objective):
    "y = w x, with noise that only the generator of torch decides."

    def __init__(self):
        super().__init__()
        self.weight, self.drop = nn.Parameter(torch.zeros(4)), nn.Dropout(0.5)

    def forward(self, x, y):
        return dict(loss=((self.drop(x) * self.weight).sum(1) - y).square().mean())


class Stop(Exception):
    pass


def train_line(out, stop=None, steps=30, **settings):
    "Train a line for 30 steps of 4; `stop` breaks off at that batch, which is made a step ahead."
    batches = 0

    def collate(items):
        nonlocal batches
        batches += 1
        if batches == stop:
            raise Stop
        examples = torch.tensor([example for example, _ in items])
        x = torch.stack([torch.sin(examples * (k + 1.0)) for k in range(4)], 1)
        return dict(x=x, y=x.sum(1))

    torch.manual_seed(0)
    line = Line()
    settings = dict(steps=steps, batch=4, lr=0.05, save_every=10, name="line") | settings
    history = fit(line, collate, 20, out, **settings)
    return line.weight.detach().clone(), history


@pytest.fixture
def broken_off(tmp_path):
    "A training that ended between step 20 and step 30, its checkpoints, and what it should have come to."
    wanted, _ = train_line(tmp_path / "whole")
    with pytest.raises(Stop):
        train_line(tmp_path / "run", stop=27)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-10", "checkpoint-20"]
    return tmp_path / "run", folder, wanted


@pytest.mark.parametrize(
    "file, message",
    [
        ("model.safetensors", "model.safetensors is missing"),
        ("optimizer.pt", "optimizer.pt is missing"),
        (CHECKSUMS, "it was not finished"),
    ],
)
def test_incomplete_checkpoint_is_left_out_by_name(broken_off, capsys, file, message):
    run, folder, wanted = broken_off
    (folder / "checkpoint-20" / file).unlink()
    weight, _ = train_line(run)
    printed = capsys.readouterr().out
    assert message in re.search("checkpoint checkpoint-20 is left out: (.*)", printed)[1]
    assert "resumes from checkpoint-10" in printed and torch.equal(weight, wanted)


def test_complete_checkpoint_is_used(broken_off, capsys):
    run, _, wanted = broken_off
    weight, _ = train_line(run)
    assert "resumes from checkpoint-20" in capsys.readouterr().out and torch.equal(weight, wanted)


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_no_pickle_is_run(broken_off, tmp_path, file):
    "The checksums are right, so that nothing but `weights_only` stands between the file and its code."
    run, checkpoints, _ = broken_off
    folder, mark = checkpoints / "checkpoint-20", tmp_path / "ran"
    assert (folder / file).is_file()
    torch.save(Payload(mark), folder / file)
    write_checksums(folder)
    with pytest.raises(pickle.UnpicklingError):
        train_line(run)
    assert not mark.exists()
    torch.load(folder / file, weights_only=False)
    assert mark.is_dir(), "the payload is harmless, and the test shows nothing"


def test_checkpoints_hold_no_other_pickles(broken_off):
    names = {file.name for file in (broken_off[1] / "checkpoint-20").iterdir()}
    pickles = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert names <= pickles | {"model.safetensors", "trainer_state.json", "loss_sums.safetensors", CHECKSUMS}


def test_patience_is_not_forgotten(tmp_path, capsys):
    "Validation gets worse from the first step: stopped in the middle of its patience, a run ends as another."

    def worse(items):
        return dict(x=torch.ones(len(items), 4), y=torch.full((len(items),), -9.0))

    settings = dict(steps=60, valid=(worse, 8), eval_every=5, patience=3)
    wanted, history = train_line(tmp_path / "whole", **settings)
    assert max(entry["step"] for entry in history) == 20
    with pytest.raises(Stop):
        train_line(tmp_path / "run", stop=19, **settings)
    weight, history = train_line(tmp_path / "run", **settings)
    assert "resumes from checkpoint-15" in capsys.readouterr().out
    assert max(entry["step"] for entry in history) == 20 and torch.equal(weight, wanted)


@pytest.fixture(scope="module")
def small():
    return TabletopSource(scale("smoke"), 101)


def teacher_batch(data, n=6):
    captions = data.captions[0][:n]
    features = np.random.default_rng(0).normal(size=(n, 4, 8))
    rows = np.arange(n)
    pairs = VideoText(captions, rows, features, np.ones((n, 4), bool), rows, np.arange(0))
    tokens = tokenize(data.tokenizer, captions, data.s.max_tokens)
    collate = video_text_collator(tokens, pairs, rows, data.tokenizer, data.s, 0)
    return collate([(k, 0) for k in range(n)])


def test_video_encoder_off_the_path_is_found(small):
    batch = teacher_batch(small)

    def new_teacher():
        return Teacher(small.s, small.tokenizer, 8, 0)

    for contrast in ("hinge", "info_nce"):
        assert check_trainable(TeacherObjective(new_teacher(), contrast), batch)["frozen"] == 0
    unused = TeacherObjective(new_teacher(), "none")
    unused.teacher.video.requires_grad_(True)
    detached = TeacherObjective(new_teacher(), "info_nce")
    detached.teacher.video.forward = torch.no_grad()(detached.teacher.video.forward)
    for objective in (unused, detached):
        with pytest.raises(ValueError, match=r"get no gradient: teacher\.video\."):
            check_trainable(objective, batch)
    frozen = TeacherObjective(new_teacher(), "info_nce", freeze_video=True)
    parameters = sum(p.numel() for p in frozen.teacher.video.parameters())
    assert check_trainable(frozen, batch)["frozen"] == parameters


def test_padding_does_not_matter(small):
    torch.manual_seed(0)
    s, tokens = small.s, small.tokens
    lm, teacher = (language_model(s, small.tokenizer, seed).double().eval() for seed in (1, 2))
    pool = torch.randn(9, s.hidden).double()
    kd = "soft_label+regression+voken+nst+crd+nt_xent"
    objective = StudentObjective(lm, teacher, kd, s=s, pool=pool).double().eval()
    by_length = np.argsort(tokens.lengths, kind="stable")
    rows = [(int(row), 0) for row in by_length[[0, 5, -9, -1]]]
    batch = text_collator(tokens, small.tokenizer, s, 0)(rows)
    mask = batch["mask"]
    assert not mask.all() and mask.shape[1] + 3 <= s.max_tokens

    def garbage(*shape):
        return torch.randint(5, len(small.tokenizer), shape)

    padding = torch.zeros(len(rows), 3, dtype=torch.bool)
    padded = dict(position=batch["position"])
    for name in ("ids", "masked"):
        inside = torch.where(mask, batch[name], garbage(*mask.shape))
        padded[name] = torch.cat([inside, garbage(len(rows), 3)], 1)
    for name in ("mask", "where"):
        padded[name] = torch.cat([batch[name], padding], 1)
    first_word = torch.arange(mask.shape[1]) == 1
    changed = batch | dict(masked=torch.where(first_word, 7, batch["masked"]))
    with torch.no_grad():
        wanted, same, other = (objective(**x) for x in (batch, padded, changed))
    assert set(wanted) == {"loss", "mlm", *kd.split("+")}
    for name in wanted:
        assert torch.allclose(wanted[name], same[name], rtol=1e-6, atol=1e-9), name
        assert not torch.allclose(wanted[name], other[name], rtol=1e-6, atol=1e-9), name


VERBS = dict(
    drop="drop|dropped|let go of",
    dunk="dunk|dunked|put",
    heat="heat|heated|hold|held",
    squeeze="squeeze|squeezed|press|pressed",
    push="push|pushed",
)
OUTCOME = {phrase: outcome for outcome, phrases in OUTCOME_PHRASES.items() for phrase in phrases}
FROM_VIDEO = ("video-only", "never filmed")  # kinds of questions that the counterfactual answers otherwise


def event_of(text):
    return next(event for event, verbs in VERBS.items() if re.search(rf"\b(?:{verbs})\b", text))


def words_of(texts) -> set:
    return {word for text in texts for word in text.split()}


@pytest.fixture(scope="module", params=[101, 7])
def pair(request):
    "A world and its counterfactual."
    sizes = dict(captions=1500, sentences=2500, takes=1)
    return [World(request.param, counterfactual=other, **sizes) for other in (False, True)]


def test_tokeniser_is_the_same_every_time(small):
    "Teacher and student train in processes of their own, and have to agree on every id."
    texts = [*small.captions[0], *small.sentences]
    first, *others = (train_tokenizer(texts, small.s.vocab_size, 40).get_vocab() for _ in range(4))
    assert all(other == first for other in others)


def test_counterfactual_says_the_same(pair):
    world, other = pair
    (captions, clips), (same_captions, same_clips) = world.captions(), other.captions()
    assert captions == same_captions and np.array_equal(clips, same_clips)
    assert world.sentences() == other.sentences()
    here, there = (w.task("piqa", "test", 400) for w in pair)
    assert (here.label != there.label)[here.kind == "video-only"].mean() > 0.3
    assert ((world.nouns.cls == other.nouns.cls) == (world.nouns.split == "train")).all()


def test_no_text_states_what_happens_to_test_nouns(pair):
    world = pair[0]
    nouns, split = set(world.nouns.noun), world.nouns.split
    phrases = [phrase for v in EVENTS.values() for outcome in v for phrase in OUTCOME_PHRASES[outcome]]
    states = re.compile(r"\b(?:" + "|".join(phrases) + r")\b")
    for corpus in (world.captions()[0], world.sentences()):
        stated = words_of(text for text in corpus if states.search(text)) & nouns
        assert set(split[list(stated)]) == {"train"}
        assert (split[list(words_of(corpus) & nouns)] == "test").sum() > 20


def test_never_filmed_nouns_have_no_clip(pair):
    world = pair[0]
    never, filmed = (set(world.nouns.noun[world.nouns.filmed == x]) for x in (False, True))
    assert never and set(world.nouns.split[list(never)]) == {"test"}
    assert filmed == set(world.clips.noun)
    assert not never & words_of(world.captions()[0]) and never <= words_of(world.sentences())


@pytest.mark.parametrize("which", [0, 1])
def test_labels_follow_the_classes(pair, which):
    "Answers derived again from the table of nouns and the words of the question alone."
    world = pair[which]
    seen = {right_of_piqa(world, x) for x in world.task("piqa", "test", 400).itertuples()} - {None}
    assert seen == {outcome for v in EVENTS.values() for outcome in v}, "an outcome was never asked for"
    checked = 0
    for task, derive in dict(mnli=right_of_mnli, tracie=right_of_tracie).items():
        questions = world.task(task, "test", 400)
        for x in questions[questions.kind.isin(FROM_VIDEO)].itertuples():
            assert x.label == derive(world, x), x
            checked += 1
    assert checked > 100


def right_of_piqa(world, x):
    "The outcome that a question about a film asks for, once its label is found to be right."
    noun, answers = world.nouns.loc[x.group], (x.sol1, x.sol2)
    if x.kind == "stated":
        right = [answer == f"in the {PLACE[noun.category]}" for answer in answers]
    else:
        assert x.group in x.goal.split()
        event = event_of(x.goal)
        right = [OUTCOME[answer.removeprefix("it ")] == noun[event] for answer in answers]
        assert (event == "push") == (x.kind == "static")
    assert sum(right) == 1 and right[x.label], x
    if x.kind in FROM_VIDEO:
        assert noun.filmed == (x.kind == "video-only")
        return noun[event]


def right_of_mnli(world, x):
    outcome = OUTCOME[x.sentence2.removeprefix(f"the {x.group} ")]
    return 0 if outcome == world.nouns.loc[x.group, event_of(x.sentence1)] else 2


def right_of_tracie(world, x):
    first, _, last, *_ = x.story.split(" . ")
    asked, relation = re.fullmatch(r"something (.*) (?:starts|ends) (before|after) .*", x.event).groups()
    nouns = [next(word for word in part.split() if word in world.nouns.index) for part in (first, last)]
    has = [world.nouns.loc[noun, event_of(first)] == OUTCOME[asked] for noun in nouns]
    assert sum(has) == 1
    return int(has[0] == (relation == "before"))


def test_looks_do_not_give_classes_away(pair):
    "Within a split, classes and looks are dealt out apart: knowing one, the other stays open."
    nouns = pair[0].nouns
    for split in ("train", "test"):
        rows = nouns[nouns.split == split]
        assert rows.cls.nunique() == len(CLASSES) and rows["shape"].nunique() == len(SHAPES)
        assert rows.groupby("shape").cls.nunique().min() >= 3
        assert rows.groupby("cls")["shape"].nunique().min() >= 3
