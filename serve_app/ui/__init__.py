"""The drawing board in the browser: one Gradio page over the same service that the HTTP API calls.

Importing this package imports neither gradio nor torch; `build_page` and `mount_page` do the former.
"""

from serve_app.ui.page import build_page, mount_page

__all__ = ["build_page", "mount_page"]
