"Features of folders of videos: killed and resumed, by several processes, from damaged files."

import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from processes import COMMAND, command, content

from vlkd.core.files import rng
from vlkd.core.settings import data_dir
from vlkd.data.video import Features, read_frames, write_mp4
from vlkd.features.encoders import GridPixels
from vlkd.features.extract import extract_videos
from vlkd.features.video3d import load_resnext3d, save_resnext3d, tiny_resnext3d

av = pytest.importorskip("av", reason="the `video` extra is not installed")
ROOT = data_dir(need=False)
real = pytest.mark.skipif(ROOT is None, reason="VLKD_DATA is not set")


def write_clip(path, n=16, fps=8, side=(32, 48)):
    "Frames whose brightness counts up, with a pattern that names the file."
    x = rng(path.name).integers(0, 100, (1, *side, 3)) + np.arange(n)[:, None, None, None] * 100 // n
    return write_mp4(path, x.astype(np.uint8), fps)


def extract_command(*args):
    "`vlkd extract` in this process."
    return command("extract", *args, "--workers", "1")


@pytest.fixture(scope="module")
def tiny3d(tmp_path_factory):
    "Weights file of a small 3D-ResNeXt."
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return save_resnext3d(tiny_resnext3d(32), tmp_path_factory.mktemp("weights") / "tiny.safetensors")


class EndsOnWhite(GridPixels):
    "Takes its process down when a frame is nearly white, as a crash in native code would."

    def encode(self, frames):
        if np.asarray(frames).mean() > 240:
            os._exit(9)
        return super().encode(frames)


class RefusesWhite(GridPixels):
    def encode(self, frames):
        if np.asarray(frames).mean() > 240:
            raise ValueError("too bright")
        return super().encode(frames)


class Overflows(GridPixels):
    def encode(self, frames):
        return super().encode(frames) * (1e6 if np.asarray(frames).mean() > 240 else 1)


@pytest.mark.slow
def test_killed_half_way_and_resumed_equals_uninterrupted(tmp_path, tiny3d, workers=2):
    v, whole, out, kills = tmp_path / "videos", tmp_path / "whole", tmp_path / "killed", []
    v.mkdir()
    for i in range(40):
        write_clip(v / f"v{i:02}.mp4", 24 + 8 * (i % 3))
    (v / "v07.mp4").write_bytes(b"")  # and one that cannot be read
    args = ["--frames", "grid", "--clips", f"resnext3d={tiny3d}", "--shard-size", 2]
    r = extract_command(v, "--out", whole, *args)
    assert r.returncode == 1 and "v07.mp4: the file is empty" in r.stderr
    for done, sig in (
        (2, signal.SIGKILL),
        (6, signal.SIGINT),
    ):  # killed, then interrupted, each time with shards behind and before it
        p = subprocess.Popen(
            [*COMMAND, "extract", str(v), "--out", str(out), *map(str, args), "--workers", str(workers)],
            stdout=subprocess.DEVNULL,
            stderr=(tmp_path / "said").open("w"),
        )
        while len(list(out.glob("shard-*.json"))) < done and p.poll() is None:
            time.sleep(0.002)
        assert p.poll() is None
        p.send_signal(sig)
        p.wait(timeout=120)
        kills.append(len(list(out.glob("shard-*.json"))))
    assert p.returncode == 130, (kills, (tmp_path / "said").read_text())
    assert 2 <= kills[0] <= kills[1] < 20 and not (out / "manifest.json").exists()
    time.sleep(1)
    state = content(out)
    time.sleep(1)
    assert content(out) == state  # no worker outlives the run
    r = command("extract", v, "--out", out, *args, "--workers", workers)
    assert r.returncode == 1 and "v07.mp4: the file is empty" in r.stderr and "Traceback" not in r.stderr
    assert content(out) == content(whole) and len(content(out)) == 2 * 20 + 2
    feats = Features(out)
    assert (
        len(feats) == 39 and set(feats.errors) == {"v07"} and all(np.isfinite(feats[k]).all() for k in feats)
    )
    again = extract_command(v, "--out", out, *args)
    assert again.returncode == 1 and content(out) == content(whole)


