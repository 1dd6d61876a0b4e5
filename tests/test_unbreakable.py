"""What is promised of interrupted, damaged and hostile circumstances: processes killed anywhere, bits that flip, full disks, folders that cannot be written, code in the place of data."""
import ast, contextlib, io, json, os, pickle, re, shutil, signal, stat, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from test_bad_inputs import Evil, content, extract, films, forked, unix, vlkd  # noqa: F401 films is a fixture
from test_reproduce import Toy, end, params, plain, plan, quick, start, toy  # noqa: F401 quick and toy are fixtures
from vlkd.core import *
from vlkd.core import _plain

LIBRARY = Path(__file__).resolve().parent.parent/"vlkd"
WORDS = "copper iron gold salt ice is soft hard and melts rusts never often".split()


# Jobs: each makes a folder, gives the same numbers whenever it is asked to, and goes on where it was broken off

class Mean:
    "An encoder of rows that are given."
    name, dim = "given", 4
    def encode(self, x): return x

class States:
    "Token states that depend on the ids alone."
    fingerprint = "states"
    def __call__(self, ids, mask):
        import torch
        return torch.sin(ids[..., None]*torch.arange(1, 9))

def texts(n=200): r = rng("unbreakable"); return [" ".join(r.choice(WORDS, r.integers(3, 12))) for _ in range(n)]

def tokenizer():
    from vlkd.data.text import train_tokenizer
    return train_tokenizer([" ".join(WORDS)], 80)

def corpus(out):
    from vlkd.data.corpus import text_list, tokenize_corpus
    t = tokenize_corpus(text_list(texts()), tokenizer(), out, max_tokens=16, shard_rows=20); return read_corpus(out, t)
def read_corpus(out, t=None):
    from vlkd.data.corpus import CorpusTokens
    t = t or CorpusTokens(out, tokenizer()); x, m = t[np.arange(len(t))]; return dict(x=x.numpy(), m=m.numpy(), n=np.asarray(t.lengths))

def features(out):
    from vlkd.data.video import extract
    x = {f"v{i}": rng("features", i).normal(size=(3+i % 4, 4)).astype(np.float32) for i in range(12)}
    extract({k: k for k in x}, Mean(), out, shard_size=3, read=lambda p: (x[str(p)], None)); return read_features(out)
def read_features(out):
    from vlkd.data.howto import MappedFeatures
    from vlkd.data.video import load_features
    f, g = load_features(out), MappedFeatures(out); assert all(np.array_equal(f[k], g[k]) for k in f); return {k: f[k].copy() for k in f}

def captions(out):
    from vlkd.data.howto import caption_table
    src = out.parent/"captions.json"; r = rng("captions")
    if not src.is_file(): write_json(src, {f"v{i}": dict(start=[0, 2.5], end=[2, 4.25], text=[" ".join(r.choice(WORDS, 4)), "naïve text"]) for i in range(20)})
    caption_table(src, out); return read_captions(out)
def read_captions(out):
    from vlkd.data.howto import CaptionTable
    t = CaptionTable(out); return dict(video=np.array(t.video), start=np.array(t.start), end=np.array(t.end), texts=np.array(list(t.texts)), videos=np.array(t.videos))

def pool():
    from vlkd.models.vokens import VokenPool
    r = rng("pool"); n = 9; return VokenPool(pd.DataFrame(dict(task="t", video=[f"v{i}" for i in range(n)], start=0., end=r.random(n))), r.normal(size=(n, 8)).astype(np.float32))

def vokens(out):
    from vlkd.data.text import tokenize
    from vlkd.models.vokens import vokenize
    pool().save(out/"pool"); tok = tokenizer(); vokenize(tokenize(tok, texts(60)), States(), pool(), tok, out/"vokens", batch=8, shard_rows=16); return read_vokens(out)
def read_vokens(out):
    from vlkd.data.text import tokenize
    from vlkd.models.vokens import StoredVokens, VokenPool
    tok = tokenizer(); p = VokenPool.load(out/"pool"); v = StoredVokens(out/"vokens", tokenize(tok, texts(60)), tok, p); return dict(v=v[np.arange(len(v))].numpy(), pool=p.vectors, end=p.clips.end.to_numpy(), size=np.array(v.size), counts=v.counts())

def teacher(out):
    import torch
    from vlkd.models.video import Teacher
    s = scale("smoke", hidden=16, heads=2, layers=1, intermediate=16); tok = tokenizer(); t = Teacher(s, tok, 4, 0); t.save(out, tok); return read_teacher(out)
def read_teacher(out):
    from vlkd.models.video import Teacher
    t, tok = Teacher.load(out, scale("smoke", hidden=16, heads=2, layers=1, intermediate=16)); return {k: v.numpy() for k, v in t.state_dict().items()} | dict(ids=np.array(tok(texts(5), padding=True)["input_ids"]))

