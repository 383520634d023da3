"""The dashboard's Secrets pages: forms that take values, pages that never show one."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.test import Client

from secrets_vault import services
from secrets_vault.models import Bundle
from tests.secrets_vault.conftest import PLANTED

pytestmark = pytest.mark.django_db


@pytest.fixture
def browser(alice: Any) -> Client:
    client = Client()
    client.force_login(alice)
    return client


@pytest.fixture
def bundle(alice: Any) -> Bundle:
    values = {
        "LLM_API_KEY": PLANTED,
        "TOKEN": PLANTED,
        "SENT": {"value": PLANTED, "inject": {"hosts": ["api.example.com"], "header": "A: {value}"}},
    }
    services.bundle_create(tenant=alice.tenant, name="default", values=values)
    return Bundle.objects.get(name="default")


def opened(bundle: Bundle) -> dict[str, str]:
    values = services.values_read(bundles=[Bundle.objects.get(pk=bundle.pk)], purpose="test")
    return {name: value.text.reveal() for name, value in values.items()}


@pytest.mark.parametrize("path", ["/secrets", "/secrets/default"])
def test_the_pages_want_a_signed_in_person(client: Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 302
    assert answer["Location"].startswith("/sign-in")


def test_an_empty_list_says_what_to_do(browser: Client) -> None:
    answer = browser.get("/secrets")
    assert answer.status_code == 200
    assert "No bundle yet" in answer.content.decode()
    assert "no-store" in answer["Cache-Control"]


def test_a_bundle_is_made_with_the_form_and_its_page_follows(browser: Client, alice: Any) -> None:
    form = {
        "name": "default", "llm_api_key": "sk-12345678", "llm_base_url": "", "llm_model": "some-model",
        "name_0": "GITHUB_TOKEN", "value_0": " 12345678 ", "name_1": "", "value_1": "",
    }  # fmt: skip
    answer = browser.post("/secrets", form, follow=True)
    assert answer.redirect_chain == [("/secrets/default", 302)]
    assert "Bundle default is made." in answer.content.decode()
    assert opened(Bundle.objects.get()) == {
        "LLM_API_KEY": "sk-12345678",
        "LLM_MODEL": "some-model",
        "GITHUB_TOKEN": " 12345678 ",
    }


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"name": "BAD", "llm_api_key": PLANTED}, "does not begin with"),
        ({"name": "b"}, "at least one value"),
        ({"name": "b", "llm_api_key": "short"}, "at least 8"),
        ({"name": "b", "llm_api_key": PLANTED, "llm_base_url": "http://localhost"}, "not allowed"),
        ({"name": "b", "name_0": "PATH", "value_0": PLANTED}, "reserved"),
        ({"name": "b", "name_0": "", "value_0": PLANTED}, "both a name and a value"),
        ({"name": "b", "name_0": "A", "value_0": PLANTED, "name_1": "A", "value_1": PLANTED}, "there twice"),
        ({"name": "b", "name_0": PLANTED, "value_0": "12345678"}, "is not made of"),
        ({"name": "default", "llm_api_key": PLANTED}, "already"),
    ],
)
def test_a_refused_form_says_why_and_gives_no_value_back(
    browser: Client, bundle: Bundle, form: dict[str, str], message: str
) -> None:
    answer = browser.post("/secrets", form)
    assert answer.status_code == 400
    body = answer.content.decode()
    assert message in body
    assert f'value="{PLANTED}"' not in body or form.get("name_0") == PLANTED
    assert Bundle.objects.count() == 1


def test_4_3_no_page_holds_a_value(browser: Client, bundle: Bundle) -> None:
    for path in ("/secrets", "/secrets/default", "/secrets/default?value=TOKEN"):
        body = browser.get(path).content.decode()
        assert PLANTED not in body
        assert "TOKEN" in body


def test_value_inputs_are_hidden_and_not_filled_in(browser: Client, bundle: Bundle) -> None:
    for path in ("/secrets", "/secrets/default?value=TOKEN"):
        inputs = re.findall(r"<input[^>]*>", browser.get(path).content.decode())
        values = [tag for tag in inputs if re.search(r'name="(value|value_\d|llm_\w+)"', tag)]
        assert values
        for tag in values:
            assert 'autocomplete="off"' in tag
            assert " value=" not in tag
            assert 'type="password"' in tag or re.search(r'name="llm_(base_url|model)"', tag)


def test_a_value_is_replaced_and_a_running_session_is_mentioned(
    browser: Client, bundle: Bundle, hold: Any
) -> None:
    hold("ses_a", "default")
    prepared = browser.get("/secrets/default?value=TOKEN").content.decode()
    assert re.search(r'<input[^>]*name="name"[^>]*value="TOKEN"', prepared)
    answer = browser.post("/secrets/default/values", {"name": "TOKEN", "value": "new-value"}, follow=True)
    assert "TOKEN is set; 1 running session will use it." in answer.content.decode()
    assert opened(bundle)["TOKEN"] == "new-value"
    assert opened(bundle)["LLM_API_KEY"] == PLANTED


def test_a_refused_value_stays_on_the_page_with_the_reason(browser: Client, bundle: Bundle) -> None:
    answer = browser.post("/secrets/default/values", {"name": "TOKEN", "value": "short"})
    assert answer.status_code == 400
    assert "at least 8" in answer.content.decode()
    answer = browser.post(
        "/secrets/default/values", {"name": "LLM_BASE_URL", "value": "https://new.example.com"}
    )
    assert "give the key again" in answer.content.decode()
    assert Bundle.objects.get().version == 1


def test_a_value_is_removed_a_version_comes_back_and_the_bundle_goes(
    browser: Client, bundle: Bundle, hold: Any
) -> None:
    browser.post("/secrets/default/values/remove", {"name": "TOKEN"})
    assert sorted(opened(bundle)) == ["LLM_API_KEY", "SENT"]
    browser.post("/secrets/default/rollback", {"version": "1"})
    assert sorted(opened(bundle)) == ["LLM_API_KEY", "SENT", "TOKEN"]
    hold("ses_a", "default")
    answer = browser.post("/secrets/default/delete", follow=True)
    assert "in use by ses_a" in answer.content.decode()
    answer = browser.post("/secrets/default/delete", {"force": "true"}, follow=True)
    assert answer.redirect_chain == [("/secrets", 302)]
    assert Bundle.objects.count() == 0


def test_the_page_says_where_each_value_goes(browser: Client, bundle: Bundle) -> None:
    body = browser.get("/secrets/default").content.decode()
    for words in ("the model, outside the sandbox", "environment of commands", "requests to api.example.com"):
        assert words in body


@pytest.mark.parametrize("path", ["", "/values", "/values/remove", "/rollback", "/delete"])
def test_a_strangers_bundle_is_a_missing_page(bundle: Bundle, mallory: Any, path: str) -> None:
    client = Client()
    client.force_login(mallory)
    form = {"name": "TOKEN", "value": "12345678", "version": "1", "force": "true"}
    answers = []
    for name in ("default", "missing"):
        url = f"/secrets/{name}{path}"
        answers.append(client.post(url, form) if path else client.get(url))
    assert [answer.status_code for answer in answers] == [404, 404]
    assert Bundle.objects.get().version == 1


def test_forms_need_their_csrf_token_and_a_get_changes_nothing(alice: Any, bundle: Bundle) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(alice)
    for path in ("/values", "/values/remove", "/rollback", "/delete"):
        assert (
            client.post(f"/secrets/default{path}", {"name": "TOKEN", "value": "12345678"}).status_code == 403
        )
        assert client.get(f"/secrets/default{path}").status_code == 405
    assert Bundle.objects.get().version == 1
