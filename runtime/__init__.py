"""What machines need: attention on a CPU, sharding, files, cost, compiling, what a run records.

Every chapter imports from here before it computes, so this is the one place for what must be so
before XLA starts. jaxlib 0.10.2, the newest for Python 3.11, offloads some sums over the rows of a
product to a library that computes them wrongly on CPUs (jax issue 39103: 2^15 + 1 rows of three
numbers, off by 0.2 %). Without that offload it is right and costs 3 % of a training step. And with
libtpu (which compiles for slices that are elsewhere) but no accelerator, JAX would look for a TPU,
and complain at length.
"""

import glob
import importlib.util
import os

import jax
import jaxlib

if jaxlib.__version__ == "0.10.2":
    flag, flags = "--xla_cpu_experimental_ynn_fusion_type=", os.environ.get("XLA_FLAGS", "")
    if flag not in flags:  # who has chosen keeps the choice
        os.environ["XLA_FLAGS"] = f"{flags} {flag}-reduce".strip()

DEVICES = "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd"
if importlib.util.find_spec("libtpu") and not any(map(glob.glob, DEVICES)):
    jax.config.update("jax_platforms", jax.config.jax_platforms or "cpu")
