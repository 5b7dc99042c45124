"""Every profile can render every resolution."""

import pytest

from contract.job import DEFAULT_MODEL, Profile, Resolution
from handler.video_model.catalog import CHECKPOINTS, IMAGE_BASES, ROUTES, image_routes, text_routes
from handler.weights.download import RECIPES


def test_every_profile_has_a_route_of_known_checkpoints_for_every_resolution() -> None:
    assert set(ROUTES) == {(profile, resolution) for profile in Profile for resolution in Resolution}
    names = {name for route in ROUTES.values() for name in route.checkpoints} | set(IMAGE_BASES.values())
    assert names <= set(CHECKPOINTS)
    assert names == set(RECIPES), "each can be downloaded, and nothing else is"


def test_a_profile_without_its_image_base_takes_the_fastest_one_present() -> None:
    models = {DEFAULT_MODEL: Profile.QUALITY, Profile.FAST.model: Profile.FAST, Profile.QUALITY.model: Profile.QUALITY}
    only_fast = image_routes(models, {IMAGE_BASES[Profile.FAST]})
    assert set(only_fast) == set(text_routes(models))
    assert {route.base for route in only_fast.values()} == {IMAGE_BASES[Profile.FAST]}
    both = image_routes(models, set(IMAGE_BASES.values()))
    assert both[DEFAULT_MODEL, Resolution.P720].base == IMAGE_BASES[Profile.QUALITY]
    assert image_routes(models, set()) == {}


def test_a_profile_without_its_distilled_image_base_takes_the_undistilled_one() -> None:
    models = {DEFAULT_MODEL: Profile.BALANCED}
    assert {route.base for route in image_routes(models, {"480p_i2v"}).values()} == {"480p_i2v"}
    both = image_routes(models, {"480p_i2v", IMAGE_BASES[Profile.BALANCED]})
    assert {route.base for route in both.values()} == {IMAGE_BASES[Profile.BALANCED]}


@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        ("480p_t2v", ()),
        ("720p_i2v", ()),
        ("480p_t2v_distilled", ("guidance_scale", "num_inference_steps")),
        ("720p_i2v_distilled", ("guidance_scale", "num_inference_steps")),
        ("480p_t2v_4step", ("guidance_scale", "num_inference_steps")),
        ("480p_i2v_step_distilled", ("guidance_scale",)),
    ],
)
def test_distillation_fixes_what_a_request_may_not_change(name: str, fixed: tuple[str, ...]) -> None:
    assert CHECKPOINTS[name].sampling.fixed == fixed
    assert bool(fixed) == (CHECKPOINTS[name].sampling.guidance_scale == 1.0)
