"""A small random decoder of image embeddings, and a prior that draws them, on disk."""

from pathlib import Path

from dits import weighted_by_name
from image_towers import SIZE, written
from networks import stirred

from data.clip import CLIPImage
from data.codec import Codec
from data.text.clip import CLIPText
from flow.objective import Objective
from flow.path import Cosine
from flow.target import X0
from mmdit.model import MMDiT
from mmdit.prior import Prior
from pipeline import Pipeline
from pipeline.sampling import Sampling

ROOT = Path(__file__).parents[1]


def made(folder: Path, codec: Codec, side: int, sampling: Sampling) -> Pipeline:
    """Writes `decoder`, whose latents have this side, and `prior` into a folder. Returns the prior."""
    encoder, own_text = CLIPImage(written(folder / "tower")), CLIPText(ROOT / "assets/shapes/text")
    sizes = {"depth": 1, "width": 32, "heads": 1, "text_dim": 160}
    network = stirred(MMDiT(
        codec.channels, **sizes, pooled_dim=128 + SIZE, sample_size=side, pos_embed_max_size=4, level_embeds=True
    ))  # fmt: skip
    Pipeline(network, Objective(), codec, own_text, sampling, image_encoder=encoder).save(folder / "decoder")
    drawing = weighted_by_name(Prior(SIZE, **sizes, pooled_dim=128, text_mask=True))
    prior = Pipeline(drawing, Objective(Cosine(), X0()), encoder, own_text, sampling)
    prior.save(folder / "prior")
    return prior
