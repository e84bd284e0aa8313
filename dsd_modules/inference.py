"""Separate batches and recordings with a trained model."""

import math
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.signal
import soundfile
import torch

from dsd_modules.files import write_whole
from dsd_modules.model_folder import read_model
from dsd_modules.separator import separate

_HEARD_RMS = 0.05  # about that of LibriMix's mixtures


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

    Attributes
    ----------
    num_spks : int
        Number of speakers that it separates.
    num_blocks : int
        Number of dual-path blocks, or of Conv-TasNet's repeats.

    Raises
    ------
    ValueError
        If the device does not exist.

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

    def __init__(self, modules, sample_rate, device="cpu"):
        try:
            self.device = torch.empty(0, device=device).device
        except (AssertionError, RuntimeError) as error:  # torch raises either
            raise ValueError(f"device can only be one of this machine, but got {device!r}: {error}") from None
        self.mods = torch.nn.ModuleDict(modules).to(self.device).eval().requires_grad_(False)
        self.sample_rate = sample_rate
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
            ``@revision`` where one is to be pinned. From there it is downloaded into the hub's own cache.
        savedir : str, optional
            Not used: SpeechBrain's calls name it.
        run_opts : dict, optional
            ``{"device": "cuda"}``; without it the CPU.

        Returns
        -------
        SepformerDSDSeparation

        Raises
        ------
        ValueError
            If the folder or a file is missing or cannot be downloaded, its YAML is not that of a separator of
            these kinds or asks for anything to be run, or its weights do not fit.
        """
        modules, sample_rate = read_model(source)
        return cls(modules, sample_rate, (run_opts or {}).get("device") or "cpu")

    @torch.no_grad()
    def separate_batch(self, mix, lengths=None):
        """Separate a batch of mixtures at the model's sample rate.

        An item of a padded batch gives what it gives alone. The estimates have the scale that the network
        gives them, which training leaves open; samples after the last whole frame are zero.

        Arguments
        ---------
        mix : torch.Tensor
            Mixtures [B, T], floating point, on any device.
        lengths : torch.Tensor or list of int, optional
            Number of samples of each item, [B]. What lies beyond does not matter.

        Returns
        -------
        torch.Tensor
            Estimates [B, T, N] for N speakers, float32, on the model's device; zero beyond the lengths.

        Raises
        ------
        ValueError
            If the mixtures are not [B, T], empty or not finite, or the lengths do not fit them.
        """
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

        kernel = self.mods["encoder"].conv1d.kernel_size[0]
        mix = torch.nn.functional.pad(mix, (0, max(0, kernel - num_samples)))  # [B, max(T, kernel)]
        whole = None if lengths is None else lengths.clamp(min=kernel)
        estimates = separate(**self.mods, mixture=mix, lengths=whole)
        estimates = estimates[:, :, :num_samples]  # [B, N, T]
        if lengths is not None:
            estimates = estimates.masked_fill(is_padding[:, None], 0)
        return estimates.transpose(1, 2)  # [B, T, N]

    def separate_file(self, path):
        """Separate a recording.

        Channels are averaged, and another sample rate is converted. Each voice is scaled by one gain, so that
        the voices add up to the recording as well as they can: their relative levels are kept. All voices are
        turned down together where the loudest sample would exceed 1. Silence gives silence; the level of the
        recording does not matter otherwise.

        Arguments
        ---------
        path : str or Path
            An audio file of any format that soundfile reads.

        Returns
        -------
        torch.Tensor
            The voices [T, N] at the model's sample rate, float32, on the CPU.

        Raises
        ------
        ValueError
            If the file is missing, no audio, empty or not finite.
        """
        mixture = _read_mono(path, self.sample_rate)  # [T]
        rms = np.sqrt(np.mean(mixture**2))
        # The network's normalisation fails on faint input, so it hears every recording at one level.
        heard = torch.from_numpy(mixture * (_HEARD_RMS / rms if rms > 0 else 1.0)).float()  # [T]
        estimates = self.separate_batch(heard[None])[0].cpu().numpy()  # [T, N]
        estimates = estimates * _mixing_gains(estimates, mixture)  # [T, N], float64
        peak = np.abs(estimates).max()
        return torch.from_numpy((estimates / max(peak, 1.0)).astype(np.float32))


def save_estimates(estimates, sample_rate, folder, stem):
    """Write the voices of a recording as 16-bit wav files; each appears only once it is whole.

    Arguments
    ---------
    estimates : torch.Tensor
        The voices [T, N]; what exceeds 1 is clipped.
    sample_rate : int
        Hz.
    folder : str or Path
        Created where it is missing.
    stem : str
        The files are ``<stem>_spk1.wav`` and so on.

    Returns
    -------
    list of Path

    Raises
    ------
    ValueError
        If the voices are not [T, N] or not finite.

    Example
    -------
    >>> import tempfile
    >>> paths = save_estimates(torch.zeros(800, 2), 8000, tempfile.mkdtemp(), "meeting")
    >>> [path.name for path in paths]
    ['meeting_spk1.wav', 'meeting_spk2.wav']
    """
    if estimates.dim() != 2:
        raise ValueError(f"estimates must have shape [T, N], but got {list(estimates.shape)}.")
    if not estimates.isfinite().all():
        raise ValueError("estimates must be finite, but they hold NaN or infinite samples.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for spk, voice in enumerate(estimates.detach().cpu().numpy().T, 1):
        paths.append(folder / f"{stem}_spk{spk}.wav")
        with write_whole(paths[-1], "wb") as stream:
            soundfile.write(stream, voice, sample_rate, format="WAV", subtype="PCM_16")
    return paths


def _read_mono(path, sample_rate):
    """A recording as one channel [T] at a sample rate, float64."""
    if not Path(path).is_file():
        raise ValueError(f"The audio file {path} was not found.")
    try:
        samples, file_rate = soundfile.read(path, dtype="float32", always_2d=True)  # [T, channels]
    except (OSError, RuntimeError, TypeError) as error:  # TypeError: headerless formats
        raise ValueError(f"{path} cannot be read as audio: {error}") from None
    if len(samples) == 0:
        raise ValueError(f"{path} is empty: it has no samples.")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path} holds samples that are NaN or infinite.")
    mixture = samples.mean(axis=1, dtype=np.float64)  # [T]
    if file_rate != sample_rate:
        divisor = math.gcd(file_rate, sample_rate)
        mixture = scipy.signal.resample_poly(mixture, sample_rate // divisor, file_rate // divisor)  # [T']
    return mixture


def _mixing_gains(estimates, mixture):
    """One gain per voice [N] with which the estimates [T, N] add up best to the mixture [T], in float64.

    SI-SDR does not see the sign of an estimate: training may leave it turned. So a voice that goes against
    the mixture is turned first; beyond that no gain is negative.
    """
    both = np.column_stack([estimates, mixture]).astype(np.float64)  # [T, N+1]
    triangle = np.linalg.qr(both, mode="r")  # [min(T, N+1), N+1], with the same least-squares problem
    signs = np.sign(triangle[:, :-1].T @ triangle[:, -1])  # [N]
    return signs * scipy.optimize.nnls(triangle[:, :-1] * signs, triangle[:, -1])[0]
