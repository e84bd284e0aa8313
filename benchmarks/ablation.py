"""Train and compare plain PIT, DSD, LO and controls on recorded speech, all from the recipe's one YAML.

    python benchmarks/ablation.py --speech FOLDER --output results/ablation

FOLDER holds ``libri_train/metadata.csv`` and ``libri_test/metadata.csv`` (columns id, speaker, path). Training
mixtures are made from the first; dev mixtures from the first half of the second's speakers, test mixtures from the
other half. The runs stand in benchmarks/ablation_plan.py; each is a process of the recipe's train.py. The test set
stays closed until all runs of the command are trained. The same command again goes on where it was stopped, also from
the output's csv files alone.

The model is small, so that two cores train a run in ten minutes. Any option of the YAML can be set for all runs:

    python benchmarks/ablation.py --data_folder /path/to/Libri2Mix --set num_filters=256 kernel_size=16 chunk_size=250

    OUTPUT/results.csv      a row per regime, arm, seed and epoch
    OUTPUT/test_scores.csv  a row per regime, arm, seed and test mixture
    OUTPUT/runs.csv         where, how long, at which commit, with which command
    OUTPUT/tables.md, *.png what to look at
    OUTPUT/examples         what plain PIT and DSD + LO make of a mixture of synthetic voices
    OUTPUT/data, runs       mixtures; the folders of the runs, with a log each
"""

import argparse
import csv
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median

import torch
from ablation_examples import write_examples
from ablation_plan import ARMS, REGIMES, Data, Run, num_epochs, overrides, plan
from ablation_report import write_report
from tqdm import tqdm

from dsd_modules.data.generate import generate_synthetic, mix_recordings
from dsd_modules.evaluation import read_results
from dsd_modules.options import read_options
from shared_modules.files import lock_folder, write_table, write_whole

RECIPE = Path(__file__).resolve().parents[1] / "recipes/LibriMix/separation"
KEY = ("regime", "arm", "seed")
NUM_DEV, NUM_TEST = 100, 200
# What --set must leave alone.
OWN_OPTIONS = {name for each in (*ARMS.values(), *REGIMES.values()) for name in each.overrides} - {"lr", "batch_size"}
OWN_OPTIONS |= {"seed", "number_of_epochs", "cascade_pit_epochs", "cascade_fixed_epochs", "data_folder"}
OWN_OPTIONS |= {"output_folder", "save_folder", "device", "test_at_end"}


