"""A trained separator as ONNX files, which onnxruntime runs without PyTorch and without this project."""

import contextlib
import copy
import logging
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dsd_modules.model_folder import onnx_name, read_model
from dsd_modules.separator import separate
from shared_modules.files import write_whole

OPSET = 18  # onnxruntime 1.15 reads it, the oldest tried
TOLERANCE = 1e-4  # of the largest sample of the estimates
_MAX_BYTES = 2**31 - 2**24  # a file of protocol buffers ends at 2 GiB
_EXAMPLE_SAMPLES = 3000  # the exporter wants to see some mixture; its length and batch stay open


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file and what its metadata tell. Lengths are in samples."""

    path: Path
    sample_rate: int  # Hz
    num_spks: int
    num_blocks: int
    opset: int
    shortest_length: int
    longest_checked_length: int
    largest_difference: float  # that the check found, as a share of the estimates' largest sample


def export_onnx(folder, longest_seconds=10.0, progress=None):
    """Write one ONNX file for each number of blocks into a model folder, after a check against PyTorch.

    Each file holds its weights, and takes mixtures ``mixture [batch, length]`` (float32) at the model's sample rate to
    ``estimates [batch, length, num_spks]``, as :meth:`dsd_modules.inference.SepformerDSDSeparation.separate_batch`
    does. Batch and length are open. The shortest mixture is one kernel of the encoder. There is no longest one but for
    the memory, which grows with the square of the length; the longest that was compared stands in the file.

    The check separates noise, and silence, with onnxruntime and with PyTorch: batches of 1 to 3, from the shortest
    mixture to the longest that is wanted, odd lengths among them. All files are written, or none.

    Arguments
    ---------
    folder : str or Path
        From :func:`dsd_modules.model_folder.export_model`, or another local one that
        :func:`dsd_modules.model_folder.read_model` reads.
    longest_seconds : float
        Length of the longest mixture of the check, s.
    progress : callable, optional
        It is called with each path before the file is made.

    Returns
    -------
    list of OnnxFile
        ``separator_blocks1.onnx`` and so on, whose ``metadata_props`` have the fields of :class:`OnnxFile`.

    Raises
    ------
    ValueError
        If the folder cannot be read, a package is missing, a file would exceed 2 GiB, or its estimates differ from
        PyTorch's by more than :data:`TOLERANCE`.
    """
    _require_packages()
    if not (Path(folder) / "encoder.ckpt").is_file():
        raise ValueError(f"ONNX files are written into a model folder, but {folder} is none.")
    modules, sample_rate = read_model(folder)
    num_blocks = modules["masknet"].num_layers
    num_bytes = sum(tensor.nbytes for module in modules.values() for tensor in module.state_dict().values())
    if num_bytes > _MAX_BYTES:
        raise ValueError(f"An ONNX file holds at most 2 GiB, but the weights of {folder} take {num_bytes / 2**30:.1f}.")
    files = []
    with contextlib.ExitStack() as stack:  # the files appear when all of them are written
        for number in range(1, num_blocks + 1):
            path = Path(folder) / onnx_name(number)
            if progress is not None:
                progress(path)
            separator = _Separator(modules, number).eval().requires_grad_(False)
            lengths = _lengths_to_check(separator, round(longest_seconds * sample_rate))
            model = _convert(separator)
            difference = _largest_difference(model, separator, lengths, path)
            num_spks = modules["masknet"].num_spks
            files.append(OnnxFile(path, sample_rate, num_spks, number, OPSET, lengths[0], lengths[-1], difference))
            properties = {name: str(value) for name, value in asdict(files[-1]).items() if name != "path"}
            model.metadata_props.update(properties)
            stack.enter_context(write_whole(path, "wb")).write(_serialize(model))
    return files


class _Separator(torch.nn.Module):
    """Mixtures [B, T] to estimates [B, T, N] after a number of blocks."""

    def __init__(self, modules, num_blocks):
        super().__init__()
        self.mods = torch.nn.ModuleDict(modules)
        self.num_blocks = num_blocks

    def forward(self, mixture):
        estimates = separate(**self.mods, mixture=mixture, blocks=[self.num_blocks - 1])[0]  # [B, N, T]
        return estimates.transpose(1, 2)


def _require_packages():
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"The export to ONNX needs the package {error.name}; get it with: pip install onnx onnxscript onnxruntime"
        ) from None


def _convert(separator):
    """The separator as an ``onnx_ir.Model``."""
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript import optimizer

    kernel = separator.mods["encoder"].conv1d.kernel_size[0]
    with _without_warnings():
        program = torch.export.export(
            _with_onnx_recurrence(separator),
            (torch.zeros(2, kernel + _EXAMPLE_SAMPLES),),
            dynamic_shapes={"mixture": dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)},
            strict=False,
            # Else it wants a proof that every length takes the same path; instead the estimates are compared.
            prefer_deferred_runtime_asserts_over_guards=True,
        ).run_decompositions(_DECOMPOSITIONS)
        model = torch.onnx.export(
            program,
            opset_version=OPSET,
            input_names=["mixture"],
            output_names=["estimates"],
            dynamo=True,
            optimize=False,  # its rules take the 1e-8 of a norm for 0: silence would become NaN
            verbose=False,
        ).model
        optimizer.inline(model)
        optimizer.fold_constants(model)
        optimizer.remove_unused_nodes(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = onnx_ir.Shape(["batch", "length", *value.shape[2:]])
    model.ir_version = 8  # of the opset's time
    common.DeduplicateInitializersPass()(model)
    common.ClearMetadataAndDocStringPass()(model)  # the places of this machine's source files
    return model


@contextlib.contextmanager
def _without_warnings():
    """The exporter tells of packages that nothing here needs, and of its own affairs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _serialize(model):
    import onnx_ir

    return onnx_ir.to_proto(model).SerializeToString()


