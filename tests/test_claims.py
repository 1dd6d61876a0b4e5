"The rules of the claims ledger, and the claims that this repository states."

import subprocess

import numpy as np
import pandas as pd
import pytest
from simulated import records, worlds

from vlkd.core.settings import settings_file
from vlkd.eval.claims import (
    check_claim,
    correct_families,
    first_commits,
    judge_all,
    read_claims,
    stated_at,
    stated_when,
)


def judge(claim, examples):
    return judge_all([claim], examples)[0]


BASE = dict(id="x", family="video-only", table="m5", paper="VidLanKD", where="Table 5", text="an example")


def greater(**more):
    return BASE | dict(kind="greater", better="a", worse="b", tasks=["piqa"], min_effect=1.0) | more


def equivalent(**more):
    return BASE | dict(kind="equivalent", a="a", b="twin", tasks=["piqa"], bound=1.0) | more


def not_worse(**more):
    return BASE | dict(kind="not_worse", no_worse="a", than="twin", tasks=["piqa"], bound=5.0) | more


def above_chance(**more):
    return BASE | dict(kind="above_chance", run="a", tasks=["piqa"], chance=50.0, min_effect=5.0) | more


def agreement(ranks, **more):
    return BASE | dict(kind="agreement", tasks=["piqa"], min_effect=0.3, ranks=ranks) | more


NOTED = {key: BASE[key] for key in ("id", "table", "paper", "where", "text")} | dict(kind="noted")


# ---- verdicts
@pytest.fixture(scope="module")
def three():
    "Records of a good run, of its twin and of two runs at chance."
    good = worlds("a", 0.8)
    return pd.concat([good, good.assign(run="twin"), worlds("b", 0.5), worlds("same", 0.5)])


@pytest.mark.parametrize(
    "claim,verdicts",
    [
        (greater(), "holds"),
        (greater(min_effect=60), "fails"),  # a sure effect, smaller than the smallest interesting one
        (greater(better="b", worse="a"), "opposite"),
        (greater(better="b", worse="a", min_effect=60), "fails"),
        (greater(worse="twin"), "fails"),  # exactly equal
        (greater(better="same"), ("undecided", "fails")),
        (equivalent(), "holds"),
        (equivalent(b="b"), "fails"),
        (above_chance(), "holds"),
        (above_chance(run="b", min_effect=20.0), "fails"),
        (above_chance(chance=99.0), "opposite"),
        (not_worse(), "holds"),
        (not_worse(than="b"), "holds"),  # better is not worse
        (not_worse(no_worse="b"), "fails"),
        (agreement(dict(b=80.0, same=80.0, a=82.0)), "holds"),
        (agreement(dict(b=82.0, same=82.0, a=80.0)), "opposite"),
        (NOTED, "noted"),
    ],
)
def test_verdicts(three, claim, verdicts):
    assert judge(claim, three)["verdict"] in verdicts


def test_what_a_verdict_tells(three):
    found = judge(greater(), three)
    keys = "id table paper where text kind family primary stated verdict provisional diff low high level p"
    keys += " p_holm detectable min_effect n_worlds n per_world evidence test"
    assert set(keys.split()) <= set(found)
    assert "an effect of 1 points is excluded" in found["test"]
    assert (found["n"], found["n_worlds"]) == (1000, 5)
    assert f"{found['diff']:+.1f} points" in found["evidence"]
    assert judge(greater(min_effect=found["diff"] + 0.5), three)["verdict"] == "undecided"


def test_worlds_and_tasks_that_are_missing():
    r = pd.concat([worlds("a", 0.8), worlds("b", 0.5, n_worlds=3)])
    two = judge(greater(tasks=["piqa", "mnli"]), r)
    assert two["diff"] == judge(greater(), r)["diff"]
    assert "on piqa alone, since no run has records of mnli" in two["evidence"]
    one = judge(greater(), r)
    assert one["n_worlds"] == 3 and "worlds 4, 5 left out" in one["evidence"]
    assert judge(greater(), r[(r.run == "b") | (r.seed > 3)])["evidence"].startswith("no world in which")
    assert "one world" in judge(greater(), r[r.seed == 1])["evidence"]