def make_data(data, arguments):
    """Mix a regime's data, or find them."""
    if arguments.data_folder:
        return arguments.data_folder
    root = arguments.output / "data"
    sets = {"train-360": data.num_train, "dev": NUM_DEV, "test": NUM_TEST}
    sets = {name: max(size // arguments.shrink, 4) for name, size in sets.items()}
    options = {"sets": sets, "num_spks": data.num_spks, "max_seconds": data.max_seconds}
    if data.source == "synthetic":
        return generate_synthetic(root, **options)
    evaluation = arguments.speech / "libri_test/metadata.csv"
    num_speakers = len({row["speaker"] for row in _read_csv(evaluation, ("speaker",))})
    corpora = {
        "train-360": arguments.speech / "libri_train/metadata.csv",
        "dev": f"{evaluation}:0:{num_speakers // 2}",
        "test": f"{evaluation}:{num_speakers // 2}:",
    }
    return mix_recordings(root, corpora, **options)


def _read_csv(path, columns=()):
    with open(path, newline="", encoding="utf-8") as stream:
        table = csv.DictReader(stream)
        for column in columns:
            if column not in (table.fieldnames or ()):
                raise ValueError(f"{path} lacks the column {column!r}.")
        return list(table)


class Records:
    """The three csv files: what is known of each run, whether or not its folder is still there."""

    def __init__(self, folder):
        self.folder = folder
        self.tables = {}
        for name in ("results", "test_scores", "runs"):
            path = folder / f"{name}.csv"
            self.tables[name] = {}
            for row in _read_csv(path, KEY) if path.exists() else []:
                self.tables[name].setdefault(Run(row["regime"], row["arm"], int(row["seed"])), []).append(row)

    def put(self, name, run, rows):
        """Set a run's rows and write the file."""
        self.tables[name][run] = [{**run._asdict(), **row} for row in rows]
        write_table(self.folder / f"{name}.csv", [row for rows in self.tables[name].values() for row in rows])

    def is_trained(self, run, epochs):
        """Whether all epochs are there."""
        return len(self.tables["results"].get(run, ())) == num_epochs(run, epochs)

    def is_tested(self, run):
        """Whether the test scores are there."""
        return run in self.tables["test_scores"]


class Training:
    """One run's process, with a log of its own."""

    def __init__(self, run, data_folder, arguments, device, test_at_end):
        self.run = run
        self.device = device
        self.folder = (arguments.output / "runs" / run.regime / run.arm / str(run.seed)).resolve()
        options = {**overrides(run, arguments.epochs), **dict(arguments.set)}
        if arguments.shrink > 1:
            options["probe_size"] = 4
        self.command = ["train.py", "hparams/sepformer_dsd.yaml", *_flags(options)]
        folders = {"data_folder": data_folder, "output_folder": self.folder}
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.commit = _commit()
        self.log = self.folder / ("test_log.txt" if test_at_end else "log.txt")
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command, *_flags({**folders, "test_at_end": test_at_end, "device": device})],
                cwd=RECIPE,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def history(self):
        """The epochs so far."""
        path = self.folder / "history.csv"
        return _read_csv(path) if path.exists() else []

    def last_words(self):
        """The log's last error, and where the log is."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        errors = [line for line in lines if line.startswith("error: ") or "Error: " in line]
        reason = errors[-1] if errors else f"ended with exit status {self.process.returncode}"
        return f"{reason} (see {self.log})"


def _flags(options):
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def run_all(runs, data, arguments, records, test_at_end):
    """Run the trainings, ``arguments.jobs`` at a time; returns those that failed."""
    if not runs:
        return []
    devices = [f"cuda:{i % torch.cuda.device_count()}" if arguments.gpu else "cpu" for i in range(arguments.jobs)]
    waiting, active, failed = list(runs), [], []
    unit = "run" if test_at_end else "epoch"
    total = len(runs) if test_at_end else sum(num_epochs(run, arguments.epochs) for run in runs)
    progress = tqdm(total=total, desc="Test" if test_at_end else "Training", unit=unit, smoothing=0)
    num_done = 0
    try:
        while waiting or active:
            while waiting and len(active) < arguments.jobs:
                free = list(devices)
                for training in active:
                    free.remove(training.device)
                run = waiting.pop(0)
                active.append(Training(run, data[REGIMES[run.regime].data], arguments, free[0], test_at_end))
            time.sleep(0.5)
            for training in list(active):
                if training.process.poll() is None:
                    continue
                active.remove(training)
                if training.process.returncode:
                    failed.append(training)
                    tqdm.write(f"failed: {'/'.join(map(str, training.run))}: {training.last_words()}", file=sys.stderr)
                else:
                    _keep(training, arguments, records, test_at_end)
                    num_done += 1 if test_at_end else num_epochs(training.run, arguments.epochs)
            running = 0 if test_at_end else sum(len(training.history()) for training in active)
            progress.set_postfix_str(", ".join("/".join(map(str, training.run)) for training in active), refresh=False)
            progress.update(num_done + running - progress.n)
            if sys.stderr.isatty():
                progress.refresh()  # the clock goes on
    finally:
        progress.close()
        for training in active:
            training.process.terminate()
            training.process.wait()
    return failed


def _keep(training, arguments, records, test_at_end):
    """Copy what a finished process left into the csv files."""
    run = training.run
    records.put("results", run, _with_exclusions(training.history(), training.folder / "exclusions.csv"))
    if not test_at_end:
        about = {
            "device": torch.cuda.get_device_name(training.device) if arguments.gpu else _processor(),
            "threads": arguments.threads,
            "jobs": arguments.jobs,
            "commit": training.commit,
            "seconds": round(sum(float(row["seconds"] or 0) for row in training.history())),  # of training
            "command": " ".join(training.command),
        }
        records.put("runs", run, [about])
        return
    speakers = _speakers(training.folder)
    scores, _ = read_results(training.folder / "test_results.csv")
    rows = []
    for sample_id, row in scores.items():
        kept = {name: value for name, value in row.items() if "spk" not in name}
        rows.append({"id": sample_id, "speakers": speakers[sample_id], **kept})
    records.put("test_scores", run, rows)


def _with_exclusions(history, audit):
    """The history with what the audit tells of each epoch's excluded samples.

    Their mean SI-SDR (or what ``dsd_metric`` is), and the median of how much worse it is than the stored one, in dB.
    """
    exclusions = {}
    for row in _read_csv(audit):  # cascaded PIT's fixed stage is no exclusion by the metric, but shows here too
        exclusions.setdefault(row["epoch"], []).append((float(row["metric"]), float(row["stored_metric"])))
    for row in history:
        excluded = exclusions.get(row["epoch"])
        row["excluded_metric"] = round(mean(metric for metric, _ in excluded), 4) if excluded else ""
        row["excluded_gap"] = round(median(stored - metric for metric, stored in excluded), 4) if excluded else ""
    return history


def _speakers(folder):
    """The speakers of each test mixture: from the metadata beside the mixtures, or as LibriMix's ids tell."""
    mixtures = _read_csv(folder / "manifests/test.csv")
    _, options = read_options(folder / "hyperparams.yaml")
    info = list(Path(options["data_folder"]).glob("metadata/*_test_info.csv"))
    if not info:  # <speaker>-<chapter>-<utterance>_<speaker>-...
        return {row["ID"]: " ".join(part.split("-")[0] for part in row["ID"].split("_")) for row in mixtures}
    return {
        row["mixture_ID"]: " ".join(value for name, value in row.items() if name.startswith("speaker_"))
        for row in _read_csv(info[0], ("mixture_ID",))
    }


def _processor():
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit():
    """The commit that runs, or "unknown"."""
    try:
        git = ["git", "-C", str(RECIPE)]
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changes = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True).strip()
        return f"{commit}+changes" if changes else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def check_settings(arguments):
    """The settings that all runs of an output folder share; a folder of other ones is refused."""
    path = arguments.output / "settings.json"
    settings = {"epochs": arguments.epochs, "shrink": arguments.shrink, "set": dict(arguments.set)}
    settings["data_folder"] = arguments.data_folder and arguments.data_folder.name
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier != settings:
            raise ValueError(f"{path} says {earlier}, but got {settings}; give these settings, or another --output.")
    return settings


