"""Operators' own templates: a trial run on real Docker decides, and says why it refuses."""

from __future__ import annotations

import io
import json
import secrets
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from typing import Any

import docker
import pytest
from django.core.management import CommandError, call_command
from django.test import Client
from docker.errors import ImageNotFound

from accounts.models import User
from e2a.core.errors import Conflict, ValidationFailed
from sandboxes.image_build import LABEL
from sandboxes.image_names import is_image_name
from sandboxes.image_prune import images_prune
from sandboxes.models import Node, Sandbox, SandboxState, Template, TemplateState
from sandboxes.template_admin import TemplateForm
from sandboxes.templates import template_add, template_try_again
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, wait_until
from tests.sandboxes.test_api_refusals import refused
from tests.sandboxes.test_warm_and_cold import exec_in, made

pytestmark = pytest.mark.one_database

MakeNode = Callable[..., RunningNode]
MakeImage = Callable[..., str]


@pytest.fixture(scope="session")
def make_image() -> Iterator[MakeImage]:
    """`make_image("RUN true", base=…)`: an image as an operator could have one. Removed at the end."""
    from sandboxes.image_build import build_image

    client = docker.APIClient()
    made_tags: list[str] = []

    def make(*lines: str, base: str = "", tag: str = "", labels: dict[str, str] | None = None) -> str:
        base = base or build_image("standard", say=lambda _line: None).tag
        tag = tag or f"e2a-test-own/{secrets.token_hex(6)}:1"
        text = "\n".join([f"FROM {base}", *lines]).encode()
        folder = io.BytesIO()
        with tarfile.open(fileobj=folder, mode="w") as archive:
            entry = tarfile.TarInfo("Dockerfile")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
        folder.seek(0)
        steps = list(
            client.build(
                fileobj=folder,
                custom_context=True,
                tag=tag,
                rm=True,
                decode=True,
                labels=labels or {},
                network_mode="none",
            )
        )
        assert not [step for step in steps if "error" in step], steps
        made_tags.append(tag)
        return tag

    yield make
    for row in client.images(filters={"label": LABEL}):
        own = [tag for tag in row["RepoTags"] or () if tag.startswith("e2a/own-t-")]
        made_tags.extend(own)
    for tag in made_tags:
        with suppress(ImageNotFound):
            client.remove_image(tag, force=True)
    client.close()


@pytest.fixture
def docker_node(make_node: MakeNode) -> RunningNode:
    return make_node(engine="docker")


def own(image: str, **values: Any) -> Template:
    name = f"t-{secrets.token_hex(4)}"
    sizes: dict[str, Any] = {"vcpu": Decimal("0.5"), "memory_mib": 256, "disk_mib": 256}
    return template_add(name=name, image=image, **(sizes | values))


def tried(template: Template) -> Template:
    """The template after its trial."""

    def over() -> bool:
        template.refresh_from_db()
        return template.state != TemplateState.TRYING

    wait_until(over, seconds=120, what=f"the trial of {template.name} ({template.refusal})")
    return template


def refusal(image: str, **values: Any) -> str:
    template = tried(own(image, **values))
    assert (template.state, template.is_enabled) == (TemplateState.REFUSED, False)
    return template.refusal


def containers_of(node: RunningNode) -> list[Any]:
    return node.host.engine.list_labelled(node.host.instance)


def test_an_image_of_ones_own_is_usable_once_its_trial_passed(
    docker_node: RunningNode, worker: Any, as_alice: Api, make_image: MakeImage
) -> None:
    image = make_image(
        "ENV TOOL_HOME=/opt/tool", "RUN mkdir /opt/tool && echo yes >/opt/tool/here", "USER 1000"
    )
    template = own(image)
    refused(as_alice.post("/v1/sandboxes", {"template": template.name}), 400, "unknown_template")
    assert tried(template).state == TemplateState.READY, template.refusal
    assert template.is_enabled
    assert template.image == image
    assert template.image_id == Node.objects.get().images[template.name]["id"]
    assert containers_of(docker_node) == []
    shown = {one["name"]: one for one in as_alice.get("/v1/templates").json()["templates"]}
    assert shown[template.name]["available"]

    sandbox = made(as_alice, template=template.name)["vm_id"]
    ran = exec_in(as_alice, sandbox, "cat $TOOL_HOME/here; id -u; pwd; touch /here")
    slot = Sandbox.objects.get(public_id=sandbox).slot
    assert slot is not None
    assert ran["stdout"] == f"yes\n{10000 + slot}\n/workspace\n"
    assert "Read-only file system" in ran["stderr"]


