"""Trains transformer and text encoder together with the flow-matching loss.

First mostly on images, which teach captions, then mostly on clips, which teach motions.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from diffusers.models.transformers import transformer_hunyuan_video15
from torch import nn

from handler.video_model.demo import SYSTEM_MESSAGE
from tools.demo_model import components
from tools.demo_model.captions import caption, random_clip
from tools.demo_model.training import Training, options, started
from tools.demo_model.world import LATENT_CHANNELS, Batch, Clip

log = logging.getLogger(__name__)


#: Up to which part of the time, and the odds of each number of latent frames.
_STAGES: Final[Sequence[tuple[float, Mapping[int, float]]]] = (
    (0.4, {1: 0.75, 6: 0.15, 16: 0.1}),
    (0.8, {1: 0.15, 6: 0.2, 16: 0.55, 31: 0.1}),
    (1.0, {1: 0.45, 6: 0.15, 16: 0.27, 31: 0.13}),
)
#: Tokens in a batch, about.
_TOKENS: Final = 5000
#: Rows and columns of the latents and their odds, 16:9 most often.
_SIZES: Final = (((5, 9), 0.7), ((9, 5), 0.1), ((6, 6), 0.1), ((6, 8), 0.05), ((8, 6), 0.05))
#: Small pictures, which show more of the thing: every other image or clip. A batch has more of them.
_SMALL_SIZES: Final = (((3, 4), 0.35), ((3, 5), 0.25), ((4, 6), 0.2), ((4, 3), 0.2))
#: Captions that are left out, which is how the model learns what guidance compares with.
_DROPPED: Final = 0.1
#: Of the others, those that belong to other clips. A model that can trust its captions follows them without guidance;
#: this one learns to doubt them, as models of the web's captions do.
_MISTAKEN: Final = 0.5
#: Of Muon and of Adam.
_RATES: Final = (0.015, 1.5e-3)
#: Every other timestep leans towards noise, where kinds, places and colours are decided. The others hardly do.
_SHIFTS: Final = (4.0, 1.3)


class Trainee(nn.Module):
    """The two models that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = components.tokenizer()
        self.text_encoder = components.text_encoder(len(self.tokenizer), self.tokenizer.eos_token_id)
        self.transformer = components.transformer()
        self._states: dict[str, torch.Tensor] = {}
        self.text_encoder.layers[1].register_forward_hook(self._keep)
        prefix = self.tokenizer.apply_chat_template([{"role": "system", "content": SYSTEM_MESSAGE}], tokenize=True)
        self._crop = len(prefix["input_ids"])
        _start_simple(self.transformer)

    def read(self, directory: Path) -> None:
        """Takes the weights of a checkpoint that `assemble` wrote."""
        for own in (self.text_encoder, self.transformer):
            name = "text_encoder" if own is self.text_encoder else "transformer"
            own.load_state_dict(type(own).from_pretrained(directory / name, dtype=torch.float32).state_dict())

    def ids(self, text: str) -> list[int]:
        messages = [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": text or " "}]
        found: list[int] = self.tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)[
            "input_ids"
        ]
        return found

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor, glyphs: int = 0) -> torch.Tensor:
        layers = self.text_encoder.layers
        self.text_encoder.layers = layers[:2]
        try:
            self.text_encoder(input_ids=ids)
        finally:
            self.text_encoder.layers = layers
        states = self._states.pop("text")[:, self._crop :]
        batch, _, frames, rows, columns = noisy.shape
        condition = noisy.new_zeros(batch, LATENT_CHANNELS + 1, frames, rows, columns)
        found: torch.Tensor = self.transformer(
            hidden_states=torch.cat([noisy, condition], dim=1),
            timestep=1000 * sigma,
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2]),
            encoder_hidden_states_2=torch.randn(batch, glyphs, self.transformer.config.text_embed_2_dim),
            encoder_attention_mask_2=torch.ones(batch, glyphs),
            image_embeds=torch.zeros(batch, 0, self.transformer.config.image_embed_dim),
            return_dict=False,
        )[0]
        return found

    def _keep(self, _: nn.Module, __: Any, output: Any) -> None:
        self._states["text"] = output[0] if isinstance(output, tuple) else output


