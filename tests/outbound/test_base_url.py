"""SECURITY.md 6.1, 6.2, 6.3 and 6.7: which base URLs may be named, by their form alone."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from e2a.core.addresses import NameLookupError, NotPublicError, address_refusal, resolve_public
from e2a.core.errors import ValidationFailed
from e2a.core.outbound import check_base_url, trusted_url
from tests.outbound.servers import PUBLIC, Lookups


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("https://api.anthropic.com", "https://api.anthropic.com"),
        ("https://API.Anthropic.com/", "https://api.anthropic.com"),
        ("https://api.example.com:443/v1/", "https://api.example.com/v1"),
        ("https://gateway.example.com/v1/acc-1/my_gw/anthropic", "https://gateway.example.com/v1/acc-1/my_gw/anthropic"),
        ("https://xn--bcher-kva.example.com", "https://xn--bcher-kva.example.com"),
        ("https://8.8.8.8", "https://8.8.8.8"),
        ("https://[2606:4700:4700:0::1111]", "https://[2606:4700:4700::1111]"),
    ],
)  # fmt: skip
def test_a_public_https_url_is_allowed_in_its_normal_form(given: str, normal: str) -> None:
    assert check_base_url(given).url == normal


@pytest.mark.parametrize(
    "url",
    [
        # 6.1: scheme, port, user, query, fragment, control characters, two readings.
        "", "api.example.com", "http://api.example.com", "ftp://api.example.com", "file:///etc/passwd",
        "//evil.example.com/", "https:api.example.com", "https:///api.example.com",
        "https:\\\\api.example.com",
        "https://api.example.com:80", "https://api.example.com:8443", "https://api.example.com:0443",
        "https://api.example.com:", "https://api.example.com:443:443", "https://api.example.com:99999",
        "https://good.example.com@evil.example.com", "https://good.example.com\\@evil.example.com",
        "https://good.example.com#@evil.example.com", "https://user:pw@api.example.com", "https://@api.example.com",
        "https://api.example.com?x=1", "https://api.example.com/?", "https://api.example.com/#",
        "https://api.example.com//evil.example.com", "https://api.example.com/a/../b", "https://api.example.com/./",
        "https://api.example.com/%2e%2e/", "https://api.example.com/\\", "https://api.example.com/a b",
        "https://api.example.com/\n", "https://api.example.com\n", "\nhttps://api.example.com",
        " https://api.example.com", "https://api.exa\tmple.com", "https://api.example.com/\x00",
        "https://api%2eexample.com", "https://" + "a" * 250 + ".example.com",
        "https://api.example.com/" + "a" * 2048,
        "https://-api.example.com", "https://api-.example.com", "https://api..example.com", "https://.example.com",
        "https://a_b.example.com", "https://xn--a.example.com", "https://bücher.example.com", "https://apı.example.com",
        # 6.2: other spellings of addresses inside.
        "https://127.0.0.1", "https://127.1", "https://127.0.1", "https://2130706433", "https://0x7f000001",
        "https://0x7f.0.0.1", "https://0177.0.0.1", "https://017700000001", "https://0", "https://0x", "https://0.0.0.0",
        "https://127.0.0.1.", "https://10.0.0.1", "https://172.16.0.1", "https://172.31.255.255",
        "https://192.168.1.1", "https://169.254.169.254", "https://100.64.0.1", "https://100.100.100.200",
        "https://168.63.129.16", "https://192.0.0.8", "https://192.88.99.1", "https://198.18.0.1",
        "https://224.0.0.1", "https://255.255.255.255", "https://240.0.0.1", "https://192.0.2.1",
        "https://[::]", "https://[::1]", "https://[0:0:0:0:0:0:0:1]", "https://[::ffff:10.0.0.1]",
        "https://[::ffff:8.8.8.8]", "https://[::ffff:a9fe:a9fe]", "https://[::127.0.0.1]",
        "https://[64:ff9b::a9fe:a9fe]", "https://[64:ff9b:1::1]", "https://[2002:7f00:1::]",
        "https://[2001:0:4136:e378:8000:63bf:3fff:fdd2]", "https://[2001:db8::1]", "https://[fc00::1]",
        "https://[fd00:ec2::254]", "https://[fe80::1]", "https://[fe80::1%25eth0]", "https://[fe80::1%eth0]",
        "https://[fec0::1]", "https://[ff02::1]", "https://[::1", "https://[]", "https://::1",
        "https://localhost", "https://localhost.", "https://LOCALHOST", "https://a.localhost", "https://db",
        "https://metadata.google.internal", "https://printer.local", "https://git.corp", "https://nas.home.arpa",
        "https://１２７.0.0.1", "https://127。0。0。1", "https://①②⑦.0.0.1", "https://api.example.com.",
        "https://127.0.0.1.nip.io", "https://10-0-0-1.sslip.io", "https://a.192.168.0.1.example.com",
        "https://ip-169-254-169-254.example.com", "https://localtest.me", "https://x.lvh.me",
    ],
)  # fmt: skip
def test_a_hostile_form_is_refused(url: str) -> None:
    with pytest.raises(ValidationFailed) as refused:
        check_base_url(url, field="llm.base_url")
    assert refused.value.code == "forbidden_url"
    assert [(error.field, error.code) for error in refused.value.errors] == [
        ("llm.base_url", "forbidden_url")
    ]


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1:8080"),
        ("http://127.0.0.1:8080/v1", "127.0.0.1"),
        ("https://10.1.2.3", "10.1.2.3:443"),
        ("http://[::1]:11434", "[::1]:11434"),
        ("http://[::1]:11434", "::1"),
        ("http://localhost:11434", "localhost:11434"),
        ("http://Ollama:11434", "OLLAMA:11434"),
        ("https://models.internal", "models.internal"),
        ("http://models.example.com", "models.example.com:80"),
    ],
)
def test_the_operator_may_allow_a_private_or_plain_host(url: str, entry: str) -> None:
    with pytest.raises(ValidationFailed):
        check_base_url(url)
    assert check_base_url(url, allow_private=frozenset({entry})).url == url.lower()


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("http://127.0.0.1:8081", "127.0.0.1:8080"),
        ("http://127.0.0.11:8080", "127.0.0.1:8080"),
        ("http://evil.models.internal", "models.internal"),
        ("http://user@127.0.0.1:8080", "127.0.0.1:8080"),
        ("http://169.254.169.254", "169.254.169.254"),
        ("https://100.100.100.200", "100.100.100.200:443"),
        ("http://168.63.129.16", "168.63.129.16"),
        ("http://[fd00:ec2::254]", "fd00:ec2::254"),
        ("http://[::ffff:169.254.169.254]", "::ffff:169.254.169.254"),
        ("http://0.0.0.0:8080", "0.0.0.0:8080"),
    ],
)
def test_an_allow_list_covers_the_exact_host_and_port_and_never_metadata(url: str, entry: str) -> None:
    with pytest.raises(ValidationFailed):
        check_base_url(url, allow_private=frozenset({entry}))


def test_the_origin_of_a_url_is_what_a_key_belongs_to() -> None:
    assert check_base_url("https://Api.Example.com:443/v1/").origin == "https://api.example.com"
    assert trusted_url("http://127.0.0.1:9999/x").origin == "http://127.0.0.1:9999"
    assert trusted_url("http://[::1]:9999").authority == "[::1]:9999"
    assert trusted_url("https://api.anthropic.com/").authority == "api.anthropic.com:443"
    with pytest.raises(ValueError, match="must look like"):
        trusted_url("127.0.0.1:9999")


def test_all_addresses_of_a_name_must_be_public() -> None:
    assert resolve_public("a.example.com", 443, resolver=Lookups([[PUBLIC]])) == [ip_address(PUBLIC)]
    for inside in (
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "::1",
        "fe80::1%eth0",
        "::ffff:8.8.8.8",
        "nonsense",
    ):
        with pytest.raises(NotPublicError):
            resolve_public("a.example.com", 443, resolver=Lookups([[PUBLIC, inside]]))
    with pytest.raises(NameLookupError):
        resolve_public("a.example.com", 443, resolver=Lookups([[]]))


def test_an_allowed_name_may_resolve_inside_but_not_to_metadata() -> None:
    allowed = frozenset({"models.example.com:443"})
    inside = Lookups([["10.0.0.7"]])
    found = resolve_public("models.example.com", 443, allow_private=allowed, resolver=inside)
    assert found == [ip_address("10.0.0.7")]
    with pytest.raises(NotPublicError):
        resolve_public("models.example.com", 8443, allow_private=allowed, resolver=inside)
    with pytest.raises(NotPublicError):
        metadata = Lookups([["169.254.169.254"]])
        resolve_public("models.example.com", 443, allow_private=allowed, resolver=metadata)


def test_this_machines_own_public_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2a.core.addresses.is_own_address", lambda address: str(address) == PUBLIC)
    assert address_refusal(ip_address(PUBLIC)) == f"{PUBLIC} is this machine"
    assert address_refusal(ip_address("8.8.8.8")) is None


def test_the_routing_table_knows_which_addresses_are_ours() -> None:
    from e2a.core.addresses import is_own_address

    assert is_own_address(ip_address("127.0.0.1"))
    assert not is_own_address(ip_address("8.8.8.8"))
