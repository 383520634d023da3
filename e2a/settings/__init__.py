"""Django's settings. What comes from the environment is read in `environment.py` and seen as `settings.E2A`."""

from pathlib import Path
from typing import Any

import dj_database_url
import django_stubs_ext
from csp.constants import NONE, SELF, UNSAFE_EVAL, UNSAFE_INLINE
from django.templatetags.static import static

django_stubs_ext.monkeypatch()  # Before any model or field of ours: they are written with type parameters.

from e2a.core import log as _log  # noqa: E402
from e2a.settings import environment as _environment  # noqa: E402

BASE_DIR = Path(__file__).resolve().parent.parent.parent
E2A = _environment.read(BASE_DIR)

DEBUG = False  # Errors are problems or our own pages, everywhere; a traceback is in the log.
SECRET_KEY = _environment.django_secret_key(BASE_DIR, E2A)
ALLOWED_HOSTS = _environment.allowed_hosts(E2A)
CSRF_TRUSTED_ORIGINS = [E2A.public_url] if E2A.public_url else []

INSTALLED_APPS = [
    "unfold.apps.BasicAppConfig",
    "e2a.apps.OperatorAdminConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django.contrib.humanize",
    "channels",
    "corsheaders",
    "csp",
    "django_htmx",
    "django_otp",
    "django_otp.plugins.otp_totp",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "rest_framework",
    "e2a.core",
    "accounts",
    "keys",
    "secrets_vault",
    "sandboxes",
    "sessions_app",
    "e2a",
]

MIDDLEWARE = [
    "e2a.core.access_log.AccessLogMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "corsheaders.middleware.CorsMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django_otp.middleware.OTPMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "e2a.core.headers.SecurityHeadersMiddleware",
    "e2a.core.decided.DecidedMiddleware",
]

ROOT_URLCONF = "e2a.urls"
ASGI_APPLICATION = "e2a.asgi.application"
APPEND_SLASH = False

TEMPLATES: list[dict[str, Any]] = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "e2a.core.context.product",
            ]
        },
    }
]

DATABASES: dict[str, Any] = {"default": dj_database_url.parse(_environment.database_url(E2A))}
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    DATABASES["default"]["OPTIONS"] = {
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
        "init_command": (
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-16000; PRAGMA mmap_size=134217728;"
        ),
    }
    DATABASES["default"]["CONN_MAX_AGE"] = None
    DATABASES["default"]["TEST"] = {
        "NAME": str(E2A.data_dir / "test.sqlite3")
    }  # In memory, writers do not wait.
else:
    DATABASES["default"].setdefault("OPTIONS", {})["pool"] = {"min_size": 1, "max_size": 32, "timeout": 10}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

AUTH_USER_MODEL = "accounts.User"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.Argon2PasswordHasher"]
LOGIN_URL = "/sign-in"
LOGIN_REDIRECT_URL = "/"

LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True
USE_I18N = False

STATIC_URL = "/static/"
STATIC_ROOT = E2A.data_dir / "static"
STATIC_ROOT.mkdir(parents=True, exist_ok=True)
_PACKAGES = BASE_DIR / "node_modules"
# What the terminal's and the desktop's pages load: made by `npm ci` at set-up (package.json), served as it is.
_VENDOR = {
    "vendor/xterm": ("@xterm/xterm/lib", "@xterm/xterm/css"),
    "vendor/addon-fit": ("@xterm/addon-fit/lib",),
    "vendor/novnc": ("@novnc/novnc",),
}
STATICFILES_DIRS: list[Any] = [
    BASE_DIR / "static",
    *[
        (prefix, str(_PACKAGES / folder))
        for prefix, folders in _VENDOR.items()
        for folder in folders
        if (_PACKAGES / folder).is_dir()
    ],
]
WHITENOISE_USE_FINDERS = not E2A.production
WHITENOISE_AUTOREFRESH = not E2A.production
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {
        "BACKEND": (
            "whitenoise.storage.CompressedManifestStaticFilesStorage"
            if E2A.production
            else "django.contrib.staticfiles.storage.StaticFilesStorage"
        )
    },
}

# The body cap is held before Django reads anything (e2a.body_gate); this is the second fence.
DATA_UPLOAD_MAX_MEMORY_SIZE = 1024 * 1024
FILE_UPLOAD_HANDLERS = ["django.core.files.uploadhandler.MemoryFileUploadHandler"]

