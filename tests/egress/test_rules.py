"""What an egress rule means, exactly (SECURITY 5.7)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2a.core.errors import ValidationFailed
from sandboxes.egress.rules import BadHost, EgressRules, Rule, host_normal, rule_parse


def allowed(rule: str, host: str, port: int = 443) -> bool:
    return EgressRules.parse({"allow": [rule]}).verdict(host_normal(host), port).is_allowed


@pytest.mark.parametrize(
    ("rule", "host", "port", "expected"),
    [
        ("api.example.com", "api.example.com", 443, True),
        ("api.example.com", "api.example.com", 80, True),
        ("api.example.com", "api.example.com", 8443, False),
        ("api.example.com:8443", "api.example.com", 8443, True),
        ("api.example.com:8443", "api.example.com", 443, False),
        ("api.example.com", "API.Example.COM", 443, True),
        ("API.Example.COM", "api.example.com", 443, True),
        ("api.example.com", "api.example.com.", 443, True),
        ("api.example.com.", "api.example.com", 443, True),
        ("api.example.com", "xapi.example.com", 443, False),
        ("api.example.com", "api.example.com.evil.org", 443, False),
        ("*.example.com", "a.example.com", 443, True),
        ("*.example.com", "a.b.example.com", 443, True),
        ("*.example.com", "example.com", 443, False),
        ("*.example.com", "evilexample.com", 443, False),
        ("*.example.com", "a.evilexample.com", 443, False),
        ("*.example.com:8080", "a.example.com", 8080, True),
        ("*.example.com:8080", "a.example.com", 443, False),
        ("bücher.example", "xn--bcher-kva.example", 443, True),
        ("xn--bcher-kva.example", "bücher.example", 443, True),
        ("BÜCHER.example", "bücher.example", 443, True),
        ("*", "anything.example.org", 443, True),
        ("*", "anything.example.org", 22, False),
        ("*:22", "anything.example.org", 22, True),
        ("*", "203.0.113.7", 443, False),
        ("*", "2001:db8::1", 443, False),
        ("203.0.113.7", "203.0.113.7", 443, True),
        ("203.0.113.7:8080", "203.0.113.7", 8080, True),
        ("203.0.113.7", "203.0.113.8", 443, False),
        ("[2001:db8::1]", "2001:0db8:0:0::1", 443, True),
        ("[2001:db8::1]:8080", "[2001:db8::1]", 8080, True),
        ("2001:db8::1", "[2001:DB8::1]", 443, True),
    ],
)
def test_what_a_rule_lets_out(rule: str, host: str, port: int, expected: bool) -> None:
    assert allowed(rule, host, port) is expected


def test_default_deny_and_deny_beats_allow() -> None:
    assert EgressRules().verdict("example.com", 443).reason == "not_allowed"
    rules = EgressRules.parse(
        {"allow": ["*.example.com", "*"], "deny": ["bad.example.com", "*.bad.example.com:443"]}
    )
    assert rules.verdict("good.example.com", 443).rule == "*.example.com"
    assert rules.verdict("bad.example.com", 443).reason == "denied"
    assert rules.verdict("a.bad.example.com", 443).rule == "*.bad.example.com:443"
    assert rules.verdict("a.bad.example.com", 80).is_allowed


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "http://example.com", "example.com/path", "user@example.com", "example.com:0", "example.com:65536",
        "example.com:", "example.com:https", "a b.example.com", "example..com", ".example.com", "*.", "**.example.com",
        "a.*.example.com", "*example.com", "*.*.example.com", "localhost", "*.localhost", "metadata.google.internal",
        "*.internal", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "*.203.0.113.7", "[203.0.113.7]", "[::1",
        "fe80::1%eth0", "example.com\n", "exa\u2028mple.com", "a" * 64 + ".example.com", "x" * 301, "-a.example.com",
        "10-0-0-1.nip.io", "printer",
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused(text: str) -> None:
    if text.strip() != text and text.strip():
        assert str(rule_parse(text)) == text.strip()  # Blanks around it are nobody's intention.
        return
    with pytest.raises(BadHost):
        rule_parse(text)


def test_every_bad_entry_is_named() -> None:
    with pytest.raises(ValidationFailed) as refused:
        EgressRules.parse({"allow": ["good.example.com", "bad/host", 7], "deny": "example.com"})
    assert [(error.field, error.code) for error in refused.value.errors] == [
        ("egress.allow.1", "bad_egress"), ("egress.allow.2", "bad_egress"), ("egress.deny", "bad_egress"),
    ]  # fmt: skip
    wrong: list[object] = [None, [], "x", {"allow": [], "block": []}, {"allow": ["a.example.com"] * 201}]
    for body in wrong:
        with pytest.raises(ValidationFailed):
            EgressRules.parse(body)


def test_what_is_stored_means_the_same() -> None:
    rules = EgressRules.parse(
        {"allow": ["*.Example.com:8443", "[2001:db8::1]:443", "*", "bücher.example"], "deny": ["203.0.113.7"]}
    )
    assert EgressRules.stored(rules.as_json()) == rules
    assert EgressRules.parse(rules.as_json()) == rules
    assert EgressRules.stored({}) == EgressRules()


def test_a_template_and_a_request_are_joined() -> None:
    template = EgressRules.parse({"allow": ["a.example.com"], "deny": ["b.example.com"]})
    request = EgressRules.parse({"allow": ["b.example.com", "a.example.com"]})
    joined = template.joined(request)
    assert [str(rule) for rule in joined.allow] == ["a.example.com", "b.example.com"]
    assert not joined.verdict("b.example.com", 443).is_allowed


_labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
_names = st.lists(_labels, min_size=1, max_size=4).map(".".join)


@given(_names, _names, st.sampled_from([80, 443, 22]))
def test_a_wildcard_is_for_whole_labels_below_only(base: str, host: str, port: int) -> None:
    rule = Rule(base, below=True, port=None)
    labels, wanted = host.split("."), base.split(".")
    below = len(labels) > len(wanted) and labels[-len(wanted) :] == wanted
    assert rule.matches(host, port) is (below and port in (80, 443))


@given(st.text(max_size=60))
def test_any_text_is_a_rule_in_normal_form_or_refused(text: str) -> None:
    try:
        rule = rule_parse(text)
    except BadHost:
        return
    assert rule_parse(str(rule)) == rule