def _lengths_to_check(separator, longest):
    """From the encoder's kernel to the longest wanted, samples; the first are shorter than a chunk of SepFormer."""
    kernel = separator.mods["encoder"].conv1d.kernel_size[0]
    lengths = [kernel, kernel + 1, 3 * kernel - 1, 40 * kernel + 7, longest // 3 | 1, longest]
    return [kernel, *sorted(length for length in lengths[1:-1] if length < longest), max(longest, kernel)]


def _largest_difference(model, separator, lengths, path):
    """What onnxruntime and PyTorch differ by, as a share of the estimates' largest sample; too much is refused."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(_serialize(model), options, providers=["CPUExecutionProvider"])
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for number, length in enumerate(lengths):
        batch = 1 if length == lengths[-1] else 2 + number % 2
        mixture = 0.05 * torch.randn(batch, length, generator=generator)  # about the level of speech
        mixture[1:2] = 0
        with torch.no_grad():
            expected = separator(mixture)  # [B, T, N]
        estimates = torch.from_numpy(session.run(None, {"mixture": mixture.numpy()})[0])
        if estimates.shape != expected.shape:
            got = f"estimates {list(estimates.shape)}, but expected {list(expected.shape)}"
            raise ValueError(f"{path} is not written: it would give {got}.")
        difference = ((estimates - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        if not difference <= TOLERANCE:  # also where it is NaN
            raise ValueError(
                f"{path} is not written: for a batch of {batch} and {length} samples its estimates would differ from "
                f"PyTorch's by {difference:.1e} of their largest sample, but at most {TOLERANCE} is right."
            )
        largest = max(largest, difference)
    return largest


# What ONNX or onnxruntime would do in a worse way than PyTorch


def _with_onnx_recurrence(separator):
    """A copy whose recurrent networks are ONNX's own operators."""
    separator = copy.deepcopy(separator)
    for module in list(separator.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.RNNBase):
                setattr(module, name, _Recurrent(child))
    return separator


# How ONNX orders the gates that PyTorch keeps one below the other.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}


class _Recurrent(torch.nn.Module):
    """A recurrent network as ONNX's own operator: to be exported, not to be run.

    PyTorch's exporter would write a loop over the steps.
    """

    def __init__(self, rnn):
        super().__init__()
        self.num_layers, self.num_directions, self.hidden_size = rnn.num_layers, 1 + rnn.bidirectional, rnn.hidden_size
        self.operator, _, activation = rnn.mode.partition("_")
        self.attributes = {"hidden_size": rnn.hidden_size}
        self.attributes["direction"] = "bidirectional" if rnn.bidirectional else "forward"
        if self.operator == "GRU":
            self.attributes["linear_before_reset"] = 1
        if self.operator == "RNN":
            self.attributes["activations"] = [activation.title()] * self.num_directions
        for layer in range(self.num_layers):
            w, r, b_w, b_r = (
                self._directions(rnn, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            self.register_buffer(f"w_{layer}", w)  # [directions, gates * hidden, C]
            self.register_buffer(f"r_{layer}", r)  # [directions, gates * hidden, hidden]
            self.register_buffer(f"b_{layer}", torch.cat([b_w, b_r], dim=1))  # [directions, 2 * gates * hidden]

    def _directions(self, rnn, name):
        gates = _GATES[rnn.mode]
        names = [name, f"{name}_reverse"][: self.num_directions]
        directions = [getattr(rnn, name).detach().chunk(len(gates)) for name in names]
        return torch.stack([torch.cat([parts[gate] for gate in gates]) for parts in directions])

    def flatten_parameters(self):
        """There is nothing to flatten."""

    def forward(self, x):
        """[B, T, C] to a tuple that starts with [B, T, directions * hidden]."""
        x = x.transpose(0, 1)  # [T, B, C]
        for layer in range(self.num_layers):
            x = torch.onnx.ops.symbolic(
                self.operator,
                [x, getattr(self, f"w_{layer}"), getattr(self, f"r_{layer}"), getattr(self, f"b_{layer}")],
                self.attributes,
                dtype=x.dtype,
                shape=[x.shape[0], self.num_directions, x.shape[1], self.hidden_size],
                version=14,
            )
            x = x.transpose(1, 2).flatten(2)  # [T, B, directions * hidden]
        return (x.transpose(0, 1),)


def _whole_norm(x, eps):
    """x [B, ...] with mean 0 and variance 1 over all of an item.

    The means are taken one axis after the other: onnxruntime adds millions of numbers up one by one, which is wrong by
    more than 1e-4 after half a minute of audio.
    """

    def mean(x):
        for axis in range(x.dim() - 1, 0, -1):
            x = x.mean(axis, keepdim=True)
        return x  # [B, 1, ...]

    x = x - mean(x)
    return x / torch.sqrt(mean(x * x) + eps)


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    if len(normalized_shape) == 1:  # over the channels alone
        return NotImplemented
    x = _whole_norm(x, eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _group_norm(x, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    if num_groups > 1:
        return NotImplemented
    x, shape = _whole_norm(x, eps), (-1, *(1,) * (x.dim() - 2))  # [C, 1, ...]
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


_DECOMPOSITIONS = {torch.ops.aten.layer_norm.default: _layer_norm, torch.ops.aten.group_norm.default: _group_norm}