def run(out):
    r = rng("record"); record(out, dict(x=float(r.random())), tables=dict(t=pd.DataFrame(dict(a=r.random(40)))), examples=pd.DataFrame(dict(b=r.random(40))), headline="h"); files = {str(f.relative_to(out)): (f.stat().st_size, sha256_file(f)) for f in sorted(out.rglob("*")) if f.is_file() and f.name != "run.json"}
    write_json(out/"run.json", dict(key="k", files=files)); return read_run(out)
def read_run(out): r = Run(out); return dict(x=np.array(r.metrics["x"]), a=r.table("t").a.to_numpy(), b=r.examples.b.to_numpy())

def training(out):
    from test_training import line
    w, h = line(out); w = w.numpy(); return dict(w=w, loss=np.array([x["loss"] for x in h if "loss" in x]))

JOBS = dict(training=(training, None), corpus=(corpus, read_corpus), features=(features, read_features), captions=(captions, read_captions), vokens=(vokens, read_vokens), teacher=(teacher, read_teacher), record=(run, read_run))

def quiet(f, *a):
    with contextlib.redirect_stdout(io.StringIO()) as o: x = f(*a)
    return x, o.getvalue()

def same(a, b): return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
def part(name, a, b): return same(a, b) or name == "features" and set(a) < set(b) and all(np.array_equal(a[k], b[k]) for k in a)     # a folder of features says how far it has come

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Job -> its folder, its numbers, the seconds and the number of file operations that it takes; each made once."
    made = {}
    def get(name):
        if name not in made:
            d = tmp_path_factory.mktemp(name)/"whole"; x, _ = quiet(JOBS[name][0], d)
            e = d.parent/"events"; began = time.monotonic(); assert crash(lambda: JOBS[name][0](d.parent/"counted"), d.parent, count=e) == 0
            made[name] = SimpleNamespace(folder=d, numbers=x, seconds=time.monotonic()-began, events=int(e.read_text()))
        return made[name]
    return get


# SIGKILL

def crash(f, below, *, event=None, after=None, count=None):
    "Exit code of `f()` in a process that is killed at its `event`-th change of a file below a folder, or after some seconds; `count`: the file that gets the number of such changes."
    def watched():
        n, top = [0], str(below)
        def hook(what, args):
            if what == "open": where, w = args[0], isinstance(args[1], str) and set(args[1]) & set("wax+") or args[2] & (os.O_WRONLY | os.O_RDWR)
            else: where, w = args[0] if args else None, what in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")
            if w and isinstance(where, (str, os.PathLike)) and os.fspath(where).startswith(top):
                if n[0] == event: os.kill(os.getpid(), signal.SIGKILL)
                n[0] += 1
        sys.addaudithook(hook); f(); m = n[0]
        if count is not None: Path(count).write_text(str(m))
    return forked(watched, after=after)

def killed_and_resumed(name, whole, tmp_path, rounds):
    w, (job, look) = whole(name), JOBS[name]; r = rng("moments", name, rounds); died = 0
    for i in range(rounds):                                                         # twice killed in the same folder: at a change of a file, and at any time
        out = tmp_path/f"{i}"; moments = [dict(event=int(r.integers(w.events))), dict(after=float(r.random()*w.seconds))]
        for m in moments:
            if name == "captions" and not (tmp_path/"captions.json").is_file(): shutil.copy(w.folder.parent/"captions.json", tmp_path)
            code = crash(lambda: job(out), tmp_path, **m); assert code in (0, -signal.SIGKILL), (name, m, code); died += code != 0
            if look:                                                                # what is there is whole, or says that it is not
                try: x, _ = quiet(look, out)
                except (ValueError, OSError) as e: assert str(out) in str(e), (m, e)
                else: assert part(name, x, w.numbers), m
        x, _ = quiet(job, out); assert same(x, w.numbers), moments
    assert died >= rounds, "the kills came too late to test anything"

@unix
@pytest.mark.parametrize("name", JOBS)
def test_killed_at_4_random_moments(name, whole, tmp_path): killed_and_resumed(name, whole, tmp_path, 2)

@unix
@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_killed_at_20_random_moments(name, whole, tmp_path): killed_and_resumed(name, whole, tmp_path, 10)

