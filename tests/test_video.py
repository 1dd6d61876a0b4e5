"""Video files as found in the wild, and feature shards made from them."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from vlkd.core.files import rng
from vlkd.core.settings import data_dir
from vlkd.data.video import Features, VideoError, VideoWarning, read_frames, write_mp4
from vlkd.features.extract import extract_videos

pytest.importorskip("av", reason="the `video` extra is not installed")
ROOT = data_dir(need=False)
real = pytest.mark.skipif(ROOT is None, reason="VLKD_DATA is not set")
RAW = sorted((ROOT / "video_raw").iterdir()) if ROOT else [Path("VLKD_DATA is not set")]


class MeanColour:
    name, dim, size = "mean-colour", 3, 32

    def encode(self, frames):
        return frames.mean((1, 2), dtype=np.float32)


def shown_at(path, fps):
    "Oracle: decode everything, then take for each time the last frame that is not later, at least one."
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [
            (float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(stream)
        ]
        rate = float(stream.average_rate)
    first, last = frames[0][0], max(time for time, _ in frames)
    times = [time - first for time, _ in frames]
    if times != sorted(times):  # pts out of order: the frames come at the stream's rate
        times = [k / rate for k in range(len(frames))]
    samples = int(np.ceil((last - first + 1 / rate) * fps - 1e-6))
    shown = [max(i for i, time in enumerate(times) if time <= k / fps + 1e-9) for k in range(samples)]
    return np.stack([frames[i][1] for i in shown])


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
    times = read_frames(path, fps=2)[1]
    start = 5.5 if times[-1] >= 5.5 else 5.25
    x, t = read_frames(path, fps=2, start=start, end=start + 1)
    from_the_start, _ = read_frames(path, fps=4)
    assert np.array_equal(x[0], from_the_start[int(start * 4)]) and t[0] == start


@real
def test_all_msvd_clips_decode(tmp_path):
    clips = sorted((ROOT / "msvd_clips").glob("*.mp4"))
    lines = (ROOT / "msvd_clips/index.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["clip"]: row for row in map(json.loads, lines)}
    assert len(clips) == 18 and {c.stem for c in clips} == set(rows)
    feats = extract_videos(ROOT / "msvd_clips", tmp_path, MeanColour(), workers=1)
    assert len(feats) == 18 and not feats.errors and not feats.manifest["warnings"]
    for c in clips:
        assert len(feats[c.stem]) == int(np.ceil(rows[c.stem]["kept"] / 4)), c  # kept frames at 4 a second


@real
@pytest.mark.parametrize("path", RAW, ids=lambda p: p.name)
def test_a_cut_raw_file_never_passes_silently(path, tmp_path):
    data, whole = path.read_bytes(), len(read_frames(path)[0])
    for part in (0.02, 0.5, 0.9):
        f = tmp_path / f"{part}{path.suffix}"
        f.write_bytes(data[: int(len(data) * part)])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                x, _ = read_frames(f)
            except VideoError as e:
                assert str(f) in str(e)
                continue
        warned = any(issubclass(w.category, VideoWarning) and str(f) in str(w.message) for w in caught)
        assert len(x) <= whole and (warned or len(x) >= 0.85 * whole), (part, len(x), whole)


def test_library_imports_without_av():
    code = """if True:
        import sys
        sys.modules["av"] = None
        import vlkd
        from vlkd.data.video import read_frames
        try: read_frames(vlkd.__file__)
        except ImportError as e: assert "video" in str(e); print("ok")"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "ok"


def test_damaged_bytes_fuzz(tmp_path):
    "Flipped bytes anywhere: frames, a VideoError, never another exception."
    r = rng("fuzz")
    x = r.integers(0, 255, (12, 32, 32, 3)).astype(np.uint8)
    good = write_mp4(tmp_path / "a.mp4", x, 4).read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for k in range(60):
        data = bytearray(good)
        for i in r.integers(0, len(data), 1 + k):
            data[i] = r.integers(256)
        (tmp_path / "b.mp4").write_bytes(data)
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

    with av.open(str(tmp_path / "a.h264"), "w", format="h264") as container:
        stream = container.add_stream("h264", rate=25)
        stream.height = stream.width = 16
        stream.pix_fmt = "yuv420p"
        for i in range(200):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    x, t = read_frames(tmp_path / "a.h264", start=6)
    assert t.tolist() == [6, 7] and abs(int(x[0].mean()) - 150) <= 2 and abs(int(x[1].mean()) - 175) <= 2


def test_gif_frames_last_as_long_as_they_say(tmp_path):
    from PIL import Image

    ims = [Image.fromarray(np.full((16, 16, 3), v, np.uint8)) for v in (0, 100, 200)]
    ims[0].save(tmp_path / "a.gif", save_all=True, append_images=ims[1:], duration=[500, 1500, 500])
    x, _ = read_frames(tmp_path / "a.gif", fps=2)
    assert x.mean((1, 2, 3)).round(-2).tolist()[:4] == [0, 100, 100, 100] and len(x) == 5


def test_two_runs_at_once_share_the_work(tmp_path):
    "The second run waits for the first and then finds everything there: four files, four encodings in all."
    for i in range(4):
        write_mp4(tmp_path / f"{i}.mp4", np.full((4, 16, 16, 3), 40 * i, np.uint8), 2)
    code = """if True:
        import sys, time; from pathlib import Path
        from vlkd.features.extract import extract_videos
        class Slow:
            name, dim, calls = "slow", 3, 0
            def encode(self, frames): self.calls += 1; time.sleep(.5); return frames.mean((1, 2))
        p, e = Path(sys.argv[1]), Slow(); (p/f"ready{sys.argv[2]}").touch()
        while len(list(p.glob("ready*"))) < 2: time.sleep(.01)
        made = extract_videos(p, p / "out", e, shard_size=1, workers=1)
        assert len(made) == 4; print("calls", e.calls)"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(k)], stdout=subprocess.PIPE, text=True
        )
        for k in range(2)
    ]
    assert sorted(int(r.communicate(timeout=60)[0].split()[-1]) for r in runs) == [0, 4]
    feats = Features(tmp_path / "out")
    assert [round(float(feats[str(i)].astype(float).mean()), -1) for i in range(4)] == [0, 40, 80, 120]


def test_a_missing_shard_is_rebuilt_and_named(tmp_path, capsys):
    f = write_mp4(tmp_path / "a.mp4", np.full((4, 32, 32, 3), 90, np.uint8), 2)
    want = extract_videos(f, tmp_path / "out", MeanColour(), workers=1)["a"]
    (s := next((tmp_path / "out").glob("shard-*.safetensors"))).unlink()
    b = extract_videos(f, tmp_path / "out", MeanColour(), workers=1)
    assert s.name in capsys.readouterr().out and np.array_equal(b["a"], want)


def test_only_unreadable_files(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"")
    files = {name: tmp_path / f"{name}.mp4" for name in ("a", "gone")}
    feats = extract_videos(files, tmp_path / "out", MeanColour(), workers=1)
    assert len(feats) == 0 and set(feats.errors) == {"a", "gone"}
    assert "a.mp4: the file is empty" in capsys.readouterr().out
