"""Separate batches, recordings of any length and streams with a trained model."""

import contextlib
import copy
import itertools
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dsd_modules.levels import Levels
from dsd_modules.model_folder import MAX_SAMPLE_RATE, read_model
from dsd_modules.separator import check_early_exit, separate, separate_until
from dsd_modules.voice_files import VoiceFiles
from dsd_modules.windows import FollowedVoices, Windows
from shared_modules.devices import find_device
from shared_modules.recordings import Recording, Resampler, resampled_length

_HEARD_RMS = 0.05  # about that of LibriMix's mixtures
_OVERLAP_SECONDS = 2.0  # of windows; at most a quarter of their length
_REMINDER_SECONDS = 1.0
_WINDOW_SECONDS = 16.0
_SPOOL_SAMPLES = 2**16  # that are read again at a time


@dataclass(frozen=True)
class SeparatedRecording:
    """What :meth:`SepformerDSDSeparation.separate_to_files` has written.

    Attributes
    ----------
    paths : list of Path
        A wav file per voice.
    num_seconds : float
        Duration of the recording.
    elapsed_seconds : float
        Time that it took.
    blocks_run : float
        Number of blocks that were run, mean over the windows that are not silent.

    Example
    -------
    >>> SeparatedRecording([Path("a_spk1.wav")], num_seconds=10.0, elapsed_seconds=2.5, blocks_run=2.0).real_time_factor
    0.25
    """

    paths: list
    num_seconds: float
    elapsed_seconds: float
    blocks_run: float

    @property
    def real_time_factor(self):
        """Time that it took per time of the recording."""
        return self.elapsed_seconds / self.num_seconds


