"""What a finished run leaves: scores by groups, separated examples, the report, and where everything is."""

import math
import sys
from pathlib import Path

import numpy as np
import soundfile

from dsd_modules.evaluation import read_results
from dsd_modules.groups import gender_pairs, write_groups
from dsd_modules.inference import SepformerDSDSeparation
from dsd_modules.losses import PITLoss
from dsd_modules.model_card import main_scores
from dsd_modules.permutation import reorder_estimates
from dsd_modules.report import draw_report, read_history
from dsd_modules.voice_files import VoiceFiles


def separate_example(exported, item, folder):
    """Separate one test mixture with the exported model, and keep its audio.

    Arguments
    ---------
    exported : str
        The exported folder.
    item : dict
        Of a :class:`dsd_modules.dataset.MixtureDataset`.
    folder : str
        Where the wavs go: the mixture, the references, and the estimates in the order of the references.

    Returns
    -------
    dict
        ``id``, ``sample_rate``, ``mixture [T]``, ``references [N, T]``, ``estimates [N, T]``.
    """
    separator = SepformerDSDSeparation.from_hparams(source=exported)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mixture_path = folder / f"{item['id']}_mixture.wav"
    soundfile.write(mixture_path, item["mix_sig"].numpy(), separator.sample_rate, subtype="PCM_16")
    estimates = separator.separate_file(mixture_path).T.unsqueeze(0)  # (1, N, T)
    references = item["sources"].T.unsqueeze(0)  # (1, N, T)
    estimates = reorder_estimates(estimates, PITLoss()(estimates, references).perm)
    with VoiceFiles(folder, item["id"], separator.num_spks, separator.sample_rate) as files:
        files.write(estimates[0].T)
    for spk, reference in enumerate(references[0], 1):
        path = folder / f"{item['id']}_reference{spk}.wav"
        soundfile.write(path, reference.numpy(), separator.sample_rate, subtype="PCM_16")
    return {
        "id": item["id"],
        "sample_rate": separator.sample_rate,
        "mixture": item["mix_sig"].numpy(),
        "references": references[0].numpy(),
        "estimates": estimates[0].numpy(),
    }


def results_table(output_folder, test_block=None):
    """Where the test scores are kept.

    Arguments
    ---------
    output_folder : str or Path
        The run's folder.
    test_block : int, optional
        The block (from 1) whose estimates were scored in the final one's place; None: the final one.

    Returns
    -------
    Path
        ``test_results.csv``, which is what reports and comparisons read, or ``test_results_block<b>.csv``.

    Example
    -------
    >>> results_table("run", test_block=2).name
    'test_results_block2.csv'
    """
    suffix = "" if test_block is None else f"_block{test_block}"
    return Path(output_folder) / f"test_results{suffix}.csv"


def format_groups(groups):
    """The scores of each group as a table for the terminal.

    Arguments
    ---------
    groups : list of dict
        From :func:`dsd_modules.groups.write_groups`.

    Returns
    -------
    str

    Example
    -------
    >>> print(format_groups([{"kind": "gender", "group": "FM", "num_mixtures": 2, "si_sdri": 9.5, "stoi": 0.9}]))
      group             mixtures   SI-SDRi      STOI
      gender FM                2      9.50      0.90
    """
    lines = [f"  {'group':16}{'mixtures':>10}" + "".join(f"{name:>10}" for name in main_scores(groups[0]))]
    for group in groups:
        values = ("-" if math.isnan(value) else f"{value:.2f}" for value in main_scores(group).values())
        name = f"{group['kind']} {group['group']}"
        lines.append(f"  {name:16}{group['num_mixtures']:10}" + "".join(f"{value:>10}" for value in values))
    return "\n".join(lines)


def finish_run(output_folder, exported, test_set, test_block=None, folders=()):
    """Write the scores of groups, separate a test mixture of median quality, draw the report, print what came out.

    The report and the separated mixture are of the whole model: with ``test_block`` they stay as they are.

    Arguments
    ---------
    output_folder : str
        The run's folder, with ``history.csv`` and the :func:`results_table`.
    exported : str
        The exported model.
    test_set : MixtureDataset
        The test set.
    test_block : int, optional
        See :func:`results_table`.
    folders : list of (str or None)
        Where metadata may tell the speakers' sexes, see :func:`dsd_modules.groups.gender_pairs`.
    """
    output_folder, exported = Path(output_folder).resolve(), Path(exported).resolve()
    table = results_table(output_folder, test_block)
    rows, mean = read_results(table)
    num_spks = sum(column.startswith("si_sdr_spk") for column in mean)
    groups_table = table.with_name(table.name.replace("results", "groups"))
    groups = write_groups(groups_table, rows, gender_pairs(rows, num_spks, folders))
    places = {"results table": table} | ({"table of groups": groups_table} if groups else {})
    if test_block is None:
        # Neither the best nor the worst: the example shall show what to expect.
        scored = sorted((row["si_sdri"], sample_id) for sample_id, row in rows.items() if np.isfinite(row["si_sdri"]))
        median_id = scored[len(scored) // 2][1] if scored else test_set.data_ids[0]
        example = separate_example(exported, test_set[test_set.data_ids.index(median_id)], output_folder / "examples")
        history = read_history(output_folder / "history.csv")
        draw_report(history, output_folder / "report.png", results=mean, example=example)
        places |= {
            "figure": output_folder / "report.png",
            "TensorBoard": f"{sys.executable} -m tensorboard.main --logdir {output_folder / 'tensorboard'}",
            "separated voices": output_folder / "examples",
            "exported model": exported,
        }
    of_blocks = {name.removeprefix("si_sdri_"): value for name, value in mean.items() if "_block" in name}
    blocks = ", ".join(f"{block} {value:.2f}" for block, value in of_blocks.items())
    scores = ", ".join(f"{name} {value:.2f}{' dB' * ('SDR' in name)}" for name, value in main_scores(mean).items())
    block = "" if test_block is None else f" of block {test_block}"
    print(f"\nTest{block}, {len(rows)} mixtures: {scores} ({blocks})")
    if len(groups) > 1:  # one alone is the whole test set
        print(format_groups(groups))
    print("\n".join(f"  {name:16}  {place}" for name, place in places.items()))
