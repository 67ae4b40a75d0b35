"""Read settings.ini, and put the paper notebooks into the wheel."""
import configparser
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
EXTRAS = ("train", "metrics", "robointer", "docs", "dev")
PYTHONS = ("3.11", "3.12", "3.13")


def read_settings(path: Path = HERE / "settings.ini") -> dict[str, str]:
    """The `[DEFAULT]` section of settings.ini."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parser.read(path, encoding="utf-8")
    return dict(parser["DEFAULT"])


def lines(value: str) -> list[str]:
    """The non-empty lines of a setting that holds one requirement a line."""
    return [line.strip() for line in value.splitlines() if line.strip()]


def extras(settings: dict[str, str]) -> dict[str, list[str]]:
    """The extras of settings.ini, and `all`, which holds every one of them."""
    found = {name: lines(settings[f"{name}_requirements"]) for name in EXTRAS}
    return {**found, "all": sorted({requirement for group in found.values() for requirement in group})}


class BuildWithPapers(build_py):
    """Copy `papers/*.ipynb` beside the package's other assets, so that the folder in the repository stays their one source."""

    def run(self) -> None:
        """Build as usual; an editable install keeps reading `papers/` itself."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "vlm_repro", "assets", "papers")
        target.mkdir(parents=True, exist_ok=True)
        for notebook in sorted((HERE / "papers").glob("*.ipynb")):
            shutil.copy2(notebook, target)


if __name__ == "__main__":
    settings = read_settings()
    setup(
        name=settings["lib_name"],
        version=settings["version"],
        description=settings["description"],
        long_description=(HERE / "README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        author=settings["author"],
        license=settings["license"],
        keywords=[word.strip() for word in settings["keywords"].split(",")],
        classifiers=[
            "Development Status :: 4 - Beta",
            "Framework :: Jupyter",
            "Intended Audience :: Science/Research",
            "Programming Language :: Python :: 3 :: Only",
            *(f"Programming Language :: Python :: {version}" for version in PYTHONS),
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
        ],
        packages=find_packages(include=["vlm_repro", "vlm_repro.*"]),
        package_data={"vlm_repro": ["assets/**/*"]},
        include_package_data=False,
        install_requires=lines(settings["requirements"]),
        extras_require=extras(settings),
        entry_points={
            "console_scripts": [settings["console_script"]],
            "nbdev": [f"{settings['lib_name']} = {settings['lib_name']}._modidx:d"],
        },
        cmdclass={"build_py": BuildWithPapers},
    )
