"""The metadata agree with one another, the wheel carries what a run needs, and importing the package stays quick."""
import ast
import configparser
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vlm_repro
from setup import EXTRAS, extras, lines, read_settings

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("vlm_repro", "papers", "nbs", "tests", "tools")
HEAVY = ("torch", "transformers", "pandas", "matplotlib")
IMPORT_BUDGET_S = 0.3
LIGHT = ["vlm_repro", "vlm_repro.cli", *(f"vlm_repro.core.{path.stem}" for path in sorted((ROOT / "vlm_repro" / "core").glob("[a-z]*.py")))]


@pytest.fixture(scope="session")
def settings() -> dict[str, str]:
    return read_settings()


def requirements(settings: dict[str, str]) -> list[Requirement]:
    """Every requirement of the package and of its extras."""
    return [Requirement(line) for line in lines(settings["requirements"]) + extras(settings)["all"]]


def pins() -> dict[str, str]:
    """The versions in constraints.txt by canonical name."""
    rows = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in rows}


# ---------------------------------------------------------------- metadata


def test_pyproject_holds_what_settings_ini_says(settings):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == settings["lib_name"]
    assert project["requires-python"] == f">={settings['min_python']}"
    assert project["urls"] == {"Repository": settings["git_url"], "Documentation": settings["doc_url"]}


def test_the_version_has_one_value(settings):
    assert settings["version"] == vlm_repro.__version__


def test_the_site_is_named_as_the_package_is(settings):
    website = yaml.safe_load((ROOT / "nbs" / "_quarto.yml").read_text())["website"]
    assert (website["title"], website["description"]) == (settings["lib_name"], settings["description"])
    assert (website["site-url"], website["repo-url"]) == (settings["doc_url"], settings["git_url"])


def test_settings_ini_has_every_extra(settings):
    assert set(extras(settings)) == {*EXTRAS, "all"} == {"train", "metrics", "robointer", "docs", "dev", "all"}
    assert all(extras(settings).values())


def test_every_requirement_is_pinned_within_its_range(settings):
    pinned = pins()
    outside = [str(r) for r in requirements(settings) if not r.specifier.contains(pinned.get(canonicalize_name(r.name), "0"))]
    assert not outside, f"constraints.txt does not satisfy {outside}"


def test_the_pins_name_no_file_and_no_host():
    text = (ROOT / "constraints.txt").read_text()
    assert not [line for line in text.splitlines() if any(mark in line for mark in ("@", "//", "file:", "-f", "--"))]


def imported(path: Path) -> set[str]:
    """The top-level names of what a module imports from outside the package, functions' own imports included."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level and node.module}
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"vlm_repro"}


def test_every_import_of_the_package_is_a_requirement(settings):
    declared = {canonicalize_name(r.name) for r in requirements(settings)}
    owners = importlib.metadata.packages_distributions()
    undeclared = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "vlm_repro").rglob("*.py")
        for name in imported(path)
        if not declared & {canonicalize_name(owner) for owner in owners.get(name, [name])}
    }
    assert not undeclared


# ---------------------------------------------------------------- install


@pytest.mark.parametrize("changed", ["settings.ini", "constraints.txt", "setup.py", "pyproject.toml"])
def test_the_install_stamp_notices_a_change_of_the_requirements(tmp_path, changed):
    for name in ("Makefile", "settings.ini", "constraints.txt", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    stamp = tmp_path / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    outer = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "VENV"}
    question = {"args": ["make", "--question", "install"], "cwd": tmp_path, "env": outer}
    assert subprocess.run(**question).returncode == 0
    later = stamp.stat().st_mtime + 2
    os.utime(tmp_path / changed, (later, later))
    assert subprocess.run(**question).returncode == 1


# ---------------------------------------------------------------- import


def fresh(code: str) -> str:
    """What `code` prints in a Python of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def cpu_seconds(code: str, repeats: int = 5) -> float:
    """The least processor time a Python that runs `code` takes from start to end: unlike the clock's, it does not depend on what else runs."""
    def once() -> float:
        process = subprocess.Popen([sys.executable, "-c", code])
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        return usage.ru_utime + usage.ru_stime
    return min(once() for _ in range(repeats))


def test_importing_the_package_costs_little_over_bare_python():
    assert cpu_seconds("import vlm_repro") - cpu_seconds("pass") <= IMPORT_BUDGET_S


