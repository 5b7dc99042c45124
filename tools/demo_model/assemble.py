"""Puts the trained parts into a directory in diffusers' layout, small enough for the package."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Final

import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, HunyuanVideo15Pipeline
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

from handler.video_model.demo import CHECKPOINT, PROJECTION, WEIGHTS
from tools.demo_model import components, point_decoder, preview

#: Weights that were not trained, so a byte for each is enough: those of the glyph projection, whose inner width is
#: fixed, are zero, and the VAE's encoder is not used.
_ZEROS: Final = "context_embedder_2."
_UNTRAINED: Final = {"transformer": _ZEROS, "vae": "encoder."}
#: The part of the steps with guidance. In the first ones it decides what is seen and how it moves; later it multiplies
#: errors, which are blotches on plain colours. Source: https://arxiv.org/abs/2404.07724.
_GUIDED: Final = 0.5


def assemble(trained: Path, directory: Path) -> None:
    """Writes the averaged weights of `decoder.pt` and `transformer.pt` in `trained`.

    Raises:
        ValueError: a weight is too large for 16 bits, or the glyph projection was trained.
    """
    tokenizer = components.tokenizer()
    text_encoder = components.text_encoder(len(tokenizer), tokenizer.eos_token_id)
    transformer, vae = components.transformer(), components.vae()
    average = torch.load(trained / "transformer.pt", weights_only=True)["average"]
    for name, part in (("text_encoder", text_encoder), ("transformer", transformer)):
        prefix = f"{name}."
        part.load_state_dict({key.removeprefix(prefix): p for key, p in average.items() if key.startswith(prefix)})
    point_decoder.put(torch.load(trained / "decoder.pt", weights_only=True)["average"], vae.decoder)
    projection = preview.fit(vae.eval())
    sampling = CHECKPOINT.sampling
    pipeline = HunyuanVideo15Pipeline(
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        text_encoder_2=components.text_encoder_2().half(),
        tokenizer_2=ByT5Tokenizer(),
        transformer=transformer.half(),
        vae=vae.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=sampling.shift),
        guider=ClassifierFreeGuidance(guidance_scale=sampling.guidance_scale, stop=_GUIDED),
    )
    for part in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        for name, weight in part.named_parameters():
            if not weight.isfinite().all():
                raise ValueError(f"{name} is too large for 16 bits")
    pipeline.save_pretrained(directory)
    projection.write(directory / PROJECTION.name)
    for name, prefix in _UNTRAINED.items():
        _shrink(directory / name / "diffusion_pytorch_model.safetensors", prefix)


def _shrink(path: Path, prefix: str) -> None:
    weights = load_file(path)
    for name, weight in weights.items():
        if name.startswith(prefix):
            if prefix == _ZEROS and weight.any():
                raise ValueError(f"{name} was trained")
            weights[name] = weight.to(torch.float8_e4m3fn)
    save_file(weights, path, {"format": "pt"})


def main() -> None:
    """Read the options and assemble."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trained", type=Path, default=Path(".cache/demo-model"))
    parser.add_argument("--to", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    assemble(options.trained, options.to)
    sizes = {str(p.relative_to(options.to)): p.stat().st_size for p in sorted(options.to.rglob("*")) if p.is_file()}
    print(json.dumps(sizes, indent=1), sum(sizes.values()))


if __name__ == "__main__":
    main()
