"""A finished run as a folder to take away: a PEFT adapter or a merged model, with tokenizer, card and recipe."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from safetensors import SafetensorError

from flocktune.config.load import load_recipe
from flocktune.data.chat_template import served_template
from flocktune.data.modelfile import modelfile
from flocktune.errors import Problem, UserError, reason
from flocktune.files import open_to_readers, read_json, write_atomic, write_json
from flocktune.models.load import load_tokenizer, quietly
from flocktune.models.peft_io import CONFIG_FILE
from flocktune.models.vllm_layout import max_lora_rank, vllm_problems
from flocktune.report.card import Export, hub_id, model_card, shared_recipe
from flocktune.report.runs import load_experiment
from flocktune.resident import forget_models
from flocktune.results import Tuned, find_run, open_result
from flocktune.run_folder import EXPERIMENT, write_adapter

_LOG = logging.getLogger(__name__)


def export_result(
    path: Path, method: str | None, to: Path, *, merged: bool = False, base_name: str | None = None
) -> Path:
    """Write a PEFT adapter, or the merged transformers model; with its tokenizer, a model card and the recipe.

    ``base_name``: what the base model is called elsewhere, such as its hub id; default: what the recipe calls it. The
    tokenizer's chat template is the run's prompt template. Raises UserError; never overwrites.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        got = "one with files in it" if to.is_dir() else "a file"
        raise UserError(Problem(str(to), "a new or empty folder", got, "Choose another: --to"))
    tuned = open_result(path, method)
    try:
        to.mkdir(parents=True, exist_ok=True)
        if merged:
            with quietly():
                tuned.base.adapter.merge().save_pretrained(to)
            forget_models()  # the resident model is no longer the base
        else:
            write_adapter(to, tuned.adapter, tuned.config, tuned.base.model, base_name)
        templated = _write_tokenizer(tuned, to, merged=merged)
        _write_card(path, method, to, merged, base_name, templated)
        open_to_readers(to)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(to, ignore_errors=True)  # it was new or empty; half a model must not be taken for one
        raise UserError(
            Problem(
                str(to), "a folder that can be written", reason(error) if isinstance(error, OSError) else str(error)
            )
        ) from None
    return to


def _write_tokenizer(tuned: Tuned, to: Path, *, merged: bool) -> bool:
    """The tokenizer with the run's template as its chat template; False when there is none that fits. And Ollama's."""
    tokenizer = load_tokenizer(tuned.config.model)  # one of its own: the resident one stays as it is
    with quietly():
        chat_template = served_template(tuned.config.data.template, tokenizer)
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(to)
    if merged and (text := modelfile(tuned.config.data.template, tokenizer)):
        write_atomic(to / "Modelfile", text)
    settings = read_json(to / "tokenizer_config.json")
    if (
        settings.get("tokenizer_class") == "TokenizersBackend"
    ):  # which only transformers 5 knows; this is its older name
        write_json(to / "tokenizer_config.json", {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    if chat_template is None:
        _LOG.warning("no chat template gives this tokenizer the training's tokens: %s carries none", to)
    return chat_template is not None


def _write_card(path: Path, method: str | None, to: Path, merged: bool, base_name: str | None, templated: bool) -> None:
    run = find_run(path, method)
    config = load_recipe(run / "recipe.yaml")
    written = None if merged else read_json(to / CONFIG_FILE)["r"]
    usable = written and not vllm_problems(to)
    export = Export(
        key=run.name if (path / EXPERIMENT).exists() else config.method,
        config=config,
        base=base_name or hub_id(config.model.path),
        merged=merged,
        chat_template=templated,
        rank=written or config.lora.rank,
        max_lora_rank=max_lora_rank(written) if usable and written else None,
    )
    write_atomic(to / "README.md", model_card(export, load_experiment(path)))
    write_atomic(to / "training_recipe.yaml", shared_recipe(config))
