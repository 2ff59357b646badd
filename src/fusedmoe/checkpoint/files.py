"""Safetensors files and JSON of a directory, read with suspicion."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from fusedmoe.errors import CheckpointError, MissingDependencyError, explain

#: Types of weights that are not quantised, as safetensors names them.
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

#: Bytes that are copied at once.
_PIECE = 2**24
#: Bytes of a configuration or an index: those of the largest models have a hundredth of it.
_LARGEST_JSON = 2**28
CONVERT_AGAIN = "Download or convert the checkpoint again."
LAYER = re.compile(r"^(?:.*\.)?(?:layers|h|blocks)\.(\d{1,6})\.")
#: Ends where the names of routed experts begin; "shared_experts." are none, because of the dot before.
_BLOCK = re.compile(r"\.(?:(?=experts\.)|block_sparse_moe\.(?=input_linear\.))")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embeddings|tok_embeddings)\.weight$")


def error(what: str, *, got: object, wanted: object, do: str) -> CheckpointError:
    """A :class:`CheckpointError` with a composed message, to be raised by the caller."""
    return CheckpointError(explain(what, got=got, wanted=wanted, do=do))


def some(names: Iterable[object], limit: int = 4) -> str:
    """The first names, and how many more."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


def _ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def beside(directory: Path, name: str) -> Path | None:
    """The file of this name, which may be a link: within the directory, or into the blobs of the hub's cache.

    The cache keeps ``<model>/snapshots/<commit>/<name>`` as links to ``<model>/blobs/<hash>``.

    Raises:
        CheckpointError: it leads elsewhere, or is no file: reading a pipe or a device would never end.
    """
    path = directory / name
    if not os.path.lexists(path):
        return None
    home = Path(os.path.realpath(directory))
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(one) for one in homes):
        raise error(
            f"{path} leads out of the directory",
            got=f"a link to {real}",
            wanted="a file that lies in it, or a link of the hub's cache",
            do="Copy the file itself there, if you trust it.",
        )
    if not real.is_file():
        raise error(f"cannot read {path}", got="no regular file", wanted="one", do=CONVERT_AGAIN)
    return path


def json_object(path: Path) -> dict[str, Any]:
    """The object in a file of JSON."""
    if path.exists() and not (path.is_file() and path.stat().st_size <= _LARGEST_JSON):
        wanted = f"a regular file of at most {_LARGEST_JSON} bytes"
        raise error(f"cannot read {path}", got="another kind of file, or more", wanted=wanted, do=CONVERT_AGAIN)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"cannot read {path}", got=cause, wanted="a JSON object", do=CONVERT_AGAIN) from cause
    if not isinstance(value, dict):
        raise error(f"content of {path}", got=type(value).__name__, wanted="a JSON object", do=CONVERT_AGAIN)
    return value


