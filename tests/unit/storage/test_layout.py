"""Object keys and valid task ids."""

import pytest

from storage import layout


def test_a_tasks_objects_differ_in_their_extension() -> None:
    assert layout.video_key("a-1") == "videos/a-1.mp4"
    assert layout.manifest_key("a-1") == "videos/a-1.json"
    assert layout.poster_key("a-1") == "videos/a-1.jpg"


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
