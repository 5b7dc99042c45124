"""Numbers that the source's own code computed, for modules of it that the model uses through other classes.

They were made on 2026-11-25 with https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5 at commit 60783e7, in float32 on a
CPU with torch 2.13.0: its classes with the sizes, weights and inputs below (`tests/support/golden.py` makes them from
names), strictly loaded, then `digest` of the output. Its attention was PyTorch's scaled_dot_product_attention with its
mask in place of a compiled flex_attention. The licence of its code does not let it be part of this repository.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
from torch import nn

from handler.video_model.attention import NATIVE, use_mask_free_attention
from handler.weights.convert import convert_transformer
from tests.support.golden import digest, noise, weights
from tests.support.original_layout import original
from tests.support.small_models import upsampler_720p, upsampler_1080p

#: By what conditions the video: HunyuanVideo_1_5_DiffusionTransformer.
TRANSFORMER = {
    "text": [0.96306669, 1.94453621, 1.74469495, 0.07312020, -0.89908123, 0.39161226, 0.60029811],
    "image": [0.96318698, 1.95212448, 1.73103964, 0.03762128, -0.91728622, 0.36261442, 0.59074980],
    "meanflow": [1.02931301, 1.94370842, 2.11291575, 0.20172894, -1.18637156, -0.42522472, 1.05754507],
}
#: `decode` of latents, `encode` of an image and of nine frames: AutoencoderKLConv3D.
VAE = {
    "decode": [0.52314073, -0.05826895, -0.22697924, 0.40233922, 0.13985837, 0.08441710, 0.60923868],
    "image": [1.22402399, 1.34741187, -0.89465880, -0.90124196, 0.15451175, -0.30465510, -0.97490716],
    "video": [1.30201274, 1.29561483, -1.16528594, -1.30753708, -0.79815209, 1.74384761, -1.54041457],
}
#: SRTo720pUpsampler and SRTo1080pUpsampler.
UPSAMPLERS = {
    "720p": [0.83006329, -0.65410024, -0.75891864, 1.26428580, 0.24530849, -0.52924156, 0.66108668],
    "1080p": [0.63895124, 1.32657504, 0.01362604, -0.12253160, 0.96409726, 0.40951091, 0.05340111],
}


def named_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return weights({name: tensor.shape for name, tensor in module.state_dict().items()})


@pytest.mark.parametrize("mask_free", [False, True])
@pytest.mark.parametrize("kind", TRANSFORMER)
def test_a_converted_transformer_computes_what_the_source_does(kind: str, mask_free: bool) -> None:
    """With padded text, with and without words for ByT5, stock and with trimmed text in chunks."""
    # 1. Weights under the source's names, converted.
    model = HunyuanVideo15Transformer3DModel(
        in_channels=17,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        rope_axes_dim=(4, 6, 6),
        num_layers=2,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=32,
        text_embed_2_dim=1472,
        image_embed_dim=16,
        use_meanflow=kind == "meanflow",
    ).eval()
    published = {name: tensor.shape for name, tensor in original(model.state_dict()).items()}
    model.load_state_dict(convert_transformer(weights(published)), strict=True)
    if mask_free:
        use_mask_free_attention(model, NATIVE, chunk=17)
    # 2. One pass. Without an image the source hides tokens of zeros, and we leave them out.
    glyphs = 0 if kind == "image" else 3
    vision = 3 * noise("vision", 1, 7, 16) if kind == "image" else torch.zeros(1, 0 if mask_free else 7, 16)
    with torch.no_grad():
        (velocity,) = model(
            hidden_states=3 * noise("latents", 1, 17, 3, 4, 5),
            timestep=torch.tensor([637.5]),
            timestep_r=torch.tensor([412.25]) if kind == "meanflow" else None,
            encoder_hidden_states=3 * noise("text", 1, 9, 32),
            encoder_attention_mask=(torch.arange(9) < 6)[None].long(),
            encoder_hidden_states_2=3 * noise("glyphs", 1, 5, 1472),
            encoder_attention_mask_2=(torch.arange(5) < glyphs)[None].long(),
            image_embeds=vision,
            return_dict=False,
        )
    assert digest(velocity) == pytest.approx(TRANSFORMER[kind], abs=1e-5)


def test_the_vae_encodes_and_decodes_as_the_source_does() -> None:
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=8,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()
    vae.load_state_dict(named_weights(vae))
    with torch.no_grad():
        computed = {
            "decode": vae.decode(2 * noise("latents", 1, 8, 3, 4, 5)).sample,
            "image": vae.encode(2 * noise("image", 1, 3, 1, 32, 40)).latent_dist.mode(),
            "video": vae.encode(2 * noise("video", 1, 3, 9, 32, 40)).latent_dist.mode(),
        }
    for name, tensor in computed.items():
        assert digest(tensor) == pytest.approx(VAE[name], abs=1e-5), name


@pytest.mark.parametrize("kind", UPSAMPLERS)
def test_the_upsamplers_compute_what_the_source_does(kind: str) -> None:
    upsampler: nn.Module = upsampler_720p() if kind == "720p" else upsampler_1080p()
    upsampler.load_state_dict(named_weights(upsampler))
    with torch.no_grad():
        refined = upsampler(2 * noise("latents", 1, 8, 3, 4, 5))
    assert digest(refined) == pytest.approx(UPSAMPLERS[kind], abs=1e-5)
