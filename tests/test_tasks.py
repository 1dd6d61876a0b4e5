"Readers and writers of the downstream tasks: round trips, every mistake, fuzz, and the real files."

import csv
import gzip
import json
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlkd.core.settings import data_dir
from vlkd.data.readers import content_words
from vlkd.data.scores import (
    bag_of_words_baseline,
    category_scores,
    hypothesis_only_baseline,
    majority,
    matthews,
    prior,
    tracie_scores,
    two_way,
)
from vlkd.data.squad import qnli_from_squad
from vlkd.data.tasks import TASKS, canonical, read_task, write_task

fuzz = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HEADS = dict(
    sst2="sentence\tlabel",
    qnli="index\tquestion\tsentence\tlabel",
    qqp="id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
)
ROWS = dict(sst2="fine .\t1", qnli="7\twhat ?\tthat .\tnot_entailment", qqp="3\t1\t2\twhat ?\twho ?\t0")


def frame(name, n=6, text='" {} é\u2028\x0c\x85 {} ', **more):
    columns = {c: [text.format(c, i // 2) for i in range(n)] for c in TASKS[name].columns}
    labels = [i % len(TASKS[name].labels) for i in range(n)]
    return canonical(name, pd.DataFrame(columns | dict(label=labels) | more))


# ---- round trips
@pytest.mark.parametrize(
    "name, split", [(n, s) for n in TASKS for s in TASKS[n].format.files if s in ("train", "dev")]
)
@pytest.mark.parametrize("gz", [False, True])
def test_round_trip(name, split, gz, tmp_path):
    for df in (
        frame(name),
        frame(name, id=[f"w1-{i}" for i in range(6)]),
        frame(name, group=[f"noun{i // 3}" for i in range(6)], kind=["", "video-only"] * 3),
    ):
        p = write_task(name, df, tmp_path, split)
        if gz:
            for f in list(tmp_path.iterdir()):
                (tmp_path / f"{f.name}.gz").write_bytes(gzip.compress(f.read_bytes()))
                f.unlink()
        pd.testing.assert_frame_equal(read_task(name, tmp_path, split), df)
        assert p.parent == tmp_path


def test_no_groups_file_without_need(tmp_path):
    for name in TASKS:
        write_task(name, frame(name), tmp_path / name, "dev")
        assert not list((tmp_path / name).glob("*-groups.tsv")), name
    write_task("sst2", frame("sst2", kind=["x"] * 6), tmp_path / "sst2", "dev")
    assert (tmp_path / "sst2/dev-groups.tsv").is_file()
    write_task("sst2", frame("sst2"), tmp_path / "sst2", "dev")
    assert not (tmp_path / "sst2/dev-groups.tsv").is_file()  # nothing stale stays


def test_official_columns(tmp_path):
    "An independent reader (csv without quoting) finds the official headers and values."

    def rows(name, split="dev", text="{} {}"):
        p = write_task(name, frame(name, text=text), tmp_path / name, split)
        return list(
            csv.reader(p.open(encoding="utf-8", newline="\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
        )

    for name in HEADS:
        head, *cells = rows(name, text='" {} {}')
        column = TASKS[name].columns[0]
        assert "\t".join(head) == HEADS[name]
        assert [row[head.index(column)] for row in cells] == frame(name, text='" {} {}')[column].tolist()
    head, *cells = rows("mnli")
    texts_on = ["sentence1", "sentence2", "label1", "label2", "label3", "label4", "label5", "gold_label"]
    assert head[:4] == ["index", "promptID", "pairID", "genre"] and head[8:] == texts_on
    assert [row[-1] for row in cells[:3]] == ["entailment", "neutral", "contradiction"]
    assert {len(row) for row in cells} == {16}
    p = write_task("piqa", frame("piqa"), tmp_path / "piqa", "dev")
    assert p.name == "valid.jsonl"
    assert list(json.loads(p.read_text(encoding="utf-8").split("\n")[0])) == ["goal", "sol1", "sol2"]
    assert rows("tracie", "train")[0] == ["event: event 0 story: story 0", "answer: negative"]


def test_writer_refuses_and_leaves_folder(tmp_path):
    for name in TASKS:
        d = tmp_path / name
        write_task(name, frame(name), d, "dev")
        before = {f.name: f.read_bytes() for f in d.iterdir()}
        c = TASKS[name].columns[0]
        for bad in ("a\tb", "a\nb", "a\rb"):
            df = frame(name)
            df.loc[2, c] = bad
            if name in ("piqa", "axb") or (name == "swag" and "\r" not in bad):
                write_task(name, df, tmp_path / "json", "dev")
                assert read_task(name, tmp_path / "json", "dev")[c][2] == bad
                continue
            with pytest.raises(ValueError, match="row 2"):
                write_task(name, df, d, "dev")
            assert {f.name: f.read_bytes() for f in d.iterdir()} == before
    df = frame("tracie")
    df.loc[1, "event"] = "a story: b"
    with pytest.raises(ValueError, match=r"row 1.*cannot carry"):
        write_task("tracie", df, tmp_path, "dev")


@fuzz
@given(
    st.sampled_from(sorted(TASKS)),
    st.lists(st.tuples(*[st.text(max_size=12)] * 5, st.integers(0, 1)), min_size=1, max_size=4),
)
def test_fuzz_round_trip(tmp_path, name, rows):
    "Any text is written and comes back equal, or is refused as ValueError."
    t = TASKS[name]
    df = pd.DataFrame([dict(zip(t.columns, r[:5], strict=False)) | dict(label=r[5]) for r in rows])
    try:
        df = canonical(t, df)
        write_task(name, df, tmp_path / "f", "dev")
    except ValueError:
        return
    pd.testing.assert_frame_equal(read_task(name, tmp_path / "f", "dev"), df)


# ---- mistakes
GOOD = {n: f"{HEADS[n]}\n{ROWS[n]}\n".encode() for n in HEADS} | dict(
    swag=b"video-id,fold-ind,startphrase,gold-source,ending0,ending1,ending2,ending3,label\n"
    b'v,7,"He nods, she",gold,"says ""no"".",b,c,d,2\n',
    diagnostics=b"Lexical Semantics\tPredicate-Argument Structure\tLogic\tKnowledge\tDomain\t"
    b"Premise\tHypothesis\tLabel\n\t\tNegation\tWorld\tNews\tIt is.\tIt was.\tneutral\n",
    axb=b'{"idx": 7, "label": "entailment", '
    b'"sentence1": "It is.", "sentence2": "It was.", "logic": "Negation"}\n',
    piqa=b'{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}\n',
    tracie=b"event: e starts after f story: s.\tanswer: positive\n",
    mnli=b"entailment\tone .\ttwo .\n",
    mnli_mm=b"entailment\tone .\ttwo .\n",
)
FILE = dict(
    sst2="dev.tsv",
    qnli="dev.tsv",
    qqp="dev.tsv",
    piqa="valid.jsonl",
    tracie="uniform_prior_test.txt",
    mnli="mnli_matched.tsv",
    mnli_mm="mnli_mismatched.tsv",
    swag="val.csv",
    diagnostics="diagnostic-full.tsv",
    axb="AX-b.jsonl",
)


def read_bytes(folder, name, data, gz=False):
    f = folder / (FILE[name] + (".gz" if gz else ""))
    f.write_bytes(data)
    return read_task(name, folder, "dev")


@pytest.mark.parametrize("name", GOOD)
def test_common_mistakes(name, tmp_path):
    good = GOOD[name]
    for same in (good, good.replace(b"\n", b"\r\n"), good[:-1], b"\xef\xbb\xbf" + good):
        assert (
            len(read_bytes(tmp_path, name, same)) == 1
        )  # Windows line ends, none at the end, a mark of order
    last = good.count(b"\n")
    mistakes = [
        (b"", f"{FILE[name]}.*(empty|no rows)"),
        (good.replace(b"e", b"\xe9", 1), "line 1: not UTF-8"),
        (good[:-1] + b"\t}\n", f"line {last}: "),
        (b"\xff\xfe" + good.decode().encode("utf-16-le"), "line 1: not UTF-8"),
    ]
    if name != "swag":
        mistakes.append((good + b"\n", f"line {last + 1}: "))
    for data, says in mistakes:
        with pytest.raises(ValueError, match=says) as e:
            read_bytes(tmp_path, name, data)
        assert FILE[name] in str(e.value)
    (tmp_path / FILE[name]).unlink()
    with pytest.raises(FileNotFoundError, match="has none of"):
        read_task(name, tmp_path, "dev")
    long = good + (good.split(b"\n")[-2] + b"\n") * 500
    packed = gzip.compress(long)
    for cut in (len(packed) - 4, len(packed) // 2, 12):
        with pytest.raises(ValueError, match=r"gz, line .*broken or cut short"):
            read_bytes(tmp_path, name, packed[:cut], gz=True)
    with pytest.raises(ValueError, match=r"gz, line 1.*broken or cut short"):
        read_bytes(tmp_path, name, good, gz=True)  # not gzip at all
    with pytest.raises(ValueError, match="both"):
        read_bytes(tmp_path, name, good)  # plain and gz side by side
    with pytest.raises(FileNotFoundError, match="not a folder"):
        read_task(name, tmp_path / "nothing", "dev")
    with pytest.raises(ValueError, match="unknown split"):
        read_task(name, tmp_path, "deb")


def piqa_row(**change) -> bytes:
    return json.dumps(dict(goal="g", sol1="a", sol2="b") | change).encode() + b"\n"


AGAIN = {name: data.split(b"\n")[1] + b"\n" for name, data in GOOD.items()}  # a second row
NLI = "expected entailment or neutral or contradiction"
MISTAKES = [
    (
        "sst2",
        b"text\tlabel\nfine .\t1\n",
        "line 1: no column 'sentence'; expected sentence, label, found text, label",
    ),
    ("sst2", b"sentence\tlabel\tlabel\nfine .\t1\t1\n", "line 1: a column name occurs twice"),
    ("sst2", b"sentence\tlabel\nfine .\t1\nbad .\n", "line 3: 1 fields, expected 2"),
    ("sst2", b"sentence\tlabel\nfine .\t2\n", "line 2: label '2'; expected 0 or 1"),
    ("sst2", b"sentence\tlabel\nfine .\t1 \n", "line 2: label '1 '"),
    ("sst2", b"sentence\tlabel\n", "no rows"),
    (
        "qnli",
        GOOD["qnli"] + b"8\ta\tb\tentails\n",
        "line 3: label 'entails'; expected entailment or not_entailment",
    ),
    ("qnli", GOOD["qnli"] + AGAIN["qnli"], "line 3: id '7' occurs a second time"),
    ("qqp", GOOD["qqp"] + b"4\t1\t2\tbroken\n", "line 3: 4 fields, expected 6"),
    ("mnli", b"entailment\tone .\ttwo .\n-\ta\tb\n", f"line 2: label '-'; {NLI}"),
    ("mnli", b"entailment\tone .\n", "line 1: 2 fields, expected 3"),
    ("piqa", piqa_row(label=2), "line 1: label 2; expected 0 or 1"),
    ("piqa", piqa_row(label=True), "line 1: label True"),
    ("piqa", GOOD["piqa"] + piqa_row(), "line 2: label nan; expected 0 or 1"),
    ("piqa", GOOD["piqa"] + b'{"goal": "g", "sol1": "a", "label": 1}\n', "line 2: no text under 'sol2'"),
    ("piqa", GOOD["piqa"] + piqa_row(sol1=3), "line 2: no text under 'sol1'"),
    ("piqa", piqa_row(goal=3, label=1), "line 1: goal should be text, got 3"),
    ("piqa", GOOD["piqa"] + b'{"goal": "g", \n', "line 2: not JSON"),
    ("piqa", b"[1, 2]\n", "line 1: expected an object"),
    ("piqa", b"[" * 100000 + b"\n", "line 1: not JSON"),
    ("piqa", piqa_row(goal="\ud800", label=1), "line 1: goal holds half a surrogate"),
    ("piqa", piqa_row(), "no valid-labels.lst"),
    ("tracie", GOOD["tracie"] + b"event: e story: s answer: positive\n", "line 2: expected 'event"),
    ("tracie", GOOD["tracie"] + b"event: e\tstory: s\tanswer: positive\n", "line 2: expected"),
    (
        "tracie",
        GOOD["tracie"] + b"event: e story: s\tanswer: maybe\n",
        "line 2: label 'maybe'; expected negative or positive",
    ),
    ("swag", GOOD["swag"].replace(b"ending3", b"ending4"), "line 1: no column 'ending3'"),
    ("swag", GOOD["swag"].replace(b"startphrase", b"start"), "line 1: no column 'startphrase'"),
    ("swag", GOOD["swag"].replace(b"label", b"ending3"), "line 1: a column name occurs twice"),
    ("swag", GOOD["swag"].replace(b",2\n", b",4\n"), "line 2: label '4'; expected 0 or 1 or 2 or 3"),
    ("swag", GOOD["swag"].replace(b",2\n", b",\n"), "line 2: label ''"),
    ("swag", GOOD["swag"].replace(b",2\n", b"\n"), "line 2: 8 fields, expected 9"),
    (
        "swag",
        GOOD["swag"] + b'v,8,"He\nnods",gold,a,b,c,d,1\nv,9,"open,gold,a\n',
        "line 5: .*quotation mark is open",
    ),
    ("swag", GOOD["swag"] + b'v,8,"He" nods,gold,a,b,c,d,1\n', "line 3: .*a quotation mark is open or stray"),
    ("swag", GOOD["swag"] + AGAIN["swag"], "line 3: id '7' occurs a second time"),
    ("swag", GOOD["swag"].split(b"\n")[0] + b"\n", "no rows"),
    ("swag", GOOD["swag"].replace(b",", b"\t"), "line 1: no column|line 2: "),
    ("diagnostics", GOOD["diagnostics"].replace(b"Logic", b"logic"), "line 1: no column 'Logic'"),
    (
        "diagnostics",
        GOOD["diagnostics"].replace(b"neutral", b"not_entailment"),
        f"line 2: label 'not_entailment'; {NLI}",
    ),
    ("diagnostics", GOOD["diagnostics"].replace(b"\tneutral", b""), "line 2: 7 fields, expected 8"),
    # GLUE's test form, which has no labels
    ("diagnostics", b"index\tsentence1\tsentence2\n0\ta\tb\n", "line 1: no column 'Lexical Semantics'"),
    ("axb", GOOD["axb"] * 2, "line 2: id '7' occurs a second time"),
    (
        "axb",
        GOOD["axb"].replace(b'"entailment"', b'"neutral"'),
        "line 1: label 'neutral'; expected entailment or not_entailment",
    ),
    ("axb", GOOD["axb"].replace(b'"entailment"', b"0"), "line 1: label 0"),
    ("axb", GOOD["axb"].replace(b'"Negation"', b'["Negation"]'), "line 1: the tag of logic should be text"),
    ("axb", GOOD["axb"].replace(b'"idx": 7, ', b""), "line 1: no column 'idx'"),
    ("axb", GOOD["axb"] + GOOD["axb"][:40] + b"\n", "line 2: not JSON"),
]


@pytest.mark.parametrize("name, data, says", MISTAKES)
def test_mistake(name, data, says, tmp_path):
    with pytest.raises(ValueError, match=says) as e:
        read_bytes(tmp_path, name, data)
    assert FILE[name].split(".")[0] in str(e.value)


def test_piqa_labels(tmp_path):
    row = b'{"goal": "g", "sol1": "a", "sol2": "b"}\n'
    lst = tmp_path / "valid-labels.lst"
    lst.write_text("0\n1\n")
    assert read_bytes(tmp_path, "piqa", row * 2).label.tolist() == [0, 1]
    for text, says in (
        ("0\n", "line 2: 1 labels for 2 rows"),
        ("0\n1\n1\n", "line 3: 3 labels for 2 rows"),
        ("0\nx\n", "line 2: label 'x'"),
        ("", "line 1: 0 labels"),
    ):
        lst.write_text(text)
        with pytest.raises(ValueError, match=f"valid-labels.lst, {says}"):
            read_bytes(tmp_path, "piqa", row * 2)
    # a label in the row wins over a file that does not align
    assert read_bytes(tmp_path, "piqa", GOOD["piqa"]).label.tolist() == [1]


def test_groups_file_must_align(tmp_path):
    write_task("qnli", frame("qnli", kind=["k"] * 6), tmp_path, "dev")
    g = tmp_path / "dev-groups.tsv"
    rows = g.read_text().split("\n")
    g.write_text("\n".join(rows[:-2]) + "\n")
    with pytest.raises(ValueError, match="5 rows for 6"):
        read_task("qnli", tmp_path, "dev")
    g.write_text("\n".join([rows[0], rows[2], rows[1], *rows[3:]]))
    with pytest.raises(ValueError, match=r"line 2: id '1', but dev.tsv has '0'"):
        read_task("qnli", tmp_path, "dev")


def test_ragged_rows_may_be_dropped(tmp_path):
    (tmp_path / "dev.tsv").write_bytes(GOOD["qqp"] + b"4\t1\t2\tcut in\n two\t?\t0\n5\t1\t2\ta\tb\t1\n")
    with pytest.warns(UserWarning, match="2 rows of a wrong width left out, the first in line 3"):
        df = read_task("qqp", tmp_path, "dev", drop_ragged=2)
    assert df["id"].tolist() == ["3", "5"]
    with pytest.raises(ValueError, match="line 4"):
        read_task("qqp", tmp_path, "dev", drop_ragged=1)


def test_mistakes_of_a_multiline_csv_count_from_its_line(tmp_path):
    more = GOOD["swag"] + b'v,8,"He\nnods",gold,a,b,c,d,1\nv,9,ok,gold,a,b,c,d,'
    df = read_bytes(tmp_path, "swag", more + b"1\n")
    assert df.startphrase.tolist() == ["He nods, she", "He\nnods", "ok"] and df.ending0[0] == 'says "no".'
    assert df.group.tolist() == ["v"] * 3 and df.id.tolist() == ["7", "8", "9"]
    with pytest.raises(ValueError, match="line 5: label '7'"):
        read_bytes(tmp_path, "swag", more + b"7\n")


def test_swag_without_startphrase(tmp_path):
    (tmp_path / "val.jsonl").write_text(
        '{"sent1": "He nods.", "sent2": "She", '
        '"ending0": "a", "ending1": "b", "ending2": "c", "ending3": "d", "label": 3}\n'
    )
    df = read_task("swag", tmp_path, "dev")
    assert df.startphrase[0] == "He nods. She" and df.label[0] == 3
    with pytest.raises(ValueError, match=r"both val.csv and val.jsonl"):
        (tmp_path / "val.csv").write_bytes(GOOD["swag"])
        read_task("swag", tmp_path, "dev")


# ---- tags, scores
def test_categories_survive(tmp_path):
    categories = [
        "",
        "logic",
        "logic;knowledge",
        "lexical semantics;predicate-argument structure",
        "knowledge",
    ]
    kinds = ["", "Negation", "Negation;Common sense", "", "video-only"]
    pairs = [(f"p{i // 2}", f"h{i // 2}")[:: 1 if i % 2 else -1] for i in range(5)]
    df = pd.DataFrame(pairs, columns=["sentence1", "sentence2"])
    df = canonical("diagnostics", df.assign(label=[0, 1, 2, 0, 1], category=categories, kind=kinds))
    assert df.group.nunique() == 3  # both directions of a pair are one group
    for name in ("diagnostics", "axb"):
        d = df.assign(label=two_way(df.label)) if name == "axb" else df
        d = canonical(name, d.drop(columns="group"))
        p = write_task(name, d, tmp_path / name, "dev")
        pd.testing.assert_frame_equal(read_task(name, tmp_path / name, "dev"), d)
        (p.parent / f"{p.name.split('.')[0]}-groups.tsv").unlink()
        alone = read_task(name, p.parent, "dev")  # the official file by itself keeps the categories
        own = [
            "",
            "Negation",
            "Logic;Knowledge",
            "Lexical Semantics;Predicate-Argument Structure",
            "video-only",
        ]
        assert alone.category.tolist() == d.category.tolist() and alone.kind.tolist() == own
        for bad in ("logics", "knowledge;logic", "logic;"):
            with pytest.raises(ValueError, match="row 1: category"):
                write_task(name, d.assign(category=["", bad, "", "", ""]), tmp_path / "no", "dev")
    s = category_scores(df, df.label)
    assert s.examples.tolist() == [1, 1, 2, 2, 5] and s.accuracy.eq(100).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_matthews(pairs):
    import warnings

    from sklearn.metrics import matthews_corrcoef

    y, p = map(np.array, zip(*pairs, strict=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = matthews_corrcoef(y, p)
    assert abs(matthews(y, p) - want) < 1e-9


def evaluator(rows):  # the rules of TRACIE's evaluator, read line by line
    n, ok, stories = dict(start=0, end=0), dict(start=0, end=0), {}
    for line, label, said in rows:
        line = line.split("\t")[0]
        k = "start" if "starts before" in line or "starts after" in line else "end"
        n[k] += 1
        ok[k] += label == said
        stories.setdefault(line.split("story:")[1], []).append(label == said)
    return dict(
        overall=100 * sum(ok.values()) / sum(n.values()),
        start=100 * ok["start"] / n["start"],
        end=100 * ok["end"] / n["end"],
        story=100 * sum(map(all, stories.values())) / len(stories),
    )


# ---- QNLI from SQuAD
def squad(**change):
    q = dict(id="q", question="What floats?", answers=[dict(text="Cork", answer_start=0)]) | change
    return dict(
        data=[dict(title="T", paragraphs=[dict(context="Cork floats. Stone sinks. It rained.", qas=[q])])]
    )


def write(p, o):
    p.write_text(json.dumps(o))
    return p


def test_qnli_from_squad(tmp_path):
    df = qnli_from_squad(write(tmp_path / "s.json", squad()))
    assert sorted(df.label) == [0, 1] and set(df.group) == {"T"}
    sentence = df.set_index("label").sentence
    assert sentence[0] == "Cork floats." and sentence[1] in ("Stone sinks.", "It rained.")
    assert df.equals(qnli_from_squad(tmp_path / "s.json", seed=0))
    g = tmp_path / "s.json.gz"
    g.write_bytes(gzip.compress((tmp_path / "s.json").read_bytes()))
    assert df.equals(qnli_from_squad(g))
    for bad, says in (
        (squad(answers=[dict(text="Cork", answer_start=5)]), "not at character 5"),
        (squad(answers=[]), "there are no answers"),
        (squad(answers=[dict(text="floats. Stone", answer_start=5)]), "no question with an answer in one"),
    ):
        with pytest.raises(ValueError, match=rf"s\.json.*{says}"):
            qnli_from_squad(write(tmp_path / "s.json", bad))


# ---- real files
real = pytest.mark.skipif(not os.environ.get("VLKD_DATA"), reason="VLKD_DATA is not set")


@real
@pytest.mark.parametrize(
    "task,folder,split,rows,groups",
    [
        ("sst2", "glue_sst2", "train", 67349, None),
        ("sst2", "glue_sst2", "dev", 872, 872),
        ("qnli", "glue_qnli", "dev", 5463, None),
        ("piqa", "piqa", "train", 5601, None),
        ("piqa", "piqa", "dev", 1838, None),
        ("swag", "swag", "dev", 11, 6),
        ("axb", "superglue_axb", "dev", 1104, None),
        ("tracie", "tracie", "train", 860, 84),
        ("tracie", "tracie", "dev", 4248, 342),
        ("tracie", "tracie", "iid_train", 1174, None),
        ("mnli", "mnli_1k", "dev", 1000, None),
        ("mnli", "mnli_1k", "dev_mismatched", 1000, None),
    ],
)
def test_real(task, folder, split, rows, groups, tmp_path):
    d = data_dir() / folder
    if task == "swag" and (f := data_dir() / "swag_fixture_21rows" / "swag_val_first11.csv").is_file():
        d = tmp_path / "in"
        d.mkdir()
        (d / "val.csv").write_bytes(f.read_bytes())
    if not d.is_dir():
        pytest.skip(f"no {folder} under VLKD_DATA")
    df = read_task(task, d, split)
    assert len(df) == rows and (groups is None or df.group.nunique() == groups)
    if task == "mnli":
        df = df.assign(kind="")
    write_task(task, df, tmp_path, split)
    pd.testing.assert_frame_equal(read_task(task, tmp_path, split), df)
    if folder == "tracie":
        assert majority(df)["rate"] == 0.5


@real
def test_real_qnli():
    d = data_dir()
    if not (d / "squad").is_dir() or not (d / "glue_qnli").is_dir():
        pytest.skip("no squad or glue_qnli under VLKD_DATA")
    dev = read_task("qnli", d / "glue_qnli", "dev")
    df = qnli_from_squad(
        d / "squad" / "train-v1.1.json.gz", limit=8000
    )  # GLUE cut its dev set from SQuAD dev
    assert len(df) == 8000 and df.label.mean() == 0.5 and df.group.nunique() > 40

    def overlap(df, y):
        return np.mean(
            [
                len(content_words(q) & content_words(s)) / max(1, len(content_words(q)))
                for q, s in zip(df.question[df.label == y], df.sentence[df.label == y], strict=False)
            ]
        )

    for y in (0, 1):
        assert abs(overlap(df, y) - overlap(dev, y)) < 0.03  # as hard as GLUE's own pairs, by shared words
    assert (
        0.45 < hypothesis_only_baseline("qnli", df, dev) < 0.58
        and bag_of_words_baseline("qnli", df, dev) > 0.65
    )


@real
def test_real_tracie_scores():
    d = data_dir() / "tracie"
    if not d.is_dir():
        pytest.skip("no tracie under VLKD_DATA")
    df = read_task("tracie", d, "dev")
    g = np.random.default_rng(0)
    said = np.where(g.random(len(df)) < 0.9, df.label, 1 - df.label)
    with gzip.open(d / "uniform_prior_test.txt.gz", "rt", encoding="utf-8") as f:
        lines = [l.rstrip("\n") for l in f]
    want = evaluator(
        [(l, l.split("answer: ")[1], TASKS["tracie"].labels[y]) for l, y in zip(lines, said, strict=False)]
    )
    got = tracie_scores(df, pd.Series(said, df.id))
    assert (
        set(got) == set(want)
        and all(abs(got[k] - want[k]) < 1e-9 for k in want)
        and 0 < got["story"] < got["overall"]
    )
    # the paper's training set has a uniform prior, the other has none
    assert prior(read_task("tracie", d, "train")).tolist() == [0.5] * 4
    assert max(abs(prior(read_task("tracie", d, "iid_train")) - 0.5)) > 0.1


@real
def test_real_axb_categories():
    if not (data_dir() / "superglue_axb").is_dir():
        pytest.skip("no superglue_axb under VLKD_DATA")
    df = read_task("axb", data_dir() / "superglue_axb", "dev")
    s = category_scores(df, np.ones(len(df), int))
    assert s.examples.tolist() == [368, 424, 364, 284, 1104]
    assert abs(s.accuracy["all"] - 100 * 644 / 1104) < 1e-9 and s.matthews["all"] == 0
    assert df.group.nunique() < 0.6 * len(df)
