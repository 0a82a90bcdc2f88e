"""The house stands: imports point one way, chapters are short, README's list of them is true.

`python tests/test_house.py` prints the list as README must have it.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES, FUNCTION = 450, 50  # at most, of a file and of a function


def modules() -> dict[str, Path]:
    """{name: file} of the product: the chapters, and the two annexes."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("runtime/*.py"), *ROOT.glob("evaluation/*.py")]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in sorted(files)
        if file.name != "__init__.py"
    }


def imports(file: Path, known: dict[str, Path]) -> tuple[set[str], set[str]]:
    """What of ours a file imports: at its head, and inside of functions."""
    head, inside = set(), set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        (head if node in tree.body else inside).update(name for name in names if name in known)
    return head, inside - head


def house() -> str:
    """A line for each file: its length, what it imports, and in brackets what its command does."""
    known = modules()
    found = {name: imports(file, known) for name, file in known.items()}
    order, rest = [], sorted(known, key=lambda name: (READING.index(name), name))
    while rest:  # as they are read, but nothing before what it stands on
        order.append(next(name for name in rest if found[name][0] <= set(order)))
        rest.remove(order[-1])
    lines = []
    for name in order:
        length = len(known[name].read_text(encoding="utf-8").splitlines())
        head, inside = (sorted(some, key=order.index) for some in found[name])
        said = " ".join([*head, *(f"[{other}]" for other in inside)])
        path = str(known[name].relative_to(ROOT))
        lines.append(
            f"{path:27}{length:4}  {said.replace('runtime.', '').replace('evaluation.', '')}"
        )
    return "\n".join(line.rstrip() for line in lines)


READING = [
    *"runtime.files runtime.command runtime.containers runtime.parquet".split(),
    *"runtime.recording runtime.sharding runtime.attention".split(),
    *"runtime.settings runtime.template".split(),
    *"weights whisper llama generate connector distill_loss data".split(),
    *"runtime.recipe runtime.cost runtime.hlo runtime.compiling runtime.record".split(),
    *"runtime.watching runtime.answers runtime.keeping runtime.claiming train".split(),
    *"evaluation.unpack evaluation.suites evaluation.published evaluation.voicebench".split(),
    *"evaluation.metrics evaluation.systems evaluation.degrade evaluation.tasks".split(),
    *"evaluation.predictions evaluation.significance".split(),
    *"evaluation.report eval runtime.completions runtime.page demo".split(),
]


def test_imports_point_one_way_and_readme_says_so():
    """The list holds every file with its length and its imports; none imports from further down,
    but a command, inside of its `main`."""
    assert f"```text\n{house()}\n```" in README


def test_nothing_imports_the_ends():
    """train, eval and demo are commands; train alone ends with eval."""
    known = modules()
    for name, file in known.items():
        head, inside = imports(file, known)
        assert not head & {"train", "eval", "demo"}, name
        assert inside & {"train", "eval", "demo"} <= ({"eval"} if name == "train" else set()), name


def test_chapters_are_short():
    """At most ten at the top, 450 lines each; functions of 50 lines; a README of 230."""
    assert len(list(ROOT.glob("*.py"))) <= 10
    assert len(README.splitlines()) <= 230
    long = {}
    for name, file in modules().items():
        source = file.read_text(encoding="utf-8")
        if len(source.splitlines()) > LINES:
            long[name] = len(source.splitlines())
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION:
                    long[f"{name}.{node.name}"] = length
    assert not long


def test_every_room_has_a_readme_and_every_chapter_says_what_it_reads():
    for room in ("runtime", "evaluation", "toy", "benchmarks", "tests"):
        assert (ROOT / room / "README.md").is_file(), room
    for name, file in modules().items():
        said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        assert "Reads:" in said and ("Read next:" in said or name == "demo"), name


if __name__ == "__main__":
    print(house())
