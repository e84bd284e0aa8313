"""Voice profiles from the command line: ``python -m nessa_modules.recognize identify talk.wav --model FOLDER``."""

import argparse
import contextlib
import json
import os
import signal
import sys
import unicodedata
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from dsd_modules.separate import find_model
from shared_modules.errors import RunError
from shared_modules.recording_files import find_recordings
from shared_modules.terminal import SecondsBar, leave, positive, printable, write_line

# What needs seconds to import (torch, SpeechBrain) waits until the command line was read.

_EPILOG = """\
examples:
  python -m nessa_modules.recognize calibrate dev.csv --model old/exported
  python -m nessa_modules.recognize enroll Ada ada1.wav ada2.flac --model old/exported
  python -m nessa_modules.recognize verify Ada call.wav --model old/exported
  python -m nessa_modules.recognize identify calls/ --model old/exported --json
  python -m nessa_modules.recognize migrate --alignment old-to-new --model new/exported
  python -m nessa_modules.recognize identify meeting.wav --mixture --alignment old-to-new --model new/exported
  python -m nessa_modules.recognize remove Ada

A model is a folder of a training run, its exported folder, or a name on the Hugging Face hub. Recordings may be of any
format that soundfile reads and of any sample rate, folders of them, or - for standard input. The store is one file,
which its owner alone can read; no audio is kept in it. COMMAND --help tells more.

exit codes: 0 all was done, and verify accepted every recording; 1 verify rejected one; 2 something could not be done:
each fault is named on standard error, and the other recordings are still done; 130 interrupted.
"""
_NOTED_SHARE = 0.1  # of strangers who are taken for somebody
_RATE_HELP = (
    "use the threshold that this share of comparisons with other people's recordings reached on the development set "
    "(default: the store's, which is 0.01 unless it was made with another). The rate is that of one comparison: among "
    "N profiles, a stranger is taken for somebody up to N times as often"
)


