"""Speaker encoders: their folders, read without running anything, and their embeddings."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import voice

from nessa_modules import encoder as encoder_module
from nessa_modules.corpora import Utterance
from nessa_modules.encoder import MIN_SECONDS, SpeakerEncoder, export_encoder, training_wiring
from shared_modules.model_files import Plan, read_plan

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "VoxCeleb" / "SpeakerAlignment"
RATE = 8000
SMALL = "sample_rate: 8000\nn_mels: 24\nn_fft: 256\nchannels: 16\nlast_channels: 24\nembedding_size: 12\n"
SMALL_ECAPA = SMALL + "attention_channels: 8\nse_channels: 8\nres2net_scale: 4\n"
KINDS = {"ecapa": SMALL_ECAPA, "xvector": SMALL, "resnet": SMALL}
SMALL_RESNET = {
    "input_size": 24,
    "channels": [4, 4, 8, 8],
    "block_sizes": [1, 2, 1, 1],
    "strides": [1, 2, 2, 2],
    "lin_neurons": 12,
}


def wiring(kind):
    if kind == "resnet":  # which has no recipe here
        resnet = Plan("!new:speechbrain.lobes.models.ResNet.ResNet", dict(SMALL_RESNET))
        return wiring("ecapa") | {"embedding_model": resnet}
    return training_wiring(RECIPE / "hparams" / f"{kind}.yaml", KINDS[kind])


def small_encoder(kind="ecapa", seed=0):
    """Random weights, and the statistics of batch norm random as well, so that each of them counts."""
    torch.manual_seed(seed)
    encoder = SpeakerEncoder(wiring(kind))
    state = encoder.mods["embedding_model"].state_dict()
    for name, tensor in state.items():
        if "running" in name:
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return SpeakerEncoder(wiring(kind), state)


def export(folder, kind="ecapa", seed=0, num_speakers=5):
    encoder = small_encoder(kind, seed)
    weight = torch.randn(num_speakers, encoder.embedding_size) if num_speakers else None
    names = [f"speaker'{number}" for number in range(num_speakers)] or None
    return export_encoder(folder, encoder.wiring, encoder.mods["embedding_model"], weight, names), encoder, weight


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("encoder") / "exported")


def speech(seconds, seed=0, rate=RATE):
    return voice(np.random.default_rng(seed), int(seconds * rate), 140, rate)


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_of_a_padded_batch_gives_what_it_gives_alone(kind):
    encoder = small_encoder(kind)
    lengths = [8000, 5000, 2500, 5000]
    wavs = torch.full((4, 8000), 0.7)  # what lies beyond the lengths does not matter
    for row, length in enumerate(lengths):
        wavs[row, :length] = torch.from_numpy(speech(length / RATE, seed=row))
    together = encoder.encode_batch(wavs, torch.tensor(lengths) / 8000)
    assert together.shape == (4, 12)
    for row, length in enumerate(lengths):
        alone = encoder.encode_batch(wavs[row : row + 1, :length])[0]
        assert torch.allclose(together[row], alone, atol=1e-6)
    assert not torch.allclose(together[1], together[3], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_is_the_same_each_time_and_in_any_company(kind):
    """SpeechBrain's x-vector adds noise to the pooled means, also in eval mode."""
    encoder = small_encoder(kind)
    wavs = torch.from_numpy(np.stack([speech(0.5, seed) for seed in range(3)]))
    first = encoder.encode_batch(wavs)
    assert torch.equal(first, encoder.encode_batch(wavs))
    assert torch.allclose(first, torch.cat([encoder.encode_batch(wav[None]) for wav in wavs]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_speakers", [0, 5])
def test_the_exported_folder_loads_in_stock_speechbrain(kind, num_speakers, tmp_path):
    from speechbrain.inference.classifiers import EncoderClassifier
    from speechbrain.inference.speaker import SpeakerRecognition

    folder, encoder, weight = export(tmp_path / "exported", kind, num_speakers=num_speakers)
    wavs = torch.from_numpy(np.stack([speech(0.7, seed) for seed in range(2)]))
    ours = SpeakerEncoder.from_hparams(folder)
    assert torch.equal(ours.encode_batch(wavs), encoder.encode_batch(wavs))
    for interface in (EncoderClassifier, SpeakerRecognition):
        theirs = interface.from_hparams(str(folder), savedir=str(tmp_path / interface.__name__))
        assert torch.allclose(theirs.encode_batch(wavs).flatten(1), ours.encode_batch(wavs), atol=1e-4)
    if not num_speakers:
        assert ours.classifier_weight is None
        assert ours.speakers is None
        return
    theirs.hparams.label_encoder.expect_len(num_speakers)
    probabilities, _, index, names = theirs.classify_batch(wavs)
    cosines = torch.nn.functional.normalize(ours.encode_batch(wavs), dim=-1) @ ours.classifier_weight.T
    assert torch.allclose(probabilities, cosines, atol=1e-4)
    assert names == [ours.speakers[number] for number in index]
    assert ours.speakers == [f"speaker'{number}" for number in range(num_speakers)]
    assert torch.allclose(ours.classifier_weight, torch.nn.functional.normalize(weight, dim=-1))


def test_stock_speechbrain_resamples_to_the_models_rate(exported, tmp_path):
    from speechbrain.inference.classifiers import EncoderClassifier

    theirs = EncoderClassifier.from_hparams(str(exported[0]), savedir=str(tmp_path))
    assert theirs.audio_normalizer.sample_rate == RATE


# The wiring of speechbrain's spkrec-ecapa-voxceleb, spkrec-xvect-voxceleb and spkrec-resnet-voxceleb, made small;
# LanceaKing/spkrec-ecapa-cnceleb has that of the first.
PUBLISHED = """
n_mels: {n_mels}
pretrained_path: {folder}
out_n_neurons: 6
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: !ref <n_mels>
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !new:speechbrain.lobes.models.{model}
classifier: !new:speechbrain.lobes.models.{classifier}
    out_neurons: !ref <out_n_neurons>
mean_var_norm_emb: !new:speechbrain.processing.features.InputNormalization
    norm_type: global
    std_norm: False
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    mean_var_norm_emb: !ref <mean_var_norm_emb>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
        mean_var_norm_emb: !ref <mean_var_norm_emb>
        classifier: !ref <classifier>
        label_encoder: !ref <label_encoder>
    paths:
        embedding_model: !ref <pretrained_path>/embedding_model.ckpt
        mean_var_norm_emb: !ref <pretrained_path>/mean_var_norm_emb.ckpt
        classifier: !ref <pretrained_path>/classifier.ckpt
        label_encoder: !ref <pretrained_path>/label_encoder.txt
"""
PUBLISHED_KINDS = {
    "ecapa": {
        "n_mels": 80,
        "model": """ECAPA_TDNN.ECAPA_TDNN
    input_size: !ref <n_mels>
    channels: [16, 16, 16, 16, 48]
    kernel_sizes: [5, 3, 3, 3, 1]
    dilations: [1, 2, 3, 4, 1]
    attention_channels: 8
    lin_neurons: 12""",
        "classifier": "ECAPA_TDNN.Classifier\n    input_size: 12",
    },
    "xvect": {
        "n_mels": 24,
        "model": """Xvector.Xvector
    in_channels: !ref <n_mels>
    activation: !name:torch.nn.LeakyReLU
    tdnn_blocks: 5
    tdnn_channels: [16, 16, 16, 16, 48]
    tdnn_kernel_sizes: [5, 3, 3, 1, 1]
    tdnn_dilations: [1, 2, 3, 1, 1]
    lin_neurons: 12""",
        "classifier": """Xvector.Classifier
    input_shape: [null, null, 12]
    activation: !name:torch.nn.LeakyReLU
    lin_blocks: 1
    lin_neurons: 12""",
    },
    "resnet": {
        "n_mels": 80,
        "model": """ResNet.ResNet
    input_size: !ref <n_mels>
    channels: [4, 4, 8, 8]
    strides: [1, 2, 2, 2]
    block_sizes: [3, 4, 6, 3]
    lin_neurons: 12""",
        "classifier": "ResNet.Classifier\n    input_size: 12",
    },
}


def publish(folder, kind):
    """A folder as SpeechBrain publishes them, made by its own classes alone."""
    from hyperpyyaml import load_hyperpyyaml

    torch.manual_seed(0)
    text = PUBLISHED.format(folder=folder, **PUBLISHED_KINDS[kind])
    built = load_hyperpyyaml(text)
    for name in ("embedding_model", "classifier"):
        state = built[name].state_dict()
        for key in state:
            if "running" in key:
                state[key] = torch.rand_like(state[key]) + 0.5
        torch.save(state, folder / f"{name}.ckpt")
    torch.save(
        {"count": 1, "glob_mean": torch.zeros(12), "glob_std": torch.ones(12)}, folder / "mean_var_norm_emb.ckpt"
    )
    (folder / "hyperparams.yaml").write_text(text)
    names = "".join(f"'id1000{number}' => {number}\n" for number in (2, 0, 1, 3, 5, 4))
    (folder / "label_encoder.txt").write_text(f"{names}================\n'starting_index' => 0\n")


@pytest.mark.parametrize("kind", PUBLISHED_KINDS)
def test_a_published_folder_embeds_as_in_stock_speechbrain(kind, tmp_path):
    from speechbrain.inference import EncoderClassifier

    folder = tmp_path / "published"
    folder.mkdir()
    publish(folder, kind)
    stock = EncoderClassifier.from_hparams(str(folder), savedir=str(tmp_path / "stock"))
    encoder = SpeakerEncoder.from_hparams(folder)
    assert encoder.sample_rate == 16000
    assert encoder.speakers == [f"id1000{number}" for number in range(6)]

    wavs = torch.from_numpy(np.stack([speech(0.6, seed, rate=16000) for seed in range(3)]))
    tolerance = 1e-4 if kind == "xvect" else 1e-5  # SpeechBrain's x-vector adds noise
    expected = stock.encode_batch(wavs).reshape(3, 12)
    assert expected.std(0).mean() > 10 * tolerance
    assert torch.allclose(encoder.encode_batch(wavs), expected, atol=tolerance)

    lengths = [9600, 4800, 6000]
    wavs = torch.where(torch.arange(9600) < torch.tensor(lengths)[:, None], wavs, 0.7)
    together = encoder.encode_batch(wavs, torch.tensor(lengths) / 9600)
    for row, length in enumerate(lengths):
        alone = stock.encode_batch(wavs[row : row + 1, :length]).flatten()
        assert torch.allclose(together[row], alone, atol=tolerance)

    if kind == "xvect":  # several layers are no direction per speaker
        assert encoder.classifier_weight is None
        return
    scores = stock.classify_batch(wavs[:1])[0]
    assert torch.allclose(torch.cosine_similarity(together[:1], encoder.classifier_weight), scores, atol=1e-5)


# spkrec-ecapa-voxceleb-mel-spec, for SpeechBrain's MelSpectrogramEncoder, and one that a transformer embeds for.
OF_OTHER_FORMS = {
    "holds no compute_features: it is not in the form of SpeechBrain's EncoderClassifier": """
sample_rate: 16000
n_mel_channels: 80
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: !ref <n_mel_channels>
    channels: [1024, 1024, 1024, 1024, 3072]
    kernel_sizes: [5, 3, 3, 3, 1]
    dilations: [1, 2, 3, 4, 1]
    groups: [1, 1, 1, 1, 1]
    attention_channels: 128
    lin_neurons: 192
normalizer: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
modules:
    normalizer: !ref <normalizer>
    embedding_model: !ref <embedding_model>
""",
    "asks for !new:speechbrain.lobes.models.huggingface_transformers.wavlm.WavLM, which is no part": """
wav2vec2: !new:speechbrain.lobes.models.huggingface_transformers.wavlm.WavLM
    source: microsoft/wavlm-large
    save_path: wavlm_checkpoint
""",
}


@pytest.mark.parametrize("sentence", OF_OTHER_FORMS)
def test_a_published_folder_of_another_form_is_refused(sentence, tmp_path):
    (tmp_path / "hyperparams.yaml").write_text(OF_OTHER_FORMS[sentence])
    with pytest.raises(ValueError, match=sentence):
        SpeakerEncoder.from_hparams(tmp_path)


@pytest.mark.parametrize(
    ("part", "replacement", "sentence"),
    [
        ("block_sizes: [3, 4, 6, 3]", "block_sizes: [3, 4, 100000, 3]", "block_sizes can only be up to 64"),
        (
            "block_sizes: [3, 4, 6, 3]",
            "block_sizes: {0: 99999, 1: 4, 2: 6, 3: 3}",
            "block_sizes can only have up to 64",
        ),
        ("block_sizes: [3, 4, 6, 3]", "block_sizes: [3, 4, 6]", "cannot be built"),
        ("block_sizes: [3, 4, 6, 3]", "block_sizes: [3, 4, 6, 4]", "do not fit"),
        ("strides: [1, 2, 2, 2]", "strides: [0, 2, 2, 2]", "cannot be built"),
        ("strides: [1, 2, 2, 2]", "strides: [1, -2, -2, 2]", "does not embed"),
        ("channels: [4, 4, 8, 8]", "channels: [4, 4, 8, 100001]", "channels can only be up to 100000"),
        ("channels: [4, 4, 8, 8]", "channels: [4, 4, 8, 90000]", "do not fit"),
        ("ResNet.ResNet", "ResNet.SEBlock", "ResNet.SEBlock, which is no part"),
        ("ResNet.Classifier", "ResNet.BasicBlock", "ResNet.BasicBlock, which is no part"),
        ("lin_neurons: 12", "lin_neurons: 12\n    activation: !name:os.system", "os.system, which is no part"),
    ],
)
def test_a_resnet_that_asks_for_something_else_is_refused(part, replacement, sentence, tmp_path):
    publish(tmp_path, "resnet")
    text = (tmp_path / "hyperparams.yaml").read_text()
    assert part in text
    (tmp_path / "hyperparams.yaml").write_text(text.replace(part, replacement, 1))
    with pytest.raises(ValueError, match=sentence):
        SpeakerEncoder.from_hparams(tmp_path)


def test_the_full_size_recipes_are_the_published_models():
    """As many weights as SpeechBrain's VoxCeleb models have."""
    for kind, num_weights in (("ecapa", 20_767_552), ("xvector", 4_211_604)):
        modules = encoder_module._build_modules(training_wiring(RECIPE / "hparams" / f"{kind}.yaml"), kind, "meta")
        assert sum(p.numel() for p in modules["embedding_model"].parameters()) == num_weights


MODEL_IDS = {"ecapa": "6c2e1bb641c0c3a5", "xvect": "770790d95dc3ffed", "resnet": "b7aec74104c82781"}


@pytest.mark.parametrize("kind", MODEL_IDS)
def test_the_id_of_a_model_never_changes(kind):
    """Stores of voice profiles know their models by it."""
    plan = read_plan(PUBLISHED.format(folder="here", **PUBLISHED_KINDS[kind]), kind)
    wiring = {name: plan[name] for name in ("compute_features", "mean_var_norm", "embedding_model")}
    state = SpeakerEncoder(wiring).mods["embedding_model"].state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            numbers = torch.arange(tensor.numel()).reshape(tensor.shape)
            state[name] = (numbers % 7 + 1) / 8 if name.endswith("running_var") else (numbers % 7 - 3) / 64
    assert SpeakerEncoder(wiring, state).model_id == MODEL_IDS[kind]


def test_the_id_is_of_the_wiring_and_the_weights_alone(exported, tmp_path):
    folder, encoder, _ = exported
    assert len(encoder.model_id) == 16
    moved = shutil.copytree(folder, tmp_path / "under another name")
    (moved / "classifier.ckpt").unlink()
    (moved / "label_encoder.ckpt").unlink()
    assert SpeakerEncoder.from_hparams(moved).model_id == encoder.model_id

    state = torch.load(moved / "embedding_model.ckpt", weights_only=True)
    for name in state:
        if name.endswith("num_batches_tracked"):
            state[name] += 1  # changes no embedding
    torch.save(state, moved / "embedding_model.ckpt")
    assert SpeakerEncoder.from_hparams(moved).model_id == encoder.model_id
    state["fc.conv.bias"][0] += 1e-3
    torch.save(state, moved / "embedding_model.ckpt")
    assert SpeakerEncoder.from_hparams(moved).model_id != encoder.model_id

    other = shutil.copytree(folder, tmp_path / "other wiring")
    text = (other / "hyperparams.yaml").read_text()
    (other / "hyperparams.yaml").write_text(text.replace("hop_length: 10", "hop_length: 12"))
    assert SpeakerEncoder.from_hparams(other).model_id != encoder.model_id


def test_the_folder_of_a_run_holds_its_exported_model(exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / "exported")
    assert SpeakerEncoder.from_hparams(tmp_path).model_id == exported[1].model_id


@pytest.mark.parametrize(("rate", "channels", "form"), [(8000, 1, "WAV"), (44100, 2, "WAV"), (16000, 1, "FLAC")])
def test_a_recording_of_any_form_gives_nearly_the_same(rate, channels, form, tmp_path):
    encoder = small_encoder()
    samples = voice(np.random.default_rng(1), 2 * rate, 140, rate)
    expected = encoder.encode_batch(torch.from_numpy(voice(np.random.default_rng(1), 2 * RATE, 140, RATE))[None])[0]
    path = tmp_path / f"voice.{form.lower()}"
    soundfile.write(path, np.stack([samples] * channels, 1), rate, format=form)
    given = [path, path.read_bytes(), io.BytesIO(path.read_bytes()), (np.stack([samples] * channels, 1), rate)]
    for recording in given:
        embedding = encoder.encode_recording(recording)
        assert embedding.shape == (12,)
        assert torch.cosine_similarity(embedding, expected, dim=0) > 0.98


def test_samples_may_be_integers_or_a_tensor():
    encoder = small_encoder()
    samples = speech(1)
    in_16_bits = (samples * 2**15).round().astype(np.int16)
    samples = in_16_bits / np.float32(2**15)
    expected = encoder.encode_recording((samples, RATE))
    assert torch.equal(encoder.encode_recording((in_16_bits, RATE)), expected)
    tensor = torch.from_numpy(samples).requires_grad_()
    assert torch.equal(encoder.encode_recording((tensor, RATE)), expected)
    assert torch.equal(encoder.encode_recording((tensor.double(), RATE)), expected)
    half = tensor.bfloat16()  # which numpy does not know
    assert torch.equal(encoder.encode_recording((half, RATE)), encoder.encode_recording((half.float(), RATE)))
    without_sign = (in_16_bits.astype(np.int32) + 2**15).astype(np.uint16)  # as of files of 8 bits
    assert torch.allclose(encoder.encode_recording((without_sign, RATE)), expected, atol=1e-6)


def test_the_weights_are_a_copy():
    """Training may go on; the id stays that of the embeddings."""
    encoder = small_encoder()
    state = encoder.mods["embedding_model"].state_dict()
    again = SpeakerEncoder(encoder.wiring, state)
    wavs = torch.from_numpy(speech(0.5))[None]
    before = again.encode_batch(wavs)
    state["fc.conv.bias"] += 1
    assert torch.equal(again.encode_batch(wavs), before)


def test_a_long_recording_is_embedded_in_pieces():
    encoder = small_encoder()
    samples = np.concatenate([speech(40, 1), speech(40, 2), speech(40, 3)])  # two pieces of a minute
    pieces = [encoder.encode_batch(torch.from_numpy(half)[None])[0] for half in np.split(samples, 2)]
    assert torch.allclose(encoder.encode_recording((samples, RATE)), (pieces[0] + pieces[1]) / 2, atol=1e-5)


def test_silent_pieces_of_a_long_recording_do_not_count(tmp_path):
    encoder = small_encoder()
    silence = np.zeros(59 * RATE, np.float32)
    voices = [speech(59, seed) for seed in range(3)]
    expected = [encoder.encode_recording((samples, RATE)) for samples in voices]
    signals = [
        np.concatenate(pieces) for pieces in ((voices[0], silence), (silence, voices[1]), (voices[2], voices[2]))
    ]
    utterances = []
    for number, samples in enumerate(signals):
        assert torch.allclose(encoder.encode_recording((samples, RATE)), expected[number], atol=1e-5)
        soundfile.write(tmp_path / f"{number}.wav", samples, RATE, subtype="FLOAT")
        utterances.append(Utterance(f"u{number}", "s", str(tmp_path / f"{number}.wav"), 118.0))
    embeddings = encoder.encode_utterances(utterances, progressbar=False, batch_seconds=1000)  # all at once
    assert torch.allclose(embeddings, torch.stack(expected), atol=1e-5)
    drift = np.linspace(0, 3e-4, 118 * RATE, dtype=np.float32)  # no piece changes by more than 1.5e-4
    with pytest.raises(ValueError, match=r"^the recording is silent: there is no voice in it\.$"):
        encoder.encode_recording((drift, RATE))


@pytest.mark.parametrize(
    ("recording", "sentence"),
    [
        ((np.zeros(8000, np.float32), RATE), "^the recording is silent"),
        ((np.full(16000, 0.5, np.float32), RATE), "^the recording is silent"),
        ((np.full(88200, 0.5, np.float32), 44100), "^the recording is silent"),  # resampled, its ends ring
        ((speech(0.1), RATE), r"^the recording is too short: .* at least 0.25 s, but got 0.100 s"),
        ((np.full(8000, np.nan, np.float32), RATE), "^the recording holds samples that are NaN"),
        ((np.zeros((0,), np.float32), RATE), r"^the recording can only be samples .* got shape \[0\]"),
        ((np.zeros((2, 3, 4), np.float32), RATE), r"^the recording can only be samples .* got shape \[2, 3, 4\]"),
        ((speech(1), 0), "^the recording: its sample rate can only be 100 to 768000 Hz, but got 0"),
        ((speech(1), True), "but got True"),
        ((speech(1) + 1j, RATE), "^the recording can only hold integer or floating-point samples, but got complex"),
        ((speech(1) > 0, RATE), "^the recording can only hold integer or floating-point samples, but got bool"),
        ((torch.ones(RATE, dtype=torch.bool), RATE), "^the recording can only hold .* but got bool"),
        (([[0.1], [0.1, 0.2]], RATE), r"^the recording can only be given as \(samples, sample rate\)"),
        (("a", "b", "c"), r"^the recording can only be given as \(samples, sample rate\)"),
        (b"no audio", "^the recording cannot be read as audio"),
        (b"", "^the recording is empty"),
        ("no/such/file.wav", "^The audio file no/such/file.wav was not found"),
        (7, "A recording can only be"),
    ],
)
def test_what_is_no_voice_is_refused(recording, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_encoder().encode_recording(recording)


@pytest.mark.parametrize(
    ("wavs", "shares", "sentence"),
    [
        (torch.zeros(2, 3, 4), None, r"floating-point tensor \[B, T\], but got torch.float32 \[2, 3, 4\]"),
        (torch.zeros(2, 4000, dtype=torch.int16), None, "but got torch.int16"),
        ([1.0, 2.0], None, "but got list"),
        (torch.zeros(0, 4000), None, "must not be empty"),
        (torch.zeros(1, 100), None, "at least 0.25 s .2000 samples at 8000 Hz., but got 100"),
        (torch.zeros(2, 4000), torch.tensor([1.0, 0.1]), "but got 400 samples"),
        (torch.zeros(2, 4000), torch.tensor([1.0, 1.5]), "shares above 0 up to 1"),
        (torch.zeros(2, 4000), torch.ones(3), r"can only be \[2\] shares"),
        (torch.full((2, 4000), float("nan")), None, "Item 0 of the batch gives no finite embedding"),
    ],
)
def test_a_batch_that_is_none_is_refused(wavs, shares, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_encoder().encode_batch(wavs, shares)


def write_utterances(folder, lengths):
    utterances = []
    for number, seconds in enumerate(lengths):
        path = folder / f"{number}.wav"
        soundfile.write(path, speech(seconds, seed=number), RATE, subtype="FLOAT")
        utterances.append(Utterance(f"u{number}", f"s{number % 2}", str(path), seconds))
    return utterances


@pytest.mark.parametrize("batch_seconds", [0.1, 1.5, 60])
def test_utterances_keep_their_order(batch_seconds, tmp_path):
    encoder = small_encoder()
    utterances = write_utterances(tmp_path, [0.8, 0.4, 0.8, 70.0, 0.5, 0.8])
    utterances.append(Utterance("part", "s0", utterances[3].path, 0.6, start_s=1.0))
    embeddings = encoder.encode_utterances(utterances, progressbar=False, batch_seconds=batch_seconds)
    assert embeddings.shape == (7, 12)
    for row, utterance in enumerate(utterances[:-1]):
        assert torch.allclose(embeddings[row], encoder.encode_recording(utterance.path), atol=1e-5)
    part = speech(70.0, seed=3)[RATE : RATE + 4800]
    assert torch.allclose(embeddings[-1], encoder.encode_batch(torch.from_numpy(part)[None])[0], atol=1e-5)
    assert encoder.encode_utterances([], progressbar=False).shape == (0, 12)


def test_embeddings_can_be_learned_from(tmp_path):
    """Tensors of inference mode could not."""
    layer = torch.nn.Linear(12, 3)
    encoder = small_encoder()
    wavs = torch.from_numpy(speech(0.5))[None]
    utterances = write_utterances(tmp_path, [0.5])
    for embeddings in (encoder.encode_batch(wavs), encoder.encode_utterances(utterances, progressbar=False)):
        layer(embeddings).sum().backward()
        assert layer.weight.grad is not None


def test_a_silent_utterance_is_named(tmp_path):
    utterances = write_utterances(tmp_path, [0.5, 0.5])
    soundfile.write(utterances[1].path, np.zeros(4000), RATE)
    with pytest.raises(ValueError, match=r"1.wav \(u1\) is silent"):
        small_encoder().encode_utterances(utterances, progressbar=False)


def test_an_utterance_without_a_finite_embedding_is_named(tmp_path):
    utterances = write_utterances(tmp_path, [0.5, 0.5, 0.4])
    soundfile.write(utterances[1].path, speech(0.5) * 1e25, RATE, subtype="FLOAT")  # its energy is infinite
    with pytest.raises(ValueError, match=r"1.wav \(u1\) gives no finite embedding"):
        small_encoder().encode_utterances(utterances, progressbar=False)


# What a folder may not ask for, by what is replaced in its YAML.
HOSTILE = [
    ("!new:speechbrain.lobes.features.Fbank", "!new:os.system", "os.system"),
    ("!new:speechbrain.lobes.features.Fbank", "!apply:os.system", "tag !apply:os.system is not allowed"),
    ("!new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN", "!new:subprocess.Popen", "subprocess.Popen"),
    ("!new:speechbrain.dataio.preprocess.AudioNormalizer", "!new:pathlib.Path", "pathlib.Path, which is no part"),
    ("!new:speechbrain.dataio.preprocess.AudioNormalizer", "!name:torch.load", "torch.load, which is no part"),
    ("!new:speechbrain.dataio.preprocess.AudioNormalizer", "!module:os", "tag !module:os is not allowed"),
    ("sample_rate: !ref <sample_rate>", "sample_rate: !include:/etc/passwd", "!include:/etc/passwd is not allowed"),
    ("\nsample_rate: 8000", "\nsample_rate: !!python/object/apply:os.getcwd []", "is not allowed"),
    ("\nsample_rate: 8000", "\nsample_rate: 16000", "sample_rate is 16000, but its features are of 8000 Hz"),
    ("  sample_rate: 8000", "  sample_rate: 0.5", "sample_rate can only be a whole number of 1000 to 768000 Hz"),
    ("channels: [16, 16, 16, 16, 24]", "channels: [90000, 90000, 90000, 90000, 90000]", "do not fit"),
    ("channels: [16, 16, 16, 16, 24]", "channels: [9000000, 16, 16, 16, 24]", "channels can only be up to 100000"),
    ("channels: [16, 16, 16, 16, 24]", f"channels: [{', '.join(['16'] * 500)}]", "can only have up to 64 values"),
    ("channels: [16, 16, 16, 16, 24]", "channels: many", "cannot be built"),
    ("lin_neurons: 12", "lin_neurons: 13", "do not fit"),
    ("lin_neurons: 12", "lin_neurons: 12\n  activation: !name:os.system", "os.system, which is no part"),
    ("lin_neurons: 12", "lin_neurons: 12\n  activation: os.system", "activation can only be one of"),
    ("lin_neurons: 12", "lin_neurons: 12\n  activation: torch.nn.ReLU", "activation can only be one of"),
    ("lin_neurons: 12", "lin_neurons: 12\n  activation: !new:torch.nn.ReLU {}", "torch.nn.ReLU, which is no part"),
    ("!new:speechbrain.dataio.preprocess.AudioNormalizer", "!new:torch.nn.ReLU", "torch.nn.ReLU, which is no part"),
    ("lin_neurons: 12", "lin_neurons: 12\n  unheard_of: 1", "unheard_of"),
    ("n_mels: 24", "n_mels: 100000", "n_mels can only be up to 512"),
    ("n_mels: 24", "n_mels: 25", "does not embed"),
    ("n_fft: 256", "n_fft: 100000", "n_fft can only be up to 16384"),
    ("hop_length: 10", "hop_length: 0.00001", "does not embed"),
    ("hop_length: 10", "hop_length: .nan", "hop_length can only be up to"),
    ("hop_length: 10", "hop_length: 10\n  requires_grad: true", "can only have fixed filters"),
    ("norm_type: sentence", "norm_type: global", "norm_type sentence, but got 'global'"),
    ("embedding_model: !new", "embedding_model: {}\nmodel: !new", "embedding_model can only be"),
]


@pytest.mark.parametrize(("part", "replacement", "sentence"), HOSTILE)
def test_a_folder_that_asks_for_something_else_is_refused(part, replacement, sentence, exported, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "hostile")
    text = (folder / "hyperparams.yaml").read_text()
    assert part in text
    (folder / "hyperparams.yaml").write_text(text.replace(part, replacement, 1))
    with pytest.raises(ValueError, match=sentence):
        SpeakerEncoder.from_hparams(folder)


def test_an_alias_bomb_is_refused(exported, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "hostile")
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 20))
    (folder / "hyperparams.yaml").write_text(bomb + (folder / "hyperparams.yaml").read_text())
    with pytest.raises(ValueError, match="too long for a model's wiring"):
        SpeakerEncoder.from_hparams(folder)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("here_the_payload_was_run",)


@pytest.mark.parametrize("name", ["embedding_model.ckpt", "classifier.ckpt"])
def test_a_pickle_is_not_unpickled(name, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(exported[0], tmp_path / "hostile")
    torch.save({"weight": Payload()}, folder / name)
    with pytest.raises(ValueError, match=f"{name} is no checkpoint of weights alone"):
        SpeakerEncoder.from_hparams(folder)
    assert not (tmp_path / "here_the_payload_was_run").exists()


@pytest.mark.parametrize("name", ["hyperparams.yaml", "embedding_model.ckpt", "classifier.ckpt"])
def test_a_pipe_is_not_waited_for(name, exported, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "hostile")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=name):
        SpeakerEncoder.from_hparams(folder)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').mkdir('x') => 0\n",
        "'a' + 'b' => 0\n",
        "'a' => 0\n'b' => 2\n",
        "'a' => -1\n",
        "[[['a']]] => 0\n",
        "(" * 100_000 + " => 0\n",
        "'a\n",
        "\0",
        "'\0' => 0\n",
        "\udcff",
        "\n" * (2**21 + 1),
        None,  # a pipe, which is not waited for
    ],
    ids=lambda text: repr(text)[:20],
)
def test_another_list_of_speakers_is_left_unread(text, exported, tmp_path, monkeypatch):
    """Nothing of it is run, and the embeddings do not need it."""
    monkeypatch.chdir(tmp_path)
    folder, encoder, _ = export(tmp_path / "hostile", num_speakers=1)
    labels = folder / "label_encoder.ckpt"
    if text is None:
        labels.unlink()
        os.mkfifo(labels)
    else:
        labels.write_text(text, errors="surrogateescape")
    loaded = SpeakerEncoder.from_hparams(folder)
    assert (loaded.speakers, loaded.model_id) == (None, encoder.model_id)
    assert loaded.classifier_weight.shape == (1, 12)
    assert os.listdir(tmp_path) == ["hostile"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("fc.conv.bias"), "lacks fc.conv.bias"),
        (lambda state: state.update(more=torch.zeros(1)), "holds more"),
        (lambda state: state["fc.conv.bias"].fill_(float("nan")), "NaN or infinite, first in fc.conv.bias"),
        (lambda state: state.update({"fc.conv.bias": torch.zeros(12, dtype=torch.int64)}), "fc.conv.bias can only be"),
        (lambda state: state.update({"fc.conv.bias": torch.zeros(1).expand(10**9)}), "fc.conv.bias"),
        (
            lambda state: state.update({"asp_bn.norm.num_batches_tracked": torch.zeros(10**6, dtype=torch.int64)}),
            "num_batches_tracked",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, sentence, exported, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "hostile")
    state = torch.load(folder / "embedding_model.ckpt", weights_only=True)
    change(state)
    torch.save(state, folder / "embedding_model.ckpt")
    with pytest.raises(ValueError, match=sentence) as fault:
        SpeakerEncoder.from_hparams(folder)
    assert "hostile" in str(fault.value)


