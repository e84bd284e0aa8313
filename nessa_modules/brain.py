"""The Brain of an embedding recipe: batches, stages and records. The recipe adds forward and objective."""

import math
import time

import speechbrain as sb
import torch
import torch.nn.functional as F

from nessa_modules.sampling import SpeakerBatchSampler
from nessa_modules.trials import eer
from shared_modules.brain import RecordedBrain
from shared_modules.errors import DataError, RunError


class EmbeddingBrain(RecordedBrain):
    """Everything of embedding training that is not forward and objective.

    ``compute_forward(batch, stage)`` is left to the recipe, which returns embeddings ``[B, D]``, and so is
    ``compute_objectives(embeddings, batch, stage)``, which returns the loss and calls :meth:`track`. Batches are dicts
    of ``id`` (list of str), ``sig`` ``[B, T]`` and ``speaker_index`` ``[B]``; in training B = P x M, the M utterances
    of a speaker side by side.

    The hparams hold ``modules``, ``lr_scheduler``, ``epoch_counter``, ``epoch_tracker``, ``history``, the loggers, and
    the options of the YAML. A resume goes on after the last whole epoch.
    """

    def make_dataloader(self, dataset, stage, ckpt_prefix="dataloader-", **loader_kwargs):
        """Training: batches of P speakers, ``steps_per_epoch`` of them. Validation: all utterances, in order."""
        del ckpt_prefix  # epochs are resumed at their beginning, and then follow from (seed, epoch)
        if stage == sb.Stage.TRAIN:
            hparams = self.hparams
            self.train_sampler = loader_kwargs["batch_sampler"] = SpeakerBatchSampler(
                dataset.speaker_indices,
                hparams.speakers_per_batch,
                hparams.utterances_per_speaker,
                hparams.seed,
                hparams.steps_per_epoch,
            )
        # A generator of its own: the loader's draws would move the global one, which a resume restores.
        return super().make_dataloader(dataset, stage, None, generator=torch.Generator(), **loader_kwargs)

    def _train_loader_specifics(self, dataset, loader_kwargs):
        return loader_kwargs  # the batch sampler is all there is

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        return False  # checkpoints are of whole epochs

    def signals(self, batch):
        """A batch's signals on the device.

        Arguments
        ---------
        batch : dict
            With ``sig`` and ``id``.

        Returns
        -------
        torch.Tensor
            ``[B, T]``, float32.

        Raises
        ------
        DataError
            If one is silent or not finite: it is named.
        """
        wavs = batch["sig"]
        peaks = wavs.abs().amax(-1)  # (B,); NaN where a sample is
        for is_wrong, fault in ((~peaks.isfinite(), "holds samples that are not finite"), (peaks == 0, "is silent")):
            if is_wrong.any():
                name = batch["id"][int(is_wrong.nonzero()[0])]
                seconds = wavs.shape[-1] / self.hparams.sample_rate
                raise DataError(f"Utterance {name} {fault}, in {seconds:g} s of it at least; leave it out of the data.")
        return wavs.to(self.device)

    def track(self, stage, result):
        """Add a training batch's numbers to the running means.

        Arguments
        ---------
        stage : sb.Stage
            TRAIN.
        result : LossResult
            Of the batch.
        """
        tracker, name = self.hparams.epoch_tracker, stage.name.lower()
        tracker.add(f"{name}/loss", result.loss.detach().cpu()[None])
        tracker.add(f"{name}/accuracy", result.accuracy.cpu())

    def on_fit_batch_start(self, batch, should_step):
        """Set the learning rate of the coming step."""
        if should_step:
            epochs = self.hparams.epoch_counter.current - 1 + (self.step - 1) / self.hparams.steps_per_epoch
            self.hparams.lr_scheduler.on_step(self.optimizer, epochs / self.hparams.epoch_counter.limit)

    def on_stage_start(self, stage, epoch=None):
        """Open the epoch's records."""
        if stage == sb.Stage.TRAIN:
            self.stage_start = time.time()
            self.hparams.epoch_tracker.start_epoch(epoch)
        else:
            self.embeddings, self.speakers = [], []

    def evaluate_batch(self, batch, stage):
        """Collect the embeddings of validation utterances; there is no loss of theirs, which would need P x M."""
        with self.evaluation_ctx:
            embeddings = self.compute_forward(batch, stage)  # (B, D)
        self.embeddings.append(F.normalize(embeddings.float().cpu(), dim=-1))
        self.speakers.append(batch["speaker_index"])
        return torch.tensor(0.0)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Validation: write the epoch's records, save."""
        if stage == sb.Stage.TRAIN:
            self.train_seconds = time.time() - self.stage_start
            return
        hparams = self.hparams
        means = hparams.epoch_tracker.means()
        train = {name.removeprefix("train/"): value for name, value in means.items()}
        valid = {"eer": self._eer(epoch)}
        meta = {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]}
        hparams.lr_scheduler.on_epoch(self.optimizer, epoch, valid["eer"])
        hparams.train_logger.log_stats(meta, train, valid)
        self.tensorboard.log_stats(meta, train, valid)
        row = {**meta, "seconds": self.train_seconds}
        row.update({f"train_{name}": value for name, value in train.items()})
        hparams.history.append({**row, "valid_eer": valid["eer"]})
        self.checkpointer.save_and_keep_only(
            meta={"eer": valid["eer"], "epoch": epoch}, num_to_keep=hparams.num_to_keep, min_keys=["eer"]
        )

    def _eer(self, epoch):
        """Of all pairs of validation utterances, by the cosine of their embeddings; a share."""
        embeddings, speakers = torch.cat(self.embeddings), torch.cat(self.speakers)  # (K, D), (K,)
        if not bool(embeddings.isfinite().all()) or not math.isfinite(self.hparams.epoch_tracker.means()["train/loss"]):
            raise RunError(
                f"After epoch {epoch} the embeddings are not finite: the training diverged. Lower --lr "
                f"(now {self.hparams.lr})."
            )
        first, second = torch.triu_indices(len(embeddings), len(embeddings), offset=1)  # (pairs,) each
        scores = (embeddings @ embeddings.T)[first, second]
        return eer(scores.numpy(), (speakers[first] == speakers[second]).numpy())
