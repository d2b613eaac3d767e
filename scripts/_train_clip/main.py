"""Data, towers, training, folder, push, check: in this order."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed

from .data import Data, Draws, load_data
from .options import Options
from .publishing import push
from .training import train
from .with_pairs import WithPairs
from .with_text import WithText


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        trained: The towers, on the CPU and in eval mode.
        data: What they were trained on and measured with.
        losses: Mean loss of each epoch.
        accuracy: On what was held out, 0 to 1.
    """

    trained: WithText | WithPairs
    data: Data
    losses: list[float]
    accuracy: float


def run(options: Options) -> Result:
    """Train, save, push where asked for, and load again what was saved and pushed.

    Every process trains and returns; only the main one writes.

    Raises:
        NotTheSame: what was loaded again gives other outputs.
    """
    sharing = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=options.seed)
    accelerator = Accelerator(cpu=options.cpu, dataloader_config=sharing)
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) != accelerator.num_processes:
        # accelerate takes torchrun's processes on CPUs for so many trainings by themselves unless told
        raise SystemExit(
            f"train_clip: {started} processes were started and {accelerator.num_processes} would train together; "
            "where there are only CPUs, add --cpu"
        )
    set_seed(options.seed)
    with accelerator.main_process_first():
        data = load_data(options)
    trained = WithText(options, data) if options.second_tower is None else WithPairs(options)
    start = time.monotonic()
    draws = Draws(data.train, options.seed, options.limit)
    losses = train(accelerator, trained.module, draws, trained.collate, options)
    accelerator.print(f"trained in {time.monotonic() - start:.0f} s on {accelerator.num_processes} process(es)")
    accelerator.free_memory()
    trained.module.cpu()
    accuracy = trained.accuracy(data)
    if accelerator.is_main_process:
        _publish(trained, data, accuracy, options)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Result(trained, data, losses, accuracy)


def _publish(trained: WithText | WithPairs, data: Data, accuracy: float, options: Options) -> None:
    print(f"held out: {accuracy:.1%} of {len(data.held_out.images)} right")
    folder = Path(options.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    trained.save(folder, data, accuracy)
    trained.check(str(folder), data)
    print(f"saved in {folder}: loaded again, it gives the same outputs")
    if options.push_to_hub is not None:
        url = push(folder, options.push_to_hub, options.private)
        trained.check(options.push_to_hub, data)
        print(f"pushed to {url}: loaded again, it gives the same outputs")
