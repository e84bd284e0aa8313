"""Tests of ``python -m dsd_modules.export``: ONNX, the card, and the way to the hub and back, by a stand-in for it."""

import os
import shutil
import socket
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import yaml
from hub_stand_in import TOKEN, is_large, running_hub
from test_model_folder import CONVTASNET, make_export, make_other_export

from dsd_modules import export
from dsd_modules.inference import SepformerDSDSeparation

# Whatever the machine has set: nothing stands between a program and the stand-in.
DIRECT = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""}
MODEL_FILES = ["decoder.ckpt", "encoder.ckpt", "hyperparams.yaml", "masknet.ckpt"]

# Whatever asks for another address than loopback ends the program.
ONLY_LOOPBACK = """
import os
import socket

connect = socket.socket.connect

def connect_to_loopback(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost"):
        os.write(2, f"a connection to {address}".encode())
        os._exit(99)
    return connect(self, address)

socket.socket.connect = connect_to_loopback
"""


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def near_hub(hub, monkeypatch, tmp_path):
    """The stand-in is the hub of this process, and alice is logged in."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, value in {**DIRECT, "HF_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, value)
    return hub


def environment(hub, folder, **changes):
    """Of a program whose hub is the stand-in, and which reaches nothing else."""
    (folder / "only_loopback").mkdir(exist_ok=True)
    (folder / "only_loopback" / "sitecustomize.py").write_text(ONLY_LOOPBACK)
    switches = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK"), "1")
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(folder / "only_loopback")}
    return {**os.environ, **DIRECT, **switches, **places, "HF_TOKEN": TOKEN, **changes}


def run(command, **options):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fails(capsys, *command):
    """The sentence with which the command ends."""
    with pytest.raises(SystemExit) as stop:
        export.main([str(part) for part in command])
    capsys.readouterr()
    return stop.value.code


# To the hub and back


LOAD = """
import sys
import torch
from huggingface_hub import snapshot_download
from dsd_modules.inference import SepformerDSDSeparation