def test_half_written_files_of_a_killed_run_are_removed(tmp_path):
    write_clip(tmp_path / "a.mp4")
    out = tmp_path / "out"
    out.mkdir()
    for n in (".shard-00000.safetensors.x1", ".shard-00000.json.x2", ".manifest.json.x3", ".plan.json.x4"):
        (out / n).write_bytes(b"half")
    extract_videos(tmp_path, out, GridPixels(2), workers=1)
    assert sorted(content(out)) == [
        "manifest.json",
        "plan.json",
        "shard-00000.json",
        "shard-00000.safetensors",
    ]


def test_number_of_workers_and_of_machines_does_not_change_a_byte(tmp_path, tiny3d):
    (tmp_path / "v").mkdir()
    for i in range(7):
        write_clip(tmp_path / "v" / f"{i}.mp4", 8 + 5 * i)
    net = load_resnext3d(tiny3d)
    kw = dict(frames=GridPixels(4), clips=net, shard_size=2)
    extract_videos(tmp_path / "v", tmp_path / "a", workers=1, **kw)
    extract_videos(tmp_path / "v", tmp_path / "b", workers=2, **kw)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    for r in (2, 0, 1):  # three machines without a common disk, then copied together
        extract_videos(tmp_path / "v", tmp_path / f"r{r}", workers=1, rank=r, world_size=3, **kw)
        (tmp_path / "c").mkdir(exist_ok=True)
        for p in (tmp_path / f"r{r}").glob("[sp]*"):
            (tmp_path / "c" / p.name).write_bytes(p.read_bytes())
    assert Features(tmp_path / "r1").manifest["missing"] == 5

    class Never(GridPixels):
        def encode(self, x):
            raise AssertionError("nothing is left to encode")

    extract_videos(tmp_path / "v", tmp_path / "c", workers=1, **dict(kw, frames=Never(4)))
    assert content(tmp_path / "a") == content(tmp_path / "c")


def test_a_video_that_ends_its_process_is_an_error_of_that_video(tmp_path):
    for i in range(5):
        write_clip(tmp_path / f"{i}.mp4")
    write_mp4(tmp_path / "white.mp4", np.full((8, 32, 32, 3), 255, np.uint8), 8)
    feats = extract_videos(tmp_path, tmp_path / "out", EndsOnWhite(2), workers=2)
    assert (
        sorted(feats) == list("01234")
        and "white.mp4: decoding or encoding it ends the process" in feats.errors["white"]
    )


def test_an_encoder_that_refuses_or_overflows_leaves_no_row(tmp_path):
    write_clip(tmp_path / "a.mp4")
    write_mp4(tmp_path / "white.mp4", np.full((8, 32, 32, 3), 255, np.uint8), 8)
    for enc, text in (
        (RefusesWhite(2), "white.mp4: too bright"),
        (Overflows(2), "white.mp4: features that are not finite in float16"),
    ):
        feats = extract_videos(tmp_path, tmp_path / text[11:14], enc, workers=1)
        assert list(feats) == ["a"] and text in feats.errors["white"]


def sound(path):
    with av.open(str(path), "w") as c:
        s = c.add_stream("aac", rate=8000, layout="mono")
        for _i in range(8):
            f = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            f.sample_rate = 8000
            c.mux(s.encode(f))
        c.mux(s.encode())


def no_frames(path):
    with av.open(str(path), "w") as c:
        s = c.add_stream("h264", rate=8)
        s.height = s.width = 32
        s.pix_fmt = "yuv420p"
        c.start_encoding()


def variable(path, ms, levels):
    from fractions import Fraction

    with av.open(str(path), "w") as c:
        s = c.add_stream("h264", rate=25)
        s.height, s.width, s.pix_fmt = 32, 48, "yuv420p"
        s.codec_context.time_base = Fraction(1, 1000)
        for m, v in zip(ms, levels, strict=True):
            f = av.VideoFrame.from_ndarray(np.full((32, 48, 3), v, np.uint8), format="rgb24")
            f.pts, f.time_base = m, Fraction(1, 1000)
            c.mux(s.encode(f))
        c.mux(s.encode())


