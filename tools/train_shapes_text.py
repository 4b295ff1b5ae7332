"""Trains the two CLIP text towers of the shapes and writes `assets/shapes/text/`.

    python -m tools.train_shapes_text

Both learn from scenes drawn for them, each by CLIP's loss (A. Radford et al., "Learning Transferable Visual Models
From Natural Language Supervision", 2021) against one convolutional image tower that is not kept. As on the web, a short
caption may fit several pictures of a batch. The second tower is the wider one, as in Stable Diffusion 3.

By itself CLIP's loss gives up the relation: no two captions of a batch differ in "above" and "below" alone. So words
are grounded, too, as in GLIP (L. H. Li et al., "Grounded Language-Image Pre-training", 2022): a linear layer, which is
not kept, reads from each noun's state where its shapes lie. The towers are causal, so it is the second noun that knows.

At the end it prints how often a full caption leads to its own scene among 256 unseen ones, and how much of the places
of the second nouns' shapes their states explain. The weights are stored in half precision. It takes about eight minutes
on one core.
"""

from collections.abc import Sequence
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
GROUNDING = 2.0  # weight of the grounding loss
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


def grounding_loss(read: Tensor, nouns: Tensor, places: Tensor) -> Tensor:
    """The mean square distance between the places read at nouns and those of their shapes, in half pictures.

    Args:
        read: places (B, N, 2) read from the states of all words.
        nouns: which words are nouns, (B, N) bool.
        places: those of the first and the second noun's shapes, (B, 2, 2).
    """
    order = rearrange((nouns.cumsum(1) - 1).clamp(min=0), "b n -> b n 1").expand(read.shape)
    return (read - places.gather(1, order)).square().sum(-1)[nouns].mean()


def noun_words() -> list[str]:
    """The words for shapes, singular and plural."""
    return [shapes.Group(count, shape).words().split()[-1] for shape in shapes.SHAPES for count in (1, 2)]


def place(scene: shapes.Scene) -> np.ndarray:
    """The mean centre (down, right) of the shapes of the first and the second group, (2, 2), each −1 … 1."""
    found = np.zeros((2, 2), dtype=np.float32)
    for i, group in enumerate(scene.request.groups):
        centres = [(o.top + o.side / 2, o.left + o.side / 2) for o in scene.objects if o.shape == group.shape]
        found[i] = np.mean(centres, axis=0) / (shapes.SIDE / 2) - 1
    return found


def scenes(first: int, count: int) -> tuple[Tensor, list[tuple[str, str]], Tensor]:
    """Pictures (count, 3, 64, 64) uint8, the long and the short caption of each, and its places (count, 2, 2)."""
    drawn = [shapes.scene(SEED, i) for i in range(first, first + count)]
    pixels = torch.from_numpy(np.stack([np.asarray(shapes.picture(scene)) for scene in drawn]))
    captions = [shapes.captions(scene, stream(SEED, Use.CAPTION, 0, first + i)) for i, scene in enumerate(drawn)]
    places = torch.from_numpy(np.stack([place(scene) for scene in drawn]))
    return rearrange(pixels, "b h w c -> b c h w").contiguous(), captions, places


def tokenized(tokenizer: CLIPTokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token numbers (count, LENGTH), and which of them are nouns."""
    ids = tokenizer(captions, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    nouns = torch.tensor(tokenizer(noun_words(), add_special_tokens=False).input_ids).flatten()
    return ids, torch.isin(ids, nouns)


def report(text: CLIPText, image: nn.Module, readers: Sequence[nn.Module]) -> None:
    """Prints how often a long caption leads to its own scene among unseen ones, and what a second noun tells."""
    pixels, captions, places = scenes(SCENES, 256)
    long = [pair[0] for pair in captions]
    related = torch.tensor([shapes.asked_for(caption).relation is not None for caption in long])
    nouns = tokenized(text.towers[0].tokenizer, long)[1]
    with torch.no_grad():
        pictures = normalize(image(pixels / 255), dim=-1)
        tokens, pooled = text.encode(long)
        for slot, reader in zip(text.slots, readers, strict=True):
            scores = normalize(pooled[:, slot.pooled], dim=-1) @ pictures.T
            right = (scores.argmax(dim=1) == torch.arange(len(long))).double().mean()
            second = (nouns & (nouns.cumsum(1) == 2))[related]  # the last noun of each
            off = reader(tokens[related][..., slot.columns])[second] - places[related, 1]
            told = 1 - off.square().mean() / places[related, 1].var(0, correction=0).mean()
            print(
                f"{slot.name}: {right:.1%} of 256 captions lead to their scene; "
                f"the second noun tells {told:.0%} of the variance of its shapes' places"
            )


def main() -> None:
    Parser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # a sum's order, hence its last bits, depends on the number of threads
    torch.manual_seed(0)
    pixels, captions, places = scenes(0, SCENES)
    tokenizer = train_tokenizer(words(), LENGTH)
    ids, nouns = (
        torch.stack(both)
        for both in zip(*(tokenized(tokenizer, [pair[i] for pair in captions]) for i in (0, 1)), strict=True)
    )  # (2, SCENES, LENGTH)
    towers, image = [text_tower(tokenizer, width) for width in WIDTHS], image_tower()
    scale = nn.Parameter(torch.full((len(towers),), 1 / 0.07).log())
    readers = [nn.Linear(width, 2) for width in WIDTHS]
    parameters = [p for module in (*towers, image, *readers) for p in module.parameters()] + [scale]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    bar = tqdm(range(STEPS), desc="text towers", unit="step")
    for step in bar:
        batch = torch.randint(SCENES, (BATCH,))
        short = (torch.rand(BATCH) < 0.3).long()
        row = ids[short, batch]
        pictures = normalize(image(pixels[batch] / 255), dim=-1)  # (B, PROJECTION)
        loss = torch.zeros(())
        for tower, reader, factor in zip(towers, readers, scale.exp().clamp(max=100), strict=True):
            read = tower(row, output_hidden_states=True)
            loss = loss + contrastive_loss(factor * normalize(read.text_embeds, dim=-1) @ pictures.T)
            states = read.hidden_states[-2]  # those that models are given
            loss = loss + GROUNDING * grounding_loss(reader(states), nouns[short, batch], places[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{float(loss) / len(towers):.3f}")
    for tower, suffix in zip(towers, ("", "_2"), strict=True):
        write(FOLDER, tower.half(), tokenizer, suffix)
    report(CLIPText(FOLDER), image.eval(), readers)


if __name__ == "__main__":
    main()
