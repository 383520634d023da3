"""API keys: a look-up part, a keyed digest, and what the key may do. Never the key."""

from __future__ import annotations

import datetime as dt

from django.db import models

from accounts.models import Tenant, User
from e2a.core.clock import now
from e2a.core.ids import PublicIdField


class ApiKey(models.Model):
    """One key. It works until `revoked_at` and `expires_at`, whichever is first; both may lie ahead.

    `revoked_at` lies ahead while a rotated key has its grace time. `end_told_at` is when the sessions that
    the key opened were told of its end. `pepper_id` is the signing key that `digest` was made with.
    """

    public_id = PublicIdField("key")
    tenant = models.ForeignKey(Tenant, on_delete=models.CASCADE, related_name="api_keys")
    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="api_keys")
    name = models.CharField(max_length=100, blank=True)
    lookup = models.CharField(max_length=21, unique=True, editable=False)
    prefix = models.CharField(max_length=12, editable=False)
    last_four = models.CharField(max_length=4, editable=False)
    digest = models.CharField(max_length=64, editable=False)
    pepper_id = models.CharField(max_length=16, editable=False)
    scopes = models.JSONField(default=list)
    created_at = models.DateTimeField()
    last_used_at = models.DateTimeField(null=True, blank=True)
    last_used_address = models.CharField(max_length=45, blank=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)
    end_told_at = models.DateTimeField(null=True, blank=True, editable=False)

    class Meta:
        verbose_name = "API key"
        indexes = [models.Index(fields=["tenant", "-id"], name="apikey_tenant")]

    def __str__(self) -> str:
        return f"{self.prefix}…{self.last_four}"

    def is_live(self, moment: dt.datetime | None = None) -> bool:
        """Whether the key itself works at `moment` (default now). Says nothing of its user or tenant."""
        moment = moment or now()
        revoked = self.revoked_at is not None and self.revoked_at <= moment
        expired = self.expires_at is not None and self.expires_at <= moment
        return not revoked and not expired

    @property
    def is_revoked(self) -> bool:
        return self.revoked_at is not None and self.revoked_at <= now()

    @property
    def state(self) -> str:
        """`active`, `expiring` (rotated, in its grace time), `expired` or `revoked`, for people."""
        if self.is_revoked:
            return "revoked"
        if not self.is_live():
            return "expired"
        return "active" if self.revoked_at is None else "expiring"
