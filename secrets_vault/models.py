"""Secret bundles. Values exist here only as AES-256-GCM ciphertext under a tenant's own data key."""

from __future__ import annotations

from django.db import models

from accounts.models import Tenant
from e2a.core.ids import PublicIdField


class DataKey(models.Model):
    """A tenant's data key, wrapped by the key of the ring that `wrapping_key_id` names. Deleting it shreds
    everything.
    """

    tenant = models.OneToOneField(Tenant, on_delete=models.CASCADE, related_name="data_key")
    wrapping_key_id = models.CharField(max_length=16, db_index=True)
    wrapped = models.BinaryField()
    created_at = models.DateTimeField(auto_now_add=True)
    rewrapped_at = models.DateTimeField(null=True, blank=True)

    def __str__(self) -> str:
        return f"data key of {self.tenant}"


class Bundle(models.Model):
    public_id = PublicIdField("sec")
    tenant = models.ForeignKey(Tenant, on_delete=models.CASCADE, related_name="bundles")
    name = models.CharField(max_length=63)
    version = models.PositiveIntegerField(default=1)
    is_inline = models.BooleanField(
        default=False, help_text="Made for one sandbox from its request; not listed."
    )
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["tenant", "name"], name="bundle_name_once")]

    def __str__(self) -> str:
        return self.name


class BundleVersion(models.Model):
    """One whole state of a bundle. The last ten are kept."""

    bundle = models.ForeignKey(Bundle, on_delete=models.CASCADE, related_name="versions")
    version = models.PositiveIntegerField()
    created_at = models.DateTimeField(auto_now_add=True)
    created_by = models.CharField(max_length=64, blank=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["bundle", "version"], name="bundle_version_once")]

    def __str__(self) -> str:
        return f"{self.bundle} v{self.version}"


class SecretValue(models.Model):
    """One value of one version. `inject` is metadata of egress injection, or null; it holds no secret."""

    bundle_version = models.ForeignKey(BundleVersion, on_delete=models.CASCADE, related_name="values_set")
    name = models.CharField(max_length=128)
    ciphertext = models.BinaryField(editable=False)
    size = models.PositiveIntegerField()
    inject = models.JSONField(null=True, blank=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["bundle_version", "name"], name="secret_name_once")]

    def __str__(self) -> str:
        return self.name


class BundleUse(models.Model):
    """A live holder of a bundle: a session or a sandbox, by public id. Released when the holder ends."""

    bundle = models.ForeignKey(Bundle, on_delete=models.CASCADE, related_name="uses")
    holder = models.CharField(max_length=40, db_index=True)
    position = models.PositiveSmallIntegerField(default=0)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["bundle", "holder"], name="bundle_use_once")]

    def __str__(self) -> str:
        return f"{self.holder} uses {self.bundle}"