def main(argv=None):
    """The command line.

    Arguments
    ---------
    argv : list of str, optional
        None: the arguments of the command.

    Returns
    -------
    int
        The exit code, see ``--help``.

    Example
    -------
    >>> main(["list", "--store", "no/such/file"])
    2
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if getattr(arguments, "separator", None) is not None and not arguments.mixture:
        parser.error("--separator can only be given with --mixture")
    try:
        return arguments.command(arguments)
    except BrokenPipeError:  # nobody reads on, as with `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (RunError, ValueError, OSError) as error:
        _say_fault(error)
        return 2


# The commands


def _enroll(arguments):
    recordings = _recordings(arguments.recordings)
    profiles = _open(arguments)
    profiles.enroll(arguments.name, [recording for _, recording in recordings], add=arguments.add)
    count = f"{len(recordings)} {'more ' if arguments.add else ''}recording{'s' if len(recordings) > 1 else ''}"
    _tell(
        arguments,
        {"store": str(arguments.store), "name": arguments.name, "recordings": len(recordings)},
        f"{arguments.name} is enrolled with {count}",
    )
    return 0


def _verify(arguments):
    recordings, profiles = _recordings(arguments.recordings), _open(arguments, must_exist=True, name=arguments.name)

    def verify(recording):
        result = profiles.verify(arguments.name, recording, arguments.false_accept_rate)
        shown = "accepted as" if result.accepted else "rejected as"
        line = f"{shown} {result.name}: score {result.score:.3f}, threshold {result.threshold:.3f}"
        return [({}, asdict(result), line)], result.accepted

    return _for_each(arguments, recordings, verify)


def _identify(arguments):
    recordings, profiles = _recordings(arguments.recordings), _open(arguments, must_exist=True)
    separator = _load_separator(arguments) if arguments.mixture else None
    named = None  # the last result that names somebody

    def told(result):
        nonlocal named
        named = result if result.name is not None else named
        return asdict(result), _identified_line(result)

    def identify(recording):
        if separator is None:
            result = profiles.identify(recording, arguments.candidates, arguments.false_accept_rate)
            return [({}, *told(result))], True
        with SecondsBar("separated", delay=1, leave=False, disable=None) as bar:
            voices = profiles.identify_mixture(
                recording, separator, arguments.candidates, arguments.false_accept_rate, bar.progress
            )
        found = []
        for voice in voices:
            level = f"{voice.level_db:.0f} dB" if voice.level_db > float("-inf") else "nothing in it"
            known, line = {"name": None, "candidates": []}, f"silent ({level})"
            if not voice.is_silent:
                known, line = told(voice.identification)
            found.append(({"voice": voice.number}, {**known, "is_silent": voice.is_silent}, line))
        return found, True

    code = _for_each(arguments, recordings, identify)
    if named is not None:
        _note_many_profiles(named)
    return code


def _remove(arguments):
    profiles = _open(arguments, must_exist=True)
    known = set(profiles.names())
    names = [name for name in dict.fromkeys(arguments.names) if name in known]
    for name in dict.fromkeys(arguments.names):
        if name not in known:
            _say_fault(f"There is no profile {name!r} in {arguments.store}.")
    if names:
        profiles.remove(*names)
        for name in names:
            _tell(arguments, {"store": str(arguments.store), "removed": name}, f"{name} is removed")
    return 0 if len(names) == len(set(arguments.names)) else 2


def _list(arguments):
    known = _open(arguments, must_exist=True).describe()
    if arguments.json:
        print(json.dumps(known, ensure_ascii=False))
        return 0
    if known["alignment_id"] is None:
        print(f"model:     {known['runtime_model_id']}")
    else:
        print(f"models:    {known['enroll_model_id']} enrolls, {known['runtime_model_id']} recognises")
        print(f"alignment: {known['alignment_id']}")
    thresholds = [
        f"{entry['threshold']:.3f} at {entry['false_accept_rate']:g}"
        + (" (the default)" if entry["false_accept_rate"] == known["false_accept_rate"] else "")
        for entry in known["calibration"]
    ]
    print(f"threshold: {', '.join(thresholds) or 'none yet: use calibrate'}")
    print(f"profiles:  {len(known['profiles'])}")
    width = min(40, max((len(printable(profile["name"])) for profile in known["profiles"]), default=0))
    for profile in known["profiles"]:
        count = f"{profile['recordings']} recording{'s' if profile['recordings'] > 1 else ''}"
        print(f"  {printable(profile['name']):<{width}}  {count:<14}  model {', '.join(profile['models'])}")
    return 0


def _migrate(arguments):
    from nessa_modules.profiles import VoiceProfiles

    if arguments.alignment is None and arguments.model is None:
        raise RunError("migrate needs --alignment, or --model alone where that model has made all profiles.")
    profiles = VoiceProfiles(arguments.store, must_exist=True)
    before = profiles.describe()
    alignment, encoder = _load_alignment(arguments), None
    if arguments.model is not None:
        encoder = _load_encoder(arguments.model, arguments.device)
    is_changed = profiles.migrate(alignment, encoder, false_accept_rate=arguments.false_accept_rate)
    known = profiles.describe()
    count, model = len(known["profiles"]), known["runtime_model_id"]
    line = f"{count} profile{'s' if count != 1 else ''} moved: recordings are recognised with model {model} from now on"
    lines = [line]
    if known["calibration"]:
        old, new = (_threshold_text(store) for store in (before, known))
        lines += [
            f"threshold: {old}, now {new}: that of the alignment's development speakers; to be sure of the rate, use "
            "calibrate with recordings like yours",
            _default(known["false_accept_rate"]),
        ]
    if not is_changed:
        lines = [f"nothing changed: {arguments.store} has these models and this alignment already"]
    known = {field: known[field] for field in ("runtime_model_id", "alignment_id", "false_accept_rate", "calibration")}
    _tell(arguments, {"store": str(arguments.store), **known, "is_changed": is_changed}, *lines)
    if not known["calibration"]:
        print("note: there is no threshold yet: use calibrate", file=sys.stderr)
    return 0


def _calibrate(arguments):
    from nessa_modules.corpora import read_corpus
    from nessa_modules.profiles import VoiceProfiles
    from nessa_modules.trials import SameSpace, calibrate_thresholds, make_trials

    utterances = read_corpus(arguments.corpus, segment_seconds=arguments.segment_seconds)
    trials = make_trials(utterances, num_enroll=arguments.num_enroll)
    alignment = _load_alignment(arguments)
    recogniser = enroller = _load_encoder(arguments.model, arguments.device)
    if arguments.enroll_model is not None:
        enroller = _load_encoder(arguments.enroll_model, arguments.device)
    expected = recogniser.model_id if alignment is None else alignment.enroll_model_id
    if enroller.model_id != expected:
        raise RunError(
            f"Profiles are to be made by model {expected}, but got {enroller.model_id}: give it with --enroll_model."
        )
    profiles = VoiceProfiles(arguments.store, (enroller, recogniser), alignment)
    progressbar = sys.stderr.isatty()
    embeddings = recogniser.encode_utterances(utterances, progressbar)
    of_profiles = embeddings if enroller is recogniser else enroller.encode_utterances(utterances, progressbar)
    scores = trials.scores(alignment or SameSpace(), of_profiles, embeddings)
    rows = calibrate_thresholds(scores, trials.labels, sorted({*arguments.rates, arguments.false_accept_rate} - {None}))
    if not rows:
        raise RunError(f"{arguments.corpus} has too few recordings for any threshold.")
    profiles.set_calibration(rows, arguments.false_accept_rate)
    rate = profiles.describe()["false_accept_rate"]
    count = int((~trials.labels).sum())
    lines = [
        f"  {row['threshold']:.3f} at a false-accept rate of {row['false_accept_rate']:g}, which rejects "
        f"{100 * row['false_reject_rate']:.1f} % of the true speakers' recordings"
        for row in rows
    ]
    known = {"store": str(arguments.store), "comparisons": count, "calibration": rows, "false_accept_rate": rate}
    _tell(arguments, known, f"thresholds from {count} comparisons of different speakers:", *lines, _default(rate))
    return 0


# What they share


def _for_each(arguments, recordings, recognise):
    """Recognise each recording and tell what came of it, whatever becomes of the others; the exit code."""
    is_each_done = is_each_accepted = True
    bar = tqdm(recordings, desc="recordings", leave=False, disable=None if len(recordings) > 1 else True)
    for name, recording in bar:
        try:
            found, is_accepted = recognise(recording)
            is_each_accepted &= is_accepted
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # the rest is still to be done
            is_each_done = False
            fault = _fault(error)
            fault = fault if name in fault else f"{name}: {fault}"
            write_line(f"error: {printable(fault)}", sys.stderr)
            if arguments.json:
                write_line(json.dumps({"recording": name, "error": fault}, ensure_ascii=False))
            continue
        for part, known, line in found:
            if arguments.json:
                write_line(json.dumps({"recording": name, **part, **known}, ensure_ascii=False))
            else:
                voice = f", voice {part['voice']}" if part else ""
                write_line(printable(f"{name}{voice}: {line}"))
    return 2 if not is_each_done else 0 if is_each_accepted else 1


def _identified_line(result):
    scores = [f"{candidate.name} {candidate.score:.3f}" for candidate in result.candidates]
    if not scores:
        return "nobody known: there are no profiles"
    if result.name is None:
        return f"nobody known: threshold {result.threshold:.3f}; best are {', '.join(scores)}"
    others = f"; next are {', '.join(scores[1:])}" if scores[1:] else ""
    return f"{result.name}: score {result.candidates[0].score:.3f}, threshold {result.threshold:.3f}{others}"


def _note_many_profiles(result):
    """Say that one of many profiles is reached more often than the false-accept rate tells."""
    share = result.num_profiles * result.false_accept_rate
    if result.num_profiles > 1 and share >= _NOTED_SHARE:
        print(
            f"note: among {result.num_profiles} profiles, at a false-accept rate of {result.false_accept_rate:g} for "
            f"each, up to {100 * min(share, 1):.0f} % of strangers' recordings are taken for somebody: a lower "
            "--false_accept_rate makes it fewer",
            file=sys.stderr,
        )


def _recordings(sources):
    """Each recording's name and what is read: a path, or the bytes of standard input."""
    found, notes = find_recordings(sources, Path(os.devnull))
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    if not found:
        raise RunError(f"There is no recording in {', '.join(sources)}.")
    if any(path is None for path, _ in found) and sys.stdin.isatty():
        raise RunError("- takes the recording from standard input, but that is the terminal.")
    return [("stdin", sys.stdin.buffer.read()) if path is None else (str(path), str(path)) for path, _ in found]


