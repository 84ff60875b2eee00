"""The server: the engine as a Ray Serve application.

`serve run serve_app:app` and `serve run serve_app:build model=...` find what they need here. As an
attribute, `serve_app.app` is the bound application; the module of that name is reached as
`from serve_app.app import launch`. Importing this package imports neither torch nor Ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve_app.app import build as build

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    """`build`, the builder; `app`, the graph bound with the settings of the environment."""
    if name not in ("app", "build"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from serve_app.app import build as builder
    from serve_app.settings import Settings

    if name == "build":
        value: Any = builder
    else:
        value = builder(Settings())
    # Importing the module `serve_app.app` put the module under this name; the application replaces it.
    globals()[name] = value
    return value
