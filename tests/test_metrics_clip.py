"""CLIP's features and scores are those of torchmetrics, and a damaged folder is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from measured import ASSETS
from safetensors.torch import load_file, save_file
from torchmetrics.functional.multimodal import clip_score as torchmetrics_clip_score
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from data import digits
from metrics.clip_score import clip_score
from metrics.features import CLIPFeatures, load_features
from training.rewards import CLIPScore


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP with random weights, and the digits' tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 700, "max_position_embeddings": 10, "bos_token_id": 698, "eos_token_id": 699}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=shared | words, vision_config=shared | {"image_size": 16, "patch_size": 4}, projection_dim=12
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    for file in (ASSETS / "text/tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


class TensorCLIP(CLIPModel):
    """CLIP with features as torchmetrics expects them: tensors, as before transformers 5."""

    def get_image_features(self, *args):
        return super().get_image_features(*args).pooler_output

    def get_text_features(self, *args):
        return super().get_text_features(*args).pooler_output


def test_clip_score_is_that_of_torchmetrics(clip_folder: Path):
    """One pair at a time: torchmetrics clips at 0 only after the mean, the paper before."""
    clip = CLIPFeatures(clip_folder)
    clip.chunk = 4
    pictures = torch.rand(10, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    captions = [digits.captions(i, digits.HELD_OUT_TEMPLATES)[i % 4] for i in range(10)]
    model, processor = (
        TensorCLIP.from_pretrained(clip_folder),
        CLIPProcessor(CLIPImageProcessor.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)),
    )
    expected = [
        torchmetrics_clip_score(picture, caption, lambda: (model, processor)).item()
        for picture, caption in zip(pictures.mul(255).round().byte(), captions, strict=True)
    ]
    assert 0 < sum(score > 0 for score in expected) < 10  # both sides of the clip are seen
    assert clip_score(clip, pictures, captions) == pytest.approx(np.mean(expected), rel=1e-4)
    assert clip_score(clip_folder, pictures, captions) == pytest.approx(np.mean(expected), rel=1e-4)
    for wrong in (captions[:9], "ten digits"):
        with pytest.raises(ValueError, match="each picture has a caption"):
            clip_score(clip, pictures, wrong)


def test_clip_features(clip_folder: Path):
    """Grey is RGB of three equal channels, a longer caption loses its tail, and chunks change nothing."""
    clip = load_features(f"clip:{clip_folder}")
    assert isinstance(clip, CLIPFeatures)
    grey = torch.rand(5, 1, 20, 24, generator=torch.Generator().manual_seed(0))
    pooled, spatial, logits = clip(grey)
    assert pooled.shape == (5, clip.num_features)
    assert spatial is logits is None
    torch.testing.assert_close(clip(grey.expand(-1, 3, -1, -1)).pooled, pooled)
    torch.testing.assert_close(
        torch.cat([clip(picture[None]).pooled for picture in grey]), pooled, rtol=1e-4, atol=1e-5
    )
    assert json.loads(clip.preprocessing.partition("CLIPImageProcessor ")[2])["size"] == {"shortest_edge": 16}
    assert clip.text(["a seven", "seven " * 50]).shape == (2, clip.num_features)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("config.json", FileNotFoundError, "config.json is missing"),
        ("model.safetensors", FileNotFoundError, "model.safetensors is missing"),
        ("preprocessor_config.json", FileNotFoundError, "preprocessor_config.json is missing"),
        ("tokenizer.json", FileNotFoundError, "tokenizer.json is missing"),
        ("truncated", ValueError, "is truncated"),
        ("another size", ValueError, "is damaged or of another model"),
        ("one weight too few", ValueError, "1 weights are absent, such as logit_scale"),
        ("other model", ValueError, "model_type is 'bert'"),
        ("bad config", ValueError, "config.json is no JSON"),
        ("bad processor", ValueError, "no CLIP image processor's"),
        ("bad tokenizer", ValueError, "no readable CLIP tokenizer"),
    ],
)
def test_damaged_clip_is_one_clear_line(clip_folder: Path, tmp_path: Path, fault: str, kind, words: str):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    weights = folder / "model.safetensors"
    match fault:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "another size":
            save_file(load_file(weights) | {"visual_projection.weight": torch.zeros(13, 32)}, weights)
        case "one weight too few":
            save_file({name: value for name, value in load_file(weights).items() if name != "logit_scale"}, weights)
        case "other model":
            (folder / "config.json").write_text('{"model_type": "bert"}')
        case "bad config":
            (folder / "config.json").write_text("{")
        case "bad processor":
            (folder / "preprocessor_config.json").write_text("{")
        case "bad tokenizer":
            (folder / "tokenizer.json").write_text("{")
        case file:
            (folder / file).unlink()
    with pytest.raises(kind, match=words) as error:
        clip_score(folder, torch.zeros(1, 3, 16, 16), ["one"])
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_mean_reward_is_the_clip_score_over_100(clip_folder: Path):
    pictures, captions = torch.rand(3, 3, 20, 20), ["a zero", "a handwritten one", "the digit 2"]
    reward = CLIPScore(clip_folder)(pictures, captions)
    assert 100 * float(reward.mean()) == pytest.approx(clip_score(clip_folder, pictures, captions), rel=1e-4)
