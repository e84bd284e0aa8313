"""The model card of an exported folder: what it is, what it was trained on, and what its run measured."""

import csv
import json
import math
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from speechbrain.lobes.models.dual_path import SBRNNBlock

from dsd_modules.evaluation import read_results
from dsd_modules.model_folder import CARD_FILE, read_model
from dsd_modules.options import EXPECTED, read_options
from dsd_modules.report import epoch_series, read_history
from dsd_modules.tasnet import ConvTasNetMaskNet
from shared_modules.files import write_whole
from shared_modules.options import is_hub_name

UNKNOWN_LICENCE = "unknown"  # the hub's word where none was chosen
ONNX_HEADING = "## ONNX: without PyTorch and without this project"
# Up to the end of its program: what stands below it, or where no program is left, is the user's own.
_ONNX_SECTION = re.compile(
    rf"^{re.escape(ONNX_HEADING)}((?:(?!\n#).)*?\n```python(?:(?!\n#).)*?\n```)?\n", re.DOTALL | re.MULTILINE
)
_PAPERS = {
    "SepFormer": "https://arxiv.org/abs/2010.13154",
    "DPRNN": "https://arxiv.org/abs/1910.06379",
    "Conv-TasNet": "https://arxiv.org/abs/1809.07454",
}
_METHOD = "https://arxiv.org/abs/2311.12199"
_KEY_OPTIONS = (
    "dsd_mode",
    "layerwise",
    "number_of_epochs",
    "batch_size",
    "segment_seconds",
    "lr",
    "lr_schedule",
    "precision",
    "seed",
)
_SPEAKERS = {1: "one speaker, from noise", 2: "two speakers", 3: "three speakers"}
_TASKS = {"mix_clean": "clean mixtures", "mix_both": "mixtures with noise", "mix_single": "one speaker with noise"}


def write_card(folder, run_folder=None, table=None, test_block=None, licence=UNKNOWN_LICENCE):
    """Write ``README.md`` into an exported folder, in the form of the Hugging Face hub.

    Every number is read from the files of the run; where there are none, the card says so. It names no folder.

    Arguments
    ---------
    folder : str or Path
        The exported folder.
    run_folder : str or Path, optional
        The run that it comes from: its ``hyperparams.yaml``, ``history.csv``, manifests and test scores.
    table : str or Path, optional
        The test scores, see :func:`dsd_modules.results.results_table`; None: the run's ``test_results.csv``, if any.
    test_block : int, optional
        The block that they are of; None: the last one.
    licence : str
        Of the weights, an identifier as of the hub. It is for who trained them to choose.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If the model cannot be read, the table is missing, a file of the run is broken, or the licence is no
        identifier.
    """
    check_licence(licence)
    model = _describe_model(folder)
    run = _read_run(run_folder, table)
    options = run.get("options")
    data_name, data_text = _describe_data(options)
    sizes = f" Mixtures: {', '.join(run['sizes'])}." if run.get("sizes") else ""
    sections = [
        f"---\n{_header(model, run, data_name, licence)}\n---\n",
        f"# {model['title']}\n\n{_about(model, options)}\n",
        f"## Data\n\n{data_text}{sizes}\n",
        f"## Training\n\n{_training(run)}\n",
        f"## Results\n\n{_results(run, test_block)}\n",
        f"## How to load\n\n{_how_to_load(model)}\n",
        f"## Limits\n\n{_limits(model, options)}\n",
        f"## Licence\n\n{_licence(options)}\n",
        f"## Sources\n\n{_sources(model, options)}\n",
    ]
    path = Path(folder) / CARD_FILE
    with write_whole(path) as stream:
        stream.write("\n".join(sections))
    return path


