"""The size and crop of a picture as a condition: its features, in batches and in the pipeline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from painted import BUCKETS, CODEC, HELD_OUT, SIZES, TEXT, batches, by_content, identities
from PIL import Image

from data.module import Stored
from data.raw.pictures import cover
from data.sizes import SIZE_FEATURES, size_features
from data.text.clip import CLIPText
from flow.objective import Objective
from mmdit.model import MMDiT
from pipeline import Pipeline


@pytest.fixture(scope="module")
def text() -> CLIPText:
    return CLIPText(TEXT)


def test_size_features_are_sdxl_s() -> None:
    sizes = torch.tensor([[20, 20, 0, 3, 16, 16], [1024, 768, 12, 0, 512, 384]])
    features = size_features(sizes)
    assert features.shape == (2, SIZE_FEATURES)
    assert features.dtype == torch.float32
    by_hand = [
        function(value * 10000 ** (-i / 128))
        for value in sizes[1].tolist()
        for function in (np.cos, np.sin)
        for i in range(128)
    ]
    np.testing.assert_allclose(features[1], by_hand, atol=2e-4)
    theirs = get_timestep_embedding(sizes.flatten(), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(features, theirs.reshape(2, -1), atol=2e-4, rtol=0)


def test_the_pooled_vector_holds_original_size_crop_and_size(stores: dict[str, str], text: CLIPText) -> None:
    known = by_content(stores["tokens"])
    data = Stored(text, CODEC, 1, stores["tokens"], 8, held_out=HELD_OUT, size_conditioning=True)
    given = {batch.x0.shape[2:]: batch for batch in batches(data, 12)}
    assert given.keys() == set(BUCKETS)
    for size, batch in given.items():
        number = int(identities(batch, known)[0].removeprefix("painted-"))
        height, width = SIZES[number % 3]
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        _, top, left = cover(Image.fromarray(pixels), *size)
        pooled = data.on_after_batch_transfer(batch, 0).pooled
        assert pooled.shape == (8, text.pooled_dim + SIZE_FEATURES)
        told = size_features(torch.tensor([[height, width, top, left, *size]]))
        assert torch.equal(pooled[0, text.pooled_dim :], told[0])
        assert (top > 0, left > 0) == (size == (8, 32), size == (32, 8))
    plain = Stored(text, CODEC, 1, stores["tokens"], 8, held_out=HELD_OUT)
    assert batches(plain, 1)[0].sizes is None


def test_the_pipeline_asks_for_uncropped_pictures(text: CLIPText, tmp_path: Path) -> None:
    network = MMDiT(
        in_channels=3, depth=1, width=16, heads=1, text_dim=160, pooled_dim=128 + SIZE_FEATURES, sample_size=16,
        pos_embed_max_size=16,
    )  # fmt: skip
    pipe = Pipeline(network.eval(), Objective(), CODEC, text)
    pipe.save(tmp_path / "model")
    for some in (pipe, Pipeline.load(tmp_path / "model")):
        assert some.sized
        for sides, told in (((8, 32), [8, 32, 0, 0, 8, 32]), ((None, None), [16, 16, 0, 0, 16, 16])):
            pooled = some.condition(["a red circle", ""], *sides).pooled
            assert torch.equal(pooled[:, :128], text.encode(["a red circle", ""]).pooled)
            assert torch.equal(pooled[:, 128:], size_features(torch.tensor([told])).expand(2, -1))
    told = size_features(torch.tensor([[8, 32, 0, 0, 8, 32]]))
    given: list[torch.Tensor] = []
    network.register_forward_pre_hook(lambda _, inputs: given.append(inputs[2].pooled[:, 128:]))
    assert pipe(["a red circle"], [0], negative="a blue one", height=8, width=32).shape == (1, 3, 8, 32)
    assert all(torch.equal(sizes, told.expand(2, -1)) for sizes in given)  # of the prompt and the negative one
