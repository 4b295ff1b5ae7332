"""Choices between two pictures: judged, encoded, learned; resume, ranks, bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from trials import ROOT, assert_goes_on_to_the_bit, assert_two_learn_as_one, fit, lines, logged, refused, small, state

import encode
import sample
from data import digits
from data.batch import Batch
from data.latents import Pixels
from data.module import Stored
from data.raw.base import Fault, Raw
from data.raw.choices import Choices
from data.raw.pictures import save_png, to_image
from data.store.encoding import Encoding, StoreEncoder
from data.store.reader import Store
from data.text.clip import CLIPText
from engine.flops import forward_flops, training_flops
from flow.objective import Objective
from flow.preference import DPO
from mmdit.model import MMDiT
from mmdit.network import Condition
from pipeline import Pipeline
from storage.models import find_model
from training.chosen import ChoiceModel
from training.cost import StepCost
from training.teacher import Teacher, TeacherModel

TEXT = ROOT / "assets/digits/text"
CODEC = Pixels(1, 0.3, 2.66)
COUNT = 48


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of choices: real digits, of which the one with more ink is preferred."""
    folder = tmp_path_factory.mktemp("choices")
    pixels, labels = digits.load("train")
    rows = []
    for i in range(COUNT):
        pair = [2 * i, 2 * i + 1]
        for number in pair:
            save_png(to_image(pixels[number]), folder / f"{number}.png", {})
        worse, better = sorted(pair, key=lambda number: float(pixels[number].mean()))
        caption = f"a handwritten {('zero', 'one', 'two', 'three')[int(labels[better]) % 4]}"
        rows.append({"caption": caption, "better": f"{better}.png", "worse": f"{worse}.png", "by": "hand"})
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def store(given: Path) -> Path:
    settings = Encoding(Choices(given / "choices.jsonl"), given / "store", 8, 8, device="cpu")
    StoreEncoder(settings, CODEC, CLIPText(TEXT)).run()
    return given / "store"


@pytest.fixture
def flags(trained: Path, store: Path, tmp_path: Path) -> list[str]:
    small(tmp_path)
    overlay = str(ROOT / "configs/preference/choices.yaml")
    data = ["--data.store", str(store), "--data.batch_size", "8", "--data.held_out", "8"]
    model = ["--network.path", str(trained), "--judgement.reference", str(trained)]
    steps = ["--run.steps", "6", "--run.validate_every", "3", "--optimization.warmup", "2"]
    return ["--config", overlay, *data, *model, *steps]


def test_a_store_holds_both_pictures_the_preferred_one_first(given: Path, store: Path) -> None:
    opened = Store(store)
    rows = [json.loads(line) for line in (given / "choices.jsonl").read_text().splitlines()]
    assert (len(opened), opened.plan["latents"], opened.plan["channels"]) == (COUNT, "choice", 2)
    latents = opened.latents(np.arange(COUNT)).float()
    for i, name in enumerate(opened.ids().to_pylist()):
        row = rows[int(name.removeprefix("choices.jsonl:")) - 1]
        assert opened.captions(i) == [row["caption"]]
        for latent, key in zip(latents[i], ("better", "worse"), strict=True):
            pixels = torch.from_numpy(np.array(Image.open(given / row[key]))).float() / 255
            assert torch.equal(latent, CODEC.encode(pixels[None, None])[0, 0].bfloat16().float())


def test_batches_hold_the_preferred_pictures_as_those_to_learn(store: Path, text: CLIPText) -> None:
    for batch in Stored(text, CODEC, 0, str(store), 8, held_out=8, caption_dropout=0.0).val_dataloader():
        assert batch.worse is not None
        better, worse = (CODEC.decode(latents).mean((1, 2, 3)) for latents in (batch.x0, batch.worse))
        assert (better > worse).all()