def amend_card(folder, licence=None, source=None, onnx_files=None):
    """Change what an existing card tells of the licence, the model's name or the ONNX files; the rest stays.

    Arguments
    ---------
    folder : str or Path
        The exported folder.
    licence : str, optional
        As of :func:`write_card`.
    source : str, optional
        What the card's examples load: the model's name on the hub.
    onnx_files : list of OnnxFile, optional
        From :func:`dsd_modules.onnx_export.export_onnx`.

    Raises
    ------
    ValueError
        If the folder has no card, or the licence is no identifier.
    """
    path = Path(folder) / CARD_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path} cannot be read.") from None
    if licence is not None:
        check_licence(licence)
        text = re.sub(r"^license: .*$", f"license: {licence}", text, count=1, flags=re.MULTILINE)
    if source is not None:
        text = re.sub(r'^source = ".*"', f'source = "{source}"', text, flags=re.MULTILINE)
    if onnx_files is not None:
        section = f"{ONNX_HEADING}\n\n{_onnx(onnx_files)}\n"
        text = text.rstrip("\n") + "\n"
        text, num_replaced = _ONNX_SECTION.subn(lambda _: section, text, count=1)
        if num_replaced == 0:
            text += f"\n{section}"
    with write_whole(path) as stream:
        stream.write(text)


def check_licence(licence):
    """Refuse what is no licence identifier of the hub, such as ``apache-2.0``, ``cc-by-4.0`` or ``other``.

    Example
    -------
    >>> check_licence("do what you like")
    Traceback (most recent call last):
    ValueError: A licence can only be an identifier such as apache-2.0, cc-by-4.0 or other, but got 'do what you like'.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        expected = "an identifier such as apache-2.0, cc-by-4.0 or other"
        raise ValueError(f"A licence can only be {expected}, but got {licence!r}.")


def main_scores(row):
    """The scores that papers report, as far as they are in the row, by their names.

    Example
    -------
    >>> main_scores({"si_sdr": 9.0, "si_sdri": 8.5, "stoi": 0.9})
    {'SI-SDRi': 8.5, 'STOI': 0.9}
    """
    names = {"si_sdri": "SI-SDRi", "sdri": "SDRi", "pesq": "PESQ", "stoi": "STOI"}
    return {name: row[column] for column, name in names.items() if column in row}


def _describe_model(folder):
    modules, sample_rate = read_model(folder)
    masknet = modules["masknet"]
    if isinstance(masknet, ConvTasNetMaskNet):
        architecture = "Conv-TasNet"
    else:
        architecture = "DPRNN" if isinstance(masknet.dual_mdl[0].intra_mdl, SBRNNBlock) else "SepFormer"
    speakers = _SPEAKERS.get(masknet.num_spks, f"{masknet.num_spks} speakers")
    return {
        "architecture": architecture,
        "title": f"{architecture} for {speakers} at {sample_rate / 1000:g} kHz",
        "speakers": speakers,
        "sample_rate": sample_rate,
        "num_spks": masknet.num_spks,
        "num_blocks": masknet.num_layers,
        "num_weights": sum(weights.numel() for module in modules.values() for weights in module.parameters()),
        "is_stock": "!new:dsd_modules" not in (Path(folder) / "hyperparams.yaml").read_text(encoding="utf-8"),
    }


def _read_run(run_folder, table):
    """What the files of a run tell; what is missing is left out."""
    run = {}
    if run_folder is not None:
        run_folder = Path(run_folder)
        hparams_file = run_folder / "hyperparams.yaml"
        if hparams_file.exists():
            _, run["options"] = read_options(hparams_file)
            run["changed"] = _changed_options(hparams_file, run["options"])
        if (run_folder / "history.csv").exists():
            run["history"] = read_history(run_folder / "history.csv")
        sets = {"train": "training", "valid": "validation", "test": "test"}
        run["sizes"] = [
            f"{word} {size}"
            for name, word in sets.items()
            if (size := _manifest_size(run_folder / "manifests" / f"{name}.csv"))
        ]
        if table is None and (run_folder / "test_results.csv").exists():
            table = run_folder / "test_results.csv"
    if table is not None:
        rows, run["scores"] = read_results(table)
        run["num_mixtures"] = len(rows)
        groups = Path(table).with_name(Path(table).name.replace("results", "groups"))
        if groups != Path(table) and groups.exists():
            with open(groups, newline="", encoding="utf-8") as stream:
                run["groups"] = list(csv.DictReader(stream))
    return run


def _is_public(name):
    """Whether an option's value may stand in a card: it is known, and it is no path."""
    return name in EXPECTED and "path" not in EXPECTED[name][1]


