"""The commands: arguments, one call of the package each, and what is said of the result."""

import os
import sys
from typing import Annotated, Any, Literal

import typer

from .exporting import Format
from .exporting import export as write
from .report import INCOMPLETE, command, fail, printable, say, say_rows

app = typer.Typer(
    name="hf-timm-tower",
    help="Towers of hf_timm_tower: look at them, embed images, search, verify, push, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run a head that is stored as code.")]
DType = Literal["float32", "float16"]
TowerPlace = Annotated[str, typer.Argument(metavar="REPO", help="A tower: repository id or folder.")]


def _load(place: str, revision: str | None, trust: bool) -> Any:
    from ..timm_model import TimmModel

    return TimmModel.from_pretrained(place, revision=revision, trust_remote_code=trust)


def _tower_of(stored: Any, tower: str | None, trust: bool, as_json: bool) -> Any:
    """The tower of a folder of embeddings, or the one that is named instead."""
    known = stored.manifest["tower"]
    if tower is None and known.get("loaded_from") is None:
        fail("the folder does not say where its tower came from: --tower REPO", as_json, 2)
    return _load(tower or known["loaded_from"], None if tower else known.get("commit"), trust)


@app.command()
def inspect(repo: TowerPlace, revision: Revision = None, as_json: AsJson = False) -> None:
    """Say what a tower is, without fetching its weights."""
    with command(as_json):
        from ..hub.download import Access
        from .inspection import inspect_tower

        facts = inspect_tower(repo, revision, Access())
        if not as_json:
            facts["files"] = [f"{size:>13,}  {name}" for name, size in facts["files"].items()]
            facts = {name: value for name, value in facts.items() if value is not None}
        say(facts, as_json)


@app.command()
def embed(
    source: Annotated[str, typer.Argument(help="A folder of images, a tar shard, or one image.")],
    to: Annotated[
        str, typer.Option(help="Folder for the embeddings; one that was left in the middle is gone on with.")
    ],
    tower: Annotated[str | None, typer.Option(help="Repository id or folder; by default that of the folder.")] = None,
    revision: Revision = None,
    batch_size: Annotated[int | None, typer.Option(help="Images that run at once.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one for each core.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale embeddings to length 1.")] = False,
    dtype: Annotated[DType | None, typer.Option(help="What is stored; by default what the tower gives.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, ...")] = None,
    rows_per_shard: Annotated[int | None, typer.Option(help="Images of a shard: what a kill loses at most.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be used.")] = False,
    trust_remote_code: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: AsJson = False,
) -> None:
    """Embed images into a folder of Parquet files. Exit code 3: done, but for images that cannot be used."""
    with command(as_json):
        from pathlib import Path

        import torch

        from ..embedding.manifest import read_manifest

        known = (read_manifest(Path(to)) or {}).get("tower", {}) if os.path.isdir(to) else {}
        if tower is None and known.get("loaded_from") is None:
            fail("which tower? --tower REPO", as_json, 2)
        model = _load(
            tower or known["loaded_from"], revision or (None if tower else known.get("commit")), trust_remote_code
        )
        stored = model.embed_to(
            source,
            to,
            batch_size=batch_size,
            num_workers="auto" if workers is None else workers,
            normalize=normalize,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=device or ("cuda" if torch.cuda.is_available() else None),
            progress=not quiet and sys.stderr.isatty(),
            errors="raise" if strict else "collect",
            rows_per_shard=rows_per_shard,
        )
        failures = stored.failures
        facts: dict[str, Any] = {
            "folder": to,
            "embeddings": len(stored),
            "shards": len(stored.shards),
            "failures": len(failures),
        }
        if failures and not as_json:
            facts["left out"] = [f"{failure.id}: {failure.reason}" for failure in failures[:10]]
            if len(failures) > 10:
                facts["left out"].append(f"and {len(failures) - 10} more, in {os.path.join(to, 'failures.jsonl')}")
        say(facts, as_json)
    if failures:
        raise typer.Exit(INCOMPLETE)


