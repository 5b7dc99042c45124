"""LoRA adapters change a render as PEFT's own layers do, and leave nothing behind. What is no adapter is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch._dynamo.utils import counters

from benchmarks import random_model
from contract.job import JobInput
from contract.lora import Lora
from handler.settings import Approximation, WorkerSettings
from handler.video_model import lora_files
from handler.video_model.approximations import Fp8Linear, approximate
from handler.video_model.attention import NATIVE, use_mask_free_attention
from handler.video_model.base import AdapterError, Frames, ModelLoadError, RenderCancelledError
from handler.video_model.compilation import compile_blocks
from handler.video_model.demo import load_pipeline
from handler.video_model.generate import PipelineModel
from handler.video_model.loader import load_model
from handler.video_model.lora import applied, bytes_of, combined
from handler.video_model.lora_files import LoraFiles, linear_layers
from handler.video_model.memory import SMALLEST, Budget, DoesNotFitError, Part, Placement, Weights, peak
from handler.video_model.placement import place
from tests.support.full import full
from tests.support.original_layout import BACK

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT, of two adapters

CPU = torch.device("cpu")
#: Less than the tokens of a video.
CHUNK = 50
ATTENTION = r".*transformer_blocks\.\d\.attn\.to_[qkv]$"
#: PEFT finds the weights of an adapter by its name anywhere in a key.
NAMES = ("film", "anime", "noir")
QUERY = "transformer_blocks.0.attn.to_q"


def plain() -> HunyuanVideo15Transformer3DModel:
    transformer: HunyuanVideo15Transformer3DModel = random_model.build_pipeline().transformer
    return transformer


EVERY_LAYER = list(linear_layers(plain()))
IN_BLOCKS = [name for name in EVERY_LAYER if name.startswith("transformer_blocks.")]


def ours() -> HunyuanVideo15Transformer3DModel:
    transformer = plain()
    use_mask_free_attention(transformer, NATIVE, chunk=CHUNK)
    return transformer


def with_peft(
    *configs: dict[str, Any], transformer: HunyuanVideo15Transformer3DModel | None = None
) -> HunyuanVideo15Transformer3DModel:
    """A transformer of diffusers with a random adapter of PEFT for each configuration, called as in NAMES."""
    adapted = plain() if transformer is None else transformer
    for name, config in zip(NAMES, configs, strict=False):
        adapted.add_adapter(LoraConfig(**{"lora_alpha": 6, "target_modules": EVERY_LAYER, **config}), name)
        generator = torch.Generator().manual_seed(len(name))
        for module in adapted.modules():
            if isinstance(module, LoraLayer) and name in module.lora_B:
                for weight in (module.lora_A[name].weight, module.lora_B[name].weight):
                    weight.data = torch.randn(weight.shape, generator=generator) / 4
    adapted.eval()
    return adapted


def save(adapted: HunyuanVideo15Transformer3DModel, directory: Path) -> LoraFiles:
    """The files of all its adapters, written by diffusers."""
    for name in adapted.peft_config:
        adapted.save_lora_adapter(directory, name, weight_name=f"{name}.safetensors")
    return LoraFiles(directory)


def video(transformer: HunyuanVideo15Transformer3DModel, text: int = 6) -> torch.Tensor:
    """The velocity of one pass over random latents."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    arguments: dict[str, Any] = {
        "hidden_states": noise(transformer.config.in_channels, 4, 5, 6),
        "timestep": torch.tensor([300.0]),
        "encoder_hidden_states": noise(text, transformer.config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, text),
        "encoder_hidden_states_2": noise(4, transformer.config.text_embed_2_dim),
        "encoder_attention_mask_2": torch.ones(1, 4),
        "image_embeds": torch.zeros(1, 0, transformer.config.image_embed_dim),
    }
    with transformer.cache_context("test"):
        result: torch.Tensor = transformer(**arguments).sample
    return result


def passed(transformer: HunyuanVideo15Transformer3DModel) -> torch.Tensor:
    with torch.no_grad():
        return video(transformer)


def passed_with(
    files: LoraFiles, transformer: HunyuanVideo15Transformer3DModel, scales: dict[str, float]
) -> torch.Tensor:
    adapters = [(files.read(name, transformer), scale) for name, scale in scales.items()]
    with applied(combined(adapters, transformer), transformer, CPU):
        return passed(transformer)


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()
    counters.clear()


