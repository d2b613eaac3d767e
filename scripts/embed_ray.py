#!/usr/bin/env python
"""Embed images on a Ray cluster, and go on where a run ended.

    python scripts/embed_ray.py org/tower manifest.parquet out/ --actors 8
    python scripts/embed_ray.py org/tower s3://bucket/photos/ s3://bucket/embeddings/ --gpus 1 --cpus 8 --actors 16
    ray job submit --address http://head:8265 --working-dir . -- python scripts/embed_ray.py ...

SOURCE is a Parquet manifest with the columns `id` and `path` (a file that every node can open, or an address of an
object store: s3://, gs://, ...), or a folder of images, whose paths are then the ids. OUT gets Parquet files with `id`
and `embedding`; `_tower.json` says what made them, and another tower is refused there. After a run that was killed the
same command goes on: Ray's checkpoint beside OUT knows which ids are done. Rows are in no order. A cluster needs three
cores beside those of the actors. Needs `pip install "hf_timm_tower[ray]"`.
"""

import argparse
import os
import sys

CORES_BESIDE = 3
"""For reading, writing and Ray's filter of what is done, beside those of the actors."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("tower", help="repository id of a tower, or a folder that every node can read")
    parser.add_argument("source", help="a .parquet manifest, or a folder of images")
    parser.add_argument("out", help="folder or address for Parquet files")
    parser.add_argument("--revision", help="branch, tag or commit of the tower")
    parser.add_argument("--trust-remote-code", action="store_true", help="run a head that is stored as code")
    parser.add_argument("--id-column", default="id", help="of the manifest; every id stands once")
    parser.add_argument("--path-column", default="path", help="of the manifest")
    parser.add_argument("--batch-size", type=int, help="images that run at once; 8 on a CPU, 32 on a GPU")
    parser.add_argument("--normalize", action="store_true", help="scale embeddings to length 1")
    parser.add_argument("--dtype", choices=("float32", "float16"), help="what is stored; what the tower gives")
    parser.add_argument("--strict", action="store_true", help="end at the first image that cannot be used")
    parser.add_argument("--actors", type=int, default=1, help="towers at work")
    parser.add_argument("--cpus", type=int, default=1, help="cores of each, which decode")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each")
    parser.add_argument("--rows-per-file", type=int, default=4096, help="about; what a kill loses at most per writer")
    parser.add_argument("--checkpoint", help="folder or address that all nodes reach; default: OUT with .checkpoint")
    parser.add_argument("--address", help="of the cluster; default: RAY_ADDRESS, else this machine")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Read, embed, write: each of them Ray's."""
    import ray
    import torch
    from pyarrow.dataset import dataset
    from ray.data.checkpoint import CheckpointConfig
    from ray.data.expressions import download

    from hf_timm_tower.embedding.ray import claim_output, embed_dataset

    how = {
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
        "batch_size": options.batch_size,
        "normalize": options.normalize,
        "dtype": getattr(torch, options.dtype) if options.dtype else None,
        "num_gpus": options.gpus,
    }
    out = options.out if "://" in options.out else os.path.abspath(options.out)  # Ray's checkpoint takes no other
    claim_output(out, options.tower, **how)
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    # on one machine the actors would leave no core to those that feed them, and all would wait for ever
    cores = max(os.cpu_count() or 1, options.actors * options.cpus + CORES_BESIDE) if address == "local" else None
    ray.init(address=address, num_cpus=cores, ignore_reinit_error=True)
    key, column = options.id_column, options.path_column
    is_manifest = options.source.endswith(".parquet")
    first = dataset(options.source).head(1, columns=[column])[column].to_pylist() if is_manifest else []
    remote = any("://" in str(path) for path in first)
    # A dataset has the settings of the moment in which it is made. The checkpoint is kept, so that the same command
    # after a run that came to its end finds nothing to do, instead of appending everything again.
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column=key if is_manifest else "path",
        checkpoint_path=options.checkpoint or out.rstrip("/") + ".checkpoint",
        delete_checkpoint_on_success=False,
    )
    if is_manifest:
        images = ray.data.read_parquet(options.source).select_columns(list(dict.fromkeys([key, column])))
        images = images.repartition(target_num_rows_per_block=options.rows_per_file)
    else:
        images, key, column = ray.data.read_binary_files(options.source, include_paths=True), "path", "bytes"
    if remote:
        images, column = images.with_column("bytes", download(column)), "bytes"
    embedded = embed_dataset(
        images,
        options.tower,
        column=column,
        id_column=key,
        errors="raise" if options.strict else "collect",
        actors=options.actors,
        num_cpus=options.cpus,
        **how,
    )
    embedded.write_parquet(out)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 with the reason on stderr."""
    options = parse(arguments)

    # torch and ray take seconds to import: not before the command line is known to be right
    from hf_timm_tower import TowerError

    try:
        run(options)
    except ImportError as error:
        raise SystemExit(f'{error}: pip install "hf_timm_tower[ray]"') from error
    except TowerError as error:
        print(f"embed_ray: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # pyarrow's for a manifest that is not there has its path alone
        print(f"embed_ray: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
