"""Object keys and valid task ids."""

import pytest

from storage import layout


def test_each_attempt_has_keys_of_its_own_and_the_task_has_one_verdict() -> None:
    assert layout.video_key("a-1", "0f") == "videos/a-1/0f.mp4"
    assert layout.poster_key("a-1", "0f") == "videos/a-1/0f.jpg"
    assert layout.manifest_key("a-1") == "videos/a-1.json"
    assert layout.attempts_prefix("a-1") == "videos/a-1/"


def test_keys_of_older_releases_differ_in_their_extension() -> None:
    assert layout.video_key("a-1") == "videos/a-1.mp4"
    assert layout.poster_key("a-1") == "videos/a-1.jpg"


@pytest.mark.parametrize(
    ("key", "task_id"),
    [
        ("videos/a-1/0f.mp4", "a-1"),
        ("videos/a-1.json", "a-1"),
        ("videos/a-1", None),
        ("videos/", None),
        ("videos/.mp4", None),
        ("other/a-1.json", None),
    ],
)
def test_a_key_names_its_task(key: str, task_id: str | None) -> None:
    assert layout.task_id_of(key) == task_id


@pytest.mark.parametrize("task_id", ["3b241101-e2bb-4255-8caf-4136c566a962", "sync-abc-u1", "a", "A_1", "x" * 128])
def test_uuids_and_runpods_ids_are_task_ids(task_id: str) -> None:
    assert layout.is_task_id(task_id)


@pytest.mark.parametrize(
    "task_id", ["", "..", "../etc/passwd", "a/b", "a.mp4", "a b", "a\n", "a\0", "-a", "é", "x" * 129, "%2e%2e", "٣"]
)
def test_nothing_else_is_a_task_id(task_id: str) -> None:
    assert not layout.is_task_id(task_id)
    with pytest.raises(ValueError, match="not a task id"):
        layout.video_key(task_id)