def _setting(text):
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"NAME=VALUE expected, but got {text!r}")
    if name in OWN_OPTIONS:
        raise argparse.ArgumentTypeError(f"{name} is what the runs differ in, or the ablation's own")
    return name, value


def parse_arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--speech", type=Path, default=os.environ.get("DSD_REALSPEECH"), help="folder of recorded speech"
    )
    parser.add_argument(
        "--data_folder", type=Path, help="a Libri2Mix folder, instead of mixing (regimes of other data drop out)"
    )
    parser.add_argument("--output", type=Path, default=Path("results/ablation"), help="(%(default)s)")
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), metavar="REGIME", help="these alone")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="these arms of the regimes alone")
    parser.add_argument("--seeds", type=int, default=3, help="of the main arms (%(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="of the main arms (%(default)s)")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one per GPU, or per core")
    parser.add_argument("--threads", type=int, default=1, help="of each run, on the CPU (%(default)s)")
    parser.add_argument("--shrink", type=int, default=1, help="divide the sizes of the sets, to rehearse (%(default)s)")
    parser.add_argument(
        "--set",
        type=_setting,
        nargs="+",
        default=[],
        action="extend",
        metavar="NAME=VALUE",
        help="options of the YAML, for every run",
    )
    parser.add_argument("--dev_only", action="store_true", help="leave the test set closed")
    parser.add_argument("--report_only", action="store_true", help="draw tables and figures from the csv files")
    arguments = parser.parse_args(argv)
    for name in ("seeds", "epochs", "jobs", "threads", "shrink"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, but got {value}")
    for name, known in (("regimes", REGIMES), ("arms", ARMS)):
        for value in getattr(arguments, name) or ():
            if value not in known:
                parser.error(f"--{name} can only be some of {', '.join(known)}, but got {value}")
    arguments.gpu = torch.cuda.is_available()
    arguments.jobs = arguments.jobs or (torch.cuda.device_count() if arguments.gpu else os.cpu_count())
    arguments.speech = arguments.speech and Path(arguments.speech)
    if arguments.data_folder:
        arguments.regimes = [name for name in arguments.regimes if REGIMES[name].data == Data()]
    return arguments


def main(argv=None):
    """The command; returns the exit status."""
    arguments = parse_arguments(argv)
    for stop in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, lambda *_: sys.exit("error: terminated; the same command goes on"))
    try:
        return ablation(arguments)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def ablation(arguments):
    """Train, test, report."""
    if arguments.report_only:
        write_report(arguments.output)
        return 0
    runs = [run for run in plan(arguments.regimes, arguments.seeds) if not arguments.arms or run.arm in arguments.arms]
    if not runs:
        arms = "" if arguments.arms is None else f", arms {' '.join(arguments.arms)}"
        raise ValueError(f"The plan has no run of the regimes {' '.join(arguments.regimes) or 'given'}{arms}.")
    if arguments.data_folder and not arguments.data_folder.is_dir():
        raise ValueError(f"--data_folder {arguments.data_folder} is no folder.")
    for run in runs:
        overrides(run, arguments.epochs)
    settings = check_settings(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(arguments.output)  # until the end
    records = Records(arguments.output)
    is_open = not arguments.dev_only
    untrained = [run for run in runs if not records.is_trained(run, arguments.epochs)]
    untested = [run for run in runs if is_open and REGIMES[run.regime].is_tested and not records.is_tested(run)]
    data = {REGIMES[run.regime].data: None for run in (*untrained, *untested)}
    if not (arguments.speech or arguments.data_folder) and any(each.source == "recordings" for each in data):
        raise ValueError("--speech FOLDER (or DSD_REALSPEECH) is needed; without recordings: --regimes synthetic")
    data = {each: make_data(each, arguments).resolve() for each in data}
    with write_whole(arguments.output / "settings.json") as stream:
        stream.write(json.dumps(settings) + "\n")
    failed = run_all(untrained, data, arguments, records, test_at_end=False)
    if not failed:
        failed = run_all(untested, data, arguments, records, test_at_end=True)
    if records.tables["results"]:
        write_report(arguments.output)
    if not failed and is_open and any(data.values()):
        write_examples(arguments.output)
    del lock
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
