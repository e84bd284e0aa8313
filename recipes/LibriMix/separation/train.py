"""Train, evaluate and export a speech separator with dynamic sample dropout and layer-wise optimization.

    > python train.py hparams/sepformer_dsd.yaml
    > python train.py hparams/sepformer_dsd.yaml --data_folder /path/to/Libri2Mix
    > python train.py hparams/sepformer_dsd.yaml --dsd_mode none --layerwise False   # plain PIT

Every option stands, with its values, in hparams/sepformer_dsd.yaml.
"""

import sys
from functools import partial
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from librimix_prepare import check_librimix, prepare_librimix
from speechbrain.utils.distributed import ddp_init_group, if_main_process, run_on_main

from dsd_modules.brain import SeparationBrain
from dsd_modules.data.generate import generate_synthetic
from dsd_modules.data.manifest import read_mixtures, refuse_shared_mixtures, write_manifest
from dsd_modules.dataset import MixtureDataset
from dsd_modules.errors import ends_in_one_sentence, mistakes_as_run_errors
from dsd_modules.files import lock_folder
from dsd_modules.losses import layerwise_loss
from dsd_modules.model_folder import export_model, load_weights
from dsd_modules.options import check_options, check_resume, check_run_opts, read_options
from dsd_modules.results import finish_run
from dsd_modules.sample_dropout import REORDER


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
            Negative SI-SDR in dB: the weighted sum over the blocks, the mean over all samples of the batch, where
            the dropped ones count as zero.
        """
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
        return torch.where(keep, result.loss, 0.0).mean()


def check_data(options):
    """Look for the data before anything is generated or built."""
    if options["train_manifest"]:
        sets = [read_mixtures(options[f"{name}_manifest"], options["num_spks"]) for name in ("train", "valid", "test")]
        refuse_shared_mixtures(sets)
    elif options["data_folder"]:
        check_librimix(options["data_folder"], **_layout(options))


def _layout(options):
    return {name: options[name] for name in ("num_spks", "sample_rate", "train_sets", "mode", "task")}


def prepare_data(options):
    """Write the three manifests: of the user's own csv files, of a LibriMix folder, or of synthetic voices."""
    manifests = [options["train_csv"], options["valid_csv"], options["test_csv"]]
    Path(manifests[0]).parent.mkdir(parents=True, exist_ok=True)
    if options["train_manifest"]:
        own = [options["train_manifest"], options["valid_manifest"], options["test_manifest"]]
        for manifest, source in zip(manifests, own, strict=True):
            mixtures = read_mixtures(source, options["num_spks"])
            write_manifest(manifest, mixtures, options["sample_rate"], options["kernel_size"])
        return
    data_folder = options["data_folder"]
    if data_folder is None:
        num_train, num_valid, num_test = options["synthetic_sizes"]
        train_sets = options["train_sets"]
        data_folder = generate_synthetic(
            options["synthetic_folder"],
            num_spks=options["num_spks"],
            sample_rate=options["sample_rate"],
            mode=options["mode"],
            sets={**dict.fromkeys(train_sets, -(-num_train // len(train_sets))), "dev": num_valid, "test": num_test},
            noise=options["task"] == "mix_both",
            seed=options["synthetic_seed"],
        )
    prepare_librimix(data_folder, *manifests, min_samples=options["kernel_size"], **_layout(options))


def make_datasets(hparams):
    """The training, validation, test and probe sets."""
    seed, sample_rate = hparams["seed"], hparams["sample_rate"]
    crops = {"segment_seconds": hparams["segment_seconds"], "segment": hparams["segment"]}
    train = MixtureDataset(hparams["train_csv"], sample_rate, seed=seed, **crops)
    valid = MixtureDataset(hparams["valid_csv"], sample_rate)
    test = MixtureDataset(hparams["test_csv"], sample_rate)
    probe_size = min(hparams["probe_size"], len(train))
    probe_rows = [len(train) * i // probe_size for i in range(probe_size)]  # spread over the sorted ids
    probe = MixtureDataset(hparams["train_csv"], sample_rate, rows=probe_rows) if probe_size else None
    return train, valid, test, probe


def check_fit(options, hparams, train, probe):
    """Whether the data fit the options, the checkpoint that is resumed, and the weights to start from."""
    num_batches = -(-len(train) // options["batch_size"])
    if num_batches < options["grad_accumulation_factor"]:
        raise ValueError(
            f"--grad_accumulation_factor is {options['grad_accumulation_factor']}, but an epoch has only "
            f"{num_batches} batches: there would never be a step."
        )
    hparams["memory_bank"].set_samples(train.data_ids)
    hparams["probe_bank"].set_samples(probe.data_ids if probe else [])
    hparams["checkpointer"].check_recoverable("memory_bank")
    if hparams["pretrained_folder"]:
        load_weights(hparams["pretrained_folder"], hparams["modules"])


@ends_in_one_sentence
def main(argv):
    """The run: check, prepare, train, evaluate, export, report."""
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    with mistakes_as_run_errors():
        given = {name: run_opts[name] for name in run_opts.overridden_args}
        overrides, options = read_options(hparams_file, overrides, given)
        check_options(options)
        check_run_opts(options, run_opts.device, run_opts.data_parallel_backend)
        check_resume(options)
        check_data(options)
        ddp_init_group(run_opts)
        lock = lock_folder(options["output_folder"])  # until the end of the run
        run_on_main(prepare_data, kwargs={"options": options})
        with open(hparams_file, encoding="utf-8") as stream:
            hparams = load_hyperpyyaml(stream, overrides)
        train, valid, test, probe = make_datasets(hparams)
        check_fit(options, hparams, train, probe)
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
    brain.test_results_path = Path(hparams["output_folder"]) / "test_results.csv"
    brain.fit(
        hparams["epoch_counter"],
        train,
        valid,
        train_loader_kwargs=hparams["train_loader_opts"],
        valid_loader_kwargs=hparams["valid_loader_opts"],
    )
    if hparams["test_at_end"]:
        brain.evaluate(test, max_key="si_sdri", test_loader_kwargs=hparams["valid_loader_opts"])
        if if_main_process():
            folder = Path(hparams["output_folder"]) / "exported"
            exported = export_model(folder, hparams_file, options, hparams["modules"])
            finish_run(hparams["output_folder"], exported, test)
    del lock


if __name__ == "__main__":
    main(sys.argv[1:])
