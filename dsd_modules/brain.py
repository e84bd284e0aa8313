"""The Brain of a separation recipe: forward, stages and records. The recipe adds ``compute_objectives``."""

import copy
import math
import time
from dataclasses import dataclass
from functools import partial

import speechbrain as sb
import torch
from speechbrain.utils.distributed import ddp_broadcast, if_main_process
from tqdm import tqdm

from dsd_modules.evaluation import best_permutations, score_batch, write_results
from dsd_modules.groups import overlap_ratio
from dsd_modules.losses import is_silent, pairwise_neg_si_sdr
from dsd_modules.permutation import assignment_margin, reorder_estimates
from dsd_modules.quality import QualityScorer
from dsd_modules.report import draw_separation
from dsd_modules.sampling import EvaluationBatches, TrainingBatches
from dsd_modules.separator import separate
from shared_modules.brain import RecordedBrain
from shared_modules.distributed import all_gather, get_rank, world_size
from shared_modules.errors import RunError

# How many validation mixtures TensorBoard shows.
NUM_EXAMPLES = 3


@dataclass
class Measures:
    """What is known of a batch of B items after PIT, for L blocks; on the CPU."""

    si_sdr: torch.Tensor  # [L, B], dB, mean over speakers, each block under its own best assignment
    si_sdri: torch.Tensor  # [L, B], dB, improvement over the mixture
    perm: torch.Tensor  # [L, B, N], each block's best assignment
    margin: torch.Tensor  # [B], dB, between best and second-best assignment of the final block
    is_silent: torch.Tensor  # [B], whether any source is