def streamed(transformer: HunyuanVideo15Transformer3DModel) -> None:
    place(transformer, Placement.STREAMED, "block_level", CPU)


def cached(transformer: HunyuanVideo15Transformer3DModel) -> None:
    approximate([transformer], {Approximation.FIRST_BLOCK_CACHE}, many_steps=[transformer])


@pytest.mark.parametrize("prepare", [lambda _: None, full(streamed), cached], ids=["resident", "streamed", "cached"])
@pytest.mark.parametrize("config", [full({"r": 4}), {"r": 1, "target_modules": ATTENTION, "use_rslora": True}])
def test_an_adapter_changes_the_output_as_peft_does_and_leaves_nothing_behind(
    prepare: Callable[[HunyuanVideo15Transformer3DModel], None], config: dict[str, Any], tmp_path: Path
) -> None:
    reference = with_peft(config)
    files, transformer = save(reference, tmp_path), ours()
    prepare(transformer)
    before = passed(transformer)
    assert largest_difference(passed(reference), before) > 1e-2
    assert largest_difference(passed_with(files, transformer, {"film": 1.0}), passed(reference)) < 1e-5
    assert torch.equal(passed(transformer), before)


@pytest.mark.parametrize("prepare", [full(lambda _: None), streamed], ids=["resident", "streamed"])
def test_two_adapters_add_up_each_with_its_scale(
    prepare: Callable[[HunyuanVideo15Transformer3DModel], None], tmp_path: Path
) -> None:
    reference = with_peft({"r": 4}, {"r": 3, "target_modules": ATTENTION})
    files, transformer = save(reference, tmp_path), ours()
    prepare(transformer)
    reference.set_adapters(["film", "anime"], weights=[0.5, -1.5])
    found = passed_with(files, transformer, {"film": 0.5, "anime": -1.5})
    assert largest_difference(found, passed(reference)) < 1e-5
    reference.set_adapters(["film"], weights=[0.5])
    assert largest_difference(found, passed(reference)) > 1e-2


@pytest.mark.full
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks_compute_as_peft_does_and_no_set_of_adapters_compiles_them_again(
    backend: str, tmp_path: Path
) -> None:
    """Both make the graphs and guards that inductor compiles; `aot_eager` also replaces operations in place."""
    reference = with_peft({"r": 4}, {"r": 3, "target_modules": ATTENTION}, {"r": 1, "target_modules": ["ff.net.2"]})
    files, transformer = save(reference, tmp_path), ours()
    assert compile_blocks([transformer], backend=backend, loras=True)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 8, "before and after attention, for latent and for text tokens, with and without adapters"
    before = passed(transformer)
    with torch.compiler.set_stance("fail_on_recompile"):
        for names in ("film",), ("anime",), ("noir",), ("film", "anime"), NAMES:
            reference.set_adapters(list(names), weights=[0.5] * len(names))
            found = passed_with(files, transformer, dict.fromkeys(names, 0.5))
            assert largest_difference(found, passed(reference)) < 1e-5
            assert torch.equal(passed(transformer), before)
    assert counters["stats"]["unique_graphs"] == graphs


def test_layers_in_8_bits_take_adapters_in_full_precision(tmp_path: Path) -> None:
    transformer, rounded = ours(), plain()
    approximate([transformer], {Approximation.FP8_WEIGHTS})
    for name, layer in transformer.named_modules():
        if isinstance(layer, Fp8Linear):
            linear = rounded.get_submodule(name)
            linear.weight.data = layer.weight.to(torch.float32) * layer.scale
    reference = with_peft({"r": 4}, transformer=rounded)
    files = save(reference, tmp_path)
    assert largest_difference(passed_with(files, transformer, {"film": 1.0}), passed(reference)) < 1e-5


def original_name(module: str) -> str:
    name = f"{module}."
    for pattern, replacement in BACK:
        name = re.sub(pattern, replacement, name)
    return name.removesuffix(".")


def comfyui_name(module: str) -> str:
    name = original_name(module).replace("_mlp.fc1", "_mlp.0").replace("_mlp.fc2", "_mlp.2")
    return name.replace("_attn_", "_attn.").replace("_mod.linear", "_mod.lin")


