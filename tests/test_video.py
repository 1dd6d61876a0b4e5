"""Video files as found in the wild, and feature shards made from them."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from vlkd.core.settings import data_dir
from vlkd.data.video import extract, load_features, read_frames, VideoError, VideoWarning, write_mp4

pytest.importorskip("av", reason="the `video` extra is not installed")
ROOT = data_dir(need=False)
real = pytest.mark.skipif(ROOT is None, reason="VLKD_DATA is not set")
RAW = sorted((ROOT / "video_raw").iterdir()) if ROOT else [Path("VLKD_DATA is not set")]


class MeanColour:
    name, dim, size = "mean-colour", 3, 32

    def encode(self, frames):
        return frames.mean((1, 2), dtype=np.float32)


def shown_at(path, fps):
    "Oracle: decode everything, then take for each sample time the last frame that is not later, at least one."
    import av

    with av.open(str(path)) as c:
        s = c.streams.video[0]
        f = [(float(x.pts * x.time_base), x.to_ndarray(format="rgb24")) for x in c.decode(s)]
        rate = float(s.average_rate)
        n = max(x for x, _ in f) - f[0][0] + 1 / rate
    t = [x - f[0][0] for x, _ in f]
    if t != sorted(t):
        t = [k / rate for k in range(len(f))]  # pts out of order: the frames come at the stream's rate
    return np.stack(
        [
            f[max(i for i, x in enumerate(t) if x <= k / fps + 1e-9)][1]
            for k in range(int(np.ceil(n * fps - 1e-6)))
        ]
    )


@real
@pytest.mark.parametrize("path", RAW, ids=lambda p: p.name)
def test_raw_files_decode_as_the_oracle_says(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, t = read_frames(path, fps=2)
    want = shown_at(path, 2)
    assert x.dtype == np.uint8 and x.shape == want.shape and len(t) == len(x)
    assert np.array_equal(x, want)
    np.testing.assert_allclose(t, np.arange(len(x)) / 2)


@real
@pytest.mark.parametrize("path", RAW, ids=lambda p: p.name)
def test_seeking_gives_what_reading_from_the_start_gives(path):
    x, t = read_frames(path, fps=2)
    lo = 5.5
    if t[-1] < lo:
        lo = 5.25
    y, u = read_frames(path, fps=2, start=lo, end=lo + 1)
    z, _ = read_frames(path, fps=4)
    assert np.array_equal(y[0], z[int(lo * 4)]) and u[0] == lo


@real
def test_all_msvd_clips_decode(tmp_path):
    clips = sorted((ROOT / "msvd_clips").glob("*.mp4"))
    rows = {
        r["clip"]: r
        for r in map(json.loads, (ROOT / "msvd_clips/index.jsonl").read_text(encoding="utf-8").splitlines())
    }
    assert len(clips) == 18 and {c.stem for c in clips} == set(rows)
    feats = extract(clips, MeanColour(), tmp_path)
    assert len(feats) == 18 and not feats.errors and not feats.manifest["warnings"]
    for c in clips:
        assert len(feats[c.stem]) == int(np.ceil(rows[c.stem]["kept"] / 4)), c  # kept frames at 4 a second


@real
def test_a_cut_raw_file_never_passes_silently(tmp_path):
    for p in RAW:
        b = p.read_bytes()
        for part in (0.02, 0.5, 0.9):
            f = tmp_path / f"{part}{p.suffix}"
            f.write_bytes(b[: int(len(b) * part)])
            whole = len(read_frames(p)[0])
            with warnings.catch_warnings(record=True) as w:
                warnings.simplefilter("always")
                try:
                    x, _ = read_frames(f)
                except VideoError as e:
                    assert str(f) in str(e)
                    continue
            assert len(x) <= whole
            assert (
                any(issubclass(i.category, VideoWarning) and str(f) in str(i.message) for i in w)
                or len(x) >= 0.85 * whole
            ), (p, part, len(x), whole)


def test_library_imports_without_av():
    code = "import sys; sys.modules['av'] = None\nfrom vlkd.data.video import *\ntry: read_frames(__import__('vlkd').__file__)\nexcept ImportError as e: assert 'video' in str(e); print('ok')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "ok"


def test_damaged_bytes_fuzz(tmp_path):
    "Flipped bytes anywhere: frames, a VideoError, never another exception."
    from vlkd.core.files import rng

    r = rng("fuzz")
    x = r.integers(0, 255, (12, 32, 32, 3)).astype(np.uint8)
    b = write_mp4(tmp_path / "a.mp4", x, 4).read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for k in range(60):
        d = bytearray(b)
        for i in r.integers(0, len(d), 1 + k):
            d[i] = r.integers(256)
        (tmp_path / "b.mp4").write_bytes(d)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                y, t = read_frames(tmp_path / "b.mp4", size=16, max_frames=20)
            except VideoError as e:
                assert "b.mp4" in str(e)
                outcomes["refused"] += 1
                continue
        assert y.dtype == np.uint8 and 1 <= len(y) == len(t) <= 20 and y.shape[1:] == (16, 16, 3)
        outcomes["read"] += 1
    assert min(outcomes.values()) > 0, outcomes


def test_start_in_a_stream_without_timestamps(tmp_path):
    import av

    with av.open(str(tmp_path / "a.h264"), "w", format="h264") as c:
        s = c.add_stream("h264", rate=25)
        s.height = s.width = 16
        s.pix_fmt = "yuv420p"
        for i in range(200):
            c.mux(s.encode(av.VideoFrame.from_ndarray(np.full((16, 16, 3), i, np.uint8), format="rgb24")))
        c.mux(s.encode())
    x, t = read_frames(tmp_path / "a.h264", start=6)
    assert t.tolist() == [6, 7] and abs(int(x[0].mean()) - 150) <= 2 and abs(int(x[1].mean()) - 175) <= 2


def test_gif_frames_last_as_long_as_they_say(tmp_path):
    from PIL import Image

    ims = [Image.fromarray(np.full((16, 16, 3), v, np.uint8)) for v in (0, 100, 200)]
    ims[0].save(tmp_path / "a.gif", save_all=True, append_images=ims[1:], duration=[500, 1500, 500])
    x, t = read_frames(tmp_path / "a.gif", fps=2)
    assert x.mean((1, 2, 3)).round(-2).tolist()[:4] == [0, 100, 100, 100] and len(x) == 5


def test_two_runs_at_once_share_the_work(tmp_path):
    "The second run waits for the first and then finds everything there: four files, four encodings in all."
    for i in range(4):
        write_mp4(tmp_path / f"{i}.mp4", np.full((4, 16, 16, 3), 40 * i, np.uint8), 2)
    code = """if True:
        import sys, time; from pathlib import Path
        from vlkd.data.video import extract
        class Slow:
            name, dim, calls = "slow", 3, 0
            def encode(self, frames): self.calls += 1; time.sleep(.5); return frames.mean((1, 2))
        p, e = Path(sys.argv[1]), Slow(); (p/f"ready{sys.argv[2]}").touch()
        while len(list(p.glob("ready*"))) < 2: time.sleep(.01)
        assert len(extract(sorted(p.glob("*.mp4")), e, p/"out", shard_size=1)) == 4; print(e.calls)"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(k)], stdout=subprocess.PIPE, text=True
        )
        for k in range(2)
    ]
    assert sorted(int(r.communicate(timeout=60)[0]) for r in runs) == [0, 4]
    feats = load_features(tmp_path / "out")
    assert [round(float(feats[str(i)].astype(float).mean()), -1) for i in range(4)] == [0, 40, 80, 120]


