"""A finished run, or any PEFT adapter, opened to be evaluated and tried."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flocktune.allocation import allocate_clients
from flocktune.config.load import build_config, load_recipe
from flocktune.config.schema import Columns, EvaluationConfig, LoraConfig, ModelConfig, RunConfig
from flocktune.data.encoding import encode_prompt
from flocktune.data.examples import Example, Message
from flocktune.emulation import compress, emulator_settings
from flocktune.errors import Problem, UserError, near, reason
from flocktune.evaluation.evaluate import Evaluation, evaluate
from flocktune.evaluation.generate import stream_answer
from flocktune.files import read_json
from flocktune.models.bundle import MANIFEST, Bundle, read_bundle
from flocktune.models.lora import attach, pairs
from flocktune.models.lora_module import scale
from flocktune.models.peft_io import CONFIG_FILE, import_peft, unfolded
from flocktune.report.events import LOG_NAME, read_events
from flocktune.resident import Base, forget_models, load_base, load_instructions
from flocktune.run_folder import EXPERIMENT, PROMPTING
from flocktune.types import Tensors


@dataclass(frozen=True, eq=False)
class Tuned:
    """A base model with a trained adapter in it, and the recipe that says how to speak to it."""

    config: RunConfig
    base: Base
    adapter: Tensors


def open_result(
    path: Path,
    method: str | None = None,
    base_model: str | None = None,
    *,
    emulator: bool = False,
    beside: Tuned | None = None,
) -> Tuned:
    """Open a run's folder, a comparison's (``method`` chooses), or a PEFT adapter's.

    ``emulator``: FedBiOT's adapter on the emulator, as clients have it, not in the full model. ``beside``: another
    result that is open; on the same base the two share it, and of their adapters only this one is then attached.
    Raises UserError.
    """
    if emulator:
        if (path / CONFIG_FILE).exists() or base_model:
            got = "an adapter's folder" if (path / CONFIG_FILE).exists() else "a base model of your own (--base)"
            raise UserError(Problem("--as emulator", "a run's folder, which holds its emulator", got))
        return _open_emulator(find_run(path, method))
    if (path / CONFIG_FILE).exists():
        tensors, lora = import_peft(path)
        named = base_model or read_json(path / CONFIG_FILE).get("base_model_name_or_path")
        if not named:
            raise UserError(Problem(str(path), "an adapter that names its base model", "none", "Name it: --base"))
        # Without our own file beside it, the adapter was trained elsewhere: Alpaca's template is the usual one.
        data = read_json(path / PROMPTING) if (path / PROMPTING).exists() else {}
        config = replace(build_config({"data": data}), model=ModelConfig(path=named), lora=_attachable(lora, tensors))
    else:
        run = find_run(path, method)
        tensors, lora = import_peft(run / "adapter")
        config = load_recipe(run / "recipe.yaml")
        # FedBiOT's adapter is on some layers only: the files say on which, not the recipe.
        within = lora if config.method == "fedbiot" else config.lora
        config = replace(config, lora=replace(within, start_from=None))
        if base_model:
            config = replace(config, model=replace(config.model, path=base_model))
    base = _shared(config, beside) or load_base(config.model, config.lora, config.runtime.device)
    adapter = unfolded(tensors, lora, config.lora.rank)
    base.adapter.load(adapter)
    return Tuned(config, base, adapter)


def _shared(config: RunConfig, other: Tuned | None) -> Base | None:
    """The other result's model with an adapter as ``config`` has it; None when it is another model."""
    if other is None or _same_base(config) != _same_base(other.config):
        return None
    model = other.base.adapter.detach()
    forget_models()  # nobody else may find this model with now one adapter in it, now another
    return replace(other.base, adapter=attach(model, config.lora, seed=0))


def _same_base(config: RunConfig) -> tuple[ModelConfig, str]:
    """What two recipes that load the same model have in common."""
    folder = Path(config.model.path).expanduser()
    path = str(folder.resolve()) if folder.is_dir() else config.model.path
    return replace(config.model, path=path, gradient_checkpointing=False), config.runtime.device


def _attachable(lora: LoraConfig, tensors: Tensors) -> LoraConfig:
    """``lora`` with the largest rank that a trained adapter may have: a side adapter makes an exported one larger."""
    rank = min([lora.rank, *(side for a, b in pairs(tensors).values() for side in (a.shape[1], b.shape[0]))])
    if rank == lora.rank:
        return lora
    return replace(lora, rank=rank, alpha=scale(lora) * (math.sqrt(rank) if lora.rslora else rank))