@pytest.mark.parametrize(
    "claim,message",
    [
        (greater(better="c"), "no records of c on piqa"),
        (greater(tasks=["piqa", "mnli"]), "no records of a on mnli"),
        (greater(subset="video-only"), "of kind video-only"),
    ],
)
def test_missing_records_are_not_tested(claim, message):
    both = worlds("b", 0.5)
    found = judge(claim, pd.concat([worlds("a", 0.8), both, both.assign(task="mnli")]))
    assert found["verdict"] == "not tested" and message in found["evidence"]
    assert (found["p"], found["n"]) == (None, 0)


def test_subset():
    frames = []
    for kind, accuracy, n in (("video-only", 0.9, 200), ("never filmed", 0.5, 300)):
        for run, right in (("a", accuracy), ("b", 0.5)):
            frames.append(worlds(run, right, kind=kind, n=n))
            frames[-1]["id"] = kind + frames[-1]["id"]
    r = pd.concat(frames)
    part = judge(greater(subset="video-only"), r)
    rest = judge(greater(subset="never filmed"), r)
    assert part["n"] == 1000
    assert part["diff"] > judge(greater(), r)["diff"] > rest["diff"]


def test_holm_within_a_family():
    r = pd.concat([worlds(run, p, n=60) for run, p in (("a", 0.8), ("b", 0.5), ("c", 0.52))])
    one = judge(greater(), r)
    others = [greater(id=f"x{i}", better="c", table=f"m{i}") for i in range(11)]
    family = judge_all([greater(), *others], r)
    assert family[0]["p"] == one["p"] == one["p_holm"]
    assert family[0]["p_holm"] == pytest.approx(12 * one["p"])
    apart = judge_all([greater(), *(c | dict(family="stated") for c in others)], r)
    assert apart[0]["p_holm"] == one["p"]


def test_pages_judged_apart_are_corrected_together():
    "The report corrects over all pages, and correcting what is corrected changes nothing."
    r = pd.concat([worlds(run, p, n=60) for run, p in (("a", 0.7), ("b", 0.5), ("c", 0.52))])
    first, second = [greater()], [greater(id="y", better="c", table="m7")]
    together = judge_all([*first, *second], r)
    assert together[0]["p_holm"] == pytest.approx(2 * together[0]["p"])
    assert correct_families([*judge_all(first, r), *judge_all(second, r)]) == together
    assert correct_families(together) == together


def test_primary_claims_are_corrected_on_their_own():
    r = pd.concat([worlds(run, p, n=60) for run, p in (("a", 0.7), ("b", 0.5), ("c", 0.52))])
    found = judge_all([greater(), greater(id="y", better="c", primary=True)], r)
    assert all(c["p_holm"] == c["p"] for c in found)


def test_a_weak_effect_among_many_claims_is_undecided():
    weak = greater(better="c", worse="b", min_effect=1.0)
    r = pd.concat([records("c", [1] * 9 + [0] + [1, 0] * 45), records("b", [0] * 9 + [1] + [1, 0] * 45)])
    alone = judge(weak, r)
    assert 0.0005 < alone["p"] < 0.05 and alone["verdict"] == "holds"
    others = [greater(id=f"y{i}", better="b", worse="c") for i in range(39)]
    among = judge_all([weak, *others], r)[0]
    assert among["verdict"] == "undecided" and among["detectable"] > alone["detectable"]


def test_fewer_than_five_worlds_are_provisional(three):
    assert not judge(greater(), three)["provisional"]
    assert judge(greater(), three[three.seed < 5])["provisional"]


@pytest.mark.parametrize("truth", [0.0, 6.0])
def test_false_verdicts_of_a_family(truth):
    """Holm's promise through the whole pipeline, on simulated records of five worlds: with a true difference
    of 0 any *holds* or *opposite* is false, with one of `min_effect` any *fails* is; a family has one in at
    most 5 % of the cases (and some)."""
    generator = np.random.default_rng(4)
    claims = [greater(id=f"x{k}", better=f"a{k}", worse=f"b{k}", min_effect=6.0) for k in range(3)]
    false, rounds = 0, 80
    for _ in range(rounds):
        frames = []
        for k in range(3):
            for run, gain in ((f"a{k}", truth), (f"b{k}", 0.0)):
                good = (60 + gain + generator.normal(0, 3, 5)) / 100
                right = (generator.random(200) < p for p in good)
                frames += [records(run, x, seed=seed) for seed, x in enumerate(right)]
        verdicts = {c["verdict"] for c in judge_all(claims, pd.concat(frames))}
        false += bool(verdicts & ({"fails"} if truth else {"holds", "opposite"}))
    assert false / rounds < 0.12


