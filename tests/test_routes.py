"The examples of CONTRIBUTING.md run as they are printed."

import re
from pathlib import Path

import numpy as np
import pytest

from vlkd.core.files import rng
from vlkd.core.settings import scale
from vlkd.data.tasks import Task
from vlkd.data.video import Features, write_mp4
from vlkd.models.bert import language_model, save_model
from vlkd.train.finetune import finetune_all
from vlkd.train.sources import load_data

PAGE = Path(__file__).resolve().parent.parent / "CONTRIBUTING.md"


def examples():
    "Python blocks of each route, in the order of the page."
    routes = PAGE.read_text(encoding="utf-8").split("## Four routes")[1].split("\n## ")[0]
    for section in routes.split("\n### ")[1:]:
        title = section.split("\n")[0]
        blocks = re.findall(r"^```python\n(.*?)^```", section, re.S | re.M)
        if blocks:
            yield pytest.param("\n".join(blocks), id=title)


def write_own_files(folder):
    "What the route of own videos reads: clips.csv and its videos, text.txt, and a task in moves/."
    rows = ["path,caption"]
    for i in range(20):
        frames = rng("clip", i).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
        write_mp4(folder / f"clip{i}.mp4", frames, fps=8)
        rows.append(f"clip{i}.mp4,look the thing {('rises', 'falls')[i % 2]} now")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    (folder / "text.txt").write_text("the old thing is in the garden\nthe small thing is here\n" * 40)
    (folder / "moves").mkdir()
    examples = "sentence\tlabel\n" + "the old thing\trises\nthe small thing\tfalls\n" * 20
    for split in ("train", "dev"):
        (folder / "moves" / f"{split}.tsv").write_text(examples)


@pytest.mark.parametrize("code", list(examples()))
def test_route(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_own_files(tmp_path)
    monkeypatch.setenv("VLKD_RUNS", str(tmp_path / "runs"))
    exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})


OWN_TERMS = """
from vlkd.train.terms import Term, register_term


@register_term
class Distance(Term):
    name = "distance"

    def forward(self, student, teacher, batch):
        mask = batch["mask"]
        return (self.head(student.states[mask]) - teacher.states[mask]).abs().mean()
"""


def test_own_objective(tmp_path, monkeypatch):
    "A class in a module of its own, named in a plan's `kd`, is trained, saved, loaded and counted."
    from vlkd.core.settings import scale
    from vlkd.models.bert import save_model
    from vlkd.models.video_text import Teacher
    from vlkd.tools.cost import distillation_parameters, student_flops
    from vlkd.train import terms
    from vlkd.train.sources import load_data
    from vlkd.train.text_student import load_distillation, save_distillation, train_student

    monkeypatch.setattr(terms, "TERMS", dict(terms.TERMS))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_terms.py").write_text(OWN_TERMS)
    s = scale("smoke")
    with pytest.raises(ValueError, match="unknown objective 'distance'; it should be one of soft_label"):
        student_flops(s, "nst+distance")
    kd = "nst+own_terms:distance"
    data = load_data(s, 101)
    teacher = Teacher(s, data.tokenizer, s.feature_dim, 0)
    student, history = train_student(
        data,
        tmp_path / "run",
        teacher=teacher,
        kd=kd,
        preset="tuned",
        weights=dict(distance=0.5),
        steps=4,
    )
    last = history[-1]
    assert student.kd == ("nst", "distance") and last["distance"] > 0
    assert last["loss"] == pytest.approx(last["mlm"] + last["nst"] + 0.5 * last["distance"], rel=1e-5)
    folder = save_model(tmp_path / "student", student.lm, data.tokenizer)
    save_distillation(student, folder)
    loaded, _ = load_distillation(folder, teacher.lm, s)
    assert loaded.retrieval_term() is loaded.terms["nst"]
    trained, restored = (model.terms["distance"].head[0].weight.cpu() for model in (student, loaded))
    assert trained.equal(restored)
    cost, known = student_flops(s, kd), student_flops(s, "nst+regression")
    assert cost["distance"] == known["regression"] > 0
    added = sum(p.numel() for p in student.terms.parameters())
    assert sum(distillation_parameters(s, kd).values()) == added


def test_own_task(tmp_path):
    "A task with files of its own is fine-tuned, scored and recorded under its name, at every source."
    folder = tmp_path / "mood"
    folder.mkdir()
    rows = ["the man is lovely\tcalm", "the man is awful\tangry"]
    for split, n in (("train", 100), ("dev", 5)):
        (folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows * n]) + "\n")
    mood = Task("mood", "single", ("calm", "angry"), ("sentence",), folder=str(folder))
    data = load_data(scale("smoke", ft_steps=40), 101)
    model = save_model(tmp_path / "model", language_model(data.s, data.tokenizer, 0), data.tokenizer)
    records = finetune_all(model, data, tmp_path / "out", tasks=[mood], run="own")
    assert set(records.task) == {"mood"} and len(records) == 10 and records.right.mean() == 1
    (folder / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv"):
        finetune_all(model, data, tmp_path / "again", tasks=[mood])


def test_own_encoder(tmp_path, capsys):
    "An encoder in a file of its own is named on the command line; its features carry its name."
    from vlkd.tools.cli import main

    example = next(p.values[0] for p in examples() if p.id == "Your own frozen encoder")
    (tmp_path / "videos").mkdir()
    write_mp4(tmp_path / "videos/white.mp4", np.full((16, 32, 32, 3), 255, np.uint8), fps=8)
    own = tmp_path / "brightness.py"
    own.write_text(example.split('"""')[1])
    arguments = ["extract", tmp_path / "videos", "--out", tmp_path / "out", "--frames", f"{own}:Brightness"]
    with pytest.raises(SystemExit) as end:
        main([str(x) for x in arguments])
    assert not end.value.code
    features = Features(tmp_path / "out")
    assert features.manifest["encoder"] == "brightness"
    assert np.allclose(features["white"], 1, atol=0.02)


def test_claim(tmp_path):
    "The claim that is printed is one that can be read, of the kind that is explained."
    from vlkd.eval.claims import read_claims

    recipe = PAGE.read_text(encoding="utf-8").split("## Recipe: a claim")[1]
    printed = re.search(r"^```toml\n(.*?)^```", recipe, re.S | re.M)[1]
    file = tmp_path / "claims.toml"
    file.write_text('[defaults]\npaper = "a paper"\nwhere = "Table 5"\n\n' + printed)
    (claim,) = read_claims(file)
    assert (claim["id"], claim["kind"], claim["bound"]) == ("m5.stated", "not_worse", 5.0)
    assert read_claims(table="m5"), "no claim of table m5: print another example"
