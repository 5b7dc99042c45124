"""API keys and the rate limit, without HTTP."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from contract.settings import explain
from hunyuan.settings import ClientSettings
from shim.access import ApiKeys, RateLimit, client_of_address, parse_api_keys
from shim.settings import ShimSettings

ALICE = "alices-key-0123456789"
BOB = "bobs-key-abcdefghijkl=="


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_key_has_its_own_name_or_one_of_its_place() -> None:
    keys = ApiKeys(parse_api_keys(f"alice:{ALICE}, {BOB} ,"))
    assert keys.name_of(ALICE.encode()) == "alice"
    assert keys.name_of(BOB.encode()) == "key-2"
    for wrong in (b"", b"alice", ALICE[:-1].encode(), f"alice:{ALICE}".encode(), f"{ALICE} ".encode(), b"\xff" * 20):
        assert keys.name_of(wrong) is None


def test_without_keys_there_is_nothing_to_check() -> None:
    assert not parse_api_keys(" , ")
    assert parse_api_keys(ALICE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("too-short-secret"[:15], "key 1 must have at least 16"),
        (f"alice:{ALICE},bob:short-secret", "key 2 must have at least 16"),
        (f"al ice:{ALICE}", "name of key 1"),
        (f"a:b:{ALICE}", "name of key 1"),
        (f":{ALICE}", "name of key 1"),
        (f"alice:{ALICE}\u00e9", "key 1 must consist of"),
        (f"alice:{ALICE} secret", "key 1 must consist of"),
        (f"alice:{ALICE},alice:{BOB}", "key 2 has the name or the value"),
        (f"alice:{ALICE},bob:{ALICE}", "key 2 has the name or the value"),
    ],
)
def test_a_key_that_cannot_be_used_is_named_and_not_shown(
    text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUNYUAN_API_KEYS", text)
    with pytest.raises(ValidationError) as caught:
        ShimSettings()
    for shown in (explain(caught.value), str(caught.value), repr(caught.value)):
        assert words in shown
        assert "HUNYUAN_API_KEYS" in shown
        assert "secret" not in shown
        assert ALICE not in shown


def test_settings_show_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUNYUAN_API_KEYS", f"alice:{ALICE}")
    monkeypatch.setenv("HUNYUAN_API_KEY", ALICE)
    settings = ShimSettings()
    assert [key.name for key in settings.access.api_keys] == ["alice"]
    assert ALICE not in f"{settings!r} {settings.access!r} {settings} {ClientSettings()!r}"
    monkeypatch.setenv("HUNYUAN_API_KEY", f"{ALICE}\n")
    with pytest.raises(ValidationError) as caught:
        ClientSettings()
    assert ALICE not in explain(caught.value)


@pytest.mark.parametrize("origin", ["https://films.example/", "films.example", "https://user@films.example", "null"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUNYUAN_CORS_ORIGINS", f"https://films.example:8443, {origin}")
    with pytest.raises(ValidationError, match="HUNYUAN_CORS_ORIGINS"):
        ShimSettings()


def test_the_limit_allows_one_minutes_requests_at_once_and_then_evenly() -> None:
    clock = Clock()
    limit = RateLimit(6, clock=clock)
    assert [limit.take("alice") for _ in range(6)] == [0.0] * 6
    assert limit.take("alice") == pytest.approx(10.0)
    assert limit.take("bob") == 0.0, "each client has a bucket of its own"
    clock.now += 9.0
    assert limit.take("alice") == pytest.approx(1.0), "asking in vain costs nothing"
    clock.now += 1.0
    assert limit.take("alice") == 0.0
    clock.now += 3600
    assert [limit.take("alice") for _ in range(7)] == [0.0] * 6 + [pytest.approx(10.0)]


def test_the_limit_keeps_at_most_ten_thousand_clients() -> None:
    limit = RateLimit(1, clock=Clock())
    assert limit.take("first") == 0.0
    for number in range(9_999):
        limit.take(str(number))
    assert limit.take("first") > 0, "still among the last ten thousand"
    for number in range(10_000):
        limit.take(f"more-{number}")
    assert limit.take("first") == 0.0, "forgotten"


def test_an_ipv6_host_is_one_client_whichever_of_its_addresses_it_uses() -> None:
    assert client_of_address("2001:db8:1:2::1") == client_of_address("2001:db8:1:2:ffff::9") == "2001:db8:1:2::/64"
    assert client_of_address("2001:db8:1:3::1") != client_of_address("2001:db8:1:2::1")
    assert client_of_address("::ffff:192.0.2.7") == client_of_address("192.0.2.7") == "192.0.2.7"
    assert client_of_address("unix") == "unix"