def test_what_is_no_choice_is_left_out_and_named(given: Path, tmp_path: Path) -> None:
    picture = str(given / "0.png")
    good = {"caption": " a zero ", "better": picture, "worse": picture}
    broken = [good | {"caption": ""}, good | {"worse": "none.png"}, good | {"better": None}]
    text = [json.dumps(row) for row in (good, *broken)] + ["", "[]", "{"]
    (tmp_path / "all.jsonl").write_text("\n".join(text))
    source = Choices(tmp_path / "all.jsonl")
    first, *faults = source.read(0)
    assert first == Raw("all.jsonl:1", Path(picture), ("a zero",), (1.0,), worse=Path(picture))
    assert all(isinstance(fault, Fault) for fault in faults)
    assert [(fault.id.split(":")[1], fault.reason) for fault in faults] == [
        ("2", "no caption"), ("3", "no picture"), ("4", "no picture"), ("6", "unreadable row"), ("7", "unreadable row"),
    ]  # fmt: skip
    assert list(source.read(0, 4)) == faults[3:]
    before = source.describe()
    (tmp_path / "all.jsonl").write_text("\n".join(text).replace("a zero", "a nine"))
    assert Choices(tmp_path / "all.jsonl").describe() != before
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"none.jsonl is empty: it needs a choice a line"):
        Choices(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Choices(tmp_path / "nowhere.jsonl")


def test_the_posterior_of_choices_is_refused(given: Path, tmp_path: Path) -> None:
    settings = Encoding(Choices(given / "choices.jsonl"), tmp_path / "store", 8, 8, latents="posterior")
    with pytest.raises(ValueError, match="latents must be mean for two pictures each, got posterior"):
        StoreEncoder(settings, CODEC, CLIPText(TEXT))


def pipe_of(text: CLIPText, seed: int) -> Pipeline:
    torch.manual_seed(seed)
    network = MMDiT(1, depth=1, width=32, heads=1, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Pipeline(network, Objective(), CODEC, text)


def batch_of(pipe: Pipeline) -> Batch:
    draw = torch.Generator().manual_seed(7)
    x0, worse, noise = torch.randn(3, 4, 1, 8, 8, generator=draw)
    condition = pipe.condition(["zero", "one", "two", "three"])
    return Batch(0, np.arange(4), x0, noise, condition.text, condition.pooled, worse=worse)


def test_the_loss_is_dpo_of_both_pictures_with_one_noise_and_one_time(text: CLIPText) -> None:
    """The formula of Wallace et al. 2023, from the four errors."""
    pipe, reference = pipe_of(text, 0), pipe_of(text, 1)
    model = ChoiceModel(DPO(20.0), TeacherModel(Teacher(), reference))
    batch, t = batch_of(pipe), torch.tensor([0.2, 0.4, 0.6, 0.9])
    lesson = model.lesson(batch, torch.zeros_like(batch.noise))
    loss = lesson.loss(pipe.objective, pipe.network, t)
    condition = pipe.condition(["zero", "one", "two", "three"])

    def error(network: torch.nn.Module, picture: Tensor) -> Tensor:
        times = t[:, None, None, None]
        z = (1 - times) * picture + times * batch.noise
        return (network(z, t, condition) - (batch.noise - picture)).square().mean((1, 2, 3))

    assert batch.worse is not None
    gained = [error(pipe.network, x) - error(reference.network, x) for x in (batch.x0, batch.worse)]
    wanted = -torch.nn.functional.logsigmoid(-20 / 2 * (gained[0] - gained[1]))
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    assert loss.shape == (4,)
    told = model.means(lambda sums: sums)
    assert told["accuracy"] == pytest.approx(float((gained[0] < gained[1]).double().mean()))
    assert told["winner_margin"] == pytest.approx(float(gained[0].detach().mean()), rel=1e-3)
    assert told["loser_margin"] == pytest.approx(float(gained[1].detach().mean()), rel=1e-3)


def test_at_the_reference_the_loss_is_ln_2_and_pulls_to_the_preferred_picture(text: CLIPText) -> None:
    """The gradient there is β/4 times that of m_w − m_l."""
    pipe = pipe_of(text, 0)
    model = ChoiceModel(DPO(20.0), TeacherModel(Teacher(), pipe_of(text, 0)))
    batch, t = batch_of(pipe), torch.full((4,), 0.5)
    loss = model.lesson(batch, batch.noise).loss(pipe.objective, pipe.network, t)
    torch.testing.assert_close(loss, torch.full((4,), 2.0).log(), rtol=1e-5, atol=1e-5)
    weights = [parameter for parameter in pipe.network.parameters() if parameter.requires_grad]
    own = torch.autograd.grad(loss.mean(), weights, allow_unused=True)
    condition = pipe.condition(["zero", "one", "two", "three"])
    assert batch.worse is not None
    errors = [pipe.objective.loss(pipe.network, x, batch.noise, t, condition) for x in (batch.x0, batch.worse)]
    wanted = torch.autograd.grad(20 / 4 * (errors[0] - errors[1]).mean(), weights, allow_unused=True)
    assert sum(theirs is not None for theirs in wanted) > 20
    for ours, theirs in zip(own, wanted, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_cost_counts_both_pictures_and_the_reference(text: CLIPText) -> None:
    pipe = pipe_of(text, 0)
    model, batch = ChoiceModel(DPO(), TeacherModel(Teacher(), pipe)), batch_of(pipe)
    given = batch.x0, torch.zeros(4), Condition(batch.text, batch.pooled)
    once, learned = (count(pipe.network, *given) for count in (forward_flops, training_flops))
    assert StepCost(pipe.network, Objective(), None, None, model)(batch).flops == 2 * learned + 2 * once


def test_it_stops_and_goes_on_to_the_bit_and_keeps_the_best_model(flags: list[str], tmp_path: Path) -> None:
    assert_goes_on_to_the_bit(tmp_path / "config.yaml", *flags, stopped=2)
    found = [entry for entry in logged(tmp_path / "run").values() if "val/preference" in entry]
    assert len(found) == 2
    assert all(0 <= entry["val/accuracy"] <= 1 and entry["val/drift"] > 0 for entry in found)
    best = min(entry["val/preference"] for entry in found)
    assert state(tmp_path / "run")["numbers"]["best"] == pytest.approx(best)
    assert Pipeline.load(find_model(tmp_path / "run"))(["zero"], [0]).isfinite().all()


def test_two_processes_learn_as_one(flags: list[str], tmp_path: Path) -> None:
    assert_two_learn_as_one(tmp_path / "config.yaml", *flags, kind="ddp", relative=5e-6)


def test_held_out_choices_are_made_as_the_others_are(flags: list[str], tmp_path: Path) -> None:
    """Forty steps on forty choices of more ink: held-out ones are made so more often than by chance."""
    fit(
        tmp_path / "config.yaml", *flags, "--run.steps", "40", "--run.validate_every", "40", "--optimization.lr", "1e-3"
    )
    told = [entry for entry in lines(tmp_path / "run") if "val/preference" in entry]
    assert told[-1]["val/preference"] < 0.6  # ln 2 = 0.69 at the start
    assert told[-1]["val/accuracy"] > 0.7


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--judgement.loss", "NFT"], "NFT learns from the model's own pictures and not from choices: set"),
        (["--judgement.rewards", '[{{"class_path": "Ink"}}]'], "the data are choices: leave the rewards out"),
        (
            ["--judgement.group", "4"],
            "judgement.group, guidance, pairs, features are for pictures that the model draws",
        ),
        (["--judgement.reference", "null"], "DPO compares with a model that does not learn: set"),
        (["--judgement", "null"], "the data are choices between two pictures: set judgement.loss DPO"),
        (
            ["--data.before", '[{{"store": "{pictures}", "steps": 2}}]'],
            "some of the stores hold choices or hints",
        ),
        (["--objective", "StepMap"], "StepMap learns no output at a point"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    flags: list[str], tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture, more: list[str], message: str
) -> None:
    given = [flag.format(pictures=pictures) for flag in more]
    assert message in refused(capsys, tmp_path / "config.yaml", *flags, *given)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def pictures(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of single pictures."""
    folder = tmp_path_factory.mktemp("single")
    flags = ["--encode.source", "Pictures", "--encode.source.path", str(folder / "pictures"), "--encode.side", "8"]
    (folder / "pictures").mkdir()
    for i in range(4):
        (folder / f"pictures/{i}.png").write_bytes((given / f"{i}.png").read_bytes())
        (folder / f"pictures/{i}.txt").write_text("a zero")
    encode.main(["--config", str(small(folder)), *flags, "--encode.step", "8", "--encode.store", str(folder / "store")])
    return folder / "store"


# sample.py prefer


def drawn(folder: Path, levels: dict[str, list[int]]) -> None:
    """A folder as sample.py leaves it, of grey pictures."""
    folder.mkdir()
    entries = []
    for caption, own in levels.items():
        for i, level in enumerate(own):
            name = f"{caption}_{i}.png"
            Image.new("L", (8, 8), level).save(folder / name)
            entries.append({"file": name, "prompt": caption, "seed": i})
    (folder / "samples.json").write_text(json.dumps(entries))


def prefer(*flags: object) -> None:
    sample.main(["prefer", *map(str, flags)])


INK = ["--rewards", '[{"class_path": "Ink"}]']


def test_the_best_picture_is_preferred_to_the_worst(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    drawn(tmp_path / "drawn", {"zero": [51, 204, 102, 153], "one": [51, 51], "two": [0, 255, 127], "three": [9]})
    prefer(tmp_path / "drawn", *INK)
    rows = [json.loads(line) for line in (tmp_path / "drawn/choices.jsonl").read_text().splitlines()]
    assert [(row["caption"], row["better"], row["worse"]) for row in rows] == [
        ("zero", "zero_1.png", "zero_0.png"), ("zero", "zero_3.png", "zero_2.png"), ("two", "two_1.png", "two_0.png"),
    ]  # fmt: skip
    assert rows[0]["rewards"] == pytest.approx([0.8, 0.2])
    assert "3 choices from 3 prompts" in capsys.readouterr().out
    assert len(list(Choices(tmp_path / "drawn/choices.jsonl").read(0))) == 3
    prefer(tmp_path / "drawn", "--rewards", '[{"class_path": "Ink", "init_args": {"weight": -2}}]', "--overwrite")
    first = json.loads((tmp_path / "drawn/choices.jsonl").read_text().splitlines()[0])
    assert (first["better"], first["rewards"]) == ("zero_0.png", pytest.approx([-0.4, -1.6]))


@pytest.mark.parametrize(
    ("make", "flags", "message"),
    [
        (lambda folder: None, INK, "has no samples.json: give a folder that sample.py drew into"),
        (lambda folder: drawn(folder, {"zero": [5]}), INK, "choices need two: draw with --num-images 4"),
        (lambda folder: drawn(folder, {"zero": [5, 5]}), INK, "equally good: draw more"),
        (lambda folder: drawn(folder, {"zero": [5, 6]}), [*INK, "--out", "elsewhere.jsonl"], "must lie in"),
        (lambda folder: drawn(folder, {"zero": [5, 6]}), ["--rewards", '[{"class_path": "Nothing"}]'], "Nothing"),
        (lambda folder: drawn(folder, {"zero": [5, 6]}), [], "required: rewards"),
        (lambda folder: drawn(folder, {"zero": [5, 6]}), ["--rewards", '[{"class_path": "RightShapes"}]'],
         "RightShapes: the caption 'zero' is none of the shapes'"),
        (lambda folder: (drawn(folder, {"zero": [5, 6]}), (folder / "zero_1.png").unlink()), INK, "zero_1.png"),
        (lambda folder: (drawn(folder, {"zero": [5, 6]}), (folder / "choices.jsonl").touch()), INK,
         "choices.jsonl exists: give --overwrite, or another --out"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, make: Callable[[Path], Any], flags: list[str], message: str
) -> None:
    make(tmp_path / "drawn")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit) as end:
        prefer(tmp_path / "drawn", *flags)
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert (end.value.code, len(told)) == (2, 1)
    assert message in told[0]
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
