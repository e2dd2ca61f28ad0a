"""The image, built twice; `./dev image-check` passes --image, and without it the tests that need one are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.building import Builder, Image

ROOT = Path(__file__).parent.parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--image", action="store_true", help="build the image, on a base that is made here, and run it")
    parser.addoption("--wheel", default="cpu", choices=("cpu", "cuda12", "cuda13"), help="the image's build argument")


@pytest.fixture(scope="session")
def wheel(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--wheel", default="cpu"))


@pytest.fixture(scope="session")
def builder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    if not pytestconfig.getoption("--image", default=False):
        pytest.skip("builds and runs the image: ./dev image-check does it, as root and in some minutes")
    with Builder.at(ROOT / ".cache/image", scratch=tmp_path_factory.mktemp("image")) as builder:
        yield builder


@pytest.fixture(scope="session")
def image(builder: Builder, wheel: str) -> Image:
    return builder.build(wheel, "first")


@pytest.fixture(scope="session")
def image_again(builder: Builder, image: Image, wheel: str) -> Image:
    """Built from a copy of the same files at another place, with nothing kept from the first."""
    return builder.build(wheel, "second")
