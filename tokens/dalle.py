"""DALL·E 1: one stream of caption tokens and picture codes through a causal transformer (Ramesh et al. 2021, §2.2)."""

from dataclasses import dataclass
from typing import Any, final

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from mmdit.network import Condition
from mmdit.saved import SavedNetwork


@dataclass
class Memory:
    """Keys and values of the beginning of a stream."""

    text: Tensor
    mask: Tensor
    codes: Tensor  # (B, n)
    version: int  # of the weights
    cache: DynamicCache

    def begins(self, text: Tensor, mask: Tensor, codes: Tensor, version: int) -> bool:
        """Whether a stream has one code more than this one, at the same weights."""
        count = self.codes.shape[1]
        return (
            codes.shape[1] == count + 1
            and version == self.version
            and self.text.shape == text.shape
            and torch.equal(self.text, text)
            and torch.equal(self.mask, mask)
            and torch.equal(self.codes, codes[:, :count])
        )


@final
class DALLE(SavedNetwork):
    """model(codes, t, condition) → logits of each code, given the caption and the codes before it.

    The stream is [N caption tokens | codes], row by row, the stack of a place in order. Each position predicts what
    follows it: the last caption token the first code. Padding of the caption is replaced by a learned token for each
    position. Codes have learned embeddings of row, column and depth. The transformer is Llama's (RMSNorm, SwiGLU,
    rotary positions), by transformers, without dropout.

    Args:
        stack: codes of one place.
        codes: how many codes there are.
        sample_size: height and width of the grid of places, the only size.
        words: size of the tokenizer's vocabulary.
        text_length: N, tokens of a caption with its padding.
        depth: number of blocks.
        width: channels of a token.
        heads: attention heads.

    Attributes:
        settings: the arguments.
    """

    pooled_dim, text_dim, text_mask = 0, 1, True

    def __init__(
        self,
        stack: int = 1,
        codes: int = 256,
        sample_size: int = 8,
        words: int = 700,
        text_length: int = 20,
        depth: int = 4,
        width: int = 128,
        heads: int = 2,
    ) -> None:
        super().__init__()
        self.settings = {
            "stack": stack, "codes": codes, "sample_size": sample_size, "words": words, "text_length": text_length,
            "depth": depth, "width": width, "heads": heads,
        }  # fmt: skip
        if min(self.settings.values()) < 1 or codes < 2 or width % (2 * heads):
            raise ValueError("DALLE needs sizes of at least 1, two codes, and a width that is an even multiple of "
                             f"heads, got {self.settings}")  # fmt: skip
        self.in_channels, self.out_channels = stack, stack * codes
        self.sample_size = self.unit = self.largest = sample_size
        self.depth, self.width, self.heads = depth, width, heads
        self.codes, self.words, self.text_length = codes, words, text_length
        self.length = stack * sample_size**2
        llama: dict[str, Any] = {
            "vocab_size": words + codes,
            "hidden_size": width,
            "intermediate_size": 4 * width * 2 // 3 // 8 * 8,  # as many weights as two matrices of 4·width
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "max_position_embeddings": text_length + self.length,
            "attn_implementation": "sdpa",
        } | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        self.transformer = LlamaModel(LlamaConfig(**llama))
        self.padding = nn.Parameter(0.02 * torch.randn(text_length, width))
        self.rows = nn.Parameter(0.02 * torch.randn(sample_size, 1, 1, width))
        self.columns = nn.Parameter(0.02 * torch.randn(sample_size, 1, width))
        self.depths = nn.Parameter(0.02 * torch.randn(stack, width))
        self.head = nn.Linear(width, words + codes, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        self.memory: Memory | None = None

    def forget(self) -> None:
        """Drops the keys and values of the picture that was written last."""
        self.memory = None

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the transformer."""
        return self.transformer.layers

    def forward(self, z: Tensor, t: Tensor, condition: Condition, text: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, stack·codes, H, W) of codes z (B, stack, H, W).

        Above t = 0, only the first 1 − t of the codes are known, and only the logits of the next one are computed; the
        others are 0. Keys and values of the known codes are kept for the call with one more.

        Args:
            z: codes, and anything at places that are not known.
            t: one time for all pictures, (B,).
            condition: its `text` holds token numbers (B, N, 1), its `mask` which of them are no padding (B, N).
            text: also return the logits of the caption's tokens from the second on, (B, N − 1, words).

        Raises:
            ValueError: the caption or the grid has another size, or the condition has no mask.
        """
        self.check_condition(condition)
        if z.shape[1:] != (self.in_channels, self.sample_size, self.sample_size):
            raise ValueError(f"this network writes {self.in_channels} × {self.sample_size} × {self.sample_size} codes, "
                             f"got {tuple(z.shape[1:])}")  # fmt: skip
        if condition.text.shape[1:] != (self.text_length, 1):
            raise ValueError(f"this network reads captions of {self.text_length} tokens, got "
                             f"{tuple(condition.text.shape[1:])}")  # fmt: skip
        stream = rearrange(z, "b k h w -> b (h w k)")
        known = self.length if z.is_meta else round((1 - float(t[0])) * self.length)
        if known < self.length:
            return self._next(stream[:, :known].long(), condition)
        hidden = self._run(torch.cat([self._text(condition), self._codes(stream[:, :-1].long(), 0)], dim=1))
        first = self.text_length - 1  # the last caption token predicts the first code
        logits = nn.functional.linear(hidden[:, first:], self.head.weight[self.words :])
        side = self.sample_size
        picture = rearrange(logits, "b (h w k) c -> b (k c) h w", h=side, w=side)
        if not text:
            return picture
        return picture, nn.functional.linear(hidden[:, :first], self.head.weight[: self.words])

    def _next(self, codes: Tensor, condition: Condition) -> Tensor:
        """The logits of the code after these (B, n), at its place."""
        assert condition.mask is not None
        weight, count = self.head.weight, codes.shape[1]
        version = sum(0 if p.is_inference() else p._version for p in self.parameters())
        given = condition.text, condition.mask, codes, version
        memory, self.memory = self.memory, None
        if memory and memory.begins(*given):
            cache, inputs = memory.cache, self._codes(codes[:, count - 1 :], count - 1)
        else:
            cache = DynamicCache()
            inputs = torch.cat([self._text(condition), self._codes(codes, 0)], dim=1)
        hidden = self._run(inputs, cache)
        if count + 1 < self.length and not self.training:
            self.memory = Memory(*given, cache)
        logits = nn.functional.linear(hidden[:, -1], weight[self.words :])
        place, depth = divmod(count, self.in_channels)
        side = self.sample_size
        result = logits.new_zeros(len(codes), self.in_channels, self.codes, side, side)
        result[:, depth, :, place // side, place % side] = logits
        return result.flatten(1, 2)

    def _run(self, stream: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """The blocks and the last norm on a stream (B, n, width), or with a cache on its next part."""
        first = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(first, first + stream.shape[1], device=stream.device)[None]
        angles = rotary(positions, self.width // self.heads, stream.dtype)
        for block in self.blocks:  # torch's attention, which without a mask is causal here
            stream = block(stream, position_embeddings=angles, past_key_values=cache)
        return self.transformer.norm(stream)

    def _text(self, condition: Condition) -> Tensor:
        """Embeddings (B, N, width) of a caption."""
        assert condition.mask is not None
        words = self.transformer.embed_tokens(condition.text[..., 0].long())
        return torch.where(condition.mask[..., None], words, self.padding.to(words))

    def _codes(self, codes: Tensor, first: int) -> Tensor:
        """Embeddings (B, n, width) of codes, the first of which is number `first` of the picture."""
        where = (self.rows + self.columns + self.depths).flatten(0, 2)[first : first + codes.shape[1]]
        return self.transformer.embed_tokens(codes + self.words) + where


def rotary(positions: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, n, dim) of rotary positions (1, n), as Llama has them (Su et al. 2021, §3.2).

    The frequencies are float32 whatever the type of the weights: half precision would turn far positions.
    """
    frequencies = 10_000 ** (-torch.arange(0, dim, 2, device=positions.device).float() / dim)
    angles = (positions[..., None] * frequencies).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)
