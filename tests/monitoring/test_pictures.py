"""The pictures in the documentation show the panels that there are."""

from __future__ import annotations

import pytest
from PIL import Image

from monitoring.generate import HERE
from monitoring.panels import DASHBOARDS, Dashboard
from tests.monitoring.render import PANELS, panels_of

FOLDER = HERE / "pictures"


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_the_picture_of_a_dashboard_was_drawn_from_its_panels(dashboard: Dashboard) -> None:
    with Image.open(FOLDER / f"{dashboard.uid}.png") as picture:
        drawn = picture.info[PANELS]
    assert drawn == panels_of(dashboard), "run python -m tests.monitoring.render monitoring/pictures"


def test_there_is_no_picture_of_another_dashboard_and_the_page_shows_each() -> None:
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    names = {f"{dashboard.uid}.png" for dashboard in DASHBOARDS}
    assert {file.name for file in FOLDER.iterdir()} == names
    assert all(f"(pictures/{name})" in readme for name in names)
