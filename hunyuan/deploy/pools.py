"""RunPod's GPU pools, as far as the service has been planned for them, and how long they may render.

Source of the pools: https://docs.runpod.io/references/gpu-types. RunPod promises no host memory: `host` is what was
seen (41 GB beside an RTX 4090), else as much as the GPU has. Tests compare memory and speed with the worker's own plan.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from contract.job import DEMO_MODEL, Profile
from contract.render_times import SLOWEST, longest_timeout


@dataclass(frozen=True)
class Pool:
    """Memory in GB of a GPU, and of the host that a worker counts on.

    The slowest GPU of the pool takes `slowdown` times as long as an H100 SXM.
    """

    memory: int
    host: int
    slowdown: float


POOLS: Final[Mapping[str, Pool]] = {
    "ADA_24": Pool(24, 41, 6.0),  # RTX 4090
    "ADA_48_PRO": Pool(48, 48, 5.5),  # L40; the L40S and the RTX 6000 Ada are faster
    "AMPERE_80": Pool(80, 80, 3.2),  # A100
    "ADA_80_PRO": Pool(80, 80, 1.31),  # H100 PCIe; the H100 SXM is the measure
    "HOPPER_141": Pool(141, 141, 1.0),  # H200
}
#: A second costs most on these, and a video least. Every profile fits them, and so does one checkpoint alone.
DEFAULT_POOLS: Final = ("ADA_80_PRO", "HOPPER_141", "AMPERE_80")
#: The other pools whose GPU and host hold a profile; it is missing where host memory is too small.
OTHER_POOLS: Final[Mapping[Profile, tuple[str, ...]]] = {
    Profile.TURBO: ("ADA_48_PRO",),
    Profile.FAST: (),
    Profile.BALANCED: (),
    Profile.QUALITY: ("ADA_48_PRO",),
}


def serves_profiles(model_path: str | None) -> bool:
    """Whether HUNYUAN_MODEL_PATH can hold the checkpoints of a profile. A hub id names one checkpoint alone."""
    return (model_path or "").startswith(("/", ".", "~"))


def execution_timeout(profile: Profile, pools: Iterable[str], model_path: str | None) -> int:
    """Seconds that a job may run that has no limit of its own: the longest video on the slowest of the pools."""
    slowdown = max(POOLS[name].slowdown if name in POOLS else SLOWEST for name in pools)
    if model_path == DEMO_MODEL:
        return longest_timeout(Profile.TURBO, slowdown)
    # One checkpoint alone takes 50 steps with guidance, as the profile quality does.
    return longest_timeout(profile if serves_profiles(model_path) else Profile.QUALITY, slowdown)


def pool_warnings(profile: Profile, pools: Iterable[str], model_path: str | None) -> Iterator[str]:
    """A sentence for each pool whose workers would refuse to start with this profile."""
    if not serves_profiles(model_path):
        return
    for name in pools:
        if name in POOLS and name not in (*DEFAULT_POOLS, *OTHER_POOLS[profile]):
            yield (
                f"warning: workers in {name} can count on {POOLS[name].host} GB of host memory only, which is too "
                f"little for profile {profile}: they will not start. Leave out --gpu {name}"
            )