class SeparationBrain(RecordedBrain):
    """Everything of separation training that is not the objective.

    ``compute_objectives(predictions, batch, stage)`` is left to the recipe, which calls :meth:`measure`,
    :meth:`visit_memory_bank` and :meth:`track`. Predictions are the estimates of blocks, ``[L, B, N, T]``, the final
    block last.

    The hparams hold ``modules`` (encoder, masknet, decoder), ``pit_loss``, ``memory_bank``, ``probe_bank``,
    ``lr_scheduler``, ``weight_average``, ``epoch_counter``, ``epoch_tracker``, ``history``, ``exclusion_audit``, the
    loggers, and the options of the YAML.

    On several ranks each one trains and evaluates its own mixtures; what is recorded is that of all of them.
    """

    # Given by the recipe before fit: the probe set's DataLoader, or None.
    probe_loader = None
    # Given by the recipe before evaluate: where the scores of each mixture go.
    test_results_path = None

    def make_dataloader(self, dataset, stage, ckpt_prefix="dataloader-", **loader_kwargs):
        """Batches that repeat no mixture on any number of ranks: see :mod:`dsd_modules.sampling`."""
        del ckpt_prefix  # the place in the epoch is kept by TrainingBatches
        size = {"num_samples": len(dataset), "batch_size": loader_kwargs.pop("batch_size", 1)}
        place = {"rank": get_rank(), "num_ranks": world_size()}
        if stage == sb.Stage.TRAIN:
            accumulation = self.grad_accumulation_factor
            batches = TrainingBatches(**size, seed=self.hparams.seed, accumulation=accumulation, **place)
            self.train_sampler = batches
            if self.checkpointer is not None:
                self.checkpointer.add_recoverable("train_batches", batches)
        else:
            batches = EvaluationBatches(**size, **place)
        # A generator of its own: the loader's draws would move the global one, which a resume restores.
        generator = torch.Generator()
        return super().make_dataloader(
            dataset, stage, None, batch_sampler=batches, generator=generator, **loader_kwargs
        )

    def _train_loader_specifics(self, dataset, loader_kwargs):
        return loader_kwargs  # SpeechBrain's would repeat mixtures to even out the ranks

    def on_fit_start(self):
        """Recover the last checkpoint; drop the records of what comes after it."""
        if self.hparams.memory_bank.restart_epoch is not None:
            # Of the modules as they were built: DDP and compile, which come below, share their weights.
            self.initial_weights = {n: copy.deepcopy(m.state_dict()) for n, m in self.hparams.modules.items()}
        if get_rank() > 0:
            torch.manual_seed(self.hparams.seed + get_rank())  # the ranks' dropouts differ
        self.hparams.weight_average.to(self.device)
        super().on_fit_start()

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        # Gradients that wait for their optimizer step would be lost.
        if self.step % self.grad_accumulation_factor:
            return False
        return super()._should_save_intra_epoch_ckpt(last_ckpt_time, steps_since_ckpt)

    def compute_forward(self, batch, stage):
        """Estimates of the final block ``[1, B, N, T]``, or of all blocks where they are supervised or scored."""
        if stage == sb.Stage.TRAIN:
            # Not those of hparams: these are wrapped by DDP and compile.
            return self._separate(self.modules, batch, blocks="all" if self.hparams.layerwise else [-1])
        return self._separate(self.evaluation_modules, batch, blocks="all")  # (L, B, N, T)

    @property
    def evaluation_modules(self):
        """The averaged modules where there are any; never wrapped by DDP, whose forward is a collective."""
        modules = {name: getattr(module, "module", module) for name, module in self.modules.items()}
        return self.hparams.weight_average.averaged(modules)

    def _separate(self, modules, batch, blocks):
        batch = batch.to(self.device)
        mixture, lengths = batch.mix_sig.data, batch.num_samples
        return separate(modules["encoder"], modules["masknet"], modules["decoder"], mixture, lengths, blocks)

    @staticmethod
    def references(batch):
        """The references ``[B, N, T]`` and the lengths ``[B]`` in samples, or None where nothing is padded."""
        sources = batch.sources.data.transpose(1, 2)  # (B, T, N) -> (B, N, T)
        lengths = batch.num_samples
        return sources, None if bool((lengths == sources.shape[-1]).all()) else lengths.to(sources.device)

    def measure(self, batch, pit):
        """What the memory bank and the records need of a batch, on the CPU.

        Arguments
        ---------
        batch : PaddedBatch
            The batch.
        pit : PITResult
            Of all blocks, each under its own best assignment.

        Returns
        -------
        Measures
        """
        references, lengths = self.references(batch)
        mixture_si_sdr = -pairwise_neg_si_sdr(batch.mix_sig.data.unsqueeze(1), references, lengths).mean((1, 2))
        si_sdr = -pit.loss.detach()  # (L, B)
        return Measures(
            si_sdr=si_sdr.cpu(),
            si_sdri=(si_sdr - mixture_si_sdr).cpu(),
            perm=pit.perm.cpu(),
            margin=assignment_margin(pit.loss_matrix[-1].detach()).cpu(),
            is_silent=is_silent(references, lengths).any(-1).cpu(),
        )

    @staticmethod
    def is_filler(batch, stage):
        """Whether the batch is there only because the other ranks, or the accumulated step, still need this one."""
        return stage == sb.Stage.TRAIN and not batch.weight.any()

    def visit_memory_bank(self, batch, measures):
        """The memory bank's decision about a training batch; exclusions go to the audit.

        Arguments
        ---------
        batch : PaddedBatch
            The batch.
        measures : Measures
            Of the batch; the final block decides.

        Returns
        -------
        Decision
            On the CPU.
        """
        bank, perm = self.hparams.memory_bank, measures.perm[-1]
        metric = getattr(measures, self.hparams.dsd_metric)[-1]
        is_stable = not self.hparams.dynamic_mixing  # a row is another mixture in each epoch
        decision = bank.update(batch.row, perm, metric, ~measures.is_silent & is_stable)
        self.hparams.exclusion_audit.add(bank.epoch, batch.id, decision, perm, metric)
        return decision

    def track(self, stage, measures, layerwise, keep=None):
        """Add a batch's numbers to the running means; crops with a silent source do not count.

        Arguments
        ---------
        stage : sb.Stage
            TRAIN or VALID.
        measures : Measures
            Of the batch.
        layerwise : LayerwiseResult
            The losses of the supervised blocks.
        keep : torch.Tensor, optional
            Boolean ``[B]``: the samples that are not dropped. The losses are averaged over these alone, so that
            runs which drop and runs which do not can be compared.
        """
        add_loss = partial(self._add, stage, slice(None) if keep is None else keep)
        add = partial(self._add, stage, ~measures.is_silent)
        last = self.num_blocks
        add_loss("loss", layerwise.loss.detach().cpu())
        block_losses = layerwise.block_losses.detach().cpu()  # (L, B)
        for block, losses in enumerate(block_losses, last - len(block_losses) + 1):
            add_loss(f"loss_block{block}", losses)
        add("si_sdr", measures.si_sdr[-1])
        add("si_sdri", measures.si_sdri[-1])
        for index, block in enumerate(range(last - len(measures.si_sdr) + 1, last + 1)):
            add(f"si_sdr_block{block}", measures.si_sdr[index])
            add(f"si_sdri_block{block}", measures.si_sdri[index])
            if block < last:
                is_decoupled = (measures.perm[index] != measures.perm[-1]).any(-1).double()
                add(f"layer_decoupling_block{block}", is_decoupled)
        if stage == sb.Stage.TRAIN:
            add("margin", measures.margin, keep_values=True)

    def _add(self, stage, rows, name, values, **kwargs):
        self.hparams.epoch_tracker.add(f"{stage.name.lower()}/{name}", values[rows], **kwargs)

    @property
    def num_blocks(self):
        """How many outputs the mask network has: dual-path blocks, or repeats."""
        return self.hparams.modules["masknet"].num_layers

    def on_fit_batch_start(self, batch, should_step):
        """Set the learning rate of the coming step."""
        if should_step:
            self.hparams.lr_scheduler.on_step(self.optimizer, self._progress())

    def _progress(self):
        """The share of the training that is done: of all of it, or of that before or after a restart."""
        bank = self.hparams.memory_bank
        restart = bank.restart_epoch or 1
        first, last = (restart, self.hparams.epoch_counter.limit) if bank.epoch >= restart else (1, restart - 1)
        return (bank.epoch - first + self.train_sampler.epoch_share_done) / (last - first + 1)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Note what a step has done."""
        if should_step:
            self.train_sampler.advance()
            self.hparams.weight_average.update(self.hparams.modules)

    def on_stage_start(self, stage, epoch=None):
        """Open the epoch's records, unless a resume has brought them along."""
        if stage == sb.Stage.TRAIN:
            # After a resume inside the epoch its whole duration is not known.
            is_resumed = self.hparams.epoch_tracker.epoch == epoch
            self.stage_start = float("nan") if is_resumed else time.time()
            self.hparams.memory_bank.start_epoch(epoch)
            self.hparams.epoch_tracker.start_epoch(epoch)
            if epoch == self.hparams.memory_bank.restart_epoch and not is_resumed:
                for name, weights in self.initial_weights.items():
                    self.hparams.modules[name].load_state_dict(weights)
                self.optimizer.state.clear()
                self.hparams.weight_average.restart()
        interval = self.hparams.examples_interval
        self.wants_examples = stage == sb.Stage.VALID and interval > 0 and epoch % interval == 0
        self.examples, self.test_rows = [], {}
        if stage == sb.Stage.TEST:
            metrics, sample_rate = self.hparams.test_metrics, self.hparams.sample_rate
            self.quality = QualityScorer(metrics, sample_rate, progressbar=if_main_process())

    def evaluate_batch(self, batch, stage):
        """Validation: the objective, and examples for TensorBoard. Test: the scores of each mixture."""
        with self.evaluation_ctx:
            estimates = self.compute_forward(batch, stage)
            if stage == sb.Stage.VALID:
                loss = self.compute_objectives(estimates, batch, stage)
        if stage == sb.Stage.TEST:
            return self._score(batch, estimates[: self.hparams.test_block].float())  # None: all blocks
        if self.wants_examples:
            for b in range(min(len(batch), NUM_EXAMPLES - len(self.examples))):
                self.examples.append(self._make_example(batch, estimates, b))
        return loss.detach().cpu()

    def _score(self, batch, estimates):
        """Score a test batch; PESQ and STOI are left to other processes."""
        references, lengths = self.references(batch)
        mixture = batch.mix_sig.data
        perm = best_permutations(estimates, references, lengths)
        rows = score_batch(estimates, references, mixture, lengths, perm)
        if references.shape[1] > 1:
            for row, ratio in zip(rows, overlap_ratio(references, lengths).tolist(), strict=True):
                row["overlap"] = ratio
        self.test_rows.update(zip(batch.id, rows, strict=True))
        if self.hparams.test_metrics:
            ordered = reorder_estimates(estimates[-1], perm[-1])
            for b, num_samples in enumerate(batch.num_samples.tolist()):
                signals = (ordered[b], references[b], mixture[b])
                self.quality.submit(batch.id[b], *(x[..., :num_samples].float().cpu().numpy() for x in signals))
        return -torch.tensor([row["si_sdr"] for row in rows]).nanmean()

    def _make_example(self, batch, estimates, b):
        """Mixture, references and estimates of one item, the estimates in the order of the references."""
        num_samples = int(batch.num_samples[b])
        reference = self.references(batch)[0][b, :, :num_samples]
        estimate = estimates[-1, b, :, :num_samples]
        perm = self.hparams.pit_loss(estimate.unsqueeze(0), reference.unsqueeze(0)).perm
        return {
            "id": batch.id[b],
            "sample_rate": self.hparams.sample_rate,
            "mixture": batch.mix_sig.data[b, :num_samples].float().cpu().numpy(),
            "references": reference.float().cpu().numpy(),
            "estimates": reorder_estimates(estimate, perm[0]).float().cpu().numpy(),
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
                estimates = self._separate(self.evaluation_modules, batch, blocks=None)
                references, lengths = self.references(batch)
                pit = self.hparams.pit_loss(estimates, references, lengths)
                bank.update(batch.row, pit.perm, -pit.loss, ~is_silent(references, lengths).any(-1))
        return bank.end_epoch()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Validation: write the epoch's records, save. Test: write the scores."""
        if stage == sb.Stage.TRAIN:
            self.train_seconds = time.time() - self.stage_start
        elif stage == sb.Stage.VALID:
            self._finish_epoch(epoch)
        else:
            self._finish_test()

    def _finish_test(self):
        """Gather the scores of all ranks on the main one, which writes them by id."""
        for sample_id, scores in self.quality.collect().items():
            self.test_rows[sample_id].update(scores)
        rows = {sample_id: row for ranked in all_gather(self.test_rows) for sample_id, row in ranked.items()}
        if if_main_process():
            write_results(self.test_results_path, list(rows), list(rows.values()))

    def _finish_epoch(self, epoch):
        """All ranks come here; the numbers are those of all ranks, the files rank 0's."""
        hparams = self.hparams
        probe_counts = self.count_probe_switches(epoch)
        counts = hparams.memory_bank.end_epoch()
        hparams.exclusion_audit.synchronize()
        hparams.epoch_tracker.synchronize()
        means = ddp_broadcast(hparams.epoch_tracker.means())
        margins = hparams.epoch_tracker.values.get("train/margin", [])
        train, valid = (
            {name.removeprefix(stage): value for name, value in means.items() if name.startswith(stage)}
            for stage in ("train/", "valid/")
        )
        self._check_progress(epoch, counts, valid)
        meta = {
            "epoch": epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **self._label_switches(counts),
            "dropped_samples": counts.dropped_samples,
            "reordered_samples": counts.reordered_samples,
            "readmitted_samples": counts.readmitted_samples,
            "excluded_rate": counts.excluded_rate,
            "uncounted_samples": counts.uncounted,
            "all_dropped_batches": counts.all_dropped_batches,
            "margin_median": float(torch.tensor(margins).median()) if margins else float("nan"),
        }
        if probe_counts is not None:
            meta.update({f"probe_{name}": value for name, value in self._label_switches(probe_counts).items()})
        hparams.lr_scheduler.on_epoch(self.optimizer, epoch, valid["loss"])

        hparams.train_logger.log_stats(meta, train, valid)  # a collective in SpeechBrain
        self.tensorboard.log_stats(meta, train, valid)
        self.tensorboard.log_histogram("assignment_margin_db", margins, epoch)
        if if_main_process():
            for number, example in enumerate(self.examples, 1):
                self.tensorboard.log_example(f"example_{number}", example, draw_separation(example), epoch)
            row = {**meta, "seconds": self.train_seconds}
            row.update({f"train_{name}": value for name, value in train.items()})
            row.update({f"valid_{name}": value for name, value in valid.items()})
            hparams.history.append(row)
        # What a cascade learned before its restart is not its result.
        is_result = epoch >= (hparams.memory_bank.restart_epoch or 1)
        self.checkpointer.save_and_keep_only(
            meta={"si_sdri": valid["si_sdri"] if is_result else -math.inf, "epoch": epoch},
            num_to_keep=hparams.num_to_keep,
            max_keys=["si_sdri"],
        )

    def _label_switches(self, counts):
        """Their number and rate; NaN where nothing can switch (one speaker) or nothing was counted."""
        is_counted = self.hparams.num_spks > 1 and counts.uncounted < counts.visits
        return {
            name: getattr(counts, name) if is_counted else math.nan for name in ("label_switches", "label_switch_rate")
        }

    def _check_progress(self, epoch, counts, valid):
        """Stop a run that learns nothing, instead of going on with numbers that look like others."""
        if counts.uncounted == counts.visits and not self.hparams.dynamic_mixing:
            raise RunError(
                f"In epoch {epoch} each of the {counts.visits} training mixtures had a silent source or an estimate "
                "that is not finite: nothing can be learned from them. Look at the data, or lower --lr "
                f"(now {self.hparams.lr})."
            )
        if not math.isfinite(valid.get("loss", math.nan)) or not math.isfinite(valid["si_sdri"]):
            raise RunError(
                f"After epoch {epoch} no validation mixture has a finite score: the training diverged, or each has a "
                f"silent source. Lower --lr (now {self.hparams.lr}), or look at the data."
            )

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Load the best checkpoint's weights, and nothing else of it."""
        del min_key
        self.hparams.weight_average.to(self.device)
        self.checkpointer.load_only(("encoder", "masknet", "decoder", "weight_average"), max_key=max_key)
