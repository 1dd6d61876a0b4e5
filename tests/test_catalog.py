"Data cards: broken ones are refused by file and key, and the rows that they state are those of the files."

import gzip
import json
import re

import numpy as np
import pytest
import yaml

from vlkd.core.settings import scales
from vlkd.data.catalog import SECTIONS, cards, print_status, read_card, require, status, waiting
from vlkd.reproduce.plan import load_plan

ALL = """daquar esnlive flickr30k_captions flickr8k free_exercise_db glue_diagnostics glue_mnli glue_qnli
glue_qqp glue_sst2 howto100m mnli_1k msvd_clips open_english_wordnet piqa snli_ve squad superglue_axb swag
swag_fixture_21rows tabletop tokenizer_vocabs tracie vcr video_raw vqa_v2 weights wikipedia_en wikitext
wikitext103"""
FILES = [("a.tsv", True, 3), ("photos/", True, None), ("b.txt", False, None)]
BLOCK = dict(
    id="spoons",
    redistributable=True,
    folder="spoons",
    files=[dict(path=p, required=r) | (dict(rows=n) if n else {}) for p, r, n in FILES],
    needed_by=["m5@real", "*@paper"],
    roles=["teacher"],
    splits={"train": 3},
    columns=["SPOON"],
)
HEAD = dict(pretty_name="Spoons", license="cc-by-4.0", language=["en"], size_categories=["n<1K"])
HEAD |= dict(task_categories=["text-classification"], vlkd=BLOCK)


def write(folder, head=HEAD, sections=SECTIONS, name="spoons"):
    "A card of a set."
    f = folder / f"{name}.md"
    prose = "\n".join(f"## {section}\n\nText.\n" for section in sections)
    f.write_text(f"---\n{yaml.safe_dump(head)}---\n\n# Spoons\n\n{prose}", encoding="utf-8")
    return f


def changed(**kw):
    "HEAD with keys changed; `vlkd__x` is a key of the block, None removes."
    head = {**HEAD, "vlkd": dict(HEAD["vlkd"])}
    for key, value in kw.items():
        part = head["vlkd"] if key.startswith("vlkd__") else head
        key = key.removeprefix("vlkd__")
        if value is None:
            del part[key]
        else:
            part[key] = value
    return head


def test_the_release_has_these_cards():
    cs = cards()
    assert sorted(cs) == ALL.split()
    assert [c.id for c in cs.values() if c.embedded] == ["tabletop"]
    for c in cs.values():
        if c.license in ("research use", "mixed or not stated") or "terms" in c.license.lower():
            assert not c.redistributable, f"{c.id} must not be republished under {c.license}"
    for i in ("flickr8k", "msvd_clips", "video_raw", "glue_sst2", "howto100m"):
        assert not cs[i].redistributable


