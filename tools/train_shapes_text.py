"""Trains the two CLIP text towers of the shapes and writes `assets/shapes/text/`.

    python -m tools.train_shapes_text

Both learn from scenes drawn for them, each by CLIP's loss (A. Radford et al., "Learning Transferable Visual Models
From Natural Language Supervision", 2021) against one convolutional image tower that is not kept. As on the web, a short
caption may fit several pictures of a batch. The second tower is the wider one, as in Stable Diffusion 3.

At the end it prints how often a full caption leads to its own scene among 256 unseen ones. The weights are stored in
half precision. It takes about eight minutes on one core.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from cli import Parser
from data import shapes
from data.order import Use, stream
from data.text.clip import CLIPText, write
from tools.tokenizer import train_tokenizer

FOLDER = Path(__file__).parents[1] / "assets" / "shapes" / "text"
LENGTH = 20  # tokens per caption: 18 words between the start and the end
WIDTHS, LAYERS, PROJECTION = (64, 96), 3, 64
SCENES, SEED = 20_000, 2  # a seed that no store of examples uses
STEPS, BATCH, RATE = 1000, 128, 2e-3
# More words that people write about such pictures.
MORE_WORDS = (
    "the and of big little tiny one on over under left right top bottom side with shape shapes photo show me draw"
)


def words() -> list[str]:
    """The words of the scenes' captions, and MORE_WORDS."""
    drawn = (shapes.captions(shapes.scene(SEED, i), stream(SEED, Use.CAPTION, 0, i)) for i in range(2000))
    return [*MORE_WORDS.split(), *" ".join(caption for pair in drawn for caption in pair).split()]


def text_tower(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=PROJECTION,
            num_hidden_layers=LAYERS,
            num_attention_heads=width // 32,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            architectures=["CLIPTextModelWithProjection"],
        )
    )


def image_tower() -> nn.Module:
    """Pictures (B, 3, 64, 64) to (B, PROJECTION), without pooling, so that positions are kept."""
    sizes = (3, 32, 64, 64, 64)
    layers = [
        layer
        for inputs, outputs in pairwise(sizes)
        for layer in (nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.GELU())
    ]
    flat = sizes[-1] * (shapes.SIDE // 2 ** (len(sizes) - 1)) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 512), nn.GELU(), nn.Linear(512, PROJECTION))


def contrastive_loss(similarity: Tensor) -> Tensor:
    """The mean of both directions' cross-entropies; `similarity (B, B)` has a row per caption."""
    own = torch.arange(len(similarity))
    return (cross_entropy(similarity, own) + cross_entropy(similarity.T, own)) / 2


def scenes(first: int, count: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """Pictures (count, 3, 64, 64) uint8, and the long and the short caption of each."""
    drawn = [shapes.scene(SEED, i) for i in range(first, first + count)]
    pixels = torch.from_numpy(np.stack([np.asarray(shapes.picture(scene)) for scene in drawn]))
    captions = [shapes.captions(scene, stream(SEED, Use.CAPTION, 0, first + i)) for i, scene in enumerate(drawn)]
    return rearrange(pixels, "b h w c -> b c h w").contiguous(), captions


def report(text: CLIPText, image: nn.Module) -> None:
    """Prints how often a long caption leads to its own scene among unseen ones."""
    pixels, captions = scenes(SCENES, 256)
    with torch.no_grad():
        pictures = normalize(image(pixels / 255), dim=-1)
        pooled = text.encode([long for long, _ in captions]).pooled
        for slot in text.slots:
            scores = normalize(pooled[:, slot.pooled], dim=-1) @ pictures.T
            right = (scores.argmax(dim=1) == torch.arange(len(captions))).double().mean()
            print(f"{slot.name}: {right:.1%} of 256 captions lead to their scene")


def main() -> None:
    Parser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # a sum's order, hence its last bits, depends on the number of threads
    torch.manual_seed(0)
    pixels, captions = scenes(0, SCENES)
    tokenizer = train_tokenizer(words(), LENGTH)
    ids = torch.stack(
        [
            tokenizer(
                [pair[i] for pair in captions], padding="max_length", max_length=LENGTH, return_tensors="pt"
            ).input_ids
            for i in (0, 1)
        ]
    )  # (2, SCENES, LENGTH)
    towers, image = [text_tower(tokenizer, width) for width in WIDTHS], image_tower()
    scale = nn.Parameter(torch.full((len(towers),), 1 / 0.07).log())
    parameters = [p for module in (*towers, image) for p in module.parameters()] + [scale]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    bar = tqdm(range(STEPS), desc="text towers", unit="step")
    for step in bar:
        batch = torch.randint(SCENES, (BATCH,))
        row = ids[(torch.rand(BATCH) < 0.3).long(), batch]
        pictures = normalize(image(pixels[batch] / 255), dim=-1)  # (B, PROJECTION)
        loss = torch.zeros(())
        for tower, factor in zip(towers, scale.exp().clamp(max=100), strict=True):
            loss = loss + contrastive_loss(factor * normalize(tower(row).text_embeds, dim=-1) @ pictures.T)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{float(loss) / len(towers):.3f}")
    for tower, suffix in zip(towers, ("", "_2"), strict=True):
        write(FOLDER, tower.half(), tokenizer, suffix)
    report(CLIPText(FOLDER), image.eval())


if __name__ == "__main__":
    main()
