"""The app of `hf-timm-tower serve`, and the only file here that imports gradio: what is shown where.

It listens on this machine alone, asks nobody on the network, and opens the files of the embedded set and what is
dropped on it, no others.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when it is imported

import gradio as gr
from PIL import Image

from ..reader.errors import TowerError
from .explore import PatchView
from .shown_set import ShownSet

LOOPBACK = "127.0.0.1"


def make_app(shown: ShownSet) -> gr.Blocks:
    """The app as gradio's blocks; `launch` it yourself on a Space, `serve` does it on this machine."""
    methods = ["pca", *(["umap"] if importlib.util.find_spec("umap") else [])]
    origin = shown.stored.manifest["tower"]
    name = origin.get("loaded_from") or shown.tower.config.architecture
    if not origin.get("commit"):
        name = os.path.basename(name)  # a folder's
    with gr.Blocks(title="hf-timm-tower", analytics_enabled=False, fill_width=True) as app:
        gr.Markdown(f"{len(shown):,} images by `{str(name).replace('`', '')}`")
        with gr.Tab("Neighbours"):
            _neighbours_tab(shown)
        with gr.Tab("Inside an image"):
            _patches_tab(shown)
        with gr.Tab("Map"):
            _map_tab(shown, methods)
        with gr.Tab("Duplicates and outliers"):
            _oddities_tab(shown)
    return app


def serve(shown: ShownSet, port: int | None = None, *, block: bool = True) -> str:
    """Run the app on this machine's loopback address, and return its address.

    Args:
        shown: What to show.
        port: None takes the first free one from 7860 on.
        block: Until Ctrl-C.
    """
    app = make_app(shown)
    _, address, _ = app.launch(
        server_name=LOOPBACK,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        theme=gr.themes.Default(font="sans-serif", font_mono="monospace"),  # no fonts from the network
    )
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    if block:
        app.block_thread()
    return str(address)


def _neighbours_tab(shown: ShownSet) -> None:
    with gr.Row():
        image = _drop("query")
        most = max(2, min(60, len(shown)))  # gradio's least
        count = gr.Slider(1, most, min(12, most), step=1, label="Neighbours")
    found = _gallery("Nearest first, with the cosine", "neighbours")

    def search(given: Image.Image | None, k: float) -> Any:
        return [] if given is None else shown.neighbours(given, int(k))

    gr.on([image.change, count.release], _told(search), [image, count], found, api_visibility="private")


def _patches_tab(shown: ShownSet) -> None:
    with gr.Row():
        image = _drop("patches-query")
    with gr.Row():
        view = _picture("What the tower sees: click on it", "view")
        parts = _picture("Main components of the last map", "components")
        alike = _picture("Like the place that was clicked", "similarity")
    state = gr.State()

    def look(given: Image.Image | None) -> Any:
        if given is None:
            return None, None, None, None
        patches = PatchView(shown.tower, given)
        x, y = patches.view.width // 2, patches.view.height // 2
        return patches, patches.view, patches.components(), patches.similarity_picture(x, y)

    def compare(patches: PatchView | None, event: gr.SelectData) -> Any:
        return None if patches is None else patches.similarity_picture(*event.index)

    image.change(_told(look), image, [state, view, parts, alike], api_visibility="private")
    view.select(compare, state, alike, api_visibility="private")


def _map_tab(shown: ShownSet, methods: list[str]) -> None:
    with gr.Row():
        method: Any = gr.Radio(methods, value=methods[0], label="Method")
        draw = gr.Button("Draw the map", elem_id="draw")
    with gr.Row():
        picture = _picture("Every image; click on one", "map")
        found = _gallery("The image there, and its neighbours", "there", columns=3)

    def pick(way: Any, event: gr.SelectData) -> Any:
        return shown.neighbours_of(shown.row_at(way, *event.index), 12)

    draw.click(_told(shown.map_picture), method, picture, api_visibility="private")
    picture.select(pick, method, found, api_visibility="private")


def _oddities_tab(shown: ShownSet) -> None:
    with gr.Row():
        least = gr.Slider(0.5, 1, 0.95, step=0.005, label="Least cosine of a pair")
        compare = gr.Button("Compare all images", elem_id="compare")
    pairs = _gallery("Near duplicates, pair by pair", "duplicates")
    odd = _gallery("Outliers: the mean cosine to their ten nearest", "outliers")

    def both(cosine: float) -> Any:
        return shown.duplicates(cosine), shown.outliers()

    compare.click(_told(both), least, [pairs, odd], api_visibility="private")


def _drop(name: str) -> gr.Image:
    return gr.Image(type="pil", label="Drop an image", height=320, elem_id=name, sources=["upload", "clipboard"])


def _picture(label: str, name: str) -> gr.Image:
    """With its label above, where gradio would lay it over the picture."""
    with gr.Column():
        gr.Markdown(f"**{label}**")
        return gr.Image(
            label=label, show_label=False, interactive=False, elem_id=name, buttons=["fullscreen"], format="png"
        )


def _gallery(label: str, name: str, columns: int = 6) -> gr.Gallery:
    """With its label above, where gradio would lay it over the first picture; without gradio's button to share."""
    with gr.Column():
        gr.Markdown(f"**{label}**")
        return gr.Gallery(
            label=label,
            show_label=False,
            elem_id=name,
            columns=columns,
            object_fit="contain",
            height="auto",
            format="png",
            buttons=["fullscreen"],
        )


def _told(work: Callable[..., Any]) -> Callable[..., Any]:
    """This package's errors as a message in the browser."""

    def run(*given: Any) -> Any:
        try:
            return work(*given)
        except TowerError as error:
            raise gr.Error(str(error)) from error

    return run
