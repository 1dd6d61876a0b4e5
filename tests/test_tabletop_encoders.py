"Tabletop's encoders: captions of what can be seen, a CLIP that is trained once, features from files."

import contextlib
import io
import threading
from functools import partial
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch
from processes import command

import vlkd.tabletop.clip as module
from vlkd.core.files import rng
from vlkd.data.video import Features, read_frames, write_mp4
from vlkd.features.encoders import GridPixels
from vlkd.features.extract import VideoItem, encode_video, extract_videos
from vlkd.tabletop.clip import (
    WORDINGS,
    TabletopClip,
    caption_frame,
    clip_tokens,
    frame_facts,
    load_tabletop_clip,
    nameless,
)
from vlkd.tabletop.encoders import load_tabletop_encoder
from vlkd.tabletop.nouns import COLOURS, EVENTS, ROUND, SHAPES, STATIC
from vlkd.tabletop.render import SIDE, render, surfaces
from vlkd.tabletop.world import World

clip = pytest.mark.skipif(not find_spec("open_clip"), reason="the `encoders` extra is not installed")
video = pytest.mark.skipif(not find_spec("av"), reason="the `video` extra is not installed")
TINY = dict(clips=30, steps=6, batch=16)


@pytest.mark.parametrize("shape", SHAPES)
def test_frames_that_look_alike_have_the_same_facts(shape):
    "A caption must not say what its one frame does not show, such as the future."
    happens = [(event, o) for event, v in {**EVENTS, **STATIC}.items() for o in v if event != "push"]
    happens.append(("push", "roll" if shape in ROUND else "slide"))
    events, outcomes = zip(*happens, strict=True)
    n = len(happens)
    looks = pd.DataFrame(dict(shape=[shape] * n, size=["large"] * n))
    frames = render(looks, events, outcomes, [7] * n, noise=0.0).reshape(-1, SIDE, SIDE, 3)
    facts = frame_facts(looks, events, outcomes, [7] * n)
    facts = facts.replace(dict(state=dict(narrow="whole", wide="whole")))  # widths between pixels look alike
    found = {}
    for frame, row in zip(frames, facts.itertuples(index=False), strict=True):
        found.setdefault(frame.tobytes(), set()).add(tuple(row))
    assert max(map(len, found.values())) == 1 and len(found) < len(frames)


def test_surfaces_are_the_ones_filmed():
    n = 60
    looks = pd.DataFrame(dict(shape=["square"] * n, size=["large"] * n))
    films = render(looks, ["heat"] * n, ["keep"] * n, range(n), noise=0.0)[:, 0].astype(float)
    for film, surface in zip(films, surfaces(range(n)).itertuples(), strict=True):
        tint, pixels = np.array(COLOURS[surface.colour], float), film[13:23, 8:24].reshape(-1, 3)
        hues = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
        light = pixels[np.linalg.norm(hues - tint / np.linalg.norm(tint), axis=1) < 0.03].max(1)
        assert len(light) > 20, surface  # pixels of this tint
        assert (light.min() < 0.7 * light.max()) == (surface.texture == "striped"), surface


def test_captions_name_what_they_keep():
    draw = rng("captions")
    facts = frame_facts(*nameless(50, 5), range(50))
    for row in facts.to_dict("records"):
        caption = f" {caption_frame(draw, row, 1.0)} "
        for fact, value in row.items():
            assert not value or any(f" {phrase} " in caption for phrase in WORDINGS[fact][value]), row
        assert clip_tokens([caption]).max() == clip_tokens(["a thing"]).max()  # the end is within the length
    assert len({caption_frame(draw, facts.iloc[0].to_dict()) for _ in range(50)}) > 10


@clip
def test_clip_is_the_same_with_more_threads():
    frames = TabletopClip(**TINY).nameless_frames(3, 1)[0]
    alone, threads = TabletopClip(**TINY).fit().image(frames), torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(99)
    try:
        threaded = TabletopClip(**TINY).fit()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(alone, threaded.image(frames))
    assert TabletopClip(**TINY | dict(seed=1)).name != threaded.name