def test_what_is_pinned_does_not_follow_the_tag(
    docker_node: RunningNode, worker: Any, as_alice: Api, make_image: MakeImage
) -> None:
    image = make_image("RUN echo first >/etc/edition")
    template = tried(own(image))
    make_image("RUN echo second >/etc/edition", tag=image)
    sandbox = made(as_alice, template=template.name)["vm_id"]
    assert exec_in(as_alice, sandbox, "cat /etc/edition")["stdout"] == "first\n"
    assert template_try_again(template=template)
    tried(template)
    sandbox = made(as_alice, template=template.name)["vm_id"]
    assert exec_in(as_alice, sandbox, "cat /etc/edition")["stdout"] == "second\n"


def test_a_broken_image_is_refused_with_the_reason(docker_node: RunningNode, make_image: MakeImage) -> None:
    old = "#!/bin/sh\\necho 3.9; case $* in *version_info[*) exit 0;; *) exit 1;; esac\\n"
    old_python = f"RUN rm /usr/bin/python3 && printf '{old}' >/usr/bin/python3 && chmod +x /usr/bin/python3"
    hidden = "RUN rm /usr/bin/python3 /usr/bin/python"
    assert "there is no image e2a-test-own/never:built on the node" in refusal("e2a-test-own/never:built")
    assert "no /bin/bash" in refusal(make_image("RUN rm /usr/bin/bash"))
    assert "no python3" in refusal(make_image(hidden))
    assert "3.11 or newer" in refusal(make_image(old_python))
    assert "no /bin/sh" in refusal(make_image('ENTRYPOINT ["/x"]', base="scratch"))
    assert "volumes (/data)" in refusal(make_image("VOLUME /data"))
    assert "ONBUILD" in refusal(make_image("ONBUILD RUN true"))
    shadowed = make_image(
        "RUN rm /usr/bin/true && printf '#!/bin/sh\\nexit 3\\n' >/etc/true && chmod +x /etc/true",
        "ENV BASH_ENV=/etc/env",
        "RUN echo 'true() { return 3; }' >/etc/env",
    )
    assert "`true` does not run in it (exit code 3)" in refusal(shadowed)
    assert containers_of(docker_node) == []
    assert not any(name.startswith("t-") for name in Node.objects.get().images)


def test_an_image_for_another_machine_is_refused(docker_node: RunningNode, make_image: MakeImage) -> None:
    tag = make_image()
    client = docker.APIClient()
    with tarfile.open(fileobj=io.BytesIO(b"".join(client.get_image(tag))), mode="r") as archive:
        files = {one.name: archive.extractfile(one) for one in archive.getmembers() if one.isfile()}
        contents = {name: file.read() for name, file in files.items() if file is not None}
    manifest = json.loads(contents["manifest.json"])
    config = json.loads(contents[manifest[0]["Config"]]) | {"architecture": "s390x"}
    contents[manifest[0]["Config"]] = json.dumps(config).encode()
    manifest[0]["RepoTags"] = [other := f"e2a-test-own/{secrets.token_hex(6)}:other"]
    contents["manifest.json"] = json.dumps(manifest).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in contents.items():
            if name != "repositories":
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    list(client.load_image(packed.getvalue()))  # type: ignore[no-untyped-call]
    try:
        assert "it is for linux/s390x, and the node is linux/" in refusal(other)
    finally:
        client.remove_image(other, force=True)
        client.close()


def test_too_little_memory_is_refused_with_the_reason(
    docker_node: RunningNode, make_image: MakeImage
) -> None:
    hungry = make_image(
        "ENV BASH_ENV=/etc/env", "RUN echo 'x=$(head -c 200M /dev/zero | tr \"\\\\0\" x)' >/etc/env"
    )
    assert "`true` does not run in it" in refusal(hungry, memory_mib=64)


