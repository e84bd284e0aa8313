"""What a run of separation writes down beside :mod:`shared_modules.tracking`: audible examples, and the exclusions."""

import csv

import torch
from speechbrain.utils.distributed import if_main_process

from dsd_modules.sample_dropout import ACTIONS
from shared_modules import tracking
from shared_modules.checkpoints import AppendedFiles
from shared_modules.distributed import all_gather


class TensorboardLogger(tracking.TensorboardLogger):
    """With examples of separation to hear and to see."""

    def log_example(self, name, example, figure, epoch):
        """Write the audio of a mixture, its references and estimates, and their figure."""
        if self.writer is None:
            return
        signals = {"mixture": example["mixture"]}
        for spk, (ref, est) in enumerate(zip(example["references"], example["estimates"], strict=True), 1):
            signals[f"reference_{spk}"], signals[f"estimate_{spk}"] = ref, est
        for signal_name, signal in signals.items():
            loudest = max(float(abs(signal).max()), 1e-8)
            audio = torch.as_tensor(signal)[None] / loudest * 0.9
            self.writer.add_audio(f"{name}/{signal_name}", audio, epoch, sample_rate=example["sample_rate"])
        self.writer.add_figure(f"{name}/spectrograms", figure, epoch)
        self.writer.flush()


class ExclusionAudit(AppendedFiles):
    """The audit: one row of ``exclusions.csv`` for every sample that was dropped or reordered.

    It is a recoverable: a resume cuts the file back to the checkpoint.

    Arguments
    ---------
    path : str
        The csv.
    """

    columns = ("epoch", "id", "action", "stored_assignment", "assignment", "stored_metric", "metric")

    def __init__(self, path):
        super().__init__([path])
        self._rows = []

    def add(self, epoch, ids, decision, perm, metric):
        """Note the excluded samples of a batch; :meth:`synchronize` writes them.

        Arguments
        ---------
        epoch : int
            Current epoch.
        ids : list of str
            Of the batch's samples.
        decision : Decision
            The rule's decision.
        perm, metric : torch.Tensor
            PIT's assignment ``[B, N]`` and metric ``[B]``, dB.
        """
        for b in decision.is_excluded.nonzero().flatten().tolist():
            self._rows.append(
                (
                    epoch,
                    ids[b],
                    ACTIONS[int(decision.action[b])],
                    " ".join(map(str, decision.stored.best_perm[b].tolist())),
                    " ".join(map(str, perm[b].tolist())),
                    f"{float(decision.stored.best_metric[b]):.4f}",
                    f"{float(metric[b]):.4f}",
                )
            )

    def synchronize(self):
        """Append all ranks' rows to the file. All ranks must call it."""
        ranks = all_gather(self._rows)
        self._rows = []
        if not if_main_process():
            return
        is_new = not self.paths[0].exists()
        with open(self.paths[0], "a", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            if is_new:
                writer.writerow(self.columns)
            writer.writerows(row for rows in ranks for row in rows)