class Files:
    """The tensors of a directory by name; a file is opened when the first tensor in it is asked for."""

    #: Names of the configuration and of the weights.
    CONFIG, WEIGHTS = "config.json", "model.safetensors"
    #: Names of the language model's part of a configuration, and of ModelOpt's own file.
    TEXT_CONFIGS, MODELOPT = ("text_config", "llm_config", "language_config"), "hf_quant_config.json"

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        self._handles: dict[str, Any] = {}
        self._offsets: dict[str, tuple[int, int]] = {}
        if not directory.is_dir():
            raise error(
                "checkpoint",
                got=f"{directory}, which is no directory",
                wanted=f"a directory with {self.CONFIG} and *.safetensors",
                do="Pass the local path of a downloaded model, not its name on a hub.",
            )
        beside(directory, self.CONFIG)
        config = json_object(directory / self.CONFIG)
        if not config.get("quantization_config") and beside(directory, self.MODELOPT):
            quantization = json_object(directory / self.MODELOPT).get("quantization")
            if isinstance(quantization, dict):
                config["quantization_config"] = {"quant_method": "modelopt", **quantization}
        part: dict[str, Any] = next((config[key] for key in self.TEXT_CONFIGS if isinstance(config.get(key), dict)), {})
        # What the part leaves open, the whole may say.
        said = {key: value for key, value in part.items() if value is not None or key not in config}
        self.config: dict[str, Any] = {**config, **said}
        self._file_of = self._find_files()

    def _find_files(self) -> dict[str, str]:
        single, index = self.directory / self.WEIGHTS, self.directory / f"{self.WEIGHTS}.index.json"
        if beside(self.directory, single.name):
            with _broken_file(single):
                return dict.fromkeys(self._handle(single.name).keys(), single.name)
        if not beside(self.directory, index.name):
            pickles = [path.name for path in sorted(self.directory.glob("*.bin"))]
            raise error(
                f"no safetensors weights in {self.directory}",
                got=some(pickles) or "no weights",
                wanted=f"{single.name} or {index.name}",
                do="Pickled weights are never opened, as they can run code: convert them to safetensors."
                if pickles
                else CONVERT_AGAIN,
            )
        files = json_object(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise error(f"weight_map of {index}", got=type(files).__name__, wanted="names of files", do=CONVERT_AGAIN)
        for file in set(files.values()):
            # Bare names only, of what it is then looked at when it is opened.
            if not re.fullmatch(r"[^/\\:\0]+\.safetensors", file):
                raise error(
                    f"weight_map of {index} names a file outside of the directory, or of another kind",
                    got=repr(file),
                    wanted="the bare name of a .safetensors file beside the index",
                    do="Do not use this checkpoint unless you trust where it comes from and know why.",
                )
        return files

    def _handle(self, file: str) -> Any:
        """To be called under :func:`_broken_file`."""
        if file not in self._handles:
            beside(self.directory, file)
            handle = _safetensors().safe_open(self.directory / file, framework="pt", device="cpu")
            self._handles[file] = self._stack.enter_context(handle)
        return self._handles[file]

    @property
    def names(self) -> Iterable[str]:
        """All tensor names."""
        return self._file_of.keys()

    def under(self, prefix: str) -> list[str]:
        """Tensor names that start with prefix."""
        return [name for name in self._file_of if name.startswith(prefix)]

    def first(self, prefix: str, suffixes: Iterable[str]) -> str | None:
        """The first of prefix + suffix that exists."""
        return next((prefix + suffix for suffix in suffixes if prefix + suffix in self._file_of), None)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type of a tensor, as safetensors names it; no data is read."""
        file = self._file_of[name]
        with _broken_file(self.directory / file):
            tensor = self._handle(file).get_slice(name)
            return tuple(tensor.get_shape()), tensor.get_dtype()

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> torch.Tensor:
        """``tensor[index]``; no more than that is read. It lies in the file: copy it before the files are closed."""
        file = self._file_of[name]
        with _broken_file(self.directory / file):
            handle = self._handle(file)
            tensor: torch.Tensor = handle.get_slice(name)[index] if index else handle.get_tensor(name)
            return tensor

    def raw(self, name: str) -> tuple[str, tuple[int, ...], int, Iterator[bytes]]:
        """Type, shape, size and bytes, in pieces, of a tensor of any type."""
        shape, kind = self.header(name)  # opens the file, which checks what its header says
        path = self.directory / self._file_of[name]
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if name not in self._offsets:
                header = json.loads(file.read(length))
                own = (key for key in header if self._file_of.get(key) == path.name)
                self._offsets.update({key: header[key]["data_offsets"] for key in own})
        start, stop = self._offsets[name]

        def pieces() -> Iterator[bytes]:
            with path.open("rb") as file:
                file.seek(8 + length + start)
                for left in range(stop - start, 0, -_PIECE):
                    yield file.read(min(left, _PIECE))

        return kind, shape, stop - start, pieces()

    def nbytes(self) -> int:
        """Size of all files of tensors."""
        return sum((self.directory / file).stat().st_size for file in set(self._file_of.values()))

    def tensor(
        self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype | None, device: str | torch.device
    ) -> torch.Tensor:
        """A tensor that must have this shape, with any size where it says None, in memory of its own."""
        got, kind = self.header(name)
        stored_dtype = FLOATS.get(kind)
        fits = len(got) == len(shape) and all(want in (None, size) for want, size in zip(shape, got, strict=True))
        if not fits or stored_dtype is None:
            raise error(
                f"tensor {name}",
                got=f"shape {got} of {stored_dtype or f'{kind}, a type that is not float'}",
                wanted=f"floats of shape {tuple('any' if want is None else want for want in shape)}",
                do=CONVERT_AGAIN,
            )
        return torch.empty(got, dtype=dtype or stored_dtype, device=device).copy_(self.read(name))

    def blocks(self) -> tuple[dict[int, set[str]], set[int]]:
        """Of each layer with experts the prefixes of its mixtures, what comes before ``experts.``; and all layers."""
        blocks: dict[int, set[str]] = {}
        layers: set[int] = set()
        for name in self._file_of:
            if found := LAYER.match(name):
                number = int(found[1])
                layers.add(number)
                # Heads that predict further tokens number their layers anew, from 0.
                if (block := _BLOCK.search(name, found.end() - 1)) and "mtp" not in name.split("."):
                    blocks.setdefault(number, set()).add(name[: block.end()])
        return blocks, layers

    def block(self, layer: int) -> str:
        """Prefix of the names of one layer's mixture."""
        blocks, layers = self.blocks()
        if type(layer) is not int or layer not in blocks:
            raise error(
                f"layer {layer} of {self.directory}",
                got="a layer without routed experts" if type(layer) is int and layer in layers else "no such layer",
                wanted=f"one of the layers with experts: {_ranges(blocks)}" if blocks else "a layer with experts",
                do="Choose one of them." if blocks else "No layer here has experts under a known name.",
            )
        if len(blocks[layer]) > 1:
            raise error(
                f"layer {layer} of {self.directory} is not unique",
                got=some(sorted(blocks[layer])),
                wanted="one set of experts",
                do="Save the language model alone, and read that.",
            )
        return next(iter(blocks[layer]))


class Tensors(Files):
    """The tensors of a module, as if they lay in a directory with this configuration."""

    def __init__(self, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        self.directory = Path("memory")
        self.config = config
        self._tensors = tensors
        self._file_of = dict.fromkeys(tensors, "")

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type, as safetensors names it; others by torch's name."""
        tensor = self._tensors[name]
        return tuple(tensor.shape), _KINDS.get(tensor.dtype, str(tensor.dtype))

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> torch.Tensor:
        """``tensor[index]`` on the CPU, where words are taken apart."""
        return self._tensors[name].detach()[index].cpu()


_KINDS = {
    **{dtype: kind for kind, dtype in FLOATS.items()},
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError as cause:
        raise MissingDependencyError(
            explain(
                "reading a checkpoint",
                got="no package safetensors",
                wanted="safetensors >= 0.4",
                do='Run pip install "fusedmoe[cli]".',
            )
        ) from cause
    return safetensors


@contextmanager
def _broken_file(path: Path) -> Iterator[None]:
    """Turn what safetensors raises on a missing or damaged file into a CheckpointError."""
    try:
        yield
    except (_safetensors().SafetensorError, OSError) as cause:
        raise error(f"cannot read {path}", got=cause, wanted="an intact safetensors file", do=CONVERT_AGAIN) from cause


@contextmanager
def open_checkpoint(directory: str | os.PathLike[str], kind: type[Files] = Files) -> Iterator[Files]:
    """Open a directory; the files that were opened on the way are closed at the end."""
    if not isinstance(directory, (str, os.PathLike)) or "\0" in str(directory):
        do = "Pass the path of a directory."
        raise error("checkpoint", got=repr(directory), wanted="a str or os.PathLike", do=do)
    with ExitStack() as stack:
        yield kind(Path(directory), stack)
