"""A complete HunyuanVideo15Pipeline with random weights, for tests and dry runs: tiny, and built in no time.

Every component has the class of the real checkpoint. The decoder's weights blur, so that neighbouring pixels and frames
are alike, as in a video.
"""

from typing import Final

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
)

from handler.video_model.catalog import Checkpoint, Sampling

#: Renders 128x72 for 16:9, which has the area of a square of 96 pixels.
CHECKPOINT: Final = Checkpoint("random", 96, Sampling(num_inference_steps=16, shift=5.0, guidance_scale=6.0))

_WEIGHTS_SEED: Final = 2
_LATENT_CHANNELS: Final = 8
_TEXT_DIM: Final = 32
_TEXT_2_DIM: Final = 16
_ENDOFTEXT: Final = "<|endoftext|>"
_CHAT_TOKENS: Final = ["<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
_SYSTEM_MESSAGE: Final = "Describe the video."
#: A token is a byte. The stock pipeline pads each prompt to this length, which takes most of the time of a small model.
_PROMPT_TOKENS: Final = 256


def build_pipeline() -> HunyuanVideo15Pipeline:
    """Builds the pipeline, with the same weights each time."""
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_WEIGHTS_SEED)
        pipeline = HunyuanVideo15Pipeline(
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel(
                T5Config(vocab_size=384, d_model=_TEXT_2_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
            ),
            tokenizer_2=ByT5Tokenizer(),
            transformer=_transformer(),
            vae=_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            guider=ClassifierFreeGuidance(),
        )
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()  # as `from_pretrained` does; T5 has dropout
    pipeline.system_message = _SYSTEM_MESSAGE
    prefix = tokenizer.apply_chat_template([{"role": "system", "content": _SYSTEM_MESSAGE}], tokenize=True)["input_ids"]
    pipeline.prompt_template_encode_start_idx = len(prefix)
    pipeline.tokenizer_max_length = _PROMPT_TOKENS
    return pipeline


def _tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer with the 256 bytes as its vocabulary."""
    symbols = [*sorted(ByteLevel.alphabet()), _ENDOFTEXT, *_CHAT_TOKENS]
    tokenizer = Qwen2Tokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": _CHAT_TOKENS})
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLTextModel:
    heads = 2
    half_head_dim = _TEXT_DIM // heads // 2
    config = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_DIM,
        intermediate_size=2 * _TEXT_DIM,
        num_hidden_layers=3,  # the pipeline reads the third state from the end
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [half_head_dim // 4, half_head_dim // 4, half_head_dim // 2],
        },
    )
    return Qwen2_5_VLTextModel(config)


def _transformer() -> HunyuanVideo15Transformer3DModel:
    return HunyuanVideo15Transformer3DModel(
        in_channels=2 * _LATENT_CHANNELS + 1,  # latents | condition | its mask
        out_channels=_LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        rope_axes_dim=(4, 6, 6),
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=_TEXT_DIM,
        text_embed_2_dim=_TEXT_2_DIM,
        image_embed_dim=16,
        task_type="t2v",
    )


def _vae() -> AutoencoderKLHunyuanVideo15:
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=_LATENT_CHANNELS,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    _blur(vae)
    return vae


@torch.no_grad()
def _blur(vae: AutoencoderKLHunyuanVideo15) -> None:
    """Makes each convolution of the decoder a box blur that mixes channels.

    An upsampler unpacks groups of channels into neighbouring pixels, and its shortcut does the same with its input
    channels. Equal groups therefore give equal neighbours, so the output channels repeat after an eighth of them. The
    last level unpacks nothing and needs no repetition.
    """
    decoder = vae.decoder
    last_level = (f"up_blocks.{len(decoder.up_blocks) - 1}.", "conv_out.")
    for name, conv in decoder.named_modules():
        if not isinstance(conv, torch.nn.Conv3d):
            continue
        channels_out, channels_in, *taps = conv.weight.shape
        period = channels_out if name.startswith(last_level) else channels_out // 8
        mix = torch.randn(period, channels_in, 1, 1, 1)
        mix -= mix.mean(dim=1, keepdim=True)  # without this, SiLU's positive mean gives every pixel the same colour
        box = mix.expand(-1, -1, *taps) / (channels_in**0.5 * torch.Size(taps).numel())
        conv.weight.copy_(box.repeat(channels_out // period, 1, 1, 1, 1))
        if conv.bias is not None:
            conv.bias.zero_()
    # The first shortcut repeats each latent channel over several neighbours; subtract it again.
    first = decoder.conv_in.conv.weight
    for channel in range(first.shape[0]):
        first[channel, channel * first.shape[1] // first.shape[0], -1, 1, 1] -= 1
