"""What a command looks at: a model and the inputs of one call, from a name, a directory, a file or a function.

smollm2, minilm          the demo's models, with one of its prompts
path/to/model            a directory saved with save_pretrained, or a .gguf file
llama --random           a configuration of transformers, cut down, with random weights
package.module:function  whatever it returns: (model, inputs); file.py:function does too
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxopt.cli import inputs
from fxopt.cli.console import UserError
from fxopt.cli.demo import PROMPTS, SENTENCES

#: what says how wide and deep a transformer is, under the names that configurations use; first what it is cut to
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth")
_WIDTHS = {
    64: ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim"),
    128: ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"),
    4: ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
    16: ("head_dim", "d_kv"),
}

#: a random model with more parameters than this is not built
_PARAMETERS = 1_500_000_000


@dataclass(frozen=True)
class Subject:
    """A model and what it is called with."""

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def subject(
    given: str, *, random: bool, layers: int, prompt: str | None, dtype: str, device: str, say: Callable[[str], None]
) -> Subject:
    """The model that the user named, with inputs. Raises UserError, one line, where there is none."""
    where, as_dtype = inputs.device(device), inputs.dtype(dtype)
    if ":" in given and not Path(given).exists():
        if random:
            raise UserError(f"--random is for a configuration's name: {given} makes its own model")
        say(f"calling {given}")
        return _from_function(given)
    if random:
        say(f"making a small {given} with random weights")
        return _random(given, layers, as_dtype, where)
    _hint_at_random(given)
    source = inputs.model_source(given)
    say(f"reading {source.name} from {source.gguf or source.directory.name}")
    return _loaded(source, prompt, as_dtype, where)


def _from_function(given: str) -> Subject:
    where, _, path = given.rpartition(":")
    try:
        made: Any = _module(where)
        for name in path.split("."):
            made = getattr(made, name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise UserError(f"can't find {given}: {type(error).__name__}: {_one_line(error)}") from None
    if not callable(made):
        raise UserError(f"{given} is a {type(made).__name__}: name a function that returns (model, inputs)")
    try:
        result = made()
    except Exception as error:
        raise UserError(f"{given} raised {type(error).__name__}: {_one_line(error)}") from error
    if not (isinstance(result, (tuple, list)) and len(result) == 2 and callable(result[0])):
        raise UserError(
            f"{given} returned a {type(result).__name__}: return (model, inputs), inputs a tensor, a tuple or a dict"
        )
    model, given_inputs = result
    if isinstance(given_inputs, Mapping):
        return Subject(given, model, (), dict(given_inputs))
    return Subject(given, model, tuple(given_inputs) if isinstance(given_inputs, (tuple, list)) else (given_inputs,))


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)  # as `python -m` does
        return importlib.import_module(where)
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    if spec is None or spec.loader is None or not Path(where).is_file():
        raise ImportError(f"no file {where}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch and fxopt look sources up there
    spec.loader.exec_module(module)
    return module


def _loaded(source: Any, prompt: str | None, dtype: Any, device: Any) -> Subject:
    from fxopt.demo.generate import encode
    from fxopt.demo.models import DemoError

    loaded = inputs.load_model(source, dtype, device)
    try:
        if loaded.kind == "generation":
            ids = encode(loaded, prompt or PROMPTS[0])
            return Subject(source.name, loaded.model, (ids,), {"use_cache": False})
    except DemoError as error:
        raise UserError(str(error)) from None
    batch = loaded.tokenizer([prompt or SENTENCES[0]], return_tensors="pt").to(loaded.device)
    names = ("input_ids", "attention_mask")
    return Subject(source.name, loaded.model, (), {name: batch[name] for name in names})


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("this needs transformers: pip install 'fxopt[demo]'") from None
    return transformers


def _hint_at_random(given: str) -> None:
    from fxopt.demo.models import WHEELS

    if given in WHEELS or Path(given).exists() or importlib.util.find_spec("transformers") is None:
        return
    if given in _transformers().CONFIG_MAPPING:
        raise UserError(f"{given} is a configuration's name: add --random for a small model with random weights")


def _random(given: str, layers: int, dtype: Any, device: Any) -> Subject:
    """A cut-down model; where it can't be cut in width, only in depth."""
    import torch

    transformers = _transformers()
    failure: Exception | None = None
    for cut in (_cut, _shorten):
        config = cut(_config(given, transformers), layers)
        causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in loader.from_config(config).parameters())
            if size > _PARAMETERS:
                raise UserError(
                    f"a {given} of {layers} layers has {size / 1e9:.1f} billion parameters: save a smaller one"
                )
            torch.manual_seed(0)
            model = loader.from_config(config, dtype=dtype).eval().requires_grad_(False).to(device)
            kwargs = {name: value.to(device) for name, value in _inputs(model, config, dtype).items()}
            kwargs |= {"use_cache": False} if causal else {}
            with torch.inference_mode():
                model(**kwargs)
            return Subject(f"random {given}", model, (), kwargs)
        except UserError as error:
            raise error if failure is None else UserError(f"{error} (smaller: {_one_line(failure)})") from None
        except Exception as error:  # what a configuration can't be cut to shows in any way
            failure = failure or error
    raise UserError(f"can't make a random {given}: {_one_line(failure)}; write a function that returns (model, inputs)")


def _config(given: str, transformers: Any) -> Any:
    if (Path(given) / "config.json").is_file():
        try:
            return transformers.AutoConfig.from_pretrained(given, local_files_only=True)
        except Exception as error:
            raise UserError(f"transformers can't read the configuration in {given}: {_one_line(error)}") from None
    known = list(transformers.CONFIG_MAPPING)
    if given not in known:
        near = difflib.get_close_matches(given, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"no configuration {given!r}: {hint}give a model type of transformers, such as llama or bert")
    return transformers.AutoConfig.for_model(given)


def _parts(config: Any) -> list[Any]:
    found = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    return [part for part in found if part is not None]


def _shorten(config: Any, layers: int) -> Any:
    for part in _parts(config):
        for name in _DEPTHS:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, layers)
        if isinstance(kinds := getattr(part, "layer_types", None), list):
            part.layer_types = kinds[:layers]
    return config


def _cut(config: Any, layers: int) -> Any:
    for part in _parts(_shorten(config, layers)):
        heads, groups = getattr(part, "num_attention_heads", None), getattr(part, "num_key_value_heads", None)
        for size, names in _WIDTHS.items():
            for name in names:
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, size)
        if isinstance(groups, int):
            part.num_key_value_heads = 4 if groups == heads else 2
        if isinstance(getattr(part, "vocab_size", None), int):
            tokens = [v for k, v in part.to_dict().items() if k.endswith("_token_id") and isinstance(v, int)]
            part.vocab_size = max([256, *(token + 1 for token in tokens)])
    return config


def _inputs(model: Any, config: Any, dtype: Any) -> dict[str, Any]:
    import torch

    name = model.main_input_name
    if name == "pixel_values":
        sizes = [getattr(part, "image_size", None) for part in _parts(config)]
        size = next((s for s in sizes if s), 32)
        channels = next((c for p in _parts(config) if (c := getattr(p, "num_channels", None))), 3)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {name: torch.randn(2, channels, height, width, dtype=dtype)}
    if name == "input_values":
        return {name: torch.randn(2, 4000, dtype=dtype)}
    ids = torch.arange(32).reshape(2, 16) % 250 + 3
    if name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 50)
        made = {name: torch.randn(2, getattr(config, "num_mel_bins", 80), frames, dtype=dtype)}
    else:
        made = {name: ids}
    return made | {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else made


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:300]
