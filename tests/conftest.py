"""`pytest -m quick`: the tests of the helpers and of the project's files but for the slow ones, under a minute."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in ("test_helpers.py", "test_project.py") and not item.get_closest_marker("slow"):
            item.add_marker("quick")
