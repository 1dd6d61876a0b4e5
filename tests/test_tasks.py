"Readers and writers of the downstream tasks: round trips, every mistake, fuzz, and the real files."

import csv
import gzip
import json
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlkd.data.readers import content_words
from vlkd.data.scores import (
    bag_of_words_baseline,
    category_scores,
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
    task = TASKS[name]
    columns = {column: [text.format(column, i // 2) for i in range(n)] for column in task.columns}
    labels = [i % len(task.labels) for i in range(n)]
    return canonical(name, pd.DataFrame(columns | dict(label=labels) | more))


# ---- round trips
SPLITS = [(name, split) for name in TASKS for split in TASKS[name].format.files if split in ("train", "dev")]


@pytest.mark.parametrize("name, split", SPLITS)
@pytest.mark.parametrize("gz", [False, True])
def test_round_trip(name, split, gz, tmp_path):
    for df in (
        frame(name),
        frame(name, id=[f"w1-{i}" for i in range(6)]),
        frame(name, group=[f"noun{i // 3}" for i in range(6)], kind=["", "video-only"] * 3),
    ):
        written = write_task(name, df, tmp_path, split)
        if gz:
            for file in list(tmp_path.iterdir()):
                (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
                file.unlink()
        pd.testing.assert_frame_equal(read_task(name, tmp_path, split), df)
        assert written.parent == tmp_path


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

    def rows(name, split, text="{} {}"):
        written = write_task(name, frame(name, text=text), tmp_path / name, split)
        with written.open(encoding="utf-8", newline="\n") as file:
            return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

    for name in HEADS:
        first, text = TASKS[name].columns[0], '" {} {}'
        header, *lines = rows(name, "train", text)
        assert "\t".join(header) == HEADS[name]
        assert [line[header.index(first)] for line in lines] == frame(name, text=text)[first].tolist()
    header, *lines = mnli = rows("mnli", "dev")
    assert header[:4] == ["index", "promptID", "pairID", "genre"] and {len(line) for line in mnli} == {16}
    assert header[8:] == ["sentence1", "sentence2", *(f"label{i}" for i in range(1, 6)), "gold_label"]
    assert [line[-1] for line in lines[:3]] == ["entailment", "neutral", "contradiction"]
    piqa = write_task("piqa", frame("piqa"), tmp_path / "piqa", "dev")
    assert piqa.name == "valid.jsonl"
    assert list(json.loads(piqa.read_text(encoding="utf-8").split("\n")[0])) == ["goal", "sol1", "sol2"]
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
    f.parent.mkdir(exist_ok=True, parents=True)
    f.write_bytes(data)
    return read_task(name, folder, "dev")


@pytest.mark.parametrize("name", GOOD)
def test_common_mistakes(name, tmp_path):
    good, file = GOOD[name], FILE[name]
    plain = read_bytes(tmp_path, name, good)
    assert len(plain) == 1
    for written in (good.replace(b"\n", b"\r\n"), good[:-1], b"\xef\xbb\xbf" + good):  # by other editors
        pd.testing.assert_frame_equal(read_bytes(tmp_path, name, written), plain)
    last = good.count(b"\n")
    mistakes = [
        (b"", f"{file}.*(empty|no rows)"),
        (good.replace(b"e", b"\xe9", 1), "line 1: not UTF-8"),
        (good[:-1] + b"\t}\n", f"line {last}: "),
        (b"\xff\xfe" + good.decode().encode("utf-16-le"), "line 1: not UTF-8"),
    ]
    if name != "swag":  # a csv may have empty lines
        mistakes.append((good + b"\n", f"line {last + 1}: "))
    for data, says in mistakes:
        with pytest.raises(ValueError, match=says) as e:
            read_bytes(tmp_path, name, data)
        assert file in str(e.value)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match="has none of"):
        read_task(name, tmp_path, "dev")
    packed = gzip.compress(good + (good.split(b"\n")[-2] + b"\n") * 500)
    for data in (packed[:-4], packed[: len(packed) // 2], packed[:12], good):  # the last is not gzip at all
        with pytest.raises(ValueError, match=r"gz, line .*broken or cut short"):
            read_bytes(tmp_path, name, data, gz=True)
    with pytest.raises(ValueError, match="both"):
        read_bytes(tmp_path, name, good)  # plain and gz side by side
    with pytest.raises(FileNotFoundError, match="not a folder"):
        read_task(name, tmp_path / "nothing", "dev")
    with pytest.raises(ValueError, match="unknown split"):
        read_task(name, tmp_path, "deb")


ALL = "everything"
PIQA = '{"goal": "g", "sol1": "a", "sol2": "b"}'
SWAG = GOOD["swag"].decode().split("\n")[1]
THREE = "entailment or neutral or contradiction"
MISTAKES = [  # task, what is replaced in a valid file ("": a line is added), what takes its place, message
    ("sst2", "sentence", "text", "line 1: no column 'sentence'; expected sentence, label, found text, label"),
    ("sst2", ALL, "sentence\tlabel\tlabel\nfine .\t1\t1\n", "line 1: a column name occurs twice"),
    ("sst2", "", "bad .", "line 3: 1 fields, expected 2"),
    ("sst2", "\t1", "\t2", "line 2: label '2'; expected 0 or 1"),
    ("sst2", "\t1", "\t1 ", "line 2: label '1 '"),
    ("sst2", ALL, "sentence\tlabel\n", "no rows"),
    ("qnli", "", "8\ta\tb\tentails", "line 3: label 'entails'; expected entailment or not_entailment"),
    ("qnli", "", ROWS["qnli"], "line 3: id '7' occurs a second time"),
    ("qqp", "", "4\t1\t2\tbroken", "line 3: 4 fields, expected 6"),
    ("mnli", "", "-\ta\tb", f"line 2: label '-'; expected {THREE}"),
    ("mnli", "\ttwo .", "", "line 1: 2 fields, expected 3"),
    ("piqa", "1}", "2}", "line 1: label 2; expected 0 or 1"),
    ("piqa", "1}", "true}", "line 1: label True"),
    ("piqa", '"g"', "3", "line 1: goal should be text, got 3"),
    ("piqa", "", PIQA, "line 2: label nan; expected 0 or 1"),
    ("piqa", "", PIQA.replace("sol2", "sol"), "line 2: no text under 'sol2'"),
    ("piqa", "", PIQA.replace('"a"', "3"), "line 2: no text under 'sol1'"),
    ("piqa", "", '{"goal": "g", ', "line 2: not JSON"),
    ("piqa", ALL, "[1, 2]\n", "line 1: expected an object"),
    ("piqa", ALL, "[" * 100000 + "\n", "line 1: not JSON"),
    ("piqa", '"g"', '"\\ud800"', "line 1: goal holds half a surrogate"),
    ("piqa", ALL, PIQA + "\n", "no valid-labels.lst"),
    ("tracie", "", "event: e story: s answer: positive", "line 2: expected 'event"),
    (
        "tracie",
        "",
        "event: e story: s\tanswer: maybe",
        "line 2: label 'maybe'; expected negative or positive",
    ),
    ("tracie", "", "event: e\tstory: s\tanswer: positive", "line 2: expected"),
    ("swag", "ending3", "ending4", "line 1: no column 'ending3'"),
    ("swag", "startphrase", "start", "line 1: no column 'startphrase'"),
    ("swag", "label", "ending3", "line 1: a column name occurs twice"),
    ("swag", ",2\n", ",4\n", "line 2: label '4'; expected 0 or 1 or 2 or 3"),
    ("swag", ",2\n", ",\n", "line 2: label ''"),
    ("swag", ",2\n", "\n", "line 2: 8 fields, expected 9"),
    (
        "swag",
        "",
        'v,8,"He\nnods",gold,a,b,c,d,1\nv,9,"open,gold,a,b,c,d,1',
        "line 5: .*a quotation mark is open",
    ),
    ("swag", "", 'v,8,"He" nods,gold,a,b,c,d,1', "line 3: .*a quotation mark is open or stray"),
    ("swag", "", 'v,8,"He\nnods",gold,a,b,c,d,1\nv,9,ok,gold,a,b,c,d,7', "line 5: label '7'"),
    ("swag", "", SWAG, "line 3: id '7' occurs a second time"),
    ("swag", SWAG + "\n", "", "no rows"),
    ("swag", ",", "\t", "line 1: no column|line 2: "),
    ("diagnostics", "Logic", "logic", "line 1: no column 'Logic'"),
    ("diagnostics", "neutral", "not_entailment", f"line 2: label 'not_entailment'; expected {THREE}"),
    ("diagnostics", "\tneutral", "", "line 2: 7 fields, expected 8"),
    ("diagnostics", ALL, "index\tsentence1\tsentence2\n0\ta\tb\n", "line 1: no column 'Lexical Semantics'"),
    ("axb", "", GOOD["axb"].decode()[:-1], "line 2: id '7' occurs a second time"),
    ("axb", '"entailment"', '"neutral"', "line 1: label 'neutral'; expected entailment or not_entailment"),
    ("axb", '"entailment"', "0", "line 1: label 0; expected entailment"),
    ("axb", '"Negation"', '["Negation"]', "line 1: the tag of logic should be text"),
    ("axb", '"idx": 7, ', "", "line 1: no column 'idx'"),
    ("axb", "", '{"idx": 8, ', "line 2: not JSON"),
]


@pytest.mark.parametrize("name, old, new, says", MISTAKES)
def test_mistake(name, old, new, says, tmp_path):
    good = GOOD[name].decode()
    assert old == ALL or old in good
    data = new if old == ALL else good.replace(old, new) if old else good + new + "\n"
    with pytest.raises(ValueError, match=says) as e:
        read_bytes(tmp_path, name, data.encode())
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


def test_a_text_of_a_csv_may_have_lines(tmp_path):
    more = b'v,8,"He\nnods",gold,a,b,c,d,1\nv,9,ok,gold,a,b,c,d,1\n'
    df = read_bytes(tmp_path, "swag", GOOD["swag"] + more)
    assert df.startphrase.tolist() == ["He nods, she", "He\nnods", "ok"] and df.ending0[0] == 'says "no".'
    assert df.group.tolist() == ["v"] * 3 and df.id.tolist() == ["7", "8", "9"]


def test_swag_without_startphrase(tmp_path):
    row = dict(sent1="He nods.", sent2="She", ending0="a", ending1="b", ending2="c", ending3="d", label=3)
    (tmp_path / "val.jsonl").write_text(json.dumps(row) + "\n")
    df = read_task("swag", tmp_path, "dev")
    assert df.startphrase[0] == "He nods. She" and df.label[0] == 3
    (tmp_path / "val.csv").write_bytes(GOOD["swag"])
    with pytest.raises(ValueError, match=r"both val.csv and val.jsonl"):
        read_task("swag", tmp_path, "dev")


# ---- tags, scores
TAGS = {  # categories, and kinds as they are read from an official file that has no kinds of its own
    "": ("", ""),
    "logic": ("Negation", "Negation"),
    "logic;knowledge": ("Negation;Common sense", "Logic;Knowledge"),
    "lexical semantics;predicate-argument structure": (
        "",
        "Lexical Semantics;Predicate-Argument Structure",
    ),
    "knowledge": ("video-only", "video-only"),
}


def test_categories_survive(tmp_path):
    rows = []
    for i, (category, (kind, _)) in enumerate(TAGS.items()):
        pair = [f"h{i // 2}", f"p{i // 2}"]
        one, other = pair[::-1] if i % 2 else pair
        rows.append(dict(sentence1=one, sentence2=other, label=i % 3, category=category, kind=kind))
    df = canonical("diagnostics", pd.DataFrame(rows))
    assert df.group.nunique() == 3  # both directions of a pair are one group
    for name, labels in (("diagnostics", df.label), ("axb", two_way(df.label))):
        tagged = canonical(name, df.assign(label=labels).drop(columns="group"))
        file = write_task(name, tagged, tmp_path / name, "dev")
        pd.testing.assert_frame_equal(read_task(name, file.parent, "dev"), tagged)
        file.with_name(f"{file.stem}-groups.tsv").unlink()
        alone = read_task(name, file.parent, "dev")  # the official file by itself keeps the categories
        assert alone.category.tolist() == tagged.category.tolist()
        assert alone.kind.tolist() == [kind for _, kind in TAGS.values()]
        for bad in ("logics", "knowledge;logic", "logic;"):
            with pytest.raises(ValueError, match="row 1: category"):
                write_task(name, tagged.assign(category=["", bad, "", "", ""]), tmp_path / "no", "dev")
    scores = category_scores(df, df.label)
    assert scores.examples.tolist() == [1, 1, 2, 2, 5] and scores.accuracy.eq(100).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_matthews(pairs):
    from sklearn.metrics import matthews_corrcoef

    labels, said = map(np.array, zip(*pairs, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = matthews_corrcoef(labels, said)
    assert abs(matthews(labels, said) - wanted) < 1e-9


def evaluator(rows):
    "The rules of TRACIE's evaluator, read line by line."
    right = dict(overall=[], start=[], end=[])
    stories = {}
    for line, label, said in rows:
        line = line.split("\t")[0]
        kind = "start" if "starts before" in line or "starts after" in line else "end"
        for name in ("overall", kind):
            right[name].append(label == said)
        stories.setdefault(line.split("story:")[1], []).append(label == said)
    right["story"] = [all(answers) for answers in stories.values()]
    return {name: 100 * sum(answers) / len(answers) for name, answers in right.items()}


# ---- QNLI from SQuAD
def squad(**change):
    question = dict(id="q", question="What floats?", answers=[dict(text="Cork", answer_start=0)]) | change
    paragraph = dict(context="Cork floats. Stone sinks. It rained.", qas=[question])
    return dict(data=[dict(title="T", paragraphs=[paragraph])])


def write(file, content):
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_qnli_from_squad(tmp_path):
    file = write(tmp_path / "s.json", squad())
    df = qnli_from_squad(file)
    assert sorted(df.label) == [0, 1] and set(df.group) == {"T"}
    without, answers = df.sort_values("label", ascending=False).sentence
    assert answers == "Cork floats." and without in ("Stone sinks.", "It rained.")
    assert df.equals(qnli_from_squad(file, seed=0))
    packed = tmp_path / "s.json.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert df.equals(qnli_from_squad(packed))
    for bad, says in (
        (squad(answers=[dict(text="Cork", answer_start=5)]), "not at character 5"),
        (squad(answers=[]), "there are no answers"),
        (squad(answers=[dict(text="floats. Stone", answer_start=5)]), "no question with an answer in one"),
    ):
        with pytest.raises(ValueError, match=rf"s\.json.*{says}"):
            qnli_from_squad(write(tmp_path / "s.json", bad))


# ---- real files
@pytest.fixture
def folder(data):
    "The folder of a data set; skips where there is none."

    def get(name):
        if not (data / name).exists():
            pytest.skip(f"no {name} under VLKD_DATA")
        return data / name

    return get


@pytest.mark.parametrize(
    "task, name, split, rows, groups",
    [
        ("sst2", "glue_sst2", "train", 67349, None),
        ("sst2", "glue_sst2", "dev", 872, 872),
        ("qnli", "glue_qnli", "dev", 5463, None),
        ("piqa", "piqa", "train", 5601, None),
        ("piqa", "piqa", "dev", 1838, None),
        ("swag", "swag_fixture_21rows/swag_val_first11.csv", "dev", 11, 6),
        ("axb", "superglue_axb", "dev", 1104, None),
        ("tracie", "tracie", "train", 860, 84),
        ("tracie", "tracie", "dev", 4248, 342),
        ("tracie", "tracie", "iid_train", 1174, None),
        ("mnli", "mnli_1k", "dev", 1000, None),
        ("mnli", "mnli_1k", "dev_mismatched", 1000, None),
    ],
)
def test_real(task, name, split, rows, groups, folder, tmp_path):
    source = folder(name)
    if source.is_file():
        (tmp_path / "in").mkdir()
        shutil.copy(source, tmp_path / "in" / "val.csv")
        source = tmp_path / "in"
    df = read_task(task, source, split)
    assert len(df) == rows and (groups is None or df.group.nunique() == groups)
    if task == "mnli":
        df = df.assign(kind="")
    write_task(task, df, tmp_path, split)
    pd.testing.assert_frame_equal(read_task(task, tmp_path, split), df)
    assert task != "tracie" or majority(df)["rate"] == 0.5


def test_real_qnli(folder):
    "Pairs cut from SQuAD are as hard as GLUE's own, by shared words; GLUE cut its dev set from SQuAD dev."
    dev = read_task("qnli", folder("glue_qnli"), "dev")
    df = qnli_from_squad(folder("squad") / "train-v1.1.json.gz", limit=8000)
    assert len(df) == 8000 and df.label.mean() == 0.5 and df.group.nunique() > 40

    def overlap(df, label):
        rows = df[df.label == label]
        words = [
            (content_words(q), content_words(s)) for q, s in zip(rows.question, rows.sentence, strict=True)
        ]
        return np.mean([len(q & s) / max(1, len(q)) for q, s in words])

    for label in (0, 1):
        assert abs(overlap(df, label) - overlap(dev, label)) < 0.03
    assert bag_of_words_baseline("qnli", df, dev) > 0.65


def test_real_tracie_scores(folder):
    source = folder("tracie")
    df = read_task("tracie", source, "dev")
    said = np.where(np.random.default_rng(0).random(len(df)) < 0.9, df.label, 1 - df.label)
    with gzip.open(source / "uniform_prior_test.txt.gz", "rt", encoding="utf-8") as file:
        lines = [line.rstrip("\n") for line in file]
    answers = [TASKS["tracie"].labels[label] for label in said]
    wanted = evaluator(
        [(x, x.split("answer: ")[1], answer) for x, answer in zip(lines, answers, strict=True)]
    )
    found = tracie_scores(df, pd.Series(said, df.id))
    assert found == pytest.approx(wanted, abs=1e-9) and 0 < found["story"] < found["overall"]
    train, iid = (read_task("tracie", source, split) for split in ("train", "iid_train"))
    assert prior(train).tolist() == [0.5] * 4  # the paper's training set has a uniform prior
    assert max(abs(prior(iid) - 0.5)) > 0.1


def test_real_axb_categories(folder):
    df = read_task("axb", folder("superglue_axb"), "dev")
    scores = category_scores(df, np.ones(len(df), int))
    assert scores.examples.tolist() == [368, 424, 364, 284, 1104]
    assert scores.accuracy["all"] == pytest.approx(100 * 644 / 1104) and scores.matthews["all"] == 0
    assert df.group.nunique() < 0.6 * len(df)