def test_a_claim_that_cannot_be_tested_at_a_scale():
    r = pd.concat([worlds("a", 0.8), worlds("b", 0.5)])
    claim = greater(not_at=dict(real="clips are stills"))
    assert judge_all([claim], r, scale="micro")[0]["verdict"] == "holds"
    found = judge_all([claim], r, scale="real")[0]
    assert (found["verdict"], found["diff"]) == ("not tested", None)
    assert found["evidence"] == "at scale real clips are stills"


# ---- mistakes
@pytest.mark.parametrize(
    "change,message",
    [
        (dict(kind="graeter"), "did you mean 'greater'"),
        (dict(min_efect=1.0), "did you mean 'min_effect'"),
        (dict(tasks=["piqua"]), "did you mean 'piqa'"),
        (dict(tasks=[]), "at least one task"),
        (dict(tasks="piqa"), "should be list"),
        (dict(tasks=["piqa", "piqa"]), "each once"),
        (dict(min_effect="1"), "should be float"),
        (dict(min_effect=True), "should be float"),
        (dict(min_effect=-1.0), "in points"),
        (dict(min_effect=0.0), "above 0"),
        (dict(primary=1), "should be bool"),
        (dict(family=" "), "needs family"),
        (dict(worse="a"), "both 'a'"),
        (dict(text=" "), "needs text"),
        (dict(where=3), "where = 3 should be str"),
        (dict(bound=1.0), "unknown key"),
        (dict(not_at=dict(reel="x")), "did you mean 'real'"),
        (dict(not_at=dict(real="")), "should say why"),
        (dict(not_at="real"), "should be dict"),
    ],
)
def test_bad_claim(change, message):
    with pytest.raises(ValueError, match=message):
        check_claim(greater(**change))


def test_missing_key():
    with pytest.raises(ValueError, match="needs bound"):
        check_claim(BASE | dict(kind="equivalent", a="a", b="b", tasks=["piqa"]))
    with pytest.raises(ValueError, match="three runs"):
        check_claim(agreement(dict(a=1.0, b=2.0)))


CLAIM = '[[table.m5.claim]]\nid = "x"\npaper = "p"\nwhere = "w"\ntext = "t"\n'


@pytest.mark.parametrize(
    "content,message",
    [
        ("", r"expected \[table.ID\] sections"),
        ("table = 3\n", r"expected \[table.ID\] sections"),
        ("[table]\nm5 = 1\n", r"expected \[\[table.m5.claim\]\]"),
        (CLAIM + "[other]\n", "unknown section 'other'"),
        ("[table.m5]\nclaim = [1]\n", r"expected \[\[table.m5.claim\]\]"),
        (CLAIM + CLAIM, "claim 2 .*: the id m5.x occurs a second time"),
        (CLAIM + CLAIM.replace('"x"', "3"), "claim 2 .*id = 3 should be str"),
        ("[[cl", "not valid TOML"),
        (b"\xff", "not valid TOML"),
    ],
)
def test_bad_file(tmp_path, content, message):
    file = tmp_path / "claims.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_claims(file)
    assert "claims.toml" in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no claims file"):
        read_claims(tmp_path / "claims.toml")


