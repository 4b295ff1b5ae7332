"""The fields of the page as flags of sample.py, and back from a drawn picture."""

from pathlib import Path

import pytest
from PIL import Image

import sample
from data.drawn import recorded
from web.form import Form, command, kept, parsed, parts

EMPTY = Form._make([""] * len(Form._fields))._replace(
    model="assets/digits/model", prompt="a seven", seed="0", images=1, painted=None, hint=None
)


def test_empty_fields_are_no_flags(tmp_path: Path) -> None:
    argv = EMPTY.argv(tmp_path)
    assert argv == ["--model", EMPTY.model, "--prompt", "a seven", "--num-images", "1", "--seed", "0"]
    assert vars(parsed(argv, None)) == vars(sample.parser().parse_args(argv))
    assert not list(tmp_path.iterdir())


def test_every_field_is_its_flag(tmp_path: Path) -> None:
    form = EMPTY._replace(
        negative="-blue", steps=7, guidance=2.5, seed=" 12 ", images=3, sampler="ddim:eta=1", spacing="trailing",
        shift="1.5", guide_to="0.8", guider="apg:eta=0.5", rescale="0.3", height="16", width="24",
        lora="style.safetensors", lora_strength="0.7", strength="0.4",
    )  # fmt: skip
    args = parsed(form.argv(tmp_path), "cpu")
    found = {name: getattr(args, name) for name in ("negative", "steps", "guidance", "seed", "num_images", "sampler")}
    assert found == {
        "negative": "-blue", "steps": 7, "guidance": 2.5, "seed": 12, "num_images": 3, "sampler": "ddim:eta=1"
    }  # fmt: skip
    assert (args.spacing, args.shift, args.interval, args.rescale) == ("trailing", 1.5, [0.0, 0.8], 0.3)
    assert (args.height, args.width, args.lora, args.device) == (16, 24, ["style.safetensors:0.7"], "cpu")
    assert (args.strength, args.guider) == (0.4, "apg:eta=0.5")


def test_pictures_are_kept_by_their_content(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 6), (10, 20, 30, 255))
    layer = Image.new("RGBA", (8, 6))
    painted = {"background": image, "layers": [layer], "composite": image}
    args = parsed(EMPTY._replace(painted=painted, strength="0.4").argv(tmp_path), None)
    assert (args.mask, args.strength) == (None, 0.4)  # nothing was painted
    layer.paste((255, 255, 255, 255), (2, 0, 5, 6))
    form = EMPTY._replace(painted=painted, control="canny", hint=image, control_scale="0.5")
    args = parsed(form.argv(tmp_path), None)
    with Image.open(args.image) as kept, Image.open(args.mask) as mask:
        assert kept.getpixel((0, 0)) == (10, 20, 30)
        assert [mask.getpixel((x, 3)) for x in range(8)] == [0, 0, 255, 255, 255, 0, 0, 0]
    (control,) = args.control
    model, file, scale = control.split(":")
    assert (model, Path(file), scale) == ("canny", args.image, "0.5")  # the same picture is the same file
    assert form.argv(tmp_path) == form.argv(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_pictures_of_other_shapes_are_other_files(tmp_path: Path) -> None:
    files = [kept(Image.new(mode, size), tmp_path) for mode, size in (("L", (4, 6)), ("L", (6, 4)), ("RGB", (4, 2)))]
    assert len(set(files)) == 3


def test_an_empty_editor_is_no_picture() -> None:
    clear = Image.new("RGBA", (4, 4))
    assert parts(None) == (None, None)
    assert parts({"background": None, "layers": []}) == (None, None)
    assert parts({"background": clear, "layers": []}) == (None, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "x" * 2001}, "2,001 characters: take at most 2,000"),
        ({"negative": "x" * 3000}, "3,000 characters"),
        ({"prompt": "\ud800"}, "no text in UTF-8"),
        ({"control": "canny"}, "its picture is missing"),
        ({"hint": Image.new("RGB", (4, 4))}, "the folder is missing"),
        ({"seed": "1.5"}, "--seed: invalid natural value: '1.5'"),
        ({"steps": 0}, "--steps: must be at least 1"),
        ({"guide_from": "x"}, "the times of the guidance are numbers from 0 to 1, got 'x'"),
        ({"guide_to": "-inf"}, "from 0 to 1, got '-inf'"),
        ({"lora_strength": "0.5"}, "the strength of a LoRA needs a LoRA"),
        ({"control_scale": "0.5"}, "a ControlNet needs a folder and a picture"),
    ],
)
def test_what_is_no_flag_is_said_in_one_line(tmp_path: Path, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as refusal:
        parsed(EMPTY._replace(**fields).argv(tmp_path), None)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_form_of_a_drawn_picture_draws_it_again(tmp_path: Path) -> None:
    form = EMPTY._replace(steps=3, guidance=2.0, guide_from="0.2", guide_to="0.9", seed="5", negative="a two",
                          guider="apg:eta=0.5")  # fmt: skip
    sample.main([*form.argv(tmp_path), "--out", str(tmp_path / "first")])
    file = tmp_path / "first/a-seven_5.png"
    again = Form.recorded(recorded(file))
    assert (again.steps, again.guidance, again.guide_from, again.negative) == (3.0, 2.0, "0.2", "a two")
    assert again.guider == "apg:eta=0.5"
    sample.main([*again.argv(tmp_path), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again/a-seven_5.png").read_bytes() == file.read_bytes()


def test_a_recorded_lora_keeps_its_strength() -> None:
    flags = {"model": "m", "prompt": "p", "seed": "1", "lora": ["a/style.safetensors:0.7"]}
    assert Form.recorded(flags)[-5:-3] == ("a/style.safetensors", "0.7")
    assert Form.recorded(flags | {"lora": ["style"]})[-5:-3] == ("style", "")


def test_the_command_is_quoted_for_a_shell() -> None:
    assert command(["--prompt", "it's $HOME"]) == "python sample.py --prompt 'it'\"'\"'s $HOME'"