def _changed_options(hparams_file, options):
    """The options that differ from the YAML that the run was started with, as far as it is still there."""
    with open(hparams_file, encoding="utf-8") as stream:
        head = [stream.readline() for _ in range(2)]  # "# Generated ... from:", "# <path>"
    try:
        _, defaults = read_options(head[1].removeprefix("#").strip())
    except ValueError:
        return []
    return [name for name, value in options.items() if _is_public(name) and defaults.get(name) != value]


def _manifest_size(path):
    """The number of mixtures and their duration, as text, or None."""
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            seconds = [float(row["duration"]) for row in csv.DictReader(stream)]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    hours = sum(seconds) / 3600
    return f"{len(seconds):,} ({f'{hours:.1f} h' if hours >= 1 else f'{60 * hours:.0f} min'})"


def _data_kind(options):
    if options is None:
        return None
    if options.get("train_manifest"):
        return "own"
    if options.get("librispeech_folder"):
        return "librimix"
    return "layout" if options.get("data_folder") else "synthetic"


def _describe_data(options):
    """The name of the data for the header, and a text."""
    if options is None:
        return "unknown data", "The run that this model comes from was not at hand when this card was written."
    get, corpus = options.get, f"Libri{max(2, options.get('num_spks', 2))}Mix"
    sets = " and ".join(get("train_sets") or [])
    end = {"min": ", each cut to its shortest source", "max": ", each as long as its longest source"}
    task = _TASKS.get(get("task"), get("task"))
    form = f"{task}, `{get('mode')}` mode{end.get(get('mode'), '')}, {get('sample_rate', 8000) / 1000:g} kHz"
    kind = _data_kind(options)
    if kind == "synthetic":
        name = "synthetic voices (espeak-ng)"
        text = f"Synthetic voices, made with espeak-ng and mixed as LibriMix is, no recordings of people: {form}."
    elif kind == "librimix":
        name = f"{corpus} {get('task')}"
        noise = " and WHAM!'s noise" if get("task") != "mix_clean" else ""
        text = f"{corpus} (`{sets}`), mixed at load time from LibriSpeech{noise} by LibriMix's metadata: {form}."
    elif kind == "layout":
        name = f"a data folder in {corpus}'s layout, {get('task')}"
        text = (
            f"A data folder in the layout of {corpus} (`{sets}`): {form}. Whether it is {corpus} itself is not checked."
        )
    else:
        name = f"mixtures of the trainer's own, {get('task')}"
        text = f"Mixtures of the trainer's own (manifests): {form}."
    if get("dynamic_mixing"):
        text += " In training, the sources were mixed anew in each epoch."
    return name, text


def _about(model, options):
    millions = model["num_weights"] / 1e6
    millions = f"{millions:.2g}" if millions < 10 else f"{millions:.0f}"
    if model["num_spks"] == 1:
        text = "Takes the noise out of a recording of one speaker"
    else:
        text = f"Separates a recording of {model['speakers']} who talk at the same time into one recording of each"
    text += (
        f". It is a [{model['architecture']}]({_PAPERS[model['architecture']]}) of "
        f"{_count(model['num_blocks'], 'block')} and {millions} million weights, at {model['sample_rate']} Hz."
    )
    if options is None:
        return text
    parts = []
    if options.get("dsd_mode") in ("drop", "reorder"):
        parts.append(f"dynamic sample dropout (`dsd_mode: {options['dsd_mode']}`)")
    if options.get("layerwise"):
        parts.append("layer-wise optimization: each of its blocks separates")
    method = f"[{' and '.join(parts)}]({_METHOD})" if parts else "permutation-invariant training"
    return f"{text} It was trained with {method}, by a SpeechBrain recipe (dsd-separation)."


def _count(number, what):
    return f"{number} {what}{'s' * (number != 1)}"


