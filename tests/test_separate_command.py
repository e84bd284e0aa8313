"""Tests of python -m dsd_modules.separate: which recordings, where their voices go, and what becomes of each."""

import argparse
import contextlib
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import REPOSITORY
from separate_run import Separator
from test_inference import speech_like
from test_model_folder import make_export

from dsd_modules import separate
from dsd_modules.inference import SepformerDSDSeparation
from dsd_modules.separate import find_model, plan_outputs
from shared_modules import errors
from shared_modules.errors import RunError
from shared_modules.recording_files import find_recordings

RUN = [sys.executable, str(Path(__file__).parent / "separate_run.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def write(path, seconds=1.0, sample_rate=8000, channels=1, level=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = level * np.random.default_rng(0).standard_normal((int(seconds * sample_rate), channels))
    soundfile.write(path, samples, sample_rate)
    return path


def tree(folder):
    """The files of a folder and of all in it, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if not path.is_dir())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fake(monkeypatch):
    """The separator that the command line finds, instead of a model's."""
    separator = Separator()
    monkeypatch.setattr(separate, "_load", lambda model, arguments: separator)
    return separator


@pytest.fixture
def run(fake, capsys):
    """The command line in this process: its exit code, and the lines on stdout (less the model's) and stderr."""

    def run(*arguments, code=0):
        assert separate.main([*map(str, arguments), "--model", "some/model"]) == code
        out, err = capsys.readouterr()
        lines = out.splitlines()
        if lines and lines[0] == "model: some/model":
            lines = lines[1:]
        return lines, err.splitlines()

    return run


# Which recordings


def test_folders_are_searched(here):
    for name in ("b.wav", "a.FLAC", "sub dir/été.ogg", "sub dir/deep/c.mp3", ".hidden/x.wav", "folder.wav/d.wav"):
        write(here / "day" / name)
    for name in (".b.wav.7.tmp", "._b.wav", "notes.txt", "wav", "b.wav.bak", "e.raw"):
        (here / "day" / name).write_text("x")
    found, notes = find_recordings(["day", "./day/b.wav"], Path("out"))
    names = ["a.FLAC", "b.wav", "folder.wav/d.wav", "sub dir/été.ogg", "sub dir/deep/c.mp3"]
    assert [str(path) for path, _ in found] == [*(f"day/{name}" for name in names), "day/b.wav"]
    assert [str(folder) for _, folder in found] == [".", ".", "folder.wav", "sub dir", "sub dir/deep", "."]
    assert notes == []


def test_links_are_followed_once(here):
    write(here / "data" / "a.wav")
    write(here / "elsewhere" / "b.wav")
    (here / "data" / "far").symlink_to(here / "elsewhere")
    (here / "data" / "loop").symlink_to(here / "data")
    (here / "data" / "c.wav").symlink_to(here / "elsewhere" / "b.wav")
    (here / "data" / "broken.wav").symlink_to("nowhere.wav")
    (here / "link").symlink_to("data")
    found, _ = find_recordings(["link"], Path("out"))
    assert [str(path) for path, _ in found] == ["link/a.wav", "link/broken.wav", "link/c.wav", "link/far/b.wav"]


def test_voices_of_earlier_runs_are_no_recordings(here):
    for name in ("a.wav", "b_spk1.wav", "out/a_spk1.wav", "out/sub/a_spk2.wav", "out/other.wav", "outer/a_spk1.wav"):
        write(here / "day" / name)
    found, notes = find_recordings(["day"], here / "day" / "out")
    assert [str(path) for path, _ in found] == ["day/a.wav", "day/b_spk1.wav", "day/out/other.wav",
                                                "day/outer/a_spk1.wav"]  # fmt: skip
    assert notes == ["left out day/out/a_spk1.wav, day/out/sub/a_spk2.wav: voices of earlier runs"]
    found, notes = find_recordings(["day"], Path("day"))
    assert [str(path) for path, _ in found] == ["day/a.wav", "day/out/other.wav"]
    assert notes[0].startswith("left out day/b_spk1.wav, day/out/a_spk1.wav, day/out/sub/a_spk2.wav and 1 more: ")


def test_formats_that_cannot_be_read_are_named(here):
    write(here / "day" / "a.wav")
    for name in "bcde":
        (here / "day" / f"{name}.m4a").write_text("")
    found, notes = find_recordings(["day"], Path("out"))
    assert len(found) == 1
    assert notes == ["left out day/b.m4a, day/c.m4a, day/d.m4a and 1 more: no format that soundfile reads; "
                     "ffmpeg makes wav files of them"]  # fmt: skip


# Where the voices go


def places(*sources, output="out"):
    tasks = plan_outputs(find_recordings(list(sources), Path(output))[0], Path(output))
    return {task.name: str(task.folder / task.stem) for task in tasks}


def test_places(here):
    for name in ("day/a.wav", "day/b.c.flac", "day/sub/a.wav", "-x.wav"):
        write(here / name)
    assert places("day", "-x.wav", "missing.wav") == {
        "day/a.wav": "out/a",
        "day/b.c.flac": "out/b.c",
        "day/sub/a.wav": "out/sub/a",
        "-x.wav": "out/-x",
        "missing.wav": "out/missing",
    }
    assert places("-", "-") == {"stdin": "out/stdin"}


def test_one_name_and_several_endings(here):
    for name in ("day/a.wav", "day/a.flac", "day/a.b.wav"):
        write(here / name)
    assert places("day") == {"day/a.b.wav": "out/a.b", "day/a.flac": "out/a.flac", "day/a.wav": "out/a.wav"}
    write(here / "day/a.wav.ogg")  # whose stem is what distinguishes another
    with pytest.raises(RunError, match=r"day/a.wav and day/a.wav.ogg would both be written to out/a.wav_spk1.wav"):
        places("day")


def test_a_recording_given_twice_is_separated_once(here):
    write(here / "day/a.wav")
    assert list(places("day/a.wav", "./day/../day/a.wav", str(here / "day/a.wav"), "day")) == ["day/a.wav"]


@pytest.mark.parametrize("sources", [["x/a.wav", "y/a.wav"], ["x", "y"], ["x", "y/a.wav"]])
def test_the_same_name_from_two_folders(here, sources):
    write(here / "x/a.wav")
    write(here / "y/a.wav")
    with pytest.raises(RunError, match=r"x/a.wav and y/a.wav would both be written to out/a.wav_spk1.wav: separate"):
        places(*sources)
    assert places(".") == {"x/a.wav": "out/x/a", "y/a.wav": "out/y/a"}


def test_a_recording_is_never_replaced_by_a_voice(here):
    write(here / "day/a.wav")
    write(here / "day/a_spk1.wav")
    (here / "link.wav").symlink_to("day/a_spk1.wav")
    with pytest.raises(RunError, match=r"day/a_spk1.wav would be replaced by a voice of day/a.wav: leave it out"):
        places("day/a.wav", "day/a_spk1.wav", output="day")
    with pytest.raises(RunError, match=r"link.wav would be replaced by a voice of day/a.wav"):
        places("link.wav", "day/a.wav", output="day/../day")
    assert len(places("day/a.wav", "day/a_spk1.wav", output="out")) == 2
    assert places("day", output="day") == {"day/a.wav": "day/a"}


# Which model


def test_the_newest_model_is_taken(tmp_path):
    with pytest.raises(RunError, match=r"no model here yet: .*make demo.* --model, .*sepformer-libri2mix"):
        find_model(checkout=tmp_path)
    for age, name in enumerate(("new", "old/seed", "older")):
        folder = tmp_path / "recipes" / "LibriMix" / "separation" / "results" / name / "exported"
        folder.mkdir(parents=True)
        (folder / "hyperparams.yaml").write_text("")
        os.utime(folder / "hyperparams.yaml", (1e9 - age, 1e9 - age))
    incomplete = tmp_path / "recipes/LibriMix/separation/results/newest/.exported.7.tmp"
    incomplete.mkdir(parents=True)
    (incomplete / "hyperparams.yaml").write_text("")
    newest = tmp_path / "recipes/LibriMix/separation/results/new/exported"
    assert find_model(checkout=tmp_path) == str(newest)
    assert find_model(str(newest.parent)) == str(newest.parent)
    assert find_model("owner/name@main") == "owner/name@main"


# The command line


def test_a_folder(here, run, fake):
    write(here / "day/meeting.wav", 12.3, 44100, 2)
    for suffix in ("flac", "ogg", "mp3"):
        write(here / f"day/sub dir/été-{suffix}.{suffix}", 1, 16000)
    out, err = run("day", "-o", "v")
    assert err == []
    assert out == [
        "day/meeting.wav               12.3 s  2 voices  in 0.50 s  real-time factor 0.041  blocks 2.0 -> v/",
        "day/sub dir/été-flac.flac      1.0 s  2 voices  in 0.50 s  real-time factor 0.500  blocks 2.0 -> v/sub dir/",
        "day/sub dir/été-mp3.mp3        1.0 s  2 voices  in 0.50 s  real-time factor 0.500  blocks 2.0 -> v/sub dir/",
        "day/sub dir/été-ogg.ogg        1.0 s  2 voices  in 0.50 s  real-time factor 0.500  blocks 2.0 -> v/sub dir/",
        "4 recordings: 4 separated",
    ]
    assert tree("v") == sorted(
        f"{name}_spk{i}.wav"
        for name in ("meeting", "sub dir/été-flac", "sub dir/été-mp3", "sub dir/été-ogg")
        for i in (1, 2)
    )
    assert fake.options == {"channel": None, "sample_rate": None, "num_blocks": None, "exit_si_sdr_db": None}


def test_options(here, run, fake):
    write(here / "a.wav", channels=3)
    options = {"--blocks": 1, "--exit_si_sdr_db": 20.5, "--channel": 3, "--sample_rate": 44100}
    out, _ = run("a.wav", *(part for option in options.items() for part in option))
    assert fake.options == {"channel": 3, "sample_rate": 44100, "num_blocks": 1, "exit_si_sdr_db": 20.5}
    assert len(out) == 1  # no count of a single recording
    assert tree("out") == ["a_spk1.wav", "a_spk2.wav"]
    run("a.wav", "--sample_rate", "file", "--overwrite")
    assert fake.options["sample_rate"] == "file"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RECORDING"),
        (["a.wav", "--blocks", "0"], "--blocks: can only be a whole number from 1, but got '0'"),
        (["a.wav", "--jobs", "two"], "--jobs: can only be a whole number from 1, but got 'two'"),
        (["a.wav", "--channel", "-1"], "--channel: can only be a whole number from 1, but got '-1'"),
        (["a.wav", "--sample_rate", "8k"], "--sample_rate: can only be file or a whole number of Hz, but got '8k'"),
        (["a.wav", "--exit_si_sdr_db", "x"], "--exit_si_sdr_db: invalid float value: 'x'"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        separate.main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_nothing_can_be_done(here, run, monkeypatch):
    (here / "empty").mkdir()
    write(here / "a.wav")
    assert run("empty", code=2)[1] == ["error: There is no recording in empty."]
    assert run("", code=2)[1] == ["error: The name of a recording can only be a path, but got an empty one."]
    assert run("a.wav", "-o", "a.wav", code=2)[1] == ["error: The voices go to a folder, but a.wav is a file."]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "use one of them" in run("a.wav", "--jobs", "2", code=2)[1][0]
    assert tree(here) == ["a.wav"]


def test_a_bad_file_and_the_rest(here, run):
    for name in ("a.wav", "z.wav"):
        write(here / "day" / name)
    for name, content in (("broken.wav", "no audio"), ("empty.wav", ""), ("bug.wav", ""), ("memory.wav", "")):
        (here / "day" / name).write_text(content)
    os.mkfifo(here / "day" / "fifo.wav")
    (here / "day" / "gone.wav").symlink_to("nowhere")
    out, err = run("missing.wav", "day", code=1)
    assert [line.split()[0] for line in out] == ["day/a.wav", "day/z.wav", "9"]
    assert out[-1] == "9 recordings: 2 separated, 7 failed"
    assert err == [
        "error: The audio file missing.wav was not found.",
        "error: day/broken.wav cannot be read as audio: Format not recognised.",
        "error: day/bug.wav: TypeError: a bug",
        "error: day/empty.wav is empty: it has no bytes.",
        "error: day/fifo.wav is not a regular file; open it and give the file object.",
        "error: The audio file day/gone.wav was not found.",
        "error: day/memory.wav: MemoryError",
    ]
    assert tree("out") == ["a_spk1.wav", "a_spk2.wav", "z_spk1.wav", "z_spk2.wav"]


def test_voices_are_replaced_on_request_only(here, run, fake):
    write(here / "a.wav", 1)
    fake.num_spks = 3
    run("a.wav")
    fake.num_spks = 2
    write(here / "a.wav", 2)
    write(here / "b.wav", 2)
    out, err = run("a.wav", "b.wav", code=1)
    assert err == ["skipped: a.wav: out/a_spk1.wav is there already; --overwrite replaces it"]
    assert out[-1] == "2 recordings: 1 separated, 1 skipped"
    assert soundfile.info("out/a_spk1.wav").frames == 8000
    out, err = run("a.wav", "b.wav", "--overwrite")
    assert err == []
    assert out[0].endswith("-> out/  (older: out/a_spk3.wav)")
    assert soundfile.info("out/a_spk1.wav").frames == 16000


def test_folders_that_cannot_be_written(here, run, monkeypatch):
    write(here / "a.wav")
    (here / "out" / "a_spk2.wav").mkdir(parents=True)
    _, err = run("a.wav", "--overwrite", code=1)
    assert err == ["error: a.wav: out/a_spk2.wav: A folder stands where a voice is to be written"]
    assert tree("out") == []


def test_names_are_printed_on_one_line(here, run):
    name = os.fsdecode(b"a\n\xff\x1b[31m.wav")
    write(here / "day" / "x.wav").rename(here / "day" / name)
    (here / "day" / "b\n.wav").write_text("")
    out, err = run("day", code=1)
    assert out[0].startswith("day/a\\n\\udcff\\x1b[31m.wav")
    assert err == ["error: day/b\\n.wav is empty: it has no bytes."]
    assert len(tree("out")) == 2


# The program


def program(*arguments, code=0, command=RUN, **options):
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model of three speakers, in the folder of a run."""
    return make_export(tmp_path_factory.mktemp("run") / "exported", num_spks=3).parent


def real(*arguments, **options):
    """The command as a user types it."""
    return program(*arguments, command=[sys.executable, "-m", "dsd_modules.separate"], **options)


def test_help_tells_all():
    out, _ = real("--help", cwd=REPOSITORY)
    text = "\n".join(out)
    options = ("--blocks", "--exit_si_sdr_db", "--channel", "--sample_rate", "--device", "--overwrite", "--jobs")
    assert all(text.count(option) for option in (*options, "--model", "exit codes:", "examples:", "torchrun"))


def test_recordings_of_a_user(here, model, capsys):
    """Stereo at 44.1 kHz, silence, mp3, flac, ogg, odd names and a broken file, with a real model."""
    stereo = speech_like(2 * 44100, 44100)
    for name, samples, sample_rate in (
        ("-meeting 1.wav", stereo, 44100),
        ("silence.wav", np.zeros(4000), 8000),
        ("会議.flac", speech_like(8000)[:, 0], 16000),
        ("talk.mp3", stereo[:44100], 44100),
        ("talk.ogg", stereo[:44100, 0], 44100),
    ):
        soundfile.write(here / name, samples, sample_rate)
    (here / "broken.wav").write_text("no audio")
    out, err = real("--model", model, "--blocks", 1, "--", ".", code=1)
    assert err == ["error: broken.wav cannot be read as audio: Format not recognised."]
    assert out[0] == f"model: {model}"
    assert out[-1] == "6 recordings: 5 separated, 1 failed"
    assert all("  3 voices  in " in line and line.endswith("  blocks 1.0 -> out/") for line in (out[1], out[3], out[4]))
    stems = ("-meeting 1", "silence", "会議", "talk.mp3", "talk.ogg")
    assert tree("out") == sorted(f"{stem}_spk{i}.wav" for stem in stems for i in (1, 2, 3))
    assert soundfile.info("out/-meeting 1_spk3.wav").frames == 16000
    assert any(soundfile.read(f"out/-meeting 1_spk{i}.wav")[0].any() for i in (1, 2, 3))
    assert not soundfile.read("out/silence_spk2.wav")[0].any()
    before = {name: (here / "out" / name).read_bytes() for name in tree("out")}
    assert separate.main(["--model", str(model), "silence.wav"]) == 1
    assert "skipped: silence.wav: out/silence_spk1.wav is there already" in capsys.readouterr().err
    assert before == {name: (here / "out" / name).read_bytes() for name in tree("out")}
    options = ["--model", str(model), "--overwrite", "--sample_rate", "file", "--channel", "2"]
    assert separate.main([*options, "--", "-meeting 1.wav"]) == 0
    assert soundfile.info("out/-meeting 1_spk3.wav").samplerate == 44100
    assert soundfile.info("out/-meeting 1_spk3.wav").frames == 2 * 44100


def test_what_the_model_cannot_do_is_said_once(here, model, capsys):
    write(here / "a.wav")
    write(here / "b.wav")
    for options, message in (
        (["--model", model, "--blocks", 3], "num_blocks"),
        (["--model", model, "--exit_si_sdr_db", 20], "exit_si_sdr_db"),
        (["--model", model, "--device", "tpu9"], "device can only be one of this machine, but got 'tpu9'"),
        (["--model", "no/such/model"], "no/such/model"),
    ):
        assert separate.main(["a.wav", "b.wav", *map(str, options)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err
    assert tree(here) == ["a.wav", "b.wav"]


@pytest.mark.parametrize(
    ("device", "has_gpu", "local_rank", "expected"),
    [
        (None, False, None, "cpu"),
        (None, True, None, "cuda"),
        (None, True, "3", "cuda:3"),
        ("cuda", True, "1", "cuda:1"),
        ("cuda:0", True, "1", "cuda:0"),
        ("cpu", True, "1", "cpu"),
    ],
)
def test_device(monkeypatch, device, has_gpu, local_rank, expected):
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(SepformerDSDSeparation, "from_hparams", lambda source, run_opts: given.append(run_opts))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    separate._load("x", argparse.Namespace(device=device, precision="fp32", blocks=None, exit_si_sdr_db=None))
    assert given == [{"device": expected, "precision": "fp32"}]


def test_standard_input(here):
    content = write(here / "a.wav").read_bytes()
    for _ in range(2):  # a pipe
        done = subprocess.run([*RUN, "-", "--overwrite", "--model", "x"], input=content, capture_output=True)
        assert done.returncode == 0, done.stderr
    with open(here / "a.wav", "rb") as stream:  # a file
        program("-", "--overwrite", "--model", "x", stdin=stream)
    assert tree("out") == ["stdin_spk1.wav", "stdin_spk2.wav"]
    assert soundfile.info("out/stdin_spk1.wav").frames == 8000
    done = subprocess.run(
        [*RUN, "-", "--model", "x", "--overwrite"], input=b"no audio", capture_output=True, text=False
    )
    assert done.returncode == 1
    assert done.stderr.decode().strip() == "error: <stdin> cannot be read as audio: Format not recognised."
    assert "cannot be shared" in program("-", "--jobs", 2, "--model", "x", code=2, stdin=subprocess.DEVNULL)[1][0]


def test_processes(here):
    for number in range(7):
        write(here / "day" / f"{number}.wav", 0.1)
    (here / "day" / "broken.wav").write_text("")
    out, err = program("day", "--jobs", 3, "--model", "x", code=1)
    assert sorted(line.split()[0] for line in out[1:-1]) == [f"day/{number}.wav" for number in range(7)]
    assert out[-1] == "8 recordings: 7 separated, 1 failed"
    assert err == ["error: day/broken.wav is empty: it has no bytes."]
    assert len(tree("out")) == 14
    assert program("day", "--jobs", 3, "--model", "wrong", code=2)[1] == ["error: The model is wrong."]


def test_a_process_that_is_killed_takes_only_its_recording_with_it(here):
    for name in ("killed_1", "a", "b", "c"):
        write(here / "day" / f"{name}.wav", 0.1)
    out, err = program("day", "--jobs", 2, "--model", "x", code=1)
    assert err == ["error: day/killed_1.wav: its process was ended by SIGKILL; out of memory? Fewer --jobs need less"]
    assert out[-1] == "4 recordings: 3 separated, 1 failed"
    for name in ("killed_2", "killed_3", "x"):
        write(here / "both" / f"{name}.wav", 0.1)
    out, err = program("both", "--jobs", 2, "--model", "x", code=1)
    assert sorted(err)[-1] == "error: both/x.wav: all processes had ended"
    assert out[-1] == "3 recordings: 3 failed"


def test_ranks(here):
    """torchrun ends all ranks once one fails: the one with the broken file waits for the others."""
    for number in range(5):
        write(here / "day" / f"{number}.wav", 0.1)
    (here / "day" / "1.wav").write_text("")
    command = [*TORCHRUN, RUN[1]]
    done = subprocess.run([*command, "day", "--model", "x"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "error: day/1.wav is empty: it has no bytes" in done.stderr
    lines = done.stdout.splitlines()
    assert sorted(line.split()[0] for line in lines) == [
        "5",
        *(f"day/{number}.wav" for number in (0, 2, 3, 4)),
        "model:",
    ]
    assert "5 recordings: 4 separated, 1 failed" in lines
    assert len(tree("out")) == 8


def test_ranks_without_torchrun(here):
    """As a cluster's scheduler may start them: each does its part."""
    for number in range(3):
        write(here / "day" / f"{number}.wav", 0.1)
    for rank, names in ((0, ["0", "2"]), (1, ["1"])):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
        out, _ = program("day", "--model", "x", env=environment)
        assert [line.split()[0] for line in out if line.startswith("day/")] == [f"day/{name}.wav" for name in names]
    assert len(tree("out")) == 6


def begun(folder, names):
    """Wait until a program is in the middle of some recordings."""
    for _ in range(6000):
        if all((folder / f"{name}.begun").exists() for name in names):
            break
        time.sleep(0.1)
    for name in names:
        (folder / f"{name}.begun").unlink()


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_program_that_is_ended_leaves_no_part_of_a_voice(here, jobs, sent, code):
    names = [f"slow_{number}" for number in range(jobs)]
    for name in names:
        write(here / f"{name}.wav", 3)
    command = [*RUN, *(f"{name}.wav" for name in names), "--model", "x", "--jobs", str(jobs)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    # Tests that a shell runs in the background inherit that SIGINT is ignored.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **options) as process:
        begun(here / "out", names)
        assert len(tree("out")) == 2 * jobs
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)  # as a terminal does
        else:
            process.send_signal(sent)
        assert process.wait(300) == code
        if sent == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sent)  # the other processes, which would go on with their recording
        err = process.stderr.read().decode().splitlines()
    assert err == (["interrupted"] if sent == signal.SIGINT else [])
    assert [path for path in tree("out") if not path.startswith(".")] == []
    if sent == signal.SIGKILL:  # what it left is removed by the next run
        program(*command[2:], env={**os.environ, "SLOW_SECONDS": "0"})
        begun(here / "out", names)
        assert tree("out") == [f"{name}_spk{i}.wav" for name in names for i in (1, 2)]
    else:
        assert tree("out") == []


def test_full_disk(here):
    write(here / "long.wav", 10)
    write(here / "short.wav", 0.5)
    limit = (20000, resource.RLIM_INFINITY)
    _, err = program("long.wav", "short.wav", "--model", "x", code=1,
                     preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))  # fmt: skip
    assert err == ["error: long.wav: out/long_spk1.wav: File too large"]
    assert tree("out") == ["short_spk1.wav", "short_spk2.wav"]


@pytest.mark.parametrize(("rank", "size"), [("5", "2"), ("5", None), ("x", "2"), ("0", "none"), ("-1", "2")])
def test_ranks_that_cannot_be(monkeypatch, capsys, rank, size):
    """Nothing may be left out without a word."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size) if size else monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert separate.main(["a.wav"]) == 2
    assert "RANK can only be 0 to WORLD_SIZE - 1" in capsys.readouterr().err


def test_another_rank_than_the_main_one_waits_and_says_its_number(here, monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(errors.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (here / "empty").mkdir()
    assert separate.main(["empty"]) == 2
    assert capsys.readouterr().err == "error (rank 1): There is no recording in empty.\n"
    assert waits == [5]


def test_names_that_are_too_long(here, model, capsys):
    name = 300 * "a"
    assert separate.main([name, "--model", str(model)]) == 1
    assert "File name too long" in capsys.readouterr().err
    for options in (["-o", name], ["--model", name]):
        assert separate.main(["x.wav", "--model", str(model), *options]) in (1, 2)
        assert "too long" in (error := capsys.readouterr().err) or "was not found" in error


def test_nobody_reads_on(here, model):
    """As with ``| head -0``: no traceback."""
    soundfile.write(here / "a.wav", speech_like(800), 8000)
    command = shlex.join([sys.executable, "-m", "dsd_modules.separate", "a.wav", "--model", str(model)]) + " | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, check=True, text=True)
    assert "Traceback" not in result.stderr
