#!/usr/bin/env python
"""Write a tower as ONNX, as a program of torch.export, or as a timm checkpoint.

    python scripts/export.py TOWER --format onnx --out tower.onnx
    python scripts/export.py org/name --format torch --out tower.pt2
    python scripts/export.py TOWER --format timm --out FOLDER

ONNX needs `pip install "hf_timm_tower[onnx]"`. What was written is compared with the tower before it appears under its
name; `--no-check` leaves that out for ONNX and torch.export.
"""

import argparse
import sys


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("tower", help="folder or repository id of a tower")
    parser.add_argument("--format", choices=("onnx", "torch", "timm"), required=True)
    parser.add_argument("--out", required=True, help="file (.onnx, .pt2) or folder (timm) to write")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--check", action=argparse.BooleanOptionalAction, default=True, help="compare the output with the tower's"
    )
    parser.add_argument("--head", choices=("fold", "drop"), default="fold", help="timm: what becomes of the head")
    parser.add_argument(
        "--preprocess", choices=("exact", "nearest"), default="exact", help="timm: may preprocessing be approximate"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 with the reason on stderr."""
    parsed = parse(arguments)

    # torch takes seconds to import: not before the command line is known to be right
    from hf_timm_tower import TimmModel, TowerError
    from hf_timm_tower.cli.exporting import export

    try:
        tower = TimmModel.from_pretrained(parsed.tower, revision=parsed.revision)
        how = {"check": parsed.check, "head": parsed.head, "preprocess": parsed.preprocess}
        print(export(tower, parsed.out, parsed.format, **how))
    except ImportError as error:
        raise SystemExit(str(error)) from error
    except TowerError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
