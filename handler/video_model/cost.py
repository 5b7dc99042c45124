"""How long a video takes on a GPU: operations of every stage, in closed form, over what it reaches. Imports no torch.

An operation is a floating-point addition or multiplication. `tests/integration/handler/test_planning.py` compares
those of each stage with what the modules themselves perform on the meta device. The seconds are calculated: the peaks
are from data sheets, and the share of them that a GPU reaches is an assumption until `make bench-gpu` has measured it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from handler.video_model.dimensions import HALF, TRANSFORMER, VAE, Transformer, Vae
from handler.video_model.memory import WHOLE, tile_latents, tiles
from handler.video_model.workload import IMAGE_TOKENS, USUAL_TEXT, Stage, Workload

#: Parameters of Qwen's layers, which see the prompt padded to this many tokens; the embedding only looks up.
_QWEN: Final = 6_525_621_760
_QWEN_TOKENS: Final = 1108
_TERA: Final = 1e12


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: dense 16-bit TFLOP/s, memory in GB, and GB/s from pinned host memory.

    `share` of the peak is what a transformer pass reaches; 8-bit attention is `eight_bit` times as fast as 16-bit.
    """

    name: str
    tflops: float
    memory: float
    bus: float
    share: float = 0.6
    eight_bit: float = 2.0


#: Dense bf16 with accumulation in 32 bits, from NVIDIA's data sheets, which state twice these numbers where they assume
#: sparsity. PCIe 4.0 x16 reaches 25 GB/s, PCIe 5.0 x16 twice that. `share` is assumed: 0.6, or 0.5 where a power limit
#: (L40S) or the age of its kernels (B200) lets us expect less. `gpu_named` takes the first name that fits, so L40S
#: stands before L40.
GPUS: Final[Mapping[str, Gpu]] = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX4090", 165.2, 24, 25),
        Gpu("L40S", 362.05, 48, 25, share=0.5),
        Gpu("L40", 181.05, 48, 25),
        Gpu("A100", 312, 80, 25),
        Gpu("H100", 989.4, 80, 50),
        Gpu("H200", 989.4, 141, 50),
        Gpu("B200", 2250, 180, 50, share=0.5),
    )
}


@dataclass(frozen=True)
class Work:
    """Operations in attention kernels, whose 8-bit versions are faster, and all others."""

    attention: float = 0.0
    other: float = 0.0

    def __add__(self, added: Self) -> "Work":
        return Work(self.attention + added.attention, self.other + added.other)

    def __mul__(self, times: float) -> "Work":
        return Work(self.attention * times, self.other * times)

    @property
    def total(self) -> float:
        """All of them."""
        return self.attention + self.other


def pass_work(
    tokens: int, channels: int, text: tuple[int, int] = USUAL_TEXT, image: int = 0, model: Transformer = TRANSFORMER
) -> Work:
    """One pass of the transformer over latent `tokens`, a text's tokens of both encoders, and an `image`'s."""
    d, (words, glyphs) = model.width, text
    both = tokens + words + glyphs + image
    # 1. Blocks: query, key, value and output are 4 d^2, the feed-forward is 8 d^2, and the modulation 6 d^2 a stream.
    blocks = Work(4 * both**2 * d, 2 * 12 * both * d**2 + 2 * 2 * 6 * d**2) * model.layers
    # 2. What latents enter and leave through.
    latents = Work(0, 2 * tokens * d * (channels + model.latent_channels))
    # 3. What prepares the text: the refiner with its own attention, a projection of glyphs, one of an image.
    refiner = Work(4 * words**2 * d, 2 * 12 * words * d**2) * model.refiner_layers
    projections = 2 * words * model.text_width * d
    projections += 2 * glyphs * model.glyph_hidden * (model.glyph_width + model.glyph_hidden + d)
    projections += 2 * image * model.image_width * (model.image_width + d)
    return blocks + latents + refiner + Work(0, projections)


