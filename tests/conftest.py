"""Eight devices on any CPU, so that every test of sharding runs everywhere; caches of their own."""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator

import jaxlib
import pytest

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
as_for_users = any(name in word for word in sys.argv for name in ("tests/parity", "tests/real"))
if jaxlib.__version__ == "0.10.2" and not as_for_users:  # a step compiles 3 times as fast
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # its older way, gone since
# What one test has compiled, another finds, and so do the programs that they start.
compiled = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_PROCESSES"] = "1"  # whatever cluster the tests run on, they run alone


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory) -> None:
    """What the tests, and the programs that they start, keep for later goes where it is removed."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    """Compiled programs go with the file of tests that made them: all of them together take more
    pieces of memory than Linux gives a process (65,530), which ends in a segmentation fault."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
