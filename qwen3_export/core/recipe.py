"""Recipes: which tensors are quantized, to which scheme, by which method.

A recipe is an ordered list of name patterns. The first pattern that matches a linear's module name
(`model.layers.3.mlp.down_proj`, shell wildcards) decides its scheme; a linear that no pattern
matches, or one whose scheme is `none`, stays in 16 bits. Router and norms always do. A scheme may be the name of a
ggml type, such as `q4_k`.

The embedding and the output head take part only when a rule names them exactly, `model.embed_tokens`
and `lm_head`; no wildcard reaches them. A tied model has one matrix for both: the rule of
`model.embed_tokens` decides it, it stays tied, and a rule for `lm_head` must then ask for the same
scheme. So a recipe with the same scheme for both fits tied and untied models alike.

    name: gptq-w4a16-g128
    description: GPTQ, 4-bit weights, one scale per 128 inputs
    method: gptq                          # a module of solve/methods
    rules:
      - match: model.embed_tokens
        scheme: {num_bits: 8, symmetric: true, strategy: group, group_size: 32}
      - match: "*"
        scheme: {num_bits: 4, symmetric: true, strategy: group, group_size: 128}
    options: {percdamp: 0.01}             # the method's own
    calibration: {samples: 128, sequence_length: 512}
    experts: {min_tokens: 4096, fallback: share}  # for experts that the router sends fewer tokens
    layout: compressed-tensors            # how the folder stores it, unless --layout says otherwise
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3_export.core.files import read_yaml
from qwen3_export.core.gguf_types import FILE_TYPES, module_types
from qwen3_export.core.qwen3 import EMBEDDING, HEAD, Qwen3Config
from qwen3_export.core.resources import resource
from qwen3_export.core.scheme import GGML_TYPES, QuantScheme, check_keys, scheme_of_type
from qwen3_export.errors import RecipeError

DEFAULT_LAYOUT = "compressed-tensors"
_EXPERT = re.compile(r"\.experts\.\d+\.")
FALLBACKS = ("share", "rtn")
_MOST_TOKENS, _MOST_FLOOR = 1 << 20, 10**9
_KEYS = ["name", "description", "method", "rules", "file_type", "options", "calibration", "experts", "layout"]


@dataclass(frozen=True)
class Rule:
    """Linears whose module name matches `match` get `scheme`; None leaves them in 16 bits."""

    match: str
    scheme: QuantScheme | None

    def matches(self, module: str) -> bool:
        """Whether the rule is about this module; embedding and head must be named exactly."""
        return self.match == module if module in (EMBEDDING, HEAD) else fnmatch.fnmatchcase(module, self.match)


@dataclass(frozen=True)
class ExpertRule:
    """What is done with an expert that fewer than `min_tokens` calibration tokens reach.

    `share` mixes the expert's statistics with those of all the layer's tokens, in proportion to the tokens it lacks;
    `rtn` rounds it without inputs. See `calibration.experts`. `min_tokens` 0 turns the rule off. None stands for twice
    the inputs of an expert's widest linear: with so many tokens, mixing would lower GPTQ's error on other text by at
    most 15 %, while with half as many the error is about 1.5 times as large (measured on clusters of the reference
    model's tokens).
    """

    min_tokens: int | None = None
    fallback: str = "share"

    def token_floor(self, width: int) -> int:
        """The number of tokens below which the rule applies.

        `width` is the number of inputs of an expert's widest linear.
        """
        return 2 * width if self.min_tokens is None else self.min_tokens

    @classmethod
    def from_dict(cls, values: object, where: str) -> ExpertRule:
        """Build from plain values; raises RecipeError that names the key and what was expected."""
        if not isinstance(values, dict):
            raise RecipeError(f"{where}: a mapping was expected, found {type(values).__name__}")
        check_keys(values, ["min_tokens", "fallback"], where)
        rule = cls(**values)
        if rule.min_tokens is not None and (
            type(rule.min_tokens) is not int or not 0 <= rule.min_tokens <= _MOST_FLOOR
        ):
            raise RecipeError(f"{where}: min_tokens is {rule.min_tokens!r}, a number of tokens was expected")
        if rule.fallback not in FALLBACKS:
            raise RecipeError(f"{where}: fallback is {rule.fallback!r}; one of {list(FALLBACKS)} was expected")
        return rule


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. `options` belong to the method and are checked by it.

    `file_type` names a mix of llama.cpp (`q4_k_m`), which decides the type of every matrix that no rule names.
    """

    name: str
    method: str
    rules: tuple[Rule, ...]
    description: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, int] = field(default_factory=dict)
    experts: ExpertRule = ExpertRule()
    layout: str = DEFAULT_LAYOUT
    file_type: str = ""

    def for_model(self, config: Qwen3Config) -> Recipe:
        """The recipe with its file type spelled out as rules for one model."""
        if not self.file_type:
            return self
        types = module_types(config, self.file_type, weighed=self.method != "rtn")
        names = {_EXPERT.sub(".experts.*.", module): name for module, name in types.items()}
        common = Counter(name for module, name in names.items() if module not in (EMBEDDING, HEAD)).most_common(1)[0][0]
        named = {module: name for module, name in names.items() if name != common or module in (EMBEDDING, HEAD)}
        rules = [Rule(module, _scheme(name)) for module, name in named.items()]
        return dataclasses.replace(self, rules=(*self.rules, *rules, Rule("*", _scheme(common))), file_type="")

    def scheme_for(self, module: str) -> QuantScheme | None:
        """The scheme of one matrix, by module name.

        None when it stays in 16 bits.
        """
        return next((rule.scheme for rule in self.rules if rule.matches(module)), None)

    def check_against(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """Validate against every matrix of a model, `{module name: [out, in]}`.

        A tied head must be absent. Raises RecipeError when a rule matches nothing, a group does not divide a matrix, a
        tied head and its embedding would differ, or nothing would be quantized at all.
        """
        tied = EMBEDDING in linears and HEAD not in linears
        for rule in self.rules:
            if not any(map(rule.matches, linears)) and not (tied and rule.match == HEAD):
                raise RecipeError(
                    f"recipe {self.name}: the pattern {rule.match!r} matches no linear of this model",
                    f"linears are named like {next(iter(linears))}, embedding and head exactly {EMBEDDING} and {HEAD}",
                )
        if tied and any(rule.match == HEAD for rule in self.rules):
            self._check_tied()
        for name, shape in linears.items():
            if scheme := self.scheme_for(name):
                if name in (EMBEDDING, HEAD):
                    _check_outer(name, scheme)
                scheme.check_shape(name, shape)
        if not any(self.scheme_for(name) for name in linears):
            raise RecipeError(f"recipe {self.name} quantizes no tensor of this model")

    def _check_tied(self) -> None:
        """Raise RecipeError when a tied head and its embedding have different schemes."""
        head, embedding = self.scheme_for(HEAD), self.scheme_for(EMBEDDING)
        if head != embedding:
            found, wanted = (scheme.label if scheme else "16 bits" for scheme in (head, embedding))
            raise RecipeError(
                f"recipe {self.name}: {HEAD} is to be {found}, but this model ties it to {EMBEDDING}, "
                f"which is to be {wanted}",
                f"a rule for {EMBEDDING} decides the one matrix; give {HEAD} the same scheme, or no rule",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and the manifest; `Recipe.from_dict` reads them back."""
        return {
            "name": self.name,
            "description": self.description,
            "method": self.method,
            "rules": [{"match": r.match, "scheme": r.scheme.to_dict() if r.scheme else None} for r in self.rules],
            "options": dict(self.options),
            "calibration": dict(self.calibration),
            "experts": dataclasses.asdict(self.experts),
            "layout": self.layout,
            **({"file_type": self.file_type} if self.file_type else {}),
        }

    @property
    def sha256(self) -> str:
        """Hash of everything that decides the codes.

        Name and description do not; the layout is left out because a run's identity names it separately.
        """
        values = {k: v for k, v in self.to_dict().items() if k not in ("name", "description", "layout")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_dict(cls, values: object, where: str) -> Recipe:
        """Build from parsed YAML; raises RecipeError that names the key and what was expected."""
        if not isinstance(values, dict):
            raise RecipeError(f"{where}: a mapping was expected, found {type(values).__name__}")
        check_keys(values, _KEYS, where)
        for key in ("name", "method"):
            if not isinstance(values.get(key), str):
                raise RecipeError(f"{where}: {key!r} is missing or no text")
        options, calibration = values.get("options") or {}, values.get("calibration") or {}
        experts = values.get("experts")
        if not isinstance(options, dict) or not isinstance(calibration, dict):
            raise RecipeError(f"{where}: 'options' and 'calibration' must be mappings")
        check_keys(calibration, ["samples", "sequence_length"], f"{where}, calibration")
        for key, value in calibration.items():
            if type(value) is not int or not 1 <= value <= _MOST_TOKENS:
                raise RecipeError(
                    f"{where}, calibration: {key} is {value!r}, a positive number up to {_MOST_TOKENS:,} was expected"
                )
        file_type = values.get("file_type", "")
        if file_type and file_type not in FILE_TYPES:
            raise RecipeError(f"{where}: file_type is {file_type!r}; one of {', '.join(FILE_TYPES)} was expected")
        return cls(
            name=values["name"],
            method=values["method"],
            rules=() if file_type and not values.get("rules") else _rules(values.get("rules"), where),
            file_type=file_type,
            description=str(values.get("description", "")),
            options=options,
            calibration=calibration,
            experts=ExpertRule.from_dict({} if experts is None else experts, f"{where}, experts"),
            layout=str(values.get("layout", DEFAULT_LAYOUT)),
        )


def _scheme(type_name: str) -> QuantScheme | None:
    """The scheme of a ggml type; None for one of 16 bits."""
    return scheme_of_type(type_name) if type_name in GGML_TYPES else None


def _check_outer(name: str, scheme: QuantScheme) -> None:
    """Raise RecipeError for a scheme that embedding or head cannot have.

    Both are solved in pieces of rows, so no two rows may share a scale.
    """
    if not scheme.per_row or scheme.scale_dtype == "e4m3":
        raise RecipeError(
            f"{name} ({scheme.label}): its rows are solved and looked up on their own, so none may share a scale",
            "use strategy: group or channel, and no NVFP4",
        )
    if name == EMBEDDING and scheme.activations:
        raise RecipeError(f"{name} ({scheme.label}): its inputs are token ids, which nothing can round")


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
        elif isinstance(scheme, str):
            rules.append(Rule(item["match"], scheme_of_type(scheme)))
        elif isinstance(scheme, dict):
            rules.append(Rule(item["match"], QuantScheme.from_dict(scheme, here)))
        else:
            raise RecipeError(f"{here}: scheme is {scheme!r}, a mapping, a ggml type's name or none was expected")
    return tuple(rules)


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in resource("recipes").glob("*.yaml"))


def load_recipe(spec: str) -> Recipe:
    """The shipped recipe of a name, or the recipe in a YAML file.

    Raises RecipeError naming the key, what was found and what was expected.
    """
    path = resource("recipes") / f"{spec}.yaml"
    if not path.is_file() or "/" in spec:
        path = Path(spec)
    if not path.is_file():
        near = difflib.get_close_matches(spec, recipe_names(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`qwen3-export recipes list` shows them all"
        raise RecipeError(f"no recipe is called {spec!r} and no such file exists", hint)
    return Recipe.from_dict(read_yaml(path, RecipeError), str(path))
