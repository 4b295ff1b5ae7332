"""A picture as a workflow of ComfyUI: its nodes, the same picture, and in one line what cannot be said there."""

import json
from collections.abc import Callable
from pathlib import Path

import comfy_nodes
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sample
from data.drawn import OURS
from data.raw.pictures import save_png
from flow import grid
from flow.path import RectifiedFlow
from mmdit import checkpoint
from mmdit.model import MMDiT
from pipeline import Pipeline, comfy
from pipeline.__main__ import main
from pipeline.comfy import Model, decimal, escaped, scheduler, workflow
from pipeline.sampling import Sampling, random_normals
from storage.updates import Adapter
from storage.weights import METADATA

SHIFTS = [0.5, 1.0, 1.5, 3.0, 4.69, 10.0]


def drawn(model: Path, out: Path, *flags: object) -> Path:
    """A picture of `sample.py`."""
    sample.main(["--model", str(model), "--seed", "7", *map(str, flags), "--out", str(out)])
    return out / json.loads((out / "samples.json").read_text())[-1]["file"]


@pytest.fixture
def any_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of any shape pass, so that small ones draw."""

    def model_of(path: Path, loras: list[str], parts: Path) -> Model:
        return Model(path, [Adapter.parse(text) for text in loras], True)

    monkeypatch.setattr(comfy, "model_of", model_of)


def lora(folder: Path, network: MMDiT) -> Path:
    """A LoRA of diffusers' names on one layer."""
    name, width = "transformer.transformer_blocks.1.attn.to_q", network.width
    tensors = {f"{name}.lora_A.weight": torch.randn(4, width), f"{name}.lora_B.weight": torch.randn(width, 4)}
    save_file(tensors, folder / "style.safetensors", METADATA)
    return folder / "style.safetensors"


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ("--steps 6 --guidance 5 --negative eight --height 64 --width 96", {"BasicScheduler"}),
        ("--steps 5 --guidance 3 --spacing trailing --shift 2.5", {"BasicScheduler"}),
        ("--steps 3 --guidance 3 --spacing trailing --sampler heun", {"ManualSigmas"}),
        ("--steps 4 --guidance 1 --shift 2.345 --sampler ddim:eta=0.0", {"ManualSigmas"}),
        ("--steps 2 --guidance 2 --spacing given:times=1/0.4", {"ManualSigmas"}),
        ("--steps 6 --guidance 3 --skip-layers 0 1 --skip-scale 4 --skip-interval 0.2 0.6", {"SkipLayerGuidanceSD3"}),
        ("--steps 6 --guidance 3 --skip-layers 1 --skip-scale 4 --skip-interval 0 0.9", {"SkipLayerGuidanceSD3"}),
        ("--steps 4 --guidance 3 --image START --strength 0.5", {"LoadImage", "VAEEncode", "ManualSigmas"}),
        ("--steps 3 --guidance 3 --lora LORA:0.7 --lora LORA:-0.5", {"LoraLoaderModelOnly"}),
    ],
)
def test_the_picture_is_the_same_there(
    flags: str, kinds: set[str], released: tuple, any_model: None, tmp_path: Path
) -> None:
    """With the nodes' formulas and our network."""
    pipe = Pipeline.load(released[1])
    words = flags.split()
    if "START" in words:
        Image.effect_noise((96, 64), 80).convert("RGB").save(tmp_path / "start.png")
    if "--lora" in words:
        file = lora(tmp_path, pipe.network)
        words = [word.replace("LORA", str(file)) for word in words]
    words = [word.replace("START", str(tmp_path / "start.png")) for word in words]
    picture = drawn(released[1], tmp_path / "out", "--prompt", "seven (of nine)", *words)
    made = workflow(picture)
    comfy_nodes.check(made.nodes)
    assert kinds <= {node["class_type"] for node in made.nodes.values()}
    ours = np.asarray(Image.open(picture)).astype(float) / 255
    theirs = comfy_nodes.run(made.nodes, made.files, pipe)[0].permute(1, 2, 0).numpy()
    assert ours.std() > 0.02
    assert np.abs(ours - theirs).max() < 1 / 255


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 7, 20, 28, 40, 50, 999, 1000])
def test_schedulers_have_the_times_of_our_grids(shift: float, steps: int) -> None:
    """`normal` those of the released models, always; `simple` the trailing ones, where the steps divide 1,000."""
    for spacing in ("flow_match", "trailing"):
        ours = getattr(grid, spacing)(RectifiedFlow(), steps, shift).float()
        name = scheduler(Sampling(steps=steps, spacing=spacing), shift)
        if name:
            torch.testing.assert_close(comfy_nodes.schedule(name, shift, steps), ours, rtol=2e-6, atol=0)
        else:
            assert spacing == "trailing"
            assert not torch.allclose(comfy_nodes.schedule("simple", shift, steps), ours, rtol=2e-6, atol=0)
        if steps > 1:
            assert not torch.allclose(comfy_nodes.schedule("sgm_uniform", shift, steps), ours, rtol=2e-6, atol=0)
        assert torch.equal(comfy_nodes.manual(", ".join(map(decimal, ours))), ours)


