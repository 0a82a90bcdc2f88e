"""Eight devices on any CPU, so that every test of sharding runs everywhere; a cache of its own."""

import os

import pytest

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_PROCESSES"] = "1"  # whatever cluster the tests run on, they run alone


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory) -> None:
    """What the tests, and the programs that they start, keep for later goes where it is removed."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
