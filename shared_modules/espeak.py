"""One espeak-ng voice in one fresh process.

espeak-ng's output depends on the calls made before in the same process, and on the clock, from which it seeds
its noise. So each voice is synthesised by running this file as a script: a fresh interpreter, a fixed seed, one
fixed order of calls, the same bytes every time. The script needs the standard library only, which keeps its
start-up at some hundredths of a second.
"""

import contextlib
import ctypes
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

# From espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_VOLUME_PERCENT = 40  # at 100, the default, several voices clip
_CHARS_UTF8 = 1


@dataclass(frozen=True)
class Voice:
    """What makes one synthetic speaker.

    Arguments
    ---------
    language : str
        espeak-ng's name of the language or accent, e.g. ``en-us``.
    variant : str
        File name of the voice variant in espeak-ng's ``voices/!v``, e.g. ``m3``.
    rate : int
        Words per minute (espeak-ng's default: 175).
    pitch : int
        Base pitch, 0 to 100 (50 is the variant's own).
    pitch_range : int
        Liveliness of the pitch, 0 (monotone) to 100 (50 is the variant's own).

    Example
    -------
    >>> Voice("en-us", "m3", rate=170, pitch=45, pitch_range=60).variant
    'm3'
    """

    language: str
    variant: str
    rate: int
    pitch: int
    pitch_range: int


def installed_paths():
    """Where the package ``espeakng-loader`` keeps the library and the voice data.

    Returns
    -------
    library : Path
        The shared library.
    data : Path
        The folder ``espeak-ng-data``.

    Raises
    ------
    ValueError
        If the package is not installed.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise ValueError(
            "Synthetic speech needs the package espeakng-loader: pip install dsd-separation[generate]"
        ) from error
    return Path(espeakng_loader.get_library_path()), Path(espeakng_loader.get_data_path())


@contextlib.contextmanager
def own_variants(variants, language=None):
    """Voice data in a temporary folder, with voice variants of one's own in place of espeak-ng's.

    Arguments
    ---------
    variants : dict
        From the file name of a variant to its text, in espeak-ng's format of voice files. espeak-ng finds no language
        any more where there are some hundreds.
    language : str, optional
        Only this language's dictionary is linked, e.g. ``en``, which is faster. None: all.

    Yields
    ------
    Path
        The folder ``espeak-ng-data``, made of links to the installed one, for :func:`synthesize`.

    Raises
    ------
    ValueError
        If espeak-ng is not installed.

    Example
    -------
    >>> with own_variants({"ann": "language variant\\nname ann\\npitch 180 240\\n"}) as data:
    ...     sample_rate, (speech,) = synthesize(Voice("en-us", "ann", 170, 45, 60), ["Good morning."], data)
    >>> 0.5 < len(speech) / 2 / sample_rate < 2
    True
    """
    _, installed = installed_paths()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / installed.name
        (data / "voices" / "!v").mkdir(parents=True)
        for entry in installed.iterdir():
            is_needed = language is None or not entry.name.endswith("_dict") or entry.name == f"{language}_dict"
            if is_needed and entry.name != "voices":
                (data / entry.name).symlink_to(entry.resolve())
        for name, text in variants.items():
            (data / "voices" / "!v" / name).write_text(text, encoding="utf-8")
        yield data


def synthesize(voice, sentences, data=None):
    """Speaks sentences with one voice, in a process of its own.

    Arguments
    ---------
    voice : Voice or list of Voice
        The speaker; or one for each sentence: the same language and variant, at a rate, pitch and range of its own.
    sentences : list of str
        What to say, in order. The order is part of the result: see the module's docstring.
    data : Path, optional
        Voice data with variants of one's own: see :func:`own_variants`. None: the installed ones.

    Returns
    -------
    sample_rate : int
        In Hz.
    utterances : list of bytes
        16-bit mono PCM of each sentence, in the byte order of the machine.

    Raises
    ------
    ValueError
        If espeak-ng is not installed, or fails, the voices differ in more than they may, or there is nothing to say.

    Example
    -------
    >>> sample_rate, (speech,) = synthesize(Voice("en-us", "m3", 170, 45, 60), ["Good morning."])
    >>> sample_rate, 0.5 < len(speech) / 2 / sample_rate < 2
    (22050, True)
    """
    library, installed = installed_paths()
    voices = [voice] * len(sentences) if isinstance(voice, Voice) else list(voice)
    if len(voices) != len(sentences) or len({(one.language, one.variant) for one in voices}) > 1:
        raise ValueError(
            f"voice can only be one voice, or one of the same language and variant for each of {len(sentences)} "
            f"sentences, but got {voices}"
        )
    if not voices:
        raise ValueError("there is nothing to say: sentences is empty")
    job = {"library": str(library), "voices": [asdict(one) for one in voices], "sentences": list(sentences)}
    # -I -S: nothing of the user's environment, no site-packages. espeak-ng takes paths of at most 160
    # characters, so it gets "." as the parent of its data.
    done = subprocess.run(
        [sys.executable, "-I", "-S", __file__],
        input=json.dumps(job).encode(),
        capture_output=True,
        cwd=(data or installed).parent,
    )
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise ValueError(f"espeak-ng failed for {voices[0]}: {message[-1]}")
    header, _, pcm = done.stdout.partition(b"\n")
    header = json.loads(header)
    utterances, start = [], 0
    for num_bytes in header["num_bytes"]:
        utterances.append(pcm[start : start + num_bytes])
        start += num_bytes
    return header["sample_rate"], utterances


def _speak(library, voices, sentences):
    """The work of the fresh process: (sample rate, list of PCM bytes)."""
    espeak = ctypes.CDLL(library)
    sample_rate = espeak.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, b".", _INITIALIZE_DONT_EXIT)
    if sample_rate <= 0:
        raise SystemExit("espeak_Initialize found no voice data")
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))  # breath is noise, seeded from the clock otherwise

    chunks = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples, num_samples, _events):
        if samples and num_samples > 0:
            chunks.append(ctypes.string_at(samples, 2 * num_samples))
        return 0

    espeak.espeak_SetSynthCallback(receive)
    name = f"{voices[0]['language']}+{voices[0]['variant']}"
    if espeak.espeak_SetVoiceByName(name.encode()) != 0:
        raise SystemExit(f"there is no voice {name}")
    espeak.espeak_SetParameter(_VOLUME, _VOLUME_PERCENT, 0)

    utterances, voice_before = [], None
    for voice, sentence in zip(voices, sentences, strict=True):
        if voice != voice_before:
            for parameter, value in ((_RATE, "rate"), (_PITCH, "pitch"), (_RANGE, "pitch_range")):
                espeak.espeak_SetParameter(parameter, voice[value], 0)
        voice_before = voice
        chunks.clear()
        text = sentence.encode()
        failed = espeak.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 0, 0, _CHARS_UTF8, None, None)
        if failed or espeak.espeak_Synchronize() != 0:
            raise SystemExit(f"could not speak: {sentence}")
        utterances.append(b"".join(chunks))
    return sample_rate, utterances


if __name__ == "__main__":
    _sample_rate, _utterances = _speak(**json.load(sys.stdin.buffer))
    _header = {"sample_rate": _sample_rate, "num_bytes": [len(pcm) for pcm in _utterances]}
    sys.stdout.buffer.write(json.dumps(_header).encode() + b"\n" + b"".join(_utterances))
