"""Planted links, full disks, umasks, odd names, an ASCII locale, and captions that hold HTML."""

import os
import resource
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from vlkd.core.files import (
    atomic,
    atomic_folder,
    locked,
    open_lock,
    printable,
    read_json,
    save_safetensors,
    write_checksums,
    write_json,
)
from vlkd.core.settings import scale
from vlkd.data.howto100m import write_fixture
from vlkd.plots import table_md


def run(code: str, *args, **env) -> subprocess.CompletedProcess:
    "Run Python code in a process of its own."
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, env={**os.environ, **env}, timeout=120)


def test_importing_changes_nothing_for_others():
    code = "import sys; hooks = list(sys.meta_path); import vlkd.core.records; assert sys.meta_path == hooks"
    done = run(code)
    assert done.returncode == 0, done.stderr.decode()


def test_a_lock_does_not_follow_a_planted_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("important")
    (tmp_path / ".lock").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    with pytest.raises(OSError, match=r"symbolic link.*\.lock"), locked(tmp_path):
        pass
    with pytest.raises(OSError, match="symbolic link"):
        open_lock(tmp_path / "dangling")
    assert victim.read_text() == "important" and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "write",
    [
        lambda f: write_json(f, list(range(1000))),
        lambda f: save_safetensors(dict(x=np.zeros(1000)), f),
    ],
    ids=["json", "safetensors"],
)
def test_a_full_disk_is_an_error_that_names_the_file(write, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as e:
            write(tmp_path / "a.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / "a.json") in str(e.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask, file_mode, folder_mode", [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_files_have_the_permissions_of_the_umask(umask, file_mode, folder_mode, tmp_path):
    from vlkd.data.text import train_tokenizer
    from vlkd.models.bert import language_model, save_model

    before = os.umask(umask)
    try:
        write_fixture(tmp_path / "fixture", samples=50, dim=16)
        with atomic_folder(tmp_path / "folder") as part:
            save_safetensors(dict(x=np.zeros(3)), part / "a.safetensors", dict(b="1", a="2"))
            write_checksums(part)
        tokenizer = train_tokenizer(["a girl"], 20)
        sizes = dict(hidden=8, heads=2, layers=1, intermediate=8)
        save_model(tmp_path / "model", language_model(scale("smoke", **sizes), tokenizer, 0), tokenizer)
    finally:
        os.umask(before)
    for f in tmp_path.rglob("*"):
        assert f.stat().st_mode & 0o777 == (folder_mode if f.is_dir() else file_mode), f


def test_a_folder_stays_where_none_can_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    replace, calls = os.replace, []

    def fail_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("disk gone")
        replace(*args)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(OSError, match="disk gone"), atomic_folder(tmp_path / "a") as part:
        (part / "new").touch()
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["a", "a/old"]


def test_equal_tensors_make_equal_files(tmp_path):
    tensors, written = dict(b=np.ones(3), a=np.zeros(2, bool)), set()
    for names in ("abcde", "ebcda", "dceab", "abcde"):
        save_safetensors(tensors, tmp_path / "a.safetensors", dict.fromkeys(names, "x"))
        written.add((tmp_path / "a.safetensors").read_bytes())
    assert len(written) == 1


def test_names_beyond_ascii_under_an_ascii_locale(tmp_path):
    "Files, records and messages with such names are written, read and printed; the terminal gets ASCII."
    code = """if True:
        import sys
        from pathlib import Path
        import numpy as np
        from PIL import Image
        from vlkd.core.files import locked, printable, read_json, write_json
        from vlkd.core.records import Run, record
        from vlkd.data.catalog import print_status
        from vlkd.data.video import Features
        from vlkd.features.extract import extract_videos

        class Mean:
            name, dim = "mean", 3
            def encode(self, frames): return frames.mean((1, 2))

        folder = Path(sys.argv[1])
        record(folder, dict(x=1.0), headline="na\\u00efve")
        assert Run(folder).result["headline"] == "na\\u00efve"
        write_json(folder / "a.json", {str(folder): "\\u00e9"}, checksum=True)
        assert list(read_json(folder / "a.json")) == [str(folder)]
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "a.png")
        extract_videos({folder.name: [folder / "a.png"]}, folder, Mean(), workers=1)
        assert len(Features(folder)[folder.name]) == 1
        with locked(folder):
            print(printable(folder), printable("caf\\u00e9 \\x1b[2J"))
        print_status(folder)"""
    folder = tmp_path / "naïve \x1b[2J"
    folder.mkdir()
    done = run(code, folder, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.isascii() and b"\x1b" not in done.stdout and b"Data sets under" in done.stdout


def test_control_characters_are_printed_as_escapes():
    assert printable("a\x1b[2J\r\n") == r"a\x1b[2J\r\n"
    assert printable("\u202eabc\u2028") == r"\u202eabc\u2028"


def test_a_name_that_is_not_utf8_survives_json(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    assert read_json(write_json(tmp_path / "a.json", {name: 1}, checksum=True)) == {name: 1}


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    f = write_json(tmp_path / "a.json", dict(x=1))
    with pytest.raises(KeyError), atomic(f) as out:
        out.write("half")
        raise KeyError
    assert read_json(f) == dict(x=1) and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a | b", "*x*\r\n# y", "[a](javascript:b)"])
def test_text_in_a_table_is_shown_and_not_run(text):
    df = pd.DataFrame({text: [text]})
    markdown = table_md(df)
    assert "<script" not in markdown
    assert len(markdown.splitlines()) == 3 and all(line.count(" | ") == 0 for line in markdown.splitlines())
    assert "](" not in markdown.replace("\\](", "") and "*x*" not in markdown.replace("\\*", "")
