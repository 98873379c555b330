"""The arrows between the packages, and what the light modules may import. Holds the map of the house in
docs/."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("launch", "moe_train", "parallel", "data_pipeline")
ALLOWED = {
    "launch": {"moe_train", "parallel", "data_pipeline"},
    "moe_train": {"parallel", "data_pipeline"},
    "parallel": set(),
    "data_pipeline": set(),
}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

HEAVY = ("torch", "megatron", "transformers", "wandb", "matplotlib", "tensorboard", "fsspec", "s3fs")
"""What takes seconds to import, or is not on a login node."""


def imports(path: Path, *, at_import: bool = False) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import of a file: ``from a.b import c`` gives a.b.c. With `at_import` only
    those that run
    when the module is imported: not inside functions, not under TYPE_CHECKING."""
    yield from _walk(ast.parse(path.read_text(encoding="utf-8")), at_import)


def _walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, int]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((f"{child.module}.{alias.name}", child.lineno) for alias in child.names)
        elif at_import and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        elif at_import and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        else:
            yield from _walk(child, at_import)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_arrows_point_one_way(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    for module, line in imports(path):
        package = module.partition(".")[0]
        if name(path) == "moe_train/cli.py" and module == "launch.commands.app":
            continue  # the roof names the launcher's verbs
        if package in PACKAGES and package != own:
            assert package in ALLOWED[own], f"{name(path)}:{line}: {own} must not import {module}"
        assert package != "tests" and not module.startswith("None."), f"{name(path)}:{line}: imports {module}"


def test_the_command_line_is_the_roof() -> None:
    """It imports everything, nothing imports it (but `python -m moe_train`)."""
    for path in FILES:
        if name(path) != "moe_train/__main__.py":
            assert not [line for module, line in imports(path) if module.startswith("moe_train.cli")], name(path)


def test_only_parallel_touches_process_groups() -> None:
    """megatron-core's parallel_state and torch.distributed are `parallel`'s; checkpoints may use
    torch.distributed.checkpoint."""
    for path in FILES:
        own = path.relative_to(ROOT).parts
        if own[0] == "parallel":
            continue
        for module, line in imports(path):
            where = f"{name(path)}:{line}: {module}"
            assert "parallel_state" not in module, where
            if own[:2] == ("moe_train", "checkpoint") and module.startswith("torch.distributed.checkpoint"):
                continue
            assert not module.startswith("torch.distributed"), where
        text = path.read_text(encoding="utf-8")
        for forbidden in (
            "torch.distributed.init_process_group",
            "torch.distributed.new_group",
            "torch.distributed.all_reduce",
        ):
            assert forbidden not in text, f"{name(path)} uses {forbidden}"


def test_no_package_imports_apex_by_requirement() -> None:
    """PyPI's `apex` is another project: it must never be required."""
    lines = [line.split("#")[0] for line in (ROOT / "setup.py").read_text(encoding="utf-8").splitlines()]
    assert not [line for line in lines if '"apex' in line]
    assert "\napex" not in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def light_modules() -> list[str]:
    """Modules that a login node imports: all of data_pipeline and launch, and whatever reads YAML only."""
    paths = [path for path in FILES if name(path).startswith(("data_pipeline/", "launch/", "moe_train/plan/"))]
    paths += [path for path in FILES if path.name in ("config.py", "__init__.py", "errors.py")]
    paths += [path for path in (ROOT / "moe_train").glob("*.py") if path.name != "__main__.py"]
    paths += [ROOT / "moe_train/model/flops.py", ROOT / "parallel/layout.py", ROOT / "parallel/spawn.py"]
    names = {name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths}
    return sorted(names)


def test_light_modules_import_nothing_heavy() -> None:
    """One process imports them all; the report names the first module that brought something heavy in."""
    program = f"""
import importlib, sys
for module in {light_modules()!r}:
    importlib.import_module(module)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, f"importing {{module}} imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_help_imports_little() -> None:
    """`moe-train --help` is a matter of a tenth of a second: what costs more is imported by the verb that
    needs it."""
    program = """
import sys
from moe_train.cli import main
assert main(["--help"]) == 0 and main(["pretrain", "--help"]) == 0
heavy = [name for name in ("torch", "megatron", "numpy", "yaml", "rich") if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_files_are_of_a_size_to_read() -> None:
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 500, f"{name(path)} has {lines} lines: one idea a file"


def test_every_module_says_what_it_is() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{name(path)} has no docstring"


def test_every_folder_of_code_is_a_package() -> None:
    """setup.py finds packages by their __init__.py: a folder without one would not be installed."""
    for path in FILES:
        assert (path.parent / "__init__.py").exists(), f"{name(path.parent)} has no __init__.py"


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_has_nothing_to_say(command: tuple[str, ...]) -> None:
    """`ruff format` and `ruff check --fix` put right what it names; pyproject.toml has the rules."""
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
