"""What a training run is given."""

from dataclasses import dataclass, field
from pathlib import Path

from cream.files.provenance import Provenance


@dataclass(frozen=True)
class Job:
    """All that decides a run: train.py's flags (`config`), and what follows from them.

    `name` is the stage's, `start` the folder of the model trained from; `header` the settings and inputs that the run's
    sidecar records, with `provenance`; `clear` removes an earlier run from the folder `run`; `deepspeed`: the settings
    in that flag's file; `held_out`, `prompts`: the files of --eval_name and --sample_prompts; `models`: the folders of
    the stage's other models.
    """

    config: object  # train.py's TrainConfig
    name: str
    stage: object
    start: Path
    data: Path
    run: Path
    header: dict
    limit_size: int | None = None
    clear: bool = False
    deepspeed: dict | None = None
    provenance: Provenance = field(default_factory=Provenance)
    held_out: Path | None = None
    prompts: Path | None = None
    models: dict[str, Path] = field(default_factory=dict)
