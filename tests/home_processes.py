"""Virtual environments that have what is installed here and not this package, and processes in them."""

import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import hf_timm_tower


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        root: Its folder.
    """

    root: Path

    def run(
        self, code: str, *args: object, with_package: bool = False, env: Mapping[str, str | None] | None = None
    ) -> str:
        """What a new process of the environment prints, that runs in a new folder and with caches of its own.

        Args:
            code: Source, dedented.
            args: Its `sys.argv[1:]`.
            with_package: Put this package, and nothing else of the checkout, on its path.
            env: What to add to the environment variables; None takes a name out.

        Raises:
            AssertionError: the process failed; with what it printed.
        """
        count = len(list(self.root.glob("process_*")))
        scratch = self.root / f"process_{count}"
        (scratch / "cwd").mkdir(parents=True)
        path = self.root / "package_only" if with_package else None
        variables: dict[str, str | None] = {
            **os.environ,
            "HF_HOME": str(scratch / "hf"),
            **(env or {}),
            "PYTHONPATH": None if path is None else str(path),
            "PYTHONHOME": None,
            "PYTHONSAFEPATH": "1",
        }
        done = subprocess.run(
            [str(self.root / "bin" / "python"), "-c", textwrap.dedent(code), *map(str, args)],
            cwd=scratch / "cwd",
            env={name: value for name, value in variables.items() if value is not None},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode != 0:
            raise AssertionError(f"the process ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout


def make_environment(root: Path, without: tuple[str, ...] = ()) -> Environment:
    """A virtual environment with links to all packages that can be imported here, but this one.

    Lines of `.pth` files are not taken over: an editable install of this package would come in by them.

    Args:
        root: Its folder, made here.
        without: Names of further packages that it shall not have.
    """
    venv.EnvBuilder(with_pip=False, symlinks=True).create(root)
    # From inside it, the base interpreter is found as from any other virtual environment.
    site_packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(root), "platbase": str(root)}))
    left_out = tuple(name.lower() for name in ("hf_timm_tower", "__editable__", *without))
    for folder in sys.path:
        if Path(folder).name not in ("site-packages", "dist-packages") or not Path(folder).is_dir():
            continue
        for entry in os.scandir(folder):
            link = site_packages / entry.name
            skipped = entry.name.lower().startswith(left_out) or entry.name.endswith(".pth")
            if not skipped and not os.path.lexists(link):  # the first folder on the path wins
                link.symlink_to(entry.path)
    (root / "package_only").mkdir()
    (root / "package_only" / "hf_timm_tower").symlink_to(Path(hf_timm_tower.__file__).parent)
    return Environment(root)
