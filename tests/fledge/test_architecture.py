"""The walls of the house: who may import whom, and what answers without the heavy libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fledge import config as configs
from fledge import recipe

ROOT = Path(__file__).parents[2]
STAGES = ("pretrain", "finetune", "align")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", sources("fledge"), ids=lambda p: str(p.relative_to(ROOT)))
def test_fledge_imports_no_stage(path):
    assert not {name for name in imported(path) if name.split(".")[0] in (*STAGES, "configs", "tests", "benchmarks")}


@pytest.mark.parametrize("path", sources("fledge"), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_recipe_imports_by_name(path):
    if path != ROOT / "fledge" / "recipe.py":
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | imported(path)
        assert not used & {
            "import_module",
            "__import__",
            "importlib.import_module",
            "run_module",
            "exec",
            "spec_from_file_location",
        }


@pytest.mark.parametrize(
    "path", [p for package in STAGES for p in sources(package)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_stages_do_not_import_each_other(path):
    """But for a method that is another's part: it lies in the same package and is no stage itself."""
    own = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    stages = set(recipe.known_stages()) - {own}
    names = {name for name in imported(path) if name.split(".")[0] in STAGES}
    assert not names & stages
    assert {name.split(".")[0] for name in names} <= {own.split(".")[0]}


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'pydantic', 'yaml', 'transformers', 'timm', 'PIL', 'wandb'}"
    code = f"""
import sys
from fledge import cli
try:
    cli.main(["--help"])
except SystemExit:
    pass
print(sorted({heavy} & set(sys.modules)))
"""
    assert fresh(code).splitlines()[-1] == "[]"


LIGHT = ["config", "recipe", "sweep", "artifact", "track", "cli", "errors", "files", "report", "dash.server"]


@pytest.mark.parametrize("module", LIGHT)
def test_what_plans_and_reads_imports_no_torch(module):
    assert fresh(f"import sys, fledge.{module}; print('torch' in sys.modules)") == "False"


SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_yaml_loads(path, monkeypatch):
    """Through the code that runs it; a stage's parents are given on its command line, and data need not be there."""
    monkeypatch.setenv("FLEDGE_DATA", "/nowhere")
    tree = configs.read(path)
    if "stages" in tree.data:
        recipe.load(path)
    else:
        roles = configs.roles(recipe.import_stage(tree.data["stage"], "").Config)
        absent = [role for role in roles if roles[role].required and not (tree.data.get("parents") or {}).get(role)]
        recipe.load(path, [f"parents.{role}=runs/parent/artifact" for role in absent])
