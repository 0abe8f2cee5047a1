"""For the tests beside this file. They use what test_main.py has."""

import sys
from pathlib import Path

import pytest

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # where main.py is
pytest.register_assert_rewrite("test_main", "servers")


@pytest.fixture(autouse=True)
def _close_clients():
    yield
    sys.modules["test_main"].open_clients.close()