def test_a_good_card_reads_back(tmp_path):
    c = read_card(write(tmp_path))
    assert (c.id, c.license, c.columns, c.roles) == ("spoons", "cc-by-4.0", ("SPOON",), ("teacher",))
    assert c.needed_by == ("m5@real", "*@paper")
    assert [(d.path, d.required, d.rows) for d in c.files] == FILES
    assert list(c.sections) == list(SECTIONS) and c.how == "Text."


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pretty_name=None), "the key pretty_name is missing"),
        (dict(licence="x"), "unknown key 'licence'; did you mean 'license'"),
        (dict(license=3), "license should be str"),
        (dict(license="other"), "license_name should say which"),
        (dict(license=" "), "license is empty"),
        (dict(language="en"), "language should be list"),
        (dict(size_categories=["small"]), "unknown value 'small'"),
        (dict(size_categories=[]), "size_categories should hold one of"),
        (dict(vlkd=None), "the key vlkd is missing"),
        (dict(vlkd=["id"]), "vlkd should be dict"),
        (dict(vlkd__id="forks"), "id should be the file's name 'spoons'"),
        (dict(vlkd__redistributable="no way"), "redistributable should be bool"),
        (dict(vlkd__redistributable=1), "redistributable should be bool"),
        (dict(vlkd__folder="../spoons"), "folder should be a path below"),
        (dict(vlkd__folder=""), "folder is empty"),
        (dict(vlkd__files=[]), "should have a required file"),
        (dict(vlkd__files=[dict(path="a", required=False)]), "should have a required file"),
        (dict(vlkd__files=["a.tsv"]), r"files\[0\] should be a mapping"),
        (dict(vlkd__files=[dict(path="a")]), r"files\[0\]: the key required is missing"),
        (dict(vlkd__files=[dict(path="a", required=True, rows=True)]), "rows should be int"),
        (dict(vlkd__files=[dict(path="a", required=True, rows=0)]), "rows should be positive"),
        (dict(vlkd__files=[dict(path="/etc/a", required=True)]), r"files\[0\]: path should be a path below"),
        (dict(vlkd__files=[dict(path="a", required=True)] * 2), "names something twice"),
        (dict(vlkd__files=[dict(path="a", required=True, sha="x")]), "unknown key 'sha'"),
        (dict(vlkd__needed_by=["m5"]), "table ids like m5@real"),
        (dict(vlkd__needed_by=["m5@rael"]), "did you mean 'real'"),
        (dict(vlkd__needed_by=[5]), "should hold words"),
        (dict(vlkd__roles=["techer"]), "did you mean 'teacher'"),
        (dict(vlkd__splits={"train": "many"}), "splits should map names to numbers"),
        (dict(vlkd__splits={"train": True}), "splits should map names to numbers"),
        (dict(vlkd__splits=None), "the key splits is missing"),
        (dict(vlkd__need_by=["m5@real"]), "did you mean 'needed_by'"),
        (dict(vlkd__columns="SPOON"), "columns should be list"),
    ],
)
def test_a_broken_card_is_refused_by_file_and_key(tmp_path, change, message):
    f = write(tmp_path, changed(**change))
    with pytest.raises(ValueError, match=message) as e:
        read_card(f)
    assert str(f) in str(e.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "should start with a YAML head"),
        ("# Spoons\n", "should start with a YAML head"),
        ("---\npretty_name: x\n", "should start with a YAML head"),
        ("---\na: [1\n---\n", "not valid YAML"),
        ("---\npretty_name: x\npretty_name: y\n---\n", "key 'pretty_name' occurs twice"),
        ("---\njust words\n---\n", "should be a mapping"),
        ("---\n- a\n---\n", "should be a mapping"),
        ("---\na: !!python/object:os.system x\n---\n", "not valid YAML"),
        ("---\n? [a]\n: b\n---\n", "not valid YAML"),
    ],
)
def test_a_broken_head_is_refused(tmp_path, text, message):
    f = tmp_path / "spoons.md"
    f.write_text(text)
    with pytest.raises(ValueError, match=message) as e:
        read_card(f)
    assert str(f) in str(e.value)


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "spoons.md").write_bytes(b"---\n\xff\xfe\n---\n")
    with pytest.raises(ValueError, match=r"spoons\.md is not UTF-8"):
        cards(tmp_path)


@pytest.mark.parametrize("gone", SECTIONS)
def test_every_section_is_required(tmp_path, gone):
    with pytest.raises(ValueError, match=f"'## {gone}' is missing"):
        read_card(write(tmp_path, sections=[s for s in SECTIONS if s != gone]))


def test_windows_line_ends(tmp_path):
    f = write(tmp_path)
    f.write_bytes(f.read_bytes().replace(b"\n", b"\r\n"))
    assert read_card(f).how == "Text."