def test_a_shift_of_many_digits_or_near_zero_is_written_as_times() -> None:
    for shift in (0.01, 2.345):
        assert scheduler(Sampling(spacing="flow_match"), shift) is None
    least = comfy_nodes.schedule("normal", 0.01, 4)
    assert not torch.allclose(least, grid.flow_match(RectifiedFlow(), 4, 0.01).float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("seed", [0, 7, 2**62 - 1])
def test_the_noise_of_one_picture_is_the_same_there(seed: int) -> None:
    """Of several, the first: ComfyUI draws a batch from one seed, and here each picture has its own."""
    ours = random_normals([seed, seed + 1], (16, 6, 10), torch.device("cpu"))()
    theirs = torch.randn((2, 16, 6, 10), generator=torch.manual_seed(seed))
    assert torch.equal(ours[0], theirs[0])
    assert not torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("prompt", ["a (b) c", "((a:1.3)", r"back\slash \(x\)", ")(", "a:2 (b:3)"])
def test_parentheses_stay_text(prompt: str) -> None:
    assert comfy_nodes.weighted(escaped(prompt, Path("a.png"))) == [(prompt, 1.0)]
    assert comfy_nodes.weighted("a (b:1.5)") == [("a ", 1.0), ("b", 1.5)]


ENTRY = {
    "file": "a.png", "prompt": "a lighthouse", "seed": 3, "negative": "", "steps": 28, "guidance": 4.5, "sampler":
    "euler", "spacing": "flow_match", "rescale": 0.0, "interval": [0.0, 1.0], "skip_layers": [], "skip_scale": 2.8,
    "skip_interval": [0.01, 0.2], "shift": 3.0, "dtype": "float32", "height": 1024, "width": 1024,
}  # fmt: skip
MEDIUM = {"depth": 24, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}
VAE = {
    "_class_name": "AutoencoderKL", "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609,
    "block_out_channels": [128, 256, 512, 512],
}  # fmt: skip


def network(**more: object) -> MMDiT:
    """Stable Diffusion 3.5 medium, without numbers."""
    with torch.device("meta"):
        return MMDiT(**(MEDIUM | more))


def configs(folder: Path, **more: object) -> Path:
    """The configs of Stable Diffusion 3.5 medium, without weights."""
    parts = {f"{part}{i}": ["transformers", "X"] for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    process = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    contents = {
        "model_index.json": {"_class_name": "StableDiffusion3Pipeline", **parts},
        "transformer/config.json": checkpoint.config(network(**more)),
        "vae/config.json": VAE,
        "scheduler/scheduler_config.json": process,
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def single(file: Path, *parts: str, **more: object) -> Path:
    """A single file of the released size whose numbers are a hole in the file."""
    shapes = {checkpoint.PREFIX + piece.name: piece.shape
              for pieces in checkpoint.layout(network(**more), "original").values() for piece in pieces}  # fmt: skip
    places, end = {}, 0
    for name, shape in {**shapes, **{f"{part}x": (1,) for part in parts}}.items():
        size = 2 * int(np.prod(shape))
        places[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(places).encode()
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + end)
    return file


def picture(file: Path, **changes: object) -> Path:
    """A grey picture that says that it was drawn so; None leaves a key out."""
    entry = {name: value for name, value in (ENTRY | changes).items() if value is not None}
    save_png(Image.new("L", (8, 8)), file, {OURS: json.dumps(entry)})
    return file


def test_a_workflow_names_the_files_that_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = configs(tmp_path / "runs/lighthouses/model")
    file = lora(tmp_path, network())
    shown = picture(tmp_path / "a.png", model=str(model), lora=[f"{file}:0.5"], max_sequence_length="77")
    main(["workflow", str(shown), "--out", str(tmp_path / "a.json")])
    nodes = json.loads((tmp_path / "a.json").read_text())
    comfy_nodes.check(nodes)
    by_class = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert by_class["CheckpointLoaderSimple"]["ckpt_name"] == "lighthouses.safetensors"
    assert by_class["LoraLoaderModelOnly"] | {"model": 0} == {
        "model": 0, "lora_name": "style.safetensors", "strength_model": 0.5
    }  # fmt: skip
    assert by_class["T5TokenizerOptions"]["min_length"] == 77
    assert by_class["SaveImage"]["filename_prefix"] == "a"
    printed = capsys.readouterr().out
    assert f"models/checkpoints/lighthouses.safetensors: python -m pipeline export {model} --format" in printed
    assert f"models/loras/style.safetensors: {file}" in printed


ALL = tuple(kind.prefix for kind in comfy.ENCODERS)


@pytest.mark.parametrize("inside", [ALL, ALL[:2], ()])
def test_a_single_file_needs_the_encoders_that_it_lacks(inside: tuple[str, ...], tmp_path: Path) -> None:
    model = single(tmp_path / "sd3.5_medium.safetensors", "first_stage_model.", *inside)
    shown = picture(tmp_path / "a.png", model=str(model), parts=str(configs(tmp_path / "parts")))
    made = workflow(shown)
    comfy_nodes.check(made.nodes)
    kinds = [node["class_type"] for node in made.nodes.values()]
    assert made.nodes["1"]["inputs"] == {"ckpt_name": "sd3.5_medium.safetensors"}
    assert ("TripleCLIPLoader" in kinds) == (inside != ALL)
    wanted = {"models/checkpoints/sd3.5_medium.safetensors"}
    if inside != ALL:
        wanted |= {f"models/text_encoders/{name}.safetensors" for name in ("clip_l", "clip_g", "t5xxl_fp16")}
    assert made.files.keys() == wanted


def refused(shown: Path, capsys: pytest.CaptureFixture) -> str:
    """The line of error with which the command ends; it writes nothing."""
    out = shown.parent / "a.json"
    with pytest.raises(SystemExit) as ended:
        main(["workflow", str(shown), "--out", str(out)])
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert not out.exists()
    return printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": "m.png", "image": "i.png"}, "was drawn with --mask, which ComfyUI has no core node for"),
        ({"classifier": "c:3"}, "with --classifier"),
        ({"clip_guidance": "c:3"}, "with --clip-guidance"),
        ({"upscale": ["u"]}, "with --upscale"),
        ({"control": ["c:i.png"]}, "with --control"),
        ({"autoguidance": "w:2"}, "with --autoguidance"),
        ({"refiner": "r", "handover": 0.2}, "with --refiner"),
        ({"picture": "p.png"}, "with --picture"),
        ({"prior": "runs/prior"}, "with --prior"),
        ({"embedding": ["toy.safetensors"]}, "with --embedding"),
        ({"interval": [0.2, 0.8]}, r"with --interval (0.2, 0.8)"),
        ({"rescale": 0.5}, "with --rescale 0.5"),
        ({"guider": "apg:eta=0"}, "with --guider apg:eta=0, which the workflow does not carry"),
        ({"sampler": "dpmpp_2m"}, "by the sampler dpmpp_2m, and ComfyUI's samplers differ from it"),
        ({"sampler": "ddim:eta=1"}, "by the sampler ddim:eta=1"),
        ({"guidance": 101.0}, "ComfyUI's guidance is at most 100"),
        ({"skip_layers": [7], "skip_scale": -1.0}, "has a scale above 0 and at most 10"),
        ({"height": 0}, "ComfyUI's sides are multiples of 16"),
        ({"height": 1000}, "ComfyUI's sides are multiples of 16"),
        ({"spacing": "karras", "shift": 1.0}, "its times begin at 0.98"),
        ({"shift": 101.0}, "ComfyUI's shift is at most 100"),
        ({"lora": [["a"]]}, "['a'] is not a LoRA"),
        ({"interval": "x"}, "says wrongly how it was drawn"),
        ({"shift": None}, "says wrongly how it was drawn, 'shift'"),
        ({"model": None}, "says wrongly how it was drawn, 'model'"),
        ({"steps": "x"}, "says wrongly how it was drawn"),
        ({"shift": "x"}, "says wrongly how it was drawn"),
        ({"prompt": "a {red|blue} sea"}, "ComfyUI does not read '{' in a prompt as text"),
        ({"negative": "see http://a"}, "ComfyUI does not read '//' in a prompt"),
        ({"lora": ["gone.safetensors"]}, "gone.safetensors is not a LoRA"),
        ({"image": "gone.png", "strength": 0.5}, "there is no picture gone.png"),
        ({"model": "gone"}, "gone is no model folder"),
    ],
)
def test_what_cannot_be_said_there_is_refused(
    changes: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = configs(tmp_path / "model")
    assert message in refused(picture(tmp_path / "a.png", **({"model": str(model)} | changes)), capsys)


def changed(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def half_vae(folder: Path) -> None:
    changed(folder / "vae/config.json", scaling_factor=0.18215)


def no_t5(folder: Path) -> None:
    changed(folder / "model_index.json", text_encoder_3=[None, None])


def other_path(folder: Path) -> None:
    ours = {"path": {"class": "Cosine"}, "target": {"class": "V"}, "variance": None, "sampling": {}}
    changed(folder / "scheduler/scheduler_config.json", _class_name="Objective", **ours)


def test_updates_of_text_encoders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    layer = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    save_file({f"{layer}.lora_{side}.weight": torch.ones(1, 1) for side in ("up", "down")}, tmp_path / "a.safetensors")
    shown = picture(tmp_path / "a.png", model=str(configs(tmp_path / "model")), lora=[str(tmp_path / "a.safetensors")])
    assert "updates text encoders, and a workflow loads updates of the network alone" in refused(shown, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (half_vae, "has scaling_factor 0.18215, and ComfyUI reads the VAE of Stable Diffusion 3"),
        (no_t5, "has no T5, whose place ComfyUI does not fill with zeros"),
        (other_path, "does not predict the velocity on rectified flow"),
        (
            {"depth": 12, "width": 1024, "heads": 16, "dual_attention_layers": ()},
            "has width 1024, and ComfyUI reads networks of",
        ),
        ({"heads": 12}, "has heads 12, and ComfyUI reads"),
        ({"in_channels": 4}, "has in_channels 4, and ComfyUI reads"),
        ({"two_times": True}, "describes a MMDiT, not an SD3Transformer2DModel"),
    ],
)
def test_another_model_is_refused(
    change: Callable | dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = configs(tmp_path / "model", **(change if isinstance(change, dict) else {}))
    if callable(change):
        change(model)
    shown = picture(tmp_path / "a.png", model=str(model), spacing="trailing")
    assert message in refused(shown, capsys)


def test_a_picture_of_the_digits_or_of_another_program_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shown = drawn(model, tmp_path / "out", "--prompt", "7", "--steps", 1, "--height", 16, "--width", 16)
    capsys.readouterr()
    assert "ComfyUI reads" in refused(shown, capsys)
    save_png(Image.new("L", (8, 8)), tmp_path / "b.png")
    assert "does not say how it was drawn: give a PNG that sample.py wrote" in refused(tmp_path / "b.png", capsys)
    assert "there is no picture" in refused(tmp_path / "c.png", capsys)


def test_a_single_file_without_a_vae_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = single(tmp_path / "bare.safetensors")
    shown = picture(tmp_path / "a.png", model=str(model), parts=str(configs(tmp_path / "parts")))
    assert "has no VAE: python -m pipeline export" in refused(shown, capsys)


def test_an_image_that_was_scaled_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Image.new("RGB", (640, 480)).save(tmp_path / "i.png")
    model = configs(tmp_path / "model")
    shown = picture(tmp_path / "a.png", model=str(model), image=str(tmp_path / "i.png"), strength=0.5)
    assert "is 640×480 and was drawn as 1024×1024: scale it before drawing" in refused(shown, capsys)


@pytest.mark.parametrize("fault", ["alpha in the settings", "magnitude", "strength", "same name"])
def test_a_lora_that_comfyui_would_add_otherwise_is_refused(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = lora(tmp_path, network())
    loras, message = [str(file)], f"python -m pipeline convert {file} --to kohya"
    tensors = dict(checkpoint.open_file(file, unwrap=False))
    if fault == "alpha in the settings":
        save_file(
            tensors, file, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})}
        )
    elif fault == "magnitude":
        layer = "transformer.transformer_blocks.1.attn.to_q"
        save_file(tensors | {f"{layer}.lora_magnitude_vector": torch.ones(1536)}, file)
    elif fault == "strength":
        loras, message = [f"{file}:200"], "style.safetensors 200"
    else:
        (tmp_path / "other").mkdir()
        loras, message = [str(file), str(lora(tmp_path / "other", network()))], "rename one of them"
    shown = picture(tmp_path / "a.png", model=str(configs(tmp_path / "model")), lora=loras)
    assert message in refused(shown, capsys)
    if fault.startswith("alpha"):
        main(["convert", str(file), "--to", "kohya", "--out", str(tmp_path / "kohya.safetensors")])
        picture(shown, model=str(tmp_path / "model"), lora=[str(tmp_path / "kohya.safetensors")])
        main(["workflow", str(shown), "--out", str(tmp_path / "a.json")])


def test_a_picture_of_a_run_with_a_lora_needs_both(tmp_path: Path) -> None:
    """It records the LoRA's folder, which names the base."""
    base, own = configs(tmp_path / "sd3.5"), tmp_path / "runs/ink/lora"
    own.mkdir(parents=True)
    lora(own, network()).rename(own / "pytorch_lora_weights.safetensors")
    (own / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    made = workflow(picture(tmp_path / "a.png", model=str(own)))
    assert made.files.keys() == {"models/checkpoints/sd3.5.safetensors", "models/loras/ink.safetensors"}


def test_no_file_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.json").write_text("mine")
    shown = picture(tmp_path / "a.png", model=str(configs(tmp_path / "model")))
    with pytest.raises(SystemExit):
        main(["workflow", str(shown), "--out", str(tmp_path / "a.json")])
    assert "exists: choose another --out" in capsys.readouterr().err
    assert (tmp_path / "a.json").read_text() == "mine"
