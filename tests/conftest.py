"""The run's environment is made by `tests.environment`, an early plugin (`-p` in pyproject): Django reads its settings
before any conftest is loaded. Run as `python -m pytest`, so that the plugin is found."""

pytest_plugins = ["tests.fixtures"]
