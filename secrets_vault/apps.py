from django.apps import AppConfig


class SecretsVaultConfig(AppConfig):
    name = "secrets_vault"
    verbose_name = "Secrets"

    def ready(self) -> None:
        from e2a.core.idempotency import register_sealer
        from secrets_vault.sealing import PassphraseSealer

        register_sealer(PassphraseSealer())
