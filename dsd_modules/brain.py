"""The Brain of a separation recipe: forward, stages and records. The recipe adds ``compute_objectives``."""

import time

import speechbrain as sb
import torch
from speechbrain.utils.distributed import if_main_process
from tqdm import tqdm

from dsd_modules.dataset import EpochSampler
from dsd_modules.evaluation import score_batch, write_results
from dsd_modules.losses import is_silent, pairwise_neg_si_sdr
from dsd_modules.permutation import assignment_margin
from dsd_modules.report import draw_separation
from dsd_modules.separator import separate


class SeparationBrain(sb.Brain):
    """Everything of separation training that is not the objective.

    ``compute_objectives(predictions, batch, stage)`` is left to the recipe, which calls :meth:`visit_memory_bank`
    and :meth:`track`. Predictions are the estimates of blocks, ``[L, B, N, T]``, the final block last.

    The hparams hold ``modules`` (encoder, masknet, decoder), ``pit_loss``, ``memory_bank``, ``probe_bank``,
    ``lr_scheduler``, ``epoch_counter``, ``epoch_tracker``, ``history``, ``exclusion_audit``, the loggers, and the
    options of the YAML.
    """

    # Given by the recipe before fit: the probe set's DataLoader, or None.
    probe_loader = None
    # Given by the recipe before evaluate: where the scores of each mixture go.
    test_results_path = None

    def make_dataloader(self, dataset, stage, ckpt_prefix="dataloader-", **loader_kwargs):
        """Shuffle the training set from (seed, epoch); see :class:`dsd_modules.dataset.EpochSampler`."""
        if stage == sb.Stage.TRAIN:
            self.train_sampler = EpochSampler(len(dataset), self.hparams.seed)
            loader_kwargs["sampler"] = self.train_sampler
        loader = super().make_dataloader(dataset, stage, ckpt_prefix, **loader_kwargs)
        if stage == sb.Stage.TRAIN:
            steps_per_epoch = len(loader) // self.grad_accumulation_factor
            self.num_steps = max(1, steps_per_epoch * self.hparams.epoch_counter.limit)
        return loader

    def on_fit_start(self):
        """Recover the last checkpoint; drop the records of what comes after it."""
        if self.checkpointer is not None and self.checkpointer.find_checkpoint() is None:
            for recoverable in self.checkpointer.recoverables.values():
                if hasattr(recoverable, "rewind"):
                    recoverable.rewind()
        super().on_fit_start()
        self.tensorboard = self.hparams.tensorboard_logger(first_epoch=self.hparams.epoch_counter.current + 1)

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        # Gradients that wait for their optimizer step would be lost.
        if self.step % self.grad_accumulation_factor:
            return False
        return super()._should_save_intra_epoch_ckpt(last_ckpt_time, steps_since_ckpt)

    def compute_forward(self, batch, stage):
        """Estimates of the final block ``[1, B, N, T]``, or of all blocks where they are supervised or scored."""
        batch = batch.to(self.device)
        modules = self.modules  # not hparams: these are wrapped by DDP and compile
        wants_all = stage != sb.Stage.TRAIN or self.hparams.layerwise
        return separate(
            modules.encoder,
            modules.masknet,
            modules.decoder,
            batch.mix_sig.data,
            batch.num_samples,
            blocks="all" if wants_all else [-1],
        )  # (L, B, N, T)

    @staticmethod
    def references(batch):
        """The references ``[B, N, T]`` and the lengths ``[B]`` in samples, or None where nothing is padded."""
        sources = batch.sources.data.transpose(1, 2)  # (B, T, N) -> (B, N, T)
        lengths = batch.num_samples
        return sources, None if bool((lengths == sources.shape[-1]).all()) else lengths.to(sources.device)

    def visit_memory_bank(self, batch, pit):
        """The memory bank's decision about a training batch; exclusions go to the audit.

        Arguments
        ---------
        batch : PaddedBatch
            The batch.
        pit : PITResult
            Of all blocks; the final one decides.

        Returns
        -------
        Decision
            On the CPU.
        """
        bank, perm = self.hparams.memory_bank, pit.perm[-1]
        metric = -pit.loss[-1].detach()
        if self.hparams.dsd_metric == "si_sdri":
            metric = metric - self._mixture_si_sdr(batch)
        valid = ~is_silent(*self.references(batch)).any(-1)
        stored = bank.lookup(batch.row)
        decision = bank.update(batch.row, perm, metric, valid)
        self.hparams.exclusion_audit.add(bank.epoch, batch.id, stored, decision, perm, metric)
        return decision

    def _mixture_si_sdr(self, batch):
        """SI-SDR of the mixture itself, mean over speakers, dB, ``[B]``."""
        references, lengths = self.references(batch)
        return -pairwise_neg_si_sdr(batch.mix_sig.data.unsqueeze(1), references, lengths).mean((1, 2))

    def track(self, batch, pit, keep=None):
        """Add a batch's numbers to the running means; crops with a silent source do not count.

        Arguments
        ---------
        batch : PaddedBatch
            The batch.
        pit : PITResult
            Of all blocks, each under its own best assignment.
        keep : torch.Tensor, optional
            In training: which samples have a weight.
        """
        tracker, training = self.hparams.epoch_tracker, keep is not None
        stage = "train" if training else "valid"
        silent = is_silent(*self.references(batch)).any(-1)
        si_sdr = torch.where(silent, torch.nan, -pit.loss.detach())  # (L, B)
        si_sdri = si_sdr - self._mixture_si_sdr(batch)
        tracker.add(f"{stage}/si_sdr", si_sdr[-1])
        tracker.add(f"{stage}/si_sdri", si_sdri[-1])
        first_block = self.hparams.num_blocks - len(si_sdr) + 1
        for block, (block_si_sdr, block_si_sdri) in enumerate(zip(si_sdr, si_sdri, strict=True), first_block):
            tracker.add(f"{stage}/si_sdr_block{block}", block_si_sdr)
            tracker.add(f"{stage}/si_sdri_block{block}", block_si_sdri)
        for block, perm in enumerate(pit.perm[:-1], first_block):
            is_decoupled = (perm != pit.perm[-1]).any(-1).double()
            tracker.add(f"{stage}/layer_decoupling_block{block}", torch.where(silent, torch.nan, is_decoupled))
        if training:
            margin = torch.where(silent, torch.nan, assignment_margin(pit.loss_matrix[-1].detach()))
            tracker.add("train/margin", margin, keep_values=True)

    def on_fit_batch_start(self, batch, should_step):
        """Set the learning rate of the coming step."""
        if should_step:
            self.hparams.lr_scheduler.on_step(self.optimizer, self.optimizer_step / self.num_steps)

    def on_stage_start(self, stage, epoch=None):
        """Open the epoch's records, unless a resume has brought them along."""
        self.stage_start = time.time()
        if stage == sb.Stage.TRAIN:
            self.hparams.memory_bank.start_epoch(epoch)
            self.hparams.epoch_tracker.start_epoch(epoch)
        self.example = None
        self.test_ids, self.test_rows = [], []

    def evaluate_batch(self, batch, stage):
        """Validation: also keep one example. Test: also score each mixture."""
        with self.evaluation_ctx:
            estimates = self.compute_forward(batch, stage)
            loss = self.compute_objectives(estimates, batch, stage)
        references, lengths = self.references(batch)
        if stage == sb.Stage.TEST:
            self.test_ids += batch.id
            self.test_rows += score_batch(estimates.float(), references, batch.mix_sig.data, lengths)
        elif self.example is None:
            self.example = self._make_example(batch, estimates)
        return loss.detach().cpu()

    def _make_example(self, batch, estimates):
        """Mixture, references and estimates of the batch's first item, in the order of the references."""
        references, lengths = self.references(batch)
        perm = self.hparams.pit_loss(estimates[-1], references, lengths).perm[0]
        num_samples = int(batch.num_samples[0])
        return {
            "id": batch.id[0],
            "sample_rate": self.hparams.sample_rate,
            "mixture": batch.mix_sig.data[0, :num_samples].float().cpu().numpy(),
            "references": references[0, :, :num_samples].float().cpu().numpy(),
            "estimates": estimates[-1, 0, perm, :num_samples].float().cpu().numpy(),
        }

    def count_probe_switches(self, epoch):
        """Count the label switches of the probe set: fixed training mixtures, whole, in eval mode.

        Arguments
        ---------
        epoch : int
            Current epoch.

        Returns
        -------
        EpochCounts or None
            None where there is no probe set.
        """
        if self.probe_loader is None:
            return None
        bank = self.hparams.probe_bank
        bank.start_epoch(epoch)
        self.modules.eval()
        with torch.no_grad(), self.evaluation_ctx:
            for batch in tqdm(self.probe_loader, "probe set", disable=not if_main_process(), delay=3, leave=False):
                estimates = self.compute_forward(batch, sb.Stage.VALID)
                references, lengths = self.references(batch)
                pit = self.hparams.pit_loss(estimates[-1], references, lengths)
                valid = ~is_silent(references, lengths).any(-1)
                bank.update(batch.row, pit.perm, -pit.loss, valid)
        # Every rank visits the whole probe set, so there is nothing to merge.
        return bank.counts

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Training: keep the loss. Validation: write the epoch's records, save. Test: write the scores."""
        if stage == sb.Stage.TRAIN:
            self.train_loss, self.train_seconds = stage_loss, time.time() - self.stage_start
        elif stage == sb.Stage.VALID:
            self._finish_epoch(epoch, stage_loss)
        elif if_main_process():
            write_results(self.test_results_path, self.test_ids, self.test_rows)

    def _finish_epoch(self, epoch, valid_loss):
        hparams = self.hparams
        counts = hparams.memory_bank.end_epoch()
        probe_counts = self.count_probe_switches(epoch)
        hparams.exclusion_audit.synchronize()
        tracker = hparams.epoch_tracker
        tracker.synchronize()
        means, margins = tracker.means(), tracker.values.get("train/margin", [])
        train, valid = {"loss": self.train_loss}, {"loss": valid_loss}
        for name, value in means.items():
            stage, name = name.split("/")
            (train if stage == "train" else valid)[name] = value
        meta = {
            "epoch": epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "label_switches": counts.label_switches,
            "label_switch_rate": counts.label_switch_rate,
            "dropped_samples": counts.dropped_samples,
            "reordered_samples": counts.reordered_samples,
            "readmitted_samples": counts.readmitted_samples,
            "excluded_rate": counts.excluded_rate,
            "uncounted_samples": counts.uncounted,
            "all_dropped_batches": counts.all_dropped_batches,
        }
        if probe_counts is not None:
            meta["probe_label_switches"] = probe_counts.label_switches
            meta["probe_label_switch_rate"] = probe_counts.label_switch_rate
        hparams.lr_scheduler.on_epoch(self.optimizer, epoch, valid_loss)

        if if_main_process():
            hparams.train_logger.log_stats(meta, train, valid)
            self.tensorboard.log_stats(meta, train, valid)
            self.tensorboard.log_histogram("assignment_margin_db", margins, epoch)
            if self.example is not None and hparams.examples_interval and epoch % hparams.examples_interval == 0:
                self.tensorboard.log_example(self.example, draw_separation(self.example), epoch)
            median = float(torch.tensor(margins).median()) if margins else float("nan")
            row = {**meta, "seconds": self.train_seconds, "margin_median": median}
            row.update({f"train_{name}": value for name, value in train.items() if "decoupling" not in name})
            row.update({f"valid_{name}": value for name, value in valid.items() if "decoupling" not in name})
            row.update({name: value for name, value in valid.items() if "decoupling" in name})
            hparams.history.append(row)
        self.checkpointer.save_and_keep_only(
            meta={"si_sdri": valid["si_sdri"], "epoch": epoch},
            num_to_keep=hparams.num_to_keep,
            max_keys=["si_sdri"],
        )

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Load the best checkpoint's weights, and nothing else of it."""
        del min_key
        self.checkpointer.load_modules(("encoder", "masknet", "decoder"), max_key=max_key)