#: What trainers make of the name of a layer, and what they call the two matrices.
LAYOUTS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "a pipeline of diffusers": (lambda name: f"transformer.{name}", "lora_A", "lora_B"),
    "PEFT": (lambda name: f"base_model.model.{name}", "lora_A.default", "lora_B.default"),
    "the original's names": (lambda name: f"diffusion_model.{original_name(name)}", "lora_A", "lora_B"),
    "musubi-tuner": (lambda name: f"lora_unet_{original_name(name).replace('.', '_')}", "lora_down", "lora_up"),
    "ComfyUI's names": (lambda name: f"diffusion_model.{comfyui_name(name)}", "lora_A", "lora_B"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_names_of_every_trainer_are_read(layout: str, tmp_path: Path) -> None:
    names = [name for name in IN_BLOCKS if not (layout == "ComfyUI's names" and re.search("attn.(to|add)_[qkv]", name))]
    reference = with_peft({"r": 4, "target_modules": names})
    rename, down, up = LAYOUTS[layout]
    state: dict[str, torch.Tensor] = {}
    for name in names:
        layer: Any = reference.get_submodule(name)
        state[f"{rename(name)}.{down}.weight"] = layer.lora_A["film"].weight.data
        state[f"{rename(name)}.{up}.weight"] = layer.lora_B["film"].weight.data
        state[f"{rename(name)}.alpha"] = torch.tensor(6.0)
    save_file(state, tmp_path / "a.safetensors")
    assert largest_difference(passed_with(LoraFiles(tmp_path), ours(), {"a": 1.0}), passed(reference)) < 1e-5


@pytest.mark.parametrize(
    ("module", "layers"),
    [
        ("double_blocks.1.img_attn.qkv", [f"transformer_blocks.1.attn.to_{part}" for part in "qkv"]),
        ("double_blocks.1.txt_attn_qkv", [f"transformer_blocks.1.attn.add_{part}_proj" for part in "qkv"]),
        (
            "txt_in.individual_token_refiner.blocks.0.self_attn_qkv",
            [f"context_embedder.token_refiner.refiner_blocks.0.attn.to_{part}" for part in "qkv"],
        ),
        ("final_layer.adaLN_modulation.1", ["norm_out.linear"]),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_modules_that_diffusers_splits_or_reorders_are_read(
    module: str, layers: list[str], flat: bool, tmp_path: Path
) -> None:
    """Without alpha, it is the rank."""
    # A list would name endings, and a block of the refiner has a layer with the same ending.
    reference = with_peft({"r": 4, "lora_alpha": 4, "target_modules": "|".join(map(re.escape, layers))})
    made: list[Any] = [reference.get_submodule(name) for name in layers]
    down, ups = made[0].lora_A["film"].weight.data, [layer.lora_B["film"].weight.data for layer in made]
    for layer in made:
        layer.lora_A["film"].weight.data = down
    if len(ups) == 1:
        ups = list(ups[0].chunk(2)[::-1])
    name = f"lora_unet_{module.replace('.', '_')}" if flat else f"diffusion_model.{module}"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": torch.cat(ups)}, tmp_path / "a.safetensors")
    found = passed_with(LoraFiles(tmp_path), ours(), {"a": 1.0})
    assert largest_difference(found, passed(reference)) < 1e-5
    assert largest_difference(found, passed(plain())) > 1e-4


def matrices(module: str, out: int = 32, into: int = 32, rank: int = 2) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": torch.ones(rank, into), f"{module}.lora_B.weight": torch.ones(out, rank)}


DORA = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True, "transformer.lora_alpha": 2})}