def _open_emulator(run: Path) -> Tuned:
    config = load_recipe(run / "recipe.yaml")
    if config.method != "fedbiot":
        raise UserError(Problem("--as", "full, for a run without an emulator", f"emulator ({run} is {config.method})"))
    bundle = _own_bundle(run)
    tensors, lora = import_peft(run / "emulator_adapter")
    model = replace(config.model, path=str(bundle.folder), quantization=emulator_settings(config).quantization)
    config = replace(config, model=model, lora=lora)
    base = load_base(config.model, config.lora, config.runtime.device)
    base.adapter.load(tensors)
    return Tuned(config, base, tensors)


def _own_bundle(run: Path) -> Bundle:
    """The run's emulator, and no other that was put in its place. Raises UserError."""
    start = next((event for event in read_events(run / LOG_NAME) if event["event"] == "run_start"), {})
    digest = str(start.get("emulator", {}).get("digest", ""))
    if not (run / "emulator" / MANIFEST).exists():
        what = f"this run's emulator, {digest[:12]}..."
        raise UserError(
            Problem(str(run / "emulator"), what, "nothing there", "Bring it back from a copy, or run again.")
        )
    return read_bundle(run / "emulator", digest=digest)


def find_run(path: Path, method: str | None = None) -> Path:
    """The finished run that ``path`` means. In a comparison: ``method``'s, else its own method's, of the first seed."""
    if not (path / "recipe.yaml").exists():
        raise UserError(
            Problem(
                str(path),
                f"a run's folder, or an adapter's with {CONFIG_FILE}",
                "neither" if path.exists() else "nothing there",
                near(path) or "Start a run with: flocktune run RECIPE",
            )
        )
    run = path
    if (path / EXPERIMENT).exists():
        seeds = read_json(path / EXPERIMENT)["seeds"]
        place = path if len(seeds) == 1 else path / f"seed-{seeds[0]}"
        run = place / (method or load_recipe(path / "recipe.yaml").method)
        if not run.is_dir():
            there = sorted(entry.parent.name for entry in place.glob("*/recipe.yaml"))
            raise UserError(Problem("--method", f"one of {', '.join(there) or 'the finished runs'}", repr(run.name)))
    if not (run / "adapter" / CONFIG_FILE).exists():
        raise UserError(
            Problem(str(run), "a finished run", "one without an adapter yet", f"Finish it: flocktune resume {path}")
        )
    return run


def evaluate_on(
    tuned: Tuned,
    data: str | None = None,
    max_rows: int | None = None,
    settings: EvaluationConfig | None = None,
    columns: Columns | None = None,
) -> Evaluation:
    """Evaluate on a data source, or on the run's own held-out rows. Raises UserError.

    ``settings``: default, the run's. ``columns`` of ``data``: default, the run's. Of preference data the chosen
    answers are the ones to give.
    """
    config, base = tuned.config, tuned.base
    if data is None:
        rows = allocate_clients(config).test
    else:
        reading = replace(config.data, max_rows=None, columns=columns or config.data.columns)
        rows = load_instructions(data, reading, config.model)
    return evaluate(
        base.model,
        base.tokenizer,
        rows.examples,
        rows.encoded.chosen(),
        settings=settings or config.evaluation,
        template=config.data.template,
        max_tokens=config.data.max_tokens,
        pad_id=base.pad_id,
        max_rows=max_rows,
    )


def answer_stream(
    tuned: Tuned,
    instruction: str,
    context: str = "",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    history: tuple[Message, ...] = (),
) -> Generator[str, None, None]:
    """The answer to one instruction after ``history``, piece by piece, with the prompt template of the training."""
    config, base = tuned.config, tuned.base
    example = Example(instruction, context, history=history)
    prompt = encode_prompt(example, base.tokenizer, template=config.data.template, max_tokens=config.data.max_tokens)
    return stream_answer(
        base.model, base.tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )


def compress_model(model: str, settings: Mapping[str, Any], public: str, to: Path) -> Bundle:
    """Write the emulator of ``model``, as the recipe's ``emulator`` settings say, to ``to``. Raises UserError."""
    if to.exists():
        raise UserError(Problem(str(to), "a new folder", "one that exists", "Choose another: --to"))
    tree = {"method": "fedbiot", "model": {"path": model}, "emulator": settings, "alignment": {"public": public}}
    try:
        to.absolute().parent.mkdir(parents=True, exist_ok=True)
        return compress(build_config(tree), to)
    except OSError as error:
        raise UserError(Problem(str(to), "a folder that can be written", reason(error))) from None