class SepformerDSDSeparation:
    """A trained separator, ready to separate batches and recordings.

    Use :meth:`from_hparams`. The model is in eval mode, and keeps no gradients.

    Arguments
    ---------
    modules : dict
        ``encoder``, ``masknet`` (:class:`dsd_modules.masknet.DualPathMaskNet` or
        :class:`dsd_modules.tasnet.ConvTasNetMaskNet`) and ``decoder``.
    sample_rate : int
        Of the recordings it was trained with, Hz.
    device : str or torch.device
        Where it computes.
    precision : str
        ``"fp32"``, or ``"bf16"``: faster where the device has it, for a difference of about -40 dB.

    Attributes
    ----------
    num_spks : int
        Number of speakers that it separates.
    num_blocks : int
        Number of dual-path blocks, or of Conv-TasNet's repeats.

    Raises
    ------
    ValueError
        If the device does not exist, or the precision is another.

    Example
    -------
    >>> from speechbrain.lobes.models.dual_path import Decoder, Encoder, SBTransformerBlock
    >>> from dsd_modules.masknet import DualPathMaskNet
    >>> intra, inter = (SBTransformerBlock(1, 8, 2, d_ffn=16) for _ in range(2))
    >>> masknet = DualPathMaskNet(8, 8, intra, inter, num_layers=2, K=10, num_spks=3)
    >>> modules = {"encoder": Encoder(16, 8), "masknet": masknet, "decoder": Decoder(8, 1, 16, stride=8, bias=False)}
    >>> separator = SepformerDSDSeparation(modules, sample_rate=8000)
    >>> separator.num_spks, separator.sample_rate, separator.num_blocks
    (3, 8000, 2)
    >>> separator.separate_batch(torch.randn(2, 1000), lengths=[1000, 7]).shape
    torch.Size([2, 1000, 3])
    """

    def __init__(self, modules, sample_rate, device="cpu", precision="fp32"):
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision can only be 'fp32' or 'bf16', but got {precision!r}.")
        self.device = find_device(device)
        if precision == "bf16":  # once; autocast alone would convert them at each call
            modules = copy.deepcopy(modules)  # the caller's stay in float32
            for module in modules["masknet"].modules():
                if isinstance(module, torch.nn.Linear | torch.nn.MultiheadAttention):
                    module.bfloat16()
        self.mods = torch.nn.ModuleDict(modules).to(self.device).eval().requires_grad_(False)
        self.sample_rate, self.precision = sample_rate, precision
        self.num_spks = self.mods["masknet"].num_spks
        self.num_blocks = self.mods["masknet"].num_layers

    @classmethod
    def from_hparams(cls, source, savedir=None, run_opts=None):
        """Load a SepFormer, DPRNN or Conv-TasNet. No code of the folder is run.

        Arguments
        ---------
        source : str or Path
            A local folder from :func:`dsd_modules.model_folder.export_model`, or a separator in SpeechBrain's
            published form; or its name on the Hugging Face hub, such as ``speechbrain/sepformer-libri2mix``, with
            ``@revision`` where one is to be pinned.
        savedir : str or Path, optional
            The hub's cache for this model; left out: the one of all programs. A local folder is read where it is.
        run_opts : dict, optional
            ``{"device": "cuda", "precision": "bf16"}``; without them the CPU and fp32.

        Returns
        -------
        SepformerDSDSeparation

        Raises
        ------
        ValueError
            If the folder or a file is missing or cannot be downloaded, its YAML is not that of a separator of
            these kinds or asks for anything to be run, or its weights do not fit.
        """
        modules, sample_rate = read_model(source, savedir)
        run_opts = run_opts or {}
        return cls(modules, sample_rate, run_opts.get("device") or "cpu", run_opts.get("precision") or "fp32")

    @torch.no_grad()
    def separate_batch(self, mix, lengths=None, num_blocks=None, exit_si_sdr_db=None):
        """Separate a batch of mixtures at the model's sample rate.

        An item of a padded batch gives what it gives alone. The estimates have the scale that the network
        gives them, which training leaves open; samples after the last whole frame are zero.

        Arguments
        ---------
        mix : torch.Tensor
            Mixtures [B, T], floating point, on any device.
        lengths : torch.Tensor or list of int, optional
            Number of samples of each item, [B]. What lies beyond does not matter.
        num_blocks : int, optional
            Run only so many blocks of the model, from 1: faster, and where the model was trained with layer-wise
            optimization nearly as good. None: all.
        exit_si_sdr_db : float, optional
            Early exit, for models of three blocks and more: stop after the first block, from the second on, whose
            estimates agree with those of the block before by so much SI-SDR, dB.
            See :func:`dsd_modules.separator.separate_until`.

        Returns
        -------
        torch.Tensor
            Estimates [B, T, N] for N speakers, float32, on the model's device; zero beyond the lengths.

        Raises
        ------
        ValueError
            If the mixtures are not [B, T], empty or not finite, the lengths do not fit them, or the model has no
            such blocks.
        """
        self._check_blocks(num_blocks, exit_si_sdr_db)
        if not isinstance(mix, torch.Tensor) or mix.dim() != 2 or not mix.is_floating_point():
            got = f"{mix.dtype} {list(mix.shape)}" if isinstance(mix, torch.Tensor) else type(mix)
            raise ValueError(f"mix must be a floating-point tensor of shape [B, T], but got {got}.")
        if mix.numel() == 0:
            raise ValueError(f"mix must not be empty, but got shape {list(mix.shape)}.")
        num_samples = mix.shape[1]
        mix = mix.to(self.device, torch.float32)  # [B, T]
        if lengths is not None:
            lengths = torch.as_tensor(lengths).cpu()  # [B]
            if lengths.shape != mix.shape[:1] or lengths.is_floating_point():
                got = f"{lengths.dtype} {list(lengths.shape)}"
                raise ValueError(f"lengths must be whole numbers of samples of shape [{len(mix)}], but got {got}.")
            if lengths.min() < 1 or lengths.max() > num_samples:
                raise ValueError(f"lengths must lie in [1, {num_samples}] samples, but got {lengths.tolist()}.")
            is_padding = torch.arange(num_samples) >= lengths[:, None]  # [B, T]
            is_padding = is_padding.to(self.device)
            mix = mix.masked_fill(is_padding, 0)
        if not mix.isfinite().all():
            raise ValueError("mix must be finite, but it holds NaN or infinite samples.")

        estimates, _ = self._run(mix, lengths, num_blocks, exit_si_sdr_db)  # [B, N, T]
        if lengths is not None:
            estimates = estimates.masked_fill(is_padding[:, None], 0)
        return estimates.transpose(1, 2)  # [B, T, N]

    def separate_file(
        self,
        recording,
        channel=None,
        sample_rate=None,
        num_blocks=None,
        exit_si_sdr_db=None,
        window_seconds=_WINDOW_SECONDS,
        progress=None,
    ):
        """Separate a recording of any length.

        It is separated in windows that overlap, and each voice is followed from one to the next
        (:class:`dsd_modules.windows.FollowedVoices`). Each voice has one gain, none negative, with which the voices
        add up to the recording as well as they can: their relative levels are kept. All are turned down together
        where the loudest sample would exceed 1. Silence gives silence; the level of the recording does not matter
        otherwise.

        Arguments
        ---------
        recording : str, Path, bytes or binary file object
            Audio of any format that soundfile reads, and of any sample rate.
        channel : int, optional
            The channel to separate, from 1. None: the mean of all.
        sample_rate : int or "file", optional
            Of the voices, Hz; ``"file"``: that of the recording. None: that of the model.
        num_blocks, exit_si_sdr_db : optional
            See :meth:`separate_batch`. Early exit is decided for each window.
        window_seconds : float
            Length of the windows. A recording that is no longer is separated as a whole.
        progress : callable, optional
            Called after each window with the seconds that are done, and those of the recording.

        Returns
        -------
        torch.Tensor
            The voices [T, N], float32, on the CPU.

        Raises
        ------
        ValueError
            If the file is missing, no audio, damaged, empty or not finite, or an option cannot be. The
            sentence names the file.
        """
        with Recording(recording) as source:
            rate = _output_rate(sample_rate, source, self.sample_rate)
            with self._separated(source, channel, num_blocks, exit_si_sdr_db, window_seconds, progress) as separated:
                return torch.from_numpy(np.concatenate(list(separated.blocks(rate))))

    def separate_to_files(
        self,
        recording,
        folder,
        stem=None,
        channel=None,
        sample_rate=None,
        num_blocks=None,
        exit_si_sdr_db=None,
        window_seconds=_WINDOW_SECONDS,
        progress=None,
    ):
        """Separate a recording of any length into wav files; memory does not grow with it.

        The files are replaced where they exist, and appear once all are whole. Until then the voices lie in a
        temporary file in the folder, 4 bytes a sample and voice.

        Arguments
        ---------
        recording, channel, sample_rate, num_blocks, exit_si_sdr_db, window_seconds, progress
            See :meth:`separate_file`.
        folder : str or Path
            Created where it is missing.
        stem : str, optional
            The files are ``<stem>_spk1.wav`` and so on. None: the recording's name without its ending.

        Returns
        -------
        SeparatedRecording

        Raises
        ------
        ValueError
            As for :meth:`separate_file`, or the stem is no name; no file is written then.
        OSError
            If the files cannot be written.
        """
        start = time.perf_counter()
        with Recording(recording) as source:
            rate = _output_rate(sample_rate, source, self.sample_rate)
            stem = Path(source.name).stem if stem is None else stem
            if Path(stem).name != stem or "\0" in stem:
                raise ValueError(f"stem can only be the beginning of a file's name, but got {stem!r}.")
            separating = self._separated(
                source, channel, num_blocks, exit_si_sdr_db, window_seconds, progress, folder=folder
            )
            with separating as separated, VoiceFiles(folder, stem, self.num_spks, rate) as files:
                for voices in separated.blocks(rate):
                    files.write(voices)
            elapsed = time.perf_counter() - start
            return SeparatedRecording(files.paths, source.num_seconds, elapsed, separated.blocks_run)

    def stream(
        self,
        chunks,
        num_blocks=None,
        exit_si_sdr_db=None,
        window_seconds=4.0,
        hop_seconds=0.5,
        fade_seconds=0.1,
    ):
        """Separate audio while it arrives.

        The latency is ``hop_seconds + fade_seconds``, always: when ``n`` samples have come, the voices of all but
        the last ``latency`` samples have been given. Each hop, the last window is separated anew, with a second more
        for each voice that pauses; so it takes ``window_seconds / hop_seconds`` times the computing of a recording, and
        more. The voices are followed, and the gains are those with which they add up to the mixture so far; they are
        never turned down for loudness.

        Arguments
        ---------
        chunks : iterable of torch.Tensor or np.ndarray
            The mixture as it comes: [t], floating point, at the model's sample rate, of any lengths.
        num_blocks, exit_si_sdr_db : optional
            See :meth:`separate_batch`.
        window_seconds : float
            How much of the past the model hears.
        hop_seconds : float
            How often it is run.
        fade_seconds : float
            How long one run fades into the next.

        Returns
        -------
        iterator of torch.Tensor
            The voices as they are ready: [t, N], float32, on the CPU; together as long as the mixture.

        Raises
        ------
        ValueError
            If a chunk is not [t] or not finite, or an option cannot be.

        Example
        -------
        >>> from speechbrain.lobes.models.dual_path import Decoder, Encoder, SBTransformerBlock
        >>> from dsd_modules.masknet import DualPathMaskNet
        >>> intra, inter = (SBTransformerBlock(1, 8, 2, d_ffn=16) for _ in range(2))
        >>> masknet = DualPathMaskNet(8, 8, intra, inter, num_layers=2, K=10)
        >>> decoder = Decoder(8, 1, 16, stride=8, bias=False)
        >>> modules = {"encoder": Encoder(16, 8), "masknet": masknet, "decoder": decoder}
        >>> microphone = (0.1 * torch.randn(4000) for _ in range(3))
        >>> [list(voices.shape) for voices in SepformerDSDSeparation(modules, 8000).stream(microphone)]
        [[3200, 2], [4000, 2], [4800, 2]]
        """
        self._check_blocks(num_blocks, exit_si_sdr_db)
        fade = self._num_samples("fade_seconds", fade_seconds)
        hop = self._num_samples("hop_seconds", hop_seconds)
        length = self._num_samples("window_seconds", window_seconds, hop + fade)
        windows = Windows.of_stream(length, hop, fade, min(self._reminder, length // 4))
        followed = FollowedVoices(self._window_separator(num_blocks, exit_si_sdr_db), self.num_spks, windows)
        return self._stream(chunks, followed, hop + fade)

    def _stream(self, chunks, followed, latency):
        levels, gains = Levels(self.num_spks), np.zeros(self.num_spks)
        waiting = np.zeros((0, self.num_spks), np.float32)  # [t, N], until they are due
        num_come = num_given = 0
        for samples in _pieces(chunks, self.sample_rate, followed.windows.hop):
            num_come += len(samples)
            for mixture, voices in followed.push(samples):
                levels.add(mixture, voices)
                last, gains = gains, levels.gains()
                last = np.where(last == 0, gains, last)  # a voice that was silent begins at its level
                ramp = np.linspace(0, 1, len(voices), endpoint=False)[:, None]  # from gains to gains without a step
                waiting = np.concatenate([waiting, (voices * (last + ramp * (gains - last))).astype(np.float32)])
            due = num_come - latency - num_given
            if due > 0:
                yield torch.from_numpy(waiting[:due])
                waiting, num_given = waiting[due:], num_given + due
        for mixture, voices in followed.finish() if num_come else ():
            levels.add(mixture, voices)
            gains = np.where(gains == 0, levels.gains(), gains)
            yield torch.from_numpy(np.concatenate([waiting, (voices * gains).astype(np.float32)]))

    def _check_blocks(self, num_blocks, exit_si_sdr_db):
        if num_blocks is not None:
            if type(num_blocks) is not int or not 1 <= num_blocks <= self.num_blocks:
                raise ValueError(f"num_blocks can only be 1 to {self.num_blocks}, but got {num_blocks!r}.")
            if exit_si_sdr_db is not None:
                raise ValueError("num_blocks and exit_si_sdr_db both tell which blocks to run; give one of them.")
        if exit_si_sdr_db is not None:
            check_early_exit(exit_si_sdr_db, self.num_blocks)

    def _run(self, mix, lengths, num_blocks, exit_si_sdr_db):
        """Estimates [B, N, T] of mixtures [B, T], and the number of blocks that were run for each item."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self._run_blocks(mix, lengths, num_blocks, exit_si_sdr_db)

    def _run_blocks(self, mix, lengths, num_blocks, exit_si_sdr_db):
        num_samples, kernel = mix.shape[1], self.mods["encoder"].conv1d.kernel_size[0]
        mix = torch.nn.functional.pad(mix, (0, max(0, kernel - num_samples)))  # [B, max(T, kernel)]
        lengths = None if lengths is None else lengths.clamp(min=kernel)
        if exit_si_sdr_db is None:
            num_blocks = num_blocks or self.num_blocks
            estimates = separate(**self.mods, mixture=mix, lengths=lengths, blocks=[num_blocks - 1])[0]
            return estimates[:, :, :num_samples], [num_blocks] * len(mix)
        estimates, blocks_run = torch.zeros(len(mix), self.num_spks, mix.shape[1], device=self.device), []
        for item, mixture in enumerate(mix):  # each leaves where it may
            length = mix.shape[1] if lengths is None else int(lengths[item])
            alone, num_run = separate_until(**self.mods, mixture=mixture[None, :length], exit_si_sdr_db=exit_si_sdr_db)
            estimates[item, :, :length] = alone[0]
            blocks_run.append(num_run)
        return estimates[:, :, :num_samples], blocks_run

    def _window_separator(self, num_blocks, exit_si_sdr_db, blocks_run=None):
        """A function from a mixture [T] to estimates [T, N] of its level, float32 arrays."""

        @torch.no_grad()
        def separate_window(mixture):
            rms = np.sqrt(np.mean(np.square(mixture, dtype=np.float64)))
            if rms == 0:
                return np.zeros((len(mixture), self.num_spks), np.float32)
            # The network's normalisation fails on faint input, so it hears every window at one level.
            level = _HEARD_RMS / rms
            heard = torch.from_numpy((mixture * level).astype(np.float32)).to(self.device)  # [T]
            estimates, num_run = self._run(heard[None], None, num_blocks, exit_si_sdr_db)  # [1, N, T]
            if blocks_run is not None:
                blocks_run.extend(num_run)
            if not estimates.isfinite().all():
                raise ValueError("The model's estimates are NaN or infinite: its weights may be damaged.")
            return (estimates[0].T.cpu().numpy() / level).astype(np.float32)  # [T, N]

        return separate_window

    @property
    def _reminder(self):
        return round(_REMINDER_SECONDS * self.sample_rate)

    def _num_samples(self, name, seconds, least=1):
        """An option in seconds as a number of samples."""
        is_number = isinstance(seconds, int | float) and math.isfinite(seconds)
        if not is_number or round(seconds * self.sample_rate) < least:
            raise ValueError(f"{name} can only be a number from {least / self.sample_rate:g} on, but got {seconds!r}.")
        return round(seconds * self.sample_rate)

    @contextlib.contextmanager
    def _separated(self, source, channel, num_blocks, exit_si_sdr_db, window_seconds, progress, folder=None):
        """A recording's voices, in a temporary file of the folder."""
        self._check_blocks(num_blocks, exit_si_sdr_db)
        length = self._num_samples("window_seconds", window_seconds, self.sample_rate // 10)
        overlap = min(round(_OVERLAP_SECONDS * self.sample_rate), length // 4)
        windows = Windows.of_recording(length, overlap, min(self._reminder, length // 4))
        blocks_run, levels, done = [], Levels(self.num_spks), 0
        separate_window = self._window_separator(num_blocks, exit_si_sdr_db, blocks_run)
        followed = FollowedVoices(separate_window, self.num_spks, windows)
        with _spool(folder) as spool:
            with contextlib.closing(source.blocks(self.sample_rate, channel)) as blocks:
                pushed = itertools.chain.from_iterable(followed.push(block) for block in blocks)
                for mixture, voices in itertools.chain(pushed, followed.finish()):
                    levels.add(mixture, voices)
                    spool.write(voices.tobytes())
                    done += len(voices)
                    if progress is not None:
                        progress(min(done / self.sample_rate, source.num_seconds), source.num_seconds)
            yield _SeparatedVoices(spool, levels.gains(), source, self.sample_rate, blocks_run)


def _spool(folder):
    """A temporary file without a name, of which a kill leaves nothing."""
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder or tempfile.gettempdir())) from None


class _SeparatedVoices:
    """The voices of a recording as the network gave them, in a file [T, N], float32, and their gains [N]."""

    def __init__(self, spool, gains, source, sample_rate, blocks_run):
        self._spool, self._gains, self._source, self._sample_rate = spool, gains, source, sample_rate
        self.blocks_run = float(np.mean(blocks_run)) if blocks_run else 0.0

    def blocks(self, sample_rate):
        """The voices [t, N] at a rate, at their levels; none exceeds 1."""
        peak = max(np.abs(voices).max(initial=0.0) for voices in self._resampled(sample_rate))
        for voices in self._resampled(sample_rate):
            yield voices / np.float32(max(peak, 1.0))

    def _resampled(self, sample_rate):
        num_spks = len(self._gains)
        resampler = Resampler(self._sample_rate, sample_rate, num_spks)
        # At its own rate a recording gives as many samples as it has.
        remaining = resampled_length(self._source.num_frames, self._source.sample_rate, sample_rate)
        self._spool.seek(0)
        while stretch := self._spool.read(4 * num_spks * _SPOOL_SAMPLES):
            voices = np.frombuffer(stretch, np.float32).reshape(-1, num_spks) * self._gains  # [t, N]
            voices = resampler.push(voices.astype(np.float32)).reshape(-1, num_spks)[:remaining]
            remaining -= len(voices)
            yield voices
        yield resampler.finish().reshape(-1, num_spks)[:remaining]


def _output_rate(sample_rate, source, model_rate):
    if sample_rate is None:
        return model_rate
    if sample_rate == "file":
        return source.sample_rate
    is_whole = isinstance(sample_rate, int | np.integer) and not isinstance(sample_rate, bool)
    if not is_whole or not 1 <= sample_rate <= MAX_SAMPLE_RATE:
        expected = f"a whole number of Hz up to {MAX_SAMPLE_RATE}, or 'file'"
        raise ValueError(f"sample_rate can only be {expected}, but got {sample_rate!r}.")
    return int(sample_rate)


def _pieces(chunks, sample_rate, length):
    """The chunks of a stream, once they are checked, as float32 arrays of at most some length."""
    num_come = 0
    for chunk in chunks:
        if isinstance(chunk, torch.Tensor):
            chunk = chunk.detach().cpu()
            chunk = chunk.float() if chunk.dtype == torch.bfloat16 else chunk  # which numpy does not know
        samples = np.asarray(chunk)
        if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
            got = f"{samples.dtype} {list(samples.shape)}"
            raise ValueError(f"a chunk can only be floating-point samples of shape [t], but got {got}.")
        with np.errstate(over="ignore"):
            samples = samples.astype(np.float32)
        if not np.isfinite(samples).all():
            seconds = num_come / sample_rate
            raise ValueError(f"the chunk that begins at {seconds:.3f} s holds NaN or infinite samples.")
        num_come += len(samples)
        yield from (samples[begin : begin + length] for begin in range(0, len(samples), length))
