"""Bodies and answers of `/v1/sandboxes/{id}/jobs`."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from rest_framework import serializers

from e2a.core.api import ClosedSerializer, StrictBooleanField, StrictCharField, StrictIntegerField
from sandboxes.models import JobState
from sandboxes.serializers import ExecSerializer

SIGNALS = ("TERM", "INT", "KILL", "HUP", "QUIT", "USR1", "USR2", "STOP", "CONT", "TSTP", "WINCH")


class JobCreateSerializer(ExecSerializer):
    """As for `exec`; without `timeout_seconds` it runs as long as the sandbox."""

    timeout_seconds = StrictIntegerField(required=False, allow_null=True, min_value=1, max_value=7200)
    keep_stdin_open = StrictBooleanField(default=False, help_text="More input follows by `…/stdin`.")


class JobSignalSerializer(ClosedSerializer):
    signal = serializers.ChoiceField(choices=SIGNALS)


class JobStdinSerializer(ClosedSerializer):
    """Text, or with `encoding: base64` any bytes; `close` ends the input behind them."""

    data = StrictCharField(  # type: ignore[assignment]  # DRF's metaclass takes fields out of the class.
        required=False, allow_blank=True, default="", max_length=1024 * 1024
    )
    encoding = serializers.ChoiceField(choices=["utf-8", "base64"], default="utf-8")
    close = StrictBooleanField(default=False)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        if attrs["encoding"] == "utf-8":
            attrs["data"] = attrs["data"].encode()
            return attrs
        try:
            attrs["data"] = base64.b64decode(attrs["data"], validate=True)
        except (binascii.Error, ValueError):
            raise serializers.ValidationError({"data": "This is not base64."}, code="invalid") from None
        return attrs


class JobSerializer(serializers.Serializer[Any]):
    job_id = serializers.CharField()
    state = serializers.ChoiceField(choices=JobState.values)
    command = serializers.CharField(help_text="Its beginning, with secrets redacted.")
    created_at = serializers.DateTimeField()
    ended_at = serializers.DateTimeField(allow_null=True)
    exit_code = serializers.IntegerField(allow_null=True, help_text="Null while it runs, and when unknown.")
    signal = serializers.CharField(allow_null=True)
    timed_out = serializers.BooleanField()
    oom = serializers.BooleanField()
    reason = serializers.CharField(
        allow_null=True,
        help_text="Of an `unknown` one: what its sandbox died of, or `forgotten` by its guest.",
    )
    output_bytes = serializers.IntegerField()


class JobListSerializer(serializers.Serializer[Any]):
    jobs = JobSerializer(many=True)
    next_cursor = serializers.CharField(allow_null=True)


class JobOutputPieceSerializer(serializers.Serializer[Any]):
    stream = serializers.ChoiceField(choices=["stdout", "stderr"])
    offset = serializers.IntegerField()
    data = serializers.CharField()  # type: ignore[assignment]  # As above.


class JobOutputSerializer(serializers.Serializer[Any]):
    output = JobOutputPieceSerializer(many=True)
    next_after = serializers.IntegerField(help_text="The next page's `after`.")
    dropped_bytes = serializers.IntegerField(help_text="Bytes behind `after` that are not kept any more.")
    has_ended = serializers.BooleanField(help_text="It has ended, and this is the last of its output.")


class JobStdinAnswerSerializer(serializers.Serializer[Any]):
    job_id = serializers.CharField()
    accepted_bytes = serializers.IntegerField()


class JobDeletedSerializer(serializers.Serializer[Any]):
    job_id = serializers.CharField()
    deleted = serializers.BooleanField()
