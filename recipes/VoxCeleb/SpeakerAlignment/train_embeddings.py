"""Train a speaker-embedding model, and export it.

    > python train_embeddings.py hparams/ecapa.yaml
    > python train_embeddings.py hparams/ecapa.yaml --data_folder /path/to/voxceleb
    > python train_embeddings.py hparams/xvector.yaml --loss prototypical --train_csv train.csv --dev_csv dev.csv

Every option stands, with its values, in hparams/ecapa.yaml and hparams/xvector.yaml.
"""

import logging
import sys
from functools import partial
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.checkpoints import torch_recovery
from voxceleb_prepare import check_data, prepare_data

from nessa_modules.brain import EmbeddingBrain
from nessa_modules.corpora import read_corpus
from nessa_modules.encoder import export_encoder, training_wiring
from nessa_modules.options import check_options, check_resume, read_options
from nessa_modules.sampling import CropDataset
from shared_modules.errors import ends_in_one_sentence, mistakes_as_run_errors
from shared_modules.files import lock_folder
from shared_modules.model_files import EXPORTED_FOLDER
from shared_modules.options import check_run_opts

SPLITS = ("train", "dev")


class Embeddings(EmbeddingBrain):
    """Features, embeddings, and a loss over P speakers with M utterances each."""

    def compute_forward(self, batch, stage):
        """Embeddings ``[B, D]``, not length-normalised."""
        with torch.no_grad():  # the features have no weights
            wavs = self.signals(batch)
            lengths = torch.ones(len(wavs), device=self.device)
            features = self.modules.mean_var_norm(self.modules.compute_features(wavs), lengths)  # (B, frames, mels)
        return self.modules.embedding_model(features)[:, 0]  # (B, 1, D) -> (B, D)

    def compute_objectives(self, embeddings, batch, stage):
        """The loss of a batch, nats."""
        num_utterances = self.hparams.utterances_per_speaker
        speakers = batch["speaker_index"].view(-1, num_utterances)[:, 0]  # (P,)
        grouped = embeddings.view(len(speakers), num_utterances, -1)  # (P x M, D) -> (P, M, D)
        result = self.modules.speaker_loss(grouped, speakers.to(self.device))
        self.track(stage, result)
        return result.loss


def make_datasets(options):
    """The training and the validation set."""
    manifests = prepare_data(options, SPLITS)
    train, dev = (read_corpus(manifests[split], min_seconds=options["min_seconds"]) for split in SPLITS)
    num_speakers = len({utterance.speaker for utterance in train})
    if num_speakers < options["speakers_per_batch"]:
        raise ValueError(
            f"--speakers_per_batch can only be up to {num_speakers}, the number of training speakers, but got "
            f"{options['speakers_per_batch']}."
        )
    if options["out_n_neurons"] not in (None, num_speakers):
        raise ValueError(
            f"--out_n_neurons can only be {num_speakers}, the number of training speakers, but got "
            f"{options['out_n_neurons']}."
        )
    chosen = min(options["dev_utterances"], len(dev))
    dev = [dev[len(dev) * index // chosen] for index in range(chosen)]  # spread over the sorted ids
    dev_speakers = [utterance.speaker for utterance in dev]
    if not 1 < len(set(dev_speakers)) < len(dev_speakers):
        raise ValueError(
            f"Validation needs several speakers, one of them with several utterances, but has {len(dev_speakers)} "
            f"utterances of {len(set(dev_speakers))} speakers."
        )
    make_dataset = partial(CropDataset, sample_rate=options["sample_rate"], seed=options["seed"])
    return (
        make_dataset(train, crop_seconds=options["crop_seconds"]),
        make_dataset(dev, crop_seconds=options["dev_crop_seconds"]),
    )


def export(hparams, hparams_file, overrides, speakers):
    """Write the best model of the run; returns its folder and its epoch's numbers."""
    best = hparams["checkpointer"].find_checkpoint(min_key="eer")
    for name in ("embedding_model", "speaker_loss"):
        torch_recovery(hparams[name], best.paramfiles[name], end_of_epoch=True)
    classifier = getattr(hparams["speaker_loss"], "classifier", None)
    folder = export_encoder(
        Path(hparams["output_folder"]) / EXPORTED_FOLDER,
        training_wiring(hparams_file, overrides),
        hparams["embedding_model"],
        None if classifier is None else classifier.weight,
        None if classifier is None else speakers,
    )
    return folder, best.meta


@ends_in_one_sentence
def main(argv):
    """The run: check, prepare, train, export."""
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    # It warns that it cannot save figures without torchvision, which nothing here needs.
    logging.getLogger("speechbrain.utils.train_logger").addFilter(lambda record: "torchvision" not in record.msg)
    with mistakes_as_run_errors():
        given = {name: run_opts[name] for name in run_opts.overridden_args}
        overrides, options = read_options(hparams_file, overrides, given)
        check_options(options)
        run_opts = check_run_opts(options, run_opts)
        check_resume(options)
        check_data(options, SPLITS)
        lock = lock_folder(options["output_folder"])  # until the end of the run
        train, dev = make_datasets(options)
        if options["out_n_neurons"] is None:
            overrides += f"\nout_n_neurons: {len(train.speakers)}"
        with open(hparams_file, encoding="utf-8") as stream:
            hparams = load_hyperpyyaml(stream, overrides)
    sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)

    brain = Embeddings(
        modules=hparams["modules"],
        opt_class=hparams["optimizer"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.fit(
        hparams["epoch_counter"],
        train,
        dev,
        train_loader_kwargs=hparams["train_loader_opts"],
        valid_loader_kwargs=hparams["dev_loader_opts"],
    )
    with mistakes_as_run_errors():
        folder, meta = export(hparams, hparams_file, overrides, train.speakers)
    print(f"\n{folder}: the model of epoch {meta['epoch']}, EER {100 * meta['eer']:.2f} % on the validation speakers.")
    del lock


if __name__ == "__main__":
    main(sys.argv[1:])