def test_no_cards(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no data cards"):
        cards(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        cards(tmp_path / "none")


def test_states(tmp_path):
    write(tmp_path)
    data = tmp_path / "data"
    spoons = data / "spoons"
    (spoons / "photos").mkdir(parents=True)

    def now():
        row = status(data, tmp_path).loc[0]
        return row["state"], row["missing files"]

    no_photos = "photos/ (no such folder, or an empty one)"
    assert now() == ("missing", ["a.tsv", no_photos])
    (spoons / "a.tsv").write_text("x")
    assert now() == ("partial", [no_photos])
    waits = ["spoons (column SPOON) (in part)"]
    assert waiting(status(data, tmp_path)) == {"*@paper": waits, "m5@real": waits}
    with pytest.raises(FileNotFoundError, match=r"spoons is partial: it lacks photos/.*Text\."):
        require("spoons", data=data, folder=tmp_path)
    (spoons / "photos" / "1.jpg").write_bytes(b"x")
    assert now() == ("present", []) and waiting(status(data, tmp_path)) == {}
    assert require("spoons", data=data, folder=tmp_path) == {"spoons": spoons.resolve()}
    (spoons / "a.tsv").unlink()
    (spoons / "a.tsv").mkdir()
    assert now()[1] == ["a.tsv"], "a folder is not a file"


def test_a_file_in_the_place_of_the_data_folder(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        status(tmp_path / "data")


def test_without_data(monkeypatch, capsys):
    monkeypatch.setenv("VLKD_DATA", "")
    df = status()
    assert df[df["state"] == "present"]["data set"].tolist() == ["tabletop"]
    assert set(df["state"]) == {"present", "missing"}
    with pytest.raises(FileNotFoundError, match=r"VLKD_DATA is not set.*\n*.*squad is missing"):
        require("tabletop", "squad", "piqa")
    print_status()
    printed = capsys.readouterr().out
    assert "export VLKD_DATA=" in printed and "@micro:" not in printed
    assert re.search(r"\*@paper: .*glue_mnli \(column MNLI\)", printed)
    assert re.search(r"real@real: .*flickr8k.*squad", printed)
    assert re.search(r"m7@paper: glue_diagnostics \(column Lexicon", printed)


def test_a_wrong_folder_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("VLKD_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="not a folder"):
        print_status()


def test_everything_missing_is_named_at_once(tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        require("squad", "piqa", data=tmp_path)
    for part in ("squad is missing", "piqa is missing", "valid.jsonl.gz", str(tmp_path / "piqa")):
        assert part in str(e.value)


def test_cards_name_tables_of_the_plan(root):
    ids = set(load_plan())
    for c in cards().values():
        for t in c.needed_by:
            assert t.split("@")[0] in {"*"} | ids, f"{c.path}: needed_by {t}, which no plan has"
        assert all(t.split("@")[1] in scales() for t in c.needed_by)


def test_the_card_of_tabletop_is_of_its_edition():
    from vlkd.tabletop.nouns import EDITION
    from vlkd.tabletop.world import World

    c = cards()["tabletop"]
    assert f"edition `{EDITION}`" in c.sections["Origin"]
    assert {f"{k} nouns": len(v) for k, v in World(1).splits.items()}.items() <= c.splits.items()


def count(f) -> int:
    "Rows of a file, counted without the readers of the library."
    if f.is_dir():
        return sum(1 for p in f.iterdir() if p.is_file())
    with gzip.open(f, "rb") if f.suffix == ".gz" else open(f, "rb") as opened:
        data = opened.read()
    if "squad" in f.parts and ".json" in f.name:
        return data.count(b'"question"')
    if f.name == "captions_msvd_all.json":
        return len(json.loads(data))
    if f.suffix == ".npz":
        return len(np.load(f)["files"])
    has_header = f.parent.name.startswith("glue_") or ".csv" in f.name
    return data.count(b"\n") + (not data.endswith(b"\n")) - has_header


def test_rows_of_the_real_files(data):
    counted = 0
    for card in cards().values():
        for file in card.files:
            f = data / card.folder / file.path
            if file.rows and f.exists():
                counted += 1
                assert count(f) == file.rows, f"{card.path} says {file.rows} rows of {file.path}"
    assert counted, "no file of any card is there"


def test_licences_agree_with_the_sources(data):
    "A folder's SOURCE.json and its card name the same licence."
    words = {
        "cc-by-sa-4.0": "CC BY-SA 4.0",
        "cc-by-sa-3.0": "CC BY-SA 3.0",
        "afl-3.0": "AFL-3.0",
        "apache-2.0": "Apache-2.0",
        "research use": "research use",
        "mit": "SWAG: MIT",
        "MultiNLI terms": "MultiNLI:",
        "none stated for the labels; SNLI texts CC BY-SA 4.0": "states no licence",
        "WordNet licence and CC BY 4.0": "WordNet licence (Princeton) + CC BY 4.0",
        "research and educational use": "research/educational use",
        "GLUE terms, none stated for the texts": "terms per gluebenchmark; no file in repo",
    }
    for card in cards().values():
        source = data / card.folder / "SOURCE.json"
        if card.folder and source.is_file():
            licence = json.loads(source.read_text(encoding="utf-8"))["licence"]
            assert words[card.license].lower() in licence.lower(), card.id
