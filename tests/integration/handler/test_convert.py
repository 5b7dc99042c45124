"""Checkpoints are converted exactly, and downloaded from a hub as a profile needs them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from benchmarks import random_model
from contract.job import Profile
from handler.settings import WorkerSettings
from handler.video_model.catalog import needed
from handler.video_model.loader import load_model
from handler.video_model.upsamplers import load_upsampler
from handler.weights.convert import convert_checkpoint, convert_transformer, transformer_config
from handler.weights.download import download
from handler.weights.errors import ConvertError, WeightsError
from handler.weights.hub import Fetch, Files, fetch_from_hub
from hunyuan.cli.main import app
from tests.support.full import full
from tests.support.original_layout import State, original
from tests.support.small_models import image_pipeline, sr_transformer, upsampler_720p, upsampler_1080p

TRANSFORMER = Path("transformer", "diffusion_pytorch_model.safetensors")
COMMIT = "c0ffee" + 34 * "0"
SMALL_ROPE = {"rope_dim_list": [4, 6, 6]}


def small(seed: int = 0, *, in_channels: int = 17, out_channels: int = 8) -> HunyuanVideo15Transformer3DModel:
    """Has heads of the published size, so that no configuration has to name it."""
    torch.manual_seed(seed)
    return HunyuanVideo15Transformer3DModel(
        in_channels=in_channels,
        out_channels=out_channels,
        num_attention_heads=1,
        attention_head_dim=128,
        num_layers=3,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=32,
        text_embed_2_dim=16,
        image_embed_dim=24,
        task_type="t2v",
    ).eval()


def meanflow_98_channels() -> HunyuanVideo15Transformer3DModel:
    torch.manual_seed(1)
    config = dict(sr_transformer().config) | {"in_channels": 98, "out_channels": 32, "num_layers": 2}
    return HunyuanVideo15Transformer3DModel.from_config(config).eval()


def published(**changes: object) -> HunyuanVideo15Transformer3DModel:
    """The model at its published size, on the meta device, which takes no memory."""
    with torch.device("meta"):
        return HunyuanVideo15Transformer3DModel(task_type="t2v", **changes)


def equal(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", ["base", "meanflow"])
@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model."])
def test_a_transformer_comes_back_bit_for_bit(kind: str, prefix: str) -> None:
    state = (small() if kind == "base" else meanflow_98_channels()).state_dict()
    converted = convert_transformer({prefix + name: tensor for name, tensor in original(state).items()})
    assert equal(converted, state)


def test_a_converted_transformer_computes_the_same(tmp_path: Path) -> None:
    model = small()
    save_file(original(model.state_dict()), tmp_path / "one.safetensors")
    convert_checkpoint(tmp_path / "one.safetensors", tmp_path / "480p_t2v", "480p_t2v")
    loaded = HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "480p_t2v" / "transformer")
    arguments = {
        "hidden_states": torch.randn(1, 17, 2, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "encoder_attention_mask": torch.ones(1, 5),
        "encoder_hidden_states_2": torch.randn(1, 3, 16),
        "encoder_attention_mask_2": torch.ones(1, 3),
        "image_embeds": torch.zeros(1, 4, 24),
    }
    with torch.no_grad():
        # Not to the bit: kernels differ with where in memory a weight begins.
        assert (loaded(**arguments).sample - model(**arguments).sample).abs().max() < 1e-5


def test_the_published_sizes_are_read_from_the_shapes() -> None:
    base = original(published().state_dict())
    assert len(base) == 1793, "as many as hy1.5_t2v_480p_lightx2v_4step.safetensors has"
    config = transformer_config(base, "480p_t2v_4step")
    assert config == {name: value for name, value in published().config.items() if not name.startswith("_")}
    assert transformer_config(base, "720p_t2v")["target_size"] == 960
    stage = published(in_channels=98, use_meanflow=True, target_size=1440)
    config = transformer_config(original(stage.state_dict()), "1080p_sr_distilled")
    assert config == {name: value for name, value in stage.config.items() if not name.startswith("_")}


def test_unknown_and_missing_keys_are_named() -> None:
    state = original(small().state_dict())
    state["double_blocks.1.img_attn_q.weight_scale"] = state.pop("double_blocks.1.img_attn_q.bias")
    with pytest.raises(ConvertError) as error:
        convert_transformer(state)
    assert "unknown double_blocks.1.img_attn_q.weight_scale;" in str(error.value)
    assert "missing double_blocks.1.img_attn_q.bias" in str(error.value)


@pytest.mark.parametrize(
    ("dropped", "named"),
    [
        ("double_blocks.1.", "double_blocks.1.img_mod.linear.weight"),
        ("double_blocks.", "double_blocks.0.img_mod.linear.weight"),
        ("txt_in.individual_token_refiner.", "txt_in.individual_token_refiner.blocks.0.norm1.weight"),
        ("time_r_in.mlp.2.", "time_r_in.mlp.2.weight"),
        ("img_in.proj.weight", "img_in.proj.weight"),
    ],
)
def test_missing_modules_are_named(dropped: str, named: str) -> None:
    state = original(meanflow_98_channels().state_dict() if "time_r" in dropped else small().state_dict())
    left = {name: tensor for name, tensor in state.items() if not name.startswith(dropped)}
    with pytest.raises(ConvertError, match=re.escape(named)):
        convert_transformer(left)


def test_another_model_is_refused_in_a_short_message() -> None:
    with pytest.raises(ConvertError, match=r"unknown decoder\.0, .* and 96 more") as error:
        convert_transformer({f"decoder.{index}": torch.zeros(1) for index in range(100)})
    assert len(str(error.value)) < 600


def write_sharded(state: State, directory: Path, *, with_index: bool) -> None:
    directory.mkdir()
    names = sorted(state)
    shards = {f"part-{index}.safetensors": names[index::3] for index in range(3)}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, directory / file)
    if with_index:
        index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        (directory / "unrelated.safetensors").write_bytes(b"not named by the index")


@pytest.mark.parametrize("kind", ["file", "directory", "shards", "shards with an index"])
def test_single_files_and_shards_are_read(tmp_path: Path, kind: str) -> None:
    model, source = small(), tmp_path / "source"
    state = original(model.state_dict())
    if kind.startswith("shards"):
        write_sharded(state, source, with_index=kind.endswith("index"))
    else:
        source.mkdir()
        save_file(state, source / "one.safetensors")
        source = source / "one.safetensors" if kind == "file" else source
    convert_checkpoint(source, tmp_path / "out", "480p_t2v_4step")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["transformer"]
    assert equal(load_file(tmp_path / "out" / TRANSFORMER), model.state_dict())
    modes = {path.stat().st_mode for path in (tmp_path / "out" / "transformer").iterdir()}
    assert len(modes) == 1, "who may read the configuration may read the weights"
    loaded = HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert equal(loaded.state_dict(), model.state_dict())
    assert loaded.config.target_size == 640


def test_a_missing_or_doubled_shard_is_named(tmp_path: Path) -> None:
    state = original(small().state_dict())
    write_sharded(state, tmp_path / "source", with_index=True)
    (tmp_path / "source" / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="part-1"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", "480p_t2v")
    write_sharded(state, tmp_path / "twice", with_index=False)
    shutil.copy(tmp_path / "twice" / "part-0.safetensors", tmp_path / "twice" / "part-3.safetensors")
    with pytest.raises(ConvertError, match=r"part-3\.safetensors has .*another file"):
        convert_checkpoint(tmp_path / "twice", tmp_path / "out", "480p_t2v")


def write_stage(root: Path, name: str) -> tuple[State, State]:
    """A super-resolution stage as it lies in the original repository: its weights, and its upsampler's."""
    transformer, upsampler = sr_transformer(), upsampler_720p() if name.startswith("720p") else upsampler_1080p()
    directory = root / "transformer" / name
    directory.mkdir(parents=True)
    save_file(original(transformer.state_dict()), directory / "diffusion_pytorch_model.safetensors")
    (directory / "config.json").write_text(json.dumps(SMALL_ROPE))
    upsampler.save_pretrained(root / "upsampler" / name)
    return transformer.state_dict(), upsampler.state_dict()