def test_orphan_shards_of_a_killed_run_are_removed(tmp_path):
    f = write_mp4(tmp_path / "a.mp4", np.zeros((4, 32, 32, 3), np.uint8), 2)
    extract([f], MeanColour(), tmp_path / "out")
    (tmp_path / "out/shard-0123.safetensors").write_bytes(b"half")
    feats = extract([f], MeanColour(), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("shard-*")] == list(feats.manifest["shards"])


def test_a_missing_shard_is_rebuilt_and_named(tmp_path, capsys):
    f = write_mp4(tmp_path / "a.mp4", np.full((4, 32, 32, 3), 90, np.uint8), 2)
    a = extract([f], MeanColour(), tmp_path / "out")
    want = a["a"]
    (s := next((tmp_path / "out").glob("shard-*"))).unlink()
    b = extract([f], MeanColour(), tmp_path / "out")
    assert s.name in capsys.readouterr().out and np.array_equal(b["a"], want)


def test_only_unreadable_files(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"")
    feats = extract([tmp_path / "a.mp4", tmp_path / "gone.mp4"], MeanColour(), tmp_path / "out")
    assert (
        len(feats) == 0
        and set(feats.errors) == {"a", "gone"}
        and "a.mp4: the file is empty" in capsys.readouterr().out
    )
