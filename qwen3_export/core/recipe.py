"""Recipes: which tensors are quantized, to which scheme, by which method.

A recipe is an ordered list of name patterns. The first pattern that matches a linear's module name
(`model.layers.3.mlp.down_proj`, shell wildcards) decides its scheme; a linear that no pattern
matches, or one whose scheme is `none`, stays in 16 bits. Only the linears inside decoder blocks are
candidates: router, norms, embedding and `lm_head` stay as they are.

    name: gptq-w4a16-g128
    description: GPTQ, 4-bit weights, one scale per 128 inputs
    method: gptq                          # a file of qwen3_export/solve
    rules:
      - match: "*"
        scheme: {num_bits: 4, symmetric: true, strategy: group, group_size: 128}
    options: {percdamp: 0.01}             # the method's own
    calibration: {samples: 128, sequence_length: 512}
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qwen3_export.core.resources import resource
from qwen3_export.errors import RecipeError

SCALE_DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class QuantScheme:
    """How the numbers of one weight matrix `[out, in]` are stored.

    `strategy` says what shares one scale: the whole `tensor`, an output `channel`, or a `group` of
    `group_size` consecutive inputs of one output channel. Integer codes are unsigned in memory; a
    symmetric scheme has the implicit zero point `2 ** (num_bits - 1)`.
    """

    num_bits: int = 4
    type: str = "int"
    symmetric: bool = True
    strategy: str = "group"
    group_size: int | None = 128
    scale_dtype: str = "bf16"

    def __post_init__(self) -> None:
        self._check_choice("type", self.type, ("int",))
        self._check_choice("strategy", self.strategy, ("channel", "group"))
        self._check_choice("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        self._check_choice("num_bits", self.num_bits, (2, 4, 8))
        self._check_choice("symmetric", self.symmetric, (True, False))
        if self.strategy == "group":
            if type(self.group_size) is not int or self.group_size < 1:
                raise RecipeError(
                    f"group_size is {self.group_size!r}: a positive whole number was expected",
                    "use 32, 64 or 128, or strategy: channel for one scale per output row",
                )
        elif self.group_size is not None:
            object.__setattr__(self, "group_size", None)

    @staticmethod
    def _check_choice(key: str, value: object, choices: tuple[object, ...]) -> None:
        if type(value) is not type(choices[0]) or value not in choices:
            raise RecipeError(f"scheme has {key}: {value!r}; one of {list(choices)} was expected")

    @property
    def label(self) -> str:
        """A short name, e.g. `w4-g128-sym`, used in tables and manifests."""
        grain = f"g{self.group_size}" if self.strategy == "group" else "channel"
        return f"w{self.num_bits}-{grain}-{'sym' if self.symmetric else 'asym'}"

    @property
    def midpoint(self) -> int:
        """The implicit zero point of a symmetric scheme."""
        return 1 << (self.num_bits - 1)

    @property
    def max_code(self) -> int:
        """The largest unsigned code."""
        return (1 << self.num_bits) - 1

    def group_length(self, in_features: int) -> int:
        """Number of consecutive inputs that share one scale."""
        return self.group_size if self.group_size is not None else in_features

    def num_groups(self, in_features: int) -> int:
        """Number of scales per output row."""
        return in_features // self.group_length(in_features)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise RecipeError when a weight `[out, in]` cannot be cut into this scheme's groups."""
        if len(shape) != 2:
            raise RecipeError(f"{name}: only matrices can be quantized, its shape is {list(shape)}")
        if shape[1] % self.group_length(shape[1]):
            raise RecipeError(
                f"{name}: its {shape[1]} inputs are not divisible by group_size {self.group_size}",
                f"use a group_size that divides {shape[1]}, or a rule that leaves this tensor in 16 bits",
            )

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Storage per weight in bits, scales and zero points included."""
        scale_bits = 32 if self.scale_dtype == "fp32" else 16
        zero_bits = 0 if self.symmetric else self.num_bits
        return self.num_bits + (scale_bits + zero_bits) * self.num_groups(shape[1]) / shape[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "scheme") -> QuantScheme:
        """Build from plain values; RecipeError names an unknown key and its nearest neighbour."""
        check_keys(values, [f.name for f in dataclasses.fields(cls)], where)
        if values.get("strategy") == "channel":
            values = {**values, "group_size": None}
        return cls(**values)


@dataclass(frozen=True)
class Rule:
    """Linears whose module name matches `match` get `scheme`; None leaves them in 16 bits."""

    match: str
    scheme: QuantScheme | None


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. `options` belong to the method and are checked by it."""

    name: str
    method: str
    rules: tuple[Rule, ...]
    description: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, int] = field(default_factory=dict)

    def scheme_for(self, module: str) -> QuantScheme | None:
        """The scheme of one linear, by module name; None when it stays in 16 bits."""
        for rule in self.rules:
            if fnmatch.fnmatchcase(module, rule.match):
                return rule.scheme
        return None

    def check_against(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """Validate against every linear of a model: `{module name: [out, in]}`.

        Raises RecipeError when a rule matches nothing, a group does not divide a matrix, or nothing
        would be quantized at all.
        """
        for rule in self.rules:
            if not any(fnmatch.fnmatchcase(name, rule.match) for name in linears):
                raise RecipeError(
                    f"recipe {self.name}: the pattern {rule.match!r} matches no linear of this model",
                    f"linears are named like {next(iter(linears))}",
                )
        for name, shape in linears.items():
            if scheme := self.scheme_for(name):
                scheme.check_shape(name, shape)
        if not any(self.scheme_for(name) for name in linears):
            raise RecipeError(f"recipe {self.name} quantizes no tensor of this model")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and the manifest; `Recipe.from_dict` reads them back."""
        return {
            "name": self.name,
            "description": self.description,
            "method": self.method,
            "rules": [{"match": r.match, "scheme": r.scheme.to_dict() if r.scheme else None} for r in self.rules],
            "options": dict(self.options),
            "calibration": dict(self.calibration),
        }

    @property
    def sha256(self) -> str:
        """Hash of everything that decides the bytes (name and description do not)."""
        values = {k: v for k, v in self.to_dict().items() if k not in ("name", "description")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_dict(cls, values: object, where: str) -> Recipe:
        """Build from parsed YAML; raises RecipeError that names the key and what was expected."""
        if not isinstance(values, dict):
            raise RecipeError(f"{where}: a mapping was expected, found {type(values).__name__}")
        check_keys(values, ["name", "description", "method", "rules", "options", "calibration"], where)
        for key in ("name", "method"):
            if not isinstance(values.get(key), str):
                raise RecipeError(f"{where}: {key!r} is missing or no text")
        options, calibration = values.get("options") or {}, values.get("calibration") or {}
        if not isinstance(options, dict) or not isinstance(calibration, dict):
            raise RecipeError(f"{where}: 'options' and 'calibration' must be mappings")
        check_keys(calibration, ["samples", "sequence_length"], f"{where}, calibration")
        for key, value in calibration.items():
            if type(value) is not int or value < 1:
                raise RecipeError(f"{where}, calibration: {key} is {value!r}, a positive number was expected")
        return cls(
            name=values["name"],
            method=values["method"],
            rules=_rules(values.get("rules"), where),
            description=str(values.get("description", "")),
            options=options,
            calibration=calibration,
        )


def _rules(items: object, where: str) -> tuple[Rule, ...]:
    if not isinstance(items, list) or not items:
        raise RecipeError(f"{where}: 'rules' must be a list with at least one rule")
    rules = []
    for number, item in enumerate(items, 1):
        here = f"{where}, rule {number}"
        if not isinstance(item, dict) or not isinstance(item.get("match"), str):
            raise RecipeError(f"{here}: a mapping with a 'match' pattern was expected")
        check_keys(item, ["match", "scheme"], here)
        scheme = item.get("scheme")
        if scheme is None or scheme == "none":
            rules.append(Rule(item["match"], None))
        elif isinstance(scheme, dict):
            rules.append(Rule(item["match"], QuantScheme.from_dict(scheme, here)))
        else:
            raise RecipeError(f"{here}: scheme is {scheme!r}, a mapping or none was expected")
    return tuple(rules)


def check_keys(values: Iterable[Any], known: list[str], where: str, error: type[RecipeError] = RecipeError) -> None:
    """Raise RecipeError for the first unknown key, with the nearest known one as the hint."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise error(f"{where}: unknown key {key!r}", hint)


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in resource("recipes").glob("*.yaml"))


def load_recipe(spec: str) -> Recipe:
    """Load a shipped recipe by name or any recipe by its YAML path; raises RecipeError."""
    path = resource("recipes") / f"{spec}.yaml"
    if not path.is_file() or "/" in spec:
        path = Path(spec)
    if not path.is_file():
        near = difflib.get_close_matches(spec, recipe_names(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`qwen3-export recipes list` shows them all"
        raise RecipeError(f"no recipe is called {spec!r} and no such file exists", hint)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(f"{path}: not a readable YAML file ({first})") from error
    return Recipe.from_dict(values, str(path))