@pytest.mark.parametrize("name", ["720p_sr_distilled", full("1080p_sr_distilled")])
@pytest.mark.parametrize("given", ["root", "directory", "file"])
def test_a_super_resolution_stage_keeps_its_upsampler_as_it_is(tmp_path: Path, name: str, given: str) -> None:
    transformer, upsampler = write_stage(tmp_path / "source", name)
    inside = tmp_path / "source" / "transformer" / name
    source = {"root": tmp_path / "source", "directory": inside, "file": next(inside.glob("*.safetensors"))}[given]
    convert_checkpoint(source, tmp_path / "out", name)
    loaded = HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert equal(loaded.state_dict(), transformer)
    assert loaded.config.use_meanflow
    assert tuple(loaded.config.rope_axes_dim) == (4, 6, 6)
    assert equal(load_upsampler(tmp_path / "out" / "upsampler").state_dict(), upsampler)
    for file in (tmp_path / "source" / "upsampler" / name).iterdir():
        assert (tmp_path / "out" / "upsampler" / file.name).read_bytes() == file.read_bytes()


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """The transformer is already written when the upsampler proves to be another one."""
    name = "720p_sr_distilled"
    write_stage(tmp_path / "source", name)
    save_file({"a": torch.zeros(1)}, tmp_path / "source" / "upsampler" / name / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConvertError, match=r"is not an upsampler: .*in_conv"):
        convert_checkpoint(tmp_path / "source", tmp_path / name, name)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("name", "state", "says"),
    [
        ("480p_t2v", original(sr_transformer().state_dict()), "heads of 16 channels need a rope_dim_list"),
        ("720p_sr_distilled", original(small().state_dict()), "time_r_in is missing"),
        (
            "480p_t2v",
            original(small().state_dict()) | {"byt5_in.fc2.bias": torch.zeros(5)},
            r"size mismatch for context_embedder_2\.linear_2\.bias",
        ),
        ("480p_t2v", original(small().state_dict()) | {"img_in.proj.weight": torch.zeros(5)}, r"shape \(5,\)"),
        ("540p", original(small().state_dict()), "no checkpoint is called 540p"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, name: str, state: State, says: str) -> None:
    save_file(state, tmp_path / "one.safetensors")
    with pytest.raises(ConvertError, match=says):
        convert_checkpoint(tmp_path / "one.safetensors", tmp_path / "out", name)
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


def test_an_existing_target_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConvertError, match="already exists"):
        convert_checkpoint(tmp_path / "one.safetensors", tmp_path / "out", "480p_t2v")


