"""Refuse a checkout in which git wrote the committed links as plain files."""

from pathlib import Path

LINKS = ("policies", "kernels", "conf")


def check_links(package: Path = Path(__file__).parent) -> None:
    """Raise ImportError if a link of ``package`` is a file (Windows default, some unzip tools).

    Without this, such a checkout builds a wheel that has no policies and reports no error.
    """
    broken = [name for name in LINKS if (package / name).is_file()]
    if broken:
        files = ", ".join(f"kvbench/{name}" for name in broken)
        raise ImportError(
            f"{files}: a plain file where a link to a folder belongs. In the repository, delete it, then run: "
            "git config core.symlinks true && git checkout -- kvbench"
        )
