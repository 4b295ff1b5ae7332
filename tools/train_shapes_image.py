"""Trains the CLIP image tower of the shapes and writes `assets/shapes/image/`.

    python -m tools.train_shapes_image

It is the counterpart of the two frozen text towers of the shapes: one embedding of a picture for both, learned by
CLIP's loss (Radford et al. 2021, figure 3). Mean and deviation of its embeddings are measured on the same scenes at the
end (`data.clip`). It prints how often a full caption leads to its own scene among 256 unseen ones. The weights are
stored in half precision. It takes about fifteen minutes on one core.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from cli import Parser
from data.clip import CLIPImage, centred, write
from data.shapes import SIDE
from data.text.clip import CLIPText
from tools.train_shapes_text import PROJECTION, contrastive_loss, scenes

FOLDER = Path(__file__).parents[1] / "assets" / "shapes" / "image"
SCENES, STEPS, BATCH, RATE = 40_000, 2500, 128, 1e-3
SHORT = 0.3  # share of the short captions, which may fit several scenes of a batch


def tower() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            projection_dim=PROJECTION,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=8,
        )
    )


def pooled(text: CLIPText, captions: list[tuple[str, str]]) -> Tensor:
    """Unit vectors of the long and the short captions by each tower, (towers, 2, count, PROJECTION)."""
    with torch.no_grad():
        both = torch.stack([
            torch.cat([text.encode(said[i : i + 200]).pooled for i in range(0, len(said), 200)])
            for said in zip(*captions, strict=True)
        ])  # fmt: skip
    return normalize(torch.stack([both[..., slot.pooled] for slot in text.slots]), dim=-1)


def report(codec: CLIPImage, text: CLIPText) -> None:
    """Prints how often a long caption leads to its own scene among unseen ones."""
    pixels, captions = scenes(SCENES, 256)
    pictures = codec.embedding(codec.encode(pixels / 255))
    for slot, texts in zip(text.slots, pooled(text, captions), strict=True):
        right = ((texts[0] @ pictures.T).argmax(1) == torch.arange(256)).double().mean()
        print(f"{slot.name}: {right:.1%} of 256 captions lead to their scene")


def main() -> None:
    Parser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # a sum's order, hence its last bits, depends on the number of threads
    torch.manual_seed(0)
    pixels, captions = scenes(0, SCENES)
    text = CLIPText(FOLDER.parent / "text")
    texts, image = pooled(text, captions), tower()
    scale = nn.Parameter(torch.full((len(texts),), 1 / 0.07).log())
    parameters = [*image.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    bar = tqdm(range(STEPS), desc="image tower", unit="step")
    for step in bar:
        rows = torch.randint(SCENES, (BATCH,))
        kind = (torch.rand(BATCH) < SHORT).long()
        pictures = normalize(image(centred(pixels[rows] / 255)).image_embeds, dim=-1)
        loss = torch.zeros(())
        for own, factor in zip(texts, scale.exp().clamp(max=100), strict=True):
            loss = loss + contrastive_loss(factor * own[kind, rows] @ pictures.T)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{float(loss.detach()) / len(texts):.3f}")
    write(FOLDER, image.half(), pixels)
    report(CLIPImage(FOLDER), text)


if __name__ == "__main__":
    main()
