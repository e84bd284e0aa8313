"""What a finished run leaves: separated examples, the report, and where everything is."""

import sys
from pathlib import Path

import numpy as np
import soundfile

from dsd_modules.evaluation import read_results
from dsd_modules.inference import SepformerDSDSeparation, save_estimates
from dsd_modules.losses import PITLoss
from dsd_modules.permutation import reorder_estimates
from dsd_modules.report import draw_report, read_history


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
    save_estimates(estimates[0].T, separator.sample_rate, folder, item["id"])
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


def finish_run(output_folder, exported, test_set):
    """Separate a test mixture of median quality, draw the report, and print where everything is.

    Arguments
    ---------
    output_folder : str
        The run's folder, with ``history.csv`` and ``test_results.csv``.
    exported : str
        The exported model.
    test_set : MixtureDataset
        The test set.
    """
    output_folder, exported = Path(output_folder).resolve(), Path(exported).resolve()
    rows, mean = read_results(output_folder / "test_results.csv")
    # Neither the best nor the worst: the example shall show what to expect.
    scored = sorted((row["si_sdri"], sample_id) for sample_id, row in rows.items() if np.isfinite(row["si_sdri"]))
    median_id = scored[len(scored) // 2][1] if scored else test_set.data_ids[0]
    example = separate_example(exported, test_set[test_set.data_ids.index(median_id)], output_folder / "examples")
    history = read_history(output_folder / "history.csv")
    draw_report(history, output_folder / "report.png", results=mean, example=example)
    of_blocks = {name.removeprefix("si_sdri_"): value for name, value in mean.items() if "_block" in name}
    blocks = ", ".join(f"{block} {value:.2f}" for block, value in of_blocks.items())
    print(
        f"\nTest, {len(rows)} mixtures: SI-SDRi {mean['si_sdri']:.2f} dB, SDRi {mean['sdri']:.2f} dB "
        f"({blocks})\n"
        f"  results table     {output_folder / 'test_results.csv'}\n"
        f"  figure            {output_folder / 'report.png'}\n"
        f"  TensorBoard       {sys.executable} -m tensorboard.main --logdir {output_folder / 'tensorboard'}\n"
        f"  separated voices  {output_folder / 'examples'}\n"
        f"  exported model    {exported}"
    )