def test_names_are_checked_before_any_node_sees_them(db: None) -> None:
    for image in (
        "$(touch /tmp/x)",
        "a b",
        "image;rm -rf /",
        "-v",
        "Image",
        "a\nRUN x",
        "a:",
        "",
        "x" * 301,
        "../x",
    ):
        assert not is_image_name(image), image
        with pytest.raises(ValidationFailed):
            own(image)
    for image in (
        "python:3.12-slim",
        "registry.test:5000/team/app@sha256:" + "0" * 64,
        "localhost/a_b/c.d:V1",
    ):
        assert is_image_name(image), image
    sizes: dict[str, Any] = {"vcpu": Decimal(1), "memory_mib": 256, "disk_mib": 256}
    for name in ("Own", "own_x", "-own", "o" * 64, "own/x"):
        with pytest.raises(ValidationFailed):
            template_add(name=name, image="a", **sizes)
    with pytest.raises(Conflict):
        template_add(name="standard", image="a", **sizes)
    assert not Template.objects.filter(is_custom=True).exists()


def test_a_trial_whose_message_was_lost_is_found_by_the_node(
    make_node: MakeNode, make_image: MakeImage
) -> None:
    template = own(make_image())
    assert template.state == TemplateState.TRYING
    make_node(engine="docker")
    assert tried(template).state == TemplateState.READY, template.refusal


def test_the_admin_adds_one_and_shows_how_its_trial_ended(
    docker_node: RunningNode, worker: Any, make_image: MakeImage
) -> None:
    operator = User.objects.create_superuser(email="operator@example.com", password="x" * 20)
    desk = Client()
    desk.force_login(operator)
    pages = "/admin/sandboxes/template"
    form = {"name": "t-desk", "image": "a b", "vcpu": "1", "memory_mib": "256", "disk_mib": "256", "pids": "128",
            "shm_mib": "64", "description": "Mine", "runtime": ""}  # fmt: skip
    wrong = desk.post(f"{pages}/add/", form)
    assert (wrong.status_code, b"It is not the name of an image" in wrong.content) == (200, True)
    assert desk.post(f"{pages}/add/", form | {"image": "e2a-test-own/never:built"}).status_code == 302
    template = tried(Template.objects.get(name="t-desk"))
    assert template.is_custom
    page = desk.get(f"{pages}/{template.pk}/change/").content.decode()
    assert "there is no image e2a-test-own/never:built on the node" in page
    # Refused, it cannot be switched on.
    desk.post(f"{pages}/{template.pk}/change/", {"is_enabled": "on", "runtime": ""})
    template.refresh_from_db()
    assert not template.is_enabled

    again = {"action": "try_again", "_selected_action": [str(template.pk)]}
    Template.objects.filter(pk=template.pk).update(image=make_image())
    assert desk.post(f"{pages}/", again).status_code == 302
    assert tried(template).state == TemplateState.READY, template.refusal
    assert "yes, on local" in desk.get(f"{pages}/{template.pk}/change/").content.decode()


def test_the_command_adds_one_and_says_how_its_trial_ended(
    docker_node: RunningNode, worker: Any, make_image: MakeImage, capsys: pytest.CaptureFixture[str]
) -> None:
    call_command("template_add", "t-shell", make_image(), "--vcpu", "0.5", "--memory-mib", "256")
    template = Template.objects.get(name="t-shell")
    assert f"t-shell is ready: {template.image_id}" in capsys.readouterr().out
    assert (template.vcpu, template.memory_mib) == (Decimal("0.5"), 256)
    with pytest.raises(CommandError, match="there is no image e2a-test-own/never:built"):
        call_command("template_add", "t-broken", "e2a-test-own/never:built")
    with pytest.raises(CommandError, match="not the name of an image"):
        call_command("template_add", "t-wrong", "; true")