@unix
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_extraction_killed_at_random_moments(films, tmp_path, kills):
    "Of videos, with files that cannot be read among them."
    want = content(films.parent/"whole"); e = tmp_path/"events"; assert crash(lambda: extract(films, tmp_path/"counted"), tmp_path, count=e) == 0; n, r, out = int(e.read_text()), rng("extraction", kills), tmp_path/"out"
    for k in range(kills):
        assert crash(lambda: extract(films, out), tmp_path, event=int(r.integers(n//2))) in (0, -signal.SIGKILL)
        if k % 4 == 3: extract(films, out); assert content(out) == want; shutil.rmtree(out)


# `vlkd reproduce`

chain = """import hashlib, time
from vlkd.core import write_json
p = o/'chain.json'; s = json.loads(p.read_text()) if p.exists() else dict(n=0, h='')
while s['n'] < 10: s = dict(n=s['n']+1, h=hashlib.sha256(f"{s['h']} {seed} {s['n']}".encode()).hexdigest()); write_json(p, s); time.sleep(.01)
score = int(s['h'][:6], 16)"""

def results(toy): return {p.name: {f.name: f.read_bytes() for f in p.iterdir() if f.name not in ("run.json", "notebook.ipynb") and f.name[0] != "."} for p in sorted((toy.d/"runs/smoke").glob("*@*"))}

@unix
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_reproduce_killed_at_random_moments(quick, kills):
    "The runner is killed, with or without its workers, and started again: the records are those of a graph that nobody stopped."
    import psutil
    toy = quick; toy.nb("teacher", params, start, chain, end); began = time.monotonic(); assert quiet(toy.run)[0]["failed"] == {}; took = time.monotonic()-began; want, r = results(toy), rng("reproduce", kills); died = 0
    assert set(want) == {"teacher@1", "student@1", "other@1", "t1@1"}; shutil.rmtree(toy.d/"runs")
    for k in range(kills):
        if (pid := os.fork()) == 0:
            with contextlib.suppress(BaseException): os.dup2(os.open(os.devnull, os.O_WRONLY), 1); signal.alarm(120); toy.run()
            os._exit(0)
        time.sleep(float(r.random())*took*.8)
        with contextlib.suppress(psutil.Error):
            tree = psutil.Process(pid).children(recursive=True) if k % 2 else []; os.kill(pid, signal.SIGKILL)
            for q in tree: q.kill()
        died += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
        for n, x in results(toy).items(): assert x == want[n], n                     # a run that has its place is whole
        if k % 4 == 3:
            assert quiet(toy.run)[0]["failed"] == {} and results(toy) == want and toy.why() == {}
            assert not list((toy.d/"runs/smoke/.partial").iterdir()); shutil.rmtree(toy.d/"runs")
    assert died >= kills/2

@unix
def test_reproduce_on_a_full_disk(quick):
    toy = quick; quiet(toy.run); want = results(toy); small = (run_folder("t1", "smoke", 1)/"run.json").stat().st_size//2; shutil.rmtree(toy.d/"runs")
    code = forked(toy.run, size=small); assert code == 99 and not results(toy)
    assert quiet(toy.run)[0]["failed"] == {} and results(toy) == want


# Bits that flip, files that are cut, empty or in disorder

def flip(b:bytes, r) -> bytes: x = bytearray(b); x[r.integers(len(x))] ^= 1 << int(r.integers(8)); return bytes(x)
DAMAGE = dict(flip=flip, cut=lambda b, r: b[:int(r.integers(len(b)))], empty=lambda b, r: b"", swapped=lambda b, r: b[len(b)//2:]+b[:len(b)//2])

def damaged_files(folder): return [f for f in sorted(folder.rglob("*")) if f.is_file() and f.stat().st_size and not f.name.startswith(".lock")]

@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", [k for k in JOBS if JOBS[k][1]])
def test_damage_is_named_or_does_not_matter(name, how, whole, tmp_path):
    "Every file of a finished folder in turn: reading gives the same numbers, or an error with the name of a file of the folder."
    w = whole(name); r = rng("damage", name, how); named = set(); files = damaged_files(w.folder); assert files
    for f in files:
        rel = f.relative_to(w.folder); out = tmp_path/"d"; shutil.rmtree(out, ignore_errors=True); shutil.copytree(w.folder, out); b = f.read_bytes()
        for _ in range(4 if how == "flip" else 1):
            (out/rel).write_bytes(DAMAGE[how](b, r))
            try: x, _ = quiet(JOBS[name][1], out)
            except (ValueError, OSError) as e: assert any(q.name in str(e) for q in (f, f.with_suffix(".npy"), f.with_suffix(""))), (rel, e); named.add(rel)
            else: assert same(x, w.numbers), f"{rel}: other numbers, and not a word"
    assert named, "nothing was ever noticed"

@pytest.mark.parametrize("name, rebuilt", [("corpus", ".npy"), ("features", ".safetensors"), ("vokens", ".npy")])
def test_damaged_shards_are_made_again(name, rebuilt, whole, tmp_path):
    w = whole(name); r = rng("rebuilt", name); files = [f for f in damaged_files(w.folder) if f.suffix == rebuilt and f.name != "vectors.npy"]; assert len(files) >= 3
    for f in files:
        out = tmp_path/f.stem; shutil.copytree(w.folder, out); (out/f.relative_to(w.folder)).write_bytes(flip(f.read_bytes(), r))
        x, said = quiet(JOBS[name][0], out); assert same(x, w.numbers) and f.name in said and (out/f.relative_to(w.folder)).read_bytes() == f.read_bytes()

def test_damaged_shards_of_videos_are_made_again(films, tmp_path):
    want = content(films.parent/"whole"); r = rng("videos")
    for n, b in want.items():
        shutil.rmtree(tmp_path/"out", ignore_errors=True); shutil.copytree(films.parent/"whole", tmp_path/"out"); (tmp_path/"out"/n).write_bytes(flip(b, r))
        try: extract(films, tmp_path/"out")
        except ValueError as e: assert n == "plan.json" and n in str(e)
        else: assert n != "plan.json" and content(tmp_path/"out") == want, n

@pytest.mark.parametrize("how", DAMAGE)
def test_damage_of_a_checkpoint(how, tmp_path, whole):
    "Every file of the newest checkpoint: it is left out by name, and the training ends with the same weights."
    from test_training import Stop, line
    want = whole("training").numbers; r = rng("checkpoint", how)
    with pytest.raises(Stop): quiet(lambda: line(tmp_path/"stopped", stop=27))
    for f in damaged_files(tmp_path/"stopped"/"checkpoints"/"checkpoint-20"):
        out = tmp_path/f.name; shutil.copytree(tmp_path/"stopped", out); g = out/"checkpoints"/"checkpoint-20"/f.name; g.write_bytes(DAMAGE[how](f.read_bytes(), r))
        (w, _), said = quiet(line, out); assert np.array_equal(w.numpy(), want["w"]) and re.search(r"checkpoint-20 is left out: .*\w+ is (damaged|broken|missing)", said) and "resumes from checkpoint-10" in said, (f.name, said)

@pytest.mark.parametrize("how", DAMAGE)
def test_damage_of_a_cache_file(how, tmp_path, monkeypatch):
    "Read-outs of Tabletop's encoder: made again, with the same numbers."
    from vlkd.models import tabletop as t
    def fit(self, *a):
        r = rng("read-outs"); [setattr(self, k, r.normal(size=(3, 4)).astype(np.float32)) for k in t._parts]; self.columns = list("abc"); made.append(1); return self
    monkeypatch.setattr(t.TabletopEncoder, "fit", fit); r, made = rng("cache", how), []; numbers = lambda e: {k: getattr(e, k) for k in t._parts} | dict(c=np.array(e.columns))
    want = numbers(t._load_read_outs(tmp_path)); t._load_read_outs(tmp_path); assert len(made) == 1; files = damaged_files(tmp_path); assert len(files) == 2
    for n, f in enumerate(files, 2):
        f.write_bytes(DAMAGE[how](f.read_bytes(), r)); e, said = quiet(t._load_read_outs, tmp_path); assert same(numbers(e), want) and len(made) == n and "is damaged: it is made again" in said

def test_a_run_that_was_changed_is_not_read(whole, tmp_path):
    shutil.copytree(whole("record").folder, tmp_path/"r"); f = tmp_path/"r"/"result.json"; write_json(f, read_json(f) | dict(metrics=dict(x=.99)))
    with pytest.raises(ValueError, match="result.json was changed after it was recorded"): Run(tmp_path/"r")
    (tmp_path/"r"/"run.json").unlink(); assert Run(tmp_path/"r").metrics["x"] == .99       # a notebook run by hand has no receipt

def test_a_seal(tmp_path):
    f = write_json(tmp_path/"a.json", {"b": (1, 2.5), 3: None}, seal=True); assert read_json(f) == {"b": [1, 2.5], "3": None}
    for a, b in (("2.5", "2.0"), ('"b"', '"c"'), ("null", "true")):
        s = f.read_text(); assert a in s; (tmp_path/"c.json").write_text(s.replace(a, b))
        with pytest.raises(ValueError, match="c.json was changed or damaged"): read_json(tmp_path/"c.json")


# Full disks

@unix
@pytest.mark.parametrize("name", [k for k in JOBS if k != "training"])
def test_full_disk(name, whole, tmp_path):
    w, (job, look) = whole(name), JOBS[name]; sizes = sorted({f.stat().st_size for f in damaged_files(w.folder)}); r = rng("disk", name)
    for n, size in enumerate((sizes[0]-1, int(r.integers(sizes[0], sizes[-1])), sizes[-1]-1)):
        out = tmp_path/f"{n}"/"out"; out.parent.mkdir(); [shutil.copy(f, out.parent) for f in w.folder.parent.glob("captions.json")]
        assert forked(lambda: job(out), size=size) == 99
        try: x, _ = quiet(look, out)
        except (ValueError, OSError) as e: assert str(out) in str(e), e
        else: assert part(name, x, w.numbers)
        x, _ = quiet(job, out); assert same(x, w.numbers)
