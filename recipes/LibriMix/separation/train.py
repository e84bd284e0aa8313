"""Train, evaluate and export a speech separator with dynamic sample dropout and layer-wise optimization.

    > python train.py hparams/sepformer_dsd.yaml
    > python train.py hparams/sepformer_dsd.yaml --data_folder /path/to/Libri2Mix
    > python train.py hparams/sepformer_dsd.yaml --dsd_mode none --layerwise False   # plain PIT

Every option stands, with its values, in hparams/sepformer_dsd.yaml.
"""

import logging
import os
import sys
from functools import partial
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from librimix_prepare import check_data, make_reader, prepare_data
from speechbrain.utils.distributed import ddp_init_group, if_main_process

from dsd_modules.augmentation import Augmentation
from dsd_modules.brain import SeparationBrain
from dsd_modules.dataset import MixtureDataset, read_entries
from dsd_modules.dynamic_mixing import DynamicMixing
from dsd_modules.losses import layerwise_loss
from dsd_modules.model_card import write_card
from dsd_modules.model_folder import export_model, load_weights, model_options
from dsd_modules.options import check_options, check_resume, read_options
from dsd_modules.quality import check_metrics
from dsd_modules.results import finish_run, results_table
from dsd_modules.sample_dropout import REORDER
from shared_modules.distributed import leave_group, run_on_main
from shared_modules.errors import ends_in_one_sentence, mistakes_as_run_errors
from shared_modules.files import lock_folder
from shared_modules.options import check_run_opts


class Separation(SeparationBrain):
    """PIT with the memory bank of dynamic sample dropout, summed over the blocks."""

    def compute_objectives(self, predictions, batch, stage):
        """The loss of a batch.

        Arguments
        ---------
        predictions : torch.Tensor
            Estimates of the blocks, ``[L, B, N, T]``.
        batch : PaddedBatch
            The batch.
        stage : sb.Stage
            Only in training does the memory bank look at the samples.

        Returns
        -------
        torch.Tensor
            Negative SI-SDR in dB: the weighted sum over the blocks, the mean over all samples of the step (each has
            its weight), where the dropped ones count as zero.
        """
        if self.is_filler(batch, stage):
            # With no mixture left, this rank joins the step without weight. Not 0 * predictions: 0 * inf is NaN.
            return torch.where(torch.zeros_like(predictions, dtype=torch.bool), predictions, 0.0).sum()

        hparams = self.hparams
        pit = hparams.pit_loss(predictions, *self.references(batch))  # of every block at once
        supervised = pit if hparams.layerwise else pit[-1:]
        layerwise = partial(
            layerwise_loss,
            supervised,
            layer_weights=hparams.layer_weights,
            layer_permutation=hparams.layer_permutation,
        )
        measures = self.measure(batch, pit)
        if stage != sb.Stage.TRAIN:
            result = layerwise()
            self.track(stage, measures, result)
            return result.loss.mean()

        decision = self.visit_memory_bank(batch, measures)
        keep, perm, action = (x.to(self.device) for x in (decision.keep, decision.perm, decision.action))
        result = layerwise(perm=perm, imposed=action == REORDER, gamma_db=hparams.soft_min_gamma_db)
        self.track(stage, measures, result, decision.keep)
        return torch.where(keep, batch.weight.to(result.loss) * result.loss, 0.0).sum()


