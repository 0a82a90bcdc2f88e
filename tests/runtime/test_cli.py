"""runtime/cli.py: what a user meets first: help, errors, Ctrl-C, terminals of old."""

import dataclasses
import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

from runtime import cli

ROOT = Path(cli.__file__).parents[1]
CHAPTERS = "weights whisper llama generate connector distill_loss data train eval demo".split()


def started(code: str, **environment: str) -> subprocess.Popen:
    """Python with this code, in the repository's root."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_help_says_what_a_chapter_does_and_what_each_flag_is(chapter, capsys):
    """A sentence for the whole, and one for each flag; those of train.py's are tested with it."""
    module = importlib.import_module(chapter)
    with pytest.raises(SystemExit, match="0"):
        module.parse(["--help"]) if chapter == "train" else tyro.cli(module.main, args=["--help"])
    usage, purpose, flags = capsys.readouterr().out.split("\n\n", 2)
    assert usage.startswith("usage:") and len(purpose.split()) > 2 and purpose.endswith(".")
    shown = " ".join(flags.replace("│", " ").split())
    for name in inspect.signature(module.main).parameters:
        said = re.search(rf"^ +{name}: (\S+ \S+)", module.main.__doc__, re.MULTILINE)
        assert said and said[1] in shown, f"{name} has no help"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_word_too_many_is_named(chapter, capsys):
    module = importlib.import_module(chapter)
    words = ["first", "second"] if chapter != "demo" else ["--first"]
    with pytest.raises(SystemExit, match="2"):
        module.parse(words) if chapter == "train" else tyro.cli(module.main, args=words)
    assert words[-1] in capsys.readouterr().err


def test_no_chapter_imports_what_only_its_end_needs():
    """Charts and pages: a wrong flag need not wait for them."""
    code = "import sys, train, eval, demo; print({'matplotlib', 'gradio'} & {*sys.modules})"
    assert started(code).communicate()[0].strip() == "set()"


# Ctrl-C --------------------------------------------------------------------------------------

# A mutex that is locked twice, of the C library: Python hears no signal while it waits, as in XLA.
BLOCKED = (
    "import ctypes; lock = ctypes.CDLL(None).pthread_mutex_lock; "
    "mutex = ctypes.create_string_buffer(64); lock(mutex); print('ready', flush=True); lock(mutex)"
)
# In a callback of the garbage collector Python can raise nothing: a Ctrl-C is lost there.
LOST = (
    "import gc, time; gc.callbacks.append(lambda *_: time.sleep(60)); "
    "print('ready', flush=True); gc.collect(); time.sleep(60)"
)
ASLEEP = "import time; print('ready', flush=True); time.sleep(60)"
# what the user's own handler makes a wish of is not ended
WISHING = (
    "import time; from training import record\n"
    "    with record.Stop() as stop:\n"
    "        print('ready', flush=True)\n"
    f"        time.sleep({cli.PATIENCE + 1.5})\n"
    "        print('asked', stop.asked)"
)


@pytest.mark.parametrize("work", [ASLEEP, LOST, BLOCKED])
def test_ctrl_c_is_one_line_and_130_also_where_python_hears_nothing(work):
    process = started(f"from runtime import cli\ndef main(): {work}\ncli.run(main, 'bye')")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.strip() == "bye" and not output
    assert time.monotonic() - began < cli.PATIENCE + 5


def test_ctrl_c_that_is_a_wish_ends_nothing():
    process = started(f"from runtime import cli\ndef main():\n    {WISHING}\ncli.run(main)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0 and output == "asked SIGINT\n", error


def test_after_a_command_ctrl_c_is_as_it_was():
    before = signal.getsignal(signal.SIGINT)
    cli.run(lambda: None)
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1


# Terminals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_a_terminal_cannot_show_is_replaced(encoding):
    code = (
        "from runtime import cli\n"
        "from tqdm import tqdm\n"
        "def main():\n"
        "    print('\\u5927 done')\n"
        "    list(tqdm([1], desc='\\u5927'))\n"
        "    raise ValueError('\\u5927 is missing')\n"
        "cli.run(main)"
    )
    process = started(code, PYTHONIOENCODING=encoding)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 1 and output == "? done\n"
    assert error.endswith("error: ? is missing\n") and "Traceback" not in error


# What was compiled ---------------------------------------------------------------------------


def test_what_was_compiled_is_kept_for_the_next_start(tmp_path):
    """In the cache, or where the user says; the second start compiles nothing anew."""
    code = (
        "import jax\n"
        "from runtime import cli\n"
        "jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)\n"
        "def main():\n"
        "    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "    jax.jit(lambda x: x @ x.T + 1)(jax.numpy.ones((3, 4)))\n"
        "cli.run(main)"
    )
    for where in (tmp_path / "diva" / "xla", tmp_path / "elsewhere"):
        told = {} if where.name == "xla" else {"JAX_COMPILATION_CACHE_DIR": str(where)}
        environment = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""} | told
        kept = []
        for _ in range(2):
            process = started(code, **environment)
            assert process.wait(timeout=60) == 0, process.communicate()
            kept.append({file.name for file in where.iterdir() if file.name.endswith("-cache")})
        assert kept[0] and kept[0] == kept[1]


def test_where_nothing_can_be_kept_nothing_is_said(tmp_path):
    (tmp_path / "a file").touch()
    code = "import jax\nfrom runtime import cli\ncli.run(lambda: jax.numpy.ones(3) + 1)"
    away = {"XDG_CACHE_HOME": str(tmp_path / "a file"), "JAX_COMPILATION_CACHE_DIR": ""}
    process = started(code, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", **away)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 0


# Numbers -------------------------------------------------------------------------------------


def test_a_number_below_the_least_is_named_as_the_flag():
    made = dataclasses.make_dataclass("Made", ["batch_size", "seed"])
    cli.at_least(made(1, 0), batch_size=1, seed=0)
    with pytest.raises(ValueError, match="--batch-size 0: expected at least 1"):
        cli.at_least(made(0, 0), batch_size=1, seed=0)


def test_what_a_damaged_file_held_is_no_command_to_the_terminal(capsys):
    """Nor a second line: only our own line breaks stay."""

    def refuse() -> None:
        raise ValueError("a.tsv: found \x1b[2J\r\x85b\nc")

    with pytest.raises(SystemExit):
        cli.run(refuse)
    assert capsys.readouterr().err == "error: a.tsv: found \\x1b[2J\\r\\x85b\nc\n"