def test_an_unknown_runtime_refuses_and_never_falls_back(
    docker_node: RunningNode, worker: Any, as_alice: Api, make_image: MakeImage
) -> None:
    assert "runc" in Node.objects.get().runtimes
    assert "runsc" not in Node.objects.get().runtimes
    assert "this node has no runtime runsc; it has " in refusal(make_image(), runtime="runsc")
    Template.objects.filter(name="standard").update(runtime="runsc")
    answer = as_alice.post("/v1/sandboxes", {})
    refused(answer, 503, "runtime_unavailable")
    assert "runsc" in answer.json()["detail"]
    shown = {one["name"]: one["available"] for one in as_alice.get("/v1/templates").json()["templates"]}
    assert not shown["standard"]
    assert not Sandbox.objects.exists()
    Template.objects.filter(name="standard").update(runtime="runc")
    sandbox = made(as_alice)["vm_id"]
    assert exec_in(as_alice, sandbox, "echo here")["stdout"] == "here\n"
    container = containers_of(docker_node)[0].container_id
    client = docker.APIClient()
    assert client.inspect_container(container)["HostConfig"]["Runtime"] == "runc"
    client.close()


def test_another_runtime_ends_what_is_parked_with_the_old_one(make_node: MakeNode) -> None:
    from sandboxes.templates import template_changed

    node = make_node(engine="docker", pool=1)
    old = node.wait_parked(1)[0]
    Template.objects.filter(name="standard").update(runtime="runsc")
    assert template_changed(Template.objects.get(name="standard")) <= 1
    wait_until(
        lambda: not Sandbox.objects.filter(state=SandboxState.PARKED).exists(), what="no parked one is left"
    )
    old.refresh_from_db()
    assert old.state in (SandboxState.STOPPING, SandboxState.DESTROYED)


def test_only_unused_images_are_pruned(make_image: MakeImage) -> None:
    repository = f"e2a-prune-{secrets.token_hex(4)}"
    labels = {LABEL: "standard"}
    kept, unused, used = (
        make_image(f"RUN echo {name} >/etc/{name}", tag=f"{repository}/standard:{name}", labels=labels)
        for name in ("kept", "unused", "used")
    )
    foreign = make_image(
        "RUN echo foreign >/etc/foreign", tag=f"other-{repository}/standard:1", labels=labels
    )
    client = docker.APIClient()
    container = client.create_container(used, command=["true"])
    try:
        assert images_prune({kept}, repository=repository) == [unused]
        there = {tag for row in client.images() for tag in row["RepoTags"] or ()}
        assert {kept, used, foreign} <= there
        assert unused not in there
    finally:
        client.remove_container(container["Id"], force=True)
        client.close()


def test_an_image_that_is_wanted_is_built_by_a_node(
    docker_node: RunningNode, worker: Any, as_alice: Api, template_images: dict[str, str]
) -> None:
    Node.objects.update(images={"standard": Node.objects.get().images["standard"]})
    answer = as_alice.post("/v1/sandboxes", {"template": "canvas"})
    refused(answer, 503, "template_not_ready")
    assert int(answer["Retry-After"]) > 0
    wait_until(lambda: "canvas" in Node.objects.get().images, seconds=120, what="canvas on the node")
    wait_until(lambda: Template.objects.get(name="canvas").wanted_at is None, what="the wish is fulfilled")
    assert made(as_alice, template="canvas")["state"] == "creating"


def test_egress_rules_of_a_template_are_checked_and_kept_in_one_form(db: None) -> None:
    template = Template.objects.get(name="standard")

    def form(egress: str) -> TemplateForm:
        kept = {name: getattr(template, name) for name in TemplateForm.Meta.fields if name != "egress"}
        return TemplateForm(data={**kept, "egress": egress}, instance=template)

    good = form('{"allow": ["PyPI.org.", "*.example.com:8443"]}')
    assert good.is_valid(), good.errors
    assert good.cleaned_data["egress"] == {"allow": ["pypi.org", "*.example.com:8443"], "deny": []}
    assert form("").is_valid()
    bad = form('{"allow": ["http://pypi.org/", "bad host"], "deny": ["fine.example"]}')
    assert [str(text).partition(":")[0] for text in bad.errors["egress"]] == [
        "egress.allow.0",
        "egress.allow.1",
    ]
    assert not form('{"may": ["pypi.org"]}').is_valid()
