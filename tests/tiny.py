"""Tiny random pipelines of the three released kinds, as diffusers builds and saves them: the opponents of the tests."""

from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from networks import stirred
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from data import digits
from tools.tokenizer import unigram_tokenizer

TOKENIZER = Path(__file__).parents[1] / "assets" / "digits" / "text" / "tokenizer"
TOKENS, POOLED = 224, 64 + 128  # as in the released models, T5 is wider than both CLIPs together


def pipeline(
    kind: Literal["sd3", "sd35_medium", "sd35_large"], folder: Path, t5: bool = True
) -> StableDiffusion3Pipeline:
    """A random pipeline, the same at each call, in eval mode; saved to `folder`.

    Every parameter is random, those too that begin at zero or one, and so are the pictures, whose pixels lie mostly
    between black and white. Heads are 64 wide where a network has no norm of queries and keys, since nothing else in
    the original's single file tells how many there are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = StableDiffusion3Pipeline(
            transformer=frozen(transformer(kind)),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=frozen(vae()),
            text_encoder=frozen(clip(64, "quick_gelu")),
            tokenizer=clip_tokenizer("<|endoftext|>"),
            text_encoder_2=frozen(clip(128, "gelu")),
            tokenizer_2=clip_tokenizer("!"),
            text_encoder_3=frozen(t5_encoder()) if t5 else None,
            tokenizer_3=t5_tokenizer() if t5 else None,
        )
    pipe.text_encoder.text_projection.weight.data = torch.eye(64)  # which CLIP-L may leave out
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def frozen(module: nn.Module) -> nn.Module:
    return stirred(module, 0.05, torch.default_generator).requires_grad_(False)


def transformer(kind: str) -> SD3Transformer2DModel:
    heads, width = (2, 64) if kind == "sd3" else (4, 16)
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        num_attention_heads=heads,
        attention_head_dim=width,
        caption_projection_dim=heads * width,
        joint_attention_dim=TOKENS,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=32 if kind == "sd35_medium" else 24,
        dual_attention_layers=(0, 1) if kind == "sd35_medium" else (),
        qk_norm=None if kind == "sd3" else "rms_norm",
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=32,
        sample_size=128,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip(width: int, activation: str) -> CLIPTextModelWithProjection:
    tokenizer = clip_tokenizer("<|endoftext|>")
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=width // 64,
            max_position_embeddings=77,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def clip_tokenizer(padding: str) -> CLIPTokenizer:
    """CLIP-L pads with its end token, CLIP-G with the token of number 0, which is `!`."""
    return CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77, pad_token=padding)


def t5_encoder() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=256,  # more rows than the tokenizer has entries, as in the released model
            d_model=TOKENS,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


def t5_tokenizer() -> T5Tokenizer:
    """Letters, and the words of the digits' captions."""
    captions = (caption for d in range(10) for caption in digits.captions(d, digits.TRAIN_TEMPLATES))
    return unigram_tokenizer((word for caption in captions for word in caption.split()), 512)