CHANNEL_LAYERS = {
    "default": {
        "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
        "CONFIG": {"hosts": [E2A.redis_url]},
    }
}

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["keys.authentication.BearerAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["e2a.core.permissions.ScopePermission"],
    "DEFAULT_PARSER_CLASSES": ["e2a.core.parsers.StrictJSONParser"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "EXCEPTION_HANDLER": "e2a.core.problems.exception_handler",
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "UNAUTHENTICATED_USER": None,
    "UNAUTHENTICATED_TOKEN": None,
}

SPECTACULAR_SETTINGS = {
    "TITLE": "e2a",
    "DESCRIPTION": "One API call gives an AI agent its own sandbox; a WebSocket streams what it does.",
    "VERSION": "1",
    "OAS_VERSION": "3.1.1",
    "SERVE_INCLUDE_SCHEMA": False,
    "SERVE_PERMISSIONS": ["rest_framework.permissions.AllowAny"],
    "SERVE_AUTHENTICATION": [],
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "SCHEMA_PATH_PREFIX": r"/v1",
    "COMPONENT_SPLIT_REQUEST": True,
    "ENUM_GENERATE_CHOICE_DESCRIPTION": False,
    "ENUM_NAME_OVERRIDES": {
        "SessionStatus": ("starting", "idle", "running", "waiting", "ended"),
        "SessionEnded": ("ended",),
        "TaskStatus": ("queued", "running", "done"),
        "SandboxState": (
            "booting",
            "configuring",
            "creating",
            "destroyed",
            "paused",
            "running",
            "stopping",
        ),
        "KeyRevoked": ("revoked",),
    },
    "POSTPROCESSING_HOOKS": [
        "drf_spectacular.hooks.postprocess_schema_enums",
        "e2a.core.openapi.add_problems",
    ],
}

# Celery. Messages are nudges: the row in the database is the work, its lease says who does it.
_broker = (
    E2A.redis_url.replace("unix://", "redis+socket://", 1)
    if E2A.redis_url.startswith("unix://")
    else E2A.redis_url
)
CELERY_BROKER_URL = _broker
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "visibility_timeout": 3600,
    "socket_connect_timeout": 2,
    "socket_timeout": 15,
    "socket_keepalive": True,
    "retry_on_timeout": True,
    "max_retries": 1,
    "global_keyprefix": "e2a:",
}
CELERY_RESULT_BACKEND = None
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_TASK_DEFAULT_QUEUE = "control"
CELERY_TASK_ROUTES = {
    "sessions_app.tasks.turn_run": {"queue": "turns"},
    "sandboxes.tasks.sandbox_provision": {"queue": "provision"},
    "sandboxes.tasks.sandbox_restore": {"queue": "archives"},
    "sandboxes.tasks.snapshot_save": {"queue": "archives"},
    "sandboxes.tasks.snapshot_remove": {"queue": "archives"},
    "sandboxes.tasks.storage_tidy": {"queue": "archives"},
}
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_WORKER_REDIRECT_STDOUTS = False
CELERY_TASK_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_TIMEZONE = "UTC"

LOGGING_CONFIG = "logging.config.dictConfig"
LOGGING = _log.configure(E2A.log_format)

# Web surface (SECURITY 9).
CONTENT_SECURITY_POLICY = {
    "EXCLUDE_URL_PREFIXES": (),
    "DIRECTIVES": {
        "default-src": [SELF],
        "script-src": [SELF],
        "style-src": [SELF],
        "img-src": [SELF, "data:"],
        "connect-src": [SELF, *_environment.websocket_sources(E2A)],
        "object-src": [NONE],
        "base-uri": [NONE],
        "form-action": [SELF],
        "frame-ancestors": [NONE],
    },
}
CORS_URLS_REGEX = r"^/v1/.*$"
CORS_ALLOWED_ORIGINS = list(E2A.embed_origins)
CORS_ALLOW_CREDENTIALS = False
CORS_ALLOW_HEADERS = ["authorization", "content-type", "idempotency-key", "last-event-id"]
CORS_EXPOSE_HEADERS = ["x-request-id", "retry-after", "link", "idempotent-replayed"]

SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
SECURE_CROSS_ORIGIN_OPENER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
CSRF_COOKIE_HTTPONLY = True  # Pages have the token in them; no script reads the cookie.
CSRF_COOKIE_SAMESITE = "Lax"
CSRF_FAILURE_VIEW = "e2a.views.csrf_failure"
SESSION_COOKIE_AGE = 14 * 24 * 3600
if E2A.production:
    SESSION_COOKIE_NAME = "__Host-e2a-session"
    CSRF_COOKIE_NAME = "__Host-e2a-csrf"
    SESSION_COOKIE_SECURE = True
    CSRF_COOKIE_SECURE = True
    SECURE_SSL_REDIRECT = True
    SECURE_REDIRECT_EXEMPT = [r"^healthz$", r"^readyz$"]
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if E2A.trusted_proxies else None
    SECURE_HSTS_SECONDS = 31536000
    SECURE_HSTS_INCLUDE_SUBDOMAINS = True
    SECURE_HSTS_PRELOAD = True
else:
    SESSION_COOKIE_NAME = "e2a-session"
    CSRF_COOKIE_NAME = "e2a-csrf"

EMAIL_BACKEND, _email = _environment.email(E2A)
globals().update(_email)

# The operators' site (SECURITY 9.12). Alpine makes functions of attributes, Unfold has style elements; both are allowed
# on its own path only (e2a.core.headers).
OTP_TOTP_ISSUER = "e2a"
ADMIN_CONTENT_SECURITY_POLICY = {"script-src": [SELF, UNSAFE_EVAL], "style-src": [SELF, UNSAFE_INLINE]}
UNFOLD = {
    "SITE_TITLE": "e2a admin",
    "SITE_HEADER": "e2a",
    "SITE_URL": "/",
    "SHOW_HISTORY": True,
    "COLORS": {
        "primary": {
            "50": "#eff8f5",
            "100": "#dcede7",
            "200": "#b7dccf",
            "300": "#86c5b1",
            "400": "#4fa990",
            "500": "#1f8a74",
            "600": "#0a6759",
            "700": "#0a574b",
            "800": "#074b41",
            "900": "#063d35",
            "950": "#032822",
        }
    },
    "SITE_FAVICONS": [
        {"rel": "icon", "type": "image/svg+xml", "href": lambda request: static("e2a/icon.svg")}
    ],
}
