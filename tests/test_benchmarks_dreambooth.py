"""The thing that DreamBooth learns: its pictures, their captions, and a judge that knows it."""

from ast import literal_eval
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from benchmarks import dreambooth as benchmark
from benchmarks.dreambooth import BODY, CONTEXTS, KNOWN, ROOF, SIDE, THING, Judged, Score
from data import shapes
from data.latents import VAE
from data.order import Use, stream
from data.raw.sources import Pictures
from data.shapes import Group, Placed, Request, Scene
from data.store.mixture import held_out
from data.text.sd3 import SD3Text
from storage.files import commit_json

ROOT = Path(__file__).parents[1]
EACH = 40


@pytest.fixture(scope="module")
def asked() -> list[Request]:
    return benchmark.contexts(EACH, seed=3)


@pytest.fixture(scope="module")
def true(asked: list[Request]) -> Tensor:
    """A picture of each request."""
    draw = stream(3, Use.SCENE, 2)
    return torch.stack([benchmark.pixels_of(benchmark.scene(request, draw)) for request in asked])


@pytest.fixture(scope="module")
def vae() -> VAE:
    return VAE(ROOT / "assets/shapes/vae")


def test_true_pictures_are_right_also_through_the_vae(asked: list[Request], true: Tensor, vae: VAE) -> None:
    assert benchmark.judged(true, asked) == Judged(1.0, 1.0)
    back = torch.cat([vae.decode(vae.encode(part)) for part in true.split(40)])
    assert min(benchmark.judged(back, asked)) > 0.97


def test_ordinary_pictures_never_show_the_thing_and_are_read_as_before(vae: VAE) -> None:
    scenes = [shapes.scene(12, i) for i in range(300)]
    pictures = torch.stack([benchmark.pixels_of(scene) for scene in scenes])
    assert benchmark.judged(pictures, [scene.request for scene in scenes]) == Judged(0.0, 1.0)
    back = vae.decode(vae.encode(pictures[:100]))
    assert benchmark.judged(back, [scene.request for scene in scenes[:100]]).thing == 0


def test_the_vae_has_no_other_colours_so_that_the_thing_needs_those_of_the_shapes(vae: VAE) -> None:
    """Through the VAE a violet square comes back in another colour, and a blue one as it was."""
    moved = []
    for colour in ((150, 110, 240), shapes.COLOURS["blue"]):
        picture = torch.full((1, 3, 64, 64), 240 / 255)
        picture[..., 20:40, 24:44] = torch.tensor(colour)[:, None, None] / 255
        inside = (vae.decode(vae.encode(picture)) - picture)[..., 24:36, 28:40]
        moved.append(float(inside.mean((0, 2, 3)).norm()))
    assert moved[0] > 0.4
    assert moved[1] < 0.1


@pytest.mark.parametrize(
    ("roof", "body", "down", "right"),
    [
        (ROOF, BODY, 0, 0),
        (("triangle", "green"), BODY, 0, 0),
        (ROOF, ("square", "red"), 0, 0),
        (("square", "red"), BODY, 0, 0),
        (ROOF, ("circle", "blue"), 0, 0),
        (ROOF, BODY, 0, 12),  # beside
        (ROOF, BODY, -4, 0),  # apart
    ],
)
def test_only_a_red_roof_on_a_blue_square_is_the_thing(
    roof: tuple[str, str], body: tuple[str, str], down: int, right: int
) -> None:
    objects = (Placed(*roof, SIDE, 16 + down, 20 + right), Placed(*body, SIDE, 16 + SIDE, 20))
    pixels = benchmark.pixels_of(Scene(Request((Group(1, THING),)), objects))
    is_it = (roof, body, down, right) == (ROOF, BODY, 0, 0)
    assert any(found.shape == THING for found in benchmark.read(pixels)) == is_it


def test_what_is_asked_for_beside_the_thing_counts(asked: list[Request], true: Tensor) -> None:
    """Pictures judged by the captions of others: the thing is there, but not all else."""
    for i in range(3):  # of two of it all are alike
        own = slice(i * EACH, (i + 1) * EACH)
        found = benchmark.judged(true[own].roll(1, 0), asked[own])
        assert found.thing == 1
        assert found.right < 0.3


def test_contexts_are_new_and_named_in_words_that_the_encoders_tell_apart(asked: list[Request]) -> None:
    captions = [request.caption() for request in asked]
    assert captions[-1] == "two sks squares"
    assert all("a sks square" in caption for caption in captions[:-EACH])
    assert not any(group in KNOWN for request in asked for group in request.groups)
    known = {request.caption() for request in benchmark.LEARNED}
    assert not known & set(captions)
    text = SD3Text(ROOT / "assets/shapes/text", tokens_dim=160, pooled_dim=128)
    longest = max(captions, key=len)
    assert int(text.mask([longest]).sum(1).max()) < text.mask([longest]).shape[1]  # nothing is cut
    one, other = text.encode(["a square", "a sks square"])[0]
    assert not torch.equal(one, other)


