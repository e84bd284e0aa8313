"""Bring a trained model to others: ``python -m dsd_modules.export FOLDER --onnx --push_to_hub OWNER/NAME``."""

import argparse
import sys
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from dsd_modules.model_card import UNKNOWN_LICENCE, amend_card, check_licence, write_card
from dsd_modules.model_folder import CARD_FILE, is_model_file, read_model
from dsd_modules.onnx_export import export_onnx
from shared_modules.errors import ends_in_one_sentence, mistakes_as_run_errors
from shared_modules.files import write_whole
from shared_modules.model_files import EXPORTED_FOLDER

_HISTORY = "history.csv"  # which a run has


def find_exported(folder):
    """The exported folder that is meant, and the run it comes from.

    Arguments
    ---------
    folder : str or Path
        A run's folder, or an exported one.

    Returns
    -------
    exported : Path
    run_folder : Path or None
        None where the exported folder lies in no run.

    Raises
    ------
    ValueError
        If the folder is neither.

    Example
    -------
    >>> find_exported("no/such/run")
    Traceback (most recent call last):
    ValueError: The folder no/such/run was not found.
    """
    folder = Path(folder)
    for exported in (folder, folder / EXPORTED_FOLDER):
        if (exported / "encoder.ckpt").is_file():
            place = exported.resolve()
            is_of_run = place.name == EXPORTED_FOLDER and (place.parent / _HISTORY).exists()
            return exported, place.parent if is_of_run else None
    if not folder.is_dir():
        raise ValueError(f"The folder {folder} was not found.")
    expected = "expected the folder of a run that was tested, or an exported one"
    raise ValueError(f"{folder} holds no trained model: {expected}.")


def push_to_hub(folder, name, private=False):
    """Send an exported folder to the Hugging Face hub: its model, its card and its ONNX files, and nothing else.

    They arrive together, in one commit. ONNX files there that the folder does not have are removed.

    Arguments
    ---------
    folder : str or Path
        The exported folder, with its card.
    name : str
        ``OWNER/NAME``. Created where it does not exist.
    private : bool
        Whether only the owner shall see it.

    Returns
    -------
    str
        Where the model is now.

    Raises
    ------
    ValueError
        If the name is none, nobody is logged in, the hub refuses or cannot be reached, or a private model is
        wanted under a name that is public.
    """
    check_hub_name(name)
    api = huggingface_hub.HfApi()
    files = [path.name for path in Path(folder).iterdir() if is_model_file(path.name)]
    try:
        url = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise ValueError(f"--private cannot be had: {name} is on the hub already, and public.")
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=files,
            delete_patterns="separator_blocks*.onnx",
            commit_message="Upload a separator with dsd-separation",
        )
    except HfHubHTTPError as error:
        raise ValueError(f"The hub refused {name}: {_refusal(error)}") from None
    except ValueError:
        raise
    except Exception as error:  # an upload can fail in any way
        if isinstance(error.__cause__, HfHubHTTPError):
            raise ValueError(f"The hub refused {name}: {_refusal(error.__cause__)}") from None
        raise ValueError(
            f"The hub could not be reached, or broke off, and has no new model: {_one_line(error)}"
        ) from None
    return str(url)


def check_hub_name(name):
    """Refuse what cannot be a model's name on the hub, and to go on without a token.

    Example
    -------
    >>> check_hub_name("my model")
    Traceback (most recent call last):
    ValueError: --push_to_hub can only be OWNER/NAME of letters, digits, '-', '_' and '.', but got 'my model'.
    """
    try:
        huggingface_hub.utils.validate_repo_id(name)
        is_right = name.count("/") == 1
    except ValueError:
        is_right = False
    if not is_right:
        raise ValueError(
            f"--push_to_hub can only be OWNER/NAME of letters, digits, '-', '_' and '.', but got {name!r}."
        )
    if huggingface_hub.get_token() is None:
        raise ValueError("--push_to_hub needs a token of the hub: log in with `hf auth login`, or set HF_TOKEN.")


def _refusal(error):
    if error.response is not None and error.response.status_code == 401:
        return "it does not know the token; log in with `hf auth login`, or set HF_TOKEN."
    return _one_line(error.server_message or error)


def _one_line(text):
    return " ".join(str(text).split("\n\n")[0].split()) or type(text).__name__


def _parse(argv):
    parser = argparse.ArgumentParser(prog="python -m dsd_modules.export", description=__doc__.split(":")[0] + ".")
    parser.add_argument("folder", help="the folder of a run, or an exported one")
    parser.add_argument("--onnx", action="store_true", help="write an ONNX file for each number of blocks")
    parser.add_argument(
        "--longest_seconds", type=float, default=10.0, metavar="S", help="up to where ONNX is compared (10)"
    )
    parser.add_argument("--licence", "--license", help="of the weights, such as apache-2.0 or cc-by-4.0 (unknown)")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="send it to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="as a private model")
    options = parser.parse_args(argv)
    if options.private and options.push_to_hub is None:
        parser.error("--private needs --push_to_hub OWNER/NAME")
    if not options.longest_seconds > 0:
        parser.error(f"--longest_seconds can only be above 0, but got {options.longest_seconds:g}")
    return options


@ends_in_one_sentence(interrupted="interrupted")
def main(argv):
    """Write what is missing, and send it."""
    options = _parse(argv)
    with mistakes_as_run_errors():
        exported, place = _export(options)
    names = sorted(path.name for path in exported.iterdir() if is_model_file(path.name))
    print("\n".join(f"  {name:24}{(exported / name).stat().st_size / 1e6:10.2f} MB" for name in names))
    print(place)


def _export(options):
    """The exported folder, and where the model is now."""
    exported, run_folder = find_exported(options.folder)
    if options.licence is not None:
        check_licence(options.licence)
    if options.push_to_hub is not None:
        check_hub_name(options.push_to_hub)
    read_model(exported)
    onnx_files = None
    if options.onnx:
        onnx_files = export_onnx(exported, options.longest_seconds, lambda path: print(f"making {path}", flush=True))
    card = exported / CARD_FILE
    if not card.exists():
        write_card(exported, run_folder, licence=options.licence or UNKNOWN_LICENCE)
    amend_card(exported, options.licence, onnx_files=onnx_files)
    if options.push_to_hub is None:
        return exported, exported
    print(f"sending to {options.push_to_hub}", flush=True)
    text = card.read_text(encoding="utf-8")
    amend_card(exported, source=options.push_to_hub)
    try:
        return exported, push_to_hub(exported, options.push_to_hub, options.private)
    except BaseException:
        with write_whole(card) as stream:  # it is not there
            stream.write(text)
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