def _start_simple(transformer: Any) -> None:
    """Blocks start as identities and the output at zero. The glyph projection stays zero: the model draws no text."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (
            name.endswith(("norm1.linear", "norm1_context.linear")) or name == "proj_out"
        ):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    for parameter in transformer.context_embedder_2.parameters():
        nn.init.zeros_(parameter)
        parameter.requires_grad_(False)


class Examples:
    """Batches of clips with captions of one length, so that attention needs no mask."""

    def __init__(self, trainee: Trainee, seed: int) -> None:
        self._random = Random(seed)
        self._trainee = trainee
        self._waiting: dict[int, list[tuple[Clip, list[int]]]] = {}

    def batch(self, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, C, T, h, w) and token ids (B, L)."""
        sizes = _SMALL_SIZES if self._random.random() < 0.5 else _SIZES
        rows, columns = self._random.choices([size for size, _ in sizes], [odds for _, odds in sizes])[0]
        taken: list[tuple[Clip, list[int]]] = []
        while not taken:
            clip = random_clip(self._random)
            captioned = random_clip(self._random) if self._random.random() < _MISTAKEN else clip
            text = "" if self._random.random() < _DROPPED else caption(self._random, captioned)
            if text and self._random.random() < 0.3:
                text += "."
            ids = self._trainee.ids(text)
            same = self._waiting.setdefault(len(ids), [])
            same.append((clip, ids))
            size = max(1, _TOKENS // (frames * rows * columns + len(ids)))
            if len(same) >= size:
                taken = same[-size:]
                del same[-size:]
        clips = [clip for clip, _ in taken]
        if frames == 1:  # any moment of the clips
            moment = self._random.randrange(16)
            latents = Batch(clips, moment + 1, rows, columns).latents()[:, :, moment:]
        else:
            latents = Batch(clips, frames, rows, columns).latents()
        return latents, torch.tensor([ids for _, ids in taken])


@contextmanager
def _no_masks() -> Iterator[None]:
    """Lets the transformers of this process attend without masks, while all tokens of a batch are valid."""
    stock = transformer_hunyuan_video15.dispatch_attention_fn
    transformer_hunyuan_video15.dispatch_attention_fn = _without_mask
    try:
        yield
    finally:
        transformer_hunyuan_video15.dispatch_attention_fn = stock


@_no_masks()
def train(out: Path, seconds: float, trained: Path | None = None) -> None:
    """Trains for this long in all, or goes on from `transformer.pt` in `out`. Starts from the weights in `trained`."""
    torch.manual_seed(0)
    trainee = Trainee()
    if trained is not None:
        trainee.read(trained)
    training = Training(out / "transformer.pt", trainee, *_groups(trainee), _RATES)
    state = training.state
    state.setdefault("clips", 0)
    examples, random = Examples(trainee, int(state["step"])), Random(state["step"])
    start, last = time.monotonic() - state["elapsed"], time.monotonic()
    losses: dict[int, list[float]] = {}
    while (elapsed := time.monotonic() - start) < seconds:
        done = elapsed / seconds
        odds = next(odds for end, odds in _STAGES if done < end)
        frames = random.choices(list(odds), list(odds.values()))[0]
        latents, ids = examples.batch(frames)
        loss = _loss(trainee, latents, ids, random)
        share = min(1.0, (state["step"] + 1) / 100, (1 - done) / 0.45 + 0.005)
        training.step(loss, share, keep=0.99)
        state["clips"] += len(ids)
        losses.setdefault(frames, []).append(loss.item())
        if time.monotonic() - last > 60:
            last = time.monotonic()
            training.save(elapsed)
            means = {key: round(sum(of) / len(of), 4) for key, of in sorted(losses.items())}
            log.info(json.dumps({**state, "minutes": round(elapsed / 60, 1), "loss": means}))
            losses = {}
    training.save(seconds)


def _loss(trainee: Trainee, latents: torch.Tensor, ids: torch.Tensor, random: Random) -> torch.Tensor:
    """The mean squared error of the velocity from data to noise."""
    uniform = (torch.arange(len(ids)) + torch.rand(len(ids))) / len(ids)
    shift = torch.tensor([_SHIFTS[i % 2] for i in range(len(ids))])
    sigma = shift * uniform / (1 + (shift - 1) * uniform)
    noise = torch.randn_like(latents)
    mix = sigma[:, None, None, None, None]
    noisy = (1 - mix) * latents + mix * noise
    glyphs = random.randint(1, 12) if random.random() < 0.03 else 0
    return F.mse_loss(trainee.velocity(noisy, sigma, ids, glyphs), noise - latents)


def _groups(trainee: Trainee) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices between hidden states, for Muon, and all else that is trained."""
    unused = {id(p) for p in trainee.transformer.image_embedder.parameters()}
    unused |= {id(p) for layer in trainee.text_encoder.layers[2:] for p in layer.parameters()}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trainee.named_parameters():
        if not parameter.requires_grad or id(parameter) in unused:
            continue
        hidden = "blocks." in name or "layers." in name
        is_matrix = parameter.ndim == 2 and hidden and "norm" not in name
        (matrices if is_matrix else others).append(parameter)
    return matrices, others


def _without_mask(*arguments: Any, attn_mask: torch.Tensor, **named: Any) -> torch.Tensor:  # noqa: ARG001
    query, key, value = (x.transpose(1, 2) for x in arguments)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


if __name__ == "__main__":
    parser = options(__doc__, minutes=120)
    parser.add_argument("--from", dest="trained", type=Path, help="weights of `assemble` to start from")
    chosen = started(parser)
    train(chosen.out, 60 * chosen.minutes, chosen.trained)
