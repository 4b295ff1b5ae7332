"""`python -m pipeline export`: what other tools then read, the card, and what is refused."""

import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from mmdit import checkpoint
from pipeline import LoadOptions, Pipeline
from pipeline.__main__ import main
from storage.weights import open_file

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(pipe: Pipeline, tmp_path: Path) -> Path:
    """A run's folder."""
    folder = tmp_path / "digits"
    pipe.save(folder / "model")
    config = yaml.safe_load((ROOT / "configs/digits.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    losses = [{"step": 10, "val/loss": 0.5}, {"step": 15, "train/loss": 0.4}, {"step": 20, "val/loss": 0.25}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))
    row = {"sampler": "euler", "steps": 8, "evaluations": 8.0, "accuracy": 0.981, "distance_ratio": 0.9512}
    (folder / "evaluation").mkdir()
    (folder / "evaluation/results.json").write_text(json.dumps({"rows": [row]}))
    return folder


def test_a_run_s_model_is_exported_with_a_card(run: Path, pipe: Pipeline, capsys: pytest.CaptureFixture) -> None:
    main(["export", str(run)])
    out = run / "export/diffusers"
    assert "SD3Transformer2DModel" in capsys.readouterr().out
    opened = SD3Transformer2DModel.from_pretrained(out, subfolder="transformer")
    wanted = checkpoint.export(pipe.network, "diffusers")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in opened.state_dict().items())
    assert torch.equal(Pipeline.load(out)(["the digit 3"], [0]), pipe(["the digit 3"], [0]))
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "text-to-image"
    for told in ("# digits\n", "MMDiT, 2 blocks of width 32", "8×8 pixels", "0.2500, at step 20",
                 "| euler | 8 | 8 | 0.981 | 0.9512 |", "lr: 0.002", "caption_dropout 0.1"):  # fmt: skip
        assert told in card, told


def test_a_single_file_of_a_run_holds_its_network(run: Path, pipe: Pipeline, capsys: pytest.CaptureFixture) -> None:
    main(["export", str(run), "--format", "single-file", "--dtype", "bfloat16"])
    assert capsys.readouterr().out.strip().endswith("holds the network")
    card = (run / "export/single-file/README.md").read_text()
    assert "--model digits/digits.safetensors --parts FOLDER" in card
    assert "from_pretrained" not in card
    file = run / "export/single-file/digits.safetensors"
    assert open_file(file).dtype == torch.bfloat16
    back = checkpoint.load(file, dtype="bfloat16").state_dict()
    assert all(torch.equal(back[name], tensor.bfloat16()) for name, tensor in pipe.network.state_dict().items())


def test_released_models_go_round_all_formats_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A half-precision folder → single file → folder → diffusers."""
    theirs = tiny.pipeline("sd35_medium", tmp_path / "a").to(torch.float16)
    theirs.save_pretrained(tmp_path / "a")
    main(["export", str(tmp_path / "a"), "--format", "single-file", "--out", str(tmp_path / "b")])
    assert "holds the network and the VAE and text encoders" in capsys.readouterr().out
    main(["export", str(tmp_path / "b/b.safetensors"), "--parts", str(tmp_path / "a"), "--out", str(tmp_path / "c")])
    assert "opens in diffusers' StableDiffusion3Pipeline" in capsys.readouterr().out
    back = StableDiffusion3Pipeline.from_pretrained(tmp_path / "c", torch_dtype=torch.float16)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        mine, wanted = getattr(back, name).state_dict(), getattr(theirs, name).state_dict()
        assert mine.keys() == wanted.keys()
        assert all(torch.equal(mine[key], wanted[key]) for key in wanted), name
    assert back.tokenizer_2("a seven").input_ids == theirs.tokenizer_2("a seven").input_ids
    assert "StableDiffusion3Pipeline.from_pretrained" in (tmp_path / "c/README.md").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["export", "nowhere"], "nowhere is no model folder"),
        (["export", "RUN", "--out", "RUN"], "is no export"),
        (["export", "MODEL"], "give --out"),
        (["export", "RUN", "--format", "onnx"], "invalid choice"),
        (["import", "RUN"], "invalid choice"),
        (["export", "RUN", "--parts", "RUN"], "--parts is for single files"),
        (["export", "RUN", "--lora", "nowhere"], "nowhere is not a LoRA"),
    ],
)
def test_bad_input_ends_in_one_line(run: Path, capsys: pytest.CaptureFixture, argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        main([{"RUN": str(run), "MODEL": str(run / "model")}.get(arg, arg) for arg in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (run / "export").exists()


def test_an_upload_that_fails_keeps_the_export(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Nothing is sent unless it is asked for; asked for without a way out, one line and status 1."""
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    for name, value in (("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")):
        with monkeypatch.context() as patch:
            patch.setattr(f"huggingface_hub.constants.{name}", value)
            with pytest.raises(SystemExit) as end:
                main(["export", str(run), "--push-to-hub", "someone/digits"])  # the second sends what the first left
        said = capsys.readouterr().err
        assert end.value.code == 1
        assert said.startswith("error: could not upload to someone/digits"), said
        assert len(said.strip().splitlines()) == 1
        assert (run / "export/diffusers/README.md").is_file()


@pytest.mark.parametrize("kind", ["sd3", "sd35_medium", "sd35_large"])
@pytest.mark.parametrize("layout", ["diffusers", "single-file"])
def test_every_export_opens_whole_in_diffusers(kind: str, layout: str, tmp_path: Path) -> None:
    """Every tensor of every part is there, on a device, and the same."""
    theirs = tiny.pipeline(kind, tmp_path / "a")
    main(["export", str(tmp_path / "a"), "--format", layout, "--out", str(tmp_path / "b")])
    if layout == "diffusers":
        back = StableDiffusion3Pipeline.from_pretrained(tmp_path / "b", local_files_only=True)
    else:
        file = tmp_path / "b/b.safetensors"
        back = StableDiffusion3Pipeline.from_single_file(file, config=str(tmp_path / "a"), local_files_only=True)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        mine, wanted = getattr(back, name).state_dict(), getattr(theirs, name).state_dict()
        assert mine.keys() == wanted.keys()
        assert all(not mine[key].is_meta and torch.equal(mine[key], wanted[key]) for key in wanted), name


def test_an_export_of_ours_can_be_replaced_and_read(run: Path) -> None:
    for _ in range(2):
        main(["export", str(run), "--out", str(run / "out"), "--overwrite"])
    Pipeline.load(run / "out")


def test_a_lora_s_folder_is_merged_into_what_it_belongs_to(tmp_path: Path) -> None:
    from mmdit import lora

    tiny.pipeline("sd3", tmp_path / "base")
    network = checkpoint.load(tmp_path / "base")
    lora.add(network, lora.LoRA(4))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lora.save(lora.export(network), tmp_path / "run/lora", str(tmp_path / "base"))
    main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "whole")])
    merged = Pipeline.load(tmp_path / "base", LoadOptions(lora=(str(tmp_path / "run"),)))
    whole = Pipeline.load(tmp_path / "whole")
    plain = Pipeline.load(tmp_path / "base")
    pictures = [p(["a seven"], [0], height=64, width=64) for p in (merged, whole, plain)]
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-2)
