"""The trainings of an experiment: processes of the recipe's ``train_embeddings.py``, several at a time."""

import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from shared_modules.files import write_whole


class Training:
    """One model: its folder, and the process that trains it.

    Arguments
    ---------
    plan : Plan
    version : str
        ``v1`` or ``v2``.
    seed : int
    folder : Path
        Of the experiment.
    device : str
    """

    def __init__(self, plan, version, seed, folder, device="cpu"):
        self.version, self.seed = version, seed
        self.model = getattr(plan, version)
        self.folder = Path(folder).resolve() / "models" / f"{version}_{seed}"
        self.exported = self.folder / "exported"
        data = Path(folder).resolve() / "data"
        # The two are trained independently: with one seed, models of one form would start from the same weights.
        own_seed = seed if version == "v1" else 1000 + seed
        self.options = {
            "seed": own_seed,
            "loss": plan.loss,
            "sample_rate": plan.sample_rate,
            **self.model.options,
            "train_csv": data / f"train_{version}.csv",
            "dev_csv": data / "dev.csv",
            "output_folder": self.folder,
        }
        self.device, self.process = device, None

    @property
    def name(self):
        """Version and seed, such as ``v1/3``."""
        return f"{self.version}/{self.seed}"

    @property
    def settings(self):
        """What the model was trained with; paths left out, so that folders can be moved."""
        options = {name: value for name, value in self.options.items() if not isinstance(value, Path)}
        data = {name: _corpus_hash(self.options[name]) for name in ("train_csv", "dev_csv")}
        return {"hparams": self.model.hparams, "options": options, "data": data}

    def is_done(self):
        """Whether the model is there.

        Raises
        ------
        ValueError
            If one of other settings is there.
        """
        record = self.folder / "settings.json"
        if record.exists():
            earlier = json.loads(record.read_text(encoding="utf-8"))
            if earlier != json.loads(json.dumps(self.settings)):
                raise ValueError(
                    f"{self.folder} is a model of other settings or data than the plan's; give another output folder, "
                    "or remove that one."
                )
        return record.exists() and (self.folder / "trained").exists()

    def start(self, recipe):
        """Start or resume the process, with a log of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with write_whole(self.folder / "settings.json") as stream:
            stream.write(json.dumps(self.settings, indent=1) + "\n")
        command = [sys.executable, "train_embeddings.py", f"hparams/{self.model.hparams}", "--device", self.device]
        for name, value in self.options.items():
            command += [f"--{name}", str(value)]
        with open(self.folder / "stdout.txt", "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                cwd=recipe,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def finish(self):
        """Note that the process went well.

        Raises
        ------
        ValueError
            If it did not.
        """
        if self.process.returncode:
            lines = (self.folder / "stdout.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            words = [line for line in lines if line.startswith("error: ") or "Error: " in line]
            reason = words[-1] if words else f"it ended with exit status {self.process.returncode}"
            raise ValueError(f"The training of {self.name} failed: {reason} (see {self.folder / 'stdout.txt'})")
        with write_whole(self.folder / "trained") as stream:
            stream.write("whole\n")

    def num_epochs(self):
        """How many epochs the history tells of."""
        history = self.folder / "history.csv"
        return max(len(history.read_text(encoding="utf-8").splitlines()) - 1, 0) if history.exists() else 0


def _corpus_hash(path):
    """A hash of what a csv lists, wherever the recordings are."""
    with open(path, encoding="utf-8", newline="") as stream:
        rows = [{**row, "path": os.path.basename(row["path"])} for row in csv.DictReader(stream)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def train_models(trainings, recipe, jobs=1, progressbar=True):
    """Train those models that are not there yet.

    Arguments
    ---------
    trainings : list of Training
    recipe : str or Path
        The folder of ``train_embeddings.py``.
    jobs : int
        Processes at a time, one thread each.
    progressbar : bool

    Raises
    ------
    ValueError
        If one fails; the others are stopped, and resumed by the next call.
    """
    waiting = [training for training in trainings if not training.is_done()]
    active = []
    num_kept = len(trainings) - len(waiting)
    with tqdm(total=len(trainings), initial=num_kept, desc="Models", disable=not progressbar) as bar:
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    active.append(waiting.pop(0))
                    active[-1].start(recipe)
                time.sleep(0.2)
                for training in [each for each in active if each.process.poll() is not None]:
                    active.remove(training)
                    training.finish()
                    bar.update()
                words = [f"{each.name}: {each.num_epochs()} epochs" for each in active]
                bar.set_postfix_str(", ".join(words), refresh=sys.stderr.isatty())
        finally:
            for training in active:
                training.process.terminate()
                training.process.wait()