def stage_work(stage: Stage, *, from_image: bool) -> Work:
    """All passes of a stage. The upsampler before it is under a thousandth of them."""
    image = IMAGE_TOKENS if from_image else 0
    one_step = sum((pass_work(tokens, stage.channels, image=image) for tokens in stage.windows), Work())
    return one_step * (stage.passes / len(stage.windows))


def decode_work(latents: tuple[int, int, int], model: Vae = VAE) -> Work:
    """The decoder over latents of (frames, height, width), as one tile.

    The first latent frame is one frame of every level, and every other one is two and then four.
    """
    frames, pixels = latents[0], latents[1] * latents[2]
    first, last = model.channels[0], model.channels[-1]
    values = frames * pixels
    # 1. Into the decoder, and its middle: two residual blocks, and attention to this frame and all before it.
    convolutions = values * (model.latent_channels * first + 4 * first**2) * 27 + values * 4 * first**2
    attention = 4 * first * pixels**2 * frames * (frames + 1) // 2
    # 2. Each level: residual blocks, and an upsampler, which computes its result's channels before it unpacks them.
    for level, width in enumerate(model.channels):
        convolutions += model.resnets * 2 * width**2 * 27 * frames * pixels
        if level < len(model.channels) - 1:
            convolutions += width * model.channels[level + 1] * model.unpacked(level) * 27 * frames * pixels
            frames = 2 * frames - 1 if model.unpacked(level) == 8 else frames
            pixels *= 4
    # 3. Out of it.
    return Work(attention, 2.0 * (convolutions + last * 3 * 27 * frames * pixels))


def prompt_work() -> Work:
    """Both text encoders; ByT5 is a hundredth of Qwen."""
    return Work(0, 2.0 * _QWEN * _QWEN_TOKENS)


@dataclass(frozen=True)
class Speed:
    """What a GPU reaches: operations a second, and bytes a second from host memory for weights that are streamed."""

    attention: float
    other: float
    bus: float

    @classmethod
    def of(cls, gpu: Gpu, *, share: float | None = None, eight_bit: bool = False) -> Self:
        """`share` of the peak replaces the assumed one; `eight_bit` attention as SageAttention computes it."""
        reached = gpu.tflops * _TERA * (share if share is not None else gpu.share)
        return cls(reached * (gpu.eight_bit if eight_bit else 1.0), reached, gpu.bus * 1e9)

    def seconds(self, work: Work) -> float:
        """Seconds of computation."""
        return work.attention / self.attention + work.other / self.other


def render_seconds(
    video: Workload, speed: Speed, *, streamed: bool = False, tile: int = WHOLE, gpus: int = 1
) -> Mapping[str, float]:
    """Seconds of each stage, by the names of `contract.result.Stage`. Encoding to MP4 runs beside decoding.

    With `streamed` transformers, a pass takes at least as long as the copy of the weights to the GPU. Tiles of the VAE
    overlap, so that it decodes more pixels. Several `gpus` share the transformers' passes, each with a bus of its own;
    what they exchange is not counted.
    """
    copy = TRANSFORMER.parameters(video.stages[0].channels, meanflow=False) * HALF / speed.bus if streamed else 0.0

    def denoising(stage: Stage) -> float:
        return max(speed.seconds(stage_work(stage, from_image=video.from_image)) / gpus, stage.passes * copy)

    base, *upscalers = video.stages
    again = tiles(video, tile) * tile_latents(video, tile) / tile_latents(video, WHOLE)
    return {
        "encoding_prompt": speed.seconds(prompt_work()),
        "denoising": denoising(base),
        "upscaling": sum(map(denoising, upscalers)),
        "decoding": speed.seconds(decode_work(video.stages[-1].latents)) * again,
    }


def gpu_named(name: str) -> Gpu | None:
    """The data sheet of the GPU with this name, as CUDA or a user says it: "NVIDIA GeForce RTX 4090", "h100"."""
    plain = name.replace(" ", "").replace("-", "").upper()
    return next((gpu for gpu in GPUS.values() if gpu.name in plain), None)
