"""`dsv3 inspect`: what a checkpoint folder or a bundled config holds, from headers alone."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

MAX_NAMES = 20


def add_parser(subparsers: Any) -> None:
    """Adds the command to `dsv3`."""
    parser = subparsers.add_parser(
        "inspect",
        help="show config, parameters and tensors",
        description="Show the config, the parameters by component and the bytes by dtype, and for a folder "
        "whether its tensors are those of the model (exit code 1 if not). Only headers are read.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="DIR|CONFIG_NAME", help="checkpoint folder, or a name in configs/")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns 1 where tensors and model do not agree. Raises InputError."""
    facts = describe(args.model)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else "\n".join(report_lines(facts)))
    return 0 if facts.get("tensors", {}).get("agree", True) else 1


def describe(model: str) -> dict[str, Any]:
    """All facts as a JSON object.

    Args:
        model: a checkpoint folder, or else the name of a bundled config.

    Returns:
        `model`; `config` (as in config.json); `parameters` (counts by component, and the fields of
        `ParameterCounts`); `bytes` by dtype; for a folder also `tensors`: `expected`, `as_expected`, `agree`,
        and the lines on those that are `missing`, `unexpected`, of `wrong_shape`, of `wrong_dtype`.

    Raises:
        InputError: neither a checkpoint folder nor a config; a file is missing, truncated or corrupt.
    """
    from dsv3_jax.checkpoint.folder import open_checkpoint
    from dsv3_jax.checkpoint.hf_config import config_fields
    from dsv3_jax.checkpoint.summary import bytes_by_dtype, count_parameters, expected_bytes_by_dtype
    from dsv3_jax.checkpoint.verify import compare
    from dsv3_jax.config import named_config

    tensors = None
    if Path(model).is_dir() or "/" in model:
        checkpoint = open_checkpoint(model)
        comparison = compare(checkpoint)
        config, sizes = comparison.config, bytes_by_dtype(checkpoint)
        tensors = dataclasses.asdict(comparison) | {"agree": comparison.agrees()}
        del tensors["config"]
        fields = config_fields(checkpoint.config)
    else:
        config = named_config(model)
        fields, sizes = config_fields(config), expected_bytes_by_dtype(config)
    facts = {"model": model, "config": fields, "parameters": dataclasses.asdict(count_parameters(config))}
    facts["bytes"] = sizes
    return facts if tensors is None else facts | {"tensors": tensors}


def report_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `describe` as text."""
    lines = [str(facts["model"]), "", "config"]
    lines += [f"  {name:32} {json.dumps(value)}" for name, value in facts["config"].items()]
    lines += ["", "parameters (scales not counted)", *_parameter_lines(facts)]
    lines += [
        "",
        "bytes" if "tensors" in facts else "bytes (of the weights in the format that the config names)",
    ]
    sizes = facts["bytes"] | {"total": sum(facts["bytes"].values())}
    lines += [f"  {name:24} {size:>19,}  {_short(size, 'G')}B" for name, size in sizes.items()]
    if "tensors" in facts:
        lines += ["", *_tensor_lines(facts["tensors"])]
    return lines


def _parameter_lines(facts: dict[str, Any]) -> list[str]:
    counts, config = facts["parameters"], facts["config"]
    chosen = f"{config['num_experts_per_tok']} of {config['n_routed_experts']} routed experts, no embedding"
    rows = [(name.replace("_", " "), count, "") for name, count in counts["components"].items()]
    rows += [("total", counts["total"], ""), ("activated per token", counts["activated"], chosen)]
    if counts["mtp"]:
        rows += [
            ("MTP", counts["mtp"], "not in the total"),
            ("MTP as stored", counts["mtp_stored"], "with its copies of embedding and head"),
        ]
    elif config["num_nextn_predict_layers"]:
        rows.append(("MTP", 0, "announced by config.json, but not in the files"))
    return [f"  {name:24} {count:>19,}  {_short(count, 'B')}  {note}".rstrip() for name, count, note in rows]


def _short(number: int, billion: str) -> str:
    """A number in thousands, millions or billions, with that unit."""
    for unit, power in ((billion, 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= power:
            return f"{number / power:7.2f} {unit}"
    return f"{number:7d}  "


def _tensor_lines(tensors: dict[str, Any]) -> list[str]:
    lines = [f"{tensors['as_expected']} of {tensors['expected']} tensors as expected"]
    problems = [
        f"  {kind.replace('_', ' ')}: {line}"
        for kind in ("missing", "unexpected", "wrong_shape", "wrong_dtype")
        for line in tensors[kind]
    ]
    lines += problems[:MAX_NAMES]
    if len(problems) > MAX_NAMES:
        lines.append(f"  and {len(problems) - MAX_NAMES} more")
    return lines
