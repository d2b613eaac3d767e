#!/usr/bin/env python3
"""Train an image tower and a text model to agree (CLIP, SigLIP), and publish both as one zero-shot classifier.

    python scripts/train_clip.py                                    # digits and a tiny BERT: no downloads
    python scripts/train_clip.py --data FOLDER --tower org/tower --lock-image --text-model org/bert --loss siglip
    python scripts/train_clip.py --second-tower test_convnext       # two image towers, on pairs of images
    torchrun --nproc-per-node 2 scripts/train_clip.py --cpu --push-to-hub org/name      # or: accelerate launch

FOLDER is what `datasets` calls an image folder, with captions (`text`) or partners (`pair_file_name`) in its
metadata.jsonl. Several processes share each batch, and all of it counts as negatives. Needs
`pip install "hf_timm_tower[train]"`, and scikit-learn for the digits.
"""

import sys
from argparse import RawDescriptionHelpFormatter

from _train_clip.options import Options
from transformers import HfArgumentParser


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 with the reason on stderr."""
    parser = HfArgumentParser(
        Options, description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    (options,) = parser.parse_args_into_dataclasses(arguments)

    # torch takes seconds to import: not before the command line is known to be right
    from _train_clip.main import run
    from _train_clip.publishing import NotTheSame

    from hf_timm_tower import TowerError

    try:
        run(options)
    except (NotTheSame, TowerError) as error:
        print(f"train_clip: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