def command(*arguments: str | Path) -> Result:
    """Runs `hunyuan` in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def started(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Runs `hunyuan` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "hunyuan", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (env or {}),
    )


@pytest.mark.full
def test_a_killed_conversion_leaves_nothing_under_its_name_and_the_next_one_clears_up(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    save_file(original(small().state_dict()), tmp_path / "source" / "one.safetensors")
    config = tmp_path / "source" / "config.json"
    os.mkfifo(config)  # a reader waits
    with started("convert-weights", tmp_path / "source", tmp_path / "480p_t2v") as process:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) == 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".480p_t2v.partial", "source"]
    config.unlink()
    assert command("convert-weights", tmp_path / "source", tmp_path / "480p_t2v").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["480p_t2v", "source"]


@pytest.mark.full
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    save_file(original(small().state_dict()), tmp_path / "one.safetensors")
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "hunyuan",
            "convert-weights",
            tmp_path / "one.safetensors",
            tmp_path / "480p_t2v",
        ],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    ) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1
    assert "cannot be written" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


def test_exit_codes_of_convert(tmp_path: Path) -> None:
    save_file(original(small().state_dict()), tmp_path / "one.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:-1000])
    source, nameless = tmp_path / "one.safetensors", tmp_path / "out"
    unnamed = command("convert-weights", source, nameless)
    assert unnamed.exit_code == 2
    assert "--name" in unnamed.stderr
    assert command("convert-weights", source, nameless, "--name", "480p_t2v_4step").exit_code == 0
    for arguments in (
        (source, nameless, "--name", "480p_t2v"),
        (source, tmp_path / "other", "--name", "540p"),
        (tmp_path / "absent.safetensors", tmp_path / "480p_t2v"),
        (tmp_path / "cut.safetensors", tmp_path / "480p_t2v"),
        (tmp_path, tmp_path / "480p_t2v"),
    ):
        failed = command("convert-weights", *arguments)
        assert failed.exit_code == 1, arguments
        assert len(failed.stderr.splitlines()) == 1
    assert command("convert-weights", source).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    ["download-weights fast --to weights --accept-licence", "convert-weights one.safetensors 480p_t2v"],
)
def test_an_installation_without_pytorch_says_what_to_install(tmp_path: Path, arguments: str) -> None:
    script = "import sys; sys.modules['torch'] = None; from hunyuan.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'hunyuan-video-service[worker]'" in done.stderr
    assert not list(tmp_path.iterdir())


class LocalHub:
    """Repositories in a directory. The call with the number `breaks_at` fails in the middle."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[Files] = []
        self.breaks_at: int | None = None

    def __call__(self, files: Files, to: Path) -> None:
        self.asked.append(files)
        base = self.root / files.repository
        paths = [path.relative_to(base) for path in sorted(base.rglob("*")) if path.is_file()]
        for path in paths:
            wanted = not files.allow or any(fnmatch(str(path), pattern) for pattern in files.allow)
            if not wanted or any(fnmatch(str(path), pattern) for pattern in files.ignore):
                continue
            (to / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / path, to / path)
            if len(self.asked) == self.breaks_at:
                raise WeightsError(f"{files.repository}: connection lost")


