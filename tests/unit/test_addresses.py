"""Which addresses are on the public internet."""

from __future__ import annotations

import pytest

from contract.addresses import is_public


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *("::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "224.0.0.1", "255.255.255.255"),
        *("127.255.255.254", "0.1.2.3", "100.127.255.255", "198.18.0.1", "192.0.2.1", "203.0.113.9", "240.0.0.1"),
        *("::", "::127.0.0.1", "::ffff:169.254.169.254", "::ffff:100.64.0.1", "::ffff:0:10.0.0.1", "fec0::1"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::1", "2002:a9fe:a9fe::", "2001::1"),
        *("ff02::1", "ff0e::1", "2001:db8::1", "fd00:ec2::254", "100::1", "4000::1"),
        *("168.63.129.16", "192.0.0.9", "192.0.0.192", "192.88.99.1", "192.31.196.1", "192.52.193.1", "192.175.48.1"),
        *("::ffff:168.63.129.16", "64:ff9b::a83f:8110", "2002:a83f:8110::1", "2002:c058:6301::", "2001:20::1"),
        *("3fff::1", "3fff:fff::1", "5f00::1", "2620:4f:8000::1", "2606:4700::5efe:10.0.0.1"),
        *("2606:4700::200:5efe:127.0.0.1", "2001:1::1", "2001:3::1"),
    ],
)
def test_only_addresses_of_the_public_internet_are_public(address: str) -> None:
    assert not is_public(address)
    assert is_public("93.184.215.14")
    assert is_public("2606:4700::1111")
    assert is_public("::ffff:93.184.215.14")
    assert is_public("64:ff9b::5db8:d70e"), "networks with IPv6 alone reach IPv4 this way"