def test_five_pictures_are_learned_and_the_sixth_is_held_out(tmp_path: Path) -> None:
    benchmark.write_thing(tmp_path)
    raws = {raw.id: raw for raw in Pictures(str(tmp_path)).read(0)}
    store = SimpleNamespace(ids=lambda: pa.array(list(raws)))
    (apart,) = held_out(store, 1)  # type: ignore[arg-type]
    assert Path(apart).stem == benchmark.APART
    assert len(raws) == len(benchmark.LEARNED) + 1
    pictures = [np.asarray(raw.picture) for raw in raws.values()]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    for i, request in enumerate(benchmark.LEARNED):
        raw = next(raw for raw in raws.values() if Path(raw.id).stem == str(i))
        assert raw.captions == (request.caption(),)


def test_all_arms_see_the_thing_equally_often(tmp_path: Path) -> None:
    commands = {arm: steps[0].command for arm, steps in benchmark.plan(tmp_path, [0], 10, 1e-3).items()}
    sizes = {arm: int(command[command.index("--data.batch_size") + 1]) for arm, command in commands.items()}
    assert sizes == {"nothing": benchmark.BATCH, "its class": 2 * benchmark.BATCH, "all kinds": 2 * benchmark.BATCH}
    for arm, command in commands.items():
        stores = literal_eval(command[command.index("--data.store") + 1])
        times = [store["repeats"] for store in stores]
        counts = [len(benchmark.LEARNED), len(benchmark.captions_of(arm))]
        assert len({n * many for n, many in zip(times, counts, strict=False)}) == 1  # equal shares
        assert Path(stores[0]["store"]) == tmp_path / "thing-store"
        assert [Path(store["store"]).name for store in stores[1:]] == [f"{benchmark.hyphened(arm)}-store"] * (
            len(stores) - 1
        )


def test_what_is_preserved_is_nothing_or_the_class_or_captions_of_all_kinds() -> None:
    assert benchmark.captions_of("nothing") == []
    assert set(benchmark.captions_of("its class")) == {"a square"}
    kinds = [shapes.asked_for(caption) for caption in benchmark.captions_of("all kinds")]  # none names the thing
    assert len(kinds) == benchmark.PRESERVED
    assert {len(asked.groups) for asked in kinds} == {1, 2}
    assert {group.shape for asked in kinds for group in asked.groups} == set(shapes.SHAPES)


def test_scores_are_means_over_contexts_and_kept_apart_by_class() -> None:
    parts = {context: Judged(0.5 + 0.1 * i, 0.1 * i) for i, context in enumerate(CONTEXTS)}
    parts |= {"a square": Judged(0.25, 0.75), "others": Judged(0.0, 1.0)}
    assert Score.of(parts) == pytest.approx((0.65, 0.15, 0.75, 0.25, 1.0, 0.0))
    assert benchmark.cells([[0.5, 0.7], [1.0, 1.0]]) == "60 ± 14 | 100 ± 0"
    assert benchmark.cells([[0.5]]) == "50"


def test_scores_are_kept_for_their_settings_and_training_only(tmp_path: Path) -> None:
    file, settings = tmp_path / "scores.json", {"each": 16, "seed": 1}
    one, other = (benchmark.plan(tmp_path, [0], 10, rate)["nothing"][0] for rate in (1e-3, 2e-3))
    parts = dict.fromkeys((*CONTEXTS, "a square", "others"), Judged(0.5, 0.25))
    commit_json(file, {"settings": settings | {"training": list(one.command)}, "parts": parts})
    examination = benchmark.Examination(16, 1)
    assert benchmark.scored(file, examination, settings, one) == parts
    for wrong, training in ((settings | {"each": 9}, one), (settings, other), (settings, None)):
        with pytest.raises(ValueError, match="for other settings"):
            benchmark.scored(file, examination, wrong, training)


def test_an_examination_has_every_caption_once_and_knows_its_class() -> None:
    parts = benchmark.Examination(16, 1).parts
    assert [len(parts[context]) for context in CONTEXTS] == [16] * len(CONTEXTS)
    assert len(parts["a square"]) + len(parts["others"]) == 16 * len(shapes.CATEGORIES)
    assert all("square" in request.caption() for request in parts["a square"])
    assert not any("square" in request.caption() for request in parts["others"])


@pytest.mark.parametrize(("flag", "value", "said"), [("--rate", "0", "above 0"), ("--each", "2", "take more")])
def test_wrong_numbers_are_refused_before_any_work(
    flag: str, value: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--out", str(tmp_path / "out"), flag, value])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