@pytest.mark.parametrize("module", LIGHT)
def test_the_light_modules_import_no_heavy_package(module):
    assert fresh(f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])").strip() == "[]"


# ---------------------------------------------------------------- wheel and sdist


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of what is committed, so that building leaves nothing behind in the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, copy)
    return copy


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a wheel or an sdist without the network."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="session")
def wheel(checkout, tmp_path_factory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_carries_papers_tables_and_weights(wheel):
    packed = zipfile.ZipFile(wheel)
    wanted = {f"vlm_repro/assets/papers/{path.name}": path for path in (ROOT / "papers").glob("*.ipynb")}
    wanted |= {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "vlm_repro").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {name for name in packed.namelist() if ".dist-info/" not in name} == set(wanted)
    assert [name for name, path in wanted.items() if packed.read(name) != path.read_bytes()] == []
    kinds = ("assets/papers/mmwalk.ipynb", "published.csv", "defects.csv", ".safetensors")
    assert [kind for kind in kinds if not any(name.endswith(kind) for name in wanted)] == []


def test_the_wheel_says_what_settings_ini_says(wheel, settings):
    packed = zipfile.ZipFile(wheel)
    info = next(name.rsplit("/", 1)[0] for name in packed.namelist() if name.endswith("/METADATA"))
    meta = importlib.metadata.PathDistribution(zipfile.Path(packed, f"{info}/")).metadata
    assert (meta["Name"], meta["Version"], meta["Summary"]) == (settings["lib_name"], settings["version"], settings["description"])
    assert (meta["License-Expression"] or meta["License"], meta["Requires-Python"]) == (settings["license"], f">={settings['min_python']}")
    assert set(meta.get_all("Provides-Extra")) == set(extras(settings))
    plain = {str(Requirement(line)) for line in lines(settings["requirements"])}
    assert plain == {str(Requirement(line)) for line in meta.get_all("Requires-Dist") if "extra ==" not in line}


def test_the_wheel_has_the_command_and_the_nbdev_index(wheel, settings):
    packed = zipfile.ZipFile(wheel)
    parser = configparser.ConfigParser()
    parser.read_string(packed.read(next(name for name in packed.namelist() if name.endswith("entry_points.txt"))).decode())
    assert dict(parser["console_scripts"]) == {"vlm-repro": "vlm_repro.cli:main"}
    assert dict(parser["nbdev"]) == {settings["lib_name"]: "vlm_repro._modidx:d"}


@pytest.mark.slow
def test_a_wheel_built_from_the_sdist_is_the_same(checkout, wheel, tmp_path):
    sdist = build("sdist", checkout, tmp_path)
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    again = build("wheel", next((tmp_path / "unpacked").iterdir()), tmp_path)
    one, two = zipfile.ZipFile(wheel), zipfile.ZipFile(again)
    assert sorted(one.namelist()) == sorted(two.namelist())
    assert [name for name in one.namelist() if not name.endswith("/RECORD") and one.read(name) != two.read(name)] == []


def empty_environment(folder: Path, wheel: Path) -> Path:
    """A new environment with the wheel in it and, for its dependencies, the site-packages of this Python; the folder of its programs."""
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    subprocess.run([sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q", "--no-deps", str(wheel)], check=True)
    # A path in a .pth file does not run the .pth files found there, so the editable install of the checkout stays out of sight.
    here = [entry for entry in sys.path if entry.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(here) + "\n")
    return folder / "bin"


@pytest.mark.slow
def test_an_installed_wheel_runs_the_paper_from_any_folder(wheel, tmp_path):
    programs = empty_environment(tmp_path / "env", wheel)
    work = tmp_path / "elsewhere"
    work.mkdir()
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"IPYTHONDIR": str(tmp_path / "ipython")}
    where = subprocess.run([programs / "python", "-c", "import vlm_repro; print(vlm_repro.__file__)"], cwd=work, env=env, capture_output=True, text=True, check=True)
    assert Path(where.stdout.strip()).is_relative_to(tmp_path / "env")
    done = subprocess.run([programs / "vlm-repro", "run", "mmwalk", "-p", "shots", "3", "-p", "limit", "2"], cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert [path.parent.relative_to(work).parts[0] for path in work.rglob("manifest.json")] == ["runs"]