@app.command()
def search(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Embeddings made by `embed`.")],
    image: Annotated[str, typer.Argument(help="An image file.")],
    k: Annotated[int, typer.Option("-k", help="How many neighbours.")] = 10,
    tower: Annotated[str | None, typer.Option(help="Repository id or folder; by default that of the folder.")] = None,
    sheet: Annotated[str | None, typer.Option(help="Write a picture of the neighbours, a .png or .jpg.")] = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """The images that are nearest to one, by cosine."""
    with command(as_json):
        from ..embedding.search import contact_sheet, embed_query, nearest
        from ..embedding.stored import StoredEmbeddings

        stored = StoredEmbeddings(folder)
        model = _tower_of(stored, tower, trust_remote_code, as_json)
        found = nearest(stored, embed_query(model, stored, image), k)
        if sheet is not None:
            tiles = [(stored.image_path(name), f"{cosine:.4f} {os.path.basename(name)}") for name, cosine in found]
            contact_sheet(image, tiles, sheet)
        if as_json:
            say({"image": image, "neighbours": [{"id": name, "cosine": cosine} for name, cosine in found]}, as_json)
        else:
            say_rows(("cosine", "image"), [(f"{cosine:.4f}", name) for name, cosine in found])


@app.command()
def serve(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Embeddings made by `embed`.")],
    tower: Annotated[str | None, typer.Option(help="Repository id or folder; by default that of the folder.")] = None,
    images: Annotated[
        str | None, typer.Option(help="Folder of the images, where they have moved since, or for --space.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="By default the first free one from 7860 on.")
    ] = None,
    space: Annotated[
        str | None, typer.Option(help="Push it with the images as a Space of this id instead, to be seen by others.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Of a new Space.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Look at embeddings in a browser, on this machine alone: neighbours, maps, duplicates, outliers."""
    with command(False):
        try:
            from ..embedding.gradio import serve as run
        except ImportError as error:
            fail(f'{error}: pip install "hf_timm_tower[app]"', False)
        from ..embedding.shown_set import ShownSet
        from ..embedding.space import push_space
        from ..embedding.stored import StoredEmbeddings

        stored = StoredEmbeddings(folder)
        shown = ShownSet(_tower_of(stored, tower, trust_remote_code, False), stored, images)
        if space is None:
            run(shown, port)
        else:
            say({"commit": push_space(shown, space, private=private or None)}, False)


@app.command("eval")
def evaluate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Embeddings of images in one folder for each class.")],
    train: Annotated[
        str | None, typer.Option(help="Embeddings of a training set of the same classes, for k-NN and a linear probe.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How good embeddings are: retrieval, and with --train also k-NN (as DINOv2) and a linear probe (as CLIP)."""
    with command(as_json):
        from ..embedding.evaluation import evaluate_folders
        from ..embedding.stored import StoredEmbeddings

        found = evaluate_folders(StoredEmbeddings(folder), None if train is None else StoredEmbeddings(train))
        if as_json:
            say({name: {"metrics": each.metrics, "protocol": each.protocol} for name, each in found.items()}, as_json)
        else:
            say_rows(("metric", "value"), [(name, f"{value:.4f}") for each in found.values()
                                           for name, value in each.metrics.items()])  # fmt: skip


@app.command()
def verify(
    repo: TowerPlace, revision: Revision = None, trust_remote_code: Trust = False, as_json: AsJson = False
) -> None:
    """Whether a tower gives here the outputs that it was saved with. Exit code 1: it does not."""
    with command(as_json):
        found = _load(repo, revision, trust_remote_code).verify()
        if as_json:
            say({"status": found.status, "relative_difference": found.relative_difference, "tolerance": found.tolerance,
                 "changed": {name: list(map(str, pair)) for name, pair in found.changed.items()}}, as_json)  # fmt: skip
        else:
            print("\n".join(map(printable, str(found).splitlines())))
    if found.status == "different":
        raise typer.Exit(1)


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="A tower's folder.")],
    repo: Annotated[str, typer.Argument(help="Repository id; it is made.")],
    private: Annotated[bool, typer.Option("--private", help="Of a new repository.")] = False,
    branch: Annotated[str | None, typer.Option(help="Branch, made where it does not exist.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card, such as apache-2.0.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit's first line.")] = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Push a tower's folder to the Hub in one commit."""
    with command(as_json):
        model = _load(folder, None, trust_remote_code)
        words = {} if message is None else {"commit_message": message}
        url = model.push_to_hub(repo, private=private or None, branch=branch, license=license, **words)
        say({"commit": url}, as_json)


@app.command()
def export(
    repo: TowerPlace,
    format: Annotated[Format, typer.Option("--format", help="onnx, transformers.js, torch (torch.export), timm.")],
    out: Annotated[str, typer.Option(help="File (.onnx, .pt2) or folder (timm) to write.")],
    revision: Revision = None,
    check: Annotated[bool, typer.Option(help="Compare the output with the tower's.")] = True,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write a tower for another library."""
    with command(as_json):
        say({"written": write(_load(repo, revision, trust_remote_code), out, format, check=check)}, as_json)
