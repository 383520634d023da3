"""Who uses e2a: tenants, their people, and the sign-in flows that prove a mailbox."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from django.contrib.auth.models import AbstractBaseUser, BaseUserManager, PermissionsMixin
from django.db import models
from django.utils.crypto import salted_hmac

from e2a.core.ids import PublicIdField


class Tenant(models.Model):
    """What everything belongs to. Limits are per tenant and are settings of the row, not of the code."""

    public_id = PublicIdField("ten")
    name = models.CharField(max_length=120)
    plan_tier = models.CharField(max_length=32, default="free")
    max_live_sandboxes = models.PositiveIntegerField(default=20)
    max_tasks_queued = models.PositiveIntegerField(default=20)
    allowed_origins = models.JSONField(default=list, blank=True, help_text="Origins that may embed the chat.")
    suspended_at = models.DateTimeField(null=True, blank=True)
    erase_asked_at = models.DateTimeField(
        null=True, blank=True, help_text="An operator had it erased: its rows go as its sandboxes end."
    )
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.name

    @property
    def is_active(self) -> bool:
        return self.suspended_at is None


class UserManager(BaseUserManager["User"]):
    def create_superuser(self, email: str, password: str | None = None, **extra: Any) -> User:
        """`manage.py createsuperuser`: an operator with a tenant of their own."""
        from accounts.services import user_get_or_create

        user = user_get_or_create(address=email)
        user.is_staff = user.is_superuser = True
        user.set_password(password)
        user.save(update_fields=["is_staff", "is_superuser", "password"])
        return user

    def get_by_natural_key(self, username: str | None) -> User:
        from accounts.addresses import address_key

        return self.get(email_key=address_key(username or ""))


class User(AbstractBaseUser, PermissionsMixin):
    """A person with a mailbox. Mail goes to `email`; look-ups use `email_key` (SECURITY 1.11)."""

    public_id = PublicIdField("usr")
    tenant = models.ForeignKey(Tenant, on_delete=models.PROTECT, related_name="users")
    email = models.EmailField(max_length=254, unique=True)
    email_key = models.CharField(max_length=320, unique=True, editable=False)
    is_staff = models.BooleanField(default=False)
    is_active = models.BooleanField(default=True)
    token_version = models.PositiveIntegerField(default=1, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)

    objects: ClassVar[UserManager] = UserManager()

    USERNAME_FIELD = "email"
    REQUIRED_FIELDS: ClassVar[list[str]] = []

    def __str__(self) -> str:
        return self.email

    def get_session_auth_hash(self) -> str:
        """Binds dashboard sessions to `token_version` too: what ends a user's tokens ends the cookies."""
        return salted_hmac(
            "accounts.User.session", f"{self.password}|{self.token_version}", algorithm="sha256"
        ).hexdigest()

    def get_session_auth_fallback_hash(self) -> Iterator[str]:
        """None: Django's keys are not rotated with fall-backs; a new `SECRET_KEY` signs everybody out."""
        return iter(())


class LoginFlow(models.Model):
    """One asked-for code, which is nowhere itself: a signing key derives it from `nonce` (`accounts.codes`).

    `failures` and `closed_at` are written in a transaction of their own, so that no later error takes them
    back. `mailed_at` is when the mail left; `mail_claimed_at` is the lease of the task that is sending it.
    """

    login_id = models.CharField(max_length=40, unique=True)
    email = models.EmailField(max_length=254)
    email_key = models.CharField(max_length=320)
    nonce = models.CharField(max_length=32, editable=False)
    code_key_id = models.CharField(max_length=16, editable=False)
    code_digest = models.CharField(max_length=64, editable=False)
    is_long = models.BooleanField(default=False)
    failures = models.PositiveSmallIntegerField(default=0)
    source = models.CharField(max_length=45, blank=True, help_text="The caller's IPv4 address or IPv6 /64.")
    is_known_browser = models.BooleanField(default=False, help_text="Sent out of a known browser's reserve.")
    created_at = models.DateTimeField(db_index=True)
    expires_at = models.DateTimeField()
    closed_at = models.DateTimeField(null=True, blank=True)
    close_reason = models.CharField(max_length=16, blank=True)
    mail_claimed_at = models.DateTimeField(null=True, blank=True)
    mailed_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        indexes = [models.Index(fields=["email_key", "created_at"], name="loginflow_address")]

    def __str__(self) -> str:
        return f"{self.email} {self.created_at:%H:%M:%S}"


class MailboxState(models.Model):
    """Failures in a row for one address, over all its flows; only a success sets it back (SECURITY 1.4).

    Its row is also the lock under which codes of that address are sent and tried.
    """

    email_key = models.CharField(max_length=320, unique=True)
    failures_in_a_row = models.PositiveIntegerField(default=0)

    def __str__(self) -> str:
        return self.email_key


class SignIn(models.Model):
    """One proven mailbox, somewhere: the family that its account tokens and refresh tokens belong to.

    It counts while `ended_at` is empty and `token_version` is still the user's.
    """

    family = models.CharField(max_length=40, unique=True)
    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="sign_ins")
    token_version = models.PositiveIntegerField()
    created_at = models.DateTimeField(db_index=True)
    source = models.CharField(max_length=45, blank=True)
    user_agent = models.CharField(max_length=200, blank=True)
    ended_at = models.DateTimeField(null=True, blank=True)
    end_reason = models.CharField(max_length=16, blank=True)

    def __str__(self) -> str:
        return f"{self.user} {self.created_at:%Y-%m-%d %H:%M}"

    @property
    def is_live(self) -> bool:
        """Whether its tokens still count. Reads the user and the tenant: select them with it."""
        return (
            self.ended_at is None
            and self.token_version == self.user.token_version
            and self.user.is_active
            and self.user.tenant.is_active
        )


class RefreshToken(models.Model):
    """One refresh token of a sign-in. Spending it makes the next one; spending it twice ends the sign-in."""

    sign_in = models.ForeignKey(SignIn, on_delete=models.CASCADE, related_name="refresh_tokens")
    digest = models.CharField(max_length=64, unique=True, editable=False)
    created_at = models.DateTimeField()
    expires_at = models.DateTimeField(db_index=True)
    spent_at = models.DateTimeField(null=True, blank=True)

    def __str__(self) -> str:
        return f"{self.sign_in} {self.created_at:%H:%M:%S}"