@clip
def test_of_several_that_ask_one_trains(tmp_path, monkeypatch, capsys):
    "A damaged file is made again, with the same weights."
    made, frames = [], np.zeros((1, SIDE, SIDE, 3), np.uint8)

    class Counted(TabletopClip):
        def fit(self):
            made.append(1)
            return super().fit()

    monkeypatch.setattr(module, "TabletopClip", partial(Counted, **TINY))
    got = []
    with contextlib.redirect_stderr(io.StringIO()):
        ts = [threading.Thread(target=lambda: got.append(load_tabletop_clip(tmp_path))) for _ in range(3)]
        for t in ts:
            t.start()
        for t in ts:
            t.join()
    assert len(made) == 1 and len(got) == 3
    f = next((tmp_path / "encoders").glob("*.safetensors"))
    f.write_bytes(f.read_bytes()[:-9])
    assert np.array_equal(load_tabletop_clip(tmp_path).image(frames), got[0].image(frames))
    assert len(made) == 2 and "is damaged: it is made again" in capsys.readouterr().out


class Ends:
    "An encoder of clips that look back: the brightness of each of its frames."

    frames, rate, size, trailing, dim, name = 6, 4, 32, True, 6, "ends"

    def encode(self, x):
        return GridPixels(1).encode(x)[..., 0]


@video
def test_clips_that_look_back_end_at_their_row(tmp_path):
    x = (np.arange(22) * 10)[:, None, None, None] + np.zeros((1, 32, 32, 3))
    f = write_mp4(tmp_path / "a.mp4", x.astype(np.uint8), 4)

    def levels(y):
        return (y + 1) * 127.5

    for fps, every in ((1, 4), (2, 2), (4, 1)):
        y, cut = encode_video(VideoItem(f), None, Ends(), fps)
        rows = range(0, 22, every)
        assert len(y) == len(rows) and not cut
        assert np.abs(levels(y) - [[10 * max(k - 5 + j, 0) for j in range(6)] for k in rows]).max() < 4
    y, cut = encode_video(VideoItem(f), GridPixels(1), Ends(), 2, max_frames=7)
    assert (
        len(y) == 7
        and cut
        and abs(levels(y[6, -1]) - 120) < 4
        and np.abs(levels(y[:, 0]) - levels(y[:, -1])).max() < 2
    )


@video
@pytest.mark.parametrize("kind", ["2d", pytest.param("clip", marks=clip)])
def test_films_of_a_world_through_the_command(tmp_path, monkeypatch, kind):
    "In two processes, or in this one with a small CLIP."
    if kind == "clip":
        monkeypatch.setenv("VLKD_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(module, "TabletopClip", partial(TabletopClip, **TINY))
    world = World(6)
    films = world.frames(np.arange(12))
    v = tmp_path / "v"
    for i, x in enumerate(films):
        write_mp4(
            v / f"{i:02}.mp4", x if i else np.kron(x, np.ones((1, 2, 2, 1), np.uint8)), 1
        )  # the first at twice the size
    options = ["--frames", f"tabletop-{kind}", "--clips", "tabletop-3d", "--workers", 1 + (kind == "2d")]
    done = command("extract", v, "--out", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    feats, enc = Features(tmp_path / "out"), load_tabletop_encoder(kind=kind)
    assert feats.manifest["dims"] == [enc.dim_2d, 14] and feats.manifest["clips"]["trailing"]
    seen = np.stack([read_frames(v / f"{i:02}.mp4", fps=1, size=32)[0] for i in range(12)])
    want = enc.encode(seen)
    got = np.stack([feats[f"{i:02}"] for i in range(12)])
    assert got.shape == want.shape and np.abs(got.astype(float) - want).max() < 2e-2
    assert (
        np.corrcoef(got[1:].ravel(), enc.encode(films[1:]).ravel())[0, 1] > 0.9
    )  # and nearly those of the frames before compression


@video
def test_a_folder_of_other_features_is_refused(tmp_path):
    write_mp4(tmp_path / "v/a.mp4", World(6).frames([0])[0], 1)
    extract_videos(tmp_path / "v", tmp_path / "out", "tabletop-2d", "tabletop-3d", workers=1)
    with pytest.raises(ValueError, match=r"other features .encoder"):
        extract_videos(tmp_path / "v", tmp_path / "out", None, "tabletop-3d", workers=1)
    with pytest.raises(ValueError, match="fps 2 should divide the 1 frames a second of tabletop-3000-0-3d"):
        extract_videos(tmp_path / "v", tmp_path / "x", None, "tabletop-3d", fps=2, workers=1)