def _training(run):
    options = run.get("options")
    if options is None:
        return "The set-up is not known."
    lines, history = [], run.get("history", [])
    if history:
        lines.append(f"It was trained for {_count(history[-1]['epoch'], 'epoch')}.")
    epochs, scores = epoch_series(history, "valid_si_sdri")
    if epochs:
        best = max(range(len(scores)), key=scores.__getitem__)
        lines.append(
            f"The weights are those with the best SI-SDRi on the validation set: {scores[best]:.2f} dB, "
            f"epoch {epochs[best]}."
        )
    if options.get("ema_decay"):
        lines.append(f"They are a moving average (`ema_decay: {options['ema_decay']}`).")
    if options.get("pretrained_folder"):
        start = options["pretrained_folder"]
        lines.append(f"Training started from the weights of {f'`{start}`' if is_hub_name(start) else 'another model'}.")
    names = [name for name in _KEY_OPTIONS if name in options]
    names += [name for name in run.get("changed", []) if name not in names]
    table = ["", "", "| option | value |", "|---|---|"] + [f"| `{name}` | {_value(options[name])} |" for name in names]
    others = [name for name in options if _is_public(name) and name not in names]
    rest = ", ".join(f"`{name}: {_value(options[name])}`" for name in others)
    details = f"\n\n<details><summary>All other options</summary>\n\n{rest}\n\n</details>" if rest else ""
    return " ".join(lines) + "\n".join(table) + details


def _value(value):
    """As a YAML of the recipe has it."""
    return str(value) if isinstance(value, str | bool) else json.dumps(value)


def _results(run, test_block):
    if "scores" not in run:
        return "No test scores were at hand, so nothing is known of how well it separates."
    scores = run["scores"]
    names = list(main_scores(scores))
    name = "test set" if test_block is None else f"test set, block {test_block}"
    table = [
        f"| | mixtures | {' | '.join(map(_with_unit, names))} |",
        f"|---|---{'|---' * len(names)}|",
        _score_row(name, run["num_mixtures"], scores, names),
    ]
    groups = run.get("groups", [])
    if len(groups) > 1:  # one alone is the whole test set
        for group in groups:
            means = {name: float(value or "nan") for name, value in group.items() if name not in ("kind", "group")}
            table.append(_score_row(f"{group['kind']} {group['group']}", group["num_mixtures"], means, names))
    source = "of the data above" if "options" in run else "of data that are not known"
    text = f"Means over the test mixtures {source}. Higher is better"
    if any("SDR" in name for name in names):
        text += "; SI-SDRi and SDRi tell by how much the voices are better than the mixture itself"
    text += ".\n\n" + "\n".join(table)
    of_blocks = {name.removeprefix("si_sdri_block"): value for name, value in scores.items() if "si_sdri_block" in name}
    if of_blocks:
        rows = "\n".join(f"| {block} | {value:.2f} |" for block, value in of_blocks.items())
        text += f"\n\nBy the number of blocks that are run:\n\n| blocks | SI-SDRi, dB |\n|---|---|\n{rows}"
    return text


def _with_unit(name):
    return f"{name}, dB" if "SDR" in name else name


def _score_row(name, num_mixtures, scores, columns):
    values = main_scores(scores)
    cells = ("-" if math.isnan(values.get(column, math.nan)) else f"{values[column]:.2f}" for column in columns)
    return f"| {name} | {num_mixtures} | {' | '.join(cells)} |"


def _how_to_load(model):
    text = (
        "With dsd-separation:\n\n"
        "```python\n"
        "from dsd_modules.inference import SepformerDSDSeparation\n\n"
        'source = "path/to/this/folder"\n'
        "separator = SepformerDSDSeparation.from_hparams(source)\n"
        'voices = separator.separate_file("meeting.wav")  # [samples, speakers]\n'
        'separator.separate_to_files("meeting.wav", "out")  # writes out/meeting_spk<i>.wav\n'
        "```\n\n"
    )
    if not model["is_stock"]:
        return text + "SpeechBrain alone has no class for this model and cannot load it."
    return text + (
        "With SpeechBrain alone:\n\n"
        "```python\n"
        "from speechbrain.inference.separation import SepformerSeparation\n\n"
        'source = "path/to/this/folder"\n'
        'separator = SepformerSeparation.from_hparams(source, savedir="pretrained")\n'
        'voices = separator.separate_file("meeting.wav")  # [1, samples, speakers]\n'
        "```"
    )


def _limits(model, options):
    speakers = "one speaker" if model["num_spks"] == 1 else f"{model['num_spks']} speakers"
    lines = [
        f"- It expects {speakers}; what it gives for more or fewer is not known.",
        "- Which voice comes first is arbitrary.",
        "- It has heard the data above alone: nothing is known of other languages, rooms, microphones or noises.",
    ]
    if options is None:
        lines[-1] = "- What languages, rooms, microphones and noises it can be used with is not known."
    if _data_kind(options) == "synthetic":
        lines[-1] = "- It has heard synthetic voices alone: it is for trying and testing, not for recordings of people."
    return "\n".join(lines)