torch.set_num_threads(1)  # as here: the estimates are to be the same bit by bit
separator = SepformerDSDSeparation.from_hparams("alice/voices")
torch.save(separator.separate_batch(torch.load("mixture.pt")), "estimates.pt")
print(snapshot_download("alice/voices"))
"""


def test_what_is_sent_comes_back(hub, tmp_path):
    """With ONNX and the card, byte by byte, and nothing that lies beside the model."""
    widths = {**CONVTASNET, "num_blocks": 1, "num_conv_layers": 1}
    exported = make_other_export(tmp_path / "run" / "exported", "convtasnet", **widths)
    (tmp_path / "run" / "history.csv").write_text("epoch,valid_si_sdri\n1,2.0\n")
    (exported / "notes.txt").write_text("private")
    (exported / ".README.md.123.tmp").write_text("half")
    env = environment(hub, tmp_path)
    options = ["--onnx", "--longest_seconds", "0.2", "--licence", "cc-by-4.0", "--push_to_hub", "alice/voices"]
    sent = run(["-m", "dsd_modules.export", str(tmp_path / "run"), *options], env=env)
    assert sent.returncode == 0, sent.stderr
    assert "making " in sent.stdout
    assert "separator_blocks1.onnx" in sent.stdout
    assert sent.stdout.splitlines()[-1] == f"{hub.url}/alice/voices"
    assert "masknet.ckpt: 100%" in sent.stderr  # progress

    here = contents(exported)
    model = hub.models["alice/voices"]
    assert sorted(model["files"]) == ["README.md", *MODEL_FILES, "separator_blocks1.onnx"]
    assert all(here[name] == content for name, content in model["files"].items())
    assert set(hub.large_files.values()) == {here[name] for name in model["files"] if is_large(name)}
    assert sum(request.startswith("POST") and "/commit/" in request for request in hub.requests) == 1
    assert not model["private"]
    card = here["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "cc-by-4.0"
    assert 'source = "alice/voices"' in card
    assert "trained for 1 epoch" not in card  # the run's options are not there to tell of them
    assert "## ONNX" in card

    mixture = torch.randn(2, 1003)
    torch.save(mixture, tmp_path / "mixture.pt")
    loaded = run(["-c", LOAD], env=env, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    estimates = SepformerDSDSeparation.from_hparams(exported).separate_batch(mixture)
    assert torch.equal(torch.load(tmp_path / "estimates.pt"), estimates)
    snapshot = loaded.stdout.splitlines()[-1]
    assert {name: (tmp_path / snapshot / name).read_bytes() for name in os.listdir(snapshot)} == model["files"]


def test_sent_again_it_replaces_the_model(near_hub, tmp_path, capsys):
    """Also the ONNX of an earlier one goes, which has other weights."""
    exported = make_export(tmp_path / "exported")
    (exported / "separator_blocks1.onnx").write_bytes(b"one")
    (exported / "separator_blocks2.onnx").write_bytes(b"two")
    export.main([str(exported), "--push_to_hub", "alice/voices"])
    near_hub.models["alice/voices"]["files"]["figure.png"] = b"added by hand"
    make_export(exported, seed=1)
    export.main([str(exported), "--push_to_hub", "alice/voices", "--licence", "mit"])
    files = near_hub.models["alice/voices"]["files"]
    assert sorted(files) == sorted(["README.md", *MODEL_FILES, "figure.png"])
    assert files["masknet.ckpt"] == (exported / "masknet.ckpt").read_bytes()
    assert capsys.readouterr().out.splitlines()[-1] == f"{near_hub.url}/alice/voices"


def test_a_model_from_the_hub_is_put_where_it_is_wanted(near_hub, tmp_path):
    exported = make_export(tmp_path / "exported")
    export.main([str(exported), "--push_to_hub", "alice/voices"])
    mixture = torch.randn(1, 4000)
    estimates = SepformerDSDSeparation.from_hparams("alice/voices", savedir=tmp_path / "saved").separate_batch(mixture)
    assert torch.equal(estimates, SepformerDSDSeparation.from_hparams(exported).separate_batch(mixture))
    for name in MODEL_FILES:
        (kept,) = (tmp_path / "saved").rglob(name)
        assert kept.read_bytes() == (exported / name).read_bytes()
    assert not list((tmp_path / "cache").rglob("*.ckpt"))
    for name in ("alice/voises", "alice/voices@v2"):  # not the one that is there
        with pytest.raises(ValueError, match="was not found"):
            SepformerDSDSeparation.from_hparams(name, savedir=tmp_path / "saved")
    near_hub.models.clear()  # a folder here needs no hub
    SepformerDSDSeparation.from_hparams(exported, savedir=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_private_model(near_hub, tmp_path, capsys):
    exported = make_export(tmp_path / "exported")
    export.main([str(exported), "--push_to_hub", "alice/secret", "--private"])
    assert near_hub.models["alice/secret"]["private"]
    export.main([str(exported), "--push_to_hub", "alice/open"])
    near_hub.models["alice/open"]["files"].clear()
    sentence = fails(capsys, exported, "--push_to_hub", "alice/open", "--private")
    assert sentence == "error: --private cannot be had: alice/open is on the hub already, and public."
    assert near_hub.models["alice/open"]["files"] == {}


def test_faults_of_the_hub_are_sentences(near_hub, tmp_path, capsys, monkeypatch):
    exported = make_export(tmp_path / "exported")
    export.main([str(exported)])
    before = contents(exported)
    push = (exported, "--push_to_hub", "alice/voices")
    refused = "error: The hub refused"
    sentence = fails(capsys, exported, "--push_to_hub", "bob/voices")
    assert sentence == f"{refused} bob/voices: You don't have the rights to create a model under this namespace"
    near_hub.refuse_large_files = True
    assert fails(capsys, *push) == f"{refused} alice/voices: Private repository storage limit reached"
    assert near_hub.models["alice/voices"]["files"] == {}  # nor a part of it
    monkeypatch.setenv("HF_TOKEN", "hf_of_yesterday")
    assert "it does not know the token; log in with `hf auth login`" in fails(capsys, *push)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        sentence = fails(capsys, *push)
    assert sentence.startswith("error: The hub could not be reached, or broke off, and has no new model: ")
    assert "\n" not in sentence
    assert contents(exported) == before  # also the card


def test_without_a_token_nothing_is_asked(near_hub, tmp_path, capsys, monkeypatch):
    exported = make_export(tmp_path / "exported")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    sentence = fails(capsys, exported, "--push_to_hub", "alice/voices")
    assert sentence == "error: --push_to_hub needs a token of the hub: log in with `hf auth login`, or set HF_TOKEN."
    assert near_hub.requests == []
    assert sorted(contents(exported)) == MODEL_FILES


@pytest.mark.parametrize("name", ["voices", "alice/my voices", "alice/voices/2", "alice/..", "/voices", "", "alice/-v"])
def test_a_name_that_is_none(near_hub, tmp_path, capsys, name):
    exported = make_export(tmp_path / "exported")
    sentence = fails(capsys, exported, "--push_to_hub", name)
    assert sentence.startswith("error: --push_to_hub can only be OWNER/NAME of letters")
    assert sentence.endswith(f"but got {name!r}.")
    assert near_hub.requests == []


# The command


def test_a_run_and_its_exported_folder_are_the_same_model(tmp_path, capsys):
    exported = make_export(tmp_path / "run" / "exported")
    assert export.find_exported(tmp_path / "run") == (exported, None)
    (tmp_path / "run" / "history.csv").write_text("epoch,valid_si_sdri\n1,2.0\n")
    assert export.find_exported(tmp_path / "run") == (exported, tmp_path / "run")
    assert export.find_exported(exported) == (exported, tmp_path / "run")
    shutil.copytree(exported, tmp_path / "run" / "of_another_run")
    assert export.find_exported(tmp_path / "run" / "of_another_run") == (tmp_path / "run" / "of_another_run", None)
    export.main([str(tmp_path / "run")])
    assert sorted(contents(exported)) == ["README.md", *MODEL_FILES]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["README.md", *MODEL_FILES, str(exported)]


def test_a_card_that_is_there_stays(tmp_path):
    exported = make_export(tmp_path / "exported")
    export.main([str(exported)])
    card = exported / "README.md"
    card.write_text(card.read_text() + "\nWhat the trainer adds.\n")
    before = card.read_text()
    export.main([str(exported)])
    assert card.read_text() == before
    export.main([str(exported), "--license", "apache-2.0"])
    assert card.read_text() == before.replace("license: unknown", "license: apache-2.0")


def test_mistakes_are_sentences(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert fails(capsys, tmp_path / "empty") == (
        f"error: {tmp_path / 'empty'} holds no trained model: expected the folder of a run that was tested, or an "
        "exported one."
    )
    assert fails(capsys, tmp_path / "none") == f"error: The folder {tmp_path / 'none'} was not found."
    exported = make_export(tmp_path / "exported")
    before = contents(exported)
    assert "A licence can only be an identifier" in fails(capsys, exported, "--licence", "my own")
    assert fails(capsys, exported, "--private") == 2
    assert fails(capsys, exported, "--onnx", "--longest_seconds", "-1") == 2
    (exported / "masknet.ckpt").write_bytes(b"broken")
    assert "masknet.ckpt is no checkpoint" in fails(capsys, exported, "--onnx")
    assert contents(exported) == {**before, "masknet.ckpt": b"broken"}


def test_an_interrupted_export(tmp_path, capsys, monkeypatch):
    exported = make_export(tmp_path / "exported")

    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "read_model", interrupt)
    with pytest.raises(SystemExit) as stop:
        export.main([str(exported)])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


# At the end of a run


def test_a_run_ends_with_its_card(run_recipe, librimix, tmp_path):
    output = tmp_path / "run"
    run_recipe(data_folder=librimix, output_folder=output, number_of_epochs=1, seed=3)
    text = (output / "exported" / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---")[1])
    mean = (output / "test_results.csv").read_text().splitlines()[-1].split(",")
    columns = (output / "test_results.csv").read_text().splitlines()[0].split(",")
    si_sdri = float(mean[columns.index("si_sdri")])
    assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(si_sdri, abs=0.0051)
    assert f"| test set | 5 | {si_sdri:.2f} |" in text
    assert "trained for 1 epoch." in text
    assert "| `seed` | 3 |" in text
    assert "Mixtures: training 24 (" in text
    assert str(tmp_path) not in text
    assert str(librimix) not in text

    run_recipe(data_folder=librimix, output_folder=output, number_of_epochs=1, seed=3, test_only=None, test_block=1)
    text = (output / "exported" / "README.md").read_text(encoding="utf-8")
    assert "| test set, block 1 | 5 |" in text