@pytest.mark.parametrize("name", ["hyperparams.yaml", "embedding_model.ckpt"])
def test_a_missing_file_is_named(name, exported, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name):
        SpeakerEncoder.from_hparams(folder)


def test_a_folder_without_classifier_or_names_is_enough(exported, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "copy")
    (folder / "label_encoder.ckpt").write_text("'only one' => 0\n")  # of something else
    assert SpeakerEncoder.from_hparams(folder).speakers is None
    (folder / "classifier.ckpt").unlink()
    encoder = SpeakerEncoder.from_hparams(folder)
    assert encoder.classifier_weight is None
    assert encoder.model_id == exported[1].model_id


def test_names_of_any_characters_come_back(tmp_path):
    encoder = small_encoder()
    names = ["Ada\u00a0L", "\u200bBo", "Zo\u00eb \U0001f600", "\x7f\\'\"\n", "\U000e0001", "\U00100000"]
    folder = export_encoder(
        tmp_path / "exported", encoder.wiring, encoder.mods["embedding_model"], torch.randn(len(names), 12), names
    )
    assert SpeakerEncoder.from_hparams(folder).speakers == names


def test_a_folder_of_something_else_is_not_replaced(exported, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        export(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_an_export_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    folder, encoder, _ = export(tmp_path / "exported")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoder_module.torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        export(tmp_path / "exported", seed=1)
    monkeypatch.undo()
    assert SpeakerEncoder.from_hparams(folder).model_id == encoder.model_id
    assert os.listdir(tmp_path) == ["exported"]


def test_options_that_do_not_fit_the_trained_model_are_refused(tmp_path):
    trained = small_encoder("xvector")
    for overrides, sentence in ((SMALL.replace("16", "18"), "do not fit"), (SMALL, None)):
        other = training_wiring(RECIPE / "hparams" / "xvector.yaml", overrides)
        if sentence is None:  # of the same weights, but another network
            other["embedding_model"].arguments["activation"] = Plan("!name:torch.nn.ReLU", {})
            sentence = "embeddings differ"
        with pytest.raises(ValueError, match=sentence):
            export_encoder(tmp_path / "exported", other, trained.mods["embedding_model"])
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("device", ["meta", "no such device"])
def test_a_device_that_does_not_compute_is_refused(device, exported):
    with pytest.raises(ValueError, match="device can only be one"):
        SpeakerEncoder.from_hparams(exported[0], run_opts={"device": device})


def test_a_name_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no/such/folder was not found"):
        SpeakerEncoder.from_hparams("no/such/folder")


def test_the_shortest_voice_gives_an_embedding():
    for kind in KINDS:
        assert small_encoder(kind).encode_recording((speech(MIN_SECONDS), RATE)).isfinite().all()
