"""Settings, job and results of a quantization run, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import block_name
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.model.workers import Workers
from qwen3_export.solve.chunk_sizes import samples_at_once
from qwen3_export.solve.method import SolvedWeight, fold_of
from qwen3_export.text.samples import Samples

if TYPE_CHECKING:
    import torch

    from qwen3_export.solve.calibration.activations import SampleFile, SpareFiles
    from qwen3_export.solve.calibration.fisher import FisherInformation


@dataclass(frozen=True)
class QuantizeSettings:
    """Settings of a run.

    Only `calibration`, `samples`, `sequence_length` and `seed` can change the codes.

    `scratch` is a folder for activations, on another disk than the output; None keeps them beside it.
    `reuse`: a finished output of the very same run is taken as it is.
    """

    calibration: str = "bundled"
    samples: int | None = None
    sequence_length: int | None = None
    seed: int = 0
    memory: int | None = None
    device: str = "cpu"
    threads: int | None = None
    resume: bool = True
    force: bool = False
    layout: str | None = None
    scratch: Path | None = None
    reuse: bool = False
    cluster: str | None = None

    def size(self, recipe: Recipe) -> tuple[int, int]:
        """Number of calibration samples, and of tokens in each."""
        samples = self.samples or recipe.calibration.get("samples", 128)
        return samples, self.sequence_length or recipe.calibration.get("sequence_length", 512)


QUANTIZED, ORIGINAL = "quantized", "original"


@dataclass(frozen=True)
class Job:
    """Everything that the block loop works with.

    `without_torch`: the model does not run (`blocks.rtn_without_torch`). `apart` is added to the names of folders with
    samples' states, so that workers on different blocks do not share one.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    method: ModuleType
    options: Any
    samples: Samples | None
    pool: Workers
    scratch: Path
    device: str = "cpu"
    fisher: FisherInformation | None = None
    spare_files: SpareFiles | None = None
    without_torch: bool = False
    apart: str = ""

    def hidden_path(self, layer: int, model: str = QUANTIZED) -> Path:
        """Path of a model's hidden states before block `layer`."""
        return self.scratch / f"{model}-{layer:04d}.samples"

    def states_folder(self, model: str, kind: str = "") -> Path:
        """Folder of a model's states inside a block; `kind` names a side run."""
        return self.scratch / f"{kind or model}-states{self.apart}"

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The type in which calibration samples are multiplied.

        It is the pool's, but fp32 where schemes round inputs, so that only that rounding is measured.
        """
        import torch

        exact = self.device != "cpu" or any(self._activations)
        return torch.float32 if exact else self.pool.matmul_dtype

    @property
    def int_matmul(self) -> bool:
        """Whether calibration samples are multiplied as integers; not where inputs are rounded too."""
        return self.device == "cpu" and self.pool.int_matmul and not any(self._activations)

    @property
    def _activations(self) -> set[str | None]:
        """How the recipe's schemes round inputs."""
        return {rule.scheme.activations for rule in self.recipe.rules if rule.scheme}

    @property
    def samples_at_once(self) -> int:
        """Calibration samples whose inputs are in memory together."""
        assert self.samples is not None
        return samples_at_once(len(self.samples.ids[0]))

    @property
    def needs_magnitudes(self) -> bool:
        """Whether mean |x| and max |x| are needed: for folds and calibrated input scales."""
        return self.fold != "none" or any(rule.scheme and rule.scheme.has_input_scale for rule in self.recipe.rules)

    @property
    def fold(self) -> str:
        """See `solve.method.fold_of`."""
        return fold_of(self.options)

    def schemes(self, layer: int) -> dict[str, QuantScheme]:
        """Schemes of a block's quantized linears by local name."""
        names = self.checkpoint.config.linear_shapes(layer)
        found = {name: self.recipe.scheme_for(f"{block_name(layer)}.{name}") for name in names}
        return {name: scheme for name, scheme in found.items() if scheme is not None}

    @property
    def token_floor(self) -> int:
        """Tokens below which the recipe's rule for experts applies."""
        return self.recipe.experts.token_floor(self.checkpoint.config.expert_width)

    def samples_of(self, model: str) -> list[int]:
        """Numbers of the samples that run through one of the models.

        With `shift_every` only some run through the original.
        """
        assert self.samples is not None
        every = getattr(self.options, "shift_every", 1) if model == ORIGINAL else 1
        return list(range(every - 1, len(self.samples.ids), every))

    @property
    def models(self) -> tuple[str, ...]:
        """The models that run: the quantized one, perhaps the original beside it."""
        beside = self.method.needs_original(self.options) and self.samples_of(ORIGINAL)
        return (QUANTIZED, ORIGINAL) if beside else (QUANTIZED,)

    def hidden_file(self, path: Path) -> SampleFile:
        """Hidden states `[1, tokens, hidden]` per sample, fp32."""
        from qwen3_export.solve.calibration.activations import SampleFile

        assert self.samples is not None
        return SampleFile(path, (1, len(self.samples.ids[0]), self.checkpoint.config.hidden_size))


@dataclass(frozen=True)
class LinearRecord:
    """The record of a quantized linear: everything but its codes."""

    scheme: QuantScheme
    error: float
    tokens: int
    fallback: str | None = None


@dataclass(frozen=True)
class BlockRecord:
    """Records of a solved block's linears, and the number of tokens of each expert."""

    linears: Mapping[str, LinearRecord]
    expert_tokens: Sequence[int] = ()


@dataclass(frozen=True)
class SolvedLinear:
    """One quantized linear, with the facts that the manifest records.

    `fallback` is the rule that was applied to an expert with too few tokens.
    """

    solved: SolvedWeight
    tokens: int
    fallback: str | None = None

    @property
    def record(self) -> LinearRecord:
        """What is said of it."""
        return LinearRecord(self.solved.tensor.scheme, self.solved.error, self.tokens, self.fallback)


@dataclass(frozen=True)
class SolvedBlock:
    """The result of solving one block.

    `linears` are the quantized linears, `replaced` the norms and router that a fold changed, `{tensor name: array}`,
    and `expert_tokens` the number of tokens of each expert in a sparse layer.
    """

    linears: dict[str, SolvedLinear]
    replaced: dict[str, NDArray] = field(default_factory=dict)
    expert_tokens: list[int] = field(default_factory=list)

    @property
    def record(self) -> BlockRecord:
        """What is said of it."""
        return BlockRecord({name: linear.record for name, linear in self.linears.items()}, self.expert_tokens)