def _open(arguments, must_exist=False, name=None):
    """The store, with the models that were given; a name: of a profile that it must have."""
    from nessa_modules.profiles import VoiceProfiles

    profiles = VoiceProfiles(arguments.store, must_exist=must_exist)  # its faults are told before a model is loaded
    if name is not None and name not in profiles:
        raise RunError(f"There is no profile {name!r} in {arguments.store}.")
    if getattr(arguments, "model", None) is None:
        return profiles
    profiles.close()
    alignment = _load_alignment(arguments)
    encoder = _load_encoder(arguments.model, arguments.device)
    rate = arguments.false_accept_rate
    return VoiceProfiles(arguments.store, encoder, alignment, false_accept_rate=rate, must_exist=must_exist)


def _load_alignment(arguments):
    if arguments.alignment is None:
        return None
    from nessa_modules.alignment import load_alignment

    return load_alignment(arguments.alignment)


def _load_encoder(source, device):
    from nessa_modules.encoder import SpeakerEncoder

    return SpeakerEncoder.from_hparams(source, run_opts={"device": _device(device)})


def _load_separator(arguments):
    from dsd_modules.inference import SepformerDSDSeparation

    try:
        model = find_model(arguments.separator)
    except RunError:  # whose sentence names another option
        raise RunError(
            "There is no separator here yet: give one with --separator, the folder of an exported model or a name on "
            "the Hugging Face hub such as speechbrain/sepformer-libri2mix."
        ) from None
    if arguments.separator is None:
        print(f"separator: {printable(model)}", file=sys.stderr)
    return SepformerDSDSeparation.from_hparams(model, run_opts={"device": _device(arguments.device)})


