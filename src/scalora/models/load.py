"""Models and their tokenizers, from a packaged alias, a folder, a GGUF file or the Hugging Face hub."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from ..common import packaged
from ..common.errors import ScaloraError
from ..common.files import damage, digest, expand_user, is_sealed, seal
from .heads import HEADS, Head, auto_class, fits
from .origin import OUTPUTS, Origin, changes_function, find_random, set_origin, set_outputs
from .packed import cannot_pack, is_packed, outside_backbone, packing, settle
from .processors import image_processor, load_tokenizer, with_padding

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
_MADE = ("digits-mlp", "byte-lm")  # on the spot, by scalora.models.digits and scalora.models.bytes


def load_model(
    source: str,
    *,
    head: Head,
    num_labels: int | None = None,
    class_names: Sequence[str] | None = None,
    dtype: str = "float32",
    config: dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    need_tokenizer: bool = True,
    quantization: str = "none",
    compute: torch.dtype = torch.float32,
) -> tuple[Any, Any]:
    """The model `source` with the wanted head, on the CPU, and its tokenizer, ready for training.

    A dense network has no tokenizer (None), a model of images its image processor in place of one. Any other's pads on
    the right and always has a pad token. A classification head that the source lacks starts at random, as does its
    pooler; a language-modelling head that it lacks is an error. What started so, and what the base must be loaded with,
    is the model's :func:`~.origin.origin`.

    Args:
        source: a packaged alias (`packaged.ASSETS`), a folder with config.json, a .gguf file, or a hub id.
        head: what the model shall compute.
        num_labels: outputs of a classification head (1 for regression); only there, and needed there.
        class_names: of the head's outputs, none for regression: they and the loss they need replace whatever the
            source's configuration says of its own. None leaves that as it is.
        dtype: 'float32', 'bfloat16', 'float16', or 'auto' for that of the source.
        config: values that replace those of the model's configuration.
        attn_implementation: transformers' name of an attention kernel; None leaves the choice to it.
        need_tokenizer: False where the model is only computed with: a source without a tokenizer then gives None.
        quantization: how its weights are kept; `nf4-rounded` is left to whoever knows which are targeted.
        compute: what products with packed weights are made in.

    Raises:
        ScaloraError: no such source, one of the wrong kind, or one that transformers cannot load.
    """
    if dtype not in _DTYPES:
        raise ScaloraError(f"dtype is {dtype!r}: it must be one of {', '.join(_DTYPES)}")
    if (num_labels is not None) != HEADS[head].labelled:
        raise ScaloraError(
            f"num_labels is {num_labels!r} with head {head!r}: a classification head needs it, no other takes it"
        )

    path = _resolve(source)
    from transformers import AutoConfig

    from . import digits as dense  # noqa: F401  # makes its class known to transformers

    options: dict[str, Any] = {"dtype": _DTYPES[dtype], "attn_implementation": attn_implementation}
    config = config or {}
    try:
        original: Any = AutoConfig.from_pretrained(path)
        configuration: Any = copy.deepcopy(original)
        _check_kind(source, configuration, head)
        for name, value in config.items():
            if name in OUTPUTS and HEADS[head].labelled:
                raise ScaloraError(
                    f"config: {name} follows from the task: leave it out, and name classes in task.labels"
                )
            if not hasattr(configuration, name):
                raise ScaloraError(
                    f"config: the configuration of {source!r} has no {name!r}; it has {_names(configuration)}"
                )
            setattr(configuration, name, value)
        # A network that reads vectors has no tokenizer.
        tokenizer = None
        if head == "image-classification":
            tokenizer = image_processor(path) if need_tokenizer else None
        elif configuration.model_type != "scalora-dense":
            tokenizer = load_tokenizer(source, path, need_tokenizer)
        needed, random = {}, frozenset()
        if num_labels is not None:
            needed = set_outputs(configuration, original, num_labels, class_names)
        if is_packed(quantization):
            kept = outside_backbone(auto_class(head), configuration)
            options |= {"quantization_config": packing(quantization, compute, kept), "device_map": {"": "cpu"}}
        model, report = auto_class(head).from_pretrained(
            path,
            config=configuration,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
        if not HEADS[head].labelled:
            _refuse_other_sizes(report, source, config)
        random = frozenset()
        if HEADS[head].labelled:
            random = find_random(model, report, source, config)
            needed |= {"ignore_mismatched_sizes": True} if report["mismatched_keys"] else {}
        elif report["missing_keys"]:
            raise ScaloraError(
                f"model: {source!r} has no {sorted(report['missing_keys'])[0]}, which a language model needs; "
                " give a checkpoint that was saved with its language-modelling head"
            )
    except ScaloraError:
        raise
    except Exception as error:  # damaged files and impossible configurations break transformers in any way there is
        if is_packed(quantization):
            raise cannot_pack(quantization, source, error) from error
        raise _at_fault(source, config, attn_implementation, error) or _cannot_load(source, error) from error
    overrides = changes_function(config, original)
    known = Origin(random, {**needed, **overrides}, overrides)
    if is_packed(quantization):
        settle(model, quantization)
        known = replace(known, quantization=quantization)
    set_origin(model, known)
    if tokenizer is None or head == "image-classification":
        return model, tokenizer
    return model, with_padding(source, model, tokenizer)


def plain_model(packed: Any, head: Head) -> Any:
    """The model that a packed one was loaded as, once more and not packed, on the CPU.

    Raises:
        ScaloraError: its source is gone.
    """
    configuration = copy.deepcopy(packed.config)
    del configuration.quantization_config
    try:
        return auto_class(head).from_pretrained(
            packed.name_or_path, config=configuration, dtype=packed.dtype, ignore_mismatched_sizes=HEADS[head].labelled
        )
    except Exception as error:  # as above
        raise _cannot_load(packed.name_or_path, error) from error


def _resolve(source: str) -> str:
    """The folder or hub id that transformers shall load for `source`."""
    if source in _MADE:
        from .bytes import byte_lm
        from .digits import digits_mlp

        return str(digits_mlp() if source == "digits-mlp" else byte_lm())
    if source in packaged.ASSETS:
        if packaged.ASSETS[source].kind != "model":
            raise ScaloraError(f"model: {source!r} is a packaged data set, not a model; models are {_packaged()}")
        path = packaged.fetch(source)
        return str(_convert_gguf(path) if path.suffix == ".gguf" else path)
    path = expand_user(source)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ScaloraError(f"model: the folder {source!r} has no config.json; give one written by save_pretrained")
        return os.path.abspath(path)  # what is saved names it, and is loaded from other folders
    if path.is_file():
        if path.suffix != ".gguf":
            raise ScaloraError(f"model: {source!r} is a file but no .gguf; give a .gguf file or the model's folder")
        return str(_convert_gguf(path))
    near = get_close_matches(source, [*packaged.ASSETS, *_MADE], n=1, cutoff=0.8)
    if near:
        raise ScaloraError(f"model: no model {source!r} — did you mean {near[0]!r}?")
    # A hub id is "name" or "owner/name"; whatever else is not there is a misspelt path.
    if path.suffix == ".gguf" or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ScaloraError(
            f"model: there is no file or folder {source!r}; check the path (it is relative to {Path.cwd()})"
        )
    return source


def _names(configuration: Any) -> str:
    return ", ".join(sorted(name for name in configuration.to_dict() if not name.startswith("_")))


def _packaged() -> str:
    return ", ".join((*(name for name, asset in packaged.ASSETS.items() if asset.kind == "model"), *_MADE))


def _refuse_other_sizes(report: Any, source: str, config: dict[str, Any]) -> None:
    for name, there, wanted in sorted(report["mismatched_keys"])[:1]:
        sizes = f"{name} of {source!r} has the shape {tuple(there)}, and {tuple(wanted)} is asked for"
        if config:
            raise ScaloraError(f"config: {sizes} with {config}: leave out what changes the sizes of weights")
        raise ScaloraError(f"model: {sizes} by its config.json: its files do not go with one another; mend them")


def _at_fault(source: str, config: dict[str, Any], attention: str | None, error: Exception) -> ScaloraError | None:
    """The error where it is a value of the recipe, and not the files, that transformers does not take."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if attention is not None and any(word in reason.lower() for word in ("attn", "attention", attention.lower())):
        return ScaloraError(
            f"attn_implementation is {attention!r}: {reason[:300]}; choose eager or sdpa, or leave it out"
        )
    if config and (source in (*packaged.ASSETS, *_MADE) or expand_user(source).exists()):
        return ScaloraError(
            f"config: {source!r} cannot be loaded with {config} ({reason}): leave these values out; if it does not "
            "load without them either, its files are damaged"
        )
    return None