def make_datasets(hparams, options):
    """The training, validation, test and probe sets."""
    seed, sample_rate, reader = hparams["seed"], hparams["sample_rate"], make_reader(options)
    make_dataset = partial(MixtureDataset, sample_rate=sample_rate, reader=reader, seed=seed)
    speeds = hparams["speeds"] if hparams["speed_perturb"] else None
    dynamic_mixing = None
    if hparams["dynamic_mixing"]:
        entries = list(read_entries(hparams["train_csv"]).values())
        noise = hparams["task"] != "mix_clean"
        dynamic_mixing = DynamicMixing(entries, reader, hparams["num_spks"], sample_rate, seed, noise)
    train = make_dataset(
        hparams["train_csv"],
        segment_seconds=hparams["segment_seconds"],
        segment=hparams["segment"],
        augmentation=Augmentation(seed, speeds, hparams["wave_drop"]) if speeds or hparams["wave_drop"] else None,
        dynamic_mixing=dynamic_mixing,
    )
    valid, test = make_dataset(hparams["valid_csv"]), make_dataset(hparams["test_csv"])
    probe_size = min(hparams["probe_size"], len(train))
    probe_rows = [len(train) * i // probe_size for i in range(probe_size)]  # spread over the sorted ids
    probe = make_dataset(hparams["train_csv"], rows=probe_rows) if probe_size else None
    return train, valid, test, probe


def check_fit(hparams, train, probe):
    """Whether the data and the model fit the options, the checkpoint that is resumed, and the weights to start from."""
    num_blocks = hparams["modules"]["masknet"].num_layers
    if (hparams["test_block"] or 1) > num_blocks:
        raise ValueError(f"--test_block can only be 1 to {num_blocks}, but got {hparams['test_block']}.")
    hparams["memory_bank"].set_samples(train.data_ids)
    hparams["probe_bank"].set_samples(probe.data_ids if probe else [])
    hparams["checkpointer"].check_recoverable("memory_bank")
    if hparams["pretrained_folder"]:
        load_weights(hparams["pretrained_folder"], hparams["modules"])


@ends_in_one_sentence
def main(argv):
    """The run: check, prepare, train, evaluate, export, report."""
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    # It warns that it cannot save figures without torchvision, which nothing here needs.
    logging.getLogger("speechbrain.utils.train_logger").addFilter(lambda record: "torchvision" not in record.msg)
    with mistakes_as_run_errors():
        given = {name: run_opts[name] for name in run_opts.overridden_args}
        overrides, options = read_options(hparams_file, overrides, given)
        check_options(options)
        check_metrics(options["test_metrics"])
        run_opts = check_run_opts(options, run_opts)
        check_resume(options, model_options(hparams_file), run_opts.test_only)
        if os.environ.get("RANK", "0") == "0":  # the ranks do not know of each other yet
            check_data(options)
        ddp_init_group(run_opts)
        lock = lock_folder(options["output_folder"])  # until the end of the run
        run_on_main(prepare_data, options)
        with open(hparams_file, encoding="utf-8") as stream:
            hparams = load_hyperpyyaml(stream, overrides)
        train, valid, test, probe = make_datasets(hparams, options)
        check_fit(hparams, train, probe)
    if not run_opts.test_only:
        sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)

    brain = Separation(
        modules=hparams["modules"],
        opt_class=hparams["optimizer"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    if probe is not None:
        brain.probe_loader = brain.make_dataloader(probe, sb.Stage.VALID, None, **hparams["valid_loader_opts"])
    brain.test_results_path = results_table(hparams["output_folder"], hparams["test_block"])
    brain.fit(
        hparams["epoch_counter"],
        train,
        valid,
        train_loader_kwargs=hparams["train_loader_opts"],
        valid_loader_kwargs=hparams["valid_loader_opts"],
    )
    if hparams["test_at_end"] or run_opts.test_only:
        brain.evaluate(test, max_key="si_sdri", test_loader_kwargs=hparams["valid_loader_opts"])
        if if_main_process():
            folder = Path(hparams["output_folder"]) / "exported"
            modules = hparams["weight_average"].averaged(hparams["modules"])
            exported = export_model(folder, hparams_file, options, modules)
            folders = [options[name] for name in ("metadata_folder", "data_folder", "librispeech_folder")]
            with mistakes_as_run_errors():
                finish_run(hparams["output_folder"], exported, test, hparams["test_block"], folders)
                table = results_table(hparams["output_folder"], hparams["test_block"])
                write_card(exported, hparams["output_folder"], table, hparams["test_block"])
    elif if_main_process():
        print("\nThe test set was not looked at; the same command without --test_at_end False tests.")
    leave_group()
    del lock


if __name__ == "__main__":
    main(sys.argv[1:])
