"""What `import zoact_remote` promises."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import zoact_remote
from zoact_remote import errors

HEAVY = ("torch", "transformers", "vllm", "typer", "rich", "pydantic")


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_nothing_heavy() -> None:
    assert modules_after("import zoact_remote").isdisjoint((*HEAVY, "requests", "numpy"))


def test_the_whole_library_needs_no_framework() -> None:
    assert modules_after("from zoact_remote import *").isdisjoint(HEAVY)


@pytest.mark.parametrize("name", zoact_remote.__all__)
def test_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(zoact_remote, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)


def test_every_exception_is_one_of_ours() -> None:
    names = [name for name in zoact_remote.__all__ if inspect.isclass(getattr(zoact_remote, name))]
    raised = {name for name in names if issubclass(getattr(zoact_remote, name), Exception)}
    assert {"ZoActError", "CallFailed", "InvalidValue", "RecordError", "TrainingDiverged", "Inconclusive"} <= raised
    assert all(issubclass(getattr(zoact_remote, name), zoact_remote.ZoActError) for name in raised)
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert defined <= raised


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        _ = zoact_remote.trainer


def test_type_checkers_see_the_names_that_exist() -> None:
    tree = ast.parse(Path(zoact_remote.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    homes = {name: f"zoact_remote.{module}" for name, module in zoact_remote._HOME.items()}
    assert seen == homes
    assert set(zoact_remote.__all__) == {*homes, "__version__"}
    assert dir(zoact_remote) == sorted(zoact_remote.__all__)
