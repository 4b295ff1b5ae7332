"""Padding that is masked: no picture depends on how many padding tokens a caption has."""

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import stirred
from trials import ROOT, fit, refused, small

from data.batch import complete
from data.latents import Pixels
from data.module import TrainingDigits
from data.order import Share
from data.text.clip import CLIPText
from data.text.encoder import Text
from flow.objective import Objective
from mmdit.model import MMDiT
from pipeline import Pipeline
from pipeline.sampling import Sampling

PROMPTS, SEEDS = ["a handwritten seven", "9"], [0, 1]


class Longer(CLIPText):  # type: ignore[misc]  # final, but for this test
    """The same tokens, followed by more padding."""

    def encode(self, captions: list[str]) -> Text:  # type: ignore[override]
        tokens, pooled = super().encode(captions)
        return Text(torch.cat([tokens, 10 * torch.randn(len(captions), 4, tokens.shape[2])], 1), pooled)

    def mask(self, captions: list[str]) -> torch.Tensor:  # type: ignore[override]
        return torch.cat([super().mask(captions), torch.zeros(len(captions), 4, dtype=torch.bool)], 1)


def masked(text: CLIPText, text_mask: bool = True) -> Pipeline:
    torch.manual_seed(0)
    network = MMDiT(
        in_channels=1, depth=2, width=32, heads=2, text_dim=64, pooled_dim=64, sample_size=8, pos_embed_max_size=8,
        text_mask=text_mask,
    )  # fmt: skip
    return Pipeline(stirred(network), Objective(), Pixels(1, 0.3, 2.66), text, Sampling(steps=3, guidance=2.0))


def test_a_mask_marks_the_words_with_start_and_end(text: CLIPText) -> None:
    mask = text.mask(["", "a", "a handwritten seven"])
    assert mask.dtype == torch.bool
    assert mask.shape == (3, text.length)
    counts = mask.sum(1).tolist()
    assert counts[0] == 2  # start and end
    assert counts[0] < counts[1] < counts[2]
    assert all(row[: int(row.sum())].all() for row in mask)  # from the left
    assert text.mask(["seven " * 100]).all()  # cut, all its own


def test_pictures_do_not_depend_on_the_number_of_padding_tokens(text: CLIPText) -> None:
    longer = Longer(ROOT / "assets/digits/text")
    drawn = masked(text)(PROMPTS, SEEDS)
    torch.testing.assert_close(masked(longer)(PROMPTS, SEEDS), drawn, atol=1e-5, rtol=0)
    without = masked(text, False)(PROMPTS, SEEDS)
    assert (masked(longer, False)(PROMPTS, SEEDS) - without).abs().max() > 1e-3  # padding that is attended matters
    assert (drawn - without).abs().max() > 1e-3


def test_the_model_folder_remembers(text: CLIPText, tmp_path: Path) -> None:
    pipe = masked(text)
    pipe.save(tmp_path / "model")
    back = Pipeline.load(tmp_path / "model")
    assert back.network.text_mask
    assert torch.equal(back(PROMPTS, SEEDS), pipe(PROMPTS, SEEDS))


def test_training_gives_each_caption_its_mask_and_a_dropped_one_that_of_the_empty(text: CLIPText) -> None:
    ids = np.arange(40)
    data = TrainingDigits(text, Pixels(1, 0.3, 2.66), 0, 40, 0.5, text_mask=True)
    batch = data[Share(0, ids, ids)]
    null = text.encode([""])
    dropped = (batch.pooled - null.pooled).norm(dim=1) < 1e-3
    assert batch.mask is not None
    assert 5 < dropped.sum() < 35
    assert torch.equal(batch.mask[dropped], text.mask([""]).expand(int(dropped.sum()), -1))
    assert (batch.mask[~dropped].sum(1) > 2).all()
    assert TrainingDigits(text, Pixels(1, 0.3, 2.66), 0, 40, 0.5)[Share(0, ids, ids)].mask is None


@pytest.mark.parametrize("folder", ["digits", "shapes"])  # with one encoder and with two, which share rows
def test_a_dropped_encoder_s_mask_is_that_of_the_null_condition(folder: str) -> None:
    text = CLIPText(ROOT / f"assets/{folder}/text")
    ids = np.arange(3)
    batch = TrainingDigits(text, Pixels(1, 0.3, 2.66), 0, 3, 0.0, text_mask=True)[Share(0, ids, ids)]
    tokens, pooled = text.encode([""])
    kept = torch.ones(3, len(text.slots), dtype=torch.bool)
    kept[1], kept[2, 1:] = False, False
    done = complete(batch._replace(kept=kept), text, Text(tokens[0], pooled[0]), text.mask([""])[0])
    assert done.mask is not None
    assert batch.mask is not None
    assert torch.equal(done.mask[1], text.mask([""])[0])
    assert torch.equal(done.mask[[0, 2]], batch.mask[[0, 2]])


def test_it_trains_by_its_overlay_and_is_not_half_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = small(tmp_path)
    fit(config, "--config", str(ROOT / "configs/text/masked.yaml"))
    assert Pipeline.load(tmp_path / "run").network.text_mask
    flags = ["--data.text_mask", "true", "--run.folder", str(tmp_path / "other")]
    assert "network.text_mask is False, but the data need True: make them equal" in refused(capsys, config, *flags)