def _device(device):
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _threshold_text(store):
    thresholds = {entry["false_accept_rate"]: entry["threshold"] for entry in store["calibration"]}
    threshold = thresholds.get(store["false_accept_rate"])
    return "none" if threshold is None else f"{threshold:.3f}"


def _default(rate):
    return f"the threshold at {rate:g} counts, unless --false_accept_rate says otherwise"


def _tell(arguments, known, *lines):
    print(json.dumps(known, ensure_ascii=False) if arguments.json else "\n".join(map(printable, lines)))


def _say_fault(error):
    print(f"error: {printable(_fault(error))}", file=sys.stderr)


def _fault(error):
    """One sentence."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, RuntimeError | MemoryError):  # out of memory, or a bug
        return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
    return str(error)


def _name(text):
    """A name as the store keeps it."""
    return unicodedata.normalize("NFC", text)


def _share(text):
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"can only be above 0 and below 1, but got {text!r}")


def _seconds(text):
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"can only be a positive number of seconds, but got {text!r}")


def _parser():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m nessa_modules.recognize",
        description="Enroll people by their voice, and tell whose a recording is.",
        epilog=_EPILOG,
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    store = argparse.ArgumentParser(add_help=False)
    store.add_argument(
        "--store", type=Path, default=Path("voices.db"), metavar="FILE", help="the profiles (default: voices.db)"
    )
    store.add_argument("--json", action="store_true", help="print an object per line, for programs")

    def models(needs_model, help="of the store's models, the one that is to be used"):
        options = argparse.ArgumentParser(add_help=False)
        options.add_argument("--model", required=needs_model, metavar="FOLDER", help=help)
        options.add_argument("--alignment", metavar="FOLDER", help="alignment of the store's two models, if it has two")
        options.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
        options.add_argument("--false_accept_rate", type=_share, metavar="R", help=_RATE_HELP)
        return options

    def add(name, command, help, parents, description=None):
        added = commands.add_parser(
            name, help=help, description=description or f"{help[0].upper()}{help[1:]}.", parents=[store, *parents]
        )
        added.set_defaults(command=command)
        return added

    recordings = argparse.ArgumentParser(add_help=False)
    recordings.add_argument(
        "recordings", nargs="+", metavar="RECORDING", help="audio files, folders of them, or - for standard input"
    )
    person = argparse.ArgumentParser(add_help=False)
    person.add_argument("name", type=_name, metavar="NAME", help="of the person")

    enroll = add(
        "enroll",
        _enroll,
        "make a profile from recordings of one person",
        [person, recordings, models(True)],
        "Make a profile from recordings of one person: from all of them, or if one cannot be used from none. The first "
        "one creates the store.",
    )
    enroll.add_argument("--add", action="store_true", help="add the recordings to a profile that is there already")
    add(
        "verify",
        _verify,
        "tell whether recordings are of a person",
        [person, recordings, models(True)],
        "Tell whether recordings are of a person. Exit code 0: all are accepted; 1: one is not; 2: a fault.",
    )
    identify = add(
        "identify", _identify, "tell whose recordings are, or that it is nobody known", [recordings, models(True)]
    )
    identify.add_argument("--mixture", action="store_true", help="several speak at once: separate, and name each voice")
    identify.add_argument(
        "--separator", metavar="FOLDER", help="for --mixture: model that separates (default: this checkout's newest)"
    )
    identify.add_argument("--candidates", type=positive, default=5, metavar="N", help="how many are told (default: 5)")
    remove = add(
        "remove",
        _remove,
        "forget people, without a trace in the file",
        [],
        "Forget people. The whole file is written anew, so that nothing of them is left in it: name many at once.",
    )
    remove.add_argument("names", nargs="+", type=_name, metavar="NAME", help="of a person")
    add("list", _list, "show the models, thresholds and profiles of a store", [])
    add(
        "migrate",
        _migrate,
        "move a store to another runtime model, without audio",
        [
            models(
                False, "the new runtime model, to see that it is the alignment's; or alone, one that made all profiles"
            )
        ],
        "Move a store to another runtime model, without audio: its profiles are compared through the alignment from "
        "then on. Its thresholds become the alignment's.",
    )
    calibrate = add(
        "calibrate",
        _calibrate,
        "set the thresholds of a store from a development set",
        [models(True, "the model that recognises")],
        "Set the thresholds from recordings of people that no model was trained on: each one's profile is compared "
        "with the recordings of the others.",
    )
    calibrate.add_argument(
        "corpus", metavar="CORPUS", help="csv (id, speaker, path), or folder in VoxCeleb's or LibriSpeech's layout"
    )
    calibrate.add_argument(
        "--enroll_model", metavar="FOLDER", help="with --alignment: the model that makes profiles (default: --model)"
    )
    calibrate.add_argument(
        "--num_enroll", type=positive, default=3, metavar="N", help="recordings of a profile (default: 3)"
    )
    calibrate.add_argument(
        "--segment_seconds", type=_seconds, metavar="S", help="cut longer recordings into pieces of at least S seconds"
    )
    calibrate.add_argument(
        "--rates",
        type=_share,
        nargs="+",
        default=(0.001, 0.01, 0.05),
        metavar="R",
        help="false-accept rates (default: 0.001 0.01 0.05); those with too few comparisons for them are left out",
    )
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)  # as an exception, so that nothing half done is left
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
