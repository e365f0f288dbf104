"""The comparisons: storage schemes, with the peers' methods and our recipes for each."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from qwen3_export.core.recipe import Recipe, load_recipe
from qwen3_export.errors import RecipeError

# Scheme → peer → its methods that store exactly this scheme.
PEERS = {
    "w4-g128": {
        "gptqmodel": ["rtn", "gptq", "gptq-mse", "gptaq"],
        "llmcompressor": ["rtn", "gptq", "gptq-mse", "awq+rtn", "awq+gptq-mse"],
        "autoround": ["opt-rtn", "tuned200"],
    },
    "w4-g128-asym": {
        "gptqmodel": ["awq", "gptq"],
        "llmcompressor": ["rtn", "awq+rtn", "gptq-mse"],
        "autoround": ["opt-rtn"],
    },
    "w4-g32": {"gptqmodel": ["gptq"], "llmcompressor": ["rtn", "gptq-mse"], "autoround": ["opt-rtn"]},
    "fp8-dynamic": {"llmcompressor": ["rtn"]},
    "fp8-static": {"llmcompressor": ["rtn"]},
    "fp8-block": {"llmcompressor": ["rtn"]},
    "int8": {"llmcompressor": ["rtn", "smoothquant+rtn", "smoothquant+gptq"]},
    "mxfp4": {"llmcompressor": ["rtn", "gptq"]},
    "nvfp4": {"llmcompressor": ["rtn", "gptq"]},
}
ALIASES = {"awq": ["w4-g128-asym"], "fp8": ["fp8-dynamic", "fp8-static", "fp8-block"]}
RECIPES = (
    "rtn-w4a16-g128",
    "rtn-weighted-w4a16-g128",
    "gptq-plain-w4a16-g128",
    "gptq-w4a16-g128",
    "gptq-max-w4a16-g128",
    "gptq-signed-w4a16-g128",
    "awq-w4a16-g128",
    "awq-gptq-w4a16-g128",
    "awq-w4a16-g128-asym",
    "awq-gptq-w4a16-g128-asym",
    "rtn-w4a16-g32",
    "gptq-w4a16-g32",
    "gptq-max-w4a16-g32",
    "fp8-dynamic",
    "fp8-static",
    "fp8-block128",
    "int8-dynamic",
    "int8-smooth-dynamic",
    "mxfp4-w4a16",
    "nvfp4-w4a16",
)
# Recipes for comparison only, which are not shipped.
OWN = Path(__file__).resolve().parent / "recipes"


@dataclass(frozen=True)
class Job:
    """One run of a tool; `method` is a peer's method or our recipe's name."""

    tool: str
    method: str
    scheme: str


def schemes(names: list[str] | None) -> list[str]:
    """Schemes in the order of `PEERS`; `fp8` and `awq` stand for groups of them."""
    wanted = {scheme for name in names or PEERS for scheme in ALIASES.get(name, [name])}
    return [scheme for scheme in PEERS if scheme in wanted]


def recipe_spec(name: str) -> str:
    """The value of `--recipe`: the path of a recipe from here, else the name."""
    path = OWN / f"{name}.yaml"
    if path.is_file():
        return str(path)
    return str(Path(name).resolve()) if Path(name).is_file() else name


def find_recipe(name: str) -> Recipe:
    """A shipped recipe, one of `OWN`, or any YAML file."""
    return load_recipe(recipe_spec(name))


def scheme_of(recipe: Recipe) -> str:
    """The name of the scheme that a recipe's last rule stores."""
    values = next(rule.scheme for rule in reversed(recipe.rules) if rule.scheme).to_dict()
    activations = str(values.get("activations") or "")
    if values["type"] == "float" and values["num_bits"] == 4:
        return {"e8m0": "mxfp4", "e4m3": "nvfp4"}[values["scale_dtype"]]
    if values["type"] == "float":
        return {"block": "fp8-block"}.get(
            values["strategy"], f"fp8-{'static' if 'static' in activations else 'dynamic'}"
        )
    if activations:
        return "int8"
    grain = f"g{values['group_size']}" if values["strategy"] == "group" else values["strategy"]
    return f"w{values['num_bits']}-{grain}{'' if values['symmetric'] else '-asym'}"


def jobs(wanted: list[str], peers: list[str], recipes: list[str] | None) -> list[Job]:
    """Every run that is asked for.

    A default recipe that this version lacks is left out with a note. A named recipe runs even where no peer stores the
    scheme of its last rule.
    """
    ours = []
    for name in recipes if recipes is not None else RECIPES:
        try:
            ours.append(Job("ours", name, scheme_of(find_recipe(name))))
        except RecipeError as error:
            if recipes:
                raise
            print(f"left out: {error}", file=sys.stderr)
    theirs = [Job(p, m, s) for s in wanted for p in peers for m in PEERS[s].get(p, [])]
    alone = dict.fromkeys(job.scheme for job in ours if recipes and job.scheme not in PEERS)
    run = (*wanted, *alone)
    for job in ours:
        if recipes and job.scheme not in run:
            print(f"left out: {job.method} counts as {job.scheme}, which --scheme does not name", file=sys.stderr)
    return [job for scheme in run for job in (*ours, *theirs) if job.scheme == scheme]
