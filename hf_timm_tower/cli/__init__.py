"""`hf-timm-tower`, the command. torch is imported by the commands that need it, not before."""

import io
import sys


def main() -> None:
    """The entry point."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f'hf-timm-tower: {error}: pip install "hf_timm_tower[cli]"', file=sys.stderr)
        sys.exit(1)
    from .app import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files that the output's encoding does not have
            stream.reconfigure(errors="backslashreplace")
    app()
