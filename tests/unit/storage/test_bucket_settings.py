"""Settings of a bucket: where they are read from, and that secrets are not shown."""

import pytest
from pydantic import ValidationError

from contract.settings import explain
from storage.settings import BucketSettings, JobBucketSettings

SECRET = "hush-hush-secret"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", "http://127.0.0.1:9000")
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", SECRET)
    return monkeypatch


def test_runpods_names_are_read(environment: pytest.MonkeyPatch) -> None:
    settings = BucketSettings()
    assert str(settings.endpoint_url) == "http://127.0.0.1:9000/"
    assert settings.secret_access_key.get_secret_value() == SECRET


def test_the_secret_is_never_shown(environment: pytest.MonkeyPatch) -> None:
    assert SECRET not in repr(BucketSettings())


def test_a_missing_variable_is_named(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("BUCKET_ACCESS_KEY_ID")
    with pytest.raises(ValidationError) as caught:
        BucketSettings()
    assert "BUCKET_ACCESS_KEY_ID: Field required" in explain(caught.value)


def test_a_wrong_variable_is_named_and_its_value_is_not_repeated(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("BUCKET_ENDPOINT_URL", f"ftp://{SECRET}")
    with pytest.raises(ValidationError) as caught:
        BucketSettings()
    text = explain(caught.value)
    assert text.startswith("BUCKET_ENDPOINT_URL: ")
    assert SECRET not in text


def test_our_keys_never_go_to_a_callers_endpoint(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError) as caught:
        JobBucketSettings.model_validate({"endpointUrl": "http://127.0.0.1:6666"})
    assert "accessSecret: Field required" in explain(caught.value)