def turned(path, quarter=True):
    x = np.zeros((8, 32, 64, 3), np.uint8)
    x[:, :, 32:] = 200
    write_mp4(path, x, 8)
    b = bytearray(path.read_bytes())
    i = b.index(b"tkhd") + 44
    b[i : i + 36] = b"".join(
        int(v).to_bytes(4, "big", signed=True) for v in (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    )
    path.write_bytes(b)


def test_bad_files_are_named_and_leave_no_row(tmp_path, tiny3d):
    v = tmp_path / "v"
    v.mkdir()
    write_clip(v / "good.mp4")
    good = (v / "good.mp4").read_bytes()
    sound(v / "sound.mp4")
    no_frames(v / "nothing.mp4")
    (v / "empty.mp4").write_bytes(b"")
    (v / "text.mp4").write_text("not a video\n" * 50)
    (v / "cut.mp4").write_bytes(good[: len(good) // 2])
    b = bytearray(good)
    b[60:-700] = rng("x").bytes(len(b) - 760)
    (v / "noise.mp4").write_bytes(b)
    r = extract_command(v, "--out", tmp_path / "out", "--frames", "grid", "--clips", f"resnext3d={tiny3d}")
    assert r.returncode == 1 and "Traceback" not in r.stderr
    feats = Features(tmp_path / "out")
    bad = {"sound", "nothing", "empty", "text", "cut"}
    assert (
        bad <= set(feats.errors)
        and "good" in feats
        and set(feats) | set(feats.errors) | {"noise"} == bad | {"good", "noise"}
    )
    for k in bad:
        assert str(v / f"{k}.mp4") in feats.errors[k] and f"  {k}: " in r.stderr
    assert "no video stream" in feats.errors["sound"] and "the file is empty" in feats.errors["empty"]
    assert (
        "noise" in feats.errors or "noise" in feats.manifest["warnings"]
    )  # damaged bytes never pass silently
    assert feats["good"].any(1).all()


def test_a_file_that_breaks_off_keeps_its_good_part_and_fails_the_command(tmp_path):
    x = rng("texture").integers(0, 255, (40, 32, 32, 3)).astype(np.uint8)
    f = tmp_path / "v.mkv"
    with av.open(str(f), "w") as c:
        s = c.add_stream("h264", rate=4)
        s.height = s.width = 32
        s.pix_fmt = "yuv420p"
        for i in x:
            c.mux(s.encode(av.VideoFrame.from_ndarray(i, format="rgb24")))
        c.mux(s.encode())
    b = f.read_bytes()
    f.write_bytes(b[: len(b) // 2])
    r = extract_command(tmp_path, "--out", tmp_path / "out", "--frames", "grid")
    feats = Features(tmp_path / "out")
    assert (
        r.returncode == 1
        and "1 could be read only in part" in r.stderr
        and str(f) in feats.manifest["warnings"]["v"]
    )
    assert 0 < len(feats["v"]) < 10


def test_variable_frame_rate_is_sampled_by_time(tmp_path, tiny3d):
    ms, levels = [0, 40, 900, 1000, 3500, 3540, 4100, 6000], [10, 40, 70, 100, 130, 160, 190, 220]
    variable(tmp_path / "v.mp4", ms, levels)
    feats = extract_videos(tmp_path, tmp_path / "out", GridPixels(1), load_resnext3d(tiny3d), workers=1)
    shown = [levels[max(i for i, m in enumerate(ms) if m <= 1000 * s)] for s in range(7)]
    assert (
        feats["v"].shape == (7, 3 + 128)
        and np.abs((feats["v"][:, 0].astype(float) + 1) * 127.5 - shown).max() < 5
    )


def test_rotation_is_applied_before_both_encoders(tmp_path, tiny3d):
    turned(tmp_path / "turned.mp4")
    up = np.zeros((8, 64, 32, 3), np.uint8)
    up[:, 32:] = 200
    write_mp4(tmp_path / "upright.mp4", up, 8)
    feats = extract_videos(tmp_path, tmp_path / "out", GridPixels(2), load_resnext3d(tiny3d), workers=1)
    a, b = feats["turned"], feats["upright"]
    assert (
        np.abs(a[:, :12].astype(float) - b[:, :12]).max() < 0.05
        and a[0, :6].max() < -0.8 < 0.4 < a[0, 6:12].min()
    )
    assert np.linalg.norm(a[0, 12:].astype(float) - b[0, 12:]) < 0.05 * np.linalg.norm(
        b[0, 12:].astype(float)
    )


def test_a_stream_that_changes_size_is_read_at_its_first_size(tmp_path):
    parts = []
    for i, side in enumerate([(32, 48), (64, 64)]):
        with av.open(str(tmp_path / f"{i}.h264"), "w", format="h264") as c:
            s = c.add_stream("h264", rate=4)
            s.height, s.width = side
            s.pix_fmt = "yuv420p"
            for _k in range(8):
                c.mux(
                    s.encode(
                        av.VideoFrame.from_ndarray(
                            np.full((*side, 3), 60 + 100 * i, np.uint8), format="rgb24"
                        )
                    )
                )
            c.mux(s.encode())
        parts.append((tmp_path / f"{i}.h264").read_bytes())
    (tmp_path / "v.ts").write_bytes(b"".join(parts))
    feats = extract_videos({"v": tmp_path / "v.ts"}, tmp_path / "out", GridPixels(1), workers=1)
    assert np.abs((feats["v"][:, 0].astype(float) + 1) * 127.5 - [60, 60, 160, 160]).max() < 6


def test_a_list_with_times_and_missing_files(tmp_path):
    write_clip(tmp_path / "a.mp4", 48)
    (tmp_path / "list.csv").write_text("path,start,end\na.mp4,1,3\ngone.mp4,,\na.mp4,90,95\n")
    r = extract_command(tmp_path / "list.csv", "--out", tmp_path / "out", "--frames", "grid")
    feats = Features(tmp_path / "out")
    assert r.returncode == 1 and list(feats) == ["a_1_3"] and len(feats["a_1_3"]) == 2
    assert (
        "list.csv, line 3: " in feats.errors["gone"]
        and "gone.mp4: no such video file" in feats.errors["gone"]
    )
    assert (
        "list.csv, line 4: " in feats.errors["a_90_95"]
        and "after the end of the video" in feats.errors["a_90_95"]
    )
    write_clip(tmp_path / "gone.mp4")
    r = extract_command(tmp_path / "list.csv", "--out", tmp_path / "out", "--frames", "grid")
    assert r.returncode == 1 and "gone" in Features(tmp_path / "out")
    (tmp_path / "list.csv").write_text("path,start,end\na.mp4,3,1\n")
    r = extract_command(tmp_path / "list.csv", "--out", tmp_path / "new", "--frames", "grid")
    assert (
        r.returncode == 2
        and "list.csv, line 2: end should be later than start" in r.stderr
        and not (tmp_path / "new").exists()
    )


def test_more_than_512_rows_are_left_out(tmp_path):
    write_mp4(
        tmp_path / "long.mp4",
        np.repeat(np.arange(600) % 250, 16 * 16 * 3).reshape(600, 16, 16, 3).astype(np.uint8),
        1,
    )
    feats = extract_videos(tmp_path, tmp_path / "out", GridPixels(1), workers=1)
    it = feats.manifest["items"]["long"]
    assert it["length"] == len(feats["long"]) == 512 and it["truncated"] is True
    assert abs((float(feats["long"][511, 0]) + 1) * 127.5 - 511 % 250) < 3


@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_a_full_disk_leaves_whole_shards_only(tmp_path, monkeypatch, ending):
    import vlkd.features.extract as module

    v = tmp_path / "v"
    v.mkdir()
    for i in range(6):
        write_clip(v / f"{i}.mp4")
    kw = dict(frames=GridPixels(2), workers=1, shard_size=2)
    extract_videos(v, tmp_path / "whole", **kw)
    out = tmp_path / "out"
    replace = os.replace

    def full(a, b):
        if Path(b).name == f"shard-00001.{ending}":
            raise OSError(28, "No space left on device")
        return replace(a, b)

    with monkeypatch.context() as m:
        m.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left on device"):
            module.extract_videos(v, out, **kw)
    left = content(out)
    assert "shard-00001.json" not in left and left.items() <= content(tmp_path / "whole").items()
    extract_videos(v, out, **kw)
    assert content(out) == content(tmp_path / "whole")


def test_a_full_disk_while_a_shard_is_renewed_keeps_the_old_one(tmp_path, monkeypatch):
    v = tmp_path / "v"
    v.mkdir()
    write_clip(v / "a.mp4")
    write_clip(v / "b.mp4")
    kw = dict(frames=GridPixels(2), workers=1)
    extract_videos(v, tmp_path / "out", **kw)
    before = content(tmp_path / "out")
    write_clip(v / "a.mp4", 32)

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            extract_videos(v, tmp_path / "out", **kw)
    assert content(tmp_path / "out") == before
    feats = extract_videos(v, tmp_path / "out", **kw)
    assert len(feats["a"]) == 4 and len(feats["b"]) == 2


@real
@pytest.mark.slow
def test_msvd_clips_through_mobilenet_are_its_features_of_their_frames(tmp_path):
    from vlkd.features.encoders import load_mobilenet

    clips, encoder = sorted((ROOT / "msvd_clips").glob("*.mp4"))[:4], load_mobilenet()
    made = extract_videos({p.stem: p for p in clips}, tmp_path / "out", encoder, max_frames=4, workers=1)
    assert len(made) == 4 and not made.errors and not made.manifest["warnings"]
    for path in clips:
        frames, _ = read_frames(path, size=encoder.size, max_frames=4)
        assert np.array_equal(made[path.stem], encoder.encode(frames).astype(np.float16))


@real
@pytest.mark.slow
def test_raw_files_through_both_encoders(tmp_path, tiny3d):
    r = extract_command(
        ROOT / "video_raw", "--out", tmp_path / "out", "--clips", f"resnext3d={tiny3d}", "--max-frames", 3
    )
    assert r.returncode == 0, r.stderr
    feats = Features(tmp_path / "out")
    assert len(feats) == len(list((ROOT / "video_raw").iterdir())) and feats.manifest["dims"] == [1280, 128]
    for k in feats:
        assert (
            feats[k].shape == (3, 1408)
            and np.isfinite(feats[k]).all()
            and feats[k][:, :1280].any(1).all()
            and feats[k][:, 1280:].any(1).all()
        ), k


def test_a_named_pipe_is_an_error_of_its_video(tmp_path, capsys):
    write_clip(tmp_path / "a.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    feats = extract_videos(tmp_path, tmp_path / "out", GridPixels(2), workers=1)
    assert list(feats) == ["a"] and "pipe.mp4: not a regular file" in feats.errors["pipe"]
    assert "no features of pipe" in capsys.readouterr().out


def test_kept_features_of_a_deleted_video_are_named(tmp_path, capsys):
    for name in ("a", "b"):
        write_clip(tmp_path / f"{name}.mp4")
    extract_videos(tmp_path, tmp_path / "out", GridPixels(2), workers=1)
    (tmp_path / "b.mp4").unlink()
    capsys.readouterr()
    feats = extract_videos(tmp_path, tmp_path / "out", GridPixels(2), workers=1)
    assert set(feats) == {"a", "b"}
    assert "out: 1 videos are no longer there, their features are kept: b" in capsys.readouterr().out


def test_control_characters_of_names_do_not_reach_the_terminal(tmp_path, capsys):
    (tmp_path / "red\x1b[31m\r.mp4").write_bytes(b"")
    write_clip(tmp_path / "a.mp4")
    extract_videos(tmp_path, tmp_path / "out\x1b[2J", GridPixels(2), workers=1)
    (tmp_path / "red\x1b[31m\r.mp4").unlink()
    extract_videos(tmp_path, tmp_path / "out\x1b[2J", GridPixels(2), workers=1)
    printed = capsys.readouterr()
    assert "red" in printed.out
    assert not set(printed.out + printed.err) & set("\x1b\r")


OWN = """
class Brightness:
    name, dim = "brightness", 1

    def encode(self, frames):
        return frames.mean((1, 2, 3))[:, None] / 255
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_an_own_encoder_by_file_or_module(tmp_path, workers, monkeypatch):
    write_clip(tmp_path / "a.mp4")
    (tmp_path / "own_features.py").write_text(OWN)
    by_file = extract_videos(
        tmp_path, tmp_path / "file", f"{tmp_path}/own_features.py:Brightness", workers=workers
    )
    monkeypatch.syspath_prepend(tmp_path)
    by_module = extract_videos(tmp_path, tmp_path / "module", "own_features:Brightness", workers=1)
    assert by_file.manifest["encoder"] == "brightness"
    assert by_file["a"].shape == (2, 1) and np.array_equal(by_file["a"], by_module["a"])
    with pytest.raises(ValueError, match="lacks dim, encode"):
        extract_videos(tmp_path, tmp_path / "out", SimpleNamespace(name="x"), workers=1)
