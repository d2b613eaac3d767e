"""Load towers in a process that never built them, and say what they give."""

import multiprocessing
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

_CONTEXT: ForkServerContext | None = None


def _context() -> ForkServerContext:
    # The server imports and does nothing else; every child is forked from it and knows only what it loads itself.
    global _CONTEXT
    if _CONTEXT is None:
        _CONTEXT = multiprocessing.get_context("forkserver")
        _CONTEXT.set_forkserver_preload(["hf_timm_tower.timm_model", "hf_timm_tower.modeling"])
    return _CONTEXT


def _load_and_run(folders: list[str], images: str, results: str) -> None:
    torch.set_num_threads(1)
    from hf_timm_tower import TimmModel

    image = torch.load(images, weights_only=True)
    found = {}
    for folder in folders:
        tower = TimmModel.from_pretrained(folder)
        assert not tower.training
        with torch.no_grad():
            found[folder] = tower(image)
        del tower
    torch.save(found, results)


def outputs_in_fresh_process(folders: list[Path], image: torch.Tensor, scratch: Path) -> list[torch.Tensor]:
    """Outputs of towers for `image`, each loaded by `from_pretrained` in one new process; in the order of `folders`.

    Raises:
        RuntimeError: the process failed; its message is on stderr.
    """
    images, results = scratch / "image.pt", scratch / "outputs.pt"
    torch.save(image, images)
    process = _context().Process(target=_load_and_run, args=([str(f) for f in folders], str(images), str(results)))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"loading in a fresh process failed with exit code {process.exitcode}")
    found = torch.load(results, weights_only=True)
    return [found[str(folder)] for folder in folders]