@pytest.mark.parametrize(
    ("state", "metadata", "says"),
    [
        (
            matrices(QUERY, out=64),
            {},
            rf"is of another model: {QUERY} has the shape \(32, 32\), the adapter's is \(64, 32\)",
        ),
        (matrices(QUERY, into=2048), {}, "is of another model"),
        (matrices("double_blocks.0.img_attn.qkv", out=95), {}, "is of another model"),
        (
            matrices("transformer_blocks.53.attn.to_q"),
            {},
            "is of another model, this one has no linear layer transformer_blocks.53.attn.to_q",
        ),
        (
            matrices("single_blocks.0.linear1"),
            {},
            "is of another model, this one has no linear layer single_blocks.0.linear1",
        ),
        (
            matrices("transformer_blocks.0.attn.norm_q"),
            {},
            "is of another model, this one has no linear layer transformer_blocks.0.attn.norm_q",
        ),
        (matrices("x_embedder.proj"), {}, "is of another model, this one has no linear layer x_embedder.proj"),
        (matrices(QUERY) | matrices("double_blocks.0.img_attn_q"), {}, f"has two updates for {QUERY}"),
        ({f"{QUERY}.lora_A.weight": torch.ones(2, 32)}, {}, "lacks one of the two matrices"),
        (matrices(QUERY) | {f"{QUERY}.lora_A.weight": torch.ones(3, 32)}, {}, "has matrices of"),
        (matrices(QUERY) | {f"{QUERY}.lora_A.weight": torch.ones(2, 32, dtype=torch.int8)}, {}, "has matrices of"),
        (matrices(QUERY) | {f"{QUERY}.alpha": torch.ones(2)}, {}, "has matrices of"),
        (matrices(QUERY) | {f"{QUERY}.diff_b": torch.ones(32)}, {}, "has weights that are not of a LoRA: .*diff_b"),
        ({f"{QUERY}.weight": torch.ones(32, 32)}, {}, "has weights that are not of a LoRA: "),
        ({}, {}, "is empty"),
        (matrices(QUERY), DORA, "is a DoRA adapter"),
        (matrices(QUERY), {"lora_adapter_metadata": "{"}, "has metadata that is not a configuration"),
        (matrices(QUERY), {"lora_adapter_metadata": "[1]"}, "has metadata that is not a configuration"),
    ],
)
def test_a_file_that_is_no_adapter_of_this_model_is_refused_saying_why(
    state: dict[str, torch.Tensor], metadata: dict[str, str], says: str, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "a.safetensors", metadata=metadata or None)
    with pytest.raises(AdapterError, match=f'^loras: the adapter "a" {says}'):
        LoraFiles(tmp_path).read("a", ours())


def test_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    torch.save(matrices(QUERY), tmp_path / "renamed.safetensors")
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    torch.save(matrices(QUERY), tmp_path / "plain.pt")
    files = LoraFiles(tmp_path)
    assert files.names == ["evil", "renamed"]
    for name in files.names:
        with pytest.raises(AdapterError, match=f'^loras: the adapter "{name}" is not a complete safetensors file'):
            files.read(name, ours())
    assert not (tmp_path / "executed").exists()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_only_files_in_the_directory_itself_have_names(tmp_path: Path) -> None:
    directory, outside = tmp_path / "loras", tmp_path / "outside.safetensors"
    (directory / "below").mkdir(parents=True)
    for path in (directory / "a.safetensors", directory / "below" / "b.safetensors", outside):
        save_file(matrices(QUERY), path)
    for name in (".hidden", "b:1", "x" * 101):
        save_file(matrices(QUERY), directory / f"{name}.safetensors")
    (directory / "c.safetensors").mkdir()
    (directory / "away.safetensors").symlink_to(outside)
    (directory / "loop.safetensors").symlink_to(directory / "loop.safetensors")
    (directory / "same.safetensors").symlink_to(directory / "a.safetensors")
    files = LoraFiles(directory)
    assert files.names == ["a", "same"]
    for name in ("../outside", "below/b", "away", "b", str(outside.with_suffix(""))):
        with pytest.raises(AdapterError, match="there is no adapter"):
            files.read(name, ours())
    assert LoraFiles(tmp_path / "absent").names == LoraFiles(None).names == []


def test_a_changed_file_is_read_again_and_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = Path.read_bytes

    def counted(path: Path) -> bytes:
        reads.append(path.stem)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    for name in "ab":
        save_file(matrices(QUERY), tmp_path / f"{name}.safetensors")
    files, transformer = LoraFiles(tmp_path), ours()
    for name in "abab":
        files.read(name, transformer)
    assert reads == ["a", "b"]
    save_file(matrices(QUERY, rank=3), tmp_path / "a.safetensors")
    assert files.read("a", transformer)[QUERY].down.shape == (3, 32)
    assert reads == ["a", "b", "a"]
    monkeypatch.setattr(lora_files, "CACHED_BYTES", (tmp_path / "a.safetensors").stat().st_size)
    for name in "baab":
        files.read(name, transformer)
    assert reads == ["a", "b", "a", "a", "b"]