@pytest.fixture(scope="module")
def hub_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    pipeline = random_model.build_pipeline()
    for name in ("480p_t2v_distilled", "720p_t2v"):
        pipeline.save_pretrained(root / f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{name}")
    image_pipeline().save_pretrained(root / "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v_distilled")
    for name in ("720p_sr_distilled", "1080p_sr_distilled"):
        write_stage(root / "tencent/HunyuanVideo-1.5", name)
    (root / "tencent/HunyuanVideo-1.5/transformer/480p_i2v").mkdir()
    (root / "tencent/HunyuanVideo-1.5/transformer/480p_i2v/huge.safetensors").write_bytes(b"not wanted")
    four_steps = root / "lightx2v/Hy1.5-Distill-Models/hy1.5_t2v_480p_lightx2v_4step.safetensors"
    four_steps.parent.mkdir(parents=True)
    state = original(small(7).state_dict())
    save_file({f"model.{name}": tensor.bfloat16() for name, tensor in state.items()}, four_steps)
    (four_steps.parent / "another.safetensors").write_bytes(b"not wanted")
    return root


@pytest.fixture
def hub(hub_root: Path) -> LocalHub:
    return LocalHub(hub_root)


@pytest.mark.parametrize("profile", [profile if profile is Profile.FAST else full(profile) for profile in Profile])
def test_what_a_profile_needs_is_downloaded_and_loads(tmp_path: Path, hub: LocalHub, profile: Profile) -> None:
    to = tmp_path / "weights"
    download(profile, to, hub)
    assert {path.name for path in to.iterdir()} == needed(profile)
    model = load_model(WorkerSettings(model_path=str(to), profile=profile))
    assert profile.model in model.models
    for stage in needed(profile):
        if stage.endswith("_sr_distilled"):
            assert sorted(path.name for path in (to / stage).iterdir()) == ["transformer", "upsampler"]
    if profile is Profile.FAST:
        state = {name: tensor.bfloat16() for name, tensor in small(7).state_dict().items()}
        assert equal(load_file(to / "480p_t2v_4step" / TRANSFORMER), state)


def test_image_to_video_weights_are_downloaded_on_request(tmp_path: Path, hub: LocalHub) -> None:
    download(Profile.BALANCED, tmp_path, hub, images=True)
    assert {path.name for path in tmp_path.iterdir()} == needed(Profile.BALANCED) | {"480p_i2v_distilled"}
    assert load_model(WorkerSettings(model_path=str(tmp_path))).takes_images


def test_complete_checkpoints_are_not_downloaded_again(tmp_path: Path, hub: LocalHub) -> None:
    download(Profile.FAST, tmp_path, hub)
    asked = len(hub.asked)
    download(Profile.FAST, tmp_path, hub)
    assert len(hub.asked) == asked
    download(Profile.BALANCED, tmp_path, hub)
    (transformer,) = hub.asked[asked:]
    assert transformer.allow == ("transformer/*",), "the text encoders and the VAE are those of fast"
    shared = Path("vae", "diffusion_pytorch_model.safetensors")
    assert (tmp_path / "480p_t2v_distilled" / shared).samefile(tmp_path / "480p_t2v_4step" / shared)
    assert {path.name for path in tmp_path.iterdir()} == needed(Profile.FAST) | needed(Profile.BALANCED)


def test_a_download_of_the_first_checkpoints_is_completed_by_the_next_one(tmp_path: Path, hub: LocalHub) -> None:
    """The image has a layer for each checkpoint."""
    names = sorted(needed(Profile.FAST))
    for number in range(1, len(names) + 1):
        download(Profile.FAST, tmp_path, hub, first=number)
        assert sorted(path.name for path in tmp_path.iterdir()) == names[:number]
    asked = len(hub.asked)
    download(Profile.FAST, tmp_path, hub)
    assert len(hub.asked) == asked


@pytest.mark.parametrize("breaks_at", [full(1), 2, full(3), full(4)])
def test_an_interrupted_download_leaves_no_partial_checkpoint_and_resumes(
    tmp_path: Path, hub: LocalHub, breaks_at: int
) -> None:
    hub.breaks_at = breaks_at
    with pytest.raises(WeightsError, match="connection lost"):
        download(Profile.FAST, tmp_path, hub)
    hub.breaks_at = None
    names = {path.name for path in tmp_path.iterdir()} - {".download"}
    assert names < needed(Profile.FAST)
    untouched = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    download(Profile.FAST, tmp_path, hub)
    assert {path.name for path in tmp_path.iterdir()} == needed(Profile.FAST)
    assert untouched == {name: (tmp_path / name).stat().st_mtime_ns for name in names}


def test_an_incomplete_checkpoint_is_left_alone_and_named(tmp_path: Path, hub: LocalHub) -> None:
    download(Profile.QUALITY, tmp_path, hub)
    asked = len(hub.asked)
    index = tmp_path / "720p_t2v" / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}}))
    with pytest.raises(WeightsError, match="720p_t2v exists but is incomplete"):
        download(Profile.QUALITY, tmp_path, hub)
    assert index.exists()
    assert len(hub.asked) == asked


