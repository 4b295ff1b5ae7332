"""sample.py as a user calls it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
from pipeline import Pipeline


def refused(capsys: pytest.CaptureFixture, *argv: str | Path) -> str:
    """The one line with which a call ends; it must end with status 2."""
    with pytest.raises(SystemExit) as end:
        sample.main([str(arg) for arg in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_writes_pictures_named_by_prompt_and_seed(pipe: Pipeline, model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the digit 3\n\nthe digit 4\n")
    argv = ["--model", str(model), "--prompt", "A seven!", "--prompts", str(prompts), "--num-images", "2"]
    sample.main([*argv, "--seed", "7", "--steps", "3", "--batch-size", "4", "--out", str(tmp_path / "out")])
    entries = json.loads((tmp_path / "out/samples.json").read_text())
    assert [entry["file"] for entry in entries] == [
        "a-seven_7.png", "a-seven_8.png", "the-digit-3_9.png", "the-digit-3_10.png", "the-digit-4_11.png",
        "the-digit-4_12.png",
    ]  # fmt: skip
    for entry in entries:
        picture = pipe([entry["prompt"]], [entry["seed"]], sampling=replace(pipe.sampling, steps=3))[0, 0]
        image = Image.open(tmp_path / "out" / entry["file"])
        assert (image.mode, image.size) == ("L", (8, 8))
        shown = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(8, 8) / 255
        torch.testing.assert_close(shown, picture, atol=0.51 / 255, rtol=0)
    told = {"negative": "", "steps": 3, "guidance": 2.0, "sampler": "euler", "shift": 1.5, "height": 8, "width": 8}
    assert entries[0].items() >= (told | {"prompt": "A seven!", "seed": 7, "model": str(model)}).items()
    assert Image.open(tmp_path / "out/sheet.png").size == (2 * 68 + 4, 3 * 68 + 4)


def test_a_run_folder_serves_as_its_model_and_an_empty_prompt_is_allowed(model: Path, tmp_path: Path) -> None:
    sample.main(["--model", str(model.parent), "--prompt", "", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/unconditional_0.png").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nowhere", "--prompt", "7"], "nowhere is no model folder"),
        (["--prompt", "7"], "required: --model"),
        (["--model", "MODEL"], "give --prompt TEXT or --prompts FILE"),
        (["--model", "MODEL", "--prompts", "nowhere.txt"], "no prompt file nowhere.txt"),
        (["--model", "MODEL", "--prompts", "EMPTY"], "at least one line"),
        (["--model", "MODEL", "--prompt", "7", "--steps", "0"], "must be at least 1"),
        (["--model", "MODEL", "--prompt", "7", "--steps", "many"], "invalid"),
        (["--model", "MODEL", "--prompt", "7", "--height", "9"], "height must be a multiple of 2"),
        (["--model", "MODEL", "--prompt", "7", "--width", "4000"], "width must be at most 16"),
        (["--model", "MODEL", "--prompt", "7", "--guidence", "2"], "unrecognized arguments: --guidence"),
        (["--model", "MODEL", "--prompt", "7", "--shift", "0"], "shift must be > 0"),
        (["--model", "MODEL", "--prompt", "7", "--device", "abacus"], "no device abacus"),
        (["--model", "MODEL", "--prompt", "7", "--device", "cuda:99"], "no device cuda:99"),
        (["--model", "MODEL", "--prompt", "7", "--seed", "-1"], "seed"),
        (["--model", "MODEL", "--prompt", "7", "--seed", "9" * 25], "seed"),
        (["--model", "MODEL", "--prompt", "7", "--guidance", "nan"], "finite"),
        (["--model", "MODEL", "--prompt", "7", "--sampler", "ddpm"], "RectifiedFlow is continuous"),
        (["--model", "MODEL", "--prompt", "7", "--sampler", "rk45"], "there is no sampler 'rk45'"),
        (["--model", "MODEL", "--prompt", "7", "--sampler", "ddim:eta=2"], "0 <= eta <= 1"),
        (["--model", "MODEL", "--prompt", "7", "--spacing", "leading"], "needs a discrete path"),
        (["--model", "MODEL", "--prompt", "7", "--interval", "0.9", "0.1"], "from <= to"),
        (["--model", "MODEL", "--prompt", "7", "--rescale", "2"], "between 0 and 1"),
        (["--model", "MODEL", "--prompt", "7", "--shift", "inf"], "finite"),
        (["--model", "MODEL", "--prompts", "BINARY"], "no text in UTF-8"),
    ],
)
def test_bad_input_ends_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, argv: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe7")
    places = {"MODEL": str(model)} | {name: str(tmp_path / f"{name.lower()}.txt") for name in ("EMPTY", "BINARY")}
    out = ["--out", str(tmp_path / "out")]
    assert message in refused(capsys, *(places.get(arg, arg) for arg in argv), *out)
    assert not (tmp_path / "out").exists()


def test_a_truncated_model_ends_in_one_line(model: Path, capsys: pytest.CaptureFixture) -> None:
    file = model / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "truncated" in refused(capsys, "--model", model, "--prompt", "7")


def test_a_pickle_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    assert "is a pickle" in refused(capsys, "--model", tmp_path / "model.ckpt", "--prompt", "7")
