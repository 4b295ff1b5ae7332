"""Trains the CLIP text tower of the digits and writes `assets/digits/text/`.

    python -m tools.train_digits_text

The tower learns from the training pictures with the training templates only, against a small convolutional image tower
that is not kept. The loss is CLIP's with soft targets: a batch has many pictures of each digit, and every caption of a
digit is right for every picture of it (UniCL, J. Yang et al., "Unified Contrastive Learning in Image-Text-Label Space",
2022). A caption without a digit fits all pictures equally; so does the empty caption, so that the null condition is a
vector between the digits.

Other words of the training captions are randomly replaced, or extended, by entries of the whole vocabulary except
digits, so that the tower finds the digit in new sentences.

The command writes the same bytes each time on the same machine. At the end it prints how often a caption leads to the
right pictures, also for held-out templates and pictures.
"""

import random
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from cli import Parser
from data import digits
from data.text.clip import CLIPText, write
from tools.tokenizer import train_tokenizer

FOLDER = Path(__file__).parents[1] / "assets" / "digits" / "text"
LENGTH = 10  # tokens per caption: eight words between the start and the end
WIDTH, LAYERS, PROJECTION = 64, 3, 64
STEPS, BATCH, RATE = 700, 256, 2e-3
BLANK = 0.15  # share of captions that name no digit; half of them are empty
# Words that people write about pictures. Each becomes one token; unknown words are split into letters.
PROMPT_WORDS = """
an and art as at big black bold by careful clean clear dark digit draw drawing drawn figure for from grey hand image in
ink is it large light like line make me neat nice number numeral old on paper pen pencil photo photograph picture please
scan shape show simple single sketch small style symbol that thick thin this white with write writing written
"""


class Captions:
    """Draws rows of token numbers `(B, LENGTH)` for labels, and whether each row names its digit, `(B,)`."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.rows = [
            [
                tokenizer(caption, add_special_tokens=False).input_ids
                for caption in digits.captions(d, digits.TRAIN_TEMPLATES)
            ]
            for d in range(10)
        ]
        names = [name for d in range(10) for name in digits.captions(d, ("{word}", "{numeral}"))]
        self.digits = {i for ids in tokenizer(names, add_special_tokens=False).input_ids for i in ids}
        self.others = sorted(set(range(len(tokenizer))) - self.digits - {self.start, self.end})

    def draw(self, labels: list[int], rng: random.Random) -> tuple[Tensor, Tensor]:
        rows, named = [], []
        for label in labels:
            row = list(rng.choice(self.rows[label]))
            blank = rng.random() < BLANK
            if blank:
                row = [i for i in row if i not in self.digits] if rng.random() < 0.5 else []
            if row and rng.random() < 0.5:
                share = rng.random()
                row = [i if i in self.digits or rng.random() > share else rng.choice(self.others) for i in row]
                for _ in range(rng.randint(0, LENGTH - 2 - len(row))):
                    row.insert(rng.randint(0, len(row)), rng.choice(self.others))
            rows.append([self.start, *row, *[self.end] * (LENGTH - 1 - len(row))])
            named.append(not blank)
        return torch.tensor(rows), torch.tensor(named)


def image_tower() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64 * 4 * 4, PROJECTION),
    )


def contrastive_loss(similarity: Tensor, labels: Tensor, named: Tensor) -> Tensor:
    """The mean of both directions' cross-entropies; `similarity (B, B)` has a row per caption, a column per picture."""
    same = (rearrange(labels, "b -> b 1") == labels) & rearrange(named, "b -> b 1")
    to_pictures = (same | ~rearrange(named, "b -> b 1")).float()  # a caption without a digit fits every picture
    to_captions = same.float().T
    losses = [
        -(target / target.sum(dim=1, keepdim=True).clamp(min=1) * scores.log_softmax(dim=1)).sum(dim=1).mean()
        for target, scores in ((to_pictures, similarity), (to_captions, similarity.T))
    ]
    return (losses[0] + losses[1]) / 2


def report(text: CLIPText, image: nn.Module) -> None:
    """Prints how often a picture leads to its digit's caption, and how often a caption's vectors identify its digit."""
    with torch.no_grad():
        for split in ("train", "held_out"):
            pixels, labels = digits.load(split)
            pictures = normalize(image(pixels), dim=-1)
            for name, templates in (("train", digits.TRAIN_TEMPLATES), ("held-out", digits.HELD_OUT_TEMPLATES)):
                right = []
                for template in templates:
                    captions = [digits.captions(d, (template,))[0] for d in range(10)]
                    scores = pictures @ normalize(text.encode(captions).pooled, dim=-1).T
                    right.append((scores.argmax(dim=1) == labels).double().mean())
                print(
                    f"retrieval, {split.replace('_', '-')} pictures, {name} templates: {torch.stack(right).mean():.2%}"
                )
        seen = [text.encode(digits.captions(d, digits.TRAIN_TEMPLATES)) for d in range(10)]
        new = [text.encode(digits.captions(d, digits.HELD_OUT_TEMPLATES)) for d in range(10)]
        truth = torch.arange(10).repeat_interleave(len(digits.HELD_OUT_TEMPLATES))
        for name, old_rows, new_rows in (
            ("pooled vector", [x.pooled for x in seen], [x.pooled for x in new]),
            ("last token", [x.tokens[:, -1] for x in seen], [x.tokens[:, -1] for x in new]),
            ("mean of tokens", [x.tokens.mean(dim=1) for x in seen], [x.tokens.mean(dim=1) for x in new]),
        ):
            gaps = torch.cdist(torch.cat(new_rows), torch.stack([rows.mean(dim=0) for rows in old_rows]))  # (40, 10)
            own = gaps[torch.arange(len(truth)), truth]
            other = gaps.scatter(1, rearrange(truth, "n -> n 1"), torch.inf).amin(dim=1)
            print(
                f"held-out captions by nearest train centroid, {name}: {(own < other).double().mean():.2%}; "
                f"distance to the own digit over that to the next: mean {(own / other).mean():.2f}, "
                f"worst {(own / other).max():.2f}"
            )


def main() -> None:
    Parser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # a sum's order, hence its last bits, depends on the number of threads
    torch.manual_seed(0)
    rng = random.Random(0)
    pixels, labels = digits.load("train")
    texts = " ".join(caption for d in range(10) for caption in digits.captions(d, digits.TRAIN_TEMPLATES))
    tokenizer = train_tokenizer([*PROMPT_WORDS.split(), *texts.replace(",", "").split()], LENGTH)
    captions = Captions(tokenizer)
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=PROJECTION,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            architectures=["CLIPTextModelWithProjection"],
        )
    )
    image = image_tower()
    scale = nn.Parameter(torch.tensor(1 / 0.07).log())
    parameters = [*encoder.parameters(), *image.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for _ in tqdm(range(STEPS), desc="text tower", unit="step"):
        batch = torch.randint(len(labels), (BATCH,))
        ids, named = captions.draw(labels[batch].tolist(), rng)
        words = normalize(encoder(ids).text_embeds, dim=-1)  # (B, PROJECTION)
        pictures = normalize(image(pixels[batch]), dim=-1)  # (B, PROJECTION)
        loss = contrastive_loss(scale.exp().clamp(max=100) * words @ pictures.T, labels[batch], named)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    write(FOLDER, encoder, tokenizer)
    report(CLIPText(FOLDER), image.eval())


if __name__ == "__main__":
    main()