# ---- the claims of this repository
PAPER = {  # SST-2, QNLI, QQP, MNLI
    "text": (88.8, 84.9, 85.3, 77.4),
    "soft": (87.2, 84.4, 86.4, 76.6),
    "regression": (88.8, 84.8, 87.1, 78.1),
    "voken": (89.7, 85.5, 86.5, 77.8),
    "nst": (91.1, 85.0, 87.4, 78.4),
    "crd": (90.0, 85.5, 87.3, 78.3),
    "nst-crd": (91.5, 85.8, 87.4, 78.7),
    "none": (79.6, 61.5, 72.7, 61.6),
    "asr": (83.3, 78.5, 83.7, 71.5),
    "nst-mlm": (88.1, 83.1, 85.6, 77.4),
    "nst-ct": (88.9, 85.2, 86.2, 77.5),
    "video-pt": (84.0, 78.9, 84.2, 73.1),
    "two-stage": (90.3, 85.0, 87.2, 76.9),
    "voken-image": (89.3, 84.4, 86.0, 77.5),
    "nst-image": (88.9, 85.0, 86.3, 77.2),
    "nst-nohead": (89.4, 84.8, 86.7, 77.0),
    "crd-nohead": (88.9, 85.1, 86.6, 77.8),
    "base-text": (78.9,),  # the average of Table 1
    "base-voken": (81.7,),
    "base-voken-clip": (82.3,),
    "base-nst-crd": (82.4,),
    "base-nst-crd-clip": (82.6,),
}


def _paper_average(run: str) -> float:
    return float(np.mean(PAPER[run.removeprefix("student-")]))


def test_smallest_effects_are_under_those_of_the_paper():
    "A claim on an average asks for less than the paper reports, else it could not hold even in the paper."
    on_averages = [c for c in read_claims() if len(c.get("tasks", [])) >= 4 and c["kind"] == "greater"]
    assert on_averages
    for c in on_averages:
        assert c["min_effect"] < _paper_average(c["better"]) - _paper_average(c["worse"]), c["id"]


def test_ranks_are_those_of_the_paper():
    ranked = [c for c in read_claims() if c["kind"] == "agreement"]
    assert ranked
    for c in ranked:
        for run, average in c["ranks"].items():
            assert average == pytest.approx(_paper_average(run)), (c["id"], run)


GREATER = """[[table.{table}.claim]]
id = "{id}"
paper = "p"
where = "w"
text = "t"
family = "f"
better = "{better}"
worse = "{worse}"
tasks = ["piqa"]
min_effect = 1.0
primary = true
"""


def test_a_contrast_is_stated_once(tmp_path):
    file = tmp_path / "claims.toml"
    first = GREATER.format(table="m5", id="x", better="a", worse="b") + 'also = ["m7"]\n'
    file.write_text(first)
    assert [c["id"] for c in read_claims(file, "m7")] == ["m5.x"] and read_claims(file, "m3") == []
    file.write_text(first + GREATER.format(table="m7", id="y", better="b", worse="a"))
    with pytest.raises(ValueError, match=r"m5\.x compares the same"):
        read_claims(file)


def test_a_table_has_few_primary_claims(tmp_path):
    file = tmp_path / "claims.toml"
    seven = [GREATER.format(table="m5", id=k, better=f"a{k}", worse="b") for k in range(7)]
    file.write_text("".join(seven))
    with pytest.raises(ValueError, match="7 primary claims"):
        read_claims(file)


# ---- before or after
def _commit(folder, text: str, message: str) -> str:
    (folder / "nbs/experiments/x").mkdir(parents=True, exist_ok=True)
    (folder / "nbs/experiments/x/claims.toml").write_text(text)
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["add", "-A"], [*who, "commit", "-qm", message]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True)
    return head.stdout.decode().strip()


def test_when_a_claim_was_stated(tmp_path, monkeypatch):
    "By the first commit with its test: another wording is the same claim, another effect is another one."
    text = GREATER.format(table="m5", id="x", better="a", worse="b")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "settings.ini").write_text(settings_file().read_text())
    monkeypatch.setattr("vlkd.eval.claims.settings_file", lambda: tmp_path / "settings.ini")
    monkeypatch.setattr("vlkd.eval.claims.path", lambda name: tmp_path / name)
    commits = [
        _commit(tmp_path, "[[broken", "unreadable"),
        _commit(tmp_path, text.replace("1.0", "2.0"), "larger effect"),
        _commit(tmp_path, text, "this test"),
        _commit(tmp_path, text.replace('"t"', '"other words"'), "other words"),
    ]
    first_commits.cache_clear()
    claim = read_claims()[0]
    assert stated_at(claim) == commits[2]
    assert stated_at(claim | dict(min_effect=3.0)) == ""
    assert [stated_when(commits[2], c) for c in commits] == ["after", "after", "before", "before"]
    assert stated_when("", commits[3]) == stated_when(commits[2], "0" * 40) == "unknown"
    first_commits.cache_clear()
