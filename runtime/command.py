"""Command: a chapter run from the command line.

Every error that a user can cause is one line, and exit code 1.

Reads: nothing of ours.   Read next: files.py.
"""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import tyro

Config = TypeVar("Config")

ALONE = (
    "another process has gone, or cannot be reached ({}). Start the same command again on all "
    "hosts: the run goes on from its newest checkpoint."
)


def run(main: Callable[[], object]) -> None:
    """Call `main`; of several processes one that fails ends at once, so that the others hear it."""
    try:
        main()
        return
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        print(f"error: {ALONE.format(str(error).splitlines()[0])}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(1)  # an orderly end would wait for the others
    sys.exit(1)


def parse(presets: dict[str, Config], args: Sequence[str], program: str) -> Config:
    """The configuration of a command line: the preset that it names (or the first), and flags that
    override its fields."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=next(iter(presets)))
    name = first.parse_known_args(args)[0].preset
    if name not in presets:
        raise ValueError(f"--preset {name}: no such preset; expected one of {', '.join(presets)}.")
    return tyro.cli(type(presets[name]), default=presets[name], args=args, prog=program)


def line(presets: dict[str, Any], config: Any, program: str, without: Sequence[str]) -> str:
    """The command line that `parse` makes `config` of, the flags `without` left out."""
    flags = ["--preset", config.preset]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        same = value == getattr(presets[config.preset], field.name)
        if not same and field.name not in ("preset", *without):
            flags += ["--" + field.name.replace("_", "-"), str(value)]
    return shlex.join(["python", program, *flags])