def test_a_file_larger_than_any_adapter_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.truncate(5_000_000_000)  # takes no disk
    with pytest.raises(AdapterError, match=r"has 5\.0 GB, more than a LoRA adapter has"):
        LoraFiles(tmp_path).read("a", ours())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[PipelineModel, HunyuanVideo15Transformer3DModel]:
    """The demo model with an adapter "trained" in its directory, and diffusers' transformer with the same in PEFT."""
    directory = tmp_path_factory.mktemp("loras")
    reference = load_pipeline().transformer
    names = [name for name in linear_layers(reference) if name.startswith("transformer_blocks.")]
    reference.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=names), "trained")
    optimizer = torch.optim.AdamW([each for each in reference.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(3):  # towards a still picture
        optimizer.zero_grad()
        torch.autograd.backward(video(reference).square().mean())
        optimizer.step()
    reference.eval()
    reference.save_lora_adapter(directory, "trained", weight_name="trained.safetensors")
    torch.save(matrices(QUERY), directory / "pickle.safetensors")
    model = load_model(WorkerSettings(model_path="demo", lora_dir=directory))
    assert isinstance(model, PipelineModel)
    return model, reference


def render(model: PipelineModel, *loras: Lora, cancelled: Event | None = None) -> Frames:
    """The first frames after one step."""
    job = JobInput(prompt="A red ball moves to the left", duration=5, num_inference_steps=1, loras=loras)
    frames = model.render(job, seed=1, on_progress=lambda *_: None, cancelled=cancelled or Event())
    try:
        return next(frames)
    finally:
        frames.close()


def test_a_trained_adapter_changes_the_demo_model_as_peft_does(
    demo: tuple[PipelineModel, HunyuanVideo15Transformer3DModel],
) -> None:
    model, reference = demo
    assert model.loras == ["pickle", "trained"]
    transformer = model.parts.shared.transformer
    files = model._loras
    with torch.no_grad():
        expected, before = video(reference), video(transformer)
        with applied(combined([(files.read("trained", transformer), 1.0)], transformer), transformer, CPU):
            found = video(transformer)
    assert largest_difference(expected, before) > 1e-2
    assert largest_difference(found, expected) < 1e-5


def test_a_job_without_adapters_is_the_same_after_jobs_with_adapters_good_and_bad(
    demo: tuple[PipelineModel, HunyuanVideo15Transformer3DModel],
) -> None:
    model, _ = demo
    before = render(model)
    cancelled = Event()
    cancelled.set()
    assert not np.array_equal(render(model, Lora(name="trained")), before)
    for name in ("pickle", "absent"):
        with pytest.raises(AdapterError, match=name):
            render(model, Lora(name="trained"), Lora(name=name))
    with pytest.raises(RenderCancelledError):
        render(model, Lora(name="trained"), cancelled=cancelled)
    assert np.array_equal(render(model, Lora(name="trained", scale=0.0)), before)
    assert np.array_equal(render(model), before)


def test_adapters_count_as_memory_of_the_render(demo: tuple[PipelineModel, HunyuanVideo15Transformer3DModel]) -> None:
    model, _ = demo
    transformer = model.parts.shared.transformer
    updates = combined([(model._loras.read("trained", transformer), 1.0)], transformer)
    job = JobInput(prompt="A red ball moves to the left", duration=5)
    needed = peak(SMALLEST, Weights(Part(), Part(), Part()), model.workload(job))
    budget = Budget(needed + bytes_of(updates), Weights(Part(), Part(), Part()), SMALLEST)
    budget.check(model.workload(job), bytes_of(updates))
    with pytest.raises(DoesNotFitError):
        budget.check(model.workload(job), bytes_of(updates) + 1)


def test_a_directory_that_does_not_exist_is_named_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"HUNYUAN_LORA_DIR: {tmp_path}/absent is not a directory"):
        load_model(WorkerSettings(model_path="demo", lora_dir=tmp_path / "absent"))
