"""Core's own tables: stored answers of idempotent requests, and the audit trail."""

from __future__ import annotations

from django.db import models


class IdempotencyRecord(models.Model):
    """One answer kept for 24 h under (tenant, method, path, key).

    Both digests are keyed; an answer that shows a credential is encrypted under the raw key, so that
    the database alone cannot read it. `status` is `None` while the first request still runs.
    """

    tenant_id = models.BigIntegerField()
    scope = models.CharField(max_length=300)
    key_digest = models.CharField(max_length=64)
    body_digest = models.CharField(max_length=64)
    status = models.PositiveSmallIntegerField(null=True)
    answer = models.BinaryField(default=b"")
    is_sealed = models.BooleanField(default=False)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["tenant_id", "scope", "key_digest"], name="idempotency_once"),
        ]
        indexes = [models.Index(fields=["created_at"], name="idempotency_age")]

    def __str__(self) -> str:
        return f"{self.scope} {self.key_digest[:8]}"


class AuditEvent(models.Model):
    """Who did what to what, from where. Never a secret, never a code."""

    created_at = models.DateTimeField(auto_now_add=True)
    action = models.CharField(max_length=64)
    actor = models.CharField(max_length=64, blank=True)
    tenant_id = models.BigIntegerField(null=True)
    target = models.CharField(max_length=64, blank=True)
    address = models.CharField(max_length=45, blank=True)
    user_agent = models.CharField(max_length=200, blank=True)
    detail = models.JSONField(default=dict)

    class Meta:
        indexes = [
            models.Index(fields=["tenant_id", "-id"], name="audit_tenant"),
            models.Index(fields=["address", "action", "created_at"], name="audit_source"),
        ]

    def __str__(self) -> str:
        return f"{self.action} {self.target}"