def _cannot_load(source: str, error: Exception) -> ScaloraError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ScaloraError(f"model: cannot load {source!r} ({reason}); {_way_out(source, error)}")


def _way_out(source: str, error: Exception) -> str:
    """What may help, by what failed: the files at hand, the hub, or the way to it."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    elsewhere = f"give a local folder, a .gguf file or a packaged model ({_packaged()})"
    if source in (*packaged.ASSETS, *_MADE) or expand_user(source).exists():
        return f"its files are damaged, or do not go with one another or the recipe: mend them, or {elsewhere}"
    causes: list[BaseException | None] = [error]
    while (cause := causes[-1]) is not None and len(causes) < 20:
        causes.append(cause.__cause__ or cause.__context__)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"the hub gives it to those alone who accepted its terms: do so on its page, log in, or {elsewhere}"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"the hub has no model of that name, or a private one: check its spelling, log in, or {elsewhere}"
    if any(isinstance(cause, (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError)) for cause in causes):
        return (
            f"the hub could not be asked, and its cache here has no such model: check its spelling and the network, or "
            f"{elsewhere}"
        )
    return f"check its spelling and the network, or {elsewhere}"


def _check_kind(source: str, config: Any, head: Head) -> None:
    if not fits(config, head):
        possible = " or ".join(other for other in HEADS if fits(config, other))
        way_out = f"choose a task for a {possible} model" if possible else "choose another model"
        article = "an" if head[0] in "aeiou" else "a"
        raise ScaloraError(
            f"model: {source!r} is a {config.model_type} model and cannot be {article} {head} model; {way_out}"
        )


def _convert_gguf(file: Path) -> Path:
    """A folder in the cache with the dequantised float32 weights of `file`, written at the first call."""
    cached = packaged.cache_dir() / "converted" / digest(file)[:16]
    if is_sealed(cached):
        if reason := damage(cached, content=False):
            raise ScaloraError(
                f"model: {cached}, converted from {file.name}, is damaged ({reason}): delete that folder"
            )
        return cached
    from transformers import AutoTokenizer

    packaged.make_folder(cached.parent)
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".converting-") as temporary:
        folder = Path(temporary) / "model"
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = auto_class("causal-lm").from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        except Exception as error:  # a damaged file breaks its parser in any way there is
            raise _cannot_load(str(file), error) from error
        # The weights are plain float32 by now, but these marks would make Trainer and save_pretrained refuse them.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        seal(folder)
        try:
            folder.rename(cached)
        except OSError:
            # Another process was faster; its copy holds the same weights.
            if not cached.exists():
                raise
    return cached
