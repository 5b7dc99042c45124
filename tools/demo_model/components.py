"""The demo model's parts before training: HunyuanVideo-1.5's classes in small."""

from __future__ import annotations

from typing import Final

from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, Qwen2Tokenizer, T5Config, T5EncoderModel

from handler.video_model.demo import SYSTEM_MESSAGE, read_words
from tools.demo_model.scenes import CELL
from tools.demo_model.words import vocabulary
from tools.demo_model.world import LATENT_CHANNELS, TEMPORAL

TEXT_DIM: Final = 128
_TEXT_2_DIM: Final = 16
_SPACE: Final = "Ġ"  # ByteLevel's sign for a space
_ENDOFTEXT: Final = "<|endoftext|>"
_CHAT_TOKENS: Final = ["<|im_start|>", "<|im_end|>"]
#: Shorter than Qwen's: every token of it costs time in training. A space before each text lets its first word be known.
_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|> {{ message.content }}<|im_end|>{% endfor %}<|im_start|>"
)


def tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer whose merges build the words of the world, each after a space, from its letters.

    A word that is not known becomes the longest known beginning and single bytes.
    """
    symbols = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    for word in [*vocabulary(), *SYSTEM_MESSAGE.lower().split()]:
        for end in range(1, len(word) + 1):
            merged = _SPACE + word[:end]
            if merged not in symbols:
                symbols[merged] = len(symbols)
                merges.append((_SPACE + word[: end - 1], word[end - 1]))
    for token in (_ENDOFTEXT, *_CHAT_TOKENS):
        symbols[token] = len(symbols)
    built = Qwen2Tokenizer(vocab=symbols, merges=merges)
    built.add_special_tokens({"additional_special_tokens": _CHAT_TOKENS})
    built.chat_template = _CHAT_TEMPLATE
    read_words(built)
    return built


def text_encoder(tokens: int, end_of_text: int) -> Qwen2_5_VLTextModel:
    """The pipeline reads the third state from the end: that of the second layer."""
    heads = 4
    half_head_dim = TEXT_DIM // heads // 2
    return Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=tokens,
            hidden_size=TEXT_DIM,
            intermediate_size=2 * TEXT_DIM,
            num_hidden_layers=4,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=end_of_text,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [half_head_dim // 4, half_head_dim // 4, half_head_dim // 2],
            },
        )
    )


def text_encoder_2() -> T5EncoderModel:
    """Untrained: the demo model draws no text."""
    return T5EncoderModel(T5Config(vocab_size=384, d_model=_TEXT_2_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def transformer() -> HunyuanVideo15Transformer3DModel:
    """Six blocks of 128 channels."""
    return HunyuanVideo15Transformer3DModel(
        in_channels=2 * LATENT_CHANNELS + 1,  # latents | condition | its mask
        out_channels=LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=32,
        rope_axes_dim=(8, 12, 12),
        num_layers=6,
        num_refiner_layers=1,
        mlp_ratio=4.0,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=_TEXT_2_DIM,
        image_embed_dim=16,
        task_type="t2v",
    )


def vae() -> AutoencoderKLHunyuanVideo15:
    """Its encoder is untrained: text to video does not call it."""
    return AutoencoderKLHunyuanVideo15(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 32, 64, 64, 64),
        layers_per_block=1,
        spatial_compression_ratio=CELL,
        temporal_compression_ratio=TEMPORAL,
        scaling_factor=1.0,
    )
