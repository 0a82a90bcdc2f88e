"""Command: a chapter run from the command line.

Every error that a user can cause is one line, and exit code 1; Ctrl-C is one line, and 130. What a
terminal cannot show is printed as "?". What XLA has compiled is kept for the next start.

Reads: files.py.   Read next: containers.py.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from runtime import files

Config = TypeVar("Config")

ALONE = (
    "another process has gone, or cannot be reached ({}). Start the same command again on all "
    "hosts: the run goes on from its newest checkpoint."
)


EXAMPLE = Path("toy/common_voice/en/clips/toy_en_test_00478.opus")  # what is the capital of france
STOPPED = 130  # exit code after Ctrl-C, as shells have it
PATIENCE = 2.0  # seconds


def run(main: Callable[[], object], stopped: str = "stopped") -> None:
    """Call `main`; of several processes one that fails ends at once, so that the others hear it.

    `stopped` is what is said after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    keep_compiled()
    try:
        with _ctrl_c_is_heard(stopped):
            main()
        return
    except KeyboardInterrupt:
        _end_at_once(stopped)
    except (ValueError, OSError, FloatingPointError) as error:
        # a message may hold what a damaged file held, which a terminal would take for commands
        said = (c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(error))
        print(f"error: {''.join(said)}", file=sys.stderr, flush=True)
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        print(f"error: {ALONE.format(str(error).splitlines()[0])}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(1)  # an orderly end would wait for the others
    sys.exit(1)


def keep_compiled() -> None:
    """Keep compiled programs in ~/.cache/diva/xla, unless JAX_COMPILATION_CACHE_DIR says where, or
    nothing can be written there."""
    folder = files.cache_folder() / "xla"
    if not jax.config.jax_compilation_cache_dir and _can_write(folder):
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _can_write(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


@contextlib.contextmanager
def _ctrl_c_is_heard(stopped: str) -> Iterator[None]:
    """Python hears Ctrl-C between two of its own steps, but XLA may compile for minutes: so a
    thread waits for it too, and ends the process if nothing has come of it after PATIENCE."""
    hear, tell = socket.socketpair()
    tell.setblocking(False)
    done = threading.Event()

    def wait() -> None:
        while number := hear.recv(1):
            raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            if number[0] == signal.SIGINT and raises and not done.wait(PATIENCE):
                _end_at_once(stopped)

    def lost(unraisable: Any) -> None:
        """Where Python cannot raise, as in a callback of the garbage collector: no traceback."""
        if unraisable.exc_type is not KeyboardInterrupt:
            told(unraisable)

    told, sys.unraisablehook = sys.unraisablehook, lost
    before = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        sys.unraisablehook = told
        done.set()
        tell.close()
        thread.join()
        hear.close()


def _end_at_once(stopped: str) -> None:
    """Without waiting for threads that still read, compile or write: nothing of ours is half done
    that the next start would take for whole."""
    print(f"\n{stopped}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(STOPPED)


def parse(presets: dict[str, Config], args: Sequence[str], program: str) -> Config:
    """The configuration of a command line: the preset that it names (or the first), and flags that
    override its fields."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=next(iter(presets)))
    name = first.parse_known_args(args)[0].preset
    if name not in presets:
        raise ValueError(f"--preset {name}: no such preset; expected one of {', '.join(presets)}.")
    return tyro.cli(type(presets[name]), default=presets[name], args=args, prog=program)


def at_least(config: Any, **least: int) -> None:
    """Raises ValueError for a field below the smallest number that it may be."""
    for name, smallest in least.items():
        if getattr(config, name) < smallest:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {getattr(config, name)}: expected at least {smallest}.")


def line(presets: dict[str, Any], config: Any, program: str, without: Sequence[str]) -> str:
    """The command line that `parse` makes `config` of, the flags `without` left out."""
    flags = ["--preset", config.preset]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        same = value == getattr(presets[config.preset], field.name)
        if not same and field.name not in ("preset", *without):
            flags += ["--" + field.name.replace("_", "-"), str(value)]
    return shlex.join(["python", program, *flags])
