"""Reading of TOML files, which Python knows from 3.11 on, and the package tomli before."""

from __future__ import annotations

from typing import Any, Dict

from deploy.errors import ConfigError, MissingDependencyError
from deploy.files import AnyPath, read_regular


def read_toml(path: AnyPath, what: str) -> Dict[str, Any]:
    """
    The parsed content of the TOML file at `path`.

    Args:
        what: it should have been, for the messages.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
        MissingDependencyError: Python before 3.11 needs tomli.
    """
    try:
        import tomllib  # novermin: asked for next
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise MissingDependencyError("tomli", f"reading {path} with this Python", "pip install tomli") from error
    try:
        return tomllib.loads(read_regular(path).decode())
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}); expected {what}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} has lists in lists, hundreds of levels deep; expected {what}") from error
    except ValueError as error:  # also what is not UTF-8
        raise ConfigError(f"{path} is not TOML ({error}); expected {what}") from error
