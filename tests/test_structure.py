"""The structure that README describes: packages on one side, no import upwards, nothing unlisted.

runtime/  formats/                                          know no model
weights whisper llama generate connector distill_loss data  the method, in reading order
training/ train   evaluation/ eval   serving/ demo          a package, and the command that uses it
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BELOW = ("runtime", "formats")
METHOD = "weights whisper llama generate connector distill_loss data".split()
ABOVE = {"training": "train", "evaluation": "eval", "serving": "demo"}  # package: its command
PACKAGES = (*BELOW, *ABOVE)


def modules() -> dict[str, Path]:
    """{dotted name: file} of the top modules and of the five packages."""
    files = [*ROOT.glob("*.py"), *(file for name in PACKAGES for file in ROOT.glob(f"{name}/*.py"))]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in sorted(files)
        if file.name != "__init__.py"
    }


def imports(file: Path, names: dict[str, Path], in_functions: bool = False) -> set[str]:
    """The project's modules that `file` imports at its head, or only inside of functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    head, inside = set(), set()
    for node in ast.walk(tree):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        target = head if node in tree.body else inside
        target.update(name for name in imported if name in names)
    return inside - head if in_functions else head


def layer(name: str) -> int:
    """0 and 1: packages below. 2 to 8: the method. 9 and 10: packages above and their commands."""
    package = name.split(".")[0]
    if package in BELOW:
        return BELOW.index(package)
    if package in METHOD:
        return 2 + METHOD.index(package)
    return 9 if package in ABOVE else 10


def test_no_module_imports_upwards():
    """Packages below know no model, and a module of the method none that is read after it."""
    names = modules()
    for name, file in names.items():
        for other in imports(file, names):
            assert layer(other) <= layer(name), f"{name} imports {other}"


def test_the_packages_above_do_not_import_each_other():
    """Apart from serving, whose page lists the evaluation's prompts, and the command of each."""
    names = modules()
    for name, file in names.items():
        package = name.split(".")[0]
        if package in ABOVE:
            others = {other.split(".")[0] for other in imports(file, names)} & ABOVE.keys()
            allowed = {package, "evaluation"} if package == "serving" else {package}
            assert others <= allowed, f"{name} imports {others - allowed}"


def test_there_is_no_import_circle():
    """At the heads of the modules. Inside of functions, a command's main may use a later module."""
    names = modules()
    remaining = {name: imports(file, names) for name, file in names.items()}
    while remaining:
        free = [name for name, needed in remaining.items() if not needed & remaining.keys()]
        assert free, f"a circle among {sorted(remaining)}"
        for name in free:
            del remaining[name]


def test_commands_are_imported_by_none_but_train_which_ends_with_an_evaluation():
    names = modules()
    for name, file in names.items():
        assert not imports(file, names) & {*ABOVE.values()}, name
        inside = imports(file, names, in_functions=True) & {*ABOVE.values()}
        assert inside <= ({"eval"} if name == "train" else set()), name


def test_readme_lists_every_module_and_package_and_each_package_its_files():
    for name, file in modules().items():
        package = name.split(".")[0] if "." in name else None
        text = (ROOT / package / "README.md").read_text(encoding="utf-8") if package else README
        assert f"[{file.name}]({file.name})" in text, f"{name} is not in the README above it"
    for package in (*PACKAGES, "toy", "benchmarks", "tests"):
        assert (ROOT / package / "README.md").is_file(), package
        assert f"({package}/README.md)" in README, f"{package}/README.md is not linked"


def test_every_module_says_what_it_reads():
    """In its docstring; the next one to read, too, but in demo.py, the last."""
    for name, file in modules().items():
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        assert "Reads:" in docstring, name
        assert "Read next:" in docstring or name == "demo", name
