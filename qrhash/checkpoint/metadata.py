"""What is saved beside the arrays: the configs that give the numbers their meaning, as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qrhash.arithmetic import typed_fields
from qrhash.config import EmbedConfig
from qrhash.dynamic.config import DynamicConfig
from qrhash.parts import Shared
from qrhash.stacks import CollectionConfig

# What an id's numbers depend on. The names of logical axes, the mesh and the like do not matter.
_FIELDS = ("partition", "operation", "features", "widths", "use_bias", "param_dtype")

# What an admission judges by: with another one it judges the candidates of the checkpoint anew.
_JUDGED_BY = ("threshold", "probability", "seed", "halve_every")

# What to do about another one, where something can be done.
_ADVICE = {
    "capacity": "restore it with the capacity of the checkpoint, then call qrhash.dynamic.grow, or "
    "grow_all.",
    "admission": "restore it with that of the checkpoint, then take dataclasses.replace(state, "
    "admission=init_state(config).admission): keys keep their rows, candidates are counted anew.",
}


class MismatchError(ValueError):
    """A checkpoint of another model, or none where one is wanted."""


def describe(config: Any) -> dict[str, Any]:
    """The configs of features as JSON."""
    if isinstance(config, DynamicConfig):
        return {"": _describe_dynamic(config)}
    if isinstance(config, Mapping):
        dynamic = {name: c for name, c in config.items() if isinstance(c, DynamicConfig)}
        others = {name: each for name, each in config.items() if name not in dynamic}
        owners = (getattr(each, "owner", each) for each in others.values())
        # One that is shared is of a collection, as are all beside it.
        if dynamic and not any(isinstance(each, str) and each in dynamic for each in owners):
            # Nothing depends on their order.
            of_dynamic = {name: _describe_dynamic(dynamic[name]) for name in sorted(dynamic)}
            return (describe(others) if others else {}) | of_dynamic
        config = CollectionConfig(config)
    if isinstance(config, EmbedConfig):
        return {"": _describe_one(config)}
    if not isinstance(config, CollectionConfig):
        raise ValueError(
            "config must be an EmbedConfig, a DynamicConfig, a CollectionConfig or a mapping of "
            f"names to configs, got {config!r}."
        )
    return {name: _describe_embedding(value) for name, value in config.embeddings}


def _describe_embedding(value: Any) -> Any:
    if isinstance(value, Shared):
        return _describe_shared(value)
    return _describe_dynamic(value) if isinstance(value, DynamicConfig) else _describe_one(value)


def _describe_shared(shared: Shared) -> Any:
    if shared.partition is None:
        return shared.owner
    return {"owner": shared.owner, "partition": _plain(shared.partition)}


def _describe_one(config: EmbedConfig) -> dict[str, Any]:
    return {field: _plain(getattr(config, field)) for field in _FIELDS}


def _describe_dynamic(config: DynamicConfig) -> dict[str, Any]:
    values = typed_fields(config.admission)
    kind = values.pop("type")
    sizes = ", ".join(f"{k}={v}" for k, v in values.items() if k not in _JUDGED_BY)
    described = {
        "capacity": config.capacity,
        "features": config.features,
        "param_dtype": str(config.param_dtype),
        "admission": f"{kind}({sizes})",
    }
    if config.refused is None:
        return described | {"refused_value": config.refused_value}
    of_refused = _describe_one(config.refused)
    return described | {f"refused.{name}": value for name, value in of_refused.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, str)):
        return value
    return list(value) if isinstance(value, tuple) else str(value)


def check_extra(extra: Any) -> None:
    """Raises a ValueError unless JSON can hold it."""
    try:
        back = json.loads(json.dumps(extra))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"extra must be what JSON can hold: {error}.") from error
    if not _same_keys(extra, back):
        raise ValueError(
            f"extra must be what JSON can hold, dictionaries whose keys are text, got {extra!r}."
        )


def _same_keys(value: Any, back: Any) -> bool:
    """Whether dictionaries still have their keys: JSON makes text of numbers."""
    if isinstance(value, dict):
        return value.keys() == back.keys() and all(_same_keys(value[k], back[k]) for k in value)
    if isinstance(value, (list, tuple)):
        return all(map(_same_keys, value, back))
    return True


def compare(where: Path, what: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a MismatchError unless both are the same."""
    for name in {**saved, **wanted}:
        if name not in saved or name not in wanted:
            side, other = ("model", "checkpoint") if name in wanted else ("checkpoint", "model")
            raise MismatchError(
                f"{where} is of another model: {what} {name!r} is in the {side} alone, not in the "
                f"{other}."
            )
        ours, theirs, advice = wanted[name], saved[name], ""
        if ours == theirs:
            continue
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            pairs = {of: (ours.get(of), theirs.get(of)) for of in {**theirs, **ours}}
            field = next(of for of, (our, their) in pairs.items() if our != their)
            ours, theirs, named = *pairs[field], f"{field} of {what} {name!r}"
            advice = f" {_ADVICE[field]}" if field in _ADVICE else ""
        else:
            named = f"{what} {name!r}"
        raise MismatchError(
            f"{where} is of another model: {named} is {theirs} in the checkpoint, {ours} in the "
            f"model{':' if advice else '.'}{advice}"
        )
