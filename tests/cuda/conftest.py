"""The tiny target and its drafters, for all files of this folder; their tests are marked as those of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _path_as_before() -> Iterator[None]:
    """Tests choose the kernels of this process; others expect the references."""
    from dspark_cli.kernels import dispatch

    yield
    dispatch.use("reference")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target and its drafters."""
    from test_torch_session import save_files

    return save_files(tmp_path_factory.mktemp("cuda"))