def _licence(options):
    text = (
        "Of these weights: see `license` at the top of this card. It is for who trained them to choose; `unknown` "
        "means that no licence was chosen, so that none is given. The code, dsd-separation and SpeechBrain, is "
        "Apache-2.0."
    )
    kind = _data_kind(options)
    if kind == "synthetic":
        data = "espeak-ng, which spoke the training data, is a program under the GPL-3; it is no part of this model."
    else:
        data = "The data have licences of their own, which the trainer and the user have to look at"
        if kind in ("librimix", "layout"):
            data += ": LibriSpeech, which LibriMix is made of, is under CC BY 4.0"
            if options.get("task") != "mix_clean":
                data += ", and WHAM!'s noise under CC BY-NC 4.0, for non-commercial use"
        data += "."
    return f"{text}\n\n{data}"


def _sources(model, options):
    lines = [
        f"- {model['architecture']}: {_PAPERS[model['architecture']]}",
        f"- Dynamic sample dropout and layer-wise optimization: C. Gao, Y. Gu, I. Marsic, Interspeech 2023, {_METHOD}. "
        "This model is of an independent implementation; no number of this card is the paper's.",
        "- SpeechBrain: https://arxiv.org/abs/2106.04624",
    ]
    if _data_kind(options) not in ("own", None):
        lines.append("- LibriMix: https://arxiv.org/abs/2005.11262")
    return "\n".join(lines)


def _header(model, run, data_name, licence):
    scores = main_scores(run.get("scores", {}))
    results = [
        EvalResult(
            task_type="audio-to-audio",
            task_name="speech separation",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", data_name.lower()).strip("-"),
            dataset_name=f"{data_name}, {run['num_mixtures']} test mixtures",
            metric_type=name.lower(),
            metric_name=_with_unit(name),
            metric_value=round(value, 2),
        )
        for name, value in scores.items()
        if math.isfinite(value)
    ]
    start = (run.get("options") or {}).get("pretrained_folder")
    return ModelCardData(
        license=licence,
        library_name="speechbrain",
        pipeline_tag="audio-to-audio",
        tags=["speech-separation", "audio-source-separation", model["architecture"].lower()],
        base_model=start.split("@")[0] if is_hub_name(start) else None,
        metrics=[name.lower() for name in scores] or None,
        model_name=model["title"] if results else None,
        eval_results=results or None,
    ).to_yaml()


def _onnx(files):
    """The text of the section on ONNX, which ends with its program: :func:`amend_card` knows it by that."""
    rows = [
        f"| `{file.path.name}` | {file.num_blocks} | {file.longest_checked_length:,} | {file.largest_difference:.0e} |"
        for file in files
    ]
    last = files[-1]
    return f"""\
Each file holds its weights and takes `mixture [batch, samples]` (float32, {last.sample_rate} Hz, at least \
{last.shortest_length} samples) to `estimates [batch, samples, speakers]`. They were compared with PyTorch up to the \
length below. Longer mixtures take memory with up to the square of their length: cut them into windows that overlap.

| file | blocks | longest compared, samples | largest difference, relative to the peak |
|---|---|---|---|
{chr(10).join(rows)}

With numpy and onnxruntime (`pip install numpy onnxruntime`) alone, for a 16-bit mono wav:

```python
import wave

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{last.path.name}")
sample_rate = int(session.get_modelmeta().custom_metadata_map["sample_rate"])
with wave.open("meeting.wav") as file:
    assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, sample_rate)
    mixture = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768  # [samples]

level = np.sqrt(np.mean(mixture**2)) + 1e-9
voices = session.run(None, {{"mixture": 0.05 / level * mixture[None]}})[0][0]  # [samples, speakers]
voices = voices * np.linalg.lstsq(voices, mixture, rcond=None)[0]  # levels at which they add up to the mixture
for number, voice in enumerate(voices.T, 1):
    with wave.open(f"voice{{number}}.wav", "wb") as file:
        file.setparams((1, 2, sample_rate, 0, "NONE", ""))
        file.writeframes((32767 * voice.clip(-1, 1)).astype("<i2").tobytes())
```"""
