"""Trains the T5 text tower of the shapes and writes `assets/shapes/text/text_encoder_3/` and its tokenizer.

    python -m tools.train_shapes_t5

Stable Diffusion 3 reads a caption a third time by T5 (C. Raffel et al., "Exploring the Limits of Transfer Learning with
a Unified Text-to-Text Transformer", 2020), which never saw a picture. Here it learns from captions alone, too: one
linear layer, which is not kept, reads from the state of each noun what its caption says about that group, and whether
the group lies above, below, left or right of the other. Unlike a CLIP tower, T5 reads in both directions, so the first
noun knows of the relation, too.

At the end it prints how many of these answers are right for unseen captions. The weights are stored in half precision.
It takes about four minutes on one core.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from cli import Parser
from data import shapes
from data.order import Use, stream
from data.shapes import COLOURS, NUMBERS, RELATIONS, SHAPES, SIZES
from storage.weights import write_tensors
from tools.tokenizer import unigram_tokenizer
from tools.train_shapes_text import FOLDER, LENGTH, MORE_WORDS, SCENES, SEED, WIDTHS

WIDTH, LAYERS = sum(WIDTHS), 2  # as wide as both CLIP towers together
SCALE = 3.0  # of the states, so that they are about as long as the CLIP towers'
STEPS, BATCH, RATE = 1500, 128, 2e-3
UNSEEN = 500  # scenes
QUESTIONS = {
    "shape": len(SHAPES),
    "colour": 1 + len(COLOURS),  # the first answer is that the caption does not say it
    "size": 1 + len(SIZES),
    "number": len(NUMBERS) - 1,
    "vertical": 3,  # above the other group, not said, below it
    "horizontal": 3,
}


def captions(first: int, count: int) -> list[str]:
    """The long and the short captions of `count` scenes."""
    numbers = range(first, first + count)
    return [text for i in numbers for text in shapes.captions(shapes.scene(SEED, i), stream(SEED, Use.CAPTION, 0, i))]


def answers(caption: str) -> Tensor:
    """The answers to QUESTIONS for the first and the second group, (2, 6); zeros for a second group that is absent."""
    asked = shapes.asked_for(caption)
    down, right = RELATIONS[asked.relation] if asked.relation else (0, 0)
    rows = torch.zeros(2, len(QUESTIONS), dtype=torch.long)
    for row, group, sign in zip(rows, asked.groups, (-1, 1), strict=False):
        row[:] = torch.tensor(
            [
                SHAPES.index(group.shape),
                1 + tuple(COLOURS).index(group.colour) if group.colour else 0,
                1 + tuple(SIZES).index(group.size) if group.size else 0,
                group.count - 1,
                1 + sign * down,
                1 + sign * right,
            ]
        )
    return rows


class Reader(nn.Module):
    """The encoder, and the layer that answers QUESTIONS from the states of nouns.

    Args:
        tokenizer: of the captions.
    """

    def __init__(self, tokenizer: T5Tokenizer) -> None:
        super().__init__()
        self.encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=WIDTH,
                d_kv=32,
                num_heads=4,
                d_ff=2 * WIDTH,
                num_layers=LAYERS,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                is_encoder_decoder=False,
                use_cache=False,
                architectures=["T5EncoderModel"],
            )
        )
        nn.init.constant_(self.encoder.encoder.final_layer_norm.weight, SCALE)
        self.answer = nn.Linear(WIDTH, sum(QUESTIONS.values()))
        nouns = [shapes.Group(count, shape).words().split()[-1] for shape in SHAPES for count in (1, 2)]
        self.nouns = torch.tensor(tokenizer(nouns, add_special_tokens=False).input_ids).flatten()

    def forward(self, ids: Tensor, answers: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits for each of QUESTIONS of the M nouns in `ids (B, N)`, and of `answers (B, 2, 6)` theirs, (M, 6)."""
        states = self.encoder(input_ids=ids).last_hidden_state
        nouns = torch.isin(ids, self.nouns)
        group = rearrange((nouns.cumsum(1) - 1).clamp(min=0), "b n -> b n 1").expand(-1, -1, len(QUESTIONS))
        return list(self.answer(states[nouns]).split([*QUESTIONS.values()], dim=-1)), answers.gather(1, group)[nouns]


def prefixed(ids: Tensor, others: Tensor) -> Tensor:
    """`ids (B, N)` with up to three other words before a caption, each with probability 0.3: users write more."""
    room = int((ids == 0).sum(1).min())  # padding
    for _ in range(min(3, room)):
        row = torch.rand(len(ids)) < 0.3
        word = others[torch.randint(len(others), (int(row.sum()), 1))]
        ids = ids.clone()
        ids[row] = torch.cat([word, ids[row, :-1]], dim=1)
    return ids


@torch.no_grad()
def report(reader: Reader, ids: Tensor, asked: Tensor) -> None:
    """Prints how many answers are right."""
    logits, right = reader(ids, asked)
    for question, scores, told in zip(QUESTIONS, logits, right.T, strict=True):
        print(f"{question}: {(scores.argmax(1) == told).double().mean():.1%} right")


def main() -> None:
    Parser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # a sum's order, hence its last bits, depends on the number of threads
    torch.manual_seed(0)
    seen = captions(0, SCENES + UNSEEN)
    words = {word for caption in seen for word in caption.split()}
    tokenizer = unigram_tokenizer(words | set(MORE_WORDS.split()), LENGTH)
    ids = tokenizer(seen, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    asked = torch.stack([answers(caption) for caption in seen])
    known = {i for row in tokenizer(sorted(words), add_special_tokens=False).input_ids for i in row}
    others = torch.tensor([i for i in range(3, len(tokenizer)) if i not in known])
    reader, train = Reader(tokenizer), 2 * SCENES
    optimizer = torch.optim.AdamW(reader.parameters(), lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    bar = tqdm(range(STEPS), desc="T5", unit="step")
    for step in bar:
        batch = torch.randint(train, (BATCH,))
        logits, right = reader(prefixed(ids[batch], others), asked[batch])
        loss = torch.stack([cross_entropy(*pair) for pair in zip(logits, right.T, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{float(loss):.3f}")
    report(reader, ids[train:], asked[train:])
    encoder = reader.encoder.half()
    encoder.config.save_pretrained(FOLDER / "text_encoder_3")
    tokenizer.save_pretrained(FOLDER / "tokenizer_3")
    state = {name: value.contiguous() for name, value in encoder.named_parameters()}
    write_tensors(state, FOLDER / "text_encoder_3" / "model.safetensors")


if __name__ == "__main__":
    main()
