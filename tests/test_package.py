"""The package is what the checkout is: links hold, the core needs two dependencies, a wheel loses no file."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from kvbench._guard import LINKS, check_links

ROOT = Path(__file__).parents[1]

# Import the core while everything from the optional extras looks as if it were not installed.
CORE_ONLY = """
import sys
from importlib.machinery import PathFinder

OPTIONAL = {
    "accelerate", "datasets", "hydra", "lm_eval", "matplotlib", "omegaconf", "pandas", "plotly", "pyarrow", "pydantic",
    "scipy", "wandb", "wonderwords",
}

class CoreFinder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in OPTIONAL else super().find_spec(name, path, target)

sys.meta_path = [CoreFinder if finder is PathFinder else finder for finder in sys.meta_path]
import kvbench, kvbench.policies
assert kvbench.policies.POLICIES
"""

# Run in the folder of an installed wheel, without site-packages' .pth files: an editable install cannot help out.
USE_WHEEL = """
import sys
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path

import kvbench, kvbench.policies

installed = Path(sys.argv[1])
assert kvbench.policies.POLICIES
ours = [module for name, module in sys.modules.items() if name.partition(".")[0] == "kvbench"]
for module in ours:
    for place in module.__path__ if hasattr(module, "__path__") else [module.__file__]:
        assert Path(place).is_relative_to(installed), (module, place)
assert not [name for name in sys.modules if name.partition(".")[0] in {"policies", "kernels"}]
for name in sys.argv[2:]:
    assert (files("kvbench.conf") / name).read_text(), name
assert distribution("kvbench").version == kvbench.__version__
entries = sorted(entry.value for entry in distribution("kvbench").entry_points)
assert entries == ["kvbench.cli:main", "kvbench.lm_eval:KvbenchLM"]
"""


def run(*command: str | Path, **kwargs) -> None:
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )
    assert done.returncode == 0, done.stdout


def package_files(folder: Path) -> set[str]:
    """Every file that belongs in a wheel, named as the wheel names it."""
    paths = (Path(top, name) for top, _, names in os.walk(folder / "kvbench", followlinks=True) for name in names)
    return {path.relative_to(folder).as_posix() for path in paths}


@pytest.mark.parametrize("name", LINKS)
def test_link_resolves_to_top_folder(name: str) -> None:
    link = ROOT / "kvbench" / name
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert not (ROOT / name / name).exists(), "a second `ln -s` lands inside the folder that the first one links"


def test_init_files_are_where_imports_need_them() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "would shadow the PyPI package that transformers probes"
    assert not (ROOT / "tests" / "__init__.py").exists(), "would put the repository root first on sys.path"
    assert (ROOT / "conf" / "__init__.py").is_file()
    assert (ROOT / "policies" / "__init__.py").is_file()
    ops = {path.parent for path in (ROOT / "kernels").glob("*/*.py")}
    assert [op.name for op in ops if not (op / "__init__.py").is_file()] == []


def test_guard_names_the_fix_for_a_checkout_without_links(tmp_path: Path) -> None:
    check_links()
    (tmp_path / "conf").mkdir()
    check_links(tmp_path)
    (tmp_path / "policies").write_text("../policies")
    with pytest.raises(ImportError, match="kvbench/policies: .*git config core.symlinks true && git checkout -- kvb"):
        check_links(tmp_path)


def test_import_calls_the_guard_first(tmp_path: Path) -> None:
    package = tmp_path / "kvbench"
    package.mkdir()
    for name in ("__init__.py", "_guard.py"):
        shutil.copy(ROOT / "kvbench" / name, package)
    (package / "policies").write_text("../policies")
    done = subprocess.run([sys.executable, "-c", "import kvbench"], cwd=tmp_path, capture_output=True, text=True)
    assert "ImportError: kvbench/policies: a plain file" in done.stderr


def test_core_imports_without_optional_dependencies(tmp_path: Path) -> None:
    run(sys.executable, "-c", CORE_ONLY, cwd=tmp_path)


def test_wheel_works_from_another_folder(tmp_path: Path) -> None:
    source, dist, installed, elsewhere = (tmp_path / name for name in ("source", "dist", "installed", "elsewhere"))
    source.mkdir()
    elsewhere.mkdir()
    for name in ("kvbench", *LINKS):  # a copy, so that no build folder appears in the checkout
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, source)
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == package_files(source)

    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", installed, wheel)
    configs = sorted(path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*.yaml"))
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    environment = {**os.environ, "PYTHONPATH": path}
    run(sys.executable, "-S", "-c", USE_WHEEL, installed, *configs, cwd=elsewhere, env=environment)