def test_without_the_licence_or_a_known_profile_nothing_is_downloaded(tmp_path: Path) -> None:
    refused = command("download-weights", "quality", "--to", tmp_path / "weights")
    assert refused.exit_code == 2
    assert "European Union, the United Kingdom and South Korea" in refused.stdout
    assert "--accept-licence" in refused.stderr
    assert command("download-weights", "fastest", "--to", tmp_path / "weights").exit_code == 2
    assert not list(tmp_path.iterdir())


class HubServer(ThreadingHTTPServer):
    """Those repositories over HTTP: the part of the hub's API that its client uses."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _HubRequest)
        self.root = root
        self.received: list[str] = []
        self.changes: set[str] = set()  # files that arrive with one byte changed, once


class _HubRequest(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path).strip("/")
        if path.startswith("api/models/"):
            owner, name, *rest = path.removeprefix("api/models/").split("/")
            base = self.server.root / owner / name
            files = [{"type": "file", "oid": "0", **describe(path, base)} for path in base.rglob("*") if path.is_file()]
            siblings = [{"rfilename": file["path"], "size": file["size"], "lfs": file["lfs"]} for file in files]
            info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
            self._answer(json.dumps(files if rest[:1] == ["tree"] else info))
        else:
            repository, found, file = path.partition(f"/resolve/{COMMIT}/")
            self.server.received += [file] if found and self.command == "GET" else []
            body = (self.server.root / repository / file).read_bytes() if found else None
            if body and self.command == "GET" and file in self.server.changes:
                self.server.changes.remove(file)
                body = body[:-1] + bytes([body[-1] ^ 1])
            self._answer(body)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def _answer(self, answer: str | bytes | None) -> None:
        body = answer.encode() if isinstance(answer, str) else answer or b""
        self.send_response(404 if answer is None else 200)
        etag = hashlib.sha256(body).hexdigest()
        for header, value in {"X-Repo-Commit": COMMIT, "ETag": etag, "Content-Length": len(body)}.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def describe(path: Path, base: Path) -> dict[str, object]:
    size = path.stat().st_size
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    lfs = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 130}
    return {"path": str(path.relative_to(base)), "size": size, "lfs": lfs}


@pytest.fixture
def hub_server(hub_root: Path) -> Iterator[HubServer]:
    with HubServer(hub_root) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.full
def test_the_hubs_own_client_fetches_what_is_needed_and_no_more(tmp_path: Path, hub_server: HubServer) -> None:
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub_server.server_port}", "HF_HOME": str(tmp_path / "home")}
    with started("download-weights", "fast", "--to", tmp_path / "weights", "--accept-licence", env=env) as process:
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "European Union, the United Kingdom and South Korea" in said
    assert "480p_t2v_4step: ready" in said
    assert {path.name for path in (tmp_path / "weights").iterdir()} == needed(Profile.FAST)
    assert not list((tmp_path / "weights").rglob(".cache"))
    unwanted = {"another.safetensors", "transformer/480p_i2v/huge.safetensors", TRANSFORMER.as_posix()}
    assert not unwanted & set(hub_server.received)
    assert len(hub_server.received) == len(set(hub_server.received))


def test_a_damaged_file_is_named_and_fetched_again(tmp_path: Path, hub_server: HubServer) -> None:
    changed = "transformer/720p_sr_distilled/diffusion_pytorch_model.safetensors"
    hub_server.changes = {changed}
    to = tmp_path / "weights"
    fetch: Fetch = partial(fetch_from_hub, endpoint=f"http://127.0.0.1:{hub_server.server_port}")
    with pytest.raises(WeightsError) as error:
        download(Profile.BALANCED, to, fetch)
    assert str(error.value).startswith(f"tencent/HunyuanVideo-1.5: {changed} was damaged in its download")
    assert not list(to.rglob(f".download/**/{changed}")), "nothing of it is kept"
    assert not (to / "720p_sr_distilled").exists()
    before = list(hub_server.received)
    download(Profile.BALANCED, to, fetch)
    assert {path.name for path in to.iterdir()} == needed(Profile.BALANCED)
    again = hub_server.received[len(before) :]
    assert [file for file in again if file in before] == [changed]


def test_without_a_connection_an_unfinished_download_is_not_taken_as_complete(tmp_path: Path) -> None:
    """The hub's client alone would: without a connection it accepts what is in the directory."""
    begun = tmp_path / "weights" / ".download" / "1080p_sr_distilled.original"
    write_stage(begun, "1080p_sr_distilled")
    (begun / "upsampler" / "1080p_sr_distilled" / "config.json").unlink()
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    with started("download-weights", "quality", "--to", tmp_path / "weights", "--accept-licence", env=env) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert [line.partition(": ")[0] for line in errors.splitlines()] == ["tencent/HunyuanVideo-1.5"]
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [".download"]
